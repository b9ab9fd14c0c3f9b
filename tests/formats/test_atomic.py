"""Files and folders appear whole or not at all, and what a killed process left is removed by the next."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.errors import UserError
from loratune.formats import atomic
from loratune.formats.atomic import atomic_folder, atomic_path, remove_leftovers


def left(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def test_leftovers_of_ended_processes_are_removed_and_nothing_else(tmp_path: Path, ended: int) -> None:
    host = atomic._host()
    gone = [f".a.safetensors.{host}.{ended}.0123456789ab.tmp", f".a.safetensors.{host}.{ended}.ff.tmp"]
    stays = [
        f".a.safetensors.{host}.{os.getpid()}.0123456789ab.tmp",  # it runs
        f".a.safetensors.elsewhere.{ended}.0123456789ab.tmp",  # another machine's
        f".b.safetensors.{host}.{ended}.0123456789ab.tmp",  # another file's
        f".axsafetensors.{host}.{ended}.0123456789ab.tmp",
        f".a.safetensors.{host}.{ended}.0123456789ab.tmp.mine",
        "a.safetensors",
    ]
    for name in [gone[0], *stays]:
        (tmp_path / name).write_text("x")
    (tmp_path / gone[1]).mkdir()
    (tmp_path / gone[1] / "file").write_text("x")
    remove_leftovers(tmp_path / "a.safetensors")
    assert left(tmp_path) == sorted(stays)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_killed_process_leaves_what_the_next_removes(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "out"
    made = "open(t, 'w').write('half')" if kind == "file" else "(t / 'half').write_text('half')"
    code = (
        "import os, signal, sys; from pathlib import Path; from loratune.formats.atomic import *\n"
        f"with atomic_{'path' if kind == 'file' else 'folder'}(Path(sys.argv[1])) as t:\n"
        f"    {made}; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(place)], check=False)
    assert done.returncode == -9
    assert not place.exists()
    (leftover,) = left(tmp_path)
    assert leftover.startswith(".out.")
    assert leftover.endswith(".tmp")
    if kind == "file":
        with atomic_path(place) as temporary:
            temporary.write_text("whole")
        assert place.read_text() == "whole"
    else:
        with atomic_folder(place) as temporary:
            (temporary / "whole").write_text("whole")
        assert left(place) == ["whole"]
    assert left(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError])
@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException], exchanged: bool
) -> None:
    place = tmp_path / "out"
    place.mkdir()
    (place / "old").write_text("old")
    if not exchanged:  # a system that cannot

        def unknown(name: object) -> None:
            raise AttributeError("renameat2")

        monkeypatch.setattr(atomic.ctypes, "CDLL", unknown)
    with pytest.raises(UserError if failure is OSError else failure):  # noqa: PT012, SIM117
        with atomic_folder(place, replace=True) as temporary:
            (temporary / "new").write_text("new")
            assert left(place) == ["old"]
            raise failure
    assert left(place) == ["old"]
    assert left(tmp_path) == ["out"]
    with atomic_folder(place, replace=True) as temporary:
        (temporary / "new").write_text("new")
    assert left(place) == ["new"]
    assert left(tmp_path) == ["out"]


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    place = tmp_path / "out.safetensors"
    place.write_text("old")
    with pytest.raises(UserError) as error:  # noqa: PT012, SIM117
        with atomic_path(place) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
    told = str(error.value)
    assert told.startswith(f"{place}: cannot be written")
    assert "No space left on device" in told
    assert "make room" in told
    assert "\n" not in told
    assert place.read_text() == "old"
    assert left(tmp_path) == ["out.safetensors"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, steps = tmp_path / "out", []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        steps.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name.partition('.tmp')[1] or 'folder'}")
        real_sync(descriptor)

    def replace(old: Path, new: Path) -> None:
        steps.append("rename")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_path(place) as temporary:
        temporary.write_text("x")
    assert steps == ["sync .tmp", "rename", "sync folder"]
    steps.clear()
    with atomic_folder(tmp_path / "made") as temporary:
        (temporary / "file").write_text("x")
    assert steps[-2:] == ["rename", "sync folder"]
    assert len(steps) == 4  # the file and the folder before
