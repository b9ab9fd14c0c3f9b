"""Keys that were left empty where something has to stand; jsonargparse lets null pass for every type."""

from __future__ import annotations

from argparse import SUPPRESS
from collections.abc import Iterable, Iterator
from types import NoneType
from typing import Any, get_args

from jsonargparse import Namespace


def empty_keys(actions: Iterable[Any], config: Namespace) -> Iterator[str]:
    """The keys that are null, or below one that is, and have a default that is not.

    Args:
        actions: of the parser.
        config: as parsed.
    """
    for action in actions:
        optional = NoneType in get_args(getattr(action, "_typehint", None))
        if action.default not in (None, SUPPRESS) and not optional and (key := _null(config, action.dest)):
            yield key


def _null(config: Any, dest: str) -> str | None:
    """The shortest beginning of a dotted key that is null; None where none is, or the key is not there."""
    parts = dest.split(".")
    for count, part in enumerate(parts, 1):
        if not isinstance(config, Namespace) or part not in config:
            return None
        config = config[part]
        if config is None:
            return ".".join(parts[:count])
    return None
