"""Pictures as people have them, turned into square tensors."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def open_picture(data: bytes) -> Image.Image:
    """Decode a picture to upright RGB; transparency is laid on white.

    Raises:
        OSError: the bytes are no picture, or a damaged one (`PIL.UnidentifiedImageError` included).
    """
    try:
        opened = Image.open(io.BytesIO(data))
        opened.load()
        picture: Image.Image = ImageOps.exif_transpose(opened)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damage makes Pillow raise SyntaxError, ValueError, TypeError and its own kinds, too
        raise OSError(f"damaged: {error}") from error
    if picture.mode in ("I;16", "I;16B", "I"):
        # PIL clips 16-bit greys to 255 instead of scaling them.
        picture = Image.fromarray((np.asarray(picture, dtype=np.float64) / 257).round().astype("uint8"))
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture)
        picture = canvas
    return picture.convert("RGB")


def square(picture: Image.Image, size: int) -> Image.Image:
    """The middle square of a picture, at size x size pixels (Lanczos)."""
    return ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as uint8, shape (3, H, W)."""
    return torch.from_numpy(np.array(picture, dtype=np.uint8)).permute(2, 0, 1)


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels in [-1, 1], shape (3, H, W), as an RGB picture; what lies outside is clipped."""
    grey = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(grey.permute(1, 2, 0).numpy())


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], the range that VAE and pixel-space models take."""
    return pixels.float() / 127.5 - 1
