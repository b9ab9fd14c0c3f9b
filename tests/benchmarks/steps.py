"""Training steps per second and peak memory, beside plain loops with diffusers and peft in the same run.

    python tests/benchmarks/steps.py [--steps 12] [--compile] [--only cpu|gpu]

On the CPU: the embedded base, batch 16 of 64-pixel images, LoRA of rank 16 on all layers. On a GPU: SD 1.5 at 512 and
SDXL at 1024 with random weights. Every row is a process of its own; the first 3 steps are not counted. On the CPU the
rows take turns of a few steps, so that what else the machine does falls on all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(Path(__file__).parent))
BATCH, WARM, TURN = 16, 3, 4
MARK = "@row"
FLOOR = {"sd15": 1.67, "sdxl": 14.0}  # TFLOP an image, forward and backward with LoRA on cross-attention
SIZES = {"sd15": 512, "sdxl": 1024}


def cpu_rows(compile: bool) -> dict[str, dict[str, Any]]:
    """What is measured on the embedded base."""
    rows: dict[str, dict[str, Any]] = {
        "plain loop, images and captions encoded each step, bf16": {"loop": "encode"},
        "plain loop, cached latents, bf16": {"loop": "cached"},
        "loratune, float32": {"words": ["--trainer.precision", "32-true"]},
        "loratune, bf16, channels first": {"words": ["--model.memory.channels_last", "false"]},
        "loratune, bf16": {"words": []},
        "loratune, bf16, the base held in bf16": {"words": ["--model.memory.dtype", "bfloat16"]},
    }
    if compile:
        rows["loratune, bf16, compiled"] = {"words": ["--model.memory.compile", "true"]}
    return rows


def gpu_rows() -> Iterator[tuple[str, dict[str, Any]]]:
    """What is measured on a GPU."""
    for name in FLOOR:
        for targets in ("cross-attention", "attention"):
            for batch in (1, 4, 8):
                one = {"base": name, "targets": targets, "batch": batch}
                told = f"{name} {SIZES[name]}, {targets}, batch {batch}"
                yield f"plain loop, cached: {told}", {"loop": "gpu", **one}
                for memory in ({}, {"compile": True}, {"gradient_checkpointing": True}):
                    yield f"loratune: {told}{''.join(f', {key}' for key in memory)}", {"memory": memory, **one}


def turn() -> None:
    """In a child: wait until it is this row's turn."""
    print(MARK, "ready", flush=True)
    sys.stdin.readline()


def timed(step: Callable[[], Any], steps: int) -> float:
    """Steps per second, by the median."""
    taken = []
    for number in range(WARM + steps):
        if number >= WARM and (number - WARM) % TURN == 0:
            turn()
        since = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= WARM:
            taken.append(time.perf_counter() - since)
    return 1 / statistics.median(taken)


def ours(words: list[str], steps: int) -> float:
    """Steps per second of `loratune fit`, from the end of one batch to that of the next."""
    import lightning as L

    from loratune.recipe.run import run

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.taken: list[float] = []
            self.since = 0.0

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            self.taken.append(time.perf_counter() - self.since)
            done = len(self.taken)
            if WARM <= done < WARM + steps and (done - WARM) % TURN == 0:
                turn()
            self.since = time.perf_counter()

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        recipe = str(ROOT / "recipes" / "quickstart.yaml")
        given = ["-c", recipe, "--trainer.max_steps", str(WARM + steps), "--trainer.default_root_dir", folder]
        given += ["--samples.every_n_steps", "0", "--evaluation.every_n_steps", "0", "--evaluation.figures", "false"]
        given += ["--trainer.limit_val_batches", "0", "--data.batch_size", str(BATCH)]
        cli = run([*given, "--trainer.enable_progress_bar", "false", *words], execute=False)
        cli.trainer.callbacks.append(clock)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    return 1 / statistics.median(clock.taken[WARM:])


