"""What LoRA files say of themselves beside the tensors: alphas in peft's way, and what other programs show."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from loratune.errors import UserError
from loratune.lora.names import COMPONENTS

ADAPTER_METADATA = "lora_adapter_metadata"
PADDING_KEY = "loratune.padding"  # layers of zeros, without which diffusers would not read the others
PEFT_NAMED = ("peft", "peft adapter", "diffusers", "old diffusers")
MODELSPEC_VERSION = "1.0.1"
SGM = "https://github.com/Stability-AI/generative-models"


@dataclass(frozen=True)
class Size:
    """What peft's configuration says of a layer: r, alpha, and whether it is a DoRA."""

    rank: int
    alpha: float
    dora: bool = False


def _in_metadata(component: str, path: str) -> str:
    """A layer's name in peft's metadata: without text_model, so that it fits with and without that level.

    peft takes a name for a layer's whole name or for the end of it; transformers 5 has no such level.
    """
    return path if component == "unet" else path.removeprefix("text_model.")


def peft_metadata(sizes: Mapping[str, Size]) -> str:
    """The JSON that gives diffusers every layer's rank and alpha (a flattened LoraConfig for each component).

    Args:
        sizes: by canonical name.
    """
    told: dict[str, Any] = {}
    for component in COMPONENTS:
        own = {
            _in_metadata(component, name.partition(".")[2]): size
            for name, size in sizes.items()
            if name.startswith(f"{component}.")
        }
        if own:
            told |= {f"{component}.{key}": value for key, value in _component(own).items()}
    return json.dumps(told, sort_keys=True)


def _component(sizes: Mapping[str, Size]) -> dict[str, Any]:
    alphas = {path: number(size.alpha) for path, size in sizes.items()}
    rank = _most_common(size.rank for size in sizes.values())
    alpha = _most_common(alphas.values())
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(sizes),
        "rank_pattern": {path: size.rank for path, size in sizes.items() if size.rank != rank},
        "alpha_pattern": {path: one for path, one in alphas.items() if one != alpha},
    }
    return config | ({"use_dora": True} if any(size.dora for size in sizes.values()) else {})


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def number(value: float) -> int | float:
    """A whole number as an int, as other programs write it."""
    return int(value) if float(value).is_integer() else value


def carried_config(text: str, source: str) -> dict[str, Any]:
    """The JSON object of peft's metadata, or of an adapter_config.json.

    Raises:
        ValueError: it is none.
    """
    return dict(_parsed(text, source))


@lru_cache(maxsize=2)
def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source} is not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{source} must be a table")
    return config


def stored_alpha(path: Path | str, name: str, rank: int, format: str, metadata: Mapping[str, str]) -> float:
    """A layer's alpha where it is no tensor: by peft's configuration, else r.

    Args:
        path: of the file; its configuration may lie beside it.
        name: of the layer, canonical, with component.
        rank: r of its tensors, 0 for a layer that has none.
        format: of the file, one of `lora_names.TABLES`.
        metadata: of the file.

    Raises:
        UserError: the configuration should be beside the file and is not.
        ValueError: as `peft_alpha` and `config_alpha`.
    """
    if format not in PEFT_NAMED or not rank:
        return float(rank or 1)
    carried = metadata.get(ADAPTER_METADATA)
    if format != "peft adapter" or carried is not None:
        return peft_alpha(name, rank, carried)
    beside = Path(path).with_name("adapter_config.json")
    if not beside.is_file():
        raise UserError(f"{path}: its alpha is in {beside.name}, which is not beside it; put both into one folder")
    return config_alpha(name.partition(".")[2], rank, carried_config(beside.read_text(), beside.name), beside.name)


