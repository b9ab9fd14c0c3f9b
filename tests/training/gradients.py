"""A callback for tests, named by recipes of runs that are processes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from safetensors.torch import save_file

from loratune.lora.whole import whole


class Gradients(L.Callback):
    """Writes what each step moves the weights by, before clipping, into the run's folder."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        held = {name: whole(one.grad).clone() for name, one in pl_module.named_parameters() if one.grad is not None}
        if trainer.is_global_zero:
            save_file(held, Path(trainer.default_root_dir) / f"gradients-{trainer.global_step}.safetensors")
