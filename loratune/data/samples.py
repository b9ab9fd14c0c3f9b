"""Captioned images by index, wherever they are kept."""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from loratune.errors import UserError

IMAGE_SUFFIXES = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNREAD_SUFFIXES = {".heic", ".heif", ".jxl", ".psd", ".raw", ".svg", ".tga"}
CAPTION_COLUMNS = ("text", "caption", "prompt")
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 30
"""A larger file is not read: a sparse file can claim to be hundreds of gigabytes."""


@dataclass(frozen=True)
class Sample:
    """One image, still encoded, and its captions.

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
        skipped: files that lie there and are not used, each with the reason.
        beside: the folder that holds the files which `rows` name, where these are a stranger's words: no name leads
            out of it.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        where: str,
        root: str = "",
        skipped: dict[str, str] | None = None,
        beside: Path | None = None,
    ) -> None:
        self.rows, self.where, self.root, self.beside = rows, where, root, beside
        self.skipped = dict(skipped or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        row = self.rows[index]
        image: dict[str, Any] = row["image"] or {}  # an empty cell is an unreadable image
        data, path = image.get("bytes"), image.get("path")
        name = path or f"{self.where}, row {index}"
        captions = captions_of(row["caption"], f"{self.where}, row {index}")
        if data is None:
            data = read_image(self._place(path)) if path else b""
        return Sample(name, data, captions, self.root)

    def _place(self, path: str) -> Path:
        if self.beside is None:
            return Path(path)
        file = self.beside / path
        if not file.resolve().is_relative_to(self.beside.resolve()):
            raise UserError(f"{self.where}: the image {path!r} lies outside of {self.beside}; put it there")
        return file

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def without_caption(self) -> list[str]:
        """Names of the images that have no caption."""
        captions = (captions_of(value, f"{self.where}, row {row}") for row, value in enumerate(self.rows["caption"]))
        missing = [row for row, some in enumerate(captions) if not some]
        return [(self.rows[row]["image"] or {}).get("path") or f"{self.where}, row {row}" for row in missing]


def captions_of(value: Any, where: str) -> tuple[str, ...]:
    """The captions in a cell: text, a number, a list of them, or nothing (None, NaN, blanks).

    Raises:
        UserError: it is something else, such as an object; `where` names it.
    """
    cells = value if isinstance(value, (list, tuple)) else [value]
    texts = []
    for cell in cells:
        if cell is None or (isinstance(cell, float) and math.isnan(cell)):
            continue
        if isinstance(cell, bool) or not isinstance(cell, (str, int, float)):
            shown = str(cell) if len(str(cell)) < 60 else f"{str(cell)[:57]}..."
            raise UserError(f"{where}: the caption is {shown}; give text, or a list of texts")
        texts.append(str(cell).strip())
    return tuple(text for text in texts if text)


def caption_columns(column: str | None) -> tuple[str, ...]:
    """The columns that may hold captions, the first that is there counts."""
    return (column,) if column else CAPTION_COLUMNS


def read_image(path: Path | str) -> bytes:
    """A file's bytes.

    Raises:
        UserError: it cannot be read, is no file (a pipe would be waited for, a device has no end), or is too large.
    """
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            raise UserError(f"{path}: cannot be read (no file, but a folder, pipe or device)")
        if info.st_size > MAX_IMAGE_BYTES:
            raise UserError(f"{path}: has {info.st_size} bytes; an image may have at most {MAX_IMAGE_BYTES}")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
