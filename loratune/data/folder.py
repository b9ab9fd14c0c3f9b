"""A folder of images with captions beside them, or in a metadata file."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from loratune.data.samples import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    UNREAD_SUFFIXES,
    Source,
    caption_columns,
    captions_of,
)
from loratune.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv")
TEXT_SUFFIXES = (".txt", ".caption")
"""Of caption files beside images, in any case; the first that is there counts. sd-scripts' default is .caption."""
UNREAD_KIND = "is an image of a kind that is not read; save it as PNG"
NO_IMAGE = "is a caption file without an image"
RUN_FILES = ("recipe.yaml", "tensorboard")


def read_folder(folder: Path, metadata: Sequence[str], caption_column: str | None) -> Source:
    """The images of a folder and of those in it; hidden files, and the folders of runs, are passed over.

    Args:
        folder: of the images.
        metadata: names of files with captions, of which the first that is there counts; without one captions are
            in text files beside the images.
        caption_column: of the metadata; by default the first of text, caption, prompt.

    Raises:
        UserError: there is no image, or a caption cannot be read; the message names file and line.
    """
    files, skipped = list_files(folder)
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    if not images:
        raise UserError(f"{folder}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))}){_tables(files)}")
    captions = _metadata(folder, metadata, caption_column, images)
    if captions is None:
        captions = _texts_beside(files, images, skipped)
    for file in files:
        if file.suffix.lower() in UNREAD_SUFFIXES:
            skipped[str(file)] = UNREAD_KIND
        elif file.suffix.lower() == ".tar":
            skipped[str(file)] = "a .tar file beside images; name it in data.sources to use it"
    rows: dict[str, Any] = {"image": [{"path": str(file), "bytes": None} for file in images]}
    rows["caption"] = [list(captions.get(file, ())) for file in images]
    listed = datasets.List(datasets.Value("string"))
    features = datasets.Features({"image": datasets.Image(decode=False), "caption": listed})
    return Source(datasets.Dataset.from_dict(rows, features=features), str(folder), str(folder), skipped)


def list_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder and of those in it, sorted, and what is left out of them with the reason.

    Names that begin with a dot are hidden, as are macOS' __MACOSX folders; they are left out without a word.
    """
    files: list[Path] = []
    skipped: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        inside = Path(place)
        if inside != folder and all((inside / name).exists() for name in RUN_FILES):
            skipped[place] = "is the folder of a run"
            folders.clear()
            continue
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in names:
            file = inside / name
            if _is_hidden(name) or not file.is_file():
                continue
            if not _is_utf8(str(file)):
                skipped[ascii(str(file))] = "its name is not UTF-8; rename it"
                continue
            files.append(file)
    return sorted(files), skipped


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tables(files: Sequence[Path]) -> str:
    """A hint at tables in a folder without images, such as a clone of a dataset from the hub."""
    tables = [file for file in files if file.suffix.lower() == ".parquet"]
    return f"; there are {len(tables)} .parquet files: give {tables[0]}" if tables else ""


def _texts_beside(
    files: Sequence[Path], images: Sequence[Path], skipped: dict[str, str]
) -> dict[Path, tuple[str, ...]]:
    """The captions in text files named as the images: `a.txt` or `a.png.txt` for a.png."""
    texts: dict[Path, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in TEXT_SUFFIXES:
            texts.setdefault(file.with_suffix(""), []).append(file)
    captions, used = {}, set[Path]()
    for image in images:
        beside = [*texts.get(image.with_suffix(""), ()), *texts.get(image, ())]
        ordered = sorted(beside, key=lambda file: TEXT_SUFFIXES.index(file.suffix.lower()))
        if ordered:
            captions[image] = _read_text(ordered[0])
            used.add(ordered[0])
            skipped |= {str(file): f"{ordered[0].name} holds the caption of {image.name}" for file in ordered[1:]}
    loose = [file for some in texts.values() for file in some if file not in used and str(file) not in skipped]
    skipped |= {str(file): NO_IMAGE for file in loose}
    return captions


def _read_text(file: Path) -> tuple[str, ...]:
    if (size := file.stat().st_size) > MAX_CAPTION_BYTES:
        raise UserError(f"{file}: has {size} bytes; a caption may have at most {MAX_CAPTION_BYTES}")
    try:
        return captions_of(file.read_text(encoding="utf-8-sig"), str(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None


def _metadata(
    folder: Path, names: Sequence[str], caption_column: str | None, images: Sequence[Path]
) -> dict[Path, tuple[str, ...]] | None:
    """Captions by image from the first of some files that the folder has; None where it has none of them."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        return None
    try:
        rows = list(_rows(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
    if caption_column and not any(caption_column in row for _, row in rows):
        raise UserError(f"{file}: caption_column {caption_column!r} is in none of its rows")
    normal = {unicodedata.normalize("NFC", str(image)): image for image in images}
    captions: dict[Path, tuple[str, ...]] = {}
    for number, row in rows:
        image = _image_of(folder, f"{file}:{number}", row, normal)
        cell = next((row[name] for name in caption_columns(caption_column) if row.get(name)), None)
        captions[image] = (*captions.get(image, ()), *captions_of(cell, f"{file}:{number}"))
    return captions


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        if file.suffix == ".csv":
            yield from _csv_rows(file, stream)
            return
        for number, line in enumerate(stream, 1):
            if line.strip():
                try:
                    yield number, dict(json.loads(line))
                except (ValueError, TypeError, RecursionError) as error:
                    raise UserError(f"{file}:{number}: not a JSON object ({error})") from None


def _csv_rows(file: Path, stream: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(stream, skipinitialspace=True)
    try:
        columns = reader.fieldnames or []
        if len(columns) == 1 and ";" in columns[0]:
            raise UserError(f"{file}:1: its columns are separated by ';'; separate them by commas")
        for row in reader:
            if None in row:
                cells = f"{len(columns) + len(row[None])} cells for {len(columns)} columns"  # type: ignore[call-overload]
                raise UserError(f"{file}:{reader.line_num}: {cells}; put captions with commas in double quotes")
            yield reader.line_num, row
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from None


def _image_of(folder: Path, where: str, row: dict[str, Any], normal: dict[str, Path]) -> Path:
    """The image of a row, as it is listed; a link in the folder may point anywhere, a name may not leave it."""
    name = row.get("file_name")
    if not name or not isinstance(name, str):
        raise UserError(f"{where}: no 'file_name'; give the image's name, relative to {folder}")
    image = Path(os.path.normpath(folder.absolute() / name))
    if "\\" in name and not image.exists():
        image = Path(os.path.normpath(folder.absolute() / name.replace("\\", "/")))
    if not _is_within(image, folder):
        raise UserError(f"{where}: file_name {name!r} leaves the folder")
    image = folder / image.relative_to(folder.absolute())
    listed = normal.get(unicodedata.normalize("NFC", str(image)))
    if listed is not None:
        return listed
    if not image.is_file():
        raise UserError(f"{where}: there is no image {name!r} in {folder}")
    if image.suffix.lower() in IMAGE_SUFFIXES:
        raise UserError(f"{where}: {name!r} is hidden, or in the folder of a run; move it")
    raise UserError(f"{where}: {name!r} is of a kind not read here ({', '.join(sorted(IMAGE_SUFFIXES))})")


def _is_within(image: Path, folder: Path) -> bool:
    return image.is_relative_to(folder.absolute()) and image.parent.resolve().is_relative_to(folder.resolve())
