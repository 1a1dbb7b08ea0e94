"""Tensors as one rank holds them: a local part with its position in the whole."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement, Replicate, Shard, _StridedShard

from hydra_ckpt.errors import CheckpointConfigError, TopologyError
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.boxes import Box, Sharding
from hydra_ckpt.layout.grids import flat_boxes
from hydra_ckpt.layout.plan import fingerprint
from hydra_ckpt.layout.replicas import ranks_per_file
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.storage.dtypes import check_storable, safetensors_dtype
from hydra_ckpt.storage.memory import bytes_of, narrow, view_as


@dataclass(frozen=True, slots=True, eq=False)
class ShardPlacement:
    """The position of a tensor's local part in the whole: what stays the same from save to save.

    A `Localizer` makes one for each, and returns the same one again, so places are compared by identity.

    Attributes:
        spec: Name, element type and global shape.
        box: The part held here; empty if the rank holds nothing.
        mesh: Digest of the device mesh it is spread over; empty for a plain tensor, replicated by convention.
        replica: Index among the ranks of the mesh that hold the same box, and their number.
        group: Equal for tensors of one mesh replicated along the same dimensions.
        origin: Name of the live tensor it is part of, if it has another name in an export.
        ranks_per_file: How many ranks of the mesh would write to a file of the whole tensor.
        sharding: How; None for a plain tensor, and on a rank outside the mesh.
    """

    spec: TensorSpec
    box: Box
    mesh: str = ""
    replica: tuple[int, int] = (0, 1)
    group: Hashable = ()
    origin: str = ""
    ranks_per_file: int = 1
    sharding: Sharding | None = None


@dataclass(frozen=True, slots=True)
class LocalTensor:
    """This rank's part of a named tensor.

    Attributes:
        place: Its position in the whole.
        tensor: That part, of the sizes of the place's box, sharing memory with the live object.
        divisible: Whether all replicas certainly hold the same values.
        deferred: Whether nothing but an optimizer step changes it, so that copying it may wait until then.
    """

    place: ShardPlacement
    tensor: torch.Tensor
    divisible: bool = True
    deferred: bool = False

    @property
    def spec(self) -> TensorSpec:
        """Name, element type and global shape."""
        return self.place.spec

    @property
    def box(self) -> Box:
        """The part held here."""
        return self.place.box


@dataclass(frozen=True, slots=True)
class _Kept:
    """A `LocalTensor` made before, and what it was made from."""

    tensor: torch.Tensor
    item: LocalTensor
    facts: tuple[Any, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor, item: LocalTensor) -> _Kept:
        """A new one."""
        return cls(tensor, item, _facts(item.tensor))

    def holds(self, tensor: torch.Tensor, local: torch.Tensor, *, divisible: bool, deferred: bool) -> bool:
        """Whether the same live tensor, with its memory where it was, would give the same result again."""
        item = self.item
        return (
            tensor is self.tensor
            and type(local) in _PLAIN
            and _facts(local) == self.facts
            and item.divisible == divisible
            and item.deferred == deferred
        )


def _facts(local: torch.Tensor) -> tuple[Any, ...]:
    """What `tensor.data = ...` and methods such as `t_()` change in a tensor that stays the same object."""
    conj = local.dtype.is_complex and local.is_conj()
    return local.data_ptr(), local.shape, local.stride(), local.dtype, conj, local.is_neg()


# Other kinds may be pending results, whose memory cannot be accessed.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Localizer:
    """Makes `LocalTensor`s and remembers their positions: querying PyTorch's meshes takes longer than copying."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._last: dict[str, tuple[tuple[object, ...], ShardPlacement]] = {}
        self._places: dict[Hashable, dict[str, ShardPlacement]] = {}
        self._meshes: dict[DeviceMesh, tuple[str, tuple[int, ...] | None]] = {}

    def __call__(
        self, name: str, tensor: torch.Tensor, *, divisible: bool = True, deferred: bool = False, lasting: bool = False
    ) -> LocalTensor:
        """A live tensor or DTensor as a `LocalTensor`.

        Args:
            name: Its name in the checkpoint.
            tensor: The live tensor.
            divisible: See `LocalTensor`.
            deferred: See `LocalTensor`.
            lasting: Whether it is the same object from save to save, and may be remembered until `forget`.

        Raises:
            TopologyError: A placement that has no whole value yet (partial sums), or a local shape other than the
                placements imply.
            CheckpointConfigError: A tensor, or a name, that files cannot hold.
        """
        if name not in self._last:
            check_storable(name, tensor)
        local = _local(tensor)
        if not lasting:
            return self._make(name, tensor, local, divisible=divisible, deferred=deferred)
        kept = self._kept.get(name)
        if kept is None or not kept.holds(tensor, local, divisible=divisible, deferred=deferred):
            kept = _Kept.of(tensor, self._make(name, tensor, local, divisible=divisible, deferred=deferred))
            self._kept[name] = kept
        return kept.item

    def forget(self) -> None:
        """Forget the live tensors."""
        self._kept = {}

    def _make(
        self, name: str, tensor: torch.Tensor, local: torch.Tensor, *, divisible: bool, deferred: bool
    ) -> LocalTensor:
        known: tuple[object, ...] = (tensor.dtype, tensor.shape)
        if isinstance(tensor, DTensor):
            known = (*known, tensor.device_mesh, tensor.placements)
        last = self._last.get(name)
        # Comparing is fast and hashing is not: from save to save these are the same objects.
        if last is None or last[0] != known:
            last = self._last[name] = (known, self._find(name, tensor, known))
        place = last[1]
        if place.box.sizes != local.shape and (place.box.numel or local.numel()):
            raise TopologyError(
                f"{name}: this rank holds a part of shape {list(local.shape)}, but shape {list(tensor.shape)} with its "
                f"placements gives {list(place.box.sizes)}"
            )
        if type(local) in _PLAIN and local.numel() and not local.is_meta and not local.data_ptr():
            raise CheckpointConfigError(f"{name}: its memory was freed (resize_(0)); give it values before the save")
        return LocalTensor(place, local.detach(), divisible, deferred)

    def _find(self, name: str, tensor: torch.Tensor, known: tuple[object, ...]) -> ShardPlacement:
        # Many tensors of a model have one shape and one placement.
        alike = self._places.setdefault(known, {})
        place = alike.get(name)
        if place is None:
            one = next(iter(alike.values()), None)
            if one is None:
                place = self._place(name, tensor)
            else:
                place = replace(one, spec=TensorSpec(name, one.spec.dtype, one.spec.shape))
            alike[name] = place
        return place

    def _place(self, name: str, tensor: torch.Tensor) -> ShardPlacement:
        spec = TensorSpec(name, safetensors_dtype(name, tensor.dtype), tuple(tensor.shape))
        if not isinstance(tensor, DTensor):
            return ShardPlacement(spec, Box.whole(spec.shape))
        mesh, coordinate = self._mesh(tensor.device_mesh)
        sharding = _sharding(name, tensor, coordinate or (0,) * tensor.device_mesh.ndim)
        if coordinate is None:
            return ShardPlacement(
                spec, Box((0,) * tensor.dim(), (0,) * tensor.dim()), mesh, ranks_per_file=ranks_per_file(sharding)
            )
        group = (mesh, tuple(position for position, dim in enumerate(sharding.dims) if dim is None))
        box, replica = sharding.box(spec.shape), sharding.replica
        return ShardPlacement(
            spec, box, mesh, replica, group, ranks_per_file=ranks_per_file(sharding), sharding=sharding
        )

    def _mesh(self, mesh: DeviceMesh) -> tuple[str, tuple[int, ...] | None]:
        """A digest of the mesh's shape and ranks, and this rank's coordinate in it."""
        if mesh not in self._meshes:
            ranks = mesh.mesh
            coordinate = mesh.get_coordinate()
            digest = fingerprint([str(list(ranks.shape)), bytes_of(ranks).hex()])
            self._meshes[mesh] = digest, None if coordinate is None else tuple(coordinate)
        return self._meshes[mesh]


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of this rank behind a tensor."""
    if not isinstance(tensor, DTensor):
        return tensor
    # to_local() makes a new view, or a step of autograd, which takes longer than everything done with it here.
    local = tensor._local_tensor
    return local if type(local) in _PLAIN else tensor.to_local()


def _sharding(name: str, tensor: DTensor, coordinate: tuple[int, ...]) -> Sharding:
    dims, strided = [], []
    for placement in tensor.placements:
        dims.append(_sharded_dim(name, placement, tensor.dim()))
        strided.append(isinstance(placement, _StridedShard))
    return Sharding(tuple(tensor.device_mesh.shape), coordinate, tuple(dims), tuple(strided))


def _sharded_dim(name: str, placement: Placement, ndim: int) -> int | None:
    if isinstance(placement, Replicate):
        return None
    if isinstance(placement, Shard | _StridedShard):
        return placement.dim % ndim
    raise TopologyError(f"{name}: the placement {placement} cannot be saved; redistribute it to Shard or Replicate")


class Exporter:
    """Shows what a rank holds as the exported tensors it is part of: views of the same memory.

    Each position is computed once.

    Args:
        naming: How the tensors are exported.
    """

    def __init__(self, naming: TensorMapping) -> None:
        self._naming = naming
        self._order = {id(alias): number for number, alias in enumerate(naming.aliases)}
        self._known: dict[ShardPlacement, list[_Piece]] = {}

    def __call__(self, items: Iterable[LocalTensor]) -> list[LocalTensor]:
        """The exported tensors in the naming's order; `spec` has the exported element type, `tensor` the live one."""
        found = [(piece, item) for item in items for piece in self._pieces(item.place)]
        found.sort(key=lambda pair: pair[0].number)
        return [replace(item, place=piece.place, tensor=piece.view(item.tensor)) for piece, item in found]

    def _pieces(self, place: ShardPlacement) -> list[_Piece]:
        pieces = self._known.get(place)
        if pieces is None:
            pieces = self._known[place] = []
            for alias in self._naming.by_source.get(place.spec.name, ()):
                for flat, held in flat_boxes(place.spec.shape, alias.grid or place.spec.shape, place.box):
                    part = alias.part(held)
                    if part is not None:
                        inner, placed = part
                        spec = self._naming.spec(alias, place.spec.dtype)
                        there = replace(place, spec=spec, box=placed, origin=place.spec.name)
                        number, own = self._order[id(alias)], flat.within(place.box)
                        pieces.append(_Piece(number, alias, there, own, held.sizes, inner.within(held)))
        return pieces


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of an exported tensor that is in a rank's part of a live one.

    Attributes:
        number: The alias's in the naming.
        alias: How it is exported.
        place: Its position in the exported tensor.
        own: The box of the rank's part that contains it.
        grid: The shape of that box in the alias's grid.
        inner: The piece, in that grid.
    """

    number: int
    alias: SliceMapping
    place: ShardPlacement
    own: Box
    grid: tuple[int, ...]
    inner: Box

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece in the rank's part; shares memory."""
        if self.alias.grid:
            tensor = narrow(tensor, self.own).view(self.grid)
        return view_as(self.alias, tensor, self.inner)
