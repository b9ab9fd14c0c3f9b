"""In models in memory: W' = W_0 + sum_i w_i (alpha_i / r_i) B_i A_i (Hu 2021, section 4.1), rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loratune.families.architectures import canonical_module_name
from loratune.lora.file import read_lora
from loratune.lora.layers import LowRank
from loratune.lora.merge.match import Weighted, terms_by_layer
from loratune.lora.merge.request import parse

Term = tuple[float, LowRank]


def parse_weighted(text: str, names: Sequence[str] = ()) -> Weighted[LowRank]:
    """`FILE`, `FILE:WEIGHT` or `FILE:WEIGHT,block=ratio`, read.

    Args:
        text: as on the command line.
        names: canonical layer names of the base, by which kohya's names are understood.

    Raises:
        UserError: no such file, or a weight that is no finite number.
    """
    given = parse(text)
    return Weighted(given, read_lora(given.path, names))


def change_of(w: Tensor, terms: Sequence[Term]) -> Tensor:
    """sum_i w_i times the change that each layer makes of W_0, in W_0's dtype and shape; there is one term or more."""
    total: Tensor | None = None
    for weight, layer in terms:
        one = layer.change(w)
        scaled = one if weight == 1 else one * weight
        total = scaled if total is None else total + scaled
    assert total is not None
    return total


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in another dtype, rounded once, to the nearest (ties to even).

    torch goes from float64 to the 16-bit kinds by way of float32, which would round twice. Rounded to odd on that
    way, float32 has bits enough for the second rounding to be the right one (Boldo & Melquiond 2008).
    """
    if values.dtype != torch.float64 or dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    near = values.float()
    off = near.double() != values
    even = near.view(torch.int32) & 1 == 0
    towards = torch.where(near.double() < values, torch.inf, -torch.inf).float()
    return torch.where(off & even, torch.nextafter(near, towards), near).to(dtype)


def added(w: Tensor, terms: Sequence[Term], exact: bool = False) -> Tensor:
    """W_0 plus the weighted terms, rounded once to W_0's dtype; the shape stays.

    Args:
        w: W_0.
        terms: weights and layers.
        exact: compute in float64 instead of float32.
    """
    terms = [(weight, layer) for weight, layer in terms if weight]  # adding 0.0 would make 0.0 of W_0's -0.0
    if not terms:
        return w.clone()
    start = w.to(computed_in(w.dtype, exact))
    return rounded(start + change_of(start, terms), w.dtype)


def computed_in(dtype: torch.dtype, exact: bool) -> torch.dtype:
    """The dtype of the arithmetic for weights of a dtype."""
    return torch.float64 if exact or dtype == torch.float64 else torch.float32


@torch.no_grad()
def merge_into(components: Mapping[str, nn.Module], loras: Sequence[Weighted[LowRank]]) -> None:
    """Add LoRAs to the weights of modules, in place."""
    weights = {
        f"{component}.{canonical_module_name(component, module, name)}": part.weight
        for component, module in components.items()
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d)
    }
    shapes = {name: weight.shape for name, weight in weights.items()}
    for name, terms in terms_by_layer(loras, shapes).terms.items():
        weights[name].copy_(added(weights[name], terms))
