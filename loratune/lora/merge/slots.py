"""Where the weights of a base's layers lie in its files; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import UserError
from loratune.families.architectures import canonical_text_name, entries, module_names
from loratune.families.layouts import Config, Place, Shape
from loratune.formats.headers import Header, TensorInfo


@dataclass(frozen=True)
class Slot:
    """The weight of a layer in a file.

    Args:
        file: which of the base's files.
        key: the file's tensor.
        dtype: of it, as safetensors names it.
        shape: of the weight, as the layer has it.
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


def file_slots(path: Path, header: Header, configs: Mapping[str, Config]) -> dict[str, Slot]:
    """The weights of all layers that a LoRA can adapt, by canonical name, in a single file.

    Raises:
        UserError: one of them is not in the file, or has another size there.
    """
    adaptable = set(module_names(configs))
    slots: dict[str, Slot] = {}
    for component, key, shape, place in entries(configs):
        name = f"{component}.{key.removesuffix('.weight')}"
        if key.endswith(".weight") and name in adaptable:
            slots[name] = _slot(path, header.tensors.get(place.key), shape, place)
    return slots


def _slot(path: Path, info: TensorInfo | None, shape: Shape, place: Place) -> Slot:
    if info is None or math.prod(info.shape) != math.prod(place.shape):
        fault = "is missing" if info is None else f"has shape {list(info.shape)} instead of {list(place.shape)}"
        raise UserError(f"{path}: {place.key!r} {fault}; the checkpoint is not complete, download it again")
    start, stop = info.start, info.stop
    if place.rows is not None:
        row = (info.stop - info.start) // place.shape[0]
        start, stop = info.start + place.rows[0] * row, info.start + place.rows[1] * row
    return Slot(path, place.key, info.dtype, shape, start, stop, place.transposed)


def component_slots(component: str, files: Mapping[Path, Header]) -> dict[str, Slot]:
    """The weights of all layers of a diffusers folder's component, by canonical name."""
    slots: dict[str, Slot] = {}
    for path, header in files.items():
        for key, info in header.tensors.items():
            if key.endswith(".weight") and len(info.shape) in (2, 4) and "embedding" not in key.split(".")[-2]:
                name = key.removesuffix(".weight")
                named = name if component == "unet" else canonical_text_name(name)
                slots[f"{component}.{named}"] = Slot(path, key, info.dtype, info.shape, info.start, info.stop)
    return slots
