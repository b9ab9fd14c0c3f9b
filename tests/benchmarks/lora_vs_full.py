"""LoRA beside full fine-tuning, on the embedded base: python tests/benchmarks/lora_vs_full.py [--steps 60]

LoRA on cross-attention (the default), LoRA on all layers (the quickstart) and all of the U-Net train on the same
images for the same number of steps, each in a process of its own. Prints trainable parameters, peak
memory, size of the written file, and steps per second.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = "recipes/quickstart.yaml"
SDPA = ["--model.memory.attention", "sdpa"]  # as in the full recipe
CASES = {
    "LoRA, cross-attention": ["-c", QUICKSTART, *SDPA, "--model.lora.targets", "cross-attention"],
    "LoRA, all layers": ["-c", QUICKSTART, *SDPA],
    "full": ["-c", "recipes/full-finetune.yaml"],
}
WARM_UP = 10


class Clock(L.Callback):
    """Times the steps after the first few."""

    def __init__(self) -> None:
        self.started, self.seconds = 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.started = time.perf_counter()
        self.seconds = time.perf_counter() - self.started


def child(case: str, steps: int, out: Path) -> None:
    """Train one case and print what it took as JSON."""
    from loratune.recipe.run import run

    words = [*CASES[case], "--trainer.default_root_dir", str(out), "--trainer.max_steps", str(steps)]
    words += ["--trainer.enable_progress_bar", "false", "--samples.every_n_steps", "0", "--data.cache_dir", str(out)]
    cli, clock = run(words, execute=False), Clock()
    cli.trainer.callbacks.append(clock)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    written = [*out.glob("lora.safetensors"), *out.glob("base-*/unet/*.safetensors")]
    found = {
        "trainable parameters": sum(p.numel() for p in cli.model.parameters() if p.requires_grad),
        "peak memory, MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "file, MB": sum(path.stat().st_size for path in written) / 1e6,
        "checkpoint, MB": (out / "checkpoints" / "last.ckpt").stat().st_size / 1e6,
        "steps/s": (steps - WARM_UP) / clock.seconds,
    }
    print("\n" + json.dumps(found))


def main() -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.steps, Path(options.child[1]))
        return
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            words = [sys.executable, __file__, "--steps", str(options.steps), "--child", case, f"{folder}/{case}"]
            done = subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
            found[case] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{'':22}" + "".join(f"{case:>24}" for case in CASES))
    for key in found["full"]:
        print(f"{key:22}" + "".join(f"{found[case][key]:24,.2f}" for case in CASES))


if __name__ == "__main__":
    main()
