"""What belongs to each kind of Stable Diffusion: its family, its parts, its tokenizers, its names in metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from loratune.families.architectures import layout_kind
from loratune.families.base_configs import Configs
from loratune.families.sd import StableDiffusion
from loratune.families.sdxl import StableDiffusionXL


@dataclass(frozen=True)
class Pipeline:
    """What a base of one kind is put together from, in memory and in a diffusers folder.

    Args:
        family: what is put together.
        parts: class of each component with weights, by its folder.
        tokenizers: the token that each tokenizer pads with, by its folder.
        index: what else is in its model_index.json.
        float32: components that are loaded in float32 whatever is asked for.
    """

    family: type[StableDiffusion]
    parts: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    index: Mapping[str, Any]
    float32: tuple[str, ...] = ()


_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_NONE = [None, None]
_SD1 = Pipeline(
    StableDiffusion,
    _PARTS,
    {"tokenizer": "<|endoftext|>"},
    {"requires_safety_checker": False, "safety_checker": _NONE, "feature_extractor": _NONE},
)
# OpenCLIP was trained with text padded by the token 0, which is "!".
PIPELINES = {
    "sd1": _SD1,
    "sd2": replace(_SD1, tokenizers={"tokenizer": "!"}),
    "sdxl": Pipeline(
        StableDiffusionXL,
        {**_PARTS, "text_encoder_2": CLIPTextModelWithProjection},
        {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        {"force_zeros_for_empty_prompt": True, "image_encoder": _NONE, "feature_extractor": _NONE},
        float32=("vae",),
    ),
}


def pipeline_of(configs: Configs) -> Pipeline:
    """What belongs to configurations."""
    return PIPELINES[layout_kind(configs)]


def modelspec_architecture(configs: Configs) -> str:
    """Stability's modelspec name of an architecture; a LoRA's has `/lora` after it."""
    v = configs["scheduler"].get("prediction_type") == "v_prediction"
    sd2 = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    names = {"sd1": "stable-diffusion-v1", "sd2": sd2, "sdxl": "stable-diffusion-xl-v1-base"}
    return names[layout_kind(configs)]


def lora_metadata(configs: Configs) -> dict[str, str]:
    """How LoRA files for a base say what they are for, as `standard_metadata` takes it."""
    v = configs["scheduler"].get("prediction_type") == "v_prediction"
    names = {"sd1": "sd_v1", "sd2": "sd_v2_v" if v else "sd_v2", "sdxl": "sdxl_base_v1-0"}
    architecture = f"{modelspec_architecture(configs)}/lora"
    return {"base_model": names[layout_kind(configs)], "architecture": architecture}
