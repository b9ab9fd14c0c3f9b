"""The images of a recipe: what is known of each, before any is encoded."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Literal

from loratune.data.augment import Augment, upright_size
from loratune.data.buckets import Buckets, Size
from loratune.data.captions import Captions
from loratune.data.entries import MIDDLE, Entry, View
from loratune.data.masks import Masks, digest_of
from loratune.data.samples import Sample, Source
from loratune.data.settings import SourceConfig


@dataclass(frozen=True)
class Collection:
    """Sources read as a recipe says.

    Args:
        settings: of each source.
        sources: the same, opened.
        size: side of the square, or the root of the buckets' area, in pixels.
        buckets: sizes beside the square; none: the square alone.
        captions: how captions are read.
        augment: how training images vary.
        percent: share of the training images that is held out.
        split_by: what decides it.
    """

    settings: Sequence[SourceConfig]
    sources: Sequence[Source]
    size: int
    buckets: Buckets | None = None
    captions: Captions = Captions()  # noqa: RUF009 (frozen)
    augment: Augment = Augment()  # noqa: RUF009 (frozen)
    percent: int = 0
    split_by: Literal["image", "caption"] = "image"
    masks: Sequence[Masks | None] = field(init=False)
    sizes: Sequence[Size] = field(init=False)
    ends: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        masks = [Masks(source.masks, source.path) if source.masks else None for source in self.settings]
        object.__setattr__(self, "masks", masks)
        sizes = self.buckets.sizes(self.size**2) if self.buckets else [(self.size, self.size)]
        object.__setattr__(self, "sizes", sizes)
        object.__setattr__(self, "ends", list(accumulate(map(len, self.sources))))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def at(self, number: int) -> tuple[int, int]:
        """The source and the row there of an image, by its number among all."""
        source = bisect_right(self.ends, number)
        return source, number - (self.ends[source - 1] if source else 0)

    def sample(self, entry: Entry) -> Sample:
        """An image as its source has it."""
        return self.sources[entry.source][entry.index]

    def entry(self, source: int, index: int, sample: Sample) -> Entry:
        """What is known of an image.

        Raises:
            OSError: it is unreadable.
            UserError: its mask is of another size.
        """
        config, size = self.settings[source], upright_size(sample.data)
        masks = self.masks[source]
        return Entry(
            source=source,
            index=index,
            name=Path(sample.name).name,
            captions=self.captions.read(sample.captions, config.caption_prefix),
            digest=hashlib.sha256(sample.data).hexdigest(),
            size=size,
            bucket=self.buckets.fit(size, self.sizes) if self.buckets else self.sizes[0],
            prefix=config.caption_prefix,
            loss_weight=config.loss_weight,
            mask=digest_of(masks.read(sample, size)) if masks else "",
        )

    def mask(self, entry: Entry) -> bytes | None:
        """The bytes of an image's mask, or None where it counts whole."""
        masks = self.masks[entry.source]
        return masks.read(self.sample(entry), entry.size) if masks and entry.mask else None

    def is_held_out(self, entry: Entry) -> bool:
        """Whether an image is for validation: by its source's role, or by a hash of itself."""
        if (role := self.settings[entry.source].role) != "training":
            return role == "validation"
        text = entry.digest if self.split_by == "image" else entry.caption.removeprefix(entry.prefix)
        return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100 < self.percent

    @property
    def masked(self) -> bool:
        """Whether any source has masks."""
        return any(masks is not None for masks in self.masks)

    def views(self, entry: Entry) -> list[View]:
        """How an image may come in a step: the middle alone in validation."""
        return [MIDDLE] if self.is_held_out(entry) else self.augment.views(entry.size, entry.bucket)

    def cached_captions(self, entry: Entry) -> Sequence[str]:
        """The captions of an image that are encoded beforehand; none where there are too many."""
        if self.captions.changes_tags:
            return ()
        return entry.captions[:1] if self.is_held_out(entry) else self.captions.possible(entry.captions)
