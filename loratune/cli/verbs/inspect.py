"""`loratune inspect`."""

from __future__ import annotations

import json as jsons
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune.cli.say import say
from loratune.errors import visible

SHOWN = 120  # characters of a value in the table; JSON has it whole
LISTED = 6  # items of a list in the table


def inspect(file: Path, /, json: bool = False, diff: Path | None = None) -> None:
    """Describe a .safetensors file: a LoRA's type, rank, norms and the programs that load it; a checkpoint's family.

    Args:
        file: a LoRA or a checkpoint (or a diffusers folder).
        json: print JSON.
        diff: another LoRA: print how the two differ.
    """
    from loratune.lora.inspect import compare, describe

    facts = compare(file, diff) if diff else describe(file)
    if json:
        say(jsons.dumps(facts, indent=2))
    else:
        _print_table(facts)


def _print_table(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in facts.items():
        if value not in (None, {}, []):
            table.add_row(Text(_plain(key), style="bold"), Text(_shown(value)))
    Console().print(table)


def _shown(value: Any, indent: str = "") -> str:
    """A value for people: short numbers, the beginning of long texts and lists."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        if set(value) == {"loads", "notes"}:
            return _verdict(value, indent)
        lines = [f"{_plain(name)}: {_shown(item, f'{indent}  ')}" for name, item in value.items()]
        return ("\n" + indent if indent else "") + f"\n{indent}".join(lines)
    if isinstance(value, list):
        more = f", and {len(value) - LISTED} more" if len(value) > LISTED else ""
        return ", ".join(_shown(item) for item in value[:LISTED]) + more
    text = _plain(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text):,} characters)"


def _plain(value: Any) -> str:
    """On one line, and without what a terminal would take for a command."""
    return visible(" ".join(str(value).split()))


def _verdict(value: dict[str, Any], indent: str) -> str:
    lines = [str(value["loads"])]
    for note in value["notes"]:
        keys: Sequence[str] = note["keys"]
        example = f" ({len(keys)} keys, such as {keys[0]})" if keys else ""
        lines.append(_plain(f"{note['why']}{example}"))
    return f"\n{indent}".join(lines)
