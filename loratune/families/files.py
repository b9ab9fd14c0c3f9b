"""Bases on disk: found by name, loaded from safetensors, written as a diffusers folder or a single file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.sdxl import StableDiffusionXL
from loratune.families.stable_diffusion import TOKENIZER, StableDiffusion
from loratune.formats.architectures import module_names
from loratune.formats.bases import WEIGHTS, Configs, configs_of_file, find_base, folder_configs, read_json
from loratune.formats.checkpoints import canonical_text_keys, from_single_file, module_text_keys
from loratune.formats.files import atomic_folder, read_tensors, sha256_file, write_safetensors


@dataclass(frozen=True)
class Pipeline:
    """What a diffusers folder of one pipeline class holds.

    Args:
        family: what is put together from it.
        parts: class of each component with weights, by its folder.
        tokenizers: the token that each tokenizer pads with, by its folder.
        index: what else is in its model_index.json.
        float32: components that are loaded in float32 whatever is asked for.
        original_layout: whether its single-file layout, and kohya's names that go with it, are known here.
        lora_metadata: how LoRA files for it say what they are for, as `standard_metadata` takes it.
    """

    family: type[StableDiffusion]
    parts: Mapping[str, Any]
    tokenizers: Mapping[str, str]
    index: Mapping[str, Any]
    float32: tuple[str, ...] = ()
    original_layout: bool = True
    lora_metadata: Mapping[str, str] = field(default_factory=dict)


_PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
_NONE = [None, None]
PIPELINES = {
    StableDiffusion.pipeline: Pipeline(
        StableDiffusion,
        _PARTS,
        {"tokenizer": "<|endoftext|>"},
        {"requires_safety_checker": False, "safety_checker": _NONE, "feature_extractor": _NONE},
    ),
    StableDiffusionXL.pipeline: Pipeline(
        StableDiffusionXL,
        {**_PARTS, "text_encoder_2": CLIPTextModelWithProjection},
        {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"},
        {"force_zeros_for_empty_prompt": True, "image_encoder": _NONE, "feature_extractor": _NONE},
        float32=("vae",),
        original_layout=False,
        lora_metadata={"base_model": "sdxl_base_v1-0", "architecture": "stable-diffusion-xl-v1-base/lora"},
    ),
}


def pipeline_of(configs: Configs) -> Pipeline:
    """What belongs to configurations; those of single files name no pipeline and are Stable Diffusion 1.x."""
    return PIPELINES[configs.get("model_index", {}).get("_class_name", StableDiffusion.pipeline)]


def layer_names(configs: Configs) -> tuple[str, ...]:
    """Canonical names of the layers that a LoRA can adapt, by which kohya's names are understood; () if unknown."""
    return module_names(configs) if pipeline_of(configs).original_layout else ()


def _is_text(component: str) -> bool:
    return component.startswith("text_encoder")


def base_hash(name: str) -> str:
    """sha256 of the file that holds a base's U-Net, as sd-scripts hashes models; "" for a base made in code."""
    try:
        path = find_base(name)
    except UserError:
        return ""
    return sha256_file(path / "unet" / WEIGHTS["unet"] if path.is_dir() else path)


def load_family(name: str, dtype: torch.dtype = torch.float32) -> StableDiffusion:
    """A base by name, with its weights in `dtype`.

    Raises:
        UserError: no such base, not safetensors, damaged, or of a family that is not supported.
    """
    path = find_base(name)
    configs, weights = read_folder(path) if path.is_dir() else read_single_file(path)
    return build(configs, weights, tokenizers_of(path, pipeline_of(configs)), dtype, source=name)


def tokenizers_of(path: Path, pipeline: Pipeline) -> dict[str, CLIPTokenizer]:
    """The base's own tokenizers by name, each CLIP's where it carries none."""
    return {
        name: CLIPTokenizer.from_pretrained(path / name)
        if (path / name / "vocab.json").is_file()
        else CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
        for name, pad in pipeline.tokenizers.items()
    }


