"""A server that is asked more than it can answer, by OpenAI's client with its own retries: what comes through, and how late."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.http import chat_body, httpx, percentiles
from benchmarks.report import finish
from benchmarks.serving import Served, serve

try:
    import openai
except ImportError as error:
    raise ValueError("espalier bench overload needs OpenAI's client; install it with `pip install openai`") from error

IN_TIME_S = 5.0
"""Longest wait for an answer that still counts as in time."""
SATURATING = 16
"""Questions that a saturating client keeps in flight: twice as many as run at once."""
WARM_UP = 32
"""Questions before anything is measured."""
MAX_TOKENS = 16
DEGRADE = "degrade"


@dataclass(frozen=True)
class Outcome:
    """How one question ended. `asked` and `ended` are seconds since the first could come; `last` is what the last attempt took."""

    asked: float
    ended: float
    retries: int = 0
    last: float = 0.0
    level: str = ""
    error: str = ""


def run(checkpoint: str, times: float, seconds: float, levels: Sequence[str], seed: int, quiet: bool) -> dict[str, Any]:
    """Serve and overload `checkpoint` in turn at each of the levels, as default, and from the first one with --degrade. Prints; the
    last line is one JSON document, which is also returned.

    The questions come at random, `times` as many a second as a saturating client gets answered at the first level. Raises
    ConnectionError when a server does not start.
    """
    console, ways = Console(stderr=True, quiet=quiet), {}
    # A client that is short of cores would hide what the server does: it has one, the server the others.
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    rate: float | None = None
    for way in (*levels, DEGRADE):
        arguments = ["--default-level", levels[0], "--degrade"] if way == DEGRADE else ["--default-level", way]
        with on(cores[:-1]), serve(checkpoint, *arguments) as served, on(cores[-1:]):
            console.print(f"{way}: a saturating client, then too many questions")
            outcomes, found = asyncio.run(_measure(served, times, rate, seconds, seed))
        rate = found["asked_per_s"]
        ways[way] = found | summarise(outcomes, seconds)
    document = {"checkpoint": checkpoint, "times": times, "seconds": seconds, "seed": seed, "cores": len(cores), "ways": ways}
    show(ways, console)
    return finish(document)


async def _measure(
    served: Served, times: float, rate: float | None, seconds: float, seed: int
) -> tuple[list[Outcome], dict[str, float]]:
    model = httpx.get(f"{served.url}/v1/models").json()["data"][0]["id"]
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        await asyncio.gather(*(ask(client, question(model, -number - 1), 0.0) for number in range(WARM_UP)))
        saturated = await saturate(client, model, seconds)
        if not saturated:
            raise ValueError(f"a saturating client got no answer within {seconds:g} s; give more --seconds")
        rate = rate or times * saturated
        arrivals = list(arrive(rate, seconds, Random(seed)))
        asked = [question(model, number) for number in range(len(arrivals))]
        busy = time.process_time()
        outcomes = await overload(client, asked, arrivals)
        share = (time.process_time() - busy) / max(one.ended for one in outcomes)
    return outcomes, {"saturated_per_s": saturated, "asked_per_s": rate, "client_cpu": share}


def question(model: str, index: int) -> dict[str, Any]:
    """A question about a picture that the server has not seen."""
    return {"model": model, "messages": chat_body(abs(index), MAX_TOKENS)["messages"], "max_tokens": MAX_TOKENS}


def arrive(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """Moments at which questions come that know nothing of one another, `rate` a second on average."""
    moment = random.expovariate(rate)
    while moment < seconds:
        yield moment
        moment += random.expovariate(rate)


async def saturate(client: openai.AsyncOpenAI, model: str, seconds: float) -> float:
    """Answers a second of a client that keeps SATURATING questions in flight."""
    start, answered = time.monotonic(), 0
    numbers = iter(range(10**6, 10**7))

    async def worker() -> None:
        nonlocal answered
        while time.monotonic() < start + seconds:
            outcome = await ask(client, question(model, next(numbers)), start)
            answered += not outcome.error and outcome.ended < seconds

    await asyncio.gather(*(worker() for _ in range(SATURATING)))
    return answered / seconds


async def overload(client: openai.AsyncOpenAI, asked: Sequence[dict[str, Any]], arrivals: Sequence[float]) -> list[Outcome]:
    """Ask each question at its moment, whatever has become of those before it."""
    start = time.monotonic()

    async def come(body: dict[str, Any], moment: float) -> Outcome:
        await asyncio.sleep(start + moment - time.monotonic())
        return await ask(client, body, start)

    return await asyncio.gather(*(come(body, moment) for body, moment in zip(asked, arrivals, strict=True)))


async def ask(client: openai.AsyncOpenAI, body: dict[str, Any], start: float) -> Outcome:
    asked = time.monotonic() - start
    try:
        reply = await client.chat.completions.with_raw_response.create(**body)
    except openai.APIStatusError as error:
        return Outcome(asked, time.monotonic() - start, error=str(error.status_code))
    except openai.APIConnectionError as error:
        return Outcome(asked, time.monotonic() - start, error=type(error).__name__)
    last, level = reply.elapsed.total_seconds(), reply.headers["x-pruning-level"]
    return Outcome(asked, time.monotonic() - start, reply.retries_taken, last, level)


def summarise(outcomes: Sequence[Outcome], seconds: float) -> dict[str, Any]:
    """Of those answered: how long from the first attempt and from the last, and how many in time. Rates are over the time in which
    questions came."""
    answered = [one for one in outcomes if not one.error]
    waits = [one.ended - one.asked for one in answered]
    return {
        "asked": len(outcomes), "answered": len(answered), "share_answered": len(answered) / len(outcomes),
        "answered_per_s": sum(one.ended <= seconds for one in answered) / seconds,
        "in_time": sum(wait <= IN_TIME_S for wait in waits),
        "e2e_s": percentiles(waits or [0.0]), "last_attempt_s": percentiles([one.last for one in answered] or [0.0]),
        "retries": dict(sorted(Counter(str(one.retries) for one in answered).items())),
        "levels": dict(sorted(Counter(one.level for one in answered).items())),
        "errors": dict(sorted(Counter(one.error for one in outcomes if one.error).items())),
    }  # fmt: skip


def show(ways: dict[str, dict[str, Any]], console: Console) -> None:
    columns = ("level", "saturated/s", "asked/s", "answered/s", "answered", "p50 s", "p99 s", "last p99 s", "in time", "client CPU")
    table = Table(*columns, title=f"OpenAI's client with its default retries; in time: within {IN_TIME_S:g} s of the first attempt")
    for way, row in ways.items():
        rates = (f"{row[name]:.1f}" for name in ("saturated_per_s", "asked_per_s", "answered_per_s"))
        waits = (f"{one:.2f}" for one in (row["e2e_s"]["p50"], row["e2e_s"]["p99"], row["last_attempt_s"]["p99"]))
        table.add_row(way, *rates, f"{row['share_answered']:.0%}", *waits, str(row["in_time"]), f"{row['client_cpu']:.0%}")
    console.print(table)


@contextmanager
def on(cores: Sequence[int]) -> Iterator[None]:
    """This thread on these cores, and for good the processes that it starts meanwhile. Without any, nothing changes."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
