"""Simple, stated measures of what was drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

COLOUR_SIDE = 16  # pixels
CELLS, DIRECTIONS = 8, 8


def colourfulness(pixels: Tensor) -> Tensor:
    """Mean of max(R, G, B) - min(R, G, B) over an image: 0 for black, white and grey, 1 for pure colours.

    (The chroma of the HSV and HSL hexcone. Not HSV's saturation, which divides by the brightness and so
    makes much of the tint of a black line.) Pixels in [-1, 1], (B, 3, H, W) -> (B,).
    """
    shade = (pixels.float().clamp(-1, 1) + 1) / 2
    return (shade.amax(1) - shade.amin(1)).flatten(1).mean(1)


def colours(pixels: Tensor) -> Tensor:
    """Where which colours are: RGB at 16 x 16 pixels, for `nearest_rate`. (B, 3, H, W) -> (B, 768)."""
    return F.adaptive_avg_pool2d(pixels.float().clamp(-1, 1), COLOUR_SIDE).flatten(1)


def shapes(pixels: Tensor) -> Tensor:
    """Where which edges are, whatever their colour: histograms of oriented gradients, for `nearest_rate`.

    (Dalal & Triggs 2005: unsigned directions in 8 bins, shared between neighbours, over 8 x 8 cells; here the
    root of each histogram, and one norm for the image.) Two images of the same thing in different drawing
    styles are near by this, and far by colours. (B, 3, H, W) -> (B, 512), of length 1, or 0 for an even image.
    """
    grey = F.pad(pixels.float().clamp(-1, 1).mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    across = (grey[..., 1:-1, 2:] - grey[..., 1:-1, :-2]) / 2
    down = (grey[..., 2:, 1:-1] - grey[..., :-2, 1:-1]) / 2
    strength = torch.hypot(across, down)
    place = torch.atan2(down, across).remainder(torch.pi) / torch.pi * DIRECTIONS
    first, share = place.floor().long(), place.frac()
    bins = torch.zeros(len(grey), DIRECTIONS, *strength.shape[-2:], device=pixels.device)
    bins.scatter_add_(1, first % DIRECTIONS, strength * (1 - share))
    bins.scatter_add_(1, (first + 1) % DIRECTIONS, strength * share)
    return F.normalize(F.adaptive_avg_pool2d(bins, CELLS).flatten(1).sqrt(), eps=1e-6)


def nearest_rate(
    samples: Tensor,
    reals: Tensor,
    right: Tensor,
    by: Callable[[Tensor], Tensor] = shapes,
    candidates: int = 20,
    seed: int = 0,
) -> float:
    """How often a sample's nearest real image, among some drawn at random, is the right one.

    For each sample, its right image and `candidates` - 1 others are compared with it by the squared
    distance of what `by` makes of them. Chance is 1 / candidates.

    Args:
        samples: (N, 3, H, W) in [-1, 1].
        reals: (M, 3, H, W) in [-1, 1], M >= candidates.
        right: (N,), the index in `reals` of each sample's right image.
        by: shapes or colours.
        candidates: images compared with each sample.
        seed: of the draw of the others.

    Raises:
        ValueError: there are fewer real images than candidates.
    """
    if len(reals) < candidates:
        raise ValueError(f"{len(reals)} real images are fewer than {candidates} candidates")
    random = torch.Generator().manual_seed(seed)
    features, real = by(samples).cpu(), by(reals).cpu()
    hits = 0
    for feature, index in zip(features, right.tolist(), strict=True):
        others = torch.randperm(len(real) - 1, generator=random)[: candidates - 1]
        others = others + (others >= index)
        distance = (real[torch.cat([torch.tensor([index]), others])] - feature).square().sum(1)
        hits += int(distance.argmin() == 0)
    return hits / len(features)


def share_of_the_way(start: float, reached: float, goal: float) -> float:
    """How far from start to goal something has come: 0 at the start, 1 at the goal."""
    return (reached - start) / (goal - start)
