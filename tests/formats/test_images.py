"""Images of every kind come out upright, in RGB and on white; damaged ones as OSError."""

from __future__ import annotations

import io
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from loratune.formats.images import normalise, open_image, square, to_image, to_tensor

QUICK = settings(max_examples=200, deadline=None)
WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def noise(width: int = 9, height: int = 7, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def at(image: Image.Image, x: int, y: int) -> Any:
    return image.getpixel((x, y))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(orientation: int) -> None:
    upright = noise()
    values = np.asarray(upright)
    # What a camera stores for each orientation (TIFF 6.0, tag 274), by numpy instead of Pillow.
    stored = {
        1: values,
        2: values[:, ::-1],
        3: values[::-1, ::-1],
        4: values[::-1],
        5: values.transpose(1, 0, 2),
        6: np.rot90(values, 1),
        7: values[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(values, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    opened = open_image(encoded(Image.fromarray(np.ascontiguousarray(stored)), exif=exif))
    assert np.array_equal(np.asarray(opened), values)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (3, 1))
    for x, alpha in enumerate((0, 255, 51)):
        image.putpixel((x, 0), (0, 0, 0, alpha))
    opened = open_image(encoded(image.convert(mode)))
    assert opened.mode == "RGB"
    assert [at(opened, x, 0)[0] for x in range(3)] == [255, 0, 204]  # 255 (1 - 51 / 255) = 204
    assert all(len(set(at(opened, x, 0))) == 1 for x in range(3))


def test_what_is_transparent_has_no_colour_of_its_own() -> None:
    opened = open_image(encoded(Image.new("RGBA", (2, 2), (255, 0, 0, 0))))
    assert at(opened, 1, 1) == WHITE


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_with_a_transparent_colour(form: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([0, 1])
    opened = open_image(encoded(image, form, transparency=1))
    assert [at(opened, 0, 0), at(opened, 1, 0)] == [RED, WHITE]


def test_rgb_with_one_transparent_colour() -> None:
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), BLUE)
    opened = open_image(encoded(image, transparency=BLUE))
    assert [at(opened, 0, 0), at(opened, 1, 0)] == [RED, WHITE]


def test_an_opaque_palette_keeps_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *BLUE])
    image.putdata([1, 0])
    opened = open_image(encoded(image))
    assert [at(opened, 0, 0), at(opened, 1, 0)] == [BLUE, RED]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_and_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 128 * 257, 65535, 300 * 100]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values), form))
    assert [at(opened, x, 0) for x in range(5)] == [(g, g, g) for g in (0, 1, 128, 255, 117)]


def test_sixteen_bit_grey_of_the_other_byte_order() -> None:
    values = np.array([[0, 65535, 64 * 257]], dtype=">u2")
    opened = open_image(encoded(Image.frombytes("I;16B", (3, 1), values.tobytes()), "TIFF"))
    assert [at(opened, x, 0)[0] for x in range(3)] == [0, 255, 64]


def test_cmyk_and_grey_and_black_and_white() -> None:
    ink = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = at(open_image(encoded(ink, "TIFF")), 4, 4)
    assert red == RED
    assert at(open_image(encoded(Image.new("L", (2, 2), 77))), 0, 0) == (77, 77, 77)
    assert at(open_image(encoded(Image.new("1", (2, 2), 1))), 0, 0) == WHITE


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_truncated_file_is_an_error(form: str) -> None:
    data = encoded(noise(64, 64), form)
    assert open_image(data).size == (64, 64)
    for share in (0.0, 0.01, 0.3, 0.7):
        with pytest.raises(OSError):
            open_image(data[: int(len(data) * share)])


def test_a_text_is_no_image() -> None:
    with pytest.raises(OSError, match=r"^its content is no image of a known kind$"):
        open_image(b"a red disc on white")


def test_damage_that_pillow_does_not_call_an_oserror() -> None:
    data = encoded(noise(64, 64))
    start = data.index(b"IDAT")
    length = int.from_bytes(data[start - 4 : start]) // 2
    shorter = data[: start - 4] + length.to_bytes(4) + data[start:]  # the next chunk begins among the pixels
    with pytest.raises(OSError, match="damaged: broken PNG"):
        open_image(shorter)
    cut = bytearray(data)
    cut[8:12] = (12).to_bytes(4)  # of IHDR's 13 bytes
    with pytest.raises(OSError, match="damaged"):
        open_image(bytes(cut))


