"""How many tokens a caption is for a base's text encoders."""

from __future__ import annotations

from collections.abc import Callable

from transformers import CLIPTokenizer

from loratune.families.prompts import Prompts, tokenise
from loratune.families.sd import TOKENIZER
from loratune.lora.tokens import NewToken


def counter(prompts: Prompts, token: NewToken | None) -> Callable[[str], int]:
    """A function that counts a caption's tokens, as every base that is known here reads it; no weight is needed.

    Args:
        prompts: how captions are read.
        token: a new one, which may be many vectors.
    """
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens([] if token is None else token.names)
    return lambda caption: len(tokenise(caption, tokenizer, prompts.weighting))
