"""What ranks cannot know about each other: the one place where they agree on what all of them hold.

A rank knows the global shape of everything it holds, so it computes the file layout alone. The rest takes a few bytes
per rank: whether the others hold the same (or, under pipeline parallelism, what they hold instead), and how many
copies of each device mesh there are.

Example: 4 ranks, 2 pipeline stages with 2 data-parallel replicas each. Ranks 0 and 1 hold `embed` and `a`, ranks 2 and
3 hold `b` and `embed`, which is tied. Each rank sends a digest of what it holds; there are two kinds. The first rank
of each kind, 0 and 2, is its leader and sends its list of tensors. Rank 0 merges them in the order of the stages and
answers: `embed` and `a` are written by leader 0, `b` by leader 2. So all ranks know the same three tensors and compute
the same files. In the resulting `Agreement`:

- `specs` is `embed, a, b` on all ranks, and `fingerprint` is equal.
- `elsewhere` is empty on ranks 0 and 1, and has `embed` on ranks 2 and 3: they hold it, but do not write it.
- `together` has `embed` with the leaders (0, 2) on all ranks, to compare the copies of the stages.
- `leader` is 0, 0, 2, 2, and `peer` is (0, 2), (1, 2), (0, 2), (1, 2). As the tensors are plain, each rank is a copy of
  its own: `copies` has the same numbers, and ranks 0 and 1 divide `embed` and `a` between them.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from hydra_ckpt.distributed.channel import Channel
from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.plan import describe, fingerprint
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.saving.unequal_stages import refuse_unequal_stages
from hydra_ckpt.state.local import LocalTensor
from hydra_ckpt.store import names


@dataclass(frozen=True)
class Agreement:
    """What the ranks agreed on.

    Attributes:
        specs: Part to all its tensors on any rank, in file order.
        copies: Mesh (its digest; empty for plain tensors) to this rank's copy of it and the number of copies.
        leads: Whether this rank writes what is the same on all ranks that hold the same tensors.
        fingerprint: Equal on all ranks.
        elsewhere: Part and name of tensors held here that ranks holding otherwise different ones write: a weight that
            two pipeline stages share.
        together: Part and name of tensors that several pipeline stages hold, sharded alike, to the leaders of these
            stages.
        one_host: Whether all ranks run on one host.
        leader: The first rank that holds the same tensors as this one.
        peer: This rank's index among the ranks that hold the same tensors, and their number.
        adapted: Part to what the adapters of all ranks say its files hold.
        ranks_per_file: Part and name of a tensor to the number of ranks that would write into a file holding all of it.
    """

    specs: Mapping[str, tuple[TensorSpec, ...]]
    copies: Mapping[str, tuple[int, int]]
    leads: bool
    fingerprint: str
    elsewhere: frozenset[tuple[str, str]] = frozenset()
    together: Mapping[tuple[str, str], tuple[int, ...]] = field(default_factory=dict)
    one_host: bool = True
    leader: int = 0
    peer: tuple[int, int] = (0, 1)
    adapted: Mapping[str, TensorMapping] = field(default_factory=dict)
    ranks_per_file: Mapping[tuple[str, str], int] = field(default_factory=dict)


Parts = Mapping[str, Sequence[LocalTensor]]


def agree(
    parts: Parts,
    channel: Channel,
    stage: int,
    global_order: Sequence[str] | None,
    adapted: Mapping[str, TensorMapping] = MappingProxyType({}),
    objects: Sequence[str] = (),
) -> Agreement:
    """Collective: agree on what all ranks hold.

    Args:
        parts: What this rank holds.
        channel: To the other ranks.
        stage: The pipeline rank; ranks of one stage must hold the same tensors.
        global_order: The model's keys in file order, if known.
        adapted: Part to what this rank's adapters say its files hold.
        objects: Labels of the groups, schedulers and other objects beside the tensors.

    Raises:
        TopologyError: Ranks of one stage hold different tensors, or two stages disagree about a tensor.
    """
    local = {part: [item.spec for item in items] for part, items in parts.items()}
    said = {part: naming.to_data() for part, naming in adapted.items()}
    texts = itertools.chain.from_iterable((part, *describe(specs)) for part, specs in local.items())
    text = fingerprint(itertools.chain(texts, [json.dumps(said)], objects))
    meshes = list(dict.fromkeys(item.place.mesh for items in parts.values() for item in items))
    note = {"host": socket.gethostname(), "stage": stage, "holds": text, "meshes": meshes}
    gathered = channel.gather("agreeing on the layout", note)
    positions = channel.scatter("agreeing on the layout", None if gathered is None else _positions(gathered))
    specs: Mapping[str, Sequence[TensorSpec]] = local
    ranks_per_file: Mapping[tuple[str, str], int] = {
        (part, item.spec.name): item.place.ranks_per_file for part, items in parts.items() for item in items
    }
    elsewhere: frozenset[tuple[str, str]] = frozenset()
    together: dict[tuple[str, str], tuple[int, ...]] = {}
    leads = positions["leader"] == channel.rank
    if positions["several"]:
        union = _union(parts, said, objects, channel, stage, leads)
        ranks_per_file, adapted, together = union.ranks_per_file, union.adapted, union.together(positions["leader"])
        specs = {part: list(found) for part, found in union.writers.items()}
        elsewhere = union.elsewhere(local, positions["leader"])
    ordered = {part: tuple(_in_order(part, items, global_order)) for part, items in specs.items()}
    texts = itertools.chain.from_iterable((part, *describe(items)) for part, items in ordered.items())
    copies = {mesh: tuple(place) for mesh, place in zip(meshes, positions["copies"], strict=True)}
    return Agreement(
        ordered,
        copies,
        leads,
        fingerprint(texts),
        elsewhere,
        together,
        positions["one_host"],
        positions["leader"],
        tuple(positions["peer"]),
        adapted,
        ranks_per_file,
    )


def _positions(notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coordinator only: for each rank, its copy of each mesh among the ranks that hold the same tensors."""
    kinds = [(note["stage"], note["holds"]) for note in notes]
    seen: dict[Any, dict[str, int]] = defaultdict(dict)
    own: list[list[tuple[Any, int]]] = []
    for rank, (kind, note) in enumerate(zip(kinds, notes, strict=True)):
        places = []
        for position, mesh in enumerate(note["meshes"]):
            # Plain tensors have no mesh: each rank is a separate copy.
            identity = mesh or str(rank)
            table = seen[kind, position]
            places.append(((kind, position), table.setdefault(identity, len(table))))
        own.append(places)
    peers: dict[Any, list[int]] = defaultdict(list)
    indices = []
    for rank, kind in enumerate(kinds):
        indices.append(len(peers[kind]))
        peers[kind].append(rank)
    several = len(peers) > 1
    one_host = len({note["host"] for note in notes}) == 1
    return [
        {
            "several": several,
            "one_host": one_host,
            "leader": peers[kinds[rank]][0],
            "peer": (indices[rank], len(peers[kinds[rank]])),
            "copies": [(copy, len(seen[key])) for key, copy in places],
        }
        for rank, places in enumerate(own)
    ]


