"""What pictures become, and what is refused before it costs anything."""

from __future__ import annotations

import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.images import MAX_PIXELS, ImageError, decode
from tests.server.fake_engine import picture, png_header

LIMIT = 1_000_000


def refused(data: bytes, reason: str, message: str, max_pixels: int = LIMIT) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode(data, max_pixels)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_the_three_formats_are_read(kind: str, size: tuple[int, int]) -> None:
    image = decode(picture(kind, size))
    assert (image.mode, image.size) == ("RGB", size)
    assert np.abs(np.asarray(image, int)[0, 0] - (255, 0, 0)).max() <= 2


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(picture("JPEG", (8, 4), exif=exif)).size == (4, 8)


@pytest.mark.parametrize(
    ("mode", "color", "save"),
    [
        ("RGBA", (255, 0, 0, 0), {}),
        ("LA", (0, 0), {}),
        ("P", 0, {"transparency": 0}),
        ("RGB", "red", {"transparency": (255, 0, 0)}),
    ],
)
def test_what_is_transparent_is_white(mode: str, color: Any, save: dict[str, Any]) -> None:
    assert decode(picture("PNG", mode=mode, color=color, **save)).getpixel((0, 0)) == (255, 255, 255)


def test_half_transparent_is_half_white() -> None:
    assert decode(picture("PNG", mode="RGBA", color=(255, 0, 0, 128))).getpixel((0, 0)) == (255, 127, 127)


def test_sixteen_bits_of_grey_keep_their_brightness() -> None:
    file = BytesIO()
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(file, "PNG")
    assert decode(file.getvalue()).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize(("mode", "color"), [("1", 1), ("L", 255), ("CMYK", (0, 0, 0, 0))])
def test_other_modes_become_rgb(mode: str, color: Any) -> None:
    assert decode(picture("JPEG" if mode == "CMYK" else "PNG", mode=mode, color=color)).getpixel((0, 0)) == (255,) * 3


def film(kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    file = BytesIO()
    frames[0].save(file, kind, save_all=True, append_images=frames[1:])
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_animation_is_refused(kind: str) -> None:
    refused(film(kind), "content", "single frame")


def test_a_phones_second_view_is_ignored() -> None:
    assert decode(film("MPO")).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", film("GIF"), picture("GIF"), picture("BMP"), picture("TIFF"), b"%PDF-1.7", b"<svg/>", b"RIFF\0\0\0\0WAVE"],
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    refused(data, "format", "JPEG, PNG or WebP")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_file_is_refused(kind: str) -> None:
    """Wherever it ends, except where all that is missing is something that no decoder needs."""
    data = picture(kind, (16, 16))
    refused(data[: len(data) // 2], "content", "broken or cut short")
    for end in range(len(data)):
        no_crash(data[:end])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_flipped_byte_crashes(kind: str) -> None:
    data = picture(kind, (16, 16))
    for i in range(len(data)):
        no_crash(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])


def no_crash(data: bytes) -> None:
    try:
        decode(data)
    except ImageError as error:
        assert "0x" not in str(error)  # Pillow's own messages hold addresses


def jpeg_header(width: int, height: int) -> bytes:
    data = picture("JPEG")
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


def webp_header(width: int, height: int) -> bytes:
    data = bytearray(picture("WEBP", lossless=True))
    data[21:25] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [png_header(20_000, 20_000), png_header(10_000, 10_000), jpeg_header(20_000, 20_000), webp_header(16_000, 16_000)],
)
def test_too_many_pixels_are_refused_by_the_header(data: bytes) -> None:
    """There is nothing behind these headers: decoding would find them broken instead."""
    refused(data, "size", "pixels", MAX_PIXELS)


def test_the_pixel_limit_is_exact() -> None:
    assert decode(picture(size=(10, 10)), 100).size == (10, 10)
    refused(picture(size=(10, 10)), "size", "at most 99 pixels", 99)


def test_a_line_of_pixels_is_refused() -> None:
    assert decode(picture(size=(100, 1))).size == (100, 1)
    refused(picture(size=(101, 1)), "content", "100 times")


@pytest.mark.parametrize("data", [picture("JPEG", (8, 8), progressive=True), film("MPO")])
def test_a_jpeg_of_countless_scans_is_refused(data: bytes) -> None:
    assert decode(data, 64).size == (8, 8)
    refused(data + b"\xff\xda" * 64, "size", "scans", 64)
