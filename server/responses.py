"""OpenAI's responses, without state: items in, items or typed events out, as a form of the chat's chunks."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import uuid4

from server.chat import conversation, prepare_chat, told
from server.replies import KEEP_AWAKE, Chunk, caught
from server.request import PreparedRequest
from server.schemas import ResponsesRequest, parse
from server.served import Served
from server.settings import Settings

Event = dict[str, Any]
ECHOED = {
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "temperature", "text", "tool_choice", "tools",
    "top_logprobs", "top_p",
}  # fmt: skip


def read_response(served: Served, settings: Settings, body: bytes, header: str | None) -> PreparedRequest:
    """A body to a prepared request; see `read_chat`."""
    request = parse(ResponsesRequest, body)
    chat = conversation([item.as_message() for item in request.input], "input")
    chat = replace(chat, turns=told(chat.turns, request.instructions or ""))
    prepared = prepare_chat(served.pick(request.model), settings, request, chat, header, kind="resp_")
    echo = request.model_dump(include=ECHOED, by_alias=True, exclude_none=True)
    return replace(prepared, echo={**_defaults(prepared), **echo})


def _defaults(prepared: PreparedRequest) -> dict[str, Any]:
    sampling = prepared.sampling
    return {
        "instructions": None, "max_output_tokens": sampling.max_tokens, "metadata": {}, "temperature": sampling.temperature,
        "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_p": sampling.top_p,
    }  # fmt: skip


def whole_response(reply: dict[str, Any], prepared: PreparedRequest) -> dict[str, Any]:
    """A chat's whole reply as a response."""
    choice = reply["choices"][0]
    message, reason = choice["message"], choice["finish_reason"]
    status = "incomplete" if reason == "length" else "completed"
    output = [_call(call, status) for call in message.get("tool_calls", ())]
    if not output:
        output = [_message(f"msg_{uuid4().hex}", message["content"] or "", choice["logprobs"], status)]
    return _response(reply, prepared, status, output) | {"usage": _usage(reply["usage"]), "pruning": reply["pruning"]}


def _response(chunk: Mapping[str, Any], prepared: PreparedRequest, status: str, output: list[Event]) -> Event:
    incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {
        "id": prepared.id, "object": "response", "created_at": chunk["created"], "status": status, "error": None,
        "incomplete_details": incomplete, "model": prepared.model, "output": output, "parallel_tool_calls": True,
        "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False, "truncation": "disabled",
        "usage": None, **prepared.echo,
    }  # fmt: skip


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cache_write_tokens": 0, **usage["prompt_tokens_details"]},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "image_tokens": usage["image_tokens"],
        "image_tokens_kept": usage["image_tokens_kept"],
    }


def _message(item_id: str, text: str, logprobs: Mapping[str, Any] | None, status: str) -> Event:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": [_part(text, logprobs)]}


def _part(text: str, logprobs: Mapping[str, Any] | None) -> Event:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": (logprobs or {}).get("content", [])}


def _call(call: Mapping[str, Any], status: str) -> Event:
    return {"id": f"fc_{uuid4().hex}", "type": "function_call", "status": status, "call_id": call["id"], **call["function"]}


# ---- the stream


class _Item:
    """The one output item of a stream in the making: a message or a function call, as the events of its course tell it."""

    def __init__(self) -> None:
        self.item: Event = {}
        self._text = ""
        self._logprobs: list[Any] = []
        self._held: list[Any] = []  # log-probabilities of tokens that do not show yet what the item is

    def add(self, delta: Mapping[str, Any], logprobs: Mapping[str, Any] | None) -> Iterator[Event]:
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                self.item, self._held = _call(call, "in_progress"), []
                yield {"type": "response.output_item.added", "output_index": 0, "item": dict(self.item)}
            else:
                yield from self._grow("response.function_call_arguments", call["function"]["arguments"], {})
        if not self._is_call:
            self._held += (logprobs or {}).get("content", [])
            if delta.get("content") or (self._held and self.item):
                yield from self._say(delta.get("content", ""))

    def _say(self, text: str) -> Iterator[Event]:
        """Text of a message, with the log-probabilities that waited for it."""
        yield from self.begin()
        entries, self._held = self._held, []
        self._logprobs += entries
        yield from self._grow("response.output_text", text, {"content_index": 0, "logprobs": entries})

    @property
    def _is_call(self) -> bool:
        return self.item.get("type") == "function_call"

    def begin(self) -> Iterator[Event]:
        """A message, unless an item is begun."""
        if not self.item:
            self.item = {**_message(f"msg_{uuid4().hex}", "", None, "in_progress"), "content": []}
            yield {"type": "response.output_item.added", "output_index": 0, "item": dict(self.item)}
            yield {"type": "response.content_part.added", **self._place, "content_index": 0, "part": _part("", None)}

    def _grow(self, kind: str, text: str, more: Event) -> Iterator[Event]:
        self._text += text
        yield {"type": f"{kind}.delta", **self._place, "delta": text, **more}

    def end(self, status: str) -> Iterator[Event]:
        yield from self._say("") if self._held else self.begin()
        if self._is_call:
            self.item |= {"status": status, "arguments": self._text}
            name = self.item["name"]
            yield {"type": "response.function_call_arguments.done", **self._place, "name": name, "arguments": self._text}
        else:
            self.item = _message(self.item["id"], self._text, {"content": self._logprobs}, status)
            more = {**self._place, "content_index": 0}
            yield {"type": "response.output_text.done", **more, "text": self._text, "logprobs": self._logprobs}
            yield {"type": "response.content_part.done", **more, "part": self.item["content"][0]}
        yield {"type": "response.output_item.done", "output_index": 0, "item": self.item}

    @property
    def _place(self) -> Event:
        return {"item_id": self.item["id"], "output_index": 0}


async def response_events(chunks: AsyncIterator[Chunk], prepared: PreparedRequest) -> AsyncIterator[str]:
    """Server-sent events of a response; comments that keep proxies awake between them."""
    number = 0
    async for event in _events(chunks, prepared):
        if event:
            data = json.dumps({"sequence_number": number, **event}, separators=(",", ":"))
            yield f"event: {event['type']}\ndata: {data}\n\n"
            number += 1
        else:
            yield KEEP_AWAKE


async def _events(chunks: AsyncIterator[Chunk], prepared: PreparedRequest) -> AsyncIterator[Event]:
    item, status, pruning = _Item(), "completed", None
    first: Chunk = {}
    async for chunk in caught(chunks):
        if not chunk:
            yield {}
        elif "error" in chunk:
            failed = {"code": "server_error", "message": chunk["error"]["message"]}
            yield {"type": "response.failed", "response": _response(first, prepared, "failed", []) | {"error": failed}}
        elif "usage" in chunk:
            response = _response(first, prepared, status, [item.item])
            usage = {"usage": _usage(chunk["usage"]), "pruning": pruning}
            yield {"type": f"response.{status}", "response": response | usage}
        else:
            if not first:
                first = chunk
                for kind in ("created", "in_progress"):
                    yield {"type": f"response.{kind}", "response": _response(first, prepared, "in_progress", [])}
            (choice,) = chunk["choices"]
            for event in item.add(choice["delta"], choice["logprobs"]):
                yield event
            if reason := choice["finish_reason"]:
                status, pruning = "incomplete" if reason == "length" else "completed", chunk["pruning"]
                for event in item.end(status):
                    yield event
