"""Predicted beside measured peak memory, for recipes on the embedded base (and on a GPU where there is one).

    python tests/benchmarks/plan_memory.py

Each recipe is trained for two steps in a process of its own. Measured is, on a CPU, the most that the process ever held
(ru_maxrss) less what it held when all was imported and nothing was loaded; on a GPU, the most that torch allocated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
RECIPES = {
    "LoRA on all layers, bf16, batch 64": ["--data.batch_size", "64"],
    "LoRA on cross-attention, float32, batch 64, gradient checkpointing": [
        *("--data.batch_size", "64", "--model.lora.targets", "cross-attention"),
        *("--trainer.precision", "32-true", "--model.memory.gradient_checkpointing", "true"),
    ],
    "LoRA on all layers, float32, batch 24": [
        *("--data.batch_size", "24", "--trainer.precision", "32-true"),
    ],
    "QLoRA (nf4) on attention, bf16, batch 96, encoders unloaded": [
        *("--data.batch_size", "96", "--model.lora.targets", "attention", "--model.memory.quantization", "nf4"),
        *("--model.memory.dtype", "bfloat16", "--model.memory.unload_encoders", "true", "--samples.every_n_steps", "0"),
    ],
}
BASE = ["--samples.every_n_steps", "0", "--trainer.enable_progress_bar", "false"]


def measured(words: list[str]) -> int:
    """Bytes that two steps of the quickstart's recipe, with other keys, take at their peak; for a child process."""
    import psutil
    import torch

    from loratune.recipe.run import run
    from loratune.training import lora_module

    assert lora_module
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "-c", str(ROOT / "recipes" / "quickstart.yaml"), *BASE, *words, "--trainer.max_steps", "2"]
        words += ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
        run([*words, "--trainer.default_root_dir", folder])
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def predicted(words: list[str]) -> int:
    """Bytes that the plan says."""
    import torch

    from loratune.planning.plan import CONTEXT, make_plan

    gpu = torch.cuda.is_available()
    return make_plan(ROOT / "recipes" / "quickstart.yaml", gpu, [*BASE, *words]).peak - CONTEXT * gpu


def child(what: str, words: list[str]) -> int:
    """What `measured` or `predicted` gives in a process of its own."""
    # One arena for all threads, so that memory that was freed is used again and not counted twice.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, __file__, "--child", what, json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        what, words = asked.child[0], json.loads(asked.child[1])
        print(measured(words) if what == "measured" else predicted(words))
        return
    print(f"| {'recipe':58} | predicted | measured | ratio |\n|{'-' * 60}|-----------|----------|-------|")
    for name, words in RECIPES.items():
        said, found = child("predicted", words), child("measured", words)
        print(f"| {name:58} | {said / 1e6:6.0f} MB | {found / 1e6:5.0f} MB | {said / found:5.2f} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
