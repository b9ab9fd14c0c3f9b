"""A LoRA file read back as another program would read it, and compared with what was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from loratune.errors import UserError
from loratune.families.known import kohya_prefixes
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer

# How a residual block's layers are called in the original layout.
RESNET = {"conv1": "in_layers_2", "time_emb_proj": "emb_layers_1", "conv2": "out_layers_3"}
RESNET["conv_shortcut"] = "skip_connection"


class _File(NamedTuple):
    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def verify(path: Path, layers: Mapping[str, LowRank], format: str, dtype: torch.dtype) -> None:
    """Read a LoRA file as another program would and compare every (alpha / r) B A with the one in training.

    Of LoHa and LoKr, and of DoRA's magnitudes, the tensors themselves are compared. Shares no code with the writer:
    names by each format's published rule, tensors by safetensors' library.

    Raises:
        UserError: a layer is missing or differs by more than the rounding to `dtype` can explain.
    """
    with safe_open(path, framework="pt") as opened:
        found = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118
        file = _File(path, found, opened.metadata())
    for name, layer in layers.items():
        try:
            same = _same(file, name, layer, format, dtype)
        except KeyError as error:
            raise UserError(f"{name}: reads back without {error}; do not use this file") from None
        if not same:
            raise UserError(f"{path}: {name} reads back as another B A than was trained; do not use this file")


def _same(file: _File, name: str, layer: LowRank, format: str, dtype: torch.dtype) -> bool:
    raw = name if format == "peft" else _kohya_name(file, name)
    if layer.magnitude is not None:
        m = file.tensors[f"{raw}.lora_magnitude_vector.weight" if format == "peft" else f"{raw}.dora_scale"]
        if not torch.equal(m.flatten(), layer.magnitude.to(dtype).float().flatten()):
            return False
    if isinstance(layer, LoRALayer) and layer.mid is None:
        return _same_product(layer, *_as_read(file, raw, format), dtype)
    alpha = torch.tensor(layer.alpha).to(dtype).float()
    tensors = {field: value for field, value in layer.tensors().items() if field != "magnitude"}
    held = {f"{raw}.{layer.suffixes[field]}": value for field, value in tensors.items()}
    factors = all(torch.equal(file.tensors[key], value.to(dtype).float()) for key, value in held.items())
    return factors and bool(torch.isclose(file.tensors[f"{raw}.alpha"], alpha, rtol=torch.finfo(dtype).eps))


def _same_product(layer: LoRALayer, down: Tensor, up: Tensor, scale: float, dtype: torch.dtype) -> bool:
    read = scale * up.flatten(1) @ down.flatten(1)
    trained = layer.scale * layer.up.flatten(1) @ layer.down.flatten(1)
    # Each of B and A is off by at most eps relative, or by the smallest number where that is coarser; B may hold the
    # rest of the scale.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    wide = layer.up.abs().flatten(1) * abs(layer.scale / scale) if scale else layer.up.abs().flatten(1)
    bound = abs(scale) * ((2.1 * eps + 1e-6) * wide + tiny) @ (layer.down.abs().flatten(1) + tiny)
    return bool(((read - trained).abs() <= bound + 1e-12).all())


def _as_read(file: _File, raw: str, format: str) -> tuple[Tensor, Tensor, float]:
    """A, B and alpha / r."""
    if format == "peft":
        down, up = file.tensors[f"{raw}.lora_A.weight"], file.tensors[f"{raw}.lora_B.weight"]
        return down, up, _peft_scale(json.loads(file.metadata["lora_adapter_metadata"]), raw)
    down, up = file.tensors[f"{raw}.lora_down.weight"], file.tensors[f"{raw}.lora_up.weight"]
    return down, up, float(file.tensors.get(f"{raw}.alpha", torch.tensor(float(len(down))))) / len(down)


def _peft_scale(told: Mapping[str, Any], name: str) -> float:
    component, _, path = name.partition(".")
    path = path.removeprefix("text_model.")
    alpha = told[f"{component}.alpha_pattern"].get(path, told[f"{component}.lora_alpha"])
    return float(alpha / told[f"{component}.rank_pattern"].get(path, told[f"{component}.r"]))


def _kohya_name(file: _File, name: str) -> str:
    component, _, path = name.partition(".")
    there = {key.partition(".")[0] for key in file.tensors}
    paths = (path, _original(path)) if component == "unet" else (path,)
    spelt = [f"{prefix}{one.replace('.', '_')}" for prefix in kohya_prefixes()[component] for one in paths]
    return next((one for one in spelt if one in there), spelt[0])


def _original(path: str) -> str:
    """An SDXL U-Net's layer in the original layout, of two residual blocks a level."""
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.+)", path):
        side, level, kind, index = match[1], int(match[2]), match[3], int(match[4])
        place = 3 * level + index + (side == "down")
        inside = match[5] if kind == "attentions" else RESNET[match[5]]
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{int(kind == 'attentions')}.{inside}"
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path):
        place = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{place}.{match[3] if match[1] == 'attentions' else RESNET[match[3]]}"
    if match := re.fullmatch(r"(down|up)_blocks\.(\d)\.(?:down|up)samplers\.0\.conv", path):
        place = 3 * int(match[2])
        return f"input_blocks.{place + 3}.0.op" if match[1] == "down" else f"output_blocks.{place + 2}.2.conv"
    single = {"conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    single |= {f"time_embedding.linear_{i}": f"time_embed.{2 * i - 2}" for i in (1, 2)}
    single |= {f"add_embedding.linear_{i}": f"label_emb.0.{2 * i - 2}" for i in (1, 2)}
    return single.get(path, path)
