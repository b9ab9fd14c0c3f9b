"""`loratune sample`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from loratune.cli.say import say
from loratune.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image


def sample(
    base: str,
    lora: list[str] = [],  # noqa: B006 (jsonargparse shows it as the default)
    prompt: list[str] = [],  # noqa: B006
    prompts: Path | None = None,
    out: Path = Path("samples"),
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str | None = None,
    seed: int = 0,
    count: int = 1,
    size: int | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    device: str = "auto",
    embedding: list[Path] = [],  # noqa: B006
    chunks: int = 1,
    prompt_weighting: bool = False,
    captions: bool = False,
) -> None:
    """Sample images: a PNG for each prompt and seed, and a grid of them all.

    Args:
        base: builtin:NAME, a diffusers folder, a .safetensors file, or a hub id.
        lora: a LoRA file, or FILE:SCALE; repeat it to add several.
        prompt: what to sample; repeat it for several images.
        prompts: a text file with one prompt a line.
        out: folder for the images.
        steps: inference steps of the sampler.
        guidance_scale: of classifier-free guidance; 1 turns it off.
        sampler: ddim, ddpm, euler, euler-a, dpm++ or unipc; a flow-matching base has euler alone. By default the first
            that its family has.
        seed: of the first image of each prompt; the same seed and prompt give the same image.
        count: images of each prompt, from seed, seed + 1, and so on.
        size: side in pixels; by default the base's own.
        height: in pixels, where it is unlike the width.
        width: in pixels.
        batch_size: images sampled at once; above 1 the last bits of an image may depend on it.
        device: auto, cpu, cuda, cuda:1, mps.
        embedding: a file with a learned token (textual inversion), which prompts may then use; repeat it.
        chunks: chunks of 75 tokens that a prompt may fill.
        prompt_weighting: read (word:1.2) in prompts as a prompt weight; write brackets that are meant as \\( and \\).
        captions: write the prompt beside each image (.txt), and no grid: a folder to train on.
    """
    for key, value in (("steps", steps), ("count", count), ("batch-size", batch_size)):
        if value < 1:
            raise UserError(f"--{key} is {value}; give 1 or more")
    every = [*prompt, *(_lines(prompts) if prompts else [])]
    if not every:
        raise UserError("sample: nothing to draw; give --prompt TEXT or --prompts FILE")
    from rich.progress import track

    from loratune.families.prompts import Prompts, parse_weights
    from loratune.families.sampling import make_scheduler, sample_images
    from loratune.formats.images import to_image
    from loratune.lora.load import load_with

    try:
        reading = Prompts(chunks, prompt_weighting)
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('prompts.')}") from None
    for text in every if prompt_weighting else ():
        parse_weights(text)
    model = load_with(base, lora, device, embedding)
    model.prompts = reading
    make_scheduler(model, sampler)
    _writable(out)
    pairs = [(text, seed + number) for text in every for number in range(count)]
    own = model.image_size()
    high, wide = height or size or own[0], width or size or own[1]
    images: list[Image] = []
    parts = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    for part in track(parts, description="sampling", transient=True):
        texts, seeds = [text for text, _ in part], [number for _, number in part]
        images.extend(
            map(to_image, sample_images(model, texts, seeds, high, wide, steps, guidance_scale, sampler).cpu())
        )
    _save(images, pairs, out, captions)
    if not captions:
        _save_grid(images, every, seed, out / "grid.png", max(128, high, wide))
    say(f"{len(images)} images and {'their captions' if captions else 'grid.png'} are in {out}")


def _lines(path: Path) -> list[str]:
    """The prompts of a text file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text file in UTF-8; write one prompt a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _writable(out: Path) -> None:
    """Make the folder before anything is drawn."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    out.mkdir(parents=True, exist_ok=True)


def _save(images: list[Image], pairs: list[tuple[str, int]], out: Path, captions: bool) -> None:
    """Write a PNG for each (prompt, seed), and its caption where they are asked for."""
    for number, (image, (text, seed)) in enumerate(zip(images, pairs, strict=True)):
        file = out / f"{number:03d}-{slug(text)}-{seed}.png"
        image.save(file)
        if captions:
            file.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")


def _save_grid(images: list[Image], prompts: list[str], seed: int, path: Path, cell: int) -> None:
    """All images in one: a column for each prompt, a row for each seed."""
    from loratune.evaluation.grids import grid

    count = len(images) // len(prompts)
    rows = [[images[i * count + n] for i in range(len(prompts))] for n in range(count)]
    grid(rows, prompts, [f"seed {seed + n}" for n in range(count)], cell=cell).save(path)


def slug(text: str) -> str:
    """Words of a text, safe as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"
