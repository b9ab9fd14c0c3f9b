"""What a format of LoRA files is: how it spells a layer's name, what it puts behind it, and where alpha is.

Names and suffixes are separate: any spelling of a layer's name can meet any spelling of its suffix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from loratune.lora.kinds.known import KINDS

if TYPE_CHECKING:
    from loratune.lora.kinds.layer import LowRank


class Part(NamedTuple):
    """What a tensor is of a layer.

    Args:
        kind: the kind of layer that has it (LoRA, LoHa, LoKr), or "" where any may.
        field: of the kind's class.
    """

    kind: str
    field: str


ALPHA, MAGNITUDE = Part("", "alpha"), Part("", "magnitude")
DOWN, UP, MID = (Part("LoRA", field) for field in ("down", "up", "mid"))
PADDING_KEY = "loratune.padding"  # layers of zeros, without which diffusers would not read the others
Sizes = Mapping[str, tuple[int, int]]
Written = tuple[dict[str, Any], dict[str, str]]
"""Tensors by key, and what they need in the metadata."""


class Place(NamedTuple):
    """A layer whose alpha is asked for.

    Args:
        path: of the file; a configuration may lie beside it.
        name: canonical.
        rank: r of its tensors; 0 for a layer that has none.
        metadata: the file's.
    """

    path: Path
    name: str
    rank: int
    metadata: Mapping[str, str]


def alpha_or_rank(stored: float | None, place: Place) -> float:
    """The alpha tensor, else r (1 where there is none), so that the scale is 1 (sd-scripts, networks/lora.py:836)."""
    return float(place.rank or 1) if stored is None else stored


def not_written(layers: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: Any) -> Written:
    """For formats that are read alone.

    Raises:
        ValueError: always.
    """
    raise ValueError("this format is read, not written; give peft or kohya")


def dotted(name: str) -> tuple[str, ...]:
    """A canonical name, and without the level that transformers 5 left out of text encoders."""
    return (name, name.replace(".text_model.", ".", 1))


def bare(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names without their component."""
    return tuple(name.partition(".")[2] for name in names)


@dataclass(frozen=True, eq=False)
class Table:
    """A format: one of these, and a row in `tables.known.TABLES`.

    Args:
        name: of the format.
        begins: a regular expression that is found in its names, at their beginning mostly; "" for what no other spells.
        suffixes: what a tensor is, by the end of its key; of several for one part, the first is written.
        spell: the names of a layer in files, by its canonical one.
        every_kind: whether tensors that have no suffix here get the one that their kind gives them.
        loose: whether layers of no known architecture are read too: the file's name is the canonical one.
        joined: whether its names have _ for every dot.
        number: canonical names by numbered ones, from the layers' sizes and the metadata, for formats without names;
            a ValueError says why there are none.
        alpha: the layer's alpha, from its tensor (None where there is none) or from elsewhere.
        write: layers as tensors of this format, and what these need in the metadata. Its arguments are the layers,
            the metadata, and the dtype to cast to or None. A ValueError says what the format cannot hold.
    """

    name: str
    begins: str | Callable[[], str]
    suffixes: Mapping[str, Part]
    spell: Callable[[str], tuple[str, ...]]
    every_kind: bool = False
    loose: bool = False
    joined: bool = False
    number: Callable[[Sizes, Mapping[str, str]], dict[str, str]] | None = None
    alpha: Callable[[float | None, Place], float] = alpha_or_rank
    write: Callable[[Mapping[str, LowRank], Mapping[str, str], Any], Written] = not_written

    def names(self, raw: str) -> bool:
        """Whether it is this format that spells a layer's name so."""
        begins = self.begins() if callable(self.begins) else self.begins
        return re.search(begins, raw) is not None

    def ends(self) -> dict[str, Part]:
        """What a tensor is, by the end of its key."""
        own = {f".{end}": Part(kind.kind, name) for kind in KINDS.values() for name, end in kind.suffixes.items()}
        return {**self.suffixes, **{end: part for end, part in own.items() if end not in self.suffixes}}

    def suffix(self, part: Part) -> str:
        """What is written at the end of the key of a tensor."""
        return next(end for end, what in self.ends().items() if what == part)
