"""From what each rank holds to what it writes: the one place where ranks agree on a layout.

A rank knows the global shape of everything it holds, so it computes the files' layout alone. What it cannot know is
settled once, with a few bytes a rank: that the others hold the same (or, under pipeline parallelism, what they hold
instead), and how many copies of each device mesh there are. The result serves every later save of the same state.
"""

from __future__ import annotations

import itertools
import json
import socket
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from hydra_ckpt.distributed import Channel
from hydra_ckpt.errors import TopologyError
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.blocks import BLOCK_SHARDS, BlockFiles, Member, block_files
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.files import DEFAULT_FILE_BYTES, FileLayout, by_file, by_size, lay_out
from hydra_ckpt.layout.plan import Piece, WritePlan, describe, fill_files, fingerprint
from hydra_ckpt.layout.replicas import Holding, Share, shares
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.state.local import LocalTensor, Place
from hydra_ckpt.storage.header import BOXES_KEY, encode_boxes
from hydra_ckpt.store import names

# Fewer bytes than this are not worth a file of their own.
_MIN_FILE_BYTES = 64 << 20
_MAX_WRITERS = 64
# What begins the name of a part that is an export beside the part's own files.
BESIDE = "export/"


@dataclass(frozen=True)
class Agreement:
    """What the ranks settled.

    Attributes:
        specs: Part to all tensors of it, whoever holds them, in the order of the files.
        copies: Mesh (its digest; empty for plain tensors) to this rank's copy of it and the number of copies.
        leads: Whether this rank writes what is the same on all ranks that hold the same tensors.
        fingerprint: Equal on all ranks.
        elsewhere: Part and name of tensors held here that ranks holding otherwise different ones write: a weight that
            two pipeline stages share.
        one_host: Whether all ranks run on one host.
        leader: The first of the ranks that hold the same tensors as this one.
        adapted: Part to what the adapters of all ranks say that its files hold.
        crowds: Part and name of tensors to how many ranks would meet in a file of the whole one.
    """

    specs: Mapping[str, tuple[TensorSpec, ...]]
    copies: Mapping[str, tuple[int, int]]
    leads: bool
    fingerprint: str
    elsewhere: frozenset[tuple[str, str]] = frozenset()
    one_host: bool = True
    leader: int = 0
    adapted: Mapping[str, Naming] = field(default_factory=dict)
    crowds: Mapping[tuple[str, str], int] = field(default_factory=dict)


Parts = Mapping[str, Sequence[LocalTensor]]


def signature(parts: Parts) -> str:
    """Tells whether a plan still holds: equal as long as every tensor lies where it lay. Cheap, made at each save."""
    return str(hash(tuple((part, tuple(item.place for item in items)) for part, items in parts.items())))


def agree(
    parts: Parts,
    channel: Channel,
    stage: int,
    global_order: Sequence[str] | None,
    adapted: Mapping[str, Naming] = MappingProxyType({}),
) -> Agreement:
    """Collective: settle what all ranks hold.

    Args:
        parts: What this rank holds.
        channel: To the other ranks.
        stage: The pipeline rank; ranks of one stage must hold the same tensors.
        global_order: The model's keys in the order of its files, if known.
        adapted: Part to what this rank's adapters say that its files hold.

    Raises:
        TopologyError: Ranks of one stage hold different tensors, or stages disagree about one of the same name.
    """
    local = {part: [item.spec for item in items] for part, items in parts.items()}
    said = {part: naming.to_data() for part, naming in adapted.items()}
    texts = itertools.chain.from_iterable((part, *describe(specs)) for part, specs in local.items())
    text = fingerprint(itertools.chain(texts, [json.dumps(said)]))
    meshes = list(dict.fromkeys(item.place.mesh for items in parts.values() for item in items))
    note = {
        "host": socket.gethostname(),
        "stage": stage,
        "holds": text,
        "meshes": meshes,
    }
    gathered = channel.gather("agreeing on the layout", note)
    positions = channel.scatter("agreeing on the layout", None if gathered is None else _positions(gathered))
    specs: Mapping[str, Sequence[TensorSpec]] = local
    crowds = {(part, item.spec.name): item.place.crowd for part, items in parts.items() for item in items}
    elsewhere: frozenset[tuple[str, str]] = frozenset()
    leads = positions["leader"] == channel.rank
    if positions["several"]:
        writers, crowds, adapted = _union(parts, said, channel, stage, leads)
        specs = {part: list(found) for part, found in writers.items()}
        elsewhere = frozenset(
            (part, spec.name)
            for part, items in local.items()
            for spec in items
            if writers[part][spec] != positions["leader"]
        )
    ordered = {part: tuple(_in_order(part, items, global_order)) for part, items in specs.items()}
    texts = itertools.chain.from_iterable((part, *describe(items)) for part, items in ordered.items())
    copies = {mesh: tuple(place) for mesh, place in zip(meshes, positions["copies"], strict=True)}
    leader, one_host = positions["leader"], positions["one_host"]
    return Agreement(ordered, copies, leads, fingerprint(texts), elsewhere, one_host, leader, adapted, crowds)


