"""What a run logged, as lines of JSON in its folder: it outlives the process, and a resumed run goes on with it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from loratune.formats.atomic import atomic_path, tolerated

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
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def cut(path: Path, step: int) -> None:
    """Drop what was logged after a step, from which the run goes on."""
    if not path.is_file():
        return
    kept = [record for record in read(path) if record["step"] <= step]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def curves(records: Iterable[Mapping[str, Any]]) -> Curves:
    """Numbers by name as (step, value), steps rising, each step once: what was written last counts."""
    lines: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and math.isfinite(value):
                lines.setdefault(name, {})[record["step"]] = float(value)
    return {name: sorted(points.items()) for name, points in lines.items()}


def notes(records: Iterable[Mapping[str, Any]], kind: str = "warning") -> list[tuple[int, str]]:
    """Words of a kind and their steps, each once."""
    texts = {(record["step"], record[kind]): None for record in records if isinstance(record.get(kind), str)}
    return sorted(texts)


class History(Logger):
    """A logger of lines of JSON, one for each time that something is logged; a full disk loses them and not the run.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / FILE

    @property
    def name(self) -> str:
        """Of the logger."""
        return "history"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in the recipe."""

    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add the numbers of a step; what is not finite is left out."""
        kept = {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
        if kept:
            with tolerated(self.path):
                append(self.path, {"step": int(step or 0), **kept})

    @rank_zero_only  # type: ignore[untyped-decorator]
    def note(self, kind: str, text: str, step: int) -> None:
        """Add words of a kind, such as a warning."""
        with tolerated(self.path):
            append(self.path, {"step": step, kind: text})

    @rank_zero_only  # type: ignore[untyped-decorator]
    def begin(self, step: int) -> None:
        """Go on from a step: what was logged after it is of a run that is no more."""
        with tolerated(self.path):
            if step:
                cut(self.path, step)
            else:
                self.path.unlink(missing_ok=True)
