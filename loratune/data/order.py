"""The order in which images come: batches of one size, by seed and epoch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from loratune.data.buckets import Size, batch_count, batches
from loratune.data.entries import Draw, Entry
from loratune.data.settings import SourceConfig

Group = tuple[list[int], int]
"""Indices of entries of one source and one size, and how many images of an epoch are theirs; never fewer."""


def groups(entries: Sequence[Entry], often: Sequence[float]) -> list[Group]:
    """Entries by source and size, and how many images of an epoch are each group's.

    Args:
        entries: what is trained on.
        often: how often each source's images come in an epoch; of 2.5 times the half is another one in each epoch.
    """
    held: dict[tuple[int, Size], list[int]] = {}
    for index, entry in enumerate(entries):
        held.setdefault((entry.source, entry.bucket), []).append(index)
    seen = [0] * len(often)
    made: list[Group] = []
    for (source, _), indices in held.items():
        before, seen[source] = seen[source], seen[source] + len(indices)
        # Rounding what has come so far keeps a source's whole count right to one image.
        count = round(often[source] * seen[source]) - round(often[source] * before)
        made.append((indices, max(1, count)))  # or a shape of few images would never come
    return made


def often_of_weights(weights: Sequence[float], counts: Sequence[int]) -> list[float]:
    """How often each source's images come in an epoch, so that its images are a share of the epoch by weight.

    The epoch is as long as it takes to give every image at least once.

    Args:
        weights: of each source; 0 leaves it out.
        counts: images of each.
    """
    longest = max((count / weight for weight, count in zip(weights, counts, strict=True) if weight), default=0.0)
    return [longest * weight / max(1, count) for weight, count in zip(weights, counts, strict=True)]


def often(sources: Sequence[SourceConfig], counts: Sequence[int]) -> list[float]:
    """How often the images of each source come in an epoch.

    Args:
        sources: as the recipe has them.
        counts: images of each that are trained on.
    """
    if any(one.weight is not None for one in sources):
        weights = [1.0 if one.weight is None else one.weight for one in sources]
        return often_of_weights(
            [weight if count else 0.0 for weight, count in zip(weights, counts, strict=True)], counts
        )
    others = sum(
        count * (one.repeats or 1) for one, count in zip(sources, counts, strict=True) if one.role == "training"
    )
    return [
        others / max(1, count) if one.role == "regularization" and one.repeats is None else float(one.repeats or 1)
        for one, count in zip(sources, counts, strict=True)
    ]


class BatchOrder(Sampler[list[Draw]]):
    """Every image in each epoch, in batches of one size, in an order that follows from seed and epoch alone.

    Where the run stands is asked for, not counted: after a resume the order goes on where it was.

    Args:
        given: as `groups` makes them.
        sizes: of every entry.
        batch_size: images in a batch, of all processes together; where a size's images do not fill a last
            batch, that batch is smaller.
        seed: of the run.
        place: the epoch, and how many of its batches are done, by how many an epoch has.
    """

    def __init__(
        self,
        given: Sequence[Group],
        sizes: Sequence[Size],
        batch_size: int,
        seed: int,
        place: Callable[[int], tuple[int, int]] = lambda _: (0, 0),
    ) -> None:
        self.given, self.sizes, self.batch_size = given, sizes, batch_size
        self.seed, self.place = seed, place
        self._length = batch_count((sizes[group[0]] for group, count in given for _ in range(count)), batch_size)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, done = self.place(len(self))
        draws = [draw for group in self.given for draw in self._draws(*group, epoch)]
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        made = batches([self.sizes[draw.sample] for draw in draws], self.batch_size, random)
        return ([draws[at] for at in batch] for batch in made[done:])

    def _draws(self, indices: Sequence[int], count: int, epoch: int) -> Iterator[Draw]:
        whole, rest = divmod(count, len(indices))
        chosen: set[int] = set()
        if rest:  # in turns: the next ones of an order that stays
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + 500_009)
            turns = torch.randperm(len(indices), generator=random).tolist()
            chosen = {turns[(epoch * rest + at) % len(turns)] for at in range(rest)}
        for at, index in enumerate(indices):
            for nth in range(whole + (at in chosen)):
                yield Draw(index, (self.seed, epoch, nth))


def in_order(sizes: Sequence[Size], batch_size: int) -> list[list[Draw]]:
    """Every image once, in batches of one size, size by size as they come, with nothing random."""
    held: dict[Size, list[Draw]] = {}
    for index, size in enumerate(sizes):
        held.setdefault(size, []).append(Draw(index))
    return [draws[start : start + batch_size] for draws in held.values() for start in range(0, len(draws), batch_size)]


def batches_consumed(step: int, batches: int, accumulate: int) -> int:
    """Batches a run has trained on after `step` optimizer steps.

    Args:
        step: optimizer steps taken.
        batches: in an epoch.
        accumulate: batches to a step; the last step of an epoch may have fewer.
    """
    steps = -(-batches // accumulate)
    epoch, within = divmod(step, steps)
    return epoch * batches + within * accumulate
