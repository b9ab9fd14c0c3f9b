"""A safetensors file made from another: what stays is copied by a thread or shared, the rest is written over it.

Without torch, so that copying begins before torch is loaded.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.formats.descriptors import BINARY, fcntl, read_at, read_into, write_at
from loratune.formats.headers import Header, header_bytes

Range = tuple[int, int]
"""Bytes [start, stop) of a file's data section."""

CHUNK = 64 << 20  # bytes copied at a time; the disk has nothing to do between two of them
BUFFER = 4 << 20  # bytes buffered where the system cannot copy by itself
BLOCK = 4096  # bytes; what file systems share is a multiple of it
FICLONERANGE = 0x4020940D  # ioctl_ficlonerange(2)
SYNC_FILE_RANGE_WRITE = 2
POPULATE_READ = 22  # madvise(2), Linux 5.14
# What copy_file_range says between file systems that it cannot join.
NO_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY)
# What direct writing says where the file system or the disk cannot, or the source cannot be mapped.
NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EFAULT, errno.ENODEV, errno.EACCES)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order, those that touch or overlap merged, empty ones left out."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def without(ranges: Iterable[Range], taken: Iterable[Range]) -> list[Range]:
    """What is in the ranges and not in those taken."""
    left: list[Range] = []
    holes = joined(taken)
    for start, stop in joined(ranges):
        for low, high in holes:
            if low < stop and high > start:
                left.append((start, low))
                start = high
        left.append((start, stop))
    return joined(left)


@dataclass(frozen=True)
class Output:
    """A file in the making.

    Args:
        source: descriptor of the file that it is made from.
        target: its own descriptor.
        begins: where the data section begins, in both, in bytes from the files' beginnings.
        length: of the data section, in bytes.
        shared: whether the file system shares the source's bytes, so that only what differs must be written.
        direct: the target's descriptor for writing past the page cache, None where that is not possible.
    """

    source: int
    target: int
    begins: tuple[int, int]
    length: int
    shared: bool
    direct: int | None = None

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill a buffer with the source's bytes from `start` of the data section."""
        done = 0
        while done < len(buffer):
            count = read_into(self.source, buffer[done:], self.begins[0] + start + done)
            if count == 0:
                raise _shorter()
            done += count

    def write(self, start: int, data: memoryview) -> None:
        """Write bytes at `start` of the data section, and have the disk begin with them."""
        done = 0
        while done < len(data):
            done += write_at(self.target, data[done:], self.begins[1] + start + done)
        start_writing(self.target, self.begins[1] + start, len(data))

    def copy(self, start: int, stop: int) -> int:
        """Copy bytes of the data section from the source; returns how many, at most CHUNK."""
        count = min(stop - start, CHUNK)
        old, at = self.begins[0] + start, self.begins[1] + start
        if self.direct is not None:
            if copied := _copy_blocks(self.source, self.direct, old, at, count):
                return copied
            count = min(count, -at % BLOCK or count)  # up to a block's beginning, from where blocks can be copied
        copied = _copy(self.source, self.target, old, at, count)
        start_writing(self.target, at, copied)
        return copied


@contextmanager
def opened(source: Path, header: Header, target: Path, metadata: dict[str, str]) -> Iterator[Output]:
    """A new file with a safetensors file's tensors and other metadata; its data section is still to be filled.

    The data section begins at the same place within a block as the source's (the header is padded with spaces), so
    that blocks can be shared.
    """
    head = header_bytes(header.tensors.items(), metadata)
    padding = (header.data_offset - len(head)) % BLOCK
    text = head[8:] + b" " * padding
    with _open(source, target, (header.data_offset, 8 + len(text)), header.size - header.data_offset) as output:
        _write_all(output.target, len(text).to_bytes(8, "little") + text)
        yield output


@contextmanager
def opened_copy(source: Path, target: Path) -> Iterator[Output]:
    """A new file that is to become a copy of any other; its data section is all of it."""
    with _open(source, target, (0, 0), source.stat().st_size) as output:
        yield output


@contextmanager
def _open(source: Path, target: Path, begins: tuple[int, int], length: int) -> Iterator[Output]:
    old = os.open(source, os.O_RDONLY | BINARY)
    try:
        new = os.open(target, os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY, 0o666)
        try:
            shared = _share(old, new, begins, length)
            with _direct(target, begins) as direct:
                if not shared:
                    os.ftruncate(new, begins[1] + length)
                yield Output(old, new, begins, length, shared, direct)
        finally:
            os.close(new)
    finally:
        os.close(old)


def _share(source: int, target: int, begins: tuple[int, int], length: int) -> bool:
    """Have the target share the source's blocks, where the file system can; False where it cannot."""
    ahead = begins[0] % BLOCK  # bytes of the data section's first block that are the header's
    order = struct.pack("qQQQ", source, begins[0] - ahead, 0, begins[1] - ahead)  # 0: up to the source's end
    if not length or fcntl is None:
        return False
    try:
        fcntl.ioctl(target, FICLONERANGE, order)
    except OSError:
        return False
    return os.fstat(target).st_size == begins[1] + length


