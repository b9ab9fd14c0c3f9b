"""The header of a safetensors file, read alone and checked strictly: what lies where; nothing is executed."""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from loratune.errors import UserError

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# A header's length may begin with these bytes too, so they only explain a file that is no safetensors file.
PICKLE_MAGIC = (b"PK", b"\x80", b"\x1f\x8b")
MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
MAX_SIDES = 64  # of a tensor; torch's own limit

# Bytes of a number by safetensors' name of its kind. The headers are read without torch, which takes seconds to load.
ITEM_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, stop) of the data section, `dtype` as safetensors names it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Args:
        metadata: its free text.
        tensors: by name, in the order of their bytes.
        data_offset: of the data section in the file, in bytes.
        size: of the whole file, in bytes.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    data_offset: int
    size: int


def read_header(path: Path | str) -> Header:
    """The header of a safetensors file; its tensors are not touched.

    Raises:
        UserError: the file is missing, a pickle, damaged or truncated.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise _pickle(path)
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            what = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or a device"
            raise UserError(f"{path}: cannot be read (it is {what}, not a file)")
        size = info.st_size
        with path.open("rb") as file:
            text = _read_text(path, file, size)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    metadata, entries = _parse(path, text)
    tensors = {key: _tensor_info(path, key, entry) for key, entry in entries.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    offset = 8 + len(text)
    _check_layout(path, tensors, size - offset)
    return Header(metadata, tensors, offset, size)


def _read_text(path: Path, file: BinaryIO, size: int) -> bytes:
    head = file.read(9)
    length = int.from_bytes(head[:8], "little")
    if head[8:] != b"{" or length > size - 8:
        if head.startswith(PICKLE_MAGIC):
            raise _pickle(path)
        if head[8:] != b"{":
            raise UserError(f"{path}: no safetensors file (its header is missing); download or export it again")
        raise _damaged(path, f"the header is {length} bytes long, the file {size}: it was cut short or changed")
    if length > MAX_HEADER:
        raise _damaged(path, f"the header is {length} bytes long; {MAX_HEADER} are allowed")
    text = b"{" + file.read(length - 1)
    if length < 2 or len(text) != length:
        raise _damaged(path, f"the header has {len(text)} bytes of the {length} that it should have")
    return text


def _parse(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        if len(counts) != len(pairs):
            raise _damaged(path, f"the key {counts.most_common(1)[0][0]!r} is there twice")
        for pair in pairs:
            "".join(text for text in pair if isinstance(text, str)).encode()  # a ValueError for half a character
        return dict(pairs)

    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not valid JSON ({error})") from None
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the header's __metadata__ must hold text only")
    return metadata, entries


def _tensor_info(path: Path, key: str, entry: Any) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {key!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise UserError(f"{path}: {key!r} has the unknown dtype {dtype!r}; known are {', '.join(ITEM_SIZES)}")
    if not _is_naturals(shape) or not _is_naturals(offsets) or len(offsets) != 2:
        raise _damaged(path, f"the shape {shape!r} or the data_offsets {offsets!r} of {key!r} are not sizes")
    # Sides beside a zero count too: libraries multiply them for their strides.
    if len(shape) > MAX_SIDES or math.prod(side or 1 for side in shape) >= 2**60:
        raise _damaged(path, f"the shape of {key!r} is of no tensor ({len(shape)} sides, from {shape[:4]} on)")
    wanted = math.prod(shape) * ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != wanted:
        raise _damaged(path, f"{key!r} has {offsets[1] - offsets[0]} bytes; {dtype} {shape} needs {wanted}")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: dict[str, TensorInfo], available: int) -> None:
    end = 0
    for key, info in tensors.items():
        if info.start != end:
            fault = "overlap the tensor before" if info.start < end else "leave a gap before it"
            raise _damaged(path, f"the bytes of {key!r} {fault}")
        end = info.stop
    if end != available:
        fault = "truncated" if end > available else "too long"
        raise _damaged(path, f"{fault}: its tensors need {end} bytes, it has {available}")


def _damaged(path: Path, fault: str) -> UserError:
    return UserError(f"{path}: {fault}; download or export it again")


def _pickle(path: Path) -> UserError:
    reason = "only .safetensors is loaded, as a pickle can run any code when it is opened"
    return UserError(f"{path}: {reason}; convert it with a tool you trust")


def header_bytes(tensors: Iterable[tuple[str, TensorInfo]], metadata: dict[str, str]) -> bytes:
    """A file's bytes before its data: the length (8 bytes) and the JSON, padded to a multiple of 8."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    for key, info in tensors:
        entries[key] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [info.start, info.stop]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
