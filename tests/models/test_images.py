"""What pictures become, and what is refused before it costs anything."""

from __future__ import annotations

import struct
import time
import zlib
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from models.images import MAX_PIXELS, ImageError, decode, open_image
from tests.server.fake_engine import picture, png_header

LIMIT = 1_000_000
KINDS = ["PNG", "JPEG", "WEBP", "GIF", *(["AVIF"] if features.check("avif") else [])]


def refused(data: bytes, reason: str, message: str, max_pixels: int = LIMIT) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        decode(data, max_pixels)
    assert caught.value.reason == reason


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (7, 5)])
def test_the_formats_are_read(kind: str, size: tuple[int, int]) -> None:
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


@pytest.mark.parametrize("kind", ["MPO", "GIF"])
def test_of_a_gif_and_a_phones_views_the_first_is_seen(kind: str) -> None:
    assert decode(film(kind)).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", picture("BMP"), picture("TIFF"), b"%PDF-1.7", b"<svg/>", b"RIFF\0\0\0\0WAVE"],
)
def test_other_formats_are_unsupported(data: bytes) -> None:
    refused(data, "format", "not a JPEG, PNG, WebP")


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused(kind: str) -> None:
    """Wherever it ends, except where all that is missing is something that no decoder needs."""
    data = picture(kind, (16, 16))
    refused(data[: len(data) // 2], "content", "broken or cut short")
    for end in range(len(data)):
        no_crash(data[:end])


@pytest.mark.parametrize("kind", KINDS)
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


# ---- metadata, which never makes a good picture bad


def chunk(kind: bytes, data: bytes, good: bool = True) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data) ^ (not good))


def with_chunks(*chunks: bytes) -> bytes:
    data = picture("PNG", (8, 8))
    return data[:33] + b"".join(chunks) + data[33:]


ENDLESS = zlib.compress(b"x" * 50_000_000)
PNGS = {
    "text": chunk(b"tEXt", b"x" * 3_000_000),
    "endless text": chunk(b"zTXt", b"Comment\0\0" + ENDLESS),
    "endless international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + ENDLESS),
    "endless profile": chunk(b"iCCP", b"icc\0\0" + ENDLESS),
    "no profile": chunk(b"iCCP", b"icc\0\0no zlib"),
    "no checksum": chunk(b"tEXt", b"Comment\0x", good=False),
    "no size": chunk(b"pHYs", b"x"),
    "no gamma": chunk(b"gAMA", b""),
    "broken EXIF": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
    "EXIF of a wrong checksum": chunk(b"eXIf", b"MM\0*", good=False),
    "many": chunk(b"tEXt", b"k\0v") * 5000,
}
TURNED = chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")


@pytest.mark.parametrize("kind", KINDS)
def test_no_pixel_is_decoded_to_know_the_size(kind: str) -> None:
    file = open_image(picture(kind, (8, 4)))
    assert file.size == (4, 8)
    assert file.image._im is None  # type: ignore[attr-defined]  # Pillow's pixels


@pytest.mark.parametrize("at", [33, -12])
def test_a_png_tells_its_orientation_before_or_behind(at: int) -> None:
    data = picture("PNG", (8, 4))
    file = open_image(data[:at] + TURNED + data[at:])
    assert file.size == (8, 4) and file.image._im is None  # type: ignore[attr-defined]
    assert file.decode().size == (4, 8)


@pytest.mark.parametrize("name", PNGS)
def test_no_chunk_without_pixels_spoils_a_png(name: str) -> None:
    started = time.thread_time()
    assert decode(with_chunks(PNGS[name])).getpixel((7, 7)) == (255, 0, 0)
    assert time.thread_time() - started < 1


BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\0\x05" + b"\xff" * 60


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("extra", [{"exif": BROKEN_EXIF}, {"exif": b"Exif\0\0"}, {"icc_profile": b"no profile"}, {"xmp": b"<"}])
def test_no_metadata_spoils_a_photograph(kind: str, extra: dict[str, bytes]) -> None:
    assert decode(picture(kind, (8, 8), **extra)).getpixel((7, 7)) == pytest.approx((255, 0, 0), abs=2)


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xEF, 0xFE])
def test_no_segment_spoils_a_jpeg(marker: int) -> None:
    data = picture("JPEG", (8, 8))
    for content in (b"", b"MPF\0II*\0", b"Photoshop 3.0\08BIM\4", b"ICC_PROFILE\0\1", b"\xff" * 60_000):
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        assert decode(data[:2] + segment * 20 + data[2:]).getpixel((7, 7)) == pytest.approx((255, 0, 0), abs=2)


def test_a_gif_of_endless_comments_is_read_at_once() -> None:
    data, block = picture("GIF", (8, 8)), b"\xff" + b"c" * 255
    at = data.index(b"\x2c", 13 + 6)
    started = time.thread_time()
    assert decode(data[:at] + b"\x21\xfe" + block * 40_000 + b"\0" + data[at:]).getpixel((7, 7)) == (255, 0, 0)
    assert time.thread_time() - started < 1


# ---- no more than is needed


def test_a_large_jpeg_is_decoded_smaller() -> None:
    data = picture("JPEG", (2400, 1800))
    whole, small = open_image(data), open_image(data, side=96)
    assert small.pixels * 4 <= whole.pixels == 2400 * 1800
    assert min(small.decode().size) >= 2 * 96
    assert small.decode().size[0] * 3 == small.decode().size[1] * 4
    for kind, size in (("JPEG", (800, 300)), ("PNG", (2400, 1800))):
        assert open_image(picture(kind, size), side=96).decode().size == size
