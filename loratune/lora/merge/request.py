"""`FILE:SCALE,block=ratio`: which LoRA counts how strongly in which block; without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.families.base import Base
from loratune.families.blocks import block_of, depth_of, widest, within

BLOCK = re.compile(r"([A-Za-z][\w.]*)=([^:=,/]*)")


@dataclass(frozen=True)
class Given:
    """A LoRA as given on the command line, not read yet.

    Args:
        path: of its file.
        weight: how strongly it counts.
        blocks: ratios by block, multiplied with the weight.
    """

    path: Path
    weight: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    def weight_of(self, name: str) -> float:
        """The weight of the layer of a canonical name: by the longest block that has it."""
        fitting = [block for block in self.blocks if within(name, block)]
        return self.weight * (self.blocks[max(fitting, key=depth_of)] if fitting else 1.0)

    def told(self) -> list[object]:
        """As the merged file's metadata has it."""
        return [str(self.path), self.weight, *([dict(self.blocks)] if self.blocks else [])]


def parse(text: str) -> Given:
    """`FILE`, `FILE:SCALE` or `FILE:SCALE,block=ratio,...`.

    Raises:
        UserError: a number that is none or not finite, a block given twice, or a file that is no safetensors file.
    """
    head, blocks = _blocks(text)
    path, weight = Path(head), 1.0
    if not path.exists() and ":" in head:
        name, _, number = head.rpartition(":")
        path, weight = Path(name), _number(text, number, f"write FILE:SCALE, such as {name}:0.8")
    if path.suffix.lower() not in (".safetensors", "") and path.exists():
        raise UserError(
            f"{path}: its name ends in {path.suffix}; only .safetensors files are loaded, so save it as one"
        )
    return Given(path, weight, blocks)


def _blocks(text: str) -> tuple[str, dict[str, float]]:
    """The text before the blocks, and the blocks."""
    head = text
    found: list[tuple[str, ...]] = []
    while "," in head and not Path(head).exists():
        before, _, last = head.rpartition(",")
        if not (part := BLOCK.fullmatch(last)):
            break
        head, found = before, [part.groups(), *found]
    blocks: dict[str, float] = {}
    for block, number in found:
        if block in blocks:
            raise UserError(f"--lora {text}: the block {block} is there twice; give it once")
        blocks[block] = _number(text, number, f"write BLOCK=RATIO, such as {block}=0.5")
    return head, blocks


def _number(text: str, number: str, remedy: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise UserError(f"--lora {text}: {number!r} is no number; {remedy}") from None
    if not math.isfinite(value):
        raise UserError(f"--lora {text}: the weight must be finite")
    return value


def check_blocks(given: Given, names: Collection[str]) -> None:
    """Check that every block is one of a base's.

    Args:
        given: as on the command line.
        names: canonical names of the base's layers.

    Raises:
        UserError: there is no such block; the message lists those that there are.
    """
    for block in given.blocks:
        if not any(within(name, block) for name in names):
            known = sorted({block_of(name) for name in names})
            known_blocks = f"there are {', '.join([*widest(), *known])} and what lies in them"
            raise UserError(f"--lora {given.path}: the base has no block {block!r}; {known_blocks}")


@dataclass(frozen=True)
class Request:
    """What is to be merged.

    Args:
        base: what is merged into.
        given: the LoRAs.
        out: what is written.
        exact: compute in float64.
        allow_partial: leave out what the base has no layer for.
        in_place: `out` may be the base.
        unmerge: subtract.
    """

    base: Base
    given: Sequence[Given]
    out: Path
    exact: bool = False
    allow_partial: bool = False
    in_place: bool = False
    unmerge: bool = False

    @property
    def note(self) -> dict[str, Any]:
        """What the merged file's metadata says of this merge."""
        flags = {name: True for name in ("exact", "unmerge") if getattr(self, name)}
        return {"base": self.base.name, "loras": [one.told() for one in self.given], **flags}
