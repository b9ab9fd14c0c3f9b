"""Which bases a LoRA's layers fit, by their names and shapes; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from loratune.families.architectures import architectures, entries, module_names, title
from loratune.families.base import Base
from loratune.families.layouts import Shape
from loratune.families.locate import builtin_names
from loratune.lora.names import flat, known_shapes


@cache
def bases() -> dict[str, Mapping[str, Shape]]:
    """The shapes of W_0 of all layers that a LoRA can sit on, by canonical name, of every base that is known here.

    By what people call them: the known architectures, and the embedded bases.
    """
    known = {title(architectures()[name]): shapes for name, shapes in known_shapes().items()}
    return known | {f"builtin:{name}": _embedded(name) for name in builtin_names()}


def _embedded(name: str) -> dict[str, Shape]:
    configs = Base.open(f"builtin:{name}").configs
    whole = {f"{component}.{key}": shape for component, key, shape, _ in entries(configs)}
    return {layer: whole[f"{layer}.weight"] for layer in module_names(configs)}


def layer_names() -> list[str]:
    """Canonical names of the layers of all of `bases`, by which kohya's are understood."""
    return sorted({name for shapes in bases().values() for name in shapes})


def fitting(sizes: Mapping[str, tuple[int, int]]) -> list[str]:
    """The bases that have all of these layers in these sizes; an inpainting variant only where its base does not.

    Args:
        sizes: (out, in k k) by canonical name.
    """
    fit = [
        name
        for name, shapes in bases().items()
        if all(key in shapes and flat(shapes[key]) == size for key, size in sizes.items())
    ]
    return [name for name in fit if name.removesuffix(" (inpainting)") not in fit or "(inpainting)" not in name]


def shapes_for(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Shape]:
    """The whole shapes of these layers' W_0 in the first base that fits; {} where none does."""
    fit = fitting(sizes)
    return {name: bases()[fit[0]][name] for name in sizes} if fit else {}
