"""Captioned images are found wherever they are kept, and what is wrong is told by file and line."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import datasets as hf
from loratune.data.samples import Source
from loratune.data.sources import read_source
from loratune.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(shade: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (2, 2), shade).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def found(source: Source) -> list[tuple[str, bytes, str | None]]:
    return [(Path(one.name).name, one.data, one.caption) for one in source]


def table(path: Path, columns: dict[str, list[Any]]) -> str:
    made = hf.Dataset.from_dict(columns)
    for name in ("image", "photo"):
        if name in columns:
            made = made.cast_column(name, hf.Image(decode=False))
    made.to_parquet(str(path))
    return str(path)


def images(*shades: int) -> list[dict[str, Any]]:
    return [{"bytes": png(shade), "path": None} for shade in shades]


def test_text_files_beside_images_also_in_folders_within(tmp_path: Path) -> None:
    put(tmp_path / "b.png", png(2))
    put(tmp_path / "b.txt", "  the second \n")
    put(tmp_path / "a" / "deep" / "a.JPG", png(1))
    put(tmp_path / "a" / "deep" / "a.txt", "ein Bär")
    put(tmp_path / "c.webp", png(3))
    put(tmp_path / "d.png", png(4))
    put(tmp_path / "d.txt", " \n")
    put(tmp_path / "notes.md", "no image")
    source = read_source(str(tmp_path))
    assert len(source) == 4
    assert found(source) == [
        ("a.JPG", png(1), "ein Bär"),
        ("b.png", png(2), "the second"),
        ("c.webp", png(3), None),
        ("d.png", png(4), None),
    ]
    assert source[1].name == str(tmp_path / "b.png")


def test_the_marks_of_windows_editors_are_no_part_of_a_caption(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "a.txt", b"\xef\xbb\xbfa disc\r\n")
    assert read_source(str(tmp_path))[0].caption == "a disc"
    put(tmp_path / "metadata.csv", b"\xef\xbb\xbffile_name,text\r\na.png,a ring\r\n")
    assert read_source(str(tmp_path))[0].caption == "a ring"
    put(tmp_path / "metadata.jsonl", b'\xef\xbb\xbf{"file_name": "a.png", "text": "a square"}\r\n')
    assert read_source(str(tmp_path))[0].caption == "a square"


@pytest.mark.parametrize("name", ["a.txt", "metadata.csv", "metadata.jsonl"])
def test_captions_that_are_not_utf8_are_named(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / name, "file_name,text\na.png,B\xe4r\n".encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}.*UTF-8"):
        read_source(str(tmp_path))


def test_metadata_jsonl(tmp_path: Path) -> None:
    put(tmp_path / "in" / "a.png", png(1))
    put(tmp_path / "b.png", png(2))
    put(tmp_path / "c.png", png(3))
    put(tmp_path / "b.txt", "not looked at")
    rows = [{"file_name": "b.png", "text": " second "}, {"file_name": "in/a.png", "text": "first", "more": [1]}]
    put(tmp_path / "metadata.jsonl", "\n\n".join(map(json.dumps, rows)))
    assert found(read_source(str(tmp_path))) == [
        ("b.png", png(2), "second"),
        ("c.png", png(3), None),
        ("a.png", png(1), "first"),
    ]


@pytest.mark.parametrize("name", ["./a.png", "in/../a.png"])
def test_a_file_name_written_the_long_way_still_finds_its_image(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png", png())
    (tmp_path / "in").mkdir()
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": name, "text": "a disc"}))
    assert read_source(str(tmp_path))[0].caption == "a disc"


def test_metadata_csv_with_quotes_and_commas(tmp_path: Path) -> None:
    caption = 'a "red", round\ndisc'
    put(tmp_path / "a.png", png(1))
    with (tmp_path / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "file_name"], [caption, "a.png"]])
    assert found(read_source(str(tmp_path))) == [("a.png", png(1), caption)]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_the_column_of_captions_of_a_folder(tmp_path: Path, name: str) -> None:
    row = {"file_name": "a.png", "text": "T", "caption": "C", "prompt": "P", "style": "S"}
    put(tmp_path / "a.png", png())

    def write(kept: dict[str, str]) -> None:
        lines = json.dumps(kept) if name.endswith("jsonl") else ",".join(kept) + "\n" + ",".join(kept.values())
        put(tmp_path / name, lines)

    for first in ("text", "caption", "prompt"):
        write(row)
        assert read_source(str(tmp_path))[0].caption == row[first]
        assert read_source(str(tmp_path), caption_column="style")[0].caption == "S"
        del row[first]
    write(row)
    assert read_source(str(tmp_path))[0].caption is None
    with pytest.raises(UserError, match=rf"{name}.*caption_column 'stile'"):
        read_source(str(tmp_path), caption_column="stile")


def test_parquet(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"image": images(1, 2), "text": ["one", None], "n": [1, 2]})
    source = read_source(path)
    assert [(one.data, one.caption) for one in source] == [(png(1), "one"), (png(2), None)]
    assert source[1].name == f"{path}, row 1"


def test_columns_of_parquet(tmp_path: Path) -> None:
    columns = {"photo": images(1), "words": ["w"], "caption": ["c"], "prompt": ["p"]}
    path = table(tmp_path / "x.parquet", columns)
    assert read_source(path, "photo")[0].caption == "c"
    assert read_source(path, "photo", "words")[0].caption == "w"
    with pytest.raises(UserError, match=r"image_column 'image' is not one of its columns \['photo', 'words'"):
        read_source(path)
    with pytest.raises(UserError, match="caption_column 'wrods' is not one of its columns"):
        read_source(path, "photo", "wrods")
    alone = table(tmp_path / "y.parquet", {"image": images(1)})
    with pytest.raises(UserError, match="caption_column None is not one"):
        read_source(alone)


def test_captions_that_are_numbers_are_text(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"image": images(1), "text": [7]})
    assert read_source(path)[0].caption == "7"


def test_a_row_without_a_image_is_an_unreadable_one(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"image": [*images(1), None], "text": ["one", "two"]})
    source = read_source(path)
    assert source[1].data == b""
    assert source[1].name.endswith("row 1")


def test_a_image_that_goes_away_is_named(tmp_path: Path) -> None:
    source = read_source(str(put(tmp_path / "gone.png", png()).parent))
    (tmp_path / "gone.png").unlink()
    with pytest.raises(UserError, match=r"gone\.png: cannot be read"):
        source[0]


def test_a_damaged_parquet_is_named(tmp_path: Path) -> None:
    path = put(tmp_path / "x.parquet", b"PAR1 and nothing more")
    with pytest.raises(UserError, match=r"x\.parquet: cannot be read"):
        read_source(str(path))


def test_an_empty_folder(tmp_path: Path) -> None:
    put(tmp_path / "a.txt", "a caption alone")
    with pytest.raises(UserError, match=f"{tmp_path}: no images") as error:
        read_source(str(tmp_path))
    assert ".jpeg" in str(error.value)


@pytest.mark.parametrize("row", [{}, {"file_name": ""}, {"file_name": None}, {"filename": "a.png"}, {"file_name": 5}])
def test_missing_file_name(tmp_path: Path, row: dict[str, Any]) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png"}\n' + json.dumps(row))
    with pytest.raises(UserError, match=r"metadata\.jsonl:2: no 'file_name'"):
        read_source(str(tmp_path))


def test_missing_file_name_in_csv(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "metadata.csv", "file,text\na.png,x\n")
    with pytest.raises(UserError, match=r"metadata\.csv:2: no 'file_name'"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["up", "absolute", "link"])
def test_a_file_name_may_not_leave_the_folder(tmp_path: Path, kind: str) -> None:
    outside = put(tmp_path / "outside.png", png())
    folder = tmp_path / "in"
    put(folder / "a.png", png())
    (folder / "link").symlink_to(tmp_path)
    name = {"up": "../outside.png", "absolute": str(outside), "link": "link/outside.png"}[kind]
    put(folder / "metadata.jsonl", json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(UserError, match=r"metadata\.jsonl:1: file_name .*outside\.png' leaves the folder"):
        read_source(str(folder))


@pytest.mark.parametrize("line", ['{"file_name": "a.png"', "[1, 2]", "7", '"a.png"'])
def test_a_bad_line_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "metadata.jsonl", '{"file_name": "a.png"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"metadata\.jsonl:3: not a JSON object"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("name", ["b.png", "in"])
def test_a_image_that_is_not_there(tmp_path: Path, name: str) -> None:
    put(tmp_path / "a.png", png())
    (tmp_path / "in").mkdir()
    put(tmp_path / "metadata.csv", f"file_name,text\na.png,x\n{name},y\n")
    with pytest.raises(UserError, match=rf"metadata\.csv:3: there is no image '{name}'"):
        read_source(str(tmp_path))


def test_a_captioned_file_of_an_unknown_kind_is_not_dropped_silently(tmp_path: Path) -> None:
    put(tmp_path / "a.png", png())
    put(tmp_path / "b.psd", b"layers")
    put(tmp_path / "metadata.csv", "file_name,text\na.png,x\nb.psd,y\n")
    with pytest.raises(UserError, match=r"metadata\.csv:3: 'b\.psd'.*\.png"):
        read_source(str(tmp_path))


def test_missing_parquet_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.parquet: no such file.*datasets/build\.py"):
        read_source(str(tmp_path / "x.parquet"))
    for path in (str(tmp_path / "nothing"), "nothing", "a/b/c", "data/x.zip", str(put(tmp_path / "x.png", png()))):
        with pytest.raises(UserError, match=r"no such folder, \.jsonl, \.csv, \.parquet or \.tar file or hub dataset"):
            read_source(path)


@pytest.mark.parametrize("error", [ConnectionError("no route to the hub\nmore"), OSError(), ValueError("gone")])
def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(hf, "load_dataset", refuse)
    with pytest.raises(UserError, match="owner/name: no such folder, and the hub did not give it") as told:
        read_source("owner/name")
    assert "\n" not in str(told.value)
    assert (str(error).split("\n")[0] or "OSError") in str(told.value)


def test_a_hub_dataset_has_columns_as_parquet_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> hf.Dataset:
        asked.append((name, split))
        return hf.Dataset.from_dict({"image": images(1), "prompt": ["p"]}).cast_column("image", hf.Image())

    monkeypatch.setattr(hf, "load_dataset", load)
    assert [(one.data, one.caption) for one in read_source("owner/name")] == [(png(1), "p")]
    assert asked == [("owner/name", "train")]


def tar(path: Path, members: dict[str, bytes | str]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            told = tarfile.TarInfo(name)
            told.size = len(data)
            file.addfile(told, io.BytesIO(data))
    return str(path)


def test_a_webdataset_has_captions_beside_its_images(tmp_path: Path) -> None:
    members = {"a/1.txt": " one ", "a/1.png": png(1), "2.JPG": png(2), "2.json": '{"caption": "two"}', "3.webp": png(3)}
    path = tar(tmp_path / "set" / "0.tar", members | {"notes.md": "no image"})
    source = read_source(path)
    assert [(one.name, one.data, one.caption) for one in source] == [
        (f"{path}, a/1.png", png(1), "one"),
        (f"{path}, 2.JPG", png(2), "two"),
        (f"{path}, 3.webp", png(3), None),
    ]
    assert source.without_caption() == [f"{path}, 3.webp"]
    tar(tmp_path / "set" / "1.tar", {"4.png": png(4), "4.json": '{"tags": ["x", "y"], "text": "four"}'})
    both = read_source(str(tmp_path / "set"))
    assert len(both) == 4
    assert both[3].caption == "four"
    assert read_source(str(tmp_path / "set"), caption_column="tags")[3].captions == ("x", "y")


def test_names_in_a_tar_are_never_paths(tmp_path: Path) -> None:
    outside = put(tmp_path / "secret.png", png(9))
    path = tar(tmp_path / "set.tar", {"../secret.txt": "a caption", "../secret.png": png(1)})
    assert read_source(path)[0].data == png(1)
    with tarfile.open(path, "a") as file:
        link = tarfile.TarInfo("linked.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        file.addfile(link)
    assert len(read_source(path)) == 1


@pytest.mark.parametrize("content", [b"no tar at all", b""])
def test_a_damaged_tar_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"x\.tar: (not a tar file|no image in this tar file)"):
        read_source(str(put(tmp_path / "x.tar", content)))


def test_a_caption_of_a_tar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tar(tmp_path / "x.tar", {"1.png": png(), "1.json": "{", "2.png": png(), "2.txt": b"\xff"})
    for row, member in ((0, r"1\.json"), (1, r"2\.txt")):
        with pytest.raises(UserError, match=rf"x\.tar, {member}: not a caption that can be read"):
            read_source(path)[row]


def test_a_column_may_hold_several_captions(tmp_path: Path) -> None:
    path = table(tmp_path / "x.parquet", {"image": images(1, 2, 3), "text": [["a", " b "], [], ["c"]]})
    source = read_source(path)
    assert [one.captions for one in source] == [("a", "b"), (), ("c",)]
    assert len(source.without_caption()) == 1
    put(tmp_path / "set" / "1.png", png())
    put(tmp_path / "set" / "metadata.jsonl", '{"file_name": "1.png", "text": ["x", "y"]}')
    assert read_source(str(tmp_path / "set"))[0].captions == ("x", "y")


def test_a_metadata_file_may_be_named_itself(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        put(tmp_path / name, png())
    path = put(tmp_path / "short.jsonl", '{"file_name": "1.png", "text": "a"}\n{"file_name": "2.png", "text": "b"}\n')
    put(tmp_path / "metadata.csv", "file_name,text\n1.png,long\n2.png,longer\n")
    assert [one.caption for one in read_source(str(path))] == ["a", "b"]
    assert [one.caption for one in read_source(str(tmp_path / "metadata.csv"))] == ["long", "longer"]


def test_a_dataset_saved_on_disk(tmp_path: Path) -> None:
    made = hf.Dataset.from_dict({"image": images(1, 2), "caption": ["a", "b"]}).cast_column("image", hf.Image())
    made.save_to_disk(str(tmp_path / "saved"))
    assert found(read_source(str(tmp_path / "saved"))) == [
        (f"{tmp_path.name}/saved, row 0".rpartition("/")[2], png(1), "a"),
        (f"{tmp_path.name}/saved, row 1".rpartition("/")[2], png(2), "b"),
    ]
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved: cannot be read as a saved dataset"):
        read_source(str(tmp_path / "saved"))
