"""From logits to an answer: draw its next token, hand out its text and log-probabilities, and see whether it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from models.checkpoint import Checkpoint
from server.batch import follow
from server.metrics import Metrics
from server.request import Delta, Event, FinishReason, Request, Started, TokenLogprob
from server.running import Running
from server.sampling import is_greedy, sample, top_logprobs


class Answering:
    """Draws the tokens of all requests; `emit` tells a request's events."""

    def __init__(self, checkpoint: Checkpoint, metrics: Metrics, emit: Callable[[Request, Event], None]) -> None:
        self._model, self._preprocessor, self._eos = checkpoint.model, checkpoint.preprocessor, checkpoint.eos
        self._metrics, self._emit = metrics, emit

    def take(self, one: Running, logits: Tensor) -> FinishReason | None:
        """Draw a token from logits [vocab] and hand out its text; returns why the answer ends, if it does."""
        if not torch.isfinite(logits).all():
            raise ArithmeticError("logits are not finite")
        self._record_token_time(one)
        request, sampling = one.request, one.request.sampling
        token, complete = self._draw(one, logits)
        calls = self._calls(one)
        ends = token in (self._eos if calls else one.ends)
        text = "" if ends else one.text.push(token, may_stop=len(one.output_ids) > sampling.min_tokens and not calls)
        full = len(one.output_ids) >= one.max_new_tokens
        reason: FinishReason | None = "stop" if ends or complete or one.text.stopped else "length" if full else None
        if reason:
            text += one.text.finish()
        logprobs = self._logprobs(one, logits, token, text)
        if text or logprobs:
            self._emit(request, Delta(text, logprobs))
        return reason

    def _calls(self, one: Running) -> bool:
        """Whether the answer is a function call, as its first tokens show."""
        if (tools := one.request.tools) is None:
            return False
        return tools.calls(b"".join(map(self._preprocessor.token_bytes, one.output_ids[:2])))  # the first may be a blank

    def _draw(self, one: Running, logits: Tensor) -> tuple[int, bool]:
        """The next token, and whether it completes what the answer must be."""
        request, sampling, constraint = one.request, one.request.sampling, one.request.constraint
        allowed = constraint.allowed(len(logits)) if constraint else None
        if is_greedy(sampling) and allowed is None:
            token = int(logits.argmax())
        else:
            token = sample(logits, one.output_ids, sampling, one.generator, request.prompt, one.ends, allowed)
        one.confidence.note(logits, allowed, token, partial(follow, self._model, one))
        one.output_ids.append(token)
        self._metrics.generated_tokens.inc()
        return token, constraint.take(token) if constraint else False

    def _record_token_time(self, one: Running) -> None:
        """The first token ends the prefill, and its event says what was planned."""
        now, request = time.monotonic(), one.request
        if one.output_ids:
            one.decode_seconds += now - one.last_token
            self._metrics.inter_token.labels(request.level).observe(now - one.last_token)
        else:
            if request.parent.first_token is None:
                request.parent.first_token = now
                if not request.withheld:
                    self._metrics.first_token.labels(request.level).observe(now - request.created)
            self._emit(request, Started(one.receipt, dict(request.timings)))
        one.last_token = now

    def _logprobs(self, one: Running, logits: Tensor, token: int, text: str) -> tuple[TokenLogprob, ...]:
        """Those of the tokens whose text is out with this one's."""
        count = one.request.sampling.logprobs
        if count is None:
            return ()
        own, top = top_logprobs(logits, token, count)
        entry = replace(self._entry(token, own), top=tuple(self._entry(*other) for other in top))
        if token in one.ends:  # it has no text
            entry = replace(entry, bytes=b"")
        return one.logprobs.push(entry, text, holds=one.text.holds, stopped=one.text.stopped)

    def _entry(self, token: int, logprob: float) -> TokenLogprob:
        return TokenLogprob(self._preprocessor.token_text(token), logprob, self._preprocessor.token_bytes(token))
