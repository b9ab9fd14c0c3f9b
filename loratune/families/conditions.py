"""Conditions of several captions as one batch; those of unequal length are padded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from loratune.families.family import Condition


def padded(tensors: Sequence[Tensor], dim: int) -> list[Tensor]:
    """Tensors of one length along a dimension, with zeros (false) at the end of the shorter ones."""
    longest = max(tensor.shape[dim] for tensor in tensors) if tensors[0].ndim > dim else 0
    return [
        tensor if tensor.ndim <= dim or tensor.shape[dim] == longest else _longer(tensor, dim, longest)
        for tensor in tensors
    ]


def _longer(tensor: Tensor, dim: int, length: int) -> Tensor:
    after = [0, 0] * (tensor.ndim - dim - 1)
    return pad(tensor, (*after, 0, length - tensor.shape[dim]))


def stack_conditions(parts: Sequence[Condition]) -> Condition:
    """Conditions of one caption each, without batch, as one batch."""
    return {name: torch.stack(padded([part[name] for part in parts], 0)) for name in parts[0]}


def join_conditions(parts: Sequence[Condition]) -> Condition:
    """Several conditions as one batch."""
    return {name: torch.cat(padded([part[name] for part in parts], 1)) for name in parts[0]}


def repeat_condition(condition: Condition, count: int) -> Condition:
    """A condition of batch 1, for a batch of `count`."""
    return {name: value.expand(count, *value.shape[1:]) for name, value in condition.items()}


def choose_condition(chosen: Tensor, substitute: Condition, other: Condition) -> Condition:
    """A condition of batch 1 where `chosen` (B,) is true, and the first B of another where it is not."""
    count, mixed = len(chosen), {}
    for name, value in other.items():
        first, rest = padded([substitute[name].to(value), value[:count]], 1)
        mixed[name] = torch.where(chosen.view(-1, *[1] * (value.ndim - 1)), first, rest)
    return mixed
