"""Experts stacked in memory and sharded over ranks, one tensor for each in Hugging Face files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from hydra_ckpt import AppState, CheckpointingConfig, KeyMismatchError, SaveFailedError, TopologyError
from hydra_ckpt.state.adapter import StackedExperts, adapter_naming
from hydra_ckpt.state.local import Localizer
from hydra_ckpt.testing import run_distributed

transformers = pytest.importorskip("transformers")

MODELS = ["mixtral", "qwen3"]


def tiny(kind: str, seed: int = 1) -> nn.Module:
    """Four experts in two layers."""
    torch.manual_seed(seed)
    common = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "mixtral":
        config = transformers.MixtralConfig(
            **common, vocab_size=31, intermediate_size=20, num_local_experts=4, num_experts_per_tok=2
        )
        return transformers.MixtralForCausalLM(config)
    config = transformers.Qwen3MoeConfig(
        **common,
        vocab_size=31,
        head_dim=6,
        intermediate_size=14,
        moe_intermediate_size=20,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.Qwen3MoeForCausalLM(config)


def adapter_for(kind: str) -> StackedExperts:
    return StackedExperts.mixtral() if kind == "mixtral" else StackedExperts.qwen_moe()


class Run:
    """A model whose experts lie on the ranks of a mesh, the rest sharded by FSDP; trained by gradients of its names."""

    def __init__(self, kind: str, ep: int, seed: int, *, own_adapter: bool = True) -> None:
        world = dist.get_world_size() if dist.is_initialized() else 1
        self.model = tiny(kind, seed)
        if own_adapter:
            self.model.state_dict_adapter = adapter_for(kind)
        self.moe_mesh = None
        if world > 1:
            # Experts over `ep`, their rows over the rest, as expert parallelism with FSDP has them.
            mesh = init_device_mesh("cpu", (ep, world // ep), mesh_dim_names=("ep", "ep_shard"))
            self.moe_mesh = mesh
            experts = set()
            for module in list(self.model.modules()):
                for name, parameter in list(module.named_parameters(recurse=False)):
                    if name in ("gate_up_proj", "down_proj"):
                        whole = distribute_tensor(parameter.detach(), mesh, [Shard(0), Shard(1)])
                        setattr(module, name, nn.Parameter(whole))
                        experts.add(getattr(module, name))
            fully_shard(self.model, mesh=init_device_mesh("cpu", (world,)), ignored_params=experts)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.state = AppState(self.model, self.optimizer)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for name, parameter in self.model.named_parameters():
                parameter.grad = gradient(name, parameter)
            self.optimizer.step()

    def everything(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = full(parameter)
            found.update({f"{name}:{key}": full(value) for key, value in self.optimizer.state[parameter].items()})
        return found

    def engine(self, directory: Path, **options: Any) -> Any:
        config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
        return config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0, self.moe_mesh)


def gradient(name: str, parameter: torch.Tensor) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    if isinstance(parameter, DTensor):
        noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
    return parameter.detach() * 0.1 + noise


def full(tensor: torch.Tensor) -> torch.Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name


def _save(directory: Path, kind: str, ep: int, options: dict[str, Any], own_adapter: bool) -> None:
    run = Run(kind, ep, 1, own_adapter=own_adapter)
    run.train(2)
    with run.engine(directory, **options) as engine:
        engine.save(run.state, step=2).result()


def _load(directory: Path, kind: str, ep: int) -> dict[str, torch.Tensor]:
    run = Run(kind, ep, 2)
    with run.engine(directory) as engine:
        report = engine.load(run.state)
    assert report.step == 2
    return run.everything()


def saved_by_transformers(model: nn.Module, directory: Path) -> dict[str, torch.Tensor]:
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


@pytest.mark.parametrize(
    "kind", [kind if kind == "mixtral" else pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS]
)
def test_experts_move_between_ranks_and_the_export_is_what_transformers_saves(tmp_path: Path, kind: str) -> None:
    reference = Run(kind, 1, 1)
    reference.train(2)
    wanted = reference.everything()
    run_distributed(_save, 2, tmp_path / "run", kind, 2, {"save_consolidated": "always"}, True)
    export = tmp_path / "run" / "LATEST" / "model" / "consolidated"
    assert_same(load_file(export / "model.safetensors"), saved_by_transformers(reference.model, tmp_path / "theirs"))
    assert_same(_load(tmp_path / "run", kind, 1), wanted)
    for found in run_distributed(_load, 4, tmp_path / "run", kind, 2):
        assert_same(found, wanted)
    opened = type(reference.model).from_pretrained(export)
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        assert torch.equal(opened(tokens).logits, reference.model(tokens).logits)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_consolidated": "always", "is_async": True},
        {"save_consolidated": "always", "shared_writes": False},
        {"model_save_format": "torch_save"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize(("kind", "own_adapter"), [("mixtral", True), ("qwen3", False)])
def test_any_expert_mesh_continues_as_any_other(
    tmp_path: Path, kind: str, world: int, ep: int, options: dict[str, Any], own_adapter: bool
) -> None:
    reference = Run(kind, 1, 1)
    reference.train(2)
    run_distributed(_save, world, tmp_path / "run", kind, ep, options, own_adapter)
    for target, size in [(1, 1), (2, 2), (4, 1), (4, 4)]:
        for found in run_distributed(_load, target, tmp_path / "run", kind, size):
            assert_same(found, reference.everything())


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_of_transformers_needs_no_adapter(tmp_path: Path, kind: str) -> None:
    run = Run(kind, 1, 1, own_adapter=False)
    run.train(2)
    with run.engine(tmp_path / "run", save_consolidated="always") as engine:
        engine.save(run.state, step=2).result()
    exported = load_file(tmp_path / "run" / "LATEST" / "model" / "consolidated" / "model.safetensors")
    assert_same(exported, saved_by_transformers(run.model, tmp_path / "theirs"))
    assert_same(_load(tmp_path / "run", kind, 1), run.everything())


# -- other layouts in memory ---------------------------------------------------------------------------------------


class Separate(nn.Module):
    """The same model with a tensor for each expert, as its files have them; no adapter."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *places, last = name.split(".")
            owner: nn.Module = self
            for place in places:
                if not hasattr(owner, place):
                    owner.add_module(place, nn.Module())
                owner = getattr(owner, place)
            owner.register_parameter(last, nn.Parameter(tensor.clone()))


