"""LoRA: the same module with W_0 frozen and only B and A trained."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable

from loratune.adapters.lora import TEXT_TARGETS, LoRA, at_start, collect, inject, is_adapter, parameter_groups, put
from loratune.families.base import Family
from loratune.families.pipelines import layer_names
from loratune.families.stable_diffusion import StableDiffusion
from loratune.families.writing import configs_of
from loratune.formats.lora import read_lora
from loratune.formats.lora_layers import LowRank
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.objectives import Objective
from loratune.training.schedules import Schedule, optimizer_and_schedule


class LoRAModule(DiffusionModule):
    """Teach a base a style: W_0 is frozen, B A beside it is trained; at step 0 it equals the base.

    Args:
        base: the model: builtin:NAME, a diffusers folder, a .safetensors file, a hub id, or a Family.
        lora: rank, alpha, dropout and targets.
        objective: what the loss is.
        optimizer: any torch optimizer.
        schedule: how the learning rate moves over the run.
    """

    def __init__(
        self,
        base: Family | str,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = Schedule(),  # noqa: B008 (frozen)
    ) -> None:
        super().__init__(base, (), objective, optimizer, schedule)
        self.lora = lora
        components = self.family.components()
        inject(self.family.network, lora, lora.pattern)
        encoders = [module for name, module in components.items() if name.startswith("text_encoder")]
        if lora.text_encoder and not encoders:
            raise ValueError("lora.text_encoder: this base has no text encoder")
        for encoder in encoders if lora.text_encoder else ():
            inject(encoder, lora, TEXT_TARGETS)
        for name, parameter in self.family.named_parameters():
            parameter.requires_grad_(is_adapter(name))
        if lora.start_from:
            names = layer_names(configs_of(self.family)) if isinstance(self.family, StableDiffusion) else ()
            put(components, read_lora(lora.start_from, names).layers, lora.start_from)
        self._start = at_start(components) if lora.init in ("pissa", "olora") else {}

    def layers(self) -> dict[str, LowRank]:
        """The adapter as it stands, by canonical layer name."""
        return collect(self.family.components(), self._start)

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.family.components(), self.lora)
        return optimizer_and_schedule(self, groups, self.optimizer, self.schedule)
