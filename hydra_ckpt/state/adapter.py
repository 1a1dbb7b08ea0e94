"""State-dict adapters: a model's own tensors under the names and in the shapes of its Hugging Face files.

A model that keeps its experts stacked, `(experts, out, in)`, is published with one tensor per expert. An adapter
defines how: `model.state_dict_adapter.to_hf(state_dict)`. It is never given the weights, but called once, and again
when shapes have changed, with tensors that have shapes and no memory (`hydra_ckpt.state.tracing`). So every rank knows
which bytes of the files its shards are, and writes and reads them through views of that memory: nothing is gathered,
nothing copied.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from math import prod
from typing import Any, Protocol

import torch
from torch import nn

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.tracing import Trace
from hydra_ckpt.storage.dtypes import TORCH_DTYPE, safetensors_dtype


class StateDictAdapter(Protocol):
    """Converts between a model's own state dict and its Hugging Face form; the model carries it as an attribute.

    An adapter may also have `forced_hf_dtype_mapping(state_dict)`, which maps Hugging Face names to the element type
    (`"float32"` or `"F32"`) that they have in files, whatever type training uses.
    """

    def to_hf(self, state_dict: dict[str, Any], /) -> dict[str, Any]:
        """Every tensor of the result is part of one of the argument: indexed, narrowed or transposed.

        It may also be several such parts joined by `torch.cat` or `torch.stack`.

        The argument may be one pipeline stage's part of the model.
        """

    def from_hf(self, hf_state_dict: dict[str, Any], /) -> dict[str, Any]:
        """The reverse. Only names and shapes of its result are checked: they must be those `to_hf` was given."""


class StackedExperts:
    """An adapter for experts stacked in one tensor each for gate and up projections together, and down projections.

    Shapes are `(experts, 2 * inner, hidden)` and `(experts, hidden, inner)`, the names end in `gate_up_proj` and
    `down_proj`: what transformers 5 has in memory. Use `StackedExperts.mixtral()` or `StackedExperts.qwen_moe()`.

    Args:
        own: What the name of the module that holds the stacks ends in.
        hf: The same in Hugging Face's names.
        gate: Name of a gate projection.
        up: Name of an up projection.
        down: Name of a down projection.
        renamed: Other parts of names that differ: ours to Hugging Face's.
    """

    def __init__(
        self, own: str, hf: str, gate: str, up: str, down: str, renamed: Mapping[str, str] | None = None
    ) -> None:
        self._own, self._hf = own, hf
        self._gate, self._up, self._down = gate, up, down
        self._renamed = dict(renamed or {})

    @classmethod
    def mixtral(cls) -> StackedExperts:
        """`block_sparse_moe.experts.<n>.w1`, `w3` and `w2`."""
        renamed = {".mlp.gate.": ".block_sparse_moe.gate."}
        return cls(".mlp.experts.", ".block_sparse_moe.experts.", "w1.weight", "w3.weight", "w2.weight", renamed)

    @classmethod
    def qwen_moe(cls) -> StackedExperts:
        """`mlp.experts.<n>.gate_proj`, `up_proj` and `down_proj`, as Qwen2-MoE and Qwen3-MoE have them."""
        place = ".mlp.experts."
        return cls(place, place, "gate_proj.weight", "up_proj.weight", "down_proj.weight")

    def to_hf(self, state_dict: dict[str, Any], /) -> dict[str, Any]:
        """See `StateDictAdapter`."""
        found: dict[str, Any] = {}
        for name, tensor in state_dict.items():
            place, separator, last = name.rpartition(self._own)
            if not separator or last not in ("gate_up_proj", "down_proj"):
                found[self._rename(name, forward=True)] = tensor
                continue
            for number in range(tensor.shape[0]):
                expert, stem = tensor[number], f"{place}{self._hf}{number}."
                if last == "down_proj":
                    found[stem + self._down] = expert
                else:
                    found[stem + self._gate], found[stem + self._up] = expert.chunk(2)
        return found

    def from_hf(self, hf_state_dict: dict[str, Any], /) -> dict[str, Any]:
        """See `StateDictAdapter`."""
        stacks: dict[str, dict[int, dict[str, Any]]] = defaultdict(lambda: defaultdict(dict))
        found: dict[str, Any] = {}
        for name, tensor in hf_state_dict.items():
            place, separator, rest = name.rpartition(self._hf)
            number, _, last = rest.partition(".")
            if separator and last in (self._gate, self._up, self._down):
                stacks[place][int(number)][last] = tensor
            else:
                found[self._rename(name, forward=False)] = tensor
        for place, experts in stacks.items():
            rows = [experts[number] for number in sorted(experts)]
            stem = f"{place}{self._own}"
            if self._gate in rows[0]:
                found[stem + "gate_up_proj"] = torch.stack([torch.cat([r[self._gate], r[self._up]]) for r in rows])
            if self._down in rows[0]:
                found[stem + "down_proj"] = torch.stack([row[self._down] for row in rows])
        return found

    def _rename(self, name: str, *, forward: bool) -> str:
        for own, hf in self._renamed.items():
            name = name.replace(own, hf) if forward else name.replace(hf, own)
        return name


def has_adapter(model: nn.Module) -> bool:
    """Whether a model itself defines what its files hold."""
    return getattr(model, "state_dict_adapter", None) is not None


def adapter_naming(model: nn.Module, specs: Sequence[TensorSpec]) -> TensorMapping:
    """What the files of a model hold according to `model.state_dict_adapter`.

    Args:
        model: The model, or one pipeline stage of it; it has an adapter.
        specs: Its tensors.

    Raises:
        TopologyError: The adapter drops or doubles something, or does more than splitting and joining tensors. The
            message lists everything.
    """
    adapter: Any = model.state_dict_adapter
    naming, problems = _traced(adapter, specs)
    if problems:
        raise TopologyError(
            f"the model's state_dict_adapter ({type(adapter).__name__}) does not fit; nothing was written or "
            "loaded.\n  " + "\n  ".join(problems)
        )
    return naming


def _traced(adapter: Any, specs: Sequence[TensorSpec]) -> tuple[TensorMapping, list[str]]:
    """The naming, and everything that is wrong with it."""
    trace = Trace(specs)
    with torch.no_grad(), trace:
        try:
            converted = adapter.to_hf(dict(trace.sources))
        except Exception as error:  # noqa: BLE001 - foreign code
            return TensorMapping(()), [f"to_hf fails on tensors without memory: {type(error).__name__}: {error}"]
    forced = getattr(adapter, "forced_hf_dtype_mapping", None)
    types = {name: trace.dtype_of(item) for name, item in converted.items()}
    for name, dtype in forced(trace.sources).items() if forced is not None else ():
        types[name] = TORCH_DTYPE.get(dtype) or getattr(torch, dtype)
    aliases: list[SliceMapping] = []
    dtypes: dict[str, str] = {}
    problems = []
    for name, item in converted.items():
        pieces = trace.pieces_of(name, item)
        if pieces is None:
            problems.append(
                f"{name}: to_hf does not return it as a view of one tensor of the model along its dimensions, or as "
                "several such views joined"
            )
            continue
        aliases += pieces
        for source in {alias.source: trace.sources[alias.source].dtype for alias in pieces}.values():
            if torch.promote_types(source, types[name]) != types[name]:
                problems.append(f"{name}: {source} cannot be stored as {types[name]} without loss")
            elif source != types[name]:
                dtypes[name] = safetensors_dtype(name, types[name])
    naming = TensorMapping.ordered(
        aliases, specs, dtypes, {name: tuple(item.shape) for name, item in converted.items()}
    )
    for spec in specs:
        problems += _uncovered(spec, naming.by_source.get(spec.name, ()))
    return naming, problems + _not_restored(adapter, trace.sources, converted)


def _uncovered(spec: TensorSpec, parts: Sequence[SliceMapping]) -> list[str]:
    """What is dropped or doubled of one tensor."""
    if not parts:
        return [f"{spec.name}: to_hf drops it"]
    problems = [
        f"{one.name} and {other.name}: to_hf returns elements of {spec.name} twice"
        for group in _neighbours(parts).values()
        for one, other in combinations(group, 2)
        if one.box.intersect(other.box) is not None
    ]
    covered = sum(part.box.numel for part in parts)
    if not problems and covered != prod(spec.shape):
        problems.append(f"{spec.name}: to_hf drops {prod(spec.shape) - covered} of its {prod(spec.shape)} elements")
    return problems


def _neighbours(parts: Sequence[SliceMapping]) -> dict[Hashable, list[SliceMapping]]:
    """Pieces that may overlap: those of one expert. Comparing each with each takes long with hundreds of experts."""
    leads = all(part.box.sizes and part.box.sizes[0] == 1 for part in parts)
    groups: dict[Hashable, list[SliceMapping]] = defaultdict(list)
    for part in parts:
        groups[part.grid, part.box.offsets[:1] if leads else ()].append(part)
    return groups


def _not_restored(adapter: Any, blank: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> list[str]:
    """Names and shapes that `from_hf` does not return."""
    reverse = getattr(adapter, "from_hf", None)
    if reverse is None:
        return []
    try:
        with torch.no_grad():
            restored = reverse(dict(converted))
    except Exception as error:  # noqa: BLE001 - foreign code
        return [f"from_hf fails on what to_hf returns: {type(error).__name__}: {error}"]
    problems = [f"{name}: from_hf does not return it" for name in blank if name not in restored]
    problems += [
        f"{name}: from_hf returns it, but the model has no such tensor" for name in restored if name not in blank
    ]
    return problems + [
        f"{name}: from_hf returns it as {list(restored[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in blank.items()
        if name in restored and restored[name].shape != tensor.shape
    ]
