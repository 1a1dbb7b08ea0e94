"""A sweep's directory has one launcher at a time, if a sweeper chooses values by results.

Two such launchers would count their jobs from the same number, and each would take the other's trials for its own.
"""

from __future__ import annotations

import atexit
import json
import logging
from pathlib import Path

from hydra_ckpt.errors import CheckpointExistsError, CorruptCheckpointError
from hydra_ckpt.files import Files, write_atomically
from hydra_ckpt.store import names
from hydra_ckpt.store.lease import Lease, Times
from hydra_ckpt.store.owner import Owner, read_owner
from hydra_ckpt.store.small_files import read_small_file
from hydra_ckpt.worker import Heart

__all__ = ["hold_sweep", "identify", "identity_of"]

log = logging.getLogger(__name__)

_DIRECTORY = ".hydra_ckpt_launcher"
_IDENTITY = ".hydra_ckpt_sweep"
_MAX_BYTES = 1 << 16
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


def identity_of(sweep_dir: Path) -> str | None:
    """The random text that is in a sweep's directory, wherever it is moved; None if it has none that can be read."""
    try:
        found = json.loads(read_small_file(sweep_dir / _IDENTITY, _MAX_BYTES))
    except (OSError, CorruptCheckpointError, ValueError, RecursionError):
        return None
    return found if isinstance(found, str) and found else None


def identify(sweep_dir: Path) -> str:
    """The identity of a sweep, written now if it has none. Only its launcher may call it.

    Args:
        sweep_dir: The sweep's directory; created if it is missing.

    Returns:
        The identity. If it cannot be written, it is valid for this start only.
    """
    known = identity_of(sweep_dir)
    if known is not None:
        return known
    identity = names.nonce()
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(Files(), sweep_dir / _IDENTITY, json.dumps(identity).encode(), names.nonce())
    except OSError as error:
        log.warning("%s: the next start will not know the trials of this one: %s", sweep_dir, error)
    return identity


def _refusal(sweep_dir: Path, root: Path) -> CheckpointExistsError:
    found = read_owner(root)
    who = f"host {found[0].host}, process {found[0].pid}" if found is not None else "unknown"
    return CheckpointExistsError(
        f"another program launches jobs in {sweep_dir} ({who}), and a sweeper that goes by results cannot share a "
        "directory. Wait until it has ended, or set another hydra.sweep.dir; both may continue the same study"
    )
