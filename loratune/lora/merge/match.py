"""Which layers of a base LoRAs change, and with what weights; without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loratune.errors import UserError
from loratune.lora.file import LoRAFile
from loratune.lora.kinds.layer import LowRank
from loratune.lora.merge.request import Given

SHOWN = 3  # layers that a message names


@dataclass(frozen=True)
class Weighted:
    """A LoRA and how strongly it counts."""

    given: Given
    file: LoRAFile

    @property
    def path(self) -> Path:
        """Of its file."""
        return self.given.path

    @property
    def weight(self) -> float:
        """How strongly it counts, before the blocks' ratios."""
        return self.given.weight


@dataclass
class Matches:
    """The layers of LoRAs in a base.

    Args:
        terms: weights and layers by canonical name of the base's layer.
        unmatched: by LoRA in their order: canonical names of the layers that the base lacks, or has in another shape.
    """

    terms: dict[str, list[tuple[float, LowRank]]] = field(default_factory=dict)
    unmatched: list[list[str]] = field(default_factory=list)


def terms_by_layer(
    loras: Sequence[Weighted], shapes: Mapping[str, Sequence[int]], partial: bool = False, sign: int = 1
) -> Matches:
    """The terms for each layer of a base.

    Args:
        loras: what is added.
        shapes: shape of W_0 by canonical layer name.
        partial: leave out the layers that the base lacks, or has in another shape, if they are not most of them.
        sign: -1 to subtract.

    Raises:
        UserError: a LoRA has a layer that the base lacks or that has another shape there, or not one that it has.
    """
    matches = Matches()
    for lora in loras:
        faults = {name: fault for name, layer in lora.file.layers.items() if (fault := _fault(name, layer, shapes))}
        if faults and (not partial or 2 * len(faults) > len(lora.file.layers)):
            raise UserError(f"{lora.path}: does not fit this base: {_told(faults, len(lora.file.layers))}")
        matches.unmatched.append(list(faults))
        for name, layer in lora.file.layers.items():
            if name not in faults:
                matches.terms.setdefault(name, []).append((sign * lora.given.weight_of(name), layer))
    return matches


def _fault(name: str, layer: LowRank, shapes: Mapping[str, Sequence[int]]) -> str:
    if name not in shapes:
        return f"it has no layer {name}"
    shape = tuple(shapes[name])
    if layer.flat_shape != (shape[0], math.prod(shape[1:])):
        return f"{name} is {list(layer.flat_shape)}, the base's {list(shape)}"
    return ""


def _told(faults: Mapping[str, str], count: int) -> str:
    more = f" (and {len(faults) - SHOWN} more)" if len(faults) > SHOWN else ""
    some = f"{'; '.join([*faults.values()][:SHOWN])}{more}"
    if 2 * len(faults) > count:
        return f"{some}; {count - len(faults)} of its {count} layers fit, and --allow-partial needs half of them"
    return f"{some}; --allow-partial leaves them out, and merges the other {count - len(faults)}"
