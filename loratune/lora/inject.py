"""Adapters put into a frozen W_0 (by peft), and taken out again: LoRA and its relatives."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from loratune.errors import UserError
from loratune.families.architectures import canonical_module_name
from loratune.lora.fused import fuse
from loratune.lora.kinds.known import KINDS, types
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.whole import whole

ADAPTER = "default"
PRESETS = {"all-linear": r".*", "all": r".*", "none": r"(?!)"}
"""Targets of every family, beside its own."""
OF_FAMILIES = ("cross-attention", "attention", "attention+ff")
"""Names of the targets that families may have; each says which layers they are."""


@dataclass(frozen=True)
class LoRA:
    """How W_0 is adapted: h = W_0 x + (alpha / r) B A x (Hu 2021, section 4.1), or a relative of it.

    Args:
        type: lora (LoCon where targets are convolutions), dora (Liu 2024), loha (Hyeon-Woo 2022) or lokr
            (Edalati 2022, LyCORIS).
        rank: r, the inner size of B A.
        alpha: the scale is alpha / r; by default r, so that the scale is 1.
        rslora: make the scale alpha / sqrt(r) (Kalajdzievski 2023).
        dropout: share of x's entries dropped before A, in [0, 1); of the rows of Delta W for loha and lokr.
        targets: cross-attention (W_Q, W_K, W_V), attention, attention+ff, all-linear, all (convolutions too), none
            (new tokens or the text encoder alone), or a regular expression that whole module names of the U-Net
            must match.
        rank_pattern: other ranks, by regular expressions that whole module names must match; the first match counts.
        alpha_pattern: other alphas, likewise.
        init: of A, with B = 0: kaiming, or gaussian; or of both from W_0, with B A taken from it: pissa (Meng
            2024) or olora (Buyukakyuz 2024).
        text_encoder: adapt the text encoders' attention too.
        text_encoder_lr: the text encoders' learning rate; none takes the optimizer's.
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou 2024; the paper uses 16).
        init_from: a LoRA file to initialise from, in any format that is read; its type and ranks must be the same.
    """

    type: Literal["lora", "dora", "loha", "lokr"] = "lora"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.0
    targets: str = "cross-attention"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init: Literal["kaiming", "gaussian", "pissa", "olora"] = "kaiming"
    text_encoder: bool = False
    text_encoder_lr: float | None = None
    loraplus_lr_ratio: float = 1.0
    init_from: Path | None = None

    def __post_init__(self) -> None:
        for key, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if rank < 1:
                raise ValueError(f"lora.{key} is {rank}; give 1 or more")
        for key, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if alpha is not None and not 0 < alpha < math.inf:
                raise ValueError(f"lora.{key} is {alpha}; give a number above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout is {self.dropout}; give 0 or more and less than 1")
        for key in ("targets", "rank_pattern", "alpha_pattern"):
            for pattern in [self.targets] if key == "targets" else getattr(self, key):
                _check_pattern(key, pattern)
        for key in ("text_encoder_lr", "loraplus_lr_ratio"):
            if (value := getattr(self, key)) is not None and not 0 < value < math.inf:
                raise ValueError(f"lora.{key} is {value}; give a number above 0")
        self._check_together()

    def _check_together(self) -> None:
        plain = self.type in ("lora", "dora")
        if not plain and (self.rslora or self.init != "kaiming" or self.loraplus_lr_ratio != 1):
            raise ValueError(
                f"lora: rslora, init and loraplus_lr_ratio are of type lora and dora; leave them out for {self.type}"
            )
        if self.init in ("pissa", "olora") and (self.type == "dora" or self.init_from):
            raise ValueError(f"lora.init {self.init} changes W_0 itself: not with type dora or init_from")
        if self.text_encoder_lr is not None and not self.text_encoder:
            raise ValueError("lora.text_encoder_lr is set, but lora.text_encoder is false; set it to true")

    def pattern(self, targets: Mapping[str, str]) -> str:
        """The regular expression of the targets.

        Args:
            targets: those of a family, by name.

        Raises:
            UserError: the family has none of that name.
        """
        if self.targets in OF_FAMILIES and self.targets not in targets:
            raise UserError(f"lora.targets {self.targets}: this family has {', '.join([*targets, *PRESETS])}")
        return {**PRESETS, **targets}.get(self.targets, self.targets)

    @property
    def linear_only(self) -> bool:
        """Whether convolutions are left out whatever the pattern says."""
        return self.targets == "all-linear"

    @property
    def scaled_alpha(self) -> float:
        """alpha, with its default."""
        return float(self.rank if self.alpha is None else self.alpha)

    def rank_of(self, name: str) -> int:
        """r of a module."""
        return next((rank for pattern, rank in self.rank_pattern.items() if re.fullmatch(pattern, name)), self.rank)

    def alpha_of(self, name: str) -> float:
        """alpha of a module; where none is given anywhere, its r."""
        default = float(self.rank_of(name)) if self.alpha is None else self.alpha
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if re.fullmatch(pattern, name)), default)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"lora.{key} {pattern!r} is no preset and no regular expression: {error}") from None


def match_targets(module: nn.Module, pattern: str, linear_only: bool = False) -> list[str]:
    """Names of the Linear and Conv2d layers that the pattern matches whole.

    Raises:
        UserError: it matches none; the message lists the kinds of layer that exist.
    """
    kinds = nn.Linear if linear_only else nn.Linear | nn.Conv2d
    names = [name for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    targets = [name for name in names if re.fullmatch(pattern, name) and isinstance(module.get_submodule(name), kinds)]
    if not targets:
        listed = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name) for name in names})
        raise UserError(f"lora.targets {pattern!r} matches no layer; there are: {', '.join(listed)}")
    return targets


def inject(module: nn.Module, lora: LoRA, pattern: str) -> list[str]:
    """Put an adapter beside every target; the module computes what it did before.

    Returns:
        The names of the adapted layers.
    """
    targets = match_targets(module, pattern, lora.linear_only)
    if lora.init in ("pissa", "olora"):
        for name in targets:
            if not isinstance(module.get_submodule(name), nn.Linear):
                raise UserError(
                    f"lora.init {lora.init} is for linear layers; {name} is a convolution: set lora.targets"
                )
    ranks = {name: rank for name in targets if (rank := lora.rank_of(name)) != lora.rank}
    alphas = {name: alpha for name in targets if (alpha := lora.alpha_of(name)) != lora.scaled_alpha}
    shared: dict[str, Any] = {"r": lora.rank, "target_modules": targets, "rank_pattern": ranks, "alpha_pattern": alphas}
    config = types()[lora.type].peft_config(lora, shared)
    inject_adapter_in_model(config, module, adapter_name=ADAPTER)
    for layer in adapted_layers(module).values():
        if lora.type == "lora":
            fuse(cast(LoraLayer, layer), ADAPTER)
    return targets


def adapted_layers(module: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name."""
    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is an adapter's."""
    attributes = {attribute for kind in KINDS.values() for attribute in kind.attributes.values()}
    return any(part in attributes for part in name.split("."))


