"""What the keys of a LoRA file stand for: each key's layer and part, or why it is not read; from the header alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loratune.families.known import adaptable
from loratune.formats.headers import Header, TensorInfo
from loratune.lora.kinds.known import KINDS
from loratune.lora.kinds.layer import LowRank, missing
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.names import canonical_name, flat, known_shapes
from loratune.lora.tables.comfyui import BARE
from loratune.lora.tables.known import format_of, inverted, known_names, naming, split
from loratune.lora.tables.kohya import components
from loratune.lora.tables.table import Part, Table

TOKEN = "<embed>"  # how cloneofsimo's metadata mark a learned token
# What is not read, told by a key: the first pattern that fits.
UNREAD: tuple[tuple[str, str], ...] = (
    (r"^bundle_emb\.", "an embedding bundled with a LoRA"),
    (r"^lllite_", "a ControlNet-LLLite, which is no LoRA"),
    (r"^lora_controlnet$|^input_hint_block\.", "a Control-LoRA, which is a ControlNet and no LoRA"),
    (r"\.(oft_blocks|oft_diag|oft_[rRsS]|boft_[RrsS]|boft_blocks)\b", "an OFT or BOFT"),
    (r"\.on_input$|\.ia3_l\b", "an IA3"),
    (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", "a GLoRA (LyCORIS)"),
    (r"\.(w_norm|b_norm)$", "trained norms (LyCORIS)"),
    (r"\.diff(_b)?$", "whole weights beside a LoRA (LyCORIS full)"),
    (r"\.(bias_indices|bias_values|bias_size)$", "a LyCORIS with sparse biases"),
    (r"\.(vera_lambda|hra_u|lora_E|lora_embedding_[AB]|loha_|randlora_|fourierft_)", "another adapter of peft"),
    (r"^(lora_unet_|lycoris_)(double|single)_blocks_|(^|\.)(double|single)_blocks\.", "a FLUX LoRA"),
    (r"(^|\.)single_transformer_blocks\.", "a FLUX LoRA"),
    (r"^lora_unet_joint_blocks_|(^|\.)joint_blocks\.|^lora_te3_|^text_encoder_3\.", "a Stable Diffusion 3 LoRA"),
    (r"^lora_prior_|^prior\.", "a LoRA of Stable Cascade"),
    (r"^(lora_transformer_|transformer\.|base_model\.model\.transformer\.)", "a LoRA of a transformer (SD 3, FLUX)"),
)


def unread(keys: Iterable[str]) -> str | None:
    """What is not read, by the first key that tells, in words; or None."""
    kinds = (kind for key in keys for pattern, kind in UNREAD if re.search(pattern, key))
    return next(kinds, None)


@dataclass(frozen=True)
class LayerKeys:
    """The tensors of one layer.

    Args:
        raw: the layer's name in the file.
        tables: the formats that spell it so, best first.
        keys: by what they are.
        infos: where each lies, likewise.
    """

    raw: str
    tables: tuple[Table, ...]
    keys: dict[Part, str] = field(default_factory=dict)
    infos: dict[Part, TensorInfo] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The kinds of which there are parts; one, in a layer that is whole."""
        return sorted({part.kind for part in self.keys if part.kind})

    @property
    def kind(self) -> type[LowRank]:
        """The kind; LoRA where no part tells."""
        return KINDS[self.kinds[0]] if self.kinds else LoRALayer

    @property
    def dora(self) -> bool:
        """Whether there is a magnitude."""
        return any(part.field == "magnitude" for part in self.keys)

    @cached_property
    def entries(self) -> LowRank:
        """The layer, with the header's entries for tensors: its rank and shapes.

        Raises:
            ValueError: the shapes do not fit one another, or one is missing.
        """
        if len(self.kinds) > 1:
            raise ValueError(f"it has parts of a {' and of a '.join(self.kinds)}")
        held = {part.field: info for part, info in self.infos.items() if part.field not in ("alpha", "magnitude")}
        if lacking := missing(self.kind, [*held]):
            raise ValueError(f"it has no {lacking} tensor")
        layer: LowRank = self.kind(**held, alpha=1.0)  # type: ignore[call-arg]
        return layer


@dataclass(frozen=True)
class Described:
    """What a LoRA file's keys stand for.

    Args:
        format: of most keys, as `format_of` says; "" where none tells.
        layers: those that can be read, by canonical name.
        every: all, those of names that are not known too, in the file's order.
        strays: keys of no layer.
        foreign: what is not read, by key, and why: strays, and layers of other models.
        damaged: what is wrong with layers that should be read, by key.
        tokens: learned tokens.
    """

    format: str
    layers: dict[str, LayerKeys]
    every: tuple[LayerKeys, ...]
    strays: tuple[str, ...]
    foreign: dict[str, str]
    damaged: dict[str, str]
    tokens: tuple[str, ...]


