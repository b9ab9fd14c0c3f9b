"""The training loss by ranges of t."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def range_names(steps: int, parts: int) -> list[str]:
    """Equal ranges of the steps 0..T-1 by their first and last, such as t0-249."""
    edges = [steps * part // parts for part in range(parts + 1)]
    return [f"t{first}-{after - 1}" for first, after in pairwise(edges)]


def add(sums: Tensor, t: Tensor, losses: Tensor, steps: int) -> Tensor:
    """Sums of losses and their counts (2, parts), with those of a batch added; nothing waits for the device.

    Args:
        sums: so far.
        t: steps (B,) of 0..steps-1.
        losses: (B,).
        steps: T.
    """
    parts = sums.shape[1]
    # T p // P <= t where p P^-1 T < t + 1: the inverse of how `range_names` rounds.
    index = ((t.long() + 1) * parts - 1).div(steps, rounding_mode="floor").clamp(0, parts - 1)
    both = torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)])
    return sums.index_add(1, index, both)


def means(sums: Tensor) -> list[float]:
    """Mean loss of each part; nan where there was none."""
    total, count = sums.tolist()
    return [loss / number if number else float("nan") for loss, number in zip(total, count, strict=True)]
