"""The layers' weights in files, changed one by one: read, merged, counted, written; in parallel, in little memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from loratune.adapters.merge import Term, change_of, computed_in, rounded
from loratune.adapters.slots import Slot
from loratune.errors import UserError
from loratune.formats.files import DTYPES
from loratune.formats.streaming import Output, Range, Writer, without

MAX_WORKERS = 4
SPARE = 2  # buffers that wait to be written
KEPT = (32 << 20) - (1 << 16)  # bytes; glibc keeps no larger blocks
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SLACK = 1 + 2**-10  # for the float32 arithmetic before a rounding to 16 bits


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
    """

    layers: int = 0
    elements: int = 0
    unchanged: int = 0
    base: float = 0.0
    change: float = 0.0
    doubtful: int = 0
    bound: float = 0.0
    expected: float = 0.0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    @property
    def ratio(self) -> float:
        """||Delta W|| / ||W_0||."""
        return math.sqrt(self.change / self.base) if self.base else 0.0


def merged(w: Tensor, terms: Sequence[Term], exact: bool = False, unmerge: bool = False) -> tuple[Tensor, Tally]:
    """W_0 with the terms added, rounded once to its dtype, and what that did.

    Args:
        w: W_0, or the merged W whose terms (with their signs changed) are taken out again.
        terms: weights and layers, one or more.
        exact: compute in float64 instead of float32.
        unmerge: count how far the result may be from the W_0 that was merged.
    """
    start = w.to(computed_in(w.dtype, exact))
    change = change_of(start, terms)
    tally = Tally(1, w.numel(), base=_squares(start), change=_squares(change))
    if unmerge:
        total = start.double() + change
        new = rounded(total, w.dtype)
        tally.doubtful, tally.bound, tally.expected = left_over(w, total, new)
    else:
        total = start.add_(change) if start is not w else start + change
        new = rounded(total, w.dtype)
    tally.unchanged = w.numel() - _differing(new, w)
    return new, tally


def _differing(one: Tensor, other: Tensor) -> int:
    """How many elements are not the same bit for bit; numpy compares 16-bit numbers ten times as fast as torch."""
    kind = INTEGERS[one.element_size()]
    return int(np.count_nonzero(one.view(kind).numpy() != other.view(kind).numpy()))


def checked(
    w: Tensor, terms: Sequence[Term], where: str, exact: bool = False, unmerge: bool = False
) -> tuple[Tensor, Tally]:
    """As `merged`; `where` is the file and key of W_0, for messages.

    Raises:
        UserError: a value is not finite, or beyond what the dtype holds.
    """
    new, tally = merged(w, terms, exact, unmerge)
    most = math.sqrt(tally.base) + math.sqrt(tally.change)  # no element is larger; NaN is not less than anything
    if not most < torch.finfo(w.dtype).max and not _finite(new):
        if not _finite(w):
            raise UserError(f"{where} has values that are not finite; the base is damaged, download it again")
        told = f"values beyond {torch.finfo(w.dtype).max:g}, the most its dtype holds"
        raise UserError(f"{where} would get {told}; give a smaller weight")
    return new, tally


def _finite(values: Tensor) -> bool:
    wide = values.float() if values.element_size() == 1 else values
    low, high = torch.aminmax(wide)
    return math.isfinite(float(low)) and math.isfinite(float(high))


def _squares(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) ** 2


def left_over(merged_w: Tensor, total: Tensor, new: Tensor) -> tuple[int, float, float]:
    """How far an unmerged weight may be from the original one.

    The original was rounded to `merged_w` by half a unit in the last place at most, so it lies that near to
    `total` (the merged weight less the change, before rounding). Where no number of the dtype but `new` does, `new` is
    the original.

    Returns:
        The number of elements that may differ; the sum of the squares of the most that they can differ by; that of
        what they differ by on average, with rounding errors spread evenly.
    """
    unit = spacing(merged_w)
    reach = unit / 2 * SLACK
    held = new.double()
    off = (total - held).abs()
    info = torch.finfo(new.dtype)
    gap = spacing(held * (1 - info.eps / 4), new.dtype)  # below a power of two it is half of that above
    doubtful = off + reach >= gap
    most, mean = (off + reach).square(), off.square() + unit.square() / 12
    return int(doubtful.sum()), float(most[doubtful].sum()), float(mean[doubtful].sum())


def spacing(values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The unit in the last place of each value in its dtype (or the one given), as float64."""
    info = torch.finfo(dtype or values.dtype)
    exponent = torch.frexp(values.double()).exponent - 1
    smallest = math.log2(info.smallest_normal)
    return torch.ldexp(torch.tensor(info.eps, dtype=torch.float64), exponent.clamp_min(int(smallest)))


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
            if not DTYPES[slot.dtype].is_floating_point:
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
    buffers = Buffers(workers + SPARE)

    def one(patch: Patch) -> Tally:
        writer.check()
        return _apply(patch, outputs[patch.slot.file], writer, buffers, exact, unmerge)

    free = [patch for patch in made if not without([patch.range], withheld[patch.slot.file])]
    with _torch_for_workers():
        tallies = _parallel(one, free, workers)
        if copied := [patch for patch in made if patch.name not in tallies]:  # the guess from the keys missed these
            writer.wait()
            tallies |= _parallel(one, copied, workers)
    return {patch.name: tallies[patch.name] for patch in made}


class Buffers:
    """A few buffers that go round: memory asked for anew would be paged in anew."""

    def __init__(self, count: int) -> None:
        self._free: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(count):
            self.give(torch.empty(0, dtype=torch.uint8))

    def take(self, size: int) -> Tensor:
        """One of `size` bytes or more; waits until there is one."""
        held = self._free.get()
        return held if held.numel() >= size else torch.empty(size, dtype=torch.uint8)

    def give(self, buffer: Tensor) -> None:
        """It may be taken again."""
        self._free.put(buffer)


def _parallel(one: Callable[[Patch], Tally], made: Sequence[Patch], workers: int) -> dict[str, Tally]:
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(one, patch) for patch in made]
        wait(running, return_when=FIRST_EXCEPTION)
        for future in running:
            future.cancel()
    for future in running:
        if not future.cancelled():
            future.result()
    return {patch.name: future.result() for patch, future in zip(made, running, strict=True)}


@contextmanager
def _torch_for_workers() -> Iterator[None]:
    """torch with one thread for each operation (the operations are what runs in parallel), keeping freed memory.

    To free a large block once makes glibc keep blocks up to that size, instead of having each paged in anew.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.empty(KEPT, dtype=torch.uint8)  # freed at once
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _apply(patch: Patch, output: Output, writer: Writer, buffers: Buffers, exact: bool, unmerge: bool) -> Tally:
    slot, size = patch.slot, patch.slot.stop - patch.slot.start
    buffer = buffers.take(size)
    try:
        data = buffer[:size]
        output.read_into(slot.start, data.numpy().data)
        held = data.view(DTYPES[slot.dtype])
        w = held.reshape(slot.shape[::-1]).T.contiguous() if slot.transposed else held.reshape(slot.shape)
        new, tally = checked(w, patch.terms, f"{slot.file}: {slot.key!r}", exact, unmerge)
        held.copy_((new.T if slot.transposed else new).reshape(-1))
    except BaseException:
        buffers.give(buffer)
        raise
    writer.write(output, slot.start, data.numpy().data, lambda: buffers.give(buffer))
    return tally
