"""YAML that anybody may have written, read as plain data within limits."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

__all__ = ["MAX_BYTES", "parse_config", "parse_yaml"]

MAX_BYTES = 1 << 20
_MAX_DEPTH = 64


def parse_yaml(text: str) -> Any:
    """YAML as plain data, interpolations as they are written; None if it cannot be read.

    Aliases, by which a few lines become gigabytes, are refused, and so is what is nested too deeply. Nothing is called.
    """
    from yaml import YAMLError, load

    try:
        return load(text, _loader()) if len(text) <= MAX_BYTES else None  # noqa: S506 - a SafeLoader
    except (YAMLError, RecursionError, MemoryError, ValueError, TypeError, OverflowError, AttributeError):
        return None


def parse_config(text: str) -> dict[str, Any] | None:
    """A configuration's YAML as plain data; None if it is none."""
    data = parse_yaml(text)
    return data if isinstance(data, dict) else None


def _loader() -> Any:
    from yaml import AliasEvent, SafeLoader
    from yaml.composer import ComposerError

    class Loader(SafeLoader):  # type: ignore[misc]
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(AliasEvent):
                raise ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
            if self.depth >= _MAX_DEPTH:
                raise ComposerError(None, None, "nested too deeply", self.peek_event().start_mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    # OmegaConf writes a path as a call of pathlib's; it is read as a text.
    Loader.add_multi_constructor(
        "tag:yaml.org,2002:python/object/apply:pathlib.",
        lambda loader, _, node: str(PurePath(*map(str, loader.construct_sequence(node)))),
    )
    return Loader
