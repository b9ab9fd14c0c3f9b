"""How the learning rate moves over a run, and what some optimizers ask for beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable

FUSED_ON = ("cuda",)
"""Devices where an optimizer's step is fused unless the recipe says otherwise; on a CPU it would change last bits."""


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate as a fraction of the optimizer's own, by step.

    Args:
        name: constant, linear, cosine, cosine_with_restarts or polynomial, after the warm-up.
        warmup_steps: steps over which the rate grows linearly from zero.
        num_cycles: for cosine_with_restarts: how often the cosine begins anew (Loshchilov 2017), 2 or more.
        power: for polynomial: of 1 - the part of the run that is done.
        min_lr_ratio: the fraction that all but constant end at, in [0, 1).
    """

    name: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    warmup_steps: int = 0
    num_cycles: int | None = None
    power: float | None = None
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; give 0 or more")
        if not 0 <= self.min_lr_ratio < 1:
            raise ValueError(f"lr_schedule.min_lr_ratio is {self.min_lr_ratio}; give 0 or more and less than 1")
        if self.min_lr_ratio and self.name == "constant":
            raise ValueError(
                "lr_schedule.min_lr_ratio says nothing of the name 'constant'; leave it out, or give another name"
            )
        self._check_own("num_cycles", "cosine_with_restarts", 2)
        self._check_own("power", "polynomial", 0)

    def _check_own(self, key: str, name: str, least: int) -> None:
        value = getattr(self, key)
        if value is None:
            if self.name == name:
                raise ValueError(f"lr_schedule.name is {name}; give schedule.{key} too")
        elif self.name != name:
            raise ValueError(f"schedule.{key} is of the name {name}, not {self.name}; leave it out")
        elif value < least or not value:
            raise ValueError(f"schedule.{key} is {value}; give {least or 'a number above 0'}{' or more' * bool(least)}")

    def factor(self, step: int, total: int) -> float:
        """The fraction of the full rate at a step of 0..total, in [0, 1]."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        done = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        done = min(max(done, 0.0), 1.0)
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * self._left(done)

    def _left(self, done: float) -> float:
        """From 1 to 0 as `done` goes from 0 to 1."""
        if self.name == "cosine_with_restarts":
            done = 1.0 if done == 1 else (done * (self.num_cycles or 1)) % 1.0
        if self.name == "polynomial":
            return float((1 - done) ** (self.power or 1.0))
        cosine = (1 + math.cos(math.pi * done)) / 2
        return {"constant": 1.0, "linear": 1 - done}.get(self.name, cosine)


def optimizer_and_schedule(
    module: L.LightningModule,
    parameters: Iterable[torch.nn.Parameter] | list[dict[str, Any]],
    optimizer: OptimizerCallable,
    schedule: LRSchedule,
) -> dict[str, Any]:
    """What `configure_optimizers` returns: the optimizer, and its rate moved at every step.

    A group of parameters may have a `factor`, by which its learning rate is multiplied.
    """
    made = optimizer(parameters)
    for group in made.param_groups:
        group["lr"] = group["lr"] * group.get("factor", 1.0)
    fuse(made)
    total = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: schedule.factor(step, total))
    return {"optimizer": made, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"}}


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that can make its step in one kernel do so, where the recipe says neither yes nor no."""
    for group in optimizer.param_groups:
        undecided = "fused" in group and group["fused"] is None and not group.get("foreach")
        if undecided and all(p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def switching(trainer: L.Trainer) -> list[Any]:
    """Optimizers that train other weights than they evaluate, and say so by `train` and `eval` (Defazio 2024)."""
    return [one for one in getattr(trainer, "optimizers", []) if hasattr(one, "train") and hasattr(one, "eval")]


@contextmanager
def evaluated(trainer: L.Trainer) -> Iterator[None]:
    """Within it the weights are those that the optimizer evaluates; after it they are to the bit what they were."""
    held = [one for one in switching(trainer) if any(group.get("train_mode") for group in one.param_groups)]
    trained = [p for one in held for group in one.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in trained]
    for one in held:
        one.eval()
    try:
        yield
    finally:
        for one in held:
            one.train()
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)


class EvaluationWeights(L.Callback):
    """Puts optimizers that know two modes, such as schedule-free ones, into the right one.

    A checkpoint holds the weights that are trained, so that a resumed run is the same run.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for one in switching(trainer):
            one.train()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = evaluated(trainer)
        self._validation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.__exit__(None, None, None)
