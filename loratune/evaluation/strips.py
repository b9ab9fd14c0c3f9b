"""The process in images: x_t on the way to noise, the estimates of x_0 on the way back, and words on an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from loratune.diffusion.process import diffuse
from loratune.evaluation.grids import grid

FIGURES = {
    "forward": (
        "Forward process",
        "x_t of a held-out image (of a training image where none is held out) and one noise, decoded.",
    ),
    "reverse": (
        "Reverse process",
        "What the network takes for the finished image, x_0, after so many of the sampler's steps; last the image.",
    ),
    "words": (
        "Where each word is seen",
        "Cross-attention, mean over heads, layers and steps: each word's share, bright where it is largest.",
    ),
}
"""Title and note of each figure, by its name."""

Coefficients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0..count-1, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(at * (count - 1) / (most - 1)) for at in range(most)]


def forward_states(x_0: Tensor, noise: Tensor, coefficients: Coefficients, steps: Sequence[int]) -> Tensor:
    """x_t of one image and one noise at several steps (Ho 2020, eq. 4).

    Args:
        x_0: (...), as `noise`.
        noise: of the same shape.
        coefficients: (a, b) for steps (k,) and what they multiply.
        steps: k of them.

    Returns:
        (k, ...).
    """
    states = x_0.expand(len(steps), *x_0.shape)
    a, b = coefficients(torch.tensor(steps, device=x_0.device), states)
    return diffuse(states, noise.expand_as(states), a, b)


def strip(images: Sequence[Image.Image], names: Sequence[str], cell: int = 128) -> Image.Image:
    """Images in a row, each below its name."""
    return grid([images], names, cell=cell)


def heat(image: Image.Image, share: Tensor) -> Image.Image:
    """An image, dark where a map is low and bright where it is high.

    Args:
        image: of any size.
        share: (h, w); it is enlarged to the image, its largest value is full light and its smallest the darkest.
    """
    size = (image.height, image.width)
    large = F.interpolate(share[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
    apart = float(large.max() - large.min())
    light = 0.15 + 0.85 * ((large - large.min()) / apart if apart > 1e-6 else torch.ones_like(large))
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) * light[..., None].cpu().numpy()
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
