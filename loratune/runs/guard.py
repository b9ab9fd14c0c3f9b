"""NaN and Inf in the loss or the gradients, found before a weight is touched."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

import lightning as L
import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.lora.whole import whole
from loratune.runs.checkpoints import checkpoints_of

log = logging.getLogger(__name__)
NAMED = 16


class Guard(L.Callback):
    """Skip steps with NaN or Inf in the loss or the gradients, and stop after too many in a row.

    A skipped step leaves weights, the optimizer's state and the loss scale as they were; it counts as a step of the
    run, so that the order of images and the learning rate stay the same.

    Args:
        max_skipped_steps: stop the run after so many skipped steps in a row; 0 never stops it.
    """

    def __init__(self, max_skipped_steps: int = 10) -> None:
        if max_skipped_steps < 0:
            raise ValueError(f"guard.max_skipped_steps is {max_skipped_steps}; give 0 or more")
        self.max_skipped_steps = max_skipped_steps
        self.skipped = self.in_a_row = 0
        self._names: list[str] = []
        self._waiting: deque[tuple[int, list[str], Tensor]] = deque()
        self._loss_ok: Tensor | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let checkpoints of before bad steps in a row stay, rather than ones written among them."""
        if (kept := checkpoints_of(trainer)) is not None:
            kept.refusals = (self._is_in_a_row,)

    def _is_in_a_row(self) -> bool:
        """Whether the last two steps were skipped; after one the weights are still those of before."""
        count = 0
        for *_, bad in reversed(self._waiting):
            if not bool(bad):
                return count >= 2
            count += 1
        return count + self.in_a_row >= 2

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._names += batch.get("name", []) if isinstance(batch, dict) else []

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """The loss of every batch of the step counts."""
        finite = torch.isfinite(loss.detach()).all()
        self._loss_ok = finite if self._loss_ok is None else self._loss_ok & finite

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Let the optimizer do nothing where the step is bad; on a GPU without the host waiting, where it can."""
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # A scaler skips such steps itself while it looks for the highest scale; then a bad loss alone is counted.
        by_scaler = scaled(trainer)
        bad = is_bad([] if by_scaler else [p.grad for p in parameters], self._loss_ok)
        if bad is None:
            self._next(trainer, torch.zeros((), dtype=torch.bool))
            return
        if trainer.world_size > 1:  # every process does the same
            bad = trainer.strategy.reduce(bad.float(), reduce_op="sum") > 0
        if by_scaler:
            pass
        elif skips_by_itself(optimizer):
            optimizer.found_inf, optimizer.grad_scale = bad.float(), None
        elif bool(bad):
            for parameter in parameters:
                parameter.grad = None
        self._next(trainer, bad)

    def _next(self, trainer: L.Trainer, bad: Tensor) -> None:
        self._waiting.append((trainer.global_step, self._names, bad))
        self._names, self._loss_ok = [], None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Count; on a GPU only every now and then, as reading waits for it."""
        if not self._waiting:
            return
        late = self._waiting[-1][2].device.type != "cpu"
        if not late or len(self._waiting) >= max(1, self.max_skipped_steps):
            self.count(trainer)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/skipped_steps", float(self.skipped))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.count(trainer)

    def count(self, trainer: L.Trainer) -> None:
        """Count the skipped among the steps since the last time, and say which they were.

        Raises:
            UserError: there were too many in a row.
        """
        flags = torch.stack([bad for *_, bad in self._waiting]).tolist() if self._waiting else []
        for bad in flags:
            step, names, _ = self._waiting.popleft()
            self.in_a_row = self.in_a_row + 1 if bad else 0
            self.skipped += bool(bad)
            if bad:
                fault = f"step {step + 1}: NaN or Inf in the loss or the gradients"
                log.warning("%s; the step was skipped (images: %s)", fault, listed(names))
            if self.max_skipped_steps and self.in_a_row >= self.max_skipped_steps:
                self._waiting.clear()
                raise UserError(self._too_many(trainer, step, names))

    def _too_many(self, trainer: L.Trainer, step: int, names: list[str]) -> str:
        kept = checkpoints_of(trainer)
        path = (kept.last_model_path or kept.best_model_path) if kept else ""
        last_good = f"the last good checkpoint is {path}" if path else "there is no checkpoint yet"
        return (
            f"step {step + 1}: NaN or Inf in the loss or the gradients for {self.in_a_row} steps in a row "
            f"(guard.max_skipped_steps), lastly with the images {listed(names)}; {last_good}; "
            "lower the learning rate, or look at these images"
        )

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def is_bad(gradients: list[Any], loss_ok: Tensor | None) -> Tensor | None:
    """Whether a loss or a gradient holds NaN or Inf, as a scalar on their device; None where there is neither.

    Args:
        gradients: of all that is trained.
        loss_ok: whether the loss is finite, if that is known.
    """
    bad = None if loss_ok is None else ~loss_ok
    if not gradients:
        return bad
    wrong = ~torch.isfinite(whole(torch.nn.utils.get_total_norm(gradients)))
    return wrong if bad is None else bad.to(wrong.device) | wrong


def scaled(trainer: L.Trainer) -> bool:
    """Whether the loss is scaled, as in float16."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def skips_by_itself(optimizer: Any) -> bool:
    """Whether an optimizer's step asks on the device whether to be made: torch's fused ones do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def listed(names: list[str]) -> str:
    """Names, the first of them where they are many."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return (", ".join(names[:NAMED]) or "unnamed") + more
