"""peft's format as diffusers calls its own: `unet.` and the path, `lora_A.weight`; alphas as JSON in the metadata.

No alpha is a tensor: diffusers would refuse the file (loaders/lora_pipeline.py:210).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from loratune.families.known import adaptable
from loratune.lora.kinds.lora import LoRALayer
from loratune.lora.tables.table import ALPHA, DOWN, MAGNITUDE, UP, Part, Place, Table, Written, alpha_or_rank, dotted

if TYPE_CHECKING:
    from loratune.lora.kinds.layer import LowRank

METADATA = "lora_adapter_metadata"
SUFFIXES = {
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_magnitude_vector.weight": MAGNITUDE,  # transformers 5 passes over the other one in text encoders
    ".lora_magnitude_vector": MAGNITUDE,
    ".alpha": ALPHA,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
    ".lora_magnitude_vector.default.weight": MAGNITUDE,
    ".lora_magnitude_vector.default": MAGNITUDE,
    ".lora_A": DOWN,
    ".lora_B": UP,
}
# A regular expression from a file must not take for ever: no repeated groups, and few repetitions.
REPEATED_GROUP = re.compile(r"\)[*+?{]")
REPETITION = re.compile(r"(?<!\\)[*+{]")
MOST_REPETITIONS = 2


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
    return path.removeprefix("text_model.")


def peft_metadata(sizes: Mapping[str, Size]) -> str:
    """The JSON that gives diffusers every layer's rank and alpha (a flattened LoraConfig for each component).

    Args:
        sizes: by canonical name.
    """
    configs: dict[str, Any] = {}
    for component in adaptable():
        own = {
            _in_metadata(component, name.partition(".")[2]): size
            for name, size in sizes.items()
            if name.startswith(f"{component}.")
        }
        if own:
            configs |= {f"{component}.{key}": value for key, value in _component(own).items()}
    return json.dumps(configs, sort_keys=True)


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


def parsed_config(text: str, source: str) -> dict[str, Any]:
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


def alpha(stored: float | None, place: Place) -> float:
    """The alpha tensor, else by peft's metadata, else r; rsLoRA's alpha / sqrt(r) as alpha' / r.

    Raises:
        ValueError: the metadata is no JSON object, has no such component or gives no finite number.
    """
    text = place.metadata.get(METADATA)
    if stored is not None or text is None or not place.rank:
        return alpha_or_rank(stored, place)
    component, _, path = place.name.partition(".")
    every = parsed_config(text, METADATA)
    own = {key.removeprefix(f"{component}."): value for key, value in every.items() if key.startswith(f"{component}.")}
    if not own and "lora_alpha" in every:  # `save_lora_adapter` of one network names no component
        own = every
    if "lora_alpha" not in own:
        raise ValueError(f"{METADATA} says nothing of {component}.lora_alpha")
    return config_alpha(path, place.rank, own, METADATA)


def config_alpha(path: str, rank: int, config: Mapping[str, Any], source: str) -> float:
    """A layer's alpha by a LoraConfig, or one of peft's other configurations.

    Args:
        path: canonical, without component.
        rank: r of its tensors.
        config: as peft saves it.
        source: of the configuration, for messages.

    Raises:
        ValueError: it gives no finite number, or a pattern that is not read.
    """
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: alpha_pattern is {patterns!r}; it must be a table")
    given = [value for key, value in patterns.items() if _means(key, path, source)]
    own = given[0] if given else config.get("lora_alpha", config.get("alpha"))
    if isinstance(own, bool) or not isinstance(own, int | float) or not abs(own) < 1e300:
        raise ValueError(f"{source} gives the alpha {own!r}; it must be a number")
    return float(own) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)


def _means(key: str, path: str, source: str) -> bool:
    """Whether a key of a pattern means a layer: it fits the whole name or the end of it (peft's get_pattern_key)."""
    try:
        if REPEATED_GROUP.search(key) or len(REPETITION.findall(key)) > MOST_REPETITIONS:
            raise re.error(f"repeated groups, or more than {MOST_REPETITIONS} repetitions, are not read")
        pattern = re.compile(rf"(.*\.)?({key})$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{source}: alpha_pattern has the regular expression {key!r}: {error}") from None
    return any(pattern.match(one) for one in (path, path.removeprefix("text_model.")))


def write(layers: Mapping[str, LowRank], metadata: Mapping[str, str], dtype: Any) -> Written:
    """peft's tensors as diffusers reads them, and the metadata with ranks and alphas.

    Raises:
        ValueError: peft's format cannot hold them.
    """
    from loratune.lora.write import cast, padded, padding

    if problem := peft_problem(layers):
        raise ValueError(problem)
    plain = {name: layer for name, layer in layers.items() if isinstance(layer, LoRALayer)}
    zeros = padding(plain, dtype, kohya=False)
    tensors: dict[str, Any] = {}
    for name, layer in ({name: cast(layer, dtype) for name, layer in plain.items()} | zeros).items():
        for field, tensor in layer.tensors().items():
            part = MAGNITUDE if field == "magnitude" else Part(layer.kind, field)
            tensors[f"{name}{PEFT.suffix(part)}"] = _magnitude(tensor) if part == MAGNITUDE else tensor
    sizes = {name: Size(one.rank, one.alpha, one.magnitude is not None) for name, one in (plain | zeros).items()}
    return tensors, {METADATA: peft_metadata(sizes), **padded(zeros)}


def _magnitude(m: Any) -> Any:
    """(out,) beside a Linear and (1, out, 1, 1) beside a convolution, as peft has it."""
    return m.flatten() if m.dim() < 4 else m.reshape(1, -1, 1, 1)


def peft_problem(layers: Mapping[str, LowRank]) -> str | None:
    """Why layers cannot be written in peft's format, or None."""
    remedy = "convert with --to kohya, or --rank R to approximate"
    for name, layer in layers.items():
        if not isinstance(layer, LoRALayer):
            return f"{name} is a {layer.name}, which peft's format cannot hold; {remedy}"
        if layer.mid is not None:
            return f"{name} is a LoCon with a middle tensor, which peft's format cannot hold; {remedy}"
        if layer.magnitude is not None and layer.magnitude.shape[0] != layer.flat_shape[0]:
            return (
                f"{name} is a DoRA with a norm for each input, which peft's format cannot hold; convert with --to kohya"
            )
    for component in sorted({name.split(".")[0] for name in layers}):
        doras = {layers[name].magnitude is not None: name for name in layers if name.split(".")[0] == component}
        if len(doras) == 2:
            both = f"{doras[True]} is a DoRA and {doras[False]} is none"
            return f"{both}; peft's format has one kind for all of {component}; convert with --to kohya"
    return None


def begins() -> str:
    """The names of the components that LoRAs sit in."""
    return rf"^({'|'.join(adaptable())})\."


PEFT = Table("peft", begins, SUFFIXES, dotted, loose=True, alpha=alpha, write=write)
