"""The families that are known, one a row: which of them a base is of, by its configurations."""

from __future__ import annotations

from collections.abc import Mapping

from loratune.errors import UserError
from loratune.families.family import Family, Part
from loratune.families.layouts import Config
from loratune.families.sd import StableDiffusion, StableDiffusion2
from loratune.families.sdxl import StableDiffusionXL

FAMILIES: list[Family] = [StableDiffusion(), StableDiffusion2(), StableDiffusionXL()]


def family_of(configs: Mapping[str, Config]) -> Family:
    """The family of a base with these configurations.

    Raises:
        UserError: it is of none that is known.
    """
    for family in FAMILIES:
        if family.fits(configs):
            return family
    raise UserError(f"configurations of {', '.join(configs)}: of no family that is known; there is {supported()}")


def supported() -> str:
    """The families, for messages."""
    return ", ".join(family.title for family in FAMILIES)


def parts() -> dict[str, Part]:
    """The components of all families by name; of several with a name, that of the first family."""
    return {part.name: part for family in reversed(FAMILIES) for part in family.parts}


def adaptable() -> dict[str, Part]:
    """The components that LoRAs sit in, by name."""
    return {name: part for name, part in parts().items() if part.adaptable}


def kohya_prefixes() -> dict[str, tuple[str, ...]]:
    """What kohya's names of a component's layers begin with, in any family."""
    prefixes: dict[str, tuple[str, ...]] = {}
    for part in (part for family in FAMILIES for part in family.parts if part.kohya):
        prefixes[part.name] = tuple(dict.fromkeys((*prefixes.get(part.name, ()), *part.kohya)))
    return prefixes


def pipelines() -> dict[str, Family]:
    """The first family of each of diffusers' classes of pipeline."""
    return {name: family for family in reversed(FAMILIES) for name in family.pipelines()}
