"""Do the ranks hold the same? Compared at every save, before anything is staged, by a reduction of constant size."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.distributed.group import Group
from hydra_ckpt.distributed.vote import Vote
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.saving.drift import Judgement, ReplicaReport, judge, unequal
from hydra_ckpt.saving.watching import Watchlist, label_of
from hydra_ckpt.state.capture import Captured
from hydra_ckpt.state.local import LocalTensor, ShardPlacement
from hydra_ckpt.state.plain import ABSENT, is_state, state_at
from hydra_ckpt.storage.folding import digest, digest_each, is_constant, whole
from hydra_ckpt.store import names

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

log = logging.getLogger(__name__)

_HALF = (1 << 32) - 1
_MAX_LAYOUTS = 4


@dataclass
class Differences:
    """What is known to differ between ranks; it only grows.

    Attributes:
        own: Labels of the tensors and plain data stored once per rank.
        anywhere: The same labels, of all pipeline stages.
        apart: Mesh and replicated dimensions of tensors that the first replica writes whole.
        drifted: Labels of these tensors, of all ranks: once they differ, they are not compared any more.
    """

    own: set[str] = field(default_factory=set)
    anywhere: set[str] = field(default_factory=set)
    apart: set[Hashable] = field(default_factory=set)
    drifted: set[str] = field(default_factory=set)
    _places: dict[tuple[str, ShardPlacement], ShardPlacement] = field(default_factory=dict)

    def arranged(self, parts: Parts) -> dict[str, list[LocalTensor]]:
        """The tensors, with one more part for those stored once per rank. Nothing that differs is divisible."""
        found = {part: list(items) for part, items in parts.items()}
        if not self.own and not self.apart:
            return found
        own: list[LocalTensor] = []
        for part, items in found.items():
            wanted = {label.removeprefix(f"{part}/") for label in self.own if label.startswith(f"{part}/")}
            for position, item in enumerate(items):
                place = item.place
                if place.spec.name in wanted:
                    own.append(replace(item, place=self._own_place(part, place), divisible=False))
                    items[position] = replace(item, divisible=False)
                elif item.divisible and (place.mesh, place.group) in self.apart:
                    items[position] = replace(item, divisible=False)
        return {**found, names.OWN: own} if own else found

    def _own_place(self, part: str, place: ShardPlacement) -> ShardPlacement:
        """A tensor's place in the per-rank files; the same object for the same place, see `ShardPlacement`."""
        known = self._places.get((part, place))
        if known is None:
            spec = replace(place.spec, name=label_of(part, place.spec.name))
            known = replace(place, spec=spec, replica=(0, 1), group=(), ranks_per_file=1, sharding=None)
            self._places[part, place] = known
        return known

    def plain_of(self, captured: Captured) -> dict[str, Any]:
        """The plain data that each rank stores for itself, by label."""
        found = {label: tree for label, tree in captured.plain.items() if label in self.own}
        for label in self.own - found.keys():
            # Only tensors here, but more than tensors on another rank.
            if is_state(label) and (state := state_at(captured.shared, label)) is not ABSENT:
                found[label] = state
        return found


@dataclass(frozen=True)
class Look:
    """Digests of what a rank holds.

    Attributes:
        captured: The state, taken apart.
        leader: The first rank that holds the same tensors.
        watchlist: The groups that were digested.
        digests: One digest per group, by key.
    """

    captured: Captured
    leader: int
    watchlist: Watchlist
    digests: Mapping[str, int]


