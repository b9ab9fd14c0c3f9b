"""What a person sees of a run: one bar over all its steps, a bar for what is long beside them, and where it all is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from loratune.runs.checkpoints import checkpoints_of
from loratune.runs.folder import REPORT
from loratune.training.export import Export

BAR = 10  # characters, so that a line has no more than 80
SECONDS = 0.5  # between two looks at the loss, for which a GPU is waited


class StepBar(ProgressBar):
    """One bar over a run's steps: step of steps, time left, loss, learning rate, steps a second; 80 columns at most.

    Where stderr is no terminal there is no bar, and what is long beside the steps is said in a line.
    """

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self.console = console or Console(stderr=True)
        self._bars: Progress | None = None
        self._steps: TaskID | None = None
        self._other: TaskID | None = None
        self._since, self._looked, self._on = (0.0, 0), 0.0, True

    def disable(self) -> None:
        """Lightning shows one process's bar alone."""
        self._on = False

    def enable(self) -> None:
        """Show it again."""
        self._on = True

    @property
    def _shown(self) -> bool:
        return self._on and self.console.is_terminal

    def _open(self) -> Progress:
        if self._bars is None:
            columns = (TextColumn("{task.description}"), BarColumn(BAR), TextColumn("{task.fields[more]}"))
            self._bars = Progress(*columns, console=self.console, transient=True)
            self._bars.start()
        return self._bars

    def _close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars = self._steps = self._other = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = (time.monotonic(), trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = time.monotonic()
        if not self._shown or now - self._looked < SECONDS:
            return
        self._looked = now
        total = run_length(trainer)
        if self._steps is None:
            self._steps = self._open().add_task("", total=total, more="")
        step = trainer.global_step
        seconds, done = now - self._since[0], step - self._since[1]
        name = f"{step}/{total}" if total else f"step {step}"
        more = numbers_line(trainer.callback_metrics, rate_of(trainer), seconds, done, total and total - step)
        self._open().update(self._steps, completed=step, total=total, description=name, more=more)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        total = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        if self._shown:
            self._other = self._open().add_task("held-out loss", total=total, more="")

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self._other is not None:
            self._open().advance(self._other)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._other is not None:
            self._open().remove_task(self._other)
        self._other = None

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    @contextmanager
    def during(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar with its time for what takes `total` passes through the network; gives what counts one."""
        if not self._shown:
            if self._on:
                self.console.print(f"{what}: {total} passes through the network", highlight=False, soft_wrap=True)
            yield lambda: None
            return
        opened, bars, begun = self._bars is not None, self._open(), time.monotonic()
        task = bars.add_task(what, total=total, more="")
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            left = (time.monotonic() - begun) / done * max(0, total - done)
            bars.update(task, completed=done, more=f"{done} of {total} passes, {clock(left)} left")

        try:
            yield count
        finally:
            bars.remove_task(task)
            if not opened:
                self._close()


def rate_of(trainer: L.Trainer) -> float | None:
    """The learning rate of the first group of parameters, where there is an optimizer."""
    return next((float(optimizer.param_groups[0]["lr"]) for optimizer in trainer.optimizers), None)


def numbers_line(metrics: Any, rate: float | None, seconds: float, done: int, left: int | None) -> str:
    """Time left, loss, learning rate and steps a second, of what is known.

    Args:
        metrics: as they were logged.
        rate: of learning.
        seconds: since the first step of this process.
        done: steps in them.
        left: steps to do, None where the run has no length.
    """
    parts = []
    if done and left is not None:
        parts.append(f"{clock(seconds / done * left)} left")
    if "train/loss" in metrics:
        parts.append(f"loss {float(metrics['train/loss']):.4f}")
    if rate is not None:
        parts.append(f"lr {rate:.1e}")
    if done:
        speed = done / seconds
        parts.append(f"{speed:.2f} steps/s" if speed >= 0.1 else f"{seconds / done:.0f} s/step")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """A time as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def run_length(trainer: L.Trainer) -> int | None:
    """Steps of a run, None where it has no length; the images have to be opened before where epochs are given."""
    total = trainer.estimated_stepping_batches
    return None if total == float("inf") else int(total)


@contextmanager
def working(trainer: L.Trainer, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Say what is done beside the steps, and how long it takes; gives what counts a pass through the network."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, StepBar) and trainer.is_global_zero:
        with bar.during(what, total) as count:
            yield count
    else:
        yield lambda: None


def closing(trainer: L.Trainer) -> str:
    """Where all that a run left is, and what can be done with it: a line for each."""
    folder, module = Path(trainer.default_root_dir), trainer.lightning_module
    written = [path for callback in trainer.callbacks if isinstance(callback, Export) for path in callback.written]  # type: ignore[attr-defined]
    kept = checkpoints_of(trainer)
    lines = [("written", str(path)) for path in written]
    lines += [("report", str(folder / REPORT))] if (folder / REPORT).is_file() else []
    lines += [("checkpoint", kept.last_model_path)] if kept and kept.last_model_path else []
    loras = [path for path in written if path.name == "lora.safetensors"]
    bases = [path for path in written if path.name.startswith("base-")]
    if loras:
        lines.append(
            ("next", f"loratune sample --base {getattr(module, 'base_name', '')} --lora {loras[0]} --prompt ...")
        )
    elif bases:
        lines.append(("next", f"loratune sample --base {bases[0]} --prompt ..."))
    return "\n".join(f"{name:<10}  {text}" for name, text in lines)
