"""safetensors files read without loading the whole, and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loratune.errors import UserError
from loratune.formats.atomic import atomic_folder, atomic_path
from loratune.formats.headers import Header, TensorInfo, header_bytes, read_header

__all__ = [
    "Header",
    "TensorInfo",
    "atomic_folder",
    "atomic_path",
    "data_hash",
    "read_header",
    "read_tensors",
    "rewrite",
    "sha256_file",
    "tensors_hash",
    "write_safetensors",
]

CHUNK = 1 << 20  # bytes copied or hashed at a time
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype.

    Raises:
        ValueError: the format has no such dtype.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"safetensors files cannot hold {dtype}")


def read_tensors(path: Path | str, keys: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a safetensors file, on the CPU and by memory map; all of them, or those named.

    Raises:
        UserError: as `read_header`, or the file has no tensor of a name.
    """
    path = Path(path)
    header = read_header(path)
    wanted = list(header.tensors if keys is None else keys)
    if missing := [key for key in wanted if key not in header.tensors]:
        raise UserError(f"{path}: there is no tensor {missing[0]!r} in it ({len(missing)} missing in all)")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in wanted}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); download or export it again") from None


def read_part(path: Path, start: int, length: int, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor from bytes of a safetensors file, read into memory of its own.

    Args:
        path: of the file.
        start: of the bytes, from the file's beginning.
        length: of them.
        dtype: as safetensors names it.
        shape: of the tensor.

    Raises:
        UserError: the file cannot be read, or has become shorter.
    """
    try:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    if len(data) != length:
        raise UserError(f"{path}: became shorter while it was read; download or export it again")
    return _tensor_of(data, TensorInfo(dtype, shape, 0, length))


def write_safetensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], durable: bool = True
) -> None:
    """Write a safetensors file, whole or not at all; the same content always gives the same bytes.

    Raises:
        UserError: the place cannot be written to.
    """
    ordered = _in_order(tensors)
    infos: dict[str, TensorInfo] = {}
    end = 0
    for key in ordered:
        tensor = tensors[key]
        start, end = end, end + tensor.numel() * tensor.element_size()
        infos[key] = TensorInfo(dtype_name(tensor.dtype), tuple(tensor.shape), start, end)
    with atomic_path(path, durable) as temporary, temporary.open("wb") as file:
        file.write(header_bytes(infos.items(), dict(metadata)))
        for key in ordered:
            file.write(_bytes_of(tensors[key]))


def _in_order(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # wide first, so all are aligned


def data_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256, in hex, of the data section that `write_safetensors` makes of tensors."""
    digest = hashlib.sha256()
    for key in _in_order(tensors):
        digest.update(_bytes_of(tensors[key]))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _tensor_of(data: bytes, info: TensorInfo) -> Tensor:
    if not data:
        return torch.empty(info.shape, dtype=DTYPES[info.dtype])
    return torch.frombuffer(bytearray(data), dtype=DTYPES[info.dtype]).reshape(info.shape)


def rewrite(
    source: Path | str,
    destination: Path | str,
    patches: Mapping[str, Callable[[Tensor], Tensor]],
    metadata: dict[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Copy a safetensors file with some tensors replaced, one tensor in memory at a time.

    Args:
        patches: from a tensor's name to what makes the new one; it must keep dtype and shape.
        metadata: of the copy; None keeps the source's.
        progress: called with the bytes done and the bytes in all.

    Raises:
        KeyError: the source has no tensor of a patch's name.
        ValueError: a patch changed dtype or shape.
        UserError: the source cannot be read or the destination not written.
    """
    source = Path(source)
    header = read_header(source)
    if missing := sorted(set(patches) - set(header.tensors)):
        raise KeyError(f"{source}: there is no tensor {missing[0]!r} to patch ({len(missing)} missing in all)")
    metadata = header.metadata if metadata is None else metadata
    with atomic_path(destination) as temporary, source.open("rb") as old, temporary.open("wb") as new:
        new.write(header_bytes(header.tensors.items(), metadata))
        old.seek(header.data_offset)
        for key, info in header.tensors.items():
            if key in patches:
                new.write(_patched(key, old.read(info.stop - info.start), info, patches[key]))
            else:
                _copy(old, new, info.stop - info.start)
            if progress is not None:
                progress(info.stop, header.size - header.data_offset)


def _patched(key: str, data: bytes, info: TensorInfo, patch: Callable[[Tensor], Tensor]) -> memoryview:
    tensor = patch(_tensor_of(data, info))
    if (dtype_name(tensor.dtype), tuple(tensor.shape)) != (info.dtype, info.shape):
        raise ValueError(f"the patch of {key!r} made {info.dtype} {info.shape} a {tensor.dtype} {tuple(tensor.shape)}")
    return _bytes_of(tensor)


def _copy(old: BinaryIO, new: BinaryIO, left: int) -> None:
    while left:
        data = old.read(min(CHUNK, left))
        if not data:
            raise OSError("the source became shorter while it was read")
        new.write(data)
        left -= len(data)


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors, in hex: over their names in order, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        tensor = tensors[key]
        digest.update(json.dumps([key, dtype_name(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(_bytes_of(tensor))
    return digest.hexdigest()
