"""New tokens in a frozen text encoder: textual inversion (Gal 2022), alone or beside an adapter.

Only the new rows are parameters; the rows that the base has stay where they are, untouched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loratune.errors import UserError
from loratune.formats.files import read_header, read_tensors, write_safetensors

Parts = Mapping[str, tuple[Any, Any]]
"""Each text encoder's tokenizer and itself, by the encoder's name in a base."""

WINDOW = 75  # tokens of CLIP's window between begin and end
TOKEN_KEY = "loratune.token"
# How files with rows for two encoders name them.
FILE_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
A1111_KEY = "emb_params"
SPECIAL = set("()[]:,\\|")


@dataclass(frozen=True)
class NewToken:
    """A new token, learned from images whose captions have it (textual inversion, Gal 2022).

    Args:
        placeholder_token: the new word in prompts and captions, such as "<sks>", without spaces.
        num_vectors: number of embeddings it stands for; the further ones are named <sks>_1, <sks>_2.
        initializer_token: word or words whose embeddings it starts from, in turn, such as "cat"; none draws embeddings
            like the base's.
        lr: its learning rate; none takes the optimizer's.
    """

    placeholder_token: str
    num_vectors: int = 1
    initializer_token: str | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        word = self.placeholder_token
        if not word or any(character.isspace() or character in SPECIAL for character in word):
            remedy = "give one word without spaces and without ( ) [ ] : , \\ |"
            raise ValueError(f"tokens.placeholder_token is {word!r}; {remedy}")
        if not 1 <= self.num_vectors <= WINDOW:
            raise ValueError(f"tokens.num_vectors is {self.num_vectors}; give 1 to {WINDOW}, as many as a window holds")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"tokens.lr is {self.lr}; give a number above 0, or null for the optimizer's")

    @property
    def names(self) -> list[str]:
        """A name for each vector."""
        more = (f"{self.placeholder_token}_{index}" for index in range(1, self.num_vectors))
        return [self.placeholder_token, *more]


def check_new(new: NewToken, tokenizer: Any) -> None:
    """See that a tokenizer has not the token but knows the initializer.

    Raises:
        ValueError: it has it, or the initializer is longer than the token.
    """
    known = tokenizer.get_vocab()
    ids = tokenizer(new.placeholder_token, add_special_tokens=False).input_ids
    if len(ids) < 2 or any(name in known for name in new.names):
        raise ValueError(
            f"tokens.placeholder_token {new.placeholder_token!r} is in the base's vocabulary; "
            "give a new one, such as '<my-cat>'"
        )
    _initial_ids(new, tokenizer)


def _initial_ids(new: NewToken, tokenizer: Any) -> list[int]:
    """The tokens whose rows the new ones start from, one for each vector; none where there is no initializer."""
    if new.initializer_token is None:
        return []
    ids = tokenizer(new.initializer_token, add_special_tokens=False).input_ids
    if not 1 <= len(ids) <= new.num_vectors:
        fault = f"is {len(ids)} tokens, and tokens.num_vectors is {new.num_vectors}"
        raise ValueError(
            f"tokens.initializer_token {new.initializer_token!r} {fault}; give a shorter one, or more vectors"
        )
    return [ids[index % len(ids)] for index in range(new.num_vectors)]


class GrownEmbedding(nn.Module):
    """An embedding with more rows: those that it had, untouched, and new ones, which alone may be trained.

    Args:
        known: the embedding before, of n rows.
        rows: the new rows n, n + 1, ..., (v, d).
    """

    def __init__(self, known: Any, rows: Tensor) -> None:
        super().__init__()
        self.known, self.rows = known, nn.Parameter(rows.detach().clone())
        self.num_embeddings: int = known.num_embeddings + len(rows)

    @property
    def weight(self) -> Tensor:
        """All rows, (n + v, d)."""
        return torch.cat([self.known.weight, self.rows.to(self.known.weight)])

    def forward(self, ids: Tensor) -> Tensor:
        """Rows by their numbers, (..., d)."""
        first = int(self.known.num_embeddings)
        old = self.known(ids.clamp(max=first - 1))
        new = nn.functional.embedding((ids - first).clamp(min=0), self.rows.to(old.dtype))
        return torch.where((ids >= first)[..., None], new, old)


def add_tokens(parts: Parts, names: list[str], rows: Mapping[str, Tensor]) -> list[nn.Parameter]:
    """Give every tokenizer new tokens and every text encoder their rows; returns the rows as parameters.

    Args:
        parts: of the base.
        names: of the tokens, one for each row.
        rows: (v, d) for each of the parts.
    """
    parameters = []
    for part, (tokenizer, encoder) in parts.items():
        known = encoder.get_input_embeddings()
        if len(tokenizer) != known.num_embeddings:
            fault = f"its tokenizer has {len(tokenizer)} tokens and its {part} {known.num_embeddings} rows"
            raise UserError(f"a new token does not fit this base: {fault}")
        tokenizer.add_tokens(names)
        grown = GrownEmbedding(known, rows[part].to(known.weight.device, torch.float32))
        encoder.set_input_embeddings(grown)
        _end_by_name(encoder, tokenizer)
        parameters.append(grown.rows)
    return parameters


def _end_by_name(encoder: Any, tokenizer: Any) -> None:
    """Let the pooled state be that of the end token.

    Old configurations say 2, for which transformers takes the token of the highest number: a new token, then.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id


