"""`loratune quickstart`: the whole of it once."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratune.cli.say import say
from loratune.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = 10
STEPS, GUIDANCE, SEED = 25, 4.0, 7


def quickstart(
    *overrides: str,
    recipe: Path = Path("recipes/quickstart.yaml"),
    out: Path = Path("runs/quickstart"),
    lora_scale: float = 0.75,
) -> None:
    """Train the quickstart's LoRA, merge it, sample before and after, and measure: what `make demo` runs.

    The images are of captions that the LoRA never saw: the folders beside the recipe's data that end in
    -heldout, the style's own images and the base's.

    Args:
        recipe: what to train; its keys can be overridden, as in --trainer.max_steps 100.
        out: folder of the run; an earlier run there is replaced.
        lora_scale: LoRA scale in the merged checkpoint and its images; less keeps more of the base.
    """
    from loratune.recipe.reader import read_recipe
    from loratune.recipe.run import run

    started = time.perf_counter()
    _check_data(recipe, read_recipe(recipe))
    words = ["--trainer.default_root_dir", str(out), *_overwrite(out), *overrides]
    cli = run(["fit", "-c", str(recipe), *words])
    trained = time.perf_counter()
    numbers = _compare(
        cli.model.base_name, Path(cli.datamodule.sources[0].path), cli.datamodule.resolution, out, lora_scale
    )
    finished = time.perf_counter()
    numbers["seconds"] = {"training": round(trained - started, 1), "all": round(finished - started, 1)}
    _write(out / "metrics.json", numbers)
    say(_text(out, numbers))


def _check_data(recipe: Path, settings: dict[str, Any]) -> None:
    """See that there is something to compare with, before anything is trained."""
    path = (settings.get("data") or {}).get("path")
    for folder in (Path(f"{path}-heldout"), Path(str(path)).parent / "noto-heldout"):
        if not folder.exists():
            raise UserError(
                f"{recipe}: quickstart compares on {folder}, which does not exist; train it by loratune fit"
            )


def _overwrite(out: Path) -> list[str]:
    """The words that replace an earlier run.

    Raises:
        UserError: the folder holds something else.
    """
    from loratune.runs.folder import LOCK, holds_a_run

    if not out.exists():
        return []
    if not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if holds_a_run(out):
        return ["--run.overwrite", "true"]
    if {path.name for path in out.iterdir()} - {LOCK}:
        raise UserError(f"{out}: holds something that no quickstart made; give --out another folder")
    return []


def _compare(base: str, data: Path, size: int, out: Path, lora_scale: float) -> dict[str, Any]:
    """Merge the run's LoRA, sample before and after, and measure both."""
    import torch

    from loratune.evaluation.measure import Sampling, draw_all, read_images, style_numbers
    from loratune.families.base import Base
    from loratune.lora.load import load_with
    from loratune.lora.merge.request import Given, Request
    from loratune.lora.merge.run import merge

    lora, merged = out / "lora.safetensors", out / "merged.safetensors"
    merge(Request(Base.open(base), [Given(lora, lora_scale)], merged))
    styled, captions = read_images(f"{data}-heldout", size)
    reals, _ = read_images(str(data.parent / "noto-heldout"), size)
    sampling = Sampling(size, STEPS, GUIDANCE, SEED)
    before = draw_all(load_with(base, []), captions, sampling)
    after = draw_all(load_with(str(merged), []), captions, sampling)
    _before_after(before, after, captions, out / "before_after.png")
    facts = {"lora_scale": lora_scale, "lora_bytes": lora.stat().st_size, "threads": torch.get_num_threads()}
    return style_numbers(before, after, reals, styled) | facts


def _before_after(before: Tensor, after: Tensor, captions: list[str], path: Path) -> None:
    from loratune.evaluation.grids import grid
    from loratune.formats.atomic import atomic_path
    from loratune.formats.images import to_image

    rows = [[to_image(pixels) for pixels in row[:SHOWN]] for row in (before, after)]
    with atomic_path(path) as temporary:
        grid(rows, captions[:SHOWN], ["base", "with LoRA"]).save(temporary, "PNG")


def _write(path: Path, numbers: dict[str, Any]) -> None:
    from loratune.formats.atomic import atomic_path

    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


def _text(out: Path, numbers: dict[str, Any]) -> str:
    style, nearest = numbers["colourfulness"], numbers["nearest_of_20_by_shapes"]
    return f"""
Done in {numbers["seconds"]["all"]:.0f} s, of which {numbers["seconds"]["training"]:.0f} s were the training.
  {out}/before_after.png      the same captions, which the LoRA never saw, before and after
  {out}/lora.safetensors      the LoRA, {numbers["lora_bytes"] / 1e6:.2f} MB
  {out}/merged.safetensors    U-Net, text encoder and VAE with it merged in, at LoRA scale {numbers["lora_scale"]:g}
  {out}/metrics.json          what was measured
  {out}/tensorboard           tensorboard --logdir {out}
Mean colourfulness {style["before"]:.3f} -> {style["after"]:.3f}, {style["share_of_the_way"]:.0%} of the way to the \
style's own {style["style_images"]:.3f}.
By shape, the nearest of 20 of the base's images is the right one for {nearest["before_among_base_images"]:.0%} \
of the samples before, and for {nearest["after_among_base_images"]:.0%} after."""
