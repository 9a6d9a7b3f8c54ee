"""Deadlines that headers set: what cannot make them is refused at once, or runs at a cheaper level where that is allowed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pruning.dynamic.levels import AUTO
from server.caller import CALLER
from server.errors import DeadlineMissed, InvalidRequest
from server.request import PreparedRequest

ANSWER, FIRST_TOKEN = "X-Request-Deadline-Ms", "x-slo-ttft-ms"
"""Milliseconds from the request's arrival: to the end of the answer, and, as llm-d's scheduler has it, to its first token."""
MAX_MS = 86_400_000


@dataclass(frozen=True)
class Deadline:
    """When the first token and the whole answer must be there, as time.monotonic()."""

    first_token: float = math.inf
    answer: float = math.inf

    def late_by(self, now: float, first_token: float = 0.0, answer: float = 0.0) -> float:
        """Seconds too late of what takes so many from now; none or less makes it."""
        return now + max(first_token - self.first_token, answer - self.answer)


def read_deadline(headers: Mapping[str, str], arrived: float) -> Deadline | None:
    """None without such headers. Raises InvalidRequest, by name, for one that is no whole number of milliseconds."""
    found = {name: headers[name] for name in (FIRST_TOKEN, ANSWER) if name in headers}
    for name, value in found.items():
        if not (value.isascii() and value.isdecimal() and 0 < int(value[:10]) <= MAX_MS and len(value) < 10):
            raise InvalidRequest(f"{name}: must be whole milliseconds, from 1 to {MAX_MS}, not {value[:40]!r}", param=name)
    first, answer = (arrived + int(found[name]) / 1000 if name in found else math.inf for name in (FIRST_TOKEN, ANSWER))
    return Deadline(first, answer) if found else None


def in_time(prepared: PreparedRequest, deadline: Deadline | None) -> PreparedRequest:
    """The request at its level, or at the fullest cheaper one that makes it where that is allowed. Raises DeadlineMissed.

    An idle engine takes it anyway, as cheap as allowed: a refusal teaches nothing, so estimates that are too long would stay so.
    """
    if deadline is None:
        return prepared
    engine, now = prepared.engine, time.monotonic()
    size = len(prepared.prompt), [image.picture.layout for image in prepared.images], prepared.sampling.max_tokens, prepared.n
    late: list[float] = []
    for level in _levels(prepared):
        late.append(deadline.late_by(now, *engine.predict_times(level, *size)))
        if late[-1] <= 0:
            break
    else:
        if not engine.idle:
            message = f"the server is too busy to make this request's deadline: it would be {min(late):.1f} s late"
            raise DeadlineMissed(message, max(0.1, min(late)))
    reason = prepared.reason if level == prepared.level else "deadline"
    return replace(prepared, level=level, reason=reason, deadline=deadline)


def _levels(prepared: PreparedRequest) -> list[str]:
    """Its own, then the cheaper ones that it may run at, the fullest first."""
    allowed = CALLER.get().levels or tuple(prepared.engine.menu)
    may_change = prepared.meet_deadline or prepared.level == AUTO
    return [prepared.level, *(level for level in prepared.engine.cheaper(prepared.level) if may_change and level in allowed)]
