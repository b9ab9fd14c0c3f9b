"""The metadata of LoRA files that other programs show and sort by; without torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping

from loratune.lora.tables.peft import number

MODELSPEC_VERSION = "1.0.1"
SGM = "https://github.com/Stability-AI/generative-models"


def tag_frequency(folders: Mapping[str, Iterable[str]]) -> str:
    """sd-scripts' ss_tag_frequency: how many captions of a folder have each tag (what is between commas), as JSON."""
    counts = {}
    for folder, captions in folders.items():
        tags = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
        counts[folder] = dict(tags.most_common())
    return json.dumps(counts)


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
