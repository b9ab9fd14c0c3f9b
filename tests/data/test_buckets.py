"""Buckets: their sizes, who goes where, and that no image is lost."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.data.buckets import Buckets, batch_count, batches

QUICK = settings(max_examples=150, deadline=None)
sides = st.integers(1, 5000)


@st.composite
def settings_and_area(draw: st.DrawFn) -> tuple[Buckets, int]:
    step = draw(st.sampled_from([8, 16, 32, 64]))
    smallest = draw(st.integers(step, 512))
    largest = draw(st.integers(max(1024, smallest), 4096))
    return Buckets(step, smallest, largest, draw(st.booleans())), draw(st.sampled_from([512, 768, 1024])) ** 2


def test_the_usual_sizes_of_sdxl() -> None:
    sizes = Buckets(64, 512, 2048).sizes(1024 * 1024)
    assert {(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640)} <= set(sizes)
    assert (1280, 704) not in sizes  # 1280 x 768 still fits
    assert (1088, 1024) not in sizes


@QUICK
@given(settings_and_area())
def test_sizes_keep_all_limits_and_come_in_pairs(given_: tuple[Buckets, int]) -> None:
    buckets, area = given_
    sizes = buckets.sizes(area)
    for width, height in sizes:
        assert width % buckets.step == height % buckets.step == 0
        assert buckets.smallest <= min(width, height) <= max(width, height) <= buckets.largest
        assert width * height <= area
        assert (height, width) in sizes
        assert (
            width + buckets.step > buckets.largest
            or (width + buckets.step) * height > area
            or (height + buckets.step > buckets.largest or width * (height + buckets.step) > area)
        )
    assert len(set(sizes)) == len(sizes)


@QUICK
@given(settings_and_area(), sides, sides)
def test_the_nearest_shape_is_taken(given_: tuple[Buckets, int], width: int, height: int) -> None:
    buckets, area = given_
    sizes = buckets.sizes(area)
    found = buckets.fit((width, height), sizes)
    assert found[0] % buckets.step == found[1] % buckets.step == 0
    if buckets.upscale:
        assert found in sizes
        own = math.log(width / height)
        assert all(abs(math.log(found[0] / found[1]) - own) <= abs(math.log(a / b) - own) + 1e-12 for a, b in sizes)
    else:
        assert found[0] <= max(width, buckets.step)
        assert found[1] <= max(height, buckets.step)


def test_a_small_image_is_not_enlarged_unless_allowed() -> None:
    sizes = Buckets(64, 256, 1024).sizes(512 * 512)
    assert Buckets(64, 256, 1024).fit((300, 200), sizes) == Buckets(64, 256, 1024).fit((3000, 2000), sizes)
    assert Buckets(64, 256, 1024, upscale=False).fit((300, 200), sizes) == (256, 192)
    assert Buckets(64, 256, 1024, upscale=False).fit((10, 10), sizes) == (64, 64)


@QUICK
@given(st.lists(st.sampled_from([(64, 64), (128, 32), (32, 128)]), max_size=60), st.integers(1, 9), st.integers(0, 99))
def test_every_image_once_in_batches_of_one_size(sizes: list[tuple[int, int]], count: int, seed: int) -> None:
    made = batches(sizes, count, torch.Generator().manual_seed(seed))
    assert sorted(index for batch in made for index in batch) == list(range(len(sizes)))
    assert all(len({sizes[index] for index in batch}) == 1 and len(batch) <= count for batch in made)
    assert len(made) == batch_count(sizes, count)
    assert made == batches(sizes, count, torch.Generator().manual_seed(seed))


def test_the_seed_makes_the_order() -> None:
    sizes = [(64, 64)] * 30 + [(32, 128)] * 30
    orders = [batches(sizes, 4, torch.Generator().manual_seed(seed)) for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]
    kinds = [sizes[batch[0]] for batch in orders[0]]
    assert kinds != sorted(kinds)  # the sizes are mixed, not one after the other


@pytest.mark.parametrize("wrong", [{"step": 0}, {"smallest": 32}, {"largest": 128}])
def test_limits_that_contradict_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give 1 <= step <= smallest <= largest"):
        Buckets(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("no size of at most 4096 pixels has sides of 256")):
        Buckets().sizes(64 * 64)
