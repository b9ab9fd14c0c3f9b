"""An exponential moving average of the trained weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.lora.whole import cut_like, whole
from loratune.training.schedules import evaluated, switching


class EMA(L.Callback):
    """Average the trained weights over steps; validation, samples and exports use the average.

    The average is theta' <- d theta' + (1 - d) theta with d = min(decay, (1 + n) / (10 + n)) after n
    steps, so that it forgets the start quickly (as in the DDPM and TensorFlow implementations).

    Args:
        decay: d at the end, in [0, 1).
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay is {decay}; give 0 or more and less than 1")
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}
        self._applied = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if switching(trainer):
            raise UserError("EMA: the optimizer averages the weights itself; take the EMA out of trainer.callbacks")
        trained = _trained(pl_module)
        if not self.average:
            self.average = {name: value.detach().clone() for name, value in trained.items()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # gradients are still being accumulated
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        trained = self._beside(pl_module)
        torch._foreach_lerp_(list(self.average.values()), [trained[name] for name in self.average], 1 - decay)

    def _beside(self, pl_module: L.LightningModule) -> dict[str, Tensor]:
        """The trained weights, with the average on their devices: a checkpoint's may come after the run is set up."""
        trained = _trained(pl_module)
        self.average = {name: cut_like(value, trained[name]) for name, value in self.average.items()}
        return trained

    @contextmanager
    def applied(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Within it the module's weights are the average; nests."""
        if self._applied or not self.average:
            yield
            return
        trained = self._beside(pl_module)
        kept = {name: value.detach().clone() for name, value in trained.items()}
        self._applied = True
        try:
            _copy(self.average, trained)
            yield
        finally:
            _copy(kept, trained)
            self._applied = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation = self.applied(pl_module)
        self._validation.__enter__()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation.__exit__(None, None, None)

    def state_dict(self) -> dict[str, Any]:
        """The average and how many steps are in it."""
        average = {name: whole(value) for name, value in self.average.items()}
        return {"average": average, "steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.average, self.steps = state_dict["average"], state_dict["steps"]


@contextmanager
def averaged(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """The module with its averaged weights, where the run or its optimizer keeps an average."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA)]  # type: ignore[attr-defined]
    if not averages:
        with evaluated(trainer):
            yield
        return
    with averages[0].applied(pl_module):
        yield


def _trained(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, value in source.items():
        target[name].copy_(value)
