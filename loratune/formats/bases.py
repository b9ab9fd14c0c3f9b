"""Bases by name: where they lie, what they are, told from headers and configurations, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.formats.architectures import architectures, describe_unsupported, detect
from loratune.formats.headers import PICKLE_SUFFIXES, read_header

ASSETS = Path(__file__).parent.parent / "assets"
CONFIGS_KEY = "loratune.configs"
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
Configs = dict[str, dict[str, Any]]
"""Configurations by component, the scheduler's among them; `model_index` has the pipeline's `_class_name`."""


# The components with weights in a diffusers folder of each pipeline class.
PIPELINE_PARTS = {
    "StableDiffusionPipeline": ("unet", "vae", "text_encoder"),
    "StableDiffusionXLPipeline": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


def builtin_names() -> list[str]:
    """Names of the embedded bases."""
    return sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))


def find_base(name: str) -> Path:
    """The folder or file that a base's name stands for.

    Args:
        name: `builtin:NAME`, a diffusers folder, a `.safetensors` file, or a hub id such as `owner/model`.

    Raises:
        UserError: there is no such base, or it is a pickle.
    """
    if name.startswith("builtin:"):
        folder = ASSETS / name.removeprefix("builtin:")
        if name.removeprefix("builtin:") not in builtin_names():
            raise UserError(f"base {name}: there is no such embedded base; there is {builtin_names()}")
        return folder
    path = Path(name).expanduser()
    if path.suffix in PICKLE_SUFFIXES:
        raise UserError(f"{path}: a pickle can run any code when it is opened; only .safetensors files are loaded")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise UserError(f"{path}: no model_index.json, so this is no diffusers folder")
    if path.exists():
        return path
    if path.suffix or path.is_absolute() or name.count("/") != 1:
        raise UserError(f"base {name}: no such file or folder (nor builtin:NAME, nor a hub id owner/model)")
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "unet/*.safetensors", "vae/*.safetensors", "text_encoder*/*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*.fp16.*", "*non_ema*"]))
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"base {name}: no such folder here, and the hub did not give it: {reason}") from error


def configs_of_file(path: Path) -> Configs:
    """The configurations of a base, read without its weights.

    Raises:
        UserError: it is no checkpoint that is known.
    """
    if path.is_dir():
        return folder_configs(path)
    header = read_header(path)
    if carried := header.metadata.get(CONFIGS_KEY):
        return dict(json.loads(carried))
    if found := detect(header):
        return architectures()[found]
    kind = describe_unsupported(header) or "not a checkpoint that is known here"
    raise UserError(f"{path}: {kind}; a base must be a Stable Diffusion 1.x checkpoint")


def folder_configs(folder: Path) -> Configs:
    """The configurations of a diffusers folder."""
    name = read_json(folder / "model_index.json").get("_class_name")
    if name not in PIPELINE_PARTS:
        raise UserError(f"{folder}: it is for {name}, which is not supported; there is {', '.join(PIPELINE_PARTS)}")
    configs = {"model_index": {"_class_name": name}}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    return configs | {part: read_json(folder / part / "config.json") for part in PIPELINE_PARTS[name]}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a base's folder.

    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the base is not complete") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
