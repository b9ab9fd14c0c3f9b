"""Checkpoints of full size with random weights, for benchmarks and for trying other programs.

    python tests/benchmarks/full_size.py FOLDER --names sd15 sdxl --dtype F16 --layout file folder

Keys, shapes and dtypes are those of real files; the numbers come from one block of normal numbers, scaled to each
tensor, so that a file is written about as fast as it is copied and little memory is used.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from loratune.families.architectures import architectures, entries, file_shapes
from loratune.families.known import parts
from loratune.families.save import write_settings
from loratune.formats.files import DTYPES, atomic_folder, atomic_path
from loratune.formats.headers import ITEM_SIZES, TensorInfo, header_bytes

BLOCK = 1 << 22  # numbers
Shapes = Mapping[str, tuple[int, ...]]
TEXT1, TEXT2 = "cond_stage_model.", "conditioner.embedders."
LAST = "cond_stage_model.model.transformer.resblocks.23."


class Numbers:
    """Bytes of normal numbers by their scale, made once for each scale."""

    def __init__(self, dtype: str) -> None:
        self.dtype = DTYPES[dtype]
        self.item = ITEM_SIZES[dtype]
        self.block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
        self.made: dict[tuple[float, float], memoryview] = {}

    def write(self, file: BinaryIO, key: str, shape: tuple[int, ...]) -> None:
        """A tensor's bytes: the spread of a new layer's weights, 1 + a little for norms, a little for biases."""
        norm = len(shape) == 1 and key.endswith("weight")
        fan = math.prod(shape[1:]) if len(shape) > 1 else 2500
        table = "embedding" in key and len(shape) == 2 and "linear" not in key
        data = self._scaled(1.0 if norm else 0.0, 0.02 if table else fan**-0.5)
        left, start = math.prod(shape) * self.item, zlib.crc32(key.encode()) % BLOCK * self.item
        while left:
            part = data[start : start + left]
            file.write(part)
            left, start = left - len(part), 0

    def _scaled(self, mean: float, spread: float) -> memoryview:
        if (mean, spread) not in self.made:
            numbers = (mean + spread * self.block).to(self.dtype)
            self.made[mean, spread] = numbers.view(torch.uint8).numpy().data
        return self.made[mean, spread]


def _unused(name: str) -> dict[str, tuple[int, ...]]:
    """What real files hold beside the weights that are read: OpenCLIP's temperature, SD 2.x's last layer."""
    if name.startswith("sdxl"):
        return {f"{TEXT2}1.model.logit_scale": ()}
    if not name.startswith("sd2"):
        return {}
    first = LAST.replace("23", "0")
    layer = {
        key.replace(first, LAST): shape
        for key, shape in file_shapes(architectures()[name]).items()
        if key.startswith(first)
    }
    return {f"{TEXT1}model.logit_scale": (), f"{TEXT1}model.text_projection": (1024, 1024), **layer}


def _position_ids(name: str) -> str | None:
    level = "transformer.text_model.embeddings.position_ids"
    return {"sd1": f"{TEXT1}{level}", "sdx": f"{TEXT2}0.{level}"}.get(name[:3])


def infos_of(shapes: Shapes, dtype: str, ids: str | None = None) -> Iterator[tuple[str, TensorInfo]]:
    """The header's entries in the order that the safetensors library gives them: wide first, then by name."""
    wide = [(ids, "I64", (1, 77))] if ids else []
    end = 0
    for key, kind, shape in [*wide, *((key, dtype, shapes[key]) for key in sorted(shapes))]:
        start, end = end, end + math.prod(shape) * ITEM_SIZES[kind]
        yield key, TensorInfo(kind, shape, start, end)


def file_infos(name: str, dtype: str) -> list[tuple[str, TensorInfo]]:
    """The header's entries of a single file of a known architecture."""
    return list(infos_of(file_shapes(architectures()[name]) | _unused(name), dtype, _position_ids(name)))


def _write(path: Path, infos: list[tuple[str, TensorInfo]], numbers: Numbers) -> None:
    with path.open("wb") as file:
        file.write(header_bytes(infos, {"format": "pt"}))
        for key, info in infos:
            if info.dtype == "I64":
                file.write(torch.arange(77).numpy().tobytes())
            else:
                numbers.write(file, key, info.shape)


def make_checkpoint(name: str, path: Path, dtype: str = "F16") -> None:
    """Write a single file of a known architecture with random weights.

    Args:
        name: of the architecture: sd15, sd2, sdxl, each also with -inpainting.
        path: of the file.
        dtype: as safetensors calls it: F32, F16 or BF16.
    """
    with atomic_path(path) as temporary:
        _write(temporary, file_infos(name, dtype), Numbers(dtype))


def make_folder(name: str, folder: Path, dtype: str = "F16") -> None:
    """Write a diffusers folder of a known architecture with random weights; arguments as `make_checkpoint`."""
    configs, numbers = architectures()[name], Numbers(dtype)
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for component, key, shape, _ in entries(configs):
        shapes.setdefault(component, {})[key] = shape
    with atomic_folder(folder) as temporary:
        for component, held in shapes.items():
            (temporary / component).mkdir()
            _write(temporary / component / parts()[component].file, list(infos_of(held, dtype)), numbers)
        write_settings(temporary, configs)


def main(words: list[str]) -> None:
    """Make what the command line asks for, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--names", nargs="+", default=["sd15", "sd2", "sdxl"], choices=sorted(architectures()))
    parser.add_argument("--dtype", default="F16", choices=["F32", "F16", "BF16"])
    parser.add_argument("--layout", nargs="+", default=["file"], choices=["file", "folder"])
    asked = parser.parse_args(words)
    for name in asked.names:
        for layout in asked.layout:
            start, make = time.perf_counter(), make_checkpoint if layout == "file" else make_folder
            path = asked.folder / (f"{name}.safetensors" if layout == "file" else name)
            make(name, path, asked.dtype)
            print(f"{path}: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
