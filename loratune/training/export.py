"""What a run leaves behind: each module writes what it trained; here is when, where and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch

from loratune.errors import UnwritableError
from loratune.formats.atomic import tolerated
from loratune.training.ema import averaged
from loratune.training.sharding import draws

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """Where a module's `save` writes what was trained, and how.

    Args:
        folder: of the run.
        format: keys of a LoRA file.
        dtype: of the written tensors.
        recipe: as YAML, for what can hold it.
        step: put into the names where the run goes on; None at its end.
    """

    folder: Path
    format: Literal["peft", "kohya"] = "peft"
    dtype: torch.dtype = torch.float16
    recipe: str = ""
    step: int | None = None

    def path(self, stem: str) -> Path:
        """A .safetensors file in the run's folder: STEM.safetensors, or STEM-STEP.safetensors on the way."""
        return self.folder / f"{stem}{'' if self.step is None else f'-{self.step:06d}'}.safetensors"


class Export(L.Callback):
    """Write what was trained into the run's folder, at the end of the run and before all else there.

    A LoRA becomes lora.safetensors, with the recipe and the base's hash inside, and a new token
    learned_embeds.safetensors beside it; a VAE becomes the folder vae/, a text encoder text_encoder/, other weights of
    a base the folder base-STEP/, all in diffusers' layout.

    Args:
        format: keys of the LoRA file: peft (diffusers' own), or kohya (ComfyUI, A1111, sd-scripts).
        dtype: of the written tensors.
        every_n_steps: steps between exports of lora-STEP.safetensors (and the token's file) during the run; 0 exports
            at the end alone.
    """

    def __init__(
        self,
        format: Literal["peft", "kohya"] = "peft",
        dtype: Literal["float32", "float16", "bfloat16"] = "float16",
        every_n_steps: int = 0,
    ) -> None:
        if every_n_steps < 0:
            raise ValueError(f"export.every_n_steps is {every_n_steps}; give 0 or more")
        self.format, self.dtype, self.every_n_steps = format, DTYPES[dtype], every_n_steps
        self.recipe = ""
        self.written: list[Path] = []
        self._written_at = 0
        self._failed: Exception | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and step != self._written_at:
            self._written_at = step
            with tolerated(f"step {step}: what was trained so far"):
                self._save(trainer, pl_module, step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        try:
            self.written = self._save(trainer, pl_module, None)
        except (OSError, UnwritableError) as error:  # the last checkpoint is still to be written
            self._failed = error

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what could not be written.

        Raises:
            UnwritableError: the same command with --ckpt_path last writes it, from the last checkpoint.
        """
        if self._failed is not None:
            raise UnwritableError(f"{self._failed}; then --ckpt_path last writes it") from self._failed

    def _save(self, trainer: L.Trainer, module: Any, step: int | None) -> list[Path]:
        if not draws(trainer):
            return []
        target = Target(Path(trainer.default_root_dir), self.format, self.dtype, self.recipe, step)
        with averaged(trainer, module):
            written: list[Path] = module.save(target)
        return written
