"""kohya's format (sd-scripts, A1111, Forge, ComfyUI, diffusers): `lora_unet_` and the path with _, `lora_down.weight`.

Delta W = (alpha / r) up down, with alpha a tensor of each layer; without it alpha = r (networks/lora.py:805-836).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from loratune.families.architectures import architectures, original_names
from loratune.families.known import FAMILIES, kohya_prefixes
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.names import base_kind, originals
from loratune.lora.tables.table import ALPHA, DOWN, MAGNITUDE, MID, UP, Part, Table, Written

if TYPE_CHECKING:
    from loratune.lora.kinds.layer import LowRank


def components() -> dict[str, str]:
    """The component that names are of, by what they begin with."""
    return {prefix: component for component, prefixes in kohya_prefixes().items() for prefix in prefixes}


def written(kind: str) -> dict[str, str]:
    """What sd-scripts puts before the names of each component's layers, by kind of base."""
    family = next((family for family in FAMILIES if family.name == kind), FAMILIES[0])
    return {part.name: part.kohya[0] for part in family.parts if part.kohya}


def begins() -> str:
    """The beginnings of kohya's names."""
    return rf"^({'|'.join(components())})"


def spell(name: str) -> tuple[str, ...]:
    """kohya's names of a layer, by diffusers' path and by the original one."""
    component, _, path = name.partition(".")
    paths = (path, *originals().get(name, ()))
    return tuple(f"{prefix}{one.replace('.', '_')}" for prefix in kohya_prefixes()[component] for one in paths)


def kohya_names(names: Iterable[str], kind: str = "sd") -> dict[str, str]:
    """From kohya's name of a layer, as it is written, to its canonical one.

    Args:
        names: canonical, with component.
        kind: of the base: sd, or sdxl, of whose U-Net the original layout's names are written (diffusers' where
            a layer is not SDXL's).

    Raises:
        ValueError: two layers would have one name.
    """
    names = list(names)
    original = original_names(architectures()["sdxl"]) if kind == "sdxl" else {}
    if any(name.startswith("unet.") and name not in original for name in names):
        original = {}  # never some of both: diffusers would leave out the original ones
    table: dict[str, str] = {}
    prefixes = written(kind)
    for name in names:
        component, _, path = name.partition(".")
        key = f"{prefixes[component]}{original.get(name, path).replace('.', '_')}"
        if table.setdefault(key, name) != name:
            raise ValueError(f"{table[key]} and {name} would both be {key}")
    return table


def write(layers: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: Any) -> Written:
    """kohya's tensors, and what they need in the metadata.

    Plain layers get one alpha, or alpha = r without an entry: were alphas to differ, diffusers would give the most
    common one to all attention layers. The rest of a layer's scale goes into its B. Where other kinds are among
    them, which diffusers does not read, all keep their own.

    Raises:
        ValueError: kohya's format cannot hold them exactly.
    """
    from loratune.lora.write import cast, exact_scalar, one_alpha, padded, padding

    plain = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALayer)}
    own: dict[str, LowRank] = {name: cast(layer, dtype) for name, layer in layers.items()}
    zeros: dict[str, LoRALayer] = {}
    alphas: dict[str, float] = {name: layer.alpha for name, layer in layers.items()}
    if len(plain) == len(layers):
        scaled, alpha = one_alpha(plain, dtype)
        zeros = padding(plain, dtype, kohya=True)
        own, alphas = {**scaled, **zeros}, {} if alpha is None else dict.fromkeys([*scaled, *zeros], alpha)
    base = metadata.get("ss_base_model_version", "") + metadata.get("modelspec.architecture", "")
    kind = base_kind({name: layer.flat_shape for name, layer in layers.items()}, base)
    tensors: dict[str, Any] = {}
    for raw, name in kohya_names(own, kind).items():
        held = own[name].tensors()
        for field, tensor in held.items():
            part = MAGNITUDE if field == "magnitude" else Part(own[name].kind, field)
            tensors[f"{raw}{KOHYA.suffix(part)}"] = tensor
        if name in alphas:
            tensors[f"{raw}{KOHYA.suffix(ALPHA)}"] = exact_scalar(alphas[name], next(iter(held.values())).dtype)
    return tensors, padded(zeros)


KOHYA = Table(
    "kohya",
    begins,
    {
        ".lora_down.weight": DOWN,
        ".lora_up.weight": UP,
        ".lora_mid.weight": MID,
        ".alpha": ALPHA,
        ".dora_scale": MAGNITUDE,
    },
    spell,
    every_kind=True,
    joined=True,
    write=write,
)
