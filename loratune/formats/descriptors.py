"""File descriptors where operating systems differ: Windows has no fcntl, no pread and no pwrite."""

from __future__ import annotations

import os
import threading
from typing import Any

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    fcntl: Any = None
else:
    fcntl = _fcntl

BINARY = getattr(os, "O_BINARY", 0)
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
"""Flags of os.open: bytes as they are; an error for a symbolic link. 0 where a system does not know them."""
LOCKED_BYTE = 1 << 30
"""Where msvcrt locks a file: past its text, which stays readable for others."""
_seeking = threading.Lock()


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """At most `count` bytes of a file from a place on; another thread may read the same file."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
    """Fill a buffer with a file's bytes from a place on; returns how many there were."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [buffer], offset)
    data = read_at(descriptor, len(buffer), offset)
    buffer[: len(data)] = data
    return len(data)


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> int:
    """Write bytes to a place of a file; returns how many were."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.write(descriptor, data)


def try_lock(descriptor: int) -> bool:
    """Lock a file for this process until its descriptor is closed; False where another process has it.

    A record lock (POSIX): unlike flock's it is not inherited by the processes that load batches, so a killed run's
    folder is free at once, and it works on network file systems. On Windows, msvcrt's.
    """
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            windows: Any = msvcrt
            with _seeking:
                os.lseek(descriptor, LOCKED_BYTE, os.SEEK_SET)
                windows.locking(descriptor, windows.LK_NBLCK, 1)
    except OSError:
        return False
    return True
