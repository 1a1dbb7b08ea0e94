"""Extraction: all of an AppState at one moment, as named tensors and plain data."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.layout.aliases import TensorMapping
from hydra_ckpt.layout.plan import fingerprint
from hydra_ckpt.state import optimizer as optimizer_state
from hydra_ckpt.state import rng
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.around import Around, is_left_out, told_by
from hydra_ckpt.state.linking import Linking, Links
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.state.meshes import meshes_of
from hydra_ckpt.state.model_map import ModelMap
from hydra_ckpt.state.module_oracle import OwnEntries
from hydra_ckpt.state.packing import Taken, take
from hydra_ckpt.state.peft import adapters, check_kind, is_peft_model, only_adapter, refuse_lost, trained_embeddings
from hydra_ckpt.state.plain import is_state, plain_of
from hydra_ckpt.state.wrappers import refuse_fsdp1
from hydra_ckpt.storage.encoding import encode
from hydra_ckpt.storage.sharing import Apart
from hydra_ckpt.storage.subclasses import local_part
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import part_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured:
    """The extracted state of an AppState.

    Attributes:
        parts: Name of a part (`model`, `model/<name>`, `optim`, `extras`) to its tensors, live.
        shared: State that should be equal on all ranks of a pipeline stage, as JSON data.
        plain: The parts of it that may differ between ranks, by a dotted label; see `put_plain`.
        own: What belongs to this rank alone: generators and the position in the data.
        adapted: Part to what its files hold, for models that define it by an adapter.
        omitted: Dotted names of what is left out, as `checkpoint.allow_unsaved` asks.
        models: Part to the model that exports describe, and to the name of its adapter if the part holds only that
            (otherwise empty).
        optimizers: The optimizers.
        tokenizer: Saved with exports; None if there is none.
    """

    parts: dict[str, list[LocalTensor]]
    shared: dict[str, Any]
    plain: dict[str, Any]
    own: Taken
    adapted: Mapping[str, TensorMapping] = field(default_factory=dict)
    omitted: tuple[str, ...] = ()
    models: Mapping[str, tuple[nn.Module, str]] = field(default_factory=dict)
    optimizers: Sequence[Any] = ()
    tokenizer: Any = None

    @property
    def objects(self) -> list[str]:
        """Labels of the groups, schedulers, extras: what ranks with the same tensors must have in common too."""
        return [label for label in self.plain if not is_state(label)]


@dataclass
class Extractor:
    """Extracts the state of AppStates; keeps the map of a model, which is walked only when it has changed.

    Args:
        is_peft: Whether models are PeftModels, of which only the adapter is stored.
        stage: The pipeline stage. It distinguishes state that has no name besides the model's.
        unsaved: Patterns of dotted names that are left out.
        localize: Finds the positions of tensors.
    """

    is_peft: bool = False
    stage: int = 0
    unsaved: tuple[str, ...] = ()
    localize: Localizer = field(default_factory=Localizer)
    _maps: dict[str, ModelMap] = field(default_factory=dict)
    _mapped: tuple[Any, ...] = ()
    _is_resumable: bool = False
    _has_warned: bool = False
    _apart: list[Apart] = field(default_factory=list)
    _links: Links = field(default_factory=Links)

    def check(self, state: AppState) -> None:
        """Check that the models are of kinds that can be saved; no `state_dict()` is called.

        Raises:
            CheckpointConfigError: One is not.
        """
        refuse_fsdp1(module for modules in state.models.values() for module in modules)

    def refresh(self, state: AppState) -> None:
        """Walk the models again if modules were replaced, removed or added since the last time."""
        if not all(mapped.is_current() for mapped in self.maps(state).values()):
            self._mapped = ()

    def maps(self, state: AppState) -> dict[str, ModelMap]:
        """Model name to where its tensors live; with PEFT an entry for each adapter."""
        identity: tuple[Any, ...] = tuple((name, *map(id, modules)) for name, modules in state.models.items())
        if self.is_peft:  # adapters come and go, embeddings may be trained later
            wrapped = [(name, modules) for name, modules in state.models.items() if is_peft_model(modules[0])]
            identity += tuple(hash(key) for name, modules in wrapped for key in adapters(name, modules[0]))
            identity += tuple(key for _, modules in wrapped for module in modules for key in trained_embeddings(module))
        if identity != self._mapped:
            self.check(state)
            self._maps = {}
            with rng.kept():
                for name, modules in state.models.items():
                    self._maps.update(self._map(name, modules))
            self._mapped = identity
        return self._maps

    def try_dataloader(self, state: AppState) -> None:
        """Warn if the data loader cannot report its position yet; it is asked again at each save."""
        if state.dataloader is None or self._is_resumable:
            return
        try:
            with rng.kept():
                told = state.dataloader.state_dict()
        except Exception as error:  # noqa: BLE001 - a foreign loader may raise anything
            if not self._has_warned:
                log.warning(
                    "the data loader (%s) cannot report its position (%s: %s): a resumed run starts its data from the "
                    "beginning. Pass one that can as dataloader= to AppState: hydra_ckpt.resumable(loader, seed=...) "
                    "makes one from a plain DataLoader, instead of what accelerate prepares",
                    type(state.dataloader).__name__,
                    type(error).__name__,
                    error,
                )
            self._has_warned = True
            return
        try:
            take({"dataloader": told})
        except CheckpointError as error:
            raise _unstorable(error) from error
        self._is_resumable = True

    def _map(self, name: str, modules: list[nn.Module]) -> dict[str, ModelMap]:
        for module in modules:
            check_kind(module, self.is_peft)
        if not self.is_peft:
            return {name: ModelMap.of(modules, partial(self._omits, name))}
        whole = ModelMap.of(modules, partial(self._omits, name))
        found = {}
        for key, adapter in adapters(name, modules[0]).items():
            found[key] = only_adapter(whole, modules, adapter, buffers=key == name)
            if key != name:
                found[key].names = {}  # the first map knows all parameters
        return found

    def _omits(self, model: str, name: str) -> bool:
        return is_left_out(f"{called(model)}.{name}", self.unsaved)

    def parameter_names(self, state: AppState) -> dict[int, str]:
        """Identity of every parameter to its name, preceded by the model's name if there are several."""
        return {
            identity: f"{model}/{name}" if model else name
            for model, mapped in self.maps(state).items()
            for identity, name in mapped.names.items()
        }

    def linking(self, state: AppState) -> Linking:
        """The live objects, to find out what they have in common."""
        maps = {called(name): mapped for name, mapped in self.maps(state).items()}
        return Linking.of(state, maps, self.parameter_names(state))

    def held(self, state: AppState) -> str:
        """A digest of the names of all tensors of this rank's part of the models."""
        return fingerprint(
            sorted(
                f"{model}/{name}"
                for model, mapped in self.maps(state).items()
                for name in (*(slot.name for slot in mapped.slots), *mapped.omitted)
            )
        )

    def capture(self, state: AppState) -> Captured:
        """Extract the current state; tensors stay live, everything else is copied.

        Random numbers that objects draw meanwhile are drawn again by the run: a save changes none of them.

        Raises:
            CheckpointError: Something can be stored neither as JSON nor as a tensor.
        """
        with torch.no_grad(), rng.kept() as generators:
            return self._captured(state, generators)

    def _captured(self, state: AppState, generators: dict[str, Any]) -> Captured:
        self.refresh(state)
        maps = self.maps(state)
        # Hooks that run in a module's `state_dict()` may write to its buffers.
        told = {name: mapped.beyond.told(called(name)) for name, mapped in maps.items()}
        stepped = {id(parameter) for parameter in _stepped(state)}
        if self.is_peft:
            refuse_lost(maps.values(), _trained(state))
        parts = {part_of(name): mapped.locals(self.localize, stepped) for name, mapped in maps.items()}
        omitted = [f"{called(name)}.{tensor}" for name, mapped in maps.items() for tensor in mapped.omitted]
        shared: dict[str, Any] = {"holds": self.held(state), "stage": self.stage, "keys": state.keys}
        shared["classes"] = {"lr_scheduler": [type(item).__qualname__ for item in state.lr_schedulers]}
        shared["tells_places"] = True  # of all tensors outside models and optimizers
        if ties := {name: mapped.aliases for name, mapped in maps.items() if mapped.aliases}:
            shared["ties"] = ties
        shards: dict[str, torch.Tensor] = {}
        if state.optimizers:
            self._apart += [Apart() for _ in state.optimizers[len(self._apart) :]]
            described = optimizer_state.describe(
                state.named_optimizers, self.parameter_names(state), unsaved=self.unsaved, apart=self._apart
            )
            shared["optimizer"] = described.data
            parts[names.OPTIMIZER] = described.locals(self.localize)
            shards.update(described.own)
            omitted += described.omitted
        around = self._asked(state, maps, told)
        encoded = around.encode()
        shared.update({kind: encoded[kind] for kind in ("extra_state", "metadata", "extras")})
        shared["lr_scheduler"] = list(encoded["lr_scheduler"].values())
        shared["entries"] = {
            name: [encoded["entries"][f"{name}:{number}"] for number in range(len(found.entries))]
            for name, found in told.items()
            if any(found.entries)
        }
        parts[names.EXTRAS] = [self.localize(name, tensor, divisible=False) for name, tensor in around.tensors.items()]
        shards.update(around.own)
        omitted += around.omitted
        told_own = [(name, {"own": own}) for name, own in described.told.items()] if state.optimizers else []
        statements = [*told_own, *around.states]
        if links := self._links.of(self.linking(state), list(state.named_optimizers), self._apart, statements):
            shared["links"] = links
        shared["unsaved"] = omitted
        own = {
            "rng": generators,
            "dataloader": self._dataloader_state(state),
            "dataloader_is_global": bool(getattr(state.dataloader, "state_is_global", False)),
            "shards": {name: local_part(tensor) for name, tensor in shards.items()},
        }
        _refuse_meta(parts)
        adapted = {part_of(name): mapped.adapted for name, mapped in maps.items() if mapped.adapted is not None}
        return Captured(
            parts,
            shared,
            plain_of(shared),
            take(own),
            adapted,
            tuple(omitted),
            self._described(state),
            state.optimizers,
            state.tokenizer,
        )

    def _asked(self, state: AppState, maps: Mapping[str, ModelMap], told: Mapping[str, OwnEntries]) -> Around:
        """The state around models and optimizers, by asking its objects.

        Args:
            state: The objects.
            maps: Model name to where its tensors live.
            told: Model name to what its own state_dict() returns beyond these.
        """
        around = Around(self.stage, self.unsaved, meshes_of(_tensors(state)))
        for number, (name, scheduler) in enumerate(state.named_schedulers.items()):
            around.ask("lr_scheduler", number, name, partial(told_by, name, scheduler))
        for name, mapped in maps.items():
            around.ask("extra_state", name, called(name), partial(mapped.extra_state, called(name)))
        for name, found in told.items():
            for number, part in enumerate(found.entries if any(found.entries) else ()):
                around.ask("entries", f"{name}:{number}", called(name), partial(dict, part))
            around.ask("metadata", name, called(name), partial(dict, found.metadata))
        for name, extra in state.extras.items():
            around.ask("extras", name, f"extras.{name}", partial(told_by, f"extras.{name}", extra))
        return around

    def _described(self, state: AppState) -> dict[str, tuple[nn.Module, str]]:
        found = {}
        for name, modules in state.models.items():
            keys = adapters(name, modules[0]) if self.is_peft else {name: ""}
            found.update({part_of(key): (modules[0], adapter) for key, adapter in keys.items()})
        return found

    def _dataloader_state(self, state: AppState) -> Any:
        if not self._is_resumable:
            self.try_dataloader(state)
        ask = getattr(state.dataloader, "state_dict", None)  # a plain DataLoader has none
        if not self._is_resumable or ask is None:
            return None
        try:
            return ask()
        except Exception as error:
            raise CheckpointConfigError(
                f"dataloader ({type(state.dataloader).__qualname__}): its state_dict() raises {type(error).__name__}: "
                f"{error}. Fix it; or pass AppState another loader (hydra_ckpt.resumable(loader, seed=...) makes one "
                "from a plain DataLoader) or none"
            ) from error


