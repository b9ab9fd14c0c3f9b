"""What the device at hand really does: true steps of a recipe, and how fast it multiplies matrices."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from loratune.planning.footprint import AUTOCAST, WHOLE
from loratune.recipe.run import run as run_recipe

SIDE = {"cpu": 1024, "cuda": 8192}


def matrix_rate(device: str, precision: str) -> float:
    """Arithmetic of a device per second, in FLOP, by the fastest of a few products of square matrices.

    Args:
        device: cpu or cuda.
        precision: as Lightning's trainer calls it.
    """
    dtype = (AUTOCAST | WHOLE).get(precision, torch.float32)
    side = SIDE[device]
    a = torch.ones(side, side, device=device, dtype=dtype)
    taken = []
    for _ in range(4):
        since = time.perf_counter()
        product = a @ a
        float(product[0, 0])  # waits for the device
        taken.append(time.perf_counter() - since)
    return 2 * side**3 / min(taken)


class _Watch(L.Callback):
    """Times steps and notes the device's peak."""

    def __init__(self) -> None:
        self.steps: dict[str, float] = {}
        self._since = 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        _wait(pl_module)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _wait(pl_module)
        taken, shape = time.perf_counter() - self._since, shape_text(batch)
        self.steps[shape] = min(taken, self.steps.get(shape, taken))


def _wait(module: nn.Module) -> None:
    if next(module.parameters()).is_cuda:
        torch.cuda.synchronize()


def shape_text(batch: dict[str, Any]) -> str:
    """The shape of a batch's x_0, such as 16x4x64x64."""
    value = batch["mean"] if "mean" in batch else batch["pixels"]
    return "x".join(map(str, value.shape))


def firsts(batches: Callable[[], Any]) -> list[Any]:
    """The first batch of each shape of an epoch, twice: the first step of a shape is slower than the rest."""
    by_shape: dict[str, Any] = {}
    for batch in batches():
        by_shape.setdefault(shape_text(batch).partition("x")[2], batch)  # an epoch's last batch may have fewer images
    return [batch for batch in by_shape.values() for _ in range(2)]


def true_steps(recipe: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """Take true steps in each bucket; images are encoded into the cache, all else is left as it was."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--trainer.default_root_dir", folder, "--trainer.max_steps", "-1", "--trainer.max_epochs", "1"]
        quiet += ["--trainer.limit_val_batches", "0", "--trainer.accumulate_grad_batches", "1"]
        quiet += ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--samples.every_n_steps", "0"]
        cli = run_recipe(["-c", str(recipe), *words, *quiet], execute=False)
        loader, watch = cli.datamodule.train_dataloader, _Watch()
        cli.datamodule.train_dataloader = lambda: DataLoader(firsts(loader), batch_size=None)  # type: ignore[arg-type]
        cli.trainer.callbacks = [watch]  # type: ignore[attr-defined]
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return {
        "steps": watch.steps,
        "seconds_per_step": sum(watch.steps.values()) / len(watch.steps),
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else resident_peak(),
    }


def resident_peak() -> int:
    """The most bytes that this process has held in memory so far."""
    import resource
    import sys

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
