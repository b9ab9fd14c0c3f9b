"""B and A put into a frozen W_0 (by peft), and taken out again (Hu 2021)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from loratune.errors import UserError
from loratune.formats.lora_layers import LoRALayer

ADAPTER = "default"
PRESETS = {
    "cross-attention": r".*\battn2\.to_(q|k|v)",
    "attention": r".*\battn[12]\.to_(q|k|v|out\.0)",
    "attention+ff": r".*\b(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))",
    "all-linear": r".*",
}
TEXT_TARGETS = r".*\bself_attn\.(q_proj|k_proj|v_proj|out_proj)"


@dataclass(frozen=True)
class LoRA:
    """How W_0 is adapted: h = W_0 x + (alpha / r) B A x (Hu 2021, section 4.1).

    Args:
        rank: r, the inner size of B A.
        alpha: the scale is alpha / r; by default r, so that the scale is 1.
        dropout: share of x's entries dropped before A, in [0, 1).
        targets: cross-attention (W_Q, W_K, W_V), attention, attention+ff, all-linear, or a regular
            expression that whole module names of the U-Net must match.
        text_encoder: adapt the text encoder's attention too.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "cross-attention"
    text_encoder: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank is {self.rank}; give 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha is {self.alpha}; give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; give 0 or more and less than 1")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"lora.targets {self.targets!r} is no preset and no regular expression: {error}") from None

    @property
    def pattern(self) -> str:
        """The regular expression of the targets."""
        return PRESETS.get(self.targets, self.targets)

    @property
    def scaled_alpha(self) -> float:
        """alpha, with its default."""
        return float(self.rank if self.alpha is None else self.alpha)


def match_targets(module: nn.Module, pattern: str) -> list[str]:
    """Names of the Linear and Conv2d layers that the pattern matches whole.

    Raises:
        UserError: it matches none; the message lists the kinds of layer that exist.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    linear_only = pattern == PRESETS["all-linear"]
    found = [
        name
        for name in names
        if re.fullmatch(pattern, name) and not (linear_only and isinstance(module.get_submodule(name), nn.Conv2d))
    ]
    if not found:
        kinds = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names})
        raise UserError(f"lora.targets {pattern!r} matches no layer; there are: {', '.join(kinds)}")
    return found


def inject(module: nn.Module, lora: LoRA, pattern: str) -> list[str]:
    """Put B = 0 and a random A beside every target; the module computes what it did before.

    Returns:
        The names of the adapted layers.
    """
    targets = match_targets(module, pattern)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scaled_alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias="none",  # type: ignore[arg-type]
    )
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    return targets


def adapted_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """The layers that carry an adapter, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, LoraLayer)}


def collect(components: dict[str, nn.Module]) -> dict[str, LoRALayer]:
    """B, A and alpha of every adapted layer, under its canonical name in files (float32, on the CPU)."""
    layers = {}
    for component, module in components.items():
        for name, layer in adapted_layers(module).items():
            layers[f"{component}.{canonical(component, name)}"] = LoRALayer(
                down=layer.lora_A[ADAPTER].weight.detach().float().cpu().clone(),
                up=layer.lora_B[ADAPTER].weight.detach().float().cpu().clone(),
                alpha=float(layer.scaling[ADAPTER] * layer.r[ADAPTER]),
            )
    return layers


def canonical(component: str, name: str) -> str:
    """A module's name as files have it: transformers 5 dropped the text_model level that they keep."""
    if component.startswith("text_encoder") and not name.startswith("text_model."):
        return f"text_model.{name}"
    return name


def switch(components: Iterable[nn.Module], weight: float | None) -> None:
    """Scale all adapters: 0 is the base alone, 1 as trained, None leaves them."""
    for module in components:
        for layer in adapted_layers(module).values():
            if weight is not None:
                layer.set_scale(ADAPTER, weight)


def parameter_groups(components: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """The adapters' parameters, a group for each component."""
    groups = []
    for name, module in components.items():
        if trained := [parameter for parameter in module.parameters() if parameter.requires_grad]:
            groups.append({"params": trained, "name": name})
    return groups
