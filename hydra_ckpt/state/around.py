"""The state around models and optimizers: schedulers, extras, and what modules have beside their tensors.

All of it is encoded together, because objects may share what they hold: a tensor that two extras have is stored once,
and is one tensor again after a load.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from hydra_ckpt.errors import CheckpointConfigError, CheckpointError, leave_out
from hydra_ckpt.state.meshes import described
from hydra_ckpt.storage.encoding import Sink, encode, refuse_shared_names
from hydra_ckpt.storage.sharing import Sharing
from hydra_ckpt.storage.stage_names import qualify

Key = str | int


@dataclass(frozen=True)
class _Statement:
    """What one object says its state is.

    Attributes:
        kind: What kind of object it is; the key of a shared document.
        key: Which of them.
        dotted: What messages call it.
        state: The state.
    """

    kind: str
    key: Key
    dotted: str
    state: Any

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        if self.kind == "extras":
            return f"{self.key}:"
        return f"{self.kind}:{self.key}:" if self.kind in ("entries", "metadata") else f"{self.kind}:{self.key}"


@dataclass
class Around:
    """Asks several objects for their states, then encodes all of them; the names of tensors say whose they are.

    Args:
        stage: The pipeline stage, which keeps the names apart.
        unsaved: Patterns of dotted names that are left out.
        meshes: The meshes of the models' tensors.

    Attributes:
        tensors: Of all objects, by name.
        own: What only this rank can store, by name.
        omitted: Dotted names of what was left out.
    """

    stage: int
    unsaved: tuple[str, ...]
    meshes: Collection[DeviceMesh] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    own: dict[str, torch.Tensor] = field(default_factory=dict)
    omitted: list[str] = field(default_factory=list)
    _statements: list[_Statement] = field(default_factory=list)

    def ask(self, kind: str, key: Key, dotted: str, state_dict: Callable[[], Any]) -> None:
        """Ask an object for its state.

        Args:
            kind: `lr_scheduler`, `extra_state`, `entries`, `metadata` or `extras`.
            key: Its name or number.
            dotted: What messages call it.
            state_dict: Returns its state; not called if it is left out as a whole.
        """
        is_out = not dotted.startswith("model") and is_left_out(dotted, self.unsaved)
        self._statements.append(_Statement(kind, key, dotted, None if is_out else state_dict()))

    @property
    def states(self) -> list[tuple[str, Any]]:
        """What messages call each object, and the state that it has returned."""
        return [(one.dotted, one.state) for one in self._statements if one.kind not in ("entries", "metadata")]

    def encode(self) -> dict[str, dict[Key, Any]]:
        """The states as JSON data, by kind and key.

        Raises:
            CheckpointError: A value in one can be stored neither as JSON nor as a tensor.
        """
        found: dict[str, dict[Key, Any]] = defaultdict(dict)
        first: Sink | None = None
        sharing = self._sharing()
        for statement in self._statements:
            sink = self._sink(statement)
            if sharing is not None:
                sink.sharing, sink.joint = sharing, {} if first is None else first.joint
            if sharing is not None and first is not None:
                sink.made, sink.labels = first.made, first.labels
            first = first or sink
            found[statement.kind][statement.key] = _encoded(statement, sink)
            refuse_shared_names(statement.dotted, sink, self.tensors)
            self.tensors.update(sink)
            self.own.update(sink.own)
            self.omitted += sink.omitted
        return found

    def _sharing(self) -> Sharing | None:
        """What the states hold more than once, together; None if that cannot be stored, and may be left out."""
        try:
            found = Sharing.of([statement.state for statement in self._statements])
            return None if self.unsaved and found.clashes else found
        except RecursionError:
            for statement in self._statements:
                _refuse_endless(statement)
            raise

    def _sink(self, statement: _Statement) -> Sink:
        # Nothing is left out of metadata: `fill` does not look there.
        unsaved = () if statement.kind == "metadata" else self.unsaved
        sink = Sink(qualify(statement.prefix, self.stage), statement.dotted, unsaved=unsaved)
        sink.tells_placements = True
        sink.describe_mesh = lambda tensor: described(tensor.device_mesh) if self._is_foreign(tensor) else None
        return sink

    def _is_foreign(self, tensor: DTensor) -> bool:
        return all(mesh != tensor.device_mesh for mesh in self.meshes)


def _encoded(statement: _Statement, sink: Sink) -> Any:
    try:
        return encode(statement.state, sink.inside, sink)
    except RecursionError:
        raise _endless(statement) from None


def _refuse_endless(statement: _Statement) -> None:
    try:
        Sharing.of(statement.state)
    except RecursionError:
        raise _endless(statement) from None


def _endless(statement: _Statement) -> CheckpointError:
    return CheckpointError(f"{statement.dotted}: its state contains itself, or is nested too deeply to be stored")


def is_left_out(dotted: str, patterns: Sequence[str]) -> bool:
    """Whether a name is left out, as `checkpoint.allow_unsaved` asks."""
    return any(fnmatchcase(dotted, pattern) for pattern in patterns)


def told_by(dotted: str, item: Any) -> Any:
    """What an object's state_dict() returns.

    Raises:
        CheckpointConfigError: It raises.
    """
    try:
        return item.state_dict()
    except Exception as error:
        raise CheckpointConfigError(
            f"{dotted} ({type(item).__qualname__}): its state_dict() raises {type(error).__name__}: {error}. Fix it, "
            f"{leave_out(dotted)}"
        ) from error
