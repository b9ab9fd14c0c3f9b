"""Which steps t are trained how often: the density of t, by its inverse distribution function."""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """From u ~ U(0, 1) to t in (0, 1) whose logit is N(mean, std^2) (Esser 2024, eq. 19)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def shifted(t: Tensor, shift: float) -> Tensor:
    """t moved towards noise: s t / (1 + (s - 1) t), t in [0, 1] (Esser 2024, eq. 23); s = 1 leaves it."""
    return shift * t / (1 + (shift - 1) * t)


def to_steps(t: Tensor, start: int, stop: int) -> Tensor:
    """t in [0, 1] to whole steps in [start, stop), each an equal part of it."""
    return (start + (t * (stop - start)).long()).clamp(start, stop - 1)
