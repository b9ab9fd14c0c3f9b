"""What is minimised: the loss of a sample and its weight by noise level; and guidance, its use."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from loratune.diffusion.process import Prediction

# Each is min(snr, gamma) over the factor by which a squared error in x_0 grows in what is predicted.
# eps is written as min(1, gamma / snr), whose value at snr = 0 is the limit 1; the quotient is nan there.
_MIN_SNR_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "eps": lambda snr, gamma: (gamma / snr).clamp(max=1),
    "v": lambda snr, gamma: snr.clamp(max=gamma) / (snr + 1),
    "x0": lambda snr, gamma: snr.clamp(max=gamma),
}


def min_snr_weight(snr: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Weight that makes the squared error of a prediction min(snr, gamma) |x_0 error|^2.

    Hang 2023, section 3.4. eps: min(snr, gamma) / snr, v: min(snr, gamma) / (snr + 1), x0: min(snr, gamma);
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


def weighted_squared_error(output: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """w |output - target|^2, averaged over all but the batch: (B,), for two (B, ...) and weights (B,).

    Ho 2020, eq. 14 where weight is None. Raises ValueError where shapes differ: broadcasting would hide it.
    """
    if output.shape != target.shape:
        raise ValueError(f"output is {tuple(output.shape)}, its target {tuple(target.shape)}; make them alike")
    if weight is not None and weight.shape != output.shape[:1]:
        raise ValueError(f"weight is {tuple(weight.shape)}; give one for each of {len(output)} samples")
    loss = ((output - target) ** 2).flatten(1).mean(1)
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