def describe_keys(header: Header, names: Iterable[str] = ()) -> Described:
    """Map every key of a file, or say why it does not.

    Args:
        header: of the file.
        names: canonical names, with component, of a base's layers; those of the known architectures are known.
    """
    formats = Counter(format for key in header.tensors if (format := format_of(key)))
    main = max(formats, key=lambda name: (formats[name], name != BARE.name), default="")
    tokens = tuple(key for key in header.tensors if header.metadata.get(key) == TOKEN)
    groups, damaged, strays = _grouped(header, tokens)
    telling = [layer for layer in groups if layer.kinds]
    strays += [key for layer in groups if not layer.kinds for key in layer.keys.values()] if not main else []
    foreign = {key: _stray(key, main) for key in strays}
    layers: dict[str, LayerKeys] = {}
    for layer, (name, reason) in zip(telling, _names(telling, header.metadata, tuple(names)), strict=True):
        first = next(iter(layer.keys.values()))
        if fault := _fault(layer, name):
            damaged[first] = fault
        elif name is None:
            foreign[first] = reason
        elif name in layers:
            damaged[first] = f"is of {name}, which is there twice, under two names; remove one"
        else:
            layers[name] = layer
    if main:
        foreign |= {key: _stray(key, main) for layer in groups if not layer.kinds for key in layer.keys.values()}
    return Described(main, layers, tuple(groups), tuple(strays), foreign, damaged, tokens)


def _stray(key: str, main: str) -> str:
    if kind := unread([key]):
        return f"is of {kind}; it is not read"
    if not main:
        return "is no part of a LoRA; is it a LoRA?"
    return f"is not part of a {main} LoRA, nor of another that is read"


def _grouped(header: Header, tokens: tuple[str, ...]) -> tuple[list[LayerKeys], dict[str, str], list[str]]:
    """The layers in the file's order, keys that are there twice, and keys of no layer."""
    groups: dict[str, LayerKeys] = {}
    twice: dict[str, str] = {}
    strays: list[str] = []
    for key, info in header.tensors.items():
        if key in tokens:
            continue
        if (found := split(key)) is None:
            strays.append(key)
            continue
        raw, _, part = found
        tables = naming(raw)
        raw = raw.replace(".", "_") if tables[0].joined else raw
        layer = groups.setdefault(raw, LayerKeys(raw, tables))
        if part in layer.keys:
            twice[key] = "is there twice, under two names; remove one"
        else:
            layer.keys[part], layer.infos[part] = key, info
    return [*groups.values()], twice, strays


def _fault(layer: LayerKeys, name: str | None) -> str:
    """What is wrong with a layer of a model that is read."""
    if name is None and unread(layer.keys.values()):
        return ""
    try:
        layer.entries  # noqa: B018
    except ValueError as error:
        return f"is of {layer.raw!r}: {error}; export the file again"
    return ""


def _names(
    layers: list[LayerKeys], metadata: Mapping[str, str], names: tuple[str, ...]
) -> list[tuple[str | None, str]]:
    """The canonical name of each layer, or why there is none."""
    used = {table for layer in layers for table in layer.tables}
    spelt = {table: inverted(table, names) for table in used}
    numbers = {table: _numbers(table, layers, metadata) for table in used if table.number}
    found: list[tuple[str | None, str]] = []
    for layer in layers:
        if layer.tables[0] in numbers:
            table, problem = numbers[layer.tables[0]]
            found.append((table.get(layer.raw), problem))
        else:
            found.append(_name(layer, spelt))
    return found


def _name(layer: LayerKeys, spelt: Mapping[Table, Mapping[str, tuple[str, ...]]]) -> tuple[str | None, str]:
    for table in layer.tables:
        own = spelt[table].get(layer.raw, ())
        found = own if len(own) == 1 else tuple(dict.fromkeys((*own, *known_names(table).get(layer.raw, ()))))
        if len(found) > 1:
            fitting = [name for name in found if _fits(name, layer)]
            found = tuple(fitting) if len(fitting) == 1 else found
        if len(found) == 1:
            return found[0], ""
        if found:
            parts = " or ".join(name.partition(".")[0] for name in found)
            return None, f"does not say whether it is of {parts}; put that and a dot before the names of its layers"
    if layer.tables[0].loose and (name := canonical_name(layer.raw)):
        return name, ""
    if kind := unread(layer.keys.values()):
        return None, f"is of {kind}; it is not read"
    return None, f"is of {layer.raw!r}, which is no layer of the architectures known here"


def _fits(name: str, layer: LayerKeys) -> bool:
    try:
        size = layer.entries.flat_shape
    except ValueError:
        return False
    return any(name in shapes and flat(shapes[name]) == size for shapes in known_shapes().values())


def _numbers(table: Table, layers: list[LayerKeys], metadata: Mapping[str, str]) -> tuple[dict[str, str], str]:
    """The names of layers that are numbered, or why there are none."""
    own = [layer for layer in layers if layer.tables[0] is table]
    try:
        sizes = {layer.raw: layer.entries.flat_shape for layer in own}
        return table.number(sizes, metadata) if own and table.number else {}, ""
    except ValueError as error:
        return {}, f"cannot be told: {error}"


def component_of(raw: str) -> str:
    """unet, text_encoder or text_encoder_2, by a layer's name in the file; "" where it does not tell."""
    joined = next((part for prefix, part in components().items() if raw.startswith(prefix)), "")
    return joined or next((part for part in adaptable() if re.match(rf"{part}[.:]", raw)), "")
