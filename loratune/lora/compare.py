"""How large the changes of a LoRA are, and how far two LoRAs lie apart; from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.families.blocks import block_of
from loratune.lora.algebra import distance, effective_rank, factors, inner, norm, spectrum
from loratune.lora.kinds.layer import LowRank

Layers = Mapping[str, LowRank]


def sizes_by_block(layers: Iterable[tuple[str, LowRank]]) -> dict[str, dict[str, float]]:
    """For each block: Frobenius' norm of its changes, their spectral norm, and the mean effective rank of its layers.

    The changes of a block are one block-diagonal matrix: its squared Frobenius norm is their sum, its spectral norm
    the largest.
    """
    spectra: dict[str, list[Tensor]] = {}
    for name, layer in layers:
        spectra.setdefault(block_of(name), []).append(spectrum(layer))
    return {
        block: {
            "frobenius": float(torch.cat(own).norm()),
            "spectral": max(float(s.max()) for s in own),
            "effective_rank": sum(map(effective_rank, own)) / len(own),
        }
        for block, own in spectra.items()
    }


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, dict[str, int]]:
    """How many NaN and infinities each tensor holds, by key; tensors without any are left out."""
    counts = {key: {"nan": int(value.isnan().sum()), "inf": int(value.isinf().sum())} for key, value in tensors}
    return {key: counted for key, counted in counts.items() if any(counted.values())}


def difference(one: Layers, other: Layers, names: Iterable[str]) -> dict[str, Any]:
    """How two LoRAs differ: overall and by block, ||dW_A - dW_B|| / ||dW_A|| and the cosine between both.

    A layer that only one has is zero in the other.

    Args:
        one: A.
        other: B.
        names: of the layers of both, in the order in which they are gone through.

    Raises:
        UserError: a layer of both has different sizes.
    """
    squares: dict[str, list[float]] = {}
    for name in names:
        for key in ("", block_of(name)):
            squares.setdefault(key, [0.0] * 4)
        for key, parts in ((key, _squares(name, one.get(name), other.get(name))) for key in ("", block_of(name))):
            squares[key] = [before + new for before, new in zip(squares[key], parts, strict=True)]
    return {
        "only in A": sorted(set(one) - set(other)),
        "only in B": sorted(set(other) - set(one)),
        "other rank": _differing(one, other, "rank"),
        "other alpha": _differing(one, other, "alpha"),
        **_relative(squares.pop("", [0.0] * 4)),
        "blocks": {block: _relative(parts) for block, parts in squares.items()},
    }


def _squares(name: str, one: LowRank | None, other: LowRank | None) -> tuple[float, float, float, float]:
    """||A||^2, ||B||^2, <A, B> and ||A - B||^2 of a layer."""
    left, right = (None if layer is None else factors(layer) for layer in (one, other))
    norms = [0.0 if product is None else norm(product) ** 2 for product in (left, right)]
    if left is None or right is None or one is None or other is None:
        return norms[0], norms[1], 0.0, sum(norms)
    if one.flat_shape != other.flat_shape:
        sizes = " and ".join(str(list(layer.flat_shape)) for layer in (one, other))
        raise UserError(f"--diff: {name} is {sizes}; the two are for different bases")
    return norms[0], norms[1], inner(left, right), distance(left, right) ** 2


def _relative(squares: list[float]) -> dict[str, float | None]:
    own, theirs, product, apart = squares
    both = math.sqrt(own * theirs)
    return {
        "relative_distance": math.sqrt(apart / own) if own else None,
        "cosine": max(-1.0, min(1.0, product / both)) if both else None,
    }


def _differing(one: Layers, other: Layers, field: str) -> dict[str, list[float]]:
    both = {name: [getattr(one[name], field), getattr(other[name], field)] for name in one if name in other}
    return {name: values for name, values in both.items() if values[0] != values[1]}
