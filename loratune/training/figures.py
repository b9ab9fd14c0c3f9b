"""Figures."""

from __future__ import annotations

import lightning as L

from loratune.families.base import Family


def draw_figures(trainer: L.Trainer, module: L.LightningModule, family: Family, seed: int) -> None:
    """Draw."""
