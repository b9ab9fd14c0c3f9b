"""Images as other images of the same thing: mirrored, cut elsewhere, in other colours."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from loratune.data.buckets import Size
from loratune.data.entries import MIDDLE, View

TURNED = (5, 6, 7, 8)  # EXIF orientations that swap width and height
ORIENTATION = 0x0112
_COLOURS: dict[str, Callable[[Image.Image], Any]] = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True)
class Augment:
    """Random changes of training images; validation images never change.

    Flips and crops are made before the VAE, and each variant is cached: the latents of a mirrored image are not the
    mirrored latents. Colours are continuous, so they need data.cache_latents: false.

    Args:
        flip: probability of a mirrored image, 0 to 1; not for text, nor for what has a left and a right.
        crops: number of places, evenly spaced along what exceeds the bucket, to crop from; 1 is the middle.
        brightness: its factor is uniform in [1 - b, 1 + b]; needs data.cache_latents: false.
        contrast: likewise.
        saturation: likewise.
    """

    flip: float = 0.0
    crops: int = 1
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0

    def __post_init__(self) -> None:
        for key in ("flip", *_COLOURS):
            if not 0 <= (value := getattr(self, key)) <= 1:
                raise ValueError(f"augment.{key} is {value}; give 0 to 1")
        if not 1 <= self.crops <= 16:
            raise ValueError(f"augment.crops is {self.crops}; give 1 to 16")

    @property
    def colours(self) -> dict[str, float]:
        """What colour changes there are, and how far they go."""
        return {key: value for key in _COLOURS if (value := getattr(self, key))}

    def views(self, size: Size, bucket: Size) -> list[View]:
        """The variants of an image of some size in its bucket, each once; the mirrored ones last."""
        whole = covering(size, bucket)
        across, down = (
            self._places(round(long) > short) for long, short in zip(whole, bucket, strict=True)
        )  # at most one of them has several, as the image covers the bucket
        flips = [False] * (self.flip < 1) + [True] * (self.flip > 0)
        return [View(x, y, flip) for flip in flips for x in across for y in down]

    def _places(self, room: bool) -> list[float]:
        if self.crops == 1 or not room:
            return [0.5]
        return [place / (self.crops - 1) for place in range(self.crops)]

    def draw(self, size: Size, bucket: Size, random: Random) -> View:
        """One of the variants of an image."""
        if not self.flip and self.crops == 1:
            return MIDDLE
        flip = random.random() < self.flip
        return random.choice([view for view in self.views(size, bucket) if view.flip == flip])

    def colour(self, image: Image.Image, random: Random) -> Image.Image:
        """An image in other colours."""
        for key, far in self.colours.items():
            image = _COLOURS[key](image).enhance(1 + far * (2 * random.random() - 1))
        return image


def covering(size: Size, bucket: Size) -> tuple[float, float]:
    """Width and height of an image scaled to cover a bucket."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return size[0] * scale, size[1] * scale


def cut(image: Image.Image, bucket: Size, view: View, filter: Image.Resampling = Image.Resampling.LANCZOS) -> Any:
    """The part of an image that a view is of, at the bucket's width and height."""
    part = ImageOps.fit(image, bucket, filter, centering=(view.across, view.down))
    return ImageOps.mirror(part) if view.flip else part


def corner(size: Size, bucket: Size, view: View) -> tuple[int, int]:
    """Left and top of a view in the image that is scaled to cover the bucket, and mirrored if the view is."""
    (width, height), (across, down, flip) = covering(size, bucket), view
    return round((width - bucket[0]) * (1 - across if flip else across)), round((height - bucket[1]) * down)


def upright_size(data: bytes) -> Size:
    """Width and height of an image as it is looked at, from its header.

    Raises:
        OSError: the bytes are no image.
    """
    try:
        with Image.open(io.BytesIO(data)) as opened:
            width, height = opened.size
            turned = opened.getexif().get(ORIENTATION) in TURNED
    except UnidentifiedImageError:
        raise OSError("its content is no image of a known kind") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage makes Pillow raise SyntaxError, ValueError, TypeError and its own kinds, too
        raise OSError(f"damaged: {error}") from error
    return (height, width) if turned else (width, height)