@contextmanager
def _direct(target: Path, begins: tuple[int, int]) -> Iterator[int | None]:
    """The file opened for writing past the page cache, None where it cannot be or the blocks are not alike."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or (begins[0] - begins[1]) % BLOCK:
        yield None
        return
    try:
        opened = os.open(target, os.O_WRONLY | flag)
    except OSError:
        yield None
        return
    try:
        yield opened
    finally:
        os.close(opened)


def _copy_blocks(source: int, target: int, start: int, at: int, count: int) -> int:
    """Have the disk fetch whole blocks from the source's own pages; returns the bytes copied, 0 if it cannot be so.

    A copy through the page cache moves each byte twice and pages in as much memory as it writes, which takes longer
    than the disk does. The mapped pages are never touched here, so a source that shrinks is an error and no signal.
    """
    count -= count % BLOCK
    if at % BLOCK or not count:
        return 0
    ahead = start % mmap.ALLOCATIONGRANULARITY
    try:
        with mmap.mmap(source, ahead + count, mmap.MAP_SHARED, mmap.PROT_READ, offset=start - ahead) as pages:
            with suppress(OSError, ValueError):
                pages.madvise(POPULATE_READ)
            with memoryview(pages) as view, view[ahead:] as data:
                copied = write_at(target, data, at)
    except ValueError as error:  # the source is shorter than what is to be mapped
        raise _shorter() from error
    except OSError as error:
        if error.errno not in NO_DIRECT:
            raise
        return 0
    return copied - copied % BLOCK


def _write_all(target: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += write_at(target, data[done:], done)


def _copy(source: int, target: int, start: int, at: int, count: int) -> int:
    if hasattr(os, "copy_file_range"):
        try:
            if copied := os.copy_file_range(source, target, count, start, at):
                return copied
        except OSError as error:
            if error.errno not in NO_COPY:
                raise
    data = read_at(source, min(count, BUFFER), start)
    if not data:
        raise _shorter()
    return write_at(target, data, at)


def _shorter() -> OSError:
    return OSError(errno.EIO, "the source became shorter while it was read")


@cache
def _sync_file_range() -> Callable[[int, int, int, int], Any] | None:
    try:
        call = ctypes.CDLL(None).sync_file_range
    except (AttributeError, OSError):
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call  # type: ignore[no-any-return]


def start_writing(target: int, start: int, count: int) -> None:
    """Have the disk begin to write part of a file, so that fsync has little to wait for; does nothing where unknown."""
    if (call := _sync_file_range()) is not None:
        call(target, start, count, SYNC_FILE_RANGE_WRITE)


class Writer:
    """The one thread that writes: data that it is handed, and else ranges copied from the sources, in their order.

    One, as file systems let one thread at a time write to a file, and those that wait for it burn time.

    As a context it is waited for at the end, and stopped when anything failed.

    Args:
        progress: called with the bytes just written.
    """

    def __init__(self, progress: Callable[[int], None] = lambda count: None) -> None:
        self._progress = progress
        self._handed: deque[tuple[Output, int, memoryview, Callable[[], None]]] = deque()
        self._copies: deque[tuple[Output, int, int]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        with self._changed:
            self._closed = True
            if kind is not None:
                self._handed.clear()
                self._copies.clear()
            self._changed.notify_all()
        self._thread.join()
        if kind is None:
            self.check()

    def copy(self, output: Output, ranges: Iterable[Range]) -> None:
        """Copy these from the output's source; nothing is done where the file shares its bytes."""
        if not output.shared:
            with self._changed:
                self._copies.extend((output, *bounds) for bounds in ranges)
                self._changed.notify_all()

    def write(self, output: Output, start: int, data: memoryview, done: Callable[[], None]) -> None:
        """Write data at `start` of the data section before all copies that wait; `done` is called after."""
        with self._changed:
            self._handed.append((output, start, data, done))
            self._changed.notify_all()

    def wait(self) -> None:
        """Wait until everything handed over so far is written.

        Raises:
            OSError: it could not be.
        """
        with self._changed:
            while self._handed or self._copies or self._busy:
                self._changed.wait()
        self.check()

    def check(self) -> None:
        """Raise the error of the writing thread, if there was one."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (step := self._next()) is not None:
            try:
                self._progress(step())
            except BaseException as error:  # raised in the thread that waits
                self._error = error
            with self._changed:
                self._busy = False
                if self._error is not None:
                    self._copies.clear()
                self._changed.notify_all()

    def _next(self) -> Callable[[], int] | None:
        """What to do next; None for nothing any more."""
        with self._changed:
            while not (self._handed or self._copies or self._closed):
                self._changed.wait()
            self._busy = True
            if self._handed:
                return partial(self._write, *self._handed.popleft())
            return partial(self._copy, *self._copies.popleft()) if self._copies else None

    def _write(self, output: Output, start: int, data: memoryview, done: Callable[[], None]) -> int:
        try:
            if self._error is None:
                output.write(start, data)
        finally:
            done()
        return len(data)

    def _copy(self, output: Output, start: int, stop: int) -> int:
        copied = output.copy(start, stop)
        if start + copied < stop:
            with self._changed:
                self._copies.appendleft((output, start + copied, stop))
        return copied


def check_space(folder: Path, needed: int, what: Path) -> None:
    """Check that a file system has room.

    Args:
        folder: on it; it exists.
        needed: in bytes.
        what: is to be written, for the message.

    Raises:
        UserError: it has not.
    """
    with suppress(OSError):
        free = shutil.disk_usage(folder).free
        if free < needed:
            room = f"needs {needed / 1e9:.2f} GB and there are {free / 1e9:.2f} GB free"
            raise UserError(f"{what}: {room}; make room, or give another place")
