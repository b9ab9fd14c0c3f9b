"""A base with LoRAs added to its weights, ready to sample from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base import Base
from loratune.families.load import load_model
from loratune.families.model import Model
from loratune.lora.merge.memory import merge_into, parse_weighted
from loratune.lora.tokens import put_embedding


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here; give cpu or auto") from None


def load_with(base: str, lora: Sequence[str], device: str = "auto", embedding: Sequence[Path] = ()) -> Model:
    """A base with LoRAs added to its weights and with learned tokens, ready to draw."""
    model = load_model(base)
    names = module_names(Base.open(base).configs)
    loras = [parse_weighted(text, names) for text in lora]
    merge_into(model.components(), loras)
    for one in loras:
        model.follow(one.file.metadata)
    for file in embedding:
        put_embedding(file, model.text_parts())
    return model.requires_grad_(False).eval().to(pick_device(device))
