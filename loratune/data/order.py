"""The order in which images come: batches of one size, by seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

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
    members: dict[tuple[int, Size], list[int]] = {}
    for index, entry in enumerate(entries):
        members.setdefault((entry.source, entry.bucket), []).append(index)
    seen = [0] * len(often)
    rows: list[Group] = []
    for (source, _), indices in members.items():
        before, seen[source] = seen[source], seen[source] + len(indices)
        # Rounding what has come so far keeps a source's whole count right to one image.
        count = round(often[source] * seen[source]) - round(often[source] * before)
        rows.append((indices, max(1, count)))  # or a shape of few images would never come
    return rows


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
    if any(source.weight is not None for source in sources):
        weights = [1.0 if source.weight is None else source.weight for source in sources]
        return often_of_weights(
            [weight if count else 0.0 for weight, count in zip(weights, counts, strict=True)], counts
        )
    others = sum(
        count * (source.repeats or 1)
        for source, count in zip(sources, counts, strict=True)
        if source.role == "training"
    )
    return [
        others / max(1, count)
        if source.role == "regularization" and source.repeats is None
        else float(source.repeats or 1)
        for source, count in zip(sources, counts, strict=True)
    ]


class BatchOrder(Sampler[list[Draw]]):
    """Every image in each epoch, in batches of one size, in an order that follows from seed and epoch alone.

    `epoch` and `done`, how many of its batches were trained on, are where the run stands: part of its checkpoints,
    and reckoned from no count of steps, so that they hold whatever part of an epoch is trained on.

    Args:
        groups: as `groups` makes them.
        sizes: of every entry.
        batch_size: images in a batch, of all processes together; where a size's images do not fill a last
            batch, that batch is smaller.
        seed: of the run.
        fixed: every epoch is like the first.
        limit: how much of an epoch is trained on, as Lightning's limit_train_batches: batches, or a share.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        sizes: Sequence[Size],
        batch_size: int,
        seed: int,
        fixed: bool = False,
        limit: int | float = 1.0,
    ) -> None:
        self.groups, self.sizes, self.batch_size = groups, sizes, batch_size
        self.seed, self.fixed = seed, fixed
        self.epoch = self.done = 0
        self._length = batch_count((sizes[group[0]] for group, count in groups for _ in range(count)), batch_size)
        self._trained = min(limit, self._length) if isinstance(limit, int) else int(limit * self._length)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Draw]]:
        """What is left of the epoch."""
        draws = [draw for group in self.groups for draw in self._draws(*group, self.epoch)]
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = batches([self.sizes[draw.sample] for draw in draws], self.batch_size, random)
        return ([draws[at] for at in batch] for batch in order[self.done :])

    @property
    def sampler(self) -> BatchOrder:
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Lightning begins an epoch or goes on with it; the next one begins where all of this one was trained on.

        Lightning's own count is not asked: it counts an epoch in which a run ended early, and which goes on when the
        run is lengthened.
        """
        if self.done >= self._trained:
            self.epoch, self.done = self.epoch + (not self.fixed), 0

    def state_dict(self) -> dict[str, int]:
        """Where the run stands."""
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there."""
        self.epoch, self.done = state_dict["epoch"], state_dict["done"]

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
    by_size: dict[Size, list[Draw]] = {}
    for index, size in enumerate(sizes):
        by_size.setdefault(size, []).append(Draw(index))
    return [
        draws[start : start + batch_size] for draws in by_size.values() for start in range(0, len(draws), batch_size)
    ]


class TrainingLoader(DataLoader[Any]):
    """Loads batches in an order, and counts in it those that were trained on; Lightning saves and restores its state.

    Args:
        order: whose place moves.
        more: of torch's loader.
    """

    def __init__(self, order: BatchOrder, **more: Any) -> None:
        self.order = order
        super().__init__(**more)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Begins where the order stands when the first batch is asked for; before that Lightning may restore it."""
        for batch in super().__iter__():
            self.order.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Of the order."""
        return self.order.state_dict()

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Of the order."""
        self.order.load_state_dict(state_dict)
