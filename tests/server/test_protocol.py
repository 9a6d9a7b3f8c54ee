"""Over raw sockets: clients that send no more than a byte now and then are hung up on, and nobody else is."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from server import protocol
from tests.server.client import app_of
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


def test_a_quick_client_keeps_its_connection(address: tuple[str, int]) -> None:
    with socket.create_connection(address) as line:
        for _ in range(4):
            line.sendall(GET)
            time.sleep(0.3)
            assert line.recv(4096).startswith(b"HTTP/1.1 200")
