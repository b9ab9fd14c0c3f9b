"""What a LoRA file says of the run that made it, for this program and for others."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L

from loratune import __version__
from loratune.families.base import base_hash
from loratune.families.model import PREDICTION_KEY, ZERO_SNR_KEY, Model
from loratune.families.save import configs_of
from loratune.lora.inject import LoRA
from loratune.lora.kinds.known import maker_of
from loratune.lora.kinds.layer import LowRank
from loratune.lora.metadata import standard_metadata, tag_frequency
from loratune.training.objectives import Objective

RECIPE_KEY = "loratune.recipe"
PREDICTIONS = {"eps": "epsilon"}


def origin(base: str, steps: int, lora: LoRA, recipe: str, objective: Objective) -> dict[str, str]:
    """Where a file comes from: the base, the recipe and how long it was trained.

    Args:
        base: its name, or "" where it has none.
        steps: of the run.
        lora: the adapter's settings.
        recipe: as YAML.
        objective: what the loss was.
    """
    return {
        "loratune.version": __version__,
        "loratune.base": base,
        "loratune.base_hash": base_hash(base),
        "loratune.steps": str(steps),
        "loratune.targets": lora.targets,
        RECIPE_KEY: recipe,
        **sampling_facts(objective),
    }


def sampling_facts(objective: Objective) -> dict[str, str]:
    """What has to be known to sample where it is not what the base says; `loratune sample` follows it.

    ss_ is sd-scripts' key, for people.
    """
    facts = {} if objective.prediction is None else {PREDICTION_KEY: objective.prediction}
    ends = {ZERO_SNR_KEY: "true", "ss_zero_terminal_snr": "True"}
    return facts | (ends if objective.zero_terminal_snr else {})


def standard(trainer: L.Trainer, model: Model, kind: str, layers: Mapping[str, LowRank]) -> dict[str, str]:
    """What other programs show of a LoRA.

    Args:
        trainer: of the run.
        model: the base.
        kind: of the adapter.
        layers: of the adapter.
    """
    configs = configs_of(model)
    maker, arguments = maker_of(kind)
    ranks, alphas = ({getattr(layer, key) for layer in layers.values()} for key in ("rank", "alpha"))
    data = getattr(trainer, "datamodule", None)
    return standard_metadata(
        rank=ranks.pop() if len(ranks) == 1 else None,
        alpha=alphas.pop() if len(alphas) == 1 else None,
        name=Path(trainer.default_root_dir).name,
        base_model=model.family.kohya_version(configs),
        architecture=f"{model.family.modelspec(configs)}/lora",
        module=maker,
        arguments=arguments,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        resolution=getattr(data, "resolution", None),
        prediction=PREDICTIONS.get(model.prediction, model.prediction),
        tags=_tags(data),
    )


def _tags(data: Any) -> str | None:
    """The tags of the training's captions, if its data have captions."""
    captions: dict[str, list[str]] = {}
    for entry in getattr(getattr(data, "training", None), "entries", ()):
        captions.setdefault(Path(data.sources[entry.source].path).name, []).append(entry.caption)
    return tag_frequency(captions) if captions else None
