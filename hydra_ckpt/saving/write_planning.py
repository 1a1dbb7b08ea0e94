"""From what each rank holds to what it writes. A plan serves every later save of the same state."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from hydra_ckpt.layout.blocks import BLOCK_SHARDS, BlockFiles, Member, block_files
from hydra_ckpt.layout.boxes import Box
from hydra_ckpt.layout.file_layout import DEFAULT_FILE_BYTES, FileLayout, by_file, by_size, lay_out
from hydra_ckpt.layout.plan import WriteItem, WritePlan, fill_files, fingerprint
from hydra_ckpt.layout.replicas import LocalShard, WriteShare, shares
from hydra_ckpt.layout.specs import TensorSpec
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.state.local import LocalTensor, ShardPlacement
from hydra_ckpt.storage.header import BOXES_KEY, encode_boxes
from hydra_ckpt.storage.stage_names import on_rank
from hydra_ckpt.store import names

# Fewer bytes than this are not worth a file of their own.
_MIN_FILE_BYTES = 64 << 20
_MAX_WRITERS = 64
# Prefix of the name of a part that is an export beside the part's own files.
BESIDE = "export/"


def signature(parts: Parts, objects: Sequence[str] = ()) -> str:
    """Shows whether a plan is still valid: equal as long as no tensor has changed place. Cheap, computed at each save.

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
        part: The part's name.
        directory: Where its files go.
        stem: How its file names begin.
        max_bytes: Size at which a new file begins.
        own: Whether each rank writes its own file instead of all ranks filling the same files.
        apart: Whether each rank writes everything it holds, under its own names: see `on_rank`.
        distcp: Whether the files use PyTorch's own format.
        grouped: Tensor name to a text that is equal for all tensors of one file; None groups them by size.
        beside: Whether it is an export written in addition to the part's own files, not instead of them.
        block: Tensors shared by more ranks than this are not written whole, but in files of blocks of this many
            neighbours; 0 for never.
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
    """A directory in peft's layout: one file, whatever its size."""
    return PartLayout(part, f"{part}/{names.CONSOLIDATED}", names.ADAPTER, max_bytes=1 << 62)


def shard_layout(part: str) -> PartLayout:
    """One file per rank."""
    return PartLayout(part, part, "shard", own=True)


def distcp_layout(part: str) -> PartLayout:
    """Files in PyTorch's own format, one per rank."""
    return PartLayout(part, part, "__", distcp=True)


def apart_layout(part: str) -> PartLayout:
    """Values that differ between ranks: one file per rank, holding all its values."""
    return PartLayout(part, part, part, own=True, apart=True)


def own_layout(part: str) -> PartLayout:
    """State in one file per rank, for when ranks cannot write into one file together."""
    return PartLayout(part, part, part, own=True)


def state_layout(part: str, nbytes: int, world_size: int, block: int = BLOCK_SHARDS) -> PartLayout:
    """Whole tensors, in enough files that ranks do not queue for one; in blocks if there are many ranks."""
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
    row_contiguous: bool = False,
    read_again: bool = False,
) -> WritePlan:
    """What this rank writes. The position of a share is its tensor's index in `tensors_of`.

    Args:
        parts: What this rank holds.
        agreement: What all ranks hold.
        layouts: Where the parts go.
        rank: This rank.
        world_size: All ranks.
        row_contiguous: Whether all ranks hold whole rows of every tensor, see `is_row_contiguous`.
        read_again: Whether the same save reads the files back.
    """
    by_part = _shares(parts, {layout.part for layout in layouts}, agreement)
    files, pieces = _shared_files(layouts, by_part, agreement)
    own_files, own_pieces = _own_files(layouts, by_part, rank, world_size, len(files))
    first = len(files) + len(own_files)
    in_blocks, block_pieces, led = _block_files(layouts, by_part, parts, agreement, first)
    blocked = [f"{layout.part}/{spec.name}" for layout in layouts for spec in _blocked(layout, agreement)]
    choice = fingerprint(
        [agreement.fingerprint, *map(str, layouts), str((world_size, row_contiguous, read_again)), *blocked]
    )
    # Files that no rank writes in short runs, so that none needs a memory map.
    unmapped = range(first + len(in_blocks)) if row_contiguous else range(len(files), first)
    return WritePlan(
        tuple(files),
        tuple(own_files),
        {position: share for mine in by_part.values() for position, share in mine.items()},
        (*pieces, *own_pieces, *block_pieces),
        choice,
        {layout.part: by_part.get(layout.part, {}) for layout in layouts if layout.distcp},
        tuple(in_blocks),
        frozenset(led),
        frozenset() if read_again else frozenset(unmapped),
    )


