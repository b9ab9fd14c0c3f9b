"""Every file of a source is used, or named with the reason; nothing of a stranger is waited for or followed outside."""

from __future__ import annotations

import io
import json
import os
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import datasets as hf
from loratune.data.samples import Source, captions_of
from loratune.data.sources import read_source
from loratune.errors import UserError


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), shade).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: bytes | str = b"") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def captions(source: Source) -> dict[str, tuple[str, ...]]:
    return {Path(sample.name.rpartition(", ")[2]).name: sample.captions for sample in source}


def jsonl(folder: Path, *rows: dict[str, Any]) -> None:
    put(folder / "metadata.jsonl", "\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize("name", ["a.txt", "a.TXT", "a.caption", "a.CAPTION", "a.png.txt", "a.png.caption"])
def test_a_caption_file_of_any_spelling_is_read(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / name, "a disc")
    source = read_source(str(tmp_path))
    assert source[0].captions == ("a disc",)
    assert source.skipped == {}


def test_of_two_caption_files_the_text_is_read_and_the_other_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", "a disc")
    other = put(tmp_path / "a.caption", "a ring")
    source = read_source(str(tmp_path))
    assert source[0].captions == ("a disc",)
    assert list(source.skipped) == [str(other)]


@pytest.mark.parametrize("suffix", [".jfif", ".avif", ".AVIF", ".tiff"])
def test_kinds_that_pillow_reads_are_read(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / f"a{suffix}", png())
    assert len(read_source(str(tmp_path))) == 1


@pytest.mark.parametrize("suffix", [".heic", ".SVG", ".jxl", ".tar"])
def test_a_file_of_a_kind_that_is_not_read_is_named(tmp_path: Path, suffix: str) -> None:
    put(tmp_path / "a.png", png())
    other = put(tmp_path / f"b{suffix}")
    source = read_source(str(tmp_path))
    assert len(source) == 1
    assert list(source.skipped) == [str(other)]


@pytest.mark.parametrize("name", ["._a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "sub/.hidden/a.png"])
def test_hidden_files_are_no_images(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / name, png(9))
    assert [sample.data for sample in read_source(str(tmp_path))] == [png()]


def test_the_folder_of_a_run_is_no_source(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "runs" / "r" / "recipe.yaml")
    put(tmp_path / "runs" / "r" / "tensorboard" / "events")
    put(tmp_path / "runs" / "r" / "figures" / "samples.png", png(3))
    source = read_source(str(tmp_path))
    assert len(source) == 1
    assert source.skipped == {str(tmp_path / "runs" / "r"): "is the folder of a run"}


def test_a_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb") as file:
        file.write(png(1))
    source = read_source(str(tmp_path))
    assert len(source) == 1
    assert list(source.skipped.values()) == ["its name is not UTF-8; rename it"]


def test_rows_of_one_image_are_several_captions(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    jsonl(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "./a.png", "text": ["two", "three"]})
    assert captions(read_source(str(tmp_path))) == {"a.png": ("one", "two", "three")}


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_however_its_letters_are_composed(tmp_path: Path, form: Any) -> None:
    put(tmp_path / unicodedata.normalize(form, "café.png"), png())
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    jsonl(tmp_path, {"file_name": unicodedata.normalize(other, "café.png"), "text": "coffee"})  # type: ignore[arg-type]
    assert [sample.captions for sample in read_source(str(tmp_path))] == [("coffee",)]


def test_names_as_windows_and_scripts_write_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "set" / "sub" / "a.png", png())
    put(tmp_path / "set" / "b.png", png(1))
    rows = ({"file_name": "sub\\a.png", "text": "one"}, {"file_name": str(tmp_path / "set" / "b.png"), "text": "two"})
    jsonl(tmp_path / "set", *rows)
    monkeypatch.chdir(tmp_path)
    for path in ("set", str(tmp_path / "set")):
        assert captions(read_source(path)) == {"a.png": ("one",), "b.png": ("two",)}


def test_linked_images_are_read_with_metadata_as_without(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.png", png())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").symlink_to(tmp_path / "elsewhere" / "a.png")
    jsonl(tmp_path / "set", {"file_name": "a.png", "text": "one"})
    assert captions(read_source(str(tmp_path / "set"))) == {"a.png": ("one",)}


@pytest.mark.parametrize("value", [{"en": "a disc"}, True, [{"a": 1}], [["a"]]])
def test_a_caption_that_is_no_text_is_refused_by_its_line(tmp_path: Path, value: Any) -> None:
    put(tmp_path / "a.png", png())
    jsonl(tmp_path, {"file_name": "a.png", "text": value})
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: the caption is .*; give text, or a list of texts"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), None, "", "  ", [], [float("nan")], ["", None]])
def test_an_empty_cell_is_no_caption(value: Any) -> None:
    assert captions_of(value, "here") == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,text\na.png,1girl, solo, red hair\n", r"csv:2: 4 cells for 2 columns; put captions with commas"),
        ("file_name;text\na.png;a disc\n", r"csv:1: its columns are separated by ';'"),
    ],
)
def test_csv_that_would_lose_words_is_refused(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "metadata.csv", text)
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path))


