"""Words put before every caption: whether a text encoder has room for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from loratune.families.prompts import Prompts
from loratune.lora.tokens import WINDOW, NewToken
from loratune.training.captions import counter


def too_long(
    prefixes: Iterable[tuple[str, str]], prompts: Mapping[str, Any], token: Mapping[str, Any] | None
) -> str | None:
    """What is wrong with the first prefix that does not fit into a prompt; no weight is read for it.

    Args:
        prefixes: keys and their texts.
        prompts: a recipe's section: how captions are read.
        token: a recipe's section: a new token, which may be many vectors.

    Raises:
        ValueError: a section is wrong in itself.
    """
    reading, new = Prompts(**prompts), NewToken(**token) if token else None
    room = WINDOW * reading.chunks
    for key, prefix in prefixes:
        vectors = 0 if new is None else new.num_vectors * prefix.lower().count(new.placeholder_token.lower())
        if len(prefix.encode()) + vectors <= room:
            continue  # a token has at least one byte, and reading the tokenizer takes a second
        if (count := counter(reading, new)(prefix)) > room:
            fault = f"{key} is {count} tokens, and a prompt holds {room}"
            return f"{fault}; shorten it, or set model.prompts.chunks above {reading.chunks}"
    return None
