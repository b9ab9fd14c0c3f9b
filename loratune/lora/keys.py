"""What the keys of a LoRA file stand for: each key's layer and part, or why it does not map; from the header alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratune.families.layouts import Shape
from loratune.formats.headers import Header
from loratune.lora.cloneofsimo import numbered
from loratune.lora.names import (
    COMPONENTS,
    TABLES,
    Part,
    canonical_name,
    flat,
    format_of,
    inverted,
    known_names,
    known_shapes,
)
from loratune.lora.refused import refused

TOKEN = "<embed>"  # how cloneofsimo's metadata mark a learned token
FIELDS_NEEDED = {"LoRA": ("down", "up"), "LoHa": ("w1_a", "w1_b", "w2_a", "w2_b")}


@dataclass(frozen=True)
class LayerKeys:
    """The tensors of one layer.

    Args:
        raw: the layer's name in the file.
        keys: by what they are.
        shapes: likewise.
    """

    raw: str
    keys: dict[Part, str] = field(default_factory=dict)
    shapes: dict[Part, Shape] = field(default_factory=dict)

    @cached_property
    def kind(self) -> str:
        """LoRA, LoHa or LoKr; "" where there are parts of several, or none that tells."""
        kinds = {part.kind for part in self.keys if part.kind}
        return kinds.pop() if len(kinds) == 1 else ""

    @property
    def dora(self) -> bool:
        """Whether there is a magnitude."""
        return any(part.field == "magnitude" for part in self.keys)

    @property
    def rank(self) -> int | None:
        """r, or None where the tensors do not tell (a LoKr of two whole factors has none)."""
        order = {"LoRA": ("down",), "LoHa": ("w1_b",), "LoKr": ("w2_b", "w1_b")}.get(self.kind, ())
        found = (self._shape(name) for name in order)
        return next((shape[0] for shape in found if shape), None)

    @property
    def flat_shape(self) -> tuple[int, int] | None:
        """(out, in k k) of the W_0 that it was made for, or None where the shapes are not those of such a layer."""
        try:
            return self._flat_shape()
        except (TypeError, IndexError):
            return None

    def _shape(self, name: str) -> Shape:
        return self.shapes.get(Part(self.kind, name), ())

    def _flat_shape(self) -> tuple[int, int]:
        if self.kind == "LoRA":
            return self._shape("up")[0], math.prod(self._shape("down")[1:]) * math.prod(self._shape("mid")[2:])
        if self.kind == "LoHa":
            return self._factored("w1_a", "w1_b", "t1")
        one = self._whole("w1") or self._factored("w1_a", "w1_b", "")
        two = self._whole("w2") or self._factored("w2_a", "w2_b", "t2")
        return one[0] * two[0], one[1] * two[1]

    def _whole(self, name: str) -> tuple[int, int] | None:
        shape = self._shape(name)
        return (shape[0], math.prod(shape[1:])) if shape else None

    def _factored(self, a: str, b: str, t: str) -> tuple[int, int]:
        if kernel := self._shape(t):
            return self._shape(a)[1], self._shape(b)[1] * math.prod(kernel[2:])
        return self._shape(a)[0], math.prod(self._shape(b)[1:])


@dataclass(frozen=True)
class Described:
    """What a LoRA file's keys stand for.

    Args:
        format: of most keys, one of `lora_names.TABLES`; "" where none tells.
        layers: by canonical name.
        unmapped: what is wrong with keys of no layer, and with layers that are not whole, by key.
        tokens: learned tokens.
    """

    format: str
    layers: dict[str, LayerKeys]
    unmapped: dict[str, str]
    tokens: tuple[str, ...] = ()


def describe_keys(header: Header, names: Iterable[str] = ()) -> Described:
    """Map every key of a file, or say why it does not.

    Args:
        header: of the file.
        names: canonical names, with component, of a base's layers; those of the known architectures are known.
    """
    if found := refused(header.tensors):
        reason = f"is of {found[1]}, which is not read"
        return Described("", {}, {key: reason for key in header.tensors if refused([key])})
    tokens = tuple(key for key in header.tensors if header.metadata.get(key) == TOKEN)
    told = Counter(name for key in header.tensors if (name := format_of(key)))
    if not told:
        return Described("", {}, dict.fromkeys(header.tensors, "is no part of a LoRA; is it a LoRA?"), tokens)
    main = told.most_common(1)[0][0]
    unmapped: dict[str, str] = {}
    grouped = _grouped(header, tuple(told), main, set(tokens), unmapped)
    layers = _named(grouped, header.metadata, tuple(names), unmapped)
    return Described(main, layers, unmapped, tokens)


def _grouped(
    header: Header, formats: tuple[str, ...], main: str, tokens: set[str], unmapped: dict[str, str]
) -> dict[tuple[str, str], LayerKeys]:
    """The keys by format and layer."""
    grouped: dict[tuple[str, str], LayerKeys] = {}
    loose: list[str] = []
    for key, info in header.tensors.items():
        own = format_of(key)
        if own is None:
            loose.append(key)
        elif found := TABLES[own].split(key):
            _put(grouped.setdefault((own, found[0]), LayerKeys(found[0])), found[1], key, info.shape, unmapped)
    for key in loose:  # alphas and magnitudes go with the layer that is there
        splits = [(name, found) for name in formats if (found := TABLES[name].split(key))]
        if key in tokens:
            continue
        if not splits:
            unmapped[key] = f"is not part of a {main} LoRA; remove it, or convert the file"
            continue
        name, (raw, part) = next((one for one in splits if (one[0], one[1][0]) in grouped), splits[0])
        _put(grouped.setdefault((name, raw), LayerKeys(raw)), part, key, header.tensors[key].shape, unmapped)
    return grouped


def _put(layer: LayerKeys, part: Part, key: str, shape: Shape, unmapped: dict[str, str]) -> None:
    if part in layer.keys:
        unmapped[key] = "is there twice, under two names; remove one"
        return
    layer.keys[part], layer.shapes[part] = key, shape


def _named(
    grouped: Mapping[tuple[str, str], LayerKeys],
    metadata: Mapping[str, str],
    names: tuple[str, ...],
    unmapped: dict[str, str],
) -> dict[str, LayerKeys]:
    """The layers by canonical name; those that are not whole, or have none, go to `unmapped`."""
    given = {format: inverted(TABLES[format], names) for format in {format for format, _ in grouped}}
    numbers, problem = _numbers(grouped, metadata)
    layers: dict[str, LayerKeys] = {}
    for (format, raw), layer in grouped.items():
        first = next(iter(layer.keys.values()))
        if fault := _fault(layer):
            unmapped[first] = fault
            continue
        if format == "cloneofsimo":
            name, reason = numbers.get(raw), problem
        else:
            name, reason = _name(format, layer, given[format])
        if name is None:
            unmapped[first] = reason
        elif name in layers:
            unmapped[first] = f"is of {name}, which is there twice, under two names; remove one"
        else:
            layers[name] = layer
    return layers


def _fault(layer: LayerKeys) -> str:
    kinds = sorted({part.kind for part in layer.keys if part.kind})
    if len(kinds) > 1:
        return f"is of {layer.raw!r}, which has parts of a {' and of a '.join(kinds)}; the file is damaged"
    for name in FIELDS_NEEDED.get(layer.kind or "LoRA", ()):
        if Part(layer.kind or "LoRA", name) not in layer.keys:
            return f"is of {layer.raw!r}, which has no {name} tensor; the file is not complete, export it again"
    return ""


def _name(format: str, layer: LayerKeys, given: Mapping[str, tuple[str, ...]]) -> tuple[str | None, str]:
    """The canonical name of a layer, or why there is none."""
    here = given.get(layer.raw, ())
    found = here if len(here) == 1 else tuple(dict.fromkeys((*here, *known_names(format).get(layer.raw, ()))))
    if len(found) > 1:
        fitting = [name for name in found if _fits(name, layer.flat_shape)]
        found = tuple(fitting) if len(fitting) == 1 else found
    if len(found) == 1:
        return found[0], ""
    if found:
        parts = " or ".join(name.partition(".")[0] for name in found)
        return None, f"does not say whether it is of {parts}; put that and a dot before the names of its layers"
    if TABLES[format].loose:
        loose = canonical_name(layer.raw)
        return loose, f"is of {layer.raw!r}, which is in none of {COMPONENTS}; it was made for another base"
    return None, f"is of {layer.raw!r}, which is no layer of the architectures known here; it was made for another base"


def _fits(name: str, shape: tuple[int, int] | None) -> bool:
    return any(name in shapes and flat(shapes[name]) == shape for shapes in known_shapes().values())


def _numbers(grouped: Mapping[tuple[str, str], LayerKeys], metadata: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The names of cloneofsimo's layers, or why there are none."""
    sizes: dict[str, dict[int, tuple[int, int]]] = {}
    for format, raw in grouped:
        if format == "cloneofsimo":
            component, _, number = raw.rpartition(":")
            shape = grouped[format, raw].flat_shape
            if not number.isdecimal() or shape is None:
                return {}, f"is of {raw!r}, which is no layer"
            sizes.setdefault(component, {})[int(number)] = shape
    try:
        return numbered(sizes, metadata) if sizes else {}, ""
    except ValueError as error:
        return {}, f"cannot be told: {error}"
