"""The figures at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from loratune.cli.main import main
from loratune.evaluation import figures as module
from loratune.evaluation.figures import figures, telling

ON = ["--evaluation.figures", "true", "--trainer.max_steps", "1"]


def test_the_caption_with_the_most_words_is_shown() -> None:
    assert telling(["a disc", "a red disc here", "a disc"]) == 1
    assert telling([" ".join("abcdefghijklmnopqrstu"), "a disc"]) == 1
    assert telling([""]) == 0


def test_a_run_leaves_its_figures_in_its_folder_and_in_tensorboard(recipe: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(["fit", "-c", str(recipe), *ON]) == 0
    made = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "run" / "figures").iterdir()}
    assert sorted(made) == ["forward", "reverse", "words"]
    assert all(image.std() > 1 for image in made.values())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"figures/forward", "figures/reverse", "figures/words"} <= set(events.Tags()["images"])


def test_there_are_none_where_the_base_is_released(recipe: Path, tmp_path: Path) -> None:
    assert main(["fit", "-c", str(recipe), *ON, "--model.memory.unload_encoders", "true"]) == 0
    assert not (tmp_path / "run" / "figures").exists()
    assert "drift" not in (tmp_path / "run" / "history.jsonl").read_text()


def test_the_neutral_prompts_are_read_before_the_base_is_released(recipe: Path, tmp_path: Path) -> None:
    words = [
        "--model.memory.unload_encoders",
        "true",
        "--evaluation.every_n_steps",
        "1",
        "--evaluation.prompts",
        "[a dog]",
    ]
    assert main(["fit", "-c", str(recipe), *words, "--trainer.max_steps", "2"]) == 0
    assert '"drift"' in (tmp_path / "run" / "history.jsonl").read_text()


def test_a_device_that_is_too_small_loses_the_figures_and_not_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def small(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory\nat all")

    monkeypatch.setattr(module, "sample_latents", small)
    assert main(["fit", "-c", str(recipe), *ON]) == 0
    assert "figures: not drawn (OutOfMemoryError: no memory); set evaluation.figures: false" in caplog.text
    assert (tmp_path / "run" / "lora.safetensors").is_file()


def test_a_network_without_text_has_its_strips(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from loratune.families.pixels import PixelDDPM

    class Rows(list[Any]):
        entries = (SimpleNamespace(caption="x"),)

    family = PixelDDPM(size=8, channels=(8, 8), attention_from=1, steps=20).build()
    sample = {"name": "a", "caption": "x", "pixels": torch.zeros(3, 8, 8, dtype=torch.uint8)}
    made = figures(family, SimpleNamespace(held_out=Rows([sample]), training=Rows(), resolution=8), 0)
    assert sorted(made) == ["forward", "reverse"]
