"""The noise schedule: where on its path from image to noise a model is at each of its T steps."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratune.diffusion.process import (
    alpha_bars,
    ddpm_coefficients,
    expand,
    flow_coefficients,
    rescale_zero_terminal_snr,
)


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """x_t = a x_0 + b e at steps t = 0..T-1, from little noise to much.

    Args:
        a: share of the image, float64, (T,).
        b: share of the noise, float64, (T,).
        times: what diffusers' scheduler of such a model calls the steps: their index, or 1000 sigma; (T,).
    """

    a: Tensor
    b: Tensor
    times: Tensor
    _there: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def ddpm(cls, betas: Tensor) -> NoiseSchedule:
        """Of betas (T,) in float64 (Ho 2020, eq. 4); a step's time is its index."""
        return cls(*ddpm_coefficients(alpha_bars(betas)), torch.arange(len(betas)))

    @classmethod
    def flow(cls, steps: int = 1000) -> NoiseSchedule:
        """The straight path at sigma = 1/T, 2/T, ..., 1; a step's time is 1000 sigma."""
        sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        return cls(*flow_coefficients(sigma), (1000 * sigma).float())

    def __len__(self) -> int:
        """T."""
        return len(self.a)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) at steps t (B,), in the dtype and on the device of `like`, shaped to multiply it."""
        a, b = (values[t].to(like.dtype) for values in self._on(t.device)[:2])
        return expand(a, like), expand(b, like)

    def time(self, t: Tensor) -> Tensor:
        """What a network is called with at steps t (B,)."""
        return self._on(t.device)[2][t]

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._there:
            self._there[device] = (self.a.to(device), self.b.to(device), self.times.to(device))
        return self._there[device]

    @property
    def ends_in_noise(self) -> bool:
        """Whether the last step is pure noise."""
        return float(self.a[-1]) == 0

    def ending_in_noise(self) -> NoiseSchedule:
        """Rescaled so that the last step is pure noise (Lin 2024); itself where it is so already."""
        if self.ends_in_noise:
            return self
        bars = self.a.square()
        before = torch.cat([torch.ones_like(bars[:1]), bars[:-1]])
        return self.ddpm(rescale_zero_terminal_snr(1 - bars / before))
