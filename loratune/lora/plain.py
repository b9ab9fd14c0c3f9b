"""LoRA files of plain B and A, as most are, in numpy: a merge of them needs no torch, which takes seconds to load."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loratune.formats.headers import Header, read_header
from loratune.formats.numbers import NATIVE, Array, Bytes, widened
from loratune.lora.keys import Described, LayerKeys, describe_keys
from loratune.lora.metadata import padded_layers, stored_alpha

DTYPES = (*NATIVE, "BF16")


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file, mapped."""

    raw: Bytes
    dtype: str
    shape: tuple[int, ...]

    def wide(self, kind: Any) -> Array:
        """Its numbers, in its shape, as numpy's float32 or float64."""
        return widened(self.raw, self.dtype, kind).reshape(self.shape)


@dataclass(frozen=True)
class PlainLayer:
    """B and A beside one W_0, as `lora_layers.LoRALayer`, whose fields have the same names and shapes."""

    down: Stored
    up: Stored
    alpha: float
    mid: Stored | None = None
    magnitude: None = None

    @property
    def parts(self) -> tuple[Stored, ...]:
        """Its tensors."""
        return tuple(part for part in (self.down, self.up, self.mid) if part is not None)

    @property
    def rank(self) -> int:
        """r, by which alpha is divided."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @property
    def flat_shape(self) -> tuple[int, int]:
        """(out, in k k) of the W_0 that this was made for."""
        kernel = 1 if self.mid is None else math.prod(self.mid.shape[2:])
        return self.up.shape[0], math.prod(self.down.shape[1:]) * kernel

    @property
    def fits(self) -> bool:
        """Whether the shapes fit one another: (r, in) and (out, r), or those of a convolution."""
        down, up = self.down.shape, self.up.shape
        fits = len(down) == len(up) and len(down) in (2, 4) and up[2:] in ((), (1, 1))
        fits = fits and up[1] == down[0] and 0 not in (*down, *up)
        if self.mid is None or not fits:
            return fits
        return len(self.mid.shape) == 4 and self.mid.shape[:2] == (down[0], down[0]) and down[2:] == (1, 1)

    def factors(self, kind: Any) -> tuple[Array, Array]:
        """(alpha / r) B, shape (out, r), and A, shape (r, in k k), in numpy's float32 or float64.

        The kernel of a Tucker-decomposed convolution is folded into A: A'_i,nkl = sum_j T_ijkl A_jn.
        """
        up, down = self.up.wide(kind).reshape(self.up.shape[0], -1), self.down.wide(kind).reshape(self.rank, -1)
        if self.mid is not None:
            folded = self.mid.wide(kind).transpose(0, 2, 3, 1) @ down
            down = np.ascontiguousarray(folded.transpose(0, 3, 1, 2)).reshape(self.rank, -1)
        return kind(self.scale) * up, down


@dataclass(frozen=True)
class PlainFile:
    """A LoRA's layers by canonical name."""

    layers: Mapping[str, PlainLayer]


def read_plain(path: Path | str, names: Iterable[str] = ()) -> PlainFile | None:
    """A LoRA file of plain layers without a fault; None for any other, of which `read_lora` has more to say.

    Args:
        path: of the file.
        names: canonical names, with component, of an architecture's layers.

    Raises:
        UserError: its header cannot be read.
    """
    header = read_header(path)
    described = describe_keys(header, names)
    if described.unmapped or described.tokens or not described.layers:
        return None
    data = np.memmap(path, np.uint8, "r", header.data_offset)
    held = {key: Stored(data[info.start : info.stop], info.dtype, info.shape) for key, info in header.tensors.items()}
    if not all(_sound(stored) for stored in held.values()):
        return None
    try:
        layers = {name: _layer(path, name, keys, held, described, header) for name, keys in described.layers.items()}
    except ValueError:
        return None
    for name in padded_layers(header.metadata):
        layer = layers.get(name)
        if layer and not any(part.wide(np.float32).any() for part in layer.parts):
            del layers[name]
    return PlainFile(layers) if layers else None


def _sound(stored: Stored) -> bool:
    """Whether all its values are finite numbers."""
    if stored.dtype not in DTYPES:
        return False
    if stored.dtype == "F64":
        return bool(np.isfinite(stored.raw.view(np.float64)).all())
    return bool(np.isfinite(stored.wide(np.float32)).all())


def _layer(
    path: Path | str, name: str, keys: LayerKeys, held: Mapping[str, Stored], described: Described, header: Header
) -> PlainLayer:
    """A layer.

    Raises:
        ValueError: it is of another kind, or has a fault.
    """
    parts = {part.field: held[key] for part, key in keys.keys.items()}
    given = parts.pop("alpha", None)
    if keys.kind != "LoRA" or keys.dora or (given is not None and math.prod(given.shape) != 1):
        raise ValueError
    if given is None:
        alpha = stored_alpha(path, name, keys.rank or 0, described.format, header.metadata)
    else:
        alpha = float(given.wide(np.float64).item())
    layer = PlainLayer(parts["down"], parts["up"], alpha, parts.get("mid"))
    if not layer.fits:
        raise ValueError
    return layer
