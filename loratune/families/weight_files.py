"""Which files hold a component's weights: precisions side by side, shards, their index; by their names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from loratune.errors import UserError

FULL = ""
"""The variant of files without a mark of their precision in their names."""
# Of several variants, what is read first; averages and the like come last.
PREFERRED = (FULL, "fp32", "bf16", "fp16")
VARIANT = r"(?:\.(?P<{}>[A-Za-z][\w]*))?"
SHARD = rf"(?:-(?P<number>\d+)-of-\d+{VARIANT.format('late')})?"


@dataclass(frozen=True)
class WeightFiles:
    """The files of one variant of a component's weights.

    Args:
        names: of the safetensors files, shards in order.
        index: the name of the file that lists the shards, if there is one.
    """

    names: tuple[str, ...]
    index: str | None = None


def variants_of(names: Iterable[str], weights: str) -> dict[str, WeightFiles]:
    """The variants of a component's weights that files in its folder hold, the one to be read first.

    diffusers writes `model.fp16.safetensors`, `model-00001-of-00002.fp16.safetensors` or
    `model.fp16-00001-of-00002.safetensors`, and lists shards in `model.safetensors.index.fp16.json`.

    Args:
        names: of the files.
        weights: the name of the whole file, such as `model.safetensors`.
    """
    stem = re.escape(weights.removesuffix(".safetensors"))
    file_name = re.compile(stem + VARIANT.format("early") + SHARD + r"\.safetensors")
    index_name = re.compile(
        stem
        + VARIANT.format("early")
        + r"\.safetensors"
        + VARIANT.format("late")
        + r"\.index(?:\.(?P<last>\w+))?\.json"
    )
    whole: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    indexes: dict[str, str] = {}
    for name in sorted(names):
        if match := file_name.fullmatch(name):
            variant = match["early"] or match["late"] or FULL
            if match["number"]:
                shards.setdefault(variant, []).append(name)
            else:
                whole[variant] = name
        elif match := index_name.fullmatch(name):
            indexes[match["early"] or match["late"] or match["last"] or FULL] = name
    variants = {variant: WeightFiles((name,)) for variant, name in whole.items()}
    for variant in {*shards, *indexes} - whole.keys():
        variants[variant] = WeightFiles(tuple(shards.get(variant, ())), indexes.get(variant))
    return {variant: variants[variant] for variant in sorted(variants, key=_rank)}


def _rank(variant: str) -> tuple[int, str]:
    order = PREFERRED.index(variant) if variant in PREFERRED else len(PREFERRED) + ("ema" in variant)
    return order, variant


def choose(variants_by_part: Mapping[str, Mapping[str, WeightFiles]]) -> dict[str, str]:
    """The variant of each component that is read: the same for all where one is there for all.

    Args:
        variants_by_part: by component, its variants, the one to be read first; none without any.
    """
    first = next(iter(variants_by_part.values()), {})
    common = next(
        (variant for variant in first if all(variant in variants for variants in variants_by_part.values())), None
    )
    return {part: next(iter(variants)) if common is None else common for part, variants in variants_by_part.items()}


def shards_of(folder: Path, files: WeightFiles) -> list[Path]:
    """The paths of a variant's files, by its index where it has one.

    Raises:
        UserError: a shard is missing, or the index is none.
    """
    names = _indexed(folder / files.index) if files.index else files.names
    missing = [name for name in _complete(names) if not (folder / name).is_file()]
    if missing:
        why = f"{folder / files.index} lists it" if files.index else f"{names[0]} is one of several shards"
        raise UserError(f"{folder / missing[0]}: there is no such file, but {why}; download the base again")
    return [folder / name for name in names]


def _complete(names: tuple[str, ...]) -> list[str]:
    """The names of all shards, by the number that the first name says there are."""
    match = re.fullmatch(r"(.+-)(\d+)-of-(\d+)(.+)", names[0])
    if match is None or int(match[3]) > 10_000:
        return list(names)
    before, width, count, after = match[1], len(match[2]), match[3], match[4]
    return sorted({*names, *(f"{before}{n:0{width}d}-of-{count}{after}" for n in range(1, int(count) + 1))})


def _indexed(index: Path) -> tuple[str, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        plain = bool(names) and all(Path(name).name == name and name.endswith(".safetensors") for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:
        raise UserError(f"{index}: lists no .safetensors files under weight_map; download the base again")
    return tuple(names)


def index_of(keys: Mapping[str, Iterable[str]], size: int) -> str:
    """The text of an index of shards.

    Args:
        keys: of the tensors in each file, by its name.
        size: of all tensors, in bytes.
    """
    places = {key: name for name, some in keys.items() for key in some}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"


def index_name(first: str) -> str:
    """What diffusers calls the index of shards, of which the first has this name."""
    stem, _, rest = first.partition("-")
    stem, _, early = stem.partition(".")
    variant = early or rest.removesuffix(".safetensors").partition(".")[2]
    return f"{stem}.safetensors.index{f'.{variant}' if variant else ''}.json"
