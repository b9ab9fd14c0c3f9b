"""The layers' weights in files, changed one by one: read, merged, counted, written; in parallel, in little memory."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loratune.errors import UserError
from loratune.families.slots import Slot
from loratune.formats.numbers import FLOATS, Bytes
from loratune.formats.streaming import Output, Range, Writer, without
from loratune.lora.merge.arithmetic import Tally, Term, checked

MAX_WORKERS = 4
WAITING = 128 << 20  # bytes of weights that are merged, or wait to be written
KEPT = (32 << 20) - (1 << 16)  # bytes; glibc keeps no larger blocks


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
    planned = []
    for name, some in terms.items():
        if some := [(weight, layer) for weight, layer in some if weight]:
            slot = slots[name]
            if slot.dtype not in FLOATS:
                raise UserError(f"{slot.file}: {slot.key!r} is {slot.dtype}, which nothing can be added to")
            planned.append(Patch(name, slot, some))
    return sorted(planned, key=lambda patch: (patch.slot.file, patch.slot.start))


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
    # Freed at once: that makes glibc keep blocks up to that size, instead of having each paged in anew.
    np.empty(KEPT, np.uint8)
    tallies = _parallel(one, free, workers)
    if copied := [patch for patch in made if patch.name not in tallies]:  # these were not withheld
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
            while (buffer := self._fitting(size)) is None:
                self._changed.wait()
            self._taken += 1
            return buffer

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