def initial_rows(new: NewToken, parts: Parts) -> dict[str, Tensor]:
    """What the new rows start from, (v, d) for each text encoder.

    Without an initializer they are drawn with the mean and the spread of the base's rows, by torch's own generator.
    """
    initial = {}
    for part, (tokenizer, encoder) in parts.items():
        weight = encoder.get_input_embeddings().weight.detach().float()
        ids = _initial_ids(new, tokenizer)
        drawn = weight.mean(0) + weight.std(0) * torch.randn(new.num_vectors, weight.shape[1]).to(weight)
        initial[part] = weight[ids].clone() if ids else drawn
    return initial


def rows_of(parts: Parts) -> dict[str, Tensor]:
    """The rows that were added last, for each text encoder (float32, on the CPU)."""
    return {
        part: encoder.get_input_embeddings().rows.detach().float().cpu().clone() for part, (_, encoder) in parts.items()
    }


class Embedding(NamedTuple):
    """What a file holds of a token.

    Args:
        token: its name.
        rows: (v, d) for each text encoder; those of one encoder alone are under `text_encoder`.
    """

    token: str
    rows: dict[str, Tensor]

    @property
    def names(self) -> list[str]:
        """A name for each vector."""
        return NewToken(self.token, len(next(iter(self.rows.values())))).names


def write_embedding(path: Path, embedding: Embedding, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Write a token's rows as other programs read them, read the file back and compare.

    One encoder: a tensor (v, d) under the token's name. Two, as for SDXL: clip_l and clip_g.

    Raises:
        UserError: the place cannot be written to, or the file is not what was written.
    """
    one = len(embedding.rows) == 1
    tensors = {embedding.token if one else FILE_KEYS[part]: rows.to(dtype) for part, rows in embedding.rows.items()}
    write_safetensors(path, tensors, {**metadata, TOKEN_KEY: embedding.token})
    again = read_embedding(path)
    same = again.token == embedding.token and again.rows.keys() == embedding.rows.keys()
    if not same or not all(torch.equal(again.rows[part], rows.to(dtype)) for part, rows in embedding.rows.items()):
        raise UserError(f"{path}: reads back as something else; do not use this file")


def read_embedding(path: Path) -> Embedding:
    """A token from a file: diffusers' (its name is the key), A1111's (the file's name), or SDXL's clip_l and clip_g.

    Raises:
        UserError: the file is unreadable, or is no embedding.
    """
    tensors, metadata = read_tensors(path), read_header(path).metadata
    named = metadata.get(TOKEN_KEY, Path(path).stem)
    if tensors.keys() == set(FILE_KEYS.values()):
        rows = {part: tensors[key] for part, key in FILE_KEYS.items()}
    elif len(tensors) == 1:
        ((key, value),) = tensors.items()
        named, rows = (named if key == A1111_KEY else key), {"text_encoder": value}
    else:
        raise UserError(f"{path}: is no embedding of a token (it has {len(tensors)} tensors); a LoRA goes to --lora")
    if any(value.dim() not in (1, 2) or not value.is_floating_point() for value in rows.values()):
        raise UserError(f"{path}: is no embedding of a token (it has no rows of numbers); a LoRA goes to --lora")
    rows = {part: value.view(-1, value.shape[-1]) for part, value in rows.items()}
    if len({len(value) for value in rows.values()}) != 1:
        raise UserError(f"{path}: its clip_l and clip_g have different numbers of rows; export it again")
    return Embedding(named, rows)


def put_embedding(path: Path, parts: Parts) -> str:
    """Give a base the token of a file; returns the word to write in a prompt.

    Raises:
        UserError: the file is for another kind of base, or the base has the token already.
    """
    embedding = read_embedding(path)
    for part, (_, encoder) in parts.items():
        width = int(encoder.get_input_embeddings().weight.shape[1])
        own = embedding.rows.get(part)
        if own is None or own.shape[1] != width or len(parts) != len(embedding.rows):
            has = ", ".join(f"{FILE_KEYS[one]} {rows.shape[1]}" for one, rows in embedding.rows.items())
            raise UserError(f"{path}: is for another base (widths: {has}; this base's {part} has {width})")
    try:
        new = NewToken(embedding.token, len(embedding.names))
        for tokenizer, _ in parts.values():
            check_new(new, tokenizer)
    except ValueError as error:
        raise UserError(f"{path}: {error}; rename the token's key or the file") from None
    add_tokens(parts, new.names, embedding.rows)
    return new.placeholder_token
