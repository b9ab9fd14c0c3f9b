"""Sample grids in TensorBoard, at fixed prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor

from loratune.evaluation.figures import save_figure
from loratune.evaluation.grids import captioned, grid
from loratune.evaluation.paired import check_weights, evaluating, weighted
from loratune.families.model import Model
from loratune.families.sampling import sample_images
from loratune.formats.images import to_image
from loratune.runs.loggers import log_text
from loratune.runs.progress import working
from loratune.training.sharding import draws


class SampleGrid(L.Callback):
    """Sample the same prompts from the same noise at regular steps, step 0 included, into TensorBoard.

    Args:
        prompts: what to sample; none takes captions of held-out images (or of training images).
        every_n_steps: steps between grids; 0 turns them off.
        seed: of the first prompt; each next prompt adds 1.
        steps: inference steps of the sampler.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        sampler: ddim, ddpm, euler, euler-a, dpm++ or unipc; by default the first that the base's family has.
        lora_scales: LoRA scales, a row of images for each; 0 is the base, 1 the LoRA as trained.
    """

    def __init__(
        self,
        prompts: tuple[str, ...] = (),
        every_n_steps: int = 250,
        seed: int = 0,
        steps: int = 20,
        guidance_scale: float = 4.0,
        sampler: str | None = None,
        lora_scales: tuple[float, ...] = (1.0,),
    ) -> None:
        if every_n_steps < 0 or steps < 1:
            raise ValueError("samples: give every_n_steps of 0 or more, and steps of 1 or more")
        if not lora_scales or not all(math.isfinite(scale) for scale in lora_scales):
            raise ValueError(
                f"samples.lora_scales is {list(lora_scales)}; give one number or more, such as [0, 0.5, 1]"
            )
        self.lora_scales = tuple(lora_scales)
        self.prompts, self.every_n_steps, self.seed = prompts, every_n_steps, seed
        self.steps, self.guidance_scale, self.sampler = steps, guidance_scale, sampler
        self._sampled_at, self._first = -1, True
        self._base: Tensor | None = None  # the base's samples, which do not change

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse LoRA scales that cannot be applied."""
        if self.every_n_steps and self.lora_scales != (1.0,):
            check_weights(pl_module, self.lora_scales)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._maybe(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._maybe(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps:
            self._sample(trainer, pl_module)

    def _maybe(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._sample(trainer, pl_module)

    def _sample(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = getattr(pl_module, "model", None)
        step = trainer.global_step
        if not isinstance(model, Model) or not draws(trainer) or step == self._sampled_at:
            return
        if step == 0 and not self.prompts:  # before the first step only what the recipe itself asks for
            return
        self._sampled_at = step
        prompts = self.prompts or _captions(trainer)
        with evaluating(trainer, pl_module):
            batches = len(range(0, len(prompts), trainer.datamodule.batch_size))  # type: ignore[attr-defined]
            with working(trainer, "samples", batches * self.steps * len(self.lora_scales)) as count:
                rows = [self._row(trainer, pl_module, model, prompts, scale, count) for scale in self.lora_scales]
        if not trainer.is_global_zero:
            return
        cell = max(128, rows[0].shape[-1])
        images = [[to_image(pixels) for pixels in row] for row in rows]
        if len(rows) == 1:
            sheet = captioned(images[0], prompts, cell=cell)
        else:
            sheet = grid(images, prompts, [f"LoRA scale {scale:g}" for scale in self.lora_scales], cell)
        save_figure(trainer, sheet, f"samples-{step:06d}", "samples")
        if self._first:
            self._first = False
            log_text(trainer, "samples/prompts", "\n\n".join(prompts))

    def _row(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        model: Model,
        prompts: Sequence[str],
        scale: float,
        count: Callable[[], None],
    ) -> Tensor:
        if scale == 0 and self._base is not None:
            return self._base
        size = trainer.datamodule.resolution  # type: ignore[attr-defined]
        with weighted(module, scale) if self.lora_scales != (1.0,) else nullcontext():
            most = trainer.datamodule.batch_size  # type: ignore[attr-defined]
            starts = range(0, len(prompts), most)
            pixels = torch.cat([self._pixels(model, prompts, at, most, size, count) for at in starts])
        if scale == 0:
            self._base = pixels
        return pixels

    def _pixels(
        self, model: Model, prompts: Sequence[str], start: int, most: int, size: int, count: Callable[[], None]
    ) -> Tensor:
        """Some of the prompts, no more than are in a batch, for which the device is known to have the memory."""
        some = prompts[start : start + most]
        seeds = [self.seed + start + i for i in range(len(some))]
        settings = (size, size, self.steps, self.guidance_scale, self.sampler)
        return sample_images(model, some, seeds, *settings, on_step=lambda *_: count()).cpu()


def _captions(trainer: L.Trainer, most: int = 8) -> list[str]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    entries = data.held_out.entries or data.training.entries
    return [entry.caption for entry in entries[:most]]
