"""Messages over our own store; every wait ends at its limit, whatever the network does.

Example: the second exchange on the channel `save`, with 3 ranks. Ranks 1 and 2 set the keys `save/2.1/from/1` and
`save/2.1/from/2` (first message of exchange 2), preceded by the incarnation; rank 0 waits for both. The answer is the
second message: rank 0 sets `save/2.2/to/0`. With a limit of 60 seconds and an answer that takes 40, it first sets
`save/2.2/to/0` and `save/2.2/to/1` to empty texts, after 15 and 30 seconds, and the answer is `save/2.2/to/2`. The
others read these keys in order, and each empty one extends their wait to 60 seconds from then on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from hydra_ckpt.distributed.channel import Channel, RankTimeoutError
from hydra_ckpt.distributed.courier import Courier
from hydra_ckpt.errors import CheckpointError

# A farewell takes no longer than any other message; a rank that is later has died.
_FAREWELL_S = 20.0
# PyTorch's store rereads a long message from its start whenever more of it arrives: waiting for 16,384 keys and getting
# them took 0.4 s in one message each, and 0.05 s in sixteen.
_KEYS_A_MESSAGE = 1024
# Rank 0 sends four signs of life within the limit. An answer that comes sooner needs none.
_BEATS = 4
# Ranks give up on a rank 0 that sends signs of life but never finishes after ten limits, but not before five minutes:
# at the start it may have to watch another run's heartbeat for that long.
_MOST_LIMITS = 10
_AT_LEAST_S = 300.0
# How long past the limit an answer may take before the connection counts as stuck, in seconds.
_GRACE_S = 1.0
# The same for rank 0, whose own server always answers, and which may have to query thousands of keys one by one.
_COLLECT_S = 60.0

_T = TypeVar("_T")


class _Patience:
    """How long a rank still waits for rank 0: the limit, counted from rank 0's last sign of life."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        now = time.monotonic()
        self._deadline = now + limit_s
        self._end = now + max(_MOST_LIMITS * limit_s, _AT_LEAST_S)

    @property
    def left_s(self) -> float:
        """Seconds left; negative past the deadline."""
        return self._deadline - time.monotonic()

    def renew(self) -> None:
        """Record a sign of life from rank 0."""
        self._deadline = min(time.monotonic() + self._limit_s, self._end)


