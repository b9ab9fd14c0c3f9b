"""Pictures drawn from a base with LoRAs: the verb sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from rich.progress import track
from torch import Tensor

from loratune.adapters.merge import merge_into, parse_weighted
from loratune.adapters.tokens import put_embedding
from loratune.errors import UserError
from loratune.families.files import layer_names, load_family
from loratune.families.prompts import Prompts, parse_weights
from loratune.families.sampling import draw, make_sampler
from loratune.families.stable_diffusion import StableDiffusion
from loratune.formats.bases import configs_of_file, find_base
from loratune.formats.lora import LoRAFile
from loratune.formats.pictures import to_picture
from loratune.report.grids import grid


def pick_device(name: str) -> torch.device:
    """`auto`: the first GPU, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros((), device=name).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: not available here; give cpu or auto") from None


def load_with(base: str, lora: Sequence[str], device: str = "auto", embedding: Sequence[Path] = ()) -> StableDiffusion:
    """A base with LoRAs added to its weights and with learned tokens, ready to draw."""
    family = load_family(base)
    names = layer_names(configs_of_file(find_base(base)))
    loras = [parse_weighted(text, names) for text in lora]
    merge_into(family.components(), loras)
    for one in loras:
        family.follow(cast(LoRAFile, one.file).metadata)
    for file in embedding:
        put_embedding(file, family.text_parts())
    return family.requires_grad_(False).eval().to(pick_device(device))


def own_size(family: StableDiffusion) -> int:
    """The side of the pictures a base was made for, in pixels."""
    return int(family.network.config["sample_size"] * 2 ** (len(family.vae.config["block_out_channels"]) - 1))


def sample(
    base: str,
    lora: Sequence[str],
    prompts: Sequence[str],
    out: Path,
    steps: int,
    guidance: float,
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
    """Draw `count` pictures of each prompt into `out`: PNG files, and grid.png or captions."""
    for key, value in (("steps", steps), ("count", count), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"--{key} is {value}; give 1 or more")
    try:
        told = Prompts(chunks, weights)
    except ValueError as error:
        raise UserError(f"--{str(error).removeprefix('prompts.')}") from None
    for prompt in prompts if weights else ():
        parse_weights(prompt)
    family = load_with(base, lora, device, embedding)
    family.prompts = told
    make_sampler(sampler, family.scheduler_config)
    wanted = [(prompt, seed + number) for prompt in prompts for number in range(count)]
    side = size or own_size(family)
    drawn: list[Tensor] = []
    parts = [wanted[i : i + batch_size] for i in range(0, len(wanted), batch_size)]
    for part in track(parts, description="drawing", transient=True):
        texts, seeds = [prompt for prompt, _ in part], [one for _, one in part]
        drawn.extend(draw(family, texts, seeds, side, steps, guidance, sampler).cpu())
    out.mkdir(parents=True, exist_ok=True)
    pictures = [to_picture(pixels) for pixels in drawn]
    for number, (picture, (prompt, one)) in enumerate(zip(pictures, wanted, strict=True)):
        file = out / f"{number:03d}-{slug(prompt)}-{one}.png"
        picture.save(file)
        if captions:
            file.with_suffix(".txt").write_text(prompt + "\n", encoding="utf-8")
    if captions:
        print(f"{len(pictures)} pictures and their captions are in {out}")
        return
    rows = [[pictures[i * count + n] for i in range(len(prompts))] for n in range(count)]
    grid(rows, prompts, [f"seed {seed + n}" for n in range(count)], cell=max(128, side)).save(out / "grid.png")
    print(f"{len(pictures)} pictures and grid.png are in {out}")


def slug(text: str) -> str:
    """Words of a text, safe as a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "empty"
