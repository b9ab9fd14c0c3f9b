"""Captioned images in the tar files of a webdataset, read at their offsets."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune.data.samples import (
    IMAGE_SUFFIXES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    Sample,
    Source,
    caption_columns,
    captions_of,
)
from loratune.errors import UserError


@dataclass(frozen=True)
class Member:
    """Where a member's bytes lie in a tar file.

    Args:
        name: in the tar; never used as a path.
        offset: of its first byte.
        size: in bytes.
    """

    name: str
    offset: int
    size: int


class TarSource(Source):
    """Samples of webdataset's tar files.

    A caption is in the .txt or .json member of the image's name without its ending, or else without all that comes
    after the first dot, as webdataset has it.

    Args:
        files: tar files, not compressed.
        caption_column: of .json members; by default the first of text, caption, prompt.

    Raises:
        UserError: a file is no tar file, or has no image; the message names it.
    """

    def __init__(self, files: Sequence[Path], caption_column: str | None) -> None:
        self.column, self.root = caption_column, ""
        self.skipped: dict[str, str] = {}
        self.members: list[tuple[Path, Member, Member | None]] = []
        for file in files:
            members = self._images(file)
            if not members:
                raise UserError(f"{file}: no image in this tar file ({', '.join(sorted(IMAGE_SUFFIXES))})")
            self.members += members

    def _images(self, file: Path) -> list[tuple[Path, Member, Member | None]]:
        images, captions = {}, {}
        for member in _members(file):
            suffix = Path(member.name).suffix.lower()
            if suffix in IMAGE_SUFFIXES:
                images[member.name] = member
            elif suffix in (".txt", ".json"):
                captions[member.name.removesuffix(Path(member.name).suffix)] = member
            else:
                self.skipped[f"{file}, {member.name}"] = "is neither an image nor a caption"
        pairs = [(file, image, captions.get(_stem(name)) or captions.get(_key(name))) for name, image in images.items()]
        used = {caption.name for _, _, caption in pairs if caption}
        for caption in captions.values():
            if caption.name not in used:
                self.skipped[f"{file}, {caption.name}"] = "is a caption without an image"
        return pairs

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Sample:
        file, image, caption = self.members[index]
        with file.open("rb") as stream:
            data = _bytes(file, stream, image, MAX_IMAGE_BYTES)
            captions = self._captions(file, stream, caption) if caption else ()
        return Sample(f"{file}, {image.name}", data, captions)

    def _captions(self, file: Path, stream: Any, member: Member) -> tuple[str, ...]:
        where = f"{file}, {member.name}"
        try:
            text = _bytes(file, stream, member, MAX_CAPTION_BYTES).decode("utf-8-sig")
            if member.name.lower().endswith(".txt"):
                return captions_of(text, where)
            row = dict(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{where}: not a caption that can be read ({error})") from None
        return captions_of(next((row[key] for key in caption_columns(self.column) if row.get(key)), None), where)

    def without_caption(self) -> list[str]:
        return [self[index].name for index in range(len(self)) if not self[index].captions]


def _stem(name: str) -> str:
    return name.removesuffix(Path(name).suffix)


def _key(name: str) -> str:
    """webdataset's key of a sample: the name before the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _members(file: Path) -> list[Member]:
    """The plain files in a tar file that could be there: sizes and places within it, no hidden ones."""
    length = file.stat().st_size
    members = []
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                if not info.isreg() or info.issparse() or _hidden(info.name):
                    continue
                if info.size < 0 or info.offset_data + info.size > length:
                    raise UserError(f"{file}, {info.name}: is said to have {info.size} bytes, which the file has not")
                members.append(Member(info.name, info.offset_data, info.size))
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError, IndexError, RecursionError) as error:
        raise UserError(f"{file}: not a tar file that can be read ({error}); it must not be compressed") from None
    return members


def _hidden(name: str) -> bool:
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def _bytes(file: Path, stream: Any, member: Member, most: int) -> bytes:
    if member.size > most:
        raise UserError(f"{file}, {member.name}: has {member.size} bytes; it may have at most {most}")
    stream.seek(member.offset)
    content: bytes = stream.read(member.size)
    return content
