"""The kinds of adapter that are known, one a row; without torch."""

from __future__ import annotations

from loratune.lora.kinds.layer import LowRank
from loratune.lora.kinds.loha import LoHaLayer
from loratune.lora.kinds.lokr import LoKrLayer
from loratune.lora.kinds.lora import LoRALayer

KINDS: dict[str, type[LowRank]] = {kind.kind: kind for kind in (LoRALayer, LoHaLayer, LoKrLayer)}


def types() -> dict[str, type[LowRank]]:
    """The kind that `lora.type` of a recipe names."""
    return {name: kind for kind in KINDS.values() for name in kind.makers}


def maker_of(type: str) -> tuple[str, dict[str, str] | None]:
    """What makes the layers of a `lora.type`, as sd-scripts' metadata call it, and its arguments."""
    return types()[type].makers[type]
