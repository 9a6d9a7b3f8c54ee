"""Questions to answers: through the engine that serves, or over HTTP from a running server."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL.Image import Image

from evals.exam import RecordedAnswer, make_request
from evals.official.http import client, said_by, value_at
from evals.official.task import DataError, Question
from models.images import ImageError, decode
from server.engine import Engine
from server.errors import ContextTooLong

if TYPE_CHECKING:
    import httpx

TRIES = 50
"""How often a question comes back after 429 before it counts as not answered."""
RECEIPT = ("level", "visual_tokens", "visual_tokens_total", "layers", "layers_total", "flops_ratio", "checkpoint")


@dataclass(frozen=True)
class Answer:
    """A text and what the receipt said, if there was one. `refused` says why the model cannot answer, which counts as wrong;
    `failed` why it did not this time, so that the question is asked again."""

    text: str
    receipt: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    failed: str | None = None


Ask = Callable[[Iterable[Question], int], Iterator[tuple[Question, Answer]]]
"""Answers to questions, each of at most so many tokens, as they come."""


def through_engine(engine: Engine, level: str, at_once: int) -> Ask:
    """Raises DataError for a picture that cannot be decoded."""

    def ask(questions: Iterable[Question], max_tokens: int) -> Iterator[tuple[Question, Answer]]:
        pending: list[tuple[Question, RecordedAnswer]] = []
        for number, question in enumerate(questions):
            recorded = RecordedAnswer()
            picture = None if question.image is None else decode_picture(question)
            try:
                engine.submit(make_request(engine.preprocessor, number, picture, question.text, level, recorded, max_tokens))
            except ContextTooLong as error:
                yield question, Answer("", refused=str(error))
                continue
            pending.append((question, recorded))
            while len(pending) >= at_once:
                yield from step(pending)
        while pending:
            yield from step(pending)

    def step(pending: list[tuple[Question, RecordedAnswer]]) -> Iterator[tuple[Question, Answer]]:
        engine.step()
        done = [one for one in pending if one[1].done]
        pending[:] = [one for one in pending if not one[1].done]
        yield from ((question, _recorded(recorded)) for question, recorded in done)

    return ask


def _recorded(recorded: RecordedAnswer) -> Answer:
    if recorded.receipt is None:
        return Answer("", failed="the model failed on it; the log says why")
    receipt = asdict(recorded.receipt)
    return Answer(recorded.text.strip(), {name: receipt[name] for name in RECEIPT})


def _bytes(question: Question) -> bytes:
    return question.image.read_bytes() if isinstance(question.image, Path) else question.image or b""


def decode_picture(question: Question) -> Image:
    """Raises DataError that names the question and the file."""
    try:
        return decode(_bytes(question))
    except ImageError as error:
        named = f" {question.image}" if isinstance(question.image, Path) else ""
        raise DataError(f"{question.where}: the picture{named}: {error}") from error


def server_model(url: str) -> str:
    """The name of the model that a server has. Raises ConnectionError where no such server answers."""
    with client(url) as http:
        import httpx

        try:
            reply = http.get("v1/models")
        except httpx.TransportError as error:
            raise ConnectionError(f"no server answers at {url} ({error}); start one with `espalier serve`") from error
    if reply.status_code != 200:
        raise ConnectionError(f"{url} answers GET /v1/models with {reply.status_code}; is it an OpenAI-compatible server?")
    return str(value_at(reply, "data", 0, "id"))


def server_about(url: str, model: str) -> Callable[[str], dict[str, Any]]:
    """What an Espalier server tells of a model's weights and of what a level runs of them; of another server, nothing."""
    with client(url) as http:
        version, levels = http.get("version"), http.get("v1/pruning/levels", params={"model": model})
    if version.status_code != 200 or levels.status_code != 200:
        return lambda level: {}
    weights = {"fingerprint": value_at(version, "models", model)}
    menu = {one["name"]: _told(one) for one in value_at(levels, "data")}
    return lambda level: weights | menu.get(level, {})


def _told(level: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing of what runs."""
    return {name: value for name, value in level.items() if name not in ("name", "description", "visual_ratio", "card")}


def through_server(url: str, model: str, level: str, at_once: int) -> Ask:
    """The level goes in the header, which servers without levels ignore. Raises ConnectionError when the server is gone and
    ValueError for a request that it refuses whatever the question is."""

    def ask(questions: Iterable[Question], max_tokens: int) -> Iterator[tuple[Question, Answer]]:
        pending: set[Future[tuple[Question, Answer]]] = set()
        with client(url) as http, ThreadPoolExecutor(at_once) as pool:
            for question in questions:
                pending.add(pool.submit(one, http, question, max_tokens))
                if len(pending) >= at_once:
                    yield from finished(pending)
            while pending:
                yield from finished(pending)

    def finished(pending: set[Future[tuple[Question, Answer]]]) -> Iterator[tuple[Question, Answer]]:
        done, _ = wait(pending, return_when=FIRST_COMPLETED)
        pending -= done
        failed = [future for future in done if future.exception()]
        yield from (future.result() for future in done if not future.exception())
        if failed:  # what is still under way ends and is told first: it need not be asked again
            wait(pending)
            yield from (future.result() for future in pending if not future.exception())
            failed[0].result()

    def one(http: httpx.Client, question: Question, max_tokens: int) -> tuple[Question, Answer]:
        body = {
            "model": model, "messages": [{"role": "user", "content": _content(question)}], "max_tokens": max_tokens,
            "temperature": 0,
        }  # fmt: skip
        return question, _post(http, question, body, level)

    return ask


def _content(question: Question) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if question.image is not None:
        data = _bytes(question)
        kind = "png" if data.startswith(b"\x89PNG") else "webp" if data[8:12] == b"WEBP" else "jpeg"
        url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [*parts, {"type": "text", "text": question.text}]


def _post(http: httpx.Client, question: Question, body: dict[str, Any], level: str) -> Answer:
    import httpx

    for _ in range(TRIES):
        try:
            reply = http.post("v1/chat/completions", json=body, headers={"X-Pruning-Level": level})
        except httpx.TransportError as error:
            raise ConnectionError(f"{http.base_url} is gone ({error}); start it and run the same command to go on") from error
        if reply.status_code != 429:
            break
        after = reply.headers.get("retry-after", "")
        time.sleep(float(after) if after.isdecimal() else 1.0)
    if reply.status_code == 200:
        text, receipt = value_at(reply, "choices", 0, "message", "content") or "", value_at(reply).get("pruning") or {}
        return Answer(text.strip(), {name: receipt[name] for name in RECEIPT if name in receipt})
    reason = said_by(reply)
    if "context_length_exceeded" in reply.text:
        return Answer("", refused=reason)
    if reply.status_code >= 500 or reply.status_code == 429:
        return Answer("", failed=f"{reply.status_code}: {reason}")
    raise ValueError(f"{question.where}: the server refuses it with {reply.status_code}: {reason}")
