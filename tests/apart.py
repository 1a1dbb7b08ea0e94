"""Libraries that scripts/setup installs separately, because other packages would import them where they find them."""

from __future__ import annotations

import sys
from pathlib import Path


def folder_of(library: str) -> Path:
    """Where a library is installed; it may not be there."""
    return Path(sys.prefix) / "apart" / library


def is_installed(library: str) -> bool:
    """Whether it is there."""
    return (folder_of(library) / library).is_dir()


def allow(library: str) -> None:
    """Let this process import it from now on."""
    place = str(folder_of(library))
    if place not in sys.path:
        sys.path.append(place)
