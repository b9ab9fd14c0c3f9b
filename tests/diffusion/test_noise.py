"""Kinds of noise against their definitions and statistics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from loratune.diffusion.noise import draw_pyramid, offset_noise, perturb, pyramid_noise, pyramid_sides


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_offset_noise_moves_each_channels_mean_and_nothing_else() -> None:
    noise, shift = normal(3, 4, 8, 8), normal(3, 4, 1, 1, seed=1)
    made = offset_noise(noise, shift, 0.1)
    torch.testing.assert_close(made.mean((2, 3)), noise.mean((2, 3)) + 0.1 * shift[..., 0, 0])
    torch.testing.assert_close(made - made.mean((2, 3), keepdim=True), noise - noise.mean((2, 3), keepdim=True))
    assert torch.equal(offset_noise(noise, shift, 0.0), noise)


def test_pyramid_noise_is_its_sum_at_unit_variance() -> None:
    levels = [normal(2, 4, 8, 8), normal(2, 4, 4, 4, seed=1), normal(2, 4, 2, 2, seed=2)]
    total = levels[0] + sum(
        0.3**i * F.interpolate(level, size=(8, 8), mode="bilinear") for i, level in enumerate(levels[1:], 1)
    )
    made = pyramid_noise(levels, 0.3)
    torch.testing.assert_close(made.flatten(1).std(1), torch.ones(2, dtype=torch.float64))
    for one, whole in zip(made, total, strict=True):
        torch.testing.assert_close(one * whole.std(), whole)


def test_pyramid_noise_has_more_of_the_coarse() -> None:
    random = torch.Generator().manual_seed(0)
    made, plain = draw_pyramid((200, 4, 16, 16), 0.6, random), torch.randn(200, 4, 16, 16, generator=random)
    # The mean of 256 independent values has variance 1/256; coarse noise adds up in it.
    assert float(made.mean((2, 3)).var()) > 3 * float(plain.mean((2, 3)).var())


def test_a_pyramid_halves_down_to_one() -> None:
    assert pyramid_sides(16, 16) == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    assert pyramid_sides(12, 5) == [(12, 5), (6, 2), (3, 1)]


def test_perturbed_noise_has_variance_one_plus_gamma_squared() -> None:
    noise, other = normal(1000, 16), normal(1000, 16, seed=1)
    made = perturb(noise, other, 0.5)
    assert float(made.var()) == pytest.approx(1.25, rel=0.05)
    torch.testing.assert_close(made - noise, 0.5 * other)
