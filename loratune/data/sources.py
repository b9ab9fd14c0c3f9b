"""Captioned pictures from where people keep them, as one Hugging Face dataset."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from loratune.errors import UserError

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
CAPTION_COLUMNS = ("text", "caption", "prompt")


@dataclass(frozen=True)
class Sample:
    """One picture, still encoded, and what it is called; the caption is None where there is none."""

    name: str
    data: bytes
    caption: str | None


class Source:
    """Samples by index, read from disk (or from Arrow) only when asked for.

    Args:
        rows: a dataset with columns image (undecoded) and caption.
        where: for messages.
    """

    def __init__(self, rows: datasets.Dataset, where: str) -> None:
        self.rows, self.where = rows, where

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image: dict[str, Any] = row["image"] or {}  # an empty cell is an unreadable picture
        data, path = image.get("bytes"), image.get("path")
        if data is None:
            data = _read(path) if path else b""
        return Sample(path or f"{self.where}, row {index}", data, row["caption"])

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_source(path: str, image_column: str = "image", caption_column: str | None = None) -> Source:
    """Find the captioned pictures of a folder, a parquet file or a hub name.

    A folder's captions are in metadata.jsonl, metadata.csv, or a .txt file beside each picture.

    Args:
        path: the folder, the .parquet file, or the name of a dataset on the hub.
        image_column: the column of pictures, for parquet and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt.

    Raises:
        UserError: nothing there, or not in one of these forms; the message names the file.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _folder(place, caption_column)
    if place.suffix == ".parquet":
        if not place.is_file():
            raise UserError(f"{path}: no such file; datasets/build.py rebuilds the project's own sets")
        rows = _parquet(place)
    elif place.exists() or place.suffix or path.count("/") != 1:
        raise UserError(f"{path}: no such folder, .parquet file or hub dataset (owner/name)")
    else:
        rows = _hub(path)
    return _columns(rows, path, image_column, caption_column)


def _parquet(file: Path) -> datasets.Dataset:
    try:
        return datasets.Dataset.from_parquet(str(file), keep_in_memory=False)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise UserError(f"{file}: cannot be read as parquet: {_first_line(error)}") from error


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
    rows = rows.cast_column("image", datasets.Image(decode=False)).cast_column("caption", datasets.Value("string"))
    return Source(rows, where)


def _folder(folder: Path, caption_column: str | None) -> Source:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in PICTURES and file.is_file())
    if not files:
        raise UserError(f"{folder}: no pictures in this folder ({', '.join(sorted(PICTURES))})")
    captions = _metadata(folder, caption_column)
    if captions is None:
        captions = {file: _text_beside(file) for file in files}
    rows = {"image": [{"path": str(file), "bytes": None} for file in files]}
    rows["caption"] = [captions.get(file) for file in files]  # type: ignore[misc]
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": datasets.Value("string")})
    return Source(datasets.Dataset.from_dict(rows, features=features), str(folder))


def _text_beside(picture: Path) -> str | None:
    file = picture.with_suffix(".txt")
    try:
        return file.read_text(encoding="utf-8-sig").strip() or None if file.is_file() else None
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None


def _metadata(folder: Path, caption_column: str | None) -> dict[Path, str | None] | None:
    """Captions by picture from metadata.jsonl or metadata.csv; None where the folder has neither."""
    for name in ("metadata.jsonl", "metadata.csv"):
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


def _entry(folder: Path, file: Path, number: int, row: dict[str, Any], column: str | None) -> tuple[Path, str | None]:
    if not row.get("file_name") or not isinstance(row["file_name"], str):
        raise UserError(f"{file}:{number}: no 'file_name'; give the picture's name, relative to {folder}")
    picture = folder / os.path.normpath(row["file_name"])
    if not picture.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{file}:{number}: file_name {row['file_name']!r} leaves the folder")
    if not picture.is_file():
        raise UserError(f"{file}:{number}: there is no picture {row['file_name']!r} in {folder}")
    if picture.suffix.lower() not in PICTURES:
        raise UserError(
            f"{file}:{number}: {row['file_name']!r} is of a kind not read here ({', '.join(sorted(PICTURES))})"
        )
    names = (column,) if column else CAPTION_COLUMNS
    caption = next((row[name] for name in names if row.get(name)), None)
    return picture, str(caption).strip() or None if caption is not None else None
