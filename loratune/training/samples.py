"""Sample grids in TensorBoard, at fixed prompts and seeds."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger

from loratune.families.base import Family
from loratune.families.sampling import draw
from loratune.formats.pictures import to_picture
from loratune.report.grids import captioned
from loratune.training.ema import averaged


class SampleGrid(L.Callback):
    """Draw the same prompts from the same noise every so often, step 0 included, into TensorBoard.

    Args:
        prompts: what is drawn; none draws captions of held-out pictures (or of training pictures).
        every_n_steps: steps between grids; 0 draws none.
        seed: of the first prompt; the next ones count from it.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 is none.
        sampler: ddim, ddpm, euler, euler-a, dpm++ or unipc.
    """

    def __init__(
        self,
        prompts: tuple[str, ...] = (),
        every_n_steps: int = 250,
        seed: int = 0,
        steps: int = 20,
        guidance: float = 4.0,
        sampler: str = "ddim",
    ) -> None:
        if every_n_steps < 0 or steps < 1:
            raise ValueError("samples: give every_n_steps of 0 or more, and steps of 1 or more")
        self.prompts, self.every_n_steps, self.seed = prompts, every_n_steps, seed
        self.steps, self.guidance, self.sampler = steps, guidance, sampler
        self._drawn_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._maybe(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._maybe(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps:
            self._draw(trainer, pl_module)

    def _maybe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        family = getattr(pl_module, "family", None)
        step = trainer.global_step
        if not isinstance(family, Family) or not trainer.is_global_zero or step == self._drawn_at:
            return
        self._drawn_at = step
        prompts = self.prompts or _captions(trainer)
        was_training = pl_module.training
        pl_module.eval()
        with averaged(trainer, pl_module), trainer.precision_plugin.forward_context():
            pixels = draw(
                family,
                prompts,
                [self.seed + i for i in range(len(prompts))],
                trainer.datamodule.size,  # type: ignore[attr-defined]
                self.steps,
                self.guidance,
                self.sampler,
            )
        pl_module.train(was_training)
        sheet = captioned([to_picture(one) for one in pixels], prompts, cell=max(128, pixels.shape[-1]))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(sheet), step, dataformats="HWC")
                if step == 0:
                    logger.experiment.add_text("samples/prompts", "\n\n".join(prompts), step)


def _captions(trainer: L.Trainer, most: int = 8) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    entries = data.held_out.entries or data.training.entries
    return [entry.caption for entry in entries[:most]]
