"""Modules of real libraries: their own state_dict adds nothing new, and their wrappers leave no trace."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations

from hydra_ckpt import AppState
from hydra_ckpt.state.capture import Extractor
from hydra_ckpt.testing import run_distributed
from tests.apart import allow, is_installed
from tests.hub_models import llama
from tests.test_oracle import load, save, values

needs_lightning = pytest.mark.skipif(not importlib.util.find_spec("lightning"), reason="lightning is not installed")
needs_torchao = pytest.mark.skipif(not is_installed("torchao"), reason="torchao is not installed")


def entries(model: nn.Module, *, is_peft: bool = False) -> list[str]:
    """Names of what the oracle finds beside what was walked."""
    extractor = Extractor(is_peft)
    state = AppState(model)
    extractor.capture(state)
    return [
        name
        for mapped in extractor.maps(state).values()
        for part in mapped.beyond.told("model").entries
        for name in part
    ]


def is_asked(model: nn.Module) -> bool:
    """Whether the model's state_dict() is called at each save."""
    return Extractor().maps(AppState(model))[""].beyond.customizes_saving


def words() -> torch.Tensor:
    return torch.arange(8).reshape(1, 8)


def norm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


def checkpointed() -> nn.Module:
    model = llama()
    apply_activation_checkpointing(model, check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer")
    return model


def unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "compiled": lambda: torch.compile(llama(), backend="eager"),
    "checkpointed": checkpointed,
    "norm": norm,
    "old weight norm": lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 4)),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 8),
    "unet": unet,
}


@pytest.mark.parametrize("kind", PLAIN)
def test_models_without_customization_tell_nothing_new(kind: str) -> None:
    assert entries(PLAIN[kind]()) == []


@pytest.mark.parametrize("kind", [kind for kind in PLAIN if kind != "checkpointed"])
def test_the_state_dict_of_a_model_without_customization_is_never_asked_for(kind: str) -> None:
    assert not is_asked(PLAIN[kind]())


def test_a_lora_model_tells_nothing_new() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    assert entries(model, is_peft=True) == []


def test_a_model_that_accelerate_has_prepared_tells_nothing_new() -> None:
    from accelerate import Accelerator

    assert entries(Accelerator(cpu=True).prepare(llama())) == []


@needs_torchao
def test_a_float8_model_tells_nothing_new() -> None:
    allow("torchao")
    from torchao.float8 import convert_to_float8_training

    model = llama()
    convert_to_float8_training(model.model)
    assert entries(model) == []


def _parallel(kind: str) -> list[str]:
    model: nn.Module = llama()
    if kind == "float8":
        allow("torchao")
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        convert_to_float8_training(model.model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if kind == "mixed" else MixedPrecisionPolicy()
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    if kind != "float8":  # it computes on accelerators only
        model(input_ids=words())
    return entries(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "mixed", pytest.param("float8", marks=needs_torchao)])
def test_parallel_models_tell_nothing_new_after_a_forward_pass(kind: str) -> None:
    assert run_distributed(_parallel, 2, kind) == [[], []]


# -- Lightning Fabric ----------------------------------------------------------------------------------------------


@needs_lightning
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("is_compiled", [False, True])
def test_an_export_of_a_model_that_fabric_wraps_opens_under_plain_names(
    tmp_path: Path, is_tied: bool, is_compiled: bool
) -> None:
    import transformers
    from lightning.fabric import Fabric

    def make(seed: int) -> tuple[Any, Any]:
        torch.manual_seed(seed)
        fabric = Fabric(accelerator="cpu", devices=1)
        model = llama(tie_word_embeddings=is_tied)
        model = torch.compile(model, backend="eager") if is_compiled else model
        return fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.01))

    def train(model: Any, optimizer: Any) -> None:
        for _ in range(2):
            model(input_ids=words(), labels=words()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.compiler.set_stance("force_eager")
    model, optimizer = make(0)
    train(model, optimizer)
    save(tmp_path, AppState(model, optimizer), save_consolidated="always")
    opened = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "LATEST" / "model" / "consolidated")
    assert torch.equal(opened(words()).logits, model(words()).logits)
    again, restored = make(1)
    report = load(tmp_path, AppState(again, restored))
    assert {"model", "optimizer"} <= set(report.exact)
    train(model, optimizer)
    train(again, restored)
    torch.compiler.set_stance("default")
    assert all(map(torch.equal, values(model), values(again)))


# -- adapters ------------------------------------------------------------------------------------------------------


class Quantized(nn.Linear):
    """A frozen layer that saves more than its weight, as bitsandbytes' do."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.absmax = torch.ones(3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight.absmax"] = self.absmax
        destination[prefix + "weight.quant_state"] = print  # nothing that could be stored

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        assert state_dict.pop(prefix + "weight.quant_state") is print
        self.absmax = state_dict.pop(prefix + "weight.absmax")
        super()._load_from_state_dict(state_dict, prefix, *args)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.head = Quantized(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.one(x))


def test_entries_of_an_adapter_come_back_and_those_of_its_frozen_base_are_left_alone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make(seen: int) -> nn.Module:
        model = peft.get_peft_model(Base(), peft.LoraConfig(target_modules=["one"], modules_to_save=["head"]))
        layer = model.base_model.model.one.lora_A["default"]
        head = model.base_model.model.head.modules_to_save["default"]
        for module in (layer, head):
            module.seen = seen
            module.register_state_dict_post_hook(
                lambda item, state, prefix, _: state.update({prefix + "seen": torch.tensor(item.seen)})
            )
            module.register_load_state_dict_pre_hook(
                lambda item, state, prefix, *_: setattr(item, "seen", int(state.pop(prefix + "seen")))
            )
        return model

    model, again = make(7), make(0)
    kept = again.base_model.model.one.base_layer.weight.detach().clone()
    save(tmp_path, AppState(model), is_peft=True, save_consolidated="always")
    report = load(tmp_path, AppState(again), is_peft=True)
    assert "model" in report.exact
    assert again.base_model.model.one.lora_A["default"].seen == 7
    assert again.base_model.model.head.modules_to_save["default"].seen == 7
    assert torch.equal(again.base_model.model.one.base_layer.weight, kept)
