"""Long mixed use of one server: does every accepted request end, and does memory stay where it was?"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks.http import RequestFailed, chat_body, httpx, read_event
from benchmarks.report import finish
from benchmarks.serving import Served, serve

LEVELS = ("off", "light", "balanced", "strong", "auto")
BAD, VANISHING, STRUCTURED = 0.1, 0.2, 0.1
"""Shares of requests that are wrong, that are left by their client, and whose answers fit a schema."""
ROUTE = "/v1/chat/completions"
SAMPLE_S = 1.0
STAR = {"type": "object", "properties": {"color": {"enum": ["red", "green", "blue"]}, "large": {"type": "boolean"}}}
WRONG: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"pruning": {"level": "nonsense"}},
    {"messages": [{"role": "user", "content": "word " * 20_000}]},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]}]},
    {"temperature": 9},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
)
"""What is laid over a right body to make a wrong one."""


@dataclass
class Soak:
    """What has come of it so far. `rss`: seconds since the start, and bytes."""

    statuses: Counter[str] = field(default_factory=Counter)
    unended: int = 0
    left: int = 0
    rss: list[tuple[float, int]] = field(default_factory=list)


def run(checkpoint: str, minutes: float, concurrency: int, seed: int, quiet: bool) -> dict[str, Any]:
    """Serve `checkpoint`, load it, and print; the last line is one JSON document, which is also returned.

    Raises ConnectionError when the server does not start.
    """
    console, soak = Console(stderr=True, quiet=quiet), Soak()
    with serve(checkpoint) as served:
        before = served.resident_bytes
        asyncio.run(load(served, minutes * 60, concurrency, seed, soak, console))
        ended = served.process.poll() is not None
        remaining = None if ended else waiting_and_running(httpx.get(f"{served.url}/metrics").text)
    document = summarise(soak, before, minutes * 60) | {
        "checkpoint": checkpoint, "minutes": minutes, "concurrency": concurrency, "seed": seed, "ended_early": ended,
        "left_in_engine": remaining, "exit_status": served.process.returncode,
    }  # fmt: skip
    return finish(document)


async def load(served: Served, seconds: float, concurrency: int, seed: int, soak: Soak, console: Console) -> None:
    start = time.monotonic()
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        with Progress(console=console) as progress:
            task = progress.add_task("soak", total=seconds)

            async def worker(number: int) -> None:
                random, index = Random(f"{seed}-{number}"), number
                while time.monotonic() < start + seconds and served.process.poll() is None:
                    await ask(client, random, index, soak)
                    index += concurrency

            async def watch() -> None:
                while (passed := time.monotonic() - start) < seconds and served.process.poll() is None:
                    soak.rss.append((passed, served.resident_bytes))
                    progress.update(task, completed=passed)
                    await asyncio.sleep(SAMPLE_S)

            await asyncio.gather(watch(), *(worker(number) for number in range(concurrency)))


async def ask(client: httpx.AsyncClient, random: Random, index: int, soak: Soak) -> None:
    """One request of a kind that chance chooses, whose end is noted."""
    kind = random.random()
    body = chat_body(index, max_tokens=random.choice((1, 16, 64))) | {"stream": random.random() < 0.5}
    body |= {"pruning": {"level": random.choice(LEVELS)}}
    if not body["stream"]:
        del body["stream_options"]
    if kind < BAD:
        body |= random.choice(WRONG)
    elif kind < BAD + VANISHING:
        await leave(client, body, random.uniform(0, 0.5), soak)
        return
    elif kind < BAD + VANISHING + STRUCTURED:
        body |= {"response_format": {"type": "json_schema", "json_schema": {"schema": STAR}}}
    try:
        async with client.stream("POST", ROUTE, json=body) as reply:
            soak.statuses[str(reply.status_code)] += 1
            if not has_ended(await reply.aread(), streamed=body["stream"], status=reply.status_code):
                soak.unended += 1
    except httpx.HTTPError as error:
        soak.statuses[type(error).__name__] += 1


async def leave(client: httpx.AsyncClient, body: dict[str, Any], after: float, soak: Soak) -> None:
    """Ask, and hang up after so many seconds, wherever the answer is then."""
    try:
        async with asyncio.timeout(after), client.stream("POST", ROUTE, json=body) as reply:
            await reply.aread()
            soak.statuses[str(reply.status_code)] += 1
    except TimeoutError:
        soak.left += 1
    except httpx.HTTPError as error:
        soak.statuses[type(error).__name__] += 1


def has_ended(body: bytes, *, streamed: bool, status: int) -> bool:
    """Whether an answer is whole, or a refusal says why."""
    if status != 200:
        return bool(json.loads(body)["error"]["message"])
    if not streamed:
        return bool(json.loads(body)["choices"][0]["finish_reason"])
    lines = body.decode().split("\n\n")
    try:
        ends = [choice["finish_reason"] for line in lines for choice in read_event(line).get("choices", ())]
    except RequestFailed:
        return False
    return any(ends) and "data: [DONE]" in lines


def waiting_and_running(metrics: str) -> int:
    names = ("espalier_requests_running ", "espalier_requests_waiting ")
    return sum(int(float(line.split()[1])) for line in metrics.splitlines() if line.startswith(names))


def summarise(soak: Soak, before: int, seconds: float) -> dict[str, Any]:
    """Memory in MB: of the quiet server, medians of the four quarters, and the highest of each half."""
    quarters = [
        [size / 1e6 for passed, size in soak.rss if begin <= passed / seconds < begin + 0.25] for begin in (0, 0.25, 0.5, 0.75)
    ]
    medians = [median(quarter or [0]) for quarter in quarters]
    return {
        "requests": soak.statuses.total() + soak.left, "statuses": dict(sorted(soak.statuses.items())), "left": soak.left,
        "unended": soak.unended, "quiet_mb": before / 1e6, "quarters_mb": [round(one, 1) for one in medians],
        "highest_mb": [max((*first, *second), default=0) for first, second in (quarters[:2], quarters[2:])],
        "growth_of_second_half": medians[3] / medians[2] - 1 if medians[2] else None,
    }  # fmt: skip
