"""LoRA: the same module with W_0 frozen and only B and A trained."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable

from loratune.adapters.lora import TEXT_TARGETS, LoRA, collect, inject
from loratune.families.base import Family
from loratune.formats.lora_layers import LoRALayer
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.objectives import Objective
from loratune.training.schedules import Schedule


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
            parameter.requires_grad_("lora_" in name)

    def layers(self) -> dict[str, LoRALayer]:
        """The adapter as it stands, by canonical layer name."""
        return collect(self.family.components())
