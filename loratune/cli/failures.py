"""Any error as one line and an exit code."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence

from loratune.errors import UserError, visible

MENDABLE, UNEXPECTED, INTERRUPTED, NO_READER = 2, 1, 130, 141
LESS_MEMORY = {
    "sample": "lower --batch-size or --size",
    "measure": "lower --size or --samples",
    "extract": "give --rank, or two checkpoints of half precision",
    "combine": "give --rank",
}
"""What takes less memory, by verb."""
RECIPES = "lower data.batch_size or data.resolution, or set model.memory.gradient_checkpointing: true"
FILES = "close other programs"
OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Cannot allocate memory", re.I)


def report(error: BaseException, words: Sequence[str]) -> int:
    """Print what went wrong in one line; returns the exit code.

    Args:
        error: what ended a verb.
        words: of the command line, the verb first.
    """
    if isinstance(error, BrokenPipeError):
        # What is left in the buffer is flushed when the process ends, and would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return NO_READER
    if isinstance(error, KeyboardInterrupt):
        return _print("interrupted", INTERRUPTED)
    if (message := explanation(error, words[0] if words else "")) is not None:
        return _print(message, MENDABLE)
    kind = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return _print(f"unexpected {kind}; please report it with {_traceback(error)}", UNEXPECTED)


def explanation(error: BaseException, verb: str) -> str | None:
    """What a user can mend about an error; None where it is not known to be theirs."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
        return out_of_memory(error, verb)
    if isinstance(error, OSError) and error.strerror:
        name = error.filename if error.filename is not None else "a file"
        return f"{os.fsdecode(name) if isinstance(name, bytes) else name}: {error.strerror}"
    return None


def out_of_memory(error: BaseException, verb: str) -> str:
    """What was tried, and what takes less."""
    size = re.search(r"(?:tried to allocate|allocate memory: you tried to allocate) ([\d.]+ \w+)", str(error), re.I)
    tried = f" (tried to allocate {size[1]})" if size else ""
    recipes = ("cache", "data", "fit", "plan", "quickstart", "test", "validate")
    remedy = LESS_MEMORY.get(verb, RECIPES if verb in recipes else FILES)
    return f"{verb}: out of memory{tried}; {remedy}"


def _print(message: str, code: int) -> int:
    print(f"loratune: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


def _traceback(error: BaseException) -> str:
    """The file that gets the traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="loratune-", suffix=".txt", delete=False, encoding="utf-8"
        ) as file:
            file.write(text.encode("utf-8", "backslashreplace").decode())
    except OSError:
        return f"these last lines: {text[-400:]}"
    return file.name
