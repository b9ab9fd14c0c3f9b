"""Kill a training at random moments and go on with it: python tests/benchmarks/kill_and_resume.py [--kills 20]

Each trial is a process of its own, ended by SIGKILL, and then `loratune fit -c RECIPE --ckpt_path last` in another.
The LoRA's tensors have to be to the byte those of the run that was never stopped, and every loss that was logged
the same number. Of every six trials one is killed in the middle of writing a checkpoint, one in the middle of the
encoding, one when the last step is made and nothing that follows it, and three at a random moment. A run accumulates
gradients, drops features and captions out, averages the weights and trains the text encoder too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RECIPE = """\
seed_everything: 3
trainer:
  default_root_dir: {out}
  max_steps: {steps}
  accelerator: cpu
  precision: 32-true
  accumulate_grad_batches: 2
  enable_progress_bar: false
  log_every_n_steps: 1
  callbacks: [{{class_path: EMA, init_args: {{decay: 0.9}}}}]
model:
  base: {base}
  lora: {{rank: 4, alpha: 8, targets: cross-attention, dropout: 0.2, text_encoder: true}}
  objective: {{caption_dropout: 0.2}}
  optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-2}}}}
  lr_schedule: {{name: cosine, warmup_steps: 2}}
data:
  path: {data}
  resolution: 16
  batch_size: 2
  validation_percent: 25
  cache_dir: {cache}
samples: {{every_n_steps: 0}}
checkpoint: {{every_n_train_steps: 2}}
"""
# What a child runs: the command, or the command with a write that stops halfway at the given checkpoint.
PLAIN = """
import sys
from loratune.cli.main import main
sys.stdout = sys.stderr = open({log!r}, "a")
sys.exit(main({words!r}))
"""
HALFWAY = """
import io, os, time, torch
count, save = 0, torch.save
def half(what, file, *rest, **more):
    global count
    count += 1
    if count < {number}:
        return save(what, file, *rest, **more)
    buffer = io.BytesIO()
    save(what, buffer, *rest, **more)
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    os.fsync(file.fileno())
    open({mark!r}, "w").close()
    time.sleep(600)
torch.save = half
"""
ENDED = """
import time
from loratune.evaluation.evaluate import Evaluate
def wait(*_):
    open({mark!r}, "w").close()
    time.sleep(600)
