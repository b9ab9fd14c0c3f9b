"""What is known of an image before it is decoded, and how it is looked at in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loratune.data.buckets import Size


@dataclass(frozen=True)
class Entry:
    """One image of a source.

    Attributes:
        source: which of the recipe's sources, from 0.
        index: its row there.
        name: its file's name, for messages.
        captions: what may be told of it, each with the prefix; at least one.
        digest: sha256 of its bytes.
        size: its own width and height, upright.
        bucket: the width and height that it is brought to.
        prefix: what its captions begin with, which no shuffling moves.
        loss_weight: how much its loss counts.
        mask: sha256 of its mask's bytes; empty where it has none and counts whole.
    """

    source: int
    index: int
    name: str
    captions: tuple[str, ...]
    digest: str
    size: Size
    bucket: Size
    prefix: str = ""
    loss_weight: float = 1.0
    mask: str = ""

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


class View(NamedTuple):
    """The part of an image that fills its bucket, and whether it is mirrored.

    Attributes:
        across: where the part lies from left, 0, to right, 1.
        down: where it lies from top, 0, to bottom, 1.
        flip: whether it is mirrored left to right.
    """

    across: float = 0.5
    down: float = 0.5
    flip: bool = False


MIDDLE = View()


class Draw(NamedTuple):
    """An image in a batch.

    Attributes:
        sample: index of its entry.
        place: seed, epoch, and how often it came in the epoch before: what everything random about it follows from.
            Empty: nothing is random, as in validation.
    """

    sample: int
    place: tuple[int, ...] = ()
