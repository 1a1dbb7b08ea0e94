"""A sweep's directory has one launcher at a time, if a sweeper chooses values by results.

Two such launchers would count their jobs from the same number, and each would take the other's trials for its own.
"""

from __future__ import annotations

import atexit
import logging
from pathlib import Path

from hydra_ckpt.errors import CheckpointExistsError
from hydra_ckpt.files import Files
from hydra_ckpt.store.lease import Lease, Times
from hydra_ckpt.store.owner import Owner, read_owner
from hydra_ckpt.worker import Heart

__all__ = ["hold_sweep"]

log = logging.getLogger(__name__)

_DIRECTORY = ".hydra_ckpt_launcher"
_held: set[Path] = set()  # sweeps that this process holds until it ends


def hold_sweep(sweep_dir: Path, times: Times = Times(grace_s=0.0)) -> None:  # noqa: B008 - a frozen value
    """Become the only launcher of a sweep, until this process ends.

    Args:
        sweep_dir: The sweep's directory.
        times: How long to watch a launcher on another host that may be dead.

    Raises:
        CheckpointExistsError: Another launcher is at work there.
    """
    root = sweep_dir.absolute() / _DIRECTORY
    if root in _held:
        return
    lease = Lease(Files(), root, Owner.here(root=root), times)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lease.acquire()
    except CheckpointExistsError:
        raise _refusal(sweep_dir, root) from None
    except OSError as error:
        log.warning("%s: whether another program launches jobs here cannot be determined: %s", sweep_dir, error)
        return
    _held.add(root)
    heart = Heart(times.heartbeat_s, lease.beat)
    atexit.register(lease.release)
    atexit.register(heart.stop)  # the last that is registered is called first


def _refusal(sweep_dir: Path, root: Path) -> CheckpointExistsError:
    found = read_owner(root)
    who = f"host {found[0].host}, process {found[0].pid}" if found is not None else "unknown"
    return CheckpointExistsError(
        f"another program launches jobs in {sweep_dir} ({who}), and a sweeper that goes by results cannot share a "
        "directory. Wait until it has ended, or set another hydra.sweep.dir; both may continue the same study"
    )
