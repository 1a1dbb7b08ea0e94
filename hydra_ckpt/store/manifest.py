"""The manifest: what a checkpoint holds, in a form that reveals every changed byte.

`manifest.json` is canonical JSON (sorted keys, one space of indent) that ends with the xxh3 of itself without that
field. A reader serializes what it read again and compares: any difference is damage. It is written last; a directory
with a whole manifest is complete.

A later format keeps this seal and the field `format`, so that an older reader can distinguish a newer checkpoint from a
damaged one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import xxhash

from hydra_ckpt.errors import CheckpointFormatError, CheckpointNotFoundError, CorruptCheckpointError
from hydra_ckpt.store import names
from hydra_ckpt.store.small_files import read_small_file

FORMATS = (1, 2)
"""The formats that this version reads."""
WRITER = "hydra_ckpt"
"""In `details`: the version that wrote the checkpoint."""
TOKEN = "token"  # noqa: S105 - no secret
"""In `details`: random text of the save that wrote the checkpoint."""
_DIGEST_FIELD = "~xxh3"  # sorts last
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 2048
_SEAL = re.compile(rb',\n "~xxh3": "[0-9a-f]{16}"\n\}\n\Z')
_SEAL_BYTES = 40
_XXH3 = re.compile(r"[0-9a-f]{16}")
MAX_BYTES = 1 << 30
_MAX_METRICS_BYTES = 16 << 20
_MAX_DEPTH = 64
_MOST = 1 << 62  # limit of every size and number
_LAST_TIME = 1e11  # Unix time in seconds; later times cannot be shown as a date


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of the checkpoint.

    Attributes:
        bytes: Its size in bytes.
        xxh3: The digest of the whole file; None if records in a digest sidecar cover it.
    """

    bytes: int
    xxh3: str | None = None


@dataclass(frozen=True, slots=True)
class PartRecord:
    """Where one part's tensors are stored.

    Attributes:
        format: `safetensors`, or `distcp` (PyTorch's own files).
        files: The files, relative to the checkpoint.
        index: For `distcp` a row for each chunk in these files; see `hydra_ckpt.storage.distcp`.
    """

    format: str
    files: tuple[str, ...]
    index: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: Completed optimizer steps.
        epoch: Epoch at the save.
        created: Unix time in seconds.
        world_size: Ranks that wrote it.
        parts: Name (`model`, `model/<name>`, `optim`, `extras`) to where its tensors are.
        exports: Hugging Face directories in the checkpoint, by the part they export.
        files: Every file except the manifest and files that are added later.
        digests: The sidecars with digests of tensor files.
        metrics: Metrics known at the save.
        plan: Fingerprint of the write plan.
        topology: How the ranks were arranged; see `Topology`.
        details: Plain data for people: versions, host, incarnation.
        format: One of FORMATS; later ones contain data that earlier readers would misread.
    """

    step: int
    epoch: int
    created: float
    world_size: int
    parts: Mapping[str, PartRecord]
    files: Mapping[str, FileRecord]
    digests: tuple[str, ...] = ()
    exports: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""
    topology: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    format: int = FORMATS[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of all files listed."""
        return sum(record.bytes for record in self.files.values())


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest file's content."""
    body = {name: getattr(manifest, name) for name in _FIELDS}
    # Thousands of ranks have tens of thousands of files; `asdict` would copy every field of each.
    files = {name: {"bytes": record.bytes, "xxh3": record.xxh3} for name, record in manifest.files.items()}
    parts = {name: asdict(record) for name, record in manifest.parts.items()}
    return seal({**body, "files": files, "parts": parts})


_FIELDS = tuple(item.name for item in fields(Manifest))


def seal(body: dict[str, Any]) -> bytes:
    """Canonical JSON of `body`, which is not empty, with its digest in the last field."""
    text = _dump(body)
    # The field sorts last, so the text need not be serialized again.
    last = f',\n "{_DIGEST_FIELD}": "{xxhash.xxh3_64_hexdigest(text)}"\n}}\n'
    return text.removesuffix(b"\n}\n") + last.encode()


def _dump(body: dict[str, Any]) -> bytes:
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def unseal(path: Path, data: bytes) -> dict[str, Any]:
    """The body of a sealed file.

    Raises:
        CorruptCheckpointError: Any byte differs from what `seal` wrote.
    """
    try:
        if _SEAL.search(data, max(0, len(data) - _SEAL_BYTES)) is None:
            raise ValueError("no seal at its end")  # checked before parsing, which could take far too long
        body = json.loads(data.decode())
        digest = body.pop(_DIGEST_FIELD)
        resealed = seal(body)  # a lone surrogate cannot be written
    except (ValueError, RecursionError, MemoryError, KeyError, AttributeError, TypeError):
        raise CorruptCheckpointError(path, "it is incomplete, or not JSON that hydra_ckpt wrote") from None
    if resealed != data:
        raise CorruptCheckpointError(
            path, "its digest does not match", expected=digest, found=xxhash.xxh3_64_hexdigest(_dump(body))
        )
    return dict(body)


def read_sealed(path: Path, limit: int = MAX_BYTES) -> dict[str, Any]:
    """Read and check a sealed file of at most this many bytes.

    Raises:
        FileNotFoundError: It does not exist.
        CorruptCheckpointError: It is damaged, a link, or far too large.
    """
    return unseal(path, read_small_file(path, limit))


