"""The numbers of safetensors files in numpy: made wide and rounded back; without torch, which loads late."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


class Float(NamedTuple):
    """A kind of floating point number.

    Args:
        kind: as numpy has it.
        eps: from 1 to the next number.
        smallest: the exponent of the smallest normal number, a power of 2.
        largest: the largest number.
    """

    kind: Any
    eps: float
    smallest: int
    largest: float

    @classmethod
    def of(cls, kind: Any) -> Float:
        """What is known of numpy's kind."""
        info: Any = ml_dtypes.finfo(kind)
        return cls(kind, float(info.eps), int(math.log2(float(info.smallest_normal))), float(info.max))


FLOATS = {
    "F8_E4M3": Float.of(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": Float.of(ml_dtypes.float8_e5m2),
    "F16": Float.of(np.float16),
    "BF16": Float.of(ml_dtypes.bfloat16),
    "F32": Float.of(np.float32),
    "F64": Float.of(np.float64),
}
NATIVE = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
INTEGERS = {"BOOL": np.bool_, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32}
INTEGERS |= {"U32": np.uint32, "I64": np.int64, "U64": np.uint64}


def widened(raw: Bytes, dtype: str, kind: Any = np.float32) -> Array:
    """A file's numbers as float32 or float64; exact, but for float64 made float32.

    Args:
        raw: their bytes, one piece.
        dtype: of them, one of FLOATS.
        kind: numpy's float32 or float64.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        return raw.view(FLOATS[dtype].kind).astype(kind)


def narrowed(values: Array, dtype: str) -> Bytes:
    """Numbers rounded once, to the nearest (ties to even), as a file has them.

    Beyond the largest number they become infinite; in 8 bits, of which one kind has no infinity, they become the
    largest.

    Args:
        values: float32 or float64.
        dtype: one of FLOATS.
    """
    values = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype not in NATIVE and values.dtype == np.float64:  # ml_dtypes would go by way of float32
            values = _odd(values)
        if dtype.startswith("F8"):
            values = values.clip(-FLOATS[dtype].largest, FLOATS[dtype].largest)
        return values.astype(FLOATS[dtype].kind).view(np.uint8)


def too_large(values: Array, dtype: str) -> int:
    """How many values are not finite, or so large that no number of a kind is within half a unit in the last place."""
    limit = FLOATS[dtype].largest
    half = float(spacing(np.array([limit]), dtype)[0]) / 2
    return values.size - int(np.count_nonzero(np.abs(values) < limit + half))


def _odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float64 rounded to odd float32, so that a second rounding to 16 bits or fewer is right.

    Boldo & Melquiond 2008, "Emulation of a FMA and correctly rounded sums".
    """
    near = values.astype(np.float32)
    wide = near.astype(np.float64)
    move = (wide != values) & (near.view(np.uint32) & 1 == 0)
    towards = np.where(wide < values, np.inf, -np.inf).astype(np.float32)
    return np.where(move, np.nextafter(near, towards), near)


def spacing(values: Array, dtype: str) -> NDArray[np.float64]:
    """The unit in the last place of each value in a kind of number."""
    exponent = np.frexp(values.astype(np.float64))[1] - 1
    exponent[values == 0] = FLOATS[dtype].smallest
    return np.ldexp(FLOATS[dtype].eps, np.maximum(exponent, FLOATS[dtype].smallest))


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file, perhaps mapped.

    Args:
        raw: its bytes, one piece.
        dtype: as safetensors names it.
        shape: of the tensor.
    """

    raw: Bytes
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any, dtype: str) -> Stored:
        """A torch tensor on the CPU, whose memory is shared where it lies in one piece."""
        import torch

        return cls(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy(), dtype, tuple(tensor.shape))

    def wide(self, kind: Any) -> Array:
        """Its numbers, in its shape, as numpy's float32 or float64."""
        return widened(self.raw, self.dtype, kind).reshape(self.shape)

    @property
    def finite(self) -> bool:
        """Whether all its values are finite numbers; its dtype is one of FLOATS."""
        return bool(np.isfinite(self.wide(np.float64 if self.dtype == "F64" else np.float32)).all())

    @property
    def number(self) -> float:
        """The one number that it holds.

        Raises:
            ValueError: it holds none, or more, or a complex one.
        """
        if math.prod(self.shape) != 1:
            raise ValueError(f"has shape {self.shape}; it must be one number")
        if self.dtype in FLOATS:
            return float(self.wide(np.float64).item())
        if self.dtype not in INTEGERS:
            raise ValueError(f"is {self.dtype}; it must be a real number")
        return float(self.raw.view(INTEGERS[self.dtype]).item())
