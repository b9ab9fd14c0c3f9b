"""LoRA files: layers read in every format of `tables.known`, by numpy or as torch's tensors, and written.

Importable without torch, so that a merge needs none.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from loratune.errors import UserError
from loratune.families.known import adaptable
from loratune.formats.headers import Header, read_header
from loratune.formats.numbers import FLOATS, Stored
from loratune.lora.keys import Described, LayerKeys, describe_keys
from loratune.lora.kinds.layer import LowRank
from loratune.lora.tables.known import TABLES
from loratune.lora.tables.peft import METADATA
from loratune.lora.tables.table import ALPHA, PADDING_KEY, Place

if TYPE_CHECKING:
    import torch
    from torch import Tensor

log = logging.getLogger(__name__)

# Metadata of the file as it is, not of the LoRA: hashes of its bytes are true of no other file.
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
OURS = (METADATA, PADDING_KEY, "format", *HASHES)


@dataclass
class LoRAFile:
    """A LoRA.

    Args:
        layers: by canonical module name with component, such as
            `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q` or
            `text_encoder.text_model.encoder.layers.0.self_attn.q_proj`.
        metadata: the file's free text, without what belongs to the format or to the file's very bytes.
        tokens: learned tokens that came with it, (vectors, width) by name.
        left_out: keys that are not read, and why; where that was allowed.
    """

    layers: Mapping[str, LowRank]
    metadata: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def write_lora(path: Path | str, lora: LoRAFile, format: str = "peft", dtype: torch.dtype | None = None) -> None:
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
    from loratune.formats.files import data_hash, write_safetensors
    from loratune.lora.write import refuse_not_finite

    if not lora.layers:
        raise UserError(f"{path}: there is no layer to write; nothing was adapted")
    layers = dict(sorted(lora.layers.items()))
    if unknown := [name for name in layers if name.split(".")[0] not in adaptable()]:
        raise ValueError(f"the layer {unknown[0]!r} must begin with one of {[*adaptable()]}")
    own = {key: value for key, value in lora.metadata.items() if key not in OURS}
    try:
        tensors, needed = TABLES[format].write(layers, own, dtype)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    refuse_not_finite(path, layers, tensors)
    for token, vectors in lora.tokens.items():
        write_safetensors(token_path(path, token), {token: vectors}, {"format": "pt"})
    digest = data_hash(tensors)  # as Stability's modelspec and sd-scripts write it
    hashes = {"modelspec.hash_sha256": f"0x{digest}", "sshs_model_hash": digest}
    write_safetensors(path, tensors, {**own, **needed, **hashes, "format": "pt"})


def token_path(path: Path | str, token: str) -> Path:
    """Where a learned token of a LoRA is written: readers take the name of its file for the word."""
    path = Path(path)
    return path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9_.-]', '', token) or 'token'}.safetensors")


def read_lora(path: Path | str, names: Iterable[str] = (), check_finite: bool = True) -> LoRAFile:
    """As `read_layers`, with torch's tensors, which are the file's own to the bit."""
    lora = read_layers(path, names, check_finite)
    layers = {name: on_torch(layer) for name, layer in lora.layers.items()}
    return replace(lora, layers=layers)


def on_torch(layer: LowRank) -> LowRank:
    """A layer with torch's tensors for those in a file."""
    tensors = {name: _tensor(value) for name, value in layer.tensors().items()}
    return replace(layer, **tensors)  # type: ignore[type-var]


def _tensor(stored: Stored) -> Tensor:
    import torch

    from loratune.formats.files import DTYPES

    return torch.from_numpy(np.array(stored.raw)).view(DTYPES[stored.dtype]).reshape(stored.shape)


def read_layers(
    path: Path | str, names: Iterable[str] = (), check_finite: bool = True, partial: bool = False
) -> LoRAFile:
    """Read a LoRA in any format of `tables.known`; its tensors stay where they lie, mapped.

    Learned tokens in it are kept apart (`LoRAFile.tokens`) and named in a warning.

    Args:
        path: of the file.
        names: canonical names, with component, of an architecture's layers that is not known here; kohya's
            names cannot be read back without them.
        check_finite: whether values that are not finite are an error.
        partial: leave out what is not read (`LoRAFile.left_out`) where there are other layers.

    Raises:
        UserError: the file cannot be read, is of another kind (named), has a key that does not map, lacks
            one of a pair, or holds values that are not finite.
    """
    path = Path(path)
    header = read_header(path)
    described = describe_keys(header, names)
    refuse_unread(path, described, partial)
    keys = [key for layer in described.layers.values() for key in layer.keys.values()]
    stored = mapped(path, header, [*keys, *described.tokens])
    for key, tensor in stored.items():
        _check_values(path, key, tensor, check_finite)
    layers = {name: _layer(path, name, keys, stored, header) for name, keys in described.layers.items()}
    for name in padded_layers(header.metadata):
        if name in layers and not any(one.wide(np.float32).any() for one in layers[name].tensors().values()):
            del layers[name]
    if not layers:
        raise UserError(f"{path}: there is no layer in it; is it a LoRA?")
    if described.tokens:
        note = "learned tokens are no part of the LoRA's layers; convert writes them to files of their own"
        log.warning("%s: its %s: %s", path, note, ", ".join(described.tokens))
    metadata = {key: value for key, value in header.metadata.items() if key not in OURS}
    tokens = {key: _tensor(stored[key]) for key in described.tokens}
    return LoRAFile(layers, metadata, tokens, described.foreign if partial else {})


