"""The base and the adapted network on the same images, steps and noise: a difference without the noise of draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor, nn

from loratune.data.module import collate
from loratune.diffusion.objective import weighted_error
from loratune.diffusion.process import diffuse, target
from loratune.errors import UserError
from loratune.families.architectures import canonical_module_name
from loratune.families.model import Model
from loratune.formats.images import normalise
from loratune.lora.inject import adapted_layers, factors
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.ema import averaged
from loratune.training.objectives import mask_of
from loratune.training.randomness import generator


class Chunk(NamedTuple):
    """Images of one shape, with the number of each among the images of its set.

    Args:
        numbers: b of them.
        x_0: (b, ...), on the CPU.
        batch: all else that the data say of them.
    """

    numbers: list[int]
    x_0: Tensor
    batch: dict[str, Any]


class Outputs(NamedTuple):
    """A network's losses and outputs on a set of n images at k timesteps.

    Args:
        losses: mean squared error of each, (n, k) in float64 on the CPU.
        outputs: of each chunk and step, (b, ...) on the CPU; none where they are not kept.
    """

    losses: Tensor
    outputs: list[Tensor]


class Gap(NamedTuple):
    """How much larger the adapted network's loss is than the base's, over images.

    Args:
        mean: of the differences; below 0 the adapted network is better.
        error: standard error of the mean; nan for one image.
        adapted: mean loss of the adapted network.
        base: mean loss of the base.
    """

    mean: float
    error: float
    adapted: float
    base: float


def gap(adapted: Tensor, base: Tensor) -> Gap:
    """The mean over images of the differences between paired losses (n, k), and its standard error s / sqrt(n).

    The k losses of an image are averaged first: they are not independent of one another.
    """
    difference = (adapted - base).mean(1)
    error = float(difference.std() / math.sqrt(len(difference))) if len(difference) > 1 else math.nan
    return Gap(float(difference.mean()), error, float(adapted.mean()), float(base.mean()))


def drift(adapted: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Relative squared difference of two networks' outputs: sum |f - f_0|^2 / sum |f_0|^2; 0 where they are alike."""
    moved = sum(
        float((output.double() - other.double()).square().sum()) for output, other in zip(adapted, base, strict=True)
    )
    return moved / max(sum(float(output.double().square().sum()) for output in base), 1e-30)


