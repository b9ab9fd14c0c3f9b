"""Two runs in one folder do not mix."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.recipe import parse as recipes
from loratune.runs.folder import (
    RESULTS,
    WRITTEN,
    clear,
    give_back,
    holds_a_run,
    refuse_another,
    refuse_foreign,
    take,
)
from loratune.training import diffusion_module as module

HOLD = """
import sys
from pathlib import Path
from loratune.runs.folder import take
take(Path(sys.argv[1]))
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_folder_is_one_processs_at_a_time(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=rf"{tmp_path}: a run is under way there \(process {other.pid} on "):
            take(tmp_path)
        other.kill()
    take(tmp_path)  # a killed process leaves no lock behind
    take(tmp_path)
    give_back()


def test_a_run_under_way_is_told_before_any_weight_is_loaded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were loaded"))
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        assert main(["fit", "-c", str(recipe)]) == 2
        other.kill()
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"loratune: {folder}: a run is under way there")
    assert "\n" not in said


def test_a_folder_with_another_run_is_refused_before_any_weight_is_loaded(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["fit", "-c", str(recipe), "--trainer.max_steps", "2"]) == 0
    (run / "mine.txt").write_text("kept")
    (run / "lora-000001.safetensors").write_text("of the run before")
    capsys.readouterr()
    monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("weights were loaded"))
    assert main(["fit", "-c", str(recipe)]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith(f"loratune: {run}: holds a run; go on with it by --ckpt_path last")
    assert "\n" not in said
    other = str(tmp_path / "other" / "last.ckpt")
    assert main(["fit", "-c", str(recipe), "--ckpt_path", other]) == 2
    assert f"{run}: holds another run" in capsys.readouterr().err
    both = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--run.overwrite", "true"]
    assert main(["fit", "-c", str(recipe), *both]) == 2
    assert "run.overwrite is true, and --ckpt_path" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["fit", "-c", str(recipe), "--run.overwrite", "true", "--trainer.max_steps", "1"]) == 0
    assert (run / "mine.txt").read_text() == "kept"
    assert not (run / "lora-000001.safetensors").exists()
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # the batch system runs the same command again
    assert main(["fit", "-c", str(recipe), "--trainer.max_steps", "2"]) == 0


def test_what_holds_a_run(tmp_path: Path) -> None:
    assert not holds_a_run(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    refuse_another(tmp_path, None, False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("")
    (tmp_path / "recipe.yaml").write_text("# loratune 0.1.0\nseed_everything: 0\n")
    assert holds_a_run(tmp_path)
    refuse_another(tmp_path, None, True)
    refuse_another(tmp_path, tmp_path / "checkpoints" / "last.ckpt", False)
    with pytest.raises(UserError, match="holds a run"):
        refuse_another(tmp_path, None, False)
    clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.txt"]
    assert not holds_a_run(tmp_path)
    assert "recipe.yaml" in WRITTEN


@pytest.mark.parametrize("name", RESULTS)
def test_a_file_that_no_run_wrote_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    for refuse in (refuse_foreign, lambda folder: refuse_another(folder, None, False)):
        with pytest.raises(UserError, match="a run would replace it"):
            refuse(tmp_path)
    clear(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_clear_leaves_what_is_not_of_a_run_and_what_came_since(tmp_path: Path) -> None:
    names = ("recipe.yaml", "lora.safetensors", "lora-000002.safetensors", "lora_mine.safetensors")
    names += ("checkpoints/last.ckpt", "checkpoints/epoch=1-step=4.ckpt", "checkpoints/v1-5.ckpt")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# loratune 0.1.0\n")
    take(tmp_path)
    try:
        (tmp_path / "tensorboard").mkdir()
        since = tmp_path / "tensorboard" / "events.new"
        since.write_text("")
        os.utime(since, (time.time() + 5, time.time() + 5))
        clear(tmp_path)
    finally:
        give_back()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == [".lock", "checkpoints/v1-5.ckpt", "lora_mine.safetensors", "tensorboard/events.new"]


@pytest.mark.parametrize("words", [["--trainer.accelerator", "gpu"], ["--trainer.strategy", "dpp"]])
def test_a_run_that_cannot_begin_deletes_no_other(
    recipe: Path, tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "run").mkdir()
    for name in ("recipe.yaml", "lora.safetensors"):
        (tmp_path / "run" / name).write_text("# loratune 0.1.0\n")
    assert main(["fit", "-c", str(recipe), "--run.overwrite", "true", *words]) != 0
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert (tmp_path / "run" / "recipe.yaml").is_file()


def test_every_section_is_in_the_names_that_are_suggested() -> None:
    names: Any = set(recipes.KeyNames(False))
    assert {"run.overwrite", "run.allow_changed", "guard.max_skipped_steps", "checkpoint.save_last"} <= names
