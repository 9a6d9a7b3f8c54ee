"""Who runs next: continuous batching with admission instead of preemption. Pure Python, no tensors.

First come, first served. A request's rows of keys and values are reserved whole when it is admitted, so nothing that runs is
ever pushed out, and nobody behind the head of the queue overtakes it: every request that could ever fit runs and ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from server.load import Rate

PACE_S = 0.5
"""Shortest time over which the pace of a full server is taken: requests that run together end together."""


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
    """`budget` rows of cache, and requests that run or wait. No more wait than `max_wait_s` seconds take at the pace of late, but
    always as many as may run."""

    def __init__(
        self, budget: int, max_running: int, max_waiting: int, max_prefill: int, max_wait_s: float = inf
    ) -> None:
        self.budget = budget
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_wait_s = max_wait_s
        self.max_prefill = max_prefill
        self.waiting: deque[ScheduledRequest] = deque()
        self.running: dict[str, ScheduledRequest] = {}
        self.used = 0
        self._pace = Rate()  # seconds for each request that ends while others wait
        self._finished, self._finished_since = 0, inf  # not yet in the pace

    def submit(self, first: ScheduledRequest, *others: ScheduledRequest) -> None:
        """Queue requests of one client, all or none: where the first may wait, so may the others, or a queue that is shorter than
        they are many would never take them. Raises NeverFits, or QueueFull when as many wait as may and there is no place."""
        largest = max(request.cache_rows for request in (first, *others))
        if largest > self.budget:
            raise NeverFits(f"it needs {largest} rows of KV cache and the server has {self.budget}")
        if len(self.waiting) >= self._most_waiting() and not self._has_place(first):
            raise self._queue_full()
        self.waiting += first, *others

    def check_room(self) -> None:
        """Raises QueueFull where any request would be refused now: all places are taken, in the queue too."""
        if len(self.waiting) >= self._most_waiting() and len(self.running) + len(self.waiting) >= self.max_running:
            raise self._queue_full()

    def _most_waiting(self) -> int:
        """As many as `max_wait_s` takes, but no fewer than may run; all of them while the pace is unknown."""
        in_time = self.max_wait_s / self._pace.value if self._pace.value else inf
        return int(min(self.max_waiting, max(self.max_running, in_time)))

    def _queue_full(self) -> QueueFull:
        """To come back when half of the queue is gone."""
        return QueueFull(max(1.0, self._pace.value * len(self.waiting) / 2))

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
        """The pace is that of a server with all it can run: idle time is none, nor is that of a few alone."""
        if not self.waiting:
            self._finished_since = inf
        elif self._finished_since == inf:
            self._finished, self._finished_since = 0, now
        else:
            self._finished += 1
            if now - self._finished_since >= PACE_S:
                self._pace.observe(now - self._finished_since, self._finished)
                self._finished, self._finished_since = 0, now

    @property
    def saturation(self) -> float:
        """What runs and waits over what may run, in places or in rows of cache, whichever is scarcer; above 1 some must wait."""
        waiting = list(self.waiting)
        places = (len(self.running) + len(waiting)) / self.max_running
        return max(places, (self.used + sum(request.cache_rows for request in waiting)) / self.budget)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running
