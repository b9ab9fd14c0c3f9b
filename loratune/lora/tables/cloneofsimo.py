"""The first LoRA files for Stable Diffusion (lora_diffusion by cloneofsimo, 2022-2023), which number their layers.

A number is a layer's place in torch's traversal of the model, for the diffusers of that time: for each module of a
listed class its Linear children (and, where residual blocks were adapted whole, their convolutions). That diffusers
made the U-Net's middle last, and attentions before residual blocks; in a transformer block the feed-forward came
between the two attentions, then after them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from loratune.lora.names import flat, known_shapes
from loratune.lora.tables.table import DOWN, UP, Table
from loratune.lora.tables.table import Sizes as Named

DEFAULT_CLASSES = {"unet": ("CrossAttention", "Attention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
# The children of each class of module that were adapted, in the order of its constructor.
CHILDREN = {
    "CrossAttention": ("to_q", "to_k", "to_v", "to_out.0"),
    "GEGLU": ("proj",),
    "ResnetBlock2D": ("conv1", "time_emb_proj", "conv2", "conv_shortcut"),
    "CLIPAttention": ("k_proj", "v_proj", "q_proj", "out_proj"),
    "CLIPMLP": ("fc1", "fc2"),
}
CHILDREN["Attention"] = CHILDREN["CrossAttention"]
# What the last part of a module's name says of its class.
CLASSES = {
    r"attn[12]": ("CrossAttention", "Attention"),
    r"ff\.net\.0": ("GEGLU",),
    r"resnets\.\d+": ("ResnetBlock2D",),
    r"self_attn": ("CLIPAttention",),
    r"mlp": ("CLIPMLP",),
}
INSIDE = (("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))  # the orders inside a transformer block
SIDES = ("down_blocks", "up_blocks", "mid_block")
Sizes = Mapping[int, tuple[int, int]]


def numbered(layers: Named, metadata: Mapping[str, str]) -> dict[str, str]:
    """The canonical names of numbered layers.

    Args:
        layers: (out, in k k) by `component:number`.
        metadata: the file's.

    Returns:
        By `component:number`.

    Raises:
        ValueError: the metadata names a class that is not known, or no order of layers fits the shapes.
    """
    sizes: dict[str, dict[int, tuple[int, int]]] = {}
    for raw, size in layers.items():
        component, _, number = raw.rpartition(":")
        if not number.isdecimal():
            raise ValueError(f"{raw!r} is no layer's number")
        sizes.setdefault(component, {})[int(number)] = size
    classes = {component: _classes(component, metadata) for component in sizes}
    for name, shapes in known_shapes().items():
        if "sdxl" in name or "inpainting" in name:
            continue
        for inside, dimensions in product(INSIDE, ((2, 4), (2,))):
            taken = {layer: shape for layer, shape in shapes.items() if len(shape) in dimensions}
            orders = {component: _order(component, taken, classes[component], inside) for component in sizes}
            if all(_fit(orders[component], sizes[component], shapes) for component in sizes):
                return {f"{part}:{index}": name for part, names in orders.items() for index, name in enumerate(names)}
    counts = ", ".join(f"{len(held)} of {part}" for part, held in sizes.items())
    raise ValueError(f"its layers ({counts}) fit neither Stable Diffusion 1.x nor 2.x in the order they are numbered")


def _classes(component: str, metadata: Mapping[str, str]) -> tuple[str, ...]:
    if component not in DEFAULT_CLASSES:
        raise ValueError(f"the component {component!r} is not known; known are {', '.join(DEFAULT_CLASSES)}")
    if component not in metadata:
        return DEFAULT_CLASSES[component]
    try:
        listed: Any = json.loads(metadata[component])
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, list) or not listed or not all(isinstance(one, str) for one in listed):
        raise ValueError(f"its metadata {component!r} is no list of classes")
    if unknown := [one for one in listed if one not in CHILDREN]:
        raise ValueError(f"it was trained on the class {unknown[0]!r}, whose layers are not known here")
    return tuple(listed)


def _order(component: str, shapes: Mapping[str, Any], classes: tuple[str, ...], inside: tuple[str, ...]) -> list[str]:
    """Canonical names of the adapted layers in the order of their numbers."""
    placed: list[tuple[tuple[Any, ...], str]] = []
    for name in shapes:
        if name.startswith(f"{component}."):
            placed += ((key, name) for key in _place(name, classes, inside))
    return [name for _, name in sorted(placed)]


def _place(name: str, classes: tuple[str, ...], inside: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Where a layer comes in the traversal, if a listed class holds it."""
    for pattern, called in CLASSES.items():
        match = re.fullmatch(rf"(.*\.{pattern})\.(.+)", name)
        if match and set(called) & set(classes) and match[2] in CHILDREN[called[0]]:
            yield (*(_rank(part, inside) for part in match[1].split(".")), (2, CHILDREN[called[0]].index(match[2])))


def _rank(part: str, inside: tuple[str, ...]) -> tuple[int, int]:
    for order in (SIDES, ("attentions", "resnets"), inside, ("self_attn", "mlp")):
        if part in order:
            return (1, order.index(part))
    return (0, int(part) if part.isdigit() else 0)


def _fit(names: list[str], sizes: Sizes, shapes: Mapping[str, Any]) -> bool:
    if sorted(sizes) != list(range(len(names))):
        return False
    return all(flat(shapes[name]) == sizes[index] for index, name in enumerate(names))


CLONEOFSIMO = Table("cloneofsimo", r"^\w+:\w+$", {":down": DOWN, ":up": UP}, lambda name: (), number=numbered)
