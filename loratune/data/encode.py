"""Latents and text embeddings of images and captions, encoded once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from loratune.data.augment import cut
from loratune.data.buckets import Size
from loratune.data.cache import Cache, key_of
from loratune.data.collection import Collection
from loratune.data.entries import MIDDLE, Entry, View
from loratune.data.masks import mask_tensor
from loratune.families.family import Role
from loratune.formats.files import tensors_hash
from loratune.formats.images import normalise, open_image, to_tensor


class Encodes(Protocol):
    """What is asked of a model here."""

    device: torch.device

    def encode_images(self, pixels: Tensor) -> dict[str, Tensor]:
        """Pixels in [-1, 1] (B, 3, H, W) as the posterior."""

    def encode_prompts(self, captions: list[str]) -> dict[str, Tensor]:
        """Captions as the condition."""

    def components(self) -> dict[str, nn.Module]:
        """Parts with weights, by name."""

    def names(self, role: Role) -> tuple[str, ...]:
        """The components with a role."""

    def text_settings(self) -> str:
        """What decides beside the weights what captions are encoded as."""

    def to(self, device: torch.device) -> Any:
        """Move the weights."""


@dataclass(frozen=True)
class Keys:
    """Names of cache entries, hashes of everything that decides their content.

    Args:
        vae: hash of its weights.
        text: hash of the text encoders' weights.
        settings: of the text encoders.
    """

    vae: str
    text: str
    settings: str

    def image(self, entry: Entry, view: View) -> str:
        """Of an image's posterior."""
        width, height = entry.bucket
        if width == height and view == MIDDLE:
            return key_of(what="image", image=entry.digest, size=width, vae=self.vae)
        return key_of(what="image", image=entry.digest, vae=self.vae, **_named(entry.bucket, view))

    def mask(self, entry: Entry, view: View, latents: Size) -> str:
        """Of an image's mask at the size of its latents."""
        return key_of(what="mask", mask=entry.mask, latents="x".join(map(str, latents)), **_named(entry.bucket, view))

    def caption(self, caption: str) -> str:
        """Of a caption's condition."""
        return key_of(what="text", caption=caption, encoder=self.text, settings=self.settings)


def _named(bucket: Size, view: View) -> dict[str, str]:
    return {"bucket": f"{bucket[0]}x{bucket[1]}", "view": f"{view.across:.6f},{view.down:.6f},{view.flip:d}"}


def pixels_of(
    data: bytes, bucket: Size, view: View, vary: Callable[[Image.Image], Image.Image] | None = None
) -> Tensor:
    """A view of an image as uint8, (3, H, W).

    Args:
        data: the image's bytes.
        bucket: width and height.
        view: which part.
        vary: what is done to it then.

    Raises:
        OSError: the image is unreadable.
    """
    seen = cut(open_image(data), bucket, view)
    return to_tensor(vary(seen) if vary else seen)


class Encoder:
    """Reads encoded samples from the cache and encodes what is not there.

    Args:
        model: the base; only its VAE and text encoders are used.
        cache: folder of the cache.
        text: whether captions are encoded too (not while the text encoder is trained).
    """

    def __init__(self, model: Encodes, cache: Path, text: bool) -> None:
        self.model, self.cache, self.text = model, Cache(cache), text
        parts = model.components()
        self.keys = Keys(
            _weights_hash([parts[name] for name in model.names("vae")]),
            _weights_hash([parts[name] for name in model.names("text_encoder")]),
            model.text_settings() if text else "",
        )

    def posterior(self, entry: Entry, view: View, pixels: Callable[[], Tensor]) -> dict[str, Tensor]:
        """The `mean` and `logvar` of a view, (C, h, w) each; `pixels` are asked for where they are not cached."""
        return self._get(self.keys.image(entry, view), lambda: self._encode_image(pixels()))

    def condition(self, caption: str) -> dict[str, Tensor]:
        """The conditioning of a caption."""
        return self._get(self.keys.caption(caption), lambda: self._encode_prompt(caption))

    def mask(self, entry: Entry, view: View, latents: Size, data: Callable[[], bytes | None]) -> Tensor:
        """The mask of a view at the size of its latents, (1, h, w) in [0, 1]."""

        def encode() -> dict[str, Tensor]:
            whole = mask_tensor(data(), entry.bucket, view)
            return {"mask": torch.nn.functional.adaptive_avg_pool2d(whole, latents)}

        return self._get(self.keys.mask(entry, view, latents), encode)["mask"]

    def prepare(self, entry: Entry, pixels: Sequence[tuple[View, Tensor]], captions: Sequence[str]) -> None:
        """Encode an image's views, of which the pixels are given, and its captions, into the cache."""
        for view, seen in pixels:
            self.cache.put(self.keys.image(entry, view), self._encode_image(seen))
        for caption in captions if self.text else ():
            self.condition(caption)

    def _get(self, key: str, encode: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        encoded = self.cache.get(key)
        if encoded is None:
            encoded = encode()
            self.cache.put(key, encoded)
        return encoded

    @torch.no_grad()
    def _encode_image(self, pixels: Tensor) -> dict[str, Tensor]:
        pixels = normalise(pixels)[None].to(self.model.device)
        return {name: value[0].cpu() for name, value in self.model.encode_images(pixels).items()}

    @torch.no_grad()
    def _encode_prompt(self, caption: str) -> dict[str, Tensor]:
        return {name: value[0].cpu() for name, value in self.model.encode_prompts([caption]).items()}


class Look(NamedTuple):
    """What an image is, or its name and what is wrong with it; and the pixels of its views that are not cached."""

    result: Entry | tuple[str, str]
    pixels: Sequence[tuple[View, Tensor]] = ()


class Looks(Dataset[Look]):
    """Each image looked at once, in processes of their own if there are any.

    Args:
        collection: the images.
        numbers: which of them.
        cached: the cache and its names; none where nothing is cached, and images are only decoded.
    """

    def __init__(self, collection: Collection, numbers: Sequence[int], cached: tuple[Cache, Keys] | None) -> None:
        self.collection, self.numbers, self.cached = collection, numbers, cached

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Look:
        source, row = self.collection.at(self.numbers[index])
        sample = self.collection.sources[source][row]
        try:
            entry = self.collection.entry(source, row, sample)
            if self.cached is None:
                open_image(sample.data)
                return Look(entry)
            return Look(entry, self._missing(entry, sample.data, *self.cached))
        except OSError as error:
            return Look((sample.name, str(error)))

    def _missing(self, entry: Entry, data: bytes, cache: Cache, keys: Keys) -> list[tuple[View, Tensor]]:
        views = [view for view in self.collection.views(entry) if cache.get(keys.image(entry, view)) is None]
        if not views:
            return []
        image = open_image(data)
        return [(view, to_tensor(cut(image, entry.bucket, view))) for view in views]


def _weights_hash(parts: list[nn.Module]) -> str:
    weights = {f"{i}.{name}": value for i, part in enumerate(parts) for name, value in part.state_dict().items()}
    return tensors_hash(weights)
