"""Random numbers that depend on where the run is, and on nothing that came before."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def generator(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A generator seeded by its place in the run: (seed, stage, epoch, batch, rank, ...).

    The same place gives the same numbers whatever ran before it, so a resumed run needs no
    generator's state, and validation noise is the same in every epoch.
    """
    return torch.Generator(device).manual_seed(seed_of(*place))


def seed_of(*place: int | str) -> int:
    """The seed of a place in the run, from 0 to 2^63 - 1."""
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def training_generator(device: torch.device | str, step: int, part: int, rank: int) -> torch.Generator:
    """The generator of a training step, seeded by the run's seed.

    Args:
        device: where the numbers are drawn.
        step: optimizer steps done.
        part: number of the batch within the step, where gradients are accumulated.
        rank: of the process.
    """
    return generator(device, os.environ.get("PL_GLOBAL_SEED", "0"), "train", step, part, rank)


def seed_dropout(step: int, part: int) -> None:
    """Seed torch's own generators, which dropout draws from, by the place in the run; the same in every process."""
    torch.manual_seed(seed_of(os.environ.get("PL_GLOBAL_SEED", "0"), "dropout", step, part))


def states() -> dict[str, Any]:
    """Where this process's generators stand, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states: dict[str, Any] = {
        "python": list(random.getstate()[1]),
        "python_gauss": random.getstate()[2],
        "numpy": torch.from_numpy(np.array(keys, dtype=np.int64)),
        "numpy_rest": [str(kind), int(position), int(has_gauss), float(gauss)],  # type: ignore[call-overload]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    """Set this process's generators to saved states."""
    random.setstate((3, tuple(states["python"]), states["python_gauss"]))
    kind, position, has_gauss, gauss = states["numpy_rest"]
    np.random.set_state((kind, states["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


@dataclass(frozen=True)
class Share:
    """Which rows of the batch of all processes this process has.

    Random numbers are drawn for the whole batch and cut, so that they follow from an image's place in it and not from
    the number of processes.

    Args:
        start: the first row; at or beyond `total` for a process that has no row and takes part with one that counts
            nothing.
        count: of rows.
        total: rows of the whole batch.
    """

    start: int
    count: int
    total: int

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Share:
        """A batch's share; all of it where it says nothing."""
        count = len(batch["name"])
        start, total = batch.get("share", (0, count))
        return cls(int(start), count, int(total))

    def cut(self, drawn: Tensor) -> Tensor:
        """This process's rows of what was drawn for all, (total, ...) -> (count, ...)."""
        if self.count == self.total:
            return drawn
        start = self.start if self.start < self.total else 0
        return drawn[start : start + self.count]

    def weight(self, processes: int) -> float:
        """What this process's mean loss counts, so that the mean over processes is the mean over the batch."""
        return 0.0 if self.start >= self.total else self.count * processes / self.total


def dropout(x: Tensor, p: float, share: Share) -> Tensor:
    """Dropout whose mask is this process's part of the one that is drawn for the whole batch.

    Args:
        x: (k B, ...) for k rows a sample; or of B + 1 samples, the last of which is the same in every process (the
            empty caption).
        p: the share that is dropped, in [0, 1).
        share: this process's.
    """
    if share.count == share.total:
        return F.dropout(x, p)
    same = int(len(x) % share.count > 0 or (share.count == 1 and len(x) == 2))
    rows = len(x) // (share.count + same)
    mask = torch.empty((rows * (share.total + same), *x.shape[1:]), dtype=torch.bool, device=x.device)
    mask.bernoulli_(1 - p)
    start = rows * (share.start if share.start < share.total else 0)
    kept = mask[start : start + rows * share.count]
    if same:
        kept = torch.cat([kept, mask[rows * share.total :]])
    return x * kept * (1 / (1 - p))


class SharedDropout(nn.Dropout):
    """Dropout that knows the share of the batch; `share` is set before each step."""

    share: Share | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x with a part of its numbers set to zero."""
        if not self.training or self.share is None:
            return super().forward(x)
        return dropout(x, self.p, self.share)


def share_dropout(module: nn.Module) -> list[SharedDropout]:
    """Let a module's dropout layers draw for the whole batch; returns them."""
    dropouts = [part for part in module.modules() if type(part) is nn.Dropout and part.p > 0]
    for part in dropouts:
        part.__class__ = SharedDropout
    return [part for part in module.modules() if isinstance(part, SharedDropout)]
