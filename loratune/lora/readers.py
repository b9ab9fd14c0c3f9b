"""What other programs make of a LoRA file, by rules as data.

Each rule was executed with diffusers 0.42 and peft 0.21, or read in their sources or in sd-scripts'. Where no rule
and no known format tells, the answer is that it is not known.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loratune.formats.headers import Header
from loratune.lora.keys import Described, LayerKeys, component_of, describe_keys
from loratune.lora.tables.table import ALPHA, DOWN, MAGNITUDE, MID, Part

WHOLE, CHANGED, PART, NOTHING, REFUSED, UNKNOWN = (
    "whole",
    "with another strength",
    "in part",
    "nothing",
    "refused",
    "not known",
)
ORDER = (WHOLE, UNKNOWN, CHANGED, PART, NOTHING, REFUSED)  # the worst that applies is what is told
# The formats that are read whole where no rule says otherwise.
READS: dict[str, tuple[str, ...]] = {
    "diffusers": ("kohya", "peft", "diffusers", "old diffusers"),
    "A1111/Forge": ("kohya",),
    "ComfyUI": ("kohya",),
    "sd-scripts": ("kohya",),
    "peft": ("peft adapter",),
}
KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")  # how all keys must begin for diffusers to convert them
KOHYA_READERS = ("A1111/Forge", "ComfyUI", "sd-scripts")
COMPONENTS = ("unet.", "text_encoder.", "text_encoder_2.")
SGM = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_")
DIFFUSERS_BLOCKS = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks)_")
ATTENTION = re.compile(r"_(attn[12]_to_(q|k|v|out_0)|self_attn_(q|k|v|out)_proj)$")
TEXT_QKV = re.compile(r"lora_te[12]?_.*_self_attn_[qkv]_proj$")


@dataclass(frozen=True)
class Keys:
    """The keys of a LoRA file as other programs meet them, also where it is not read here.

    Args:
        described: what they stand for.
        alphas: by layer, where the file gives one as a tensor.
        metadata: the file's.
    """

    described: Described
    alphas: dict[str, float]
    metadata: dict[str, str]

    @property
    def format(self) -> str:
        """Who named most of them; "" where none tells."""
        return self.described.format

    @cached_property
    def layers(self) -> dict[str, dict[Part, str]]:
        """The keys of each layer by what they are, by its name in the file; of the format of most keys."""
        return {layer.raw: layer.keys for layer in self._own}

    @cached_property
    def _own(self) -> list[LayerKeys]:
        names = self.format.partition(" with ")[0]
        return [layer for layer in self.described.every if any(table.name == names for table in layer.tables)]

    @cached_property
    def foreign(self) -> list[str]:
        """Keys of no layer, or of another format."""
        own = {key for held in self.layers.values() for key in held.values()}
        others = [key for layer in self.described.every for key in layer.keys.values() if key not in own]
        return [*others, *self.described.strays, *self.described.tokens]

    @cached_property
    def ranks(self) -> dict[str, int]:
        """r by layer, where there is one."""
        ranks = {}
        for layer in self._own:
            try:
                if layer.kinds and layer.entries.ranked:
                    ranks[layer.raw] = layer.entries.rank
            except ValueError:  # it is not whole
                continue
        return ranks

    @property
    def every(self) -> list[str]:
        """All keys of layers."""
        return [key for held in self.layers.values() for key in held.values()]

    @cached_property
    def kinds(self) -> dict[str, int]:
        """How many layers there are of each kind: LoRA, LoCon (Tucker), LoHa, LoKr, each perhaps with DoRA."""
        return dict(Counter(_kind(held) for held in self.layers.values()))


def _kind(parts: dict[Part, str]) -> str:
    kind = "LoCon (Tucker)" if MID in parts else next((part.kind for part in parts if part.kind), "nothing")
    return f"{kind} with DoRA" if MAGNITUDE in parts else kind


def read_keys(path: Path, header: Header, names: Sequence[str] = ()) -> Keys:
    """What the keys say; of the tensors only the alphas are read.

    Raises:
        UserError: the file cannot be read.
    """
    from loratune.lora.file import mapped

    described = describe_keys(header, names)
    alphas = {layer.raw: layer.keys[ALPHA] for layer in described.every if ALPHA in layer.keys}
    stored = mapped(path, header, alphas.values())
    numbers = {}
    for raw, key in alphas.items():
        try:
            numbers[raw] = stored[key].number
        except ValueError:  # no number
            continue
    return Keys(described, numbers, header.metadata)


@dataclass(frozen=True)
class Rule:
    """What readers do with files in which some keys are found.

    Args:
        readers: whom it is about.
        effect: one of `ORDER`.
        told: why, for people.
        keys: from a file's keys to those that it is about; none where it does not apply.
    """

    readers: tuple[str, ...]
    effect: str
    told: str
    keys: Callable[[Keys], Sequence[str]]


def _in(*formats: str) -> Callable[[Callable[[Keys], Sequence[str]]], Callable[[Keys], Sequence[str]]]:
    """Only for files of these formats."""

    def only(find: Callable[[Keys], Sequence[str]]) -> Callable[[Keys], Sequence[str]]:
        return lambda keys: find(keys) if keys.format in formats else ()

    return only


def _without_lora(keys: Keys) -> list[str]:
    """Keys without the letters lora; in kohya's files only where others are not kohya's, and no dora_scale."""
    every = [key for key in (*keys.every, *keys.foreign) if "dora_scale" not in key]
    if all(key.startswith(KOHYA) for key in every):
        return []
    return [key for key in every if "lora" not in key]


@_in("kohya")
def _mixed_with_others(keys: Keys) -> list[str]:
    """The keys of kohya's file in which others mention lora too, so that the converter leaves all as they are."""
    converted = all(key.startswith(KOHYA) for key in (*keys.every, *keys.foreign))
    return [] if converted or _without_lora(keys) else keys.every


