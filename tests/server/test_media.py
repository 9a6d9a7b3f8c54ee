"""Pictures in a request: data URLs, the server's limits, and what each refusal is in HTTP."""

from __future__ import annotations

import base64
import binascii
import threading
import time
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from server import media
from server.errors import EspalierError, InvalidRequest, PayloadTooLarge, UnsupportedMedia
from server.reading import SHORT, SLICE, parsing
from server.settings import Settings
from tests.server.fake_engine import FakePreprocessor, data_url, picture, png_header


def prepare(source: str | bytes, **limits: Any) -> tuple[Image.Image, str]:
    """What the vision tower would see, and the digest."""
    opened = media.open_all([("image", source)], preprocessor := FakePreprocessor(), Settings(**limits))
    (image,) = media.decode_all(opened, preprocessor)
    return preprocessor.seen[0], image.digest


def test_a_file_and_its_data_url_are_the_same_picture() -> None:
    data = picture(size=(7, 5))
    (one, first), (other, second) = prepare(data), prepare(data_url(data))
    assert (one.mode, one.size, first) == ("RGB", (7, 5), second)
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(
    ("data", "refusal", "code"),
    [
        (picture("BMP"), UnsupportedMedia, "unsupported_media"),
        (png_header(20_000, 20_000), PayloadTooLarge, "payload_too_large"),
        (picture()[:40], InvalidRequest, "invalid_image"),
    ],
)
def test_what_the_decoder_refuses_is_a_4xx(data: bytes, refusal: type[EspalierError], code: str) -> None:
    with pytest.raises(refusal) as caught:
        prepare(data)
    assert caught.value.code == code


def test_a_data_url_may_be_long_and_of_any_type() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    payload = base64.b64encode(file.getvalue()).decode()
    assert len(payload) > 2**20
    image, _ = prepare(f"DATA:text/plain;charset=x;BASE64,{payload}")
    assert (np.asarray(image) == noise).all()


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
        ("data:image/png;base64,abcde", "not valid base64"),
        ("data:image/png;base64,QUI=QUJD", "not valid base64"),
        ("data:image/png;base64,é", "not valid base64"),
    ],
)
def test_urls_that_are_no_data(url: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        prepare(url)


def test_base64_may_be_written_as_people_do() -> None:
    data = bytes(range(256))
    padded, lines = base64.b64encode(data).decode(), base64.encodebytes(data).decode()
    assert padded.endswith("=") and {"+", "/"} <= {*padded}
    safe = base64.urlsafe_b64encode(data).decode()
    for payload in (padded, padded.rstrip("="), lines, lines.replace("\n", "\r\n"), f" {padded}", safe, safe.rstrip("=")):
        assert media.read_data_url(f"data:image/png;base64,{payload}", 1000) == data
    assert media.read_data_url(f"data:image/png; base64, {padded}", 1000) == data


@pytest.mark.parametrize("size", [SLICE * 3 // 4 + extra for extra in range(-4, 5)])
def test_base64_in_slices_is_whole(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    padded = base64.b64encode(data).decode()
    for payload in (padded, padded.rstrip("="), base64.encodebytes(data).decode(), f"{padded}====", f"{padded}\n\n"):
        assert media.read_data_url(f"data:;base64,{payload}", size) == data


def test_no_more_base64_is_read_than_a_picture_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(text: bytes, **options: bool) -> bytes:
        read.append(len(text))
        return binascii.a2b_base64(text, **options)

    monkeypatch.setattr(media, "binascii", SimpleNamespace(a2b_base64=counted))
    with pytest.raises(PayloadTooLarge):
        media.read_data_url("data:;base64," + "a" * 20 * SLICE, 2 * SLICE)
    assert sum(read) <= 3 * SLICE


def test_long_base64_is_read_in_turn() -> None:
    url, ended = "data:;base64," + "a" * 2 * SHORT, threading.Event()

    def read() -> None:
        media.read_data_url(url, SLICE)
        ended.set()

    thread = threading.Thread(target=read)
    with parsing(url):
        thread.start()
        assert not ended.wait(0.1)
        media.read_data_url("data:;base64,aaaa", SLICE)  # a short one has no turn to wait for
    assert ended.wait(30)
    thread.join()


def test_the_digest_is_of_what_is_seen() -> None:
    files = [picture("PNG"), picture("PNG", compress_level=0), picture("WEBP", lossless=True)]
    assert len({prepare(data)[1] for data in files}) == 1
    assert len({prepare(picture(size=size))[1] for size in ((2, 8), (8, 2), (4, 4))}) == 3


# ---- budgets


def test_all_headers_are_read_before_a_picture_is_decoded() -> None:
    preprocessor, sources = FakePreprocessor(), [("first", picture()), ("second", png_header(3000, 3000)), ("third", b"no picture")]
    with pytest.raises(PayloadTooLarge) as caught:
        media.open_all(sources, preprocessor, Settings(max_request_pixels=16 + 3000 * 3000 - 1))
    assert caught.value.param == "second" and not preprocessor.seen
    with pytest.raises(UnsupportedMedia) as unknown:
        media.open_all(sources, preprocessor, Settings())
    assert unknown.value.param == "third" and not preprocessor.seen


def test_pixels_in_flight_are_bounded() -> None:
    budget, inside, most = media.PixelBudget(100), [0], [0]

    def decode(pixels: int) -> None:
        with budget.hold(pixels):
            inside[0] += min(pixels, 100)
            most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            inside[0] -= min(pixels, 100)

    threads = [threading.Thread(target=decode, args=(pixels,)) for pixels in (60, 30, 1000, 60, 10, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert 60 <= most[0] <= 100 and inside[0] == 0
