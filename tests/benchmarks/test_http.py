"""The HTTP benchmark on a stand-in server."""

from __future__ import annotations

import base64
import json
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from threading import Thread
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image
from typer.testing import CliRunner

from benchmarks import http
from espalier import app


class Stub:
    """Answers like a server: the first request is refused, `broken` is no level, `lost` ends before its answer does."""

    def __init__(self) -> None:
        self.levels: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/chat/completions")(self.chat)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": []}

    async def chat(self, request: Request) -> Response:
        level = request.headers["x-pruning-level"]
        self.levels.append(level)
        self.asked.append(await request.json())
        if len(self.levels) == 1:
            return JSONResponse({"error": {}}, 429, {"Retry-After": "0"})
        if level == "broken":
            return JSONResponse({"error": {}}, 400)
        return StreamingResponse(self.stream(level), media_type="text/event-stream")

    async def stream(self, level: str) -> Any:
        for delta in ({"role": "assistant", "content": ""}, {"content": "a red"}, {"content": " star"}):
            yield self.event({"choices": [{"index": 0, "delta": delta}], "usage": None})
        yield ": still here\n\n"
        if level == "failed":
            yield self.event({"error": {"message": "no"}})
        elif level != "lost":
            yield self.event({"choices": [], "usage": {"completion_tokens": 3}})
            yield "data: [DONE]\n\n"

    def event(self, data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data)}\n\n"


@contextmanager
def serving(app: FastAPI) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="off"))
        thread = Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def test_http_benchmark_end_to_end(capsys):
    stub = Stub()
    with serving(stub.app) as url:
        document = http.run(url, 3, 12, "off=1, strong=2,broken", 7, quiet=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == document
    assert "1 × 429" in printed.err
    assert document["answered"] == 9
    assert document["errors"] == {"400": 3, "429": 1}
    assert {name: level["answered"] for name, level in document["levels"].items()} == {"off": 3, "strong": 6}
    for part in (document, *document["levels"].values()):
        assert part["requests_per_s"] > 0
        assert part["tokens_per_s"] == pytest.approx(3 * part["requests_per_s"], rel=1e-2)
    for level in document["levels"].values():
        e2e = level["e2e_s"]
        assert 0 < level["ttft_s"]["p50"] <= e2e["p50"] <= e2e["p95"] <= e2e["p99"]
    assert sorted(stub.levels[1:]) == sorted(3 * ["off"] + 6 * ["strong"] + 3 * ["broken"])
    bodies = [json.dumps(body) for body in stub.asked]
    assert len(set(bodies)) == 12  # each picture and question is another, and the refused one came back
    image, text = stub.asked[0]["messages"][0]["content"]
    picture = Image.open(BytesIO(base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert picture.size == (96, 96)
    assert text["text"]
    assert (stub.asked[0]["max_tokens"], stub.asked[0]["stream"]) == (7, True)


def test_answers_that_break_off_are_errors(capsys):
    stub = Stub()
    with serving(stub.app) as url:
        document = http.run(url, 1, 5, "lost=2,failed=2,off=1", 7, quiet=True)
    assert document["errors"] == {"429": 1, "cut short": 2, "error in stream": 2}
    assert list(document["levels"]) == ["off"]
    assert not capsys.readouterr().err


def test_a_server_that_always_refuses_is_given_up(monkeypatch, capsys):
    app = FastAPI()
    app.get("/v1/models")(lambda: {})
    app.post("/v1/chat/completions")(lambda: JSONResponse({}, 429, {"Retry-After": "0"}))
    monkeypatch.setattr(http, "TRIES", 3)
    with serving(app) as url:
        document = http.run(url, 2, 2, "off", 7, quiet=False)
    assert (document["answered"], document["errors"], document["levels"]) == (0, {"429": 6}, {})


def test_no_server_is_a_plain_error():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match="no server answers at http://127"):
        http.run(f"http://127.0.0.1:{port}", 1, 1, "off", 1, quiet=True)
    with pytest.raises(ConnectionError, match="no server answers"):
        http.run("localhost:8000", 1, 1, "off", 1, quiet=True)
    with pytest.raises(ValueError, match="Invalid port"):
        http.run("http://localhost:port", 1, 1, "off", 1, quiet=True)
    with serving(FastAPI()) as url, pytest.raises(ConnectionError, match="answers GET /v1/models with 404"):
        http.run(url, 1, 1, "off", 1, quiet=True)


def test_without_httpx_it_says_which_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx", None)
    monkeypatch.delitem(sys.modules, "benchmarks.http")
    result = CliRunner().invoke(app, ["bench", "http"])
    assert (result.exit_code, "pip install -e '.[bench]'" in result.output) == (1, True)


def test_the_mix_of_levels():
    assert http.parse_mix("off=1, strong=30,auto") == {"off": 1, "strong": 30, "auto": 1}


@pytest.mark.parametrize("levels", ["", "off=", "off=0", "off=x", "=1", "off,,strong", "off=-1", "off=1.5", "a=1=1"])
def test_a_mix_that_makes_no_sense_is_refused(levels):
    with pytest.raises(ValueError, match="such as off=1,strong=3"):
        http.parse_mix(levels)


def test_percentiles_are_values_that_were_measured():
    assert http.percentiles([3.0, 1.0, 2.0, 4.0]) == {"p50": 2.0, "p95": 4.0, "p99": 4.0}
    assert http.percentiles([5.0]) == {"p50": 5.0, "p95": 5.0, "p99": 5.0}
