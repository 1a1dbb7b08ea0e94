"""Whether replicas still hold the same: a few elements of some tensors, compared at each save.

Replicas share the writing, each writes a stretch. A checkpoint of replicas that have drifted apart would hold a part
of each, and nobody would notice. Comparing all bytes costs what saving costs; drift shows in nearly every tensor, so a
few elements of some, other ones at each save, are enough to find it. The digests travel in the receipts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hydra_ckpt.layout.plan import fingerprint
from hydra_ckpt.saving.agreement import Agreement, Parts
from hydra_ckpt.saving.planning import replica_of, tensors_of
from hydra_ckpt.storage.digests import digest_of, hex_digest

_TENSORS_A_SAVE = 64
_PLACES_A_DIMENSION = 3
# Of hexadecimal keys and digests: 48 bits each.
_DIGITS = 12
# Spreads the tensors looked at over the saves, whatever the distance of their steps.
_STRIDE = 2654435761


@dataclass(frozen=True)
class Sample:
    """Some elements of tensors that this rank holds together with others.

    Attributes:
        key: Equal on the ranks that hold the same parts of the same tensors.
        elements: Name of a tensor to the bytes of its elements.
    """

    key: str
    elements: Mapping[str, bytes]

    @property
    def digest(self) -> str:
        """Of all elements."""
        return hex_digest(b"".join(self.elements.values()))[:_DIGITS]

    def digests(self) -> dict[str, int]:
        """Of each tensor's elements."""
        return {name: digest_of(data) for name, data in self.elements.items()}


class Sampler:
    """Takes samples of one state, as long as its tensors lie where they lie.

    Args:
        parts: The tensors.
        agreement: How many ranks hold each.
    """

    def __init__(self, parts: Parts, agreement: Agreement) -> None:
        labels = [f"{part}: {item.spec.name}" for part, items in parts.items() for item in items]
        groups: dict[Hashable, list[tuple[int, str]]] = defaultdict(list)
        for position, (label, item) in enumerate(zip(labels, tensors_of(parts), strict=True)):
            if item.divisible and item.box.numel and replica_of(item.place, agreement)[1] > 1:
                groups[item.place.mesh, item.place.group].append((position, label))
        tensors = tensors_of(parts)
        self._groups = {
            fingerprint([str(agreement.leader), *(f"{label} {tensors[at].box}" for at, label in members)])[
                :_DIGITS
            ]: members
            for members in groups.values()
        }

    @torch.no_grad()
    def take(self, parts: Parts, turn: int) -> tuple[Sample, ...]:
        """A sample of each group of replicas.

        Args:
            parts: The tensors, as they are now.
            turn: Equal on all ranks; another one chooses other tensors.
        """
        tensors = tensors_of(parts)
        found = []
        for key, members in self._groups.items():
            first = turn * _STRIDE % len(members)
            chosen = (members[first:] + members[:first])[:_TENSORS_A_SAVE]
            values = [_elements(tensors[position].tensor) for position, _ in chosen]
            found.append(Sample(key, dict(zip((label for _, label in chosen), _as_bytes(values), strict=True))))
        return tuple(found)


def _elements(tensor: torch.Tensor) -> torch.Tensor:
    """A few elements, spread evenly, as bytes on the tensor's device."""
    tensor = tensor.detach()
    if tensor.dim():
        tensor = tensor[tuple(slice(None, None, -(-size // _PLACES_A_DIMENSION)) for size in tensor.shape)]
    # A copy: a view of a single element may keep a stride that view() does not take.
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def _as_bytes(values: Sequence[torch.Tensor]) -> list[bytes]:
    """Each tensor's bytes, fetched from each device in one go."""
    devices: dict[torch.device, list[int]] = defaultdict(list)
    for number, value in enumerate(values):
        devices[value.device].append(number)
    found = [b""] * len(values)
    for numbers in devices.values():
        fetched = torch.cat([values[number] for number in numbers]).cpu().numpy().tobytes()
        for number in numbers:
            size = values[number].numel()
            found[number], fetched = fetched[:size], fetched[size:]
    return found


def summary(samples: Sequence[Sample]) -> str:
    """Keys and digests in one text; there may be many receipts, and each is taken apart by one rank."""
    return "".join(sample.key + sample.digest for sample in samples)


def drifted(receipts: Sequence[Mapping[str, Any]]) -> list[int]:
    """Coordinator only: two ranks that should hold the same and do not; empty if there are none."""
    first: dict[str, tuple[int, str]] = {}
    for rank, receipt in enumerate(receipts):
        text = receipt["copies"]
        for start in range(0, len(text), 2 * _DIGITS):
            digest = text[start + _DIGITS : start + 2 * _DIGITS]
            known, expected = first.setdefault(text[start : start + _DIGITS], (rank, digest))
            if expected != digest:
                return [known, rank]
    return []


def describe_drift(ranks: Sequence[int], told: Sequence[Mapping[str, int]]) -> str:
    """What to say about two ranks that have drifted apart.

    Args:
        ranks: The two.
        told: What each has told of its samples: name of a tensor to a digest.
    """
    one, other = told
    differing = [name for name, digest in one.items() if other.get(name, digest) != digest]
    shown = ", ".join(differing[:8]) + (", ..." if len(differing) > 8 else "")
    return (
        f"ranks {ranks[0]} and {ranks[1]} are replicas and hold different values in {len(differing)} of the {len(one)} "
        f"tensors compared ({shown}). Replicas share the writing, so the checkpoint holds a part of each. Start them "
        "from equal weights (DistributedDataParallel broadcasts them unless init_sync=False), and let every gradient "
        "be reduced over all replicas"
    )
