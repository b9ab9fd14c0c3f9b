"""LoRA formats as tables: what each calls the tensors of a layer, and the layers; made once, inverted for reading."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

from loratune.families.architectures import architectures, entries, module_names, original_names
from loratune.families.layout_text import canonical_text_name
from loratune.families.layouts import Shape

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


class Part(NamedTuple):
    """What a tensor is of a layer.

    Args:
        kind: the kind of layer that has it (LoRA, LoHa, LoKr), or "" where any may.
        field: of the layer's class in `lora_layers`.
    """

    kind: str
    field: str


ALPHA, MAGNITUDE = Part("", "alpha"), Part("", "magnitude")
DOWN, UP, MID = (Part("LoRA", field) for field in ("down", "up", "mid"))
_PEFT = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_magnitude_vector.weight": MAGNITUDE,  # transformers 5 passes over the other one in text encoders
    ".lora_magnitude_vector": MAGNITUDE,
    ".alpha": ALPHA,
}
_LYCORIS = {
    **{f".hada_{field}": Part("LoHa", field) for field in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{field}": Part("LoKr", field) for field in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}
KOHYA_PREFIXES = {
    "unet": ("lora_unet_", "lycoris_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# What sd-scripts puts before a layer's name, by kind of base.
KOHYA_WRITTEN = {
    "sd": {"unet": "lora_unet_", "text_encoder": "lora_te_"},
    "sdxl": {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"},
}
# diffusers' attention processors of 2023 called text encoders' layers as the U-Net's.
OLD_ATTENTION = {"to_q": "to_q", "to_k": "to_k", "to_v": "to_v", "to_out.0": "to_out"}
OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def _dotted(name: str) -> tuple[str, ...]:
    """The name, and without the level that transformers 5 left out of text encoders."""
    return (name, name.replace(".text_model.", ".", 1))


def _adapter(name: str) -> tuple[str, ...]:
    spelt = (*_dotted(name), *(one.partition(".")[2] for one in _dotted(name)))
    return tuple(f"base_model.model.{one}" for one in spelt)


def _old(name: str) -> tuple[str, ...]:
    """Names before `_lora.down.weight`; none for a layer that these processors did not have."""
    for attention in (".attn1.", ".attn2."):
        path, found, layer = name.partition(attention)
        if found and layer in OLD_ATTENTION:
            whole = f"{path}{attention}processor.{OLD_ATTENTION[layer]}"
            return (whole, whole.partition(".")[2])
    path, found, layer = name.partition(".self_attn.")
    if found and layer in OLD_TEXT:
        spelt = _dotted(f"{path}.self_attn.{OLD_TEXT[layer]}")
        return (*spelt, *(one.partition(".")[2] for one in spelt))
    return ()


def _kohya(name: str) -> tuple[str, ...]:
    component, _, path = name.partition(".")
    paths = (path, *_originals().get(name, ()))
    return tuple(f"{prefix}{one.replace('.', '_')}" for prefix in KOHYA_PREFIXES[component] for one in paths)


@dataclass(frozen=True)
class Table:
    """A format.

    Args:
        name: of the format.
        parts: what a tensor is, by the end of its key; of several for one part, the first is what is written.
        spell: the names of a layer in files, by its canonical one.
        loose: whether layers of no known architecture are read too: the file's name is the canonical one.
    """

    name: str
    parts: Mapping[str, Part]
    spell: Callable[[str], tuple[str, ...]]
    loose: bool = False

    def split(self, key: str) -> tuple[str, Part] | None:
        """The layer's name in the file, and which of its tensors a key is; None for a key of no layer."""
        end = max((end for end in self.parts if key.endswith(end)), key=len, default=None)
        return (key.removesuffix(end), self.parts[end]) if end else None

    @property
    def suffixes(self) -> dict[Part, str]:
        """What is written at the end of a key, by what the tensor is."""
        return {part: end for end, part in reversed(list(self.parts.items()))}


TABLES = {
    table.name: table
    for table in (
        Table(
            "kohya",
            {".lora_down.weight": DOWN, ".lora_up.weight": UP, ".lora_mid.weight": MID}
            | _LYCORIS
            | {".alpha": ALPHA, ".dora_scale": MAGNITUDE},
            _kohya,
        ),
        Table("peft adapter", {**_PEFT, ".lora_A.default.weight": DOWN, ".lora_B.default.weight": UP}, _adapter),
        Table("old diffusers", {"_lora.down.weight": DOWN, "_lora.up.weight": UP, "_lora.alpha": ALPHA}, _old),
        Table(
            "diffusers",
            {
                ".lora.down.weight": DOWN,
                ".lora.up.weight": UP,
                ".lora_linear_layer.down.weight": DOWN,
                ".lora_linear_layer.up.weight": UP,
                ".alpha": ALPHA,
            },
            _dotted,
            loose=True,
        ),
        Table("peft", _PEFT, _dotted, loose=True),
        # Layers are numbered, not named.
        Table("cloneofsimo", {":down": DOWN, ":up": UP}, lambda name: ()),
    )
}


