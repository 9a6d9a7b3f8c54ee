"""Who asks: the id and the trace of the HTTP request that is being answered, for logs and spans. Never content."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True)
class Caller:
    """`trace` holds the W3C headers traceparent and tracestate, where the client sent them. `tenant` is the name of its API key,
    and `levels` are those that the key may ask for, its default first: all of them if there is none. `admin` may change what is
    served."""

    request_id: str = ""
    trace: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    levels: tuple[str, ...] = ()
    admin: bool = False

    def allowed(self, menu: Iterable[str]) -> tuple[str, ...]:
        """Of a menu, what it may ask for, its default first."""
        known = tuple(menu)
        return tuple(level for level in self.levels if level in known) if self.levels else known

    def fields(self) -> dict[str, str]:
        """What a log line says of it: request_id, trace_id where there is a trace, tenant where there are keys."""
        traced = _TRACEPARENT.fullmatch(self.trace.get("traceparent", ""))
        told = {"request_id": self.request_id, "trace_id": traced[1] if traced else "", "tenant": self.tenant}
        return {name: value for name, value in told.items() if value}


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039  # it is frozen
"""Set for the tasks and worker threads of one HTTP request; the engine's thread has none, and asks the request."""
