"""What a load finds out and its report will say."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from hydra_ckpt.errors import some_of

PARTS = ("model", "optimizer", "lr_scheduler", "dataloader", "rng", "extras", "progress")
_ORDER = {part: number for number, part in enumerate(PARTS)}


@dataclass
class Notes:
    """What a load report contains besides the step. Names are dotted: `optimizer`, `extras.ema`, `model.head.weight`.

    Attributes:
        texts: Notes in plain words.
        exact: Objects restored and compared.
        trusted: Objects that loaded their state themselves, but report a different one afterwards.
        rederived: The parts that could not be restored exactly.
        missing: What the checkpoint does not have.
        skipped: What was not loaded into anything.
    """

    texts: list[str] = field(default_factory=list)
    exact: list[str] = field(default_factory=list)
    trusted: list[str] = field(default_factory=list)
    rederived: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @staticmethod
    def of_all_ranks(found: Sequence[Mapping[str, list[str]]]) -> dict[str, list[str]]:
        """Coordinator only: what any rank notes, as plain data; so reports are equal on all ranks."""
        return {kind: list(dict.fromkeys(name for notes in found for name in notes[kind])) for kind in found[0]}

    def derived(self, what: str, why: str) -> None:
        """Note a part that was not restored exactly, and why."""
        self.rederived += [what] if what not in self.rederived else []
        self.texts.append(why)

    def took(self, what: str, unlike: Collection[str]) -> None:
        """Note an object that loaded its state itself.

        Args:
            what: The object.
            unlike: Where its state_dict() afterwards differs from the state it was given.
        """
        if not unlike:
            self.exact.append(what)
            return
        self.trusted.append(what)
        self.texts.append(
            f"{what} loaded its state, but its state_dict() reports different values afterwards: "
            f"{some_of(sorted(unlike))}"
        )

    def changed(self, what: str, by: str, names: Collection[str]) -> None:
        """Note that an object that had been restored was changed by the loading of another one."""
        if what in self.exact:
            self.exact.remove(what)
            self.trusted.append(what)
        self.texts.append(f"{by} changed {some_of(sorted(names))} while it loaded its state")

    def parted(self, what: str, places: Mapping[str, str]) -> None:
        """Note an object that holds copies of what it shared with others when it was saved.

        Args:
            what: The object.
            places: Where in it, to whose it was.
        """
        if what in self.exact:
            self.exact.remove(what)
            self.trusted.append(what)
        shown = some_of(sorted(f"{place} ({target})" for place, target in places.items()))
        self.texts.append(
            f"{what} shared with other objects what it holds copies of now, which no longer follow them: {shown}"
        )

    def leave(self, left: Collection[str], unexpected: Collection[str]) -> None:
        """Note what stays as it was built, and what is not used, because it does not match."""
        self.missing += left
        self.skipped += unexpected
        self.texts += [f"left as built (checkpoint.load_strict=false): {', '.join(left)}"] if left else []
        self.texts += [f"not loaded: {', '.join(unexpected)}"] if unexpected else []

    def only_exact(self) -> tuple[str, ...]:
        """The exact objects that are listed nowhere else."""
        elsewhere = {*self.trusted, *self.rederived, *self.missing, *self.skipped}
        found = [name for name in self.exact if name not in elsewhere]
        return tuple(sorted(found, key=lambda name: _ORDER.get(name.partition(".")[0], len(_ORDER))))