@dataclass(frozen=True)
class _Union:
    """What the stages hold together.

    Attributes:
        writers: Part to its tensors, each with the leader of the stage that writes it.
        ranks_per_file: See `Agreement.ranks_per_file`.
        adapted: See `Agreement.adapted`.
        shared: Part and name of tensors that several stages hold, sharded alike, with the leaders of these stages.
    """

    writers: Mapping[str, Mapping[TensorSpec, int]]
    ranks_per_file: Mapping[tuple[str, str], int]
    adapted: Mapping[str, TensorMapping]
    shared: Sequence[tuple[str, str, Sequence[int]]]

    def elsewhere(self, local: Mapping[str, Sequence[TensorSpec]], leader: int) -> frozenset[tuple[str, str]]:
        """See `Agreement.elsewhere`; for the stage of this leader, which holds `local`."""
        return frozenset(
            (part, spec.name)
            for part, specs in local.items()
            for spec in specs
            if part != names.OWN and self.writers[part][spec] != leader
        )

    def together(self, leader: int) -> dict[tuple[str, str], tuple[int, ...]]:
        """See `Agreement.together`; for the stage of this leader."""
        return {(part, name): tuple(leaders) for part, name, leaders in self.shared if leader in leaders}


def _union(
    parts: Parts, said: Mapping[str, Any], objects: Sequence[str], channel: Channel, stage: int, leads: bool
) -> _Union:
    """Collective: bring together what the kinds of ranks hold; only one rank of each kind speaks."""
    data = {
        part: [
            (item.spec.name, item.spec.dtype, list(item.spec.shape), item.place.ranks_per_file, _how(item))
            for item in items
        ]
        for part, items in parts.items()
    }
    payload = {"stage": stage, "parts": data, "adapted": said, "objects": list(objects)} if leads else None
    merged = channel.agree("bringing the tensors of all ranks together", payload, _merge)
    writers = {
        part: {TensorSpec(name, dtype, tuple(shape)): writer for name, dtype, shape, _, writer in rows}
        for part, rows in merged["parts"].items()
    }
    ranks_per_file = {(part, row[0]): row[3] for part, rows in merged["parts"].items() for row in rows}
    adapted = {part: TensorMapping.from_data(data) for part, data in merged["adapted"].items()}
    return _Union(writers, ranks_per_file, adapted, [tuple(row) for row in merged["shared"]])


