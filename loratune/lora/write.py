"""What is done to layers so that other programs read what was meant: one alpha, layers of zeros, other dtypes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.tables.table import PADDING_KEY

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ATTENTION = tuple(f".self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
Kind = TypeVar("Kind", bound=LowRank)


def cast(layer: Kind, dtype: torch.dtype | None) -> Kind:
    """A layer with its tensors on the CPU and in another dtype; None keeps theirs."""
    tensors = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in layer.tensors().items()}
    return replace(layer, **tensors, alpha=float(layer.alpha))  # type: ignore[type-var]


def padded(zeros: Iterable[str]) -> dict[str, str]:
    """The metadata that say which layers were put in as zeros."""
    return {PADDING_KEY: json.dumps(sorted(zeros))} if list(zeros) else {}


def one_alpha(layers: Mapping[str, LoRALayer], dtype: torch.dtype | None) -> tuple[dict[str, LoRALayer], float | None]:
    """The layers with one alpha for all, or with alpha = r (None); B takes the rest.

    Args:
        layers: by name.
        dtype: to cast to; where one is given, B may be rounded to it once.

    Raises:
        ValueError: no alpha does without rounding, and no dtype is given.
    """
    alphas = [layer.alpha for layer in layers.values()]
    candidates: list[float | None] = [*sorted(set(alphas), key=alphas.count, reverse=True), None]
    if len(candidates) > 2 and all(layer.alpha == layer.rank for layer in layers.values()):
        candidates = [None]
    for alpha in candidates:
        exact = {name: _fold(layer, alpha, None) for name, layer in layers.items()}
        folded = {name: cast(layer, dtype) for name, layer in exact.items() if layer is not None}
        if len(folded) == len(layers):
            return folded, alpha
    if dtype is not None:
        alpha = next(alpha for alpha in candidates if alpha != 0)
        rounded = {name: _fold(layer, alpha, dtype) for name, layer in layers.items()}
        return {name: cast(layer, dtype) for name, layer in rounded.items() if layer is not None}, alpha
    shown = ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas))[:4])
    reason = "kohya's readers take one alpha for all layers, and folding the rest into B would round"
    raise ValueError(f"the alphas differ ({shown}) and {reason}; write format peft, or give a dtype to round to")


def _fold(layer: LoRALayer, alpha: float | None, dtype: torch.dtype | None) -> LoRALayer | None:
    """The same Delta W with another alpha (None is r): exactly, or None; with a dtype, rounded to that."""
    wanted = float(layer.rank) if alpha is None else alpha
    if layer.alpha == wanted:
        return layer
    if wanted == 0:
        return None
    scaled = layer.up.double() * (layer.alpha / wanted)
    up = scaled.to(dtype or layer.up.dtype)
    return replace(layer, up=up, alpha=wanted) if dtype or torch.equal(up.double(), scaled) else None


def padding(layers: Mapping[str, LoRALayer], dtype: torch.dtype | None, kohya: bool) -> dict[str, LoRALayer]:
    """Layers of zeros, one for each text encoder that diffusers would otherwise refuse, or read in part.

    In kohya's names it takes attention for attention by out_proj alone; in peft's it knows a text encoder by any
    layer of its attention.
    """
    zeros = {}
    for component in TEXT_ENCODERS:
        own = sorted(name for name in layers if name.startswith(f"{component}."))
        known = ATTENTION[-1:] if kohya else ATTENTION
        only_mlp = all(".mlp." in name for name in own)
        if not own or any(name.endswith(known) for name in own) or (kohya and only_mlp):
            continue
        like = layers[own[0]]
        # diffusers does not look at the rank of text_projection, but takes that of the others
        rank = layers.get(f"{component}.text_projection", like).rank
        width = like.flat_shape[0 if own[0].endswith("fc2") else 1]
        inside = re.match(r".*\.layers\.\d+(?=\.)", own[0])
        name = f"{inside[0] if inside else f'{component}.text_model.encoder.layers.0'}.self_attn.out_proj"
        kind = dtype or like.down.dtype
        zeros[name] = LoRALayer(torch.zeros(rank, width, dtype=kind), torch.zeros(width, rank, dtype=kind), 1.0)
    return zeros


def exact_scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor in `dtype`, or in the first wider one that holds the value exactly."""
    for kind in (dtype, torch.float32):
        if float(torch.tensor(value, dtype=kind)) == value:
            return torch.tensor(value, dtype=kind)
    return torch.tensor(value, dtype=torch.float64)


def refuse_not_finite(path: object, layers: Mapping[str, LowRank], tensors: Mapping[str, Tensor]) -> None:
    """Check what is about to be written.

    Raises:
        UserError: a value is not finite.
    """
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
            dtype = str(tensor.dtype).removeprefix("torch.")
            name = next((name for name in layers if key.startswith(name)), key)
            raise UserError(f"{path}: {name} has values that are not finite in {dtype}; write float32, or train again")
