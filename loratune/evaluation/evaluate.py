"""While it runs: the adapted network compared with its base on fixed images, and the run's report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.utils.data import Subset

from loratune.evaluation.figures import draw_figures
from loratune.evaluation.paired import (
    Chunk,
    Evaluation,
    Outputs,
    base_alone,
    drift,
    evaluating,
    fixed_chunks,
    gap,
    neutral_chunks,
    outputs,
    rise,
)
from loratune.evaluation.paired import (
    levels as middles,
)
from loratune.evaluation.run_page import write_page
from loratune.families.model import Model
from loratune.lora.norms import norms_by_block
from loratune.runs.loggers import log_numbers, log_warning
from loratune.runs.progress import run_length, working
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.lora_module import LoRAModule
from loratune.training.sharding import draws

log = logging.getLogger(__name__)
NEUTRAL = ("a dog", "a red car", "a house", "a person", "a bowl of fruit", "a mountain")
HELD_OUT, TRAINING, PROMPTS = "held_out", "training", "neutral"
MONITORED = (f"{HELD_OUT}/", f"{TRAINING}/", "drift")


class Evaluate(L.Callback):
    """Compare the adapted network with its base on the same images, timesteps and noise, and write the run's report.

    At validations held_out/gap and training/gap are logged (below 0 the adapted network is better), each with its
    standard error gap_se, and drift: how far its output has moved from the base's on neutral prompts. A
    checkpoint.monitor or EarlyStopping may name them. Training itself is the same with and without.

    Args:
        every_n_steps: steps between comparisons, each made at the next validation, and one at the end; 0 turns them
            off. Where a checkpoint or early stopping monitors one of these metrics, every validation compares.
        images: number of held-out images, and as many training images; the same ones each time.
        prompts: neutral prompts, without the style; drift is measured on noisy training images under them. None
            measures no drift.
        levels: number of timesteps, evenly spaced, at which each image is compared; and number of ranges of
            timesteps over which the training loss is averaged.
        seed: of the noise.
        figures: at the end show the forward and the reverse process, and the cross-attention to a prompt's words.
        report: write report.html into the run's folder.
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        images: int = 8,
        prompts: tuple[str, ...] = NEUTRAL,
        levels: int = 4,
        seed: int = 0,
        figures: bool = True,
        report: bool = True,
    ) -> None:
        for key, value, least, most in (
            ("every_n_steps", every_n_steps, 0, 10**9),
            ("images", images, 0, 10**6),
            ("levels", levels, 1, 100),
        ):
            if not least <= value <= most:
                raise ValueError(f"evaluation.{key} is {value}; give {least} to {most}")
        self.every_n_steps, self.images, self.prompts = every_n_steps, images, tuple(prompts)
        self.levels, self.seed, self.figures, self.report = levels, seed, figures, report
        self._sets: dict[str, list[Chunk]] = {}
        self._base: dict[str, Outputs] = {}
        self._at, self._step, self._steps = 0, -1, 1000
        self._sums: Tensor | None = None
        self._best: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose the images and keep what the base makes of them, while the text encoder and the VAE are here."""
        self._step = trainer.global_step
        if not (self.every_n_steps and isinstance(pl_module, LoRAModule)):
            return
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            strategy = type(trainer.strategy).__name__
            log.warning("evaluation: not under %s, which cuts the weights; nothing is compared with the base", strategy)
            return
        self._steps = len(pl_module.model.noise_schedule)
        with evaluating(trainer, pl_module), base_alone(pl_module):
            self._sets = self._choose(trainer.datamodule, pl_module)  # type: ignore[attr-defined]
            self._base = self._outputs(trainer, pl_module)
        if trainer.global_step == 0 and self._sets:
            # At B = 0 both are the same, exactly.
            anew = pl_module.lora.init_from is None
            metrics = self._found(0, self._base).metrics() if anew else self._compare(trainer, pl_module)
            log_numbers(trainer, metrics, 0)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._by_range(trainer, pl_module)
        step, stepped = trainer.global_step, trainer.global_step != self._step
        self._step = step
        # Without a validation there is nothing to wait for.
        if self._base and stepped and not _validates(trainer) and self._due(trainer) and step != run_length(trainer):
            log_numbers(trainer, self._compare(trainer, pl_module), step)
            self._write(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._base or not (self._due(trainer) or _is_awaited(trainer)):
            return
        pl_module.log_dict(self._compare(trainer, pl_module), batch_size=1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._write(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last comparison, and the figures; the LoRA is on disk, and whatever fails here is lost alone."""
        if self._base and self._at != trainer.global_step:
            log_numbers(trainer, self._compare(trainer, pl_module), trainer.global_step)
        model = getattr(pl_module, "model", None)
        unloaded = getattr(getattr(pl_module, "memory", None), "unload_encoders", False)
        if self.figures and isinstance(model, Model) and not unloaded and draws(trainer):
            draw_figures(trainer, pl_module, model, self.seed)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer)

    def _due(self, trainer: L.Trainer) -> bool:
        return trainer.global_step - self._at >= self.every_n_steps

    def _choose(self, data: Any, module: LoRAModule) -> dict[str, list[Chunk]]:
        sets: dict[str, list[Chunk]] = {}
        for name, rows in ((HELD_OUT, data.held_out), (TRAINING, _own(data))):
            if len(rows) and self.images:
                sets[name] = fixed_chunks(module.model, rows, self.images, data.batch_size)
        if self.prompts and len(_own(data)):
            sets[PROMPTS] = neutral_chunks(module, _own(data), self.prompts, data.batch_size)
        return sets

    def _outputs(self, trainer: L.Trainer, module: LoRAModule) -> dict[str, Outputs]:
        passes = self.levels * sum(map(len, self._sets.values()))
        with working(trainer, "comparing with the base", passes) as count:
            return {
                name: outputs(module, chunks, name, self.levels, self.seed, name == PROMPTS, count)
                for name, chunks in self._sets.items()
            }

    def _compare(self, trainer: L.Trainer, module: Any) -> dict[str, float]:
        with evaluating(trainer, module):
            adapted = self._outputs(trainer, module)
            norms = norms_by_block(module.layers())
        self._at = trainer.global_step
        self._watch(trainer, {name: outputs.losses for name, outputs in adapted.items() if name != PROMPTS})
        return self._found(self._at, adapted).metrics() | {f"norm/{block}": norm for block, norm in norms.items()}

    def _found(self, step: int, adapted: Mapping[str, Outputs]) -> Evaluation:
        gaps = {name: gap(adapted[name].losses, self._base[name].losses) for name in adapted if name != PROMPTS}
        moved = drift(adapted[PROMPTS].outputs, self._base[PROMPTS].outputs) if PROMPTS in adapted else float("nan")
        parts: dict[int, float] = {}
        if HELD_OUT in adapted:
            apart = (adapted[HELD_OUT].losses - self._base[HELD_OUT].losses).mean(0).tolist()
            parts = dict(zip(middles(self._steps, self.levels), apart, strict=True))
        return Evaluation(step, gaps, moved, parts)

    def _watch(self, trainer: L.Trainer, losses: dict[str, Tensor]) -> None:
        """Warn, once for each best step, where held-out images get worse while those that are trained get better."""
        if HELD_OUT not in losses:
            return
        best = self._best
        if not best or float(losses[HELD_OUT].mean()) < float(best[HELD_OUT].mean()):
            self._best = {"step": self._at, "warned": False, **losses}
            return
        risen = rise(losses[HELD_OUT], best[HELD_OUT])
        better = TRAINING in losses and float(losses[TRAINING].mean()) < float(best[TRAINING].mean())
        if risen is None or not better or best["warned"]:
            return
        best["warned"] = True
        text = (
            f"held-out loss rose by {risen.mean:.4f} (standard error {risen.error:.4f}) since step {best['step']}, "
            "while the training images' fell: overfitting; stop near that step, "
            "or lower the rank or the learning rate"
        )
        log.warning("step %d: %s", self._at, text)
        log_warning(trainer, text, self._at)

    def _by_range(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not isinstance(module, DiffusionModule) or module.latest is None:
            return
        (t, losses), module.latest = module.latest, None
        if self._sums is None:
            self._sums = torch.zeros(2, self.levels, device=losses.device)
        steps = len(module.model.noise_schedule)
        self._sums = add_losses(self._sums.to(losses.device), t, losses, steps)
        done = trainer.global_step
        if done == self._step or done % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        every = trainer.strategy.reduce(self._sums, reduce_op="sum")
        assert isinstance(every, Tensor)
        ranges = zip(range_names(steps, self.levels), mean_losses(every), strict=True)
        # Not by the module's log, which would repeat the last value of a range that no timestep fell into.
        log_numbers(trainer, {f"train/loss_{name}": mean for name, mean in ranges if mean == mean}, done - 1)
        self._sums = torch.zeros_like(self._sums)

    def _write(self, trainer: L.Trainer) -> None:
        if self.report and trainer.is_global_zero and trainer.state.fn == "fit":
            write_page(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs to log the same."""
        return {"at": self._at, "best": self._best, "sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._at, self._best, self._sums = state_dict["at"], state_dict["best"], state_dict["sums"]


def _own(data: Any) -> Subset[Any]:
    """The training images that are no regularization."""
    entries, sources = data.training.entries, data.sources
    return Subset(data.training, [i for i, entry in enumerate(entries) if sources[entry.source].role == "training"])


def _validates(trainer: L.Trainer) -> bool:
    return bool(trainer.enable_validation and sum(trainer.num_val_batches))


def _is_awaited(trainer: L.Trainer) -> bool:
    """Whether a checkpoint or early stopping decides by what is logged here."""
    named = (getattr(callback, "monitor", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return any(isinstance(name, str) and name.startswith(MONITORED) for name in named)


def range_names(steps: int, parts: int) -> list[str]:
    """Equal ranges of the steps 0..T-1 by their first and last, such as t0-249."""
    edges = [steps * part // parts for part in range(parts + 1)]
    return [f"t{first}-{after - 1}" for first, after in pairwise(edges)]


def add_losses(sums: Tensor, t: Tensor, losses: Tensor, steps: int) -> Tensor:
    """Sums of losses and their counts (2, parts), with those of a batch added; nothing waits for the device.

    Args:
        sums: so far.
        t: steps (B,) of 0..steps-1.
        losses: (B,).
        steps: T.
    """
    parts = sums.shape[1]
    # T p // P <= t where p P^-1 T < t + 1: the inverse of how `range_names` rounds.
    index = ((t.long() + 1) * parts - 1).div(steps, rounding_mode="floor").clamp(0, parts - 1)
    both = torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)])
    return sums.index_add(1, index, both)


def mean_losses(sums: Tensor) -> list[float]:
    """Mean loss of each part; nan where there was none."""
    total, count = sums.tolist()
    return [one / number if number else float("nan") for one, number in zip(total, count, strict=True)]
