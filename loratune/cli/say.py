"""What verbs print."""

from __future__ import annotations

from loratune.errors import visible


def say(text: str) -> None:
    """Print lines for people; control characters of captions, names and keys are shown, not sent to the terminal."""
    print(visible(text))
