"""Beside its base: gaps, drift, norms and what is decided by them, and training that does not notice."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from loratune.cli import main
from loratune.report.history import curves, read

ON = ["--evaluation.every_n_steps", "2", "--evaluation.prompts", "[a dog, a house]", "--evaluation.pictures", "3"]


def fit(recipe: Path, *words: str) -> int:
    return main(["fit", "-c", str(recipe), *words])


def found(folder: Path) -> dict[str, list[tuple[int, float]]]:
    return curves(read(folder / "history.jsonl"))


def test_training_is_the_same_bytes_with_and_without(recipe: Path, tmp_path: Path) -> None:
    made = []
    dropout = ["--model.lora.dropout", "0.3", "--model.objective.caption_dropout", "0.5"]
    for name, words in (("with", [*ON, "--evaluation.figures", "true"]), ("without", [])):
        assert fit(recipe, *dropout, *words, "--trainer.default_root_dir", str(tmp_path / name)) == 0
        made.append(load_file(tmp_path / name / "lora.safetensors"))
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])
    with_it, without = found(tmp_path / "with"), found(tmp_path / "without")
    assert with_it["train/loss"] == without["train/loss"]
    assert with_it["val/loss"] == without["val/loss"]
    assert "held_out/gap" not in without


def test_what_is_logged_and_when(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, *ON, "--trainer.max_steps", "7") == 0
    logged = found(tmp_path / "run")
    for name in ("held_out", "training", "neutral"):
        assert logged[f"{name}/gap"][0] == (0, 0.0)
        # The start, two epochs of three steps (Lightning counts a validation to the step before), the end.
        assert [step for step, _ in logged[f"{name}/gap"]] == [0, 2, 5, 7]
        assert any(value != 0 for _, value in logged[f"{name}/gap"])
        assert logged[f"{name}/gap_se"][-1][1] > 0
    assert logged["drift"][0] == (0, 0.0)
    assert logged["drift"][-1][1] > 0
    assert {name for name in logged if name.startswith("norm/")} == {
        *("norm/unet.down_blocks.0", "norm/unet.down_blocks.1", "norm/unet.mid_block"),
        *("norm/unet.up_blocks.0", "norm/unet.up_blocks.1"),
    }
    assert sum("train/loss_t" in name for name in logged) == 4
    assert sum("held_out/gap_t" in name for name in logged) == 4
