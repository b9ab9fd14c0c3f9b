"""Which tensors a checkpoint of a known architecture has, under which names; read off headers, without torch.

The original single-file layout has three kinds: sd1, sd2 (its text encoder under OpenCLIP's names) and sdxl (both).
Inpainting variants differ in shapes alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from loratune.families.layout_text import open_clip_layers, open_clip_projected_layers, text_layers
from loratune.families.layout_unet import unet_layers
from loratune.families.layout_vae import vae_layers
from loratune.families.layouts import Config, Layer, Place, Shape
from loratune.families.unsupported import name_of_kind
from loratune.formats.headers import Header

__all__ = [
    "IGNORED",
    "PREFIXES",
    "Place",
    "architectures",
    "canonical_key",
    "canonical_text_name",
    "describe_unsupported",
    "detect",
    "entries",
    "file_shapes",
    "ignored",
    "layout_kind",
    "module_names",
    "original_names",
    "places",
    "title",
]

Layers = Callable[[Config], Iterator[Layer]]

_COMMON: dict[str, tuple[str, Layers]] = {
    "unet": ("model.diffusion_model.", unet_layers),
    "vae": ("first_stage_model.", vae_layers),
}
# By kind and component: what its keys in the single file begin with, and its layers.
LAYOUTS: dict[str, dict[str, tuple[str, Layers]]] = {
    "sd1": {**_COMMON, "text_encoder": ("cond_stage_model.transformer.", text_layers)},
    "sd2": {**_COMMON, "text_encoder": ("cond_stage_model.model.", open_clip_layers)},
    "sdxl": {
        **_COMMON,
        "text_encoder": ("conditioner.embedders.0.transformer.", text_layers),
        "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_projected_layers),
    },
}
PREFIXES = {kind: {part: prefix for part, (prefix, _) in parts.items()} for kind, parts in LAYOUTS.items()}
POSITION_IDS = "embeddings.position_ids"
# What diffusers called the parts of the VAE's attention until 2023; SD 1.x folders on the hub have them still.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What real files hold besides the weights, by the beginning of the key: schedules, averages, buffers, marks.
IGNORED = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "cond_stage_model.model.attn_mask",
    "cond_stage_model.model.logit_scale",
    "cond_stage_model.model.text_projection",
    "cond_stage_model.transformer.text_projection",
    f"cond_stage_model.transformer.text_model.{POSITION_IDS}",
    "conditioner.embedders.0.logit_scale",
    "conditioner.embedders.0.transformer.text_projection",
    f"conditioner.embedders.0.transformer.text_model.{POSITION_IDS}",
    "conditioner.embedders.1.model.attn_mask",
    "conditioner.embedders.1.model.logit_scale",
    "denoiser.",
    "embedding_manager.",
    "first_stage_model.loss.",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "lvlb_weights",
    "model_ema.",
    "posterior_",
    "scale_factor",
    "sqrt_",
    "v_pred",
    "ztsnr",
)
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
_VERSIONS = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


def layout_kind(configs: Mapping[str, Config]) -> str:
    """The kind of single-file layout that goes with configurations: sd1, sd2 or sdxl; by the U-Net's without others."""
    unet, text = configs["unet"], configs.get("text_encoder")
    if "text_encoder_2" in configs or unet.get("addition_embed_type") == "text_time":
        return "sdxl"
    is_sd2 = unet.get("use_linear_projection") if text is None else text.get("hidden_act") == "gelu"
    return "sd2" if is_sd2 else "sd1"


def title(configs: Mapping[str, Config]) -> str:
    """What a base with these configurations is called, for people."""
    inpainting = " (inpainting)" if configs["unet"].get("in_channels") == 9 else ""
    return f"{_VERSIONS[layout_kind(configs)]}{inpainting}"