def _shared_files(
    layouts: Sequence[PartLayout], by_part: Mapping[str, Mapping[int, WriteShare]], agreement: Agreement
) -> tuple[list[FileLayout], list[WriteItem]]:
    """The files that all ranks fill together, and this rank's pieces of them."""
    files: list[FileLayout] = []
    pieces: list[WriteItem] = []
    for layout in layouts:
        if not layout.distcp and not layout.own:
            laid = lay_out_part(layout, agreement)
            pieces += fill_files(laid, by_part.get(layout.part, {}), len(files))
            files += laid
    return files, pieces


def _own_files(
    layouts: Sequence[PartLayout],
    by_part: Mapping[str, Mapping[int, WriteShare]],
    rank: int,
    world_size: int,
    first: int,
) -> tuple[list[FileLayout], list[WriteItem]]:
    """The files that this rank fills alone, and its pieces of them; `first` is the number of the first file."""
    files: list[FileLayout] = []
    pieces: list[WriteItem] = []
    for layout in layouts:
        if layout.own and not layout.distcp:
            mine = by_part.get(layout.part, {})
            called = {place: _renamed(share, rank) if layout.apart else share for place, share in mine.items()}
            file = _own_file(layout, called, rank, world_size)
            local = {position: _as_whole(share) for position, share in called.items()}
            pieces += fill_files([file], local, first + len(files))
            files.append(file)
    return files, pieces


def _block_files(
    layouts: Sequence[PartLayout],
    by_part: Mapping[str, Mapping[int, WriteShare]],
    parts: Parts,
    agreement: Agreement,
    first: int,
) -> tuple[list[FileLayout], list[WriteItem], set[int]]:
    """The files of this rank's blocks, its pieces of them, and which of them it creates."""
    files: list[FileLayout] = []
    pieces: list[WriteItem] = []
    led: set[int] = set()
    for layout in layouts:
        for found in _own_blocks(layout, parts.get(layout.part, ()), agreement):
            local = {position: _in_block(share, found) for position, share in by_part.get(layout.part, {}).items()}
            pieces += fill_files(found.files, local, first + len(files))
            led.update(range(len(files), len(files) + len(found.files) * found.leads))
            files += found.files
    return files, pieces, led


def is_row_contiguous(item: LocalTensor) -> bool:
    """Whether this rank holds whole rows of the tensor, and so one run of bytes in its file."""
    return item.box.sizes[1:] == item.spec.shape[1:] or not item.box.numel


def lay_out_part(layout: PartLayout, agreement: Agreement) -> list[FileLayout]:
    """The files that hold a part's whole tensors, that is, those not in files of blocks."""
    blocked = set(_blocked(layout, agreement))
    specs = [spec for spec in agreement.specs.get(layout.part, ()) if spec not in blocked]
    groups = by_size(specs, layout.max_bytes) if layout.grouped is None else by_file(specs, layout.grouped)
    return lay_out(groups, layout.directory, layout.stem) if groups else []


def _shares(parts: Parts, wanted: Collection[str], agreement: Agreement) -> dict[str, dict[int, WriteShare]]:
    """Part to this rank's shares by position. All parts are divided together, so no replica writes some of each."""
    holdings: list[LocalShard] = []
    places: list[tuple[str, int]] = []
    position = 0
    for part, items in parts.items():
        if part in wanted:
            holdings += _holdings(part, items, agreement)
            places += [(part, position + number) for number in range(len(items))]
        position += len(items)
    found: dict[str, dict[int, WriteShare]] = defaultdict(dict)
    for index, share in shares(holdings).items():
        part, place = places[index]
        found[part][place] = share
    return found


def tensors_of(parts: Parts) -> list[LocalTensor]:
    """All tensors of all parts, in order."""
    return list(itertools.chain.from_iterable(parts.values()))


