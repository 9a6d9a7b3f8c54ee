"""What hostile requests do to everybody else: `python -m benchmarks.hostile`.

A server of its own is sent each kind in turn, by clients that come back as soon as they are answered, while `/live` and a short
text question are timed. Those clients have the lowest priority: in truth they would be other machines. A busy process beside the
server, which sends nothing, shows what sharing the cores costs by itself.
"""

from __future__ import annotations

import base64
import gzip
import json
import multiprocessing
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException
from io import BytesIO
from itertools import repeat
from pathlib import Path
from random import Random
from statistics import median
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import finish
from benchmarks.serving import serve

CHAT = "/v1/chat/completions"
QUESTION = json.dumps({"messages": [{"role": "user", "content": "What is red?"}], "max_tokens": 4}).encode()
PAUSE_S = 0.02
"""Between two probes."""
LARGE = 30_000_000
SIDES = (7680, 4320)
"""The largest picture that the server takes."""
PIECE = 2**18

Pieces = list[tuple[bytes, float]]
"""Bytes of a request, and seconds to wait before the next ones."""


# ---- hostile requests


def _post(body: bytes, path: str = CHAT, **headers: str) -> Pieces:
    told = {"Host": "x", "Content-Type": "application/json", "Content-Length": str(len(body))}
    told |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return [(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode(), 0), *((body[i : i + PIECE], 0) for i in range(0, len(body), PIECE))]


def _chat(content: bytes) -> bytes:
    return b'{"max_tokens":1,"messages":[{"role":"user","content":%b}]}' % content


