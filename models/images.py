"""The one picture decoder, for the server, calibration and training: upright, transparency on white, 8-bit RGB.

Pictures may come from strangers, so every limit is applied before the work that it limits.
"""

from __future__ import annotations

from io import BytesIO
from typing import Literal

from PIL import Image, ImageOps

from models.image_limits import MAX_PIXELS

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_ASPECT = 100
"""Preprocessing scales the short side up to the model's size; a line of pixels would become gigabytes."""
MAX_SCANS = 64
"""A progressive JPEG pays for its whole area once per scan of 16 bytes; encoders write about ten at most."""

Reason = Literal["format", "size", "content"]


class ImageError(ValueError):
    """The picture is refused: its `reason` is its format, its size, or its content (broken, animated, too narrow)."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in a JPEG, PNG or WebP file, as people see it. Raises ImageError."""
    if not _is_supported(data):
        raise ImageError("format", "The picture is not a JPEG, PNG or WebP file.")
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
        raise ImageError("content", f"A picture may be {MAX_ASPECT} times as long as it is wide, no more.")
    # Weighed by pixels, so that a phone's JPEG with a short film behind it passes: there the marker occurs by chance.
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") * width * height > MAX_SCANS * max_pixels:
        raise ImageError("size", "The JPEG has too many scans.")
    # A phone's JPEG may carry a second view ("MPO"); its first frame is the picture.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ImageError("content", "The picture is animated; send a single frame.")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to white
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _broken() -> ImageError:
    return ImageError("content", "The picture is broken or cut short.")


def _too_many_pixels(limit: int) -> ImageError:
    return ImageError("size", f"A picture may have at most {limit:,} pixels.")
