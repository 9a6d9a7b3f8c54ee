"""Pictures from strangers: every limit is applied before the work it limits."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Callable
from io import BytesIO

import torch
from PIL import Image, ImageOps

from server.errors import InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.request import PreparedImage
from server.settings import Settings

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT = 100
"""Preprocessing scales the short side up to the model's size; a line of pixels would become gigabytes."""
MAX_SCANS = 64
"""A progressive JPEG pays for its whole area once per scan of 16 bytes; encoders write about ten at most."""


def prepare(source: str | bytes, pixels: Callable[[Image.Image], torch.Tensor], settings: Settings) -> PreparedImage:
    """A data URL or a file's bytes to what the vision tower takes. Raises a 4xx of `server.errors`."""
    data = source if isinstance(source, bytes) else read_data_url(source, settings.max_image_bytes)
    if len(data) > settings.max_image_bytes:
        raise PayloadTooLarge(f"A picture may have at most {settings.max_image_bytes:,} bytes.")
    image = decode(data, settings.max_image_pixels)
    return PreparedImage(pixels(image), digest(image))


def read_data_url(url: str, max_bytes: int) -> bytes:
    head, comma, payload = url.partition(",")
    if head[:5].lower() != "data:":
        raise InvalidRequest("Image URLs are not fetched; send the picture as a data URL, data:image/png;base64,...")
    if not comma or not head.lower().endswith(";base64"):
        raise InvalidRequest("A data URL must be base64: data:image/png;base64,...")
    if len(payload) > (max_bytes + 2) // 3 * 4:
        raise PayloadTooLarge(f"A picture may have at most {max_bytes:,} bytes.")
    return _base64(payload)


def _base64(text: str) -> bytes:
    # In slices: one call over megabytes would hold the interpreter lock, and so the event loop, for tens of milliseconds.
    step = 2**18
    try:
        return b"".join(binascii.a2b_base64(text[i : i + step], strict_mode=True) for i in range(0, len(text), step))
    except ValueError:
        raise InvalidRequest("The picture is not valid base64.", code="invalid_image") from None


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The picture as people see it: upright, on white where it is transparent, RGB."""
    if not _is_supported(data):
        raise UnsupportedMedia("The picture is not a JPEG, PNG or WebP file.")
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)  # reads the header only
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise _too_many_pixels(max_pixels) from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble on
        raise _broken() from error
    _check(image, data, max_pixels)
    try:
        return _upright_rgb(image)
    except Exception as error:
        raise _broken() from error


def _is_supported(data: bytes) -> bool:
    return data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def _check(image: Image.Image, data: bytes, max_pixels: int) -> None:
    """Refuse by the header what would be too much work to decode or has no single picture to show."""
    width, height = image.size
    if width * height > max_pixels:
        raise _too_many_pixels(max_pixels)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise InvalidRequest(f"A picture may be {MAX_ASPECT} times as long as it is wide, no more.", code="invalid_image")
    # Weighed by pixels, so that a phone's JPEG with a short film behind it passes: there the marker occurs by chance.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") * width * height > MAX_SCANS * max_pixels:
        raise PayloadTooLarge("The JPEG has too many scans.")
    # A phone's JPEG may carry a second view ("MPO"); its first frame is the picture.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise InvalidRequest("The picture is animated; send a single frame.", code="invalid_image")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def digest(image: Image.Image) -> str:
    """What caches know the picture by: its size and pixels, since equal bytes may be pictures of different shapes."""
    value = hashlib.sha256(b"%dx%d:" % image.size)
    value.update(image.tobytes())
    return value.hexdigest()


def _broken() -> InvalidRequest:
    return InvalidRequest("The picture is broken or cut short.", code="invalid_image")


def _too_many_pixels(limit: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"A picture may have at most {limit:,} pixels.")
