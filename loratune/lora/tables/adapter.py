"""Adapters as peft saves them: `base_model.model.` and the path, with adapter_config.json beside the file."""

from __future__ import annotations

from loratune.errors import UserError
from loratune.lora.tables.peft import METADATA, SUFFIXES, config_alpha, parsed_config
from loratune.lora.tables.peft import alpha as peft_alpha
from loratune.lora.tables.table import Place, Table, bare, dotted


def spell(name: str) -> tuple[str, ...]:
    """A layer's names, with its component and without."""
    return tuple(f"base_model.model.{one}" for one in (*dotted(name), *bare(dotted(name))))


def alpha(stored: float | None, place: Place) -> float:
    """As in peft's format, and where its metadata are not in the file by the configuration beside it.

    Raises:
        UserError: it is not there.
        ValueError: it gives no finite number.
    """
    if stored is not None or not place.rank or METADATA in place.metadata:
        return peft_alpha(stored, place)
    beside = place.path.with_name("adapter_config.json")
    if not beside.is_file():
        raise UserError(
            f"{place.path}: its alpha is in {beside.name}, which is not beside it; put both into one folder"
        )
    return config_alpha(
        place.name.partition(".")[2], place.rank, parsed_config(beside.read_text(), beside.name), beside.name
    )


ADAPTER = Table("peft adapter", r"^base_model\.model\.", SUFFIXES, spell, alpha=alpha)
