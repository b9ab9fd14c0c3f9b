"""Beside its base: gaps, drift, norms and what is decided by them, and training that does not notice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratune.cli.main import main
from loratune.evaluation.evaluate import Evaluate
from loratune.runs.checkpoints import read_checkpoint
from loratune.runs.history import curves, read

ON = ["--evaluation.every_n_steps", "2", "--evaluation.prompts", "[a dog, a house]", "--evaluation.images", "3"]


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
    for name in ("held_out", "training"):
        assert logged[f"{name}/gap"][0] == (0, 0.0)
        # The start, two epochs of three steps (Lightning counts a validation to the step before), the end.
        assert [step for step, _ in logged[f"{name}/gap"]] == [0, 2, 5, 7]
        assert any(value != 0 for _, value in logged[f"{name}/gap"])
        assert logged[f"{name}/gap_se"][-1][1] > 0
    assert logged["drift"][0] == (0, 0.0)
    assert logged["drift"][-1][1] > 0
    assert {name for name in logged if name.startswith("norm/")} == {
        *("norm/down.0", "norm/down.1", "norm/mid"),
        *("norm/up.0", "norm/up.1"),
    }
    ranges = [dict(points) for name, points in logged.items() if "train/loss_t" in name]
    assert len(ranges) == 4
    assert any(len(one) < 7 for one in ranges)  # a range in which none of four images fell says nothing
    for step, loss in logged["train/loss"]:
        told = [one[step] for one in ranges if step in one]
        assert min(told) <= loss <= max(told)
    assert sum("held_out/gap_t" in name for name in logged) == 4


def test_the_best_checkpoint_is_the_one_with_the_smallest_gap(recipe: Path, tmp_path: Path) -> None:
    # At a rate this high the gap does not only fall.
    words = ["--checkpoint.monitor", "held_out/gap", "--checkpoint.every_n_train_steps", "2"]
    words += ["--model.optimizer.init_args.lr", "0.3", "--evaluation.every_n_steps", "1000"]
    assert fit(recipe, *ON, *words, "--trainer.max_steps", "12") == 0
    gaps = dict(found(tmp_path / "run")["held_out/gap"][1:])
    assert sorted(gaps) == [2, 5, 8, 11]  # at each validation, since a checkpoint waits for it
    best = min(gaps, key=lambda step: gaps[step]) + 1
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"epoch={best // 3 - 1}-step={best}.ckpt", "last.ckpt"]
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 12


def test_a_checkpoint_that_waits_for_nothing_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(recipe, *ON, "--checkpoint.monitor", "held_out/gapp") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("loratune: checkpoint.monitor is held_out/gapp, which no validation logs; there is drift")
    assert "held_out/gap," in told


def test_a_run_stops_early_by_the_gap(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace(
        "  log_every_n_steps: 1\n",
        "  log_every_n_steps: 1\n  callbacks:\n    - class_path: EarlyStopping\n      init_args:\n"
        "        {monitor: held_out/gap, patience: 2, min_delta: 1000}\n",
    )
    recipe.write_text(text)
    assert fit(recipe, *ON, "--evaluation.every_n_steps", "1000", "--trainer.max_steps", "30") == 0
    logged = found(tmp_path / "run")
    assert logged["train/loss"][-1][0] == 8  # the first counts, two more do not better it by that much


def test_a_resumed_run_logs_what_the_whole_one_does(recipe: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    words = [*ON, "--trainer.log_every_n_steps", "2", "--checkpoint.every_n_train_steps", "5"]
    words += ["--checkpoint.save_top_k", "-1", "--trainer.max_steps", "9"]
    assert fit(recipe, *words, "--trainer.default_root_dir", str(whole)) == 0
    assert fit(recipe, *words, "--trainer.default_root_dir", str(half)) == 0
    early = next((half / "checkpoints").glob("*step=5.ckpt"))
    with open(half / "history.jsonl", "a") as file:  # of a run that went on to other numbers, and died in a line
        file.write(json.dumps({"step": 8, "train/loss": 77.0, "gone": 1.0}) + '\n{"step": 9, "tra')
    assert fit(recipe, *words, "--trainer.default_root_dir", str(half), "--ckpt_path", str(early)) == 0
    one, two = found(whole), found(half)
    assert one.keys() == two.keys()
    for name in one.keys() - {"train/steps_per_second"}:
        assert one[name] == two[name], name


def test_without_held_out_images_it_is_compared_by_steps(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, *ON, "--data.validation_percent", "0", "--trainer.max_steps", "5") == 0
    logged = found(tmp_path / "run")
    assert [step for step, _ in logged["training/gap"]] == [0, 2, 4, 5]
    assert "held_out/gap" not in logged


def test_a_run_goes_on_from_a_lora_whose_gap_is_told_at_the_start(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe) == 0
    words = ["--model.lora.init_from", str(tmp_path / "run" / "lora.safetensors"), "--trainer.max_steps", "1"]
    assert fit(recipe, *ON, *words, "--trainer.default_root_dir", str(tmp_path / "next")) == 0
    assert found(tmp_path / "next")["training/gap"][0][1] != 0
    assert found(tmp_path / "next")["drift"][0][1] > 0


class Told:
    """A trainer as far as `_watch` asks."""

    global_step = 0
    loggers = ()


def test_overfitting_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    watcher = Evaluate()

    def at(step: int, held_out: float, training: float) -> None:
        watcher._at = step
        spread = torch.linspace(0, 1, 6, dtype=torch.float64)[:, None]
        watcher._watch(Told(), {"held_out": held_out + spread, "training": training + spread})  # type: ignore[arg-type]

    at(10, 1.0, 1.0)
    at(20, 0.8, 0.9)
    at(30, 0.9, 0.95)  # both rose: too high a rate, not overfitting
    assert not caplog.text
    at(40, 0.9, 0.7)
    at(50, 1.0, 0.6)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith("step 40: held-out loss rose by 0.1000 (standard error 0.0000) since step 20")
    again = Evaluate()
    again.load_state_dict(watcher.state_dict())
    watcher = again
    at(60, 1.1, 0.5)
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("words", "changed"),
    [
        (["--evaluation.images", "2"], "training/gap"),
        (["--evaluation.prompts", "[a house, a dog]"], "drift"),
        (["--evaluation.levels", "3"], "training/gap"),
        (["--evaluation.seed", "1"], "training/gap"),
    ],
)
def test_every_key_changes_what_is_measured(recipe: Path, tmp_path: Path, words: list[str], changed: str) -> None:
    made = []
    for name, more in (("one", []), ("two", words)):
        out = ["--trainer.default_root_dir", str(tmp_path / name), "--trainer.max_steps", "2"]
        assert fit(recipe, *ON, *out, *more) == 0
        made.append(found(tmp_path / name)[changed][-1][1])
    assert made[0] != made[1]
