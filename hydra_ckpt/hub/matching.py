"""Matches tensors in a reference's files to tensors of a model, even if their names differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property

from torch import nn

from hydra_ckpt.hub.conversion import Tables
from hydra_ckpt.layout.aliases import SliceMapping, TensorMapping
from hydra_ckpt.layout.specs import TensorSpec


class Matching:
    """Maps names in a reference's files to the export names of a model's pieces.

    Args:
        model: The model.
        tables: What transformers' tables hold for it.
        naming: How it is exported.
        specs: Its tensors by name.
        aliases: Other names of tied tensors, to the names of the tensors.
        names: All names in the files.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Tables | None,
        naming: TensorMapping,
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str],
        names: Collection[str],
    ) -> None:
        self._tables = tables
        self._names = names
        self._naming = naming
        self._specs = specs
        self._aliases = aliases
        self._known = dict.fromkeys([*specs, *aliases], True)
        self._prefix = str(getattr(model, "base_model_prefix", "") or "")
        self._as_in_memory: set[str] = set()

    def __call__(self, name: str) -> str | None:
        """The piece that a name in the reference refers to; None if the model has none."""
        pieces = self._naming.by_name
        if name in pieces:
            return name
        place = self._in_memory(name)
        if place in self._known:
            return self._plain(self._aliases.get(place, place))
        found = next((other for other in self._other_prefix(name) if other in pieces), None)
        return self._converted.get(name) if found is None else found

    def _in_memory(self, name: str) -> str:
        """The model's own name for a tensor that is stored as the model holds it."""
        if self._tables is not None:
            return self._tables.loaded(name, self._prefix, self._known)
        return next((other for other in (name, *self._other_prefix(name)) if other in self._specs), name)

    def _other_prefix(self, name: str) -> list[str]:
        if not self._prefix:
            return []
        return [f"{self._prefix}.{name}", name.removeprefix(f"{self._prefix}.")]

    @cached_property
    def _converted(self) -> Mapping[str, str]:
        """Names in the files that load into the same piece as an export name, according to transformers."""
        if self._tables is None or self._tables.are_empty:
            return {}
        pieces = self._tables.targets(self._naming.by_name, self._prefix, self._known)
        places = {target: name for name, target in pieces.items()}
        found = self._tables.targets(self._names, self._prefix, self._known)
        return {name: places[target] for name, target in found.items() if target in places}

    def _plain(self, name: str) -> str:
        """Record that a tensor is read whole, as the model holds it, and return its name."""
        pieces = self._naming.by_source.get(name, ())
        if len(pieces) == 1 and pieces[0].is_whole:
            return pieces[0].name
        self._as_in_memory.add(name)
        return name

    @property
    def naming(self) -> TensorMapping:
        """The naming for reading pieces, once all names in the reference have been matched."""
        if not self._as_in_memory:
            return self._naming
        kept = [alias for alias in self._naming.aliases if alias.source not in self._as_in_memory]
        same = (SliceMapping.same(self._specs[name]) for name in sorted(self._as_in_memory))
        return TensorMapping((*kept, *same), shapes=self._naming.shapes)
