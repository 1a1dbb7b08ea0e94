"""State-dict adapters: a model's own tensors under the names and in the shapes of its Hugging Face files.

A model that keeps its experts stacked, `(experts, out, in)`, is published with one tensor for each expert. An adapter
says how: `model.state_dict_adapter.to_hf(state_dict)`. It is never given the weights. It is called once with tensors
that have shapes and no memory; what it returns are views of these, and the views' offsets and strides tell which part
of which tensor each is. So every rank knows which bytes of the files its shards are, and writes and reads them through
views of its own memory: nothing is gathered, nothing copied.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any, Protocol

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.local import LocalTensor, Place
from hydra_ckpt.storage.dtypes import TORCH_DTYPE, safetensors_dtype

log = logging.getLogger(__name__)


class StateDictAdapter(Protocol):
    """Converts between a model's own state dict and its Hugging Face form; the model carries it as an attribute.

    An adapter may also have `forced_hf_dtype_mapping(state_dict)`, which maps Hugging Face names to the element type
    (`"float32"` or `"F32"`) that they have in files whatever the training's is.
    """

    def to_hf(self, state_dict: dict[str, Any], /) -> dict[str, Any]:
        """Every tensor of the result is part of one tensor of the argument: indexed, narrowed or transposed.

        The argument may be one pipeline stage's part of the model.
        """

    def from_hf(self, hf_state_dict: dict[str, Any], /) -> dict[str, Any]:
        """The reverse. Only names and shapes of its result are looked at: they must be those `to_hf` was given."""


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


@dataclass(frozen=True)
class HfView:
    """One Hugging Face tensor as part of a tensor of the model.

    Attributes:
        spec: The Hugging Face tensor.
        source: Name of the model's tensor.
        box: Which part of it.
        dims: For each dimension of the Hugging Face tensor that of the model's, or None where it has size 1 and the
            model's tensor lacks it.
    """

    spec: TensorSpec
    source: str
    box: Box
    dims: tuple[int | None, ...]

    def place(self, held: Place) -> tuple[Place, Box | None]:
        """Where the part of it that a rank holds lies, and which box of the rank's own part that is."""
        common = self.box.intersect(held.box)
        ndim = len(self.dims)
        if common is None:
            return Place(
                self.spec, Box((0,) * ndim, (0,) * ndim), held.mesh, held.replica, held.group, self.source
            ), None
        inner = common.within(self.box)
        box = Box(
            tuple(0 if dim is None else inner.offsets[dim] for dim in self.dims),
            tuple(1 if dim is None else inner.sizes[dim] for dim in self.dims),
        )
        return Place(self.spec, box, held.mesh, held.replica, held.group, self.source), common.within(held.box)

    def view(self, local: torch.Tensor, box: Box | None) -> torch.Tensor:
        """A box of a rank's part of the model's tensor in the shape of the Hugging Face tensor, sharing its memory."""
        if box is None:
            return local.new_empty((0,) * len(self.dims))
        for dim, (start, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        kept = [dim for dim in self.dims if dim is not None]
        dropped = [dim for dim in range(local.dim()) if dim not in kept]
        local = local.permute(*kept, *dropped)
        for _ in dropped:
            local = local.squeeze(-1)
        for position, source_dim in enumerate(self.dims):
            if source_dim is None:
                local = local.unsqueeze(position)
        return local


Views = dict[str, tuple[HfView, ...]]


def has_adapter(model: nn.Module) -> bool:
    """Whether a model says itself what its files hold."""
    return getattr(model, "state_dict_adapter", None) is not None


def views_of(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> Views:
    """The Hugging Face tensors that each tensor of a model consists of; none if they are the tensors themselves.

    The adapter is `model.state_dict_adapter`. What transformers' own models are called in files is known without one
    (`hydra_ckpt.hub.conversion`).

    Args:
        model: The model, or one pipeline stage of it.
        tensors: Its tensors by name.

    Raises:
        TopologyError: The adapter drops or doubles something, or does more than taking tensors apart. The message
            lists everything.
    """
    if not has_adapter(model):
        return {}
    adapter = model.state_dict_adapter
    views, problems = _trace(adapter, tensors)
    if problems:
        raise TopologyError(
            f"the model's state_dict_adapter ({type(adapter).__name__}) does not fit; nothing was written or "
            "loaded.\n  " + "\n  ".join(problems)
        )
    same = all(len(found) == 1 and found[0].spec.name == name for name, found in views.items())
    unchanged = same and all(
        found[0].spec.shape == tuple(tensors[name].shape)
        and found[0].spec.dtype == safetensors_dtype(name, tensors[name].dtype)
        for name, found in views.items()
    )
    return {} if unchanged else views


class _CopiesAsViews(TorchFunctionMode):
    """While an adapter is traced, its copies and casts give views, so that it can be seen what they are copies of."""

    _COPIES = frozenset({"contiguous", "clone", "to", "type", "float", "bfloat16", "half", "double", "cpu", "detach"})

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: dict[int, tuple[torch.Tensor, torch.dtype]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by PyTorch for every operation on tensors."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in self._COPIES or not isinstance(result, torch.Tensor):
            return result
        source = args[0]
        view = source.view_as(source)
        self.dtypes[id(view)] = (view, result.dtype)  # holding it keeps the identity from being given again
        return view


def _trace(adapter: Any, tensors: Mapping[str, torch.Tensor]) -> tuple[Views, list[str]]:
    """The views of every tensor, and everything that is wrong with them."""
    blank = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}
    with torch.no_grad(), _CopiesAsViews() as mode:
        try:
            converted = adapter.to_hf(dict(blank))
        except Exception as error:  # noqa: BLE001 - foreign code
            return {}, [f"to_hf fails on tensors without memory: {type(error).__name__}: {error}"]
    dtypes = {name: mode.dtypes[id(item)][1] for name, item in converted.items() if id(item) in mode.dtypes}
    forced = getattr(adapter, "forced_hf_dtype_mapping", None)
    for name, dtype in forced(blank).items() if forced is not None else ():
        dtypes[name] = TORCH_DTYPE.get(dtype) or getattr(torch, dtype)
    # Meta tensors have no memory whose address could be compared, only an object that would hold it.
    sources = {_memory(tensor): name for name, tensor in blank.items()}
    views: dict[str, list[HfView]] = {name: [] for name in blank}
    problems = []
    for name, item in converted.items():
        source = sources.get(_memory(item))
        if source is None:
            problems.append(f"{name}: to_hf does not give it as a view of one tensor of the model")
            continue
        found = _view(name, item, dtypes.get(name, item.dtype), source, blank[source])
        if isinstance(found, str):
            problems.append(found)
        else:
            views[source].append(found)
    for name, parts in views.items():
        problems += _uncovered(name, parts, blank[name])
    problems += _not_restored(adapter, blank, converted)
    return {name: tuple(parts) for name, parts in views.items()}, problems


def _memory(tensor: torch.Tensor) -> int:
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)  # type: ignore[no-untyped-call]


def _view(name: str, item: torch.Tensor, dtype: torch.dtype, source: str, whole: torch.Tensor) -> HfView | str:
    """Read a view off its offset and strides; a text if it is no part of the tensor along its dimensions."""
    if torch.promote_types(whole.dtype, dtype) != dtype:
        return f"{name}: {whole.dtype} cannot be stored as {dtype} without loss"
    rest, starts = item.storage_offset(), []
    for stride in whole.stride():
        starts.append(rest // stride if stride else 0)
        rest -= starts[-1] * stride
    sizes, dims = [1] * whole.dim(), list[int | None]()
    for size, stride in zip(item.shape, item.stride(), strict=True):
        dim = next(
            (
                dim
                for dim in range(whole.dim())
                if size != 1
                and dim not in dims
                and whole.stride(dim) == stride
                and starts[dim] + size <= whole.shape[dim]
            ),
            None,
        )
        if dim is None and size != 1:
            return f"{name}: to_hf does not take it out of {source} {list(whole.shape)} along its dimensions"
        dims.append(dim)
        if dim is not None:
            sizes[dim] = size
    spec = TensorSpec(name, safetensors_dtype(name, dtype), tuple(item.shape))
    return HfView(spec, source, Box(tuple(starts), tuple(sizes)), tuple(dims))


def _uncovered(name: str, parts: Sequence[HfView], whole: torch.Tensor) -> list[str]:
    """What is dropped or doubled of one tensor."""
    if not parts:
        return [f"{name}: to_hf drops it"]
    problems = [
        f"{one.spec.name} and {other.spec.name}: to_hf gives elements of {name} twice"
        for group in _neighbours(parts).values()
        for one, other in combinations(group, 2)
        if one.box.intersect(other.box) is not None
    ]
    covered = sum(prod(part.box.sizes) for part in parts)
    if not problems and covered != whole.numel():
        problems.append(f"{name}: to_hf drops {whole.numel() - covered} of its {whole.numel()} elements")
    return problems


def _neighbours(parts: Sequence[HfView]) -> dict[tuple[int, ...], list[HfView]]:
    """Views that may overlap: those of one expert. Comparing each with each takes long with hundreds of experts."""
    leads = all(part.box.sizes and part.box.sizes[0] == 1 for part in parts)
    groups: dict[tuple[int, ...], list[HfView]] = defaultdict(list)
    for part in parts:
        groups[part.box.offsets[:1] if leads else ()].append(part)
    return groups


def _not_restored(adapter: Any, blank: Mapping[str, torch.Tensor], converted: Mapping[str, Any]) -> list[str]:
    """Names and shapes that `from_hf` does not give back."""
    reverse = getattr(adapter, "from_hf", None)
    if reverse is None:
        return []
    try:
        with torch.no_grad():
            restored = reverse(dict(converted))
    except Exception as error:  # noqa: BLE001 - foreign code
        return [f"from_hf fails on what to_hf gives: {type(error).__name__}: {error}"]
    problems = [f"{name}: from_hf does not give it back" for name in blank if name not in restored]
    problems += [
        f"{name}: from_hf gives it, and the model has no such tensor" for name in restored if name not in blank
    ]
    return problems + [
        f"{name}: from_hf gives it back as {list(restored[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in blank.items()
        if name in restored and restored[name].shape != tensor.shape
    ]


class Converter:
    """Takes `LocalTensor`s of a model apart into those of its Hugging Face tensors; remembers where each lies.

    Args:
        views: What each tensor consists of; tensors without an entry stay as they are.
    """

    def __init__(self, views: Views) -> None:
        self._views = views
        self._known: dict[Place, list[tuple[HfView, Place, Box | None]]] = {}

    @property
    def changes(self) -> bool:
        """Whether any tensor is stored otherwise than it is in memory."""
        return bool(self._views)

    def __call__(self, item: LocalTensor) -> list[LocalTensor]:
        """The Hugging Face tensors, views of the item's memory. Their element type in memory is the model's."""
        views = self._views.get(item.spec.name)
        if views is None:
            return [item]
        known = self._known.get(item.place)
        if known is None:
            known = self._known[item.place] = [(view, *view.place(item.place)) for view in views]
        return [
            LocalTensor(place, view.view(item.tensor, inner), item.divisible, item.late) for view, place, inner in known
        ]
