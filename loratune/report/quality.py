"""Simple, stated measures of what was drawn."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FEATURE_SIDE = 16


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB; x, y in [-1, 1], (B, C, H, W) -> (B,)."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def colourfulness(pixels: Tensor) -> Tensor:
    """Mean of max(R, G, B) - min(R, G, B) over a picture: 0 for black, white and grey, 1 for pure colours.

    (The chroma of the HSV and HSL hexcone. Not HSV's saturation, which divides by the brightness and so
    makes much of the tint of a black line.) Pixels in [-1, 1], (B, 3, H, W) -> (B,).
    """
    shade = (pixels.float().clamp(-1, 1) + 1) / 2
    return (shade.amax(1) - shade.amin(1)).flatten(1).mean(1)


def features(pixels: Tensor) -> Tensor:
    """What two pictures are compared by: RGB at 16 x 16 pixels. (B, 3, H, W) -> (B, 768)."""
    return F.adaptive_avg_pool2d(pixels.float().clamp(-1, 1), FEATURE_SIDE).flatten(1)


def nearest_rate(samples: Tensor, reals: Tensor, right: Tensor, candidates: int = 20, seed: int = 0) -> float:
    """How often a sample's nearest real picture, among some drawn at random, is the right one.

    For each sample, its right picture and `candidates` - 1 others are compared with it by the squared
    distance of `features`. Chance is 1 / candidates.

    Args:
        samples: (N, 3, H, W) in [-1, 1].
        reals: (M, 3, H, W) in [-1, 1], M >= candidates.
        right: (N,), the index in `reals` of each sample's right picture.
        candidates: pictures compared with each sample.
        seed: of the draw of the others.

    Raises:
        ValueError: there are fewer real pictures than candidates.
    """
    if len(reals) < candidates:
        raise ValueError(f"{len(reals)} real pictures are fewer than {candidates} candidates")
    random = torch.Generator().manual_seed(seed)
    made, real = features(samples).cpu(), features(reals).cpu()
    hits = 0
    for feature, index in zip(made, right.tolist(), strict=True):
        others = torch.randperm(len(real) - 1, generator=random)[: candidates - 1]
        others = others + (others >= index)
        distance = (real[torch.cat([torch.tensor([index]), others])] - feature).square().sum(1)
        hits += int(distance.argmin() == 0)
    return hits / len(made)


def share_of_the_way(start: float, reached: float, goal: float) -> float:
    """How far from start to goal something has come: 0 at the start, 1 at the goal."""
    return (reached - start) / (goal - start)
