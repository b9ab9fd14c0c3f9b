"""Which layers of a base LoRAs change, and with what weights; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Protocol, TypeAlias, TypeVar

from loratune.errors import UserError
from loratune.lora.merge.request import Given

if TYPE_CHECKING:
    from loratune.lora.layers import LowRank
    from loratune.lora.plain import PlainLayer

AnyLayer: TypeAlias = "PlainLayer | LowRank"
SHOWN = 3  # layers that a message names


class Layer(Protocol):
    """What a LoRA file holds for one layer."""

    @property
    def flat_shape(self) -> tuple[int, int]:
        """(out, in k k) of the W_0 that it was made for."""
        ...


L = TypeVar("L", bound=Layer)
Read = TypeVar("Read", bound=Layer, covariant=True)


class Layered(Protocol[Read]):
    """A LoRA that was read."""

    @property
    def layers(self) -> Mapping[str, Read]:
        """By canonical name."""
        ...


@dataclass(frozen=True)
class Weighted(Generic[Read]):
    """A LoRA and how strongly it counts."""

    given: Given
    file: Layered[Read]

    @property
    def path(self) -> Path:
        """Of its file."""
        return self.given.path

    @property
    def weight(self) -> float:
        """How strongly it counts, before the blocks' ratios."""
        return self.given.weight


@dataclass
class Matches(Generic[L]):
    """The layers of LoRAs in a base.

    Args:
        terms: weights and layers by canonical name of the base's layer.
        unmatched: by LoRA in their order: canonical names of the layers that the base lacks.
    """

    terms: dict[str, list[tuple[float, L]]] = field(default_factory=dict)
    unmatched: list[list[str]] = field(default_factory=list)


def terms_by_layer(
    loras: Sequence[Weighted[L]], shapes: Mapping[str, Sequence[int]], partial: bool = False, sign: int = 1
) -> Matches[L]:
    """The terms for each layer of a base.

    Args:
        loras: what is added.
        shapes: shape of W_0 by canonical layer name.
        partial: leave out the layers that the base lacks.
        sign: -1 to subtract.

    Raises:
        UserError: a LoRA has a layer that the base lacks or that has another shape there, or not one that it has.
    """
    made: Matches[L] = Matches()
    for lora in loras:
        lacking = [name for name in lora.file.layers if name not in shapes]
        if lacking and (not partial or len(lacking) == len(lora.file.layers)):
            raise UserError(f"{lora.path}: made for another base: {_lacking(lacking, len(lora.file.layers))}")
        made.unmatched.append(lacking)
        for name, layer in lora.file.layers.items():
            if name in shapes:
                _check_shape(lora.path, name, layer, tuple(shapes[name]))
                made.terms.setdefault(name, []).append((sign * lora.given.weight_of(name), layer))
    return made


def _lacking(names: Sequence[str], count: int) -> str:
    more = f" (and {len(names) - SHOWN} more)" if len(names) > SHOWN else ""
    told = f"this one has no layer {', '.join(names[:SHOWN])}{more}"
    if len(names) == count:
        return f"{told}, nor any other of its {count}"
    return f"{told}; --allow-partial leaves them out, and merges the other {count - len(names)}"


def _check_shape(path: Path, name: str, layer: Layer, shape: tuple[int, ...]) -> None:
    if layer.flat_shape != (shape[0], math.prod(shape[1:])):
        told = f"{name} is {list(layer.flat_shape)}, the base's {list(shape)}"
        raise UserError(f"{path}: made for another base: {told}")