def format_of(key: str) -> str | None:
    """The format of which a key is, or None where it does not tell (`.alpha` comes in several)."""
    kohya = key.startswith(tuple(prefix for prefixes in KOHYA_PREFIXES.values() for prefix in prefixes))
    for name, table in TABLES.items():
        found = table.split(key)
        if found is None or found[1] in (ALPHA, MAGNITUDE):
            continue
        if (name == "kohya") == kohya and (name != "peft adapter" or key.startswith("base_model.model.")):
            return name
    return None


def detect_format(keys: Iterable[str]) -> str | None:
    """The format of a LoRA file's keys (one of `TABLES`), by the first that tells, or None."""
    return next((name for key in keys if (name := format_of(key))), None)


def inverted(table: Table, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """From a file's name of a layer to the canonical ones that it may stand for.

    Several only where the file's does not say which text encoder it is of.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        for spelt in table.spell(name):
            if name not in found.get(spelt, ()):
                found[spelt] = (*found.get(spelt, ()), name)
    return found


@cache
def known_names(format: str) -> Mapping[str, tuple[str, ...]]:
    """`inverted` for all layers of the known architectures."""
    return MappingProxyType(inverted(TABLES[format], _known()))


@cache
def _known() -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for configs in architectures().values() for name in module_names(configs)))


@cache
def _originals() -> dict[str, tuple[str, ...]]:
    """The original layout's names of each layer of the U-Nets known."""
    found: dict[str, tuple[str, ...]] = {}
    for configs in architectures().values():
        for name, original in original_names(configs).items():
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), original)))
    return found


@cache
def known_shapes() -> Mapping[str, Mapping[str, Shape]]:
    """The shape of W_0 of every layer that a LoRA can sit on, by architecture and canonical name."""
    found = {}
    for name, configs in architectures().items():
        whole = {f"{component}.{key}": shape for component, key, shape, _ in entries(configs)}
        found[name] = {layer: whole[f"{layer}.weight"] for layer in module_names(configs)}
    return found


def flat(shape: Shape) -> tuple[int, int]:
    """(out, in k k) of a W_0 of (out, in) or (out, in, k, k)."""
    kernel = shape[2] * shape[3] if len(shape) == 4 else 1
    return shape[0], shape[1] * kernel


def base_kind(shapes: Mapping[str, tuple[int, int]], told: str = "") -> str:
    """What a LoRA's layers are for, sd or sdxl: by their names, then their shapes, then by what the file says.

    Args:
        shapes: (out, in k k) by canonical name.
        told: the file's own word, sd-scripts' `ss_base_model_version` or Stability's `modelspec.architecture`.
    """
    if any(name.startswith("text_encoder_2.") for name in shapes):
        return "sdxl"
    named = {one for one, known in known_shapes().items() if shapes.keys() <= known.keys()}
    fitting = {one for one in named if all(flat(known_shapes()[one][name]) == shape for name, shape in shapes.items())}
    kinds = {"sdxl" if one.startswith("sdxl") else "sd" for one in fitting or named}
    if len(kinds) == 1:
        return kinds.pop()
    return "sdxl" if kinds and any(word in told for word in ("sdxl", "stable-diffusion-xl")) else "sd"


def kohya_names(names: Iterable[str], kind: str = "sd") -> dict[str, str]:
    """From kohya's name of a layer, as it is written, to its canonical one.

    Args:
        names: canonical, with component.
        kind: of the base: sd, or sdxl, of whose U-Net the original layout's names are written (diffusers' where
            a layer is not SDXL's).

    Raises:
        ValueError: two layers would have one name.
    """
    names = list(names)
    originals = original_names(architectures()["sdxl"]) if kind == "sdxl" else {}
    if any(name.startswith("unet.") and name not in originals for name in names):
        originals = {}  # never some of both: diffusers would leave out the original ones
    table: dict[str, str] = {}
    for name in names:
        component, _, path = name.partition(".")
        key = f"{KOHYA_WRITTEN[kind][component]}{originals.get(name, path).replace('.', '_')}"
        if table.setdefault(key, name) != name:
            raise ValueError(f"{table[key]} and {name} would both be {key}")
    return table


def canonical_name(raw: str) -> str | None:
    """The canonical name of a layer whose name in the file has dots, or None where the component is not known."""
    component, _, path = raw.partition(".")
    if component not in COMPONENTS or not path:
        return None
    return raw if component == "unet" else f"{component}.{canonical_text_name(path)}"
