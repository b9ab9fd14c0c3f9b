"""The settings of a loss, and the loss of a batch by them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from loratune.diffusion.noise import draw_pyramid, offset_noise, perturb
from loratune.diffusion.objective import check_objective, debiased_weight, min_snr_weight, scheduled_huber_c
from loratune.diffusion.process import Prediction, snr
from loratune.diffusion.timesteps import logit_normal, shifted, to_steps
from loratune.families.base import Base
from loratune.families.model import Model


def _in(key: str, value: float, least: float, most: float, hint: str = "") -> None:
    if not least <= value <= most:
        raise ValueError(f"{key} is {value}; give a number from {least:g} to {most:g}{hint}")


@dataclass(frozen=True)
class Timesteps:
    """How timesteps are sampled in training.

    Args:
        distribution: uniform, or logit_normal, which favours the middle (Esser 2024, eq. 19).
        mean: of the logit of t, for logit_normal; above 0 favours noise.
        std: of the logit of t, for logit_normal.
        shift: above 1 moves t towards noise (Esser 2024, eq. 23).
        min: the first timestep that is trained, as a share of the noise schedule.
        max: where the trained timesteps end, as a share of the noise schedule.
    """

    distribution: Literal["uniform", "logit_normal"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    min: float = 0.0
    max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.min < self.max <= 1:
            raise ValueError(f"timesteps: min is {self.min}, max {self.max}; give 0 <= min < max <= 1")
        if not (0 < self.shift < math.inf and 0 < self.std < math.inf and math.isfinite(self.mean)):
            values = f"shift is {self.shift}, std {self.std}, mean {self.mean}"
            raise ValueError(f"timesteps: {values}; give numbers, shift and std above 0")
        if self.distribution == "uniform" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                "timesteps: mean and std say nothing of distribution 'uniform'; set distribution to logit_normal"
            )

    def draw(self, count: int, steps: int, random: torch.Generator) -> Tensor:
        """Steps t from 0 to `steps` - 1, (count,)."""
        start, stop = round(self.min * steps), max(round(self.max * steps), round(self.min * steps) + 1)
        if self.distribution == "uniform" and self.shift == 1:
            return torch.randint(start, stop, (count,), generator=random, device=random.device)
        u = torch.rand(count, generator=random, device=random.device)
        t = logit_normal(u.clamp(1e-6, 1 - 1e-6), self.mean, self.std) if self.distribution == "logit_normal" else u
        return to_steps(shifted(t, self.shift), start, stop)


@dataclass(frozen=True)
class Objective:
    """The loss.

    Args:
        min_snr_gamma: gamma of the min-SNR loss weight (Hang 2023 uses 5); none weighs every timestep alike.
        debiased_estimation: weigh the loss by the root of the SNR (Yu 2024); not with min_snr_gamma.
        huber_c: c of a pseudo-Huber loss in place of the squared error, in (0, 1), usually 0.1: outliers count less.
            With a huber_schedule it is the smallest c.
        huber_schedule: how c grows as noise falls (Khrapov 2024); constant keeps it.
        noise_offset: strength of offset noise, usually 0.05 to 0.1 (Guttenberg 2023).
        pyramid_noise: discount of pyramid noise, usually 0.3 (Whitaker 2023); 0 for plain noise.
        input_perturbation: strength of extra noise in x_t that the target leaves out, usually 0.1 (Ning 2023).
        caption_dropout: share of captions replaced by the empty caption, which classifier-free guidance needs, in [0,
            1].
        timesteps: how timesteps are sampled.
        prediction: prediction type to train: eps, v or x0; none keeps the base's. Sampling must use the same; loratune
            sample reads it from the LoRA file.
        zero_terminal_snr: rescale the base's noise schedule so that its last step is pure noise (Lin 2024), which needs
            prediction v or x0; loss weights follow the rescaled schedule. Sampling must use it too.
    """

    min_snr_gamma: float | None = None
    debiased_estimation: bool = False
    huber_c: float | None = None
    huber_schedule: Literal["constant", "exponential", "snr"] = "constant"
    noise_offset: float = 0.0
    pyramid_noise: float = 0.0
    input_perturbation: float = 0.0
    caption_dropout: float = 0.0
    timesteps: Timesteps = field(default_factory=Timesteps)
    prediction: Literal["eps", "v", "x0"] | None = None
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        _in("caption_dropout", self.caption_dropout, 0, 1, " (a share)")
        _in("noise_offset", self.noise_offset, 0, 1)
        _in("input_perturbation", self.input_perturbation, 0, 1)
        if not 0 <= self.pyramid_noise < 1:
            raise ValueError(f"pyramid_noise is {self.pyramid_noise}; give a discount of 0 or more and below 1")
        if self.min_snr_gamma is not None and not 0 < self.min_snr_gamma < math.inf:
            raise ValueError(f"min_snr_gamma is {self.min_snr_gamma}; give a number above 0, or null")
        if self.huber_c is not None and not 0 < self.huber_c < 1:
            raise ValueError(f"huber_c is {self.huber_c}; give a number between 0 and 1, or null for the squared error")
        if self.huber_c is None and self.huber_schedule != "constant":
            raise ValueError(
                f"huber_schedule is {self.huber_schedule!r}, but huber_c is null; set huber_c, usually 0.1"
            )
        if self.debiased_estimation and self.min_snr_gamma is not None:
            raise ValueError("debiased_estimation and min_snr_gamma both weigh by the SNR; keep one")
        if self.prediction is not None:
            self._check(self.prediction, self.zero_terminal_snr)

    def _check(self, prediction: Prediction, zero: bool) -> None:
        check_objective(prediction, zero, self.min_snr_gamma)
        if self.debiased_estimation:
            debiased_weight(torch.ones(1), prediction)
        if prediction == "flow" and self.huber_schedule == "snr":
            raise ValueError("huber_schedule 'snr' makes no sense with prediction 'flow'; use exponential or constant")

    def check_named(self, base: str) -> None:
        """Raise ValueError where the loss makes no sense for a base, of which no weight is read."""
        opened = Base.open(base)
        scheduler, family = opened.configs["scheduler"], opened.family
        kind = self.prediction or family.prediction(scheduler, base)
        self._check(kind, self.zero_terminal_snr or bool(scheduler.get("rescale_betas_zero_snr")))

    def prepare(self, model: Model) -> None:
        """Give a model the prediction and the schedule of this objective.

        Raises:
            ValueError: the loss makes no sense for it.
        """
        self._check(self.prediction or model.prediction, self.zero_terminal_snr or model.noise_schedule.ends_in_noise)
        if self.prediction:
            model.predict(self.prediction)
        if self.zero_terminal_snr:
            model.end_in_noise()

    def noise(self, shape: tuple[int, ...], random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The noise that the target knows, and the noise in x_t; both of `shape`."""
        device = random.device
        noise = (
            draw_pyramid(shape, self.pyramid_noise, random)
            if self.pyramid_noise
            else torch.randn(shape, generator=random, device=device)
        )
        if self.noise_offset:
            shift = torch.randn(*shape[:2], *[1] * (len(shape) - 2), generator=random, device=device)
            noise = offset_noise(noise, shift, self.noise_offset)
        if not self.input_perturbation:
            return noise, noise
        return noise, perturb(noise, torch.randn(shape, generator=random, device=device), self.input_perturbation)

    def weight(self, model: Model, a: Tensor, b: Tensor) -> Tensor | None:
        """Weight of each sample, (B,), by its a and b, or None where all count alike."""
        if self.min_snr_gamma is not None:
            return min_snr_weight(snr(a, b).flatten(), self.min_snr_gamma, model.prediction)
        return debiased_weight(snr(a, b).flatten(), model.prediction) if self.debiased_estimation else None

    def c(self, t: Tensor, a: Tensor, b: Tensor, steps: int) -> Tensor | None:
        """c of the pseudo-Huber error of each sample, (B,), or None for the squared error."""
        if self.huber_c is None:
            return None
        return scheduled_huber_c(t, a.flatten(), b.flatten(), self.huber_c, self.huber_schedule, steps)


def mask_of(batch: dict[str, Any], like: Tensor) -> Tensor | None:
    """The batch's masks at the size of the latents, (B, 1, H, W), where it has any."""
    if (mask := batch.get("mask")) is None:
        return None
    height, width = like.shape[-2:]
    return torch.nn.functional.adaptive_avg_pool2d(mask.to(like), (height, width))
