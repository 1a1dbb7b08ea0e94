"""Optimizers: options, state, and whatever else they save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from hydra_ckpt.loading.installing.decoded import Values
from hydra_ckpt.loading.installing.install_links import LinkInstaller
from hydra_ckpt.loading.installing.untouched import Before
from hydra_ckpt.loading.planning.load_plan import LoadPlan
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.optimizer_installing import give_back, install
from hydra_ckpt.state.optimizer_loading import Fit
from hydra_ckpt.state.optimizer_oracle import PARAMETER, differing


@dataclass(frozen=True)
class _Given:
    """An optimizer that has loaded its own state_dict.

    Attributes:
        optimizer: The object.
        expected: Makes the state_dict that it was given.
        before: The tensors in it, as they were.
        unlike: Where it reported something else right after.
    """

    optimizer: Any
    expected: Callable[..., Any]
    before: Before
    unlike: list[str]


@dataclass(frozen=True)
class OptimizerInstaller:
    """Gives optimizers their state and options.

    Args:
        source: The checkpoint, read.
        plan: What was read.
        values: The saved values.
        links: What objects have in common with others.
    """

    source: Source
    plan: LoadPlan
    values: Values
    links: LinkInstaller
    _given: dict[str, _Given] = field(default_factory=dict)

    def install(self, found: Fit, empty: Mapping[str, Collection[str]]) -> None:
        """Install the optimizers' state and options, and whatever else they save.

        Args:
            found: The parts of the saved description that fit.
            empty: Parameters whose state was empty, by the path of the optimizer that held it.
        """
        parameters = self.source.extractor.parameter_names(self.source.state)
        live = {name: parameter for parameter, name in self._parameters(parameters)}

        def walk(*, is_first: bool = False) -> None:
            made: dict[str, Any] = {}
            states = [self.values.decoded(state, made=made) for state in found.state]
            options = [[self.values.decoded(group, made=made) for group in groups] for groups in found.options]
            install(found, states, options, self.source.state.named_optimizers, parameters, empty, is_first=is_first)

        walk(is_first=True)
        named = list(self.source.state.named_optimizers.items())
        for number, tree in found.own.items():
            dotted, optimizer = named[number]
            decoded = self.values.whole(dotted, optimizer, tree, {PARAMETER: live.__getitem__})
            decoded = self.links.joining(dotted, decoded, is_own=True)
            before = self.values.before(tree)
            unlike = give_back(dotted, optimizer, decoded, found, walk)
            self._given[dotted] = _Given(optimizer, decoded, before, unlike)
        for number, kind in found.replaced.items() if found.replaced.keys() - found.refused else ():
            self._note_other_class(*named[number], kind)
        left = found.absent | found.refused | found.own.keys() | found.replaced.keys()
        for number, (dotted, _) in enumerate(named):
            self.source.notes.exact += [dotted] if number not in left else []

    def _note_other_class(self, dotted: str, optimizer: Any, kind: str) -> None:
        """Let an optimizer of another class than the saved one correct what it has taken over, and note it.

        PyTorch's load_state_dict() does so too: AdamW sets `decoupled_weight_decay`, which is false in Adam's options.
        """
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.__setstate__({"state": optimizer.state, "param_groups": optimizer.param_groups})
        self.source.notes.trusted.append(dotted)
        self.source.notes.texts.append(
            f"{dotted}: {kind} in the checkpoint, {type(optimizer).__qualname__} here; its state and options were taken"
        )

    def unlike(self) -> Iterator[tuple[str, list[str]]]:
        """Each optimizer that was given its own state_dict, and where it reports something else."""
        for dotted, one in self._given.items():
            now = [] if one.unlike else differing(one.expected(), told_by(dotted, one.optimizer), dotted)
            yield dotted, [*one.unlike, *now, *one.before.changed()]

    def _parameters(self, known: Mapping[int, str]) -> Iterator[tuple[torch.Tensor, str]]:
        """All live parameters with their names."""
        for modules in self.source.state.models.values():
            for module in modules:
                yield from ((item, known[id(item)]) for item in module.parameters() if id(item) in known)
