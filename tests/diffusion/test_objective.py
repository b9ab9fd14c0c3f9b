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
    loss = objective.weighted_error(output, process.target(prediction, x0, noise, a, b), weight)
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
    loss = objective.weighted_error(output, wanted, None)
    alone = torch.stack([torch.nn.functional.mse_loss(o, w) for o, w in zip(output, wanted, strict=True)])
    torch.testing.assert_close(loss, alone, rtol=1e-14, atol=0.0)
    weight = torch.tensor([0.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    weighted = objective.weighted_error(output, wanted, weight)
    torch.testing.assert_close(weighted, weight * alone, rtol=1e-14, atol=0.0)


def test_loss_does_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 1\)"):
        objective.weighted_error(torch.zeros(2, 3), torch.zeros(2, 1), None)
    with pytest.raises(ValueError, match=r"weight is \(2, 1\).*2 samples"):
        objective.weighted_error(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 1))


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


@pytest.mark.parametrize("prediction", WEIGHTED)
def test_the_debiased_loss_is_the_same_in_every_prediction(prediction: Prediction) -> None:
    """sqrt(snr) |x_0 error|^2, whatever the network predicts, below the clip."""
    x0, noise, output = normal(200, 3), normal(200, 3, seed=1), normal(200, 3, seed=2)
    a = torch.linspace(0.05, 0.99, 200, dtype=torch.float64).view(-1, 1)
    b = (1 - a**2).sqrt()
    snr = process.snr(a, b).flatten()
    assert snr.max() < 1000
    guessed, _ = process.recover(prediction, output, process.diffuse(x0, noise, a, b), a, b)
    weight = objective.debiased_weight(snr, prediction)
    loss = objective.weighted_error(output, process.target(prediction, x0, noise, a, b), weight)
    torch.testing.assert_close(loss, snr.sqrt() * ((guessed - x0) ** 2).mean(1), rtol=1e-9, atol=0.0)


def test_debiased_weights_are_finite_at_both_ends_but_for_eps_on_pure_noise() -> None:
    ends = torch.tensor([1e-9, 1e12], dtype=torch.float64)
    assert objective.debiased_weight(ends, "eps").tolist() == pytest.approx([10**4.5, 1000**-0.5])
    assert objective.debiased_weight(torch.zeros(1), "v").item() == 0
    with pytest.raises(ValueError, match="set debiased_estimation to false"):
        objective.debiased_weight(ends, "flow")


def test_pseudo_huber_is_square_near_zero_and_linear_far_off() -> None:
    error = torch.tensor([1e-6, -1e-6, 0.3, 1e6], dtype=torch.float64)
    made = objective.pseudo_huber(error, 0.1)
    wanted = 2 * 0.1 * ((error**2 + 0.1**2).sqrt() - 0.1)
    torch.testing.assert_close(made[2:], wanted[2:], rtol=1e-12, atol=0.0)
    torch.testing.assert_close(made[:2], error[:2] ** 2, rtol=1e-6, atol=0.0)
    assert made[3].item() == pytest.approx(2 * 0.1 * 1e6, rel=1e-6)
    assert objective.pseudo_huber(error.float(), 0.1)[0] > 0  # the textbook form would give 0 in float32
    torch.testing.assert_close(objective.pseudo_huber(error[:3], 1e6), error[:3] ** 2, rtol=1e-9, atol=0.0)


def test_hubers_c_falls_with_noise_to_its_least() -> None:
    abar = process.alpha_bars(process.scaled_linear_betas(1000))
    a, b = process.ddpm_coefficients(abar)
    t = torch.arange(1000)
    for schedule in ("exponential", "snr"):
        c = objective.scheduled_huber_c(t, a, b, 0.1, schedule, 1000)
        assert (c.diff() < 0).all()
        assert 0.9 < c[0] < 1
    assert objective.scheduled_huber_c(t, a, b, 0.1, "exponential", 1000)[-1].item() == pytest.approx(0.1)
    sigma = b / a
    torch.testing.assert_close(objective.scheduled_huber_c(t, a, b, 0.1, "snr", 1000), 0.9 / (1 + sigma) ** 2 + 0.1)
    assert objective.scheduled_huber_c(t, a, b, 0.1, "constant", 1000).unique().tolist() == pytest.approx([0.1])


def test_a_mask_leaves_only_what_it_shows() -> None:
    output, wanted = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    mask = torch.zeros(2, 1, 4, 4, dtype=torch.float64)
    mask[0, :, :2] = 1
    mask[1] = 0.5
    found = objective.weighted_error(output, wanted, mask=mask)
    squares = (output - wanted) ** 2
    torch.testing.assert_close(found, torch.stack([squares[0, :, :2].mean(), squares[1].mean()]))
    assert objective.weighted_error(output, wanted, mask=0 * mask).tolist() == [0, 0]


def test_guidance_is_eq_6_of_ho_and_salimans() -> None:
    c, u, w = normal(2, 3), normal(2, 3, seed=1), 6.5
    torch.testing.assert_close(objective.guide(c, u, 1 + w), (1 + w) * c - w * u, rtol=0.0, atol=1e-12)
    assert torch.equal(objective.guide(c, u, 0.0), u)
    torch.testing.assert_close(objective.guide(c, u, 1.0), c, rtol=0.0, atol=1e-14)
