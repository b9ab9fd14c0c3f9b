"""What differs between operating systems works without what Windows lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from loratune.errors import UserError
from loratune.formats import descriptors
from loratune.formats.descriptors import read_at, try_lock, write_at
from loratune.runs.folder import LOCK, give_back, take

TAKE = "import sys; from pathlib import Path; from loratune.runs.folder import take; take(Path(sys.argv[1])); {then}"
HIDDEN = """
import importlib, os, pkgutil, sys, types
import accelerate, datasets, diffusers, lightning, peft, torch, transformers  # theirs may need it
from lightning.pytorch import cli, loggers, strategies
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.ModuleType("msvcrt")
for name in ("pread", "pwrite", "preadv", "copy_file_range", "O_DIRECT", "O_NOFOLLOW"):
    if hasattr(os, name):
        delattr(os, name)
import loratune
for module in pkgutil.walk_packages(loratune.__path__, "loratune."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize("system", ["posix", "windows"])
def test_bytes_at_a_place(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "windows":
        monkeypatch.delattr(os, "pread")
        monkeypatch.delattr(os, "pwrite")
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert write_at(descriptor, b"abcdef", 2) == 6
    assert write_at(descriptor, memoryview(b"X"), 4) == 1
    assert read_at(descriptor, 3, 3) == b"bXd"
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"\0\0abXdef"


@pytest.mark.parametrize("free", [True, False])
def test_windows_locks_a_byte_past_the_text(free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []

    def locking(descriptor: int, mode: str, count: int) -> None:
        places.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if not free:
            raise OSError

    msvcrt = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK = locking, "not blocking"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    monkeypatch.setattr(descriptors, "fcntl", None)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    assert try_lock(descriptor) is free
    assert places == [(descriptors.LOCKED_BYTE, "not blocking", 1)]
    os.close(descriptor)


def test_another_process_is_refused(tmp_path: Path) -> None:
    take(tmp_path / "run")
    try:
        code = TAKE.format(then="")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
        assert f"a run is under way there (process {os.getpid()}" in done.stderr
    finally:
        give_back()
    assert subprocess.run([sys.executable, "-c", TAKE.format(then=""), str(tmp_path / "run")]).returncode == 0


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: is a symbolic link"):
        take(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "precious"


def test_every_module_is_imported_without_fcntl() -> None:
    done = subprocess.run([sys.executable, "-c", HIDDEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