class StoreChannel(Channel):
    """A channel over its own TCPStore connection.

    Keys are `<incarnation>/<lane>/<exchange>.<number of the message>/…`. The coordinator removes a message once every
    rank has sent the next one, so the store does not grow. While it prepares an answer it regularly sends empty ones,
    under the keys `…/to/0`, `…/to/1` and so on; the first that is not empty is the answer.

    Args:
        store: The connection.
        lane: The channel's name, equal on all ranks.
        rank: This rank.
        world_size: The number of ranks.
        limit_s: The longest wait, in seconds.
    """

    def __init__(self, store: Store, lane: str, rank: int, world_size: int, limit_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self._store: Store | None = store
        self._lane = lane
        self._limit_s = limit_s
        self._beat_s = limit_s / _BEATS
        self._exchange = self._number = 0
        self._spent: list[str] = []
        self._answer_key, self._answers = "", 0
        self._courier = Courier(f"hydra_ckpt-{lane}", self._beat if rank == 0 else None, self._beat_s)

    def open(self) -> None:
        """Collective; see `Channel.open`."""
        self._exchange += 1
        self._number = 0

    def _next(self, *ends: str) -> list[str]:
        """The keys of the next message."""
        self._number += 1
        return [f"{self._lane}/{self._exchange}.{self._number}/{end}" for end in ends]

    def gather(self, what: str, payload: Any) -> list[Any] | None:
        """Collective; see `Channel.gather`."""
        keys = self._next(*(f"from/{rank}" for rank in range(self.world_size)))
        store = self._connection
        if not self.is_coordinator:
            # Not waited for: if it gets lost, no answer comes either. It is sent even if this rank gives up, so that
            # rank 0 need not wait for a rank that has failed.
            text = json.dumps(payload)
            self._courier.submit(lambda: store.set(keys[self.rank], text))
            return None
        spent, self._spent = self._spent, keys[1:]
        self._aim(f"{self._lane}/{self._exchange}.{self._number + 1}/to")
        found = self._call(what, lambda: self._collect(store, keys[1:]), _COLLECT_S)
        missing = [rank for rank, value in enumerate(found, 1) if value is None]
        if missing:
            self._spent += spent
            raise RankTimeoutError(what, missing, self._limit_s)
        self._courier.submit(lambda: [store.delete_key(key) for key in spent])
        return [payload, *(json.loads(value) for value in found if value is not None)]

    def receive(self, what: str, send: Callable[[], Any] | None = None) -> Any:
        """Collective; see `Channel.receive`."""
        (key,) = self._next("to")
        if send is None:
            return self._listen(what, key)
        self._aim(key)
        with self._courier.beating():
            value = send()
        text = json.dumps(value)
        self._call(what, lambda: self._answer(text))
        return value

    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """Collective; see `Channel.scatter`."""
        keys = self._next(*(f"for/{rank}" for rank in range(self.world_size)))
        if payloads is None:
            return self._listen(what, keys[self.rank])
        for key, payload in list(zip(keys, payloads, strict=True))[1:]:
            self._set(what, f"{key}/0", payload)
            self._spent.append(f"{key}/0")
        return payloads[0]

    def drain(self) -> None:
        """Collective; see `Channel.drain`."""
        key, limit_s = f"{self._lane}/farewell", min(_FAREWELL_S, self._limit_s)
        store = self._connection
        try:
            if not self.is_coordinator:
                self._courier.call(lambda: store.set(f"{key}/{self.rank}", "1"), limit_s)
            else:
                wanted = [f"{key}/{rank}" for rank in range(1, self.world_size)]
                self._courier.call(lambda: store.wait(wanted, timedelta(seconds=limit_s)), limit_s + _GRACE_S)
        except (RuntimeError, TimeoutError):
            return  # the others have died, or rank 0 has: there is nothing left to wait for

    def close(self) -> None:
        """See `Channel.close`."""
        self._store = None
        self._courier.close()

    @property
    def _connection(self) -> Store:
        if self._store is None:
            raise CheckpointError("the Checkpointer is closed; its ranks can no longer communicate")
        return self._store

    def _call(self, what: str, call: Callable[[], _T], extra_s: float = _GRACE_S) -> _T:
        """Make a call that waits no longer than the limit if rank 0 answers."""
        try:
            return self._courier.call(call, self._limit_s + extra_s)
        except TimeoutError as error:
            raise RankTimeoutError(what, [0], self._limit_s) from error
        except RuntimeError as error:
            raise _unreachable(what, error) from error

    def _set(self, what: str, key: str, value: Any) -> None:
        store, text = self._connection, json.dumps(value)
        self._call(what, lambda: store.set(key, text))

    # -- the coordinator -----------------------------------------------------------------------------------------

    def _aim(self, key: str) -> None:
        """Send answers to this key from now on."""
        if key != self._answer_key:
            self._answer_key, self._answers = key, 0

    def _answer(self, text: str) -> None:
        """In the courier's thread: send the next answer under the key."""
        key = f"{self._answer_key}/{self._answers}"
        self._answers += 1
        self._spent.append(key)
        self._connection.set(key, text)

    def _beat(self) -> None:
        """In the courier's thread: send a sign of life."""
        self._answer("")

    def _collect(self, store: Store, keys: list[str]) -> list[bytes | None]:
        """In the courier's thread: the values of the keys; None for those that did not arrive within the limit."""
        deadline = time.monotonic() + self._limit_s
        found: list[bytes | None] = []
        for start in range(0, len(keys), _KEYS_A_MESSAGE):
            batch = keys[start : start + _KEYS_A_MESSAGE]
            while not _has_come(store, batch, min(self._beat_s, deadline - time.monotonic())):
                self._beat()
                if time.monotonic() >= deadline:
                    break
            if time.monotonic() < deadline:
                found += store.multi_get(batch)
            else:
                found += [store.get(key) if store.check([key]) else None for key in batch]
        return found

    # -- the others ----------------------------------------------------------------------------------------------

    def _listen(self, what: str, key: str) -> Any:
        """The value of a key that rank 0 sets."""
        store, patience = self._connection, _Patience(self._limit_s)
        begun = time.monotonic()
        future = self._courier.submit(lambda: _watch(store, key, patience))
        try:
            return json.loads(_outcome(future, patience))
        except TimeoutError as error:
            future.cancel()
            raise RankTimeoutError(what, [0], time.monotonic() - begun) from error
        except RuntimeError as error:
            raise _unreachable(what, error) from error


def _watch(store: Store, key: str, patience: _Patience) -> bytes:
    """In the courier's thread: wait for an answer; each sign of life extends the wait."""
    number = 0
    while True:
        answer = f"{key}/{number}"
        # Checks once more in case this rank itself was paused.
        if not _has_come(store, [answer], patience.left_s) and not store.check([answer]):
            raise TimeoutError
        found: bytes = store.get(answer)
        if found:
            return found
        patience.renew()
        number += 1


def _has_come(store: Store, keys: list[str], within_s: float) -> bool:
    try:
        store.wait(keys, timedelta(seconds=max(within_s, 0.001)))
    except dist.DistStoreError:
        return False
    return True


def _outcome(future: Future[_T], patience: _Patience) -> _T:
    """The result of a call; gives up a little after the patience runs out, because the call may be stuck.

    Raises:
        TimeoutError: The patience has run out.
    """
    while patience.left_s > 0:
        try:
            return future.result(patience.left_s)
        except FutureTimeoutError:
            if future.done():
                return future.result()
    try:
        return future.result(_GRACE_S)
    except FutureTimeoutError:
        raise TimeoutError from None


def _unreachable(what: str, error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"{what}: rank 0 can no longer be reached ({error})")
