"""How the learning rate moves over a run, and what some optimizers ask for beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from loratune.errors import UserError

FUSED_ON = ("cuda",)
"""Devices where an optimizer's step is fused unless the recipe says otherwise; on a CPU it would change last bits."""


@dataclass(frozen=True)
class LRSchedule:
    """The learning rate by step, as a fraction of the optimizer's own.

    Args:
        name: constant, linear, cosine, cosine_with_restarts or polynomial, after the warm-up.
        warmup_steps: steps over which the learning rate grows linearly from zero.
        num_cycles: for cosine_with_restarts: how often the cosine restarts (Loshchilov 2017), 2 or more.
        power: for polynomial: of 1 - the share of the run that is done.
        min_lr_ratio: the lowest learning rate over the optimizer's own, in [0, 1); not for constant.
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
                raise ValueError(f"lr_schedule.name is {name}; give lr_schedule.{key} too")
        elif self.name != name:
            raise ValueError(f"lr_schedule.{key} is of the name {name}, not {self.name}; leave it out")
        elif value < least or not value:
            raise ValueError(
                f"lr_schedule.{key} is {value}; give {least or 'a number above 0'}{' or more' * bool(least)}"
            )

    def factor(self, step: int, total: float) -> float:
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
    built = optimizer(parameters)
    for group in built.param_groups:
        group["lr"] = group["lr"] * group.get("factor", 1.0)
    fuse(built)
    trainer = module.trainer
    if schedule.name != "constant" and trainer.max_steps == trainer.max_epochs == -1:
        raise UserError(f"the learning rate is {schedule.name}, and the run has no length; set trainer.max_steps")
    scheduler = BySteps(built, schedule, lambda: trainer.estimated_stepping_batches)
    return {"optimizer": built, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"}}


class BySteps(torch.optim.lr_scheduler.LambdaLR):
    """An optimizer's rates by the steps that were made; a run that goes on has those of its own recipe and length.

    Args:
        optimizer: whose rates are moved from what they are now.
        schedule: by which.
        total: steps of the run; asked for after the first step or a checkpoint, as Lightning opens the images for it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: LRSchedule, total: Callable[[], float]) -> None:
        super().__init__(optimizer, lambda step: schedule.factor(step, total() if step else 1))

    def state_dict(self) -> dict[str, Any]:
        """The steps that were made."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Set the rates of a step, whatever they were in the run that is gone on from."""
        self.last_epoch = state_dict["last_epoch"]
        self._step_count = self.last_epoch + 1
        for group, rate, factor in zip(self.optimizer.param_groups, self.base_lrs, self.lr_lambdas, strict=True):
            group["lr"] = rate * factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def of_step(trainer: L.Trainer, loss: Tensor, batch_idx: int) -> Tensor:
    """A batch's loss, so that a step has the mean gradient of its batches where an epoch's last step has fewer of them.

    Lightning divides by accumulate_grad_batches, however many there are.

    Args:
        trainer: of the run.
        loss: of the batch.
        batch_idx: its number in the epoch.
    """
    whole = trainer.accumulate_grad_batches
    if whole == 1:
        return loss
    first = batch_idx // whole * whole
    count = min(first + whole, trainer.num_training_batches) - first
    return loss if count == whole else loss * (whole / count)


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer that can make its step in one kernel do so, where the recipe says neither yes nor no."""
    for group in optimizer.param_groups:
        undecided = "fused" in group and group["fused"] is None and not group.get("foreach")
        if undecided and all(p.device.type in FUSED_ON and p.is_floating_point() for p in group["params"]):
            group["fused"] = True


def switching(trainer: L.Trainer) -> list[Any]:
    """Optimizers that train other weights than they evaluate, and say so by `train` and `eval` (Defazio 2024)."""
    return [
        optimizer
        for optimizer in getattr(trainer, "optimizers", [])
        if hasattr(optimizer, "train") and hasattr(optimizer, "eval")
    ]


@contextmanager
def evaluated(trainer: L.Trainer) -> Iterator[None]:
    """Within it the weights are those that the optimizer evaluates; after it they are to the bit what they were."""
    optimizers = [
        optimizer
        for optimizer in switching(trainer)
        if any(group.get("train_mode") for group in optimizer.param_groups)
    ]
    trained = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in trained]
    for optimizer in optimizers:
        optimizer.eval()
    try:
        yield
    finally:
        for optimizer in optimizers:
            optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)


class EvaluationWeights(L.Callback):
    """Puts optimizers that know two modes, such as schedule-free ones, into the right one.

    A checkpoint holds the weights that are trained, so that a resumed run is the same run.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for optimizer in switching(trainer):
            optimizer.train()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = evaluated(trainer)
        self._validation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.__exit__(None, None, None)
