"""What a run logged, as lines of JSON in its folder: it outlives the process, and a resumed run goes on with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loratune.formats.atomic import atomic_path

FILE = "history.jsonl"
Curves = dict[str, list[tuple[int, float]]]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line; the operating system has it when this returns, so that a killed process loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(dict(record)) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a line that was cut off by the end of a process is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
    return found


def cut(path: Path, step: int) -> None:
    """Drop what was logged after a step, from which the run goes on."""
    if not path.is_file():
        return
    kept = [record for record in read(path) if record["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def curves(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Numbers by name as (step, value), steps rising, each step once: what was written last counts."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(name, {})[record["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in found.items()}


def notes(records: Iterable[Mapping[str, Any]], kind: str = "warning") -> list[tuple[int, str]]:
    """Words of a kind and their steps, each once."""
    told = {(record["step"], record[kind]): None for record in records if isinstance(record.get(kind), str)}
    return sorted(told)
