"""Captions as people write them, and what is drawn of them each time an image comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal


@dataclass(frozen=True)
class Captions:
    """How an image's caption is chosen and changed in a step. Validation always takes the first caption as it is.

    With `shuffle_tags` or `tag_dropout` there are too many captions to cache: the text encoder then stays in memory and
    encodes those of each batch.

    Args:
        lines: each line of a caption file is a caption of its own.
        choose: which of an image's captions is used: a random one each time, or the first.
        shuffle_tags: shuffle the tags of a caption, which separator parts, each time.
        keep_tokens: so many first tags stay in place and are not dropped.
        tag_dropout: share of the other tags dropped each time, from 0 to below 1.
        separator: what parts tags.
    """

    lines: bool = False
    choose: Literal["random", "first"] = "random"
    shuffle_tags: bool = False
    keep_tokens: int = 0
    tag_dropout: float = 0.0
    separator: str = ","

    def __post_init__(self) -> None:
        if not 0 <= self.tag_dropout < 1:
            raise ValueError(f"captions.tag_dropout is {self.tag_dropout}; give a share of 0 or more and below 1")
        if self.keep_tokens < 0 or (self.keep_tokens and not self.changes_tags):
            raise ValueError(
                f"captions.keep_tokens is {self.keep_tokens}; give 0, or more with shuffle_tags or tag_dropout"
            )
        if not self.separator.strip():
            raise ValueError(f"captions.separator is {self.separator!r}; give what parts tags, such as ','")

    @property
    def changes_tags(self) -> bool:
        """Whether there are too many captions to encode them all beforehand."""
        return self.shuffle_tags or self.tag_dropout > 0

    def read(self, written: Sequence[str], prefix: str) -> tuple[str, ...]:
        """An image's captions, each with the prefix; at least one."""
        if self.lines:
            written = [line.strip() for text in written for line in text.splitlines() if line.strip()]
        return tuple(prefix + text for text in written) or (prefix,)

    def possible(self, captions: Sequence[str]) -> Sequence[str]:
        """Which of an image's captions may be drawn."""
        return captions[:1] if self.choose == "first" else captions

    def draw(self, captions: Sequence[str], prefix: str, random: Random) -> str:
        """The caption of an image this time.

        Args:
            captions: as `read` gives them.
            prefix: what they begin with, which stays.
            random: where the choice comes from.
        """
        caption = random.choice(self.possible(captions))
        return prefix + self._tags(caption.removeprefix(prefix), random) if self.changes_tags else caption

    def _tags(self, text: str, random: Random) -> str:
        tags = [tag.strip() for tag in text.split(self.separator) if tag.strip()]
        first, rest = tags[: self.keep_tokens], tags[self.keep_tokens :]
        if self.tag_dropout:
            rest = [tag for tag in rest if random.random() >= self.tag_dropout]
        if self.shuffle_tags:
            random.shuffle(rest)
        return f"{self.separator} ".join(first + rest)
