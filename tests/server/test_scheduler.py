"""The scheduler's promises to callers: everyone who is let in runs and ends, in order, within the memory there is."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import count
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.load import LEAST_NATIVE_TOKENS, LEAST_TOKENS, STRETCH, WorkRate
from server.scheduler import NeverFits, QueueFull, ScheduledRequest, Scheduler, share

rows = st.integers(0, 60)
prompts = st.integers(1, 40)
MOST_CHOICES = 3


class Traffic(RuleBasedStateMachine):
    """Requests come, are admitted, end and are given up in any order; a plain model of the queue looks on."""

    @initialize(
        budget=st.integers(1, 100), places=st.integers(1, 5), queue=st.integers(0, 6), prefill=st.integers(1, 80)
    )
    def build(self, budget: int, places: int, queue: int, prefill: int) -> None:
        self.scheduler = Scheduler(budget, places, queue, prefill)
        self.waiting: list[ScheduledRequest] = []
        self.running: list[ScheduledRequest] = []
        self.submitted = 0

    def has_place(self, request: ScheduledRequest) -> bool:
        everyone = [*self.running, *self.waiting, request]
        fits = sum(one.cache_rows for one in everyone) <= self.scheduler.budget
        return fits and len(everyone) <= self.scheduler.max_running

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """A running request needs less than was reserved for it."""
        place = data.draw(st.integers(0, len(self.running) - 1))
        old = self.running[place]
        self.running[place] = replace(old, cache_rows=data.draw(st.integers(0, old.cache_rows)))
        self.scheduler.shrink(old.id, self.running[place].cache_rows)

    @rule(rows=rows, prompt=prompts, choices=st.integers(1, MOST_CHOICES))
    def submit(self, rows: int, prompt: int, choices: int) -> None:
        requests = [ScheduledRequest(f"request-{self.submitted + index}", rows, prompt) for index in range(choices)]
        self.submitted += choices
        if rows > self.scheduler.budget:
            with pytest.raises(NeverFits, match=str(self.scheduler.budget)):
                self.scheduler.submit(*requests)
        elif len(self.waiting) >= self.scheduler.max_waiting and not self.has_place(requests[0]):
            with pytest.raises(QueueFull) as refusal:
                self.scheduler.submit(*requests)
            assert refusal.value.retry_after >= 1
        else:
            self.scheduler.submit(*requests)
            self.waiting += requests

    @rule()
    def admit(self) -> None:
        idle = not self.running
        admitted = self.scheduler.admit()
        assert admitted == self.waiting[: len(admitted)], "first come, first served"
        self.waiting = self.waiting[len(admitted) :]
        self.running += admitted
        assert len(admitted) < 2 or sum(one.prefill_tokens for one in admitted) <= self.scheduler.max_prefill
        assert admitted or not (idle and self.waiting), "whoever fits an empty server gets in"
        if self.waiting:  # nobody waits for a place that is free
            head = self.waiting[0]
            assert (
                len(self.running) == self.scheduler.max_running
                or sum(one.cache_rows for one in self.running) + head.cache_rows > self.scheduler.budget
                or (admitted and sum(one.prefill_tokens for one in admitted) + head.prefill_tokens > self.scheduler.max_prefill)
            )

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.running))
        assert self.scheduler.finish(request.id)
        self.running.remove(request)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        assert self.scheduler.finish(request.id)
        self.waiting.remove(request)

    @rule()
    def finish_a_stranger(self) -> None:
        assert not self.scheduler.finish("nobody")

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert list(self.scheduler.waiting) == self.waiting
        assert list(self.scheduler.running.values()) == self.running
        assert self.scheduler.used == sum(one.cache_rows for one in self.running) <= self.scheduler.budget
        assert len(self.running) <= self.scheduler.max_running
        assert len(self.waiting) < max(self.scheduler.max_waiting, self.scheduler.max_running) + MOST_CHOICES
        assert self.scheduler.idle == (not self.waiting and not self.running)

    def teardown(self) -> None:
        """Whatever happened: if those that run keep ending, everyone who waits runs too."""
        for _ in range(2 * (self.submitted + 1) if hasattr(self, "scheduler") else 0):
            for request in list(self.running):
                self.scheduler.finish(request.id)
                self.running.remove(request)
            self.admit()
        if hasattr(self, "scheduler"):
            assert self.scheduler.idle
            assert self.scheduler.used == 0


TestTraffic = Traffic.TestCase


@given(
    sizes=st.lists(st.tuples(st.integers(1, 50), st.integers(1, 5)), min_size=1, max_size=40),
    budget=st.integers(50, 120),
    places=st.integers(1, 6),
    prefill=st.integers(1, 60),
)
def test_small_requests_never_overtake_and_large_never_starve(sizes, budget, places, prefill):
    """A full queue, each request running for some steps: they start in order, and each within the steps of those before it."""
    scheduler = Scheduler(budget, places, len(sizes), prefill)
    lengths = {}
    for number, (rows, steps) in enumerate(sizes):
        scheduler.submit(ScheduledRequest(str(number), rows, rows))
        lengths[str(number)] = steps
    started, left = [], {}
    for step in range(sum(steps for _, steps in sizes) + len(sizes)):
        for request in scheduler.admit():
            started.append(request.id)
            assert step <= sum(lengths[earlier] for earlier in started[:-1]) + len(started)
            left[request.id] = lengths[request.id]
        for request_id in list(left):
            left[request_id] -= 1
            if not left[request_id]:
                scheduler.finish(request_id)
                del left[request_id]
        if scheduler.idle:
            break
    assert started == [str(number) for number in range(len(sizes))]
    assert scheduler.idle


def test_a_prompt_longer_than_a_whole_prefill_runs_alone():
    scheduler = Scheduler(budget=100, max_running=4, max_waiting=4, max_prefill=10)
    for name, prompt in (("long", 30), ("a", 4), ("b", 6), ("c", 1)):
        scheduler.submit(ScheduledRequest(name, 10, prompt))
    assert [request.id for request in scheduler.admit()] == ["long"]
    assert [request.id for request in scheduler.admit()] == ["a", "b"]
    assert [request.id for request in scheduler.admit()] == ["c"]


def test_without_a_queue_a_place_is_served_and_others_refused():
    scheduler = Scheduler(budget=10, max_running=2, max_waiting=0, max_prefill=100)
    scheduler.submit(ScheduledRequest("a", 5, 5))
    scheduler.submit(ScheduledRequest("b", 5, 5))
    with pytest.raises(QueueFull):
        scheduler.submit(ScheduledRequest("c", 0, 1))
    assert len(scheduler.admit()) == 2
    scheduler.finish("a")
    with pytest.raises(QueueFull):  # a place, but not the memory
        scheduler.submit(ScheduledRequest("d", 6, 1))
    scheduler.submit(ScheduledRequest("e", 5, 1))
    assert [request.id for request in scheduler.admit()] == ["e"]


def test_a_full_queue_is_known_before_a_request_is():
    scheduler = Scheduler(budget=10, max_running=1, max_waiting=1, max_prefill=100)
    for name in "ab":
        scheduler.check_room()
        scheduler.submit(ScheduledRequest(name, 5, 5))
        scheduler.admit()
    with pytest.raises(QueueFull):
        scheduler.check_room()
    scheduler.finish("b")
    scheduler.check_room()


def test_an_impossible_request_is_refused_even_by_a_full_queue():
    scheduler = Scheduler(budget=10, max_running=1, max_waiting=0, max_prefill=100)
    scheduler.submit(ScheduledRequest("a", 10, 1))
    with pytest.raises(NeverFits, match="11 rows"):
        scheduler.submit(ScheduledRequest("b", 11, 1))


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("server.scheduler.time", clock)
    return clock


def full(clock: Clock, max_waiting: int, max_wait_s: float = inf, *, pace: float = 0.1) -> Scheduler:
    """A scheduler in which requests have ended at a pace while others waited, and whose queue is full."""
    scheduler = Scheduler(budget=1000, max_running=2, max_waiting=max_waiting, max_prefill=100, max_wait_s=max_wait_s)
    numbers = count()

    def fill() -> None:
        with suppress(QueueFull):
            while True:
                scheduler.submit(ScheduledRequest(str(next(numbers)), 1, 1))
                scheduler.admit()

    for _ in range(150):
        fill()
        clock.now += pace
        scheduler.finish(next(iter(scheduler.running)))
        scheduler.admit()
    fill()
    return scheduler


def hint(scheduler: Scheduler) -> float:
    with pytest.raises(QueueFull) as refusal:
        scheduler.submit(ScheduledRequest("late", 1, 1))
    return refusal.value.retry_after


def test_the_hint_of_when_to_come_back_grows_with_the_queue(clock):
    assert hint(full(clock, 2)) == 1.0
    assert hint(full(clock, 100)) == pytest.approx(5.0, rel=0.1)


def test_the_queue_is_as_long_as_its_time_allows(clock):
    assert len(full(clock, 100, 2.0).waiting) == pytest.approx(20, abs=2)
    assert len(full(clock, 10, 2.0).waiting) == 10
    assert len(full(clock, 100, 2.0, pace=5.0).waiting) == 2, "as many as run"


def test_before_the_pace_is_known_the_queue_is_whole(clock):
    scheduler = Scheduler(budget=1000, max_running=2, max_waiting=50, max_prefill=100, max_wait_s=0.1)
    for number in range(50):
        scheduler.submit(ScheduledRequest(str(number), 1, 1))
    assert hint(scheduler) == 1.0


def test_idle_hours_are_no_pace(clock):
    scheduler = full(clock, 10)
    for hour in range(20):
        for name in [*(request.id for request in scheduler.waiting), *scheduler.running]:
            scheduler.finish(name)
        clock.now += 3600
        scheduler.submit(ScheduledRequest(f"{hour}", 1, 1))
        scheduler.admit()
        clock.now += 0.1
    with suppress(QueueFull):
        for number in range(20):
            scheduler.submit(ScheduledRequest(f"late {number}", 1, 1))
    assert hint(scheduler) == 1.0


def test_a_request_never_grows_once_it_runs():
    scheduler = Scheduler(10, 2, 0, 10)
    scheduler.submit(ScheduledRequest("a", 5, 1))
    scheduler.admit()
    with pytest.raises(ValueError, match="request a holds 5 rows and cannot shrink to 6"):
        scheduler.shrink("a", 6)


@given(rows=st.lists(st.integers(1, 50), max_size=6), budget=st.integers(1, 100))
def test_prompts_share_a_pass(rows: list[int], budget: int) -> None:
    shares = share(rows, budget)
    assert sum(shares) == min(budget, sum(rows))
    assert all(0 <= own <= left for own, left in zip(shares, rows, strict=True))
    assert not rows or shares[0] >= min(rows[0], budget / 2), "the oldest ends"


def test_the_shortest_prompt_comes_next() -> None:
    assert share([100, 30, 5], 20) == [10, 5, 5]
    assert share([100, 100], 21) == [21, 0], "of equals the older"
    assert share([5, 100], 20) == [5, 15]


def test_prompts_leave_answers_their_pace() -> None:
    work = WorkRate()
    assert [work.pass_tokens(10, 1000, 1.0, native) for native in (0, 36)] == [LEAST_TOKENS, LEAST_NATIVE_TOKENS]
    work.observe_pass(0.1, prefill_rows=0, new_tokens=4)
    work.observe_pass(2.0, prefill_rows=10 * 1000, new_tokens=0)
    assert work.pass_tokens(10, 1000, inf, 36) == 1000
    for prompts_per_answer in (0.25, 1.0):
        assert work.pass_tokens(10, 1000, prompts_per_answer, 0) == int(STRETCH * 0.1 / 0.002)
    assert work.pass_tokens(10, 1000, 3.0, 0) == int(3 * STRETCH * 0.1 / 0.002), "three wait for each that is answered"


def test_parts_are_as_large_as_one_native_call_takes() -> None:
    work = WorkRate()
    work.observe_pass(0.1, prefill_rows=0, new_tokens=4)
    work.observe_pass(STRETCH * 0.1, prefill_rows=60, new_tokens=0)
    sizes = {native: work.pass_tokens(1, 1000, 1.0, native) for native in (4, 8, 30, 31, 59, 60, 100)}
    assert sizes == {4: 60, 8: 60, 30: 60, 31: 31, 59: 59, 60: 60, 100: 60}
