"""The training application that `conf/hydra_ckpt_train.yaml` composes: a small Llama on bytes, from start to export.

Run it with `hydra-ckpt-train`, `python -m hydra_ckpt.recipe` or `torchrun ... -m hydra_ckpt.recipe`. One module per
subject: settings, session, mesh, tokenizer, data, model, optimization, reporting; `train` puts them together.
"""