def ignored(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Beginnings of the keys that files of this architecture may hold and that are no weights of it.

    SD 2.x reads the last layer but one of its text encoder: the last is in the file, and in no diffusers folder.
    """
    if layout_kind(configs) != "sd2":
        return IGNORED
    last = configs["text_encoder"]["num_hidden_layers"]
    return (*IGNORED, f"{PREFIXES['sd2']['text_encoder']}transformer.resblocks.{last}.")


def entries(configs: Mapping[str, Config]) -> Iterator[tuple[str, str, Shape, Place]]:
    """Every tensor of the components with a configuration: component, diffusers key, shape in the module, place in
    the single file.

    Raises:
        UserError: a configuration lacks a key or has a part that the original layout does not.
    """
    for component, (prefix, layers) in LAYOUTS[layout_kind(configs)].items():
        for layer in layers(configs[component]) if component in configs else ():
            for name, shape, place in layer.tensors():
                yield component, name, shape, replace(place, key=prefix + place.key)


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
    """The original layout's name, without prefix, of every layer of the U-Net by its canonical one.

    `unet.down_blocks.0.attentions.0.proj_in` is `input_blocks.1.1.proj_in`.
    """
    return {f"unet.{layer.name}": layer.ldm for layer in unet_layers(configs["unet"])}


def module_names(configs: Mapping[str, Config]) -> tuple[str, ...]:
    """Canonical names, with component, of the layers that a LoRA can adapt in U-Net and text encoders."""
    return tuple(
        f"{component}.{layer.name}"
        for component, (_, layers) in LAYOUTS[layout_kind(configs)].items()
        if component != "vae" and component in configs
        for layer in layers(configs[component])
        if layer.adaptable
    )


def canonical_text_name(name: str) -> str:
    """A text encoder's module or key name with the text_model level, which transformers 5 left out."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def canonical_key(component: str, key: str) -> str | None:
    """The name today of a key of a component's file in a diffusers folder; None for a buffer that is no weight."""
    if component.startswith("text_encoder"):
        return None if key.endswith(POSITION_IDS) else canonical_text_name(key)
    before, attention, part = key.partition(".mid_block.attentions.0.")
    if component != "vae" or not attention:
        return key
    name, dot, kind = part.partition(".")
    return f"{before}{attention}{OLD_VAE_ATTENTION.get(name, name)}{dot}{kind}"


@cache
def _architectures() -> dict[str, dict[str, dict[str, Any]]]:
    folders = sorted(path for path in (Path(__file__).parent / "configs").iterdir() if path.is_dir())
    return {
        folder.name: {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        for folder in folders
    }


def architectures() -> dict[str, dict[str, dict[str, Any]]]:
    """The known architectures: name -> component (unet, vae, text encoders, scheduler) -> configuration."""
    copied: dict[str, dict[str, dict[str, Any]]] = json.loads(json.dumps(_architectures()))
    return copied


@cache
def _taken(name: str) -> dict[str, tuple[Shape, ...]]:
    """The shapes that each tensor of an architecture may have in a file."""
    return {place.key: shapes_taken(shape, place) for _, _, shape, place in entries(_architectures()[name])}


def _telling(configs: Mapping[str, Config]) -> dict[str, Shape]:
    """A few tensors, known without the layers, that no other architecture has with these shapes."""
    kind, unet, text = layout_kind(configs), configs["unet"], configs["text_encoder"]
    words = "text_model.embeddings.token_embedding" if kind != "sd2" else "token_embedding"
    return {
        CONV_IN: (unet["block_out_channels"][0], unet["in_channels"], 3, 3),
        f"{PREFIXES[kind]['text_encoder']}{words}.weight": (text["vocab_size"], text["hidden_size"]),
    }


def detect(header: Header) -> str | None:
    """The known architecture whose every tensor is in the file with its shape, or None; dtypes do not matter."""
    tensors = header.tensors
    for name, configs in _architectures().items():
        if any(key not in tensors or tensors[key].shape != shape for key, shape in _telling(configs).items()):
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
    called, parts = title(_architectures()[name]), PREFIXES[layout_kind(_architectures()[name])]
    lacking = [part for part, prefix in parts.items() if not any(key.startswith(prefix) for key in tensors)]
    if lacking:
        return f"a {called} checkpoint that is not complete: it has no {' and no '.join(lacking)}"
    if missing := [key for key in _taken(name) if key not in tensors]:
        return f"nearly a {called} checkpoint: {missing[0]!r} is missing ({len(missing)} such keys)"
    wrong = [key for key, shapes in _taken(name).items() if tensors[key].shape not in shapes]
    if not wrong:
        return None
    shape, wanted = list(tensors[wrong[0]].shape), list(_taken(name)[wrong[0]][0])
    return f"nearly a {called} checkpoint: {wrong[0]!r} is {shape} instead of {wanted} ({len(wrong)} such keys)"
