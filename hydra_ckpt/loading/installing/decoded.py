"""Saved values, decoded, with the tensors that were read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointError
from hydra_ckpt.loading.installing.untouched import Before
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.storage.decoding import OMITTED, decode, fill, missing_from, own_names, tensor_names
from hydra_ckpt.storage.encoding import OWN

_NO_OTHERS: Mapping[str, Callable[[Any], Any]] = {}


class _Aliases(Mapping[str, torch.Tensor]):
    """Other tensor objects over the same memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name].detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Values:
    """Decodes the saved state of objects.

    Args:
        source: The checkpoint, read.
        plan: What was read.

    Attributes:
        given: What several objects hold, by what it is called: one object for all that are given it.
    """

    source: Source
    plan: LoadPlan
    given: dict[str, Any] = field(default_factory=dict)

    def decoded(
        self,
        tree: Any,
        others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS,
        made: dict[str, Any] | None = None,
    ) -> Any:
        """Saved data with its tensors filled in; data that belongs to this rank alone comes from its own file.

        Args:
            tree: The data, encoded.
            others: What to make of references to what is stored elsewhere, by their tag.
            made: What several values hold, for those that objects are given; None for data to compare with, which
                must not be the very tensors that objects have: it would put its own attributes on them.
        """
        tensors = self.plan.tensors if made is not None else _Aliases(self.plan.tensors)
        return decode(tree, tensors, {OWN: self._shard, **others}, made)

    def present(self, tree: Mapping[str, Any], made: dict[str, Any] | None = None) -> dict[str, Any]:
        """A decoded dict without the values that were left out."""
        return {name: value for name, value in self.decoded(tree, made=made).items() if value is not OMITTED}

    def whole(
        self, dotted: str, item: Any, tree: Any, others: Mapping[str, Callable[[Any], Any]] = _NO_OTHERS
    ) -> Callable[..., Any]:
        """A function that builds a new copy of an object's saved state; values left out come from the live object.

        Its argument `made`, a dict or None, collects what other objects have too, for the copies they are given.
        """
        live = told_by(dotted, item) if missing_from(tree) else None
        if live is None:
            return partial(self.decoded, tree, others)

        def whole(made: dict[str, Any] | None = None) -> Any:
            return fill(self.decoded(tree, others, made), live)

        return whole

    def before(self, trees: Any) -> Before:
        """The tensors that encoded data refers to, before an object gets them."""
        shards = {} if self.source.own is None else self.source.own.get("shards", {})
        own = {name: shards[name] for name in own_names(trees) if name in shards}
        read = self.plan.tensors
        return Before.of({name: read[name] for name in tensor_names(trees) if name in read} | own)

    def _shard(self, name: str) -> torch.Tensor:
        """This rank's shard of a tensor subclass, as the DTensor it belonged to."""
        local, like = (self.source.own or {})["shards"][name], self._like(name)
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def _like(self, name: str) -> DTensor:
        """The parameter whose mesh and placements a shard of a tensor subclass had."""
        source = self.source
        parameter = source.shared["optimizer"].get("meshes", {}).get(name, name.split(SEPARATOR, maxsplit=1)[0])
        known = source.extractor.parameter_names(source.state)
        for modules in source.state.models.values():
            for item in (item for module in modules for item in module.parameters()):
                if known.get(id(item)) == parameter and isinstance(item, DTensor):
                    return item
        raise CheckpointError(f"{name}: a shard of a tensor subclass that belongs to no sharded parameter here")
