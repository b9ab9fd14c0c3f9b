"""Captioned images from where people keep them, as one Hugging Face dataset."""

from __future__ import annotations

import csv
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from loratune.errors import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Sample:
    """One image, still encoded, and what it is called.

    Args:
        name: its path, or where it is.
        data: its bytes.
        captions: none, one or several.
        root: the folder its path is under, where it has one.
    """

    name: str
    data: bytes
    captions: tuple[str, ...] = ()
    root: str = ""

    @property
    def caption(self) -> str | None:
        """The first caption, or None where there is none."""
        return self.captions[0] if self.captions else None


class Source:
    """Samples by index, read from disk (or from Arrow) only when asked for.

    Args:
        rows: a dataset with columns image (undecoded) and caption (a string or a list of them).
        where: for messages.
        root: the folder of the images, where it is one.
    """

    def __init__(self, rows: datasets.Dataset, where: str, root: str = "") -> None:
        self.rows, self.where, self.root = rows, where, root

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image: dict[str, Any] = row["image"] or {}  # an empty cell is an unreadable image
        data, path = image.get("bytes"), image.get("path")
        if data is None:
            data = _read(path) if path else b""
        return Sample(path or f"{self.where}, row {index}", data, _captions(row["caption"]), self.root)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def without_caption(self) -> list[str]:
        """Names of the images that have no caption."""
        missing = [index for index, value in enumerate(self.rows["caption"]) if not _captions(value)]
        return [self[index].name for index in missing]


class TarSource(Source):
    """Samples of webdataset's tar files, found again by their place in them.

    Names in these files are never used as paths.

    Args:
        files: tar files, not compressed.
        caption_column: of .json members; by default the first of text, caption, prompt.

    Raises:
        UserError: a file is no tar file, or has no image; the message names it.
    """

    def __init__(self, files: Sequence[Path], caption_column: str | None) -> None:
        self.column, self.root = caption_column, ""
        self.members: list[tuple[Path, str, tuple[int, int], tuple[int, int, str] | None]] = []
        for file in files:
            before = len(self.members)
            self.members += _tar_members(file)
            if len(self.members) == before:
                raise UserError(f"{file}: no image in this tar file ({', '.join(sorted(PICTURES))})")

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        file, name, (offset, size), place = self.members[index]
        with file.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
            captions = self._captions_at(file, name, stream, place) if place else ()
        return Sample(f"{file}, {name}", data, captions)

    def _captions_at(self, file: Path, name: str, stream: Any, place: tuple[int, int, str]) -> tuple[str, ...]:
        offset, size, kind = place
        stream.seek(offset)
        try:
            text = stream.read(size).decode("utf-8-sig")
            if kind == ".txt":
                return _captions(text)
            row = dict(json.loads(text))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}, {name}{kind}: not a caption that can be read ({error})") from None
        return _captions(next((row[key] for key in _columns_of(self.column) if row.get(key)), None))

    def without_caption(self) -> list[str]:
        return [self[index].name for index in range(len(self)) if not self[index].captions]


