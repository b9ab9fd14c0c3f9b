"""16-bit numbers made wide and rounded back are those of numpy and of torch, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from loratune.formats.files import DTYPES
from loratune.formats.numbers import FLOATS, narrowed, spacing, too_large, widened

ALL_16 = np.arange(1 << 16, dtype=np.uint16)
BITS = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)


def same(found: Any, wanted: Any) -> None:
    """Bit for bit, but for which NaN it is."""
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[wanted.dtype.itemsize]
    either = np.isnan(found) & np.isnan(wanted)
    assert ((found.view(bits) == wanted.view(bits)) | either).all()


def by_torch(values: Any, dtype: str) -> Any:
    return torch.from_numpy(values).to(DTYPES[dtype])


def between(dtype: str) -> Any:
    """The finite numbers of a 16-bit kind, those half-way between neighbours, and float32's next to these."""
    own = widened(ALL_16.view(np.uint8), dtype, np.float64)
    own = np.sort(own[np.isfinite(own)])
    half = ((own[1:] + own[:-1]) / 2).astype(np.float32)
    up, down = (np.nextafter(half, np.float32(towards)) for towards in (np.inf, -np.inf))
    return np.concatenate([own.astype(np.float32), half, up, down])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_every_float16_and_bfloat16_is_made_wide(kind: Any) -> None:
    finite = ALL_16[(ALL_16 & 0x7FFF) < 0x7C00]
    for bits in (ALL_16, finite):  # infinite ones are made wide on another way
        same(widened(bits.view(np.uint8), "F16", kind), bits.view(np.float16).astype(kind))
        wanted = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
        same(widened(bits.view(np.uint8), "BF16", kind), wanted.double().numpy().astype(kind))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("what", ["all", "near"])
def test_float32_is_rounded_as_torch_does(dtype: str, what: str) -> None:
    values = between(dtype) if what == "near" else BITS.view(np.float32)
    for some in (values, values[np.abs(values) < 65504], values[:0], values[1::3]):
        wide = by_torch(np.ascontiguousarray(some), dtype).float().numpy()
        with np.errstate(invalid="ignore"):
            same(widened(narrowed(some, dtype), dtype), wide)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_float64_is_rounded_once(dtype: str) -> None:
    # Just beside the middle between two numbers; by way of float32 it would become the middle, and then even.
    one = 1 + FLOATS[dtype].eps
    middle, off = 1 + FLOATS[dtype].eps / 2, 2.0**-40
    found = widened(narrowed(np.array([middle - off, middle, middle + off, -middle - off]), dtype), dtype, np.float64)
    assert found.tolist() == [1, 1, one, -one]
    odd = one + FLOATS[dtype].eps / 2
    found = widened(narrowed(np.array([odd - off, odd, odd + off]), dtype), dtype, np.float64)
    assert found.tolist() == [one, one + FLOATS[dtype].eps, one + FLOATS[dtype].eps]


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_eight_bits_end_at_their_largest_number(dtype: str, kind: Any) -> None:
    largest = FLOATS[dtype].largest
    values = np.array([1.2 * largest, -1e30, np.inf, -np.inf, largest, np.nan], kind)
    found = widened(narrowed(values, dtype), dtype)
    assert found[:5].tolist() == [largest, -largest, largest, -largest, largest]
    assert np.isnan(found[5])
    assert too_large(values, dtype) == 5  # all but the largest itself; nothing is rounded to the end unseen
    assert too_large(values[4:5] * 1.01, dtype) == 0


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_table_is_torchs(dtype: str) -> None:
    info = torch.finfo(DTYPES[dtype])
    told = FLOATS[dtype]
    assert (told.eps, 2.0**told.smallest, told.largest) == (info.eps, info.smallest_normal, info.max)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_there_and_back(dtype: str, kind: Any) -> None:
    values = np.random.default_rng(1).standard_normal(500).astype(np.float64)
    held = torch.from_numpy(values).to(DTYPES[dtype])
    raw = held.view(torch.uint8).numpy().copy()
    wide = widened(raw, dtype, kind)
    assert wide.dtype == kind
    assert torch.equal(torch.from_numpy(wide.astype(np.float32)), held.float())
    wide[:] = -wide  # the bytes are not shared
    assert (narrowed(-wide, dtype) == raw).all() or (dtype, kind) == ("F64", np.float32)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_spacing_is_to_the_next_number(dtype: str) -> None:
    values = np.array([1.0, 1.5, 2.0, -3.0, 0.0, 2.0**-20, 300.0])
    held = torch.from_numpy(values).to(DTYPES[dtype])
    bits = {2: torch.int16, 4: torch.int32}[held.element_size()]
    above = (held.abs().view(bits) + 1).view(held.dtype).double()
    assert spacing(held.double().numpy(), dtype).tolist() == (above - held.double().abs()).tolist()