def read_metrics(directory: Path) -> dict[str, Any]:
    """What was added to a checkpoint after its save: `metrics`, and perhaps more.

    Raises:
        FileNotFoundError: Nothing was added.
        CorruptCheckpointError: It is damaged, or holds something else.
    """
    path = directory / names.METRICS
    body = read_sealed(path, _MAX_METRICS_BYTES)
    if not _are_metrics(body.get("metrics")):
        raise CorruptCheckpointError(path, "its metrics are not numbers by name")
    return body


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint's directory.

    Raises:
        CheckpointNotFoundError: There is none: the directory is not a checkpoint.
        CheckpointFormatError: A newer version wrote it.
        CorruptCheckpointError: It is damaged, or names files outside the checkpoint.
    """
    path = directory / names.MANIFEST
    try:
        body = read_sealed(path)
    except FileNotFoundError:
        raise CheckpointNotFoundError(
            f"{directory} holds no {names.MANIFEST}: it is not a finished checkpoint"
        ) from None
    _check_format(path, body)
    try:
        return _from_body(path, body)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise CorruptCheckpointError(path, f"a field is missing or of the wrong kind: {error!r}") from None


def _check_format(path: Path, body: dict[str, Any]) -> None:
    number = body.get("format")
    if type(number) is not int or number < FORMATS[0]:
        raise CorruptCheckpointError(
            path, f"its format is {str(number)[:_MAX_NAME_BYTES]!r}, which is not a format number"
        )
    if number not in FORMATS:
        details = body.get("details")
        writer = details.get(WRITER) if isinstance(details, dict) else None
        known = isinstance(writer, str) and len(writer) < _MAX_NAME_BYTES
        raise CheckpointFormatError(path, number, FORMATS, writer if known else None)


def _from_body(path: Path, body: dict[str, Any]) -> Manifest:
    files = {name: FileRecord(int(entry["bytes"]), entry["xxh3"]) for name, entry in body["files"].items()}
    parts = {
        name: PartRecord(entry["format"], tuple(entry["files"]), tuple(entry["index"]))
        for name, entry in body["parts"].items()
    }
    exports = {str(name): str(place) for name, place in body["exports"].items()}
    manifest = Manifest(
        **{**body, "files": files, "parts": parts, "exports": exports, "digests": tuple(body["digests"])}
    )
    for name in [*files, *exports.values()]:
        if not _is_inside(name):
            raise CorruptCheckpointError(
                path, f"the file name {name[:200]!r} leads out of the checkpoint, or is not valid"
            )
    _check_kinds(path, manifest)
    listed = [*manifest.digests, *(name for part in parts.values() for name in part.files)]
    unknown = sorted(set(listed) - set(files))
    if unknown or not all(type(value) is int and 0 <= value < _MOST for value in (manifest.step, manifest.epoch)):
        raise CorruptCheckpointError(path, f"it contradicts itself: {unknown or 'step and epoch'}")
    return manifest


def _check_kinds(path: Path, manifest: Manifest) -> None:
    """Check the fields that later readers rely on: a correct digest does not make them true."""
    sound = {
        "files": all(0 <= file.bytes < _MOST and _is_digest(file.xxh3) for file in manifest.files.values()),
        "metrics": _are_metrics(manifest.metrics),
        "created": type(manifest.created) in (int, float) and 0 <= manifest.created < _LAST_TIME,
        "world_size": type(manifest.world_size) is int and 0 < manifest.world_size < _MOST,
        "plan": isinstance(manifest.plan, str),
        "topology": _is_topology(manifest.topology),
        "details": type(manifest.details) is dict and _is_shallow(manifest.details, _MAX_DEPTH),
        "parts": all(isinstance(part.format, str) for part in manifest.parts.values()),
    }
    wrong = [name for name, is_sound in sound.items() if not is_sound]
    if wrong:
        raise CorruptCheckpointError(path, f"a field is of the wrong kind: {', '.join(wrong)}")


def _are_metrics(value: object) -> bool:
    """Whether this maps names to numbers that fit in a float; NaN and infinities are allowed."""
    return type(value) is dict and all(_is_number(item) for item in value.values())


def _is_number(value: object) -> bool:
    if type(value) is not int and type(value) is not float:
        return False
    try:
        math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False
    return True


def _is_topology(value: object) -> bool:
    if type(value) is not dict:
        return False
    leaders = value.get("leaders", [])
    if not _is_shallow(value, _MAX_DEPTH):
        return False
    return type(leaders) is list and all(type(rank) is int and 0 <= rank < _MOST for rank in leaders)


def _is_shallow(value: object, depth: int) -> bool:
    """Whether plain data is nested no deeper than this; printing it uses one stack frame for each level."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth > 0 and all(_is_shallow(item, depth - 1) for item in below)


def _is_digest(value: object) -> bool:
    return value is None or (isinstance(value, str) and _XXH3.fullmatch(value) is not None)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    fits = len(name.encode()) < _MAX_PATH_BYTES and all(len(part.encode()) <= _MAX_NAME_BYTES for part in path.parts)
    return fits and bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
