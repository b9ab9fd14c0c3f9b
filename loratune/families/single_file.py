"""Weights from diffusers' layout to the original single file's and back, for every kind of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.families.architectures import entries, shapes_taken
from loratune.families.family import Part
from loratune.families.known import family_of
from loratune.families.layouts import Config, Place, Shape

Weights = Mapping[str, Mapping[str, Tensor]]


def to_single_file(
    components: Weights, configs: Mapping[str, Config], source: Path | str = "the base"
) -> dict[str, Tensor]:
    """The components' weights under the keys and in the shapes of the single file.

    Values are not copied, except OpenCLIP's q, k and v, which become one tensor, and its projection, which is turned.

    Args:
        components: unet, vae and the text encoders, each a state dict; text keys with or without text_model.
        configs: of the same components; others are not looked at.
        source: where the weights came from, for messages.

    Raises:
        UserError: a key is not of the configurations' table, missing, or of another shape.
    """
    tensors = {
        f"{part.name}.{key}": value
        for part in family_of(configs).parts
        for key, value in canonical_keys(part, components[part.name]).items()
    }
    table = {f"{component}.{key}": (shape, place) for component, key, shape, place in entries(configs)}
    _check_keys(source, tensors.keys(), table.keys())
    parts: dict[str, list[Tensor]] = {}
    for name, (shape, place) in table.items():
        _check_shape(source, name, tensors[name], (shape,))
        parts.setdefault(place.key, []).append(_into_file(tensors[name], place))
    return {key: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for key, pieces in parts.items()}


def from_single_file(
    tensors: Mapping[str, Tensor], configs: Mapping[str, Config], source: Path | str = "the checkpoint"
) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_single_file`; schedules, averages and buffers in the file are left out.

    Args:
        tensors: of the file, by key.
        configs: of its components.
        source: the file, for messages.

    Raises:
        UserError: a key is not of the configurations' table, missing, or of another shape.
    """
    table, family = list(entries(configs)), family_of(configs)
    known, unused = {place.key for *_, place in table}, family.ignored(configs)
    _check_keys(source, [key for key in tensors if key in known or not key.startswith(unused)], known)
    components: dict[str, dict[str, Tensor]] = {part.name: {} for part in family.parts}
    for component, name, shape, place in table:
        _check_shape(source, place.key, tensors[place.key], shapes_taken(shape, place))
        components[component][name] = _out_of_file(tensors[place.key], place, shape)
    return components


def _into_file(value: Tensor, place: Place) -> Tensor:
    if place.rows is not None:
        return value
    return value.T.contiguous() if place.transposed else value.reshape(place.shape)


def _out_of_file(value: Tensor, place: Place, shape: Shape) -> Tensor:
    part = value if place.rows is None else value[slice(*place.rows)]
    return (part.T if place.transposed else part).reshape(shape)


def _check_keys(source: Path | str, names: Collection[str], wanted: Collection[str]) -> None:
    if unknown := [key for key in names if key not in wanted]:
        raise UserError(f"{source}: {unknown[0]!r} is not part of this architecture ({len(unknown)} such keys)")
    if missing := sorted(set(wanted) - set(names)):
        raise UserError(f"{source}: {missing[0]!r} is missing ({len(missing)} such keys); the weights are not complete")


def _check_shape(source: Path | str, key: str, value: Tensor, taken: tuple[Shape, ...]) -> None:
    if tuple(value.shape) not in taken:
        fault = f"has shape {list(value.shape)}; this architecture has {list(taken[0])}"
        raise UserError(f"{source}: {key!r} {fault}")


def canonical_keys(part: Part, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A component's state dict under today's names, whichever version of diffusers or transformers wrote it."""
    named = ((part.canonical(key), value) for key, value in state_dict.items())
    return {name: value for name, value in named if name is not None}


def module_keys(part: Part, state_dict: Mapping[str, Tensor], keys: Iterable[str]) -> dict[str, Tensor]:
    """A component's state dict under the keys of a live module, whichever version of its library made it.

    Keys that the module does not have keep their canonical name, so that strict loading names them.
    """
    own = {part.canonical(key): key for key in keys}
    return {own.get(key, key): value for key, value in canonical_keys(part, state_dict).items()}
