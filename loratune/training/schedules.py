"""How the learning rate moves over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a fraction of the optimizer's own, by step.

    Args:
        name: constant, linear (to zero) or cosine (to zero), after the warm-up.
        warmup_steps: steps over which the rate grows linearly from zero.
    """

    name: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; give 0 or more")

    def factor(self, step: int, total: int) -> float:
        """The fraction of the full rate at a step of 0..total, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        done = min(max(done, 0.0), 1.0)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[self.name]


def optimizer_and_schedule(
    module: L.LightningModule,
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]],
    optimizer: OptimizerCallable,
    schedule: Schedule,
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and its rate moved at every step.

    A group of parameters may have a `factor`, by which its learning rate is multiplied.
    """
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] = group["lr"] * group.get("factor", 1.0)
    total = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule.factor(step, total))
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"}}
