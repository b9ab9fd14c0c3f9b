"""A base small enough to train in a test, and pictures to train it on."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

torch.set_num_threads(1)  # the models are tiny, and threads would only wait for one another


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights: 16-pixel pictures, 8x8 latents, two resolutions."""
    from loratune.families.files import save_diffusers_folder
    from loratune.families.stable_diffusion import NewStableDiffusion

    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )
    vae.save_pretrained(folder / "vae")
    family = NewStableDiffusion(
        folder / "vae", channels=(16, 32), heads=(2, 2), text_width=16, text_layers=1, latent_size=8
    )
    save_diffusers_folder(family, folder / "tiny", torch.float32)
    return folder / "tiny"


def write_pictures(folder: Path, count: int, captions: bool = True, size: int = 16) -> Path:
    """A folder of coloured discs with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = ["red", "green", "blue", "black"]
    lines = []
    for number in range(count):
        picture = Image.new("RGB", (size, size), "white")
        box = (1 + number % 3, 2, size - 3, size - 2 - number % 4)
        ImageDraw.Draw(picture).ellipse(box, fill=colours[number % len(colours)])
        picture.save(folder / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"a {colours[number % 4]} disc {number}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve captioned pictures."""
    return write_pictures(tmp_path / "pictures", 12)


RECIPE = """\
seed_everything: 3
trainer:
  default_root_dir: {out}
  max_steps: {steps}
  accelerator: cpu
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
model:
  base: {base}
  lora: {{rank: 4, alpha: 8, targets: cross-attention}}
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: 1.0e-2}}
data:
  path: {data}
  size: 16
  batch_size: 4
  validation_percent: 25
  cache: {cache}
samples:
  every_n_steps: 0
"""


@pytest.fixture
def recipe(tiny_base: Path, pictures: Path, tmp_path: Path) -> Path:
    """A recipe of six LoRA steps on the tiny base."""
    path = tmp_path / "style.yaml"
    out, cache = tmp_path / "run", tmp_path / "cache"
    path.write_text(RECIPE.format(out=out, steps=6, base=tiny_base, data=pictures, cache=cache))
    return path
