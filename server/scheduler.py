"""Who runs next: continuous batching with admission instead of preemption. Pure Python, no tensors.

First come, first served. A request's rows of keys and values are reserved whole when it is admitted, so nothing that runs is
ever pushed out, and nobody behind the head of the queue overtakes it: every request that could ever fit runs and ends.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace


class NeverFits(Exception):
    """The request is larger than the whole budget; waiting would not help."""


class QueueFull(Exception):
    """Not now; `retry_after` seconds is when a place should be free."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


@dataclass(frozen=True)
class ScheduledRequest:
    """What the scheduler needs to know: rows of cache in all (tokens times layers), and rows that prefill runs in a layer."""

    id: str
    cache_rows: int
    prefill_tokens: int


def share(rows: Sequence[int], budget: int) -> list[int]:
    """How many of the `rows` that each prompt has left run in this pass, the oldest prompt first; `budget` in all.

    Ours. The oldest gets half, so that it ends; the shortest come next, so that a short question does not wait for a long prompt.
    """
    shares = [0] * len(rows)
    by_length = sorted(range(len(rows)), key=rows.__getitem__)
    for index, most in ((0, budget - budget // 2), *((index, budget) for index in by_length)) if rows else ():
        shares[index] += min(most, budget - sum(shares), rows[index] - shares[index])
    return shares


class Scheduler:
    def __init__(self, budget: int, max_running: int, max_waiting: int, max_prefill: int) -> None:
        self.budget = budget
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_prefill = max_prefill
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: dict[str, ScheduledRequest] = {}
        self.used = 0
        self._last_finish = time.monotonic()
        self._pace = 1.0  # seconds between finished requests, smoothed

    def submit(self, request: ScheduledRequest) -> None:
        """Queue a request. Raises NeverFits, or QueueFull when `max_waiting` wait already and there is no place for one more."""
        if request.cache_rows > self.budget:
            raise NeverFits(f"it needs {request.cache_rows} rows of KV cache and the server has {self.budget}")
        if len(self.waiting) >= self.max_waiting and not self._has_place(request):
            raise self._queue_full()
        if self.idle:
            self._last_finish = time.monotonic()  # idle time is no pace
        self.waiting.append(request)

    def check_room(self) -> None:
        """Raises QueueFull where any request would be refused now: all places are taken, in the queue too."""
        if len(self.waiting) >= self.max_waiting and len(self.running) + len(self.waiting) >= self.max_running:
            raise self._queue_full()

    def _queue_full(self) -> QueueFull:
        return QueueFull(max(1.0, math.ceil(self._pace * len(self.waiting) / 2)))

    def _has_place(self, request: ScheduledRequest) -> bool:
        """Whether all who wait and this one may run now, so that it will not really wait."""
        rows = self.used + sum(waiting.cache_rows for waiting in self.waiting) + request.cache_rows
        return len(self.running) + len(self.waiting) < self.max_running and rows <= self.budget

    def admit(self) -> list[ScheduledRequest]:
        """Move the requests that run from now on out of the queue: as many as places, cache and this step's prefill allow."""
        admitted: list[ScheduledRequest] = []
        prefill = 0
        while self.waiting and len(self.running) < self.max_running:
            request = self.waiting[0]
            if self.used + request.cache_rows > self.budget or (admitted and prefill + request.prefill_tokens > self.max_prefill):
                break
            self.waiting.popleft()
            self.running[request.id] = request
            self.used += request.cache_rows
            prefill += request.prefill_tokens
            admitted.append(request)
        return admitted

    def shrink(self, request_id: str, cache_rows: int) -> None:
        """A running request turned out to need no more than this; the rest is free for others."""
        held = self.running[request_id]
        if cache_rows > held.cache_rows:
            raise ValueError(f"request {request_id} holds {held.cache_rows} rows and cannot shrink to {cache_rows}")
        self.running[request_id] = replace(held, cache_rows=cache_rows)
        self.used -= held.cache_rows - cache_rows

    def finish(self, request_id: str) -> bool:
        """Give back all that a request holds, wherever it is; False if it is unknown (it ended already)."""
        request = self.running.pop(request_id, None)
        if request is not None:
            self.used -= request.cache_rows
            self._note_finish(time.monotonic())
            return True
        for waiting in self.waiting:
            if waiting.id == request_id:
                self.waiting.remove(waiting)
                return True
        return False

    def _note_finish(self, now: float) -> None:
        self._pace += 0.2 * (min(now - self._last_finish, 60.0) - self._pace)
        self._last_finish = now

    @property
    def saturation(self) -> float:
        """What runs and waits over what may run, in places or in rows of cache, whichever is scarcer; above 1 some must wait."""
        waiting = list(self.waiting)
        places = (len(self.running) + len(waiting)) / self.max_running
        return max(places, (self.used + sum(request.cache_rows for request in waiting)) / self.budget)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running