def _how(item: LocalTensor) -> str:
    """Equal for tensors that are sharded alike, on whatever mesh; empty for a plain one."""
    found = item.place.sharding
    return "" if found is None else f"{found.mesh_shape} {found.dims} {found.strided}"


def _merge(payloads: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Coordinator only: the union, in stage order.

    Raises:
        TopologyError: See `agree`.
    """
    speaking = {rank: payload for rank, payload in enumerate(payloads) if payload is not None}
    refuse_unequal_stages(speaking)
    ordered = sorted(speaking.items(), key=lambda item: (item[1]["stage"], item[0]))
    merged: dict[str, dict[str, Any]] = defaultdict(dict)
    held: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    clashes = []
    for rank, payload in ordered:
        for part, rows in payload["parts"].items():
            for name, dtype, shape, ranks_per_file, how in rows:
                held[part, name, how].append(rank)
                known = merged[part].setdefault(name, (name, dtype, shape, ranks_per_file, rank))
                if known[1:3] != (dtype, shape):
                    clashes.append(f"{part}: {name} is {dtype} {shape} on rank {rank}, elsewhere {known[1]} {known[2]}")
    adapted = _merge_adapted({rank: payload["adapted"] for rank, payload in ordered}, clashes)
    if clashes:
        raise TopologyError(
            "the ranks disagree about tensors of the same name; nothing was written.\n  " + "\n  ".join(clashes)
        )
    return {
        "parts": {part: list(rows.values()) for part, rows in merged.items()},
        "adapted": adapted,
        "shared": [(part, name, ranks) for (part, name, _), ranks in held.items() if len(ranks) > 1],
    }


def _merge_adapted(said: Mapping[int, Mapping[str, Any]], clashes: list[str]) -> dict[str, Any]:
    """Part to what the adapters of all kinds of ranks say; appends contradictions to `clashes`."""
    makers: dict[tuple[str, str], tuple[int, list[Any]]] = {}
    merged: dict[str, Any] = {}
    for rank, parts in said.items():
        for part, data in parts.items():
            found = merged.setdefault(part, {"aliases": [], "dtypes": {}, "files": {}, "shapes": {}})
            for name, rows in itertools.groupby(data["aliases"], key=lambda row: row[0]):
                pieces = list(rows)
                first, known = makers.setdefault((part, name), (rank, pieces))
                if first == rank:
                    found["aliases"] += pieces
                elif known != pieces:
                    clashes.append(
                        f"{part}: the adapter makes {name} from {pieces[0][3]} on rank {rank}, and from "
                        f"{known[0][3]} on rank {first}"
                    )
            found["dtypes"].update(data["dtypes"])
            found["shapes"].update(data["shapes"])
    return merged


def _in_order(part: str, specs: Sequence[TensorSpec], order: Sequence[str] | None) -> list[TensorSpec]:
    if not order or part != names.MODEL:
        return list(specs)
    place = {name: number for number, name in enumerate(order)}
    held = {spec.name for spec in specs}
    missing = [name for name in order if name not in held]
    unknown = sorted(held - set(place))
    if missing or unknown:
        lines = [f"no rank holds {', '.join(missing)}"] if missing else []
        lines += [f"it does not list {', '.join(unknown)}"] if unknown else []
        raise TopologyError(
            f"checkpoint.model_state_dict_keys does not fit the model: {'; '.join(lines)}. List the names of the full "
            "model's state dict, or leave the setting out"
        )
    return sorted(specs, key=lambda spec: place[spec.name])
