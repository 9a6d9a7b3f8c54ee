"""The engine: one thread that owns the model, and `step`, the system in a few lines.

Other threads only submit and abort. Nothing that one request does may fail another: an error fails its request and is counted,
and the thread goes on.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from models.checkpoint import Checkpoint
from models.flops import flops_ratio
from models.forward import SequenceInput, decode_input, forward, prefill_input
from models.kv_cache import KVCache, RequestCache
from models.route import Route
from models.vision.features import ImageFeatures
from pruning.dynamic.levels import AUTO, Level, expected_rows, make_route, menu_of, worthwhile_level
from pruning.dynamic.router import Reading, RouterFailed, read_request, words
from pruning.dynamic.router_file import load_router
from pruning.dynamic.token_merging import TokenPolicy
from server.detokenize import Detokenizer
from server.errors import ContextTooLong, Overloaded, ShuttingDown
from server.metrics import Metrics
from server.request import Delta, Event, Failed, Finished, FinishReason, Receipt, Request, Started, TokenLogprob
from server.sampling import is_greedy, new_generator, sample, top_logprobs
from server.scheduler import Job, NeverFits, QueueFull, Scheduler

log = logging.getLogger("espalier.engine")


@dataclass
class Limits:
    """What the engine may hold. `kv_rows` counts one token in one layer; 0 takes a share of the memory that is free."""

    max_running: int = 8
    max_waiting: int = 64
    max_prefill: int = 4096
    kv_rows: int = 0
    cached_images: int = 64


@dataclass
class Running:
    """A request in the batch: its route and cache, and the answer so far."""

    request: Request
    route: Route
    cache: RequestCache
    receipt: Receipt
    text: Detokenizer
    generator: torch.Generator
    work: SequenceInput
    made: list[int] = field(default_factory=list)
    admitted: float = 0.0
    last_token: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """Serves one checkpoint. `start` runs the thread; tests may call `step` themselves."""

    def __init__(
        self, checkpoint: Checkpoint, limits: Limits | None = None, *, default_level: str = "off",
        token_policy: TokenPolicy | None = None, name: str | None = None, metrics: Metrics | None = None,
    ) -> None:  # fmt: skip
        limits = limits or Limits()
        self.checkpoint, self.model, self.preprocessor = checkpoint, checkpoint.model, checkpoint.preprocessor
        self.metrics = metrics or Metrics()
        self._layer_change = checkpoint.manifest.layer_change
        self.router = load_router(checkpoint)
        self.token_policy: TokenPolicy = token_policy or ("router" if self.router else "merging")
        if self.token_policy == "router" and not self.router:
            raise ValueError(f"{checkpoint.directory} has no router; train one with `espalier route`, or name another policy")
        self.menu = menu_of(checkpoint.manifest, self.model.num_layers, routed=self.token_policy == "router")
        if default_level not in self.menu:
            raise ValueError(f"default level {default_level!r} is not one of {', '.join(self.menu)}")
        self.default_level = default_level
        self.model_name = name or checkpoint.name
        self.context_length, self.fingerprint = self.model.context_length, checkpoint.fingerprint
        self.created = int(time.time())
        rows = limits.kv_rows or _rows_for_free_memory(checkpoint, limits)
        self.kv = KVCache(rows, self.model.new_cache)
        self.scheduler = Scheduler(rows, limits.max_running, limits.max_waiting, limits.max_prefill)
        self._features: OrderedDict[str, ImageFeatures] = OrderedDict()
        self._cached_images = limits.cached_images
        self._requests: dict[str, Request] = {}
        self._aborted: set[str] = set()
        self._running: dict[str, Running] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._draining = self._stopped = False
        self.metrics.watch_load(
            lambda: len(self.scheduler.running), lambda: len(self.scheduler.waiting), lambda: self.scheduler.used / rows
        )
        self.metrics.loaded(self.model.bytes_by_format(), self.model.sparsity())

    # What other threads may call.

    @property
    def alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def ready(self) -> bool:
        return self.alive and not self._draining

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="espalier-engine", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Refuse new requests from now on; what was accepted runs on. Safe in a signal handler."""
        self._draining = True

    def stop(self, grace: float = 30.0) -> bool:
        """Drain, let requests end for up to `grace` seconds, fail the rest and stop. True if nothing was cut short."""
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: self.scheduler.idle or not self.alive, grace)
            finished, self._stopped = self.scheduler.idle, True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        return finished

    def submit(self, request: Request) -> None:
        """Queue a request; its events come on the engine's thread. Raises ContextTooLong, Overloaded or ShuttingDown."""
        room = self.context_length - len(request.prompt)
        if room < 1:
            raise ContextTooLong(
                f"the prompt has {len(request.prompt)} tokens and the context holds {self.context_length}; "
                "send a shorter question, fewer turns or fewer images",
                param="messages",
            )
        job = self._job(request)
        with self._changed:
            if self._draining or (self._thread and not self._thread.is_alive()):
                raise ShuttingDown("the server is shutting down")
            if request.id in self._requests:
                raise ValueError(f"request id {request.id} is in use")
            try:
                self.scheduler.submit(job)
            except NeverFits as error:
                raise ContextTooLong(f"the request can never run here: {error}", param="max_tokens") from error
            except QueueFull as error:
                raise Overloaded(str(error), error.retry_after) from error
            self._requests[request.id] = request
            self._changed.notify_all()

    def _job(self, request: Request, settled: Level | None = None) -> Job:
        """What a request holds: the most that its level may need, or what it is `settled` to."""
        level, layers = settled or self.menu[request.level], self.model.num_layers
        answer = min(request.sampling.max_tokens, self.context_length - len(request.prompt))
        per_image = self.preprocessor.visual_tokens_per_image
        prompt = expected_rows(level, len(request.prompt), len(request.images), per_image, layers)
        running = layers - level.skipped_layers
        return Job(request.id, prompt + answer * running, prompt // running)

    def abort(self, request_id: str) -> None:
        """Forget a request, waiting or running; it emits nothing more. Unknown ids are ignored: it may just have ended."""
        with self._changed:
            if request_id in self._requests:
                self._aborted.add(request_id)
                self._changed.notify_all()

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
            self._changed.wait_for(lambda: self._stopped or self._aborted or not self.scheduler.idle)
            return not self._stopped

    def _cut_short(self) -> None:
        self._drop_aborted()
        with self._changed:
            self._draining = True
            left = list(self._requests.values())
        for request in left:
            self._end(request, "error")
            self._emit(request, Failed("the server stopped before this answer was complete"))

    @torch.inference_mode()
    def step(self) -> None:
        """One pass: drop the aborted, admit the waiting, run prompts and single tokens together, hand the tokens out."""
        self._drop_aborted()
        with self._changed:
            admitted = [self._requests[job.id] for job in self.scheduler.admit()]
        for request in admitted:
            try:
                self._begin(request)
            except RouterFailed:
                self._guard(request, self._degrade)
            except Exception as error:
                self._fail(request, error)
        if not self._running:
            return
        batch = list(self._running.values())
        started = time.monotonic()
        logits = self._forward(batch)
        self._hand_out(batch, logits, time.monotonic() - started)

    def _drop_aborted(self) -> None:
        with self._changed:
            aborted, self._aborted = self._aborted, set()
        for request_id in aborted:
            if request := self._requests.get(request_id):
                self._end(request, "abort")

    def _guard(self, request: Request, act: object, *args: object) -> None:
        """Run one request's part; an error fails that request alone."""
        try:
            act(request, *args)  # type: ignore[operator]
        except Exception as error:
            self._fail(request, error)

    def _degrade(self, request: Request) -> None:
        """Queue a request again at level off, which needs no router and more memory."""
        log.warning("request %s: the router's scores are not finite; it runs at level off", request.id)
        self.metrics.degradations.labels(request.level, "off").inc()
        with self._changed:
            self.scheduler.finish(request.id)
            request.level, request.reason = "off", f"the router failed at level {request.level}"
            self.scheduler.submit(self._job(request))

    def _fail(self, request: Request, error: Exception) -> None:
        log.error("request %s failed", request.id, exc_info=error)
        self._end(request, "error")
        self._emit(request, Failed("the model failed on this request; it can be sent again"))

    def _begin(self, request: Request) -> None:
        """Encode the images, make the route, lay out the prompt's rows and reserve its cache."""
        now = time.monotonic()
        request.timings["queue"] = now - request.created - request.timings.get("image", 0.0)
        features = [self._encode(image.digest, image.pixels) for image in request.images]
        encoded = time.monotonic()
        level = self.menu[request.level]
        seed = int(request.images[0].digest[:8], 16) if request.images else 0
        reading = self._read(request, features) if level.routed else None
        level, chance = self._settle(request, level, reading) if level.rungs else (level, None)
        route, visual = make_route(level, features, self.model.num_layers, self._layer_change, self.token_policy, seed, reading)
        request.timings |= {"encode": encoded - now, "route": time.monotonic() - encoded}
        answer = min(request.sampling.max_tokens, self.context_length - len(request.prompt))
        rows = [n + answer if runs else 0 for n, runs in zip(route.rows(len(request.prompt)), route.layers, strict=True)]
        cache = self.kv.allocate(request.id, rows)
        ids = torch.tensor(request.prompt, device=self.model.device)
        work = prefill_input(self.model, ids, visual, route, cache)
        receipt = Receipt(
            level=level.name, reason=request.reason, visual_tokens=len(route.kept_tokens), visual_tokens_total=route.visual_tokens,
            layers=sum(route.layers), layers_total=self.model.num_layers, passed_layers=len(route.frozen_layers),
            checkpoint=self.fingerprint,
            expected_agreement=None if chance is None else round(chance, 4),
            flops_ratio=round(flops_ratio(self.model.config, route, len(request.prompt), _router_flops(reading, route)), 4),
        )  # fmt: skip
        self.metrics.routed(receipt, len(request.prompt))
        text = Detokenizer(self.preprocessor.tokenizer, request.sampling.stop)
        generator = new_generator(request.sampling.seed)
        self._running[request.id] = Running(request, route, cache, receipt, text, generator, work, admitted=time.monotonic())

    def _read(self, request: Request, features: Sequence[ImageFeatures]) -> Reading | None:
        """What the router makes of a request, where it chooses."""
        if self.router is None or self.token_policy != "router" or not features:
            return None
        return read_request(self.router, self.model, features, words(request.prompt, self.model.config.image_token_id))

    def _settle(self, request: Request, level: Level, reading: Reading | None) -> tuple[Level, float | None]:
        """What a level that chooses by question, or the one most worth its arithmetic, is for this request, and the chance that its
        answer stays. The most that it could be was reserved."""
        chance: float | None = None
        if reading is None:
            settled = self.menu["off"] if level.name == AUTO else replace(self.menu["off"], name=level.name)
        elif level.name == AUTO:
            settled, chance = worthwhile_level(self.menu, reading.chances, later=request.later)
        else:
            settled, chance = level.settled(reading.chances)
        if level.name == AUTO:
            request.reason = f"auto: {_expectation(settled, chance)}"
            self.metrics.degradations.labels(AUTO, settled.name).inc()
        request.level = settled.name
        with self._changed:
            self.scheduler.shrink(self._job(request, settled))
        return settled, chance

    def _encode(self, digest: str, pixels: torch.Tensor) -> ImageFeatures:
        """An image's features [1, visual_tokens, width], remembered by content: encoding does not depend on the level."""
        features = self._features.get(digest)
        if features is None:
            features = self.model.vision(pixels[None].to(self.model.device, self.model.dtype))
        else:
            self.metrics.cache_hits.labels("image").inc()
        self._features[digest] = features
        self._features.move_to_end(digest)
        while len(self._features) > self._cached_images:
            self._features.popitem(last=False)
        return features

    def _forward(self, batch: Sequence[Running]) -> list[torch.Tensor | Exception]:
        """Logits of each request, or what went wrong with it. If the common pass fails, each one runs alone to find out whose."""
        lengths = [list(one.cache.lengths) for one in batch]
        try:
            return list(forward(self.model, [one.work for one in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [error]
            log.exception("a pass over %d requests failed; running each alone", len(batch))
        for one, length in zip(batch, lengths, strict=True):
            one.cache.lengths[:] = length
        return [self._forward([one])[0] for one in batch]

    def _hand_out(self, batch: Sequence[Running], logits: Sequence[torch.Tensor | Exception], seconds: float) -> None:
        now = time.monotonic()
        for one, row in zip(batch, logits, strict=True):
            if isinstance(row, Exception):
                self._fail(one.request, row)
            elif not torch.isfinite(row).all():
                self._fail(one.request, ArithmeticError("logits are not finite"))
            else:
                self._guard(one.request, self._advance, one, row, now, seconds)

    def _advance(self, request: Request, one: Running, logits: torch.Tensor, now: float, seconds: float) -> None:
        """Draw a token, hand out its text, and either end the request or lay out its next row."""
        if not one.made:
            request.timings["prefill"] = seconds
            self.metrics.first_token.labels(request.level).observe(now - request.created)
            self._emit(request, Started(one.receipt, dict(request.timings)))
        else:
            one.decode_seconds += now - one.last_token
            self.metrics.inter_token.labels(request.level).observe(now - one.last_token)
        one.last_token = now
        token = int(logits.argmax()) if is_greedy(request.sampling) else sample(logits, one.made, request.sampling, one.generator)
        one.made.append(token)
        self.metrics.generated_tokens.inc()
        ends = token in self.checkpoint.eos
        text = "" if ends else one.text.push(token)
        room = min(request.sampling.max_tokens, self.context_length - len(request.prompt))
        reason: FinishReason | None = "stop" if ends or one.text.stopped else "length" if len(one.made) >= room else None
        if reason:
            text += one.text.finish()
        logprobs = self._logprobs(request, logits, token)
        if text or logprobs:
            self._emit(request, Delta(text, logprobs))
        if reason:
            self._complete(one, reason)
        else:
            position = len(request.prompt) + len(one.made) - 1
            ids = torch.tensor([token], device=self.model.device)
            one.work = decode_input(self.model, ids, position, one.route, one.cache)

    def _logprobs(self, request: Request, logits: torch.Tensor, token: int) -> tuple[TokenLogprob, ...]:
        if request.sampling.logprobs is None:
            return ()
        own, top = top_logprobs(logits, token, request.sampling.logprobs)
        spell = self.preprocessor.tokenizer.decode
        return (TokenLogprob(spell([token]), own, tuple((spell([t]), value) for t, value in top)),)

    def _complete(self, one: Running, reason: FinishReason) -> None:
        request = one.request
        request.timings["decode"] = one.decode_seconds
        self._end(request, reason)
        self._emit(
            request, Finished(reason, len(request.prompt), len(one.made), one.receipt, dict(request.timings))
        )  # fmt: skip

    def _end(self, request: Request, outcome: str) -> None:
        """Give back everything a request holds."""
        with self._changed:
            known = self._requests.pop(request.id, None)
            self._aborted.discard(request.id)
            self.scheduler.finish(request.id)
            self._running.pop(request.id, None)
            self.kv.free(request.id)
            self._changed.notify_all()
        if known:
            self.metrics.finished(request.level, outcome, time.monotonic() - request.created, request.timings)

    def _emit(self, request: Request, event: Event) -> None:
        try:
            request.emit(event)
        except Exception:  # the reader is gone (its event loop is closed); the answer has nowhere to go
            log.warning("request %s has no reader any more", request.id)
            self.abort(request.id)


def _expectation(settled: Level, chance: float | None) -> str:
    """Why `auto` chose a level, in words."""
    if chance is None:
        return "no picture, and nothing to leave out"
    if settled.name == "off":
        return "no level saves enough for what it risks of this answer"
    return f"{settled.name} keeps this answer with an expected chance of {chance:.3f}: more is not worth its arithmetic"


def _router_flops(reading: Reading | None, route: Route) -> int:
    images = len(reading.visual) if reading else 0
    return reading.flops(len(route.kept_tokens) // images) if reading and images else 0


def _rows_for_free_memory(checkpoint: Checkpoint, limits: Limits, share: float = 0.3) -> int:
    """Rows of KV cache that `share` of the free memory holds, but no more than full batches at full context can use."""
    model = checkpoint.model
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    row = 2 * max(model.kv_heads) * model.head_dim * model.dtype.itemsize  # whichever layers run, they fit
    return max(1, min(int(free * share) // row, limits.max_running * model.context_length * model.num_layers))
