"""What all tests share: a server to fork processes from that has imported what most of them need."""

from __future__ import annotations

from hydra_ckpt.testing.processes import PRELOADED

PRELOADED += ["hydra._internal.hydra", "peft", "pytest", "transformers.modeling_utils"]