def levels(steps: int, count: int) -> list[int]:
    """The middles of `count` equal parts of the steps 0..T-1."""
    return [steps * (2 * part + 1) // (2 * count) for part in range(count)]


def spread(count: int, most: int) -> list[int]:
    """At most `most` indices, spread evenly over `count`."""
    return [index * count // most for index in range(most)] if count > most else list(range(count))


def fixed_chunks(model: Model, rows: Any, most: int, size: int) -> list[Chunk]:
    """Some of a data set's images, always the same, in chunks of at most `size` images of one shape.

    Args:
        model: the base; of what its VAE made the mean is taken.
        rows: samples by their index.
        most: how many images.
        size: of a chunk.
    """
    shapes: dict[tuple[int, ...], list[tuple[int, dict[str, Any]]]] = {}
    for number, index in enumerate(spread(len(rows), most)):
        sample = rows[index]
        shapes.setdefault(tuple(sample["mean" if "mean" in sample else "pixels"].shape), []).append((number, sample))
    chunks = []
    for alike in shapes.values():
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            batch = _encoded(model, collate([sample for _, sample in part]))
            chunks.append(Chunk([number for number, _ in part], model.x_0(batch, None).cpu(), batch))
    return chunks


def _encoded(model: Model, batch: dict[str, Any]) -> dict[str, Any]:
    """A batch as the network starts from it; images that are in no cache are encoded here."""
    if model.batch_kind != "latents" or "mean" in batch:
        return batch
    with torch.no_grad():
        encoded = model.encode_images(normalise(batch["pixels"]).to(model.device))
    kept = {name: value for name, value in batch.items() if name != "pixels"}
    return kept | {name: value.cpu() for name, value in encoded.items()}


def neutral_chunks(module: DiffusionModule, rows: Any, prompts: Sequence[str], size: int) -> list[Chunk]:
    """The first of a data set's images under prompts that are not theirs, as chunks; no image is sampled for it.

    Args:
        module: whose text encoders read the prompts.
        rows: samples by their index; where they are fewer than the prompts, the last prompts are left out.
        prompts: one for each image.
        size: of a chunk.
    """
    chunks = []
    for chunk in fixed_chunks(module.model, rows, len(prompts), size):
        texts = [prompts[number] for number in chunk.numbers]
        batch = {**chunk.batch, "name": texts, "caption": texts}
        if module.text_is_frozen:
            batch["condition"] = {name: value.cpu() for name, value in module.model.encode_prompts(texts).items()}
        chunks.append(chunk._replace(batch=batch))
    return chunks


@torch.no_grad()
def outputs(
    module: DiffusionModule,
    chunks: Sequence[Chunk],
    name: str,
    count: int,
    seed: int,
    keep: bool = False,
    on_pass: Callable[[], None] = lambda: None,
) -> Outputs:
    """What the network, as it stands, makes of images at `count` fixed steps and fixed noise.

    The noise follows from the set's name, the image's number, the step's and the seed: no generator is moved.
    `on_pass` is called after each pass through the network, of which there are `count` for a chunk.
    """
    model, device = module.model, module.device
    losses = torch.zeros(sum(len(chunk.numbers) for chunk in chunks), count, dtype=torch.float64)
    kept: list[Tensor] = []
    for chunk in chunks:
        batch = move_data_to_device(chunk.batch, device)
        x_0, condition = chunk.x_0.to(device), module._condition(batch, None)
        condition = model.family.conditioned(condition, batch)
        for part, step in enumerate(levels(len(model.noise_schedule), count)):
            drawn = [torch.randn(x_0.shape[1:], generator=generator("cpu", seed, name, n, part)) for n in chunk.numbers]
            noise, t = torch.stack(drawn).to(device), torch.full((len(drawn),), step, device=device)
            a, b = model.noise_schedule.at(t, x_0)
            output = model.denoise(diffuse(x_0, noise, a, b), model.noise_schedule.time(t), condition)
            error = weighted_error(output, target(model.prediction, x_0, noise, a, b), mask=mask_of(batch, x_0))
            losses[chunk.numbers, part] = error.double().cpu()
            on_pass()
            if keep:
                kept.append(output.float().cpu())
    return Outputs(losses, kept)


@contextmanager
def evaluating(trainer: L.Trainer, module: L.LightningModule) -> Iterator[None]:
    """Within it the module evaluates: no dropout, averaged weights, the run's precision; then all is as it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad(), averaged(trainer, module), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def base_alone(module: Any) -> Iterator[None]:
    """Within it the network and the text encoders are the base's: adapters off, new tokens as they began.

    An adapter that was taken from W_0 (pissa, olora) is put back to its start, where it completes W_0.

    Args:
        module: a LoRAModule; others are left as they are.
    """
    start: Mapping[str, tuple[Tensor, Tensor]] = getattr(module, "_start", {})
    with ExitStack() as stack:
        for component, part in module.model.components().items():
            for name, layer in adapted_layers(part).items():
                if initial := start.get(f"{component}.{canonical_module_name(component, part, name)}"):
                    own = factors(layer)
                    stack.enter_context(_holding(own["down"], initial[0]))
                    stack.enter_context(_holding(own["up"], initial[1]))
                else:
                    stack.enter_context(_off(layer))
        rows, first = getattr(module, "_rows", []), getattr(module, "_first_rows", [])
        for row, held_row in zip(rows, first, strict=True):
            stack.enter_context(_holding(row, held_row))
        yield


@contextmanager
def _off(layer: Any) -> Iterator[None]:
    # peft's own switch would change which parameters ask for gradients.
    before, layer._disable_adapters = layer._disable_adapters, True
    try:
        yield
    finally:
        layer._disable_adapters = before


@contextmanager
def _holding(parameter: Tensor, value: Tensor) -> Iterator[None]:
    before = parameter.detach().clone()
    parameter.data.copy_(value.view_as(parameter))
    try:
        yield
    finally:
        parameter.data.copy_(before)


def check_weights(module: Any, weights: Sequence[float]) -> None:
    """See that a module can be drawn with its adapter at these weights.

    Raises:
        UserError: it has none, or one that was taken from W_0, of which only 0 and 1 can be drawn.
    """
    if not any(adapted_layers(part) for part in _parts(module)):
        if any(weight != 1 for weight in weights):
            raise UserError(f"samples.lora_scales is {list(weights)}, but there is no LoRA to weigh; leave it out")
        return
    if getattr(module, "_start", {}) and (odd := [weight for weight in weights if weight not in (0, 1)]):
        reason = "with lora.init pissa and olora only 0 and 1 can be drawn"
        raise UserError(f"samples.lora_scales has {odd[0]:g}: {reason}; change either")


@contextmanager
def weighted(module: Any, weight: float) -> Iterator[None]:
    """Within it adapters count `weight` times as much as trained; 0 is the base alone.

    Raises:
        UserError: as `check_weights`.
    """
    check_weights(module, [weight])
    if weight == 0:
        with base_alone(module):
            yield
        return
    layers = [layer for part in _parts(module) for layer in adapted_layers(part).values()]
    scalings = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: weight * scale for name, scale in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, scalings, strict=True):
            layer.scaling.update(scaling)


def _parts(module: Any) -> Sequence[nn.Module]:
    model = getattr(module, "model", None)
    return list(model.components().values()) if model is not None else []


def rise(now: Tensor, best: Tensor) -> Gap | None:
    """How far losses (n, k) are above those of an earlier step: None where it is within two standard errors."""
    difference = gap(now, best)
    return difference if difference.mean > 2 * difference.error else None  # False for nan


@dataclass(frozen=True)
class Evaluation:
    """The comparison at a step.

    Args:
        step: of the run.
        gaps: of each set of images.
        drift: nan where there are no prompts.
        levels: the held-out images' mean gap at each step of the process at which they were compared.
    """

    step: int
    gaps: dict[str, Gap]
    drift: float
    levels: dict[int, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """As they are logged; what is not a number is left out."""
        metrics: dict[str, float] = {}
        for name, estimate in self.gaps.items():
            metrics |= {
                f"{name}/gap": estimate.mean,
                f"{name}/gap_se": estimate.error,
                f"{name}/loss": estimate.adapted,
            }
        metrics |= {f"held_out/gap_t{t}": value for t, value in self.levels.items()}
        metrics["drift"] = self.drift
        return {name: value for name, value in metrics.items() if math.isfinite(value)}
