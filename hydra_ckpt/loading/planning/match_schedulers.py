"""Compares live schedulers with a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra_ckpt.errors import some_of
from hydra_ckpt.loading.planning.matcher import Matcher
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.optimizer_loading import moved_groups
from hydra_ckpt.storage.encoding import TAG


class SchedulerMatcher(Matcher):
    """Finds the saved state of each live scheduler; further live ones stay as they were built."""

    def match(self) -> None:
        """Match every scheduler of the AppState."""
        saved, live = self.source.shared["lr_scheduler"], self.source.state.named_schedulers
        homes = self.source.counterparts("lr_scheduler", len(saved), len(live))
        pairs = {name: home for name, home in zip(live, homes, strict=True) if home is not None}
        self.plan.schedulers = {name: saved[home] for name, home in pairs.items()}
        self.plan.absent.update(live.keys() - pairs.keys())
        for name, home in pairs.items():
            self._compare_classes(name, home, live[name])
        if self.plan.schedulers and (moved := self._moved_groups()):
            self._leave(
                "lr_scheduler",
                f"it identifies groups by position, and these had a different one: "
                f"{some_of(moved)}. Build optimizers and groups in the order of the run that saved, or leave the "
                "schedulers out (restore_parts)",
                *self.plan.schedulers,
            )
        keys = self.keys("lr_scheduler")
        self.skip(
            [
                f"lr_scheduler.{number if keys is None else keys[number]}"
                for number in range(len(saved))
                if number not in homes
            ]
        )
        if keys is None and len(saved) > len(live):
            self.plan.mismatch.different["lr_scheduler"] = (
                f"{len(saved)} in the checkpoint, {len(live)} in the AppState"
            )

    def _leave(self, label: str, why: str, *dotted: str) -> None:
        """Refuse schedulers, or leave them as they were built."""
        self.plan.mismatch.different[label] = why
        self.plan.mismatch.left += dotted
        self.plan.absent.update(dotted)
        self.plan.schedulers = {name: tree for name, tree in self.plan.schedulers.items() if name not in dotted}

    def _compare_classes(self, name: str, home: int, scheduler: Any) -> None:
        """Refuse the state of a scheduler of another class with other fields, which it would take over as its own."""
        classes, tree = self.source.shared.get("classes", {}).get("lr_scheduler", []), self.plan.schedulers[name]
        here = type(scheduler).__qualname__
        # Earlier versions did not record classes; other stages have other schedulers.
        if home >= len(classes) or classes[home] == here:
            return
        sides = _different_fields(tree, told_by(name, scheduler))
        if sides:
            self._leave(
                name,
                f"{classes[home]} in the checkpoint, {here} in the AppState, with other fields "
                f"({'; '.join(sides)}). Build it as in the run that saved, or leave the schedulers out "
                "(restore_parts)",
                name,
            )
        else:
            self.source.notes.texts.append(f"{name} was a {classes[home]} when saved, and is a {here} here")

    def _moved_groups(self) -> list[str]:
        source, found = self.source, self.plan.fit
        if found is None or source.other_stages:
            return []
        described, live = source.shared["optimizer"], len(source.state.optimizers)
        homes: list[int | None] = list(range(live))
        if self.keys("lr_scheduler") is not None:  # by position, a scheduler belongs to the optimizer of its number
            homes = source.counterparts("optimizer", len(described["optimizers"]), live)
        return moved_groups(described, found, source.extractor.parameter_names(source.state), homes)


def _different_fields(tree: Any, live: Any) -> list[str]:
    """The fields that a scheduler's saved state, encoded, or its live one lacks, in words.

    PyTorch's own private ones differ from version to version.
    """
    if not isinstance(tree, Mapping) or TAG in tree or not isinstance(live, Mapping):
        return []
    there, here = ({key for key in map(str, state) if not key.startswith("_")} for state in (tree, live))
    sides = (("there", there - here), ("here", here - there))
    return [f"only {where}: {', '.join(sorted(fields))}" for where, fields in sides if fields]
