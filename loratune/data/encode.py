"""What the frozen parts of a base make of pictures and captions, once, through the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from loratune.data.cache import Cache, key_of
from loratune.formats.files import tensors_hash
from loratune.formats.pictures import normalise, open_picture, square, to_tensor


class Encodes(Protocol):
    """What is asked of a model family here."""

    device: torch.device

    def encode_pictures(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels in [-1, 1] (B, 3, H, W) as the posterior."""

    def encode_text(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions as the condition."""

    def components(self) -> dict[str, nn.Module]:
        """Parts with weights, by name."""

    def text_settings(self) -> str:
        """What decides beside the weights what captions are encoded as."""

    def to(self, device: torch.device) -> Any:
        """Move the weights."""


@dataclass(frozen=True)
class Entry:
    """One picture of a source: its row, its file's name, its caption, and the sha256 of its bytes."""

    index: int
    name: str
    caption: str
    digest: str


class Encoder:
    """Reads encoded samples from the cache and encodes what is not there.

    Args:
        family: the base; only its VAE and text encoders are used.
        cache: folder of the cache.
        size: side of the pictures in pixels.
        text: whether captions are encoded too (not while the text encoder is trained).
    """

    def __init__(self, family: Encodes, cache: Path, size: int, text: bool) -> None:
        self.family, self.cache, self.size, self.text = family, Cache(cache), size, text
        parts = family.components()
        self.vae_hash = _weights_hash([part for name, part in parts.items() if name == "vae"])
        self.text_hash = _weights_hash([part for name, part in parts.items() if name.startswith("text_encoder")])
        self.text_settings = family.text_settings() if text else ""

    def prepare(self, entry: Entry, data: bytes) -> None:
        """See that a sample is in the cache.

        Raises:
            OSError: the picture is unreadable.
        """
        self.read(entry, lambda: data)

    def read(self, entry: Entry, data: Callable[[], bytes]) -> dict[str, Any]:
        """The sample's `mean` and `logvar` and, where the text is frozen, its `condition`."""
        key = key_of(what="picture", picture=entry.digest, size=self.size, vae=self.vae_hash)
        sample: dict[str, Any] = self._get(key, lambda: self._encode_picture(data()))
        if self.text:
            key = key_of(what="text", caption=entry.caption, encoder=self.text_hash, settings=self.text_settings)
            sample["condition"] = self._get(key, lambda: self._encode_text(entry.caption))
        return sample

    def _get(self, key: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        found = self.cache.get(key)
        if found is None:
            found = encode()
            self.cache.put(key, found)
        return found

    @torch.no_grad()
    def _encode_picture(self, data: bytes) -> dict[str, Tensor]:
        pixels = normalise(to_tensor(square(open_picture(data), self.size)))[None].to(self.family.device)
        return {name: value[0].cpu() for name, value in self.family.encode_pictures(pixels).items()}

    @torch.no_grad()
    def _encode_text(self, caption: str) -> dict[str, Tensor]:
        return {name: value[0].cpu() for name, value in self.family.encode_text([caption]).items()}


def _weights_hash(parts: list[nn.Module]) -> str:
    held = {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.state_dict().items()}
    return tensors_hash(held)
