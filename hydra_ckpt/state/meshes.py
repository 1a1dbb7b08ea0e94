"""Finds a device mesh again: by its shape and the names of its dimensions, among those that live tensors are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh, _mesh_resources
from torch.distributed.tensor import DTensor


def described(mesh: DeviceMesh) -> list[Any]:
    """A mesh as JSON data, equal on all of its ranks: its shape, and the names of its dimensions if it has any."""
    return [list(mesh.shape), None if mesh.mesh_dim_names is None else list(mesh.mesh_dim_names)]


def meshes_of(tensors: Iterable[Any]) -> list[DeviceMesh]:
    """The different meshes that tensors are on."""
    return list(dict.fromkeys(item.device_mesh for item in tensors if isinstance(item, DTensor)))


def find_mesh(wanted: Sequence[Any], live: Sequence[DeviceMesh]) -> DeviceMesh | None:
    """The live mesh that `described` has described, or one that was cut from the same mesh as a live one.

    Args:
        wanted: The description.
        live: The meshes of live tensors.

    Returns:
        The mesh; None if there is none, or if several fit.
    """
    for candidates in (iter(live), _siblings(wanted[1], live)):
        fitting = [mesh for mesh in candidates if described(mesh) == list(wanted)]
        if fitting:
            return fitting[0] if all(_ranks(mesh) == _ranks(fitting[0]) for mesh in fitting) else None
    return None


def explain(wanted: Sequence[Any]) -> str:
    """Why a tensor that was on such a mesh is not loaded, and what to do."""
    shape, names = wanted
    called = f" with the dimensions {', '.join(names)}" if names else ""
    return (
        f"it was on a device mesh of shape {shape}{called}, and no tensor here is on such a mesh. Let the object have "
        "a DTensor on one before the load, or set checkpoint.load_strict=false to leave it as built"
    )


def _siblings(names: Sequence[str] | None, live: Sequence[DeviceMesh]) -> Iterator[DeviceMesh]:
    """Slices with these dimensions of the meshes that live ones were cut from."""
    for root in dict.fromkeys(_root(mesh) for mesh in live):
        if names and set(names) <= set(root.mesh_dim_names or ()):
            yield root[tuple(names)]


def _root(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh = _mesh_resources.get_root_mesh(mesh)
    return root


def _ranks(mesh: DeviceMesh) -> list[int]:
    found: list[int] = mesh.mesh.flatten().tolist()
    return found
