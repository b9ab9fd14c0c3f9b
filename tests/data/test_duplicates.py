"""Nearly the same images are found among many, and others are not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from loratune.data.duplicates import ROWS, fingerprint, near


def noise(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def saved_badly(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=50)
    return Image.open(io.BytesIO(stream.getvalue()))


def pairs(*images: Image.Image) -> list[tuple[int, int]]:
    return list(near([fingerprint(one) for one in images]))


def test_scaled_and_compressed_images_are_nearly_the_same() -> None:
    one, other = noise(1), noise(2)
    assert pairs(one, other, one.resize((48, 32)), saved_badly(other)) == [(0, 2), (1, 3)]
    assert pairs() == pairs(one) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda one: one.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        lambda one: one.crop((30, 0, 96, 64)),
        lambda one: ImageEnhance.Color(one).enhance(0),
    ],
)
def test_mirrored_cut_and_grey_images_are_others(change: object) -> None:
    one = noise(3)
    assert pairs(one, change(one)) == []  # type: ignore[operator]


def test_flat_images_differ_by_colour() -> None:
    red, crimson, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", (240, 0, 10), "blue"))
    assert pairs(red, blue, crimson) == [(0, 2)]


def test_pairs_across_all_rows_are_found() -> None:
    images = [noise(seed, 24, 16) for seed in range(2 * ROWS + 3)]
    prints = [fingerprint(one) for one in images]
    prints[ROWS + 5] = prints[2]
    prints[-1] = prints[ROWS - 1]
    assert list(near(prints)) == [(2, ROWS + 5), (ROWS - 1, 2 * ROWS + 2)]
