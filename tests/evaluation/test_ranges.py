"""The training loss by ranges of t."""

from __future__ import annotations

import math

import pytest
import torch

from loratune.evaluation.evaluate import add_losses, mean_losses, range_names


def test_ranges_are_named_by_their_steps() -> None:
    assert range_names(1000, 4) == ["t0-249", "t250-499", "t500-749", "t750-999"]
    assert range_names(10, 3) == ["t0-2", "t3-5", "t6-9"]


@pytest.mark.parametrize(("steps", "parts"), [(1000, 4), (10, 3), (1000, 7), (5, 5)])
def test_each_step_is_in_the_range_of_its_name(steps: int, parts: int) -> None:
    t = torch.arange(steps)
    found = mean_losses(add_losses(torch.zeros(2, parts), t, t.float(), steps))
    for name, mean in zip(range_names(steps, parts), found, strict=True):
        first, last = map(int, name[1:].split("-"))
        assert mean == pytest.approx((first + last) / 2)


def test_sums_go_on_and_nothing_is_no_mean() -> None:
    sums = add_losses(torch.zeros(2, 2), torch.tensor([0, 1]), torch.tensor([1.0, 2.0]), 10)
    found = mean_losses(add_losses(sums, torch.tensor([4]), torch.tensor([6.0]), 10))
    assert found[0] == 3.0
    assert math.isnan(found[1])
