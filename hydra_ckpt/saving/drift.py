"""Decides what it means when ranks hold different values, and what to report. Plain data; coordinator only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hydra_ckpt.errors import TopologyError, some_of
from hydra_ckpt.store.parts import is_of_models

_SHOWN = 8


@dataclass(frozen=True)
class ReplicaReport:
    """What a rank reports about a group that differs.

    Attributes:
        leader: The first rank that holds the same tensors.
        is_own: Whether values may differ between ranks, and are then stored once per rank.
        mesh: Equal on ranks of one device mesh.
        digests: Digests of the tensors and of the plain data, by label.
        constant: Labels of parameters whose elements are all equal: equal constants say nothing about their origin.
        between_stages: Whether the ranks are of different pipeline stages.
    """

    leader: int
    is_own: bool
    mesh: str
    digests: Mapping[str, int]
    constant: Sequence[str] = ()
    between_stages: bool = False

    def to_data(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@dataclass
class Judgement:
    """What to do about the differences found; equal on all ranks.

    Attributes:
        own: Leader to the labels of what is stored once per rank from now on.
        apart: Keys of the replica groups whose first replica stores them from now on.
        drift: The message about replicas that differ; empty if there are none.
        drifted: Labels of all tensors of the groups that differ.
    """

    own: dict[int, list[str]] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    drift: str = ""
    drifted: list[str] = field(default_factory=list)

    def to_data(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {**asdict(self), "own": list(self.own.items())}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Judgement:
        """The reverse of `to_data`."""
        return cls(**{**data, "own": dict(data["own"])})


@dataclass(frozen=True)
class _Group:
    """A group that differs, with what each of its ranks reported."""

    key: str
    told: Mapping[int, ReplicaReport]

    @property
    def first(self) -> ReplicaReport:
        return next(iter(self.told.values()))

    def values(self, label: str) -> dict[int, int | None]:
        return {rank: told.digests.get(label) for rank, told in self.told.items()}

    def labels(self) -> dict[str, None]:
        return dict.fromkeys(label for told in self.told.values() for label in told.digests)

    def differing(self) -> list[str]:
        return [label for label in self.labels() if len(set(self.values(label).values())) > 1]


def judge(
    rows: Sequence[Mapping[str, Any] | None],
    places: Sequence[Sequence[int] | None],
    unequal_at_start: Collection[str],
    *,
    is_first: bool = False,
) -> Judgement:
    """Coordinator only: distinguish drift from values that belong to each rank.

    Args:
        rows: For each rank the groups it reports: key to `ReplicaReport` as plain data.
        places: For each rank its coordinate along the expert dimensions of `moe_mesh`, or None.
        unequal_at_start: Parameters that were not equal when the run began.
        is_first: Whether the ranks compare for the first time.

    Raises:
        TopologyError: Tensors of one name are different experts, and nothing says on which ranks; or, at the first
            comparison, a weight that two pipeline stages share is not equal.
    """
    found, refused, drifted = Judgement(), [], []
    for group in _groups(rows):
        differing = group.differing()
        if group.first.between_stages and not group.first.is_own:
            if is_first:
                raise TopologyError(_describe_tied(group, differing))
            found.apart.append(group.key)
            found.drifted += group.labels()
            drifted.append(_describe_tied(group, differing))
            continue
        if not group.first.is_own:
            experts = [label for label in differing if _follows(group.values(label), places)]
            rest = [label for label in differing if label not in set(experts)]
            refused += _unplaced_experts(group, rest, unequal_at_start, is_first=is_first)
            if rest:
                found.apart.append(group.key)
                found.drifted += group.labels()  # from now on they are not compared
                drifted.append(_describe(group, rest))
            differing = experts
        for leader in {told.leader for told in group.told.values()} if differing else ():
            known = found.own.setdefault(leader, [])
            known += [label for label in differing if label not in known]
    if refused:
        raise TopologyError(
            f"{some_of(refused, _SHOWN)}: ranks hold different values under one name, and these look like different "
            "experts. Pass moe_mesh= to build() or on_train_begin(), so that each rank gets its own back; or give the "
            "experts distinct names, or make them DTensors on one mesh (model.state_dict_adapter). If they should be "
            "equal, broadcast them when the run begins"
        )
    if drifted:
        more = f" (and {len(drifted) - 1} more groups of ranks differ)" if len(drifted) > 1 else ""
        found.drift = drifted[0] + more
    return found


def _groups(rows: Sequence[Mapping[str, Any] | None]) -> Iterator[_Group]:
    found: dict[str, dict[int, ReplicaReport]] = defaultdict(dict)
    for rank, row in enumerate(rows):
        for key, data in (row or {}).items():
            found[key][rank] = ReplicaReport(**data)
    for key, told in found.items():
        yield _Group(key, told)


def _follows(values: Mapping[int, int | None], places: Sequence[Sequence[int] | None]) -> bool:
    """Whether ranks with the same expert coordinate hold the same value, so that it explains the difference."""
    by_place: dict[tuple[int, ...], set[int | None]] = defaultdict(set)
    for rank, value in values.items():
        place = places[rank]
        if place is None:
            return False
        by_place[tuple(place)].add(value)
    return len(by_place) > 1 and all(len(found) == 1 for found in by_place.values())


def _unplaced_experts(
    group: _Group, differing: Sequence[str], unequal_at_start: Collection[str], *, is_first: bool
) -> list[str]:
    """Labels of tensors that are different experts, as far as one can see.

    Those of a name with `expert` are, if other tensors are equal; if none is, only at the first comparison: later the
    replicas may have lost each other in training.
    """
    several = len({told.mesh for told in group.told.values()}) > 1
    others = group.labels().keys() - {*differing, *group.first.constant}
    equal = any(is_of_models(label) for label in others)
    return [
        label
        for label in differing
        if several
        or parameter_of(label) in unequal_at_start
        or ((equal or is_first) and any("expert" in part for part in parameter_of(label).split(".")))
    ]


def parameter_of(label: str) -> str:
    """The parameter named by the label of a model's or optimizer's tensor."""
    _, _, name = label.partition("/")
    return name.partition(":")[0]


def _describe(group: _Group, differing: Sequence[str]) -> str:
    values = group.values(differing[0])
    one = next(iter(values))
    other = next(rank for rank, value in values.items() if value != values[one])
    shown = ", ".join(label.replace("/", ": ", 1) for label in differing[:_SHOWN])
    shown += ", ..." if len(differing) > _SHOWN else ""
    return (
        f"ranks {one} and {other} are replicas and hold different values in {len(differing)} of the "
        f"{len(group.labels())} tensors compared ({shown}). Start them from equal weights (DistributedDataParallel "
        "broadcasts them unless init_sync=False), and reduce every gradient over all replicas"
    )


def _describe_tied(group: _Group, differing: Sequence[str]) -> str:
    one, other = list(group.told)[:2]
    shown = ", ".join(label.replace("/", ": ", 1) for label in differing[:_SHOWN])
    return (
        f"pipeline stages share {shown} and hold different values of it (ranks {one} and {other}); only those of rank "
        f"{one} would be saved. If it is a tied weight, add up its gradients over the stages and start from equal "
        "values; if it is not, give it a name of its own (config.tie_word_embeddings=False, or no _tied_weights_keys)"
    )


def unequal(rows: Sequence[Mapping[str, int] | None]) -> list[str]:
    """Coordinator only: names whose reported digests differ between ranks; none if all names differ."""
    found: dict[str, set[int]] = defaultdict(set)
    for row in rows:
        for name, value in (row or {}).items():
            found[name].add(value)
    differing = [name for name, values in found.items() if len(values) > 1]
    return differing if len(differing) < len(found) else []