def plain(encode: bool, steps: int) -> float:
    """Steps per second of a loop written the obvious way on the embedded base."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from peft import LoraConfig
    from transformers import CLIPTextModel, CLIPTokenizer

    base = ROOT / "loratune" / "assets" / "emoji-64"
    unet, vae = UNet2DConditionModel.from_pretrained(base / "unet"), AutoencoderKL.from_pretrained(base / "vae")
    text = CLIPTextModel.from_pretrained(base / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    scheduler = DDPMScheduler.from_pretrained(base / "scheduler")
    for part in (unet, vae, text):
        part.requires_grad_(False)
    kinds = torch.nn.Linear | torch.nn.Conv2d
    layers = [name for name, part in unet.named_modules() if isinstance(part, kinds)]
    unet.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=layers))
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    images, captions = torch.rand(BATCH, 3, 64, 64) * 2 - 1, ["a red apple"] * BATCH

    @torch.no_grad()
    def encoded() -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokenizer(captions, padding="max_length", max_length=77, return_tensors="pt").input_ids
        return vae.encode(images).latent_dist.sample() * vae.config.scaling_factor, text(ids)[0]

    held = encoded()

    def step() -> None:
        latents, told = encoded() if encode else held
        noise, t = torch.randn_like(latents), torch.randint(0, 1000, (BATCH,))
        with torch.autocast("cpu", torch.bfloat16):
            output = unet(scheduler.add_noise(latents, noise, t), t, told).sample
        F.mse_loss(output.float(), scheduler.get_velocity(latents, noise, t)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps)


def on_gpu(row: dict[str, Any], steps: int) -> float:
    """Steps per second with random weights on a GPU: our module, or a plain loop."""
    from full_size import make_folder

    from loratune.families.sdxl import StableDiffusionXL
    from loratune.lora.inject import LoRA, match_targets
    from loratune.training.lora_module import LoRAModule
    from loratune.training.memory import Memory
    from loratune.training.schedules import fuse

    name, batch = row["base"], row["batch"]
    folder = Path(tempfile.gettempdir()) / f"loratune-{name}"
    if not folder.exists():
        make_folder(name, folder)
    lora = LoRA(rank=16, targets=row["targets"])
    memory = Memory(dtype="bfloat16", **row.get("memory", {}))
    if row.get("loop"):
        from diffusers import UNet2DConditionModel
        from peft import LoraConfig

        network = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.bfloat16).cuda()
        network.requires_grad_(False)
        network.add_adapter(
            LoraConfig(
                r=16, lora_alpha=16, target_modules=match_targets(network, lora.pattern(StableDiffusionXL.targets))
            )
        )
        for parameter in network.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    else:
        module = LoRAModule(str(folder), lora, memory=memory).cuda()
        network = module.model.network
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    if not row.get("loop"):
        fuse(optimizer)
    side, width = SIZES[name] // 8, network.config["cross_attention_dim"]
    x, t = torch.randn(batch, 4, side, side, device="cuda"), torch.full((batch,), 500, device="cuda")
    told = {"text": torch.randn(batch, 77, width, device="cuda"), "pooled": torch.randn(batch, 1280, device="cuda")}
    added = {"text_embeds": told["pooled"], "time_ids": torch.zeros(batch, 6, device="cuda")}

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            if row.get("loop"):
                output = network(x, t, told["text"], added_cond_kwargs=added).sample.float()
            else:
                output = module.model.denoise(x, t, told)
            loss = F.mse_loss(output, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(step, steps)


def matmul_rate() -> float:
    """TFLOP/s of bf16 products of 8192 x 8192 matrices on the GPU."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return timed(lambda: a @ a, 20) * 2 * 8192**3 / 1e12


def measure(row: dict[str, Any], steps: int) -> tuple[float, float]:
    """Steps per second and the peak memory in MB of a row; for a child process."""
    torch.manual_seed(0)
    if "base" in row:
        return on_gpu(row, steps), torch.cuda.max_memory_allocated() / 1e6
    rate = plain(row["loop"] == "encode", steps) if "loop" in row else ours(row["words"], steps)
    return rate, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


class Row:
    """A row's process, which makes a few steps whenever it is its turn."""

    def __init__(self, row: dict[str, Any], steps: int) -> None:
        command = [sys.executable, __file__, "--steps", str(steps), "--row", json.dumps(row)]
        pipe, self.errors = subprocess.PIPE, tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the row)
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self.errors, text=True)
        self.result: tuple[float, float] | None = None  # steps/s and MB; 0 where it failed, as for want of memory
        self.wait()

    def wait(self) -> None:
        """Until it is ready for its next turn, or has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                told = line.split()[1:]
                if told != ["ready"]:
                    self.result = float(told[0]), float(told[1])
                return
        self.errors.seek(0)
        print(*self.errors.read().splitlines()[-1:], file=sys.stderr)
        self.result = 0.0, 0.0

    def go(self) -> None:
        """One turn."""
        assert self.process.stdin
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.wait()


def in_turns(rows: list[dict[str, Any]], steps: int) -> list[tuple[float, float]]:
    """What each row gives, measured side by side."""
    started = [Row(row, steps) for row in rows]
    while waiting := [one for one in started if one.result is None]:
        for one in waiting:
            one.go()
    return [one.result or (0.0, 0.0) for one in started]


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--compile", action="store_true", help="the compiled row too, which takes minutes")
    parser.add_argument("--only", choices=["cpu", "gpu"])
    parser.add_argument("--row", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.row:
        print(MARK, *measure(json.loads(asked.row), asked.steps), flush=True)
        return
    if asked.only != "gpu":
        print(f"CPU, {torch.get_num_threads()} threads: steps/s, peak MB, as multiples of the two plain loops")
        rows = cpu_rows(asked.compile)
        made = in_turns(list(rows.values()), asked.steps)
        plain_rates = [rate for rate, _ in made[:2]]
        for name, (rate, size) in zip(rows, made, strict=True):
            ratios = ", ".join(f"{rate / one:.2f}x" for one in plain_rates if one)
            print(f"  {name:60} {rate:5.2f}  {size:6.0f}  {ratios}", flush=True)
    if asked.only != "cpu":
        there = torch.cuda.is_available()
        peak = matmul_rate() if there else 0.0
        print(f"GPU, bf16 products at {peak:.0f} TFLOP/s: steps/s, peak MB, share of that rate" if there else "GPU")
        for name, row in gpu_rows():
            rate, size = in_turns([row], asked.steps)[0] if there else (0.0, 0.0)
            share = f"{rate * row['batch'] * FLOOR[row['base']] / peak:.0%}" if rate else ""
            print(f"  {name:70} " + (f"{rate:6.2f} {size:7.0f}  {share}" if rate else "not measured"), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
