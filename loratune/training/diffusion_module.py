"""Algorithm 1: one Lightning module trains any family's network."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from loratune.diffusion.objective import weighted_error
from loratune.diffusion.process import diffuse, target
from loratune.families.conditions import choose_condition
from loratune.families.family import Architecture, Condition
from loratune.families.load import load_model
from loratune.families.save import save_diffusers_folder
from loratune.training.export import Target
from loratune.training.memory import Memory, unload_encoders
from loratune.training.objectives import Objective, mask_of
from loratune.training.randomness import Share, SharedDropout, generator, share_dropout, training_generator
from loratune.training.schedules import EvaluationWeights, LRSchedule, of_step, optimizer_and_schedule

Stage = Literal["train", "val", "test"]
VALIDATION_STEPS = 4


class DiffusionModule(L.LightningModule):
    """Train the weights of a diffusion model: x_0 ~ data, t ~ U{1..T}, e ~ N(0, I), one step on the loss.

    Args:
        base: the model: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        architecture: a model with new weights, in place of a base.
        trainable: components whose weights are trained, the others are frozen; none given trains the denoiser.
        objective: the loss.
        optimizer: any torch optimizer.
        lr_schedule: the learning rate over the run.
        memory: options that save memory or time.
    """

    def __init__(
        self,
        base: str | None = None,
        architecture: Architecture | None = None,
        trainable: tuple[str, ...] | None = None,
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
        memory: Memory = Memory(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__()
        if (base is None) == (architecture is None):
            raise ValueError("base and architecture: give one of them, a base that is there or the sizes of a new one")
        if base is not None:
            objective.check_named(base)  # before a weight is read
        self.base_name = base or type(architecture).__name__
        self.model = architecture.build() if architecture else load_model(str(base), memory.torch_dtype, vae_exact=True)
        self.memory = memory
        self.objective, self.optimizer, self.lr_schedule = objective, optimizer, lr_schedule
        objective.prepare(self.model)
        self.model.requires_grad_(False)
        components = self.model.components()
        trainable = (self.model.family.denoiser.name,) if trainable is None else trainable
        for name in trainable:
            if name not in components:
                raise ValueError(f"trainable: '{name}' is not a component of the base; it has {list(components)}")
            components[name].requires_grad_(True)
        if trainable:
            memory.hold(self.model, ())
            memory.arrange(self.model, tuple(name for name in trainable if name in self.model.names("text_encoder")))
        # Checkpoints hold what is trained; the rest comes from the base again.
        self.strict_loading = False
        self._nothing: Condition | None = None
        self._dropouts: list[SharedDropout] = []
        self.latest: tuple[Tensor, Tensor] | None = None  # t and the loss of each sample of the last training batch

    @property
    def batch_kind(self) -> str:
        """What the data module must put into a batch: pixels or latents."""
        return self.model.batch_kind

    @property
    def text_is_frozen(self) -> bool:
        """Whether captions can be encoded once and cached."""
        parts = self.model.components()
        encoders = [parts[name] for name in self.model.names("text_encoder")]
        return not any(parameter.requires_grad for encoder in encoders for parameter in encoder.parameters())

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that the optimizer moves."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Only the weights that are trained."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name in trained}

    def _generator(self, stage: Stage, batch_idx: int, rank: int = 0) -> torch.Generator:
        """The same in every process, unless it has a number of its own: each cuts its rows from what is drawn."""
        if stage == "train":
            part = batch_idx % self.trainer.accumulate_grad_batches
            return training_generator(self.device, self.global_step, part, rank)
        return generator(self.device, os.environ.get("PL_GLOBAL_SEED", "0"), stage, batch_idx, rank)

    def _condition(self, batch: dict[str, Any], dropped: Tensor | None) -> Condition:
        """The network's conditioning; of the empty caption where `dropped` (B,) is true."""
        if not self.text_is_frozen or "condition" not in batch:
            if dropped is None:
                return self.model.encode_prompts(batch["caption"])
            # Reading `dropped` here would make the host wait for the device.
            conditions = self.model.encode_prompts([*batch["caption"], ""])
            return choose_condition(dropped, {name: value[-1:] for name, value in conditions.items()}, conditions)
        condition: Condition = batch["condition"]
        if dropped is None:
            return condition
        if self._nothing is None:
            with torch.no_grad():
                self._nothing = self.model.encode_prompts([""])
        return choose_condition(dropped, self._nothing, condition)

    def losses(
        self,
        batch: dict[str, Any],
        t: Tensor,
        random: torch.Generator,
        objective: Objective,
        share: Share | None = None,
    ) -> Tensor:
        """The loss of each sample at steps t (B,): Ho 2020, algorithm 1, line 5, for any prediction type.

        Random numbers are drawn for all rows of which these are a share.
        """
        share = share or Share(0, len(t), len(t))
        shape = (share.total, *self.model.x_0(batch, None).shape[1:])
        x_0 = self.model.x_0(batch, share.cut(torch.randn(shape, generator=random, device=self.device)))
        noise, noise_in = (share.cut(tensor) for tensor in objective.noise(shape, random))
        drawn = torch.rand(share.total, generator=random, device=self.device)
        dropped = share.cut(drawn) < objective.caption_dropout
        condition = self._condition(batch, dropped if objective.caption_dropout else None)
        condition = self.model.family.conditioned(condition, batch)
        schedule = self.model.noise_schedule
        a, b = schedule.at(t, x_0)
        output = self.model.denoise(diffuse(x_0, noise_in, a, b), schedule.time(t), condition)
        return weighted_error(
            output,
            target(self.model.prediction, x_0, noise, a, b),
            objective.weight(self.model, a, b),
            objective.c(t, a, b, len(self.model.noise_schedule)),
            mask_of(batch, x_0),
        )

    def configure_callbacks(self) -> list[L.Callback]:
        """What optimizers need that train other weights than they evaluate."""
        return [EvaluationWeights()]

    def on_train_start(self) -> None:
        """Drop what is not needed any more, where the recipe says so."""
        self._dropouts = share_dropout(self) if self.trainer.world_size > 1 else []
        if not self.memory.unload_encoders:
            return
        if self.objective.caption_dropout:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                self._nothing = self.model.encode_prompts([""])
        unload_encoders(self.model)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        share = Share.of(batch)
        random = self._generator("train", batch_idx, 0 if "share" in batch else self.global_rank)
        for part in self._dropouts:
            part.share = share
        t = share.cut(self.objective.timesteps.draw(share.total, len(self.model.noise_schedule), random))
        losses = self.losses(batch, t, random, self.objective, share)
        self.latest = (t, losses.detach())
        loss = (losses * batch["loss_weight"]).mean() if "loss_weight" in batch else losses.mean()
        if share.count != share.total:
            loss = loss * share.weight(self.trainer.world_size)
        self.log("train/loss", loss, prog_bar=True, batch_size=share.count, sync_dist=self.trainer.world_size > 1)
        return of_step(self.trainer, loss, batch_idx)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._held_out(batch, batch_idx, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._held_out(batch, batch_idx, "test")

    def _held_out(self, batch: dict[str, Any], batch_idx: int, stage: Stage) -> None:
        """The loss at fixed plain noise and fixed t (the middles of equal parts of 1..T), so that epochs compare."""
        plain = replace(
            self.objective, caption_dropout=0.0, noise_offset=0.0, pyramid_noise=0.0, input_perturbation=0.0
        )
        count, steps = len(batch["name"]), len(self.model.noise_schedule)
        random = self._generator(stage, batch_idx)
        losses = []
        for part in range(VALIDATION_STEPS):
            t = torch.full((count,), steps * (2 * part + 1) // (2 * VALIDATION_STEPS), device=self.device)
            losses.append(self.losses(batch, t, random, plain).mean())
        self.log(f"{stage}/loss", torch.stack(losses).mean(), prog_bar=True, batch_size=count)

    def save(self, target: Target) -> list[Path]:
        """Write the whole base as diffusers' folder base-STEP/; of a model that diffusers does not know, nothing."""
        if not self.model.family.pipeline:
            return []
        names = (f"base-{self.global_step}{f'-{count}' * bool(count)}" for count in itertools.count())
        folder = next(path for name in names if not (path := target.folder / name).exists())
        save_diffusers_folder(self.model, folder, target.dtype)
        return [folder]

    def configure_optimizers(self) -> Any:
        return optimizer_and_schedule(self, self.trained_parameters(), self.optimizer, self.lr_schedule)
