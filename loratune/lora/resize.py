"""A LoRA at another rank: the truncated singular value decomposition of each B A, from its factors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from loratune.families.layouts import Shape
from loratune.lora.algebra import factors, svd
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.progress import shown
from loratune.lora.reading import (
    Errors,
    check_out,
    check_rank,
    described,
    dtype_of,
    kept_rank,
    read,
    refuse_dora,
    shapes_of,
    truncated,
    write,
)


def resize(file: Path, out: Path, rank: int | None, keep: float | None, to: str | None, dtype: str | None) -> str:
    """Write a LoRA at another rank; returns lines with the error of each layer and overall.

    Raises:
        UserError: it cannot be read or written, is a DoRA, or `rank` and `keep` are not one of the two.
    """
    check_out(out, [file])
    check_rank(rank, keep)
    source = read(file)
    refuse_dora(source, "whose change depends on the base: it is not B A alone; merge it")
    shapes = shapes_of(file, source.file.layers)
    layers, errors = resized(source.file.layers, shapes, rank, keep, dtype_of(source.file.layers.values(), dtype))
    note = described(file) | {"rank": rank, "keep": keep, "error": errors.overall}
    write(out, layers, source.file, to or source.format, ("resized", note))
    lines = [
        f"{name}: rank {source.file.layers[name].rank} -> {layer.rank}, error {errors.of(name):.2e}"
        for name, layer in layers.items()
    ]
    ranks = sorted({layer.rank for layer in layers.values()})
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return "\n".join([*lines, f"{out}: {len(layers)} layers of {rank_text}; {errors.told()}"])


def resized(
    layers: Mapping[str, LowRank], shapes: Mapping[str, Shape], rank: int | None, keep: float | None, dtype: torch.dtype
) -> tuple[dict[str, LoRALayer], Errors]:
    """The layers at another rank with alpha = r, and how far they are from what they were.

    Args:
        shapes: of W_0, by layer.
        rank: of every layer; a layer never gets more than it has.
        keep: or the share of the squared Frobenius norm that each layer keeps.
        dtype: of the tensors.
    """
    resized_layers: dict[str, LoRALayer] = {}
    errors = Errors()
    for name, layer in shown(list(layers.items()), "resizing"):
        product = factors(layer)
        parts = svd(product)
        resized_layers[name] = truncated(parts, kept_rank(parts, rank, keep), shapes[name], dtype)
        errors.add(name, product, resized_layers[name])
    return resized_layers, errors