def refuse_unread(path: Path, described: Described, partial: bool) -> None:
    """Refuse a file that is damaged, or has keys that are not read: here, and nowhere else.

    Raises:
        UserError: it is one of these.
    """
    for key, reason in described.damaged.items():
        raise UserError(f"{path}: {key!r} {reason}")
    if partial and described.layers:
        return
    for key, reason in described.foreign.items():
        more = f" ({len(described.foreign)} such keys)" if len(described.foreign) > 1 else ""
        way = f"; merge --allow-partial leaves it out and takes the other {len(described.layers)} layers"
        raise UserError(f"{path}: {key!r} {reason}{more}{way if described.layers else ''}")


def mapped(path: Path, header: Header, keys: Iterable[str]) -> dict[str, Stored]:
    """Tensors of a file, by key, where they lie.

    Raises:
        UserError: it cannot be read.
    """
    try:
        data = np.memmap(path, np.uint8, "r", header.data_offset) if header.size > header.data_offset else np.empty(0)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download or export it again") from None
    infos = {key: header.tensors[key] for key in keys}
    return {
        key: Stored(np.asarray(data[info.start : info.stop], np.uint8), info.dtype, info.shape)
        for key, info in infos.items()
    }


def padded_layers(metadata: Mapping[str, str]) -> list[str]:
    """The layers that a file's metadata say were put in as zeros; they are left out where they still are."""
    try:
        listed = json.loads(metadata.get(PADDING_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def _check_values(path: Path, key: str, tensor: Stored, finite: bool) -> None:
    if tensor.dtype not in FLOATS:
        if not key.endswith(".alpha"):
            raise UserError(f"{path}: {key!r} holds {tensor.dtype}; a LoRA holds floating point numbers")
    elif finite and not tensor.finite:
        raise UserError(f"{path}: {key!r} has values that are not finite; the LoRA is damaged, train it again")


def _layer(path: Path, name: str, keys: LayerKeys, stored: Mapping[str, Stored], header: Header) -> LowRank:
    held = {part.field: stored[key] for part, key in keys.keys.items() if part != ALPHA}
    given = stored[keys.keys[ALPHA]] if ALPHA in keys.keys else None
    entries = keys.entries
    try:
        place = Place(path, name, entries.rank if entries.ranked else 0, header.metadata)
        alpha = keys.tables[0].alpha(None if given is None else given.number, place)
        if "magnitude" in held:
            key = next(key for part, key in keys.keys.items() if part.field == "magnitude")
            held["magnitude"] = _magnitude(held["magnitude"], entries, "lora_magnitude_vector" in key)
        return cast(Any, keys.kind)(**held, alpha=alpha)
    except ValueError as error:
        which = f"{keys.keys[ALPHA]!r}" if given is not None and "one number" in str(error) else f"{keys.raw}:"
        raise UserError(f"{path}: {which} {error}") from None


def _magnitude(m: Stored, entries: LowRank, pefts: bool) -> Stored:
    """DoRA's m as it broadcasts against W_0: (out, 1, ...) or (1, in, ...).

    Args:
        m: as the file has it: so, or of one dimension, or (1, out, 1, 1) as peft has it.
        entries: the layer.
        pefts: whether its key is peft's.

    Raises:
        ValueError: it is none of these.
    """
    outer, inner = entries.flat_shape
    dimensions = len(entries.shape) if entries.shape else len(m.shape)
    shape, size = m.shape, math.prod(m.shape)
    if size == outer and (pefts or len(shape) == 1):
        shape = (outer, *[1] * (max(dimensions, 2) - 1))
    elif size == inner and len(shape) == 1:
        shape = (1, inner)
    dimensions = max(dimensions, 2)
    fits = len(shape) == dimensions and dimensions in (2, 4) and size in shape[:2]
    if not fits or shape[0] not in (1, outer) or (shape[0] == 1 and outer > 1 and inner % shape[1]):
        raise ValueError(f"the magnitude {m.shape} is neither (out, 1, ...) nor (1, in, ...) of {outer, inner}")
    return replace(m, shape=shape)
