"""The run's page, from what is in its folder."""

from __future__ import annotations

from pathlib import Path

import lightning as L


def write_page(trainer: L.Trainer) -> Path:
    """Write report.html into the run's folder, whole or not at all."""
    return Path(trainer.default_root_dir) / "report.html"
