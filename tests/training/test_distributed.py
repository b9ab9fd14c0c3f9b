"""Two processes make the step that one makes with the whole batch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from loratune.cli.main import main
from loratune.data.shares import Rows, Shares, share
from loratune.runs.checkpoints import read_checkpoint
from loratune.training.randomness import Share, SharedDropout, dropout, share_dropout

LORA = "{rank: 4, alpha: 8, targets: cross-attention, dropout: 0.3, text_encoder: true}"
WORDS = ["--model.objective", "{caption_dropout: 0.3, noise_offset: 0.1}", "--trainer.callbacks+", "EMA"]
WORDS += [
    "--allow-code",
    "--trainer.callbacks+",
    "gradients.Gradients",
    "--data.buckets",
    "{step: 8, smallest: 8, largest: 32}",
]
SIZES = [(16, 16), (32, 8), (16, 16), (8, 32), (16, 16), (32, 8)]  # of images in turn
STEPS = 6
TWO = ["--trainer.devices", "2", "--trainer.strategy"]


def free_port() -> str:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return str(made.getsockname()[1])


def command(recipe: Path, out: Path, batch: int, *words: str) -> list[str]:
    """A run in a folder, with so many images a batch for each process."""
    text = recipe.read_text().replace("{rank: 4, alpha: 8, targets: cross-attention}", LORA)
    own = out.with_suffix(".yaml")
    own.write_text(text.replace("batch_size: 4", f"batch_size: {batch}"))
    where = ["--trainer.default_root_dir", str(out), "--checkpoint.every_n_train_steps", "2"]
    where += ["--data.cache_dir", f"{out}-cache"]
    return ["fit", "-c", str(own), *where, *WORDS, *words]


def own_environment(more: dict[str, str] | None = None) -> dict[str, str]:
    """Of a process that finds this folder's callback and knows of no other launcher."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "PL_"))}
    return plain | {"PYTHONPATH": str(Path(__file__).parent)} | (more or {})


