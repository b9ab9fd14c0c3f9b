"""The figures at the end of a run: the process forward and back, and where words are seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from torch import Tensor

from loratune.evaluation.attention import Maps, recorded, shares
from loratune.evaluation.grids import captioned
from loratune.evaluation.paired import evaluating, fixed_chunks
from loratune.evaluation.strips import evenly, forward_states, heat, strip
from loratune.families.model import Model
from loratune.families.sampling import sample_latents
from loratune.formats.atomic import atomic_path, tolerated
from loratune.formats.images import to_image
from loratune.runs.loggers import log_image
from loratune.training.randomness import generator

log = logging.getLogger(__name__)
FOLDER = "figures"
STEPS, GUIDANCE, SHOWN = 20, 4.0, 8
MOST_WORDS, ACROSS = 14, 8
LOOKED_AT = 64


def save_figure(trainer: L.Trainer, image: Image.Image, name: str, tag: str) -> None:
    """An image into the run's folder, as figures/NAME.png, and into TensorBoard; where the disk is full, said."""
    path = Path(trainer.default_root_dir) / FOLDER / f"{name}.png"
    with tolerated(path), atomic_path(path) as temporary:
        image.save(temporary, "PNG")
    log_image(trainer, image, tag)


def draw_figures(trainer: L.Trainer, module: L.LightningModule, model: Model, seed: int) -> None:
    """Draw and save them; whatever fails at it, such as a device without the memory, loses them and not the run."""
    try:
        with evaluating(trainer, module):
            images = figures(model, getattr(trainer, "datamodule", None), seed)
            for name, image in images.items() if trainer.is_global_zero else ():
                save_figure(trainer, image, name, f"figures/{name}")
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        log.warning("figures: not drawn (%s); set evaluation.figures: false", reason)


@torch.no_grad()
def figures(model: Model, data: Any, seed: int) -> dict[str, Image.Image]:
    """Images by the names of report.strips.FIGURES.

    Args:
        model: the base with its adapter.
        data: the run's data; a held-out image is taken, or one of the training's.
        seed: of the noise.
    """
    rows = data.held_out if len(data.held_out) else data.training
    number = telling([entry.caption for entry in rows.entries[:LOOKED_AT]])
    caption = rows.entries[number].caption
    chunk = fixed_chunks(model, [rows[number]], 1, 1)[0]
    x_0 = chunk.x_0[0].to(model.device)
    steps = evenly(len(model.noise_schedule), SHOWN)
    noise = torch.randn(x_0.shape, generator=generator("cpu", seed, "forward")).to(x_0)
    states = forward_states(x_0, noise, model.noise_schedule.at, steps)
    images = {"forward": strip(_decoded(model, states), [f"t = {t}" for t in steps])}
    estimates: list[Tensor] = []

    def keep(done: int, estimate: Tensor) -> None:
        estimates.append(estimate[0])

    def drawn() -> Tensor:
        return sample_latents(
            model, [caption], [seed], data.resolution, data.resolution, STEPS, GUIDANCE, on_estimate=keep
        )

    if words := model.words(caption):
        with recorded(model.network) as maps:
            end = drawn()
        images["words"] = _words(words, maps, _decoded(model, end)[0], end.shape[-1])
    else:
        end = drawn()
    if estimates:
        kept = evenly(len(estimates), SHOWN)
        shown = _decoded(model, [estimates[at] for at in kept])
        images["reverse"] = strip(shown, [f"step {at + 1}" for at in kept])
    return images


def telling(captions: Sequence[str]) -> int:
    """The number of the caption with the most words of those that have no more than can be shown; else the first."""
    counts = [len(caption.split()) for caption in captions]
    return max(range(len(counts)), key=lambda at: counts[at] if counts[at] <= MOST_WORDS else 0)


def _decoded(model: Model, latents: Sequence[Tensor] | Tensor) -> list[Image.Image]:
    # One at a time: a VAE's memory for one image is known to be there.
    return [to_image(model.decode(latent[None]).clamp(-1, 1)[0]) for latent in latents]


def _words(words: Sequence[tuple[str, Sequence[int]]], maps: Maps, image: Image.Image, side: int) -> Image.Image:
    seen = shares(maps.tokens(side), words)
    names = ["the image", *(word for word, _ in words[:MOST_WORDS])]
    images = [image, *(heat(image, share) for share in seen[:MOST_WORDS])]
    return captioned(images, names, ACROSS)
