"""The measures against their definitions, and against numpy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.diffusion.objective import psnr
from loratune.evaluation.quality import colourfulness, colours, nearest_rate, shapes, share_of_the_way

QUICK = settings(max_examples=100, deadline=None)
numbers = st.floats(-1e3, 1e3, allow_nan=False)


def plain(*rgb: float) -> Tensor:
    return torch.tensor(rgb).reshape(1, 3, 1, 1).expand(1, 3, 5, 7)


def pixels(count: int, size: int = 32, seed: int = 0, reach: float = 1.0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return reach * (2 * torch.rand(count, 3, size, size, generator=random) - 1)


@pytest.mark.parametrize("shade", [-1.0, 0.0, 0.3, 1.0])
def test_black_white_and_grey_have_no_colour(shade: float) -> None:
    assert colourfulness(plain(shade, shade, shade)).tolist() == [0.0]


def test_pure_colours_have_all_of_it() -> None:
    for colour in ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0), (1.0, 1.0, -1.0)):
        assert colourfulness(plain(*colour)).tolist() == [1.0]


def test_a_half_red_image_is_half_colourful_and_a_dark_tint_little() -> None:
    half = torch.cat([plain(1.0, -1.0, -1.0), plain(-1.0, -1.0, -1.0)], dim=3)
    assert float(colourfulness(half)) == pytest.approx(0.5)
    tint = plain(-0.9, -1.0, -1.0)  # HSV's saturation would be 1
    assert float(colourfulness(tint)) == pytest.approx(0.05)


@QUICK
@given(st.integers(0, 2**31), st.floats(0.1, 3))
def test_colourfulness_is_from_0_to_1_and_of_each_image_alone(seed: int, reach: float) -> None:
    some = pixels(3, 4, seed, reach)
    found = colourfulness(some)
    assert found.shape == (3,)
    assert ((found >= 0) & (found <= 1)).all()
    assert torch.equal(found, torch.cat([colourfulness(one[None]) for one in some]))
    assert torch.equal(found, colourfulness(some.clamp(-1, 1)))
    shade = (some.clamp(-1, 1).double().numpy() + 1) / 2
    assert np.allclose(found.numpy(), (shade.max(1) - shade.min(1)).mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_colours_are_the_means_of_16_by_16_blocks(size: int) -> None:
    some = pixels(2, size, reach=1.5)
    block = size // 16
    values = some.clamp(-1, 1).double().numpy().reshape(2, 3, 16, block, 16, block)
    found = colours(some)
    assert found.shape == (2, 768)
    assert np.allclose(found.numpy(), values.mean((3, 5)).reshape(2, 768), atol=1e-6)


def drawn_by_hand(image: np.ndarray) -> np.ndarray:
    """Histograms of oriented gradients pixel by pixel, for an image (3, 64, 64)."""
    grey, bins = np.pad(image.mean(0), 1, mode="edge"), np.zeros((8, 8, 8))
    for y in range(64):
        for x in range(64):
            across = (grey[y + 1, x + 2] - grey[y + 1, x]) / 2
            down = (grey[y + 2, x + 1] - grey[y, x + 1]) / 2
            place = (math.atan2(down, across) % math.pi) / math.pi * 8
            first, share, strength = int(place), place % 1, math.hypot(across, down)
            bins[first % 8, y // 8, x // 8] += strength * (1 - share)
            bins[(first + 1) % 8, y // 8, x // 8] += strength * share
    roots = np.sqrt(bins.flatten())
    return np.asarray(roots / np.linalg.norm(roots))


def test_shapes_are_histograms_of_oriented_gradients() -> None:
    some = pixels(2, 64)
    for found, image in zip(shapes(some), some, strict=True):
        assert np.allclose(found.numpy(), drawn_by_hand(image.double().numpy()), atol=1e-4)


def test_shapes_know_edges_and_no_colours() -> None:
    upright, lying = torch.ones(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    upright[..., 32:], lying[..., 32:, :] = -1, -1
    assert shapes(upright)[0].view(8, 64).sum(1).argmax() == 0  # the gradient lies along x: the first direction
    assert shapes(lying)[0].view(8, 64).sum(1).argmax() == 4
    assert float(shapes(upright)[0] @ shapes(lying)[0]) == pytest.approx(0, abs=1e-6)
    pale, negative = 0.3 * upright, -upright
    assert torch.allclose(shapes(pale), shapes(upright), atol=1e-6)
    assert torch.allclose(shapes(negative), shapes(upright), atol=1e-6)
    assert shapes(torch.ones(2, 3, 64, 64)).abs().max() == 0


@pytest.mark.parametrize("by", [shapes, colours])
def test_reals_are_nearest_to_themselves(by: Callable[[Tensor], Tensor]) -> None:
    reals = pixels(60)
    assert nearest_rate(reals, reals, torch.arange(60), by) == 1.0
    assert nearest_rate(reals + 0.05 * pixels(60, seed=1), reals, torch.arange(60), by) == 1.0
    assert nearest_rate(reals[:20], reals[:20], torch.arange(20)) == 1.0  # as many as candidates


def test_the_wrong_image_is_not_nearest() -> None:
    reals = pixels(20)
    assert nearest_rate(reals, reals, torch.arange(20).roll(1)) == 0.0


def test_noise_hits_by_chance_alone() -> None:
    # Unrelated noise: hits are binomial, p = 1/20, n = 600. Mean 30, deviation 5.34; beyond 4 deviations
    # (8.6 .. 51.4) lies less than 1e-3.
    reals, right = pixels(200, 16), torch.arange(200).repeat(3)
    hits = nearest_rate(pixels(600, 16, seed=1), reals, right) * 600
    assert 9 <= round(hits) <= 51


def test_chance_follows_the_candidates_and_the_seed_the_draw() -> None:
    reals, made, right = pixels(100, 16), pixels(400, 16, seed=1), torch.arange(100).repeat(4)
    # p = 1/2, n = 400: mean 200, deviation 10; 4 deviations.
    hits = round(nearest_rate(made, reals, right, candidates=2) * 400)
    assert 160 <= hits <= 240
    assert nearest_rate(made, reals, right, candidates=1) == 1.0
    rates = [nearest_rate(made, reals, right, candidates=2, seed=seed) for seed in (0, 0, 1, 2, 3)]
    assert rates[0] == rates[1]
    assert len(set(rates)) > 1


def test_every_other_image_is_a_candidate_where_all_are_drawn() -> None:
    sample = torch.zeros(1, 3, 16, 16)
    for right in range(20):
        for nearer in {0, (right + 1) % 20, (right - 1) % 20, 19} - {right}:
            reals = torch.ones(20, 3, 16, 16)
            reals[right] = 0.5
            assert nearest_rate(sample, reals, torch.tensor([right]), colours) == 1.0
            reals[nearer] = 0.1
            assert nearest_rate(sample, reals, torch.tensor([right]), colours) == 0.0


def test_too_few_reals() -> None:
    with pytest.raises(ValueError, match="19 real images are fewer than 20 candidates"):
        nearest_rate(pixels(1), pixels(19), torch.tensor([0]))
    with pytest.raises(ValueError):
        nearest_rate(pixels(2), pixels(20), torch.tensor([0]))


@QUICK
@given(st.integers(0, 2**31), st.floats(1e-3, 1.5))
def test_psnr_against_numpy(seed: int, reach: float) -> None:
    x, y = pixels(3, 6, seed, reach), pixels(3, 6, seed + 1, reach)
    a, b = (np.clip(one.double().numpy(), -1, 1) for one in (x, y))
    wanted = 20 * np.log10(2 / np.sqrt(((a - b) ** 2).mean((1, 2, 3))))
    assert np.allclose(psnr(x, y).numpy(), wanted, atol=1e-3)
    assert torch.equal(psnr(x, y), psnr(y, x))


def test_psnr_of_known_errors() -> None:
    assert psnr(plain(0.0, 0.0, 0.0), plain(0.2, 0.2, 0.2)).tolist() == pytest.approx([20.0])
    assert psnr(plain(1.0, 1.0, 1.0), plain(-1.0, -1.0, -1.0)).tolist() == pytest.approx([0.0])
    assert psnr(plain(1.0, 1.0, 1.0), plain(5.0, 1.0, 1.0)).tolist() == psnr(pixels(1), pixels(1)).tolist()
    assert torch.isfinite(psnr(pixels(1), pixels(1))).all()


@QUICK
@given(numbers, numbers.filter(lambda gap: abs(gap) > 1e-3), st.floats(-2, 2))
def test_share_of_the_way(start: float, gap: float, share: float) -> None:
    goal = start + gap
    assert share_of_the_way(start, start, goal) == 0
    assert share_of_the_way(start, goal, goal) == 1
    assert share_of_the_way(start, start + share * gap, goal) == pytest.approx(share, abs=1e-6)
