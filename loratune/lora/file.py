"""LoRA files: the layers in memory, read in every format of `lora_names.TABLES`, written in peft's and kohya's."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.formats.files import data_hash, read_header, read_tensors, write_safetensors
from loratune.lora.keys import LayerKeys, describe_keys
from loratune.lora.layers import LoHaLayer, LoKrLayer, LoRALayer, LowRank
from loratune.lora.metadata import (
    ADAPTER_METADATA,
    PADDING_KEY,
    PEFT_NAMED,
    padded_layers,
    standard_metadata,
    stored_alpha,
)
from loratune.lora.names import COMPONENTS, detect_format
from loratune.lora.write import kohya_tensors, peft_tensors, refuse_not_finite

__all__ = ["Format", "LoRAFile", "detect_format", "read_lora", "standard_metadata", "write_lora"]

log = logging.getLogger(__name__)
Format = Literal["peft", "kohya"]
# Metadata of the file as it is, not of the LoRA: hashes of its bytes are true of no other file.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
OURS = (ADAPTER_METADATA, PADDING_KEY, "format", *HASHES)
KINDS: dict[str, Any] = {kind.kind: kind for kind in (LoRALayer, LoHaLayer, LoKrLayer)}


@dataclass
class LoRAFile:
    """A LoRA.

    Args:
        layers: by canonical module name with component, such as
            `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q` or
            `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
        metadata: the file's free text, without what belongs to the format or to the file's very bytes.
        tokens: learned tokens that came with it, (vectors, width) by name.
    """

    layers: Mapping[str, LowRank]
    metadata: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)


def write_lora(path: Path | str, lora: LoRAFile, format: Format = "peft", dtype: torch.dtype | None = None) -> None:
    """Write a LoRA, whole or not at all; learned tokens each into a file of its own beside it.

    Args:
        path: of the file.
        lora: what is written.
        format: peft, which diffusers calls its own, or kohya, which all others read. kohya's alphas are made
            one for all layers, as readers take one: the rest of a layer's scale goes into its B.
        dtype: of the tensors; None keeps theirs.

    Raises:
        UserError: a value is not finite (in that dtype), or the format cannot hold it exactly.
    """
    if not lora.layers:
        raise UserError(f"{path}: there is no layer to write; nothing was adapted")
    layers = dict(sorted(lora.layers.items()))
    if unknown := [name for name in layers if name.split(".")[0] not in COMPONENTS]:
        raise ValueError(f"the layer {unknown[0]!r} must begin with one of {COMPONENTS}")
    own = {key: value for key, value in lora.metadata.items() if key not in OURS}
    try:
        written = kohya_tensors(layers, own, dtype) if format == "kohya" else peft_tensors(layers, dtype)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    tensors, told = written
    refuse_not_finite(path, layers, tensors)
    for token, vectors in lora.tokens.items():
        write_safetensors(token_path(path, token), {token: vectors}, {"format": "pt"})
    write_safetensors(path, tensors, {**own, **told, **_hashes(tensors), "format": "pt"})


def _hashes(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The hash of the data section, as Stability's modelspec and sd-scripts write it."""
    digest = data_hash(tensors)
    return {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}


def token_path(path: Path | str, token: str) -> Path:
    """Where a learned token of a LoRA is written: readers take the name of its file for the word."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.-]', '', token) or 'token'}.safetensors")


def read_lora(path: Path | str, names: Iterable[str] = (), check_finite: bool = True) -> LoRAFile:
    """Read a LoRA in any format of `lora_names.TABLES`.

    Learned tokens in it are kept apart (`LoRAFile.tokens`) and told in a warning.

    Args:
        path: of the file.
        names: canonical names, with component, of an architecture's layers that is not known here; kohya's
            names cannot be read back without them.
        check_finite: whether values that are not finite are an error.

    Raises:
        UserError: the file cannot be read, is of another kind (named), has a key that does not map, lacks
            one of a pair, or holds values that are not finite.
    """
    header = read_header(path)
    described = describe_keys(header, names)
    for key, reason in described.unmapped.items():
        raise UserError(f"{path}: {key!r} {reason}")
    tensors = read_tensors(path)
    for key, tensor in tensors.items():
        _check_values(path, key, tensor, check_finite)
    layers = {
        name: _layer(path, name, keys, tensors, _Source(described.format, header.metadata))
        for name, keys in described.layers.items()
    }
    for name in padded_layers(header.metadata):
        if name in layers and not any(bool(tensor.any()) for tensor in layers[name].tensors().values()):
            del layers[name]
    if not layers:
        raise UserError(f"{path}: there is no layer in it; is it a LoRA?")
    if described.tokens:
        told = "learned tokens are no part of the LoRA's layers; convert writes them to files of their own"
        log.warning("%s: its %s: %s", path, told, ", ".join(described.tokens))
    metadata = {key: value for key, value in header.metadata.items() if key not in OURS}
    return LoRAFile(layers, metadata, {key: tensors[key] for key in described.tokens})


@dataclass(frozen=True)
class _Source:
    format: str
    metadata: Mapping[str, str]


def _check_values(path: Path | str, key: str, tensor: Tensor, finite: bool) -> None:
    if not tensor.is_floating_point() and not key.endswith(".alpha"):
        raise UserError(f"{path}: {key!r} holds {tensor.dtype}; a LoRA holds floating point numbers")
    if finite and not torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all():
        raise UserError(f"{path}: {key!r} has values that are not finite; the LoRA is damaged, train it again")


def _layer(path: Path | str, name: str, keys: LayerKeys, tensors: Mapping[str, Tensor], source: _Source) -> LowRank:
    held = {part.field: tensors[key] for part, key in keys.keys.items()}
    given = held.pop("alpha", None)
    if given is not None and given.numel() != 1:
        raise UserError(f"{path}: '{keys.raw}.alpha' has shape {tuple(given.shape)}; it must be one number")
    try:
        stored = stored_alpha(path, name, keys.rank or 0, source.format, source.metadata) if given is None else given
        alpha = float(stored)
        if "magnitude" in held:
            held["magnitude"] = _magnitude(held["magnitude"], keys, source.format)
        return cast(LowRank, KINDS[keys.kind or "LoRA"](**held, alpha=alpha))
    except ValueError as error:
        raise UserError(f"{path}: {keys.raw}: {error}; the file is damaged, export it again") from None


def _magnitude(m: Tensor, keys: LayerKeys, format: str) -> Tensor:
    """DoRA's m as it broadcasts against W_0: (out, 1, ...) or (1, in, ...).

    Raises:
        ValueError: it is neither.
    """
    outer, inner = keys.flat_shape or (0, 0)
    dimensions = next((len(shape) for part, shape in keys.shapes.items() if part.field == "down"), m.dim())
    if format in PEFT_NAMED and m.numel() == outer:  # (out,), or (1, out, 1, 1) beside a convolution
        m = m.reshape(outer, *[1] * (dimensions - 1))
    fits = m.dim() == dimensions and m.dim() in (2, 4) and m.numel() in (m.shape[0], m.shape[1])
    if not fits or (m.shape[0] not in (1, outer)) or (m.shape[0] == 1 and outer > 1 and inner % m.shape[1]):
        raise ValueError(f"the magnitude {tuple(m.shape)} is neither (out, 1, ...) nor (1, in, ...) of {outer, inner}")
    return m
