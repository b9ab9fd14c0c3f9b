"""Captioned images from where people keep them."""

from __future__ import annotations

from pathlib import Path

import datasets
from loratune.data.folder import METADATA, read_folder
from loratune.data.samples import CAPTION_COLUMNS, IMAGE_SUFFIXES, Source
from loratune.data.tars import TarSource
from loratune.errors import UserError


def read_source(path: str, image_column: str = "image", caption_column: str | None = None) -> Source:
    """Find the captioned images of a folder, a parquet file, tar files or a hub name.

    A folder's captions are in metadata.jsonl, metadata.csv, or a .txt or .caption file beside each image. In tar
    files of a webdataset they are in a .txt or .json member of the image's name.

    Args:
        path: the folder; a .jsonl or .csv file in it; a folder that datasets saved; a .parquet file; a .tar file, or
            a folder of them; or the name of a dataset on the hub.
        image_column: the column of images, for parquet and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt.

    Raises:
        UserError: nothing there, or not in one of these forms; the message names the file.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        return _from_folder(place, path, image_column, caption_column)
    if place.suffix in (".jsonl", ".csv") and place.is_file():
        return read_folder(place.parent, (place.name,), caption_column)
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
    beside = place.absolute().parent if place.suffix == ".parquet" else None
    return _columns(rows, path, image_column, caption_column, beside)


def _from_folder(folder: Path, path: str, image_column: str, caption_column: str | None) -> Source:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(file.parent.name for file in folder.glob("*/dataset_info.json"))
        raise UserError(
            f"{path}: holds the datasets {', '.join(splits)}; give one of them, such as {folder / splits[0]}"
        )
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return _columns(_saved(folder), path, image_column, caption_column)
    tars = sorted(file for file in folder.glob("*.tar") if file.is_file())
    has_images = any(file.suffix.lower() in IMAGE_SUFFIXES and file.is_file() for file in folder.rglob("*"))
    return TarSource(tars, caption_column) if tars and not has_images else read_folder(folder, METADATA, caption_column)


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
    assert isinstance(rows, datasets.Dataset)  # several have a dataset_dict.json
    return rows


def _hub(name: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub client raises its own, requests' and OSError's kinds
        raise UserError(f"{name}: no such folder, and the hub did not give it: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _columns(rows: datasets.Dataset, where: str, image: str, caption: str | None, beside: Path | None = None) -> Source:
    names = list(rows.column_names)
    if caption is None:
        caption = next((name for name in CAPTION_COLUMNS if name in names), None)
    for key, column in (("image_column", image), ("caption_column", caption)):
        if column not in names:
            raise UserError(f"{where}: {key} {column!r} is not one of its columns {names}")
    if isinstance(rows.features[caption], datasets.ClassLabel):
        labels = ", ".join(rows.features[caption].names[:3])
        raise UserError(f"{where}: caption_column {caption!r} holds class numbers ({labels}, ...), no captions")
    rows = rows.select_columns([image, caption]).rename_columns({image: "image", caption: "caption"})  # type: ignore[dict-item]
    return Source(rows.cast_column("image", datasets.Image(decode=False)), where, beside=beside)
