"""What the ranks of one launch agree on before there is a process group.

torch is imported only if the ranks have to communicate.

Hydra starts separately in every rank: left alone, each would choose its own timestamped run directory and write its own
copies of the configuration and the log. Three resolvers prevent that; the options `hydra/output=hydra_ckpt` and
`hydra/job_logging=hydra_ckpt` use them:

- `${hydra_ckpt.launch_time:FORMAT}`: one time for all ranks, which also outlives restarts by torchrun;
- `${hydra_ckpt.run_directory:NAME}`: NAME if given, else the launch time;
- `${hydra_ckpt.rank0:VALUE,OTHERWISE}`: VALUE on the first rank, OTHERWISE (null) on the others.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from functools import cache
from itertools import count
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from hydra_ckpt.errors import TopologyError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

__all__ = ["attempt", "first_rank_says", "register_resolvers"]

_TIME_VARIABLE = "HYDRA_CKPT_LAUNCH_TIME"
_STORE_KEY = "hydra_ckpt/launch_time"
_ATTEMPT_KEY = "hydra_ckpt/attempt"
# The agent is up before its ranks are started.
_AGENT_S = 60
# All ranks are started at once, and import the same; on a shared file system that may take minutes.
_START_S = 600
_BETWEEN_S = 0.05
_said = count()


def register_resolvers() -> None:
    """Registers the resolvers; calling it again changes nothing."""
    # Cached, because Hydra passes only cached values to the jobs of a sweep.
    for name, resolver in (("launch_time", _launch_time), ("run_directory", _run_directory), ("rank0", _rank0)):
        OmegaConf.register_new_resolver(f"hydra_ckpt.{name}", resolver, use_cache=True, replace=True)


def _launch_time(form: str) -> str:
    return _launched_at().strftime(form)


def _run_directory(name: str | None) -> str:
    return name or _launch_time("%Y-%m-%d/%H-%M-%S")


def _rank0(value: str, otherwise: str | None = None) -> str | None:
    return value if os.environ.get("RANK", "0") == "0" else otherwise


@cache
def _launched_at() -> datetime:
    given = os.environ.get(_TIME_VARIABLE)
    if given:
        return datetime.fromisoformat(given)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        now = _first_to_say(now)
    return datetime.fromisoformat(now)


def _first_to_say(now: str) -> str:
    """The time named by whichever rank came first, kept by torchrun's agent."""
    if not _is_torchrun():
        raise TopologyError(
            "several ranks were started, but not by torchrun, so they cannot agree on a timestamped run directory; "
            f"give its name (hydra.run.dir=..., in hydra-ckpt-train run_name=...), or set {_TIME_VARIABLE} to the "
            "same ISO time for all of them"
        )
    said: bytes = _agents_store().compare_set(_STORE_KEY, "", now)
    return said.decode()


def first_rank_says(what: str, say: Callable[[], str]) -> str:
    """Collective: the first rank's answer, on all ranks of this launch; works before there is a process group.

    If ranks cannot communicate (several ranks not started by torchrun), each has to find the answer itself.

    Args:
        what: Names the question.
        say: Makes the answer.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return say()
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        answer = [say() if distributed.get_rank() == 0 else ""]
        distributed.broadcast_object_list(answer)
        return answer[0]
    if not _is_torchrun():
        return say()
    # The store outlives a restart, and the restarted ranks must not read earlier answers.
    key = f"hydra_ckpt/{what}/{attempt()}/{next(_said)}"
    store = _agents_store()
    if os.environ.get("RANK") == "0":
        store.set(key, say())
    try:
        answered: bytes = store.get(key)
    except RuntimeError as error:
        raise TopologyError(f"rank 0 has not said within {_START_S} s what is to be done ({what})") from error
    return answered.decode()


@cache
def attempt() -> str:
    """Collective, under torchrun: text that is equal on all ranks, and another one after each restart.

    torchrun's own count of restarts is not: when a host is lost, the agent that sees a rank fail counts one more, and
    an agent that only sees the host missing does not. Empty where the store is as new as the ranks.
    """
    if not _is_torchrun():
        return ""
    store, rank = _agents_store(), int(os.environ["RANK"])
    return _name_attempt(store, int(os.environ["WORLD_SIZE"])) if rank == 0 else _join_attempt(store, rank)


def _name_attempt(store: TCPStore, ranks: int) -> str:
    """Rank 0: name the attempt, and answer each rank that has heard the name."""
    name = os.urandom(8).hex()
    store.set(_ATTEMPT_KEY, name)
    asking = [f"{_ATTEMPT_KEY}/{name}/{rank}" for rank in range(1, ranks)]
    try:
        store.wait(asking, timedelta(seconds=_START_S))
    except RuntimeError as error:
        late = [rank for rank, key in enumerate(asking, 1) if not store.check([key])]
        raise TopologyError(f"ranks {late[:8]} have not started within {_START_S} s of rank 0") from error
    for key, asked in zip(asking, store.multi_get(asking), strict=True):
        store.set(f"{key}/answer", asked.decode())
    return name


def _join_attempt(store: TCPStore, rank: int) -> str:
    """Hear rank 0's name of the attempt. The first one heard may be of ranks that are gone, which answer nobody."""
    mine, deadline = os.urandom(8).hex(), time.monotonic() + _START_S
    while time.monotonic() < deadline:
        with suppress(RuntimeError):  # nothing within a second: perhaps there is a new name by now
            store.wait([_ATTEMPT_KEY], timedelta(seconds=1))
            name = store.get(_ATTEMPT_KEY).decode()
            key = f"{_ATTEMPT_KEY}/{name}/{rank}"
            store.set(key, mine)
            store.wait([f"{key}/answer"], timedelta(seconds=1))
            if store.get(f"{key}/answer").decode() == mine:
                return name
        time.sleep(_BETWEEN_S)
    raise TopologyError(f"rank {rank} has not heard of rank 0 within {_START_S} s of its start")


def _is_torchrun() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _agents_store() -> TCPStore:
    """The store of torchrun's agent, which outlives the ranks."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_AGENT_S))
    except RuntimeError as error:
        raise TopologyError(
            f"the store of torchrun's agent at {address}:{port} does not answer within {_AGENT_S} s. If that host is "
            "lost, torchrun has kept its address: start with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, and give the run "
            "directory a name (hydra.run.dir=..., in hydra-ckpt-train run_name=...)"
        ) from error
    store.set_timeout(timedelta(seconds=_START_S))  # what the ranks wait for each other may take longer
    return store
