"""Mirrored, cut elsewhere, in other colours: and SDXL is told where the cut was."""

from __future__ import annotations

import io
from collections import Counter
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loratune.data.augment import Augment, corner, covering, cut, upright_size
from loratune.data.entries import MIDDLE, View

sides = st.integers(8, 300)
shapes = st.tuples(sides, sides)


def ramp(width: int, height: int) -> Image.Image:
    """Red counts columns, green rows."""
    values = np.zeros((height, width, 3), dtype=np.uint8)
    values[..., 0], values[..., 1] = np.arange(width), np.arange(height)[:, None]
    return Image.fromarray(values)


def test_without_augmentation_there_is_the_middle_alone() -> None:
    assert Augment().views((30, 20), (16, 16)) == [MIDDLE]
    assert Augment().draw((30, 20), (16, 16), Random(1)) == MIDDLE


def test_the_variants_are_few_and_each_once() -> None:
    wide = Augment(flip=0.5, crops=3).views((30, 20), (16, 16))
    assert wide == [View(x, 0.5, flip) for flip in (False, True) for x in (0.0, 0.5, 1.0)]
    assert Augment(crops=2).views((20, 30), (16, 16)) == [View(0.5, 0.0), View(0.5, 1.0)]
    assert Augment(crops=5).views((20, 20), (16, 16)) == [MIDDLE]  # there is nothing to cut elsewhere
    assert Augment(flip=1).views((20, 20), (16, 16)) == [View(flip=True)]


@settings(deadline=None)
@given(shapes, shapes, st.floats(0, 1), st.integers(1, 5), st.integers())
def test_what_is_drawn_is_one_of_the_variants(
    size: tuple[int, int], bucket: tuple[int, int], flip: float, crops: int, seed: int
) -> None:
    augment = Augment(flip=flip, crops=crops)
    views = augment.views(size, bucket)
    assert len(views) == len(set(views))
    assert augment.draw(size, bucket, Random(seed)) in views


def test_how_often_is_mirrored_and_from_where_is_cut() -> None:
    random = Random(3)
    drawn = Counter(Augment(flip=0.25, crops=2).draw((30, 20), (16, 16), random) for _ in range(4000))
    assert sum(count for view, count in drawn.items() if view.flip) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(count for view, count in drawn.items() if view.across == 0) / 4000 == pytest.approx(0.5, abs=0.04)


def test_the_cut_is_where_the_view_says() -> None:
    image = ramp(48, 16)
    left, middle, right = (np.asarray(cut(image, (16, 16), View(x))) for x in (0.0, 0.5, 1.0))
    assert [int(part[0, 0, 0]) for part in (left, middle, right)] == [0, 16, 32]
    assert (np.asarray(cut(image, (16, 16), View(1.0, flip=True))) == right[:, ::-1]).all()


@settings(deadline=None)
@given(shapes, st.tuples(st.integers(8, 64), st.integers(8, 64)), st.sampled_from([0.0, 0.5, 1.0]), st.booleans())
def test_the_corner_is_that_of_the_cut_in_the_scaled_image(
    size: tuple[int, int], bucket: tuple[int, int], place: float, flip: bool
) -> None:
    view = View(place, place, flip)
    width, height = covering(size, bucket)
    left, top = corner(size, bucket, view)
    assert -0.5 <= left <= width - bucket[0] + 0.5
    assert -0.5 <= top <= height - bucket[1] + 0.5
    scaled = ramp(*size).resize((round(width), round(height)), Image.Resampling.BILINEAR)
    whole = np.asarray(scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else scaled).astype(int)
    seen = np.asarray(cut(ramp(*size), bucket, view, Image.Resampling.BILINEAR)).astype(int)
    steps = max(size[0] / width, size[1] / height)  # a pixel of the scaled image is so many of the image's
    middle = whole[top + bucket[1] // 2, left + bucket[0] // 2, :2]
    assert np.abs(seen[bucket[1] // 2, bucket[0] // 2, :2] - middle).max() <= 2 * steps + 2 or size[0] > 255


def test_colours_change_by_as_much_as_is_said() -> None:
    grey = Image.new("RGB", (4, 4), (100, 100, 100))
    random = Random(1)
    bright = [np.asarray(Augment(brightness=0.2).colour(grey, random))[0, 0, 0] for _ in range(300)]
    assert 80 <= min(bright) < 84
    assert 116 < max(bright) <= 120
    red = Image.new("RGB", (4, 4), (200, 50, 50))
    spread = [np.ptp(np.asarray(Augment(saturation=0.5).colour(red, random))[0, 0].astype(int)) for _ in range(300)]
    assert 75 <= min(spread) < 90
    assert 180 < max(spread) <= 226
    half = Image.fromarray(np.array([[[50] * 3, [150] * 3]], dtype=np.uint8))
    contrast = [np.ptp(np.asarray(Augment(contrast=0.5).colour(half, random)).astype(int)) for _ in range(300)]
    assert 50 <= min(contrast) < 60
    assert 140 < max(contrast) <= 151
    assert Augment(flip=0.5).colours == {}
    assert Augment(flip=0.5).colour(red, random) is red


def test_the_size_of_a_image_is_the_one_it_is_looked_at_in() -> None:
    def saved(turn: int | None) -> bytes:
        stream, exif = io.BytesIO(), Image.Exif()
        if turn:
            exif[0x0112] = turn
        Image.new("RGB", (6, 4)).save(stream, "JPEG", exif=exif)
        return stream.getvalue()

    assert [upright_size(saved(turn)) for turn in (None, 1, 3, 6, 8)] == [(6, 4), (6, 4), (6, 4), (4, 6), (4, 6)]
    with pytest.raises(OSError, match="no image of a known kind"):
        upright_size(b"no image")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"flip": 1.5}, "augment.flip is 1.5"), ({"crops": 0}, "augment.crops is 0"), ({"contrast": -1}, "contrast")],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Augment(**wrong)  # type: ignore[arg-type]
