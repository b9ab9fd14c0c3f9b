"""Images that are the same, or nearly: by their bytes, and by what is seen of them when they are very small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

SIDE = 16
BITS_APART = 12
"""Of the SIDE x SIDE directions of brightness, how many may differ between near duplicates: 5 %."""
COLOUR_APART = 24
"""How far a colour may be away, of 255, in any of 4 x 4 parts."""
ROWS = 512


class Fingerprint(NamedTuple):
    """What is compared of an image.

    Attributes:
        bits: whether it grows darker to the right in each of 16 x 16 places (dHash, Krawetz 2013), (4,) uint64.
        colours: of 4 x 4 parts, (48,) uint8.
    """

    bits: np.ndarray
    colours: np.ndarray


def fingerprint(image: Image.Image) -> Fingerprint:
    """An image's fingerprint, which scaling and compression hardly change; mirroring and cutting do."""
    grey = np.asarray(image.convert("L").resize((SIDE + 1, SIDE), Image.Resampling.BOX), dtype=np.int16)
    darker = np.packbits(grey[:, 1:] < grey[:, :-1])
    colours = np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX), dtype=np.uint8)
    return Fingerprint(darker.view(np.uint64), colours.reshape(-1))


def near(prints: Sequence[Fingerprint]) -> Iterator[tuple[int, int]]:
    """Pairs of images, the first number below the second, that are nearly the same.

    Every pair is compared, some rows at a time: 5,000 images are 12.5 million pairs of 32 bytes.
    """
    if not prints:
        return
    bits = np.stack([image.bits for image in prints])
    colours = np.stack([image.colours for image in prints]).astype(np.int16)
    for start in range(0, len(prints), ROWS):
        rows = bits[start : start + ROWS]
        apart = np.zeros((len(rows), len(prints) - start), dtype=np.int16)
        for word in range(bits.shape[1]):
            apart += np.bitwise_count(rows[:, None, word] ^ bits[None, start:, word])
        for row, column in np.argwhere(apart <= BITS_APART):
            first, second = start + int(row), start + int(column)
            if first < second and int(np.abs(colours[first] - colours[second]).max()) <= COLOUR_APART:
                yield first, second
