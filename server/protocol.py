"""uvicorn's protocol, with what it lacks: a deadline for a request's headers and for the rest of a body already answered, and an
end to bodies in crumbs."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import DEFAULT_MAX_INCOMPLETE_EVENT_SIZE, H11Protocol

TIMEOUT_S = 20.0
"""Seconds from a connection's start, or from its last answer, to the end of the next request's headers."""
FREE_CHUNKS, LEAST_CHUNK = 250, 64
"""Chunks of a body that may have any size, and the bytes that more of them must have on average: each takes the event loop some
microseconds, and a read may hold tens of thousands."""


class Connection(h11.Connection):
    """Refuses a body whose chunks are many and tiny, as h11 refuses what is no HTTP."""

    _chunks = _bytes = 0
    in_crumbs = False

    def next_event(self) -> Any:
        event = super().next_event()
        if type(event) is h11.Request:
            self._chunks = self._bytes = 0
        elif type(event) is h11.Data:
            self._chunks, self._bytes = self._chunks + 1, self._bytes + len(event.data)
            self.in_crumbs = self._chunks > FREE_CHUNKS and self._bytes < self._chunks * LEAST_CHUNK
            if self.in_crumbs:
                raise h11.RemoteProtocolError("the body's chunks are too small")
        return event


class DeadlineProtocol(H11Protocol):
    """Hangs up on clients that hold a connection without a request: uvicorn's own limit begins anew with each byte."""

    _deadline: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn: Connection = Connection(h11.SERVER, DEFAULT_MAX_INCOMPLETE_EVENT_SIZE)

    def send_400_response(self, msg: str) -> None:
        """Where no answer has begun; else to hang up says enough."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            told = f"A body of over {FREE_CHUNKS} chunks must have {LEAST_CHUNK} bytes in each, on average."
            super().send_400_response(told if self.conn.in_crumbs else msg)
        else:
            self.transport.close()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_watching()

    def _watch(self) -> None:
        answered = self.conn.our_state is h11.DONE
        if self.conn.their_state is h11.IDLE or (answered and self.conn.their_state is h11.SEND_BODY):
            self._deadline = self._deadline or self.loop.call_later(TIMEOUT_S, self.transport.close)
        else:
            self._stop_watching()

    def _stop_watching(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None
