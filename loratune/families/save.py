"""Bases written to disk: as a diffusers folder, or as a single file in the original layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from loratune.families.architectures import layout_kind
from loratune.families.base_configs import CONFIGS_KEY, WEIGHTS, Configs, pipeline_name, read_json, without_private
from loratune.families.pipelines import Pipeline, modelspec_architecture, pipeline_of
from loratune.families.sd import TOKENIZER, StableDiffusion
from loratune.families.single_file import Weights, canonical_keys, to_single_file
from loratune.formats.files import atomic_folder, write_safetensors


def is_text(component: str) -> bool:
    """Whether a component is a text encoder."""
    return component.startswith("text_encoder")


def configs_of(family: StableDiffusion) -> Configs:
    """The configurations of a base, as JSON can hold them."""
    configs: Configs = {"model_index": {"_class_name": family.pipeline}}
    configs["scheduler"] = {**family.scheduler_config, "_class_name": "DDIMScheduler"}
    for name, module in family.components().items():
        config: Any = module.config
        raw = config.to_diff_dict() if is_text(name) else dict(config)
        configs[name] = json.loads(json.dumps(without_private(raw), default=list))
    return configs


def weights_of(family: StableDiffusion, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The weights of a base by component, rounded to `dtype`, text keys in their canonical form."""
    return {
        name: canonical_keys(
            name, {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()}
        )
        for name, module in family.components().items()
    }


def save_diffusers_folder(family: StableDiffusion, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    write_folder(folder, configs_of(family), weights_of(family, dtype))


def save_single_file(family: StableDiffusion, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a single file in the original layout, whole or not at all.

    Raises:
        UserError: the file cannot be written, or the base has a part that the layout does not know.
    """
    write_single_file(path, configs_of(family), weights_of(family, dtype))


def write_single_file(
    path: Path, configs: Configs, weights: Weights, metadata: Mapping[str, str] | None = None
) -> None:
    """Write configurations and weights as a single file, whole or not at all.

    The configurations go into the metadata. SDXL files say by empty tensors, which other programs read, that they
    predict v and that their schedule ends in pure noise.

    Args:
        path: of the file.
        configs: of the base.
        weights: by component and diffusers key.
        metadata: more of it.
    """
    scheduler = configs["scheduler"]
    kind = scheduler.get("prediction_type", "epsilon")
    marks = {"v_pred": kind == "v_prediction", "ztsnr": bool(scheduler.get("rescale_betas_zero_snr"))}
    told = {
        "format": "pt",
        CONFIGS_KEY: json.dumps(configs),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": modelspec_architecture(configs),
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
    }
    tensors = to_single_file(weights, configs, path)
    if layout_kind(configs) == "sdxl":
        tensors |= {key: torch.zeros(0) for key, marked in marks.items() if marked}
    write_safetensors(path, tensors, told | dict(metadata or {}))


def write_folder(folder: Path, configs: Configs, weights: Weights) -> None:
    """Write configurations and weights as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    pipeline = pipeline_of(configs)
    with atomic_folder(folder) as temporary:
        for name in pipeline.parts:
            write_safetensors(temporary / name / WEIGHTS[name], weights[name], {"format": "pt"})
        write_settings(temporary, configs)


def write_settings(folder: Path, configs: Configs) -> None:
    """Write everything of a diffusers folder but the weights: configurations, tokenizers, index."""
    pipeline = pipeline_of(configs)
    for name, kind in pipeline.parts.items():
        marks = {"architectures": [kind.__name__], "model_type": "clip_text_model"}
        marked = (marks if is_text(name) else {"_class_name": kind.__name__}) | configs[name]
        _write_json(folder / name / "config.json", marked)
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    for name, pad in pipeline.tokenizers.items():
        _write_tokenizer(folder / name, pad)
    _write_json(folder / "model_index.json", _model_index(pipeline, pipeline_name(configs)))


def _write_tokenizer(folder: Path, pad: str) -> None:
    folder.mkdir()
    for file in TOKENIZER.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = read_json(folder / "tokenizer_config.json")
    _write_json(folder / "tokenizer_config.json", config | {"pad_token": pad})


def _model_index(pipeline: Pipeline, name: str) -> dict[str, Any]:
    version = {"_diffusers_version": diffusers.__version__}  # without it diffusers opens no inpainting pipeline
    index = {"_class_name": name, **version, "scheduler": ["diffusers", "DDIMScheduler"], **pipeline.index}
    index |= {name: ["transformers", "CLIPTokenizer"] for name in pipeline.tokenizers}
    libraries = {name: "transformers" if is_text(name) else "diffusers" for name in pipeline.parts}
    return index | {name: [libraries[name], kind.__name__] for name, kind in pipeline.parts.items()}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
