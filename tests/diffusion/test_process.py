"""The process against its identities, and against diffusers' schedulers, whose tables are made float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import rescale_zero_terminal_snr as diffusers_rescale
from diffusers.training_utils import compute_snr as diffusers_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.diffusion import process
from loratune.diffusion.process import Prediction, ScheduleName, Variance

# diffusers has no type hints for a checker to read.
DDPM: Any = DDPMScheduler
DDIM: Any = DDIMScheduler
Flow: Any = FlowMatchEulerDiscreteScheduler
compute_snr: Any = diffusers_snr

STEPS = 1000
SCHEDULES: dict[ScheduleName, tuple[Tensor, str, float, float]] = {
    "linear": (process.linear_betas(STEPS), "linear", 1e-4, 0.02),
    "scaled_linear": (process.scaled_linear_betas(STEPS), "scaled_linear", 0.00085, 0.012),
    "cosine": (process.cosine_betas(STEPS), "squaredcos_cap_v2", 1e-4, 0.02),
}
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
DIFFUSERS_PREDICTION: dict[Prediction, str] = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
DIFFUSERS_VARIANCE: dict[Variance, str] = {"beta": "fixed_large", "beta_tilde": "fixed_small"}

every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_variance = pytest.mark.parametrize("variance", DIFFUSERS_VARIANCE)


def close(actual: Tensor, expected: Tensor, rtol: float = 0.0, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler(kind: Any, betas: Tensor, **config: Any) -> Any:
    """A diffusers scheduler computing in float64: it keeps its own tables in float32."""
    made = kind(num_train_timesteps=len(betas), clip_sample=False, **config)
    made.betas, made.alphas = betas, 1 - betas
    made.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    made.one = made.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
    return made


def at(betas: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """(abar_t, abar_{t-1}) for t = 0..T-1."""
    abar = process.alpha_bars(betas)
    return abar[t], abar[t - 1] if t > 0 else torch.ones_like(abar[0])


# Schedules


def formula(name: ScheduleName, steps: int, start: float, end: float) -> list[float]:
    """The betas in Python's own floats, one by one."""

    def along(first: float, last: float, t: int) -> float:
        return first + (last - first) * t / (steps - 1)

    def f(t: float) -> float:
        return math.cos(math.pi / 2 * (t / steps + 0.008) / 1.008) ** 2

    return {
        "linear": lambda: [along(start, end, t) for t in range(steps)],
        "scaled_linear": lambda: [along(start**0.5, end**0.5, t) ** 2 for t in range(steps)],
        "cosine": lambda: [min(1 - f(t + 1) / f(t), 0.999) for t in range(steps)],
    }[name]()


@pytest.mark.parametrize("steps", [2, 50, STEPS])
@every_schedule
def test_schedule_is_its_formula(name: ScheduleName, steps: int) -> None:
    _, _, start, end = SCHEDULES[name]
    expected = torch.tensor(formula(name, steps, start, end), dtype=torch.float64)
    # f is nearly 0 at the end of the cosine, where one rounding of pi / 2 is 1e-13 of it.
    close(process.make_betas(name, steps, start, end), expected, rtol=0.0, atol=1e-12)


@every_schedule
def test_schedule_is_that_of_diffusers(name: ScheduleName) -> None:
    ours, theirs, start, end = SCHEDULES[name]
    made = DDPM(STEPS, beta_start=start, beta_end=end, beta_schedule=theirs)
    # diffusers computes these tables in float32, so a few units of its last place (6e-8) are theirs.
    close(ours.float(), made.betas, rtol=3e-7, atol=0.0)
    # T roundings of alpha = 1 - beta, each up to 6e-8 of alpha, are multiplied into their abar.
    close(process.alpha_bars(ours).float(), made.alphas_cumprod, rtol=STEPS * 6e-8, atol=0.0)


def test_cosine_alpha_bars_are_eq_17_until_the_cut() -> None:
    betas, t = process.cosine_betas(STEPS), torch.arange(1, STEPS + 1, dtype=torch.float64)
    angle = (t / STEPS + 0.008) / 1.008 * math.pi / 2
    expected = angle.cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    uncut = betas < 0.999
    assert uncut.sum() >= STEPS - 2
    close(process.alpha_bars(betas)[uncut], expected[uncut], rtol=1e-10, atol=0.0)


def test_defaults_are_those_of_the_papers() -> None:
    close(process.linear_betas(STEPS)[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))
    close(process.scaled_linear_betas(STEPS)[[0, -1]], torch.tensor([0.00085, 0.012], dtype=torch.float64))


