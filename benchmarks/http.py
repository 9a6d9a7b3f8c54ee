"""Load a running server: a fixed number of requests in flight, a mix of levels, pictures it has never seen."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from itertools import cycle, islice
from math import ceil
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.report import finish
from checkpoints.world import draw

try:
    import httpx
except ImportError as error:
    raise ValueError("this benchmark needs httpx; install it with `pip install -e '.[bench]'`") from error

TIMEOUT_S = 300.0
TRIES = 50
"""How often a request comes back after 429 before it counts as not answered."""


@dataclass(frozen=True)
class ChatRequest:
    level: str
    body: bytes


@dataclass(frozen=True)
class Completion:
    """One answer: seconds to its first token and end to end, both from the first attempt, so that being refused is paid for."""

    level: str
    ttft: float
    e2e: float
    tokens: int


class RequestFailed(Exception):
    """The request came to nothing; the message is what errors are counted by."""


@dataclass
class Results:
    completions: list[Completion] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """By status, every 429 included; other failures by name."""
    reasons: dict[str, str] = field(default_factory=dict)
    """By status, what the server said first."""


def run(url: str, concurrency: int, requests: int, levels: str, max_tokens: int, quiet: bool) -> dict[str, Any]:
    """Load the server and print; the last line is one JSON document, which is also returned.

    Raises ValueError for a mix that makes no sense and ConnectionError when no server answers at `url`.
    """
    console = Console(stderr=True, quiet=quiet)
    # Other pictures each time: a server keeps what it has seen.
    drawn = draw_requests(parse_mix(levels), requests, max_tokens, first=time.time_ns() // 1_000_000 % 1_000_000_000)
    results = Results()
    try:
        seconds = asyncio.run(load(url, drawn, concurrency, results, console))
    except httpx.InvalidURL as error:
        raise ValueError(f"url {url!r}: {error}") from error
    asked = {"url": url, "concurrency": concurrency, "requests": requests, "max_tokens": max_tokens}
    document = asked | summarise(results, seconds)
    show(document, console)
    return finish(document)


def parse_mix(text: str) -> dict[str, int]:
    """`off=1,strong=3` to weights by level; a level without a weight has 1."""
    mix = {}
    for part in text.split(","):
        match = re.fullmatch("([^=]+)(?:=([1-9][0-9]*))?", part.strip())
        if not match:
            raise ValueError(f"levels {text!r} are not names with whole weights, such as off=1,strong=3")
        mix[match[1]] = int(match[2] or 1)
    return mix


def draw_requests(mix: dict[str, int], count: int, max_tokens: int, first: int = 0) -> list[ChatRequest]:
    """Requests with held-out pictures from number `first` on, made before the clock starts; levels in their exact shares, in no
    order."""
    levels = list(islice(cycle(level for level, weight in mix.items() for _ in range(weight)), count))
    Random(0).shuffle(levels)
    return [ChatRequest(level, json.dumps(chat_body(index, max_tokens)).encode()) for index, level in enumerate(levels, first)]


def chat_body(index: int, max_tokens: int) -> dict[str, Any]:
    scene, png = draw("test", index), BytesIO()
    scene.image.save(png, "PNG")
    picture = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": picture}},
        {"type": "text", "text": Random(index).choice(scene.questions).text},
    ]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def load(url: str, requests: Sequence[ChatRequest], concurrency: int, results: Results, console: Console) -> float:
    """Ask everything, `concurrency` at a time, each next one when an answer is whole; returns the seconds it took."""
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits) as client:
        await check_server(client)
        queue = iter(requests)
        with Progress(console=console) as progress:
            task = progress.add_task("requests", total=len(requests))

            async def worker() -> None:
                for request in queue:
                    await send(client, request, results)
                    progress.advance(task)

            start = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(concurrency)))
            return time.perf_counter() - start


async def check_server(client: httpx.AsyncClient) -> None:
    try:
        response = await client.get("/v1/models")
    except httpx.TransportError as error:
        raise ConnectionError(
            f"no server answers at {client.base_url} ({error}); start one with `espalier serve`"
        ) from error
    if response.status_code != 200:
        status = response.status_code
        raise ConnectionError(f"{client.base_url} answers GET /v1/models with {status}; is it an Espalier server?")


async def send(client: httpx.AsyncClient, request: ChatRequest, results: Results) -> None:
    """Ask until it is answered; what is refused with 429 comes back when the server says so."""
    start = time.perf_counter()
    for _ in range(TRIES):
        try:
            wait = await attempt(client, request, start, results)
        except RequestFailed as error:
            results.errors[str(error)] += 1
            return
        except httpx.HTTPError as error:
            results.errors[type(error).__name__] += 1
            return
        if wait is None:
            return
        await asyncio.sleep(wait)


async def attempt(client: httpx.AsyncClient, request: ChatRequest, start: float, results: Results) -> float | None:
    """Stream one answer into the results, or return the seconds to wait after a 429. Raises RequestFailed, httpx.HTTPError."""
    headers = {"Content-Type": "application/json", "X-Pruning-Level": request.level}
    async with client.stream("POST", "/v1/chat/completions", content=request.body, headers=headers) as response:
        if response.status_code == 429:
            results.errors["429"] += 1
            after = response.headers.get("retry-after", "")
            return float(after) if after.isdecimal() else 1.0
        if response.status_code != 200:
            status = str(response.status_code)
            results.reasons.setdefault(status, said_by(await response.aread()))
            raise RequestFailed(status)
        first, tokens = None, None
        async for line in response.aiter_lines():
            chunk = read_event(line)
            if first is None and any(choice["delta"].get("content") for choice in chunk.get("choices", ())):
                first = time.perf_counter()
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    end = time.perf_counter()
    if tokens is None:
        raise RequestFailed("cut short")
    first = first or end  # an empty answer has no first word
    results.completions.append(Completion(request.level, first - start, end - start, tokens))
    return None


def said_by(body: bytes) -> str:
    """The message of OpenAI's error object, or the beginning of whatever came instead."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def read_event(line: str) -> dict[str, Any]:
    """The chunk in a line of server-sent events; empty for comments, blank lines and the end mark."""
    name, _, data = line.partition(": ")
    if name != "data" or data == "[DONE]":
        return {}
    chunk: dict[str, Any] = json.loads(data)
    if "error" in chunk:
        raise RequestFailed("error in stream")
    return chunk


