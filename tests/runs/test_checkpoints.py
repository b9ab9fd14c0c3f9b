"""A run that is killed, stopped or short of disk goes on as the same run."""

from __future__ import annotations

import errno
import importlib.util
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loratune.cli.main import main
from loratune.errors import UserError
from loratune.runs.checkpoints import AtomicCheckpointIO, Checkpoints, last_checkpoint, read_checkpoint
from loratune.runs.resume import differences, flat, what_matters
from loratune.training import diffusion_module as module
from loratune.training.lora_module import LoRAModule
from loratune.training.randomness import restore, states

HERE = Path(__file__).parent.parent / "training"


def load_benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("kill_and_resume", HERE.parent / "benchmarks" / "kill_and_resume.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def killing() -> Any:
    return load_benchmark()


@pytest.fixture(scope="module")
def trials(killing: Any, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("trials")
    images = folder / "images"
    images.mkdir()
    for number in range(12):
        Image.new("RGB", (16, 16), (20 * number, 100, 0)).save(images / f"{number:02d}.png")
        (images / f"{number:02d}.txt").write_text(f"colour {number}")
    return killing.Trials(folder, tiny_base, images, 8)


@pytest.mark.parametrize("kind", ["write", "encoding", "end", "random-1", "random-2", "random-3"])
def test_a_killed_run_goes_on_to_the_same_lora_and_losses(killing: Any, trials: Any, kind: str) -> None:
    draw = random.Random()
    told, found = killing.killed_and_resumed(trials, kind, kind.partition("-")[0], draw)
    assert not found, told
    steps = killing.logged(trials.whole)["train/loss"]
    assert sorted(steps) == list(range(8))  # the comparison had something to compare
    assert killing.logged(trials.whole)["val/loss"]


ASK = """
import os, signal
from loratune.training.lora_module import LoRAModule
step = LoRAModule.training_step
def asked(self, batch, batch_idx):
    if self.global_step == 3 and batch_idx % 2 == 0:
        os.kill(os.getpid(), {number})
    return step(self, batch, batch_idx)
LoRAModule.training_step = asked
"""
REQUEUED = """
import os
os.environ |= {{"SLURM_JOB_ID": "77", "PATH": {path!r} + ":" + os.environ["PATH"]}}
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_the_same(trials: Any, tmp_path: Path, number: int) -> None:
    name, before = f"signal-{number}", ASK.format(number=int(number))
    if number == signal.SIGUSR1:  # a batch system's warning
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
        (tmp_path / "scontrol").chmod(0o755)
        before += REQUEUED.format(path=str(tmp_path))
    process = trials.start(name, before)
    process.join()
    assert process.exitcode == 128 + number
    said = (trials.folder / f"{name}.log").read_text()
    last = trials.folder / name / "run" / "checkpoints" / "last.ckpt"
    assert f"step 4: saved to {last}; --ckpt_path last goes on from there" in said
    assert torch.load(last, weights_only=True)["global_step"] == 4
    if number == signal.SIGUSR1:
        assert (tmp_path / "asked").read_text() == "requeue 77\n"
        assert "job 77 is queued again" in said
    assert not trials.same(trials.run(name))


def fit(recipe: Path, *words: str) -> int:
    return main(["fit", "-c", str(recipe), "--data.validation_percent", "0", *words])


def test_a_full_disk_stops_no_training_and_leaves_the_last_good_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder, save = tmp_path / "run" / "checkpoints", torch.save

    def limited(what: Any, file: Any, *rest: Any, **more: Any) -> None:
        if what.get("global_step", 0) < 3:
            return save(what, file, *rest, **more)
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", limited)
    assert fit(recipe, "--checkpoint.every_n_train_steps", "1", "--trainer.max_steps", "5") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=2.ckpt", "last.ckpt"]
    assert [read_checkpoint(path)["global_step"] for path in sorted(folder.iterdir())] == [2, 2]
    assert (tmp_path / "run" / "lora.safetensors").is_file()
    assert "last.ckpt: this checkpoint was not saved (" in caplog.text
    assert "No space left on device" in caplog.text
    monkeypatch.setattr(torch, "save", save)
    assert fit(recipe, "--checkpoint.every_n_train_steps", "1", "--ckpt_path", "last") == 0
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=1-step=6.ckpt", "last.ckpt"]


def test_torchs_own_error_of_a_full_disk_is_no_end_either(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held, io = {"value": torch.zeros(100_000)}, AtomicCheckpointIO()
    io.save_checkpoint(held, tmp_path / "a.ckpt")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))  # the kernel refuses what is longer
    try:
        io.save_checkpoint({"value": torch.ones(100_000)}, tmp_path / "a.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert io.failed == {str(tmp_path / "a.ckpt")}
    assert "training goes on" in caplog.text
    assert torch.equal(io.load_checkpoint(tmp_path / "a.ckpt")["value"], held["value"])
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
    io.save_checkpoint(held, tmp_path / "a.ckpt")
    assert not io.failed


def test_checkpoints_rotate_by_count_and_the_only_whole_one_stays(recipe: Path, tmp_path: Path) -> None:
    words = ["--checkpoint.every_n_train_steps", "1", "--checkpoint.monitor", "step", "--checkpoint.mode", "max"]
    assert fit(recipe, *words, "--checkpoint.save_top_k", "2", "--trainer.max_steps", "4") == 0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["epoch=0-step=3.ckpt", "epoch=1-step=4.ckpt", "last.ckpt"]
    kept, trainer = Checkpoints(folder), L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    for name in ("last.ckpt", "epoch=0-step=3.ckpt"):
        (folder / name).write_bytes(b"PK half")
    kept._remove_checkpoint(trainer, str(folder / "epoch=1-step=4.ckpt"))
    assert (folder / "epoch=1-step=4.ckpt").is_file()
    assert last_checkpoint(folder) == folder / "epoch=1-step=4.ckpt"
    kept._remove_checkpoint(trainer, str(folder / "last.ckpt"))
    assert not (folder / "last.ckpt").exists()


def test_the_last_checkpoint_is_the_newest_whole_one(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path / "nowhere") is None
    io = AtomicCheckpointIO()
    for age, name in enumerate(("last.ckpt", "epoch=0-step=3.ckpt")):
        io.save_checkpoint({"step": age}, tmp_path / name)
        os.utime(tmp_path / name, (100 - age, 100 - age))
    (tmp_path / ".last.ckpt.host.1.ab.tmp").write_bytes(b"half")
    assert last_checkpoint(tmp_path) == tmp_path / "last.ckpt"
    (tmp_path / "last.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-30])
    assert last_checkpoint(tmp_path) == tmp_path / "epoch=0-step=3.ckpt"
    with pytest.raises(UserError, match=r"last.ckpt: not a checkpoint that can be read"):
        read_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"gone.ckpt: no such checkpoint"):
        read_checkpoint(tmp_path / "gone.ckpt")


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("evil",))


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="not a checkpoint that can be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert not (tmp_path / "evil").exists()


def test_generators_stand_where_they_stood(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.rand(()))]

    random.gauss(0, 1)
    np.random.randn()
    torch.save(states(), tmp_path / "states")
    wanted = draw()
    assert draw() != wanted
    restore(torch.load(tmp_path / "states", weights_only=True))
    assert draw() == wanted


def test_a_resumed_run_has_the_generators_of_the_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[float] = []
    step = LoRAModule.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        drawn.append(random.random() + np.random.rand())
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoRAModule, "training_step", watched)
    assert fit(recipe, "--trainer.default_root_dir", str(tmp_path / "whole")) == 0
    whole, drawn[:] = list(drawn), []
    assert fit(recipe, "--trainer.max_steps", "2") == 0
    random.seed(5)
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert drawn == whole
    held = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["loratune"]
    assert len(held["generators"]) == 1


DIFFERENT = [
    (["--model.lora.rank", "8"], "model.lora.rank: 4 -> 8"),
    (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches: 1 -> 2"),
    (["--seed_everything", "4"], "seed_everything: 3 -> 4"),
]


@pytest.mark.parametrize(("words", "said"), DIFFERENT)
def test_another_recipe_is_refused_unless_it_is_allowed(
    recipe: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fit(recipe, "--trainer.max_steps", "2") == 0
    loaded: list[str] = []
    monkeypatch.setattr(module, "load_model", lambda *_: loaded.append("weights") or 1 / 0)
    assert fit(recipe, "--ckpt_path", "last", *words) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"last.ckpt: is of another run: {said}; " in told
    assert f"run.allow_changed: [{said.partition(':')[0]}]" in told
    assert not loaded
    monkeypatch.undo()
    if "rank" in said:  # that one could not be loaded
        assert fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "3", "--export.dtype", "float32") == 0
        return
    assert fit(recipe, "--ckpt_path", "last", *words, "--run.allow_changed", f"[{said.partition(':')[0]}]") == 0
    last = recipe.parent / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(last)["global_step"] == 6


def test_other_images_or_another_base_are_refused(
    recipe: Path, images: Path, tmp_path: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(recipe, "--trainer.max_steps", "2") == 0
    moved = shutil.copytree(tiny_base, tmp_path / "moved")
    assert fit(recipe, "--ckpt_path", "last", "--trainer.max_steps", "3", "--model.base", str(moved)) == 0
    for file in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        weights = moved / f"{file}.safetensors"
        before, held = weights.read_bytes(), load_file(weights)
        save_file({name: value + 1e-3 for name, value in held.items()}, weights)
        assert fit(recipe, "--ckpt_path", "last", "--model.base", str(moved)) == 2
        assert "is of another run: model.base: " in capsys.readouterr().err
        weights.write_bytes(before)
    (images / "00.png").unlink()
    lines = (images / "metadata.jsonl").read_text().splitlines()
    (images / "metadata.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert fit(recipe, "--ckpt_path", "last") == 2
    said = capsys.readouterr().err
    assert "is of another run: data.path: 12 images and 0 held out (" in said
    assert "-> 11 images and 0 held out (" in said
    assert fit(recipe, "--ckpt_path", "last", "--run.allow_changed", "[data.path]") == 0


def test_only_what_decides_what_is_computed_is_compared() -> None:
    recipe = "model: {base: a, lora: {rank: 4}}\ntrainer: {max_steps: 3, precision: null}\nsamples: {seed: 1}\n"
    assert what_matters(recipe) == {"model.lora.rank": "4", "trainer.precision": "null"}
    old, new = {"a.b": "1", "a.c": "2", "d": "3"}, {"a.b": "2", "a.c": "2", "e": "4"}
    assert differences(old, new) == ["a.b: 1 -> 2", "d: 3 -> nothing"]
    assert differences(old, new, ["a", "d"]) == []
    assert flat({"a": {"b": [1, {"c": None}]}, "d": {}}) == {"a.b": '[1, {"c": null}]', "d": "{}"}


def test_a_checkpoint_of_weights_alone_is_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint.save_weights_only", "true", "--checkpoint.every_n_train_steps", "2", "--trainer.max_steps"]
    assert fit(recipe, *words, "3") == 0
    path = next((recipe.parent / "run" / "checkpoints").glob("epoch*.ckpt"))
    assert fit(recipe, "--ckpt_path", str(path)) == 2
    assert "holds weights alone" in capsys.readouterr().err


def test_what_was_logged_after_the_checkpoint_is_not_shown_twice(recipe: Path, tmp_path: Path) -> None:
    kept = ["--checkpoint.every_n_train_steps", "2", "--checkpoint.save_top_k", "-1"]
    assert fit(recipe, *kept) == 0
    early = tmp_path / "run" / "checkpoints" / "epoch=0-step=2.ckpt"
    allowed = ["--run.allow_changed", "[seed_everything]", "--seed_everything", "9"]
    assert fit(recipe, "--ckpt_path", str(early), *allowed) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss")
    steps = [event.step for event in events if event.step > 2]
    assert steps == sorted(set(steps)) == [3, 4, 5]
