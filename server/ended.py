"""A request that has ended, in metrics, in the log and in its trace: once, whatever the number of its choices. An answer that is
made again was a request too, but what a client waited for is timed once: as it was told."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from server.logs import fields
from server.metrics import OUTCOMES, Metrics
from server.request import Receipt, Request

if TYPE_CHECKING:  # its package is an extra
    from server.tracing import Tracing

log = logging.getLogger("espalier.engine")


def count_ended(
    request: Request, outcome: str, new_tokens: int, receipt: Receipt | None, metrics: Metrics, tracing: Tracing | None, model: str
) -> None:
    """Count a client's request when the last of its choices has ended, by the worst outcome among them."""
    parent = request.parent
    parent.ended += 1
    parent.new_tokens += new_tokens
    parent.outcome = max(parent.outcome, outcome, key=OUTCOMES.index)
    if parent.ended < parent.choices:
        return
    seconds = time.monotonic() - request.created
    metrics.finished(request.level, parent.outcome, request.timings)
    if parent.outcome in ("stop", "length") and not request.withheld:
        metrics.request_seconds.labels(request.level).observe(seconds)
    if tracing:
        tracing.ended(request, model, receipt)
    stages = {stage: round(value, 4) for stage, value in request.timings.items()}
    log.info(
        "request %s: %s, level %s, %d prompt and %d new tokens, %.3f s (%s)",
        request.id, parent.outcome, request.level, len(request.prompt), parent.new_tokens, seconds,
        " ".join(f"{stage} {value:.3f}" for stage, value in stages.items()),
        extra=fields(
            **parent.caller.fields(), id=request.id, outcome=parent.outcome, pruning_level=request.level, reason=request.reason,
            prompt_tokens=len(request.prompt), new_tokens=parent.new_tokens, choices=parent.choices,
            visual_tokens=receipt and receipt.visual_tokens, visual_tokens_total=receipt and receipt.visual_tokens_total,
            flops_ratio=receipt and receipt.flops_ratio, seconds=round(seconds, 4), stages=stages,
        ),
    )  # fmt: skip


def time_told(request: Request, metrics: Metrics, tracing: Tracing | None, model: str) -> None:
    """Time a request whose answers might have been withheld, now that its client has them; its parent says since when."""
    now, first = time.monotonic(), request.parent.first_token
    assert first is not None
    metrics.first_token.labels(request.level).observe(first - request.created)
    metrics.request_seconds.labels(request.level).observe(now - request.created)
    if tracing:
        tracing.record(request, model, now)
