"""The configurations of a base: of its folder, or by the header of its single file; without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.families.architectures import architectures, describe_unsupported, detect, layout_kind
from loratune.formats.headers import Header

CONFIGS_KEY = "loratune.configs"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
Configs = dict[str, dict[str, Any]]
"""Configurations by component, the scheduler's among them; `model_index` has the pipeline's `_class_name`."""

_SD, _XL = ("unet", "vae", "text_encoder"), ("unet", "vae", "text_encoder", "text_encoder_2")
# The components with weights in a diffusers folder of each pipeline class.
PIPELINE_PARTS = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionInpaintPipeline": _SD,
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL,
}
# What says where a configuration was saved and by whom, not what the model is.
PRIVATE = (
    "_class_name",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "model_type",
    "torch_dtype",
    "transformers_version",
)
SUPPORTED = "a base must be a Stable Diffusion 1.x, 2.x or XL checkpoint"
# What single files call the kinds of prediction, and what diffusers does.
PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


def file_configs(path: Path, header: Header) -> Configs:
    """The configurations of a single-file checkpoint, by its header.

    Raises:
        UserError: it is no checkpoint that is known.
    """
    if carried := header.metadata.get(CONFIGS_KEY):
        return _carried(path, carried)
    if name := detect(header):
        configs = architectures()[name]
        configs["scheduler"] |= stated_schedule(header)
        return configs | {"model_index": {"_class_name": pipeline_name(configs)}}
    kind = describe_unsupported(header) or "not a checkpoint that is known here"
    raise UserError(f"{path}: {kind}; {SUPPORTED}")


def _carried(path: Path, text: str) -> Configs:
    try:
        configs = json.loads(text)
        whole = all(isinstance(configs[part], dict) for part in (*_SD, "scheduler"))
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise UserError(f"{path}: its metadata {CONFIGS_KEY} is damaged; write the file again")
    return dict(configs)


def stated_schedule(header: Header) -> dict[str, Any]:
    """What a single file says of its noise schedule, as a diffusers scheduler has it; {} where it says nothing.

    Metadata by Stability's modelspec, or the empty tensors `v_pred` and `ztsnr` that SDXL files carry. With zero
    terminal SNR, drawing must start at the last step: trailing (Lin 2024).
    """
    told: dict[str, Any] = {}
    kind = "v" if "v_pred" in header.tensors else header.metadata.get("modelspec.prediction_type", "").lower()
    if kind in PREDICTIONS:
        told["prediction_type"] = PREDICTIONS[kind]
    if "ztsnr" in header.tensors:
        told |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return told


def pipeline_name(configs: Configs) -> str:
    """diffusers' class of pipeline for configurations; those of single files may not name one."""
    xl = "XL" if layout_kind(configs) == "sdxl" else ""
    inpaint = "Inpaint" if is_inpainting(configs) else ""
    return f"StableDiffusion{xl}{inpaint}Pipeline"


def is_inpainting(configs: Configs) -> bool:
    """Whether the U-Net takes a mask and a masked image beside x_t (9 channels)."""
    return bool(configs["unet"].get("in_channels") == 9)


def folder_configs(folder: Path) -> Configs:
    """The configurations of a diffusers folder; a part that the folder lacks has none.

    Raises:
        UserError: it is of a pipeline that is not supported, or a file of it is missing or no JSON.
    """
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINE_PARTS:
        raise UserError(f"{folder}: it is for {name}, which is not supported; there is {', '.join(PIPELINE_PARTS)}")
    configs = {"model_index": {"_class_name": name}}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    there = [part for part in PIPELINE_PARTS[name] if part == "unet" or (folder / part).is_dir()]
    return configs | {part: read_json(folder / part / "config.json") for part in there}


def parts_of(configs: Configs) -> tuple[str, ...]:
    """The components with weights that a base of this pipeline has when it is whole."""
    return PIPELINE_PARTS[pipeline_name(configs)]


def without_private(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's configuration as its constructor takes it."""
    return {key: value for key, value in config.items() if key not in PRIVATE}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a base's folder.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the base is not complete") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
