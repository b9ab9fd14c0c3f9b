"""Captions as tokens: weights of words, and windows for captions that are longer than one; pure functions.

A caption with weights is a row of parts: plain text, `(text:1.2)`, and `(text)` for 1.1; brackets nest and their
weights are multiplied; a backslash before a bracket, a colon or a backslash makes it plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loratune.errors import UserError

EMPHASIS = 1.1  # what plain brackets mean to the programs that people write such prompts for
MOST = 1e6  # weights are below it
LOOK_BACK = 20  # tokens before a window's end among which a comma is looked for
PIECES = re.compile(r"\\[\\():]|\(|:[^():\\]*\)|\)|[^\\():]+|.", re.DOTALL)
INSIDE, WORD, COMMA = 0, 1, 2


@dataclass(frozen=True)
class Prompts:
    """How captions and prompts are encoded.

    Args:
        chunks: chunks of 75 tokens that a caption may fill, each encoded alone and joined along the sequence; what a
            shorter caption does not fill is masked.
        weighting: read (word:1.2) as a prompt weight: a factor of the word's embeddings, whose mean size is kept. Write
            brackets that are meant as \\( and \\).
    """

    chunks: int = 1
    weighting: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.chunks <= 16:
            raise ValueError(f"prompts.chunks is {self.chunks}; give 1 to 16")


class Part(NamedTuple):
    """Text and the weight of its words, finite and 0 or more."""

    text: str
    weight: float


def parse_weights(prompt: str) -> list[Part]:
    """A prompt's parts in order; neighbours of one weight are one part, and none is empty.

    Raises:
        UserError: a bracket has no partner, or what follows a colon before a closing bracket is no weight.
    """
    levels: list[list[Part]] = [[]]
    for piece in PIECES.findall(prompt):
        if piece == "(":
            levels.append([])
        elif piece == ")" or (piece[0] == ":" and len(piece) > 1):
            if len(levels) == 1:
                raise UserError(f"prompt {prompt!r}: a ')' closes nothing; write \\) for a bracket that is meant")
            weight = EMPHASIS if piece == ")" else _weight(piece[1:-1], prompt)
            inner = levels.pop()
            levels[-1] += [Part(part.text, part.weight * weight) for part in inner]
        else:
            levels[-1].append(Part(piece[1:] if len(piece) == 2 and piece[0] == "\\" else piece, 1.0))
    if len(levels) > 1:
        raise UserError(f"prompt {prompt!r}: a '(' is not closed; write \\( for a bracket that is meant")
    if any(part.weight >= MOST for part in levels[0]):
        raise UserError(f"prompt {prompt!r}: its weights multiply to {MOST:g} or more; give smaller ones")
    return merged(levels[0])


def _weight(text: str, prompt: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < MOST:
        remedy = "give a number of 0 or more, as in (word:1.2), or write \\( and \\) for brackets that are meant"
        raise UserError(f"prompt {prompt!r}: {text.strip()!r} is no weight; {remedy}")
    return weight


def merged(parts: Iterable[Part]) -> list[Part]:
    """Parts with neighbours of one weight joined and empty ones left out."""
    joined: list[Part] = []
    for part in parts:
        if part.text and joined and joined[-1].weight == part.weight:
            joined[-1] = Part(joined[-1].text + part.text, part.weight)
        elif part.text:
            joined.append(part)
    return joined


def format_weights(parts: Iterable[Part]) -> str:
    """The prompt that `parse_weights` reads as these parts."""
    escaped = ((re.sub(r"([\\():])", r"\\\1", part.text), part.weight) for part in parts)
    return "".join(text if weight == 1 else f"({text}:{weight!r})" for text, weight in escaped)


class Token(NamedTuple):
    """A token's number, its weight, and whether a word or a comma ends with it: INSIDE, WORD or COMMA."""

    id: int
    weight: float = 1.0
    end: int = WORD


def tokenise(prompt: str, tokenizer: Any, weights: bool = False) -> list[Token]:
    """A prompt's tokens without begin and end; a new token of several vectors is all of these.

    Parts of different weights are tokenised apart, so a weight ends a word.
    """
    parts = parse_weights(prompt) if weights else [Part(prompt, 1.0)]
    several = vectors_of(tokenizer)
    tokens: list[Token] = []
    for text, weight in parts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for number, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
            *first, last = several.get(number, (number,))
            tokens += [Token(piece, weight, INSIDE) for piece in first]
            tokens.append(Token(last, weight, _end(name, number in several)))
    return tokens


def _end(name: str, new: bool) -> int:
    if name.removesuffix("</w>") == ",":
        return COMMA
    return WORD if new or name.endswith("</w>") else INSIDE