def summarise(results: Results, seconds: float) -> dict[str, Any]:
    completions = results.completions
    levels = sorted({one.level for one in completions})
    return {
        "seconds": seconds,
        "answered": len(completions),
        "errors": dict(sorted(results.errors.items())),
        "reasons": dict(sorted(results.reasons.items())),
        **throughput(completions, seconds),
        "levels": {level: summarise_level([one for one in completions if one.level == level], seconds) for level in levels},
    }


def summarise_level(completions: list[Completion], seconds: float) -> dict[str, Any]:
    return {
        "answered": len(completions),
        **throughput(completions, seconds),
        "ttft_s": percentiles([one.ttft for one in completions]),
        "e2e_s": percentiles([one.e2e for one in completions]),
    }


def throughput(completions: list[Completion], seconds: float) -> dict[str, float]:
    """Over the whole run, so that levels add up."""
    tokens = sum(one.tokens for one in completions)
    return {"requests_per_s": len(completions) / seconds, "tokens_per_s": tokens / seconds}


def percentiles(values: list[float]) -> dict[str, float]:
    """The smallest value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return {f"p{q}": ordered[ceil(q / 100 * len(ordered)) - 1] for q in (50, 95, 99)}


def show(document: dict[str, Any], console: Console) -> None:
    columns = ("level", "answered", "requests/s", "tokens/s", "TTFT", "end to end")
    table = Table(*columns, title=f"{document['concurrency']} at once; seconds at p50, p95, p99")
    for name, row in (document["levels"] | {"all": document}).items():
        spread = [" ".join(f"{s:.3g}" for s in row[key].values()) for key in ("ttft_s", "e2e_s") if key in row]
        table.add_row(name, str(row["answered"]), f"{row['requests_per_s']:.2f}", f"{row['tokens_per_s']:.1f}", *spread)
    console.print(table)
    if document["errors"]:
        console.print("errors: " + ", ".join(f"{count} × {name}" for name, count in document["errors"].items()))
        for name, reason in document["reasons"].items():
            console.print(f"{name}: {reason}", markup=False)