def read_folder(folder: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a diffusers folder, by component; text keys in their canonical form."""
    configs = folder_configs(folder)
    weights = {part: read_tensors(folder / part / WEIGHTS[part]) for part in pipeline_of(configs).parts}
    return configs, _canonical_text(weights)


def _canonical_text(weights: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {part: canonical_text_keys(held) if _is_text(part) else held for part, held in weights.items()}


def read_single_file(path: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a single-file checkpoint, by component; its keys and shapes tell its kind."""
    configs = configs_of_file(path)
    return configs, from_single_file(read_tensors(path), configs)


def build(
    configs: Configs,
    weights: dict[str, dict[str, Tensor]],
    tokenizers: Mapping[str, CLIPTokenizer],
    dtype: torch.dtype = torch.float32,
    source: str = "",
) -> StableDiffusion:
    """A base from configurations and weights; every weight must fit and none may be missing."""
    pipeline = pipeline_of(configs)
    parts = {name: _empty(name, kind, configs[name]) for name, kind in pipeline.parts.items()}
    for name, module in parts.items():
        found = weights[name]
        if _is_text(name):
            found = module_text_keys(found, module.state_dict().keys())
        try:
            module.load_state_dict(found)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{source}: the weights of its {name} do not fit its configuration: {reason}") from None
        module.to(torch.float32 if name in pipeline.float32 else dtype)
    return pipeline.family(**parts, **tokenizers, scheduler_config=configs["scheduler"], source=source)


def _empty(name: str, kind: Any, config: dict[str, Any]) -> Any:
    """A component with the weights it is born with."""
    plain = _without_private(config)
    return kind(CLIPTextConfig(**plain)) if _is_text(name) else kind.from_config(plain)


def _without_private(config: dict[str, Any]) -> dict[str, Any]:
    dropped = (
        "_class_name",
        "_diffusers_version",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
    )
    return {key: value for key, value in config.items() if key not in (*dropped, "architectures", "model_type")}


def configs_of(family: StableDiffusion) -> Configs:
    """The configurations of a base, as JSON can hold them."""
    configs: Configs = {"model_index": {"_class_name": family.pipeline}}
    configs["scheduler"] = {**family.scheduler_config, "_class_name": "DDIMScheduler"}
    for name, module in family.components().items():
        config: Any = module.config
        raw = config.to_diff_dict() if _is_text(name) else dict(config)
        configs[name] = json.loads(json.dumps(_without_private(raw), default=list))
    return configs


def weights_of(family: StableDiffusion, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The weights of a base by component, rounded to `dtype`, text keys in their canonical form."""
    weights = {
        name: {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
        for name, module in family.components().items()
    }
    return _canonical_text(weights)


def save_diffusers_folder(family: StableDiffusion, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty.
    """
    write_folder(folder, configs_of(family), weights_of(family, dtype))


def write_folder(folder: Path, configs: Configs, weights: dict[str, dict[str, Tensor]]) -> None:
    """Write configurations and weights as a diffusers folder, whole or not at all."""
    pipeline = pipeline_of(configs)
    with atomic_folder(folder) as temporary:
        for name, kind in pipeline.parts.items():
            (temporary / name).mkdir(parents=True)
            marks = {"architectures": [kind.__name__], "model_type": "clip_text_model"}
            marked = (marks if _is_text(name) else {"_class_name": kind.__name__}) | configs[name]
            _write_json(temporary / name / "config.json", marked)
            write_safetensors(temporary / name / WEIGHTS[name], weights[name], {"format": "pt"})
        _write_json(temporary / "scheduler" / "scheduler_config.json", configs["scheduler"])
        for name, pad in pipeline.tokenizers.items():
            _write_tokenizer(temporary / name, pad)
        _write_json(temporary / "model_index.json", _model_index(pipeline))


def _write_tokenizer(folder: Path, pad: str) -> None:
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "tokenizer_config.json")
    _write_json(folder / "tokenizer_config.json", config | {"pad_token": pad})


def _model_index(pipeline: Pipeline) -> dict[str, Any]:
    index = {"_class_name": pipeline.family.pipeline, "scheduler": ["diffusers", "DDIMScheduler"], **pipeline.index}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in pipeline.tokenizers}
    libraries = {name: "transformers" if _is_text(name) else "diffusers" for name in pipeline.parts}
    return index | {name: [libraries[name], kind.__name__] for name, kind in pipeline.parts.items()}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
