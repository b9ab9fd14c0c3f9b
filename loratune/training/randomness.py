"""Random numbers that depend on where the run is, and on nothing that came before."""

from __future__ import annotations

import hashlib

import torch


def generator(device: torch.device | str, *place: int | str) -> torch.Generator:
    """A generator seeded by its place in the run: (seed, stage, epoch, batch, rank, ...).

    The same place gives the same numbers whatever ran before it, so a resumed run needs no
    generator's state, and validation noise is the same in every epoch.
    """
    digest = hashlib.sha256("/".join(map(str, place)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