class Comparer:
    """Compares what ranks hold, for one Checkpointer. Training thread only.

    In the steady state this takes one reduction of three numbers, whatever the number of groups. In a group of n ranks
    the first adds -(n - 1) times its digest and each other rank adds its own, so the sum over all ranks and groups is
    zero if they all agree; if they do not, it is zero with a probability of 2**-64.

    Args:
        group: The ranks.
        channel: To the other ranks.
        moe_mesh: The mesh of expert parallelism, or None.
        raises: Whether replicas that differ make the save fail; if so, they are still stored as replicas afterwards.

    Attributes:
        known: The differences found so far.
        expert_place: Where this rank's experts are, see the function `expert_place`; None if unknown.
    """

    def __init__(self, group: Group, channel: Channel, moe_mesh: DeviceMesh | None, *, raises: bool) -> None:
        self._raises = raises
        self._vote = Vote(group, "comparing replicas", 3, adds=True)
        self._channel = channel
        self.expert_place = expert_place(moe_mesh)
        self._unequal_at_start: set[str] = set()
        self._turn = 0
        self._lists: dict[int, tuple[Agreement, Watchlist]] = {}
        self.known = Differences()

    def look(self, captured: Captured, agreement: Agreement, *, full: bool) -> Look:
        """Digest what other ranks also hold; local.

        Args:
            captured: The state, taken apart.
            agreement: What all ranks hold.
            full: Whether to digest every byte; if not, a different part each time.
        """
        watchlist = self._watchlist(captured.parts, agreement)
        digests = watchlist.digests(captured.parts, captured.plain, self._turn, full=full)
        return Look(captured, agreement.leader, watchlist, digests)

    def compare(self, look: Look | None) -> Judgement | None:
        """Collective: compare, and record what differs.

        Args:
            look: This rank's digests; None if it could not make them, and then nothing is compared.

        Returns:
            What was found; None if no rank found anything new.

        Raises:
            TopologyError: See `judge`.
        """
        self._turn += 1
        absent, low, high = self._vote.ask([1, 0, 0] if look is None else _ballot(look))
        if look is None or absent or not (low or high):
            return None
        judgement = self._find_out(look)
        self.known.own.update(judgement.own.get(look.leader, []))
        self.known.anywhere.update(label for labels in judgement.own.values() for label in labels)
        if not self._raises:
            groups = look.watchlist.groups
            self.known.apart.update(group.place for group in groups if group.key in judgement.apart)
            self.known.drifted.update(judgement.drifted)
        self._lists = {}
        return judgement

    def _watchlist(self, parts: Parts, agreement: Agreement) -> Watchlist:
        """The groups of a layout; cached until more is known to differ."""
        found = self._lists.get(id(agreement))
        if found is None:
            known = self.known
            watchlist = Watchlist(parts, agreement, set(known.own), set(known.anywhere), set(known.apart))
            found = (agreement, watchlist)  # kept together, so that no other agreement has its identity
            self._lists = dict([*self._lists.items(), (id(agreement), found)][-_MAX_LAYOUTS:])
        return found[1]

    def _find_out(self, look: Look) -> Judgement:
        """Collective: find out which tensors differ, on which ranks, and what that means."""
        keys = self._channel.agree("comparing replicas", look.digests, _differing_keys)
        each = look.watchlist.each(look.captured.parts, look.captured.plain, keys)
        told = {}
        for group in look.watchlist.groups:
            if group.key in each:
                constant = () if group.is_own else look.watchlist.constant(look.captured.parts, group.key)
                told[group.key] = ReplicaReport(
                    look.leader, group.is_own, str(group.place), each[group.key], constant, group.between_stages
                ).to_data()

        def decide(payloads: Sequence[Any]) -> dict[str, Any]:
            rows, places = [row for row, _ in payloads], [place for _, place in payloads]
            return judge(rows, places, self._unequal_at_start, is_first=self._turn == 1).to_data()

        found = self._channel.agree("finding out what differs", [told, self.expert_place], decide)
        return Judgement.from_data(found)

    def begin(self, held: str, parameters: Mapping[str, Any]) -> None:
        """Collective: record plain parameters that differ when the run begins: they may be experts.

        Args:
            held: Equal on ranks that hold the same tensors.
            parameters: The plain parameters by name.
        """
        if self._channel.world_size == 1:
            return
        mine = [held, digest((), map(whole, parameters.values()))]
        differs = self._channel.agree("comparing parameters", mine, _unequal_holders)
        if held not in differs:
            told = None
        else:
            varied = {name: tensor for name, tensor in parameters.items() if not is_constant(tensor)}
            values = digest_each(list(varied.values()))
            told = {f"{held}/{name}": value for name, value in zip(varied, values, strict=True)}
        if differs:
            found = self._channel.agree("comparing parameters by name", told, unequal)
            self._unequal_at_start = {name.partition("/")[2] for name in found}


def _ballot(look: Look) -> list[int]:
    low = high = 0
    for group in look.watchlist.groups:
        index, count = group.replica
        factor = 1 - count if index == 0 else 1
        low += factor * (look.digests[group.key] & _HALF)
        high += factor * (look.digests[group.key] >> 32)
    return [0, low, high]


def _differing_keys(rows: Sequence[Mapping[str, int]]) -> list[str]:
    """Coordinator only: the groups whose ranks reported different digests."""
    first: dict[str, int] = {}
    differing: dict[str, None] = {}
    for row in rows:
        for key, value in row.items():
            if first.setdefault(key, value) != value:
                differing[key] = None
    return list(differing)


def _unequal_holders(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Coordinator only: the kinds of ranks among which parameters differ."""
    return _differing_keys([{held: value} for held, value in rows])


def expert_place(mesh: DeviceMesh | None) -> list[int] | None:
    """This rank's coordinate along the mesh dimensions that experts are spread over.

    These are the dimensions named `ep` or with `expert` in their names; all dimensions if there are none.
    """
    coordinate = None if mesh is None else mesh.get_coordinate()
    if mesh is None or coordinate is None:
        return None
    titles = mesh.mesh_dim_names or ()
    chosen = [position for position, title in enumerate(titles) if title == "ep" or "expert" in title]
    return [coordinate[position] for position in chosen or range(mesh.ndim)]
