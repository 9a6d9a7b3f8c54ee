"""Pictures by URL: off unless hosts are named, and then from nowhere else, whatever names, redirects and hosts try."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_network
from typing import Any

import pytest
from ssrfguard import Policy

from server import fetch as fetching
from server.budget import BytesBudget
from server.errors import EspalierError, Overloaded
from server.fetch import fetch, policy_for
from server.run import check_fetching
from tests.server.client import ask, body, check_error, connect, image_part
from tests.server.fake_engine import FakeEngine, picture

HOST = "images.example.com"
PNG = picture()
LIMIT = 10_000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        name, _, rest = self.path.lstrip("/").partition("?")
        getattr(self, f"send_{name}")(rest)

    def reply(self, status: int = 200, data: bytes = PNG, **headers: str) -> None:
        self.send_response(status)
        for header, value in {"Content_Type": "image/png", **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def send_picture(self, rest: str) -> None:
        self.reply()

    def send_redirect(self, rest: str) -> None:
        self.reply(302, b"", Location=rest)

    def send_loop(self, rest: str) -> None:
        self.reply(302, b"", Location="/loop")

    def send_missing(self, rest: str) -> None:
        self.reply(404, b"secret text of the host")

    def send_page(self, rest: str) -> None:
        self.reply(Content_Type="text/html")

    def send_packed(self, rest: str) -> None:
        self.reply(Content_Encoding="gzip")

    def send_large(self, rest: str) -> None:
        self.reply(data=bytes(LIMIT + 1))

    def send_slow(self, rest: str) -> None:
        for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"x" * 100:
            self.wfile.write(bytes([byte]))
            time.sleep(0.05)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def host() -> Iterator[ThreadingHTTPServer]:
    """A real server on loopback; `asked` is what came to it."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.handle_error = [], lambda *args: None  # type: ignore[attr-defined,method-assign]
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def resolver(*addresses: str) -> Any:
    """A name server that says this of every name."""
    def look_up(name: Any, port: Any, *args: Any, **more: Any) -> list[Any]:
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [
            (family, socket.SOCK_STREAM, 6, "", (address, port, 0, 0) if ":" in address else (address, port))
            for family, address in zip(families, addresses, strict=True)
        ]

    return look_up


def get(server: ThreadingHTTPServer, path: str, *, open_loopback: bool = True, **more: Any) -> bytes:
    """As the server would, from a host of that name; the test opens loopback, which is closed otherwise."""
    port = server.server_address[1]
    networks = (ip_network("127.0.0.1/32"),) if open_loopback else ()
    policy = Policy(
        allowed_hosts=frozenset({HOST}), allowed_ports=frozenset({port}), allowed_networks=networks,
        max_redirects=fetching.REDIRECTS,
    )  # fmt: skip
    options = {"resolver": resolver("127.0.0.1"), **more}
    return fetch(f"http://{HOST}:{port}{path}", policy, LIMIT, **options)


def test_what_comes_counts_among_the_bodies(host: Any) -> None:
    for most in (len(PNG), len(PNG) - 1):
        with BytesBudget(most).share(), nullcontext() if most == len(PNG) else pytest.raises(Overloaded):
            assert get(host, "/picture") == PNG


def test_a_picture_comes(host: Any) -> None:
    assert get(host, "/picture") == PNG
    assert get(host, "/redirect?/picture") == PNG


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/missing", 400, "404"),
        ("/page", 415, "Content-Type"),
        ("/packed", 415, "packed"),
        ("/large", 413, "10,000 bytes"),
        ("/loop", 400, "may not"),
        ("/redirect?http://169.254.169.254/latest", 400, "may not"),
        ("/redirect?http://elsewhere.example.com/picture", 400, "may not"),
        ("/redirect?file:///etc/passwd", 400, "fetched"),
    ],
)
def test_a_host_that_misbehaves_is_left(host: Any, path: str, status: int, word: str) -> None:
    with pytest.raises(EspalierError, match=word) as refusal:
        get(host, path)
    assert refusal.value.status == status
    assert "secret" not in refusal.value.message and "169.254" not in refusal.value.message
    assert len(host.asked) <= fetching.REDIRECTS + 1


def test_a_slow_host_is_left_in_time(host: Any) -> None:
    started = time.monotonic()
    with pytest.raises(EspalierError, match=r"within 0\.5 seconds"):
        get(host, "/slow", seconds=0.5)
    assert time.monotonic() - started < 6


