"""The formats of LoRA files that are known, one a row, and whose spelling a key is; without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache, lru_cache

from loratune.families.known import FAMILIES
from loratune.lora.kinds.known import KINDS
from loratune.lora.kinds.layer import LowRank
from loratune.lora.names import known_layers
from loratune.lora.tables.adapter import ADAPTER
from loratune.lora.tables.cloneofsimo import CLONEOFSIMO
from loratune.lora.tables.comfyui import BARE, COMFYUI
from loratune.lora.tables.diffusers import DIFFUSERS, OLD_DIFFUSERS
from loratune.lora.tables.kohya import KOHYA
from loratune.lora.tables.peft import PEFT
from loratune.lora.tables.table import ALPHA, MAGNITUDE, Part, Table, not_written

# The first whose names fit counts, and of several with the same names the first that has the suffix; bare names are
# what no other spells.
TABLES: dict[str, Table] = {
    table.name: table for table in (KOHYA, ADAPTER, COMFYUI, CLONEOFSIMO, OLD_DIFFUSERS, PEFT, DIFFUSERS, BARE)
}


def writable() -> list[str]:
    """The formats that are written."""
    return [name for name, table in TABLES.items() if table.write is not not_written]


@cache
def _ends(tables: tuple[Table, ...], kinds: tuple[type[LowRank], ...]) -> tuple[tuple[str, Part], ...]:
    """What a tensor is, by the end of its key, the longest first."""
    every = {end: part for table in reversed(tables) for end, part in table.ends().items()}
    return tuple(sorted(every.items(), key=lambda item: -len(item[0])))


def split(key: str) -> tuple[str, str, Part] | None:
    """A key's layer as the file names it, its suffix, and which tensor that is; None for a key of no layer."""
    for end, part in _ends(tuple(TABLES.values()), tuple(KINDS.values())):
        if key.endswith(end):
            return key.removesuffix(end), end, part
    return None


def naming(raw: str) -> tuple[Table, ...]:
    """The formats that spell a layer's name so, best first."""
    return _naming(raw, tuple(TABLES.values()), tuple(id(family) for family in FAMILIES))


@lru_cache(maxsize=1 << 13)  # each layer has several keys
def _naming(raw: str, tables: tuple[Table, ...], families: tuple[int, ...]) -> tuple[Table, ...]:
    named = tuple(table for table in tables if table.begins and table.names(raw))
    return named or tuple(table for table in tables if not table.begins)


def format_of(key: str) -> str | None:
    """The format of a key, by its name and its suffix; None where it does not tell (`.alpha` comes in several).

    `A with B's suffixes` where the name is A's and the suffix B's.
    """
    found = split(key)
    if found is None or found[2] in (ALPHA, MAGNITUDE):
        return None
    raw, end, _ = found
    tables = naming(raw)
    whole = next(
        (table for table in tables if end in table.suffixes or (table.every_kind and end in table.ends())), None
    )
    if whole is not None:
        return whole.name
    other = next((table.name for table in TABLES.values() if end in table.suffixes), "LyCORIS")
    return f"{tables[0].name} with {other}'s suffixes"


def detect_format(keys: Iterable[str]) -> str | None:
    """The format of a LoRA file's keys, by the first that tells, or None."""
    return next((name for key in keys if (name := format_of(key))), None)


def inverted(table: Table, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """From a file's name of a layer to the canonical ones that it may stand for.

    Several only where the file's does not say which text encoder it is of.
    """
    spelt: dict[str, tuple[str, ...]] = {}
    for name in names:
        for raw in table.spell(name):
            if name not in spelt.get(raw, ()):
                spelt[raw] = (*spelt.get(raw, ()), name)
    return spelt


@cache
def known_names(table: Table) -> Mapping[str, tuple[str, ...]]:
    """`inverted` for all layers of the known architectures."""
    return inverted(table, known_layers())
