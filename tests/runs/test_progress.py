"""One bar over a run's steps in 80 columns, and where all is at its end."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from loratune.cli.main import main
from loratune.runs import progress
from loratune.runs.progress import StepBar, clock, numbers_line, working


def trainer_at(step: int, total: float) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.234e-4}])
    metrics = {"train/loss": torch.tensor(0.123456)}
    return SimpleNamespace(
        global_step=step, estimated_stepping_batches=total, callback_metrics=metrics, optimizers=[optimizer]
    )


@pytest.mark.parametrize("total", [200_000, float("inf")])
def test_the_line_of_a_long_run_fits_80_columns(monkeypatch: pytest.MonkeyPatch, total: float) -> None:
    now = iter([0.0, 999.0, 2000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now, 2000.0))
    out = io.StringIO()
    bar = StepBar(Console(file=out, force_terminal=True, width=80))
    bar.on_train_start(trainer_at(100_000, total), None)  # type: ignore[arg-type]
    bar.on_train_batch_end(trainer_at(101_000, total), None)  # type: ignore[arg-type]
    bar._bars.refresh()  # type: ignore[union-attr]
    bar._close()
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in re.split(r"[\r\n]", out.getvalue())]
    said = max(lines, key=len)
    assert len(said) <= 80
    assert "loss 0.1235  lr 1.2e-04  1.00 steps/s" in said.replace("0.99 ", "1.00 ")
    assert "101000/200000" in said or total == float("inf")
    assert ("27:28:21 left" in said) == (total == 200_000)
    assert len({line for line in lines if "loss" in line and len(line) < len(said)}) == 0


def test_what_is_said_of_what_is_not_known() -> None:
    assert numbers_line({}, None, 0.0, 0, None) == ""
    assert numbers_line({}, 1.0, 60.0, 2, 10) == "0:05:00 left  lr 1.0e+00  30 s/step"
    assert clock(3661.4) == "1:01:01"


def test_what_is_done_beside_the_steps_is_counted_with_its_time() -> None:
    out = io.StringIO()
    bar = StepBar(Console(file=out, force_terminal=True, width=80))
    trainer: Any = SimpleNamespace(progress_bar_callback=bar, is_global_zero=True)
    with working(trainer, "samples", 3) as count:
        count()
        bar._bars.refresh()  # type: ignore[union-attr]
    assert "1 of 3 passes, 0:00:00 left" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert bar._bars is None
    plain = io.StringIO()
    trainer.progress_bar_callback = StepBar(Console(file=plain))
    with working(trainer, "samples", 3) as count:
        count()
    assert plain.getvalue() == "samples: 3 passes through the network\n"
    trainer.progress_bar_callback = None
    with working(trainer, "samples", 3) as count:
        count()


def test_a_run_says_where_all_is_and_what_comes_before_its_first_step(
    recipe: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--samples.every_n_steps", "3", "--samples.steps", "2", "--evaluation.every_n_steps", "3"]
    words += ["--trainer.enable_progress_bar", "true", "--data.validation_percent", "0"]
    assert main(["fit", "-c", str(recipe), *words, "--trainer.max_steps", "3"]) == 0
    said, run = capsys.readouterr(), tmp_path / "run"
    assert said.err.count("comparing with the base: ") == 2  # of the base, and of the adapter at the end
    assert said.err.count("samples: ") == 1  # without prompts of its own none before the first step
    assert said.out.splitlines()[-4:] == [
        f"written     {run}/lora.safetensors",
        f"report      {run}/report.html",
        f"checkpoint  {run}/checkpoints/last.ckpt",
        f"next        loratune sample --base {tiny_base} --lora {run}/lora.safetensors --prompt ...",
    ]
