"""A run leaves a page that tells what it was, whole or not at all, also when it was resumed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from loratune.cli.main import main
from loratune.evaluation.page import render
from loratune.evaluation.run_page import page_of
from loratune.formats import atomic
from loratune.runs.history import append

ON = ["--evaluation.every_n_steps", "2", "--evaluation.prompts", "[a dog]", "--evaluation.images", "2"]
DRAWN = ["--samples.every_n_steps", "3", "--samples.steps", "2", "--samples.prompts", "[<b>a disc</b>]"]


def fit(recipe: Path, *words: str) -> int:
    return main(["fit", "-c", str(recipe), *words])


def points(text: str, title: str) -> int:
    """How many points the first line of a chart has."""
    card = text[text.index(f"<h3>{title}</h3>") :]
    found = re.search(r'<polyline class="line c1" points="([^"]*)"', card)
    assert found
    return len(found[1].split())


def test_the_page_of_a_run_shows_all_of_it_and_loads_nothing(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, *ON, *DRAWN, "--evaluation.figures", "true", "--samples.lora_scales", "[0, 1]") == 0
    text = (tmp_path / "run" / "report.html").read_text()
    for title in ("Loss", "Gap: loss with the LoRA less loss of the base", "Drift", "Training loss by range of t"):
        assert f"<h3>{title}</h3>" in text
    for title in ("Held-out gap by t", "Norm of B A by block", "Learning rate", "Norm of the gradient"):
        assert f"<h3>{title}</h3>" in text
    for title in ("Samples at step 6", "Samples at step 0", "Forward process", "Reverse process", "each word is seen"):
        assert f"{title}</h3>" in text
    assert "at step 6 of 6" in text
    assert "held-out images" in text
    assert "&lt;b&gt;a disc&lt;/b&gt;" in text  # in the recipe
    assert "<b>a disc" not in text
    assert all(source.startswith("data:image/") for source in re.findall(r'src="([^"]*)"', text))
    assert not re.search(r"https?://(?!www.w3.org)", text.partition("<pre>")[0])
    assert len(text) < 5_000_000
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_resumed_run_does_not_double_its_curves(recipe: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert fit(recipe, *ON, "--trainer.default_root_dir", str(whole)) == 0
    words = [*ON, "--trainer.default_root_dir", str(half)]
    assert fit(recipe, *words, "--trainer.max_steps", "3") == 0
    assert fit(recipe, *words, "--ckpt_path", "last") == 0
    one, two = ((folder / "report.html").read_text() for folder in (whole, half))
    assert points(one, "Loss") == points(two, "Loss") == 6
    assert points(two, "Gap: loss with the LoRA less loss of the base") <= 5


def test_without_a_report_there_is_none(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe, "--evaluation.report", "false", "--trainer.max_steps", "1") == 0
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_new_run_in_the_folder_starts_its_curves_anew(recipe: Path, tmp_path: Path) -> None:
    assert fit(recipe) == 0
    assert fit(recipe, "--run.overwrite", "true", "--trainer.max_steps", "2") == 0
    assert points((tmp_path / "run" / "report.html").read_text(), "Loss") == 2


def test_a_page_that_cannot_be_written_ends_no_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from loratune.evaluation import run_page

    def full(path: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_page, "atomic_path", full)
    assert atomic.atomic_path is not full
    assert fit(recipe, "--trainer.max_steps", "1") == 0
    assert "report.html: not written" in caplog.text
    assert (tmp_path / "run" / "lora.safetensors").is_file()


def test_warnings_grids_and_the_best_are_told(tmp_path: Path) -> None:
    for step, gap in ((0, 0.0), (50, -0.2), (100, -0.1)):
        append(
            tmp_path / "history.jsonl",
            {"step": step, "held_out/gap": gap, "held_out/gap_se": 0.03, "held_out/loss": 0.5},
        )
    append(tmp_path / "history.jsonl", {"step": 100, "warning": "held-out <loss> rose"})
    (tmp_path / "figures").mkdir()
    for step in (0, 50, 100, 900):
        Image.new("RGB", (8, 8)).save(tmp_path / "figures" / f"samples-{step:06d}.png")
    page = page_of(tmp_path, 100, 200)
    assert page.rows == [["held-out images", "0.6", "0.5", "-0.1", "0.03", "-0.2 at step 50"]]
    assert page.warnings == ["Step 100: held-out <loss> rose"]
    assert [one.title for one in page.shown] == [f"Samples at step {step}" for step in (100, 50, 0)]
    assert "held-out &lt;loss&gt; rose" in render(page)
