"""Noise that is not quite N(0, I), as trainers offer it; each takes its randomness as an argument."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def offset_noise(noise: Tensor, shift: Tensor, strength: float) -> Tensor:
    """Noise whose mean wanders too: noise + strength * shift (Guttenberg 2023).

    Plain noise hardly touches an image's mean brightness, so a model never learns to choose it.

    Args:
        noise: N(0, I), (B, C, H, W).
        shift: N(0, 1) for each channel, (B, C, 1, 1).
        strength: usually 0.05 to 0.1.
    """
    return noise + strength * shift


def pyramid_noise(levels: list[Tensor], discount: float) -> Tensor:
    """Noise at several resolutions added up, scaled back to unit variance for each sample (Whitaker 2023).

    sum_i discount^i up(level_i), divided by its standard deviation.

    Args:
        levels: N(0, I), (B, C, H_i, W_i), the finest first; the coarser are enlarged bilinearly to its size.
        discount: in (0, 1); usually 0.3 for fine-tuning.
    """
    total = levels[0].clone()
    for index, level in enumerate(levels[1:], 1):
        total += discount**index * F.interpolate(level, size=total.shape[-2:], mode="bilinear")
    return total / total.flatten(1).std(1).view(-1, *[1] * (total.dim() - 1))


def pyramid_sides(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of a pyramid's levels: each half of the one before, down to where a side is one."""
    sides = [(height, width)]
    while min(sides[-1]) > 1:
        sides.append((max(1, sides[-1][0] // 2), max(1, sides[-1][1] // 2)))
    return sides


def perturb(noise: Tensor, other: Tensor, strength: float) -> Tensor:
    """The noise that goes into x_t, while the target keeps `noise`: e + strength * e' (Ning 2023).

    Trains the network on inputs as wrong as its own earlier steps make them.

    Args:
        noise: N(0, I).
        other: N(0, I), independent, of the same shape.
        strength: gamma; the paper's is 0.1.
    """
    return noise + strength * other


def draw_pyramid(shape: tuple[int, ...], discount: float, random: torch.Generator) -> Tensor:
    """Pyramid noise of a shape (B, C, H, W), drawn on the generator's device."""
    sides = pyramid_sides(shape[-2], shape[-1])
    levels = [torch.randn(*shape[:2], *side, generator=random, device=random.device) for side in sides]
    return pyramid_noise(levels, discount)
