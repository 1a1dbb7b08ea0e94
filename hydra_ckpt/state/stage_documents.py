"""Pipeline stages: the data of each besides its tensors, kept separate on disk and merged for other stages.

A stage writes one document with its optimizers' options, its schedulers, extra state and extras. A run with the same
stages finds its own; any other takes all of them together, parameter by parameter and key by key.
"""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from typing import Any

from hydra_ckpt.storage.decoding import expanded
from hydra_ckpt.storage.encoding import ALIAS, ATTRIBUTES, SAME, TAG, VIEW
from hydra_ckpt.storage.stage_names import unqualified

Document = dict[str, Any]

# Tags that wrap one value in a list, together with more data.
_AROUND_ONE = {ATTRIBUTES, SAME, VIEW, "parameter"}
_DROPPED = object()


def combine(documents: Sequence[Document], holds: str, stage: int, schedulers: int) -> tuple[Document, list[str]]:
    """The document of the stage that holds the same tensors; otherwise all of them as one.

    Args:
        documents: Those of all stages.
        holds: Digest of the tensors' names that this rank holds.
        stage: This rank's stage: it decides where several hold tensors of the same names.
        schedulers: Number of live schedulers.

    Returns:
        The document, and what the stages do not agree about.
    """
    alike = [document for document in documents if document.get("holds") == holds]
    own = next((document for document in alike if document.get("stage") == stage), next(iter(alike), None))
    if own is not None:
        return own, []
    notes: list[str] = []
    combined: Document = {}
    combined["lr_scheduler"], keys = _schedulers(documents, schedulers, notes)
    combined["keys"] = {"optimizer": None, "lr_scheduler": keys}
    each = [document.get("per_rank", {}) for document in documents]
    combined["per_rank"] = {
        kind: list(dict.fromkeys(label for labels in each for label in labels.get(kind, ())))
        for kind in ("plain", "tensors")
    }
    optimizers = [document["optimizer"] for document in documents if "optimizer" in document]
    if optimizers:
        combined["optimizer"] = _optimizers(optimizers)
    for kind in ("extra_state", "extras", "metadata"):
        if not any(kind in document for document in documents):
            continue
        combined[kind] = {}
        for name in dict.fromkeys(name for document in documents for name in document.get(kind, {})):
            trees = [expanded(document[kind][name]) for document in documents if name in document.get(kind, {})]
            combined[kind][name] = _merge(trees, f"{kind}[{name!r}]", notes)
    combined["ties"] = {}
    for document in documents:
        for model, aliases in document.get("ties", {}).items():
            combined["ties"].setdefault(model, {}).update(aliases)
    combined["links"] = {
        name: [link for one in documents for link in one.get("links", {}).get(name, ())]
        for name in {name for one in documents for name in one.get("links", {})}
    }
    for kind in ("unsaved", "drifted"):
        combined[kind] = sorted({name for document in documents for name in document.get(kind, [])})
    combined["of_other_stages"] = [
        name
        for document in documents
        for name in (
            *(f"optimizer.{number}" for number in document.get("optimizer", {}).get("own", {})),
            *(f"model.{entry}" for parts in document.get("entries", {}).values() for part in parts for entry in part),
        )
    ]
    return combined, notes


def _optimizers(described: Sequence[Document]) -> Document:
    """The optimizers of all stages as one description; a parameter that several stages hold is the first stage's."""
    found: Document = {
        "optimizers": [item for one in described for item in one["optimizers"]],
        "state": {name: state for one in reversed(described) for name, state in one["state"].items()},
        "empty": [name for one in described for name in one.get("empty", [])],
    }
    placed = [one for one in described if "placements" in one]
    if placed:
        found["placements"] = {name: dims for one in placed for name, dims in one["placements"].items()}
    if any("foreign" in one for one in described):
        found["foreign"] = {name: mesh for one in described for name, mesh in one.get("foreign", {}).items()}
    if any("plain" in one for one in described):
        found["plain"] = [name for one in described for name in one.get("plain", [])]
    paths = dict.fromkeys(path for one in described for path in one.get("inner", {}))
    if paths:
        found["inner"] = {
            path: _optimizers([one["inner"][path] for one in described if path in one["inner"]]) for path in paths
        }
    return found


