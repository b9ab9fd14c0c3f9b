"""The proof in a program that shares no code with this one: `make clients`, or python tests/clients/run.py [sd15 sdxl].

stable-diffusion.cpp loads a full-size checkpoint with random weights and a kohya LoRA written here, says how
many of its tensors it applied, and draws 64 x 64 pixels; then it draws from the checkpoint that `loratune merge`
made of both. The two images must be alike, and both unlike the base's own. Needs `pip install
stable-diffusion-cpp-python` (it builds from source), 20 GB of disk for sdxl (6 for sd15), and as much memory
as the checkpoint.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from loratune.families.architectures import architectures, module_names, places
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.lora import LoRALayer

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from full_size import make_checkpoint

ATTENTION = re.compile(r".*(attn[12]\.to_(q|k|v|out\.0)|self_attn\.(q|k|v|out)_proj)")
APPLIED = re.compile(r"\((\d+) / (\d+)\) LoRA tensors have been applied")
ALIKE = 0.1  # mean difference of the two images as a share of their difference from the base's


def make_lora(name: str, path: Path, rank: int = 16, size: float = 0.05) -> None:
    """A kohya LoRA with random numbers on all attention of U-Net and text encoders."""
    configs, random = architectures()[name], torch.Generator().manual_seed(0)
    where = places(configs)
    layers = {}
    for module in filter(ATTENTION.fullmatch, module_names(configs)):
        place = where[f"{module}.weight"]
        out = place.shape[0] if place.rows is None else place.rows[1] - place.rows[0]
        down = torch.randn(rank, place.shape[1], generator=random) * place.shape[1] ** -0.5
        up = torch.randn(out, rank, generator=random) * size
        layers[module] = LoRALayer(down.half(), up.half(), rank / 2)
    write_lora(path, LoRAFile(layers), "kohya")


def draw(model: Path, prompt: str, out: Path, folder: Path) -> str:
    """Draw in a process of its own; returns all that it said."""
    words = [sys.executable, __file__, "--draw", str(model), prompt, str(out), str(folder)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode or not out.is_file():
        raise SystemExit(f"{model.name} could not be drawn from:\n{done.stdout[-3000:]}")
    return done.stdout


def draw_here(model: str, prompt: str, out: str, folder: str) -> None:
    """What the process of `draw` does."""
    from stable_diffusion_cpp import StableDiffusion

    painter = StableDiffusion(model_path=model, lora_model_dir=folder, n_threads=-1, verbose=True)
    settings = {"width": 64, "height": 64, "sample_steps": 2, "cfg_scale": 1.0, "seed": 1}
    painter.generate_image(prompt=prompt, **settings)[0].save(out)


def difference(a: Path, b: Path) -> float:
    """Mean absolute difference of two images, in 255ths."""
    one, two = (np.asarray(Image.open(path).convert("RGB"), dtype=np.float64) for path in (a, b))
    return float(np.abs(one - two).mean())


def prove(name: str, folder: Path) -> bool:
    """Whether it all holds for one architecture; prints what it saw."""
    base, lora, merged = (folder / f"{name}-{part}.safetensors" for part in ("base", "lora", "merged"))
    make_checkpoint(name, base)
    make_lora(name, lora)
    given = ["--base", str(base), "--lora", str(lora), "--out", str(merged)]
    subprocess.run([sys.executable, "-m", "loratune", "merge", *given], check=True)
    images = {kind: folder / f"{name}-{kind}.png" for kind in ("base", "with-lora", "merged")}
    draw(base, "a red apple", images["base"], folder)
    said = draw(base, f"a red apple<lora:{lora.stem}:1>", images["with-lora"], folder)
    draw(merged, "a red apple", images["merged"], folder)
    for path in (base, merged):
        path.unlink()
    found = APPLIED.search(said)
    near = difference(images["with-lora"], images["merged"])
    far = difference(images["with-lora"], images["base"])
    print(f"{name}: {found.group(0) if found else 'no word of the LoRA was said'}")
    print(f"{name}: mean difference in 255ths: LoRA against merged {near:.3f}, LoRA against base {far:.3f}", flush=True)
    return bool(found and found.group(1) == found.group(2) and near <= ALIKE * far)


def main() -> int:
    """Run what is named; 0 if all held."""
    if sys.argv[1:2] == ["--draw"]:
        draw_here(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=["sd15", "sdxl"])
    parser.add_argument("--folder", type=Path, help="where the big files go for a while; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        held = [prove(name, Path(folder)) for name in options.names]
    print("all held" if all(held) else "NOT all held")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
