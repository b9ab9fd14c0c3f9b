"""The tensors of a checkpoint one at a time, under canonical names, whichever way the file holds them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from loratune.errors import UserError
from loratune.families.architectures import entries
from loratune.families.found import WEIGHTS, Configs
from loratune.families.layouts import Place, Shape
from loratune.families.single_file import canonical_keys
from loratune.formats.headers import read_header


@dataclass(frozen=True)
class Weights:
    """A checkpoint that is open.

    Args:
        path: of the file or folder.
        shapes: of the tensors in their modules, by canonical name with component (`unet.conv_in.weight`).
        files: the open file of each tensor.
        places: where in it each tensor is.
    """

    path: Path
    shapes: dict[str, Shape]
    files: dict[str, Any]
    places: dict[str, Place]

    def read(self, name: str) -> Tensor:
        """A tensor, in its dtype and in the shape of its module.

        Raises:
            UserError: the file cannot be read.
        """
        place = self.places[name]
        try:
            whole = self.files[name].get_slice(place.key)
            value = whole[:] if place.rows is None else whole[slice(*place.rows)]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: cannot be read ({error}); download or export it again") from None
        return cast(Tensor, (value.T if place.transposed else value).reshape(self.shapes[name]))


@contextmanager
def open_weights(path: Path, configs: Configs) -> Iterator[Weights]:
    """A base's weights: a single file in the original layout, or a folder in diffusers'.

    Raises:
        UserError: a tensor is missing, or has another size than the configurations say.
    """
    table = {f"{component}.{key}": (component, shape, place) for component, key, shape, place in entries(configs)}
    held = _held_in_folder(path) if path.is_dir() else None
    with ExitStack() as stack:
        opened: dict[Path, Any] = {}
        files, places = {}, {}
        for name, (component, shape, place) in table.items():
            file = path if held is None else path / component / WEIGHTS[component]
            if file not in opened:
                headers = read_header(file).tensors
                opened[file] = stack.enter_context(safe_open(file, framework="pt")), headers
            files[name], headers = opened[file]
            places[name] = place if held is None else Place(held.get(name, name), shape)
            _check(path, name, headers, places[name], shape)
        yield Weights(path, {name: shape for name, (_, shape, _) in table.items()}, files, places)


def _held_in_folder(folder: Path) -> dict[str, str]:
    """The keys in a folder's files, by canonical name with component."""
    held: dict[str, str] = {}
    for component, file in WEIGHTS.items():
        if (folder / component / file).is_file():
            keys = {key: key for key in read_header(folder / component / file).tensors}
            canonical = canonical_keys(component, cast(Any, keys))
            held |= {f"{component}.{name}": str(key) for name, key in canonical.items()}
    return held


def _check(path: Path, name: str, headers: dict[str, Any], place: Place, shape: Shape) -> None:
    if place.key not in headers:
        raise UserError(f"{path}: {place.key!r} is missing; the weights are not complete")
    found = headers[place.key].shape
    numbers = 1
    for size in found:
        numbers *= size
    wanted = 1
    for size in place.shape:
        wanted *= size
    if numbers != wanted or (place.rows is not None and found != place.shape):
        raise UserError(f"{path}: {place.key!r} has shape {list(found)}; this architecture has {list(place.shape)}")
