"""Where the tensors of a base lie in its files; without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import UserError
from loratune.families.architectures import entries
from loratune.families.family import Part
from loratune.families.layouts import Config, Place, Shape
from loratune.formats.headers import Header, TensorInfo


@dataclass(frozen=True)
class Slot:
    """A tensor of a module in a file.

    Args:
        file: which of the base's files.
        key: the file's tensor.
        dtype: of it, as safetensors names it.
        shape: of the tensor, as the module has it.
        start: first of its bytes in the data section; they lie in one piece.
        stop: the byte after them.
        transposed: whether the file has it with rows and columns changed.
    """

    file: Path
    key: str
    dtype: str
    shape: Shape
    start: int
    stop: int
    transposed: bool = False

    @property
    def flat_shape(self) -> tuple[int, int]:
        """(out, in k k)."""
        return self.shape[0], math.prod(self.shape[1:])


Held = Mapping[str, tuple[Path, str, TensorInfo]]
"""File, key and place of tensors, by canonical name with component; in a single file by their keys in it."""


def held_in_file(path: Path, header: Header) -> Held:
    """The tensors of a single file, by key."""
    return {key: (path, key, info) for key, info in header.tensors.items()}


def held_in_folder(files: Mapping[Part, Mapping[Path, Header]]) -> Held:
    """The tensors of a diffusers folder's files, by canonical name with component (`unet.conv_in.weight`).

    Args:
        files: by component.
    """
    return {
        f"{part.name}.{name}": (path, key, info)
        for part, headers in files.items()
        for path, header in headers.items()
        for key, info in header.tensors.items()
        if (name := part.canonical(key)) is not None
    }


def slots_of(
    source: Path, stored: Held, configs: Mapping[str, Config], single: bool, names: Collection[str] | None = None
) -> Iterator[tuple[str, Slot]]:
    """Where tensors lie, by canonical name with component; of every part with a configuration.

    Args:
        source: the base, for messages.
        stored: what its files hold.
        configs: by component.
        single: whether the base is a single file in the original layout.
        names: the tensors that are wanted; all, where none are given.

    Raises:
        UserError: one of them is not there, or has another size.
    """
    for component, key, shape, in_file in entries(configs):
        name = f"{component}.{key}"
        if names is None or name in names:
            place = in_file if single else Place(name, shape)
            yield name, _slot(source, stored.get(place.key), shape, place)


def _slot(source: Path, entry: tuple[Path, str, TensorInfo] | None, shape: Shape, place: Place) -> Slot:
    if entry is None:
        raise UserError(f"{source}: {place.key!r} is missing; the checkpoint is not complete, download it again")
    path, key, info = entry
    if math.prod(info.shape) != math.prod(place.shape) or (place.rows is not None and info.shape != place.shape):
        fault = f"has shape {list(info.shape)} instead of {list(place.shape)}"
        raise UserError(f"{path}: {key!r} {fault}; the checkpoint is not complete, download it again")
    start, stop = info.start, info.stop
    if place.rows is not None:
        row = (info.stop - info.start) // place.shape[0]
        start, stop = info.start + place.rows[0] * row, info.start + place.rows[1] * row
    return Slot(path, key, info.dtype, shape, start, stop, place.transposed)
