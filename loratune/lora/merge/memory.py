"""LoRAs added to models in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from loratune.families.architectures import canonical_module_name
from loratune.formats.files import dtype_name
from loratune.formats.numbers import Stored
from loratune.lora.file import read_layers
from loratune.lora.kinds.layer import LowRank
from loratune.lora.merge.arithmetic import Term, merged
from loratune.lora.merge.match import Weighted, terms_by_layer
from loratune.lora.merge.request import parse


def parse_weighted(text: str, names: Sequence[str] = ()) -> Weighted:
    """`FILE`, `FILE:SCALE` or `FILE:SCALE,block=ratio`, read.

    Args:
        text: as on the command line.
        names: canonical layer names of the base, by which kohya's names are understood.

    Raises:
        UserError: no such file, or a weight that is no finite number.
    """
    given = parse(text)
    return Weighted(given, read_layers(given.path, names))


def stored(layer: LowRank) -> LowRank:
    """A layer with its tensors as in a file, where they are torch's."""
    held = {
        name: Stored.of(value, dtype_name(value.dtype))
        for name, value in layer.tensors().items()
        if isinstance(value, torch.Tensor)
    }
    return replace(layer, **held)  # type: ignore[type-var]


def add(w: torch.Tensor, terms: Sequence[Term], exact: bool = False) -> None:
    """Add terms to W_0 on the CPU, in place, each element rounded once to its dtype.

    Args:
        w: W_0, in one piece.
        terms: weights and layers.
        exact: compute in float64 instead of float32.
    """
    some = [(weight, stored(layer)) for weight, layer in terms if weight]  # adding 0.0 would make 0.0 of -0.0
    if some:
        raw = w.detach().view(-1).view(torch.uint8).numpy()
        merged(raw, dtype_name(w.dtype), w.shape, some, exact)


@torch.no_grad()
def merge_into(components: Mapping[str, nn.Module], loras: Sequence[Weighted]) -> None:
    """Add LoRAs to the weights of modules, in place."""
    weights = {
        f"{component}.{canonical_module_name(component, module, name)}": part.weight
        for component, module in components.items()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, terms in terms_by_layer(loras, shapes).terms.items():
        whole = weights[name].detach().contiguous()
        add(whole, terms)
        weights[name].copy_(whole)
