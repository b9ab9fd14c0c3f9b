"""Which parts of an image look at which word: cross-attention, recorded while a network draws (Hertz 2022)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class Maps:
    """Cross-attention as it was seen: of each number of places its sum over calls, (L, S) for the first `rows` rows.

    Args:
        rows: of each batch, from the first on; of guided drawing the rows with the prompt.
    """

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def add(self, seen: Tensor) -> None:
        """Add a layer's attention (B, heads, L, S)."""
        mean = seen[: self.rows].float().mean((0, 1)).cpu()
        places = mean.shape[0]
        self.sums[places] = self.sums.get(places, torch.zeros_like(mean)) + mean
        self.counts[places] = self.counts.get(places, 0) + 1

    def tokens(self, side: int) -> Tensor:
        """The mean over layers and calls for each token, (S, side, side); square images only."""
        layers = []
        for places, total in self.sums.items():
            own = math.isqrt(places)
            if own * own == places:
                maps = (total / self.counts[places]).T.unflatten(1, (own, own))
                layers.append((self.counts[places], _resized(maps, side)))
        weight = sum(count for count, _ in layers)
        return torch.stack([count / weight * maps for count, maps in layers]).sum(0)


def _resized(maps: Tensor, side: int) -> Tensor:
    return F.interpolate(maps[None], (side, side), mode="bilinear", align_corners=False)[0]


class _Recording:
    """An attention processor that lets another one work, and keeps what the queries see."""

    def __init__(self, before: Any, maps: Maps) -> None:
        self.before, self.maps = before, maps

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None and hidden_states.dim() == 3:
            q, k = attn.to_q(hidden_states), attn.to_k(encoder_hidden_states)
            q, k = (projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float() for projected in (q, k))
            self.maps.add((q @ k.transpose(-1, -2) * attn.scale).softmax(-1))
        hidden: Tensor = self.before(attn, hidden_states, encoder_hidden_states, attention_mask, **more)
        return hidden


@contextmanager
def recorded(network: Any, rows: int = 1) -> Iterator[Maps]:
    """Within it a diffusers U-Net's cross-attention is recorded; afterwards its processors are the ones it had."""
    before, maps = dict(network.attn_processors), Maps(rows)
    network.set_attn_processor({name: _Recording(processor, maps) for name, processor in before.items()})
    try:
        yield maps
    finally:
        network.set_attn_processor(before)


def shares(maps: Tensor, words: Sequence[tuple[str, Sequence[int]]]) -> Tensor:
    """What each word has of all that is seen of words, at each place: (words, h, w), which add up to 1.

    Args:
        maps: of each token, (S, h, w).
        words: and the numbers of their tokens.
    """
    of_words = torch.stack([maps[list(places)].sum(0) for _, places in words])
    return of_words / of_words.sum(0, keepdim=True).clamp_min(1e-12)
