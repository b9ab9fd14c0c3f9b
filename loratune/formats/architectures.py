"""Which tensors a checkpoint of a known architecture has, under which names; read off headers, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from loratune.formats.headers import Header
from loratune.formats.layouts import Config, Layer, text_layers, unet_layers, vae_layers

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
    return {(part, key): full for part, key, full, _, _ in entries(configs)}


def entries(
    configs: Mapping[str, Config],
) -> Iterator[tuple[str, str, str, tuple[int, ...], tuple[int, ...]]]:
    """Component, diffusers key, the single file's whole key, the shape in the module and in the file."""
    for component, prefix in PREFIXES.items():
        for key, (ldm, shape, file_shape) in _tensors(component, configs[component]).items():
            yield component, key, prefix + ldm, shape, file_shape


@dataclass(frozen=True)
class Place:
    """Where a component's tensor lies in the single file.

    Args:
        key: the file's tensor, whole.
        shape: of the file's tensor.
        rows: the part of the file's tensor that it is, [start, stop) of the first dimension; None for all of it
            (OpenCLIP keeps q, k and v in one).
        transposed: whether the file has it with rows and columns changed.
    """

    key: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    transposed: bool = False


def places(configs: Mapping[str, Config]) -> dict[str, Place]:
    """Where every tensor lies in the single file, by canonical name with component (`unet.conv_in.weight`)."""
    return {f"{part}.{key}": Place(full, file_shape) for part, key, full, _, file_shape in entries(configs)}


def original_names(configs: Mapping[str, Config]) -> dict[str, str]:
    """The original layout's name, without prefix, of every layer of the U-Net by its canonical one.

    `unet.down_blocks.0.attentions.0.proj_in` is `input_blocks.1.1.proj_in`.
    """
    return {f"unet.{layer.name}": layer.ldm for layer in LAYERS["unet"](configs["unet"])}


def file_shapes(configs: Mapping[str, Config]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the single file, by its whole key."""
    return {full: file_shape for _, _, full, _, file_shape in entries(configs)}


def module_names(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Canonical names, with component, of the layers that a LoRA can adapt in U-Net and text encoder."""
    return tuple(
        f"{component}.{layer.name}"
        for component in ("unet", "text_encoder")
        for layer in LAYERS[component](configs[component])
        if layer.adaptable
    )


def canonical_text_name(name: str) -> str:
    """A text encoder's module or key name with the text_model level, which transformers 5 left out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


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
        told = ((full, shape, file_shape) for _, _, full, shape, file_shape in entries(configs))
        if all(found.get(full) in (shape, file_shape) for full, shape, file_shape in told):
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