def _other_kinds(keys: Keys) -> list[str]:
    """What only LyCORIS has: the products of LoHa and LoKr, and middle tensors."""
    each = ((part, key) for held in keys.layers.values() for part, key in held.items())
    return [key for part, key in each if part == MID or part.kind not in ("", "LoRA")]


def _dora(keys: Keys) -> list[str]:
    return [held[MAGNITUDE] for held in keys.layers.values() if MAGNITUDE in held]


@_in("kohya")
def _left_by_converter(keys: Keys) -> list[str]:
    """What belongs to no lora_down of kohya's: the products of LyCORIS, middle tensors, single alphas."""
    left = _other_kinds(keys)
    left += [held[ALPHA] for held in keys.layers.values() if ALPHA in held and DOWN not in held]
    return [*left, *(key for key in keys.foreign if key.startswith(KOHYA))]


@_in("kohya")
def _other_alpha(keys: Keys) -> list[str]:
    """Attention layers whose alpha is not the most common one of their component; without any, alpha is r."""
    wrong = []
    for component in ("unet", "text_encoder", "text_encoder_2"):
        own = [name for name in keys.layers if component_of(name) == component and name in keys.ranks]
        counts = Counter(keys.alphas[name] for name in own if name in keys.alphas)
        common = counts.most_common(1)[0][0] if counts else None
        differ = (name for name in own if common is not None and keys.alphas.get(name, keys.ranks[name]) != common)
        wrong += [keys.layers[name].get(ALPHA, name) for name in differ if ATTENTION.search(name)]
    return wrong


def _text_without_out(mlp: bool) -> Callable[[Keys], Sequence[str]]:
    """q, k and v of a text encoder without out_proj in kohya's names, where there is (no) mlp beside them."""

    @_in("kohya")
    def find(keys: Keys) -> list[str]:
        lost: list[str] = []
        for prefix in ("lora_te_", "lora_te1_", "lora_te2_"):
            own = [name for name in keys.layers if name.startswith(prefix)]
            qkv = [name for name in own if TEXT_QKV.match(name)]
            out = any(name.endswith("_out_proj") for name in own)
            if qkv and not out and mlp == any("_mlp_" in name for name in own):
                lost += [key for name in qkv for key in keys.layers[name].values()]
        return lost

    return find


@_in("kohya")
def _both_namings(keys: Keys) -> list[str]:
    sgm = [key for key in keys.every if SGM.match(key)]
    return sgm if any(DIFFUSERS_BLOCKS.match(key) for key in keys.layers) else []


@_in("kohya")
def _sdxl_with_diffusers_names(keys: Keys) -> list[str]:
    xl = any(name.startswith("lora_te2_") for name in keys.layers) or "sdxl" in keys.metadata.get(
        "ss_base_model_version", ""
    )
    return [key for key in keys.every if DIFFUSERS_BLOCKS.match(key)] if xl else []