def png(width: int, height: int, depth: int, kind: int, rows: bytes, clear: bytes = b"") -> bytes:
    """A PNG file written by its specification: bits for each channel, 0 grey or 2 RGB, rows of samples, and tRNS."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + bytes([depth, kind, 0, 0, 0])
    parts = [(b"IHDR", head), (b"tRNS", clear), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in parts if data or name != b"tRNS")


def test_sixteen_bit_grey_with_a_transparent_grey() -> None:
    row = b"\0" + np.array([0, 257 * 9, 257 * 9 + 1, 65535], dtype=">u2").tobytes()
    opened = open_image(png(4, 1, 16, 0, row, (257 * 9).to_bytes(2)))
    assert [at(opened, x, 0)[0] for x in range(4)] == [0, 255, 9, 255]


def test_sixteen_bit_colours_with_a_transparent_colour() -> None:
    row = b"\0" + np.array([0xFF00, 0x1200, 0, 0x4000, 0x8000, 0xC000], dtype=">u2").tobytes()
    clear = np.array([0x4000, 0x8000, 0xC000], dtype=">u2").tobytes()
    opened = open_image(png(2, 1, 16, 2, row, clear))
    assert [at(opened, 0, 0), at(opened, 1, 0)] == [(255, 18, 0), WHITE]


def test_greys_of_more_than_sixteen_bits_do_not_wrap() -> None:
    values = np.array([[0, 128 * 257, 65535, 65537, 2**30, -5]], dtype=np.int32)
    opened = open_image(encoded(Image.fromarray(values), "TIFF"))
    assert [at(opened, x, 0)[0] for x in range(6)] == [0, 128, 255, 255, 255, 0]


def inks(data: bytes) -> bytes:
    """The same JPEG without its Adobe segment (APP14)."""
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4]) :]


def test_inks_in_a_jpeg_as_adobe_writes_them_and_plain() -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    adobe = encoded(cyan, "JPEG", quality=100)
    assert np.abs(np.subtract(at(open_image(adobe), 8, 8), (0, 255, 255))).max() <= 3
    negative = Image.new("CMYK", (16, 16), (0, 255, 255, 255))  # saving inverts it
    plain = inks(encoded(negative, "JPEG", quality=100))
    assert np.abs(np.subtract(at(open_image(plain), 8, 8), (0, 255, 255))).max() <= 3


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    more: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **more)
    assert Image.open(io.BytesIO(data)).n_frames == 3  # type: ignore[attr-defined]
    assert at(open_image(data), 4, 4) == RED


def test_orientation_in_a_jpeg() -> None:
    exif = Image.Exif()
    exif[274] = 6
    stored = Image.new("RGB", (32, 16), RED)
    stored.paste(BLUE, (0, 0, 16, 16))  # its left becomes the top
    opened = open_image(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0))
    assert opened.size == (16, 32)
    assert np.abs(np.subtract(at(opened, 8, 4), BLUE)).max() <= 3
    assert np.abs(np.subtract(at(opened, 8, 28), RED)).max() <= 3


def test_a_bomb_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match=r"^it claims to have more than 178956970 pixels; make it smaller$"):
        open_image(png(100_000, 100_000, 8, 2, b""))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other libraries set it
    with pytest.raises(OSError, match="it claims to have more"):
        open_image(png(100_000, 100_000, 8, 2, b""))


def test_a_large_image_is_no_bomb_and_raises_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(encoded(noise(9, 7))).size == (9, 7)


def test_too_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any) -> None:
        raise MemoryError

    data = encoded(noise())
    monkeypatch.setattr(ImageFile.ImageFile, "load", full)
    with pytest.raises(OSError, match=r"^it does not fit into memory$"):
        open_image(data)


DAMAGED = {form: encoded(noise(24, 24), form) for form in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")}


@QUICK
@given(data=st.data(), form=st.sampled_from(sorted(DAMAGED)))
def test_damage_gives_a_image_or_an_oserror(data: st.DataObject, form: str) -> None:
    content = bytearray(DAMAGED[form])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(len(content) // 2, len(content))) :]
    try:
        opened = open_image(bytes(content))
    except OSError as error:
        told = str(error)
    else:
        assert opened.mode == "RGB"
        return
    assert told
    assert "\n" not in told


@QUICK
@given(st.integers(0, 2**32 - 1))
def test_pixels_and_images_are_inverse(seed: int) -> None:
    image = noise(5, 3, seed)
    pixels = normalise(to_tensor(image))
    assert pixels.shape == (3, 3, 5)
    assert pixels.dtype == torch.float32
    assert np.array_equal(np.asarray(to_image(pixels)), np.asarray(image))


def test_every_grey_survives_and_the_ends_are_exact() -> None:
    greys = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 256).expand(3, 1, 256)
    pixels = normalise(greys)
    assert (pixels[0, 0, 0], pixels[0, 0, -1]) == (-1, 1)
    assert torch.equal(to_tensor(to_image(pixels)), greys)


def test_what_lies_outside_is_clipped() -> None:
    pixels = torch.tensor([-7.0, 7.0, 0.0]).reshape(3, 1, 1)
    assert at(to_image(pixels), 0, 0) == (0, 255, 128)


def test_channels_and_axes_keep_their_place() -> None:
    image = Image.new("RGB", (4, 2))
    image.putpixel((3, 1), (10, 20, 30))
    assert to_tensor(image)[:, 1, 3].tolist() == [10, 20, 30]
    assert int(to_tensor(image).count_nonzero()) == 3


@pytest.mark.parametrize(("width", "height"), [(40, 20), (20, 40), (20, 20)])
def test_square_takes_the_middle(width: int, height: int) -> None:
    image = Image.new("RGB", (width, height), RED)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    image.paste(BLUE, (left, top, left + side, top + side))
    made = square(image, 16)
    assert made.size == (16, 16)
    assert np.abs(np.asarray(made, dtype=int) - BLUE).max() <= 8  # Lanczos reaches a little beyond its box


def test_square_of_the_right_size_changes_nothing() -> None:
    image = noise(16, 16)
    assert np.array_equal(np.asarray(square(image, 16)), np.asarray(image))


def test_sixteen_bits_are_rounded_to_the_nearest_of_eight() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    opened = open_image(encoded(Image.fromarray(values)))
    assert np.array_equal(np.asarray(opened)[..., 0], (values / 257).round().astype(np.uint8))
