"""Every setting of the objective changes the loss as it says, and senseless ones are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from loratune.families.pixels import PixelDDPM
from loratune.training.diffusion_module import DiffusionModule
from loratune.training.objectives import Objective, Timesteps
from loratune.training.randomness import generator


@pytest.fixture(scope="module")
def module() -> DiffusionModule:
    torch.manual_seed(0)
    return DiffusionModule(PixelDDPM(size=16, channels=(16, 16), attention_from=1, prediction="v"))


def losses(module: DiffusionModule, objective: Objective, **more: Tensor) -> Tensor:
    pixels = torch.randint(0, 256, (6, 3, 16, 16), generator=generator("cpu", 1), dtype=torch.uint8)
    batch: dict[str, Any] = {"pixels": pixels, "name": list("abcdef"), "caption": [""] * 6, **more}
    t = torch.tensor([0, 100, 300, 500, 800, 999])
    with torch.no_grad():
        return module.losses(batch, t, generator("cpu", 0), objective)


@pytest.mark.parametrize(
    "set_to",
    [
        {"min_snr_gamma": 5.0},
        {"debiased": True},
        {"huber": 0.1},
        {"huber": 0.1, "huber_schedule": "exponential"},
        {"huber": 0.1, "huber_schedule": "snr"},
        {"offset_noise": 0.1},
        {"pyramid_noise": 0.3},
        {"input_perturbation": 0.1},
    ],
)
def test_every_knob_does_something(module: DiffusionModule, set_to: dict[str, Any]) -> None:
    plain, turned = losses(module, Objective()), losses(module, Objective(**set_to))
    assert torch.isfinite(turned).all()
    assert not torch.allclose(plain, turned)
    if set_to.get("huber_schedule"):
        assert not torch.allclose(turned, losses(module, Objective(huber=0.1)))


def test_perturbed_inputs_keep_the_plain_target(module: DiffusionModule) -> None:
    given, inside = Objective(input_perturbation=0.1).noise((2, 3, 8, 8), generator("cpu", 0))
    plain, same = Objective().noise((2, 3, 8, 8), generator("cpu", 0))
    assert torch.equal(given, plain)
    assert plain is same
    assert not torch.equal(given, inside)


def test_a_mask_takes_the_loss_from_where_it_is_zero(module: DiffusionModule) -> None:
    whole = losses(module, Objective())
    assert torch.allclose(losses(module, Objective(), mask=torch.ones(6, 1, 16, 16)), whole, atol=1e-6)
    left, right = torch.zeros(6, 1, 16, 16), torch.zeros(6, 1, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    halves = losses(module, Objective(), mask=left), losses(module, Objective(), mask=right)
    assert not torch.allclose(*halves)
    assert torch.allclose(sum(halves) / 2, whole, atol=1e-5)  # type: ignore[arg-type]


def test_the_held_out_loss_does_not_see_the_tricks(module: DiffusionModule) -> None:
    values = []
    for objective in (Objective(), Objective(offset_noise=0.5, input_perturbation=0.5, pyramid_noise=0.5)):
        module.objective, logged = objective, []
        module.log = lambda name, value, **_: logged.append(float(value))  # type: ignore[method-assign, misc, assignment] # noqa: B023
        pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=generator("cpu", 1), dtype=torch.uint8)
        module._trainer = None
        with torch.no_grad():
            module._held_out({"pixels": pixels, "name": ["a", "b"], "caption": ["", ""]}, 0, "val")
        values += logged
    assert values[0] == values[1]


def test_timesteps_follow_their_density() -> None:
    def draw(**set_to: Any) -> Tensor:
        return Timesteps(**set_to).draw(20000, 1000, generator("cpu", 0)).float()

    plain = draw()
    assert (plain.min(), plain.max()) == (0, 999)
    assert abs(float(plain.mean()) - 499.5) < 8  # 4 deviations of the mean of 20,000
    middle = draw(density="logit-normal")
    assert float(middle.std()) < 0.8 * float(plain.std())
    assert float(draw(density="logit-normal", mean=1.0).mean()) > float(middle.mean()) + 100
    assert float(draw(shift=3.0).mean()) > float(plain.mean()) + 100
    part = draw(start=0.2, stop=0.6)
    assert (part.min(), part.max()) == (200, 599)
    shifted = draw(start=0.2, stop=0.6, shift=3.0)
    assert (shifted.min() >= 200) & (shifted.max() == 599)
    assert draw(start=0.5, stop=0.5001).unique().tolist() == [500]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Objective(debiased=True, min_snr_gamma=5.0), "debiased and min_snr_gamma both weigh"),
        (lambda: Objective(huber_schedule="snr"), "huber_schedule is 'snr', but huber is null"),
        (lambda: Objective(huber=0.0), "huber is 0.0; give a number between 0 and 1"),
        (lambda: Objective(pyramid_noise=1.0), "pyramid_noise is 1.0"),
        (lambda: Objective(offset_noise=-0.1), "offset_noise is -0.1; give a number from 0 to 1"),
        (lambda: Objective(input_perturbation=2), "input_perturbation is 2"),
        (lambda: Objective(caption_dropout=1.5), "caption_dropout is 1.5"),
        (lambda: Timesteps(start=0.5, stop=0.5), "start is 0.5, stop 0.5"),
        (lambda: Timesteps(shift=0.0), "shift is 0.0"),
        (lambda: Timesteps(mean=1.0), "set density to logit-normal"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
