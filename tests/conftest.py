"""A base small enough to train in a test, and images to train it on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

torch.set_num_threads(1)  # the models are tiny, and threads would only wait for one another


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with random weights: 16-pixel images, 8x8 latents, two resolutions."""
    from loratune.families.save import save_diffusers_folder
    from loratune.families.sd import NewStableDiffusion

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
    new = NewStableDiffusion(
        folder / "vae", channels=(16, 32), heads=(2, 2), text_width=16, text_layers=1, latent_size=8
    )
    save_diffusers_folder(new.build(), folder / "tiny", torch.float32)
    return folder / "tiny"


def shrunk(name: str, width: int = 8, depth: int = 2) -> dict[str, dict[str, Any]]:
    """The configurations of a known architecture with few channels; blocks and keys are as many as in the real one.

    Args:
        name: sd15, sd2, sdxl, each also with -inpainting.
        width: of the text encoder and of the U-Net's first level; a multiple of 4.
        depth: of the text encoders.
    """
    from loratune.families.architectures import architectures

    configs = architectures()[name]
    text = {"hidden_size": width, "num_attention_heads": 2, "num_hidden_layers": depth, "vocab_size": 49408}
    configs["text_encoder"] |= text | {"intermediate_size": 2 * width}
    configs["vae"] |= {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
    levels = len(configs["unet"]["block_out_channels"])
    small = {"block_out_channels": [width, 2 * width, 3 * width, 3 * width][:levels], "norm_num_groups": 4}
    configs["unet"] |= small | {"attention_head_dim": 2, "cross_attention_dim": width, "sample_size": 8}
    if "text_encoder_2" in configs:
        wide = {"hidden_size": width + 4, "intermediate_size": 20, "projection_dim": 10}
        configs["text_encoder_2"] |= text | wide
        told = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 10 + 6 * 4}
        configs["unet"] |= told | {"cross_attention_dim": 2 * width + 4, "transformer_layers_per_block": [1, 2, 3]}
    return configs


@pytest.fixture(scope="session")
def tiny_configs() -> Callable[..., dict[str, dict[str, Any]]]:
    """`shrunk`, for tests of every kind of base."""
    return shrunk


def random_weights(
    configs: dict[str, dict[str, Any]], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, dict[str, torch.Tensor]]:
    """Weights for configurations, by component and canonical key."""
    from loratune.families.architectures import entries

    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, dict[str, torch.Tensor]] = {}
    for component, key, shape, _ in entries(configs):
        number = 0.1 * torch.randn(shape, generator=generator)
        norm = "norm" in key and key.endswith(".weight")
        weights.setdefault(component, {})[key] = (number + norm).to(dtype)
    return weights


@pytest.fixture(scope="session")
def tiny_weights() -> Callable[..., dict[str, dict[str, torch.Tensor]]]:
    """`random_weights`, for tests of every kind of base."""
    return random_weights


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with an SDXL of random weights: two text encoders of widths 8 and 12."""
    from loratune.families.known import family_of
    from loratune.families.load import build, tokenizers_of
    from loratune.families.save import save_diffusers_folder

    configs = shrunk("sdxl")
    configs["unet"] |= {"block_out_channels": [8, 16, 24], "layers_per_block": 1}
    folder = tmp_path_factory.mktemp("sdxl")
    tokenizers = tokenizers_of(folder, family_of(configs))
    family = build(configs, random_weights(configs), tokenizers, torch.float32, "tiny")
    save_diffusers_folder(family, folder / "tiny", torch.float32)
    return folder / "tiny"


def write_images(folder: Path, count: int, captions: bool = True, size: int = 16) -> Path:
    """A folder of coloured discs with captions in metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = ["red", "green", "blue", "black"]
    lines = []
    for number in range(count):
        image = Image.new("RGB", (size, size), "white")
        box = (1 + number % 3, 2, size - 3, size - 2 - number % 4)
        ImageDraw.Draw(image).ellipse(box, fill=colours[number % len(colours)])
        image.save(folder / f"{number:02d}.png")
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": f"a {colours[number % 4]} disc {number}"}))
    if captions:
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve captioned images."""
    return write_images(tmp_path / "images", 12)


RECIPE = """\
seed_everything: 3
trainer:
  default_root_dir: {out}
  max_steps: {steps}
  accelerator: cpu
  precision: 32-true
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
  resolution: 16
  batch_size: 4
  validation_percent: 25
  cache_dir: {cache}
samples:
  every_n_steps: 0
evaluation:
  every_n_steps: 0
  figures: false
"""


@pytest.fixture
def recipe(tiny_base: Path, images: Path, tmp_path: Path) -> Path:
    """A recipe of six LoRA steps on the tiny base."""
    path = tmp_path / "style.yaml"
    out, cache = tmp_path / "run", tmp_path / "cache"
    path.write_text(RECIPE.format(out=out, steps=6, base=tiny_base, data=images, cache=cache))
    return path
