"""A file made from another has its bytes, whichever way they are copied, and an error where they cannot be."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratune.errors import UserError
from loratune.formats import streaming
from loratune.formats.headers import Header, TensorInfo, header_bytes, read_header
from loratune.formats.streaming import BLOCK, Output, Writer, check_space, joined, opened, opened_copy, without

RANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=8)
LENGTH = 5 * BLOCK + 123


def covered(ranges: list[tuple[int, int]]) -> set[int]:
    return {byte for start, stop in ranges for byte in range(start, stop)}


@settings(max_examples=200, deadline=None)
@given(RANGES, RANGES)
def test_ranges_are_sets_of_bytes(some: list[tuple[int, int]], taken: list[tuple[int, int]]) -> None:
    assert covered(joined(some)) == covered(some)
    left = without(some, taken)
    assert covered(left) == covered(some) - covered(taken)
    for made in (joined(some), left):
        assert made == sorted(made)
        assert all(start < stop for start, stop in made)
        assert all(one[1] < other[0] for one, other in itertools.pairwise(made))


def source_file(folder: Path, metadata: dict[str, str]) -> tuple[Path, Header, bytes]:
    """A safetensors file of random bytes."""
    data = os.urandom(LENGTH)
    infos = {"a": TensorInfo("U8", (1000,), 0, 1000), "b": TensorInfo("U8", (LENGTH - 1000,), 1000, LENGTH)}
    path = folder / "source.safetensors"
    path.write_bytes(header_bytes(infos.items(), metadata) + data)
    return path, read_header(path), data


def no_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "O_DIRECT", 0, raising=False)


def direct_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_copy_blocks", lambda *arguments: 0)


def direct_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each direct write does one block and a bit."""
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[: BLOCK + 100], at))


def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between file systems that the system cannot copy between."""
    no_direct(monkeypatch)

    def fails(*arguments: int) -> int:
        raise OSError(errno.EXDEV, "two file systems")

    monkeypatch.setattr(os, "copy_file_range", fails, raising=False)
    monkeypatch.setattr(streaming, "BUFFER", 1000)


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "as it is": lambda monkeypatch: None,
    "not direct": no_direct,
    "direct fails": direct_fails,
    "direct is short": direct_is_short,
    "by hand": by_hand,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chunk", [BLOCK, 64 << 20])
def test_every_way_of_copying_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, chunk: int) -> None:
    monkeypatch.setattr(streaming, "CHUNK", chunk)
    for number in (0, 100, 4090, 5000):  # where the data section begins within a block
        path, header, data = source_file(tmp_path, {"x": "y" * number})
        target = tmp_path / f"{number}.safetensors"
        WAYS[way](monkeypatch)
        done: list[int] = []
        new = {"x": "y" * number, "new": "z"}
        with opened(path, header, target, new) as output, Writer(done.append) as writer:
            writer.copy(output, [(0, 5), (5, 1000), (1000, LENGTH)])
        found = read_header(target)
        assert found.tensors == header.tensors
        assert found.metadata == {"x": "y" * number, "new": "z"}
        assert target.read_bytes()[found.data_offset :] == data
        assert (found.data_offset - header.data_offset) % BLOCK == 0
        assert sum(done) == (0 if output.shared else LENGTH)
        with opened_copy(path, tmp_path / f"{number}.copy") as output, Writer() as writer:
            writer.copy(output, [(0, output.length)])
        assert (tmp_path / f"{number}.copy").read_bytes() == path.read_bytes()
        monkeypatch.undo()
        monkeypatch.setattr(streaming, "CHUNK", chunk)


def test_what_is_written_replaces_what_was_copied(tmp_path: Path) -> None:
    path, header, data = source_file(tmp_path, {})
    new = os.urandom(BLOCK)
    released = threading.Event()
    with opened(path, header, tmp_path / "out", {}) as output, Writer() as writer:
        held = bytearray(50)
        output.read_into(1000, memoryview(held))
        assert held == data[1000:1050]
        writer.copy(output, without([(0, LENGTH)], [(900, 900 + BLOCK)]))
        writer.write(output, 900, memoryview(new), released.set)
        writer.wait()
        assert released.is_set()
        writer.write(output, LENGTH - 10, memoryview(new[:10]), lambda: None)
    made = (tmp_path / "out").read_bytes()[read_header(tmp_path / "out").data_offset :]
    assert made == data[:900] + new + data[900 + BLOCK : -10] + new[:10]


def test_blocks_that_are_shared_are_not_copied(tmp_path: Path) -> None:
    path, header, _ = source_file(tmp_path, {})
    with opened(path, header, tmp_path / "out", {}) as output, Writer() as writer:
        writer.copy(dataclasses.replace(output, shared=True), [(0, LENGTH)])
        writer.wait()
        assert not any(os.pread(output.target, LENGTH, output.begins[1])) or output.shared


def test_sharing_is_asked_for_whole_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ext4 cannot, a clone is made by hand as the system would make it."""
    import fcntl
    import struct

    path, header, data = source_file(tmp_path, {"x": "y" * 300})

    def clone(target: int, order: int, told: bytes) -> int:
        source, start, length, at = struct.unpack("qQQQ", told)
        assert order == streaming.FICLONERANGE
        assert start % BLOCK == at % BLOCK == length == 0
        os.pwrite(target, os.pread(source, 1 << 30, start), at)
        return 0

    monkeypatch.setattr(fcntl, "ioctl", clone)
    with opened(path, header, tmp_path / "out", {"x": "z" * 9000}) as output, Writer() as writer:
        assert output.shared
        writer.copy(output, [(0, LENGTH)])
    found = read_header(tmp_path / "out")
    assert found.metadata == {"x": "z" * 9000}
    assert (tmp_path / "out").read_bytes()[found.data_offset :] == data


