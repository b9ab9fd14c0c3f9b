"""The numbers of safetensors files in numpy: 16-bit kinds made wide and rounded back; without torch, which loads late.

numpy knows no bfloat16 and converts float16 one number at a time; here both are whole-array operations on the bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Bytes = NDArray[np.uint8]


class Float(NamedTuple):
    """A kind of floating point number.

    Args:
        eps: from 1 to the next number.
        smallest: the exponent of the smallest normal number, a power of 2.
        largest: the largest number.
    """

    eps: float
    smallest: int
    largest: float


FLOATS = {
    "F8_E4M3": Float(2.0**-3, -6, 448.0),
    "F8_E5M2": Float(2.0**-2, -14, 57344.0),
    "F16": Float(2.0**-10, -14, 65504.0),
    "BF16": Float(2.0**-7, -126, (2 - 2.0**-7) * 2.0**127),
    "F32": Float(2.0**-23, -126, float(np.finfo(np.float32).max)),
    "F64": Float(2.0**-52, -1022, float(np.finfo(np.float64).max)),
}
NATIVE = {"F16": np.float16, "F32": np.float32, "F64": np.float64}
BY_TORCH = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
INTEGERS = {"BOOL": np.bool_, "I8": np.int8, "U8": np.uint8, "I16": np.int16, "U16": np.uint16, "I32": np.int32}
INTEGERS |= {"U32": np.uint32, "I64": np.int64, "U64": np.uint64}
TWO_TO_112 = np.float32(2.0**112)  # float32's exponents begin that much lower than float16's


def widened(raw: Bytes, dtype: str, kind: Any = np.float32) -> Array:
    """A file's numbers as float32 or float64; exact, but for float64 made float32.

    Args:
        raw: their bytes, one piece.
        dtype: of them, one of FLOATS.
        kind: numpy's float32 or float64.
    """
    if dtype == "F16" and (bits := raw.view(np.uint16)).size and int((bits & 0x7FFF).max()) < 0x7C00:
        return _wide_half(raw.view(np.int16)).astype(kind, copy=False)
    with np.errstate(invalid="ignore", over="ignore"):
        if dtype in NATIVE:
            return raw.view(NATIVE[dtype]).astype(kind)
        if dtype == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(kind, copy=False)
    import torch

    values = torch.from_numpy(raw).view(getattr(torch, BY_TORCH[dtype])).float()
    return values.numpy().astype(kind, copy=False)


def _wide_half(bits: NDArray[np.int16]) -> Array:
    """Finite float16 numbers by their bits as float32: shifted to their places and scaled by 2^112, which is exact."""
    wide = bits.astype(np.int32)  # the sign is repeated to the left, and stays where float32 has it
    wide <<= 13
    wide &= np.int32(-0x70002000)
    values = wide.view(np.float32)
    values *= TWO_TO_112
    return values


def narrowed(values: Array, dtype: str) -> Bytes:
    """Numbers rounded once, to the nearest (ties to even), as a file has them.

    Beyond the largest number they become infinite (NaN where the kind has no infinity).

    Args:
        values: float32 or float64.
        dtype: one of FLOATS.
    """
    values = np.ascontiguousarray(values).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == "F16" and values.dtype == np.float32:
            return _half(values).view(np.uint8)
        if dtype in NATIVE:  # numpy goes from float64 to float16 in one step
            return values.astype(NATIVE[dtype]).view(np.uint8)
        near = _odd(values) if values.dtype == np.float64 else values
    if dtype == "BF16":
        return _bfloat(near).view(np.uint8)
    import torch

    return torch.from_numpy(near).to(getattr(torch, BY_TORCH[dtype])).view(torch.uint8).numpy()


def _half(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 as float16: of normal ones the lower 13 bits are rounded off; numpy does the others one at a time."""
    sizes = np.abs(values)
    if not (values.size and sizes.max() < FLOATS["F16"].largest):
        return values.astype(np.float16).view(np.uint16)
    bits = (values * (1 / TWO_TO_112)).view(np.uint32)
    odd = bits >> 13
    odd &= 1
    odd += 0xFFF
    bits += odd
    bits >>= 13
    halves = bits.astype(np.uint16)
    halves |= (values.view(np.uint32) >> 16).astype(np.uint16) & 0x8000
    small = np.flatnonzero(sizes < 2.0 ** FLOATS["F16"].smallest)
    halves[small] = values[small].astype(np.float16).view(np.uint16)
    return halves


def _bfloat(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 as bfloat16: its upper half, after half a unit is added, or just less where that half is even."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    odd += bits
    odd >>= 16
    rounded = odd.astype(np.uint16)
    if (wrong := np.isnan(values)).any():
        rounded[wrong] = (bits[wrong] >> 16).astype(np.uint16) | 0x40  # quiet, its sign kept
    return rounded


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