def test_cosine_has_no_use_for_start_and_end() -> None:
    assert torch.equal(process.make_betas("cosine", 10, -1.0, 7.0), process.cosine_betas(10))


@pytest.mark.parametrize(
    ("name", "steps", "start", "end", "said"),
    [
        ("sigmoid", 10, 1e-4, 0.02, r"'sigmoid'.*linear.*scaled_linear.*cosine"),
        ("linear", 0, 1e-4, 0.02, "steps is 0"),
        ("cosine", 0, 1e-4, 0.02, "steps is 0"),
        ("linear", 10, 0.0, 0.02, "0.0, 0.02"),
        ("scaled_linear", 10, -0.1, 0.02, "-0.1, 0.02"),
        ("scaled_linear", 10, 1e-4, 1.0, "0.0001, 1.0"),
        ("linear", 10, 0.02, 1e-4, "0.02, 0.0001"),
    ],
)
def test_a_wrong_schedule_is_refused(name: Any, steps: int, start: float, end: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        process.make_betas(name, steps, start, end)


@every_schedule
def test_rescaling_is_algorithm_1_of_lin(name: ScheduleName) -> None:
    betas = SCHEDULES[name][0]
    before = betas.clone()
    rescaled = process.rescale_zero_terminal_snr(betas)
    assert torch.equal(betas, before)
    abar, old = process.alpha_bars(rescaled), process.alpha_bars(betas)
    assert abar[-1] == 0
    # sqrt(abar) must be the one affine image of the old that keeps the first value and ends in 0.
    first, last = old[0].sqrt(), old[-1].sqrt()
    close(abar.sqrt(), first * (old.sqrt() - last) / (first - last))
    # diffusers' function keeps the dtype it is given, so this one compares in float64.
    close(rescaled, diffusers_rescale(betas.clone()))
    close(process.alpha_bars(process.rescale_zero_terminal_snr(rescaled)), abar)


@every_schedule
def test_rescaling_is_that_of_the_scheduler(name: ScheduleName) -> None:
    betas, theirs, start, end = SCHEDULES[name]
    made = DDPM(STEPS, start, end, theirs, rescale_betas_zero_snr=True)
    # Their float32 products carry T roundings of 6e-8 at most.
    ours = process.alpha_bars(process.rescale_zero_terminal_snr(betas))
    close(ours.float(), made.alphas_cumprod, rtol=0.0, atol=STEPS * 6e-8)


def test_one_step_cannot_be_rescaled() -> None:
    with pytest.raises(ValueError, match="1 step"):
        process.rescale_zero_terminal_snr(process.linear_betas(1))


# From data to noise


def test_expand_gives_one_value_to_each_sample() -> None:
    v = torch.tensor([1.0, 2.0])
    assert process.expand(v, torch.zeros(2, 3, 4, 5)).shape == (2, 1, 1, 1)
    assert process.expand(v, torch.zeros(2)).shape == (2,)
    assert torch.equal((process.expand(v, torch.zeros(2, 3)) * torch.ones(2, 3))[:, 0], v)


@pytest.mark.parametrize("t", [0, 1, 499, 999])
@every_schedule
def test_closed_form_is_all_markov_steps_together(name: ScheduleName, t: int) -> None:
    betas = SCHEDULES[name][0]
    # With x_0 and each noise a basis vector of its own, x_t is the list of its coefficients.
    basis = torch.eye(t + 2, dtype=torch.float64)
    x = basis[0]
    for i in range(t + 1):
        x = process.markov_step(x, betas[i], basis[i + 1])
    a, b = process.ddpm_coefficients(process.alpha_bars(betas)[t])
    close(x[0], a)
    close(x[1:].square().sum(), b**2)


def test_closed_form_is_the_distribution_of_sampled_markov_steps() -> None:
    betas, x0, count = process.linear_betas(20, 0.01, 0.3), 1.7, 100_000
    x = torch.full((count,), x0, dtype=torch.float64)
    for i, beta in enumerate(betas):
        x = process.markov_step(x, beta, normal(count, seed=i))
    a, b = (float(value) for value in process.ddpm_coefficients(process.alpha_bars(betas)[-1]))
    # Five standard errors: b / sqrt(n) of the mean and b^2 sqrt(2 / n) of the variance of n normal draws.
    assert abs(float(x.mean()) - a * x0) < 5 * b / math.sqrt(count)
    assert abs(float(x.var()) - b**2) < 5 * b**2 * math.sqrt(2 / count)


@every_schedule
def test_diffuse_is_add_noise_and_v_is_get_velocity(name: ScheduleName) -> None:
    betas, t = SCHEDULES[name][0], torch.tensor([0, 1, 500, 999])
    made, x0, noise = scheduler(DDPM, betas), normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)
    a, b = process.ddpm_coefficients(process.expand(process.alpha_bars(betas)[t], x0))
    close(process.diffuse(x0, noise, a, b), made.add_noise(x0, noise, t))
    close(process.target("v", x0, noise, a, b), made.get_velocity(x0, noise, t))


