"""Files and folders that appear whole or not at all; without torch."""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loratune.errors import UnwritableError, UserError

log = logging.getLogger(__name__)

RENAME_EXCHANGE = 2  # renameat2(2), Linux
AT_FDCWD = -100


@contextmanager
def atomic_path(path: Path | str, durable: bool = True) -> Iterator[Path]:
    """A temporary path in the same folder: moved to `path` when all went well, deleted when anything did not.

    What a killed process left for the same path is removed first.

    Args:
        path: of the file.
        durable: wait until it is on the disk (fsync). Without that a power failure, though no killed process, may leave
            an empty file; for files that are checked when read, and can be made again.

    Raises:
        UserError: the place cannot be written to.
    """
    path = Path(path)
    temporary = _temporary(path)
    with _removed_on_failure(path, temporary):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)


@contextmanager
def atomic_folder(path: Path | str, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path`: moved there when all went well, deleted when anything did not.

    What a killed process left for the same path is removed first.

    Args:
        path: of the folder.
        replace: take the place of a folder that is there; it is gone when the new one is whole.

    Raises:
        UserError: `path` exists and is no empty folder, or the place cannot be written to.
    """
    path = Path(path)
    full = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if full and not (replace and path.is_dir()):
        raise UserError(f"{path}: exists and is not an empty folder; give another name, or remove it first")
    temporary = _temporary(path)
    with _removed_on_failure(path, temporary):
        temporary.mkdir(parents=True)
        remove_leftovers(path)
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        if full:
            _exchange(temporary, path)
        else:
            os.replace(temporary, path)
        _sync(path.parent)
    if full:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files and folders for `path` of this machine's processes that have ended."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{re.escape(_host())}\.(\d+)\.[0-9a-f]+\.tmp")
    for entry in path.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match and not _alive(int(match[1])):
            _delete(entry)


def _temporary(path: Path) -> Path:
    """A name that begins with a dot and tells whose it is."""
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{secrets.token_hex(6)}.tmp")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:20]


def _alive(process: int) -> bool:
    import psutil

    return bool(psutil.pid_exists(process))


@contextmanager
def _removed_on_failure(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _delete(temporary)
        if isinstance(error, OSError):
            raise UnwritableError(f"{path}: cannot be written ({error}); make room, or give another place") from error
        raise


@contextmanager
def tolerated(path: Path | str) -> Iterator[None]:
    """Within it a file that cannot be written is said, and training goes on without it."""
    try:
        yield
    except (OSError, UnwritableError) as error:
        reason = " ".join(str(error).split()).removeprefix(f"{path}: ")
        log.warning("%s: not written (%s); training goes on", path, reason)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _exchange(path: Path, other: Path) -> None:
    """Change the names of two folders with each other, in one step where the system can."""
    with suppress(AttributeError):
        call = ctypes.CDLL(None).renameat2
        if call(AT_FDCWD, os.fsencode(path), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
            return
    aside = other.with_name(f"{other.name}.before-{secrets.token_hex(6)}")  # no leftover: it may be the only copy
    os.replace(other, aside)
    try:
        os.replace(path, other)
    except OSError:
        os.replace(aside, other)
        raise
    os.replace(aside, path)


def _sync(path: Path) -> None:
    if os.name == "nt":  # there a folder cannot be opened, and a file only for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
