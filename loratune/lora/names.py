"""The canonical names of the layers that a LoRA can sit on, in the architectures that are known; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from loratune.families.architectures import architectures, entries, module_names, original_names
from loratune.families.known import FAMILIES, adaptable
from loratune.families.layouts import Shape


@cache
def known_layers() -> tuple[str, ...]:
    """Those of all known architectures, each once."""
    return tuple(dict.fromkeys(name for configs in architectures().values() for name in module_names(configs)))


@cache
def originals() -> dict[str, tuple[str, ...]]:
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
    """What a LoRA's layers are for, sd, sdxl or another family: by names, then shapes, then by what the file says.

    Args:
        shapes: (out, in k k) by canonical name.
        told: the file's own word, sd-scripts' `ss_base_model_version` or Stability's `modelspec.architecture`.
    """
    components = {name.partition(".")[0] for name in shapes}
    owners = [family for family in FAMILIES if components <= {part.name for part in family.parts}]
    if len(owners) == 1:
        return owners[0].name
    named = {one for one, known in known_shapes().items() if shapes.keys() <= known.keys()}
    fitting = {one for one in named if all(flat(known_shapes()[one][name]) == shape for name, shape in shapes.items())}
    kinds = {"sdxl" if one.startswith("sdxl") else "sd" for one in fitting or named}
    if len(kinds) == 1:
        return kinds.pop()
    return "sdxl" if kinds and any(word in told for word in ("sdxl", "stable-diffusion-xl")) else "sd"


def canonical_name(raw: str) -> str | None:
    """The canonical name of a layer whose name in the file has dots, or None where the component is not known."""
    component, _, path = raw.partition(".")
    if component not in adaptable() or not path:
        return None
    return f"{component}.{adaptable()[component].canonical(path) or path}"
