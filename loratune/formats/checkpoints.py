"""The single-file layout of Stable Diffusion 1.x, as a table made from the components' configurations."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from loratune.errors import UserError
from loratune.formats.headers import Header
from loratune.formats.layouts import Config, Layer, text_layers, unet_layers, vae_layers

Old = TypeVar("Old")
New = TypeVar("New")
LAYERS: dict[str, Callable[[Config], Iterator[Layer]]] = {
    "unet": unet_layers,
    "vae": vae_layers,
    "text_encoder": text_layers,
}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
POSITION_IDS = "embeddings.position_ids"
# What real files hold besides the weights, by the beginning of the key: schedules, averages, buffers.
IGNORED = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    f"cond_stage_model.transformer.text_model.{POSITION_IDS}",
    "embedding_manager.",
    "first_stage_model.loss.",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
# Kinds of file that are no SD 1.x checkpoint, by a part of a key that only they have; the first fit counts.
UNSUPPORTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA, not a base", ("lora_", ".lora.", ".lora_A.", ".hada_", ".lokr_")),
    ("a ControlNet", ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    ("an SDXL checkpoint", ("conditioner.embedders.1.model.",)),
    ("an SDXL refiner", ("conditioner.embedders.0.model.",)),
    ("a Stable Diffusion 2.x checkpoint", ("cond_stage_model.model.transformer.",)),
    ("a Stable Diffusion 3 checkpoint", ("joint_blocks.",)),
    ("a FLUX checkpoint", ("double_blocks.", "single_transformer_blocks.")),
    ("a U-Net alone, in diffusers' layout", ("down_blocks.0.attentions.0.",)),
)


def _tensors(component: str, config: Config) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """From a diffusers key to the single file's without prefix, the shape in the module and in the file."""
    return {
        f"{layer.name}.{part}": (f"{layer.ldm}.{part}", shape, file_shape)
        for layer in LAYERS[component](config)
        for part, shape, file_shape in layer.tensors()
    }


def unet_table(config: Config) -> dict[str, str]:
    """From a U-Net's diffusers keys to those of the original layout, without prefix."""
    return {key: ldm for key, (ldm, _, _) in _tensors("unet", config).items()}


def vae_table(config: Config) -> dict[str, str]:
    """From a VAE's diffusers keys to those of the original layout, without prefix."""
    return {key: ldm for key, (ldm, _, _) in _tensors("vae", config).items()}


def text_table(config: Config) -> dict[str, str]:
    """From a CLIP text encoder's canonical keys (with text_model.) to the original layout's: the same."""
    return {key: ldm for key, (ldm, _, _) in _tensors("text_encoder", config).items()}


def single_file_table(unet: Config, vae: Config, text: Config) -> dict[tuple[str, str], str]:
    """From (component, diffusers key) to the whole key in the single file."""
    configs = {"unet": unet, "vae": vae, "text_encoder": text}
    return {(part, key): full for part, key, full, _, _ in _entries(configs)}


def _entries(
    configs: Mapping[str, Config],
) -> Iterator[tuple[str, str, str, tuple[int, ...], tuple[int, ...]]]:
    for component, prefix in PREFIXES.items():
        for key, (ldm, shape, file_shape) in _tensors(component, configs[component]).items():
            yield component, key, prefix + ldm, shape, file_shape


