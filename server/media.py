"""Pictures of a request: data URLs and uploaded files to what the vision tower takes, within the server's limits."""

from __future__ import annotations

import binascii
import hashlib
from collections.abc import Callable

from PIL import Image

from models.images import ImageError, decode
from models.preprocess import Picture
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.request import PreparedImage
from server.settings import Settings


def prepare(source: str | bytes, picture: Callable[[Image.Image], Picture], settings: Settings) -> PreparedImage:
    """A data URL or a file's bytes to what the vision tower takes. Raises a 4xx of `server.errors`."""
    data = source if isinstance(source, bytes) else read_data_url(source, settings.max_image_bytes)
    if len(data) > settings.max_image_bytes:
        raise PayloadTooLarge(f"A picture may have at most {settings.max_image_bytes:,} bytes.")
    try:
        image = decode(data, settings.max_image_pixels)
    except ImageError as error:
        raise refusal(error) from error
    return PreparedImage(picture(image), digest(image))


def refusal(error: ImageError) -> EspalierError:
    """What HTTP says about a picture that the decoder refuses."""
    if error.reason == "format":
        return UnsupportedMedia(str(error))
    if error.reason == "size":
        return PayloadTooLarge(str(error))
    return InvalidRequest(str(error), code="invalid_image")


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URL, in either alphabet, with or without padding and line breaks."""
    head, comma, payload = url.partition(",")
    head = "".join(head.lower().split())
    if not head.startswith("data:"):
        raise InvalidRequest("Image URLs are not fetched; send the picture as a data URL, data:image/png;base64,...")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("A data URL must be base64: data:image/png;base64,...")
    payload = "".join(payload.split()).rstrip("=").replace("-", "+").replace("_", "/")
    if len(payload) > (max_bytes * 4 + 2) // 3:
        raise PayloadTooLarge(f"A picture may have at most {max_bytes:,} bytes.")
    return _base64(payload + "=" * (-len(payload) % 4))


def _base64(text: str) -> bytes:
    # In slices: one call over megabytes would hold the interpreter lock, and so the event loop, for tens of milliseconds.
    step = 2**18
    try:
        return b"".join(binascii.a2b_base64(text[i : i + step], strict_mode=True) for i in range(0, len(text), step))
    except ValueError:
        raise InvalidRequest("The picture is not valid base64.", code="invalid_image") from None


def digest(image: Image.Image) -> str:
    """What caches know the picture by: its size and pixels, since equal bytes may be pictures of different shapes."""
    value = hashlib.sha256(b"%dx%d:" % image.size)
    value.update(image.tobytes())
    return value.hexdigest()