def factors(layer: Any) -> dict[str, Tensor]:
    """The parameters of a layer's adapter, by the fields of its kind in files."""
    tensors = {}
    for name, attribute in _kind(layer).attributes.items():
        modules = getattr(layer, attribute, {})
        if ADAPTER in modules:
            tensors[name] = modules[ADAPTER].weight if isinstance(modules[ADAPTER], nn.Module) else modules[ADAPTER]
    return tensors


def _kind(layer: Any) -> type[LowRank]:
    """The kind of a layer of peft, by its attributes."""
    return next(kind for kind in KINDS.values() if all(hasattr(layer, one) for one in kind.attributes.values()))


def collect(
    components: Mapping[str, nn.Module], start: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, LowRank]:
    """Every adapted layer as files hold it, under its canonical name (float32, on the CPU).

    Args:
        components: modules by component.
        start: A and B at the start by canonical name, where they were taken from W_0 (pissa, olora): the change
            is then B A - B_0 A_0, of rank 2 r.
    """
    layers: dict[str, LowRank] = {}
    for component, module in components.items():
        for name, layer in adapted_layers(module).items():
            full = f"{component}.{canonical_module_name(component, module, name)}"
            tensors = {key: whole(value).detach().float().cpu().clone() for key, value in factors(layer).items()}
            layers[full] = _as_file(layer, tensors, (start or {}).get(full))
    return layers


