"""What strangers' pictures become, and what is refused before it costs anything."""

from __future__ import annotations

import base64
import struct
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from server import media
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.settings import Settings
from tests.server.fake_engine import data_url, picture, png_header

LIMIT = 1_000_000


def decode(data: bytes, max_pixels: int = LIMIT) -> Image.Image:
    return media.decode(data, max_pixels)


def prepare(source: str | bytes, **limits: Any) -> tuple[Image.Image, str]:
    """What the vision tower would see, and the digest."""
    seen: list[Image.Image] = []

    def pixels(image: Image.Image) -> torch.Tensor:
        seen.append(image)
        return torch.zeros(3, 1, 1)

    digest = media.prepare(source, pixels, Settings(**limits)).digest
    return seen[0], digest


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_the_three_formats_are_read(kind: str, size: tuple[int, int]) -> None:
    data = picture(kind, size)
    for source in (data, data_url(data)):
        image, _ = prepare(source)
        assert (image.mode, image.size) == ("RGB", size)
        assert np.abs(np.asarray(image, int)[0, 0] - (255, 0, 0)).max() <= 2


def test_a_data_url_may_be_long_and_its_type_is_read_from_the_bytes() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    payload = base64.b64encode(file.getvalue()).decode()
    assert len(payload) > 2**20
    image, _ = prepare(f"DATA:text/plain;charset=x;BASE64,{payload}")
    assert (np.asarray(image) == noise).all()


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
    with pytest.raises(InvalidRequest, match="single frame"):
        decode(film(kind))


def test_a_phones_second_view_is_ignored() -> None:
    assert decode(film("MPO")).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", film("GIF"), picture("GIF"), picture("BMP"), picture("TIFF"), b"%PDF-1.7", b"<svg/>", b"RIFF\0\0\0\0WAVE"],
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    with pytest.raises(UnsupportedMedia, match="JPEG, PNG or WebP"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_file_is_refused(kind: str) -> None:
    """Wherever it ends, except where all that is missing is something that no decoder needs."""
    data = picture(kind, (16, 16))
    assert refused(data[: len(data) // 2])
    for end in range(len(data)):
        refused(data[:end])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_no_flipped_byte_crashes(kind: str) -> None:
    data = picture(kind, (16, 16))
    for i in range(len(data)):
        refused(data[:i] + bytes([data[i] ^ 0xFF]) + data[i + 1 :])


def refused(data: bytes) -> bool:
    try:
        decode(data)
    except EspalierError as error:
        assert 400 <= error.status < 500
        assert "0x" not in error.message  # Pillow's own messages hold addresses
        return True
    return False


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
    with pytest.raises(PayloadTooLarge, match="pixels"):
        decode(data, Settings().max_image_pixels)


def test_the_pixel_limit_is_exact() -> None:
    assert decode(picture(size=(10, 10)), 100).size == (10, 10)
    with pytest.raises(PayloadTooLarge):
        decode(picture(size=(10, 10)), 99)


def test_a_line_of_pixels_is_refused() -> None:
    assert decode(picture(size=(100, 1))).size == (100, 1)
    with pytest.raises(InvalidRequest, match="100 times"):
        decode(picture(size=(101, 1)))


@pytest.mark.parametrize("data", [picture("JPEG", (8, 8), progressive=True), film("MPO")])
def test_a_jpeg_of_countless_scans_is_refused(data: bytes) -> None:
    assert decode(data, 64).size == (8, 8)
    with pytest.raises(PayloadTooLarge, match="scans"):
        decode(data + b"\xff\xda" * 64, 64)


def test_the_byte_limit_is_exact_and_applied_before_base64() -> None:
    data = picture()
    prepare(data_url(data), max_image_bytes=len(data))
    for source in (data, data_url(data), "data:;base64," + "!" * 1000):
        with pytest.raises(PayloadTooLarge, match="bytes"):
            prepare(source, max_image_bytes=len(data) - 1)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://example.com/cat.png", "not fetched"),
        ("http://169.254.169.254/latest", "not fetched"),
        ("file:///etc/passwd", "not fetched"),
        ("/etc/passwd", "not fetched"),
        ("", "not fetched"),
        ("data:image/png,abc", "must be base64"),
        ("data:image/png;base64", "must be base64"),
        ("data:image/png;base64,a*b=", "not valid base64"),
        ("data:image/png;base64,abc", "not valid base64"),
        ("data:image/png;base64,QUJD QUJD", "not valid base64"),
        ("data:image/png;base64,QUI=QUJD", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
    ],
)
def test_urls_that_are_no_data(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prepare(url)


def test_the_digest_is_of_what_is_seen() -> None:
    files = [picture("PNG"), picture("PNG", compress_level=0), picture("WEBP", lossless=True)]
    assert len({prepare(data)[1] for data in files}) == 1
    assert len({prepare(picture(size=size))[1] for size in ((2, 8), (8, 2), (4, 4))}) == 3
