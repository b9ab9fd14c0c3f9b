"""Drawing: Algorithm 2 and its faster relatives, by diffusers' schedulers, for any family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from loratune.diffusion.objective import guide
from loratune.errors import UserError
from loratune.families.family import Condition, Family, join_conditions, repeat_condition

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-a": "EulerAncestralDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}


def make_scheduler(name: str, config: dict[str, Any]) -> Any:
    """A diffusers scheduler by its short name, with the base's own noise schedule.

    Raises:
        UserError: the name is not one of SAMPLERS.
    """
    if name not in SAMPLERS:
        raise UserError(f"sampler {name!r} is not known; there is {', '.join(SAMPLERS)}")
    known = {key: value for key, value in config.items() if not key.startswith("_")}
    return getattr(diffusers, SAMPLERS[name]).from_config(known)


@torch.no_grad()
def sample_images(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str = "ddim",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw an image for each prompt from the noise of its own seed: `sample_latents`, decoded.

    Args:
        family: the model.
        prompts: what to draw, B of them.
        seeds: one for each prompt; the same seed and prompt give the same image in any batch.
        height: in pixels.
        width: in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance (Ho & Salimans 2022); 1 is none.
        sampler: one of SAMPLERS.
        on_step: called with the number of steps done and x_t.

    Returns:
        Pixels in [-1, 1], (B, 3, height, width).
    """
    x_0 = sample_latents(family, prompts, seeds, height, width, steps, guidance_scale, sampler, on_step)
    # One at a time: a decoder takes gigabytes for an image of 1024 pixels.
    return torch.cat([family.decode(one[None]) for one in x_0]).clamp(-1, 1)


@torch.no_grad()
def sample_latents(
    family: Family,
    prompts: Sequence[str],
    seeds: Sequence[int],
    height: int,
    width: int,
    steps: int = 25,
    guidance_scale: float = 4.0,
    sampler: str = "ddim",
    on_step: Callable[[int, Tensor], None] | None = None,
    on_estimate: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """What `sample_images` decodes: x_0 for each prompt.

    Args:
        family: as for `sample_images`, like all up to on_step.
        prompts: B of them.
        seeds: one for each prompt.
        height: in pixels.
        width: in pixels.
        steps: of the sampler.
        guidance_scale: scale of classifier-free guidance.
        sampler: one of SAMPLERS.
        on_step: called with the number of steps done and x_t.
        on_estimate: called with the number of steps done and the step's estimate of x_0; not by every sampler.
    """
    scheduler = make_scheduler(sampler, family.scheduler_config)
    scheduler.set_timesteps(steps, device=family.device)
    # On the CPU, so that a seed means the same image on every device.
    random = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = family.latent_shape(height, width)
    x = torch.stack([torch.randn(shape, generator=one) for one in random]).to(family.device)
    x = x * scheduler.init_noise_sigma
    told = family.encode_prompts(prompts)
    guided = guidance_scale != 1 and bool(told)
    if guided:
        told = join_conditions([told, repeat_condition(family.encode_prompts([""]), len(prompts))])
    extra = {"generator": random} if sampler in ("ddpm", "euler-a") else {}
    for done, t in enumerate(scheduler.timesteps, 1):
        output = _predict(family, scheduler.scale_model_input(x, t), t, told, guidance_scale if guided else 1.0)
        made = scheduler.step(output, t, x, **extra)
        x = made.prev_sample
        if on_step:
            on_step(done, x)
        if on_estimate and getattr(made, "pred_original_sample", None) is not None:
            on_estimate(done, made.pred_original_sample)
    return x


def _predict(family: Family, x: Tensor, t: Tensor, told: Condition, guidance_scale: float) -> Tensor:
    count = len(x)
    if guidance_scale == 1:
        return family.denoise(x, t.expand(count), told)
    both = family.denoise(torch.cat([x, x]), t.expand(2 * count), told)
    return guide(both[:count], both[count:], guidance_scale)
