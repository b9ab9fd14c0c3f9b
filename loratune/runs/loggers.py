"""The one place that writes to a run's loggers: numbers, images, words; what cannot be written ends no run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from loratune.runs.history import History

log = logging.getLogger(__name__)


class Events(TensorBoardLogger):
    """TensorBoard's logger in a run's folder; when the disk refuses, it says so once and writes no more.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(str(folder), name="tensorboard", version="")
        self.failed = False

    def attempt(self, write: Callable[..., Any], *what: Any, **more: Any) -> None:
        """Write, unless that failed before."""
        if self.failed:
            return
        try:
            write(*what, **more)
        except OSError as error:
            self.failed = True
            log.warning("%s: TensorBoard's events are not written any more (%s); training goes on", self.log_dir, error)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Add the numbers of a step."""
        self.attempt(super().log_metrics, metrics, step)

    def save(self) -> None:
        """See that all is on disk."""
        self.attempt(super().save)

    def finalize(self, status: str) -> None:
        """The same, at the end."""
        self.attempt(super().finalize, status)


def _events(trainer: L.Trainer) -> Iterator[tuple[Any, Callable[..., None]]]:
    """TensorBoard's writers, each with what carries out a write."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            yield logger.experiment, getattr(logger, "attempt", _at_once)


def _at_once(write: Callable[..., Any], *what: Any, **more: Any) -> None:
    write(*what, **more)


def add_history(trainer: L.Trainer) -> None:
    """Keep what is logged in the run's folder too."""
    if not any(isinstance(logger, History) for logger in trainer.loggers):
        trainer.loggers = [*trainer.loggers, History(Path(trainer.default_root_dir))]


def log_numbers(trainer: L.Trainer, numbers: Mapping[str, float], step: int) -> None:
    """Numbers of a step, into all loggers."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(numbers), step)


def log_warning(trainer: L.Trainer, text: str, step: int) -> None:
    """What a person has to know, into the history, from where the run's page has it."""
    for logger in trainer.loggers:
        if isinstance(logger, History):
            logger.note("warning", text, step)


def log_image(trainer: L.Trainer, image: Image.Image, tag: str) -> None:
    """An image of the step that the run has reached, into TensorBoard."""
    for writer, attempt in _events(trainer):
        attempt(writer.add_image, tag, np.asarray(image), trainer.global_step, dataformats="HWC")


def log_text(trainer: L.Trainer, tag: str, text: str) -> None:
    """Words, into TensorBoard."""
    for writer, attempt in _events(trainer):
        attempt(writer.add_text, tag, text, 0)


def flush(trainer: L.Trainer) -> None:
    """See that all that was logged is on disk: a run that goes on from here does not log it again."""
    for logger in trainer.loggers:
        write = getattr(getattr(logger, "experiment", None), "flush", None)
        if write is not None:
            getattr(logger, "attempt", _at_once)(write)


def begin(trainer: L.Trainer, resumed: bool) -> None:
    """Do not show what another run logged after the step that is gone on from."""
    for logger in trainer.loggers:
        if isinstance(logger, History):
            logger.begin(trainer.global_step)
    if resumed and trainer.is_global_zero:
        start = Event(session_log=SessionLog(status=SessionLog.START), step=trainer.global_step + 1)
        for writer, attempt in _events(trainer):  # torch's writer has no public way to add such an event
            attempt(writer._get_file_writer().add_event, start)
