"""Measuring a base or a LoRA on real captioned images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from loratune.data.sources import read_source
from loratune.diffusion.objective import psnr
from loratune.evaluation.quality import colourfulness, colours, nearest_rate, shapes, share_of_the_way
from loratune.families.model import Model
from loratune.families.sampling import sample_images
from loratune.formats.images import normalise, open_image, square, to_tensor
from loratune.lora.load import load_with

BY = (shapes, colours)


class Sampling(NamedTuple):
    """How images are sampled to be measured.

    Args:
        size: side in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance.
        seed: of the first image, and of the choice of images.
    """

    size: int
    steps: int
    guidance_scale: float
    seed: int


def read_images(data: str, size: int) -> tuple[Tensor, list[str]]:
    """All images of a source, (N, 3, size, size) in [-1, 1], and their captions."""
    source = read_source(data)
    pixels = [to_tensor(square(open_image(sample.data), size)) for sample in source]
    return normalise(torch.stack(pixels)), [sample.caption or "" for sample in source]


@torch.no_grad()
def measure_vae(model: Model, reals: Tensor) -> dict[str, Any]:
    """Mean PSNR of the VAE's reconstructions (of the posterior's mean), in dB."""
    values = []
    for part in track(reals.to(model.device).split(16), description="VAE", transient=True):
        x = model.x_0(model.encode_images(part), None)
        values.append(psnr(model.decode(x), part))
    return {"psnr_db": round(float(torch.cat(values).mean()), 2), "images": len(reals)}


def draw_all(model: Model, captions: Sequence[str], sampling: Sampling) -> Tensor:
    """An image for each caption, seeds counting on from the first; (N, 3, size, size) on the CPU."""
    images = []
    for start in track(range(0, len(captions), 16), description="drawing", transient=True):
        part = captions[start : start + 16]
        seeds = [sampling.seed + start + i for i in range(len(part))]
        side, steps, scale = sampling.size, sampling.steps, sampling.guidance_scale
        images.append(sample_images(model, part, seeds, side, side, steps, scale).cpu())
    return torch.cat(images)


def measure_nearest(
    model: Model, reals: Tensor, captions: Sequence[str], samples: int, sampling: Sampling
) -> dict[str, Any]:
    """The nearest-image rates over samples of captions chosen at random."""
    seed = sampling.seed
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(captions), generator=random)[:samples]
    images = draw_all(model, [captions[i] for i in chosen.tolist()], sampling)
    rates = {by.__name__: round(nearest_rate(images, reals, chosen, by, seed=seed), 4) for by in BY}
    named = {f"nearest_of_20_by_{name}": rate for name, rate in rates.items()}
    return named | {"samples": len(chosen), "guidance_scale": sampling.guidance_scale, "steps": sampling.steps}


def measure_style(
    base: str,
    lora: Sequence[str],
    reals: Tensor,
    styled: Tensor,
    captions: Sequence[str],
    sampling: Sampling,
) -> dict[str, Any]:
    """How far a LoRA goes from the base's look to the style's, and whether it still draws the right things."""
    before = draw_all(load_with(base, []), captions, sampling)
    after = draw_all(load_with(base, lora), captions, sampling)
    return style_numbers(before, after, reals, styled)


def style_numbers(before: Tensor, after: Tensor, reals: Tensor, styled: Tensor) -> dict[str, Any]:
    """The style's measure and the nearest-image rates of one image for each caption, before and after."""
    base, reached = float(colourfulness(before).mean()), float(colourfulness(after).mean())
    goal, right = float(colourfulness(styled).mean()), torch.arange(len(styled))
    return {
        "colourfulness": {
            "base_images": round(float(colourfulness(reals).mean()), 4),
            "style_images": round(goal, 4),
            "before": round(base, 4),
            "after": round(reached, 4),
            "share_of_the_way": round(share_of_the_way(base, reached, goal), 4),
        },
        **{
            f"nearest_of_20_by_{by.__name__}": {
                "before_among_base_images": round(nearest_rate(before, reals, right, by), 4),
                "after_among_base_images": round(nearest_rate(after, reals, right, by), 4),
                "after_among_style_images": round(nearest_rate(after, styled, right, by), 4),
            }
            for by in BY
        },
        "captions": len(styled),
    }
