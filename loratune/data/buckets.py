"""Aspect-ratio buckets: which sizes images are brought to, and which image goes where.

Images keep about their own shape, and a batch holds images of one size (Novel AI 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class Buckets:
    """Aspect-ratio buckets.

    Args:
        step: every side is a multiple of it, in pixels; a multiple of the VAE's factor.
        smallest: the shortest side, in pixels.
        largest: the longest side, in pixels.
        upscale: whether images smaller than their bucket are upscaled; if not, they get a bucket of their own size,
            rounded down to the step.
    """

    step: int = 64
    smallest: int = 256
    largest: int = 2048
    upscale: bool = True

    def __post_init__(self) -> None:
        if self.step < 1 or not self.step <= self.smallest <= self.largest:
            raise ValueError(
                f"buckets: step is {self.step}, smallest {self.smallest}, largest {self.largest}; "
                "give 1 <= step <= smallest <= largest"
            )

    def sizes(self, area: int) -> list[Size]:
        """The widest size for each height, and the highest for each width, whose area is at most `area` pixels.

        Raises:
            ValueError: not one size fits; the message says what to change.
        """
        sides = range(-(-self.smallest // self.step) * self.step, self.largest + 1, self.step)
        fitting: set[Size] = set()
        for side in sides:
            other = min(area // side // self.step * self.step, self.largest // self.step * self.step)
            if other >= sides.start:
                fitting |= {(side, other), (other, side)}
        if not fitting:
            raise ValueError(
                f"buckets: no size of at most {area} pixels has sides of {sides.start} to {self.largest} pixels; "
                "give a larger data.resolution, or a smaller data.buckets.smallest"
            )
        return sorted(fitting)

    def fit(self, image: Size, sizes: Sequence[Size]) -> Size:
        """The size whose shape is nearest to an image's, by the logarithm of width / height.

        Args:
            image: its width and height.
            sizes: as `sizes` makes them.
        """
        shape = math.log(image[0] / image[1])
        best = min(sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1], size))
        if self.upscale or (image[0] >= best[0] and image[1] >= best[1]):
            return best
        whole = [max(self.step, min(own, side) // self.step * self.step) for own, side in zip(image, best, strict=True)]
        return whole[0], whole[1]


def batches(sizes: Sequence[Size], batch_size: int, random: torch.Generator) -> list[list[int]]:
    """Indices in batches of one size, every index once, batches and their contents in random order.

    Where a size's images do not fill a last batch, that batch is smaller; nothing is lost and nothing comes twice.
    Where there is one size alone, the smaller batch is the last.
    """
    order = torch.randperm(len(sizes), generator=random).tolist()
    by_size: dict[Size, list[int]] = {}
    for index in order:
        by_size.setdefault(sizes[index], []).append(index)
    cut = [part for size in sorted(by_size) for part in _parts(by_size[size], batch_size)]
    if len(by_size) < 2:
        return cut  # in random order already
    return [cut[i] for i in torch.randperm(len(cut), generator=random).tolist()]


def _parts(indices: Sequence[int], count: int) -> Iterator[list[int]]:
    return (list(indices[start : start + count]) for start in range(0, len(indices), count))


def batch_count(sizes: Iterable[Size], batch_size: int) -> int:
    """How many batches `batches` makes."""
    counts: dict[Size, int] = {}
    for size in sizes:
        counts[size] = counts.get(size, 0) + 1
    return sum(-(-count // batch_size) for count in counts.values())
