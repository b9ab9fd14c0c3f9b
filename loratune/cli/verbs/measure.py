"""`loratune measure`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from loratune.cli.say import say
from loratune.errors import UserError


def measure(
    base: str,
    what: Literal["vae", "nearest", "style"],
    data: str,
    lora: list[str] = [],  # noqa: B006 (jsonargparse shows it as the default)
    style: str | None = None,
    samples: int = 200,
    size: int = 64,
    steps: int = 25,
    guidance_scale: float = 4.0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Measure a base or a LoRA on real captioned images, and print JSON.

    vae: PSNR in dB of the VAE's reconstructions. nearest: how often the nearest of 20 random real
    images to a sample, by shape and by colour, is the one of its caption (chance is 5 %). style: how far
    a LoRA moves the mean colourfulness of samples from the base's to the style's, on the captions of `data`.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        what: vae, nearest or style.
        data: captioned images: a folder, a .parquet file or a hub name; for style, images of the base's own style.
        lora: a LoRA file, or FILE:SCALE; repeat it to add several.
        style: for style: the style's own images of the captions of --data.
        samples: how many images to measure.
        size: side in pixels.
        steps: inference steps of the sampler.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        seed: of the samples and of the choice of images.
        out: also write the JSON here.
    """
    if what == "style" and not (style and lora):
        raise UserError("measure style: give --lora FILE and --style DATA too")
    from loratune.evaluation import measure as room
    from loratune.formats.atomic import atomic_path
    from loratune.lora.load import load_with

    sampling = room.Sampling(size, steps, guidance_scale, seed)
    reals, captions = room.read_images(data, size)
    if what == "vae":
        numbers = room.measure_vae(load_with(base, lora), reals[:samples])
    elif what == "nearest":
        numbers = room.measure_nearest(load_with(base, lora), reals, captions, samples, sampling)
    else:
        styled, names = room.read_images(str(style), size)
        if names != captions:
            raise UserError(f"{style}: its captions are not those of {data}, in the same order")
        numbers = room.measure_style(base, lora, reals, styled, captions, sampling)
    text = json.dumps(numbers, indent=2)
    say(text)
    if out:
        with atomic_path(out) as path:
            path.write_text(text + "\n", encoding="utf-8")
