"""W' = W_0 + sum_i w_i (alpha_i / r_i) B_i A_i (Hu 2021, section 4.1), rounded once; here and nowhere else.

In numpy, a block of rows at a time that stays in a processor's own cache; of float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from loratune.errors import UserError
from loratune.formats.numbers import FLOATS, Array, Bytes, narrowed, spacing, too_large, widened
from loratune.lora.kinds.layer import LowRank, Rows

BLOCK = 1 << 16  # elements merged at a time; a handful of such arrays stay in a processor's own cache
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SLACK = 1 + 2**-10  # for the float32 arithmetic before a rounding to 16 bits

Term = tuple[float, LowRank]
"""A weight, and a layer whose tensors are `Stored`."""


@dataclass
class Tally:
    """What merging did, summed over layers.

    Args:
        layers: how many.
        elements: of their weights.
        unchanged: elements that rounding left as they were.
        base: ||W_0||^2.
        change: ||Delta W||^2, before rounding.
        doubtful: elements that may not be W_0's own after `--unmerge`.
        bound: the most that ||W - W_0||^2 can be then.
        expected: what it is, were rounding errors uniform.
        damaged: elements of W_0 that are not finite.
        beyond: elements of the result that are not.
    """

    layers: int = 0
    elements: int = 0
    unchanged: int = 0
    base: float = 0.0
    change: float = 0.0
    doubtful: int = 0
    bound: float = 0.0
    expected: float = 0.0
    damaged: int = 0
    beyond: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def ratio(self) -> float:
        """||Delta W|| / ||W_0||."""
        return math.sqrt(self.change / self.base) if self.base else 0.0


def computed_in(dtype: str, exact: bool) -> Any:
    """numpy's kind of the arithmetic for weights of a file's dtype."""
    return np.float64 if exact or dtype == "F64" else np.float32


def merged(
    raw: Bytes, dtype: str, shape: Sequence[int], terms: Sequence[Term], exact: bool = False, unmerge: bool = False
) -> Tally:
    """Add the terms to W_0 in its place, each sum rounded once to its dtype; returns what that did.

    Args:
        raw: W_0's bytes, or those of the merged W whose terms (with their signs changed) are taken out again.
        dtype: of them, as safetensors names it.
        shape: of W_0, (out, ...).
        terms: weights and layers, one or more.
        exact: compute in float64 instead of float32.
        unmerge: count how far the result may be from the W_0 that was merged.
    """
    kind, columns = computed_in(dtype, exact), math.prod(shape[1:])
    lines = raw.reshape(shape[0], -1)
    with np.errstate(over="ignore", invalid="ignore"):
        changes = [(weight, _rows(layer, raw, dtype, shape, kind)) for weight, layer in terms]
        tally, step = Tally(layers=1), max(1, BLOCK // columns)
        for start in range(0, shape[0], step):
            rows = slice(start, start + step)
            tally += _add(lines[rows].reshape(-1), dtype, kind, _sum(changes, rows), unmerge)
    return tally


def _rows(layer: LowRank, raw: Bytes, dtype: str, shape: Sequence[int], kind: Any) -> Rows:
    """What a layer adds to some rows of W_0 flattened to (out, in k k), at weight 1."""
    if layer.magnitude is None:
        return layer.rows(kind)
    change: Array = layer.change(widened(raw, dtype, kind).reshape(shape))
    return lambda rows: change.reshape(shape[0], -1)[rows]


def _sum(changes: Sequence[tuple[float, Rows]], rows: slice) -> Array:
    """sum_i w_i Delta W_i of some rows."""
    total: Array | None = None
    for weight, change in changes:
        delta = change(rows)
        scaled = delta if weight == 1 else delta * weight
        total = scaled if total is None else total + scaled
    assert total is not None
    return total.reshape(-1)


def _add(raw: Bytes, dtype: str, kind: Any, change: Array, unmerge: bool) -> Tally:
    """Add to part of a weight in its place; the part is counted as no layer."""
    w = widened(raw, dtype, kind)
    tally = Tally(0, w.size, base=float(np.vdot(w, w)), change=float(np.vdot(change, change)))
    if unmerge:
        total = w.astype(np.float64) + change
        new = narrowed(total, dtype)
        tally.doubtful, tally.bound, tally.expected = left_over(w, total, new, dtype)
    else:
        total = np.add(w, change)
        new = narrowed(total, dtype)
    # No element is larger than the norms together; NaN is not less than anything.
    if not math.sqrt(tally.base) + math.sqrt(tally.change) < FLOATS[dtype].largest:
        tally.damaged, tally.beyond = _not_finite(w), too_large(total, dtype)
    integers = INTEGERS[len(raw) // max(1, w.size)]
    tally.unchanged = w.size - int(np.count_nonzero(new.view(integers) != raw.view(integers)))
    raw[:] = new
    return tally


def _not_finite(values: Array) -> int:
    return values.size - int(np.count_nonzero(np.isfinite(values)))


def checked(
    raw: Bytes,
    dtype: str,
    shape: Sequence[int],
    terms: Sequence[Term],
    where: str,
    exact: bool = False,
    unmerge: bool = False,
) -> Tally:
    """As `merged`; `where` is the file and key of W_0, for messages.

    Raises:
        UserError: a value is not finite, or beyond what the dtype holds.
    """
    tally = merged(raw, dtype, shape, terms, exact, unmerge)
    if tally.damaged:
        raise UserError(f"{where} has values that are not finite; the base is damaged, download it again")
    if tally.beyond:
        excess = f"values beyond {FLOATS[dtype].largest:g}, the most its dtype holds"
        raise UserError(f"{where} would get {excess}; give a smaller weight")
    return tally


def left_over(merged_w: Array, total: Array, new: Bytes, dtype: str) -> tuple[int, float, float]:
    """How far an unmerged weight may be from the original one.

    The original was rounded to `merged_w` by half a unit in the last place at most, so it lies that near to
    `total` (the merged weight less the change, before rounding). Where no number of the dtype but `new` does, `new` is
    the original.

    Returns:
        The number of elements that may differ; the sum of the squares of the most that they can differ by; that of
        what they differ by on average, with rounding errors spread evenly.
    """
    unit = spacing(merged_w, dtype)
    reach = unit / 2 * SLACK
    rounded = widened(new, dtype, np.float64)
    off = np.abs(total - rounded)
    gap = spacing(rounded * (1 - FLOATS[dtype].eps / 4), dtype)  # below a power of two it is half of that above
    doubtful = off + reach >= gap
    most, mean = (off + reach) ** 2, off**2 + unit**2 / 12
    return int(doubtful.sum()), float(most[doubtful].sum()), float(mean[doubtful].sum())