def test_flow_path_is_scale_noise() -> None:
    made, index = Flow(), torch.tensor([0, 300, 999])
    made.sigmas = made.sigmas.double()
    x0, noise = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1)
    a, b = process.flow_coefficients(process.expand(made.sigmas[index], x0))
    close(process.diffuse(x0, noise, a, b), made.scale_noise(x0, made.timesteps[index], noise))


@every_schedule
def test_snr_is_that_of_diffusers(name: ScheduleName) -> None:
    betas, t = SCHEDULES[name][0], torch.arange(STEPS)
    abar = process.alpha_bars(betas)
    ours = process.snr(*process.ddpm_coefficients(abar))
    close(ours, abar / (1 - abar), rtol=1e-10, atol=0.0)
    # compute_snr rounds a and b to float32 whatever it is given: 6e-8 each, doubled by the square.
    close(ours.float(), compute_snr(scheduler(DDPM, betas), t), rtol=5e-7, atol=0.0)


def test_snr_has_its_limits() -> None:
    ends = process.snr(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0]))
    assert ends.tolist() == [0, math.inf]


# What networks predict


def test_targets_are_what_their_names_say() -> None:
    x0, noise, (a, b) = normal(2, 3), normal(2, 3, seed=1), torch.tensor([0.6, 0.8], dtype=torch.float64)
    assert torch.equal(process.target("eps", x0, noise, a, b), noise)
    assert torch.equal(process.target("x0", x0, noise, a, b), x0)
    assert torch.equal(process.target("flow", x0, noise, a, b), noise - x0)
    close(process.target("v", x0, noise, a, b), a * noise - b * x0)


def test_v_and_flow_are_the_velocities_of_their_paths() -> None:
    x0, noise, t = normal(5), normal(5, seed=1), torch.tensor(0.7, dtype=torch.float64)
    t.requires_grad_()
    circle = t.cos(), t.sin()
    paths: dict[Prediction, tuple[Tensor, Tensor]] = {"v": circle, "flow": process.flow_coefficients(t)}
    for prediction, (a, b) in paths.items():
        (da,), (db,) = torch.autograd.grad(a, t, retain_graph=True), torch.autograd.grad(b, t)
        close(process.target(prediction, x0, noise, a, b), process.diffuse(x0, noise, da, db))


vectors = st.lists(st.floats(-100, 100), min_size=4, max_size=4).map(torch.tensor).map(Tensor.double)


# The noisiest step of SD has a = 0.068. Here a, b >= 0.001 divide some roundings of 100 (7e-15 each).
@settings(deadline=None)
@given(st.sampled_from(PREDICTIONS), st.booleans(), vectors, vectors, st.floats(0.001, 0.999))
def test_recover_undoes_target(kind: Prediction, straight: bool, x0: Tensor, noise: Tensor, s: float) -> None:
    t = torch.tensor(s, dtype=torch.float64)
    circle = (t * math.pi / 2).cos(), (t * math.pi / 2).sin()
    a, b = process.flow_coefficients(t) if straight else circle
    output = process.target(kind, x0, noise, a, b)
    found = process.recover(kind, output, process.diffuse(x0, noise, a, b), a, b)
    close(found[0], x0)
    close(found[1], noise)


