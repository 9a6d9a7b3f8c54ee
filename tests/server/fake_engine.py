"""An engine without a model: it answers from a script, on threads of its own, as the real one would."""

from __future__ import annotations

import base64
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from io import BytesIO
from typing import Any

import llguidance.hf
import torch
from llguidance import LLTokenizer
from PIL import Image

from checkpoints.embedded.build import build_processor
from models.families import Layout
from models.preprocess import Picture
from pruning.dynamic.levels import fixed_menu
from server.errors import ContextTooLong
from server.metrics import Metrics
from server.request import Delta, Event, Failed, Finished, Receipt, Request, Started, TokenLogprob

VISUAL_TOKENS = 12
LAYERS = 16
WORDS = ("A", " red", " star", ".")


@cache
def embedded_tokenizer() -> LLTokenizer:
    return llguidance.hf.from_tokenizer(build_processor().tokenizer)


class FakePreprocessor:
    """A token per word, VISUAL_TOKENS per image; refuses to let the assistant speak first."""

    tiled = False
    center_crop = False
    image_side = 2

    def __init__(self) -> None:
        self.busy = threading.Event()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self.seen: list[Image.Image] = []
        self.turns: list[dict[str, Any]] = []
        self.template: dict[str, bool] = {}

    def picture(self, image: Image.Image, *, alone: bool = True) -> Picture:
        self.seen.append(image)
        self.busy.set()
        self.may_finish.wait(30)
        return Picture(torch.zeros(1, 3, 2, 2), Layout(VISUAL_TOKENS))

    def layout(self, height: int, width: int, *, alone: bool = True) -> Layout:
        return Layout(VISUAL_TOKENS)

    vocab_size = 1000

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        """Numbers of words in order of appearance, behind a 0; `<image>` is 999."""
        return [0] * special + [999 if word == "<image>" else number for number, word in enumerate(text.split(), 1)]

    def detokenize(self, ids: Sequence[int]) -> str:
        return " ".join(f"w{token}" for token in ids)

    def count_images(self, ids: Sequence[int]) -> int:
        return ids.count(999)

    def prompt(self, messages: list[dict[str, Any]], layouts: list[Layout] | None = None, **template: bool) -> list[int]:
        self.turns, self.template = messages, template
        if messages[0]["role"] == "assistant":
            raise ValueError("the chat template refuses these messages: the user speaks first")
        parts = [part for message in messages for part in message["content"]]
        return [1] * sum(VISUAL_TOKENS if part["type"] == "image" else len(part["text"].split()) for part in parts)


class FakeEngine:
    """What a test may set: `refusals` of the next submits (None lets one pass), `full` to refuse all before they are read,
    `hold_after` how many events a request waits for `release`, `failure` of a reply's first choice after `fail_after` events, and
    `failures` of all at a level, at once.
    """

    model_name = "fake-llava"
    default_level = "off"
    context_length = 2000
    fingerprint = "fp_fake"
    created = 1_700_000_000
    promised_bytes = 0

    @property
    def grammar_tokenizer(self) -> LLTokenizer:
        return embedded_tokenizer()

    def __init__(self) -> None:
        self.preprocessor = FakePreprocessor()
        self.metrics = Metrics()
        self.menu = fixed_menu([0.1] * LAYERS, LAYERS, {"off": {"accuracy": 0.97}})
        self.ready = self.alive = True
        self.confidence: dict[str, float] = {}
        self.words: tuple[str, ...] = WORDS
        self.failure: Failed | None = None
        self.failures: dict[str, Failed] = {}
        self.fail_after = 0
        self.refusals: list[Exception | None] = []
        self.full: Exception | None = None
        self.hold_after: int | None = None
        self.release = threading.Event()
        self.submitted: list[Request] = []
        self.has_submitted = threading.Event()
        self.aborted: list[str] = []
        self.all_aborted = threading.Event()
        self._running: set[str] = set()

    def reserve(self, level: str, prompt_tokens: int, images: list[Layout], max_tokens: int, param: str) -> None:
        if prompt_tokens >= self.context_length:
            raise ContextTooLong.of(prompt_tokens, self.context_length, param)

    def check_room(self) -> None:
        if self.full:
            raise self.full

    def current_default(self) -> str:
        return self.default_level

    def submit(self, *requests: Request) -> None:
        if self.refusals and (refusal := self.refusals.pop(0)):
            raise refusal
        self._running |= {request.id for request in requests}
        self.submitted += requests
        self.has_submitted.set()
        for request in requests:
            threading.Thread(target=self._answer, args=(request,), daemon=True).start()

    def told(self, request: Request) -> None:
        """Nothing is timed here."""

    def abort(self, request_id: str) -> None:
        """As in the real engine, an id that has ended or never was is nothing to abort."""
        if request_id in self._running:
            self._running.discard(request_id)
            self.aborted.append(request_id)
            if not self._running:
                self.all_aborted.set()

    def _answer(self, request: Request) -> None:
        for count, event in enumerate(self._script(request)):
            if count == self.hold_after:
                self.release.wait(30)
            if request.id not in self._running:
                return
            if isinstance(event, Finished | Failed):
                self._running.discard(request.id)
            request.emit(event)

    def _script(self, request: Request) -> Iterator[Event]:
        level = self.menu[request.level]
        (point,) = level.operating_points
        total = VISUAL_TOKENS * len(request.images)
        kept = point.kept(VISUAL_TOKENS) * len(request.images)
        layers = LAYERS - point.skipped_layers
        receipt = Receipt(level.name, request.reason, kept, total, layers, LAYERS, 0.5, self.fingerprint)
        timings = {**request.timings, "queue": time.monotonic() - request.created, "encode": 0.002, "route": 0.001}
        timings["prefill"] = 0.004
        words = self.words if request.sampling.temperature == 0 else (f"seed {request.sampling.seed}",)
        said = words[: request.sampling.max_tokens]
        events: list[Event] = [Started(receipt, dict(timings))]
        events += [Delta(word, _logprobs(word, request.sampling.logprobs)) for word in said]
        if level.name in self.failures:
            yield self.failures[level.name]
            return
        if self.failure and request.id.endswith("-0"):
            yield from [*events[: self.fail_after], self.failure]
            return
        reason = "stop" if len(said) == len(words) else "length"
        yield from events
        receipt = replace(receipt, confidence=self.confidence.get(level.name) if request.confidence else None)
        yield Finished(reason, len(request.prompt), len(said), receipt, timings | {"decode": 0.008})


def _logprobs(token: str, alternatives: int | None) -> tuple[TokenLogprob, ...]:
    if alternatives is None:
        return ()
    own, never = (token, -0.25, token.encode()), ("\N{SNOWMAN}", float("-inf"), "\N{SNOWMAN}".encode())
    return (TokenLogprob(*own, (TokenLogprob(*own), TokenLogprob(*never))[:alternatives]),)


def picture(kind: str = "PNG", size: tuple[int, int] = (4, 4), mode: str = "RGB", color: Any = "red", **save: Any) -> bytes:
    """An image file."""
    file = BytesIO()
    Image.new(mode, size, color).save(file, kind, **save)
    return file.getvalue()


def data_url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces its size and ends there."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
