"""Checkpoints that are whole or not there, that a full disk does not end a run with, and which one is the last."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from loratune.errors import UnwritableError, UserError
from loratune.formats.atomic import atomic_path
from loratune.lora.whole import whole
from loratune.runs.loggers import flush, log_numbers
from loratune.runs.stopping import SIGNALS

log = logging.getLogger(__name__)
# What rotation is decided by, and goes back to where it was when a checkpoint could not be written.
ROTATION = (
    *("best_model_path", "best_model_score", "best_k_models", "kth_best_model_path", "kth_value", "current_score"),
    *("last_model_path", "_last_checkpoint_saved"),
)


class NotSavedError(Exception):
    """A checkpoint could not be written; it was said, and the run goes on."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the file, syncs and renames; reads tensors and plain values, never code.

    `failed` are the paths that the latest attempt to write did not reach.
    """

    def __init__(self) -> None:
        self.failed: set[str] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; where the disk is full or refuses, say so and leave the file that was there."""
        self.failed.discard(str(path))
        try:
            with atomic_path(path) as temporary, open(temporary, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
        except (OSError, RuntimeError, UnwritableError) as error:  # RuntimeError: a full disk, by torch's writer
            self.failed.add(str(path))
            reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
            log.warning("%s: this checkpoint was not saved (%s); training goes on, earlier ones stay", path, reason)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint; nothing in it is run, whatever `weights_only` is.

        Raises:
            UserError: it is not there, or damaged.
        """
        return read_checkpoint(Path(path), map_location)


def read_checkpoint(path: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint's tensors and plain values.

    Raises:
        UserError: it is not there, or damaged.
    """
    try:
        read: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint; --ckpt_path last finds the last one of a run's folder") from None
    except (OSError, RuntimeError, EOFError, UnpicklingError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a checkpoint that can be read ({reason}); give another one") from error
    return read


def last_checkpoint(folder: Path) -> Path | None:
    """The whole checkpoint in a folder that was written last, or None where there is none."""
    candidates = [(path.stat().st_mtime_ns, path.name == "last.ckpt", path) for path in _checkpoints(folder)]
    for _, _, path in sorted(candidates, reverse=True):
        if is_whole(path):
            return path
        log.warning("%s: not whole; the one before it is taken", path)
    return None


def is_whole(path: Path) -> bool:
    """Whether a checkpoint ends as it should: a file's directory is at its end, and a folder's is written last."""
    return (path / ".metadata").is_file() if path.is_dir() else zipfile.is_zipfile(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.ckpt") if not path.name.startswith(".")] if folder.is_dir() else []


class Checkpoints(ModelCheckpoint):
    """Lightning's ModelCheckpoint, with nothing lost: of checkpoints, of metrics, and where a signal ends the run.

    A checkpoint is deleted only when the one that takes its place is on disk. Where a validation follows a step, the
    step's checkpoint is written after it, so that a run that goes on from there has the validation's numbers. Where
    `monitor` is a validation's number, the best checkpoints are chosen after each validation, and the last one is
    written at its own steps.
    """

    _judges = False
    refusals: tuple[Callable[[], bool], ...] = ()
    """Each says whether what the run has now is not worth a checkpoint; then the earlier ones stay."""
    _due = False
    _open = False
    _step = -1
    _missing: dict[str, Any] | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # gradients are still being accumulated, and are in no checkpoint
        if _validation_follows(trainer):
            self._due = True
            return
        self._open = True
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._leave_if_asked(trainer)
        self._open = False

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._waits and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._judge(trainer)
        if not self._due:
            return super().on_validation_end(trainer, pl_module)
        self._due = False
        super().on_train_batch_end(trainer, pl_module, None, None, 0)  # may only note that it is due
        super().on_validation_end(trainer, pl_module)
        return self._leave_if_asked(trainer)

    @property
    def _waits(self) -> bool:
        """Whether the best are chosen by what only a validation tells."""
        return bool(self.monitor and self.monitor not in ("step", "epoch") and not self.monitor.startswith("train/"))

    def _judge(self, trainer: L.Trainer) -> None:
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            available = ", ".join(sorted(name for name in logged if not name.startswith("train/")))
            raise UserError(f"checkpoint.monitor is {self.monitor}, which no validation logs; there is {available}")
        self._judges = True
        try:
            self._save_topk_checkpoint(trainer, super()._monitor_candidates(trainer))
        finally:
            self._judges = False

    def _monitor_candidates(self, trainer: L.Trainer) -> dict[str, Tensor]:
        """What is known; the last checkpoint does not wait for what only a validation tells."""
        candidates = super()._monitor_candidates(trainer)
        return {str(self.monitor): torch.tensor(torch.nan)} | candidates if self._waits else candidates

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the step's numbers where they are not logged yet."""
        if self._open and (metrics := not_logged_yet(trainer)):
            checkpoint["not_logged"] = {"step": trainer.fit_loop.epoch_loop._batches_that_stepped, "metrics": metrics}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._missing = checkpoint.get("not_logged")

    def _leave_if_asked(self, trainer: L.Trainer) -> None:
        asked = bool(SIGNALS.asked)
        if trainer.world_size > 1:  # every process leaves at the same step
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            SIGNALS.stop(trainer, self.save_now(trainer))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._missing:
            log_numbers(trainer, self._missing["metrics"], self._missing["step"])
        SIGNALS.listen()  # Lightning has put its own handlers there
        SIGNALS.waits = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last checkpoint is of the last step, also where the run's length is no multiple of its interval."""
        SIGNALS.waits = False
        super().on_train_end(trainer, pl_module)
        if self.save_last:
            self.save_now(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        SIGNALS.waits = self._open = False
        super().on_exception(trainer, pl_module, exception)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        if not self._is_worth_it(trainer):
            raise NotSavedError
        before = self._last_global_step_saved
        flush(trainer)
        super()._save_checkpoint(trainer, filepath)
        failed: set[str] = getattr(trainer.strategy.checkpoint_io, "failed", set())
        if trainer.strategy.broadcast(str(filepath) in failed):  # only the first process writes
            self._last_global_step_saved = before
            raise NotSavedError

    def _save_topk_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self._waits and not self._judges:
            return
        with self._as_before():
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: L.Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        with self._as_before():
            super()._save_last_checkpoint(trainer, monitor_candidates)

    @contextmanager
    def _as_before(self) -> Iterator[None]:
        kept = {name: getattr(self, name) for name in ROTATION if hasattr(self, name)}
        kept["best_k_models"] = dict(self.best_k_models)
        try:
            yield
        except NotSavedError:
            for name, value in kept.items():
                setattr(self, name, value)

    def _remove_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        """Delete a checkpoint that is not needed any more, unless it is the only one that is whole."""
        others = [path for path in _checkpoints(Path(filepath).parent) if path != Path(filepath)]
        if trainer.strategy.broadcast(any(is_whole(path) for path in others)):
            super()._remove_checkpoint(trainer, filepath)

    def _is_worth_it(self, trainer: L.Trainer) -> bool:
        """Whether all trained weights are numbers, and no one refuses; the same in every process."""
        trained = [whole(value) for value in trainer.lightning_module.parameters() if value.requires_grad]
        finite = bool(torch.isfinite(torch.nn.utils.get_total_norm(trained))) if trained else True
        if not finite:
            log.warning("step %d: trained weights are NaN or Inf; no checkpoint is written", trainer.global_step)
        refused = not finite or any(refuse() for refuse in self.refusals)
        return not trainer.strategy.reduce_boolean_decision(refused, all=False)

    def save_now(self, trainer: L.Trainer) -> Path | None:
        """Write the last checkpoint where the run stands; None where it could not be written."""
        if not self.dirpath or not self._is_worth_it(trainer):
            return None
        path = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
        self.last_model_path = str(path)
        flush(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        failed: set[str] = getattr(trainer.strategy.checkpoint_io, "failed", set())
        return None if trainer.strategy.broadcast(str(path) in failed) else path


def _validation_follows(trainer: L.Trainer) -> bool:
    loop = trainer.fit_loop
    if loop._data_fetcher is None or not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
        return False
    loop.epoch_loop.val_loop.setup_data()  # says whether there is anything to validate on
    return not loop.epoch_loop.val_loop.skip


def not_logged_yet(trainer: L.Trainer) -> dict[str, float]:
    """What Lightning will log of this step when its callbacks are done, and a run that goes on from here will not."""
    connector = trainer._logger_connector
    metrics = connector.metrics["log"] if connector.should_update_logs else {}
    return {name: float(value) for name, value in metrics.items() if not isinstance(value, Mapping)}


def checkpoints_of(trainer: L.Trainer) -> Checkpoints | None:
    """The run's callback that keeps checkpoints, where it is ours."""
    callback = trainer.checkpoint_callback
    return callback if isinstance(callback, Checkpoints) else None


def use_atomic(trainer: L.Trainer) -> L.Trainer:
    """Let a trainer write checkpoints by `AtomicCheckpointIO`, unless its recipe names another plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer
