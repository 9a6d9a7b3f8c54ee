"""uvicorn's protocol, with the deadline that it lacks: for a request's headers, and for the rest of a body already answered."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

TIMEOUT_S = 20.0
"""Seconds from a connection's start, or from its last answer, to the end of the next request's headers."""


class DeadlineProtocol(H11Protocol):
    """Hangs up on clients that hold a connection without a request: uvicorn's own limit begins anew with each byte."""

    _deadline: asyncio.TimerHandle | None = None

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
