"""Bases made ready to train or to draw with: built from configurations, with weights or on the meta device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

from loratune.errors import UserError
from loratune.families.base import Base
from loratune.families.base_configs import Configs, without_private
from loratune.families.pipelines import Pipeline, pipeline_of
from loratune.families.save import is_text
from loratune.families.sd import TOKENIZER, StableDiffusion
from loratune.families.single_file import module_text_keys

_WITHOUT_WEIGHTS = ContextVar("without_weights", default=False)


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
        UserError: no such base, not safetensors, damaged, not whole, or of a family that is not supported.
    """
    base = Base.open(name)
    if base.inpainting:
        what = "an inpainting model (its U-Net takes 9 channels), which can be merged and inspected"
        raise UserError(f"{name}: {what}, but not trained or drawn with here; give a base that is none")
    base.require_whole("training or drawing")
    weights = None if _WITHOUT_WEIGHTS.get() else base.weights()
    tokenizers = tokenizers_of(base.path, pipeline_of(base.configs))
    return build(base.configs, weights, tokenizers, dtype, name, exact)


def tokenizers_of(path: Path, pipeline: Pipeline) -> dict[str, CLIPTokenizer]:
    """The base's own tokenizers by name, each CLIP's where it carries none."""
    return {
        name: CLIPTokenizer.from_pretrained(path / name)
        if (path / name / "vocab.json").is_file()
        else CLIPTokenizer.from_pretrained(TOKENIZER, pad_token=pad)
        for name, pad in pipeline.tokenizers.items()
    }


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
        state = {key: value.to(own, copy=True) for key, value in weights[name].items()}
        if is_text(name):
            state = module_text_keys(state, module.state_dict().keys())
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"{source}: the weights of its {name} do not fit its configuration: {reason}") from None
    return pipeline.family(**parts, **tokenizers, scheduler_config=configs["scheduler"], source=source)


def _new(name: str, kind: Any, config: dict[str, Any]) -> Any:
    plain = without_private(config)
    return kind(CLIPTextConfig(**plain)) if is_text(name) else kind.from_config(plain)
