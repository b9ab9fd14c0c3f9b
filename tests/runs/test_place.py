"""Where a run stands is saved, not reckoned: whatever its length is given by, it goes on as the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.cli.main import main
from loratune.training.lora_module import LoRAModule
from loratune.training.schedules import of_step

NONE_HELD_OUT = ["--data.validation_percent", "0"]
EVERY = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1"]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[str, ...]]]:
    """The epoch and the images' names of each batch that is trained on."""
    seen: list[tuple[int, tuple[str, ...]]] = []
    step = LoRAModule.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append((self.trainer.current_epoch, tuple(batch["name"])))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoRAModule, "training_step", watched)
    return seen


def fit(recipe: Path, *words: str) -> None:
    assert main(["fit", "-c", str(recipe), *NONE_HELD_OUT, *words]) == 0


def logged(recipe: Path, key: str) -> dict[int, float]:
    rows = map(json.loads, (recipe.parent / "run" / "history.jsonl").read_text().splitlines())
    return {row["step"]: row[key] for row in rows if key in row}


LENGTHS = {
    "max_epochs": ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"],
    "limited": ["--trainer.limit_train_batches", "2"],
    "workers": ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3", "--data.num_workers", "1"],
    "accumulated": ["--trainer.max_epochs", "3", "--trainer.accumulate_grad_batches", "2"],
}


@pytest.mark.parametrize("length", list(LENGTHS))
def test_a_run_goes_on_with_the_batches_of_the_whole_run(
    recipe: Path, tmp_path: Path, batches: list[Any], length: str
) -> None:
    fit(recipe, *EVERY, *LENGTHS[length])
    whole, result = list(batches), (tmp_path / "run" / "lora.safetensors").read_bytes()
    middle = next((tmp_path / "run" / "checkpoints").glob(f"*step={2 + (length == 'workers')}.ckpt"))
    done = torch.load(middle, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
    batches.clear()
    fit(recipe, *EVERY, *LENGTHS[length], "--ckpt_path", str(middle))
    assert [names for _, names in batches] == [names for _, names in whole[done:]]
    assert tensors(result) == tensors((tmp_path / "run" / "lora.safetensors").read_bytes())


def tensors(file: bytes) -> bytes:
    """A safetensors file without its header, in which the date is."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def test_a_limited_epoch_is_another_part_of_the_images_each_time(recipe: Path, batches: list[Any]) -> None:
    fit(recipe, "--trainer.limit_train_batches", "1")
    assert len({names for _, names in batches}) == 6
    assert [epoch for epoch, _ in batches] == list(range(6))


def test_overfitting_keeps_to_its_batches(recipe: Path, batches: list[Any]) -> None:
    fit(recipe, "--trainer.overfit_batches", "1")
    assert len({names for _, names in batches}) == 1


def test_a_lengthened_run_is_the_long_run(recipe: Path, batches: list[Any]) -> None:
    fit(recipe, "--trainer.max_steps", "9")
    whole = [names for _, names in batches]
    batches.clear()
    fit(recipe, "--run.overwrite", "true", "--trainer.max_steps", "3")  # to the end of an epoch
    fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "9")
    assert [names for _, names in batches] == whole


COSINE = ["--model.lr_schedule.name", "cosine"]


def test_a_finished_run_that_goes_on_has_the_rates_of_its_new_length(recipe: Path) -> None:
    fit(recipe, *COSINE, "--trainer.max_steps", "4")
    fit(recipe, *COSINE, "--ckpt_path", "last", "--trainer.max_steps", "8")
    rates = logged(recipe, "train/lr")
    assert [rates[step] for step in (4, 5, 6, 7)] == pytest.approx([5e-3, 3.08658e-3, 1.46447e-3, 3.80602e-4], 1e-4)


def test_a_rate_that_was_changed_and_allowed_is_used(recipe: Path) -> None:
    fit(recipe, "--trainer.max_steps", "2")
    changed = ["--model.optimizer.init_args.lr", "1.0e-4", "--model.optimizer.init_args.weight_decay", "0.5"]
    allowed = ["--run.allow_changed", "[model.optimizer]"]
    fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "4", *changed, *allowed)
    assert [logged(recipe, "train/lr")[step] for step in (1, 2, 3)] == [1e-2, 1e-4, 1e-4]
    last = torch.load(recipe.parent / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert {group["weight_decay"] for group in last["optimizer_states"][0]["param_groups"]} == {0.5}


def test_an_epochs_last_step_has_the_mean_gradient_of_its_batches(recipe: Path) -> None:
    fit(recipe, "--trainer.max_steps", "1", "--data.batch_size", "12")
    alone = logged(recipe, "train/grad_norm")[0], logged(recipe, "train/loss")[0]
    more = ["--run.overwrite", "true", "--trainer.accumulate_grad_batches", "4"]
    fit(recipe, "--trainer.max_steps", "1", "--data.batch_size", "12", *more)
    assert (logged(recipe, "train/grad_norm")[0], logged(recipe, "train/loss")[0]) == pytest.approx(alone, 1e-5)


@pytest.mark.parametrize(("batch", "factor"), [(0, 1), (3, 1), (4, 2), (5, 2)])
def test_only_a_shorter_step_is_weighed(batch: int, factor: float) -> None:
    trainer: Any = type("T", (), {"accumulate_grad_batches": 4, "num_training_batches": 6})()
    assert of_step(trainer, torch.tensor(1.0), batch) == factor


def test_a_schedule_needs_a_length(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    time = ["--trainer.max_time", "00:00:00:01", "--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"]
    assert main(["fit", "-c", str(recipe), *NONE_HELD_OUT, *COSINE, *time]) == 2
    assert "the learning rate is cosine, and the run has no length; set trainer.max_steps" in capsys.readouterr().err
    fit(recipe, *time, "--run.overwrite", "true")
