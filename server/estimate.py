"""What a chat would cost at each level: tokens, FLOPs and time, from its headers and its text alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from server.chat import chat_of, open_chat, prepare, with_tools
from server.errors import ContextTooLong
from server.schemas import ChatRequest, parse
from server.served import Served
from server.settings import Settings


def estimate(served: Served, settings: Settings, body: bytes) -> dict[str, Any]:
    """The reply to `POST /v1/pruning/estimate`. Nothing is decoded or run; raises a 4xx of `server.errors` as the chat would."""
    request = parse(ChatRequest, body)
    picked = served.pick(request.model)
    engine, level = picked.engine, request.pruning.level if request.pruning else None
    prepared = prepare(picked, settings, request, [], header=None, body=level)
    chat = with_tools(chat_of(request.messages, request), prepared.tools)
    prompt, opened = open_chat(engine, settings, chat)
    layouts = [image.layout for image in opened]
    max_tokens = prepared.sampling.max_tokens
    levels = []
    for name in engine.menu:
        typical, *others = engine.planner.estimate(name, len(prompt), layouts)
        seconds = engine.predict_seconds(name, len(prompt), layouts, max_tokens, prepared.n)
        cost = {"level": name, **asdict(typical), "seconds": seconds}
        if others:
            most = max(others, key=lambda one: one.flops)
            cost["at_most"] = {"visual_tokens": most.visual_tokens, "flops_ratio": most.flops_ratio}
        try:
            engine.reserve(name, len(prompt), layouts, max_tokens, chat.field)
        except ContextTooLong as error:
            cost["refused"] = error.message
        levels.append(cost)
    images = sum(layout.visual_tokens for layout in layouts)
    queue = round(engine.backlog_seconds(), 4)
    return {
        "object": "list", "prompt_tokens": len(prompt), "image_tokens": images, "max_tokens": max_tokens, "queue_seconds": queue,
        "data": levels,
    }  # fmt: skip
