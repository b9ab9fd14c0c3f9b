"""Weights from diffusers' layout to the original single file's and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import Tensor

from loratune.errors import UserError
from loratune.formats.architectures import IGNORED, POSITION_IDS, PREFIXES, canonical_text_name, entries
from loratune.formats.layouts import Config

Old = TypeVar("Old")
New = TypeVar("New")


def to_single_file(components: Mapping[str, Mapping[str, Tensor]], configs: Mapping[str, Config]) -> dict[str, Tensor]:
    """The components' weights under the keys and in the shapes of the single file; values are not copied.

    Args:
        components: unet, vae and text_encoder, each a state dict; text keys with or without text_model.
        configs: of the same components; others are not looked at.

    Raises:
        UserError: a key is not of the configuration's table, missing, or of another shape.
    """
    given = {
        (component, key): value
        for component in PREFIXES
        for key, value in _canonical(component, components[component]).items()
    }
    table = {(part, key): (full, (shape,), target) for part, key, full, shape, target in entries(configs)}
    return _renamed(given, table, lambda name: ".".join(name))


def from_single_file(tensors: Mapping[str, Tensor], configs: Mapping[str, Config]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_single_file`; schedules, averages and buffers in the file are left out.

    Raises:
        UserError: a key is not of the configurations' table, missing, or of another shape.
    """
    given = {key: value for key, value in tensors.items() if not key.startswith(IGNORED)}
    table = {full: ((part, key), (file_shape, shape), shape) for part, key, full, shape, file_shape in entries(configs)}
    components: dict[str, dict[str, Tensor]] = {component: {} for component in PREFIXES}
    for (component, key), value in _renamed(given, table, str).items():
        components[component][key] = value
    return components


def _renamed(
    given: Mapping[Old, Tensor],
    table: Mapping[Old, tuple[New, tuple[tuple[int, ...], ...], tuple[int, ...]]],
    told: Callable[[Old], str],
) -> dict[New, Tensor]:
    """Every tensor under its new name; `table` has the name, the shapes taken and the new shape."""
    if unknown := [told(key) for key in given if key not in table]:
        raise UserError(f"the key {unknown[0]!r} is not part of this architecture ({len(unknown)} such keys)")
    if missing := [told(key) for key in table if key not in given]:
        raise UserError(f"the key {missing[0]!r} is missing ({len(missing)} such keys); the weights are not complete")
    renamed = {}
    for key, (new, taken, shape) in table.items():
        if tuple(given[key].shape) not in taken:
            raise UserError(f"{told(key)!r} has shape {tuple(given[key].shape)}; this architecture has {taken[0]}")
        renamed[new] = given[key].reshape(shape)
    return renamed


def _canonical(component: str, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return canonical_text_keys(state_dict) if component == "text_encoder" else state_dict


def canonical_text_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict with the text_model level that files have, without position_ids."""
    return {canonical_text_name(key): value for key, value in state_dict.items() if not key.endswith(POSITION_IDS)}


def module_text_keys(state_dict: Mapping[str, Tensor], module_keys: Iterable[str]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict under the keys of a live module, whichever transformers made it.

    Keys that the module does not have keep their canonical name, so that loading them strictly tells.
    """
    own = {canonical_text_name(key): key for key in module_keys}
    return {own.get(key, key): value for key, value in canonical_text_keys(state_dict).items()}
