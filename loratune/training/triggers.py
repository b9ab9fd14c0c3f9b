"""Words put before every caption: whether a text encoder has room for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from loratune.families.prompts import Prompts
from loratune.lora.tokens import WINDOW, NewToken
from loratune.training.captions import counter


def check_prefixes(data: Mapping[str, Any], prompts: Prompts, token: NewToken | None) -> None:
    """See that every prefix of a recipe's data fits into a prompt; no weight is read for it.

    Args:
        data: the recipe's section.
        prompts: how captions are read.
        token: a new one, which may be many vectors.

    Raises:
        ValueError: one does not fit.
    """
    room = WINDOW * prompts.chunks
    for place, prefix in _prefixes(data, "data"):
        new = 0 if token is None else token.num_vectors * prefix.lower().count(token.placeholder_token.lower())
        if len(prefix.encode()) + new <= room:
            continue  # a token has at least one byte, and reading the tokenizer takes a second
        if (count := counter(prompts, token)(prefix)) > room:
            fault = f"{place} is {count} tokens, and a prompt holds {room}"
            raise ValueError(f"{fault}; shorten it, or set model.prompts.chunks above {prompts.chunks}")


def _prefixes(tree: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key == "caption_prefix" and isinstance(value, str):
                yield f"{place}.caption_prefix", value
            yield from _prefixes(value, f"{place}.{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from _prefixes(value, f"{place}[{index}]")