def run(words: list[str], environment: dict[str, str] | None = None) -> None:
    """Run to the end as a process of its own."""
    done = subprocess.run(words, env=own_environment(environment), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


LORATUNE = [sys.executable, "-m", "loratune"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def slurm() -> dict[str, str]:
    told = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_ID": "77", "JOB_NAME": "train", "NODEID": "0"}
    told |= {"NODELIST": "127.0.0.1", "NNODES": "1"}
    return {f"SLURM_{key}": value for key, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}


def close(one: Path, two: Path) -> None:
    """Both runs ended with the same weights, average and optimizer, but for the order of sums."""
    first, second = (read_checkpoint(path / "checkpoints" / "last.ckpt") for path in (one, two))
    assert first["global_step"] == second["global_step"] > 0
    pairs = [(first["state_dict"], second["state_dict"])]
    pairs.append((first["callbacks"]["EMA"]["average"], second["callbacks"]["EMA"]["average"]))
    # FSDP numbers the parameters of the whole module, others those that are trained; both in the same order.
    states = [sorted(held["optimizer_states"][0]["state"].items()) for held in (first, second)]
    assert len(states[0]) == len(states[1]) > 0
    pairs += [(state, other) for (_, state), (_, other) in zip(*states, strict=True)]
    for held, other in pairs:
        assert held.keys() == other.keys()
        for key, value in held.items():
            # Adam steps by the rate, 0.01, on gradients whose last bits are noise; these are compared below.
            assert torch.allclose(value, other[key], rtol=1e-3, atol=2e-4), key


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_what_one_trains(
    recipe: Path, images: Path, tmp_path: Path, slurm: dict[str, str], strategy: str
) -> None:
    """The same gradients in each step, with batches of several sizes."""
    for path, size in zip(sorted(images.glob("*.png")), SIZES * 2, strict=True):
        with Image.open(path) as image:
            image.resize(size).save(path)
    one, two = tmp_path / "one", tmp_path / "two"
    run([*LORATUNE, *command(recipe, one, 4)])
    # The second half is launched in another way, and goes on in the middle of an epoch.
    launched = command(recipe, two, 2, *TWO, strategy)
    # What is drawn and compared beside the training takes every process where weights are cut, and changes nothing.
    launched += ["--samples.every_n_steps", "3", "--evaluation.every_n_steps", "3"] if strategy == "fsdp2" else []
    port = ["--master-port", free_port()]
    run([*TORCHRUN, *port, "-m", "loratune", *launched, "--trainer.max_steps", "4"])
    held = read_checkpoint(two / "checkpoints" / "last.ckpt")
    assert held["global_step"] == 4
    assert len(held["loratune"]["generators"]) == 2
    words, same = [*LORATUNE, *launched, "--ckpt_path", "last"], slurm | {"MASTER_PORT": free_port()}
    ranks = [same | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank} for rank in "01"]
    both = [subprocess.Popen(words, env=own_environment(rank)) for rank in ranks]
    assert [process.wait() for process in both] == [0, 0]
    close(one, two)
    if strategy == "fsdp2":
        assert (two / "figures" / "samples-000006.png").is_file()
        assert "held_out/gap" in (two / "history.jsonl").read_text()
    for step in range(STEPS):
        first, second = (load_file(path / f"gradients-{step}.safetensors") for path in (one, two))
        assert first.keys() == second.keys()
        assert any(bool(value.any()) for value in first.values())
        for key, value in first.items():
            assert torch.allclose(value, second[key], rtol=1e-3, atol=1e-6), (step, key)
    # Each process encoded its share of the images.
    assert len(list((tmp_path / "two-cache").rglob("*.safetensors"))) == 12


@pytest.mark.parametrize(
    ("strategy", "words", "said"),
    [
        ("fsdp", [], "trainer.strategy is fsdp, an older form"),
        ("fsdp2", ["--model.memory.quantization", "nf4"], "not with model.memory.quantization"),
        ("fsdp2", ["--model.memory.compile", "true"], "not with model.memory.compile"),
        ("fsdp2", ["--model.lora.init", "pissa"], "not with model.lora.init"),
        ("fsdp2", ["--model.tokens", "{placeholder_token: <disc>}"], "not with model.tokens"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    recipe: Path, capsys: pytest.CaptureFixture[str], strategy: str, words: list[str], said: str
) -> None:
    given = ["--trainer.devices", "2", "--trainer.accelerator", "cpu", "--trainer.strategy", strategy, *words]
    assert main(["fit", "-c", str(recipe), *given]) == 2
    assert said in capsys.readouterr().err


def test_full_fine_tuning_is_not_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(__file__).parent.parent.parent / "recipes" / "full-finetune.yaml"
    words = ["--trainer.devices", "2", "--trainer.strategy", "fsdp2", "--trainer.default_root_dir", str(tmp_path)]
    assert main(["fit", "-c", str(recipe), *words]) == 2
    assert "not with model.class_path" in capsys.readouterr().err


def test_shares_are_the_batch_in_order_and_count_what_they_hold() -> None:
    for total in range(1, 9):
        batch = list(range(10, 10 + total))
        for processes in (1, 2, 3, 4):
            cut = [share(batch, rank, processes) for rank in range(processes)]
            counted = [index for rows in cut for index, start, whole in rows if start < whole]
            assert counted == batch
            shares = [Share(rows[0][1], len(rows), rows[0][2]) for rows in cut]
            losses = torch.arange(float(total))
            means = [one.cut(losses).mean() * one.weight(processes) for one in shares]
            assert torch.isclose(torch.stack(means).mean(), losses.mean())
    made = Shares([[0, 1, 2], [3]], 1, 2)
    assert len(made) == 2
    assert list(made) == [[(1, 1, 3), (2, 1, 3)], [(3, 0, 1)]]
    rows: Any = Rows([{"name": "a"}, {"name": "b"}])
    assert rows[(1, 4, 8)] == {"name": "b", "share": (4, 8)}
    assert Share.of({"name": ["b"], "share": (4, 8)}) == Share(4, 1, 8)
    assert Share.of({"name": ["a", "b"]}) == Share(0, 2, 2)


def test_dropout_is_cut_from_the_masks_of_the_whole_batch() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.4), nn.Dropout(0.0))
    assert share_dropout(layers) == [layers[1]]
    assert isinstance(layers[1], SharedDropout)
    x = torch.randn(5, 7, 3)

    def drawn(part: Any) -> torch.Tensor:
        torch.manual_seed(1)
        return part()

    whole = drawn(lambda: F.dropout(x, 0.4))
    assert torch.equal(whole, drawn(lambda: layers[1](x)))
    for start, stop in ((0, 2), (2, 5)):
        one = Share(start, stop - start, 5)
        layers[1].share = one
        assert torch.equal(drawn(lambda: layers[1](x[start:stop])), whole[start:stop])  # noqa: B023
    twice = drawn(lambda: F.dropout(torch.ones(8, 7, 3), 0.4))  # two rows for each of four samples
    assert torch.equal(drawn(lambda: dropout(torch.ones(4, 7, 3), 0.4, Share(2, 2, 4))), twice[4:])
    extra = drawn(lambda: F.dropout(x, 0.4))  # four samples and the empty caption
    mine = torch.cat([x[2:4], x[4:]])
    assert torch.equal(drawn(lambda: dropout(mine, 0.4, Share(2, 2, 4))), torch.cat([extra[2:4], extra[4:]]))
    assert torch.equal(layers.eval()[1](x[:2]), x[:2])
