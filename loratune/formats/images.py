"""Images as people have them, turned into square tensors."""

from __future__ import annotations

import io
import warnings

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError
from torch import Tensor

BAND = 256  # rows
ORIENTATION = 0x0112  # of EXIF
MOST_PIXELS = 178_956_970
"""An image that claims more is not decoded: small files can claim to be hundreds of gigabytes."""


def open_image(data: bytes) -> Image.Image:
    """Decode an image to upright RGB; transparency is laid on white, and of an animation the first frame is taken.

    Args:
        data: a file's content, of any kind that Pillow reads: greys of 16 bits are scaled, palettes looked up, and
            inks (CMYK) turned into light, as Adobe's programs write them (inverted) or not.

    Raises:
        OSError: the bytes are no image, a damaged one, or one of more than MOST_PIXELS; the message is one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name no file, and what matters becomes an error here
            return _decode(data)
    except Image.DecompressionBombError:
        raise OSError(f"it claims to have more than {MOST_PIXELS} pixels; make it smaller") from None
    except UnidentifiedImageError:
        raise OSError("its content is no image of a known kind") from None
    except MemoryError:
        raise OSError("it does not fit into memory") from None
    except OSError as error:
        raise OSError(_line(error)) from error
    except Exception as error:  # damage makes Pillow raise SyntaxError, ValueError, TypeError and its own kinds, too
        raise OSError(f"damaged: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decode(data: bytes) -> Image.Image:
    opened = Image.open(io.BytesIO(data))
    if opened.width * opened.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    opened.load()
    image: Image.Image = opened
    if opened.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(opened)
    if opened.format == "JPEG" and opened.mode == "CMYK" and "adobe" not in opened.info:
        image = ImageChops.invert(image)  # Pillow takes every JPEG's inks for Adobe's, which are inverted
    image = _on_white(_eight_bits(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Greys of more bits scaled to 8, where Pillow would clip them; colours of 16 bits are 8 already."""
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    scaled = np.clip(values, 0, 65535).astype(np.uint32)
    scaled += 128
    scaled //= 257  # to the nearest: 257 is odd, so that no value lies in the middle of two
    grey = Image.fromarray(scaled.astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    flat = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):  # a band at a time, so that the image is not held four times
        box = (0, top, image.width, min(top + BAND, image.height))
        band = Image.new("RGBA", (image.width, box[3] - top), "white")
        band.alpha_composite(image.crop(box).convert("RGBA"))
        flat.paste(band.convert("RGB"), box)
    return flat


def square(image: Image.Image, size: int) -> Image.Image:
    """The middle square of an image, at size x size pixels (Lanczos)."""
    return ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8, shape (3, H, W)."""
    return torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)


def to_image(pixels: Tensor) -> Image.Image:
    """Pixels in [-1, 1], shape (3, H, W), as an RGB image; what lies outside is clipped."""
    grey = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(grey.permute(1, 2, 0).numpy())


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1], the range that VAE and pixel-space models take."""
    return pixels.float() / 127.5 - 1