def file_shapes(configs: Mapping[str, Config]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the single file, by its whole key."""
    return {full: file_shape for _, _, full, _, file_shape in _entries(configs)}


def module_names(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Canonical names, with component, of the layers that a LoRA can adapt in U-Net and text encoder."""
    return tuple(
        f"{component}.{layer.name}"
        for component in ("unet", "text_encoder")
        for layer in LAYERS[component](configs[component])
        if layer.adaptable
    )


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
    entries = {(part, key): (full, (shape,), target) for part, key, full, shape, target in _entries(configs)}
    return _renamed(given, entries, lambda name: ".".join(name))


def from_single_file(tensors: Mapping[str, Tensor], configs: Mapping[str, Config]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `to_single_file`; schedules, averages and buffers in the file are left out.

    Raises:
        UserError: a key is not of the configurations' table, missing, or of another shape.
    """
    given = {key: value for key, value in tensors.items() if not key.startswith(IGNORED)}
    entries = {
        full: ((part, key), (file_shape, shape), shape) for part, key, full, shape, file_shape in _entries(configs)
    }
    components: dict[str, dict[str, Tensor]] = {component: {} for component in PREFIXES}
    for (component, key), value in _renamed(given, entries, str).items():
        components[component][key] = value
    return components


def _renamed(
    given: Mapping[Old, Tensor],
    entries: Mapping[Old, tuple[New, tuple[tuple[int, ...], ...], tuple[int, ...]]],
    told: Callable[[Old], str],
) -> dict[New, Tensor]:
    """Every tensor under its new name; `entries` has the name, the shapes taken and the new shape."""
    if unknown := [told(key) for key in given if key not in entries]:
        raise UserError(f"the key {unknown[0]!r} is not part of this architecture ({len(unknown)} such keys)")
    if missing := [told(key) for key in entries if key not in given]:
        raise UserError(f"the key {missing[0]!r} is missing ({len(missing)} such keys); the weights are not complete")
    renamed = {}
    for key, (new, taken, shape) in entries.items():
        if tuple(given[key].shape) not in taken:
            raise UserError(f"{told(key)!r} has shape {tuple(given[key].shape)}; this architecture has {taken[0]}")
        renamed[new] = given[key].reshape(shape)
    return renamed


def _canonical(component: str, state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return canonical_text_keys(state_dict) if component == "text_encoder" else state_dict


def canonical_text_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict with the text_model level that files have, without position_ids."""
    return {canonical_text_name(key): value for key, value in state_dict.items() if not key.endswith(POSITION_IDS)}


def canonical_text_name(name: str) -> str:
    """A text encoder's module or key name with the text_model level, which transformers 5 left out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def module_text_keys(state_dict: Mapping[str, Tensor], module_keys: Iterable[str]) -> dict[str, Tensor]:
    """A CLIP text encoder's state dict under the keys of a live module, whichever transformers made it.

    Keys that the module does not have keep their canonical name, so that loading them strictly tells.
    """
    own = {canonical_text_name(key): key for key in module_keys}
    return {own.get(key, key): value for key, value in canonical_text_keys(state_dict).items()}


@cache
def _architectures() -> dict[str, dict[str, dict[str, Any]]]:
    folders = sorted(path for path in (Path(__file__).parent / "configs").iterdir() if path.is_dir())
    return {
        folder.name: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    }


def architectures() -> dict[str, dict[str, dict[str, Any]]]:
    """The known architectures: name -> component (unet, vae, text_encoder, scheduler) -> configuration."""
    copied: dict[str, dict[str, dict[str, Any]]] = json.loads(json.dumps(_architectures()))
    return copied


def detect(header: Header) -> str | None:
    """The known architecture whose every tensor is in the file with its shape, or None."""
    found = {key: info.shape for key, info in header.tensors.items()}
    for name, configs in _architectures().items():
        entries = ((full, shape, file_shape) for _, _, full, shape, file_shape in _entries(configs))
        if all(found.get(full) in (shape, file_shape) for full, shape, file_shape in entries):
            return name
    return None


def describe_unsupported(header: Header) -> str | None:
    """What a file is that `detect` does not know, in words for a message, or None if its keys do not tell."""
    keys = header.tensors.keys()
    for words, parts in UNSUPPORTED:
        if any(part in key for key in keys for part in parts):
            return words
    if CONV_IN in keys and (channels := header.tensors[CONV_IN].shape[1:2]) not in ((4,), ()):
        return f"a Stable Diffusion checkpoint whose U-Net takes {channels[0]} channels (inpainting or editing)"
    return _incomplete(keys)


def _incomplete(keys: Collection[str]) -> str | None:
    has = {component: any(key.startswith(prefix) for key in keys) for component, prefix in PREFIXES.items()}
    if not has["unet"] and any("decoder.conv_in." in key for key in keys):
        return "a VAE alone"
    if has["unet"] and not all(has.values()):
        lacking = ", ".join(component for component, there in has.items() if not there)
        return f"a checkpoint that is not complete: it has no {lacking}"
    return None
