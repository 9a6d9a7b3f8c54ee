"""How long answers wait when a long prompt arrives among them: time between their tokens, alone and beside it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks.http import TIMEOUT_S, check_server, httpx, percentiles, read_event
from benchmarks.report import finish

SETTLE_TOKENS = 10
"""Tokens of each answer before a long prompt comes, and after it."""


@dataclass
class Answer:
    """When each chunk of text of a streamed answer came, in seconds."""

    times: list[float] = field(default_factory=list)


def run(url: str, answers: int, prompt_tokens: int, repeats: int, level: str, quiet: bool) -> dict[str, Any]:
    """Measure and print; the last line is one JSON document, which is also returned. Raises ConnectionError without a server.

    `p99_over_median` is the 99th percentile of all times between tokens, while long prompts ran, over the median of those alone.
    """
    measured = asyncio.run(_measure(url, answers, prompt_tokens, repeats, level))
    Console(stderr=True, quiet=quiet).print(
        f"between tokens: {measured['alone_s']['p50']:.3f} s alone, {measured['beside_s']['p99']:.3f} s at p99 beside a prompt of "
        f"{measured['prompt_tokens']} tokens: {measured['p99_over_median']:.2f}×"
    )
    return finish({"url": url, "answers": answers, "repeats": repeats, "level": level} | measured)


async def _measure(url: str, count: int, prompt_tokens: int, repeats: int, level: str) -> dict[str, Any]:
    headers = {"X-Pruning-Level": level}
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, headers=headers) as client:
        await check_server(client)
        answers = [Answer() for _ in range(count)]
        streams = [asyncio.create_task(_stream(client, number, answer)) for number, answer in enumerate(answers)]
        spans, tokens = [], 0
        try:
            await _settle(answers, streams)
            for number in range(repeats):
                start = time.perf_counter()
                tokens = await _ask_long(client, number, prompt_tokens)
                spans.append((start, time.perf_counter()))
                await _settle(answers, streams)
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
    return _summary(answers, spans) | {"prompt_tokens": tokens}


async def _settle(answers: list[Answer], streams: list[asyncio.Task[None]]) -> None:
    wanted = [len(answer.times) + SETTLE_TOKENS for answer in answers]
    while any(len(answer.times) < count for answer, count in zip(answers, wanted, strict=True)):
        if any(stream.done() for stream in streams):
            raise ValueError("an answer ended before the long prompts did; ask for fewer repeats")
        await asyncio.sleep(0.01)


def _summary(answers: list[Answer], spans: list[tuple[float, float]]) -> dict[str, Any]:
    alone: list[float] = []
    beside: list[float] = []
    for answer in answers:
        for before, after in zip(answer.times[SETTLE_TOKENS // 2 :], answer.times[SETTLE_TOKENS // 2 + 1 :], strict=False):
            disturbed = any(before < end and after > start for start, end in spans)
            (beside if disturbed else alone).append(after - before)
    ends = [end - start for start, end in spans]
    ratio = percentiles(beside)["p99"] / median(alone)
    return {"alone_s": percentiles(alone), "beside_s": percentiles(beside), "p99_over_median": ratio, "long_ttft_s": median(ends)}


async def _stream(client: httpx.AsyncClient, number: int, answer: Answer) -> None:
    body = _chat(f"Tell a long story about number {number}.") | {"stream": True, "max_tokens": 2000, "ignore_eos": True}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if any(choice["delta"].get("content") for choice in read_event(line).get("choices", ())):
                answer.times.append(time.perf_counter())


async def _ask_long(client: httpx.AsyncClient, number: int, tokens: int) -> int:
    """Ask a question of so many tokens for one token; returns how many its prompt had."""
    body = _chat(f"{number} " + "stone " * tokens) | {"max_tokens": 1}
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return int(response.json()["usage"]["prompt_tokens"])


def _chat(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}
