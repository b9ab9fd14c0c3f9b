"""Densities of t against scipy-free closed forms."""

from __future__ import annotations

import torch

from loratune.diffusion.timesteps import logit_normal, shifted, to_steps


def test_the_logit_of_logit_normal_is_normal() -> None:
    u = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    wanted = torch.distributions.Normal(-0.5, 1.5).icdf(u)
    torch.testing.assert_close(torch.logit(logit_normal(u, -0.5, 1.5)), wanted, rtol=1e-9, atol=1e-9)


def test_shift_is_equation_23_and_keeps_the_ends() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(shifted(t, 1.0), t)
    made = shifted(t, 3.0)
    assert made[0] == 0
    assert made[-1] == 1
    assert (made[1:-1] > t[1:-1]).all()
    torch.testing.assert_close(made[1:-1] / (1 - made[1:-1]), 3 * t[1:-1] / (1 - t[1:-1]))  # the odds, three times


def test_steps_are_equal_parts_of_the_range() -> None:
    t = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    found = to_steps(t, 200, 600)
    assert found.bincount(minlength=601)[200:600].tolist() == [2] * 400
    assert to_steps(torch.tensor([0.0, 1.0]), 200, 600).tolist() == [200, 599]
