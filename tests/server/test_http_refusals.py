"""Bad input, refusals and failures over HTTP: a clear error, nothing held, and the next request works."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from python_multipart.multipart import FormParser

from models.checkpoint import Checkpoint
from server.errors import Overloaded, ShuttingDown
from server.reading import SLICE
from server.request import Failed
from server.schemas import ChatRequest
from tests.server.client import PICTURE, QUESTION, ask, body, check_error, connect, events, image_part
from tests.server.client import client as client  # fixtures
from tests.server.client import engine as engine
from tests.server.fake_engine import FakeEngine, data_url, picture, png_header
from tests.server.tiny import drain, new_engine, submit
from tests.server.tiny import tiny_checkpoint as tiny_checkpoint  # a fixture

pytestmark = pytest.mark.anyio


# ---- bad input: a clear 4xx, and the next request works

TRUNCATED = data_url(picture("JPEG", (16, 16))[:-200])
TEXT_PART = {"type": "text", "text": QUESTION}
BAD: dict[str, tuple[Any, int, str | None]] = {
    "no JSON": (b"{", 400, None),
    "no object": (b"[1]", 400, None),
    "no UTF-8": (b'{"model": "\xff"}', 400, None),
    "nesting": (b"[" * 50_000, 400, None),
    "nesting in a text": (body(logit_bias="[" * 50_000), 400, "logit_bias"),
    "no messages": ({"model": "fake-llava"}, 400, "messages"),
    "empty messages": ({"messages": []}, 400, "messages"),
    "empty text": (body(text=" "), 400, "messages"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, 400, "messages[0].role"),
    "refused roles": ({"messages": [{"role": "assistant", "content": "x"}, *body()["messages"]]}, 400, "messages"),
    "picture by the assistant": (
        {"messages": [*body()["messages"], {"role": "assistant", "content": [image_part()]}]}, 400, "messages[1].content[0]",
    ),
    "broken picture": (body(image_part(TRUNCATED)), 400, "messages[0].content[0].image_url.url"),
    "no picture": (body(image_part(data_url(b"hello"))), 415, "messages[0].content[0].image_url.url"),
    "huge header": (body(image_part(data_url(png_header(20_000, 20_000)))), 413, "messages[0].content[0].image_url.url"),
    "BMP": (body(image_part(data_url(picture("BMP")))), 415, "messages[0].content[0].image_url.url"),
    "no base64": (body(image_part("data:image/png;base64,?")), 400, "messages[0].content[0].image_url.url"),
    "web address": (body(image_part("http://example.com/a.png")), 400, "messages[0].content[0].image_url.url"),
    "file": (body(image_part("file:///etc/passwd")), 400, "messages[0].content[0].image_url.url"),
    "1,000 pictures": (body(*[image_part()] * 1000), 413, "messages[0].content[16].image_url.url"),
    "long prompt": (body(text="word " * 3000), 400, "messages"),
    "longer prompt": (body(text="word " * 300_000), 400, "messages"),
    "many escapes": (b'{"messages": "%b"}' % (rb"\u0061" * 1_100_000), 413, None),
    "many values": (body(metadata=[{}] * 200_000), 413, None),
    "many pixels": (body(*[image_part(data_url(png_header(7680, 4320)))] * 5), 413, "messages[0].content[4].image_url.url"),
    "long prompt with pictures": (
        body(*[image_part(data_url(png_header(7680, 4320)))] * 4, text="word " * 1990), 400, "messages",
    ),
    "NaN": (body(temperature=float("nan")), 400, "temperature"),
    "infinity": (json.dumps(body()).replace('"model"', '"top_p": 1e999, "model"').encode(), 400, "top_p"),
    "text for a number": (body(max_tokens="many"), 400, "max_tokens"),
    "top_logprobs alone": (body(top_logprobs=3), 400, "top_logprobs"),
    "unknown level": (body(pruning={"level": "x"}), 400, "pruning.level"),
    "another route's limit": (body(max_output_tokens=1), 400, "max_output_tokens"),
    "another route's form": ({**body(), "text": {"format": {"type": "json_object"}}}, 400, "text"),
    "another route's pictures": (body(images=["x"]), 400, "images"),
    "tiny penalty": (body(repetition_penalty=1e-45), 400, "repetition_penalty"),
    "older call": ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, 400, "messages[0]"),
    "unknown model": (body(model="gpt-4o"), 404, "model"),
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", BAD)
async def test_bad_input(client: httpx.AsyncClient, engine: FakeEngine, name: str, stream: bool) -> None:
    payload, status, param = BAD[name]
    if isinstance(payload, dict):
        payload = json.dumps(payload | {"stream": stream}).encode()
    response = await client.post("/v1/chat/completions", content=payload)
    error = check_error(response, status)
    assert error["param"] == param
    assert len(error["message"]) < 500
    assert not engine.submitted
    reason = error["code"] or error["type"]
    assert f'espalier_rejections_total{{reason="{reason}"}} 1.0' in (await client.get("/metrics")).text
    assert (await ask(client)).status_code == 200


async def test_a_picture_of_one_pixel_is_a_picture(client: httpx.AsyncClient) -> None:
    assert (await ask(client, body(image_part(data_url(picture(size=(1, 1))))))).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/vqa"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_is_bounded(engine: FakeEngine, path: str, chunked: bool) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100
            yield b" " * 100

    async with connect(engine, max_body_bytes=1000) as client:
        content = chunks() if chunked else b" " * 1001
        check_error(await client.post(path, content=content), 413)
        assert sent <= 1200
        files = {"image": ("a.png", b"\0" * 2000, "image/png")}
        check_error(await client.post("/v1/vqa", files=files, data={"question": QUESTION}), 413)
        assert (await ask(client)).status_code == 200


async def test_a_gzip_body_is_read_within_the_same_bound(engine: FakeEngine) -> None:
    packed = gzip.compress(json.dumps(body(image_part())).encode())
    bomb = gzip.compress(b" " * 3_000_000)
    bad = {"bomb": (bomb, 413), "cut": (packed[:-9], 400), "no gzip": (b"{}", 400), "more": (packed + b"x", 400)}

    async def pieces(data: bytes) -> AsyncIterator[bytes]:
        for i in range(0, len(data), 100):
            yield data[i : i + 100]

    async with connect(engine, max_body_bytes=20_000) as client:
        for content in (packed, pieces(packed)):
            response = await client.post("/v1/chat/completions", content=content, headers={"Content-Encoding": "gzip"})
            assert response.status_code == 200, response.text
        for name, (data, status) in bad.items():
            response = await client.post("/v1/chat/completions", content=data, headers={"Content-Encoding": "gzip"})
            assert check_error(response, status), name
        response = await client.post("/v1/chat/completions", content=packed, headers={"Content-Encoding": "br"})
        assert "br" in check_error(response, 415)["message"]


@pytest.mark.parametrize("more", [b"\0" * 100, b"", gzip.compress(b"")], ids=["zeros", "nothing", "another"])
async def test_what_follows_a_gzip_body_is_not_read(engine: FakeEngine, more: bytes) -> None:
    """zlib would keep all of it, and count none."""
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        yield gzip.compress(json.dumps(body()).encode())
        for _ in range(100):
            sent += 1
            yield more

    async with connect(engine, max_body_bytes=2000) as client:
        response = await client.post("/v1/chat/completions", content=pieces(), headers={"Content-Encoding": "gzip"})
    if more:
        check_error(response, 400)
        assert sent <= 2
    else:
        assert response.status_code == 200


async def test_empty_pieces_of_gzip_count_as_sent(engine: FakeEngine) -> None:
    sent, packer = 0, zlib.compressobj(wbits=31)

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(10_000):
            sent += len(block := packer.flush(zlib.Z_FULL_FLUSH) or b"\0\0\0\xff\xff")
            yield block

    async with connect(engine, max_body_bytes=1000) as client:
        headers = {"Content-Encoding": "gzip"}
        check_error(await client.post("/v1/chat/completions", content=pieces(), headers=headers), 413)
    assert sent <= 1100


async def test_a_byte_order_mark_is_no_fault(client: httpx.AsyncClient) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(body(image_part())).encode()
    assert (await client.post("/v1/chat/completions", content=content)).status_code == 200


async def test_a_form_of_very_many_parts_is_refused(client: httpx.AsyncClient) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    check_error(await client.post("/v1/vqa", content=b"\r\n--bx" * 2_000, headers=headers), 413)
    part = b'--b\r\nContent-Disposition: form-data; name="question"\r\n\r\n'
    for cut in (part, part[:-5], b"--b\r\n\r\na\r\n--b--\r\n"):
        check_error(await client.post("/v1/vqa", content=cut, headers=headers), 400)


@pytest.mark.parametrize("head", [b'name="image"; filename="a.png"', b'name="question"'])
async def test_a_long_part_of_a_form_is_left(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, head: bytes) -> None:
    read = []

    def counted(self: FormParser, data: bytes) -> int:
        read.append(len(data))
        return write(self, data)

    write = FormParser.write
    monkeypatch.setattr(FormParser, "write", counted)
    part = b"--b\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    async with connect(engine, max_image_bytes=3 * SLICE) as client:
        long = part % (head, b"\r\n--" * 4 * SLICE)
        check_error(await client.post("/v1/vqa", content=long + b"--b--", headers=headers), 413)
        assert sum(read) <= 6 * SLICE
        short = b"".join([part % (head, b"a" * 2 * SLICE)] * 4)  # it is no sum
        check_error(await client.post("/v1/vqa", content=short + b"--b--", headers=headers), 400)


@pytest.mark.parametrize("name", ["messages", "logit_bias", "tools", "guided_choice", "stop_token_ids"])
def test_only_the_first_of_many_faults_is_looked_for(name: str) -> None:
    """To list tens of thousands holds the interpreter for a second."""
    many: Any = {str(i): "x" for i in range(60_000)} if name == "logit_bias" else ["x"] * 60_000
    with pytest.raises(ValidationError) as faults:
        ChatRequest.model_validate({**body(), name: many})
    assert faults.value.error_count() <= 2


# ---- refusals and failures


async def test_overload_says_when_to_come_back(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusals = [Overloaded("The queue is full.", 2.2), Overloaded("The queue is full.", 0.03)]
    response = await ask(client)
    assert check_error(response, 429)["type"] == "rate_limit_error"
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("3", "2200")
    response = await ask(client)
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "30")
    assert 'espalier_rejections_total{reason="overloaded"} 2.0' in (await client.get("/metrics")).text


@pytest.mark.parametrize(
    ("path", "payload"),
    [
        ("/v1/chat/completions", body(image_part())),
        ("/v1/completions", {"prompt": "A red star"}),
        ("/v1/responses", {"input": "A red star?"}),
        ("/v1/vqa", {"image": PICTURE, "question": "What color?"}),
    ],
)
async def test_a_full_server_refuses_before_it_reads(engine: FakeEngine, path: str, payload: dict[str, Any]) -> None:
    engine.full = Overloaded("The queue is full.", 2.0)
    async with connect(engine) as client:
        response = await client.post(path, json=payload)
    check_error(response, 429)
    assert not engine.preprocessor.seen and not engine.preprocessor.turns and not engine.submitted


async def test_draining_is_a_503(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.refusals = [ShuttingDown("The server is shutting down.")]
    response = await ask(client)
    assert check_error(response, 503)["code"] == "shutting_down"
    assert int(response.headers["retry-after"]) >= 1


async def test_the_choices_of_a_reply_are_taken_together(tiny: Checkpoint) -> None:
    """Also where the queue, at the pace of late, is shorter than they are many; and none of them where it is full."""
    engine = new_engine(tiny, max_running=1, max_wait_s=1)
    engine.scheduler._pace.observe(100.0, 1)
    payload = body(image_part(), n=3, max_tokens=2, model=engine.model_name)
    async with connect(engine) as client:
        waiting = submit(engine)
        check_error(await ask(client, payload), 429)
        drain(engine)
        assert waiting[1].finished
        engine.start()
        assert len((await ask(client, payload)).json()["choices"]) == 3
    assert engine.stop()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_500(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.failure = Failed("This request failed.")
    error = check_error(await ask(client, body(image_part(), stream=stream)), 500)
    assert (error["message"], error["code"]) == ("This request failed.", "engine_failure")
    engine.failure = None
    assert (await ask(client)).status_code == 200


async def test_a_failure_in_the_middle(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.failure, engine.fail_after = Failed("This request failed."), 3
    check_error(await ask(client), 500)
    *chunks, error = events((await ask(client, body(image_part(), stream=True))).text)
    assert len(chunks) == 3
    assert error["error"]["message"] == "This request failed."


@pytest.mark.parametrize("stream", [False, True])
async def test_one_failed_choice_frees_the_others(client: httpx.AsyncClient, engine: FakeEngine, stream: bool) -> None:
    engine.failure, engine.fail_after, engine.hold_after = Failed("This request failed."), 1, 3
    response = await ask(client, body(image_part(), n=3, stream=stream))
    assert response.status_code == (200 if stream else 500)
    assert "This request failed." in response.text
    assert engine.aborted == [request.id for request in engine.submitted[1:]]


async def test_a_bug_is_logged_and_told_without_details(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.refusals = [ZeroDivisionError("secret")]
    response = await ask(client, headers={"X-Request-Id": "my-id"})
    assert check_error(response, 500)["type"] == "server_error"
    assert response.headers["x-request-id"] == "my-id"
    assert "secret" not in response.text
    assert "ZeroDivisionError: secret" in caplog.text
    assert "my-id" in caplog.text


async def test_routes_and_methods_that_do_not_exist(client: httpx.AsyncClient) -> None:
    assert check_error(await client.get("/v1/nothing"), 404)["code"] == "not_found"
    response = await client.get("/v1/chat/completions")
    assert check_error(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
