"""From what each rank holds to what it writes. A plan serves every later save of the same state."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hydra_ckpt.layout.blocks import BLOCK_SHARDS, BlockFiles, Member, block_files
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.files import DEFAULT_FILE_BYTES, FileLayout, by_file, by_size, lay_out
from hydra_ckpt.layout.plan import Piece, WritePlan, fill_files, fingerprint
from hydra_ckpt.layout.replicas import Holding, Share, shares
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.state.local import LocalTensor, Place
from hydra_ckpt.storage.header import BOXES_KEY, encode_boxes
from hydra_ckpt.storage.stages import on_rank
from hydra_ckpt.store import names

# Fewer bytes than this are not worth a file of their own.
_MIN_FILE_BYTES = 64 << 20
_MAX_WRITERS = 64
# What begins the name of a part that is an export beside the part's own files.
BESIDE = "export/"


def signature(parts: Parts, objects: Sequence[str] = ()) -> str:
    """Tells whether a plan still holds: equal as long as every tensor lies where it lay. Cheap, made at each save.

    Args:
        parts: What this rank holds.
        objects: Labels of what it holds beside tensors.
    """
    places = tuple((part, tuple(item.place for item in items)) for part, items in parts.items())
    return str(hash((places, tuple(objects))))


@dataclass(frozen=True, slots=True)
class PartLayout:
    """How one part is laid out.

    Attributes:
        part: Its name.
        directory: Where its files go.
        stem: How they are called.
        max_bytes: Size at which a new file begins.
        own: Whether each rank writes a file of its own instead of all filling the same.
        apart: Whether each rank writes all that it holds, under names of its own: see `on_rank`.
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
    apart: bool = False


def consolidated_layout(part: str, diffusers: bool) -> PartLayout:
    """A Hugging Face directory."""
    stem = "diffusion_pytorch_model" if diffusers else "model"
    return PartLayout(part, f"{part}/{names.CONSOLIDATED}", stem)


def adapter_layout(part: str) -> PartLayout:
    """A directory as peft writes it: one file, whatever its size."""
    return PartLayout(part, f"{part}/{names.CONSOLIDATED}", names.ADAPTER, max_bytes=1 << 62)


def shard_layout(part: str) -> PartLayout:
    """One file a rank."""
    return PartLayout(part, part, "shard", own=True)


def distcp_layout(part: str) -> PartLayout:
    """PyTorch's own files, one a rank."""
    return PartLayout(part, part, "__", distcp=True)


def apart_layout(part: str) -> PartLayout:
    """Values of each rank's own in a file of each rank."""
    return PartLayout(part, part, part, own=True, apart=True)


def own_layout(part: str) -> PartLayout:
    """State in a file of each rank's own, where ranks cannot fill one together."""
    return PartLayout(part, part, part, own=True)


def state_layout(part: str, nbytes: int, world_size: int, block: int = BLOCK_SHARDS) -> PartLayout:
    """Whole tensors in so many files that ranks need not queue on one; in blocks, where ranks are many."""
    files = min(world_size, _MAX_WRITERS)
    max_bytes = min(max(-(-nbytes // files), _MIN_FILE_BYTES), DEFAULT_FILE_BYTES)
    return PartLayout(part, part, part, max_bytes, block=block)


def make_plan(
    parts: Parts,
    agreement: Agreement,
    layouts: Sequence[PartLayout],
    rank: int,
    world_size: int,
    *,
    of_rows: bool = False,
    read_again: bool = False,
) -> WritePlan:
    """What this rank writes. Positions of shares count through the parts' tensors in order (see `tensors_of`).

    Args:
        parts: What this rank holds.
        agreement: What all ranks hold.
        layouts: Where the parts go.
        rank: This rank.
        world_size: All ranks.
        of_rows: Whether all ranks hold whole rows of every tensor, see `is_of_rows`.
        read_again: Whether the files are read again in the same save.
    """
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
        called = {place: _renamed(share, rank) if layout.apart else share for place, share in mine.items()}
        file = _own_file(layout, called, rank, world_size)
        local = {position: _as_whole(share) for position, share in called.items()}
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
    choice = fingerprint([agreement.fingerprint, *map(str, layouts), str((world_size, of_rows, read_again)), *blocked])
    # Files to which nobody writes in short runs, through a memory map.
    own = range(len(files), len(files) + len(own_files))
    unmapped = range(len(files) + len(own_files) + len(in_blocks)) if of_rows else own
    return WritePlan(
        tuple(files),
        tuple(own_files),
        all_shares,
        tuple(pieces),
        choice,
        foreign,
        tuple(in_blocks),
        frozenset(led),
        frozenset() if read_again else frozenset(unmapped),
    )


def is_of_rows(item: LocalTensor) -> bool:
    """Whether the part held here is whole rows of the tensor, and so one run of bytes in its file."""
    return item.box.sizes[1:] == item.spec.shape[1:] or not item.box.numel


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
        if part == names.OWN:
            replica = (0, 1)
        elif (part.removeprefix(BESIDE), place.origin or place.spec.name) in agreement.elsewhere:
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


def _renamed(share: Share, rank: int) -> Share:
    """A share of values that other ranks have others of."""
    return replace(share, spec=replace(share.spec, name=on_rank(rank, share.spec.name)))


def _as_whole(share: Share) -> Share:
    """A share as a tensor of its own."""
    spec = TensorSpec(share.spec.name, share.spec.dtype, share.box.sizes)
    return Share(spec, Box.whole(spec.shape), share.start, share.stop)
