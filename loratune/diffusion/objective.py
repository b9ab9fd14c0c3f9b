"""What is minimised: the loss of a sample and its weight by noise level; and guidance, its use."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from loratune.diffusion.process import Prediction

DEBIASED_MOST = 1000.0  # the paper's clip of the SNR, without which the least noisy steps count for all or nothing

# Each is min(snr, gamma) over the factor by which a squared error in x_0 grows in what is predicted.
# eps is written as min(1, gamma / snr), whose value at snr = 0 is the limit 1; the quotient is nan there.
_MIN_SNR_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "eps": lambda snr, gamma: (gamma / snr).clamp(max=1),
    "v": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "x0": lambda snr, gamma: snr.clamp(max=gamma),
}


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weight that makes the squared error of a prediction min(snr, gamma) |x_0 error|^2.

    Hang 2023. eps: min(snr, gamma) / snr, v: min(snr, gamma) / (snr + 1), x0: min(snr, gamma);
    shaped as snr, which is in [0, inf]. On pure noise (snr = 0) it is 1 for eps and 0 for v and x0, so that
    with zero terminal SNR the last step is not trained at all.
    Raises ValueError for flow: its path does not keep a^2 + b^2 = 1, on which these weights rest.
    """
    if prediction not in _MIN_SNR_WEIGHTS:
        raise ValueError(
            f"min-SNR weights make no sense for prediction '{prediction}', only for one of "
            f"{list(_MIN_SNR_WEIGHTS)}; set min_snr_gamma to null"
        )
    return _MIN_SNR_WEIGHTS[prediction](snr, gamma)


# The same for sqrt(snr) |x_0 error|^2.
_DEBIASED_WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "eps": lambda snr: snr.clamp(max=DEBIASED_MOST).rsqrt(),
    "v": lambda snr: snr.sqrt() / (snr + 1),
    "x0": lambda snr: snr.clamp(max=DEBIASED_MOST).sqrt(),
}


def debiased_weight(snr: Tensor, prediction: Prediction) -> Tensor:
    """Weight that makes the squared error of a prediction sqrt(snr) |x_0 error|^2 (Yu 2024, who gives it for eps).

    eps: 1 / sqrt(snr), v: sqrt(snr) / (snr + 1), x0: sqrt(snr), with the snr of eps and x0 clipped at 1000 and the
    same error in x_0 weighed the same in each; shaped as snr.
    Raises ValueError for flow: its path does not keep a^2 + b^2 = 1.
    """
    if prediction not in _DEBIASED_WEIGHTS:
        raise ValueError(
            f"debiased_estimation makes no sense for prediction '{prediction}'; set debiased_estimation to false"
        )
    return _DEBIASED_WEIGHTS[prediction](snr)


def pseudo_huber(error: Tensor, c: Tensor | float) -> Tensor:
    """2 c (sqrt(e^2 + c^2) - c): e^2 for |e| much below c, 2 c |e| much above (Charbonnier 1994).

    Twice the usual form, so that small errors count as in the squared error. Shaped as `error`; c > 0.
    """
    # e^2 / (sqrt(e^2 + c^2) + c) is the same difference of two near numbers without the cancellation.
    return 2 * c * error.square() / ((error.square() + c**2).sqrt() + c)


def scheduled_huber_c(t: Tensor, a: Tensor, b: Tensor, least: float, schedule: str, steps: int) -> Tensor:
    """The c of each step t (Khrapov 2024): large where there is little noise, `least` where there is most.

    exponential: least^(t / T), from 1 down; snr: (1 - least) / (1 + b / a)^2 + least; constant: least.

    Args:
        t: steps from 0, (B,).
        a: weight of the image in x_t, (B,).
        b: weight of the noise, (B,).
        least: c at most noise, in (0, 1).
        schedule: constant, exponential or snr.
        steps: T.
    """
    if schedule == "exponential":
        return least ** ((t + 1) / steps)
    if schedule == "snr":
        return (1 - least) * (a / (a + b)).square() + least
    return torch.full_like(a, least)


def masked_mean(error: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each sample's error where the mask is, weighed by it: (B,) for (B, ...) and (B, 1, H, W) in [0, 1].

    An empty mask gives 0.
    """
    if mask is None:
        return error.flatten(1).mean(1)
    weight = mask.expand_as(error).flatten(1)
    return (weight * error.flatten(1)).sum(1) / weight.sum(1).clamp_min(1e-8)


def weighted_error(
    output: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    c: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """w |output - target|^2, averaged over all but the batch: (B,), for two (B, ...).

    Ho 2020, eq. 14 where there is nothing else.

    Args:
        output: of the network.
        target: of the same shape.
        weight: of each sample, (B,).
        c: of the pseudo-Huber error that takes the square's place, (B,).
        mask: where the error counts and how much, (B, 1, H, W) in [0, 1].

    Raises:
        ValueError: shapes differ; broadcasting would hide it.
    """
    if output.shape != target.shape:
        raise ValueError(f"output is {tuple(output.shape)}, its target {tuple(target.shape)}; make them alike")
    if weight is not None and weight.shape != output.shape[:1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; give one for each of {len(output)} samples")
    error = output - target
    error = error.square() if c is None else pseudo_huber(error, c.view(-1, *[1] * (error.dim() - 1)))
    loss = masked_mean(error, mask)
    return loss if weight is None else weight * loss


def check_objective(prediction: Prediction, zero_terminal_snr: bool, min_snr_gamma: float | None) -> None:
    """Raise ValueError, in one sentence, for settings that make no sense together.

    Args:
        prediction: what the network predicts.
        zero_terminal_snr: whether the last step is pure noise, abar_T = 0.
        min_snr_gamma: clip of the min-SNR weight, finite and above 0, or None for no weight.
    """
    if prediction == "eps" and zero_terminal_snr:
        raise ValueError(
            "prediction 'eps' learns nothing where zero_terminal_snr makes the last step pure noise; "
            "set prediction to 'v' or zero_terminal_snr to false"
        )
    if min_snr_gamma is None:
        return
    if not (math.isfinite(min_snr_gamma) and min_snr_gamma > 0):
        raise ValueError(f"min_snr_gamma is {min_snr_gamma}; set it to a number above 0 (usual: 5) or null")
    if prediction == "flow":
        raise ValueError(
            "min_snr_gamma makes no sense with prediction 'flow', whose path does not keep a^2 + b^2 = 1; "
            "set min_snr_gamma to null"
        )


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance u + s (c - u), in any prediction; shaped as c and u, which are alike.

    Ho & Salimans 2022, eq. 6, whose w is s - 1: s = 0 ignores the condition, 1 does not guide, SD uses 7.5.
    """
    return unconditional + scale * (conditional - unconditional)


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in dB; x, y in [-1, 1], (B, C, H, W) -> (B,)."""
    mse = (x.clamp(-1, 1) - y.clamp(-1, 1)).square().flatten(1).mean(1)
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))
