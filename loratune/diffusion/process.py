"""The diffusion process: schedules, x_t = a x_0 + b e, what networks predict of it, and the way back.

Step t of the papers, counted 1..T, is index t - 1 here, as in diffusers. x, x_0 and noise have any one shape
(B, ...). A coefficient (a, b, beta, abar) is a tensor that broadcasts with x: 0-dimensional for one step of
a loop, or one value per sample through `expand`. Nothing mutates its input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor

ScheduleName = Literal["linear", "scaled_linear", "cosine"]
Prediction = Literal["eps", "v", "x0", "flow"]
Variance = Literal["beta", "beta_tilde"]


def linear_betas(steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """beta_t from `start` to `end` in equal steps (Ho 2020, section 4): float64, (steps,).

    Raises ValueError unless steps >= 1 and 0 < start <= end < 1.
    """
    _check_schedule(steps, start, end)
    return torch.linspace(start, end, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int, start: float = 0.00085, end: float = 0.012) -> Tensor:
    """beta_t whose square root goes in equal steps (Rombach 2022, in the code of SD): float64, (steps,).

    Raises ValueError unless steps >= 1 and 0 < start <= end < 1.
    """
    _check_schedule(steps, start, end)
    return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2


def cosine_betas(steps: int, offset: float = 0.008, largest: float = 0.999) -> Tensor:
    """beta_t of abar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + offset) / (1 + offset)): float64, (steps,).

    Nichol & Dhariwal 2021, eq. 17; betas above `largest` in (0, 1) are cut to it, since f(T) = 0.
    Raises ValueError unless steps >= 1.
    """
    _check_schedule(steps)
    t = torch.arange(steps + 1, dtype=torch.float64) / steps
    f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=largest)


def _check_schedule(steps: int, start: float = 0.5, end: float = 0.5) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; a noise schedule needs at least 1")
    if not 0 < start <= end < 1:
        raise ValueError(f"beta start, end are {start}, {end}; give 0 < start <= end < 1")


_SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "linear": linear_betas,
    "scaled_linear": scaled_linear_betas,
    "cosine": lambda steps, start, end: cosine_betas(steps),
}


def make_betas(name: ScheduleName, steps: int, start: float, end: float) -> Tensor:
    """The schedule of that name: float64, (steps,). `cosine` has no use for `start` and `end`.

    Raises ValueError for an unknown name, and as the schedule itself does.
    """
    if name not in _SCHEDULES:
        raise ValueError(f"'{name}' is not a noise schedule; choose one of {list(_SCHEDULES)}")
    return _SCHEDULES[name](steps, start, end)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """betas (T,) in (0, 1] shifted and scaled so that abar_T = 0 exactly and abar_1 stays: (T,), same dtype.

    Lin 2024, algorithm 1. Raises ValueError for fewer than two steps, where both cannot hold.
    """
    if len(betas) < 2:
        raise ValueError(f"{len(betas)} step cannot be rescaled to zero terminal SNR; give 2 or more")
    root = alpha_bars(betas).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    rescaled = root**2
    return 1 - torch.cat([rescaled[:1], rescaled[1:] / rescaled[:-1]])


def alpha_bars(betas: Tensor) -> Tensor:
    """abar_t = prod_{i <= t} (1 - beta_i) (Ho 2020, above eq. 4), (T,) in [0, 1], of betas (T,) in [0, 1]."""
    return torch.cumprod(1 - betas, dim=0)


def expand(v: Tensor, like: Tensor) -> Tensor:
    """One value per sample (B,) shaped (B, 1, 1, ...), to broadcast with `like` (B, ...)."""
    return v.view(len(v), *[1] * (like.ndim - 1))


def markov_step(x_prev: Tensor, beta: Tensor, noise: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta I) (Ho 2020, eq. 2), for beta in [0, 1]."""
    return (1 - beta).sqrt() * x_prev + beta.sqrt() * noise


