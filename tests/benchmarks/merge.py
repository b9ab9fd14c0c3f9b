"""A merge beside a copy of the same file: python tests/benchmarks/merge.py --folder FOLDER [--case sdxl sd15 ...]

For each case a checkpoint of full size with random weights and a rank-16 kohya LoRA on all attention of the U-Net and
the text encoders are made in FOLDER (or found there), and then copied (`cp`, then `sync` of what was written) and
merged (`loratune merge`, which syncs too) by turns. Before each the last output is deleted and the source is read once,
so that both find it in the page cache if it fits there. Times are of whole commands, python's start included.

Prints one table: medians in seconds, their ratio, and the merge's peak of anonymous and shared memory, sampled
every 5 ms; beside it the peak of all resident memory, in which the libraries' mapped files are counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))

from full_size import make_checkpoint, make_folder

from loratune.families.architectures import architectures, module_names, original_names
from loratune.families.known import family_of
from loratune.families.layouts import Shape
from loratune.formats.files import write_safetensors
from loratune.lora.file import standard_metadata

CASES = ("sdxl", "sd15", "sdxl-folder", "sd15-folder")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
RANK, ALPHA = 16, 8.0
MB = 1_000_000


def kohya_name(name: str, originals: dict[str, str] | None) -> str:
    """kohya's name of a layer; SDXL's U-Net has the original layout's names, and two text encoders."""
    component, _, path = name.partition(".")
    if component == "unet":
        return f"lora_unet_{(originals[name] if originals else path).replace('.', '_')}"
    number = {"text_encoder": "1", "text_encoder_2": "2"}[component] if originals else ""
    return f"lora_te{number}_{path.replace('.', '_')}"


def attention_layers(architecture: str) -> dict[str, Shape]:
    """Shapes of all attention layers of the U-Net and the text encoders, by canonical name."""
    from loratune.families.architectures import entries

    configs = architectures()[architecture]
    adaptable = set(module_names(configs))
    found = {f"{part}.{key.removesuffix('.weight')}": shape for part, key, shape, _ in entries(configs)}
    return {name: found[name] for name in sorted(adaptable) if name.endswith(ATTENTION) and "attn" in name}


def make_lora(architecture: str, path: Path) -> None:
    """A kohya LoRA in float16, with numbers as training leaves them, on all attention."""
    configs, random = architectures()[architecture], torch.Generator().manual_seed(1)
    originals = original_names(configs) if family_of(configs).name == "sdxl" else None
    tensors = {}
    for name, (outer, inner, *_) in attention_layers(architecture).items():
        key = kohya_name(name, originals)
        tensors[f"{key}.lora_down.weight"] = (torch.randn(RANK, inner, generator=random) / inner**0.5).half()
        tensors[f"{key}.lora_up.weight"] = (torch.randn(outer, RANK, generator=random) * 0.02).half()
        tensors[f"{key}.alpha"] = torch.tensor(ALPHA).half()
    base = family_of(configs).kohya_version(configs)
    write_safetensors(path, tensors, standard_metadata(rank=RANK, alpha=ALPHA, base_model=base))


def prepare(case: str, folder: Path) -> tuple[Path, Path]:
    """The base and the LoRA of a case, made where they are missing."""
    architecture, _, kind = case.partition("-")
    base = folder / (architecture if kind else f"{architecture}.safetensors")
    lora = folder / f"{architecture}-lora.safetensors"
    if not base.exists():
        (make_folder if kind else make_checkpoint)(architecture, base)
    if not lora.exists():
        make_lora(architecture, lora)
    return base, lora


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def warm(path: Path) -> None:
    """Read all of a file or folder once, and let what was written before reach the disk."""
    os.sync()
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb") as opened:
                while opened.read(8 << 20):
                    pass


def copy(base: Path, out: Path) -> float:
    """Copy with cp and sync; returns the seconds taken."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    files = [out] if out.is_file() else [file for file in out.rglob("*") if file.is_file()]
    subprocess.run(["sync", *map(str, files)], check=True)
    return time.perf_counter() - start


def run_merge(base: Path, lora: Path, out: Path) -> tuple[float, float, float]:
    """Run the command; returns the seconds, and the peaks of anonymous and of all resident memory in MB."""
    words = [sys.executable, "-m", "loratune", "merge", "--base", str(base), "--lora", str(lora), "--out", str(out)]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told, subprocess.Popen(words, stdout=told, stderr=told) as running:
        own, whole = 0.0, 0.0
        while running.poll() is None:
            memory = resident(running.pid)
            own, whole = max(own, memory["RssAnon"] + memory["RssShmem"]), max(whole, memory["VmHWM"])
            time.sleep(0.005)
        seconds = time.perf_counter() - start
        if running.returncode:
            told.seek(0)
            sys.exit(told.read())
    return seconds, own, whole


def resident(process: int) -> dict[str, float]:
    """Kinds of resident memory of a process, in MB."""
    found = dict.fromkeys(("RssAnon", "RssShmem", "VmHWM"), 0.0)
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return found
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in found:
            found[key] = int(value.split()[0]) * 1024 / MB
    return found


def measure(case: str, folder: Path, runs: int) -> list[str]:
    """A row of the table."""
    base, lora = prepare(case, folder)
    copied, merged, own, whole = [], [], 0.0, 0.0
    for number in range(runs):
        for kind in ("copy", "merge"):
            out = folder / ("out" if base.is_dir() else "out.safetensors")
            remove(out)
            warm(base)
            if kind == "copy":
                copied.append(copy(base, out))
            else:
                seconds, one, other = run_merge(base, lora, out)
                merged.append(seconds)
                own, whole = max(own, one), max(whole, other)
            remove(out)
        print(f"{case} {number + 1}: copy {copied[-1]:.2f} s, merge {merged[-1]:.2f} s", file=sys.stderr, flush=True)
    files = [base] if base.is_file() else [file for file in base.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e9
    copy_time, merge_time = statistics.median(copied), statistics.median(merged)
    numbers = [f"{size:.2f}", f"{copy_time:.2f}", f"{merge_time:.2f}", f"{merge_time / copy_time:.2f}"]
    return [case, *numbers, f"{own:.0f}", f"{whole:.0f}"]


def main(words: Sequence[str]) -> None:
    """Measure the cases that the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="for the large files; a temporary one by default")
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--runs", type=int, default=5, help="pairs of a copy and a merge")
    asked = parser.parse_args(words)
    table = Table("case", "GB", "copy [s]", "merge [s]", "ratio", "own memory [MB]", "resident [MB]")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for case in asked.case:
            table.add_row(*measure(case, folder, asked.runs))
    Console(width=100).print(table)


if __name__ == "__main__":
    main(sys.argv[1:])