@pytest.mark.parametrize("way", WAYS)
def test_a_source_that_becomes_shorter_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    path, header, _ = source_file(tmp_path, {})
    WAYS[way](monkeypatch)
    with pytest.raises(OSError, match="the source became shorter"):  # noqa: PT012, SIM117
        with opened(path, header, tmp_path / "out", {}) as output:
            os.truncate(path, header.data_offset + 2 * BLOCK)
            with Writer() as writer:
                writer.copy(output, [(0, LENGTH)])
    with opened_copy(path, tmp_path / "other") as output, pytest.raises(OSError, match="became shorter"):
        output.read_into(path.stat().st_size - 3, memoryview(bytearray(10)))


def failing(output: Output, error: OSError) -> Any:
    """An output that cannot be written to."""

    class Failing(Output):
        def write(self, start: int, data: memoryview) -> None:
            raise error

    return Failing(**{one.name: getattr(output, one.name) for one in dataclasses.fields(output)})


def test_what_cannot_be_written_is_told_and_all_buffers_come_back(tmp_path: Path) -> None:
    path, header, _ = source_file(tmp_path, {})
    given_back: list[int] = []
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012, SIM117
        with opened(path, header, tmp_path / "out", {}) as output, Writer() as writer:
            bad = failing(output, full)
            for number in range(5):
                writer.write(bad, 0, memoryview(b"x"), lambda number=number: given_back.append(number))  # type: ignore[misc]
            with pytest.raises(OSError, match="No space left"):
                writer.wait()
            with pytest.raises(OSError, match="No space left"):
                writer.check()
    assert given_back == [0, 1, 2, 3, 4]


def test_an_error_elsewhere_stops_the_copy(tmp_path: Path) -> None:
    path, header, _ = source_file(tmp_path, {})
    begun = threading.Event()
    with pytest.raises(ZeroDivisionError), opened(path, header, tmp_path / "out", {}) as output:  # noqa: PT012, SIM117
        with Writer(lambda count: begun.set()) as writer:
            writer.copy(output, [(0, 1)] * 100_000)
            begun.wait(5)
            raise ZeroDivisionError
    assert not writer._thread.is_alive()
    assert not writer._copies


def test_room_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path, 1000, tmp_path / "out")
    with pytest.raises(UserError, match=r"out: needs 1000000000\.00 GB and there are .* GB free; make room"):
        check_space(tmp_path, 10**18, tmp_path / "out")
    check_space(tmp_path / "not" / "there", 10**18, tmp_path / "out")  # then opening it tells
