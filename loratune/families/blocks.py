"""What the blocks of a base are called, in merges, norms and reports alike: down.1, mid, up.0, te1; without torch."""

from __future__ import annotations

from functools import cache

from loratune.families.family import Part
from loratune.families.known import FAMILIES


def _parts() -> list[Part]:
    """The components that LoRAs sit in, denoisers first."""
    parts = [part for family in FAMILIES for part in family.parts if part.adaptable]
    return sorted(parts, key=lambda part: part.role != "denoiser")


@cache
def _table() -> dict[str, str]:
    """Shorter names by the beginnings of canonical names, a component's own after those of its blocks."""
    table: dict[str, str] = {}
    for part in _parts():
        table |= {f"{part.name}.{begin}.": called for begin, called in part.blocks}
    return table | {f"{part.name}.": part.block or part.name for part in _parts()}


@cache
def _wider() -> dict[str, str]:
    """The blocks that others lie in: te of te1 and te2, the denoiser of its own."""
    wider = {called: part.name for part in _parts() for _, called in part.blocks}
    return wider | {part.block: part.block.rstrip("0123456789") for part in _parts() if part.role == "text_encoder"}


@cache
def _order() -> list[str]:
    """From the denoiser's beginning to its end, then the text encoders."""
    names = [name for part in _parts() for name in (part.block or part.name, *(called for _, called in part.blocks))]
    return list(dict.fromkeys(names))


def short_name(name: str) -> str:
    """A canonical name as blocks are called: `unet.down_blocks.1.attentions.0...` is `down.1.attentions.0...`."""
    for begin, called in _table().items():
        if name.startswith(begin):
            return f"{called}.{name.removeprefix(begin)}"
    return name


def block_of(name: str) -> str:
    """The block that a layer is counted with: down.N, mid, up.N, unet for what lies outside them, te1 or te2."""
    first, second = [*short_name(name).split("."), ""][:2]
    return f"{first}.{second}" if second.isdigit() else first


def within(name: str, block: str) -> bool:
    """Whether a layer lies in a block: down, mid, up, down.1.attentions.0, unet, te1, te2, or te for both."""
    called = short_name(name)
    return block == _wider().get(called.split(".")[0]) or f"{called}.".startswith(f"{block}.")


def depth_of(block: str) -> tuple[bool, int]:
    """By which of two blocks the one that lies in the other is larger."""
    return block not in _wider().values(), block.count(".")


def widest() -> list[str]:
    """The blocks that hold others, and those that are numbered, without a number."""
    return list(dict.fromkeys([*sorted(set(_wider().values())), *(name for name in _order() if name in _wider())]))


def order_of(block: str) -> tuple[int, int]:
    """By which blocks are sorted, in the order in which a network runs through them."""
    first, _, number = block.partition(".")
    order = _order()
    return (order.index(first) if first in order else len(order)), int(number) if number.isdigit() else 0
