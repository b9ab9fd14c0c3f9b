"""One LoRA of several: sum_i w_i (alpha_i / r_i) B_i A_i, by concatenating the factors, so that nothing crosses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loratune.errors import UserError
from loratune.families.layouts import Shape
from loratune.lora.algebra import concatenate, factors, svd
from loratune.lora.file import LoRAFile
from loratune.lora.kinds.layer import LowRank, Product
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.merge.request import Given, check_blocks
from loratune.lora.progress import shown
from loratune.lora.reading import (
    Errors,
    Source,
    check_only_rank,
    check_out,
    described,
    dtype_of,
    kept_rank,
    made,
    read,
    refuse_dora,
    shapes_of,
    truncated,
    write,
)

Terms = Iterable[tuple[str, Sequence[tuple[float, Product]]]]


def combine(given: Sequence[Given], out: Path, rank: int | None, to: str | None, dtype: str | None) -> str:
    """Write the weighted sum of LoRAs as one; returns a line that says how far the rounding, or `rank`, puts it off.

    Raises:
        UserError: a LoRA cannot be read, is of a kind that cannot be added, or does not fit the others.
    """
    check_out(out, [one.path for one in given])
    check_only_rank(rank)
    sources = [(read(one.path), one) for one in given if one.weight != 0]
    if not sources:
        raise UserError("combine: nothing to add; give --lora FILE:SCALE with a weight that is not 0")
    for source, one in sources:
        _check_kind(source, rank)
        check_blocks(one, source.file.layers)
    shapes = _common_shapes([source for source, _ in sources])
    names = [name for name in sorted(shapes) if any(weight for weight, _ in _held(name, sources))]
    if not names:
        raise UserError("combine: nothing to add: the blocks' weights are all 0; give one that is not")
    every = [layer for source, _ in sources for layer in source.file.layers.values()]
    terms = ((name, terms_of(name, sources)) for name in shown(names, "combining"))
    done, errors = combined(terms, shapes, rank, dtype_of(every, dtype))
    shared = _shared([source for source, _ in sources])
    loras = [_told(source, one, shared) for source, one in sources]
    note = {"loras": loras, "rank": rank, "error": errors.overall}
    merged = {"modelspec.merged_from": ", ".join(source.path.stem for source, _ in sources)}
    whole = LoRAFile({}, shared | merged, _tokens([source for source, _ in sources]))
    write(out, done, whole, to or sources[0][0].format, ("combined", note))
    ranks = sorted({layer.rank for layer in done.values()})
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    how = "approximated" if rank else "exact but for the rounding"
    return f"{out}: {len(sources)} LoRAs in {len(done)} layers of {rank_text}, {how}; {errors.told()}"


def _check_kind(source: Source, rank: int | None) -> None:
    refuse_dora(source, "whose change depends on the base: it cannot be added to others; merge it")
    other = [name for name, layer in source.file.layers.items() if not isinstance(layer, LoRALayer)]
    if other and rank is None:
        kind = source.file.layers[other[0]].name
        raise UserError(f"{source.path}: {other[0]} is a {kind}, which is no B A; give --rank R to approximate it")


def _common_shapes(sources: Sequence[Source]) -> dict[str, Shape]:
    """The shape of W_0 of each layer that any of them has; a 1x1 convolution where one says so."""
    common: dict[str, tuple[Shape, Path]] = {}
    for source in sources:
        for name, shape in shapes_of(source.path, source.file.layers).items():
            before, path = common.get(name, (shape, source.path))
            if before != shape and sorted((before, shape), key=len)[1] != (*sorted((before, shape), key=len)[0], 1, 1):
                shapes = f"{list(shape)}, in {path} {list(before)}"
                raise UserError(f"{source.path}: {name} is {shapes}; give LoRAs for the same base")
            common[name] = (max(before, shape, key=len), path)
    return {name: shape for name, (shape, _) in common.items()}


def terms_of(name: str, sources: Sequence[tuple[Source, Given]]) -> list[tuple[float, Product]]:
    """The weighted B A of a layer, of those that have it with a weight that is not 0."""
    return [(weight, factors(layer)) for weight, layer in _held(name, sources) if weight]


def _held(name: str, sources: Sequence[tuple[Source, Given]]) -> list[tuple[float, LowRank]]:
    there = ((one.weight_of(name), source.file.layers.get(name)) for source, one in sources)
    return [(weight, layer) for weight, layer in there if layer is not None]


def combined(
    terms: Terms, shapes: Mapping[str, Shape], rank: int | None, dtype: torch.dtype
) -> tuple[dict[str, LoRALayer], Errors]:
    """The sums as layers with alpha = r, and how far the rounding (and the rank) puts them off.

    The weight and alpha / r go into B, its sign with it; A stays as it is.

    Args:
        terms: by layer, one after the other: weights and products.
        shapes: of W_0, by layer.
        rank: of the sums; None for the sum of the ranks.
        dtype: of the tensors.
    """
    layers: dict[str, LoRALayer] = {}
    errors = Errors()
    for name, own in terms:
        product = concatenate(own)
        if rank is None:
            layers[name] = made(product, shapes[name], dtype)
        else:
            parts = svd(product)
            layers[name] = truncated(parts, kept_rank(parts, rank, None), shapes[name], dtype)
        errors.add(name, product, layers[name])
    return layers, errors


def _tokens(sources: Sequence[Source]) -> dict[str, torch.Tensor]:
    """The learned tokens of all.

    Raises:
        UserError: two have different ones of one name.
    """
    tokens: dict[str, torch.Tensor] = {}
    for source in sources:
        for name, vectors in source.file.tokens.items():
            if not torch.equal(tokens.setdefault(name, vectors), vectors):
                raise UserError(f"{source.path}: another LoRA has another learned token {name!r}; rename one")
    return tokens


def _told(source: Source, one: Given, shared: Mapping[str, str]) -> dict[str, Any]:
    """A LoRA in the note: with the metadata on which not all agree."""
    own = {key: value for key, value in source.file.metadata.items() if key not in shared}
    return described(source.path) | {"weight": one.weight, "blocks": dict(one.blocks), "metadata": own}


def _shared(sources: Sequence[Source]) -> dict[str, str]:
    """The metadata on which all agree."""
    first, *others = [source.file.metadata for source in sources]
    return {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
