"""Random numbers that depend on where the run is, and on nothing that came before."""

from __future__ import annotations

import hashlib
import os

import torch


def generator(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A generator seeded by its place in the run: (seed, stage, epoch, batch, rank, ...).

    The same place gives the same numbers whatever ran before it, so a resumed run needs no
    generator's state, and validation noise is the same in every epoch.
    """
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def training_generator(device: torch.device | str, step: int, part: int, rank: int) -> torch.Generator:
    """The generator of a training step, seeded by the run's seed.

    Args:
        device: where the numbers are drawn.
        step: optimizer steps done.
        part: number of the batch within the step, where gradients are accumulated.
        rank: of the process.
    """
    return generator(device, os.environ.get("PL_GLOBAL_SEED", "0"), "train", step, part, rank)
