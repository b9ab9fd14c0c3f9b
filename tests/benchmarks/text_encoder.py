"""Three ways to a text encoder, the same U-Net steps each: python tests/benchmarks/text_encoder.py [--steps 500]

joint        random at the start, trained together with the U-Net
contrastive  trained beforehand with a small image tower (pretrain/text-encoder.yaml), then frozen
both         trained beforehand, then together with the U-Net

The VAE is the embedded base's. Prints the time taken, the mean training loss of the last tenth of the
steps, and how often the nearest of 20 real images to a sample is the right one, by shape and by colour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# Of so short runs the average of the recipe's 500 last steps would still be half of what they began with.
EMA = '[{"class_path": "EMA", "init_args": {"decay": 0.98}}]'
ROOT = Path(__file__).parent.parent.parent
VAE = ROOT / "loratune" / "assets" / "emoji-64" / "vae"
DATA = "datasets/base-64.parquet"


def loratune(*words: str) -> None:
    """Run the command quietly."""
    subprocess.run(
        [sys.executable, "-m", "loratune", *words],
        cwd=ROOT,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def fit(recipe: str, out: Path, steps: int, batch: int, *words: str) -> float:
    """Train one recipe of pretrain/ into `out`; returns the seconds it took."""
    started = time.perf_counter()
    shared = ["--trainer.default_root_dir", str(out), "--trainer.max_steps", str(steps), "--samples.every_n_steps", "0"]
    shared += ["--data.path", DATA, "--data.batch_size", str(batch), "--trainer.check_val_every_n_epoch", "1000000"]
    loratune("fit", "-c", f"recipes/pretrain/{recipe}.yaml", *shared, *words)
    return time.perf_counter() - started


def last_loss(out: Path) -> float:
    """Mean training loss of the last tenth of a run."""
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    values = [event.value for event in events.Scalars("train/loss")]
    last = values[-max(1, len(values) // 10) :]
    return sum(last) / len(last)


def main() -> None:
    """Train the three, measure them, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of each U-Net")
    parser.add_argument("--text-steps", type=int, default=300, help="of the contrastive training")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=100)
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = fit("text-encoder", folder / "clip", options.text_steps, 64)
        start = ["--model.init_args.base.init_args.text_encoder", str(folder / "clip" / "text_encoder")]
        ways = {"joint": [], "contrastive": [*start, "--model.init_args.trainable", "[unet]"], "both": start}
        for way, words in ways.items():
            out = folder / way
            vae = ["--model.init_args.architecture.init_args.vae", str(VAE), "--trainer.callbacks", EMA]
            seconds = fit("latent-diffusion", out, options.steps, options.batch, *vae, *words)
            base, json_file = next(out.glob("base-*")), out / "nearest.json"
            loratune(
                *("measure", "--base", str(base), "--what", "nearest", "--data", DATA),
                *("--samples", str(options.samples), "--out", str(json_file)),
            )
            found = json.loads(json_file.read_text())
            rows[way] = {
                "seconds": round(seconds + (0 if way == "joint" else before)),
                "loss": round(last_loss(out), 4),
                **{key: value for key, value in found.items() if key.startswith("nearest")},
            }
            print(way, json.dumps(rows[way]), flush=True)


if __name__ == "__main__":
    main()
