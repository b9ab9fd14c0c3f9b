"""The cache gives back what was put in, bit for bit, or nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratune.data import cache as cache_module
from loratune.data.cache import Cache, key_of
from loratune.errors import UserError
from loratune.formats import files

QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEY = key_of(what="test")
parts = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=4), st.one_of(st.integers(), st.text(max_size=8)), min_size=1, max_size=4
)


def tensors() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    mean = torch.randn(4, 3, 3, generator=random)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return {"mean": mean, "half": mean.half(), "turned": mean.transpose(0, 2), "special": special}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    def raw(value: Tensor) -> list[int]:
        return value.contiguous().view(torch.uint8).flatten().tolist()

    return left.keys() == right.keys() and all(
        left[key].dtype == right[key].dtype
        and left[key].shape == right[key].shape
        and raw(left[key]) == raw(right[key])
        for key in left
    )


def test_what_is_put_is_got_bit_for_bit(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "deep" / "cache")
    assert cache.get(KEY) is None
    cache.put(KEY, tensors())
    got = cache.get(KEY)
    assert got is not None
    assert same(got, tensors())
    assert cache.get(key_of(what="other")) is None
    assert same(Cache(tmp_path / "deep" / "cache").get(KEY) or {}, tensors())


def test_a_later_put_wins(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, tensors())
    cache.put(KEY, {"x": torch.ones(2)})
    assert same(cache.get(KEY) or {}, {"x": torch.ones(2)})


def test_the_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Cache(Path("~/cache")).path(KEY).is_relative_to(tmp_path / "cache")


@QUICK
@given(data=st.data())
def test_a_changed_byte_is_not_returned(tmp_path: Path, data: st.DataObject) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, tensors())
    content = bytearray(cache.path(KEY).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    cache.path(KEY).write_bytes(content)
    got = cache.get(KEY)
    header = 8 + int.from_bytes(content[:8], "little")
    assert got is None or (place < header and same(got, tensors()))  # the header has spaces of no meaning


@QUICK
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_not_returned(tmp_path: Path, share: float) -> None:
    cache = Cache(tmp_path)
    cache.put(KEY, tensors())
    content = cache.path(KEY).read_bytes()
    cache.path(KEY).write_bytes(content[: int(len(content) * share)])
    assert cache.get(KEY) is None


def test_a_folder_in_the_place_of_an_entry_is_no_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.path(KEY).mkdir(parents=True)
    assert cache.get(KEY) is None


@QUICK
@given(parts, parts)
def test_keys_are_equal_only_where_everything_is(one: dict[str, str | int], other: dict[str, str | int]) -> None:
    assert (key_of(**one) == key_of(**other)) == (one == other)
    assert key_of(**one) == key_of(**dict(reversed(list(one.items()))))


@QUICK
@given(st.data())
def test_every_part_of_what_made_an_entry_is_in_its_key(data: st.DataObject) -> None:
    made_from: dict[str, str | int] = {"what": "image", "image": "ab", "size": 64, "vae": "cd"}
    name = data.draw(st.sampled_from(sorted(made_from)))
    value = made_from[name]
    other = data.draw((st.integers() if isinstance(value, int) else st.text()).filter(lambda new: new != value))
    assert key_of(**{**made_from, name: other}) != key_of(**made_from)


def test_a_number_is_not_its_text() -> None:
    assert key_of(size=64) != key_of(size="64")


def test_the_encoders_version_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "VERSION", cache_module.VERSION + 1)
    assert key_of(what="test") != KEY


@pytest.mark.parametrize("earlier", [False, True])
def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    cache = Cache(tmp_path)
    if earlier:
        cache.put(KEY, tensors())
    written = 0

    def full(tensor: Tensor) -> memoryview:
        nonlocal written
        written += 1
        if written == 3:
            raise OSError(28, "No space left on device")
        return files_bytes_of(tensor)

    files_bytes_of = files._bytes_of
    new = {"a": torch.ones(4), "b": torch.ones(4), "c": torch.ones(4)}
    with monkeypatch.context() as patched:
        patched.setattr(files, "_bytes_of", full)
        patched.setattr(cache_module, "tensors_hash", lambda _: "0" * 64)
        with pytest.raises(UserError, match="No space left"):
            cache.put(KEY, new)
    assert written == 3
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([cache.path(KEY)] if earlier else [])
    assert same(cache.get(KEY) or {}, tensors() if earlier else {})


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"data\.cache_dir: cannot write to .*file/cache"):
        Cache(tmp_path / "file" / "cache").put(KEY, tensors())


def test_many_writers_of_one_key(tmp_path: Path) -> None:
    cache, wrong = Cache(tmp_path), []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        for _ in range(10):
            try:
                cache.put(KEY, tensors())
                got = cache.get(KEY)
                if got is None or not same(got, tensors()):
                    wrong.append("read something else")
            except Exception as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [cache.path(KEY)]
