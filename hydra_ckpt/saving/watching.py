"""Groups of tensors, and their digests at each save, by which ranks check that they hold the same.

Replicas share the writing, so a checkpoint of replicas that differ would hold a mix of them. Other tensors belong to a
rank (batch statistics, extras, state of its shards) and are stored once only while they are equal. At each save a
group is digested: for the second kind its plain data and small tensors in full, otherwise a few elements of some
tensors and one stretch of the rest. The stretches rotate until every byte has been covered; `full` takes all of them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hydra_ckpt.layout.plan import fingerprint
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.saving.write_planning import replica_of, tensors_of
from hydra_ckpt.state.local import LocalTensor
from hydra_ckpt.storage.digests import digest_of
from hydra_ckpt.storage.folding import SMALL_BYTES, Stretch, digest, digest_each, is_constant
from hydra_ckpt.store.parts import is_of_models

# A save digests 1/_SHARE of what it copies (digesting takes two thirds of the time of copying), but at least
# _LEAST_BYTES of each group, and at most _MOST_TENSORS tensors.
_SHARE = 12
_LEAST_BYTES = 4 << 20
_MOST_TENSORS = 1024
_SAMPLED = 64
_PLACES_A_DIMENSION, _MOST_DIMENSIONS = 3, 4
# Spreads the sampled tensors over the saves.
_STRIDE = 2654435761


def label_of(part: str, name: str) -> str:
    """How messages and checkpoints call a tensor."""
    return f"{part}/{name}"


@dataclass(frozen=True)
class Member:
    """A tensor that other ranks also hold.

    Attributes:
        label: The tensor's label, see `label_of`.
        position: Index in `tensors_of`.
        nbytes: Size of the part held here, in bytes.
        itemsize: Size of one element, in bytes.
    """

    label: str
    position: int
    nbytes: int
    itemsize: int


@dataclass(frozen=True)
class Turn:
    """What is digested at one save.

    Attributes:
        small: Positions of tensors that are digested together.
        cuts: Position of a larger tensor, its first byte, and the byte after the last one.
    """

    small: list[int]
    cuts: list[tuple[int, int, int]]

    def digest(self, tensors: Sequence[torch.Tensor]) -> int:
        """The digest of this turn; `tensors` is indexed by position."""
        stretches = [Stretch(tensors[position], start, stop) for position, start, stop in self.cuts]
        return digest([tensors[position] for position in self.small], stretches)


@dataclass(frozen=True)
class Watched:
    """A group of tensors that the same ranks hold.

    Attributes:
        key: Equal on the ranks of the group, and on no others.
        replica: This rank's index among these ranks, and their number.
        members: Its tensors, in the same order on all of these ranks.
        is_own: Whether values may differ between ranks, and are then stored once per rank.
        place: Mesh and dimensions along which the tensors are replicated.
        between_stages: Whether the ranks are of different pipeline stages.
    """

    key: str
    replica: tuple[int, int]
    members: tuple[Member, ...]
    is_own: bool
    place: Hashable = ("", ())
    between_stages: bool = False

    @property
    def has_plain(self) -> bool:
        """Whether the plain data is compared with it. Each pipeline stage has its own."""
        return self.is_own and not self.between_stages

    @cached_property
    def always(self) -> list[int]:
        """Positions of the tensors that are digested in full at every save."""
        return [member.position for member in self.members if self.is_own and member.nbytes < SMALL_BYTES]

    @cached_property
    def _rest(self) -> list[Member]:
        return [member for member in self.members if not self.is_own or member.nbytes >= SMALL_BYTES]

    @cached_property
    def turns(self) -> list[Turn]:
        """All other bytes, split into what each save digests."""
        total = sum(member.nbytes for member in self._rest)
        size = max(total // (_SHARE * self.replica[1]), _LEAST_BYTES)
        turns, left = [Turn([], [])], size
        for member in self._rest:
            start = 0
            while start < member.nbytes:
                if left < member.itemsize or len(turns[-1].small) + len(turns[-1].cuts) == _MOST_TENSORS:
                    turns.append(Turn([], []))
                    left = size
                stop = min(start + left // member.itemsize * member.itemsize, member.nbytes)
                if stop - start == member.nbytes < SMALL_BYTES:
                    turns[-1].small.append(member.position)
                else:
                    turns[-1].cuts.append((member.position, start, stop))
                left -= stop - start
                start = stop
        return turns

    def sampled(self, turn: int) -> list[int]:
        """Positions of the tensors that have a few elements digested at this turn."""
        if not self._rest:
            return []
        first = turn * _STRIDE % len(self._rest)
        return [member.position for member in (self._rest[first:] + self._rest[:first])[:_SAMPLED]]


class Watchlist:
    """The groups of one layout.

    Args:
        parts: What this rank holds.
        agreement: What all ranks hold.
        left_out: Labels of tensors that are not compared, because they are known to differ.
        anywhere: Labels of tensors that are known to differ on any ranks.
        apart: Places of replicas that are not compared, because they are known to differ.
    """

    def __init__(
        self,
        parts: Parts,
        agreement: Agreement,
        left_out: Collection[str],
        anywhere: Collection[str],
        apart: Collection[Hashable],
    ) -> None:
        found: dict[tuple[bool, Hashable], list[tuple[Member, LocalTensor]]] = defaultdict(list)
        for member, item in _members(parts):
            is_own, place = _is_own(item), (item.place.mesh, item.place.group)
            if member.nbytes and member.label not in left_out and (is_own or place not in apart):
                found[is_own, place].append((member, item))
        self._left_out = left_out
        self.groups = [
            self._group(members, is_own, place, agreement)
            for (is_own, place), members in found.items()
            if is_own or replica_of(members[0][1].place, agreement)[1] > 1
        ]
        if not any(group.is_own for group in self.groups):
            self.groups.append(self._group([], True, ("", ()), agreement))  # the plain data
        self.groups += self._between_stages(parts, agreement, anywhere, apart)

    @staticmethod
    def _between_stages(
        parts: Parts, agreement: Agreement, anywhere: Collection[str], apart: Collection[Hashable]
    ) -> list[Watched]:
        """Tensors that other pipeline stages hold as well; of each stage the first replica of a shard looks."""
        found: dict[tuple[bool, tuple[int, ...]], dict[str, tuple[Member, LocalTensor]]] = defaultdict(dict)
        for member, item in _members(parts):
            part, _, name = member.label.partition("/")
            leaders = agreement.together.get((part, name))
            is_own = _is_own(item)
            index, _ = agreement.peer if is_own else replica_of(item.place, agreement)
            if leaders is not None and index == 0 and member.nbytes and member.label not in anywhere:
                found[is_own, leaders][member.label] = (member, item)
        groups = []
        for (is_own, leaders), by_label in found.items():
            members = [member for _, (member, _) in sorted(by_label.items())]
            texts = [f"{label} {item.box}" for label, (_, item) in sorted(by_label.items())]
            key = fingerprint(["between stages", str(leaders), str(is_own), *texts])
            replica = leaders.index(agreement.leader), len(leaders)
            if key not in apart:
                groups.append(Watched(key, replica, tuple(members), is_own, key, between_stages=True))
        return groups

    @staticmethod
    def _group(
        members: Sequence[tuple[Member, LocalTensor]], is_own: bool, place: Hashable, agreement: Agreement
    ) -> Watched:
        texts = [f"{member.label} {item.box}" for member, item in members]
        key = fingerprint([str(agreement.leader), str(is_own), *texts])
        replica = agreement.peer if is_own else replica_of(members[0][1].place, agreement)
        return Watched(key, replica, tuple(member for member, _ in members), is_own, place)

    @torch.no_grad()
    def digests(self, parts: Parts, plain: Mapping[str, Any], turn: int, *, full: bool) -> dict[str, int]:
        """A digest of each group, by its key.

        Args:
            parts: The live tensors.
            plain: Plain data that may differ between ranks, by label.
            turn: Equal on all ranks; selects the tensors to digest.
            full: Whether every byte is digested.
        """
        tensors = [item.tensor for item in tensors_of(parts)]
        found = {}
        for group in self.groups:
            turns = group.turns if full else [group.turns[turn % len(group.turns)]]
            small = [tensors[position] for position in group.always]
            small += [_elements(tensors[position]) for position in ([] if full else group.sampled(turn))]
            values = [digest(small, ()), *(one.digest(tensors) for one in turns)]
            text = _text(plain, self._left_out) if group.has_plain else b""
            found[group.key] = digest_of(text + b"".join(value.to_bytes(8, "little") for value in values))
        return found

    @torch.no_grad()
    def each(self, parts: Parts, plain: Mapping[str, Any], keys: Collection[str]) -> dict[str, dict[str, int]]:
        """Full digests of each tensor and of the plain data, by label, for the groups with these keys."""
        tensors = [item.tensor for item in tensors_of(parts)]
        found = {}
        for group in self.groups:
            if group.key in keys:
                labels = [member.label for member in group.members]
                values = digest_each([tensors[member.position] for member in group.members])
                found[group.key] = dict(zip(labels, values, strict=True))
                if group.has_plain:
                    found[group.key].update({label: digest_of(_json(tree)) for label, tree in plain.items()})
        return found

    @torch.no_grad()
    def constant(self, parts: Parts, key: str) -> list[str]:
        """Labels of a group's parameters and buffers whose elements are all equal."""
        tensors = tensors_of(parts)
        members = next(group.members for group in self.groups if group.key == key)
        models = [member for member in members if is_of_models(member.label)]
        return [member.label for member in models if is_constant(tensors[member.position].tensor)]


def _members(parts: Parts) -> Iterator[tuple[Member, LocalTensor]]:
    """All tensors, with their positions."""
    labels = [label_of(part, item.spec.name) for part, items in parts.items() for item in items]
    for position, (label, item) in enumerate(zip(labels, tensors_of(parts), strict=True)):
        itemsize = item.tensor.element_size()
        yield Member(label, position, item.box.numel * itemsize, itemsize), item


def _is_own(item: LocalTensor) -> bool:
    """Whether each rank may have values of its own."""
    return not (item.divisible or item.place.mesh)


def _text(plain: Mapping[str, Any], left_out: Collection[str]) -> bytes:
    return _json({label: tree for label, tree in plain.items() if label not in left_out})


def _json(tree: Any) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode()


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements, spread evenly."""
    if not tensor.dim():
        return tensor
    # A tensor of many dimensions would give too many elements: flatten the last ones.
    tensor = tensor if tensor.dim() <= _MOST_DIMENSIONS else tensor.flatten(_MOST_DIMENSIONS - 1)
    return tensor[tuple(slice(None, None, -(-size // _PLACES_A_DIMENSION)) for size in tensor.shape)].contiguous()