def _sharded(model: nn.Module) -> nn.Module:
    """Every tensor over all ranks, along its first dimension."""
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in model.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(0)])))
    return model


def _bare(directory: Path, kind: str, layout: str, seed: int, load: bool, options: dict[str, Any]) -> Any:
    """Save or load a model alone, held in one of three ways; returns its tensors under the names of memory."""
    model = tiny(kind, seed)
    if layout == "separate":
        model = Separate(adapter_for(kind).to_hf(model.state_dict()))
    if layout == "adapter":
        model.state_dict_adapter = adapter_for(kind)
    model = _sharded(model)
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    with config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0) as engine:
        if load:
            engine.load(AppState(model))
        else:
            engine.save(AppState(model), step=1).result()
    found = {name: full(parameter) for name, parameter in model.named_parameters()}
    return found if layout == "separate" else adapter_for(kind).to_hf(found)


FORMS = [{}, {"save_consolidated": "always"}, {"model_save_format": "torch_save"}]


@pytest.mark.parametrize(
    ("saved", "loaded", "options"),
    [("transformers", "separate", FORMS[0]), ("separate", "adapter", FORMS[1]), ("adapter", "separate", FORMS[2])],
)
def test_a_model_held_otherwise_in_memory_continues(
    tmp_path: Path, saved: str, loaded: str, options: dict[str, Any]
) -> None:
    _check_layouts(tmp_path, "mixtral", saved, loaded, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", FORMS, ids=str)
@pytest.mark.parametrize("loaded", ["separate", "adapter", "transformers"])
@pytest.mark.parametrize("saved", ["separate", "adapter", "transformers"])
@pytest.mark.parametrize("kind", MODELS)
def test_any_layout_in_memory_continues_as_any_other(
    tmp_path: Path, kind: str, saved: str, loaded: str, options: dict[str, Any]
) -> None:
    _check_layouts(tmp_path, kind, saved, loaded, options)


def _check_layouts(tmp_path: Path, kind: str, saved: str, loaded: str, options: dict[str, Any]) -> None:
    wanted = run_distributed(_bare, 2, tmp_path, kind, saved, 1, False, options)[0]
    for found in run_distributed(_bare, 2, tmp_path, kind, loaded, 2, True, options):
        assert_same(found, wanted)


def test_layouts_that_do_not_meet_are_told_in_the_names_of_the_files(tmp_path: Path) -> None:
    _bare(tmp_path, "mixtral", "transformers", 1, False, {})
    tensors = adapter_for("mixtral").to_hf(tiny("mixtral").state_dict())
    first, second, *_ = (name for name in tensors if ".experts." in name)
    tensors[first], tensors[f"{second}.more"] = torch.zeros(3), tensors.pop(second)
    model = Separate(tensors)
    with (
        CheckpointingConfig(checkpoint_dir=str(tmp_path)).build(0, 0, 0) as engine,
        pytest.raises(KeyMismatchError) as failure,
    ):
        engine.load(AppState(model))
    assert failure.value.missing == [f"{second}.more"]
    assert failure.value.mismatched == {first: "[20, 12] in the checkpoint's export, [3] in the model's"}


class Joining:
    """Files hold one tensor of what are two in memory."""

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"qk": torch.cat([state_dict["q"], state_dict["k"].T], dim=1)}

    def from_hf(self, hf_state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"q": hf_state_dict["qk"][:, :3], "k": hf_state_dict["qk"][:, 3:].T}


