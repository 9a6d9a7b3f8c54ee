"""Reading requests: parsing, tokenising and decoding, in worker threads, since all of it takes too long for the event loop."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from typing import TypeVar

from anyio import CapacityLimiter, to_thread
from starlette.requests import Request

from server.errors import Overloaded

T = TypeVar("T")

READERS = 4
"""Requests read at once in each lane. Decoding a picture at the pixel limit takes some hundred megabytes for a moment."""
NICENESS = 5
"""Of readers of pictures and large bodies: on a core that they share with the engine, it gets three quarters. Where other processes
fill the cores, much more would starve whoever holds the interpreter's lock, and with it everybody."""
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
        self._threads = {True: ThreadPoolExecutor(READERS, initializer=_step_back), False: ThreadPoolExecutor(READERS)}

    async def run(self, read: Callable[[], T], *, pictures: bool) -> T:
        """`read` in a thread. Raises Overloaded when too many wait already. When this is cancelled, the thread learns of it."""
        lane = self._lanes[pictures]
        if lane.statistics().tasks_waiting >= self._max_waiting:
            raise Overloaded("too many requests are being read; try again in 1 s", 1.0)
        left = threading.Event()
        token = _LEFT.set(left)
        try:
            async with lane:
                return await asyncio.get_running_loop().run_in_executor(self._threads[pictures], copy_context().run, read)
        finally:
            left.set()
            _LEFT.reset(token)


async def read_body(request: Request) -> bytes:
    """The whole body. A long one is joined in a thread: to get memory for 30 MB would hold up the event loop for some 45 ms."""
    pieces = [piece async for piece in request.stream()]
    long = sum(map(len, pieces)) > SHORT
    return await to_thread.run_sync(b"".join, pieces) if long else b"".join(pieces)


def _step_back() -> None:
    """Give this thread NICENESS, where threads can have their own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + NICENESS)


def parsing(text: bytes | str) -> AbstractContextManager[object]:
    """To be held while a body or a part of it is looked through: that holds the interpreter's lock, for which everybody else would
    wait as often as there are threads that do so. So long ones take turns."""
    return _PARSING if len(text) > SHORT else nullcontext()


def check_wanted() -> None:
    """Raise ClientLeft in a thread whose reader has been cancelled. To be called before each costly step."""
    left = _LEFT.get()
    if left and left.is_set():
        raise ClientLeft
