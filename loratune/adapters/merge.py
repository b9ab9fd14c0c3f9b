"""W' = W_0 + sum_i w_i (alpha_i / r_i) B_i A_i, in memory and in files (Hu 2021, section 4.1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from loratune.adapters.lora import canonical
from loratune.errors import UserError
from loratune.formats.lora import LoRAFile, read_lora
from loratune.formats.lora_layers import LoRALayer


@dataclass(frozen=True)
class Weighted:
    """A LoRA file and how strongly it counts."""

    path: Path
    weight: float
    file: LoRAFile


def parse_weighted(text: str, names: Sequence[str] = ()) -> Weighted:
    """`FILE` or `FILE:WEIGHT`, read.

    Args:
        text: as on the command line.
        names: canonical layer names of the base, by which kohya's names are understood.

    Raises:
        UserError: no such file, or a weight that is no finite number.
    """
    path, weight = Path(text), 1.0
    if not path.exists() and ":" in text:
        name, _, number = text.rpartition(":")
        path = Path(name)
        try:
            weight = float(number)
        except ValueError:
            raise UserError(f"--lora {text}: {number!r} is no number; write FILE:WEIGHT, such as {name}:0.8") from None
        if not torch.isfinite(torch.tensor(weight)):
            raise UserError(f"--lora {text}: the weight must be finite")
    if path.suffix not in (".safetensors", "") and path.exists():
        raise UserError(f"{path}: only .safetensors files are loaded; this may be a pickle, which can run any code")
    return Weighted(path, weight, read_lora(path, names))


def added(w: Tensor, terms: Sequence[tuple[float, LoRALayer]]) -> Tensor:
    """W_0 plus the weighted terms, computed in float32 and rounded once to W_0's dtype; the shape stays."""
    terms = [(weight, layer) for weight, layer in terms if weight]  # adding 0.0 would make 0.0 of W_0's -0.0
    if not terms:
        return w.clone()
    total = w.to(torch.float32, copy=True)
    start = w.to(torch.float32)
    for weight, layer in terms:
        total += weight * layer.change(start)
    return total.to(w.dtype)


def terms_by_layer(
    loras: Sequence[Weighted], shapes: Mapping[str, Sequence[int]]
) -> dict[str, list[tuple[float, LoRALayer]]]:
    """The terms for each layer of a base.

    Args:
        loras: what is added.
        shapes: shape of W_0 by canonical layer name.

    Raises:
        UserError: a LoRA has a layer that the base lacks or that has another shape there.
    """
    terms: dict[str, list[tuple[float, LoRALayer]]] = {}
    for lora in loras:
        for name, layer in lora.file.layers.items():
            if name not in shapes:
                raise UserError(f"{lora.path}: made for another base: this one has no layer {name}")
            made_for = (layer.up.shape[0], *layer.down.shape[1:])
            if tuple(shapes[name]) != made_for and tuple(shapes[name]) != (*made_for, 1, 1):
                raise UserError(
                    f"{lora.path}: made for another base: {name} is {list(made_for)}, the base's {list(shapes[name])}"
                )
            terms.setdefault(name, []).append((lora.weight, layer))
    return terms


@torch.no_grad()
def merge_into(components: Mapping[str, nn.Module], loras: Sequence[Weighted]) -> None:
    """Add LoRAs to the weights of modules, in place."""
    weights = {
        f"{component}.{canonical(component, name)}": part.weight
        for component, module in components.items()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, terms in terms_by_layer(loras, shapes).items():
        weights[name].copy_(added(weights[name], terms))


def patches(
    loras: Sequence[Weighted], keys: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to do to the tensors of a file.

    Args:
        loras: what is added.
        keys: the file's key of W_0 by canonical layer name.
        shapes: shapes of the file's tensors by key.
    """
    present = {name: shapes[key] for name, key in keys.items() if key in shapes}
    made = terms_by_layer(loras, present)

    def patch(terms: list[tuple[float, LoRALayer]]) -> Callable[[Tensor], Tensor]:
        return lambda w: added(w, terms)

    return {keys[name]: patch(terms) for name, terms in made.items()}
