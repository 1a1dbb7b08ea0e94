"""What objects had in common with models and with optimizers' groups when they were saved, and have again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state.around import told_by
from hydra_ckpt.state.capture import called
from hydra_ckpt.state.linking import Linking
from hydra_ckpt.state.links import Joining, Link, parted


@dataclass(frozen=True)
class LinkInstaller:
    """Gives objects live parameters, buffers and groups where they had them, instead of copies.

    Args:
        source: The checkpoint, read.
    """

    source: Source

    def joining(self, dotted: str, whole: Callable[..., Any], *, is_own: bool = False) -> Callable[..., Any]:
        """A function like `whole`, whose values have live objects in place of copies if they are given to an object.

        Args:
            dotted: What reports call the object.
            whole: Makes its saved state; with `made` one to give to it, without one to compare with.
            is_own: Whether that is an optimizer's own state_dict().
        """
        links = self._links(dotted)
        if is_own:
            links = [replace(link, path=link.path[1:]) for link in links if link.path[:1] == ("own",)]
        if not links:
            return whole

        def joined(made: dict[str, Any] | None = None) -> Any:
            value = whole(made=made)
            return value if made is None else Joining(links, self._live().targets).joined(value)

        return joined

    def join_optimizers(self) -> None:
        """Join the optimizers' state again."""
        for dotted in self.source.state.named_optimizers:
            links = self._links(dotted) if dotted in self.source.notes.exact + self.source.notes.trusted else []
            if links:
                live = self._live()
                tree: dict[str, Any] = {"state": {}, "options": {}}
                for holder in live.inside[dotted]:
                    tree["state"][holder.path] = {live.names.get(id(key)): held for key, held in holder.state.items()}
                    tree["options"][holder.path] = holder.groups
                Joining(links, live.targets).joined(tree)

    def check(self) -> None:
        """Report what is a copy nevertheless."""
        notes = self.source.notes
        for dotted, told in self._told().items():
            saved = self._links(dotted)
            if saved and dotted in notes.exact + notes.trusted:
                live = self._live()
                lost = parted(saved, told(live), live.targets)
                if lost:
                    places = {".".join([dotted, *filter(None, map(str, link.path))]): link.target for link in lost}
                    notes.parted(dotted, places)

    def _told(self) -> dict[str, Callable[[Linking], Sequence[Link]]]:
        """For each object of the AppState what finds its links now."""
        state = self.source.state

        def of_optimizer(dotted: str) -> Callable[[Linking], Sequence[Link]]:
            own = any(link.path[:1] == ("own",) for link in self._links(dotted))
            told = {"own": told_by(dotted, state.named_optimizers[dotted])} if own else {}
            return lambda live: [*live.of_optimizer(dotted), *live.of_other(dotted, told)]

        def of_other(dotted: str, item: Any) -> Callable[[Linking], Sequence[Link]]:
            return lambda live: live.of_other(dotted, told_by(dotted, item))

        def of_model(dotted: str, mapped: Any) -> Callable[[Linking], Sequence[Link]]:
            return lambda live: live.of_other(dotted, mapped.extra_state(dotted))

        others = {**state.named_schedulers, **{f"extras.{name}": extra for name, extra in state.extras.items()}}
        models = {called(name): mapped for name, mapped in self.source.extractor.maps(state).items()}
        return {
            **{dotted: of_model(dotted, mapped) for dotted, mapped in models.items()},
            **{dotted: of_optimizer(dotted) for dotted in state.named_optimizers},
            **{dotted: of_other(dotted, item) for dotted, item in others.items()},
        }

    def _live(self) -> Linking:
        return self.source.extractor.linking(self.source.state)

    def _links(self, dotted: str) -> list[Link]:
        """An object's saved links; of other pipeline stages those to what this one has too."""
        found = [Link.read(data) for data in self.source.shared.get("links", {}).get(dotted, ())]
        if not self.source.other_stages or not found:
            return found
        live = self._live()
        known = {*live.names.values()}
        return [
            link
            for link in found
            if link.target in live.targets and (link.path[0] != "state" or str(link.path[2]) in known)
        ]