def optimized(documents: Sequence[Document]) -> set[str]:
    """The parameters that any stage's optimizers held."""
    return {
        name
        for document in documents
        for optimizer in document.get("optimizer", {}).get("optimizers", [])
        for group in optimizer["groups"]
        for name in group["params"]
    }


def _schedulers(documents: Sequence[Document], wanted: int, notes: list[str]) -> tuple[list[Any], list[str] | None]:
    """One state for each live scheduler: stages run the same schedule, however many schedulers each has.

    Returns:
        The states, and their keys; None if their order counts.
    """
    pools = [document.get("lr_scheduler", []) for document in documents]
    kinds = {json.dumps(state, sort_keys=True): state for pool in pools for state in pool}
    if len(kinds) == 1:
        return list(kinds.values()) * wanted, None
    if any(pool != pools[0] for pool in pools):
        notes.append("the pipeline stages' schedulers differ; those of the first stage are used")
    return list(pools[0]), documents[0].get("keys", {}).get("lr_scheduler")


def _merge(trees: Sequence[Any], path: str, notes: list[str]) -> Any:
    """Dictionaries become their union, key by key; of other values the first stage's counts."""
    first = trees[0]
    if len(trees) == 1:
        return first
    if all(isinstance(tree, dict) and tree.keys() >= {TAG, "v"} for tree in trees):
        tags = {tree[TAG] for tree in trees}
        if tags == {"ordered"}:
            return {TAG: "ordered", "v": _merge([tree["v"] for tree in trees], path, notes)}
        if tags == {SAME}:
            return {TAG: SAME, "v": [first["v"][0], _merge([tree["v"][1] for tree in trees], path, notes)]}
        if tags == {ATTRIBUTES}:  # a value, and its attributes
            columns = zip(*(tree["v"] for tree in trees), strict=True)
            return {TAG: ATTRIBUTES, "v": [_merge(column, path, notes) for column in columns]}
        if tags == {"map"}:
            pairs = {json.dumps(key): [key, value] for tree in reversed(trees) for key, value in tree["v"]}
            return {TAG: "map", "v": list(pairs.values())}
        if tags <= {"tensor", ALIAS, VIEW}:
            return first
    elif all(isinstance(tree, dict) and TAG not in tree for tree in trees):
        keys = dict.fromkeys(key for tree in trees for key in tree)
        return {key: _merge([tree[key] for tree in trees if key in tree], f"{path}.{key}", notes) for key in keys}
    if any(tree != first for tree in trees):
        notes.append(f"the pipeline stages have different values of {path}; the first stage's is used")
    return first


def _is_tensor(tree: Any) -> bool:
    return isinstance(tree, dict) and tree.get(TAG) == "tensor"


def keep_known(tree: Any, known: Container[str]) -> Any:
    """A tree without the tensors, by unqualified name, that only other stages have."""
    kept = _keep(tree, known)
    return {} if kept is _DROPPED else kept


def _keep(tree: Any, known: Container[str]) -> Any:
    if _is_tensor(tree):
        return tree if unqualified(tree["v"]) in known else _DROPPED
    if isinstance(tree, dict) and TAG in tree:
        inner: Any = tree.get("v")
        around = isinstance(inner, list) and tree[TAG] in _AROUND_ONE
        items = [_keep(item, known) for item in (inner if around else [inner])]
        dropped = any(item is _DROPPED for item in items)
        return _DROPPED if dropped else {**tree, "v": items if around else items[0]}
    if isinstance(tree, dict):
        kept = {key: _keep(value, known) for key, value in tree.items()}
        return {key: value for key, value in kept.items() if value is not _DROPPED}
    return tree
