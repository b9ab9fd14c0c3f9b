"""A bar for long work, on stderr, gone when it is done."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Item = TypeVar("Item")


def shown(items: Sequence[Item], description: str) -> Iterable[Item]:
    """The items one by one, with a bar that says how far they are; none where stderr is no terminal."""
    console = Console(stderr=True)
    return track(items, description=description, console=console, transient=True, disable=not console.is_terminal)
