"""Pictures of a request: data URLs and uploaded files to what the vision tower takes, within the server's limits."""

from __future__ import annotations

import binascii
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image

from models.families import Layout
from models.image_limits import MAX_PIXELS
from models.images import ImageError, ImageFile, open_image
from models.preprocess import Preprocessor
from server.caller import CALLER
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.reading import SLICE, check_wanted, parsing
from server.request import PreparedImage
from server.settings import Settings

ImageSource = tuple[str, str | bytes]
"""A picture's place in the body, for error messages, and its data URL or file."""


class PixelBudget:
    """Pixels that all threads together may decode at once; whoever asks for more waits for the others to end."""

    def __init__(self, pixels: int) -> None:
        self._pixels, self._used, self._changed = pixels, 0, threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until so many are free, or all; one picture always fits."""
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._used + pixels <= self._pixels)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


MAX_HEAD = 256
STANDARD, BLANKS = bytes.maketrans(b"-_", b"+/"), b" \t\r\n\f\v"
"""Base64's other alphabet, and what may stand between its characters."""
IN_FLIGHT = PixelBudget(MAX_PIXELS)
"""About ten bytes a pixel while a picture is turned, laid on white and scaled. The largest come one by one: decoders that run at
once take the cores from the engine."""


@dataclass(frozen=True)
class OpenedImage:
    """A picture whose header is read: its place in the body, and how its visual tokens will lie."""

    place: str
    file: ImageFile
    layout: Layout


def open_all(sources: Sequence[ImageSource], preprocessor: Preprocessor, settings: Settings) -> list[OpenedImage]:
    """Read the headers of data URLs and files. Raises a 4xx of `server.errors` that names the place."""
    opened, pixels, alone = [], 0, len(sources) == 1
    left = settings.max_body_bytes  # for what is fetched: no more than a body could have brought
    for place, source in sources:
        with _at(place):
            if isinstance(source, str) and settings.allow_image_hosts and _is_web(source):
                source = _fetch(source, min(left, settings.max_image_bytes), settings)
                left -= len(source)
            file = _open(source, preprocessor.image_side, settings)
            if (pixels := pixels + file.pixels) > settings.max_request_pixels:
                raise PayloadTooLarge(f"A request's pictures may have at most {settings.max_request_pixels:,} pixels together.")
            opened.append(OpenedImage(place, file, preprocessor.layout(*file.size, alone=alone)))
    return opened


def decode_all(opened: Sequence[OpenedImage], preprocessor: Preprocessor) -> list[PreparedImage]:
    """Pictures as the vision tower takes them. Raises a 4xx of `server.errors` that names the place."""
    images = []
    for one in opened:
        check_wanted()
        with _at(one.place), IN_FLIGHT.hold(one.file.pixels):
            image = one.file.decode()
            images.append(PreparedImage(preprocessor.picture(image, alone=len(opened) == 1), digest(image)))
    return images


def _is_web(url: str) -> bool:
    return url[:8].lower().startswith(("http://", "https://"))


def _fetch(url: str, max_bytes: int, settings: Settings) -> bytes:
    from server.fetch import fetch, policy_for  # its packages are an extra

    check_wanted()
    return fetch(url, policy_for(settings.allow_image_hosts), max_bytes)


def _open(source: str | bytes, side: int, settings: Settings) -> ImageFile:
    data = source if isinstance(source, bytes) else read_data_url(source, settings.max_image_bytes)
    if len(data) > settings.max_image_bytes:
        raise PayloadTooLarge(f"A picture may have at most {settings.max_image_bytes:,} bytes.")
    return open_image(data, settings.max_image_pixels, side)


@contextmanager
def _at(place: str) -> Iterator[None]:
    """Refusals of a picture name its place."""
    try:
        yield
    except ImageError as error:
        refused = refusal(error)
        refused.param = place
        raise refused from error
    except EspalierError as error:
        error.param = place
        raise


def refusal(error: ImageError) -> EspalierError:
    """What HTTP says about a picture that the decoder refuses."""
    if error.reason == "format":
        return UnsupportedMedia(str(error))
    if error.reason == "size":
        return PayloadTooLarge(str(error))
    return InvalidRequest(str(error), code="invalid_image")


def read_data_url(url: str, max_bytes: int) -> bytes:
    """The bytes of a base64 data URL, in either alphabet, with or without padding and line breaks."""
    head, comma, _ = url[:MAX_HEAD].partition(",")
    start, head = len(head) + 1, "".join(head.lower().split())
    if not head.startswith("data:"):
        raise InvalidRequest("Such URLs are not fetched; send the picture as a data URL, data:image/png;base64,...")
    if not comma or not head.endswith(";base64"):
        raise InvalidRequest("A data URL must be base64: data:image/png;base64,...")
    try:
        with parsing(url):
            return _base64(url, start, max_bytes)
    except ValueError:
        raise InvalidRequest("The picture is not valid base64.", code="invalid_image") from None


def _base64(url: str, start: int, max_bytes: int) -> bytes:
    """What stands from `start` on, up to two bytes more than `max_bytes`. Raises ValueError and PayloadTooLarge."""
    pieces, left, rest = [], (max_bytes + 2) // 3 * 4, b""
    for at in range(start, len(url), SLICE):
        rest += url[at : at + SLICE].encode("ascii").translate(STANDARD, BLANKS)
        if at + SLICE >= len(url):
            rest = rest.rstrip(b"=")
            rest += b"=" * (-len(rest) % 4)
        piece, rest = rest[: len(rest) // 4 * 4], rest[len(rest) // 4 * 4 :]
        if (left := left - len(piece)) < 0:
            raise PayloadTooLarge(f"A picture may have at most {max_bytes:,} bytes.")
        pieces.append(binascii.a2b_base64(piece, strict_mode=True))
    return b"".join(pieces)


def digest(image: Image.Image) -> str:
    """What caches know the picture by: its size and pixels, since equal bytes may be pictures of different shapes; and whose key
    asked, so that nobody can tell by the time whether another has sent it."""
    value = hashlib.sha256(b"%s:%dx%d:" % (CALLER.get().tenant.encode(), *image.size))
    rows = max(1, SLICE // image.width)
    for top in range(0, image.height, rows):
        value.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
    return value.hexdigest()
