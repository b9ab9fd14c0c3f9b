"""Weights that are cut over several devices, and all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """All of a tensor; where it is cut, every process has to ask for it."""
    cut: Any = value.detach()
    made: Tensor = cut.full_tensor() if isinstance(value, DTensor) else value
    return made


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and cut where that one is."""
    value = value.to(like.device)
    if not isinstance(like, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements)
