"""Reading requests: parsing, tokenising and decoding, in worker threads, since all of it takes too long for the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

from anyio import CapacityLimiter, to_thread

from server.errors import Overloaded

T = TypeVar("T")

READERS = 4
"""Requests read at once in each lane. Decoding a picture at the pixel limit takes some hundred megabytes for a moment."""
SHORT = 2**13
"""Bytes of a body that is read soon, whatever it says."""
SLICE = 2**18
"""Bytes to be looked at in one call: it holds the interpreter's lock, and so the event loop."""
_PARSING = threading.Lock()
_LEFT: ContextVar[threading.Event | None] = ContextVar("left", default=None)


class ClientLeft(Exception):
    """Nobody waits for what is being read."""


class Reading:
    """Two lanes, so that a text never waits for pictures, each with a bounded queue."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._lanes = {pictures: CapacityLimiter(READERS) for pictures in (True, False)}

    async def run(self, read: Callable[[], T], *, pictures: bool) -> T:
        """`read` in a thread. Raises Overloaded when too many wait already. When this is cancelled, the thread learns of it."""
        lane = self._lanes[pictures]
        if lane.statistics().tasks_waiting >= self._max_waiting:
            raise Overloaded("too many requests are being read; try again in 1 s", 1.0)
        left = threading.Event()
        token = _LEFT.set(left)
        try:
            return await to_thread.run_sync(read, limiter=lane, abandon_on_cancel=True)
        finally:
            left.set()
            _LEFT.reset(token)


def parsing(body: bytes) -> AbstractContextManager[object]:
    """To be held while a body is parsed: that holds the interpreter's lock, for which everybody else would wait as often as there
    are threads that parse. So long bodies take turns."""
    return _PARSING if len(body) > SHORT else nullcontext()


def check_wanted() -> None:
    """Raise ClientLeft in a thread whose reader has been cancelled. To be called before each costly step."""
    left = _LEFT.get()
    if left and left.is_set():
        raise ClientLeft
