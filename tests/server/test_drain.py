"""SIGTERM under load: what ends within the grace period is answered, the rest is told, and the exit status says which."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import uvicorn

from server import run
from server.served import Served
from tests.server.client import body, image_part
from tests.server.fake_engine import FakeEngine
from tests.server.scripted import scripted_server
from tests.server.tiny import write

SERVE = """
import sys, time
from server import engine, run
from server.settings import Settings

step = engine.Engine.step

def slow(self):
    time.sleep(0.02)
    step(self)

engine.Engine.step = slow
run.run(Settings(checkpoint=sys.argv[1], port=0, shutdown_grace_s=int(sys.argv[2]), kv_tokens=8000))
"""
CLIENTS = 16


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("drained") / "tiny-llava")


@pytest.fixture
def server(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with scripted_server(SERVE, checkpoint, request.param) as serving:
        yield serving


def ask(url: str, stream: bool, max_tokens: int, begun: Event) -> tuple[int, str]:
    """`begun` is set once a stream has."""
    payload = body(image_part(), model=None, max_tokens=max_tokens, ignore_eos=True, stream=stream)
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=payload, timeout=60) as reply:
        if stream:
            begun.set()
        reply.read()
    return reply.status_code, reply.text


def ask_and_stop(process: subprocess.Popen[str], url: str, max_tokens: int, signals: int) -> list[tuple[int, str]]:
    """What 16 clients got, half of them streams, half of which wait, when the signal came once all had been accepted and a stream
    had begun."""
    begun = Event()
    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask, url, bool(number % 2), max_tokens, begun) for number in range(CLIENTS)]
        while accepted(url) < CLIENTS:
            pass
        assert begun.wait(60)
        for _ in range(signals):
            process.send_signal(signal.SIGTERM)
            wait_until_closed(url)
        return [one.result() for one in asking]


def wait_until_closed(url: str) -> None:
    with suppress(httpx.TransportError):
        while True:
            httpx.get(f"{url}/live")


def accepted(url: str) -> int:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(int(float(line.split()[1])) for line in lines if re.match("espalier_requests_(running|waiting){", line))


def test_an_upload_that_outlasts_the_grace_is_told(checkpoint: Path) -> None:
    script = SERVE.replace("run.run(", "run.TELLING_S = 1; run.run(")
    with scripted_server(script, checkpoint, 0) as (process, url):
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port), timeout=30) as upload:
            upload.sendall(b"POST /v1/vqa HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{")
            httpx.get(f"{url}/live")  # by now the upload has begun
            process.send_signal(signal.SIGTERM)
            reply = upload.makefile("rb").read()
        assert reply.startswith(b"HTTP/1.1 503") and b'"code":"shutting_down"' in reply
        assert process.wait(30) == 0


def test_a_thread_that_reads_for_ever_holds_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python would wait for it at the end, and the pod be killed."""
    ended = []
    monkeypatch.setattr(run.os, "_exit", ended.append)
    monkeypatch.setattr(run, "TELLING_S", 0)
    engine = FakeEngine()
    engine.stop = lambda grace: True
    engine.drain = lambda: None
    server = run.DrainingServer(uvicorn.Config(lambda: None), Served([engine]), 0)
    server._stop_engines(0)
    assert ended == [run.CUT_SHORT]


@pytest.mark.parametrize("server", [60], indirect=True)
def test_all_that_was_accepted_is_answered(server: tuple[subprocess.Popen[str], str]) -> None:
    process, url = server
    replies = ask_and_stop(process, url, 20, signals=1)
    assert all(status == 200 for status, _ in replies)
    assert all('"finish_reason":"length"' in text and "error" not in text for _, text in replies)
    assert process.wait(30) == 0


@pytest.mark.parametrize(("server", "signals"), [(1, 1), (60, 2)], indirect=["server"])
def test_what_outlasts_the_grace_is_told(server: tuple[subprocess.Popen[str], str], signals: int) -> None:
    """At the end of the grace period, or at a second signal."""
    process, url = server
    replies: list[Any] = ask_and_stop(process, url, 400, signals)
    assert {status for status, _ in replies} == {200, 503}, "streams had begun, or not"
    assert all('"code":"shutting_down"' in text for _, text in replies)
    assert all(text.endswith("data: [DONE]\n\n") for status, text in replies if status == 200)
    assert process.wait(30) == 75
