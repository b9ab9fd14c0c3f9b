"""A LoRA's layers as the tensors of a format, such that other programs read what was meant."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.lora.layers import LoRALayer, LowRank
from loratune.lora.metadata import ADAPTER_METADATA, PADDING_KEY, Size, peft_metadata
from loratune.lora.names import ALPHA, MAGNITUDE, TABLES, Part, base_kind, kohya_names

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
ATTENTION = tuple(f".self_attn.{part}_proj" for part in ("q", "k", "v", "out"))
Layers = Mapping[str, LowRank]
Written = tuple[dict[str, Tensor], dict[str, str]]
Kind = TypeVar("Kind", bound=LowRank)


def cast(layer: Kind, dtype: torch.dtype | None) -> Kind:
    """A layer with its tensors on the CPU and in another dtype; None keeps theirs."""
    held = {name: tensor.detach().cpu().to(dtype or tensor.dtype) for name, tensor in layer.tensors().items()}
    return replace(layer, **held, alpha=float(layer.alpha))  # type: ignore[type-var]


def kohya_tensors(layers: Layers, metadata: Mapping[str, str], dtype: torch.dtype | None) -> Written:
    """kohya's tensors, and what they need in the metadata.

    Plain layers get one alpha, or alpha = r without an entry: were alphas to differ, diffusers would give the most
    common one to all attention layers. The rest of a layer's scale goes into its B. Where other kinds are among
    them, which diffusers does not read, all keep their own.

    Raises:
        ValueError: kohya's format cannot hold them exactly.
    """
    plain = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALayer)}
    own: dict[str, LowRank] = {name: cast(layer, dtype) for name, layer in layers.items()}
    zeros: dict[str, LowRank] = {}
    alphas: dict[str, float] = {name: layer.alpha for name, layer in layers.items()}
    if len(plain) == len(layers):
        folded, alpha = one_alpha(plain, dtype)
        own, alphas = {**folded}, {} if alpha is None else dict.fromkeys(folded, alpha)
        zeros = {**padding(plain, dtype, kohya=True)}
        alphas |= dict.fromkeys(zeros, alpha) if alpha is not None else {}
    told = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")
    kind = base_kind({name: layer.flat_shape for name, layer in layers.items()}, told)
    table, tensors = TABLES["kohya"].suffixes, dict[str, Tensor]()
    for raw, name in kohya_names([*own, *zeros], kind).items():
        layer = own[name] if name in own else zeros[name]
        held = layer.tensors()
        tensors |= {f"{raw}{table[_part(layer, field)]}": tensor for field, tensor in held.items()}
        if name in alphas:
            tensors[f"{raw}{table[ALPHA]}"] = exact_scalar(alphas[name], next(iter(held.values())).dtype)
    return tensors, _padded(zeros)


def peft_tensors(layers: Layers, dtype: torch.dtype | None) -> Written:
    """peft's tensors as diffusers reads them, and the metadata with ranks and alphas.

    No alpha is a tensor: diffusers would refuse the file.

    Raises:
        ValueError: peft's format cannot hold them.
    """
    if problem := peft_problem(layers):
        raise ValueError(problem)
    plain = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALayer)}
    zeros = padding(plain, dtype, kohya=False)
    table, tensors, sizes = TABLES["peft"].suffixes, dict[str, Tensor](), dict[str, Size]()
    for name, layer in ({name: cast(layer, dtype) for name, layer in plain.items()} | zeros).items():
        held = layer.tensors()
        if layer.magnitude is not None:
            held["magnitude"] = _peft_magnitude(layer.magnitude)
        tensors |= {f"{name}{table[_part(layer, field)]}": tensor for field, tensor in held.items()}
        sizes[name] = Size(layer.rank, layer.alpha, layer.magnitude is not None)
    return tensors, {ADAPTER_METADATA: peft_metadata(sizes), **_padded(zeros)}


def _part(layer: LowRank, field: str) -> Part:
    return MAGNITUDE if field == "magnitude" else Part(layer.kind, field)


def _padded(zeros: Iterable[str]) -> dict[str, str]:
    return {PADDING_KEY: json.dumps(sorted(zeros))} if list(zeros) else {}


def _peft_magnitude(m: Tensor) -> Tensor:
    """(out,) beside a Linear and (1, out, 1, 1) beside a convolution, as peft has it."""
    return m.flatten() if m.dim() < 4 else m.reshape(1, -1, 1, 1)


def peft_problem(layers: Layers) -> str | None:
    """Why layers cannot be written in peft's format, or None."""
    remedy = "convert with --to kohya, or --rank R to approximate"
    for name, layer in layers.items():
        if not isinstance(layer, LoRALayer):
            return f"{name} is a {layer.name}, which peft's format cannot hold; {remedy}"
        if layer.mid is not None:
            return f"{name} is a LoCon with a middle tensor, which peft's format cannot hold; {remedy}"
        if layer.magnitude is not None and layer.magnitude.shape[0] != layer.flat_shape[0]:
            return (
                f"{name} is a DoRA with a norm for each input, which peft's format cannot hold; convert with --to kohya"
            )
    for component in sorted({name.split(".")[0] for name in layers}):
        doras = {layers[name].magnitude is not None: name for name in layers if name.split(".")[0] == component}
        if len(doras) == 2:
            told = f"{doras[True]} is a DoRA and {doras[False]} is none"
            return f"{told}; peft's format has one kind for all of {component}; convert with --to kohya"
    return None


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
        found = {name: cast(layer, dtype) for name, layer in exact.items() if layer is not None}
        if len(found) == len(layers):
            return found, alpha
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
    made = {}
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
        made[name] = LoRALayer(torch.zeros(rank, width, dtype=kind), torch.zeros(width, rank, dtype=kind), 1.0)
    return made


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
            told = str(tensor.dtype).removeprefix("torch.")
            name = next((name for name in layers if key.startswith(name)), key)
            raise UserError(f"{path}: {name} has values that are not finite in {told}; write float32, or train again")
