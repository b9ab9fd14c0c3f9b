"""Bases on disk, read: found by name, told by what is in them, loaded from safetensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.architectures import layout_kind
from loratune.families.found import (
    CONFIGS_KEY,
    WEIGHTS,
    Configs,
    configs_of_file,
    find_base,
    folder_configs,
    is_inpainting,
    told_schedule,
)
from loratune.families.pipelines import Pipeline, layer_names, lora_metadata, pipeline_of
from loratune.families.save import (
    configs_of,
    is_text,
    save_diffusers_folder,
    save_single_file,
    weights_of,
    without_private,
    write_folder,
    write_single_file,
)
from loratune.families.sd import TOKENIZER, StableDiffusion
from loratune.families.single_file import canonical_keys, from_single_file, module_text_keys
from loratune.formats.files import read_tensors, sha256_file
from loratune.formats.headers import read_header

__all__ = [
    "base_hash",
    "build",
    "configs_of",
    "layer_names",
    "load_family",
    "lora_metadata",
    "pipeline_of",
    "read_folder",
    "read_single_file",
    "save_diffusers_folder",
    "save_single_file",
    "tokenizers_of",
    "weights_of",
    "without_weights",
    "write_folder",
    "write_single_file",
]

# Of SD 2.x: predicting v leaves it with a wider spread than predicting eps does. A rule that others use too.
TELLING = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V_SPREAD = 0.09
_WITHOUT_WEIGHTS = ContextVar("without_weights", default=False)


def base_hash(name: str) -> str:
    """sha256, in hex, of a single file (as sd-scripts hashes models) or of the file with a folder's U-Net.

    "" for a name that stands for nothing on disk, such as that of a base made in code.
    """
    try:
        path = find_base(name)
    except UserError:
        return ""
    file = path / "unet" / WEIGHTS["unet"] if path.is_dir() else path
    if not file.is_file():
        return ""
    told = file.stat()
    return _hash(file, told.st_size, told.st_mtime_ns)


@lru_cache(maxsize=8)
def _hash(file: Path, size: int, changed: int) -> str:
    """A file's hash, taken anew when its size (bytes) or its time of change (ns) is another."""
    return sha256_file(file)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it `load_family` reads no weights: bases are built on the meta device, with shapes and no numbers."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def load_family(name: str, dtype: torch.dtype = torch.float32, exact: Collection[str] = ()) -> StableDiffusion:
    """A base by name, with its weights in `dtype` but the `exact` components in float32, to train or draw with.

    Raises:
        UserError: no such base, not safetensors, damaged, or of a family that is not supported.
    """
    path = find_base(name)
    configs = configs_of_file(path)
    if is_inpainting(configs):
        what = "an inpainting model (its U-Net takes 9 channels), which can be merged and inspected"
        raise UserError(f"{name}: {what}, but not trained or drawn with here; give a base that is none")
    if _WITHOUT_WEIGHTS.get():
        return build(configs, None, tokenizers_of(path, pipeline_of(configs)), dtype, name, exact)
    configs, weights = read_folder(path) if path.is_dir() else read_single_file(path)
    return build(configs, weights, tokenizers_of(path, pipeline_of(configs)), dtype, name, exact)


def tokenizers_of(path: Path, pipeline: Pipeline) -> dict[str, CLIPTokenizer]:
    """The base's own tokenizers by name, each CLIP's where it carries none."""
    return {
        name: CLIPTokenizer.from_pretrained(path / name)
        if (path / name / "vocab.json").is_file()
        else CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
        for name, pad in pipeline.tokenizers.items()
    }


def read_folder(folder: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a diffusers folder, by component, under today's names.

    Raises:
        UserError: a file of it is missing, damaged or of a kind that is not supported.
    """
    configs = folder_configs(folder)
    parts = pipeline_of(configs).parts
    return configs, {part: canonical_keys(part, read_tensors(folder / part / WEIGHTS[part])) for part in parts}


def read_single_file(path: Path) -> tuple[Configs, dict[str, dict[str, Tensor]]]:
    """Configurations and weights of a single-file checkpoint, by component; its keys and shapes tell its kind.

    Raises:
        UserError: it is no checkpoint that is known, or damaged.
    """
    configs = configs_of_file(path)
    _tell_prediction(path, configs)
    return configs, from_single_file(read_tensors(path), configs, path)


def _tell_prediction(path: Path, configs: Configs) -> None:
    """Put into the configurations what an SD 2.x file predicts, where its header does not say: eps or v.

    One U-Net serves both, eps at 512 pixels and v at 768.
    """
    header = read_header(path)
    said = CONFIGS_KEY in header.metadata or "prediction_type" in told_schedule(header)
    if layout_kind(configs) != "sd2" or is_inpainting(configs):
        return
    if not said and read_tensors(path, [TELLING])[TELLING].double().std(correction=0) > V_SPREAD:
        configs["scheduler"]["prediction_type"] = "v_prediction"
    if configs["scheduler"].get("prediction_type") == "v_prediction" and CONFIGS_KEY not in header.metadata:
        configs["unet"]["sample_size"] = 96


def build(
    configs: Configs,
    weights: Mapping[str, Mapping[str, Tensor]] | None,
    tokenizers: Mapping[str, CLIPTokenizer],
    dtype: torch.dtype = torch.float32,
    source: str = "",
    exact: Collection[str] = (),
) -> StableDiffusion:
    """A base from configurations and weights; every weight must fit and none may be missing.

    Without weights it is on the meta device.

    Raises:
        UserError: one does not, or is missing.
    """
    pipeline = pipeline_of(configs)
    parts = {}
    for name, kind in pipeline.parts.items():
        with init_empty_weights(include_buffers=False):  # no memory, and no random numbers, for what is replaced
            module = _new(name, kind, configs[name])
        own = torch.float32 if name in (*pipeline.float32, *exact) else dtype
        parts[name] = module
        if weights is None:
            module.to(own)
            continue
        found = {key: value.to(own, copy=True) for key, value in weights[name].items()}
        if is_text(name):
            found = module_text_keys(found, module.state_dict().keys())
        try:
            module.load_state_dict(found, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{source}: the weights of its {name} do not fit its configuration: {reason}") from None
    return pipeline.family(**parts, **tokenizers, scheduler_config=configs["scheduler"], source=source)


def _new(name: str, kind: Any, config: dict[str, Any]) -> Any:
    plain = without_private(config)
    return kind(CLIPTextConfig(**plain)) if is_text(name) else kind.from_config(plain)
