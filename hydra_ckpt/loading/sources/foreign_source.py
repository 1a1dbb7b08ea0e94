"""Read checkpoints of other tools like ours: plain `dcp.save` directories, and accelerate's under FSDP2.

Their small values are pickled, and read only with `allow_legacy_pickle_restore`. Their contents are converted to the
form that a load of our own checkpoints compares, reads and installs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hydra_ckpt.errors import CheckpointConfigError
from hydra_ckpt.layout.plan import StoredTensor
from hydra_ckpt.loading.sources.source import Source
from hydra_ckpt.state import stage_documents as stages
from hydra_ckpt.state.optimizer import SEPARATOR
from hydra_ckpt.state.wrappers import canonical
from hydra_ckpt.storage.dcp_index import INDEX, KeyPath, model_prefix
from hydra_ckpt.storage.distcp import are_same
from hydra_ckpt.storage.encoding import encode
from hydra_ckpt.storage.pickled import (
    ACCELERATE_MODEL,
    DcpDirectory,
    read_dcp,
    read_pickle,
)
from hydra_ckpt.store import names
from hydra_ckpt.store.catalog import Checkpoint
from hydra_ckpt.store.manifest import Manifest
from hydra_ckpt.store.parts import models_in, part_of

_ACCELERATE_OPTIMIZER = "optimizer_{}"
_SCHEDULERS = ("lr_scheduler", "lr_schedulers", "scheduler", "schedulers")


def open_foreign(path: Path, *, allow_pickle: bool) -> Checkpoint:
    """A foreign directory as a checkpoint with only its path known.

    Raises:
        CheckpointConfigError: Pickles may not be read.
    """
    if not allow_pickle:
        raise CheckpointConfigError(
            f"{path} was written by torch.distributed.checkpoint or accelerate, and its small values are pickled: "
            "reading them runs code they contain. If you trust where it comes from, set "
            "checkpoint.allow_legacy_pickle_restore=true. Without that setting you can still export its weights: "
            "hydra-ckpt export"
        )
    checkpoint = Checkpoint(path, 0, 0)
    states = len(list(path.glob("random_states_*.pkl")))
    checkpoint.__dict__["manifest"] = Manifest(0, 0, 0.0, states, {}, {})
    return checkpoint


@dataclass
class ForeignSource(Source):
    """Such a directory, opened for one load; its bytes have no digests and are not checked."""

    _pools: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)

    @property
    def same_ranks(self) -> bool:
        """The places of its ranks are unknown; an equal number of ranks counts as the same places."""
        return self.checkpoint.manifest.world_size == self.channel.world_size

    def read(self) -> None:
        """Read the values that are not tensors, as far as pickles are allowed."""
        self.shared = {"extras": {}, "extra_state": {}, "lr_scheduler": []}
        self._pools = {names.OPTIMIZER: {}, names.EXTRAS: {}}
        self.own = {}
        if (self.root / INDEX).is_file():
            self._read_plain()
        else:
            self._read_accelerate()
        self.optimized = stages.optimized([self.shared])
        self.notes.texts.append("it was not written by hydra_ckpt: it has no digests, so its bytes are not checked")

    # -- where things are stored ---------------------------------------------------------------------------------

    def _read_plain(self) -> None:
        """Read one directory with everything, nested as its writer chose."""
        found = self._open("")
        model = self._model_prefix(found)
        beside = model[:-1]
        used = {self._take_model("", found, model)}
        optimizers = _optimizer_prefixes(found)
        self._take_optimizers([_subtree(found, prefix) for prefix in optimizers])
        used.update(optimizers)
        for name in _SCHEDULERS:
            tree = _subtree(found, (*beside, name))
            if tree is not None:
                used.add((*beside, name))
                self._take_schedulers(tree if isinstance(tree, list) else [tree])
        for name in self.state.extras:
            tree = _subtree(found, (*beside, name))
            if tree is not None:
                used.add((*beside, name))
                self.shared["extras"][name] = self._encode(tree, f"{name}:", self._pools[names.EXTRAS])
        step, epoch = found.values.get((*beside, "step")), found.values.get((*beside, "epoch"))
        used |= {(*beside, "step"), (*beside, "epoch")}
        self._take_step(step, epoch)
        self._note_rest(found, used)

    def _read_accelerate(self) -> None:
        """Read what `Accelerator.save_state` writes with FSDP2 and sharded state dicts."""
        for number, name in enumerate(self.extractor.maps(self.state)):
            place = ACCELERATE_MODEL.format(number)
            if (self.root / place / INDEX).is_file():
                self._take_model(name, self._open(place), ("model",))
        trees = []
        for number in range(len(self.state.optimizers)):
            place = _ACCELERATE_OPTIMIZER.format(number)
            if (self.root / place / INDEX).is_file():
                trees.append(_subtree(self._open(place), ("optimizer",)))
        self._take_optimizers(trees)
        self._take_schedulers([read_pickle(path) for path in _numbered(self.root, "scheduler", ".bin")])
        scaler = self.root / "scaler.pt"
        if scaler.is_file() and "grad_scaler" in self.state.extras:
            tree = self._encode(read_pickle(scaler), "grad_scaler:", self._pools[names.EXTRAS])
            self.shared["extras"]["grad_scaler"] = tree
        states = self.root / f"random_states_{self.channel.rank}.pkl"
        if states.is_file():
            saved = read_pickle(states)
            self.own = {
                "rng": {
                    "python": saved["random_state"],
                    "numpy": saved["numpy_random_seed"],
                    "torch": saved["torch_manual_seed"],
                }
            }
            if saved.get("torch_cuda_manual_seed") and torch.cuda.is_available():  # untested on GPU
                self.own["rng"]["cuda"] = saved["torch_cuda_manual_seed"][torch.cuda.current_device()]
        rest = [*_numbered(self.root, "sampler", ".bin"), *_numbered(self.root, "dl_state_dict", ".bin")]
        rest += sorted(self.root.glob("custom_checkpoint_*.pkl"))
        self.notes.texts += [f"{path.name} has no place in the AppState and is skipped" for path in rest]
        self._take_step(None, None)

    def _open(self, relative: str) -> DcpDirectory:
        found = read_dcp(self.root, relative, values=True)
        self.lengths.update(found.lengths)
        return found

    def _model_prefix(self, found: DcpDirectory) -> KeyPath:
        """The prefix of the model's tensors: the one with most of its names."""
        known = self._live_names()
        votes = Counter(path[:-1] for path in found.tensors if canonical(path[-1]) in known)
        remedy = "Save it again with the model's state dict under the key `model`"
        return model_prefix(self.root, votes, remedy) if votes else ("model",)

    def _live_names(self) -> set[str]:
        return {
            name
            for mapped in self.extractor.maps(self.state).values()
            for name in (*(slot.name for slot in mapped.slots), *mapped.aliases)
        }

    # -- into our form -------------------------------------------------------------------------------------------

    def _take_model(self, name: str, found: DcpDirectory, prefix: KeyPath) -> KeyPath:
        """The model's tensors, by name; a tied one appears under each of its names."""
        mapped = self.extractor.maps(self.state)[name]
        pool = self._pools.setdefault(part_of(name), {})
        for path, stored in found.tensors.items():
            if path[:-1] != prefix:
                continue
            name = canonical(path[-1])
            own = mapped.aliases.get(name, name)
            if (
                own in pool
                and self.channel.is_coordinator
                and not are_same(self.root, pool[own], stored, found.lengths)
            ):
                raise CheckpointConfigError(
                    f"{self.root}: {own} and {name} differ, and the model has one tensor for both: untie it, or save "
                    "the checkpoint again from a model that ties them"
                )
            pool.setdefault(own, _renamed(stored, own))
        self.shared["extra_state"][name] = {
            canonical(path[-1]): self._encode(value, f"extra_state:{path[-1]}", self._pools[names.EXTRAS])
            for path, value in found.values.items()
            if path[:-1] == prefix and str(path[-1]).endswith("_extra_state")
        }
        return prefix

    def _take_optimizers(self, trees: list[Any]) -> None:
        described: dict[str, Any] = {"optimizers": [], "state": {}, "placements": {}}
        parameters = self.extractor.parameter_names(self.state)
        for number, tree in enumerate(trees):
            order = (
                [
                    parameters.get(id(p), "")
                    for group in self.state.optimizers[number].param_groups
                    for p in group["params"]
                ]
                if number < len(self.state.optimizers)
                else []
            )
            state, groups = _nested_optimizer(tree, set(parameters.values()))
            for key, held in state.items():
                name = _parameter(key, order)
                described["state"][name] = {
                    kind: self._encode(value, f"{name}{SEPARATOR}{kind}", self._pools[names.OPTIMIZER])
                    for kind, value in held.items()
                }
            for group in groups:
                members = [_parameter(key, order) for key in group["params"]]
                options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
                place = f"{members[0] if members else number}{SEPARATOR}options"
                encoded = self._encode(options, place, self._pools[names.OPTIMIZER])
                # One entry per group: groups with equal options may be one group here.
                described["optimizers"].append({"class": "", "groups": [{"params": members, "options": encoded}]})
        if described["optimizers"]:
            self.shared["optimizer"] = described

    def _take_schedulers(self, trees: list[Any]) -> None:
        self.shared["lr_scheduler"] += [
            self._encode(tree, f"lr_scheduler:{number}", self._pools[names.EXTRAS]) for number, tree in enumerate(trees)
        ]

    def _take_step(self, step: Any, epoch: Any) -> None:
        known = {key: value for key, value in (("step", step), ("epoch", epoch)) if type(value) is int and value >= 0}
        self.checkpoint = replace_progress(self.checkpoint, **known)
        if "step" not in known:
            self.notes.texts.append("it does not say after how many steps it was written: the step starts at 0")

    def _note_rest(self, found: DcpDirectory, used: Collection[KeyPath]) -> None:
        rest = [
            path
            for path in (*found.tensors, *found.values)
            if not any(path[: len(prefix)] == prefix for prefix in used if prefix) and path[:-1] not in used
        ]
        for key in sorted({str(path[0]) for path in rest}):
            self.notes.texts.append(f"{key} has no place in the AppState and is skipped")

    def _encode(self, value: Any, name: str, pool: dict[str, StoredTensor]) -> Any:
        """A nested value as our JSON; stored tensors are referred to by name and noted in the pool."""
        if isinstance(value, StoredTensor):
            pool[name] = _renamed(value, name)
            return {"~": "tensor", "v": name}
        if isinstance(value, dict) and all(type(key) is str for key in value) and _has_stored(value):
            return {key: self._encode(item, _join(name, key), pool) for key, item in value.items()}
        if isinstance(value, list) and _has_stored(value):
            return [self._encode(item, _join(name, str(index)), pool) for index, item in enumerate(value)]
        return encode(value, name, self.given)

    # -- for a load ----------------------------------------------------------------------------------------------

    def models(self) -> set[str]:
        """The parts that hold models."""
        return set(models_in(self._pools))

    def stored(self, part: str) -> dict[str, StoredTensor]:
        """The tensors of a part, by name."""
        return self._pools.get(part, {})


