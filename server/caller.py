"""Who asks: the id and the trace of the HTTP request that is being answered, for logs and spans. Never content."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Caller:
    """`trace` holds the W3C headers traceparent and tracestate, where the client sent them."""

    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)

    def fields(self) -> dict[str, str]:
        """What a log line says of it: request_id, and trace_id where there is a trace."""
        traced = _TRACEPARENT.fullmatch(self.trace.get("traceparent", ""))
        told = {"request_id": self.request_id, "trace_id": traced[1] if traced else ""}
        return {name: value for name, value in told.items() if value}


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  # it is frozen
"""Set for the tasks and worker threads of one HTTP request; the engine's thread has none, and asks the request."""
