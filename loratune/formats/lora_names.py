"""What LoRA files call things: suffixes, kohya's names as a table, peft's metadata; what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from loratune.formats.architectures import architectures, canonical_text_name, module_names

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")
ADAPTER_METADATA = "lora_adapter_metadata"
SUFFIXES: dict[str, dict[str, str]] = {
    "peft": {".lora_A.weight": "down", ".lora_B.weight": "up"},
    "kohya": {".lora_down.weight": "down", ".lora_up.weight": "up"},
    "diffusers": {
        ".lora.down.weight": "down",
        ".lora.up.weight": "up",
        ".lora_linear_layer.down.weight": "down",
        ".lora_linear_layer.up.weight": "up",
    },
}
# Beginnings of keys (or parts, where they begin with a dot) that tell a kind of file that is not read.
REFUSED = {
    ".lokr_": "a LoKr (LyCORIS)",
    ".hada_": "a LoHa (LyCORIS)",
    ".lora_mid.": "a LoCon with a middle tensor (LyCORIS)",
    ".oft_": "an OFT (LyCORIS)",
    ".dora_scale": "a DoRA",
    ".lora_magnitude_vector": "a DoRA",
    "lora_unet_input_blocks_": "an SDXL LoRA with kohya's names",
    "lora_unet_middle_block_": "an SDXL LoRA with kohya's names",
    "lora_unet_output_blocks_": "an SDXL LoRA with kohya's names",
    "lora_unet_double_blocks_": "a FLUX LoRA",
    "lora_transformer_": "a LoRA of a transformer (SD 3, FLUX)",
    "transformer.": "a LoRA of a transformer (SD 3, FLUX)",
    "bundle_emb.": "an embedding bundled with a LoRA",
    ".processor.": "a LoRA of diffusers' attention processors (2023)",
    "base_model.model.": "a peft adapter folder",
    "unet:0:": "a cloneofsimo LoRA",
    "text_encoder:0:": "a cloneofsimo LoRA",
}
KOHYA_WRITTEN = {"unet": ("lora_unet",), "text_encoder": ("lora_te",)}
KOHYA_READ = {
    "unet": ("lora_unet",),
    "text_encoder": ("lora_te", "lora_te1"),
    "text_encoder_2": ("lora_te2",),
}


def kohya_names(names: Iterable[str], reading: bool = False) -> dict[str, str]:
    """From kohya's name of a layer to its canonical one; made from the latter, never parsed back.

    Args:
        names: canonical, with component.
        reading: take SDXL's prefixes too.

    Raises:
        ValueError: two layers would have one name.
    """
    prefixes = KOHYA_READ if reading else KOHYA_WRITTEN
    table: dict[str, str] = {}
    for name in names:
        component, _, path = name.partition(".")
        for prefix in prefixes[component]:
            key = f"{prefix}_{path.replace('.', '_')}"
            if table.setdefault(key, name) != name:
                raise ValueError(f"{table[key]} and {name} would both be {key}")
    return table


@cache
def known_kohya_names() -> dict[str, str]:
    """kohya's names of all layers of the known architectures, to their canonical ones."""
    names = {name for configs in architectures().values() for name in module_names(configs)}
    return kohya_names(sorted(names), reading=True)


def refused(keys: Iterable[str]) -> tuple[str, str] | None:
    """The first key that tells a kind of file that is not read, and the kind; or None."""
    for key in keys:
        for part, kind in REFUSED.items():
            if key.startswith(part) or (part.startswith(".") and part in key):
                return key, kind
    return None


def kohya_problem(names: Collection[str]) -> str | None:
    """Why layers cannot be written in kohya's format, or None."""
    if any(name.startswith("text_encoder_2.") for name in names):
        return "SDXL is not written in kohya's format yet"
    text = [name.rpartition(".")[2] for name in names if name.startswith("text_encoder.")]
    if {"q_proj", "k_proj", "v_proj"} & set(text) and "out_proj" not in text:
        return "diffusers cannot read kohya's text encoder q, k, v without out_proj"
    return None


def canonical_name(raw: str) -> str | None:
    """The canonical name of a layer in a peft or diffusers file, or None where the component is not known."""
    component, _, path = raw.partition(".")
    if component not in COMPONENTS or not path:
        return None
    return raw if component == "unet" else f"{component}.{canonical_text_name(path)}"


def _in_metadata(component: str, path: str) -> str:
    """A layer's name in peft's metadata: without text_model, so that it fits with and without that level.

    peft takes a name for a layer's whole name or for the end of it; transformers 5 has no such level.
    """
    return path if component == "unet" else path.removeprefix("text_model.")


def peft_metadata(sizes: Mapping[str, tuple[int, float]]) -> str:
    """The JSON that gives diffusers every layer's rank and alpha (a flattened LoraConfig for each component).

    Args:
        sizes: rank and alpha by canonical name.
    """
    told: dict[str, Any] = {}
    for component in COMPONENTS:
        own = {
            _in_metadata(component, name.partition(".")[2]): size
            for name, size in sizes.items()
            if name.startswith(f"{component}.")
        }
        if not own:
            continue
        ranks = [rank for rank, _ in own.values()]
        alphas = [int(alpha) if float(alpha).is_integer() else alpha for _, alpha in own.values()]
        rank, alpha = max(ranks, key=ranks.count), max(alphas, key=alphas.count)
        config = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(own),
            "rank_pattern": {path: r for path, r in zip(own, ranks, strict=True) if r != rank},
            "alpha_pattern": {path: a for path, a in zip(own, alphas, strict=True) if a != alpha},
        }
        told |= {f"{component}.{key}": value for key, value in config.items()}
    return json.dumps(told, sort_keys=True)


def peft_alpha(name: str, rank: int, text: str | None) -> float:
    """A layer's alpha by peft's metadata, and r where there is none.

    Args:
        name: canonical, with component.
        rank: r of its tensors.
        text: the metadata's JSON.

    Raises:
        ValueError: the metadata is no JSON object, has no such component or gives no finite number.
    """
    if text is None:
        return float(rank)
    component, _, path = name.partition(".")
    config = _parsed(text)
    if f"{component}.lora_alpha" not in config:
        raise ValueError(f"{ADAPTER_METADATA} says nothing of {component}.lora_alpha")
    patterns = config.get(f"{component}.alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{ADAPTER_METADATA}: {component}.alpha_pattern is {patterns!r}; it must be a table")
    fitting = (value for key, value in patterns.items() if f".{path}".endswith(f".{key.removeprefix('^')}"))
    alpha = next(fitting, config[f"{component}.lora_alpha"])
    if not isinstance(alpha, int | float) or not abs(alpha) < 1e300:
        raise ValueError(f"{ADAPTER_METADATA} gives the alpha {alpha!r}; it must be a number")
    return float(alpha) * (math.sqrt(rank) if config.get(f"{component}.use_rslora") else 1.0)


@lru_cache(maxsize=1)
def _parsed(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{ADAPTER_METADATA} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{ADAPTER_METADATA} must be a table")
    return config
