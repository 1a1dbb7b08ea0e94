"""Extraction: all of an AppState at one moment, as named tensors and plain data."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CorruptCheckpointError
from hydra_ckpt.layout.aliases import Naming
from hydra_ckpt.layout.plan import fingerprint
from hydra_ckpt.state import optimizer as optimizer_state
from hydra_ckpt.state import rng
from hydra_ckpt.state.app_state import AppState
from hydra_ckpt.state.local import Localizer, LocalTensor
from hydra_ckpt.state.model import MAX_OWN_BUFFER_BYTES, ModelMap
from hydra_ckpt.state.peft import adapters, check_kind, is_peft_model, keep_adapter, refuse_lost, trained_embeddings
from hydra_ckpt.storage.stages import qualify
from hydra_ckpt.storage.tree import decode, encode, format_of
from hydra_ckpt.store import names

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Packed:
    """Plain data as it was at one moment, turned into bytes when they are asked for: in the background.

    Attributes:
        tree: The data, encoded.
        wrap: Makes the file of the JSON.
    """

    tree: Any
    wrap: Callable[[bytes], bytes] = bytes

    @cached_property
    def data(self) -> bytes:
        """The bytes."""
        return self.wrap(self._text)

    @cached_property
    def _text(self) -> bytes:
        return json.dumps(self.tree, separators=(",", ":")).encode()

    @property
    def format(self) -> int:
        """The lowest format of a checkpoint whose readers can decode it."""
        return format_of(self._text)


@dataclass(frozen=True)
class Captured:
    """An AppState taken apart.

    Attributes:
        parts: Name of a part (`model`, `model/<name>`, `optim`, `extras`) to its tensors, live.
        shared: What is the same on all ranks of a pipeline stage; its bytes are JSON.
        own: What belongs to this rank alone: generators and the place in the data; its bytes are a safetensors file.
        adapted: Part to what its files hold, for models that say it themselves by an adapter.
    """

    parts: dict[str, list[LocalTensor]]
    shared: Packed
    own: Packed
    adapted: Mapping[str, Naming] = field(default_factory=dict)


@dataclass
class Extractor:
    """Takes AppStates apart; keeps the map of a model, which is walked only when it has changed.

    Args:
        is_peft: Whether models are PeftModels, of which only the adapter is stored.
        stage: The pipeline stage. What has no name of its own beside the model's is kept apart by it.
        localize: Knows where tensors lie.
    """

    is_peft: bool = False
    stage: int = 0
    localize: Localizer = field(default_factory=Localizer)
    _maps: dict[str, ModelMap] = field(default_factory=dict)
    _mapped: tuple[int, ...] = ()
    _resumable: bool | None = None

    def refresh(self, state: AppState) -> None:
        """Walk the models anew if modules were exchanged, taken away or added since the last time."""
        if not all(mapped.is_current() for mapped in self.maps(state).values()):
            self._mapped = ()

    def maps(self, state: AppState) -> dict[str, ModelMap]:
        """Model name to where its tensors live; with PEFT an entry for each adapter."""
        identity = tuple(id(module) for modules in state.models.values() for module in modules)
        if self.is_peft:  # adapters come and go, embeddings may be trained later
            wrapped = [(name, modules) for name, modules in state.models.items() if is_peft_model(modules[0])]
            identity += tuple(hash(key) for name, modules in wrapped for key in adapters(name, modules[0]))
            identity += tuple(key for _, modules in wrapped for module in modules for key in trained_embeddings(module))
        if identity != self._mapped:
            self._maps = {}
            for name, modules in state.models.items():
                self._maps.update(self._map(name, modules))
            self._mapped = identity
        return self._maps

    def try_dataloader(self, state: AppState) -> None:
        """See once whether the data loader can tell its place; if not, say so and leave it out."""
        self._resumable = True
        if state.dataloader is None:
            return
        try:
            pack(state.dataloader.state_dict())
        except Exception as error:  # noqa: BLE001 - a foreign loader may raise anything
            self._resumable = False
            log.warning(
                "the data loader (%s) cannot tell its place (%s: %s): a resumed run starts its data anew. "
                "Give AppState one that can, by dataloader=: hydra_ckpt.resumable(loader, seed=...) makes one of a "
                "plain DataLoader, in place of what accelerate prepares",
                type(state.dataloader).__name__,
                type(error).__name__,
                error,
            )

    def _map(self, name: str, modules: list[nn.Module]) -> dict[str, ModelMap]:
        for module in modules:
            check_kind(module, self.is_peft)
        if not self.is_peft:
            mapped = ModelMap.of(modules)
            mapped.refuse_hidden()
            return {name: mapped}
        found = {}
        for key, adapter in adapters(name, modules[0]).items():
            found[key] = ModelMap.of(modules)
            keep_adapter(found[key], modules, adapter, buffers=key == name)
            if key != name:
                found[key].names = {}  # the first map knows all parameters
        return found

    def parameter_names(self, state: AppState) -> dict[int, str]:
        """Identity of every parameter to its name, with the model's name before it where there are several."""
        return {
            identity: f"{model}/{name}" if model else name
            for model, mapped in self.maps(state).items()
            for identity, name in mapped.names.items()
        }

    def held(self, state: AppState) -> str:
        """A digest of the names of all tensors of this rank's part of the models."""
        return fingerprint(
            sorted(f"{model}/{slot.name}" for model, mapped in self.maps(state).items() for slot in mapped.slots)
        )

    @torch.no_grad()
    def capture(self, state: AppState) -> Captured:
        """Take the state apart as it is now; tensors stay live, all else is fixed.

        Raises:
            CheckpointError: Something can be stored neither as JSON nor as a tensor.
        """
        self.refresh(state)
        maps = self.maps(state)
        stepped = {
            id(parameter)
            for optimizer in state.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if self.is_peft:
            refuse_lost(maps.values(), _trained(state))
        parts = {part_of(name): mapped.locals(self.localize, stepped) for name, mapped in maps.items()}
        shared: dict[str, Any] = {"holds": self.held(state)}
        if state.optimizers:
            described, tensors = optimizer_state.describe(state.optimizers, self.parameter_names(state))
            shared["optimizer"] = described
            parts[names.OPTIMIZER] = optimizer_state.locals_of(tensors, self.localize)
        extras: dict[str, torch.Tensor] = {}
        shared["lr_scheduler"] = [
            encode(scheduler.state_dict(), qualify(f"lr_scheduler:{number}", self.stage), extras)
            for number, scheduler in enumerate(state.lr_schedulers)
        ]
        shared["extra_state"] = {
            name: encode(mapped.extra_state(), qualify(f"extra_state:{name}", self.stage), extras)
            for name, mapped in maps.items()
        }
        shared["extras"] = {
            name: encode(extra.state_dict(), qualify(f"{name}:", self.stage), extras)
            for name, extra in state.extras.items()
        }
        parts[names.EXTRAS] = [self.localize(name, tensor, divisible=False) for name, tensor in extras.items()]
        own = {
            "rng": rng.capture(),
            "dataloader": self._dataloader_state(state),
            "dataloader_is_global": bool(getattr(state.dataloader, "state_is_global", False)),
            "buffers": self._own_buffers(maps),
        }
        adapted = {part_of(name): mapped.adapted for name, mapped in maps.items() if mapped.adapted is not None}
        return Captured(parts, Packed(shared), pack(own), adapted)

    def _own_buffers(self, maps: Mapping[str, ModelMap]) -> dict[str, dict[str, torch.Tensor]]:
        """Buffers as this rank has them: batch statistics differ between ranks, and the model's files hold rank 0's."""
        found = {model: mapped.buffers() for model, mapped in maps.items()}
        plain = {
            model: {name: buffer for name, buffer in buffers.items() if not isinstance(buffer, DTensor)}
            for model, buffers in found.items()
        }
        nbytes = sum(buffer.nbytes for buffers in plain.values() for buffer in buffers.values())
        alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
        return {} if alone or nbytes > MAX_OWN_BUFFER_BYTES else plain

    def _dataloader_state(self, state: AppState) -> Any:
        if self._resumable is None:
            self.try_dataloader(state)
        take = getattr(state.dataloader, "state_dict", None)  # a plain DataLoader has none
        return take() if self._resumable and take is not None else None


def _trained(state: AppState) -> set[int]:
    """Identities of the parameters that training changes: those of optimizers, or where there are none all."""
    groups = [group["params"] for optimizer in state.optimizers for group in optimizer.param_groups]
    modules = [] if groups else [module for modules in state.models.values() for module in modules]
    groups += [module.parameters() for module in modules]
    return {id(parameter) for group in groups for parameter in group if parameter.requires_grad}


def part_of(model: str) -> str:
    """The part of a checkpoint that holds a model."""
    return f"{names.MODEL}/{model}" if model else names.MODEL


def pack(value: Any) -> Packed:
    """A nested value as one safetensors file: its tensors, and the rest as JSON in the metadata."""
    tensors: dict[str, torch.Tensor] = {}
    tree = encode(value, "", tensors)
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return Packed(tree, lambda text: safetensors_bytes(plain, metadata={"tree": text.decode()}))


def unpack(path: Path, data: bytes) -> Any:
    """The value that `pack` was given.

    Raises:
        CorruptCheckpointError: The data was not made by `pack`.
    """
    try:
        tensors = safetensors_load(data)
        length = int.from_bytes(data[:8], "little")
        tree = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["tree"])
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(path, f"cannot be read: {error!r}") from None
    return decode(tree, tensors)


def templates(state: AppState) -> Mapping[str, torch.Tensor]:
    """The live tensors of extras, schedulers and extra state by their names in a checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for name, extra in state.extras.items():
        encode(extra.state_dict(), f"{name}:", tensors)
    return tensors
