"""LoRA files: the layers in memory, and read and written in the formats of peft (diffusers) and kohya."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.formats.files import read_header, read_tensors, write_safetensors
from loratune.formats.lora_layers import LoRALayer
from loratune.formats.lora_names import (
    ADAPTER_METADATA,
    COMPONENTS,
    SUFFIXES,
    canonical_name,
    known_kohya_names,
    kohya_names,
    kohya_problem,
    peft_alpha,
    peft_metadata,
    refused,
)

Format = Literal["peft", "kohya"]
OURS = (ADAPTER_METADATA, "format")  # metadata of the format, not of the LoRA


@dataclass
class LoRAFile:
    """A LoRA.

    Args:
        layers: by canonical module name with component, such as
            `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q` or
            `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
        metadata: the file's free text, without what belongs to the format.
    """

    layers: dict[str, LoRALayer]
    metadata: dict[str, str] = field(default_factory=dict)


def detect_format(keys: Iterable[str]) -> str | None:
    """The naming of a LoRA file's keys: peft, kohya, diffusers (lora.down, read only), or None."""
    for key in keys:
        for name, suffixes in SUFFIXES.items():
            if key.endswith(tuple(suffixes)):
                return name
    return None


def write_lora(path: Path | str, lora: LoRAFile, format: Format = "peft", dtype: torch.dtype | None = None) -> None:
    """Write a LoRA, whole or not at all.

    Args:
        format: peft, which diffusers calls its own, or kohya, which all others read. kohya's alphas are made
            one for all layers, as readers take one: the rest of a layer's scale goes into its B.
        dtype: of the tensors; None keeps theirs.

    Raises:
        UserError: a value is not finite (in that dtype), or the format cannot hold it exactly.
    """
    if not lora.layers:
        raise UserError(f"{path}: there is no layer to write; nothing was adapted")
    layers = {name: _cast(path, name, layer, dtype) for name, layer in sorted(lora.layers.items())}
    if unknown := [name for name in layers if name.split(".")[0] not in COMPONENTS]:
        raise ValueError(f"the layer {unknown[0]!r} must begin with one of {COMPONENTS}")
    own = {key: value for key, value in lora.metadata.items() if key not in OURS}
    if format == "kohya":
        write_safetensors(path, _kohya_tensors(path, layers), {**own, "format": "pt"})
        return
    sizes = {name: (layer.rank, layer.alpha) for name, layer in layers.items()}
    tensors = {f"{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    tensors |= {f"{name}.lora_B.weight": layer.up for name, layer in layers.items()}
    write_safetensors(path, tensors, {**own, "format": "pt", ADAPTER_METADATA: peft_metadata(sizes)})


def _cast(path: Path | str, name: str, layer: LoRALayer, dtype: torch.dtype | None) -> LoRALayer:
    down, up = (tensor.detach().cpu().to(dtype or tensor.dtype) for tensor in (layer.down, layer.up))
    for tensor in (down, up):
        if not torch.isfinite(tensor).all():
            told = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {name} has values that are not finite in {told}; write float32, or train again")
    return LoRALayer(down, up, float(layer.alpha))


def _kohya_tensors(path: Path | str, layers: Mapping[str, LoRALayer]) -> dict[str, Tensor]:
    if problem := kohya_problem(layers):
        raise UserError(f"{path}: {problem}; write format peft")
    folded, alpha = _one_alpha(path, layers)
    tensors: dict[str, Tensor] = {}
    for key, name in kohya_names(layers).items():
        layer = folded[name]
        tensors |= {f"{key}.lora_down.weight": layer.down, f"{key}.lora_up.weight": layer.up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = _exact_scalar(alpha, layer.up.dtype)
    return tensors


def _one_alpha(path: Path | str, layers: Mapping[str, LoRALayer]) -> tuple[dict[str, LoRALayer], float | None]:
    """The layers with one alpha for all, or with alpha = r, which needs no entry (None): B takes the rest.

    Were alphas to differ, diffusers would give the most common one to all attention layers.
    """
    alphas = [layer.alpha for layer in layers.values()]
    for alpha in (*sorted(set(alphas), key=alphas.count, reverse=True), None):
        folded = {name: _fold(layer, layer.rank if alpha is None else alpha) for name, layer in layers.items()}
        exact = {name: layer for name, layer in folded.items() if layer is not None}
        if len(exact) == len(layers):
            return exact, alpha
    shown = sorted(set(alphas))[:4]
    reason = "kohya's readers take one alpha for all layers, and folding the rest into B would round"
    raise UserError(f"{path}: the alphas differ ({', '.join(f'{a:g}' for a in shown)}) and {reason}; write format peft")


def _fold(layer: LoRALayer, alpha: float) -> LoRALayer | None:
    """The same Delta W with another alpha, or None where B's dtype cannot hold it exactly."""
    if layer.alpha == alpha:
        return layer
    if alpha == 0:
        return None
    wanted = layer.up.double() * (layer.alpha / alpha)
    up = wanted.to(layer.up.dtype)
    return LoRALayer(layer.down, up, alpha) if torch.equal(up.double(), wanted) else None


def _exact_scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A 0-dim tensor in `dtype`, or in the first wider one that holds the value exactly."""
    for kind in (dtype, torch.float32):
        if float(torch.tensor(value, dtype=kind)) == value:
            return torch.tensor(value, dtype=kind)
    return torch.tensor(value, dtype=torch.float64)


def read_lora(path: Path | str, names: Iterable[str] = ()) -> LoRAFile:
    """Read a LoRA in any format of `detect_format`.

    Args:
        names: canonical names, with component, of an architecture's layers that is not known here; kohya's
            names cannot be read back without them.

    Raises:
        UserError: the file cannot be read, is of another kind (named), has a key that does not map, lacks
            one of a pair, or holds values that are not finite.
    """
    metadata = read_header(path).metadata
    tensors = read_tensors(path)
    if found := refused(tensors):
        raise UserError(f"{path}: {found[0]!r} is of {found[1]}, which is not read; convert it to a plain LoRA")
    naming = detect_format(tensors)
    if naming is None:
        raise UserError(f"{path}: not one of its keys is a LoRA's; is it a LoRA?")
    parts = _grouped(path, tensors, naming)
    table = {**known_kohya_names(), **kohya_names(names, reading=True)} if naming == "kohya" else None
    layers: dict[str, LoRALayer] = {}
    for raw, found_parts in parts.items():
        name = table.get(raw) if table is not None else canonical_name(raw)
        if name is None:
            told = "no layer of the architectures known here" if table is not None else f"in none of {COMPONENTS}"
            raise UserError(f"{path}: {raw!r} is {told}; it was made for another base")
        if name in layers:
            raise UserError(f"{path}: {name} is there twice, under two names; remove one")
        layers[name] = _layer(path, raw, name, found_parts, metadata)
    return LoRAFile(layers, {key: value for key, value in metadata.items() if key not in OURS})


def _grouped(path: Path | str, tensors: Mapping[str, Tensor], naming: str) -> dict[str, dict[str, Tensor]]:
    """The tensors by module: down, up and perhaps alpha."""
    suffixes = {**SUFFIXES[naming], ".alpha": "alpha"}
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in suffixes if key.endswith(suffix)), None)
        if suffix is None:
            raise UserError(f"{path}: the key {key!r} is not part of a {naming} LoRA; remove it, or convert the file")
        if not tensor.is_floating_point() and suffix != ".alpha":
            raise UserError(f"{path}: {key!r} holds {tensor.dtype}; a LoRA holds floating point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{path}: {key!r} has values that are not finite; the LoRA is damaged, train it again")
        parts = grouped.setdefault(key.removesuffix(suffix), {})
        if suffixes[suffix] in parts:
            raise UserError(f"{path}: {key!r} is there twice, under two names; remove one")
        parts[suffixes[suffix]] = tensor
    return grouped


def _layer(
    path: Path | str, raw: str, name: str, parts: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> LoRALayer:
    if missing := [part for part in ("down", "up") if part not in parts]:
        raise UserError(f"{path}: {raw!r} has no {missing[0]} tensor; the file is not complete, export it again")
    given = parts.get("alpha")
    if given is not None and given.numel() != 1:
        raise UserError(f"{path}: '{raw}.alpha' has shape {tuple(given.shape)}; it must be one number")
    rank = parts["down"].shape[0] if parts["down"].dim() else 0
    try:
        alpha = float(given) if given is not None else peft_alpha(name, rank, metadata.get(ADAPTER_METADATA))
        return LoRALayer(parts["down"], parts["up"], alpha)
    except ValueError as error:
        raise UserError(f"{path}: {raw}: {error}; the file is damaged, export it again") from None


def standard_metadata(
    *,
    rank: int | None = None,
    alpha: float | None = None,
    name: str | None = None,
    title: str | None = None,
    base_model: str | None = "sd_v1",
    architecture: str | None = "stable-diffusion-v1/lora",
) -> dict[str, str]:
    """The metadata that other programs show and sort by (sd-scripts' ss_ and Stability's modelspec keys).

    Args:
        rank: r of the layers, if it is one.
        alpha: of the layers, if it is one.
        name: of the file, without suffix.
        title: for people; the name by default.
        base_model: as sd-scripts calls it.
        architecture: as modelspec calls it.

    Returns:
        Text by key; what is None is left out.
    """
    whole = alpha is not None and math.isfinite(alpha) and float(alpha).is_integer()
    values = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": int(alpha) if whole and alpha is not None else alpha,
        "ss_base_model_version": base_model,
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title if title is not None else name,
    }
    return {key: str(value) for key, value in values.items() if value is not None}
