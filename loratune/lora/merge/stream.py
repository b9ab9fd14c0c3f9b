"""The layers' weights in files, changed one by one: read, merged, counted, written; in parallel, in little memory.

In numpy, a block of rows at a time that stays in a processor's own cache. torch is loaded for what is no plain LoRA.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loratune.errors import UserError
from loratune.families.slots import Slot
from loratune.formats.numbers import FLOATS, Array, Bytes, narrowed, spacing, too_large, widened
from loratune.formats.streaming import Output, Range, Writer, without
from loratune.lora.plain import PlainLayer

if TYPE_CHECKING:
    from loratune.lora.layers import LowRank

MAX_WORKERS = 4
WAITING = 128 << 20  # bytes of weights that are merged, or wait to be written
KEPT = (32 << 20) - (1 << 16)  # bytes; glibc keeps no larger blocks
BLOCK = 1 << 16  # elements merged at a time; a handful of such arrays stay in a processor's own cache
INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SLACK = 1 + 2**-10  # for the float32 arithmetic before a rounding to 16 bits

Term = tuple[float, "PlainLayer | LowRank"]
Rows = Callable[[slice], Array]
"""What a layer adds to some rows of W_0 flattened to (out, in k k), at weight 1."""


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


def _rows(layer: PlainLayer | LowRank, raw: Bytes, dtype: str, shape: Sequence[int], kind: Any) -> Rows:
    if isinstance(layer, PlainLayer):
        b, a = layer.factors(kind)
        return lambda rows: b[rows] @ a
    import torch

    with torch.no_grad():
        change: Array = layer.change(torch.from_numpy(widened(raw, dtype, kind).reshape(shape))).numpy()
    return lambda rows: change.reshape(shape[0], -1)[rows]


def _sum(changes: Sequence[tuple[float, Rows]], rows: slice) -> Array:
    """sum_i w_i Delta W_i of some rows."""
    total: Array | None = None
    for weight, change in changes:
        one = change(rows)
        scaled = one if weight == 1 else one * weight
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
        told = f"values beyond {FLOATS[dtype].largest:g}, the most its dtype holds"
        raise UserError(f"{where} would get {told}; give a smaller weight")
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
    held = widened(new, dtype, np.float64)
    off = np.abs(total - held)
    gap = spacing(held * (1 - FLOATS[dtype].eps / 4), dtype)  # below a power of two it is half of that above
    doubtful = off + reach >= gap
    most, mean = (off + reach) ** 2, off**2 + unit**2 / 12
    return int(doubtful.sum()), float(most[doubtful].sum()), float(mean[doubtful].sum())


@dataclass(frozen=True)
class Patch:
    """A layer's weight and what is added to it.

    Args:
        name: canonical.
        slot: where it lies.
        terms: weights and layers; none of the weights is 0.
    """

    name: str
    slot: Slot
    terms: Sequence[Term]

    @property
    def range(self) -> Range:
        """Its bytes in the data section."""
        return self.slot.start, self.slot.stop


def patches(slots: Mapping[str, Slot], terms: Mapping[str, Sequence[Term]]) -> list[Patch]:
    """What is to be changed, in the files' order; layers whose weights are all 0 are left out.

    Raises:
        UserError: a tensor is of a dtype that holds no fractions.
    """
    made = []
    for name, some in terms.items():
        if some := [(weight, layer) for weight, layer in some if weight]:
            slot = slots[name]
            if slot.dtype not in FLOATS:
                raise UserError(f"{slot.file}: {slot.key!r} is {slot.dtype}, which nothing can be added to")
            made.append(Patch(name, slot, some))
    return sorted(made, key=lambda patch: (patch.slot.file, patch.slot.start))


def apply(
    made: Sequence[Patch],
    outputs: Mapping[Path, Output],
    writer: Writer,
    withheld: Mapping[Path, Sequence[Range]],
    exact: bool = False,
    unmerge: bool = False,
) -> dict[str, Tally]:
    """Merge into outputs whose other bytes a thread copies.

    Args:
        made: the changes.
        outputs: by source file.
        writer: what copies, and writes.
        withheld: the bytes that it was not given yet, by source file; those that do not change are given to it.
        exact: compute in float64.
        unmerge: the terms are taken out, so count what may be left of them.

    Returns:
        What was done by canonical name.
    """
    for file, output in outputs.items():
        writer.copy(output, without(withheld[file], [patch.range for patch in made if patch.slot.file == file]))
    workers = min(MAX_WORKERS, os.cpu_count() or 1)  # the writer mostly waits for the disk
    buffers = Buffers(WAITING)

    def one(patch: Patch) -> Tally:
        writer.check()
        return _apply(patch, outputs[patch.slot.file], writer, buffers, exact, unmerge)

    free = [patch for patch in made if not without([patch.range], withheld[patch.slot.file])]
    with _memory_for_workers(made):
        tallies = _parallel(one, free, workers)
        if copied := [patch for patch in made if patch.name not in tallies]:  # the guess from the keys missed these
            writer.wait()
            tallies |= _parallel(one, copied, workers)
    return {patch.name: tallies[patch.name] for patch in made}


class Buffers:
    """Buffers that go round: memory asked for anew would be paged in anew.

    Args:
        most: the bytes of all of them; of a larger one there is one at a time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0  # bytes, those of free ones included
        self._taken = 0  # buffers
        self._free: list[Bytes] = []
        self._changed = threading.Condition()

    def take(self, size: int) -> Bytes:
        """One of `size` bytes or more; waits until there is one."""
        with self._changed:
            while (found := self._fitting(size)) is None:
                self._changed.wait()
            self._taken += 1
            return found

    def _fitting(self, size: int) -> Bytes | None:
        self._free.sort(key=len)
        for number, buffer in enumerate(self._free):
            if len(buffer) >= size:
                return self._free.pop(number)
        while self._free and self._held + size > self._most:
            self._held -= len(self._free.pop(0))
        if self._held + size > self._most and self._taken:
            return None
        self._held += size
        return np.empty(size, np.uint8)

    def give(self, buffer: Bytes) -> None:
        """It may be taken again."""
        with self._changed:
            self._taken -= 1
            self._free.append(buffer)
            self._changed.notify_all()


