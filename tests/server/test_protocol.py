"""Over raw sockets: clients that send no more than a byte now and then are hung up on, and nobody else is."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import pytest
import uvicorn

from server import protocol
from tests.server.client import app_of, body, image_part
from tests.server.fake_engine import FakeEngine

HEAD = b"POST /v1/vqa HTTP/1.1\r\nHost: x\r\n"
GET = b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(protocol, "TIMEOUT_S", 0.5)
    app = app_of(FakeEngine(), body_timeout_s=1)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol.DeadlineProtocol, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        yield listener.getsockname()
        server.should_exit = True
        thread.join()


def trickle(line: socket.socket, piece: bytes = b"a") -> float:
    """Seconds for which the server takes a byte now and then."""
    line.settimeout(0.05)
    start = time.monotonic()
    while (taken := time.monotonic() - start) < 10:
        try:
            line.sendall(piece)
            while line.recv(4096):
                pass
            break
        except TimeoutError:
            continue
        except OSError:
            break
    return taken


@pytest.mark.parametrize("begun", [b"", HEAD, GET])
def test_headers_have_a_deadline(address: tuple[str, int], begun: bytes) -> None:
    """Also those of a second request on the same connection."""
    with socket.create_connection(address) as line:
        line.sendall(begun)
        assert 0.3 < trickle(line) < 5


def test_a_body_that_is_answered_already_has_one_too(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as line:
        line.sendall(HEAD + b"Content-Length: 1000\r\n\r\n")
        assert 1 < trickle(line) < 5


def test_slow_clients_keep_no_others_out(address: tuple[str, int]) -> None:
    lines = [socket.create_connection(address) for _ in range(200)]
    for line in lines:
        line.sendall(HEAD)
    assert httpx.get(f"http://{address[0]}:{address[1]}/live").status_code == 200
    for line in lines:
        line.settimeout(5)
        assert line.recv(100) == b""
        line.close()


def send_chunks(address: tuple[str, int], *chunks: bytes) -> bytes:
    """The beginning of the reply to a body of these chunks."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    with socket.create_connection(address) as line:
        line.settimeout(30)
        with suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(data)
            return line.recv(4096)
    return b""


def test_a_body_in_crumbs_is_cut_off(address: tuple[str, int]) -> None:
    """Each would take the event loop some microseconds, and nobody sends such."""
    question = json.dumps(body(image_part())).encode()
    few = [question[i : i + 1] for i in range(200)]
    assert send_chunks(address, *few, question[200:]).startswith(b"HTTP/1.1 200")
    assert send_chunks(address, *[b" " * 100] * 3_000, question).startswith(b"HTTP/1.1 200")
    refused = send_chunks(address, *[b" "] * 200_000, question)
    assert not refused or (refused.startswith(b"HTTP/1.1 400") and b"64 bytes" in refused)


def test_crumbs_after_the_answer_are_cut_off_too(address: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """The body is refused by its first kilobytes, and the rest is in crumbs."""
    assert not send_chunks(address, b"x" * 300, *[b"x"] * 50_000).startswith(b"HTTP/1.1 200")
    assert "data_received() call failed" not in caplog.text


def test_a_quick_client_keeps_its_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as line:
        for _ in range(4):
            line.sendall(GET)
            time.sleep(0.3)
            assert line.recv(4096).startswith(b"HTTP/1.1 200")