def replica_of(place: ShardPlacement, agreement: Agreement) -> tuple[int, int]:
    """This rank's index among all ranks that hold the same, on any mesh, and the number of those ranks."""
    copy, copies = agreement.copies[place.mesh]
    index, count = place.replica
    return copy * count + index, copies * count


def _holdings(part: str, items: Sequence[LocalTensor], agreement: Agreement) -> list[LocalShard]:
    holdings = []
    for item in items:
        place = item.place
        replica = replica_of(place, agreement)
        divisible = item.divisible
        if part == names.OWN:
            replica = (0, 1)
        elif (part.removeprefix(BESIDE), place.origin or place.spec.name) in agreement.elsewhere:
            # Ranks of the other kind count as the replicas before these, and write all of it.
            replica, divisible = (replica[1] + replica[0], 2 * replica[1]), False
        holdings.append(LocalShard(place.spec, place.box, replica, (place.mesh, place.group), divisible))
    return holdings


def _blocked(layout: PartLayout, agreement: Agreement) -> list[TensorSpec]:
    """The part's tensors that are written in files of blocks, held here or not."""
    if not layout.block:
        return []
    specs = agreement.specs.get(layout.part, ())
    return [
        spec
        for spec in specs
        if spec.nbytes and agreement.ranks_per_file.get((layout.part, spec.name), 1) > layout.block
    ]


def _own_blocks(layout: PartLayout, items: Sequence[LocalTensor], agreement: Agreement) -> list[BlockFiles]:
    """The files of the part's blocks that this rank belongs to."""
    blocked = {spec.name for spec in _blocked(layout, agreement)}
    meshes = {mesh: number for number, mesh in enumerate(agreement.copies)}
    members = []
    for item in items:
        place, name = item.place, item.spec.name
        if place.sharding is not None and name in blocked and (layout.part, name) not in agreement.elsewhere:
            index, replicas = replica_of(place, agreement)
            members.append(Member(place.spec, place.sharding, replicas, index == 0, meshes[place.mesh]))
    # Ranks that hold other tensors on a similar mesh have other files.
    stem = f"{layout.stem}-{agreement.leader}"
    return [
        replace(found, files=tuple(_with_boxes(file, found.boxes) for file in found.files))
        for found in block_files(members, layout.block, layout.directory, stem)
    ]


def _with_boxes(file: FileLayout, boxes: Mapping[str, tuple[tuple[int, ...], Box]]) -> FileLayout:
    """The file, with a header that says which boxes it holds."""
    held = {spec.name: boxes[spec.name] for spec in file.tensors}
    return FileLayout(file.path, file.tensors, {"format": "pt", BOXES_KEY: encode_boxes(held)})


def _in_block(share: WriteShare, found: BlockFiles) -> WriteShare:
    """A share relative to the block's box, if the block holds any of the tensor."""
    shape_and_box = found.boxes.get(share.spec.name)
    if shape_and_box is None:
        return share
    block = shape_and_box[1]
    spec = TensorSpec(share.spec.name, share.spec.dtype, block.sizes)
    return WriteShare(spec, share.box.within(block), share.start, share.stop)


def _own_file(layout: PartLayout, mine: Mapping[int, WriteShare], rank: int, world_size: int) -> FileLayout:
    boxes = {share.spec.name: (share.spec.shape, share.box) for share in mine.values()}
    specs = sorted((_as_whole(share).spec for share in mine.values()), key=lambda spec: -spec.itemsize)
    path = f"{layout.directory}/{layout.stem}-{rank + 1:05d}-of-{world_size:05d}.safetensors"
    return _with_boxes(FileLayout(path, tuple(specs)), boxes)


def _renamed(share: WriteShare, rank: int) -> WriteShare:
    """A share under this rank's own name, for values that differ between ranks."""
    return replace(share, spec=replace(share.spec, name=on_rank(rank, share.spec.name)))


def _as_whole(share: WriteShare) -> WriteShare:
    """A share as a separate tensor."""
    spec = TensorSpec(share.spec.name, share.spec.dtype, share.box.sizes)
    return WriteShare(spec, Box.whole(spec.shape), share.start, share.stop)
