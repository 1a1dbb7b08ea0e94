"""Reports the tensors of replicas that had drifted apart when a checkpoint was saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from hydra_ckpt.errors import some_of
from hydra_ckpt.loading.planning.labels import label_of_tensor, part_of_label
from hydra_ckpt.loading.planning.matcher import Matcher
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.storage.stage_names import unqualified
from hydra_ckpt.store import names
from hydra_ckpt.store.parts import part_of


class DriftedMatcher(Matcher):
    """Finds out what reports call the tensors that had drifted: all replicas get the values of the first one."""

    def match(self) -> None:
        """Note them: an object as a whole if all of its tensors had drifted, otherwise these."""
        notes, drifted = self.source.notes, set(self.source.shared.get("drifted", ()))
        if not drifted:
            return
        known = {*notes.rederived, *self.plan.mismatch.left}
        found = [name for name in dict.fromkeys(self._names(drifted)) if name not in known]
        if found:
            notes.rederived += found
            notes.texts.append(
                f"replicas had drifted apart when this was saved; all have the first one's values now: {some_of(found)}"
            )

    def _names(self, drifted: set[str]) -> Iterator[str]:
        """What reports call tensors, by their labels."""
        objects: dict[str, dict[str, str]] = defaultdict(dict)
        for label, whole, single in self._stored():
            objects[whole][label] = single
        for whole, inside in objects.items():
            here = [single for label, single in inside.items() if label in drifted]
            yield from [whole] if len(here) == len(inside) else here

    def _stored(self) -> Iterator[tuple[str, str, str]]:
        """The label of every stored tensor, what the live object is called that has it, and what the tensor is."""
        available = self.source.available()
        for model in self.source.extractor.maps(self.source.state) if "model" in available else ():
            for name in self.source.stored(part_of(model)):
                yield f"{part_of(model)}/{name}", called(model), f"{called(model)}.{name}"
        for name in self.source.stored(names.OPTIMIZER) if "optimizer" in available else ():
            yield f"{names.OPTIMIZER}/{name}", *self._in_optimizer(name)
        for name in self.source.stored(names.EXTRAS):
            label = label_of_tensor(name)
            whole = self.called_here(label)
            if whole is not None and part_of_label(label) in available:
                inside = unqualified(name).partition(":")[2]
                yield f"{names.EXTRAS}/{name}", whole, f"{whole}.{inside}" if whole.startswith("extras.") else whole

    def _in_optimizer(self, name: str) -> tuple[str, str]:
        """What the live optimizer is called that has a tensor, and what the tensor is."""
        owner, _, inside = name.partition(SEPARATOR)
        inside = inside.replace(SEPARATOR, ".")
        if owner in self.owners or not owner.startswith("optimizer "):
            whole = self.owners.get(owner, "optimizer")
            return whole, f"{whole}.{owner.replace('/', '.', 1)}.{inside}"
        # What only the optimizer's state_dict() has is called after its number.
        own = self.called_here(f"optimizer.own.{owner.partition(' ')[2]}") or "optimizer"
        whole = own.removesuffix(".state_dict()")
        return whole, f"{whole}.{inside}"
