"""How fast images are encoded, and in how much memory: python tests/benchmarks/data.py [--counts 500 5000]

For each count a folder of JPEGs and PNGs of 96 to 256 pixels is made, and encoded by the embedded base's VAE at 64
pixels as `loratune cache` does it, in a process of its own; then once more with all of it cached. Prints images per
second, the seconds of reading and decoding, of the VAE and of writing, which add up to nearly all, and the peak of
resident memory above that of the same process with 10 images, where libraries and weights alone are held.
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

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent.parent
RECIPE = """\
trainer: {{accelerator: cpu, precision: 32-true, default_root_dir: {folder}/run}}
model: {{base: "builtin:emoji-64"}}
data: {{path: {images}, resolution: 64, cache_dir: {cache}, validation_percent: 0, num_workers: {workers}}}
"""


def make(folder: Path, count: int) -> None:
    """Captioned images of many sizes; every third is a PNG."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(side) for side in random.integers(96, 257, 2))
        values = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)
        image.save(folder / f"{number:05d}.{'png' if number % 3 == 0 else 'jpg'}")
        (folder / f"{number:05d}.txt").write_text(f"thing {number}")


def child(recipe: Path) -> None:
    """Encode, and print what it took as JSON."""
    import resource

    from loratune.cli.main import main
    from loratune.data.cache import Cache
    from loratune.data.encode import Encoder, Looks

    spent = {"decode": 0.0, "vae": 0.0, "write": 0.0, "all": 0.0}

    def timed(owner: Any, name: str, key: str) -> None:
        whole = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return whole(*given, **named)
            finally:
                spent[key] += time.perf_counter() - started

        setattr(owner, name, counted)

    timed(Looks, "__getitem__", "decode")
    timed(Encoder, "_encode_image", "vae")
    timed(Cache, "put", "write")
    from loratune.data.module import CaptionedImages

    timed(CaptionedImages, "setup", "all")
    status = main(["cache", str(recipe)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(spent | {"peak": peak, "status": status}))


def measured(folder: Path, images: Path, cache: Path, workers: int) -> dict[str, float]:
    """What one process took."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, images=images, cache=cache, workers=workers))
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(recipe)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[500, 5000])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.child)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "few", 10)
        idle = measured(folder, folder / "few", folder / "cache-few", asked.workers)["peak"]
        print("| images |        | images/s |    all | decode |   VAE | write | peak above 10 images |")
        print("|----------|--------|------------|--------|--------|-------|-------|------------------------|")
        for count in asked.counts:
            make(folder / str(count), count)
            for kind in ("new", "cached"):
                one = measured(folder, folder / str(count), folder / f"cache-{count}", asked.workers)
                times = f"{one['all']:4.1f} s | {one['decode']:4.1f} s | {one['vae']:4.1f} s | {one['write']:4.1f} s"
                more = f"{(one['peak'] - idle) / 1e6:6.1f} MB"
                print(f"| {count:8} | {kind:6} | {count / one['all']:10.0f} | {times} | {more:>22} |", flush=True)


if __name__ == "__main__":
    main()