def _filled(unit: bytes, size: int = LARGE) -> bytes:
    return unit * (size // len(unit))


def _png(width: int, height: int) -> bytes:
    """Noise in a corner: what is flat is decoded fast."""
    image, file = Image.new("RGB", (width, height)), BytesIO()
    image.paste(Image.frombytes("RGB", (512, 512), Random(0).randbytes(512 * 512 * 3)))
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def _animated(kind: str, frames: int = 500) -> bytes:
    """Frames of noise, or else equal ones are written once."""
    noise, file = Random(0), BytesIO()
    first, *others = [Image.frombytes("L", (64, 64), noise.randbytes(64 * 64)) for _ in range(frames)]
    first.save(file, kind, save_all=True, append_images=others)
    return file.getvalue()


def _pictures(data: bytes, number: int) -> bytes:
    url = b"data:image/png;base64," + base64.b64encode(data)
    return _chat(b"[%b]" % b",".join([b'{"type":"image_url","image_url":{"url":"%b"}}' % url] * number))


def _chunked() -> Pieces:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return [(head, 0), *repeat((b"1\r\na\r\n" * 20_000, 0), 50), (b"0\r\n\r\n", 0)]


def _form(filled: bytes) -> Pieces:
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="p.png"\r\n\r\n%b\r\n--b--\r\n' % filled
    return _post(part, "/v1/vqa", Content_Type="multipart/form-data; boundary=b")


def _parts(number: int) -> Pieces:
    part = b'--b\r\nContent-Disposition: form-data; name="question"\r\n\r\n\r\n'
    return _post(part * number + b"--b--", "/v1/vqa", Content_Type="multipart/form-data; boundary=b")


def _tools() -> bytes:
    kinds = {f"p{i}": {"type": "string", "pattern": "^([a-z]{1,9} ?)+$"} for i in range(8)}
    tools = [{"name": f"f{i}", "parameters": {"type": "object", "properties": kinds}} for i in range(128)]
    return json.dumps(json.loads(QUESTION) | {"tools": [{"type": "function", "function": tool} for tool in tools]}).encode()


def _schema() -> bytes:
    """Of 50 kB, and slow to compile."""
    kinds = [{"type": "integer", "minimum": i, "maximum": 10**9 + i} for i in range(800)]
    schema = {"type": "object", "properties": {f"p{i}": kind for i, kind in enumerate(kinds)}}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    return json.dumps(json.loads(QUESTION) | {"response_format": form}).encode()


def _faults() -> bytes:
    message = b'{"role":"user","content":[%b{}]}' % (b"{}," * 28)
    return b'{"messages":[%b]}' % b",".join([message] * 1000)


def _slow() -> Pieces:
    head, *_ = _post(b" " * 1_000)
    return [head, *repeat((b" ", 0.05), 1_000)]


KINDS: dict[str, tuple[int, Callable[[], Pieces]]] = {
    "30 MB of {}": (4, lambda: _post(b'{"messages":[%b{}]}' % _filled(b"{},"))),
    "30 MB of letters": (4, lambda: _post(_chat(b'"%b"' % _filled(b"a")))),
    "30 MB of words": (4, lambda: _post(_chat(b'"%b"' % _filled(b"image ")))),
    "30 MB of escapes": (4, lambda: _post(_chat(b'"%b"' % _filled(rb"\u0061")))),
    "30 MB of blanks": (4, lambda: _post(_filled(b" ") + _chat(b'"a"'))),
    "blanks in base64": (4, lambda: _post(_chat(b'[{"type":"image_url","image_url":"data:;base64,%b"}]' % _filled(b"a ")))),
    "60,000 faults": (4, lambda: _post(_faults())),
    "60,000 fields": (4, lambda: _post(_chat(b'"a",%b"x":0' % b"".join(b'"%d":0,' % i for i in range(60_000))))),
    "a large schema": (4, lambda: _post(_schema())),
    "128 tools": (4, lambda: _post(_tools())),
    "60,000 brackets": (4, lambda: _post(b"[" * 60_000)),
    "responses, 30 MB of {}": (4, lambda: _post(b'{"input":[%b{}]}' % _filled(b"{},"), "/v1/responses")),
    "tokenize, 30 MB of letters": (4, lambda: _post(b'{"prompt":"%b"}' % _filled(b"a"), "/tokenize")),
    "headers of 60 kB": (4, lambda: _post(b"{}", **{f"X_{i}": "a" * 50 for i in range(1_000)})),
    "gzip bombs": (4, lambda: _post(gzip.compress(_chat(b'"%b"' % _filled(b"a"))), Content_Encoding="gzip")),
    "one-byte chunks": (4, _chunked),
    "a form of line ends": (4, lambda: _form(_filled(b"\r\n--"))),
    "a form of boundaries": (4, lambda: _form(_filled(b"\r\n--bx"))),
    "a form of 100,000 parts": (4, lambda: _parts(100_000)),
    "16 pictures of a pixel": (4, lambda: _post(_pictures(_png(1, 1), 16))),
    "a GIF of 500 frames": (4, lambda: _post(_pictures(_animated("GIF"), 1))),
    "a WebP of 500 frames": (4, lambda: _post(_pictures(_animated("WebP"), 1))),
    "16 pictures of 33 Mpixel": (4, lambda: _post(_pictures(_png(*SIDES), 16))),
    "4 pictures of 33 Mpixel": (4, lambda: _post(_pictures(_png(*SIDES), 4))),
    "a 22 MB picture": (4, lambda: _post(_pictures(Random(0).randbytes(22_000_000), 1))),
    "200 slow bodies": (200, _slow),
}
"""How many clients at once, and what each sends."""


def attack(port: int, kind: str, ready: Any, stop: Any, told: Any) -> None:
    """In a process of its own: send requests until `stop`, and tell their statuses."""
    os.nice(19)
    clients, build = KINDS[kind]
    pieces, statuses = build(), Counter[str]()

    def client() -> None:
        while not stop.is_set():
            statuses[_send(port, pieces, stop)] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    ready.set()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.put(dict(statuses))


def _send(port: int, pieces: Pieces, stop: Any) -> str:
    """A request's status; `cut` if the server hung up."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
            try:
                for piece, pause in pieces:
                    line.sendall(piece)
                    if pause and stop.wait(pause):
                        return "left"
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was answered already
            return line.recv(4096).split(b" ")[1].decode()
    except (OSError, IndexError):
        return "cut"


def spin(port: int, kind: str, ready: Any, stop: Any, told: Any) -> None:
    """A busy process that asks for nothing."""
    ready.set()
    while not stop.is_set():
        sum(range(100_000))
    told.put({})


# ---- everybody else


def probe(port: int, seconds: float, ask: Callable[[HTTPConnection], None]) -> list[float]:
    """Seconds that each of the requests took."""
    took, end = [], time.monotonic() + seconds
    line = HTTPConnection("127.0.0.1", port, timeout=60)
    while time.monotonic() < end:
        start = time.perf_counter()
        ask(line)
        took.append(time.perf_counter() - start)
        time.sleep(PAUSE_S)
    line.close()
    return took


def live(line: HTTPConnection) -> None:
    line.request("GET", "/live")
    _read(line)


def question(line: HTTPConnection) -> None:
    line.request("POST", CHAT, QUESTION, {"Content-Type": "application/json"})
    _read(line)


def _read(line: HTTPConnection) -> None:
    reply = line.getresponse()
    text = reply.read()
    if reply.status != 200:
        raise HTTPException(f"a probe was answered {reply.status}: {text[:200]!r}")


def both(port: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of `/live` and of the question meanwhile: median and worst."""
    found: dict[str, list[float]] = {}

    def run(name: str, ask: Callable[[HTTPConnection], None]) -> None:
        found[name] = probe(port, seconds, ask)

    threads = [threading.Thread(target=run, args=one) for one in (("live", live), ("question", question))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    figures = [(name, what, of(took)) for name, took in found.items() for what, of in (("median", median), ("worst", max))]
    return {f"{name}_{what}_ms": 1e3 * seconds for name, what, seconds in figures}


def settle(pid: int) -> None:
    """Wait until a process has done next to nothing for half a second: what was asked of it before is over."""
    used = -1.0
    while (now := sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]))) > used + 5:
        used = now  # hundredths of a second
        time.sleep(0.5)