def test_blanks_after_the_commas_of_a_csv(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "metadata.csv", 'file_name, text\na.png, "a disc, red"\n')
    assert captions(read_source(str(tmp_path))) == {"a.png": ("a disc, red",)}


def parquet(path: Path, rows: list[dict[str, Any]], texts: list[Any]) -> str:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, type=kind), "text": pa.array(texts)}), path)
    return str(path)


def test_a_parquet_names_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    put(tmp_path / "set" / "sub" / "a.png", png(5))
    path = parquet(tmp_path / "set" / "x.parquet", [{"bytes": None, "path": "sub/a.png"}], ["a"])
    assert read_source(path)[0].data == png(5)


@pytest.mark.parametrize("name", ["/dev/zero", "../secret.png", "pipe"])
def test_a_parquet_opens_nothing_outside_and_waits_for_nothing(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    put(tmp_path / "secret.png", png())
    (tmp_path / "set").mkdir()
    os.mkfifo(tmp_path / "set" / "pipe")
    path = parquet(tmp_path / "set" / "x.parquet", [{"bytes": None, "path": name}], ["a"])
    with pytest.raises(UserError, match=r"lies outside of|no file, but a folder, pipe or device"):
        read_source(path)[0]


def test_a_parquet_of_floats_has_no_captions_where_it_says_nan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    rows = [{"bytes": png(), "path": None}] * 2
    source = read_source(parquet(tmp_path / "x.parquet", rows, [float("nan"), 2.5]))
    assert [sample.captions for sample in source] == [(), ("2.5",)]
    assert len(source.without_caption()) == 1


def test_class_numbers_are_no_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"image": [{"bytes": png(), "path": None}], "label": [1]}
    features = hf.Features({"image": hf.Image(decode=False), "label": hf.ClassLabel(names=["cat", "dog"])})
    loaded = hf.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(hf, "load_dataset", lambda name, split: loaded)
    with pytest.raises(UserError, match=r"'label' holds class numbers \(cat, dog"):
        read_source("owner/name", caption_column="label")


def test_a_folder_of_splits_names_them(tmp_path: Path) -> None:
    rows = hf.Dataset.from_dict({"text": ["a"]})
    hf.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"holds the datasets test, train; give one of them, such as .*test"):
        read_source(str(tmp_path / "saved"))


def test_a_clone_of_a_hub_dataset_names_its_tables(tmp_path: Path) -> None:
    put(tmp_path / "README.md")
    put(tmp_path / "data" / "train-00000.parquet")
    with pytest.raises(UserError, match=r"1 \.parquet files: give .*train-00000\.parquet"):
        read_source(str(tmp_path))


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


def test_no_image_of_a_tar_is_lost(tmp_path: Path) -> None:
    members = {"v1.0.a.png": png(1), "v1.0.a.txt": b"one", "v1.0.b.png": png(2), "v1.0.b.txt": b"two"}
    members |= {
        "c.jpg": png(3),
        "c.png": png(4),
        "c.txt": b"three",
        "d.left.png": png(5),
        "d.json": b'{"text": "four"}',
    }
    members |= {"d.json": b'{"text": "four"}', "._c.png": png(6), "lost.txt": b"nothing", "e.cls": b"7"}
    source = read_source(tar(tmp_path / "x.tar", members))
    assert captions(source) == {
        "v1.0.a.png": ("one",),
        "v1.0.b.png": ("two",),
        "c.jpg": ("three",),
        "c.png": ("three",),
        "d.left.png": ("four",),
    }
    assert [name.rpartition(", ")[2] for name in source.skipped] == ["e.cls", "lost.txt"]


@pytest.mark.parametrize("size", [b"\xff" * 11 + b"\0", b"77777777777\0", b"\x80" + (2**70).to_bytes(11, "big")])
def test_a_tar_with_a_size_that_cannot_be_is_refused(tmp_path: Path, size: bytes) -> None:
    head = bytearray(512)
    head[:5], head[100:124], head[124:136] = b"a.png", b"0000644\0" + b"0000000\0" * 2, size
    head[136:148], head[148:156], head[156:157], head[257:265] = b"00000000000\0", b" " * 8, b"0", b"ustar\00000"
    head[148:156] = b"%06o\0 " % sum(head)
    path = put(tmp_path / "x.tar", bytes(head) + (tmp_path / tar(tmp_path / "y.tar", {"b.png": png()})).read_bytes())
    with pytest.raises(UserError, match=r"x\.tar"):
        read_source(str(path))


def test_a_json_as_deep_as_the_sea_is_refused(tmp_path: Path) -> None:
    deep = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    source = read_source(tar(tmp_path / "x.tar", {"a.png": png(), "a.json": deep}))
    with pytest.raises(UserError, match=r"x\.tar, a\.json: not a caption that can be read"):
        source[0]


def test_a_sparse_file_that_claims_to_be_huge_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(UserError, match=r"a\.png: has 214748364800 bytes; an image may have at most"):
        read_source(str(tmp_path))[0]


def test_a_caption_that_claims_to_be_huge_is_refused_unread(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(200 << 30)
    with pytest.raises(UserError, match=r"a\.txt: has 214748364800 bytes; a caption may have at most"):
        read_source(str(tmp_path))
