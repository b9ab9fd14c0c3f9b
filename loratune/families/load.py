"""Bases made ready to train or to sample: built from configurations, with weights or on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from loratune.errors import UserError
from loratune.families.base import Base
from loratune.families.family import Configs, Family
from loratune.families.known import family_of
from loratune.families.model import Model
from loratune.families.single_file import module_keys

_WITHOUT_WEIGHTS = ContextVar("without_weights", default=False)


@contextmanager
def without_weights() -> Iterator[None]:
    """Within it `load_model` reads no weights: bases are built on the meta device, with shapes and no numbers."""
    token = _WITHOUT_WEIGHTS.set(True)
    try:
        yield
    finally:
        _WITHOUT_WEIGHTS.reset(token)


def load_model(name: str, dtype: torch.dtype = torch.float32, vae_exact: bool = False) -> Model:
    """A base by name, with its weights in `dtype`, the VAE's with `vae_exact` in float32, to train or sample.

    Raises:
        UserError: no such base, not safetensors, damaged, not whole, or of a family that is not supported.
    """
    base = Base.open(name)
    if base.variant != "text to image":
        what = f"an {base.variant} model can be merged and inspected, but is not trained or drawn with here"
        raise UserError(f"{name}: {what}; give a base for text to image")
    base.require_whole("training or sampling")
    weights = None if _WITHOUT_WEIGHTS.get() else base.weights()
    return build(base.configs, weights, tokenizers_of(base.path, base.family), dtype, name, vae_exact)


def tokenizers_of(path: Path, family: Family) -> dict[str, Any]:
    """The base's tokenizers by name."""
    return {name: family.load_tokenizer(path, name) for name in family.tokenizers}


def build(
    configs: Configs,
    weights: Mapping[str, Mapping[str, Tensor]] | None,
    tokenizers: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
    source: str = "",
    vae_exact: bool = False,
) -> Model:
    """A base from configurations and weights; every weight must fit and none may be missing.

    Without weights it is on the meta device.

    Raises:
        UserError: one does not, or is missing.
    """
    family, modules = family_of(configs), {}
    for part in family.parts:
        with init_empty_weights(include_buffers=False):  # no memory, and no random numbers, for what is replaced
            module = modules[part.name] = part.new(configs[part.name])
        own = torch.float32 if part.float32 or (vae_exact and part.role == "vae") else dtype
        if weights is None:
            module.to(own)
            continue
        state = {key: value.to(own, copy=True) for key, value in weights[part.name].items()}
        try:
            module.load_state_dict(module_keys(part, state, module.state_dict().keys()), assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            what = f"the weights of its {part.name} do not fit its configuration"
            raise UserError(f"{source}: {what}: {reason}") from None
    return Model(family, modules, configs["scheduler"], tokenizers, source)
