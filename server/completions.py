"""OpenAI's older completions, a text in and its continuation out, as a form of the chat's chunks; and the tokenizer's routes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from server.chat import chat_of, check_length, check_tokens, open_chat, prepare, with_tools
from server.errors import InvalidRequest
from server.replies import Chunk, chat_events
from server.request import PreparedRequest
from server.schemas import CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from server.served import Served
from server.settings import Settings

if TYPE_CHECKING:
    from server.engine import Engine


def read_completion(served: Served, settings: Settings, body: bytes, header: str | None) -> PreparedRequest:
    """A completion's body to a prepared request. Its special tokens count as such: the caller writes the whole prompt."""
    request = parse(CompletionRequest, body)
    picked = served.pick(request.model)
    prompt = _prompt(picked.engine, request)
    level = request.pruning.level if request.pruning else None
    prepared = prepare(picked, settings, request, prompt, header=header, body=level, kind="cmpl-")
    picked.engine.reserve(prepared.level, len(prompt), (), prepared.sampling.max_tokens, "prompt")
    return prepared


def _prompt(engine: Engine, request: CompletionRequest) -> list[int]:
    if isinstance(request.prompt, str):
        check_length(engine, len(request.prompt), "prompt")
        tokens = engine.preprocessor.tokenize(request.prompt, special=request.add_special_tokens is not False)
    else:
        tokens = request.prompt
        check_tokens(engine, tokens, "prompt")
    if not tokens:
        raise InvalidRequest("prompt: must not be empty", param="prompt")
    if engine.preprocessor.count_images(tokens):
        raise InvalidRequest("prompt: a completion holds no images; ask about them at /v1/chat/completions", param="prompt")
    return tokens


def tokenize(served: Served, settings: Settings, body: bytes) -> dict[str, Any]:
    """vLLM's reply to `POST /tokenize`: the tokens of a text, or of a chat with each image as its visual tokens."""
    request = parse(TokenizeRequest, body)
    engine = served.pick(request.model).engine
    if request.messages is not None:
        chat = with_tools(chat_of(request.messages, request), request.tool_use())
        tokens, _ = open_chat(engine, settings, chat)
    else:
        assert request.prompt is not None
        check_length(engine, len(request.prompt), "prompt")
        tokens = engine.preprocessor.tokenize(request.prompt, special=request.add_special_tokens is not False)
    reply: dict[str, Any] = {"count": len(tokens), "max_model_len": engine.context_length, "tokens": tokens}
    spell = engine.preprocessor.detokenize
    return reply | {"token_strs": [spell([token]) for token in tokens] if request.return_token_strs else None}


def detokenize(served: Served, body: bytes) -> dict[str, str]:
    """vLLM's reply to `POST /detokenize`."""
    request = parse(DetokenizeRequest, body)
    engine = served.pick(request.model).engine
    check_tokens(engine, request.tokens, "tokens")
    return {"prompt": engine.preprocessor.detokenize(request.tokens)}


# ---- the older form of an answer


def completion_events(chunks: AsyncIterator[Chunk], prepared: PreparedRequest) -> AsyncIterator[str]:
    """Server-sent events of a completion."""
    return chat_events(as_completions(chunks), prepared)


async def as_completions(chunks: AsyncIterator[Chunk]) -> AsyncIterator[Chunk]:
    """A chat's stream in the form of a completion's; what only names the speaker is left out."""
    seen: dict[int, int] = {}
    async for chunk in chunks:
        choices = [_choice(piece, piece["delta"].get("content", ""), seen) for piece in chunk.get("choices", ())
                   if "role" not in piece["delta"]]  # fmt: skip
        if choices or not chunk.get("choices"):
            yield chunk | {"object": "text_completion", "choices": choices} if chunk else chunk


def completion_reply(reply: dict[str, Any], prepared: PreparedRequest) -> dict[str, Any]:
    """A chat's whole reply in the form of a completion's."""
    choices = [_choice(choice, choice["message"]["content"], {}) for choice in reply["choices"]]
    return reply | {"object": "text_completion", "choices": choices}


def _choice(chat: dict[str, Any], text: str, seen: dict[int, int]) -> dict[str, Any]:
    """One choice. `seen` counts by choice the characters before this one, for `text_offset`."""
    index, entries = chat["index"], (chat["logprobs"] or {}).get("content")
    logprobs = None if entries is None else _logprobs(entries, seen.get(index, 0))
    seen[index] = seen.get(index, 0) + len(text)
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": chat["finish_reason"]}


def _logprobs(entries: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(bytes(entry["bytes"]).decode(errors="ignore"))
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }
