"""The objective against its definitions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.diffusion import objective, process
from loratune.diffusion.process import Prediction

WEIGHTED: tuple[Prediction, ...] = ("eps", "v", "x0")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
@pytest.mark.parametrize("prediction", WEIGHTED)
def test_min_snr_loss_is_the_same_in_every_prediction(prediction: Prediction, gamma: float) -> None:
    """Hang 2023: min(snr, gamma) |x_0 error|^2, whatever the network predicts."""
    x0, noise, output = normal(1000, 3), normal(1000, 3, seed=1), normal(1000, 3, seed=2)
    abar = process.alpha_bars(process.linear_betas(1000))
    a, b = process.ddpm_coefficients(process.expand(abar, x0))
    snr = process.snr(a, b).flatten()
    assert snr.min() < gamma < snr.max()
    guessed, _ = process.recover(prediction, output, process.diffuse(x0, noise, a, b), a, b)
    expected = torch.minimum(snr, torch.tensor(gamma)) * ((guessed - x0) ** 2).mean(1)
    weight = objective.min_snr_weight(snr, gamma, prediction)
    loss = objective.weighted_squared_error(output, process.target(prediction, x0, noise, a, b), weight)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0.0)


@pytest.mark.parametrize(
    ("prediction", "at_zero", "at_three", "at_nine", "at_infinity"),
    [("eps", 1.0, 1.0, 5 / 9, 0.0), ("v", 0.0, 3 / 4, 5 / 10, 0.0), ("x0", 0.0, 3.0, 5.0, 5.0)],
)
def test_min_snr_weight_is_its_formula_and_limits(
    prediction: Prediction, at_zero: float, at_three: float, at_nine: float, at_infinity: float
) -> None:
    snr = torch.tensor([0.0, 3.0, 9.0, math.inf], dtype=torch.float64)
    weight = objective.min_snr_weight(snr, 5.0, prediction)
    assert weight.tolist() == pytest.approx([at_zero, at_three, at_nine, at_infinity], abs=1e-15)


def test_min_snr_weight_makes_no_sense_for_flow() -> None:
    with pytest.raises(ValueError, match=r"'flow'.*set min_snr_gamma to null"):
        objective.min_snr_weight(torch.ones(1), 5.0, "flow")


def test_loss_is_the_mean_square_of_each_sample() -> None:
    output, wanted = normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    loss = objective.weighted_squared_error(output, wanted, None)
    alone = torch.stack([torch.nn.functional.mse_loss(o, w) for o, w in zip(output, wanted, strict=True)])
    torch.testing.assert_close(loss, alone, rtol=1e-14, atol=0.0)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    weighted = objective.weighted_squared_error(output, wanted, weight)
    torch.testing.assert_close(weighted, weight * alone, rtol=1e-14, atol=0.0)


def test_loss_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        objective.weighted_squared_error(torch.zeros(2, 3), torch.zeros(2, 1), None)
    with pytest.raises(ValueError, match=r"weight is \(2, 1\).*2 samples"):
        objective.weighted_squared_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1))


@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0", "flow"])
def test_exactly_the_pairs_that_make_no_sense_are_refused(
    prediction: Prediction, zero_terminal_snr: bool, gamma: float | None
) -> None:
    said = None
    if prediction == "eps" and zero_terminal_snr:
        said = r"prediction 'eps'.*set prediction to 'v' or zero_terminal_snr to false"
    elif prediction == "flow" and gamma:
        said = r"prediction 'flow'.*set min_snr_gamma to null"
    if said is None:
        objective.check_objective(prediction, zero_terminal_snr, gamma)
    else:
        with pytest.raises(ValueError, match=said):
            objective.check_objective(prediction, zero_terminal_snr, gamma)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_a_gamma_that_clips_nothing_sensible_is_refused(gamma: Any) -> None:
    with pytest.raises(ValueError, match=f"min_snr_gamma is {gamma}"):
        objective.check_objective("v", False, gamma)


def test_guidance_is_eq_6_of_ho_and_salimans() -> None:
    c, u, w = normal(2, 3), normal(2, 3, seed=1), 6.5
    torch.testing.assert_close(objective.guide(c, u, 1 + w), (1 + w) * c - w * u, rtol=0.0, atol=1e-12)
    assert torch.equal(objective.guide(c, u, 0.0), u)
    torch.testing.assert_close(objective.guide(c, u, 1.0), c, rtol=0.0, atol=1e-14)