def replace_progress(checkpoint: Checkpoint, step: int = 0, epoch: int = 0) -> Checkpoint:
    """The checkpoint with its step and epoch, once they are known."""
    found = replace(checkpoint, step=step, epoch=epoch)
    found.__dict__["manifest"] = checkpoint.manifest
    return found


def _renamed(stored: StoredTensor, name: str) -> StoredTensor:
    return replace(stored, spec=replace(stored.spec, name=name))


def _join(name: str, key: str) -> str:
    return f"{name}{key}" if name.endswith(":") else f"{name}.{key}"


def _has_stored(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_stored(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_stored(item) for item in value)
    return isinstance(value, StoredTensor)


def _numbered(root: Path, stem: str, suffix: str) -> list[Path]:
    """`stem.bin`, `stem_1.bin`, ..., as accelerate numbers files."""
    candidates = [root / f"{stem}{suffix}", *(root / f"{stem}_{number}{suffix}" for number in range(1, 100))]
    return [path for path in candidates if path.is_file()]


def _subtree(found: DcpDirectory, prefix: KeyPath) -> Any:
    """The values under a prefix, nested again; None if there are none."""
    tree: dict[Any, Any] = {}
    for path, leaf in (*found.tensors.items(), *found.values.items()):
        if path[: len(prefix)] != prefix:
            continue
        if path == prefix:
            return leaf
        node = tree
        for key in path[len(prefix) : -1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return _with_lists(tree) if tree else None


def _with_lists(tree: Any) -> Any:
    """DCP numbers a list's elements with integers; a dictionary's keys are strings."""
    if not isinstance(tree, dict):
        return tree
    items = {key: _with_lists(value) for key, value in tree.items()}
    return [items[key] for key in sorted(items)] if all(type(key) is int for key in items) else items


def _optimizer_prefixes(found: DcpDirectory) -> list[KeyPath]:
    """The prefixes of the optimizers' state dicts: those with parameter groups."""
    prefixes = {
        path[:position]
        for path in (*found.tensors, *found.values)
        for position, key in enumerate(path)
        if str(key) == "param_groups" or str(key).startswith("param_groups.")
    }
    return sorted(prefixes, key=str)


def _nested_optimizer(tree: dict[str, Any], known: Collection[str]) -> tuple[dict[str, dict[str, Any]], list[Any]]:
    """State by parameter, and groups, from a nested PyTorch state dict or a flat one (`state.<parameter>.<key>`)."""
    if "param_groups" in tree:
        return dict(tree.get("state", {})), list(tree["param_groups"])
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for path, value in tree.items():
        kind, _, rest = path.partition(".")
        words = rest.split(".")
        cuts = [cut for cut in range(len(words) - 1, 0, -1) if canonical(".".join(words[:cut])) in known]
        cut = cuts[0] if cuts else len(words) - 1
        parameter, key = ".".join(words[:cut]), ".".join(words[cut:])
        if kind == "state":
            state.setdefault(parameter, {})[key] = value
        else:
            groups.setdefault(parameter, {"params": [parameter]})[key] = value
    return state, list(groups.values())


def _parameter(key: Any, order: list[str]) -> str:
    """A parameter's name; optimizers' own state dicts number them in the order of their groups."""
    text = str(key)
    return order[int(text)] if text.isdigit() and int(text) < len(order) else canonical(text)
