"""Strips of the process, and maps on images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from loratune.diffusion.process import ddpm_coefficients, expand
from loratune.evaluation.strips import evenly, forward_states, heat, strip


def test_numbers_are_spread_from_the_first_to_the_last() -> None:
    assert evenly(3, 8) == [0, 1, 2]
    assert evenly(1000, 5) == [0, 250, 500, 749, 999]


def test_states_go_from_the_image_to_the_noise() -> None:
    bars = torch.linspace(1, 0, 11).double()
    x_0, noise = torch.randn(2, 3, 3).double(), torch.randn(2, 3, 3).double()

    def coefficients(t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = ddpm_coefficients(bars[t])
        return expand(a, like), expand(b, like)

    states = forward_states(x_0, noise, coefficients, [0, 5, 10])
    assert torch.equal(states[0], x_0)
    assert torch.allclose(states[1], 0.5**0.5 * (x_0 + noise))
    assert torch.equal(states[2], noise)


def test_a_strip_has_its_images_in_order() -> None:
    made = np.asarray(strip([Image.new("RGB", (16, 16), name) for name in ("red", "blue")], ["a", "b"], cell=16))
    red = np.argwhere((made == (255, 0, 0)).all(-1))
    blue = np.argwhere((made == (0, 0, 255)).all(-1))
    assert len(red) == len(blue) == 256
    assert red[:, 1].max() < blue[:, 1].min()


def test_heat_is_bright_where_the_map_is_high() -> None:
    made = np.asarray(heat(Image.new("L", (8, 8), 200), torch.tensor([[0.0, 0.4], [0.0, 0.4]])))
    assert made.shape == (8, 8, 3)
    assert made[:, 7].min() == 200
    assert made[:, 0].max() == pytest.approx(0.15 * 200, abs=1)
    even = np.asarray(heat(Image.new("L", (8, 8), 200), torch.full((2, 2), 0.5)))
    assert even.min() == 200
