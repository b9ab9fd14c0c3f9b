"""Plain LoRA beside a layer in fewer passes over its output than peft makes of it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn


class Fused(LoraVariant):  # type: ignore[misc]
    """h = W_0 x + s B A x (Hu 2021, section 4.1), where one product adds s B onto what W_0 made.

    peft multiplies and adds apart, each a pass over all of h, and casts x to the adapter's float32 before autocast
    casts it back. Numbers differ from peft's by rounding alone, which is here done once.
    """

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """What W_0 made of x, with the adapter's part added."""
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        if not _autocasts(x):
            x = x.to(down.weight.dtype)
        inner = down(module.lora_dropout[active_adapter](x))
        if isinstance(up, nn.Linear) and inner.dtype == result.dtype:
            rows = torch.addmm(result.flatten(0, -2), inner.flatten(0, -2), up.weight.t(), alpha=scale)
            return rows.view(result.shape)
        return result + up(inner * scale)


def _autocasts(x: Tensor) -> bool:
    """Whether products choose their own dtype; on the meta device there is no autocast, and whoever counts says it."""
    return x.is_meta or torch.is_autocast_enabled(x.device.type)


def fuse(layer: LoraLayer, adapter: str) -> None:
    """Let an adapter that is plain LoRA be computed so; DoRA and others stay as peft makes them."""
    if adapter not in layer.lora_variant and not layer.lora_bias.get(adapter, False):
        layer.lora_variant[adapter] = Fused
        layer.cast_input_dtype_enabled = False
