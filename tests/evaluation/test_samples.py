"""Sample grids at several weights of the LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from loratune.cli.main import main
from loratune.evaluation import samples

WORDS = ["--samples.every_n_steps", "6", "--samples.steps", "2", "--samples.prompts", "[a red disc, a blue disc]"]


def test_a_row_for_each_weight_and_the_base_is_drawn_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    draw = samples.sample_images

    def watched(*args: Any, **more: Any) -> Any:
        drawn.append(draw(*args, **more))
        return drawn[-1]

    monkeypatch.setattr(samples, "sample_images", watched)
    words = ["--samples.lora_scales", "[0, 0.5, 1]", "--model.optimizer.init_args.lr", "0.1"]
    assert main(["fit", "-c", str(recipe), *WORDS, *words]) == 0
    zero, half, one, half_after, one_after = drawn  # at the start three, at the end two
    assert zero.equal(half)
    assert zero.equal(one)
    assert not zero.allclose(one_after, atol=1e-3)
    assert not half_after.allclose(one_after, atol=1e-3)
    assert not half_after.allclose(zero, atol=1e-3)
    first, last = (np.asarray(Image.open(tmp_path / "run" / "figures" / f"samples-{n:06d}.png")) for n in (0, 6))
    assert first.shape == last.shape
    third = first.shape[0] // 3
    assert np.array_equal(first[:third], last[:third])
    assert not np.array_equal(first[-third:], last[-third:])


def test_one_weight_is_drawn_as_it_is(recipe: Path, tmp_path: Path) -> None:
    assert main(["fit", "-c", str(recipe), *WORDS, "--trainer.max_steps", "1"]) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == [
        *("samples-000000.png", "samples-000001.png"),
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--samples.lora_scales", "[]"], "samples.lora_scales is []; give one number or more"),
        (["--samples.lora_scales", "[.inf]"], "samples.lora_scales is [inf]"),
        (
            ["--samples.lora_scales", "[0, 0.5]", "--model.lora.init", "olora"],
            "samples.lora_scales has 0.5: with lora.init pissa",
        ),
        (["--evaluation.levels", "0"], "evaluation.levels is 0; give 1 to 100"),
        (["--evaluation.images", "-1"], "evaluation.images is -1; give 0 to"),
    ],
)
def test_bad_weights_are_one_line(recipe: Path, capsys: Any, words: list[str], expected: str) -> None:
    assert main(["fit", "-c", str(recipe), *WORDS, *words]) == 2
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]
