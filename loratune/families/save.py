"""Bases written to disk: as a diffusers folder, or as a single file in the original layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from loratune.families.base_configs import CONFIGS_KEY
from loratune.families.family import Configs, Part, without_private
from loratune.families.known import family_of
from loratune.families.model import Model
from loratune.families.single_file import Weights, canonical_keys, to_single_file
from loratune.formats.files import atomic_folder, write_safetensors


def configs_of(model: Model) -> Configs:
    """The configurations of a model, as JSON can hold them."""
    configs: Configs = {"model_index": {"_class_name": model.family.pipeline}}
    configs["scheduler"] = {**model.scheduler_config, "_class_name": model.family.scheduler}
    for name, config in model.configs().items():
        raw = config.to_diff_dict() if hasattr(config, "to_diff_dict") else dict(config)
        configs[name] = json.loads(json.dumps(without_private(raw), default=list))
    return configs


def weights_of(model: Model, dtype: torch.dtype) -> dict[str, dict[str, Tensor]]:
    """The weights of a model by component, rounded to `dtype`, under their canonical keys."""
    return {
        name: canonical_keys(
            model.family.part(name),
            {key: value.detach().to("cpu", dtype).contiguous() for key, value in module.state_dict().items()},
        )
        for name, module in model.components().items()
    }


def save_diffusers_folder(model: Model, folder: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    write_folder(folder, configs_of(model), weights_of(model, dtype))


def save_single_file(model: Model, path: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a base as a single file in the original layout, whole or not at all.

    Raises:
        UserError: the file cannot be written, or the base has a part that the layout does not know.
    """
    write_single_file(path, configs_of(model), weights_of(model, dtype))


def write_single_file(
    path: Path, configs: Configs, weights: Weights, metadata: Mapping[str, str] | None = None
) -> None:
    """Write configurations and weights as a single file, whole or not at all.

    The configurations go into the metadata.

    Args:
        path: of the file.
        configs: of the base.
        weights: by component and diffusers key.
        metadata: more of it.
    """
    kind, family = configs["scheduler"].get("prediction_type", "epsilon"), family_of(configs)
    own = {
        "format": "pt",
        CONFIGS_KEY: json.dumps(configs),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.modelspec(configs),
        "modelspec.prediction_type": "v" if kind == "v_prediction" else kind,
    }
    tensors = to_single_file(weights, configs, path) | {key: torch.zeros(0) for key in family.marks(configs)}
    write_safetensors(path, tensors, own | dict(metadata or {}))


def write_folder(folder: Path, configs: Configs, weights: Weights) -> None:
    """Write configurations and weights as a diffusers folder, whole or not at all.

    Raises:
        UserError: the folder exists and is not empty, or cannot be written.
    """
    with atomic_folder(folder) as temporary:
        for part in family_of(configs).parts:
            write_safetensors(temporary / part.name / part.file, weights[part.name], {"format": "pt"})
        write_settings(temporary, configs)


def write_settings(folder: Path, configs: Configs) -> None:
    """Write everything of a diffusers folder but the weights: configurations, tokenizers, index."""
    family = family_of(configs)
    for part in family.parts:
        _write_json(folder / part.name / "config.json", _marks(part) | configs[part.name])
    _write_json(folder / "scheduler" / "scheduler_config.json", configs["scheduler"])
    for name in family.tokenizers:
        family.write_tokenizer(folder, name)
    _write_json(folder / "model_index.json", _model_index(configs))


def _marks(part: Part) -> dict[str, Any]:
    """How a component's configuration names its class."""
    if part.library != "transformers":
        return {"_class_name": part.class_name}
    return {"architectures": [part.class_name], "model_type": part.cls().config_class.model_type}


def _model_index(configs: Configs) -> dict[str, Any]:
    family = family_of(configs)
    version = {"_diffusers_version": diffusers.__version__}  # without it diffusers opens no inpainting pipeline
    index = {"_class_name": family.pipeline_of(configs), **version, "scheduler": ["diffusers", family.scheduler]}
    index |= {**family.model_index} | {name: ["transformers", family.tokenizer_class] for name in family.tokenizers}
    return index | {part.name: [part.library, part.class_name] for part in family.parts}


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
