"""A run's hold on its checkpoint directory. Coordinator only."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hydra_ckpt import __version__
from hydra_ckpt import metrics as metric
from hydra_ckpt.errors import CheckpointConfigError, CheckpointError
from hydra_ckpt.files import Files
from hydra_ckpt.resolved import KeepOptions
from hydra_ckpt.store import names
from hydra_ckpt.store.best_so_far import COUNTS_FROM, KEY, BestSoFar, best_until, counts_from, opened
from hydra_ckpt.store.catalog import Catalog, Checkpoint, scan
from hydra_ckpt.store.choosing import choose, deciding_metric
from hydra_ckpt.store.draft import discard
from hydra_ckpt.store.fenced import FencedFiles, replace_prepared
from hydra_ckpt.store.lease import Lease, Times
from hydra_ckpt.store.manifest import WRITER, seal
from hydra_ckpt.store.owed_metrics import Owed, OwedMetrics
from hydra_ckpt.store.owner import Owner
from hydra_ckpt.store.pointers import move_pointer, read_pointer
from hydra_ckpt.store.recovery import conflict_error, in_the_way, put_back, recover, repoint, set_aside
from hydra_ckpt.store.retention import Context, policies, retire, superfluous
from hydra_ckpt.store.strangers import refuse_strangers
from hydra_ckpt.worker import Heart, Worker

log = logging.getLogger(__name__)


class Directory:
    """The checkpoint directory of this run.

    Args:
        root: The directory, absolute.
        files: The file layer.
        keep: The rules for the best checkpoint and for retention.
        run: The sweep and job number it belongs to, if any.
        times: How long the lease waits.
        may_wait: Whether to wait for a holder that may be dead.

    Attributes:
        best_so_far: The best value of the run, which may belong to a step that is not saved; later checkpoints record
            it. None if it is unknown.
        beginning: What its checkpoints record about how the run began.
    """

    def __init__(
        self,
        root: Path,
        files: Files,
        keep: KeepOptions,
        run: str | None,
        *,
        times: Times | None = None,
        may_wait: bool = True,
    ) -> None:
        self.root = root
        self.files = files
        self._keep = keep
        self._policies = policies(keep.retention, keep.max_recent)
        self.times = times or Times()
        self._owner = Owner.here(run or "", root)
        self._lease = Lease(files, root, self._owner, self.times, may_wait=may_wait)
        self._held = FencedFiles(files, self.fence)
        self._hidden: set[str] = set()  # names of hidden directories that were there when this run took over
        self._latest: int | None = None  # the step LATEST leads to: this run never moves it below
        self._best_name: str | None = None
        self._heart: Heart | None = None
        self._may_hold = False  # whether the lease is held, or an interrupted step may have taken it
        self._janitor: Worker | None = None
        self._best: float | None = None
        self._metric = self._configured = keep.best_metric_key
        self._owed = OwedMetrics(self._write_metrics)
        self.best_so_far: BestSoFar | None = None
        self.beginning: Mapping[str, Any] = {}
        self._counts_from = 0  # results up to this step come from other values

    # -- reading -------------------------------------------------------------------------------------------------

    def choose(self, selector: str, passed_over: Mapping[str, str]) -> dict[str, Any]:
        """The checkpoint that a selector means; see `choosing.choose`."""
        return choose(self.root, selector, passed_over, (self._configured, self._keep.best_metric_mode))

    def _recall(self, catalog: Catalog, before: Checkpoint | None) -> None:
        """Under the default key, continue with the metric that decided before."""
        if self._configured == metric.DEFAULT_KEY:
            known = [*([before] if before is not None else []), *reversed(catalog.checkpoints)]
            decided = (item.manifest.details.get("deciding_metric") for item in known)
            self._configured = next((name for name in decided if isinstance(name, str)), self._configured)

    # -- a run begins --------------------------------------------------------------------------------------------

    def open(self, not_beyond: int | None) -> None:
        """Become the writer and clean up the directory. If that fails or is interrupted, release the directory.

        Raises:
            CheckpointExistsError: Another live run writes here.
            CheckpointConfigError: The directory cannot be written, or another system keeps its checkpoints there.
        """
        try:
            self._take(not_beyond)
            self._heart = self._heart or Heart(self.times.heartbeat_s, self._lease.beat)
        except BaseException:
            self._let_go()
            raise

    def _take(self, not_beyond: int | None) -> None:
        """Take the lease and clean up the directory."""
        try:
            refuse_strangers(self.root)
            self.files.make_dir(self.root)
            self._may_hold = True
            previous = self._lease.acquire()
            former = previous.incarnation if previous else None
            recover(self._held, self.root, former, self._owner.incarnation, not_beyond=not_beyond)
            self._hidden = {path.name for path in self.root.iterdir() if names.parse_hidden(path.name)}
        except CheckpointError:
            raise  # some of our errors are also OSErrors
        except OSError as error:
            raise CheckpointConfigError(
                f"checkpoint.checkpoint_dir={self.root} cannot be written ({error}); choose another directory, or fix "
                "its permissions or free some space"
            ) from error

    def _let_go(self) -> None:
        """Stop the heartbeat and release the lease, as far as there are any."""
        if self._heart is not None:
            self._heart.stop()
        if self._may_hold:
            self._lease.release()
        self._heart, self._may_hold = None, False

    def settle(
        self,
        start_step: int | None,
        corrupt: Collection[str],
        on_conflict: str,
        resumed: Path | None = None,
        *,
        is_another: bool = False,
    ) -> dict[str, Any]:
        """Move aside checkpoints that are damaged, or later than the step the run starts from.

        Args:
            start_step: The step the run starts from; None if no run starts.
            corrupt: Names of damaged checkpoints.
            on_conflict: What to do with later steps: see `refuse_later`.
            resumed: The checkpoint the run continues from.
            is_another: Whether the checkpoints here were trained with other values; their results are not this run's.

        Returns:
            Names of the published checkpoints that stay, those with an export, the best metric so far, and the key
            that decides.

        Raises:
            CheckpointExistsError: There are later steps, and they must not be set aside.
            CheckpointFormatError: A later step has a newer format, so it is never set aside.
        """
        self.refuse_later(start_step, corrupt, on_conflict)
        damaged = [self.root / name for name in corrupt if (self.root / name).is_dir()]
        set_aside(self._held, damaged, "corrupt", self._owner.incarnation)
        if start_step is not None:
            set_aside(self._held, in_the_way(scan(self.root), start_step), "aside", self._owner.incarnation)
        catalog = scan(self.root)
        kept = {item.name for item in catalog.checkpoints}
        self._owed.keep_only(kept)
        before = opened(resumed)
        self._recall(catalog, before)
        self._counts_from = start_step or 0 if is_another else counts_from(before)
        self._metric = deciding_metric(catalog, self._configured)
        best = catalog.best(self._metric, self._keep.best_metric_mode)
        repoint(self._held, catalog, names.LATEST, catalog.checkpoints[-1] if catalog.checkpoints else None)
        latest = read_pointer(self.root, names.LATEST)
        self._latest = None if latest is None else names.step_of(latest)
        self._best_name = None
        if read_pointer(self.root, names.BEST) in catalog.newer:
            log.warning("BEST stays as it is: it leads to a checkpoint of a newer format, whose metrics are unknown")
        elif read_pointer(self.root, names.BEST) in catalog.links:
            log.warning("BEST stays as it is: it leads to a symbolic link, which is not followed")
        elif best is not None:
            # A crash may have come after a publication, or after metrics were added, and before BEST was moved.
            move_pointer(self._held, self.root, names.BEST, best.name)
            self._best_name = best.name
        else:
            repoint(self._held, catalog, names.BEST, None)
        self._best = best.metrics[self._metric] if best else None
        return {
            "published": [item.name for item in catalog.checkpoints],
            "exported": [item.name for item in catalog.checkpoints if item.manifest.exports],
            "best": self._best_until(before, catalog),
            "deciding": self._configured,
        }

    def _best_until(self, before: Checkpoint | None, catalog: Catalog) -> float | None:
        """The best value so far, including steps that were not saved."""
        mode = self._keep.best_metric_mode
        best = catalog.best(self._metric, mode, after=self._counts_from)
        saved = best.metrics[self._metric] if best else None
        value = best_until(before, self._configured, mode) if counts_from(before) == self._counts_from else None
        return value if value is not None and metric.is_better(value, saved, mode) else saved

    def refuse_later(self, start_step: int | None, corrupt: Collection[str], on_conflict: str) -> None:
        """Raise if there are intact published steps after the start that must not be set aside. Changes nothing."""
        if start_step is None:
            return
        catalog = scan(self.root)
        catalog.refuse_newer(None, start_step)
        catalog.refuse_links(start_step)
        later = in_the_way(catalog, start_step)
        later = [path for path in later if path.name not in corrupt]
        if later and on_conflict != "set_aside":
            raise conflict_error(later, start_step)

    def fence(self) -> None:
        """Raise if another incarnation has taken over the directory."""
        self._lease.check()

    def close(self) -> None:
        """Release the directory. Idempotent. Does nothing in a forked process: the directory is its parent's."""
        if os.getpid() != self._owner.pid:
            return
        if self._janitor is not None:
            self._janitor.close()
        try:
            self.write_metrics()
            self._undo_late_changes()
            if self._owed:
                log.error(
                    "these metrics could not be written and are lost with this run: %s",
                    self._owed,
                )
        finally:
            self._let_go()

    # -- a checkpoint is published -------------------------------------------------------------------------------

    def point_to(self, name: str) -> None:
        """Move the pointers to a new checkpoint; a failure does not unpublish the checkpoint.

        Also undoes what a run that had lost the directory has retired or moved meanwhile.
        """
        try:
            self._point_latest(name)
            put_back(self._held, self.root, self._owner.incarnation, self._hidden)
            self.write_metrics()
            self._consider(Checkpoint.open(self.root / name))
            self._point_best()
            self._held.unlink(self.root / name / names.TOKEN)
        except (OSError, CheckpointError) as error:
            log.warning("%s is published, but its pointers could not be moved: %s", self.root / name, error)

    def _undo_late_changes(self) -> None:
        """Undo what a run that had lost the directory has done since the last save."""
        if self._heart is None:
            return
        try:
            put_back(self._held, self.root, self._owner.incarnation, self._hidden)
            self._point_best()
        except (OSError, CheckpointError) as error:
            log.debug("%s could not be checked at the end: %s", self.root, error)

    def _point_latest(self, name: str) -> None:
        """Move LATEST, but never to an earlier step: only `settle` goes back."""
        step = names.step_of(name)
        if self._latest is not None and step < self._latest:
            log.warning("LATEST stays at step %d: %s is an earlier step", self._latest, self.root / name)
            return
        move_pointer(self._held, self.root, names.LATEST, name)
        self._latest = step

    def _point_best(self) -> None:
        """Point BEST to the best checkpoint that this run knows, if another run has moved it."""
        best, found = self._best_name, read_pointer(self.root, names.BEST)
        if best is not None and found not in {None, best} and (self.root / best).is_dir():
            move_pointer(self._held, self.root, names.BEST, best)

    def _consider(self, checkpoint: Checkpoint) -> None:
        metrics = checkpoint.metrics
        key = metric.deciding_key(metrics, self._configured)
        if key is None:
            return
        is_gone = self._best_name is not None and not (self.root / self._best_name).is_dir()
        if key != self._metric or is_gone:
            best = scan(self.root).best(key, self._keep.best_metric_mode)
            other = best if best is not None and best.name != checkpoint.name else None
            self._best, self._best_name = (other.metrics[key], other.name) if other else (None, None)
        self._metric = key
        if checkpoint.name == self._best_name and metrics[key] != self._best:  # given again, with another value
            best = scan(self.root).best(key, self._keep.best_metric_mode) or checkpoint
            move_pointer(self._held, self.root, names.BEST, best.name)
            self._best, self._best_name = best.metrics.get(key), best.name
        if metric.is_better(metrics[key], self._best, self._keep.best_metric_mode):
            move_pointer(self._held, self.root, names.BEST, checkpoint.name)
            self._best, self._best_name = metrics[key], checkpoint.name

    @property
    def details(self) -> dict[str, Any]:
        """What a manifest records about the run, for the next run and for people."""
        known = self._configured != metric.DEFAULT_KEY
        deciding = {"deciding_metric": self._configured} if known else {}
        return {
            WRITER: __version__,
            "host": self._owner.host,
            "best_metric_mode": self._keep.best_metric_mode,
            **deciding,
            **self.beginning,
            **({COUNTS_FROM: self._counts_from} if self._counts_from else {}),
            **({KEY: self.best_so_far.as_data()} if self.best_so_far is not None else {}),
        }

    def decide_by(self, key: str) -> None:
        """Let another metric decide from now on."""
        self._configured = key

    def add_metrics(self, name: str, metrics: Mapping[str, float], best: BestSoFar | None = None) -> None:
        """Add metrics that arrived after the save, atomically, and move BEST if they are better.

        Metrics that cannot be written now are kept, and written with the next metrics, at the next save or at the end.

        Args:
            name: The checkpoint.
            metrics: The new metrics.
            best: The run's best value when they arrived.
        """
        self._owed.add(name, metrics, best)
        self.write_metrics()

    def write_metrics(self) -> None:
        """Write the metrics that are not on disk yet."""
        self._owed.write()

    def _write_metrics(self, name: str, owed: Owed) -> None:
        self.fence()
        checkpoint = Checkpoint.open(self.root / name)
        best = {KEY: owed.best.as_data()} if owed.best is not None else {}
        body = seal({**checkpoint.added, "metrics": {**checkpoint.metrics, **owed.metrics}, **best})
        # One name for all attempts: the next one removes what is left of an attempt on a full disk.
        prepared = self.root / f".{names.METRICS}.{self._owner.incarnation}"
        replace_prepared(self._held, prepared, checkpoint.path / names.METRICS, body)
        self._consider(checkpoint)

    def make_way(self, name: str) -> None:
        """Set a checkpoint of this run aside, right before a new one gets its name; pointers stay."""
        self.fence()
        set_aside(self._held, [self.root / name], "aside", self._owner.incarnation)

    def withdraw(self, name: str) -> bool:
        """Set a checkpoint of this run aside for good, if there is another one; pointers move to that.

        Returns:
            Whether there is.
        """
        if all(item.name == name for item in scan(self.root).checkpoints):
            return False
        self.make_way(name)
        catalog = scan(self.root)
        best = catalog.best(self._metric, self._keep.best_metric_mode)
        repoint(self._held, catalog, names.LATEST, catalog.checkpoints[-1] if catalog.checkpoints else None)
        repoint(self._held, catalog, names.BEST, best)
        return True

    def prune(self) -> None:
        """Unpublish what no policy of the run keeps and no pointer leads to; a separate thread deletes it."""
        if self._policies:
            catalog = scan(self.root)
            self.fence()  # everything listed existed while the lease was held
            context = Context(self._metric, self._keep.best_metric_mode, time.time())
            self.retire(superfluous(catalog, self._policies, context))

    def retire(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Unpublish these immediately; a separate thread deletes them.

        Raises:
            OSError: One cannot be renamed; the others are unpublished anyway.
            CheckpointError: Another run holds the directory.
        """
        if self._janitor is None:
            self._janitor = Worker("hydra_ckpt-delete")
        failure: OSError | None = None
        for item in checkpoints:
            try:
                hidden = retire(self._held, item, self._owner.incarnation)
            except OSError as error:
                failure = failure or error
                continue
            self._janitor.submit(partial(self._delete, hidden))
        if failure is not None:
            raise failure

    def _delete(self, hidden: Path) -> None:
        try:
            discard(self._held, hidden)
        except (OSError, CheckpointError) as error:
            log.warning("%s could not be deleted; the next run will do it: %s", hidden, error)
