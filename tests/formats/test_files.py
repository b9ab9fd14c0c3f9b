"""Files are read strictly, written whole or not at all, and rewritten with nothing else touched."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from loratune.errors import UserError
from loratune.formats.files import (
    DTYPES,
    atomic_folder,
    atomic_path,
    read_header,
    read_tensors,
    rewrite,
    sha256_file,
    tensors_hash,
    write_safetensors,
)

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def raw_file(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, stop: int, dtype: str = "F32", shape: list[int] | None = None) -> dict[str, object]:
    shape = [(stop - start) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 7, generator=generator)
    return {
        "b.half": wide.half(),
        "a.float": wide,
        "c.bfloat": wide.bfloat16(),
        "scalar": torch.tensor(3.5, dtype=torch.float16),
        "empty": torch.zeros(0, 4),
        "count": torch.arange(6),
        "flags": torch.tensor([True, False]),
        "turned": wide.t(),
        "view": wide[1:3],
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and tensors_hash(left) == tensors_hash(right)


def fail_in_file(path: Path, failure: type[BaseException]) -> None:
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        raise failure


def fail_in_folder(path: Path, failure: type[BaseException]) -> None:
    with atomic_folder(path) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        raise failure


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path):
    path, tensors = tmp_path / "deep" / "er" / "file.safetensors", some_tensors()
    write_safetensors(path, tensors, {"who": "é"})
    assert same(read_tensors(path), tensors)
    assert same(load_file(path), tensors)
    header = read_header(path)
    assert header.metadata == {"who": "é"}
    assert header.tensors["a.float"].shape == (5, 7)
    assert header.tensors["b.half"].dtype == "F16"
    assert header.size == path.stat().st_size
    assert header.data_offset % 8 == 0
    assert [info.start for info in header.tensors.values()] == sorted(i.start for i in header.tensors.values())
    assert list(read_tensors(path, ["scalar"])) == ["scalar"]


def test_every_dtype_is_written_and_read(tmp_path):
    path = tmp_path / "file.safetensors"
    tensors = {name: torch.ones(3).to(dtype) for name, dtype in DTYPES.items()}
    write_safetensors(path, tensors, {})
    assert same(read_tensors(path), tensors)


def test_same_content_gives_the_same_bytes_in_safetensors_own_order(tmp_path):
    tensors = {name: value for name, value in some_tensors().items() if name != "c.bfloat"}
    first, second, theirs = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_safetensors(first, tensors, {"b": "2", "a": "1"})
    write_safetensors(second, dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    assert first.read_bytes() == second.read_bytes()
    assert sha256_file(first) == sha256_file(second)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, theirs)
    offset = read_header(theirs).data_offset
    assert theirs.read_bytes()[offset:] == first.read_bytes()[read_header(first).data_offset :]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {**t, "x": t["a"]},
        lambda t: {"b": t["a"]},
        lambda t: {"a": t["a"].half()},
        lambda t: {"a": t["a"].reshape(3, 2)},
        lambda t: {"a": t["a"] + 1},
    ],
)
def test_the_hash_of_tensors_sees_names_dtypes_shapes_and_values(change):
    tensors = {"a": torch.arange(6.0).reshape(2, 3)}
    assert tensors_hash(tensors) == tensors_hash({"a": torch.arange(6.0).reshape(2, 3)})
    assert tensors_hash(change(tensors)) != tensors_hash(tensors)


@pytest.mark.parametrize(
    ("header", "data", "told"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlap"),
        ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "gap before it"),
        ({"a": entry(4, 8)}, bytes(8), "gap before it"),
        ({"a": entry(0, 8)}, bytes(4), "truncated: its tensors need 8 bytes, it has 4"),
        ({"a": entry(0, 8)}, bytes(9), "too long"),
        ({"a": entry(0, 8, shape=[3])}, bytes(8), r"'a' has 8 bytes; F32 \[3\] needs 12"),
        ({"a": entry(8, 0, shape=[2])}, bytes(8), "'a' has -8 bytes"),
        ({"a": entry(0, 8, dtype="F12")}, bytes(8), "'a' has the unknown dtype 'F12'"),
        ({"a": entry(0, 8, shape=[-2])}, bytes(8), "not sizes"),
        ({"a": entry(0, 8, shape=[2.0])}, bytes(8), "not sizes"),
        ({"a": entry(0, 8, shape=[True, 2])}, bytes(8), "not sizes"),
        ({"a": {**entry(0, 8), "data_offsets": [0]}}, bytes(8), "not sizes"),
        ({"a": {"dtype": "F32"}}, b"", "must have dtype, shape and data_offsets"),
        ({"a": 3}, b"", "must have dtype"),
        ({"__metadata__": {"a": 1}}, b"", "must hold text only"),
        ({"__metadata__": 1}, b"", "must hold text only"),
        (b'{"a": 1', b"", "not valid JSON"),
        (b"{}}", b"", "not valid JSON"),
        (b'{"\xff": 1}', b"", "not valid JSON"),
        (b'{"\\ud800": 1}', b"", "not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": 1, "a": 1}', b"", "'a' is there twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', b"", "'dtype' is there twice"),
        (b"[]", b"", "no safetensors file"),
        (b"", b"", "no safetensors file"),
    ],
)
def test_a_damaged_file_is_told_in_one_line(tmp_path, header, data, told):
    path = raw_file(tmp_path / "file.safetensors", header, data)
    with pytest.raises(UserError, match=told) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("a.ckpt", b"", "only .safetensors is loaded"),
        ("a.PT", b"", "convert it with a tool you trust"),
        ("a.bin", b"", "only .safetensors is loaded"),
        ("a.safetensors", b"PK\x03\x04" + bytes(99), "only .safetensors is loaded"),
        ("a.safetensors", b"\x80\x02}q\x00(X\x01\x00\x00{" + bytes(99), "only .safetensors is loaded"),
        ("a.safetensors", b"\x80\x02}q\x00(X\x01{" + bytes(99), "only .safetensors is loaded"),
        ("a.safetensors", b"\x1f\x8b\x08" + bytes(99), "only .safetensors is loaded"),
        ("a.safetensors", b"version https://git-lfs", "no safetensors file"),
        ("a.safetensors", b"12", "no safetensors file"),
        ("a.safetensors", (99).to_bytes(8, "little") + b"{}", "the header is 99 bytes long, the file 10"),
    ],
)
def test_what_is_no_safetensors_file_is_told(tmp_path, name, data, told):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=told):
        read_header(tmp_path / name)


def test_missing_files_folders_and_keys_are_told(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        sha256_file(tmp_path / "none")
    write_safetensors(tmp_path / "a.safetensors", {}, {})
    with pytest.raises(UserError, match="no tensor 'x'"):
        read_tensors(tmp_path / "a.safetensors", ["x"])


def test_a_header_over_the_limit_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(100_000_100)
    with pytest.raises(UserError, match="100000000 are allowed"):
        read_header(path)


@pytest.mark.parametrize("length", [0x80, 0x280, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_is_none(tmp_path, length):
    text = json.dumps({"a": entry(0, 4)}).encode()
    path = raw_file(tmp_path / "a.safetensors", text + b" " * (length - len(text)), bytes(4))
    assert path.read_bytes()[:1] in (b"\x80", b"P")
    assert read_header(path).tensors["a"].shape == (1,)


@QUICK
@given(st.data())
def test_no_change_of_a_file_does_more_than_raise_a_user_error(tmp_path, data):
    path = tmp_path / "fuzz.safetensors"
    write_safetensors(path, {"a": torch.ones(2, 2), "b": torch.ones(3).half()}, {"k": "v"})
    held = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(held) - 1))
        new = data.draw(st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"[", b"-", b"9", b"e9", b",", b"null"]))
        held[place : place + data.draw(st.integers(0, 3))] = new
    path.write_bytes(held)
    told = ""
    try:
        header, tensors = read_header(path), read_tensors(path)
    except UserError as error:
        told = str(error)
    else:
        assert {key: tuple(x.shape) for key, x in tensors.items()} == {
            key: info.shape for key, info in header.tensors.items()
        }
    assert "\n" not in told


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    with pytest.raises(failure):
        fail_in_file(path, failure)
    assert path.read_text() == "old"
    assert left_over(tmp_path) == ["a.safetensors"]
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    assert left_over(tmp_path) == ["a.safetensors"]


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "file" / "a.safetensors", {}, {})
    with pytest.raises(ValueError, match="complex128"):
        write_safetensors(tmp_path / "a.safetensors", {"a": torch.ones(1, dtype=torch.complex128)}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        write_safetensors(tmp_path / "folder", {}, {})
    assert left_over(tmp_path) == ["file", "folder"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, failure):
    target = tmp_path / "folder"
    with pytest.raises(failure):
        fail_in_folder(target, failure)
    assert left_over(tmp_path) == []
    target.mkdir()
    with atomic_folder(target) as temporary:
        (temporary / "file").write_text("x")
    assert left_over(tmp_path) == ["folder"]
    assert left_over(target) == ["file"]
    with pytest.raises(UserError, match="not an empty folder"), atomic_folder(target):
        raise AssertionError
    assert left_over(tmp_path) == ["folder"]


def test_rewriting_changes_the_patched_tensors_alone(tmp_path):
    source, destination = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file({name: value.contiguous().clone() for name, value in some_tensors().items()}, source, {"k": "v"})
    steps: list[tuple[int, int]] = []
    patches = {"b.half": lambda x: x + 1, "scalar": lambda x: x * 2, "empty": lambda x: x}
    rewrite(source, destination, patches, progress=lambda *step: steps.append(step))
    old, new = read_header(source), read_header(destination)
    assert new.tensors == old.tensors
    assert list(new.tensors) == list(old.tensors)
    assert new.metadata == {"k": "v"}
    assert steps[-1] == (old.size - old.data_offset,) * 2
    assert len(steps) == len(old.tensors)
    expected = some_tensors() | {
        "b.half": some_tensors()["b.half"] + 1,
        "scalar": some_tensors()["scalar"] * 2,
    }
    assert same(read_tensors(destination), expected)
    rewrite(source, source, {}, {"other": "text"})
    assert read_header(source).metadata == {"other": "text"}
    assert same(read_tensors(source), some_tensors())


def test_wrong_patches_leave_nothing_behind(tmp_path):
    source, destination = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(source, {"a": torch.ones(2)}, {})
    with pytest.raises(KeyError, match="'x'"):
        rewrite(source, destination, {"x": lambda x: x})
    for patch in (lambda x: x.half(), lambda x: x[:1]):
        with pytest.raises(ValueError, match="'a'"):
            rewrite(source, destination, {"a": patch})
    assert left_over(tmp_path) == ["a.safetensors"]


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot be read \(it is a pipe or a device"):
            read_header(path)
    with pytest.raises(UserError, match=r"cannot be read \(it is a folder"):
        read_header(tmp_path)
