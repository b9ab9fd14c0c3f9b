"""Numbers about the run itself: the gradient's norm and the speed."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from loratune.lora.whole import whole


class Monitor(L.Callback):
    """Says what is trained, and logs train/grad_norm (before clipping) and train/steps_per_second."""

    def __init__(self) -> None:
        self._since: tuple[float, int] | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        counts = [(p.numel(), p.requires_grad) for p in pl_module.parameters()]
        trained, total = sum(n for n, moves in counts if moves), sum(n for n, _ in counts)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        print(
            f"training {trained:,} of {total:,} parameters on {len(data.training):,} images "
            f"({len(data.held_out):,} held out), {trainer.max_steps:,} steps, into {trainer.default_root_dir}"
        )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        pl_module.log("train/grad_norm", whole(torch.nn.utils.get_total_norm(gradients)))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.perf_counter()
        if self._since and step > self._since[1]:
            speed = (step - self._since[1]) / (now - self._since[0])
            pl_module.log("train/steps_per_second", speed, prog_bar=True)
        self._since = (now, step)
