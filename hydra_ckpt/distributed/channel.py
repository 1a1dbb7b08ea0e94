"""Messages between the ranks, carried by a store of their own.

Each thread that talks has a `Channel` of its own (a wait on one store object blocks the other threads that use it). On
a channel every rank makes the same calls in the same order.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from hydra_ckpt import errors
from hydra_ckpt.errors import CheckpointError

# A farewell needs no longer than any other message; whoever is later has died.
_FAREWELL_S = 20.0
# PyTorch's store reads a long message again from its start whenever more of it arrives: to wait for 16,384 keys and
# get them took 0.4 s in one message each, and 0.05 s in sixteen.
_KEYS_A_MESSAGE = 1024


class RankTimeoutError(CheckpointError):
    """Some ranks did not answer within the limit.

    Attributes:
        ranks: Those ranks.
    """

    def __init__(self, what: str, ranks: Sequence[int], limit_s: float) -> None:
        self.ranks = list(ranks)
        super().__init__(
            f"{what}: no answer from rank {', '.join(map(str, ranks))} within {limit_s:.0f} s "
            "(checkpoint.consolidation_timeout_minutes); a rank has died, is stuck, or took another path"
        )


class Channel(ABC):
    """Messages between the ranks, one thread a rank. Payloads are plain data (JSON)."""

    rank: int
    world_size: int

    @abstractmethod
    def gather(self, what: str, payload: Any) -> list[Any] | None:
        """Collective: hand a payload to the coordinator, who gets those of all ranks by rank; others get None."""

    @abstractmethod
    def receive(self, what: str, send: Callable[[], Any] | None = None, *, extra_s: float = 0.0) -> Any:
        """Collective: the coordinator's value on every rank; the coordinator passes `send` to make it.

        Args:
            what: What is waited for, for messages.
            send: Makes the value.
            extra_s: How many seconds longer than usual the others wait for it.
        """

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @abstractmethod
    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """Collective: the coordinator hands each rank a payload of its own; others pass None."""

    @abstractmethod
    def farewell(self) -> None:
        """Collective: rank 0, who hosts the store, returns when all others have heard everything, or are late."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the connection. Idempotent."""

    def coordinator_step(self, what: str, step: Callable[[], Any], *, extra_s: float = 0.0) -> Any:
        """Collective: let rank 0 do something; all ranks get its result, or raise its error.

        Args:
            what: What is done, for messages.
            step: Does it.
            extra_s: How many seconds longer than usual the others wait, where rank 0 may have to wait itself.
        """

        def attempt() -> dict[str, Any]:
            try:
                return {"value": step()}
            except Exception as error:  # noqa: BLE001 - raised on every rank
                return {"error": error_to_data(error)}

        reply = self.receive(what, attempt if self.is_coordinator else None, extra_s=extra_s)
        if "error" in reply:
            raise error_from_data(reply["error"])
        return reply["value"]

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Collective: rank 0 decides from the payloads of all; all get the decision, or raise its error."""
        gathered = self.gather(what, payload)
        return self.coordinator_step(what, lambda: decide(gathered or []))

    def raise_together(self, what: str, error: Exception | None) -> None:
        """Collective: if any rank has an error, raise on every rank: its own, or else the first rank's."""
        self.conclude(what, error, None, lambda _: None)

    def conclude(self, what: str, error: Exception | None, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Collective: `raise_together` and, if no rank has an error, `agree`, in one exchange."""

        def decision(gathered: list[Any]) -> dict[str, Any]:
            failed = ({"rank": rank, "error": data} for rank, (data, _) in enumerate(gathered) if data is not None)
            found = next(failed, None)
            return {"failed": found, "decision": None if found else decide([given for _, given in gathered])}

        found = self.agree(what, (error_to_data(error) if error else None, payload), decision)
        if error is not None:
            raise error
        if found["failed"] is not None:
            raise error_from_data(found["failed"]["error"], prefix=f"rank {found['failed']['rank']}: ")
        return found["decision"]


def error_to_data(error: BaseException) -> dict[str, Any]:
    """An error as plain data."""
    attributes = {key: value for key, value in vars(error).items() if _is_plain(value)}
    return {"kind": type(error).__name__, "text": str(error), "attributes": attributes}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def error_from_data(data: Mapping[str, Any], prefix: str = "") -> CheckpointError:
    """The error that `error_to_data` described; one from outside our tree becomes a `CheckpointError`."""
    kind = getattr(errors, data["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
        return CheckpointError(f"{prefix}{data['kind']}: {data['text']}")
    return errors.rebuild(kind, prefix + data["text"], data["attributes"])


class SoloChannel(Channel):
    """One rank that talks to itself."""

    rank = 0
    world_size = 1

    def gather(self, what: str, payload: Any) -> list[Any]:
        """The payload alone."""
        return [payload]

    def receive(self, what: str, send: Callable[[], Any] | None = None, *, extra_s: float = 0.0) -> Any:
        """The value itself."""
        if send is None:
            raise RuntimeError(f"{what}: the only rank is the coordinator and has to send")
        return send()

    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """The payload alone."""
        return (payloads or [None])[0]

    def farewell(self) -> None:
        """Nobody to wait for."""

    def close(self) -> None:
        """No connection to let go of."""


class StoreChannel(Channel):
    """A channel over a TCPStore connection of its own.

    Keys are `<incarnation>/<lane>/<number of the message>/…`. The coordinator removes a message once every rank
    has sent the next one, so the store does not grow.
    """

    def __init__(self, store: Store, lane: str, rank: int, world_size: int, limit_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: Store | None = store
        self._lane = lane
        self._limit_s = limit_s
        self._number = 0
        self._spent: list[str] = []

    def gather(self, what: str, payload: Any) -> list[Any] | None:
        """Collective; see `Channel.gather`."""
        self._number += 1
        keys = [f"{self._lane}/{self._number}/from/{rank}" for rank in range(self.world_size)]
        if not self.is_coordinator:
            self._set(what, keys[self.rank], payload)
            return None
        payloads = [payload, *self._wait(what, keys[1:])]
        for key in self._spent:
            self._connection.delete_key(key)
        self._spent = keys[1:]
        return payloads

    def receive(self, what: str, send: Callable[[], Any] | None = None, *, extra_s: float = 0.0) -> Any:
        """Collective; see `Channel.receive`."""
        self._number += 1
        key = f"{self._lane}/{self._number}/to"
        if send is None:
            return self._wait(what, [key], extra_s)[0]
        value = send()
        self._set(what, key, value)
        self._spent.append(key)
        return value

    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """Collective; see `Channel.scatter`."""
        self._number += 1
        keys = [f"{self._lane}/{self._number}/to/{rank}" for rank in range(self.world_size)]
        if payloads is None:
            return self._wait(what, [keys[self.rank]])[0]
        for key, payload in list(zip(keys, payloads, strict=True))[1:]:
            self._set(what, key, payload)
        self._spent += keys[1:]
        return payloads[0]

    def farewell(self) -> None:
        """Collective; see `Channel.farewell`."""
        key = f"{self._lane}/farewell"
        try:
            if not self.is_coordinator:
                self._connection.set(f"{key}/{self.rank}", "1")
            else:
                wanted = [f"{key}/{rank}" for rank in range(1, self.world_size)]
                self._connection.wait(wanted, timedelta(seconds=min(_FAREWELL_S, self._limit_s)))
        except RuntimeError:
            return  # the others have died, or rank 0 has: nobody is left to wait for

    def close(self) -> None:
        """See `Channel.close`."""
        self._store = None

    @property
    def _connection(self) -> Store:
        if self._store is None:
            raise CheckpointError("the Checkpointer is closed; its ranks cannot talk any more")
        return self._store

    def _set(self, what: str, key: str, value: Any) -> None:
        try:
            self._connection.set(key, json.dumps(value))
        except RuntimeError as error:
            raise CheckpointError(f"{what}: rank 0 cannot be reached any more ({error})") from error

    def _wait(self, what: str, keys: list[str], extra_s: float = 0.0) -> list[Any]:
        if not keys:
            return []
        limit_s = self._limit_s + extra_s
        deadline = time.monotonic() + limit_s
        values: list[bytes] = []
        try:
            for start in range(0, len(keys), _KEYS_A_MESSAGE):
                batch = keys[start : start + _KEYS_A_MESSAGE]
                self._connection.wait(batch, timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
                values += self._connection.multi_get(batch)
            return [json.loads(value) for value in values]
        except dist.DistStoreError as error:
            missing = [key for key in keys if not self._connection.check([key])]
            ranks = [int(key.rsplit("/", 1)[1]) for key in missing if "/from/" in key] or [0]
            raise RankTimeoutError(what, ranks, limit_s) from error
        except RuntimeError as error:
            raise CheckpointError(f"{what}: rank 0 cannot be reached any more ({error})") from error
