"""Weights that are cut over several devices (torch's DTensor), and all of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_cut(value: Any) -> bool:
    """Whether a tensor is one process's part of it; without importing what makes such tensors, which takes a second."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """All of a tensor; where it is cut, every process has to ask for it."""
    cut: Any = value.detach()
    full: Tensor = cut.full_tensor() if is_cut(cut) else value
    return full


def cut_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on the device of another, and cut where that one is."""
    value = value.to(like.device)
    if not is_cut(like) or is_cut(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    target: Any = like
    part: Tensor = distribute_tensor(value, target.device_mesh, target.placements)
    return part
