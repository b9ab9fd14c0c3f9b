"""A logger that keeps every number of a run in its folder, for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from loratune.runs.log_history import FILE, append, cut


class History(Logger):
    """Lines of JSON, one for each time that something is logged.

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
            append(self.path, {"step": int(step or 0), **kept})

    @rank_zero_only  # type: ignore[untyped-decorator]
    def note(self, kind: str, text: str, step: int) -> None:
        """Add words."""
        append(self.path, {"step": step, kind: text})

    @rank_zero_only  # type: ignore[untyped-decorator]
    def begin(self, step: int) -> None:
        """Go on from a step: what was logged after it is of a run that is no more."""
        if step:
            cut(self.path, step)
        else:
            self.path.unlink(missing_ok=True)
