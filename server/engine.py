"""The engine: one thread that owns the model, and `step`, the system in a few lines: admit, plan, run, sample, hand out.

Other threads only submit and abort. Nothing that one request does may fail another: an error fails its request and is counted,
and the thread goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import ceil, inf
from typing import TYPE_CHECKING

import llguidance.hf
import torch
from llguidance import LLTokenizer

from models.checkpoint import Checkpoint
from models.families import Layout
from models.kv_cache import KVCache
from models.llava import Llava
from models.vision.features import ImageFeatures
from pruning.dynamic.planner import Planner
from pruning.dynamic.token_policy import TokenPolicy
from server.answering import Answering
from server.batch import divide, lay_out, native_tokens, run_pass
from server.ended import count_ended, time_told
from server.errors import ContextTooLong, DeadlineMissed, EspalierError, Overloaded, ShuttingDown
from server.load import DefaultLevel, WorkRate
from server.memory import free_bytes
from server.metrics import Metrics
from server.prefill import Prefill
from server.request import Event, Failed, Finished, FinishReason, PreparedImage, Request
from server.running import Running
from server.scheduler import QueueFull, ScheduledRequest, Scheduler
from server.shadow import MAX_TOKENS as CHECK_TOKENS
from server.shadow import Shadow
from server.version import version

if TYPE_CHECKING:  # its package is an extra
    from server.tracing import Tracing

log = logging.getLogger("espalier.engine")

LATE_TIMES, HUNG_S, HUNG_TIMES, HUNG_FIRST_S = 2.0, 4.0, 10.0, 60.0
"""A pass is late, and the engine not ready, when it takes HUNG_S and LATE_TIMES what is expected of it. It hangs at HUNG_TIMES
that; or at HUNG_FIRST_S, while nothing is known."""
PREFIX_SHARE = 4
"""Beginnings of prompts may hold a quarter of the KV cache's rows, beside them."""


@dataclass
class Limits:
    """What the engine may hold. `kv_rows` counts one token in one layer; 0 takes a share of the memory that is free. `max_prefill`
    is how many tokens of prompts run in one pass."""

    max_running: int = 8
    max_waiting: int = 64
    max_wait_s: float = inf
    max_prefill: int = 1024
    kv_rows: int = 0
    promised_bytes: int = 0  # of what is free: other engines' caches may still take them
    cached_images: int = 64