Evaluate.on_train_end = wait
"""


class Trials:
    """Runs of one recipe in processes that were forked from one that has imported everything.

    Args:
        folder: for what they write.
        base: a diffusers folder.
        images: captioned, 16 pixels a side.
        steps: of a run.
    """

    def __init__(self, folder: Path, base: Path, images: Path, steps: int = 10) -> None:
        self.folder, self.base, self.images, self.steps = folder, base, images, steps
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["loratune.recipe.parse", "loratune.cli.main"])
        process = self.context.Process(target=exec, args=("import loratune.recipe.parse", {}))
        process.start()
        process.join()
        started = time.perf_counter()
        self.whole = self.run("whole")
        self.seconds = time.perf_counter() - started

    def words(self, name: str) -> list[str]:
        """The command of a run, whose recipe is written."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        told = {"out": folder / "run", "cache": folder / "cache", "base": self.base, "data": self.images}
        (folder / "recipe.yaml").write_text(RECIPE.format(steps=self.steps, **told))
        return ["fit", "-c", str(folder / "recipe.yaml"), "--ckpt_path", "last"]

    def start(self, name: str, before: str = "", more: tuple[str, ...] = ()) -> Any:
        """A process that runs the command, after some code."""
        source = before + PLAIN.format(log=str(self.folder / f"{name}.log"), words=[*self.words(name), *more])
        process = self.context.Process(target=exec, args=(source, {}))
        process.start()
        return process

    def run(self, name: str) -> Path:
        """Run to the end; the run's folder."""
        process = self.start(name)
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(f"exit code {process.exitcode}: {(self.folder / f'{name}.log').read_text()[-3000:]}")
        return self.folder / name / "run"

    def kill(self, name: str, seconds: float) -> None:
        """Start, and kill after some time."""
        process = self.start(name)
        process.join(seconds)
        process.kill()
        process.join()

    def kill_in_write(self, name: str, number: int) -> None:
        """Start, and kill when half of a checkpoint is on disk, the first being number 1."""
        self._kill_where(name, HALFWAY.replace("{number}", str(number)))

    def kill_at_the_end(self, name: str) -> None:
        """Start, and kill when the last step is made and nothing that comes after it."""
        self._kill_where(name, ENDED)

    def _kill_where(self, name: str, before: str) -> None:
        mark = self.folder / name / "mark"
        process = self.start(name, before.replace("{mark!r}", repr(str(mark))))
        while not mark.exists() and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        if not mark.exists():
            raise RuntimeError(f"not killed: {(self.folder / f'{name}.log').read_text()[-3000:]}")

    def kill_in_encoding(self, name: str, files: int) -> None:
        """Start, and kill when so many files are in the cache."""
        process = self.start(name)
        cache = self.folder / name / "cache"
        while process.is_alive() and sum(1 for _ in cache.rglob("*.safetensors")) < files:
            time.sleep(0.002)
        process.kill()
        process.join()

    def same(self, run: Path) -> list[str]:
        """What is different between a run and the whole one; nothing, if all is well."""
        from safetensors.torch import load_file

        one, two = (load_file(path / "lora.safetensors") for path in (self.whole, run))
        found = [] if one.keys() == two.keys() else ["names of the tensors"]
        found += [key for key in one if one[key].numpy().tobytes() != two[key].numpy().tobytes()]
        whole, other = logged(self.whole), logged(run)
        for tag in whole.keys() | other.keys():
            if whole.get(tag) != other.get(tag):
                found.append(f"{tag}: {whole.get(tag)} -> {other.get(tag)}")
        return found


def logged(run: Path) -> dict[str, dict[int, float]]:
    """Every loss that a run logged, by name and step, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "loss" in tag]
    return {tag: {e.step: e.value for e in events.Scalars(tag) if e.value == e.value} for tag in tags}


def killed_and_resumed(trials: Trials, name: str, kind: str, draw: random.Random) -> tuple[str, list[str]]:
    """Kill a run in one of three ways, go on with it, compare; what was done, and what is different."""
    if kind == "write":
        number = draw.randint(1, trials.steps)
        trials.kill_in_write(name, number)
        told = f"while writing checkpoint {number}"
    elif kind == "end":
        trials.kill_at_the_end(name)
        told = "after the last step, before the end of the run"
    elif kind == "encoding":
        files = draw.randint(1, 11)
        trials.kill_in_encoding(name, files)
        told = f"with {files} files encoded"
    else:
        seconds = draw.uniform(0, trials.seconds)
        trials.kill(name, seconds)
        told = f"after {seconds:.2f} of {trials.seconds:.2f} s"
    found = sorted((trials.folder / name / "run" / "checkpoints").glob("*.ckpt"))
    return f"{told}, {len(found)} checkpoints", trials.same(trials.run(name))


def main() -> int:
    """Kill, go on, compare, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--base", type=Path, default=ROOT / "loratune" / "assets" / "emoji-64", help="a diffusers folder"
    )
    parser.add_argument("--data", type=Path, default=ROOT / "datasets" / "ink-heldout", help="captioned images")
    chosen = parser.parse_args()
    draw, wrong = random.Random(chosen.seed), 0
    folder = Path(tempfile.mkdtemp())
    trials = Trials(folder, chosen.base, chosen.data)
    print(f"the whole run: {trials.seconds:.1f} s, {json.dumps(logged(trials.whole)['train/loss'])}")
    for number in range(chosen.kills):
        kind = ("write", "encoding", "end", "random", "random", "random")[number % 6]
        told, found = killed_and_resumed(trials, f"trial-{number}", kind, draw)
        wrong += bool(found)
        print(f"{number + 1:3} {kind:9} {told:45} {found or 'the same'}", flush=True)
    print(f"{chosen.kills - wrong} of {chosen.kills} went on to the same LoRA and the same losses")
    shutil.rmtree(folder)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