def _parallel(one: Callable[[Patch], Tally], made: Sequence[Patch], workers: int) -> dict[str, Tally]:
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(one, patch) for patch in made]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            for future in running:
                future.cancel()
    for future in running:
        if not future.cancelled():
            future.result()
    return {patch.name: future.result() for patch, future in zip(made, running, strict=True)}


@contextmanager
def _memory_for_workers(made: Sequence[Patch]) -> Iterator[None]:
    """Freed memory is kept, and torch, where it is needed, runs each operation in one thread: the layers are parallel.

    To free a large block once makes glibc keep blocks up to that size, instead of having each paged in anew.
    """
    np.empty(KEPT, np.uint8)  # freed at once
    if all(isinstance(layer, PlainLayer) for patch in made for _, layer in patch.terms):
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _apply(patch: Patch, output: Output, writer: Writer, buffers: Buffers, exact: bool, unmerge: bool) -> Tally:
    slot, size = patch.slot, patch.slot.stop - patch.slot.start
    buffer = buffers.take(size)
    try:
        data = buffer[:size]
        output.read_into(slot.start, data.data)
        raw = turned(data, slot.shape[::-1]) if slot.transposed else data
        tally = checked(raw, slot.dtype, slot.shape, patch.terms, f"{slot.file}: {slot.key!r}", exact, unmerge)
        if slot.transposed:
            data[:] = turned(raw, slot.shape)
    except BaseException:
        buffers.give(buffer)
        raise
    writer.write(output, slot.start, data.data, lambda: buffers.give(buffer))
    return tally


def turned(raw: Bytes, shape: Sequence[int]) -> Bytes:
    """The bytes of a matrix of this shape with rows and columns changed."""
    return raw.reshape(*shape, -1).transpose(1, 0, 2).reshape(-1)