def _tar_members(file: Path) -> list[tuple[Path, str, tuple[int, int], tuple[int, int, str] | None]]:
    """Each image of a tar file with what tells its caption, found by the name before the first dot."""
    images: dict[str, tuple[str, int, int]] = {}
    captions: dict[str, tuple[int, int, str]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, last = member.name.rpartition("/")
                stem, _, kind = last.partition(".")
                kind, key = f".{kind.lower()}", f"{folder}/{stem}"
                if member.isfile() and kind in PICTURES:
                    images[key] = (member.name, member.offset_data, member.size)
                elif member.isfile() and kind in (".txt", ".json"):
                    captions.setdefault(key, (member.offset_data, member.size, kind))
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{file}: not a tar file that can be read ({error}); it must not be compressed") from None
    return [(file, name, (at, size), captions.get(key)) for key, (name, at, size) in images.items()]


def _captions(value: Any) -> tuple[str, ...]:
    every = value if isinstance(value, (list, tuple)) else [value]
    return tuple(
        text.strip() for text in map(str, (caption for caption in every if caption is not None)) if text.strip()
    )


def _columns_of(column: str | None) -> tuple[str, ...]:
    return (column,) if column else CAPTION_COLUMNS


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_source(path: str, image_column: str = "image", caption_column: str | None = None) -> Source:
    """Find the captioned images of a folder, a parquet file, tar files or a hub name.

    A folder's captions are in metadata.jsonl, metadata.csv, or a .txt file beside each image. In tar files of a
    webdataset they are in a .txt or .json member of the image's name.

    Args:
        path: the folder; a .jsonl or .csv file in it; a folder that datasets saved; a .parquet file; a .tar file, or
            a folder of them; or the name of a dataset on the hub.
        image_column: the column of images, for parquet and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt.

    Raises:
        UserError: nothing there, or not in one of these forms; the message names the file.
    """
    place = Path(path).expanduser()
    if place.is_dir() and (place / "dataset_info.json").is_file() and (place / "state.json").is_file():
        return _columns(_saved(place), path, image_column, caption_column)
    if place.is_dir():
        tars = sorted(file for file in place.glob("*.tar") if file.is_file())
        return TarSource(tars, caption_column) if tars else _folder(place, METADATA, caption_column)
    if place.suffix in (".jsonl", ".csv") and place.is_file():
        return _folder(place.parent, (place.name,), caption_column)
    if place.suffix == ".tar" and place.is_file():
        return TarSource([place], caption_column)
    if place.suffix == ".parquet":
        if not place.is_file():
            raise UserError(f"{path}: no such file; datasets/build.py rebuilds the project's own sets")
        rows = _parquet(place)
    elif place.exists() or place.suffix or path.count("/") != 1:
        raise UserError(f"{path}: no such folder, .jsonl, .csv, .parquet or .tar file or hub dataset (owner/name)")
    else:
        rows = _hub(path)
    return _columns(rows, path, image_column, caption_column)


def _parquet(file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_parquet(str(file), keep_in_memory=False)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise UserError(f"{file}: cannot be read as parquet: {_first_line(error)}") from error


def _saved(folder: Path) -> datasets.Dataset:
    try:
        rows = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise UserError(f"{folder}: cannot be read as a saved dataset: {_first_line(error)}") from error
    if not isinstance(rows, datasets.Dataset):
        raise UserError(f"{folder}: holds several datasets; give the folder of one of them")
    return rows


def _hub(name: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        raise UserError(f"{name}: no such folder, and the hub did not give it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _columns(rows: datasets.Dataset, where: str, image: str, caption: str | None) -> Source:
    names = list(rows.column_names)
    if caption is None:
        caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    for key, column in (("image_column", image), ("caption_column", caption)):
        if column not in names:
            raise UserError(f"{where}: {key} {column!r} is not one of its columns {names}")
    rows = rows.select_columns([image, caption]).rename_columns({image: "image", caption: "caption"})  # type: ignore[dict-item]
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if isinstance(rows.features["caption"], datasets.Value):
        rows = rows.cast_column("caption", datasets.Value("string"))
    return Source(rows, where)


def _folder(folder: Path, names: Sequence[str], caption_column: str | None) -> Source:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UserError(f"{folder}: no images in this folder ({', '.join(sorted(PICTURES))})")
    captions = _metadata(folder, names, caption_column)
    if captions is None:
        captions = {file: _text_beside(file) for file in files}
    rows: dict[str, Any] = {"image": [{"path": str(file), "bytes": None} for file in files]}
    rows["caption"] = [list(captions.get(file, ())) for file in files]
    listed = datasets.List(datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": listed})
    return Source(datasets.Dataset.from_dict(rows, features=features), str(folder), str(folder))


def _text_beside(image: Path) -> tuple[str, ...]:
    file = image.with_suffix(".txt")
    try:
        text = file.read_text(encoding="utf-8-sig") if file.is_file() else ""
        return _captions(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None


def _metadata(folder: Path, names: Sequence[str], caption_column: str | None) -> dict[Path, tuple[str, ...]] | None:
    """Captions by image from the first of some files that the folder has; None where it has none of them."""
    for name in names:
        if not (file := folder / name).is_file():
            continue
        try:
            rows = list(_rows(file))
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
        if caption_column and not any(caption_column in row for _, row in rows):
            raise UserError(f"{file}: caption_column {caption_column!r} is in none of its rows")
        return dict(_entry(folder, file, number, row, caption_column) for number, row in rows)
    return None


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            yield from enumerate(csv.DictReader(stream), 2)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield number, dict(json.loads(line))
                except (ValueError, TypeError) as error:
                    raise UserError(f"{file}:{number}: not a JSON object ({error})") from None


def _entry(
    folder: Path, file: Path, number: int, row: dict[str, Any], column: str | None
) -> tuple[Path, tuple[str, ...]]:
    if not row.get("file_name") or not isinstance(row["file_name"], str):
        raise UserError(f"{file}:{number}: no 'file_name'; give the image's name, relative to {folder}")
    image = folder / os.path.normpath(row["file_name"])
    if not image.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file}:{number}: file_name {row['file_name']!r} leaves the folder")
    if not image.is_file():
        raise UserError(f"{file}:{number}: there is no image {row['file_name']!r} in {folder}")
    if image.suffix.lower() not in PICTURES:
        raise UserError(
            f"{file}:{number}: {row['file_name']!r} is of a kind not read here ({', '.join(sorted(PICTURES))})"
        )
    return image, _captions(next((row[name] for name in _columns_of(column) if row.get(name)), None))