def vectors_of(tokenizer: Any) -> dict[int, tuple[int, ...]]:
    """What each token that was added to a tokenizer stands for: `x` is x, x_1, x_2 and so on, as far as they exist."""
    added: dict[str, int] = tokenizer.get_added_vocab()
    vectors = {}
    for name, number in added.items():
        more = 1
        while f"{name}_{more}" in added:
            more += 1
        vectors[number] = (number, *(added[f"{name}_{i}"] for i in range(1, more)))
    return vectors


def split(tokens: Sequence[Token], chunks: int, room: int) -> tuple[list[list[Token]], list[Token]]:
    """Tokens in at most `chunks` windows of at most `room`, and what is left over.

    A window ends after the last comma near its end, else after the last whole word, but never where the rest would
    then not fit any more: nothing is left over unless there are more than chunks * room tokens.
    """
    filled: list[list[Token]] = []
    rest = list(tokens)
    while rest and len(filled) < chunks:
        least = max(1, len(rest) - room * (chunks - len(filled) - 1))
        at = len(rest) if len(rest) <= room else _cut(rest, least, room)
        filled.append(rest[:at])
        rest = rest[at:]
    return filled or [[]], rest


def _cut(tokens: Sequence[Token], least: int, room: int) -> int:
    for end, first in ((COMMA, max(least, room - LOOK_BACK)), (WORD, least)):
        for at in range(room, first - 1, -1):
            if tokens[at - 1].end >= end:
                return at
    return room


class Windows(NamedTuple):
    """Captions as windows, one caption's after another's.

    Args:
        ids: begin, up to W - 2 tokens, end, and padding, (M, W).
        weights: of these, (M, W).
        counts: how many windows each caption fills; M in all.
        cut: of each caption that did not fit, what was left out.
    """

    ids: Tensor
    weights: Tensor
    counts: list[int]
    cut: dict[str, str]


def windows(captions: Sequence[str], tokenizer: Any, width: int, prompts: Prompts) -> Windows:
    """Captions as a text encoder's windows of `width` tokens."""
    rows: list[list[Token]] = []
    counts: list[int] = []
    cut: dict[str, str] = {}
    for caption in captions:
        parts, rest = split(tokenise(caption, tokenizer, prompts.weighting), prompts.chunks, width - 2)
        rows += parts
        counts.append(len(parts))
        if rest:
            cut[caption] = tokenizer.decode([token.id for token in rest])
    begin, end, pad = (Token(getattr(tokenizer, f"{name}_token_id")) for name in ("bos", "eos", "pad"))
    whole = [[begin, *row, end, *[pad] * (width - 2 - len(row))] for row in rows]
    ids, weights = ([[getattr(token, key) for token in row] for row in whole] for key in ("id", "weight"))
    return Windows(torch.tensor(ids), torch.tensor(weights, dtype=torch.float32), counts, cut)


def weigh(states: Tensor, weights: Tensor) -> Tensor:
    """Embeddings (M, W, d) times the weights (M, W) of their tokens, rescaled to the mean |z| of each window before.

    The rescaling keeps a window's size, so that one heavier word makes the others lighter. Other programs keep the
    mean of z, which for some encoders is near zero and then changes its sign.
    """
    weighed = states * weights.to(states, non_blocking=True)[..., None]
    sizes = [embeddings.detach().abs().mean((1, 2), keepdim=True) for embeddings in (states, weighed)]
    return weighed * (sizes[0] / sizes[1].clamp_min(torch.finfo(states.dtype).tiny))


def join(states: Tensor, counts: Sequence[int], chunks: int) -> Tensor:
    """Windows (M, W, d) as one row for each caption, (B, chunks W, d), with zeros where a caption has no window."""
    if chunks == 1:
        return states
    places = filled(counts, chunks).flatten().nonzero().flatten().to(states.device, non_blocking=True)
    joined = states.new_zeros(len(counts) * chunks, *states.shape[1:]).index_copy(0, places, states)
    return joined.view(len(counts), chunks * states.shape[1], *states.shape[2:])


def filled(counts: Sequence[int], chunks: int) -> Tensor:
    """Which windows of each caption there are, bool (B, chunks)."""
    return torch.arange(chunks) < torch.tensor(counts)[:, None]


def firsts(counts: Sequence[int]) -> list[int]:
    """Where each caption's first window is among all."""
    return [sum(counts[:index]) for index in range(len(counts))]


def words_of(pieces: Sequence[str], end: str = "</w>") -> list[tuple[str, list[int]]]:
    """Words and the numbers of their tokens, from tokens as CLIP's tokenizer writes them: a word ends in `end`.

    Args:
        pieces: tokens of a prompt, without the special ones before and after.
        end: of a word.
    """
    words: list[tuple[str, list[int]]] = []
    open_word = False
    for number, piece in enumerate(pieces):
        if not open_word:
            words.append(("", []))
        word, places = words[-1]
        words[-1] = (word + piece.removesuffix(end), [*places, number])
        open_word = not piece.endswith(end)
    return words
