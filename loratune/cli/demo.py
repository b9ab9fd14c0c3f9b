"""The whole of it once: train a style, merge it, draw before and after, measure."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from loratune.errors import UserError
from loratune.evaluation.grids import grid
from loratune.evaluation.measure import draw_all, read_images, style_numbers
from loratune.formats.files import atomic_path
from loratune.formats.images import to_image
from loratune.lora.load import load_with
from loratune.lora.merge.run import merge
from loratune.recipe.parse import run

SHOWN = 10
STEPS, GUIDANCE, SEED = 25, 4.0, 7


def quickstart(recipe: Path, out: Path, weight: float) -> None:
    """Train the recipe's LoRA into `out`, and beside it the merged checkpoint, before_after.png and metrics.json.

    The LoRA counts with `weight` in all but its own file.

    The images are of captions that the LoRA never saw: the folders beside the recipe's data that end in
    -heldout, the style's own images and the base's.

    Raises:
        UserError: `out` holds something that no quickstart made.
    """
    started = time.perf_counter()
    _clear(out)
    settings: dict[str, Any] = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    base, data, size = settings["model"]["base"], Path(settings["data"]["path"]), settings["data"]["resolution"]
    run(["fit", "-c", str(recipe), "--trainer.default_root_dir", str(out)])
    trained = time.perf_counter()
    lora, merged = out / "lora.safetensors", out / "merged.safetensors"
    merge(base, [f"{lora}:{weight:g}"], merged)
    styled, captions = read_images(f"{data}-heldout", size)
    reals, _ = read_images(str(data.parent / "noto-heldout"), size)
    before = draw_all(load_with(base, []), captions, size, STEPS, GUIDANCE, SEED)
    after = draw_all(load_with(str(merged), []), captions, size, STEPS, GUIDANCE, SEED)
    _before_after(before, after, captions, out / "before_after.png")
    numbers = style_numbers(before, after, reals, styled)
    numbers["lora_weight"] = weight
    numbers["lora_bytes"] = lora.stat().st_size
    numbers["seconds"] = {
        "training": round(trained - started, 1),
        "all": round(time.perf_counter() - started, 1),
    }
    numbers["threads"] = torch.get_num_threads()
    with atomic_path(out / "metrics.json") as path:
        path.write_text(json.dumps(numbers, indent=2) + "\n")
    _say(out, numbers)


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()):
        if not (out / "recipe.yaml").is_file():
            raise UserError(f"{out}: holds something that no quickstart made; give --out another folder")
        shutil.rmtree(out)


def _before_after(before: Tensor, after: Tensor, captions: list[str], path: Path) -> None:
    rows = [[to_image(pixels) for pixels in row[:SHOWN]] for row in (before, after)]
    with atomic_path(path) as temporary:
        grid(rows, captions[:SHOWN], ["base", "with LoRA"]).save(temporary, "PNG")


def _say(out: Path, numbers: dict[str, Any]) -> None:
    style, nearest = numbers["colourfulness"], numbers["nearest_of_20_by_shapes"]
    print(f"""
Done in {numbers["seconds"]["all"]:.0f} s, of which {numbers["seconds"]["training"]:.0f} s were the training.
  {out}/before_after.png      the same captions, which the LoRA never saw, before and after
  {out}/lora.safetensors      the LoRA, {numbers["lora_bytes"] / 1e6:.2f} MB
  {out}/merged.safetensors    U-Net, text encoder and VAE with it merged in, at weight {numbers["lora_weight"]:g}
  {out}/metrics.json          what was measured
  {out}/tensorboard           tensorboard --logdir {out}
Mean colourfulness {style["before"]:.3f} -> {style["after"]:.3f}, {style["share_of_the_way"]:.0%} of the way to the \
style's own {style["style_images"]:.3f}.
By shape, the nearest of 20 of the base's images is the right one for {nearest["before_among_base_images"]:.0%} \
of the samples before, and for {nearest["after_among_base_images"]:.0%} after.""")
