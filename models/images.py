"""The one picture decoder, for the server, calibration and training: upright, transparency on white, 8-bit RGB.

Pictures may come from strangers, so every limit is applied before the work that it limits.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from PIL import ExifTags, Image, ImageOps, features

from models.image_limits import MAX_PIXELS
from models.image_metadata import PNG, without_metadata

FORMATS = ("JPEG", "PNG", "WebP", "GIF", *(("AVIF",) if features.check("avif") else ()))
"""What is read: of a GIF its first frame, and AVIF where Pillow was built with it."""
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
    """The picture in a file of one of FORMATS, as people see it. Raises ImageError."""
    return open_image(data, max_pixels).decode()


@dataclass(frozen=True)
class ImageFile:
    """A picture whose header is read and accepted. `pixels` is what decoding it will cost."""

    image: Image.Image
    pixels: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture as people see it."""
        width, height = self.image.size
        with suppress(Exception):
            # Not PngImageFile's own, which decodes the picture to look behind it.
            if Image.Image.getexif(self.image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
                return width, height
        return height, width

    def decode(self) -> Image.Image:
        """The picture as people see it. Raises ImageError."""
        try:
            return _upright_rgb(self.image)
        except Exception as error:
            raise _broken() from error


def open_image(data: bytes, max_pixels: int = MAX_PIXELS, side: int | None = None) -> ImageFile:
    """Read a picture's header. A JPEG whose short side is four times `side` or more is decoded smaller, to no less than twice
    `side`: what is read of it is the same, in a fraction of the time. Raises ImageError for what is no picture or too large."""
    kind = _format(data)
    if kind is None:
        raise ImageError("format", f"The picture is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file.")
    data = without_metadata(data, kind)
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)  # reads the header only
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):  # the latter where warnings are errors
        raise _too_many_pixels(max_pixels) from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble on
        raise _broken() from error
    _check(image, data, max_pixels)
    full = image.width * image.height
    if kind == "JPEG" and side and min(image.size) >= 4 * side:
        image.draft(image.mode, (2 * side, 2 * side))
    return ImageFile(image, max(image.width * image.height, full // 4))


def _format(data: bytes) -> str | None:
    """Which of FORMATS the file is, by its first bytes."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(PNG):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    return "AVIF" if data[4:12] in (b"ftypavif", b"ftypavis") and "AVIF" in FORMATS else None


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
    if getattr(image, "is_animated", False):
        raise ImageError("content", "The picture is animated; send a single frame.")


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    with suppress(Exception):  # which way is up is no reason to refuse a picture
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