def _positions(notes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coordinator only: tell each rank which copy of its meshes it belongs to among the ranks that hold the same."""
    kinds = [(note["stage"], note["holds"]) for note in notes]
    seen: dict[Any, dict[str, int]] = defaultdict(dict)
    own: list[list[tuple[Any, int]]] = []
    for rank, (kind, note) in enumerate(zip(kinds, notes, strict=True)):
        places = []
        for position, mesh in enumerate(note["meshes"]):
            # Plain tensors have no mesh: each rank is a copy of its own.
            identity = mesh or str(rank)
            table = seen[kind, position]
            places.append(((kind, position), table.setdefault(identity, len(table))))
        own.append(places)
    leaders = {kind: rank for rank, kind in reversed(list(enumerate(kinds)))}
    several = len(leaders) > 1
    one_host = len({note["host"] for note in notes}) == 1
    return [
        {
            "several": several,
            "one_host": one_host,
            "leader": leaders[kinds[rank]],
            "copies": [(copy, len(seen[key])) for key, copy in places],
        }
        for rank, places in enumerate(own)
    ]


def _union(
    parts: Parts, said: Mapping[str, Any], channel: Channel, stage: int, leads: bool
) -> tuple[dict[str, dict[TensorSpec, int]], dict[tuple[str, str], int], dict[str, Naming]]:
    """Collective: bring together what the kinds of ranks hold; only one rank of each kind speaks.

    Returns:
        Part to its tensors, each with the rank whose kind writes it; `Agreement.crowds`; part to what the adapters say.
    """
    data = {
        part: [(item.spec.name, item.spec.dtype, list(item.spec.shape), item.place.crowd) for item in items]
        for part, items in parts.items()
    }
    payload = {"stage": stage, "parts": data, "adapted": said} if leads else None
    merged = channel.agree("bringing the tensors of all ranks together", payload, _merge)
    writers = {
        part: {TensorSpec(name, dtype, tuple(shape)): writer for name, dtype, shape, _, writer in rows}
        for part, rows in merged["parts"].items()
    }
    crowds = {(part, row[0]): row[3] for part, rows in merged["parts"].items() for row in rows}
    return writers, crowds, {part: Naming.from_data(data) for part, data in merged["adapted"].items()}


def _merge(payloads: Sequence[dict[str, Any] | None]) -> dict[str, Any]:
    """Coordinator only: the union, in the order of the stages.

    Raises:
        TopologyError: See `agree`.
    """
    speaking = {rank: payload for rank, payload in enumerate(payloads) if payload is not None}
    _refuse_unequal_stages(speaking)
    ordered = sorted(speaking.items(), key=lambda item: (item[1]["stage"], item[0]))
    merged: dict[str, dict[str, Any]] = defaultdict(dict)
    clashes = []
    for rank, payload in ordered:
        for part, rows in payload["parts"].items():
            for name, dtype, shape, crowd in rows:
                known = merged[part].setdefault(name, (name, dtype, shape, crowd, rank))
                if known[1:3] != (dtype, shape):
                    clashes.append(f"{part}: {name} is {dtype} {shape} on rank {rank}, elsewhere {known[1]} {known[2]}")
    adapted = _merge_adapted({rank: payload["adapted"] for rank, payload in ordered}, clashes)
    if clashes:
        raise TopologyError(
            "the ranks disagree about tensors of the same name; nothing was written.\n  " + "\n  ".join(clashes)
        )
    return {"parts": {part: list(rows.values()) for part, rows in merged.items()}, "adapted": adapted}


def _merge_adapted(said: Mapping[int, Mapping[str, Any]], clashes: list[str]) -> dict[str, Any]:
    """Part to what the adapters of all kinds of ranks say together; adds what contradicts."""
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
                        f"{part}: the adapter makes {name} of {pieces[0][3]} on rank {rank}, and of {known[0][3]} on "
                        f"rank {first}"
                    )
            found["dtypes"].update(data["dtypes"])
            found["shapes"].update(data["shapes"])
    return merged


def _refuse_unequal_stages(speaking: Mapping[int, dict[str, Any]]) -> None:
    first: dict[int, tuple[int, set[tuple[str, str]]]] = {}
    lines: list[str] = []
    for rank, payload in speaking.items():
        keys = {
            (part, f"{name} {dtype} {list(shape)}")
            for part, rows in payload["parts"].items()
            for name, dtype, shape, _ in rows
        }
        keys |= {
            (part, f"{name} made of {source} {offsets} {sizes} by the adapter")
            for part, data in payload["adapted"].items()
            for name, _, _, source, offsets, sizes, *_ in data["aliases"]
        }
        known_rank, known = first.setdefault(payload["stage"], (rank, keys))
        if known != keys:
            pair = f"of ranks {known_rank} and {rank}"
            lines += [f"{pair}, only on rank {known_rank}: {part}: {key}" for part, key in sorted(known - keys)]
            lines += [f"{pair}, only on rank {rank}: {part}: {key}" for part, key in sorted(keys - known)]
    if lines:
        raise TopologyError(
            "ranks of the same pipeline stage hold different tensors; nothing was written.\n  "
            + "\n  ".join(lines)
            + "\n  Build the same model on every rank, or pass each stage's pp_rank to build()"
        )


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
            f"checkpoint.model_state_dict_keys does not fit the model: {'; '.join(lines)}. Give the names of the whole "
            "model's state dict, or leave the setting out"
        )
    return sorted(specs, key=lambda spec: place[spec.name])


@dataclass(frozen=True, slots=True)
class PartLayout:
    """How one part is laid out.

    Attributes:
        part: Its name.
        directory: Where its files go.
        stem: How they are called.
        max_bytes: Size at which a new file begins.
        own: Whether each rank writes a file of its own instead of all filling the same.
        distcp: Whether the files are PyTorch's own.
        grouped: Name of a tensor to a text that is equal for those of one file; by size where there is none.
        beside: Whether it is an export that stands beside the part's own files, instead of being these.
        block: Tensors for which more ranks than this would meet do not stand whole, but in files of blocks of so many
            neighbours; 0 for none.
    """

    part: str
    directory: str
    stem: str
    max_bytes: int = DEFAULT_FILE_BYTES
    own: bool = False
    distcp: bool = False
    grouped: Mapping[str, str] | None = None
    beside: bool = False
    block: int = 0


def consolidated_layout(part: str, diffusers: bool) -> PartLayout:
    """A Hugging Face directory."""
    stem = "diffusion_pytorch_model" if diffusers else "model"
    return PartLayout(part, f"{part}/{names.CONSOLIDATED}", stem)


def adapter_layout(part: str) -> PartLayout:
    """A directory as peft writes it: one file, whatever its size."""
    return PartLayout(part, f"{part}/{names.CONSOLIDATED}", "adapter_model", max_bytes=1 << 62)


def shard_layout(part: str) -> PartLayout:
    """One file a rank."""
    return PartLayout(part, part, "shard", own=True)


def distcp_layout(part: str) -> PartLayout:
    """PyTorch's own files, one a rank."""
    return PartLayout(part, part, "__", distcp=True)


def own_layout(part: str) -> PartLayout:
    """State in a file of each rank's own, where ranks cannot fill one together."""
    return PartLayout(part, part, part, own=True)


def state_layout(part: str, nbytes: int, world_size: int, block: int = BLOCK_SHARDS) -> PartLayout:
    """Whole tensors in so many files that ranks need not queue on one; in blocks, where ranks are many."""
    files = min(world_size, _MAX_WRITERS)
    max_bytes = min(max(-(-nbytes // files), _MIN_FILE_BYTES), DEFAULT_FILE_BYTES)
    return PartLayout(part, part, part, max_bytes, block=block)


def make_plan(
    parts: Parts, agreement: Agreement, layouts: Sequence[PartLayout], rank: int, world_size: int
) -> WritePlan:
    """What this rank writes. Positions of shares count through the parts' tensors in order (see `tensors_of`)."""
    files: list[FileLayout] = []
    own_files: list[FileLayout] = []
    pieces: list[Piece] = []
    foreign: dict[str, dict[int, Share]] = {}
    pending_own: list[tuple[PartLayout, dict[int, Share]]] = []
    in_blocks: list[FileLayout] = []
    led: set[int] = set()
    by_part = _shares(parts, {layout.part for layout in layouts}, agreement)
    for layout in layouts:
        mine = by_part.get(layout.part, {})
        if layout.distcp:
            foreign[layout.part] = mine
            continue
        if layout.own:
            pending_own.append((layout, mine))
            continue
        laid = lay_out_part(layout, agreement)
        pieces += fill_files(laid, mine, len(files))
        files += laid
    for layout, mine in pending_own:
        file = _own_file(layout, mine, rank, world_size)
        local = {position: _as_whole(share) for position, share in mine.items()}
        pieces += fill_files([file], local, len(files) + len(own_files))
        own_files.append(file)
    for layout in layouts:
        for found in _own_blocks(layout, parts.get(layout.part, ()), agreement):
            first = len(files) + len(own_files) + len(in_blocks)
            local = {position: _in_block(share, found) for position, share in by_part.get(layout.part, {}).items()}
            pieces += fill_files(found.files, local, first)
            led.update(range(len(in_blocks), len(in_blocks) + len(found.files) * found.leads))
            in_blocks += found.files
    all_shares = {position: share for mine in by_part.values() for position, share in mine.items()}
    blocked = [f"{layout.part}/{spec.name}" for layout in layouts for spec in _blocked(layout, agreement)]
    choice = fingerprint([agreement.fingerprint, *map(str, layouts), str(world_size), *blocked])
    return WritePlan(
        tuple(files),
        tuple(own_files),
        all_shares,
        tuple(pieces),
        choice,
        foreign,
        tuple(in_blocks),
        frozenset(led),
    )


def lay_out_part(layout: PartLayout, agreement: Agreement) -> list[FileLayout]:
    """The files that hold a part whole, or what of it does not lie in blocks' files."""
    blocked = set(_blocked(layout, agreement))
    specs = [spec for spec in agreement.specs.get(layout.part, ()) if spec not in blocked]
    groups = by_size(specs, layout.max_bytes) if layout.grouped is None else by_file(specs, layout.grouped)
    return lay_out(groups, layout.directory, layout.stem) if groups else []


def _shares(parts: Parts, wanted: Collection[str], agreement: Agreement) -> dict[str, dict[int, Share]]:
    """Part to this rank's shares by position. All parts are divided together, so that no replica writes in each."""
    holdings: list[Holding] = []
    places: list[tuple[str, int]] = []
    position = 0
    for part, items in parts.items():
        if part in wanted:
            holdings += _holdings(part, items, agreement)
            places += [(part, position + number) for number in range(len(items))]
        position += len(items)
    found: dict[str, dict[int, Share]] = defaultdict(dict)
    for index, share in shares(holdings).items():
        part, place = places[index]
        found[part][place] = share
    return found


def tensors_of(parts: Parts) -> list[LocalTensor]:
    """All tensors of all parts in order."""
    return list(itertools.chain.from_iterable(parts.values()))


def replica_of(place: Place, agreement: Agreement) -> tuple[int, int]:
    """This rank's index among all ranks that hold the same, whatever their mesh, and their number."""
    copy, copies = agreement.copies[place.mesh]
    index, count = place.replica
    return copy * count + index, copies * count


def _holdings(part: str, items: Sequence[LocalTensor], agreement: Agreement) -> list[Holding]:
    holdings = []
    for item in items:
        place = item.place
        replica = replica_of(place, agreement)
        divisible = item.divisible
        if (part.removeprefix(BESIDE), place.origin or place.spec.name) in agreement.elsewhere:
            # Its writers are the replicas before these, and write all of it.
            replica, divisible = (replica[1] + replica[0], 2 * replica[1]), False
        holdings.append(Holding(place.spec, place.box, replica, (place.mesh, place.group), divisible))
    return holdings


def _blocked(layout: PartLayout, agreement: Agreement) -> list[TensorSpec]:
    """Tensors of a part that lie in the files of blocks, whoever holds them."""
    if not layout.block:
        return []
    specs = agreement.specs.get(layout.part, ())
    return [spec for spec in specs if spec.nbytes and agreement.crowds.get((layout.part, spec.name), 1) > layout.block]


def _own_blocks(layout: PartLayout, items: Sequence[LocalTensor], agreement: Agreement) -> list[BlockFiles]:
    """The files of the blocks of a part to which this rank belongs."""
    blocked = {spec.name for spec in _blocked(layout, agreement)}
    meshes = {mesh: number for number, mesh in enumerate(agreement.copies)}
    members = []
    for item in items:
        place, name = item.place, item.spec.name
        if place.sharding is not None and name in blocked and (layout.part, name) not in agreement.elsewhere:
            index, replicas = replica_of(place, agreement)
            members.append(Member(place.spec, place.sharding, replicas, index == 0, meshes[place.mesh]))
    # Ranks that hold other tensors, on a mesh like this one, have other files.
    stem = f"{layout.stem}-{agreement.leader}"
    return [
        replace(found, files=tuple(_with_boxes(file, found.boxes) for file in found.files))
        for found in block_files(members, layout.block, layout.directory, stem)
    ]


def _with_boxes(file: FileLayout, boxes: Mapping[str, tuple[tuple[int, ...], Box]]) -> FileLayout:
    """The file, saying of which boxes it holds the bytes."""
    held = {spec.name: boxes[spec.name] for spec in file.tensors}
    return FileLayout(file.path, file.tensors, {"format": "pt", BOXES_KEY: encode_boxes(held)})


def _in_block(share: Share, found: BlockFiles) -> Share:
    """A share as a part of the block's box, if that has any of the tensor."""
    shape_and_box = found.boxes.get(share.spec.name)
    if shape_and_box is None:
        return share
    block = shape_and_box[1]
    spec = TensorSpec(share.spec.name, share.spec.dtype, block.sizes)
    return Share(spec, share.box.within(block), share.start, share.stop)


def _own_file(layout: PartLayout, mine: Mapping[int, Share], rank: int, world_size: int) -> FileLayout:
    boxes = {share.spec.name: (share.spec.shape, share.box) for share in mine.values()}
    specs = sorted((_as_whole(share).spec for share in mine.values()), key=lambda spec: -spec.itemsize)
    path = f"{layout.directory}/{layout.stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    return _with_boxes(FileLayout(path, tuple(specs)), boxes)


def _as_whole(share: Share) -> Share:
    """A share as a tensor of its own."""
    spec = TensorSpec(share.spec.name, share.spec.dtype, share.box.sizes)
    return Share(spec, Box.whole(spec.shape), share.start, share.stop)
