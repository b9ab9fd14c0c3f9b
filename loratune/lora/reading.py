"""What the LoRA tools share: reading with every name that is known, and writing with what was done noted inside."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loratune.errors import UserError
from loratune.families.layouts import Shape
from loratune.formats.files import sha256_file
from loratune.formats.headers import read_header
from loratune.lora.algebra import SVD, distance, factors, norm, rank_for, truncate
from loratune.lora.file import LoRAFile, read_lora, write_lora
from loratune.lora.fits import layer_names, shapes_for
from loratune.lora.kinds.layer import LowRank, Product
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.metadata import standard_metadata
from loratune.lora.tables.known import format_of, writable

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Source(NamedTuple):
    """A LoRA file that was read."""

    path: Path
    format: str
    file: LoRAFile


@dataclass
class Errors:
    """How far the layers of a written LoRA are from what they should be: squares of norms, by layer."""

    apart: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, wanted: Product, written: LowRank) -> None:
        """Compare a layer, as it is written and rounded, with the matrix that was asked for."""
        self.apart[name] = distance(wanted, factors(written, wanted.b.dtype)) ** 2
        self.whole[name] = norm(wanted) ** 2

    def of(self, name: str) -> float:
        """||written - wanted|| / ||wanted|| of a layer, in Frobenius' norm; 0 for zero by zero."""
        return _ratio(self.apart[name], self.whole[name])

    @property
    def overall(self) -> float:
        """The same of all layers as one block-diagonal matrix."""
        return _ratio(sum(self.apart.values()), sum(self.whole.values()))

    def told(self) -> str:
        """Overall, and the layer with the largest, in words."""
        worst = max(self.apart, key=self.of, default=None)
        largest = f"; the largest is {self.of(worst):.2e}, of {worst}" if worst else ""
        return f"relative Frobenius error {self.overall:.2e}{largest}"


def _ratio(apart: float, whole: float) -> float:
    if whole == 0:
        return 0.0 if apart == 0 else math.inf
    return math.sqrt(apart / whole)


def read(path: Path) -> Source:
    """A LoRA in any format, with the names of every base known here.

    Raises:
        UserError: as `read_lora`.
    """
    lora = read_lora(path, layer_names())
    named = {(format_of(key) or "").partition(" with ")[0] for key in read_header(path).tensors}
    return Source(path, next((name for name in writable() if name in named), "peft"), lora)


def check_out(out: Path, sources: Sequence[Path]) -> None:
    """Check where a LoRA is written to, before anything is read.

    Raises:
        UserError: it is one of the sources, or has a suffix that readers do not take.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: a LoRA is one .safetensors file; give such a name")
    if taken := [path for path in sources if path.resolve() == out.resolve()]:
        raise UserError(f"--out {out}: is {taken[0]} itself; give another name")


def check_rank(rank: int | None, keep: float | None) -> None:
    """Check how much of a matrix is kept.

    Raises:
        UserError: neither or both are given, or they are out of range.
    """
    if (rank is None) == (keep is None):
        raise UserError("give --rank R or --keep SHARE, one of the two")
    check_only_rank(rank)
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"--keep {keep}: is a share of the squared norm; give more than 0 and at most 1")


def check_only_rank(rank: int | None) -> None:
    """Check a rank that may be left out.

    Raises:
        UserError: it is below 1.
    """
    if rank is not None and rank < 1:
        raise UserError(f"--rank {rank}: give 1 or more")


def refuse_dora(source: Source, why: str) -> None:
    """Refuse a LoRA with magnitudes.

    Raises:
        UserError: a layer has one.
    """
    doras = [name for name, layer in source.file.layers.items() if layer.magnitude is not None]
    if doras:
        raise UserError(f"{source.path}: {doras[0]} is a {source.file.layers[doras[0]].name}, {why}")


def kept_rank(parts: SVD, rank: int | None, keep: float | None) -> int:
    """The rank that a layer gets: `rank`, or what keeps the share; never more than there are values above zero."""
    there = max(1, int((parts.s > 0).sum()))
    return min(there, rank_for(parts.s, keep) if keep is not None else rank or there)


def made(product: Product, shape: Shape, dtype: torch.dtype) -> LoRALayer:
    """B A as a layer with alpha = r beside a W_0 of this shape, rounded to `dtype`."""
    r, (outer, inner, *kernel) = product.rank, shape
    down = product.a.reshape(r, inner, *kernel).to(dtype).contiguous()
    up = product.b.reshape(outer, r, *[1] * len(kernel)).to(dtype).contiguous()
    return LoRALayer(down, up, float(r))


def truncated(parts: SVD, rank: int, shape: Shape, dtype: torch.dtype) -> LoRALayer:
    """The nearest layer of a rank."""
    return made(truncate(parts, rank), shape, dtype)


def shapes_of(path: Path, layers: Mapping[str, LowRank]) -> dict[str, Shape]:
    """The whole shapes of W_0: by the layers' own tensors, or by the base that they fit.

    Raises:
        UserError: neither tells.
    """
    own = {name: shape for name, layer in layers.items() if (shape := layer.shape)}
    if len(own) == len(layers):
        return own
    known = shapes_for({name: layer.flat_shape for name, layer in layers.items()})
    if not known:
        name = next(name for name in layers if name not in own)
        raise UserError(f"{path}: {name} fits no base that is known here, so its kernel is not known; convert it alone")
    return {**known, **own}


def dtype_of(layers: Iterable[LowRank], asked: str | None) -> torch.dtype:
    """The dtype asked for, or the narrowest that holds those of all layers."""
    if asked:
        return DTYPES[asked]
    dtypes = {tensor.dtype for layer in layers for tensor in layer.tensors().values()}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def write(
    out: Path,
    layers: Mapping[str, LowRank],
    source: LoRAFile,
    format: str,
    note: tuple[str, Mapping[str, Any]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write a LoRA whose ranks and alphas are new; what else its metadata says is kept.

    Args:
        source: what it was made from: its metadata and learned tokens are kept.
        note: the key and the JSON that say how it was made.

    Raises:
        UserError: as `write_lora`.
    """
    metadata = {**source.metadata, **_sizes(out, layers), f"loratune.{note[0]}": json.dumps(note[1], sort_keys=True)}
    write_lora(out, LoRAFile(layers, metadata, source.tokens), format, dtype)


def _sizes(out: Path, layers: Mapping[str, LowRank]) -> dict[str, str]:
    """The metadata that tell of rank and alpha; sd-scripts' word for ranks that differ is Dynamic."""
    ranks = {layer.rank for layer in layers.values()}
    if len(ranks) == 1:
        rank = ranks.pop()
        return standard_metadata(rank=rank, alpha=rank, name=out.stem, base_model=None, architecture=None)
    standard = standard_metadata(name=out.stem, base_model=None, architecture=None)
    return standard | {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}


def described(path: Path) -> dict[str, str]:
    """A file, in the note of what was made from it."""
    return {"file": path.name, "sha256": sha256_file(path)}