def _as_file(layer: Any, tensors: dict[str, Tensor], start: tuple[Tensor, Tensor] | None) -> LowRank:
    scale = float(layer.scaling[ADAPTER])
    alpha = float(layer.scaling[ADAPTER] * layer.r[ADAPTER])
    if start is not None:
        tensors = {"down": torch.cat([tensors["down"], start[0]]), "up": torch.cat([tensors["up"], -start[1]], dim=1)}
        alpha *= 2
    return _kind(layer).collected(tensors, alpha, scale)


def at_start(components: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every layer as they are now, by canonical name."""
    collected = collect(components)
    return {name: (layer.down, layer.up) for name, layer in collected.items() if isinstance(layer, LoRALayer)}


@torch.no_grad()
def put(components: Mapping[str, nn.Module], layers: Mapping[str, LowRank], path: Path) -> None:
    """Set adapters to a file's, to go on from it.

    Raises:
        UserError: the file has another kind of adapter, other ranks, or layers that are not adapted here.
    """
    places = {
        f"{component}.{canonical_module_name(component, module, name)}": layer
        for component, module in components.items()
        for name, layer in adapted_layers(module).items()
    }
    if foreign := [name for name in layers if name not in places]:
        raise UserError(
            f"lora.init_from {path}: {foreign[0]} is not adapted here ({len(foreign)} such layers); "
            "set lora.targets and lora.text_encoder so that all of the file's are"
        )
    for name, layer in layers.items():
        own = factors(places[name])
        wanted = layer.tensors()
        if type(layer) is not _kind(places[name]) or own.keys() != wanted.keys():
            raise UserError(f"lora.init_from {path}: {name} is a {layer.name}; set lora.type to that")
        for part, value in wanted.items():
            if own[part].numel() != value.numel():
                raise UserError(
                    f"lora.init_from {path}: {name} has rank {layer.rank}; set lora.rank, or lora.rank_pattern, so"
                )
            own[part].copy_(value.view_as(own[part]))
        places[name].scaling[ADAPTER] = layer.scale


def switch(components: Iterable[nn.Module], weight: float | None) -> None:
    """Scale all adapters: 0 is the base alone, 1 as trained, None leaves them."""
    for module in components:
        for layer in adapted_layers(module).values():
            if weight is not None:
                layer.set_scale(ADAPTER, weight)


def parameter_groups(
    components: Mapping[str, nn.Module], lora: LoRA, text: Collection[str] = ()
) -> list[dict[str, Any]]:
    """The adapters' parameters by learning rate: a group's own `lr`, where it has one, and its `factor`.

    Args:
        components: modules by component.
        lora: says the learning rates.
        text: components that are text encoders.
    """
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, module in components.items():
        lr = lora.text_encoder_lr if name in text else None
        for key, parameter in module.named_parameters():
            if parameter.requires_grad and is_adapter(key):
                factor = lora.loraplus_lr_ratio if ".lora_B." in f".{key}" else 1.0
                groups.setdefault((lr, factor), []).append(parameter)
    return [
        {"params": parameters, "factor": factor} | ({} if lr is None else {"lr": lr})
        for (lr, factor), parameters in groups.items()
    ]
