"""How large an adapter has become, block by block."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from loratune.families.blocks import block_of
from loratune.lora.algebra import factors, inner
from loratune.lora.kinds.layer import LowRank


def norms_by_block(layers: Mapping[str, LowRank]) -> dict[str, float]:
    """Frobenius' norm of all scaled B A of each block: ||B A||^2 = <B^T B, A A^T>, so that B A is never formed.

    DoRA's magnitudes are left out. LoHa and LoKr by the factors that their products have.
    """
    squares: dict[str, float] = {}
    for name, layer in layers.items():
        product = factors(layer, torch.float64)
        block = block_of(name)
        squares[block] = squares.get(block, 0.0) + max(inner(product, product), 0.0)
    return {block: math.sqrt(square) for block, square in squares.items()}
