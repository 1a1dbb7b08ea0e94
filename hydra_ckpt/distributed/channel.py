"""Messages between the ranks.

Each thread that communicates has its own `Channel`. On a channel every rank makes the same calls in the same order.

Example of `agree` with 3 ranks: all call `agree("counting", n, sum)` with n = 5, 7 and 9. Ranks 1 and 2 send 7 and 9
and wait. Rank 0 receives them, computes `sum([5, 7, 9])` and sends 21, which all three calls return. If `sum` raises
on rank 0, all three raise the same error. If rank 2 sends nothing within the limit, ranks 0 and 1 raise an error that
names it.

Example of `raise_together`: rank 1 passes `ValueError("x")`, the others None. Rank 1 raises its own error; ranks 0 and
2 raise `CheckpointError("rank 1: ValueError: x")`. If all pass None, nothing is raised.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hydra_ckpt import errors
from hydra_ckpt.errors import CheckpointError


class RankTimeoutError(CheckpointError):
    """Some ranks did not answer within the limit.

    Attributes:
        ranks: The ranks that did not answer.
    """

    def __init__(self, what: str, ranks: Sequence[int], limit_s: float) -> None:
        self.ranks = list(ranks)
        super().__init__(
            f"{what}: no answer from rank {', '.join(map(str, ranks))} within {limit_s:.0f} s "
            "(checkpoint.consolidation_timeout_minutes); a rank has died, is stuck, or made other calls"
        )


class Channel(ABC):
    """Messages between the ranks, one thread per rank. Payloads are plain data (JSON)."""

    rank: int
    world_size: int

    @abstractmethod
    def open(self) -> None:
        """Collective: begin an exchange. Puts a rank that gave up in the previous one back in step with the others."""

    @abstractmethod
    def gather(self, what: str, payload: Any) -> list[Any] | None:
        """Collective: send a payload to the coordinator, which gets all payloads by rank; other ranks get None.

        Only the coordinator waits.
        """

    @abstractmethod
    def receive(self, what: str, send: Callable[[], Any] | None = None) -> Any:
        """Collective: the coordinator's value on every rank; the coordinator passes `send`, which makes it.

        The others wait while the coordinator is working on it, at most the limit after its last sign of life.
        """

    @property
    def is_coordinator(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @abstractmethod
    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """Collective: the coordinator sends each rank its own payload; others pass None."""

    @abstractmethod
    def drain(self) -> None:
        """Collective: rank 0, which hosts the store, returns once all other ranks have every answer, or are late."""

    @abstractmethod
    def close(self) -> None:
        """Close the connection. Idempotent."""

    def coordinator_step(self, what: str, step: Callable[[], Any]) -> Any:
        """Collective: run `step` on rank 0; all ranks get its result, or raise its error."""

        def attempt() -> dict[str, Any]:
            try:
                return {"value": step()}
            except Exception as error:  # noqa: BLE001 - raised on every rank
                return {"error": error_to_data(error)}

        reply = self.receive(what, attempt if self.is_coordinator else None)
        if "error" in reply:
            raise error_from_data(reply["error"])
        return reply["value"]

    def agree(self, what: str, payload: Any, decide: Callable[[list[Any]], Any]) -> Any:
        """Collective: rank 0 decides from the payloads of all; all get the decision, or raise its error."""
        late: RankTimeoutError | None = None
        gathered: list[Any] | None = None
        try:
            gathered = self.gather(what, payload)
        except RankTimeoutError as error:
            if not self.is_coordinator:
                raise
            late = error  # reported to the others too

        def decision() -> Any:
            if late is not None:
                raise late
            return decide(gathered or [])

        return self.coordinator_step(what, decision)

    def raise_together(self, what: str, error: Exception | None) -> None:
        """Collective: if any rank has an error, raise on every rank: its own, otherwise that of the first rank."""
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
    """The reverse of `error_to_data`; errors of other classes than ours become a `CheckpointError`."""
    kind = getattr(errors, data["kind"], None)
    if not (isinstance(kind, type) and issubclass(kind, CheckpointError)):
        return CheckpointError(f"{prefix}{data['kind']}: {data['text']}")
    return errors.rebuild(kind, prefix + data["text"], data["attributes"])


class SoloChannel(Channel):
    """The channel of a single rank."""

    rank = 0
    world_size = 1

    def open(self) -> None:
        """Nothing to do on a single rank."""

    def gather(self, what: str, payload: Any) -> list[Any]:
        """This rank's payload in a list."""
        return [payload]

    def receive(self, what: str, send: Callable[[], Any] | None = None) -> Any:
        """The value of `send`."""
        if send is None:
            raise RuntimeError(f"{what}: the only rank is the coordinator and must send")
        return send()

    def scatter(self, what: str, payloads: Sequence[Any] | None) -> Any:
        """This rank's payload."""
        return (payloads or [None])[0]

    def drain(self) -> None:
        """No other rank to wait for."""

    def close(self) -> None:
        """No connection to close."""
