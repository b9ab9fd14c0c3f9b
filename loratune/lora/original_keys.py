"""The keys of a LoRA file as other programs meet them, also where it is not read here; from its header alone."""

from __future__ import annotations

import re
import struct
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loratune.formats.headers import Header, TensorInfo
from loratune.lora.names import ALPHA, DOWN, KOHYA_PREFIXES, MAGNITUDE, MID, TABLES, Part, format_of

KOHYA = {prefix: component for component, prefixes in KOHYA_PREFIXES.items() for prefix in prefixes}
# The tensor whose first dimension is r, by the first that is there.
RANKED = (DOWN, Part("LoHa", "w1_b"), Part("LoKr", "w2_b"), Part("LoKr", "w1_b"))
KINDS = {"F16": "e", "F32": "f", "F64": "d", "I32": "i", "I64": "q"}


@dataclass(frozen=True)
class Keys:
    """The keys of a LoRA file, by layer.

    Args:
        format: who named them, one of `lora_names.TABLES`, by most of them; "" where none tells.
        layers: the keys of each layer by what they are, by the layer's name in the file.
        foreign: keys of no layer, or of another format.
        ranks: r by layer, where there is one.
        alphas: by layer, where the file gives one as a tensor.
        metadata: the file's.
    """

    format: str
    layers: dict[str, dict[Part, str]]
    foreign: tuple[str, ...]
    ranks: dict[str, int]
    alphas: dict[str, float]
    metadata: dict[str, str]

    @property
    def every(self) -> list[str]:
        """All keys of layers."""
        return [key for held in self.layers.values() for key in held.values()]

    @cached_property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind: LoRA, LoCon (Tucker), LoHa, LoKr, each perhaps with DoRA."""
        return dict(Counter(_kind(held) for held in self.layers.values()))


def _kind(held: dict[Part, str]) -> str:
    kind = "LoCon (Tucker)" if MID in held else next((part.kind for part in held if part.kind), "nothing")
    return f"{kind} with DoRA" if MAGNITUDE in held else kind


def component_of(layer: str, format: str) -> str:
    """unet, text_encoder or text_encoder_2, by a layer's name in the file; "" where it does not tell."""
    if format == "kohya":
        return next((part for prefix, part in KOHYA.items() if layer.startswith(prefix)), "")
    return re.split(r"[.:]", layer)[0]


def read_keys(path: Path, header: Header) -> Keys:
    """What the keys say; of the tensors only the alphas are read, a few bytes each.

    Raises:
        OSError: the file cannot be read.
    """
    told = Counter(name for key in header.tensors if (name := format_of(key)))
    main = told.most_common(1)[0][0] if told else ""
    layers: dict[str, dict[Part, str]] = {}
    foreign = []
    for key in header.tensors:
        if found := _split(key, main):
            layers.setdefault(found[0], {})[found[1]] = key
        else:
            foreign.append(key)
    ranks = {name: rank for name, held in layers.items() if (rank := _rank(held, header)) is not None}
    alphas = _scalars(path, header, {name: held[ALPHA] for name, held in layers.items() if ALPHA in held})
    return Keys(main, layers, tuple(foreign), ranks, alphas, header.metadata)


def _split(key: str, main: str) -> tuple[str, Part] | None:
    """The layer and the part of a key of a format; alphas and magnitudes are of the one that most keys have."""
    own = format_of(key)
    if own not in (main, None) or (main == "kohya" and not key.startswith(tuple(KOHYA))):
        return None
    return TABLES[main].split(key) if main else None


def _rank(held: dict[Part, str], header: Header) -> int | None:
    shapes = (header.tensors[held[part]].shape for part in RANKED if part in held)
    return next((shape[0] for shape in shapes if shape), None)


def _scalars(path: Path, header: Header, keys: dict[str, str]) -> dict[str, float]:
    found: dict[str, float] = {}
    with path.open("rb") as file:
        for name, key in keys.items():
            info = header.tensors[key]
            file.seek(header.data_offset + info.start)
            value = _scalar(file.read(min(info.stop - info.start, 8)), info)
            if value is not None:
                found[name] = value
    return found


def _scalar(data: bytes, info: TensorInfo) -> float | None:
    """One number, or None where the tensor is another size or kind."""
    if info.dtype == "BF16" and len(data) == 2:
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    kind = KINDS.get(info.dtype, "")
    if not kind or len(data) != struct.calcsize(f"<{kind}") or info.stop - info.start != len(data):
        return None
    return float(struct.unpack(f"<{kind}", data)[0])