def beside(port: int, kind: str, seconds: float) -> dict[str, Any]:
    """`both` while a kind of hostile request comes, or a process is merely busy."""
    context = multiprocessing.get_context("spawn")
    ready, stop, told = context.Event(), context.Event(), context.Queue()
    other = context.Process(target=attack if kind in KINDS else spin, args=(port, kind, ready, stop, told))
    other.start()
    ready.wait()
    try:
        times = both(port, seconds)
    finally:
        stop.set()
        statuses = told.get(timeout=120)
        other.join()
    return times | {"statuses": statuses}


def main(
    checkpoint: Annotated[str, typer.Option(help="What is served.")] = "embedded",
    seconds: Annotated[float, typer.Option(min=1, help="For each kind.")] = 6.0,
    kind: Annotated[list[str] | None, typer.Option(help="So that its name holds this; may repeat.", show_default="all")] = None,
) -> None:
    console = Console(stderr=True)
    kinds = [name for name in KINDS if not kind or any(part in name for part in kind)]
    rows: dict[str, dict[str, Any]] = {}
    with serve(checkpoint) as served:
        port = urlsplit(served.url).port
        assert port
        both(port, 1.0)
        rows["alone"] = both(port, seconds)
        for name in track(["a busy process", *kinds], console=console):
            rows[name] = beside(port, name, seconds)
            settle(served.process.pid)
    table = Table("", "/live median", "worst, ms", "question median", "worst, ms", "worst over alone", "answered")
    for name, row in rows.items():
        row["question_over_alone"] = row["question_worst_ms"] / rows["alone"]["question_worst_ms"]
        figures = [f"{row[key]:.1f}" for key in ("live_median_ms", "live_worst_ms", "question_median_ms", "question_worst_ms")]
        told = " ".join(f"{n}x{status}" for status, n in row.get("statuses", {}).items())
        table.add_row(name, *figures, f"{row['question_over_alone']:.1f}", told)
    console.print(table)
    finish({"checkpoint": checkpoint, "seconds": seconds, "rows": rows})


if __name__ == "__main__":
    typer.run(main)
