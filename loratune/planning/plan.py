"""What a recipe will need, said before it starts: parameters, memory by part, steps, images, time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch

from loratune.data.order import often
from loratune.errors import UserError
from loratune.evaluation.evaluate import Evaluate
from loratune.evaluation.samples import SampleGrid
from loratune.families.load import without_weights
from loratune.planning.footprint import Rules, imagine, peak, state_bytes, step, weight_bytes
from loratune.recipe.parse import RecipeCLI
from loratune.recipe.rules import FROM_BASE
from loratune.recipe.run import run as run_recipe
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.ema import EMA

UNITS = {"MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30}
LOOKED_AT = 1000
HELD = ("weights", "adapter", "trained", "optimizer", "device", "process")
"""Parts of a training step's memory that are there between steps too."""
CONTEXT = 500 * 10**6
"""Bytes that a GPU's driver and libraries take themselves, about."""
PROCESS, HEAP = 200 * 10**6, 0.35
"""On a CPU: bytes that kernels and threads take, and what the C library keeps of memory that was freed in pieces, as a
share of the activations. Found by measuring (tests/benchmarks/plan_memory.py); glibc's heap, two threads."""


@dataclass(frozen=True)
class Plan:
    """What a run needs; sizes in bytes.

    Args:
        recipe: what was planned.
        device: what for.
        precision: as Lightning's trainer calls it.
        trained: parameters that the optimizer moves.
        frozen: parameters that it does not.
        images: in the sources, those held out among them.
        batch: images in a step, on all devices and over accumulated batches.
        steps: of the optimizer.
        sizes: (height, width) in pixels of each bucket.
        memory: by part, at the peak of a training step.
        encoding: peak while images are encoded.
        sampling: peak while samples are made; 0 where none are.
        cache: on disk.
        flops: of one step.
        seconds: of the run; none where no rate is known.
        least: seconds of the run if all its arithmetic were done as fast as this device multiplies matrices; none where
            it is planned for another device.
        measured: what true steps took.
    """

    recipe: str
    device: str
    precision: str
    trained: int
    frozen: int
    images: int
    batch: int
    steps: int
    sizes: tuple[tuple[int, int], ...]
    memory: dict[str, int]
    encoding: int
    sampling: int
    cache: int
    flops: int
    seconds: float | None = None
    least: float | None = None
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def training(self) -> int:
        """Bytes at the peak of a training step."""
        return sum(self.memory.values())

    @property
    def peak(self) -> int:
        """Bytes at the peak of the run."""
        return max(self.training, self.encoding, self.sampling)


def build(recipe: Path, words: Sequence[str] = ()) -> RecipeCLI:
    """A recipe's objects with bases on the meta device: no weight is read."""
    with without_weights():
        return run_recipe(["-c", str(recipe), *words], execute=False)


def make_plan(recipe: Path, gpu: bool, words: Sequence[str] = (), rate: float | None = None) -> Plan:
    """Plan a recipe.

    Args:
        recipe: of a LoRAModule or a DiffusionModule.
        gpu: whether it will run on a GPU.
        words: keys of the recipe to change, as on the command line.
        rate: steps per second, where they are known.

    Raises:
        UserError: the recipe is wrong, or trains something else.
    """
    cli = build(recipe, words)
    module: Any = cli.model
    if not isinstance(module, DiffusionModule):
        raise UserError(f"{recipe}: plan knows LoRAModule and DiffusionModule, not {type(module).__name__}")
    trainer: Any = cli.trainer
    data, model = cli.datamodule, module.model
    network = model.family.denoiser.name
    precision = str(trainer.precision_plugin.precision)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    counts = {flag: sum(p.numel() for p in module.parameters() if p.requires_grad == flag) for flag in (True, False)}
    weights = {name: weight_bytes(part, False, precision) for name, part in model.components().items()}
    own = weight_bytes(model, True, precision)
    imagine(module, precision)
    sizes = sizes_of(data)
    shape = max((model.latent_shape(*size) for size in sizes), key=lambda shape: shape[-1] * shape[-2])
    rules, frozen_text = Rules(precision, gpu), module.text_is_frozen
    captions = ["a caption"] * data.batch_size

    def conditioning() -> dict[str, Any]:
        with torch.set_grad_enabled(not frozen_text):
            return dict(model.encode_prompts(captions))

    condition = conditioning()
    once = step(
        model,
        data.batch_size,
        shape,
        (lambda: condition) if frozen_text else conditioning,
        rules,
        module.memory.gradient_checkpointing,
    )
    encoding = _encoding(module, max(sizes, key=lambda size: size[0] * size[1]), precision, gpu)
    sampling = _sampling(module, trainer, data, gpu)
    averages = own if any(isinstance(callback, EMA) for callback in trainer.callbacks) else 0
    kept = weights if not module.memory.unload_encoders else {network: weights[network]}
    memory = {
        "weights": sum(kept.values()),
        "adapter" if weights[network] else "trained": own + averages,
        "gradients": sum(p.numel() * p.element_size() for p in trained),
        "optimizer": state_bytes(module.optimizer, [p.numel() for p in trained]),
        "activations": once.activations,
        "transient": once.transient,
    } | ({"device": CONTEXT} if gpu else {"process": PROCESS + round(HEAP * (once.activations + once.transient))})
    # Forward, the gradients of what each layer reads, those of its weights where all are trained, and forward again.
    passes = 2 + (weights[network] == 0) + module.memory.gradient_checkpointing
    images = len(data.collection)
    batch = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    steps = _steps(trainer, images_of_an_epoch(data), batch)
    return Plan(
        recipe=str(recipe),
        device="gpu" if gpu else "cpu",
        precision=precision,
        trained=counts[True],
        frozen=counts[False],
        images=images,
        batch=batch,
        steps=steps,
        sizes=tuple(sizes),
        memory=memory,
        encoding=sum(weights.values()) + own + encoding + (CONTEXT if gpu else 0),
        sampling=sampling + sum(memory[part] for part in memory if part in HELD) if sampling else 0,
        cache=images * _cached(shape, condition, data.batch_size) if module.batch_kind == "latents" else 0,
        flops=once.flops * passes * trainer.accumulate_grad_batches,
        seconds=steps / rate if rate else None,
    )