@pytest.mark.parametrize(
    "addresses",
    [
        ("127.0.0.1",), ("10.0.0.1",), ("192.168.1.1",), ("169.254.169.254",), ("100.64.0.1",), ("0.0.0.0",), ("224.0.0.1",),
        ("::1",), ("fe80::1",), ("fd00::1",), ("::ffff:127.0.0.1",), ("::ffff:10.0.0.1",), ("64:ff9b::7f00:1",),
        ("64:ff9b::a9fe:a9fe",), ("2002:7f00:1::",), ("93.184.215.14", "127.0.0.1"),
    ],
)  # fmt: skip
def test_a_name_that_leads_inside_is_refused(host: Any, addresses: tuple[str, ...]) -> None:
    with pytest.raises(EspalierError, match="may not be fetched"):
        get(host, "/picture", open_loopback=False, resolver=resolver(*addresses))
    assert not host.asked


def test_a_name_is_looked_up_once(host: Any) -> None:
    """Rebinding: whatever the name means next, the connection goes to the address that was checked."""
    answers = iter([("127.0.0.1",), ("169.254.169.254",)])
    looked_up = []

    def moving(*args: Any, **more: Any) -> Any:
        looked_up.append(args)
        return resolver(*next(answers))(*args, **more)

    assert get(host, "/picture", resolver=moving) == PNG
    assert len(looked_up) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example.com/a.png", f"http://{HOST}.evil.example/a.png", f"http://{HOST}:8080/a.png", f"http://{HOST}:22/",
        f"http://user@{HOST}/a.png", f"http://{HOST}@127.0.0.1/", f"http://127.0.0.1\\@{HOST}/", f"http://{HOST}\\@127.0.0.1/",
        f"http://127.0.0.1#@{HOST}/", "http://127.0.0.1/", "http://2130706433/", "http://0x7f.1/", "http://0177.0.0.1/",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://localhost/", "http:///a.png",
        "http://\u2460\u2461\u2466.0.0.1/", f"http://{HOST}%2f@127.0.0.1/", "http://[::1", f"http://{HOST}\x00.evil/",
        "http://" + "a" * 10_000,
    ],
)  # fmt: skip
def test_only_the_named_hosts_are_asked(url: str) -> None:
    def never(*args: Any, **more: Any) -> Any:
        raise AssertionError(f"{args} was looked up")

    with pytest.raises(EspalierError) as refusal:
        fetch(url, policy_for([HOST]), LIMIT, resolver=never)
    assert refusal.value.code == "image_not_fetched"


def test_hosts_that_are_none_stop_the_start() -> None:
    check_fetching([HOST, "*.cdn.example.com"])
    with pytest.raises(ValueError, match="allowed_hosts"):
        check_fetching(["*"])


# ---- over HTTP


@pytest.mark.anyio
@pytest.mark.parametrize("url", [f"http://{HOST}/a.png", f"HTTPS://{HOST}/a.png", "file:///etc/passwd", "//x/a.png"])
async def test_nothing_is_fetched_by_default(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(fetching, "fetch", lambda *args: pytest.fail("fetched"))
    async with connect(FakeEngine()) as client:
        error = check_error(await ask(client, body(image_part(url))), 400)
    assert "not fetched" in error["message"] and error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.anyio
@pytest.mark.parametrize("url", ["file:///etc/passwd", "gopher://x/", "ftp://x/a.png", "javascript:x", "//x/a.png"])
async def test_other_schemes_are_refused_where_hosts_are_named(url: str) -> None:
    async with connect(FakeEngine(), allow_image_hosts=(HOST,)) as client:
        assert "not fetched" in check_error(await ask(client, body(image_part(url))), 400)["message"]


@pytest.mark.anyio
async def test_a_fetched_picture_counts_like_one_that_was_sent(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    port = host.server_address[1]
    policy = Policy(
        allowed_hosts=frozenset({HOST}), allowed_ports=frozenset({port}), allowed_networks=(ip_network("127.0.0.1/32"),)
    )
    monkeypatch.setattr(fetching, "fetch", partial(fetch, resolver=resolver("127.0.0.1")))
    monkeypatch.setattr(fetching, "policy_for", lambda hosts: policy)
    part = image_part(f"http://{HOST}:{port}/picture")
    async with connect(FakeEngine(), allow_image_hosts=(HOST,)) as client:
        assert (await ask(client, body(part))).status_code == 200
    async with connect(FakeEngine(), allow_image_hosts=(HOST,), max_image_bytes=len(PNG) - 1) as client:
        error = check_error(await ask(client, body(part)), 413)
        assert error["param"] == "messages[0].content[0].image_url.url"
    async with connect(FakeEngine(), allow_image_hosts=(HOST,), max_request_pixels=20) as client:
        assert (await ask(client, body(part))).status_code == 200
        check_error(await ask(client, body(part, part)), 413)
    asked = body(*[part] * 12)
    async with connect(FakeEngine(), allow_image_hosts=(HOST,), max_body_bytes=len(PNG) * 11 + 20) as client:
        assert len(str(asked)) < len(PNG) * 40
        assert (await ask(client, asked)).status_code == 413