def padded_layers(metadata: Mapping[str, str]) -> list[str]:
    """The layers that a file's metadata say were put in as zeros; they are left out where they still are."""
    try:
        listed = json.loads(metadata.get(PADDING_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def peft_alpha(name: str, rank: int, text: str | None) -> float:
    """A layer's alpha by peft's metadata, and r where there is none; rsLoRA's alpha / sqrt(r) as alpha' / r.

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
    config = {
        key.removeprefix(f"{component}."): value
        for key, value in carried_config(text, ADAPTER_METADATA).items()
        if key.startswith(f"{component}.")
    }
    if "lora_alpha" not in config:
        raise ValueError(f"{ADAPTER_METADATA} says nothing of {component}.lora_alpha")
    return config_alpha(path, rank, config, ADAPTER_METADATA)


def config_alpha(path: str, rank: int, config: Mapping[str, Any], source: str) -> float:
    """A layer's alpha by a LoraConfig, or one of peft's other configurations.

    Args:
        path: canonical, without component.
        rank: r of its tensors.
        config: as peft saves it.
        source: of the configuration, for messages.

    Raises:
        ValueError: it gives no finite number, or alphas by a regular expression.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: alpha_pattern is {patterns!r}; it must be a table")
    if odd := [key for key in patterns if not re.fullmatch(r"\^?[\w.]+", key)]:
        raise ValueError(f"{source}: alpha_pattern has the regular expression {odd[0]!r}; only names are read")
    given = (value for key, value in patterns.items() if _means(key, path))
    alpha = next(given, config.get("lora_alpha", config.get("alpha")))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e300:
        raise ValueError(f"{source} gives the alpha {alpha!r}; it must be a number")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _means(key: str, path: str) -> bool:
    """Whether a key of a pattern means a layer: its whole name after ^, or the end of it."""
    paths = (path, path.removeprefix("text_model."))
    if key.startswith("^"):
        return key[1:] in paths
    return any(f".{one}".endswith(f".{key}") for one in paths)


def tag_frequency(folders: Mapping[str, Iterable[str]]) -> str:
    """sd-scripts' ss_tag_frequency: how many captions of a folder have each tag (what is between commas), as JSON."""
    told = {}
    for folder, captions in folders.items():
        tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
        told[folder] = dict(tags.most_common())
    return json.dumps(told)


def standard_metadata(
    *,
    rank: int | None = None,
    alpha: float | None = None,
    name: str | None = None,
    title: str | None = None,
    base_model: str | None = "sd_v1",
    architecture: str | None = "stable-diffusion-v1/lora",
    module: str = "networks.lora",
    arguments: Mapping[str, str] | None = None,
    date: str | None = None,
    resolution: int | None = None,
    prediction: str | None = None,
    tags: str | None = None,
) -> dict[str, str]:
    """The metadata that other programs show and sort by (sd-scripts' ss_ and Stability's modelspec keys).

    Args:
        rank: r of the layers, if it is one.
        alpha: of the layers, if it is one.
        name: of the file, without suffix.
        title: for people; the name by default.
        base_model: as sd-scripts calls it.
        architecture: as modelspec calls it.
        module: that makes the layers, as sd-scripts calls it (networks.lora, lycoris.kohya).
        arguments: of the module, as sd-scripts' network_args.
        date: of creation, in ISO 8601.
        resolution: side of the training's images, in pixels.
        prediction: epsilon or v.
        tags: as `tag_frequency` gives it.

    Returns:
        Text by key; what is None is left out.
    """
    finite = alpha is not None and math.isfinite(alpha)
    xl = architecture is not None and architecture.startswith("stable-diffusion-xl")
    values = {
        "ss_network_module": module,
        "ss_network_dim": rank,
        "ss_network_alpha": number(alpha) if finite and alpha is not None else alpha,
        "ss_network_args": None if arguments is None else json.dumps(dict(arguments)),
        "ss_base_model_version": base_model,
        "ss_output_name": name,
        "ss_tag_frequency": tags,
        "ss_resolution": None if resolution is None else f"({resolution}, {resolution})",
        "modelspec.sai_model_spec": MODELSPEC_VERSION,
        "modelspec.architecture": architecture,
        "modelspec.implementation": SGM if xl else "diffusers",
        "modelspec.title": title if title is not None else name,
        "modelspec.date": date,
        "modelspec.resolution": None if resolution is None else f"{resolution}x{resolution}",
        "modelspec.prediction_type": prediction,
    }
    return {key: str(value) for key, value in values.items() if value is not None}