def _unstorable(error: CheckpointError) -> CheckpointConfigError:
    return CheckpointConfigError(
        f"dataloader: {error}. Pass AppState another loader (hydra_ckpt.resumable(loader, seed=...) makes one from a "
        "plain DataLoader) or none"
    )


def _tensors(state: AppState) -> Iterator[torch.Tensor]:
    """The models' tensors."""
    for modules in state.models.values():
        for module in modules:
            yield from module.parameters()
            yield from module.buffers()


def _refuse_meta(parts: Mapping[str, Sequence[LocalTensor]]) -> None:
    """Refuse tensors without values, as of a model that was built on the meta device and not filled."""
    for part, items in parts.items():
        for item in items:
            if item.tensor.is_meta:
                raise CheckpointConfigError(
                    f"{part}: {item.spec.name} is on the meta device and has no values; fill it (to_empty(), "
                    "load_base_model()) before training"
                )


def called(model: str) -> str:
    """What messages and reports call a model."""
    return f"model.{model}" if model else "model"


def _stepped(state: AppState) -> list[torch.Tensor]:
    """The parameters that optimizers change."""
    groups = [group for optimizer in state.optimizers for group in getattr(optimizer, "param_groups", ())]
    return [parameter for group in groups for parameter in group["params"]]


def _trained(state: AppState) -> set[int]:
    """Identities of the parameters that training changes: those of optimizers, or where there are none all."""
    modules = [] if state.optimizers else [module for modules in state.models.values() for module in modules]
    everything = [*_stepped(state), *(parameter for module in modules for parameter in module.parameters())]
    return {id(parameter) for parameter in everything if parameter.requires_grad}


def templates(state: AppState) -> Mapping[str, torch.Tensor]:
    """The live tensors of extras by their names in a checkpoint, as far as they exist yet."""
    tensors: dict[str, torch.Tensor] = {}
    for name, extra in state.extras.items():
        with suppress(Exception):  # an object that cannot be saved, or has no state yet, may still be loaded into
            encode(told_by(f"extras.{name}", extra), f"{name}:", tensors)
    return tensors
