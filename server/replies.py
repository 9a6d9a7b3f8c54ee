"""Answers on their way out: the engine's events as OpenAI's chunks, and the replies and streams that they make."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from server.caller import CALLER
from server.errors import EngineFailure, EspalierError
from server.escalation import Escalation
from server.metrics import STAGES
from server.request import Delta, Event, Failed, Finished, ParentRequest, PreparedRequest, Receipt, Request, Started, TokenLogprob
from server.schemas import MAX_INT64
from server.tools import AnswerReader

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)

MIN_LOGPROB = -9999.0
"""What OpenAI reports for a token that cannot be drawn; JSON has no -inf."""
KEEP_ALIVE_S = 15.0
KEEP_AWAKE = ": still here\n\n"
"""An event of a stream that no client reads."""

Chunk = dict[str, Any]


class AnswerStream:
    """The choices of one reply in the making: submitted at birth, to be aborted by whoever leaves it, finished or not.

    `arrived` is a time.monotonic(). `receipt` and `timings` are known once the first chunk is, and final after the last.
    """

    def __init__(self, prepared: PreparedRequest, arrived: float) -> None:
        self._engine = engine = prepared.engine
        self._prepared = prepared
        self._arrived = arrived
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._told_next: deque[tuple[int, Event]] = deque()
        self._created = int(time.time())
        self._parent = ParentRequest(prepared.n, prepared.model)
        below, allowed = prepared.escalate_below, CALLER.get().allowed(engine.menu)
        fullest = max(allowed, key=lambda name: engine.menu[name].visual_ratio)
        self._fullest = fullest
        self._escalation = Escalation(below, self._again) if below is not None and prepared.level != fullest else None
        self._requests = [self._request(index) for index in range(prepared.n)]
        self._readers = [AnswerReader(prepared.tools) for _ in self._requests]
        self.receipt: Receipt | None = None
        self.timings: dict[str, float] = {}
        engine.submit(*self._requests)

    def abort(self) -> None:
        """Free whatever still runs."""
        for request in self._requests:
            self._engine.abort(request.id)

    def headers(self) -> dict[str, str]:
        """What the reply says about its route outside its body."""
        receipt = self.receipt
        if receipt is None:
            return {}
        timings = (f"{stage};dur={self.timings[stage] * 1000:.2f}" for stage in STAGES if stage in self.timings)
        return {
            "X-Pruning-Level": receipt.level,
            "X-Pruning-Visual-Tokens": f"{receipt.visual_tokens}/{receipt.visual_tokens_total}",
            "X-Pruning-Layers": f"{receipt.layers}/{receipt.layers_total}",
            "Server-Timing": ", ".join(timings),
        }

    async def chunks(self) -> AsyncIterator[Chunk]:
        """OpenAI's chunks, the usage always last; an empty one in each KEEP_ALIVE_S of silence. Raises EngineFailure."""
        finished: list[Finished] = []
        first_token: float | None = None  # that is told
        while len(finished) < self._prepared.n:
            try:
                async with asyncio.timeout(KEEP_ALIVE_S):
                    index, event = await self._next_event()
            except TimeoutError:
                if not self._engine.alive:
                    raise EngineFailure("The engine has stopped.") from None
                yield {}
                continue
            match event:
                case Failed():
                    raise event.refusal or EngineFailure(event.message)
                case Started():
                    self.receipt, self.timings = event.receipt, event.timings
                    first_token = first_token or time.monotonic()
                    yield self._piece(index, {"role": "assistant", "content": None if self._prepared.tools else ""})
                case Delta():
                    deltas, logprobs = self._readers[index].push(event.text), _logprobs(event.logprobs)
                    for delta in deltas or ([{}] if logprobs else []):
                        yield self._piece(index, delta, logprobs=logprobs)
                        logprobs = None
                case Finished():
                    self.receipt, self.timings = event.receipt, event.timings
                    finished.append(event)
                    deltas, reason = self._readers[index].finish(event.reason)
                    for delta in deltas:
                        yield self._piece(index, delta)
                    yield self._piece(index, {}, finish_reason=reason) | {"pruning": self._told(event)}
        if self._escalation:
            parent = ParentRequest(self._prepared.n, self._prepared.model, first_token=first_token)
            self._engine.told(replace(self._requests[0], level=finished[-1].receipt.level, parent=parent))
        yield self._chunk([]) | {"usage": _usage(finished)}

    async def _next_event(self) -> tuple[int, Event]:
        while not self._told_next:
            index, event = await self._events.get()
            told = self._escalation.pass_on(index, event) if self._escalation else [event]
            self._told_next += [(index, one) for one in told]
        return self._told_next.popleft()

    def _again(self, index: int) -> bool:
        """Ask for a choice again at the fullest level; whether there is a place for it. It has begun, so its deadline is past."""
        request = self._request(index)
        request = replace(
            request, id=f"{request.id}-again", level=self._fullest, deadline=None, timings={}, created=time.monotonic(),
            parent=ParentRequest(1, self._prepared.model),
        )  # fmt: skip
        try:
            self._engine.submit(request)
        except EspalierError as refusal:
            log.info("request %s is not made again: %s", request.id, refusal.message)
            return False
        self._requests.append(request)
        self._engine.metrics.escalations.labels(self._prepared.level, self._fullest).inc()
        return True

    def _request(self, index: int) -> Request:
        prepared, loop, events = self._prepared, asyncio.get_running_loop(), self._events
        seed = prepared.sampling.seed

        def emit(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return Request(
            id=f"{prepared.id}-{index}",
            prompt=list(prepared.prompt),
            images=list(prepared.images),
            level=prepared.level,
            # Each choice draws its own luck; seeds stay what a 64-bit generator takes.
            sampling=replace(prepared.sampling, seed=None if seed is None else (seed + index) & MAX_INT64),
            emit=emit,
            reason=prepared.reason,
            deadline=prepared.deadline,
            follow_up=prepared.follow_up,
            continues=prepared.continues,
            detail=prepared.detail,
            constraint=prepared.constraint and prepared.constraint.copy(),
            tools=prepared.tools,
            choices=prepared.choices,
            confidence=prepared.escalate_below is not None,
            withheld=self._escalation is not None,
            timings={"image": prepared.image_seconds},
            created=self._arrived,
            parent=self._parent,
        )

    def _told(self, event: Finished) -> dict[str, Any]:
        """The receipt, with what `pruning.detail` asked for."""
        receipt = asdict(event.receipt)
        for name in ("detail", "probabilities", "confidence", "escalated"):
            if receipt[name] is None:
                del receipt[name]
        if "detail" in receipt:
            seconds = {stage: round(event.timings[stage], 5) for stage in STAGES if stage in event.timings}
            preprocessor = self._engine.preprocessor
            receipt["detail"] |= {"center_crop": preprocessor.center_crop, "tiled": preprocessor.tiled, "seconds": seconds}
        return receipt

    def _piece(
        self, index: int, delta: dict[str, Any], *, logprobs: Any = None, finish_reason: str | None = None
    ) -> Chunk:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk([choice])

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        return {
            "id": self._prepared.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._prepared.model,
            "system_fingerprint": self._engine.fingerprint,
            "choices": choices,
        }


def _usage(finished: Sequence[Finished]) -> dict[str, Any]:
    """The prompt counts once, as sent and not as pruned: the choices share it and its route."""
    last = finished[-1]
    completion = sum(event.completion_tokens for event in finished)
    return {
        "prompt_tokens": last.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": last.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": min(event.cached_tokens for event in finished)},  # choices find each other's
        # Not among the details: there, tools that measure servers add them to the prompt's tokens, which hold them already.
        "image_tokens": last.receipt.visual_tokens_total,
        "image_tokens_kept": last.receipt.visual_tokens,
    }