def sizes_of(data: Any) -> list[tuple[int, int]]:
    """(height, width) of the buckets of a recipe's images; of many images a thousand are looked at."""
    if data.buckets is None:
        return [(data.resolution, data.resolution)]
    collection, sizes = data.collection, set()
    for number in range(0, len(collection), max(1, len(collection) // LOOKED_AT)):
        source, row = collection.at(number)
        with suppress(OSError):  # an unreadable image is reported when the run begins
            sizes.add(collection.entry(source, row, collection.sources[source][row]).bucket[::-1])
    return sorted(sizes)


def images_of_an_epoch(data: Any) -> int:
    """About how many images come in an epoch: how many are held out is known when each is read."""
    share = {"training": (100 - data.validation_percent) / 100, "regularization": 1.0, "validation": 0.0}
    pairs = zip(data.collection.sources, data.sources, strict=True)
    counts = [round(len(source) * share[config.role]) for source, config in pairs]
    return round(sum(count * each for count, each in zip(counts, often(data.sources, counts), strict=True)))


def _encoding(module: DiffusionModule, size: tuple[int, int], precision: str, gpu: bool) -> int:
    """Bytes at the peak of encoding one image."""
    if module.batch_kind != "latents":
        return 0
    pixels = torch.empty(1, 3, *size, device="meta")
    vae: Any = module.model.components()[module.model.names("vae")[0]]
    return peak(lambda: vae.encode(pixels.to(vae.dtype)), Rules("32-true", gpu))


def _sampling(module: DiffusionModule, trainer: L.Trainer, data: Any, gpu: bool) -> int:
    """Bytes beyond what is held, at the peak of sampling and of the comparisons; 0 where there are none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    every = {
        type(callback): callback.every_n_steps for callback in callbacks if isinstance(callback, SampleGrid | Evaluate)
    }
    if not any(every.values()):
        return 0
    model: Any = module.model
    shape, rules = (
        model.latent_shape(data.resolution, data.resolution),
        Rules(str(trainer.precision_plugin.precision), gpu),
    )

    def some(count: int) -> torch.Tensor:
        return torch.empty(count, *shape, device="meta")

    conditioning = model.encode_prompts(["a caption"] * 2 * data.batch_size)  # with and without the caption
    t = torch.zeros(2 * data.batch_size, dtype=torch.long, device="meta")
    taken = peak(lambda: model.denoise(some(len(t)), t, conditioning), rules)
    vaes: Any = [model.components()[name] for name in model.names("vae")]
    if not vaes or not every.get(SampleGrid):
        return taken
    # Some families decode in float32 whatever the run's precision is.
    return max(taken, peak(lambda: vaes[0].decode(some(1).to(vaes[0].dtype)), Rules("32-true", gpu)))


def _cached(shape: Sequence[int], condition: dict[str, Any], count: int) -> int:
    """Bytes that an image and its caption take in the cache."""
    latents = 2 * 4 * shape[-3] * shape[-2] * shape[-1]
    return latents + sum(value.numel() * value.element_size() for value in condition.values()) // count


def _steps(trainer: L.Trainer, images: int, batch: int) -> int:
    epoch = max(1, -(-images // batch))
    limits = [trainer.max_steps] if trainer.max_steps >= 0 else []
    limits += [epoch * trainer.max_epochs] if trainer.max_epochs is not None and trainer.max_epochs >= 0 else []
    return min(limits, default=0)


def parse_memory(text: str) -> int:
    """Bytes of a size such as 24GB (10^9) or 23.5GiB (2^30).

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(MB|GB|MiB|GiB)\s*", text, re.IGNORECASE)
    if match is None:
        raise UserError(f"--device {text}: give cpu, gpu, or a GPU's memory such as 24GB or 23.5GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def changes(cli: RecipeCLI) -> Iterator[tuple[str, list[str]]]:
    """What would take less memory, the least harmful first: the key as shown, and the words that set it."""
    module: Any = cli.model
    memory, data = module.memory, cli.datamodule
    lora: Any = getattr(module, "lora", None)

    def key(name: str, value: str) -> tuple[str, list[str]]:
        return f"model.memory.{name}: {value}", [f"--model.memory.{name}", value]

    exact = lora is None or lora.init in FROM_BASE
    if memory.dtype == "float32" and not exact:
        yield key("dtype", "bfloat16")
    if not memory.gradient_checkpointing:
        yield key("gradient_checkpointing", "true")
    if memory.quantization is None and not exact and lora.type in ("lora", "dora"):
        yield key("quantization", "nf4")
    size = data.batch_size
    while size > 1:
        size //= 2
        yield f"data.batch_size: {size} (with trainer.accumulate_grad_batches)", ["--data.batch_size", str(size)]


def advise(recipe: Path, gpu: bool, room: int, words: Sequence[str] = ()) -> tuple[list[str], Plan] | None:
    """The changes, added one by one, with which a recipe fits into `room` bytes, and the plan with them; or None."""
    words = list(words)
    advised: list[str] = []
    for name, more in changes(build(recipe, words)):
        words += more
        advised = [*(line for line in advised if line.split(":")[0] != name.split(":")[0]), name]
        changed = make_plan(recipe, gpu, words)
        if changed.peak <= room:
            return advised, changed
    return None


def size_text(count: float) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
