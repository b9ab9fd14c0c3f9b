"""What a recipe says of the places that images come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

Role = Literal["training", "validation", "regularization"]


@dataclass(frozen=True)
class SourceConfig:
    """A source of captioned images.

    Args:
        path: a folder with .txt or .caption files, metadata.jsonl or metadata.csv; a .jsonl, .csv or .parquet file; a
            folder that datasets saved; a .tar file of a webdataset, or a folder of them; a hub dataset.
        role: training; validation: all of its images are held out; or regularization: class images that keep the base
            from forgetting the class (prior preservation, Ruiz 2023), none of them held out.
        repeats: how often each image comes in an epoch; by default once, and regularization images as often as makes
            them as many as the training images.
        weight: in place of repeats: this source's share of an epoch relative to the other sources' weights (1 by
            default); 0 leaves it out. The epoch is long enough for every image to come.
        caption_prefix: put before every caption (a trigger word).
        loss_weight: factor of the loss of its images, 0 to 100; usually 1 or less for regularization.
        masks: a folder with images of the same names: bright where the loss counts, black where it does not; without
            one the whole image counts.
        image_column: the column of images, for parquet, datasets and hub.
        caption_column: the column of captions; by default the first of text, caption, prompt. A list is several.
    """

    path: str
    role: Role = "training"
    repeats: int | None = None
    weight: float | None = None
    caption_prefix: str = ""
    loss_weight: float = 1.0
    masks: Path | None = None
    image_column: str = "image"
    caption_column: str | None = None

    def __post_init__(self) -> None:
        where = f"data.sources, {self.path}"
        if self.repeats is not None and self.weight is not None:
            raise ValueError(f"{where}: repeats is {self.repeats} and weight {self.weight}; keep one of them")
        if self.repeats is not None and not 1 <= self.repeats <= 10_000:
            raise ValueError(f"{where}: repeats is {self.repeats}; give 1 to 10000, or leave the source out")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise ValueError(f"{where}: weight is {self.weight}; give 0 or more")
        if not 0 <= self.loss_weight <= 100:
            raise ValueError(f"{where}: loss_weight is {self.loss_weight}; give 0 to 100")
        if self.role == "validation":
            unused = {"repeats": self.repeats, "weight": self.weight}
            unused["loss_weight"] = None if self.loss_weight == 1 else self.loss_weight
            if names := [key for key, value in unused.items() if value is not None]:
                raise ValueError(f"{where}: {names[0]} says nothing of role validation; leave it out")


def gathered(
    path: str | None, sources: Sequence[SourceConfig] | None, short: dict[str, Any]
) -> tuple[SourceConfig, ...]:
    """The sources of a recipe.

    Args:
        path: of the only one.
        sources: all of them.
        short: what is said of the only one beside its path.

    Raises:
        ValueError: there are both or none, nothing to train on, or repeats beside weights.
    """
    if sources is None:
        if path is None:
            raise ValueError("data.path is null; give a folder of captioned images there, or several in data.sources")
        return (SourceConfig(path, **short),)
    if path is not None:
        raise ValueError(f"data.path is {path!r}, and data.sources is given too; move it into data.sources")
    usual = {field.name: field.default for field in fields(SourceConfig)}
    for key, value in short.items():
        if value != usual[key]:
            raise ValueError(f"data.{key} is {value!r}, but data.sources is given; set {key} in each source")
    _check(sources)
    return tuple(sources)


def _check(sources: Sequence[SourceConfig]) -> None:
    trained = [source for source in sources if source.role != "validation"]
    if not any(source.role == "training" for source in trained):
        raise ValueError("data.sources: none has role training; give one to train on")
    weighed = [source for source in trained if source.weight is not None]
    repeated = [source for source in trained if source.repeats is not None]
    if weighed and repeated:
        both = f"{weighed[0].path} has weight {weighed[0].weight}, {repeated[0].path} repeats {repeated[0].repeats}"
        raise ValueError(f"data.sources: {both}; use one of both for all")
    if not any(source.weight != 0 for source in trained if source.role == "training"):
        raise ValueError("data.sources: weight is 0 for every source with role training; raise one")
    if not any(source.loss_weight for source in trained):
        raise ValueError("data.sources: loss_weight is 0 for every source, so that nothing is learned; raise one")


def left_out(source: SourceConfig) -> bool:
    """Whether a source is not even read."""
    return source.weight == 0
