"""LoRA: the same module with W_0 frozen and only B and A trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base import Base
from loratune.families.prompts import Prompts
from loratune.families.save import configs_of
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.inject import LoRA, at_start, collect, inject, is_adapter, parameter_groups, put
from loratune.lora.kinds.layer import LowRank
from loratune.lora.tokens import Embedding, NewToken, add_tokens, check_new, initial_rows, rows_of, write_embedding
from loratune.lora.verify import verify
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.export import Target
from loratune.training.memory import Memory
from loratune.training.objectives import Objective
from loratune.training.provenance import origin, standard
from loratune.training.schedules import LRSchedule, optimizer_and_schedule
from loratune.training.sharding import shard


class LoRAModule(DiffusionModule):
    """Train a LoRA: W_0 is frozen, B A beside it is trained; at step 0 it equals the base.

    Args:
        base: the model: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: type, rank, alpha, targets and the like of the adapter.
        objective: the loss.
        optimizer: any torch optimizer.
        lr_schedule: the learning rate over the run.
        tokens: a new token that is learned too (textual inversion, Gal 2022); alone with lora.targets: none.
        prompts: how captions are encoded: long ones, and words with weights.
        memory: options that save memory or time.
    """

    def __init__(
        self,
        base: str,
        lora: LoRA = LoRA(),  # noqa: B008 (frozen)
        objective: Objective = Objective(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_schedule: LRSchedule = LRSchedule(),  # noqa: B008 (frozen)
        tokens: NewToken | None = None,
        prompts: Prompts = Prompts(),  # noqa: B008 (frozen)
        memory: Memory = Memory(),  # noqa: B008 (frozen)
    ) -> None:
        if tokens is not None:
            _check_token(tokens, base)  # before any weight is read
        super().__init__(base, None, (), objective, optimizer, lr_schedule, memory)
        self.lora, self.tokens = lora, tokens
        if prompts != Prompts():
            if not self.model.family.windows:
                raise ValueError(f"prompts: {self.model.family.title} reads captions whole; leave it out")
            self.model.prompts = prompts
        components, encoded = self.model.components(), self.model.names("text_encoder")
        if next(self.model.network.parameters()).is_meta:  # pissa and olora need numbers
            lora = replace(lora, init="kaiming")
        memory.hold(self.model, (self.model.family.denoiser.name, *(encoded if lora.text_encoder else ())))
        if lora.targets != "none":
            inject(self.model.network, lora, lora.pattern(self.model.family.targets))
        if lora.text_encoder and not encoded:
            raise ValueError("lora.text_encoder: this base has no text encoder")
        for name in encoded if lora.text_encoder else ():
            inject(components[name], lora, self.model.family.text_targets)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(is_adapter(name))
            if is_adapter(name):
                parameter.data = parameter.data.float()  # peft takes the base's dtype, which small steps may vanish in
        self._rows: list[torch.nn.Parameter] = [] if tokens is None else self._learn(tokens)
        self._first_rows = [row.detach().clone() for row in self._rows]
        if lora.init_from:
            names = module_names(configs_of(self.model))
            put(components, read_lora(lora.init_from, names).layers, lora.init_from)
        memory.arrange(self.model, encoded if lora.text_encoder or tokens is not None else ())
        self._is_cut = False
        self._start = at_start(components) if lora.init in ("pissa", "olora") else {}

    def _learn(self, tokens: NewToken) -> list[torch.nn.Parameter]:
        parts = self.model.text_parts()
        for tokenizer, _ in parts.values():
            check_new(tokens, tokenizer)
        return add_tokens(parts, tokens.names, initial_rows(tokens, parts))

    def rows(self) -> dict[str, Tensor]:
        """The new token's rows as they stand, (v, d) for each text encoder; none where no token is learned."""
        return rows_of(self.model.text_parts()) if self.tokens else {}

    def configure_model(self) -> None:
        """Cut the network, and what text encoders are trained, over the devices where the strategy asks for it."""
        mesh = self._device_mesh
        if mesh is None or self._is_cut:
            return
        for name, module in self.model.components().items():
            part = self.model.family.part(name)
            if part.role == "denoiser" or any(parameter.requires_grad for parameter in module.parameters()):
                shard(module, mesh["data_parallel"], part.shards)
        self._is_cut = True

    def on_fit_start(self) -> None:
        """Refuse data in which the new token never occurs: it would be trained on nothing."""
        entries = getattr(getattr(getattr(self.trainer, "datamodule", None), "training", None), "entries", None)
        captions = [" ".join(entry.captions) for entry in entries or ()]
        if (
            self.tokens
            and captions
            and not any(self.tokens.placeholder_token.lower() in text.lower() for text in captions)
        ):
            fault = f"{self.tokens.placeholder_token!r} is in none of {len(captions)} captions"
            raise UserError(f"tokens.placeholder_token: {fault}; write it there, or set data.caption_prefix")

    def layers(self) -> dict[str, LowRank]:
        """The adapter as it stands, by canonical layer name."""
        return collect(self.model.components(), self._start)

    def save(self, target: Target) -> list[Path]:
        """Write the adapter, which is read back and compared, and the new token's rows.

        Raises:
            UserError: what was written is not what was trained.
        """
        layers, rows = self.layers(), self.rows()  # where weights are cut, every process takes part
        if not self.trainer.is_global_zero:
            return []
        facts = origin(self.base_name, self.global_step, self.lora, target.recipe, self.objective)
        written = []
        if layers:
            written.append(target.path("lora"))
            metadata = standard(self.trainer, self.model, self.lora.type, layers) | facts
            write_lora(written[-1], LoRAFile(layers, metadata), target.format, target.dtype)
            verify(written[-1], layers, target.format, target.dtype)
        if self.tokens is not None:
            written.append(target.path("learned_embeds"))
            write_embedding(written[-1], Embedding(self.tokens.placeholder_token, rows), target.dtype, facts)
        return written

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.model.components(), self.lora, self.model.names("text_encoder"))
        if self.tokens is not None:
            own = {} if self.tokens.lr is None else {"lr": self.tokens.lr}
            groups.append({"params": self._rows, "factor": 1.0, **own})
        return optimizer_and_schedule(self, groups, self.optimizer, self.lr_schedule)


def _check_token(tokens: NewToken, base: str) -> None:
    """Raise ValueError where a base cannot learn a token."""
    opened = Base.open(base)
    if not opened.family.tokenizers:
        raise ValueError(f"tokens: the text encoder of {opened.title} takes no new tokens; leave it out")
    for name in opened.family.tokenizers:
        check_new(tokens, opened.family.load_tokenizer(opened.path, name))
