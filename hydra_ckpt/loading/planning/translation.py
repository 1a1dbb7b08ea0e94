"""Maps a live model's tensors to the stored ones, if these have other names or another layout.

Files hold a model's tensors as the saved model had them in memory, or as its export has them. If the live model holds
its tensors differently in memory, the two are matched through the tensors of their exports.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.plan import StoredTensor


@dataclass(frozen=True)
class Saved:
    """How a checkpoint holds a model.

    Attributes:
        stored: The tensors in its files.
        naming: The names of the saved model's tensors in its export; None if they are the same.
        is_export: Whether the files are that export.
    """

    stored: Mapping[str, StoredTensor]
    naming: TensorMapping | None
    is_export: bool


@dataclass
class Translation:
    """The mapping from live tensors to stored ones.

    Attributes:
        naming: From live names to stored ones; None if they are the same.
        missing: Names of tensors that cannot be found.
        different: Name to what is wrong with a tensor's shape.
    """

    naming: TensorMapping | None
    missing: list[str] = field(default_factory=list)
    different: dict[str, str] = field(default_factory=dict)


def translate(names: Collection[str], saved: Saved, live: Callable[[], TensorMapping]) -> Translation:
    """Match by names: those in memory, if the saved model had the same, otherwise those in the exports.

    Args:
        names: The live tensors.
        saved: Where to look for them.
        live: Returns the naming of the live model's export; called only if the tensors are not found.

    Raises:
        CheckpointConfigError: The live model's export cannot be determined.
        TopologyError: The live model's adapter does not fit.
    """
    direct = saved.naming if saved.is_export else None
    known = saved.stored if direct is None else direct.by_source
    unknown = [name for name in names if name not in known]
    if not unknown:
        return Translation(direct)
    own = live()
    exported = saved.stored if saved.naming is None or saved.is_export else saved.naming.by_name
    if len(own.by_name.keys() - exported.keys()) >= len(unknown):
        return Translation(direct, unknown if direct is not None else [])
    if saved.naming is None or saved.is_export:
        return Translation(own)
    return _meet(own, saved.naming, saved.stored)


def _meet(live: TensorMapping, saved: TensorMapping, stored: Mapping[str, StoredTensor]) -> Translation:
    """From live tensors to saved ones of another layout, by the exported tensors that both are parts of."""
    found = Translation(live.onto(saved, {name: item.spec for name, item in stored.items()}))
    theirs, ours = _shapes(saved), _shapes(live)
    found.missing += [name for name in ours if name not in theirs]
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            found.different[name] = (
                f"{list(theirs[name])} in the checkpoint's export, {list(ours[name])} in the model's"
            )
    if not found.missing and not found.different:
        found.missing += _unmet(live, found.naming)
    return found


def _unmet(live: TensorMapping, met: TensorMapping | None) -> list[str]:
    """Tensors that the two exports rearrange in ways that cannot be mapped to each other."""
    assert met is not None  # made by `_meet`
    sizes = {name: sum(alias.box.numel for alias in aliases) for name, aliases in met.by_source.items()}
    return [
        name
        for name, aliases in live.by_source.items()
        if sum(alias.box.numel for alias in aliases) != sizes.get(name, 0)
    ]


def _shapes(naming: TensorMapping) -> dict[str, tuple[int, ...]]:
    """Exported tensors with their shapes."""
    return {name: naming.shapes.get(name, aliases[0].shape) for name, aliases in naming.by_name.items()}