@pytest.mark.parametrize("end", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_recover_at_the_ends_of_the_path(prediction: Prediction, end: float) -> None:
    x0, noise = normal(2, 3), normal(2, 3, seed=1)
    # Only the second sample is at an end: one is enough to be refused.
    a, b = process.flow_coefficients(torch.tensor([[0.5], [end]], dtype=torch.float64))
    output, x_t = process.target(prediction, x0, noise, a, b), process.diffuse(x0, noise, a, b)
    if (prediction, end) in {("eps", 1.0), ("x0", 0.0)}:
        with pytest.raises(ValueError, match=f"'{prediction}'.*use prediction 'v'"):
            process.recover(prediction, output, x_t, a, b)
    else:
        found = process.recover(prediction, output, x_t, a, b)
        close(found[0], x0)
        close(found[1], noise)


def test_an_unknown_prediction_is_refused_by_name() -> None:
    unknown: Any = "epsilon"
    with pytest.raises(ValueError, match=r"'epsilon'.*'eps', 'v', 'x0', 'flow'"):
        process.mix(unknown, torch.ones(1), torch.ones(1))


# From noise to data


@pytest.mark.parametrize("t", [1, 10, 500, 998])
@every_schedule
def test_posterior_is_the_product_of_two_gaussians(name: ScheduleName, t: int) -> None:
    betas, (abar, abar_prev) = SCHEDULES[name][0], at(SCHEDULES[name][0], t)
    x0, x_t = torch.tensor(0.8).double(), torch.tensor(-0.3).double()
    # q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalised; the trapezoid rule is exact to
    # rounding for a smooth density that is 0 at both ends of the grid, if a width has some points.
    centre, width = abar_prev.sqrt() * x0, torch.minimum(1 - abar_prev, betas[t] / (1 - betas[t])).sqrt()
    grid = torch.linspace(-1, 1, 40_001, dtype=torch.float64)
    reach = 14 * width + (centre - x_t / (1 - betas[t]).sqrt()).abs()
    grid = centre + grid * reach
    exponent = -((x_t - (1 - betas[t]).sqrt() * grid) ** 2) / (2 * betas[t])
    exponent = exponent - (grid - centre) ** 2 / (2 * (1 - abar_prev))
    density = torch.softmax(exponent, dim=0)
    mean = (density * grid).sum()
    close(process.posterior_mean(x0, x_t, abar, abar_prev), mean)
    close(process.posterior_variance(abar, abar_prev), (density * (grid - mean) ** 2).sum())


@pytest.mark.parametrize("t", [0, 1, 500, 999])
@every_schedule
def test_step_variance_is_the_schedule_and_the_mean_is_the_posterior_mean(name: ScheduleName, t: int) -> None:
    betas, x0, noise = SCHEDULES[name][0], normal(2, 3), normal(2, 3, seed=1)
    abar, abar_prev = at(betas, t)
    close(process.step_variance(abar, abar_prev), betas[t])
    x_t = process.diffuse(x0, noise, *process.ddpm_coefficients(abar))
    mean = process.ddpm_step(x_t, noise, torch.zeros_like(x_t), abar, abar_prev, "beta")
    close(process.posterior_mean(x0, x_t, abar, abar_prev), mean)


@pytest.mark.parametrize("t", [999, 500, 1, 0])
@every_variance
@every_schedule
def test_line_4_is_the_step_of_diffusers(name: ScheduleName, variance: Variance, t: int) -> None:
    betas, x, predicted = SCHEDULES[name][0], normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    made = scheduler(DDPM, betas, variance_type=DIFFUSERS_VARIANCE[variance])
    theirs = made.step(predicted, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
    # The same draw; at t = 0 neither uses it (their clamp of the variance at 1e-20 is reached nowhere else).
    ours = process.ddpm_step(x, predicted, normal(2, 3, 4, 4, seed=7), *at(betas, t), variance)
    # A step multiplies by 1 / sqrt(alpha), which is 32 at the end of the cosine schedule: hence relative.
    close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_a_batch_may_hold_several_steps() -> None:
    betas, x, predicted, z = SCHEDULES["linear"][0], normal(3, 2), normal(3, 2, seed=1), normal(3, 2, seed=2)
    pairs = [at(betas, t) for t in (0, 1, 999)]
    abar, abar_prev = (process.expand(torch.stack(part), x) for part in zip(*pairs, strict=True))
    together = process.ddpm_step(x, predicted, z, abar, abar_prev, "beta")
    for i, pair in enumerate(pairs):
        close(together[i], process.ddpm_step(x[i], predicted[i], z[i], *pair, "beta"))


@pytest.mark.parametrize("t", [999, 500, 1])
@every_schedule
def test_beta_keeps_unit_normal_data_and_beta_tilde_a_single_point(name: ScheduleName, t: int) -> None:
    """Ho 2020, section 3.2: the two choices of sigma_t are exact for these two data sets."""
    abar, abar_prev = at(SCHEDULES[name][0], t)
    here, z = torch.eye(2, dtype=torch.float64)
    # x_0 ~ N(0, I): every x_t is N(0, I), and the best guess of the noise in x_t is sqrt(1 - abar_t) x_t.
    x = process.ddpm_step(here, (1 - abar).sqrt() * here, z, abar, abar_prev, "beta")
    close(x.square().sum(), torch.ones_like(abar))
    # x_0 = 0: x_t is N(0, 1 - abar_t), all of it noise.
    b = (1 - abar).sqrt()
    x = process.ddpm_step(b * here, here, z, abar, abar_prev, "beta_tilde")
    close(x.square().sum(), 1 - abar_prev)


@pytest.mark.parametrize("prediction", DIFFUSERS_PREDICTION)
@every_schedule
def test_ddim_step_is_that_of_diffusers(name: ScheduleName, prediction: Prediction) -> None:
    betas, x, output = SCHEDULES[name][0], normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    made = scheduler(DDIM, betas, prediction_type=DIFFUSERS_PREDICTION[prediction])
    made.set_timesteps(10)
    abar, one = process.alpha_bars(betas), torch.ones(1, dtype=torch.float64)
    for t, t_next in zip(made.timesteps, [*made.timesteps[1:], None], strict=True):
        here = process.ddpm_coefficients(abar[t])
        there = process.ddpm_coefficients(one if t_next is None else abar[t_next])
        ours = process.ddim_step(*process.recover(prediction, output, x, *here), *there)
        close(ours, made.step(output, t, x, eta=0.0).prev_sample)


def test_ddim_on_the_straight_path_is_eulers_step() -> None:
    x, output = normal(2, 3), normal(2, 3, seed=1)
    t, s = torch.tensor(0.8).double(), torch.tensor(0.55).double()
    ends = process.recover("flow", output, x, *process.flow_coefficients(t))
    close(process.ddim_step(*ends, *process.flow_coefficients(s)), x + (s - t) * output)


def test_ddim_on_the_straight_path_is_the_flow_step_of_diffusers() -> None:
    made = Flow()
    made.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    made.sigmas = made.sigmas.double()
    # It rounds x to float32 before the step: eighths and quarters are exact there, so float64 sees no loss.
    x = (normal(2, 3, 4, 4) * 8).round() / 8
    for i, t in enumerate(made.timesteps):
        output = (normal(2, 3, 4, 4, seed=i + 1) * 8).round() / 8
        ends = process.recover("flow", output, x, *process.flow_coefficients(made.sigmas[i]))
        ours = process.ddim_step(*ends, *process.flow_coefficients(made.sigmas[i + 1]))
        close(ours, made.step(output, t, x).prev_sample)
        x = ours


def network(x: Tensor, t: Tensor) -> Tensor:
    """Something that is not linear and depends on t, in place of a U-Net."""
    return torch.tanh(x + torch.sin(process.expand(t, x).to(x.dtype)))


def draws(count: int, *shape: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count))


@every_variance
@every_schedule
def test_algorithm_2_is_the_loop_of_diffusers(name: ScheduleName, variance: Variance) -> None:
    _, _, start, end = SCHEDULES[name]
    betas, x = process.make_betas(name, 50, start, end), normal(2, 3, 4, 4)
    ours = process.ddpm_sample(network, x, betas, draws(49, 2, 3, 4, 4, seed=7), variance)
    made = scheduler(DDPM, betas, variance_type=DIFFUSERS_VARIANCE[variance])
    made.set_timesteps(50)
    generator = torch.Generator().manual_seed(7)
    for t in made.timesteps:
        x = made.step(network(x, t.expand(2)), t, x, generator=generator).prev_sample
    close(ours, x, rtol=1e-10, atol=1e-10)


@every_variance
@every_schedule
def test_a_perfect_network_for_one_image_draws_that_image(name: ScheduleName, variance: Variance) -> None:
    _, _, start, end = SCHEDULES[name]
    betas, image = process.make_betas(name, 100, start, end), normal(3, 4, 4, seed=3)
    a, b = process.ddpm_coefficients(process.alpha_bars(betas))

    def oracle(x: Tensor, t: Tensor) -> Tensor:
        assert (t.shape, t.dtype) == ((2,), torch.long)
        return (x - process.expand(a[t], x) * image) / process.expand(b[t], x)

    drawn = process.ddpm_sample(oracle, normal(2, 3, 4, 4), betas, draws(99, 2, 3, 4, 4, seed=7), variance)
    close(drawn, image.expand(2, 3, 4, 4))


def test_algorithm_2_keeps_the_dtype_of_x() -> None:
    x, betas = torch.zeros(2, 3), process.linear_betas(3)
    assert process.ddpm_sample(network, x, betas, [x, x], "beta").dtype == torch.float32


def test_algorithm_2_says_what_it_cannot_do() -> None:
    x, betas = normal(2, 3), process.linear_betas(5)
    with pytest.raises(ValueError, match="ran out at t = 1; 5 steps need 4"):
        process.ddpm_sample(network, x, betas, [x, x, x], "beta")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        process.ddpm_sample(network, x, process.rescale_zero_terminal_snr(betas), [x] * 4, "beta")
