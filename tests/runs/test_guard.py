"""NaN and Inf skip a step; signals save and leave; two runs do not mix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loratune.cli.main import main
from loratune.runs.guard import Guard, is_bad, listed, skips_by_itself
from loratune.training.lora_module import LoRAModule

OPTIMIZERS = {
    "plain": ["--model.optimizer", "torch.optim.AdamW"],
    "fused": ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.init_args.fused", "true"],
    "momentum": ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.init_args.momentum", "0.9"],
}


def break_steps(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], how: str = "loss") -> None:
    """Let the loss, or the gradients alone, be NaN at some steps."""
    true = LoRAModule.losses

    def losses(self: Any, *rest: Any) -> Any:
        made = true(self, *rest)
        if not self.training or self.global_step not in steps:
            return made
        if how == "loss":
            return made * float("nan")
        made.register_hook(lambda gradient: gradient * float("inf"))
        return made

    monkeypatch.setattr(LoRAModule, "losses", losses)


def saved(run: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, by step."""
    read = [torch.load(path, weights_only=True) for path in (run / "checkpoints").glob("epoch*.ckpt")]
    return sorted(read, key=lambda one: one["global_step"])


EVERY = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1", "--data.validation_percent", "0"]


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
@pytest.mark.parametrize("how", ["loss", "gradients"])
def test_a_bad_step_touches_nothing_and_is_counted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, how: str, caplog: Any
) -> None:
    break_steps(monkeypatch, (2,), how)
    assert main(["fit", "-c", str(recipe), *EVERY, *OPTIMIZERS[optimizer], "--trainer.max_steps", "4"]) == 0
    _, before, after, later = saved(tmp_path / "run")
    assert before["global_step"] == 2
    for name, value in before["state_dict"].items():
        assert torch.equal(value, after["state_dict"][name])
        assert torch.isfinite(later["state_dict"][name]).all()
    states = zip(*(one["optimizer_states"][0]["state"].values() for one in (before, after)), strict=True)
    assert all(torch.equal(one[key], two[key]) for one, two in states for key in one)
    assert any(not torch.equal(value, later["state_dict"][name]) for name, value in after["state_dict"].items())
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/skipped_steps")
    assert [event.value for event in events] == [0, 0, 1, 1]
    assert "step 3: NaN or Inf in the loss or the gradients; the step was skipped (images: " in caplog.text


def test_the_run_stops_after_too_many_bad_steps_in_a_row(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    break_steps(monkeypatch, (0, 2, 3, 4, 5))
    words = ["fit", "-c", str(recipe), *EVERY, "--trainer.max_steps", "8", "--guard.max_skipped_steps", "2"]
    assert main(words) == 2
    said = capsys.readouterr().err
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert re.search(rf"step 4: NaN or Inf .* for 2 steps in a row .* \d\d\.png.*; the last good .* {last};", said)
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert main([*words, "--run.overwrite", "true", "--guard.max_skipped_steps", "0"]) == 0
    assert torch.load(last, weights_only=True)["callbacks"]["Guard"] == {"skipped": 5, "in_a_row": 0}


def test_what_is_bad() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("inf"), 0.0])
    assert is_bad([], None) is None
    assert not is_bad([good, good], torch.tensor(True))
    assert is_bad([good, bad], None)
    assert is_bad([good], torch.tensor(False))
    assert is_bad([torch.tensor([float("nan")])], torch.tensor(True))
    assert is_bad([], torch.tensor(False))  # as under a scaler, which looks at gradients itself
    assert listed([str(i) for i in range(20)]).endswith("15 and 4 more")
    assert listed([]) == "unnamed"
    with pytest.raises(ValueError, match="max_skipped_steps is -1"):
        Guard(-1)


def test_counts_are_read_late_where_reading_would_wait(caplog: Any) -> None:
    guard = Guard(3)
    for step, bad in enumerate((False, True, True, False, True)):
        guard._waiting.append((step, [f"{step}.png"], torch.tensor(bad)))
    guard.count(None)  # type: ignore[arg-type]
    assert (guard.skipped, guard.in_a_row) == (3, 1)
    assert [line.split(":")[0] for line in caplog.messages] == ["step 2", "step 3", "step 5"]
    weights = [torch.nn.Parameter(torch.ones(2))]
    assert skips_by_itself(torch.optim.AdamW(weights, fused=True))
    assert not skips_by_itself(torch.optim.AdamW(weights))
    assert not skips_by_itself(torch.optim.RMSprop(weights))
