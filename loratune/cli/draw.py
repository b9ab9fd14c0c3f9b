"""Images drawn from a base with LoRAs: the verb sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track
from torch import Tensor

from loratune.errors import UserError
from loratune.evaluation.grids import grid
from loratune.families.prompts import Prompts, parse_weights
from loratune.families.sampling import make_scheduler, sample_images
from loratune.formats.images import to_image
from loratune.lora.load import load_with


def sample(
    base: str,
    lora: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    steps: int,
    guidance_scale: float,
    sampler: str,
    seed: int,
    count: int,
    size: int | None,
    batch_size: int,
    device: str,
    embedding: Sequence[Path] = (),
    chunks: int = 1,
    weights: bool = False,
    captions: bool = False,
) -> None:
    """Draw `count` images of each prompt into `out`: PNG files, and grid.png or captions."""
    for key, value in (("steps", steps), ("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{key} is {value}; give 1 or more")
    try:
        told = Prompts(chunks, weights)
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('prompts.')}") from None
    for prompt in prompts if weights else ():
        parse_weights(prompt)
    model = load_with(base, lora, device, embedding)
    model.prompts = told
    make_scheduler(model, sampler)
    wanted = [(prompt, seed + number) for prompt in prompts for number in range(count)]
    height, width = (size, size) if size else model.image_size()
    drawn: list[Tensor] = []
    parts = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for part in track(parts, description="drawing", transient=True):
        texts, seeds = [prompt for prompt, _ in part], [one for _, one in part]
        drawn.extend(sample_images(model, texts, seeds, height, width, steps, guidance_scale, sampler).cpu())
    out.mkdir(parents=True, exist_ok=True)
    images = [to_image(pixels) for pixels in drawn]
    for number, (image, (prompt, one)) in enumerate(zip(images, wanted, strict=True)):
        file = out / f"{number:03d}-{slug(prompt)}-{one}.png"
        image.save(file)
        if captions:
            file.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
    if captions:
        print(f"{len(images)} images and their captions are in {out}")
        return
    rows = [[images[i * count + n] for i in range(len(prompts))] for n in range(count)]
    grid(rows, prompts, [f"seed {seed + n}" for n in range(count)], cell=max(128, height, width)).save(out / "grid.png")
    print(f"{len(images)} images and grid.png are in {out}")


def slug(text: str) -> str:
    """Words of a text, safe as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"
