"""Which tensors a checkpoint of a known architecture has, under which names; read off headers, without torch.

Inpainting variants differ in shapes alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from loratune.families.family import Configs
from loratune.families.known import FAMILIES, family_of
from loratune.families.layouts import Config, Place, Shape
from loratune.families.unsupported import name_of_kind
from loratune.formats.headers import Header


def title(configs: Mapping[str, Config]) -> str:
    """What a base with these configurations is called, for people."""
    return family_of(configs).title_of(configs)


def entries(configs: Mapping[str, Config]) -> Iterator[tuple[str, str, Shape, Place]]:
    """Every tensor of the components with a configuration: component, diffusers key, shape in the module, place in
    the single file.

    Raises:
        UserError: a configuration lacks a key or has a part that the original layout does not.
    """
    for part in family_of(configs).parts:
        for layer in part.layers(configs[part.name]) if part.name in configs else ():
            for name, shape, place in layer.tensors():
                yield part.name, name, shape, replace(place, key=part.prefix + place.key)


def places(configs: Mapping[str, Config]) -> dict[str, Place]:
    """Where every tensor lies in the single file, by canonical name with component (`unet.conv_in.weight`)."""
    return {f"{component}.{name}": place for component, name, _, place in entries(configs)}


def file_shapes(configs: Mapping[str, Config]) -> dict[str, Shape]:
    """The shape of every tensor of the single file, by its whole key."""
    return {place.key: place.shape for _, _, _, place in entries(configs)}


def shapes_taken(shape: Shape, place: Place) -> tuple[Shape, ...]:
    """The shapes that a tensor may have in a file; a 1x1 convolution may lie there as a matrix.

    Args:
        shape: in the module.
        place: in the file.
    """
    whole = place.rows is None and not place.transposed
    return (place.shape, shape) if whole else (place.shape,)


def original_names(configs: Mapping[str, Config]) -> dict[str, str]:
    """The original layout's name, without prefix, of every layer of the denoiser by its canonical one.

    `unet.down_blocks.0.attentions.0.proj_in` is `input_blocks.1.1.proj_in`.
    """
    return family_of(configs).originals(configs)


def module_names(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Canonical names, with component, of the layers that a LoRA can adapt in denoiser and text encoders."""
    return tuple(
        f"{part.name}.{layer.name}"
        for part in family_of(configs).parts
        if part.adaptable and part.name in configs
        for layer in part.layers(configs[part.name])
        if layer.adaptable
    )


def canonical_module_name(component: str, module: Any, name: str) -> str:
    """The canonical name, without component, of a module inside of a component, by the component's class.

    Args:
        component: its name.
        module: the component.
        name: of the module in it.
    """
    classes = {cls.__name__ for cls in type(module).__mro__}
    for family in FAMILIES:
        for part in family.parts:
            if part.name == component and part.class_name in classes:
                return part.canonical(name) or name
    return name


@cache
def _architectures() -> dict[str, Configs]:
    return {name: configs for family in FAMILIES for name, configs in family.architectures().items()}


def architectures() -> dict[str, Configs]:
    """The known architectures: name -> component (denoiser, VAE, text encoders, scheduler) -> configuration."""
    return copy.deepcopy(_architectures())


@cache
def _taken(name: str) -> dict[str, tuple[Shape, ...]]:
    """The shapes that each tensor of an architecture may have in a file."""
    return {place.key: shapes_taken(shape, place) for _, _, shape, place in entries(_architectures()[name])}


def detect(header: Header) -> str | None:
    """The known architecture whose every tensor is in the file with its shape, or None; dtypes do not matter."""
    tensors = header.tensors
    for name, configs in _architectures().items():
        if any(
            key not in tensors or tensors[key].shape != shape
            for key, shape in family_of(configs).distinctive(configs).items()
        ):
            continue
        if all(key in tensors and tensors[key].shape in shapes for key, shapes in _taken(name).items()):
            return name
    return None


def describe_unsupported(header: Header) -> str | None:
    """What a file is that `detect` does not know, in words for a message, or None if its keys do not tell."""
    return name_of_kind({key: info.shape for key, info in header.tensors.items()}) or _nearly(header)


def _nearly(header: Header) -> str | None:
    """How a file differs from the known architecture with which it shares most, if that is a quarter of it or more."""
    tensors = header.tensors

    def share(name: str) -> tuple[int, int]:
        there = [key for key in _taken(name) if key in tensors]
        return len(there), sum(tensors[key].shape in _taken(name)[key] for key in there)

    name = max(_architectures(), key=share)
    if share(name)[0] < len(_taken(name)) / 4:
        return None
    called, family = title(_architectures()[name]), family_of(_architectures()[name])
    lacking = [part.name for part in family.parts if not any(key.startswith(part.prefix) for key in tensors)]
    if lacking:
        return f"a {called} checkpoint that is not complete: it has no {' and no '.join(lacking)}"
    if missing := [key for key in _taken(name) if key not in tensors]:
        return f"nearly a {called} checkpoint: {missing[0]!r} is missing ({len(missing)} such keys)"
    wrong = [key for key, shapes in _taken(name).items() if tensors[key].shape not in shapes]
    if not wrong:
        return None
    shape, wanted = list(tensors[wrong[0]].shape), list(_taken(name)[wrong[0]][0])
    return f"nearly a {called} checkpoint: {wrong[0]!r} is {shape} instead of {wanted} ({len(wrong)} such keys)"
