"""Drawing: Algorithm 2 and its faster relatives, by diffusers' schedulers, for any model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from loratune.diffusion.objective import guide
from loratune.errors import UserError
from loratune.families.conditions import join_conditions, repeat_condition
from loratune.families.family import Condition
from loratune.families.model import Model

NOISY = ("ddpm", "euler-a")
"""Samplers that add noise in each step."""


def make_scheduler(model: Model, sampler: str | None = None) -> Any:
    """A diffusers scheduler by its short name, with the model's own noise schedule.

    Args:
        model: whose family says which there are.
        sampler: one of its family's; none is the first of them.

    Raises:
        UserError: its family has none of that name.
    """
    samplers = model.family.samplers
    if (name := sampler or next(iter(samplers))) not in samplers:
        raise UserError(f"sampler {name!r} is not known for {model.family.title}; there is {', '.join(samplers)}")
    known = {key: value for key, value in model.scheduler_config.items() if not key.startswith("_")}
    return getattr(diffusers, samplers[name]).from_config(known)


@torch.no_grad()
def sample_images(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw an image for each prompt from the noise of its own seed: `sample_latents`, decoded.

    Args:
        model: to sample from.
        prompts: what to draw, B of them.
        seeds: one for each prompt; the same seed and prompt give the same image in any batch.
        height: in pixels.
        width: in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance (Ho & Salimans 2022); 1 is none.
        sampler: one of its family's; none is the first of them.
        on_step: called with the number of steps done and x_t.

    Returns:
        Pixels in [-1, 1], (B, 3, height, width).
    """
    x_0 = sample_latents(model, prompts, seeds, height, width, steps, guidance_scale, sampler, on_step)
    # One at a time: a decoder takes gigabytes for an image of 1024 pixels.
    return torch.cat([model.decode(latent[None]) for latent in x_0]).clamp(-1, 1)


@torch.no_grad()
def sample_latents(
    model: Model,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    on_estimate: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """What `sample_images` decodes: x_0 for each prompt.

    Args:
        model: as for `sample_images`, like all up to on_step.
        prompts: B of them.
        seeds: one for each prompt.
        height: in pixels.
        width: in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance.
        sampler: one of its family's; none is the first of them.
        on_step: called with the number of steps done and x_t.
        on_estimate: called with the number of steps done and the step's estimate of x_0; not by every sampler.
    """
    scheduler = make_scheduler(model, sampler)
    # On the CPU, so that a seed means the same image on every device.
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = model.latent_shape(height, width)
    model.family.start_sampling(scheduler, steps, shape, model.device)
    x = torch.stack([torch.randn(shape, generator=generator) for generator in random]).to(model.device)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    condition = model.encode_prompts(prompts)
    guided = guidance_scale != 1 and bool(condition)
    if guided:
        condition = join_conditions([condition, repeat_condition(model.encode_prompts([""]), len(prompts))])
    extra = {"generator": random} if sampler in NOISY else {}
    scaled = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for done, t in enumerate(scheduler.timesteps, 1):
        output = _predict(model, scaled(x, t), t, condition, guidance_scale if guided else 1.0)
        step = scheduler.step(output, t, x, **extra)
        x = step.prev_sample
        if on_step:
            on_step(done, x)
        if on_estimate and getattr(step, "pred_original_sample", None) is not None:
            on_estimate(done, step.pred_original_sample)
    return x


def _predict(model: Model, x: Tensor, t: Tensor, condition: Condition, guidance_scale: float) -> Tensor:
    count = len(x)
    if guidance_scale == 1:
        return model.denoise(x, t.expand(count), condition)
    both = model.denoise(torch.cat([x, x]), t.expand(2 * count), condition)
    return guide(both[:count], both[count:], guidance_scale)
