"""Every shipped recipe trains two steps with its own keys; base, sizes and images alone are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL

from loratune.cli.main import main

ROOT = Path(__file__).parent.parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STEPS = 2
# What makes a network small, by key.
SMALL: dict[str, Any] = {"channels": [16, 16], "heads": [2, 2], "width": 32, "text_width": 16}


def stand_in(tree: Any, stands: dict[str, Any]) -> Any:
    """A recipe's tree with other values for some keys, wherever they are; no key is added or taken away."""
    if isinstance(tree, dict):
        return {
            key: stands[key] if key in stands and not isinstance(value, dict) else stand_in(value, stands)
            for key, value in tree.items()
        }
    return [stand_in(one, stands) for one in tree] if isinstance(tree, list) else tree


def keys_of(tree: Any, prefix: str = "") -> set[str]:
    """Dotted names of a tree's keys."""
    if not isinstance(tree, dict):
        return set()
    here = {f"{prefix}{key}" for key in tree}
    return here.union(*(keys_of(value, f"{prefix}{key}.") for key, value in tree.items()))


def placed(settings: dict[str, Any], tmp_path: Path) -> Path:
    """Settings for two steps on a CPU in a folder; returns the run's."""
    out = tmp_path / "run"
    settings["trainer"] |= {"max_steps": STEPS, "default_root_dir": str(out), "accelerator": "cpu"}
    if "buckets" in settings["data"]:
        settings["data"]["buckets"] |= {"step": 8, "smallest": 8, "largest": 64}
    settings["data"]["cache_dir"] = str(tmp_path / "cache")
    return out


@pytest.fixture
def small_vae(tmp_path: Path) -> Path:
    """A VAE that was trained before, as it were."""
    made = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        norm_num_groups=4,
    )
    made.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_trains_with_its_own_keys(
    path: Path, tiny_base: Path, tiny_sdxl: Path, small_vae: Path, images: Path, tmp_path: Path
) -> None:
    shipped = yaml.safe_load(path.read_text())
    xl = "xl" in str(shipped["model"].get("base", ""))
    size = 32 if xl else 16
    stands = SMALL | {
        "base": str(tiny_sdxl if xl else tiny_base),
        "vae": str(small_vae),
        "path": str(images),
        "resolution": size,
        "size": size,
        "batch_size": 2,
    }
    settings = stand_in(shipped, stands)
    assert keys_of(settings) == keys_of(shipped)
    out = placed(settings, tmp_path)
    samples = settings.setdefault("samples", {})
    samples |= {"steps": 1, "every_n_steps": STEPS if samples.get("every_n_steps", STEPS) else 0}
    recipe = tmp_path / path.name
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["fit", "-c", str(recipe), "--trainer.enable_progress_bar", "false"]) == 0
    last = torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == STEPS
    assert last["state_dict"]
    assert all(torch.isfinite(value).all() for value in last["state_dict"].values() if value.is_floating_point())
    made = {one.name for one in out.iterdir()}
    if "class_path" not in shipped["model"]:
        assert "lora.safetensors" in made or shipped["model"].get("lora", {}).get("targets") == "none"
        assert ("learned_embeds.safetensors" in made) == ("tokens" in shipped["model"])


@pytest.mark.parametrize("name", ["character", "sd15-style", "concept-token", "sdxl-qlora"])
def test_a_recipe_trains_the_embedded_base(name: str, images: Path, tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    stands = {"base": "builtin:emoji-64", "path": str(images), "resolution": 16, "batch_size": 2}
    settings = stand_in(shipped, stands)
    assert keys_of(settings) == keys_of(shipped)
    out = placed(settings, tmp_path)
    settings["samples"]["every_n_steps"] = 0
    settings["evaluation"] = {"every_n_steps": 0, "figures": False}
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert main(["fit", "-c", str(recipe), "--trainer.enable_progress_bar", "false"]) == 0
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == STEPS
    assert (out / "lora.safetensors").is_file()