class Engine:
    """Serves one checkpoint. `start` runs the thread; tests may call `step` themselves."""

    def __init__(
        self, checkpoint: Checkpoint, limits: Limits | None = None, *, default_level: str = "off",
        token_policy: TokenPolicy | None = None, name: str | None = None, metrics: Metrics | None = None,
        tracing: Tracing | None = None, degrade: bool = False, shadow: float = 0.0,
    ) -> None:  # fmt: skip
        limits = limits or Limits()
        self.checkpoint, self.model, self.preprocessor = checkpoint, checkpoint.model, checkpoint.preprocessor
        self.metrics, self._tracing = metrics or Metrics(), tracing
        self.planner = Planner(checkpoint, token_policy)
        self.menu, self.token_policy = self.planner.menu, self.planner.token_policy
        if default_level not in self.menu:
            raise ValueError(f"default level {default_level!r} is not one of {', '.join(self.menu)}")
        self.default_level = default_level
        levels = [default_level, *(self.cheaper(default_level) if degrade else ())]
        self._default = DefaultLevel(levels, time.monotonic())
        self.model_name = name or checkpoint.name
        self.context_length, self.fingerprint = self.model.context_length, checkpoint.fingerprint
        self.created = int(time.time())
        rows = limits.kv_rows or _rows_for_free_memory(checkpoint, limits)
        self.kv = KVCache(rows, self.model.new_cache)
        self.scheduler = Scheduler(rows, limits.max_running, limits.max_waiting, limits.max_prefill, limits.max_wait_s)
        self._max_prefill = limits.max_prefill
        self._work = WorkRate()
        self._prefill = Prefill(
            checkpoint, self.planner, self.metrics, self._work, default_level=default_level, cached_images=limits.cached_images,
            prefix_rows=rows // PREFIX_SHARE,
        )  # fmt: skip
        self._shadow = Shadow(checkpoint, self.planner, self._prefill, self.kv, self.metrics, shadow)
        self._answers = Answering(checkpoint, self.metrics, self._emit)
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()
        self._encoding: dict[str, list[ImageFeatures]] = {}
        self._running: dict[str, Running] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._stopped = False
        self._pass: tuple[float, float] | None = None  # when the one that runs is late, and when it hangs
        self.metrics.watch_load(
            lambda: len(self.scheduler.running), lambda: len(self.scheduler.waiting), lambda: self.scheduler.used / rows,
            self._saturation, self.backlog_seconds,
        )  # fmt: skip
        self.metrics.start_at_zero(self.menu)
        for level in self._default.levels[1:]:
            self.metrics.degradations.labels(default_level, level)
        self.metrics.loaded(
            self.model.bytes_by_format(), self.model.sparsity(), version=version(), model=self.model_name,
            checkpoint=self.fingerprint, dtype=str(self.model.dtype).removeprefix("torch."), device=self.model.device.type,
        )  # fmt: skip

    # What other threads may call.

    def current_default(self) -> str:
        """The level that a request gets now if it names none."""
        return self._default.choose(self._saturation(), time.monotonic())

    def cheaper(self, level: str) -> list[str]:
        """The levels that keep fewer visual tokens, the fullest first."""
        ratio = {name: level.visual_ratio for name, level in self.menu.items()}
        return sorted((name for name in ratio if ratio[name] < ratio[level]), key=ratio.__getitem__, reverse=True)

    @property
    def idle(self) -> bool:
        """Whether no request runs or waits. Takes no lock: the watchdog asks too, and an engine may hang."""
        return self.scheduler.idle

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @cached_property
    def grammar_tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance knows it: about a second's work for 32,000 tokens, so only where it is needed."""
        return llguidance.hf.from_tokenizer(self.preprocessor.tokenizer, eos_token=sorted(self.checkpoint.eos))

    @property
    def ready(self) -> bool:
        late = (limits := self._pass) is not None and time.monotonic() > limits[0]
        return self.alive and not self._draining and not late

    @property
    def hung_seconds(self) -> float:
        """For how long the pass that runs has counted as hung; 0 while all is well."""
        return max(0.0, time.monotonic() - limits[1]) if (limits := self._pass) else 0.0

    @property
    def promised_bytes(self) -> int:
        """What its caches of keys and values may still take."""
        return (self.kv.budget + self.kv.budget // PREFIX_SHARE - self.kv.used) * _row_bytes(self.model)

    def give_up(self, message: str) -> None:
        """Refuse new requests and fail all that are here; for when the engine's thread cannot."""
        self.drain()
        with self._changed:
            left = list(self._requests.values())
        for request in left:
            self._emit(request, Failed(message))

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="espalier-engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Refuse new requests from now on; what was accepted runs on. Safe in a signal handler."""
        self._draining = True

    def stop(self, grace: float | None = 30.0) -> bool:
        """Drain, let requests end for up to `grace` seconds, None for as long as they take; fail the rest and stop. True if nothing
        was cut short."""
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: self.scheduler.idle or not self.alive, grace)
            finished, self._stopped = self.scheduler.idle, True
            self._changed.notify_all()
        if self._thread:
            self._thread.join(HUNG_S)
        return finished and not self.alive

    def submit(self, *requests: Request) -> None:
        """Queue the choices of one reply, all or none; their events come on the engine's thread.

        Raises ContextTooLong, Overloaded or ShuttingDown.
        """
        scheduled = [ScheduledRequest(one.id, *self._reserve(one)) for one in requests]
        with self._changed:
            if self._draining or (self._thread and not self._thread.is_alive()):
                raise ShuttingDown("the server is shutting down")
            if used := [one.id for one in requests if one.id in self._requests]:
                raise ValueError(f"request id {used[0]} is in use")
            with _told_as_overload():
                self.scheduler.submit(*scheduled)
            self._requests |= {one.id: one for one in requests}
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raises Overloaded where `submit` would anyway, so that what is refused has cost little."""
        with self._changed, _told_as_overload():
            self.scheduler.check_room()

    def reserve(
        self, level: str, prompt_tokens: int, images: Sequence[Layout], max_tokens: int, param: str = "messages"
    ) -> tuple[int, int]:
        """The most that such a request may hold: rows of cache, and prefill tokens. Raises ContextTooLong, on `param` of its body,
        for one that never fits."""
        if prompt_tokens >= self.context_length:
            raise ContextTooLong.of(prompt_tokens, self.context_length, param)
        new_tokens = min(max_tokens, self.context_length - prompt_tokens)
        most = self.planner.reserve(level, prompt_tokens, images, new_tokens)
        if most.cache_rows > self.kv.budget:
            message = f"it needs {most.cache_rows} rows of KV cache (tokens times layers) and the server has {self.kv.budget}"
            raise ContextTooLong(f"the request can never run here: {message}", param="max_tokens")
        return most.cache_rows, most.prefill_tokens

    def _reserve(self, request: Request) -> tuple[int, int]:
        return self.reserve(request.level, len(request.prompt), _layouts(request), request.sampling.max_tokens)

    def _max_new_tokens(self, request: Request) -> int:
        return min(request.sampling.max_tokens, self.context_length - len(request.prompt))

    def abort(self, request_id: str) -> None:
        """Forget a request, waiting or running; it emits nothing more. Unknown ids are ignored: it may just have ended."""
        with self._changed:
            if request_id in self._requests:
                self._aborted.add(request_id)
                self._changed.notify_all()

    def told(self, request: Request) -> None:
        """A client has all answers to a request that was `withheld`, at the level and since the first token that this one says."""
        time_told(request, self.metrics, self._tracing, self.model_name)

    # The engine's thread.

    def _run(self) -> None:
        torch.set_grad_enabled(False)
        try:
            while self._wait_for_work():
                self.step()
        finally:  # by `stop`, or by a fault of the engine itself: nobody is left to wait for ever
            self._cut_short()

    def _wait_for_work(self) -> bool:
        """False once the engine shall stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._aborted or not (self.scheduler.idle and self._shadow.idle))
            return not self._stopped

    def _cut_short(self) -> None:
        self._drop_aborted()
        with self._changed:
            self._draining = True
            left = list(self._requests.values())
        message = "the server stopped before this answer was complete"
        for request in left:
            self._end(request, "error")
            self._emit(request, Failed(message, ShuttingDown(message) if self._stopped else None))

    @torch.inference_mode()
    def step(self) -> None:
        """One pass: admit, plan, run, sample, hand out. While there is nobody, an answer is checked."""
        started = time.monotonic()
        self._drop_aborted()
        if self.scheduler.idle:
            self._check_answer()
            return
        self._shadow.give_way()
        self._refuse_late()
        self._admit()
        self._watch(started, self._started_seconds() + self._work.decode_pass)  # of the next pass at most
        self._prepare()
        self._run_batch()
        self._pass = None
        self.metrics.busy.inc(time.monotonic() - started)

    def _check_answer(self) -> None:
        if not self._shadow.idle:
            rows = CHECK_TOKENS * self.model.num_layers
            expected = self._work.prompt_seconds(rows, self._shadow.visual_tokens) + self._work.decode_pass
            self._watch(time.monotonic(), expected)
            self._shadow.step()
            self._pass = None

    def _watch(self, started: float, expected: float) -> None:
        """A pass begins, of which so many seconds are expected, or nothing is known."""
        hangs = HUNG_S + HUNG_TIMES * expected if expected else HUNG_FIRST_S
        self._pass = started + HUNG_S + LATE_TIMES * expected, started + hangs

    def _started_seconds(self) -> float:
        """What is left of the prompts of those admitted."""
        with self._changed:
            requests = [self._requests[one] for one in list(self._encoding)]
            prompts = [one.input for one in list(self._running.values()) if not one.answering]
        rows = sum(len(prompt) * sum(prompt.route.layers) for prompt in prompts)
        return sum(map(self._prompt_seconds, requests)) + self._work.prompt_seconds(rows, 0)

    def _saturation(self) -> float:
        with self._changed:
            return self.scheduler.saturation

    def predict_seconds(
        self, level: str, prompt_tokens: int, images: Sequence[Layout], max_tokens: int, n: int = 1
    ) -> float | None:
        """Engine time of such a request with `n` choices, by the pace of those before it; None before the first."""
        rows, visual = self.planner.expected_rows(level, prompt_tokens, images), sum(image.visual_tokens for image in images)
        return round(self._work.prompt_seconds(n * rows, visual) + n * self._work.answer_seconds(max_tokens), 4) or None

    def predict_times(
        self, level: str, prompt_tokens: int, images: Sequence[Layout], max_tokens: int, n: int = 1
    ) -> tuple[float, float]:
        """Seconds from now, behind all that runs and waits, to the first token of such a request and the last of its `n` choices.

        Choices run at once as far as there are places; each runs the prompt, whose pictures are encoded once.
        """
        rows, visual = self.planner.expected_rows(level, prompt_tokens, images), sum(image.visual_tokens for image in images)
        with self._changed:
            places = self.scheduler.max_running
            full = len(self.scheduler.running) >= places
            running = list(self._running.values()) if full else []
        work, at_once = self._work, min(n, places)
        left = min((max(0.0, min(work.answer_tokens, one.max_new_tokens) - len(one.output_ids)) for one in running), default=0.0)
        before = work.decode_pass * left + self.backlog_seconds() + self._started_seconds()
        first = before + work.prompt_seconds(at_once * rows, visual)
        answers = ceil(n / places) * work.decode_pass * min(work.answer_tokens, max_tokens)
        return first, first + work.prompt_seconds((n - at_once) * rows, 0) + answers

    def backlog_seconds(self) -> float:
        """Engine time that the queue will take, each request at the level that it asks for."""
        return sum(self._prompt_seconds(one) + self._work.answer_seconds(self._max_new_tokens(one)) for one in self._waiting())

    def _waiting(self) -> list[Request]:
        with self._changed:
            return [self._requests[scheduled.id] for scheduled in self.scheduler.waiting]

    def _prompt_seconds(self, request: Request) -> float:
        layouts = _layouts(request)
        rows = self.planner.expected_rows(request.level, len(request.prompt), layouts)
        return self._work.prompt_seconds(rows, sum(layout.visual_tokens for layout in layouts))

    def _drop_aborted(self) -> None:
        with self._changed:
            aborted, self._aborted = self._aborted, set()
        for request_id in aborted:
            if request := self._requests.get(request_id):
                self._end(request, "abort")

    def _refuse_late(self) -> None:
        """End those whose deadline has passed while they waited."""
        now = time.monotonic()
        for request in self._waiting():
            if request.deadline and request.deadline.late_by(now) > 0:
                self._end(request, None)
                message = "the request's deadline passed while it waited"
                self._emit(request, Failed(message, DeadlineMissed(message, max(0.1, self.backlog_seconds()))))

    def _admit(self) -> None:
        now = time.monotonic()
        with self._changed:
            admitted = [self._requests[scheduled.id] for scheduled in self.scheduler.admit()]
        for request in admitted:
            self._degrade(request)
            request.timings["queue"] = now - request.created - request.timings.get("image", 0.0)
            self._encoding[request.id] = []

    def _degrade(self, request: Request) -> None:
        """Under load the default may have gone down while it waited. Choices of one request keep one level, as do answers that may
        be made again at a fuller one."""
        level = self.current_default()
        fixed = request.reason not in ("default", "load") or request.parent.choices > 1 or request.confidence
        if fixed or level not in self.cheaper(request.level):
            return
        most = self.planner.reserve(level, len(request.prompt), _layouts(request), self._max_new_tokens(request))
        held = self.scheduler.running[request.id].cache_rows
        if level in request.parent.caller.allowed(self.menu) and most.cache_rows <= held:
            request.level, request.reason = level, "load"

    def _prompts_per_answer(self) -> float:
        """How many wait for their first token, for each answer that goes on; without end where none does."""
        answering = sum(one.answering for one in self._running.values())
        asking = len(self._running) - answering + len(self._encoding) + len(self.scheduler.waiting)
        return asking / answering if answering else inf

    def _prepare(self) -> None:
        """Encode the pictures of those admitted and plan their routes: a picture a pass for each answer's prompts, at least one."""
        each = self._prompts_per_answer()
        pictures = None if each == inf else max(1, int(each))
        for request_id, features in list(self._encoding.items()):
            request = self._requests[request_id]
            images = request.images[len(features) :][:pictures]
            if pictures is not None:
                pictures -= len(images)
            self._guard(request, self._encode, images)
            if len(features) == len(request.images):
                self._guard(request, self._plan)

    def _guard(self, request: Request, act: Callable[..., None], *args: object) -> None:
        """Run one request's part; an error fails that request alone."""
        try:
            act(request, *args)
        except EspalierError as refusal:  # what only the answer shows to be more than the server follows
            self._end(request, "error" if request.id in self._running else None)
            self._emit(request, Failed(refusal.message, refusal))
        except Exception as error:
            log.error("request %s failed", request.id, exc_info=error)
            self._end(request, "error")
            self._emit(request, Failed("the model failed on this request; it can be sent again"))

    def _encode(self, request: Request, images: Sequence[PreparedImage]) -> None:
        started = time.monotonic()
        self._encoding[request.id] += [self._prefill.encode(image, request.level) for image in images]
        request.timings["encode"] = request.timings.get("encode", 0.0) + time.monotonic() - started

    def _plan(self, request: Request) -> None:
        """Plan the route, and give back what was reserved and is not needed."""
        features = self._encoding.pop(request.id)
        plan = self._prefill.plan(request, features)
        new_tokens = self._max_new_tokens(request)
        rows = plan.route.rows(len(request.prompt), new_tokens)
        with self._changed:
            self.scheduler.shrink(request.id, sum(rows))
        cache = self.kv.allocate(request.id, rows)
        self._running[request.id] = self._prefill.begin(request, plan, features, cache, new_tokens)

    def _run_batch(self) -> None:
        """A token for each answer, and a part of the prompts beside them."""
        started, running = time.monotonic(), list(self._running.values())
        native = native_tokens(self.model, running)
        tokens = self._work.pass_tokens(self.model.num_layers, self._max_prefill, self._prompts_per_answer(), native)
        answers, prompts = divide(running, tokens)
        rows = sum(part.prefill_rows for part in prompts)
        results = run_pass(self.model, answers, prompts)
        seconds = time.monotonic() - started
        for one in running:
            if not one.answering:
                one.request.timings["prefill"] = one.request.timings.get("prefill", 0.0) + seconds
        for part, logits in zip([*answers, *prompts], results, strict=True):
            if logits is not None:
                self._guard(part.one.request, self._take, part.one, logits)
        if answering := [one for one in self._running.values() if one.answering]:
            lay_out(self.model, answering)
        self._work.observe_pass(time.monotonic() - started, rows, len(answers))

    def _take(self, request: Request, one: Running, logits: torch.Tensor | Exception) -> None:
        """The answer's next token, which may end the request."""
        if isinstance(logits, Exception):
            raise logits
        if not one.answering:
            self._prefill.keep_prefix(one)
        if reason := self._answers.take(one, logits):
            self._complete(one, reason)

    def _complete(self, one: Running, reason: FinishReason) -> None:
        request = one.request
        request.timings["decode"] = one.decode_seconds
        self._end(request, reason)
        self._shadow.note(one)
        receipt = one.confidence.told(one.receipt)
        self._emit(
            request, Finished(reason, len(request.prompt), len(one.output_ids), receipt, dict(request.timings), one.cached_rows)
        )  # fmt: skip

    def _end(self, request: Request, outcome: str | None) -> None:
        """Give back everything a request holds; without an outcome it was refused, and is not counted as ended."""
        with self._changed:
            known = self._requests.pop(request.id, None)
            self._aborted.discard(request.id)
            self.scheduler.finish(request.id)
            self._encoding.pop(request.id, None)
            running = self._running.pop(request.id, None)
            self.kv.free(request.id)
            self._changed.notify_all()
        if known and outcome:
            self._count_ended(request, outcome, running)

    def _count_ended(self, request: Request, outcome: str, running: Running | None) -> None:
        new_tokens = len(running.output_ids) if running else 0
        if outcome in ("stop", "length"):
            self._work.observe_answer(new_tokens)
        receipt = running.receipt if running else None
        count_ended(request, outcome, new_tokens, receipt, self.metrics, self._tracing, self.model_name)

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # the reader is gone (its event loop is closed); the answer has nowhere to go
            log.warning("request %s has no reader any more", request.id)
            self.abort(request.id)


@contextmanager
def _told_as_overload() -> Iterator[None]:
    try:
        yield
    except QueueFull as error:
        raise Overloaded(str(error), error.retry_after) from error


def _layouts(request: Request) -> list[Layout]:
    return [image.picture.layout for image in request.images]


def _rows_for_free_memory(checkpoint: Checkpoint, limits: Limits, share: float = 0.3) -> int:
    """Rows of KV cache that `share` of the free memory holds, but no more than full batches at full context can use."""
    model = checkpoint.model
    free = max(0, free_bytes(str(model.device)) - limits.promised_bytes)
    return max(1, min(int(free * share) // _row_bytes(model), limits.max_running * model.context_length * model.num_layers))


def _row_bytes(model: Llava) -> int:
    """Of the layer with the most heads: whichever layers run, they fit."""
    return 2 * max(model.kv_heads) * model.head_dim * model.dtype.itemsize