def _joined(directory: Path, seed: int, load: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = nn.Module()
    model.q, model.k = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 4))
    model.state_dict_adapter = Joining()
    model = _sharded(model)
    with CheckpointingConfig(checkpoint_dir=str(directory), save_consolidated="always").build(
        dist.get_rank() if dist.is_initialized() else 0, 0, 0
    ) as engine:
        if load:
            engine.load(AppState(model))
        else:
            engine.save(AppState(model), step=1).result()
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def test_an_adapter_may_join_tensors(tmp_path: Path) -> None:
    wanted, _ = run_distributed(_joined, 2, tmp_path, 1, False)
    assert_same(_joined(tmp_path, 2, True), wanted)
    [file] = (tmp_path / "LATEST" / "model" / "consolidated").glob("*.safetensors")
    assert torch.equal(load_file(file)["qk"], torch.cat([wanted["q"], wanted["k"].T], dim=1))


# -- what adapters may do ------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Names, dimensions and element types that differ from those in files."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 5).bfloat16())  # (experts, in, out)
        self.rows = nn.Parameter(torch.randn(6, 2).bfloat16())
        self.bias = nn.Parameter(torch.randn(3).bfloat16())
        self.state_dict_adapter: Any = Transposing()


class Transposing:
    """Takes experts out of a stack transposed, splits rows, adds a dimension, and wants one tensor in fp32."""

    def to_hf(self, state_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        found = {f"experts.{n}.weight": state_dict["stack"][n].T.contiguous() for n in range(3)}
        found["upper"], found["lower"] = state_dict["rows"][:2], state_dict["rows"][2:].clone()
        found["router.bias"] = state_dict["bias"].unsqueeze(0).float()
        return found

    def from_hf(self, hf_state_dict: dict[str, Any], device_mesh: Any = None, **_: Any) -> dict[str, Any]:
        return {
            "stack": torch.stack([hf_state_dict[f"experts.{n}.weight"].T for n in range(3)]),
            "rows": torch.cat([hf_state_dict["upper"], hf_state_dict["lower"]]),
            "bias": hf_state_dict["router.bias"].squeeze(0).bfloat16(),
        }


class Forcing(Transposing):
    """Says its element types as NeMo AutoModel's adapters do."""

    def forced_hf_dtype_mapping(self, state_dict: dict[str, Any]) -> dict[str, str]:
        return {"upper": "float32", "lower": "F32"}


def _save_odd(directory: Path, dim: int, seed: int, load: bool, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = Odd()
    model.state_dict_adapter = Forcing()
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for name, parameter in list(model.named_parameters()):
            placement = Shard(min(dim, parameter.dim() - 1))
            setattr(model, name, nn.Parameter(distribute_tensor(parameter.detach(), mesh, [placement])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = CheckpointingConfig(checkpoint_dir=str(directory), **options)
    with config.build(dist.get_rank() if dist.is_initialized() else 0, 0, 0) as engine:
        if load:
            engine.load(AppState(model, optimizer))
        else:
            engine.save(AppState(model, optimizer), step=1).result()
    return {name: full(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{"save_consolidated": "always"}, {"is_async": True}], ids=["export", "shards"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_transposed_split_and_cast_tensors_go_both_ways(tmp_path: Path, dim: int, options: dict[str, Any]) -> None:
    wanted, _ = run_distributed(_save_odd, 2, tmp_path, dim, 1, False, options)
    for found in run_distributed(_save_odd, 2, tmp_path, 2 - dim, 2, True, options):
        assert_same(found, wanted)
    assert_same(_save_odd(tmp_path, 0, 2, True, options), wanted)
    if "save_consolidated" in options:
        on_disk = load_file(tmp_path / "LATEST" / "model" / "consolidated" / "model.safetensors")
        expected = {
            **{f"experts.{n}.weight": wanted["stack"][n].T for n in range(3)},
            "upper": wanted["rows"][:2].float(),
            "lower": wanted["rows"][2:].float(),
            "router.bias": wanted["bias"].float().unsqueeze(0),
        }
        assert_same(on_disk, expected)


class Broken(Transposing):
    """Everything that can be wrong at once."""

    def to_hf(self, state_dict: dict[str, Any], **_: Any) -> dict[str, Any]:
        found = super().to_hf(state_dict)
        del found["experts.1.weight"]
        found["again"] = state_dict["rows"][1:3]
        found["sum"] = state_dict["bias"] + 1
        del found["router.bias"]
        return found

    def from_hf(self, hf_state_dict: dict[str, Any], device_mesh: Any = None, **_: Any) -> dict[str, Any]:
        return {"rows": hf_state_dict["upper"], "bias": hf_state_dict["sum"], "new": hf_state_dict["sum"]}


def _refused(directory: Path, broken_ranks: list[int]) -> str:
    model = Odd()
    if dist.get_rank() in broken_ranks:
        model.state_dict_adapter = Broken()
    with CheckpointingConfig(checkpoint_dir=str(directory)).build(dist.get_rank(), 0, 0) as engine:
        with pytest.raises((TopologyError, SaveFailedError)) as failure:
            engine.save(AppState(model), step=1).result()
        return str(failure.value)


@pytest.mark.parametrize("broken", [[0, 1], [1]], ids=["all", "one"])
def test_an_adapter_that_drops_or_doubles_is_refused_on_all_ranks(tmp_path: Path, broken: list[int]) -> None:
    for text in run_distributed(_refused, 2, tmp_path, broken):
        for words in (
            "Broken",
            "stack: to_hf drops 20 of its 60 elements",
            "upper and again: to_hf returns elements of rows twice",
            "lower and again: to_hf returns elements of rows twice",
            "sum: to_hf does not return it as a view of one tensor",
            "bias: to_hf drops it",
            "stack: from_hf does not return it",
            "new: from_hf returns it, but the model has no such tensor",
            "rows: from_hf returns it as [2, 2] instead of [6, 2]",
        ):
            assert words in text, (words, text)
    assert not list(tmp_path.glob("*epoch*"))


def _same_name_of_two_stages(directory: Path) -> str:
    """Each stage counts its layers from zero: both make the same name, of different tensors."""
    rank = dist.get_rank()

    class Counting:
        def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
            return {"layers.0": state_dict[f"layer{rank}"]}

    stage = nn.Module()
    stage.register_parameter(f"layer{rank}", nn.Parameter(torch.full((3,), float(rank))))
    stage.state_dict_adapter = Counting()
    with CheckpointingConfig(checkpoint_dir=str(directory)).build(0, 0, rank) as engine:
        with pytest.raises(TopologyError) as failure:
            engine.save(AppState([stage]), step=1)
        return str(failure.value)


def test_a_name_that_two_stages_make_of_different_tensors_is_refused(tmp_path: Path) -> None:
    for text in run_distributed(_same_name_of_two_stages, 2, tmp_path):
        assert "the adapter makes layers.0 from layer1 on rank 1, and from layer0 on rank 0" in text


def test_a_cast_that_loses_is_refused() -> None:
    class Narrowing(Transposing):
        def forced_hf_dtype_mapping(self, state_dict: dict[str, Any]) -> dict[str, str]:
            return {"upper": "F16"}

    model = Odd()
    model.state_dict_adapter = Narrowing()
    localize = Localizer()
    with pytest.raises(TopologyError, match=r"upper: torch\.bfloat16 cannot be stored as torch\.float16 without loss"):
        adapter_naming(model, [localize(name, tensor).spec for name, tensor in model.named_parameters()])


@pytest.mark.parametrize("kind", MODELS)
def test_the_shipped_adapters_agree_with_transformers(tmp_path: Path, kind: str) -> None:
    model = tiny(kind)
    wanted = saved_by_transformers(model, tmp_path)
    adapter = adapter_for(kind)
    state = model.state_dict()
    assert_same(adapter.to_hf(state), wanted)
    assert_same(adapter.from_hf(wanted), state)