@_in("peft", "diffusers", "old diffusers")
def _unknown_component(keys: Keys) -> list[str]:
    return [key for key in (*keys.every, *keys.foreign) if not key.startswith(COMPONENTS)]


@_in("peft")
def _untold_component(keys: Keys) -> list[str]:
    """Components that lora_adapter_metadata says nothing of, where it is there."""
    try:
        settings: Any = json.loads(keys.metadata.get("lora_adapter_metadata", "null"))
    except (ValueError, RecursionError):
        return ["lora_adapter_metadata"]
    if not isinstance(settings, dict):
        return []
    parts = {f"{key.split('.')[0]}." for key in settings}
    return [key for key in keys.every if key.startswith(COMPONENTS) and not key.startswith(tuple(parts))]


RULES: tuple[Rule, ...] = (
    Rule(("diffusers",), REFUSED, "every key must hold the letters lora, or the whole file is refused", _without_lora),
    Rule(("diffusers",), NOTHING, "one key that is not kohya's, and none is converted", _mixed_with_others),
    Rule(
        ("diffusers",),
        REFUSED,
        "its converter knows lora_down, lora_up and alpha alone, and refuses the whole file",
        _left_by_converter,
    ),
    Rule(
        ("diffusers",),
        CHANGED,
        "dora_scale is left out with a warning: what is loaded is the LoRA without DoRA",
        lambda keys: [key for key in (*keys.every, *keys.foreign) if "dora_scale" in key],
    ),
    Rule(("diffusers",), CHANGED, "attention layers get the most common alpha of all layers", _other_alpha),
    Rule(
        ("diffusers",), REFUSED, "a text encoder's q, k, v without out_proj are a ValueError", _text_without_out(False)
    ),
    Rule(
        ("diffusers",), PART, "a text encoder's q, k, v without out_proj are left out silently", _text_without_out(True)
    ),
    Rule(("diffusers",), PART, "SDXL names of both kinds: those of the original layout are left out", _both_namings),
    Rule(
        ("diffusers",),
        NOTHING,
        "its pipelines read no adapter folders of peft, and only warn",
        _in("peft adapter")(lambda keys: keys.every),
    ),
    Rule(("diffusers",), PART, "keys must begin with unet. or text_encoder; others only warn", _unknown_component),
    Rule(("diffusers",), REFUSED, "lora_adapter_metadata must tell of every component in the file", _untold_component),
    Rule(KOHYA_READERS[:2], UNKNOWN, "SDXL with diffusers' block names", _sdxl_with_diffusers_names),
    Rule(
        KOHYA_READERS,
        UNKNOWN,
        "LyCORIS and DoRA",
        lambda keys: [*_other_kinds(keys), *_dora(keys)],
    ),
    Rule(
        KOHYA_READERS,
        UNKNOWN,
        "names that begin with lycoris_",
        lambda keys: [key for key in keys.every if key.startswith("lycoris_")],
    ),
    Rule(KOHYA_READERS, UNKNOWN, "keys of no layer", lambda keys: keys.foreign),
    Rule(
        ("sd-scripts",), REFUSED, "cloneofsimo's names are not known there", _in("cloneofsimo")(lambda keys: keys.every)
    ),
    Rule(
        ("peft",),
        REFUSED,
        "it reads folders with adapter_config.json and keys that begin with base_model.model.",
        lambda keys: [key for key in keys.every if not key.startswith("base_model.model.")],
    ),
)


def verdicts(keys: Keys) -> dict[str, dict[str, Any]]:
    """For each known reader: what it loads (one of `ORDER`), and why: notes with the keys that they are about."""
    return {reader: _verdict(reader, keys) for reader in READS}


def _verdict(reader: str, keys: Keys) -> dict[str, Any]:
    applying = [(rule, list(found)) for rule in RULES if reader in rule.readers and (found := rule.keys(keys))]
    notes: list[dict[str, Any]] = [
        {"effect": _effect(rule, found, keys), "why": rule.told, "keys": found} for rule, found in applying
    ]
    otherwise = WHOLE if keys.format in READS[reader] else UNKNOWN
    return {"loads": max([otherwise, *(note["effect"] for note in notes)], key=ORDER.index), "notes": notes}


def _effect(rule: Rule, affected: list[str], keys: Keys) -> str:
    """A rule's effect; leaving all of the keys out loads nothing."""
    return NOTHING if rule.effect == PART and set(affected) >= set(keys.every) else rule.effect