def _logprobs(tokens: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    def entry(one: TokenLogprob) -> dict[str, Any]:
        return {"token": one.token, "logprob": max(one.logprob, MIN_LOGPROB), "bytes": list(one.bytes)}

    content = [{**entry(one), "top_logprobs": [entry(other) for other in one.top]} for one in tokens]
    return {"content": content} if content else None


async def fold(chunks: AsyncIterator[Chunk]) -> dict[str, Any]:
    """The whole reply that a stream of chunks amounts to."""
    reply: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    async for chunk in chunks:
        reply |= chunk
        for piece in chunk.get("choices", ()):
            _add(choices.setdefault(piece["index"], _empty_choice(piece["index"])), piece)
    return reply | {"object": "chat.completion", "choices": [choices[index] for index in sorted(choices)]}


def _empty_choice(index: int) -> dict[str, Any]:
    return {"index": index, "message": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    message, delta = choice["message"], piece["delta"]
    for call in delta.get("tool_calls", ()):
        message["content"] = None
        if "id" in call:
            begun = {key: value for key, value in call.items() if key != "index"}
            message.setdefault("tool_calls", []).append(begun | {"function": dict(call["function"])})
        else:
            message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    if delta.get("content"):
        message["content"] += delta["content"]
    choice["finish_reason"] = piece["finish_reason"]
    if piece["logprobs"]:
        before = choice["logprobs"]["content"] if choice["logprobs"] else []
        choice["logprobs"] = {"content": before + piece["logprobs"]["content"]}


def chat_reply(reply: dict[str, Any], prepared: PreparedRequest) -> dict[str, Any]:
    """The form in which answers are made."""
    return reply


def vqa_reply(reply: dict[str, Any], prepared: PreparedRequest) -> dict[str, Any]:
    """The short form: the answer, what was run for it, and what it cost."""
    (choice,) = reply["choices"]
    said = {"answer": choice["message"]["content"], "finish_reason": choice["finish_reason"]}
    return said | {key: reply[key] for key in ("pruning", "usage", "model", "id")}


async def chat_events(chunks: AsyncIterator[Chunk], prepared: PreparedRequest) -> AsyncIterator[str]:
    """Server-sent events: each chunk, comments that keep proxies awake, an error if it comes to that, and [DONE]."""
    async for chunk in caught(chunks):
        if not chunk:
            yield KEEP_AWAKE
        elif "error" in chunk:
            yield _event(chunk)
        elif chunk["choices"] or prepared.include_usage:
            yield _event({"usage": None, **chunk} if prepared.include_usage else chunk)
    yield "data: [DONE]\n\n"


async def caught(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """The chunks, and OpenAI's error object behind them if they break off."""
    try:
        async for chunk in chunks:
            yield chunk
    except EspalierError as error:
        yield error.body()
    except Exception:
        log.exception("a stream broke")
        yield EngineFailure("The server failed to finish this answer.").body()


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


async def prepend(first: Chunk, rest: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    yield first
    async for chunk in rest:
        yield chunk
