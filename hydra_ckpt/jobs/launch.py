"""What the ranks of one launch agree on before there is a process group; torch-free unless ranks must be asked.

Hydra starts in every rank by itself: left alone, each would choose its own timestamped run directory and write its own
copies of the configuration and the log. Three resolvers prevent that; the options `hydra/output=hydra_ckpt` and
`hydra/job_logging=hydra_ckpt` use them:

- `${hydra_ckpt.launch_time:FORMAT}`: one time for all ranks, which also outlives restarts by torchrun;
- `${hydra_ckpt.run_directory:NAME}`: NAME where there is one, else the launch time;
- `${hydra_ckpt.rank0:VALUE,OTHERWISE}`: VALUE on the first rank, OTHERWISE (null) on the others.
"""

from __future__ import annotations

import os
from datetime import datetime
from functools import cache

from omegaconf import OmegaConf

from hydra_ckpt.errors import TopologyError

__all__ = ["register_resolvers"]

_TIME_VARIABLE = "HYDRA_CKPT_LAUNCH_TIME"
_STORE_KEY = "hydra_ckpt/launch_time"


def register_resolvers() -> None:
    """Registers the resolvers; again changes nothing."""
    # Cached, because Hydra hands only cached values on to the jobs of a sweep.
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
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise TopologyError(
            "several ranks were started, but not by torchrun, so they cannot agree on a timestamped run directory; "
            "give its name (hydra.run.dir=..., in hydra-ckpt-train run_name=...), or set "
            f"{_TIME_VARIABLE} to one ISO time for all of them"
        )
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    said: bytes = store.compare_set(_STORE_KEY, "", now)
    return said.decode()
