"""A batch cut among processes, so that several make the step that one would make with the whole batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

from torch.utils.data import Dataset, Sampler

Row = tuple[Any, int, int]
"""What finds a sample, the first row of its process's share of the batch, and the rows of the whole batch."""


class Batches(Protocol):
    """What is cut: lists of indices, as many as `len` says."""

    def __iter__(self) -> Iterator[list[Any]]:
        """The batches of an epoch."""

    def __len__(self) -> int:
        """How many they are."""


def share(batch: list[Any], rank: int, processes: int) -> list[Row]:
    """A process's rows of a batch: consecutive, as many for each process as can be.

    A batch of fewer rows than processes leaves some without a row; they get the first one, and say by a start beyond
    the batch that it counts nothing, as every process has to take part in the step.
    """
    total = len(batch)
    start, stop = (total * edge // processes for edge in (rank, rank + 1))
    if start == stop:
        return [(batch[0], total, total)]
    return [(index, start, total) for index in batch[start:stop]]


class Shares(Sampler[list[Row]]):
    """One process's shares of batches.

    Args:
        batches: of all processes together, the same in each of them.
        rank: of this process.
        processes: how many there are.
    """

    def __init__(self, batches: Batches | Iterable[list[Any]], rank: int, processes: int) -> None:
        self.batches, self.rank, self.processes = batches, rank, processes

    def __len__(self) -> int:
        assert isinstance(self.batches, Sized)
        return len(self.batches)

    @property
    def sampler(self) -> Any:
        """Where Lightning looks for `set_epoch`."""
        return self.batches

    def __iter__(self) -> Iterator[list[Row]]:
        return (share(batch, self.rank, self.processes) for batch in self.batches)


class Rows(Dataset[dict[str, Any]]):
    """Samples by `Row`, each with its `share`: its process's first row, and the rows of the whole batch.

    Args:
        samples: by index.
    """

    def __init__(self, samples: Any) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: Row) -> dict[str, Any]:
        index, start, total = row
        return {**self.samples[index], "share": (start, total)}
