"""Bytes that all requests in flight hold together: their bodies as they come, and the pictures that are fetched for them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from server.errors import Overloaded
from server.reading import ClientLeft


class BytesBudget:
    """Counts no more than `most` bytes at once, from any thread."""

    def __init__(self, most: int) -> None:
        self._most, self._used, self._lock = most, 0, threading.Lock()

    @contextmanager
    def share(self) -> Iterator[Share]:
        """What one request holds; all of it is free again at the end."""
        share = Share(self)
        token = SHARE.set(share)
        try:
            yield share
        finally:
            SHARE.reset(token)
            share.end()

    def add(self, size: int) -> None:
        """Raises Overloaded where they are more than there may be."""
        with self._lock:
            self._used += size
            if self._used > self._most:
                raise Overloaded("The bodies of the requests in flight fill the server; try again in 1 s", 1.0)

    def free(self, size: int) -> None:
        with self._lock:
            self._used -= size


class Share:
    """One request's bytes."""

    def __init__(self, budget: BytesBudget) -> None:
        self._budget, self._held, self._ended, self._lock = budget, 0, False, threading.Lock()

    def take(self, size: int) -> None:
        """Count bytes that were just read. Raises Overloaded, and ClientLeft in a thread that outlives its request."""
        with self._lock:
            if self._ended:
                raise ClientLeft
            self._held += size
            self._budget.add(size)

    def end(self) -> None:
        with self._lock:
            self._ended = True
            self._budget.free(self._held)


SHARE: ContextVar[Share | None] = ContextVar("share", default=None)
"""Of the request that is being read, in its threads too."""