def diffuse(x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x_t = a x_0 + b e: t Markov steps in one (Ho 2020, eq. 4), and any other path from x_0 to noise."""
    return a * x0 + b * noise


def ddpm_coefficients(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) = (sqrt(abar), sqrt(1 - abar)) (Ho 2020, eq. 4), for abar in [0, 1]; same shape."""
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def flow_coefficients(t: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) = (1 - t, t): the straight path from data at t = 0 to noise at t = 1 (Liu 2023, Esser 2024)."""
    return 1 - t, t


_MIXES: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "eps": lambda a, b: (torch.zeros_like(a), torch.ones_like(a)),
    "v": lambda a, b: (-b, a),
    "x0": lambda a, b: (torch.ones_like(a), torch.zeros_like(a)),
    "flow": lambda a, b: (-torch.ones_like(a), torch.ones_like(a)),
}


def mix(prediction: Prediction, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(c_x, c_e), shaped as a and b: the network predicts c_x x_0 + c_e e.

    eps: Ho 2020, eq. 14; v: Salimans & Ho 2022, section 4; flow: dx_t/dt of the straight path,
    Liu 2023, eq. 1. Raises ValueError for an unknown prediction.
    """
    if prediction not in _MIXES:
        raise ValueError(f"'{prediction}' is not a prediction; choose one of {list(_MIXES)}")
    return _MIXES[prediction](a, b)


def target(prediction: Prediction, x0: Tensor, noise: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What the network is trained to answer, c_x x_0 + c_e e, shaped as x_0. Errors as `mix`."""
    c_x, c_e = mix(prediction, a, b)
    return c_x * x0 + c_e * noise


def recover(prediction: Prediction, output: Tensor, x_t: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(x_0, e) from the network's output: the inverse of x_t = a x_0 + b e, output = c_x x_0 + c_e e.

    Its determinant a c_e - b c_x is a for eps, a^2 + b^2 for v, -b for x0 and a + b for flow. Raises
    ValueError where any is 0, as for eps on pure noise (a = 0), whose x_0 could be anything (Lin 2024,
    section 3.3). Errors also as `mix`. Looking at the values makes a GPU wait: keep it out of training.
    """
    c_x, c_e = mix(prediction, a, b)
    determinant = a * c_e - b * c_x
    if bool((determinant == 0).any()):
        raise ValueError(
            f"prediction '{prediction}' leaves x_0 or the noise open where a = 0 (pure noise) or b = 0 (no "
            "noise), as in this batch; use prediction 'v', or steps without that end of the path"
        )
    return (c_e * x_t - b * output) / determinant, (a * output - c_x * x_t) / determinant


def step_variance(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """beta_t = 1 - abar_t / abar_{t-1} in [0, 1], for any two points of the path with abar_{t-1} > 0."""
    return 1 - alpha_bar / alpha_bar_prev


def posterior_mean(x0: Tensor, x_t: Tensor, alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """Mean of q(x_{t-1} | x_t, x_0) (Ho 2020, eq. 7), shaped as x_t; abar_t < 1, and abar_0 = 1."""
    beta = step_variance(alpha_bar, alpha_bar_prev)
    from_start = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    from_here = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return from_start * x0 + from_here * x_t


def posterior_variance(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> Tensor:
    """beta-tilde_t, the variance of q(x_{t-1} | x_t, x_0) (Ho 2020, eq. 7), in [0, beta_t]; abar_t < 1."""
    return (1 - alpha_bar_prev) / (1 - alpha_bar) * step_variance(alpha_bar, alpha_bar_prev)


_VARIANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "beta": step_variance,
    "beta_tilde": posterior_variance,
}


def ddpm_step(
    x_t: Tensor,
    noise_prediction: Tensor,
    z: Tensor,
    alpha_bar: Tensor,
    alpha_bar_prev: Tensor,
    variance: Variance,
) -> Tensor:
    """x_{t-1} = (x_t - beta_t / sqrt(1 - abar_t) eps) / sqrt(alpha_t) + sigma_t z.

    Ho 2020, algorithm 2, line 4, with alpha_t = abar_t / abar_{t-1} and beta_t = 1 - alpha_t.
    sigma_t^2 is beta_t or beta-tilde_t, and 0 in the last step, where abar_{t-1} = 1 (line 3: z = 0). The
    three x are alike; abar_t in (0, 1): at 0 the noise tells nothing of x_0, and the result is not finite.
    """
    beta = step_variance(alpha_bar, alpha_bar_prev)
    mean = (x_t - beta / (1 - alpha_bar).sqrt() * noise_prediction) / (1 - beta).sqrt()
    sigma = _VARIANCES[variance](alpha_bar, alpha_bar_prev).sqrt()
    return mean + torch.where(alpha_bar_prev == 1, 0, sigma) * z


def ddim_step(x0: Tensor, noise: Tensor, a_next: Tensor, b_next: Tensor) -> Tensor:
    """The same two ends, the next point of the path (Song 2021, eq. 12 with sigma = 0); shaped as x_0.

    On the straight path this is Euler's step x_t + (s - t) (e - x_0).
    """
    return diffuse(x0, noise, a_next, b_next)


def ddpm_sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,  # noqa: N803 (the paper's name)
    betas: Tensor,
    noises: Iterable[Tensor],
    variance: Variance,
) -> Tensor:
    """x_0 from x_T ~ N(0, I) (B, ...): Ho 2020, algorithm 2, all T steps; shape and dtype of x_T.

    Args:
        denoise: (x_t, t (B,) long, from T - 1 to 0) -> the predicted noise, shaped as x_t.
        x_T: where to start.
        betas: (T,) in (0, 1).
        noises: the z ~ N(0, I) of line 3, shaped as x_T: one for each step but the last; more are not read.
        variance: sigma_t^2, best as beta for x_0 ~ N(0, I) and as beta_tilde for a single x_0.

    Raises ValueError if abar_T = 0, from where predicted noise does not lead back, or if noises run out.
    """
    abar = alpha_bars(betas)
    if abar[-1] == 0:
        raise ValueError("algorithm 2 cannot start at zero terminal SNR; use betas whose abar_T is above 0")
    x, z_of_step = x_T, iter(noises)
    for t in reversed(range(len(betas))):
        z = next(z_of_step, None) if t > 0 else torch.zeros_like(x)
        if z is None:
            raise ValueError(f"noises ran out at t = {t}; {len(betas)} steps need {len(betas) - 1} of them")
        alpha_bar_prev = abar[t - 1] if t > 0 else torch.ones_like(abar[0])
        predicted = denoise(x, torch.full((len(x),), t, dtype=torch.long, device=x.device))
        x = ddpm_step(x, predicted, z, abar[t], alpha_bar_prev, variance)
    return x


def snr(a: Tensor, b: Tensor) -> Tensor:
    """Signal-to-noise ratio a^2 / b^2 in [0, inf] (Kingma 2021, eq. 2), inf at b = 0; same shape."""
    return a**2 / b**2
