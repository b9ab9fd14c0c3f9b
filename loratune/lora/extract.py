"""The LoRA that turns one checkpoint into another: the nearest B A of low rank to each W - W_0, a tensor at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from loratune.errors import UserError
from loratune.families.architectures import module_names
from loratune.families.base import Base
from loratune.families.layouts import Shape
from loratune.lora.algebra import SVD, randomized_svd
from loratune.lora.file import LoRAFile
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.metadata import standard_metadata
from loratune.lora.progress import shown
from loratune.lora.reading import DTYPES, Errors, check_out, check_rank, kept_rank, truncated, write

FIRST_RANK = 16  # how many singular values are asked for first where --keep tells how many are needed
NAMED = 3  # of what cannot be held, in the message


def extract(base: str, tuned: str, out: Path, rank: int | None, keep: float | None, to: str, dtype: str) -> str:
    """Write the LoRA from one checkpoint to another; returns lines that say how much of the difference it holds.

    Raises:
        UserError: a checkpoint is not known or not complete, they are of different architectures or the same.
    """
    check_rank(rank, keep)
    old, new = Base.open(base), Base.open(tuned)
    check_out(out, (old.path, new.path))
    _check_same(old, new)
    layers, errors, other = extracted(old, new, module_names(old.configs), rank, keep, DTYPES[dtype])
    lines = [f"{len(other)} tensors differ that a LoRA cannot hold: {_named(other)}"] if other else []
    if not layers:
        others = f" ({lines[0]})" if lines else ""
        raise UserError(
            f"{tuned}: no layer that a LoRA can hold differs from {base}{others}; there is nothing to extract"
        )
    note = {"base": base, "tuned": tuned, "rank": rank, "keep": keep, "error": errors.overall, "not_held": len(other)}
    configs = old.configs
    version, architecture = old.family.kohya_version(configs), f"{old.family.modelspec(configs)}/lora"
    metadata = standard_metadata(name=out.stem, base_model=version, architecture=architecture)
    write(out, layers, LoRAFile({}, metadata), to, ("extracted", note))
    ranks = sorted({layer.rank for layer in layers.values()})
    rank_text = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    return "\n".join([*lines, f"{out}: {len(layers)} layers of {rank_text}; {errors.told()}"])


def _check_same(old: Base, new: Base) -> None:
    if old.title != new.title:
        kinds = f"is {new.title}, but {old.path} is {old.title}"
        raise UserError(f"{new.path}: {kinds}; give two of the same architecture")
    parts = [{name.partition(".")[0] for name in module_names(one.configs)} for one in (old, new)]
    if lacking := sorted(parts[0] ^ parts[1]):
        without, with_it = (new, old) if lacking[0] in parts[0] else (old, new)
        raise UserError(f"{without.path}: has no {lacking[0]}, which {with_it.path} has; give two with the same parts")


def _named(names: Sequence[str]) -> str:
    """How many there are of each component, and the first few."""
    counts = Counter(name.partition(".")[0] for name in names)
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(f'{n} of {part}' for part, n in counts.items())} ({', '.join(names[:NAMED])}{more})"


def extracted(
    old: Base, new: Base, names: Sequence[str], rank: int | None, keep: float | None, dtype: torch.dtype
) -> tuple[dict[str, LoRALayer], Errors, list[str]]:
    """The layers that differ, how far each is off, and the tensors that differ but are in no such layer.

    Args:
        old: W_0.
        new: W.
        names: of the layers that a LoRA can sit on.
        rank: of every layer; a layer never gets more than it has.
        keep: or the share of the squared Frobenius norm of W - W_0 that each layer keeps.
        dtype: of the tensors.

    Raises:
        UserError: a tensor has another shape in the other checkpoint, or values that are not finite.
    """
    wanted = {f"{name}.weight": name for name in names}
    layers: dict[str, LoRALayer] = {}
    errors, other = Errors(), []
    for key in shown([key for key in old.tensors if key.partition(".")[0] in new.parts], "comparing"):
        change = _change(old, new, key)
        if not change.any():
            continue
        if key not in wanted:
            other.append(key)
            continue
        name = wanted[key]
        layers[name] = _layer(change.flatten(1), old.tensors[key].shape, rank, keep, dtype)
        written = layers[name].matrix()
        errors.whole[name] = float(change.double().norm()) ** 2
        errors.apart[name] = float((change.flatten(1) - written).double().norm()) ** 2
    return layers, errors, other


def _change(old: Base, new: Base, key: str) -> Tensor:
    """W - W_0 in float32."""
    shapes = [one.tensors[key].shape if key in one.tensors else None for one in (old, new)]
    if shapes[0] != shapes[1]:
        sides = f"{key} is {shapes[1]}, in {old.path} {shapes[0]}"
        raise UserError(f"{new.path}: {sides}; give two checkpoints of the same architecture")
    change = new.read(key).float() - old.read(key).float()
    if not change.isfinite().all():
        raise UserError(f"{new.path}: {key} or that of {old.path} has values that are not finite; one is damaged")
    return change


def _layer(change: Tensor, shape: Shape, rank: int | None, keep: float | None, dtype: torch.dtype) -> LoRALayer:
    parts = randomized_svd(change, min(rank, *change.shape)) if rank else _enough(change, keep or 1.0)
    whole = float(change.double().norm())
    kept = _rank_of(parts.s, whole, keep) if keep else kept_rank(parts, rank, None)
    return truncated(parts, kept, shape, dtype)


def _enough(change: Tensor, keep: float) -> SVD:
    """So many singular triplets that they keep the share; asked for in doubling numbers, as most layers need few."""
    wanted, asked = keep * float(change.double().square().sum()), FIRST_RANK
    while True:
        parts = randomized_svd(change, min(asked, *change.shape))
        if asked >= min(change.shape) or float(parts.s.double().square().sum()) >= wanted:
            return parts
        asked *= 2


def _rank_of(s: Tensor, whole: float, keep: float) -> int:
    """The smallest rank that keeps the share of `whole`'s square, where `s` are the leading values alone."""
    kept = s.double().square().cumsum(0)
    return min(int((kept < keep * whole**2).sum()) + 1, max(1, int((s > 0).sum())))
