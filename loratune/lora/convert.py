"""A LoRA in another format: bit for bit where it can hold it, else refused, or approximated when asked to."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from loratune.errors import UserError
from loratune.lora.algebra import factors, svd
from loratune.lora.file import LoRAFile, write_lora
from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.progress import shown
from loratune.lora.reading import (
    DTYPES,
    Errors,
    Source,
    check_only_rank,
    check_out,
    described,
    dtype_of,
    kept_rank,
    made,
    read,
    refuse_dora,
    shapes_of,
    truncated,
    write,
)


def convert(file: Path, to: str, out: Path, dtype: str | None, rank: int | None) -> str:
    """Write a LoRA in another format; returns a line that says whether it is the same or how far it is off.

    Raises:
        UserError: it cannot be read, or the format cannot hold it and no `rank` is given.
    """
    check_out(out, [file])
    check_only_rank(rank)
    source = read(file)
    kinds = ", ".join(sorted({layer.name for layer in source.file.layers.values()}))
    summary = f"{out}: {len(source.file.layers)} layers ({kinds}) as {to}"
    note = json.dumps(described(file) | {"to": to}, sort_keys=True)
    metadata = source.file.metadata | {"loratune.converted": note}
    lora = LoRAFile(source.file.layers, metadata, source.file.tokens)
    try:
        write_lora(out, lora, to, DTYPES[dtype] if dtype else None)
    except UserError as error:
        if rank is None:
            raise
        refuse_dora(source, f"which {to} does not hold and no B A approximates, as it depends on the base")
        layers, errors = approximated(source, rank, dtype_of(source.file.layers.values(), dtype))
        told_note = described(file) | {"to": to, "rank": rank, "error": errors.overall}
        write(out, layers, source.file, to, ("converted", told_note))
        return f"{summary}, approximated ({_reason(file, out, error)}); {errors.told()}"
    return f"{summary}, {_rounding(source, out)}"


def _reason(file: Path, out: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{out}: ").removeprefix(f"{file}: ").partition(";")[0]


def _rounding(source: Source, out: Path) -> str:
    """What writing did to the layers, in words: the file is read back and compared."""
    written = read(out).file.layers
    changed = Errors()
    for name, layer in source.file.layers.items():
        if not _same(layer, written[name]):
            changed.add(name, factors(layer), written[name])
    return f"{len(changed.apart)} of them rounded; {changed.told()}" if changed.apart else "exactly"


def _same(one: LowRank, other: LowRank) -> bool:
    """Whether two layers add the same to the last bit, whichever way the scale is split between alpha and B."""
    left, right = ({name: tensor.double() for name, tensor in layer.tensors().items()} for layer in (one, other))
    scales = one.scale, other.scale
    if isinstance(one, LoRALayer):
        left["up"], right["up"], scales = left["up"] * one.scale, right["up"] * other.scale, (1.0, 1.0)
    equal = left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)
    return type(one) is type(other) and scales[0] == scales[1] and equal


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Elementwise; peft and kohya give magnitudes other shapes."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def approximated(source: Source, rank: int, dtype: torch.dtype) -> tuple[dict[str, LowRank], Errors]:
    """The layers as plain LoRA with alpha = r: those that are, with the scale in B; others at this rank at most."""
    shapes = shapes_of(source.path, source.file.layers)
    layers: dict[str, LowRank] = {}
    errors = Errors()
    for name, layer in shown(list(source.file.layers.items()), "approximating"):
        product = factors(layer)
        if isinstance(layer, LoRALayer):
            layers[name] = made(product, shapes[name], dtype)
        else:
            parts = svd(product)
            layers[name] = truncated(parts, kept_rank(parts, rank, None), shapes[name], dtype)
        errors.add(name, product, layers[name])
    return layers, errors
