"""The scheduler's promises to callers: everyone who is let in runs and ends, in order, within the memory there is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.scheduler import Job, NeverFits, QueueFull, Scheduler

rows = st.integers(0, 60)
prompts = st.integers(1, 40)


class Traffic(RuleBasedStateMachine):
    """Requests come, are admitted, end and are given up in any order; a plain model of the queue looks on."""

    @initialize(
        budget=st.integers(1, 100), places=st.integers(1, 5), queue=st.integers(0, 6), prefill=st.integers(1, 80)
    )
    def build(self, budget: int, places: int, queue: int, prefill: int) -> None:
        self.scheduler = Scheduler(budget, places, queue, prefill)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.submitted = 0

    def has_place(self, job: Job) -> bool:
        everyone = [*self.running, *self.waiting, job]
        fits = sum(one.rows for one in everyone) <= self.scheduler.budget
        return fits and len(everyone) <= self.scheduler.max_running

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def shrink(self, data: st.DataObject) -> None:
        """A running job needs less than was reserved for it."""
        place = data.draw(st.integers(0, len(self.running) - 1))
        old = self.running[place]
        self.running[place] = Job(old.id, data.draw(st.integers(0, old.rows)), old.prompt)
        self.scheduler.shrink(self.running[place])

    @rule(rows=rows, prompt=prompts)
    def submit(self, rows: int, prompt: int) -> None:
        job = Job(f"job-{self.submitted}", rows, prompt)
        self.submitted += 1
        if rows > self.scheduler.budget:
            with pytest.raises(NeverFits, match=str(self.scheduler.budget)):
                self.scheduler.submit(job)
        elif len(self.waiting) >= self.scheduler.max_waiting and not self.has_place(job):
            with pytest.raises(QueueFull) as refusal:
                self.scheduler.submit(job)
            assert refusal.value.retry_after >= 1
        else:
            self.scheduler.submit(job)
            self.waiting.append(job)

    @rule()
    def admit(self) -> None:
        idle = not self.running
        admitted = self.scheduler.admit()
        assert admitted == self.waiting[: len(admitted)], "first come, first served"
        self.waiting = self.waiting[len(admitted) :]
        self.running += admitted
        assert len(admitted) < 2 or sum(job.prompt for job in admitted) <= self.scheduler.max_prefill
        assert admitted or not (idle and self.waiting), "whoever fits an empty server gets in"
        if self.waiting:  # nobody waits for a place that is free
            head = self.waiting[0]
            assert (
                len(self.running) == self.scheduler.max_running
                or sum(job.rows for job in self.running) + head.rows > self.scheduler.budget
                or (admitted and sum(job.prompt for job in admitted) + head.prompt > self.scheduler.max_prefill)
            )

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.running))
        assert self.scheduler.finish(job.id)
        self.running.remove(job)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.waiting))
        assert self.scheduler.finish(job.id)
        self.waiting.remove(job)

    @rule()
    def finish_a_stranger(self) -> None:
        assert not self.scheduler.finish("nobody")

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        assert list(self.scheduler.waiting) == self.waiting
        assert list(self.scheduler.running.values()) == self.running
        assert self.scheduler.used == sum(job.rows for job in self.running) <= self.scheduler.budget
        assert len(self.running) <= self.scheduler.max_running
        assert len(self.waiting) <= max(self.scheduler.max_waiting, self.scheduler.max_running)
        assert self.scheduler.idle == (not self.waiting and not self.running)

    def teardown(self) -> None:
        """Whatever happened: if those that run keep ending, everyone who waits runs too."""
        for _ in range(2 * (self.submitted + 1) if hasattr(self, "scheduler") else 0):
            for job in list(self.running):
                self.scheduler.finish(job.id)
                self.running.remove(job)
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
def test_a_small_job_behind_a_large_one_never_overtakes_and_the_large_one_never_starves(sizes, budget, places, prefill):
    """A full queue, each job running for some steps: they start in order, and each within the steps of those before it."""
    scheduler = Scheduler(budget, places, len(sizes), prefill)
    lengths = {}
    for number, (rows, steps) in enumerate(sizes):
        scheduler.submit(Job(str(number), rows, rows))
        lengths[str(number)] = steps
    started, left = [], {}
    for step in range(sum(steps for _, steps in sizes) + len(sizes)):
        for job in scheduler.admit():
            started.append(job.id)
            assert step <= sum(lengths[earlier] for earlier in started[:-1]) + len(started)
            left[job.id] = lengths[job.id]
        for job_id in list(left):
            left[job_id] -= 1
            if not left[job_id]:
                scheduler.finish(job_id)
                del left[job_id]
        if scheduler.idle:
            break
    assert started == [str(number) for number in range(len(sizes))]
    assert scheduler.idle


def test_a_prompt_longer_than_a_whole_prefill_runs_alone():
    scheduler = Scheduler(budget=100, max_running=4, max_waiting=4, max_prefill=10)
    for name, prompt in (("long", 30), ("a", 4), ("b", 6), ("c", 1)):
        scheduler.submit(Job(name, 10, prompt))
    assert [job.id for job in scheduler.admit()] == ["long"]
    assert [job.id for job in scheduler.admit()] == ["a", "b"]
    assert [job.id for job in scheduler.admit()] == ["c"]


def test_without_a_queue_whoever_finds_a_place_is_served_and_others_are_refused():
    scheduler = Scheduler(budget=10, max_running=2, max_waiting=0, max_prefill=100)
    scheduler.submit(Job("a", 5, 5))
    scheduler.submit(Job("b", 5, 5))
    with pytest.raises(QueueFull):
        scheduler.submit(Job("c", 0, 1))
    assert len(scheduler.admit()) == 2
    scheduler.finish("a")
    with pytest.raises(QueueFull):  # a place, but not the memory
        scheduler.submit(Job("d", 6, 1))
    scheduler.submit(Job("e", 5, 1))
    assert [job.id for job in scheduler.admit()] == ["e"]


def test_an_impossible_job_is_refused_at_once_even_when_the_queue_is_full():
    scheduler = Scheduler(budget=10, max_running=1, max_waiting=0, max_prefill=100)
    scheduler.submit(Job("a", 10, 1))
    with pytest.raises(NeverFits, match="11 rows"):
        scheduler.submit(Job("b", 11, 1))


def test_the_hint_of_when_to_come_back_grows_with_the_queue():
    def hint(waiting: int) -> float:
        scheduler = Scheduler(budget=1000, max_running=1, max_waiting=waiting, max_prefill=100)
        for number in range(waiting):
            scheduler.submit(Job(str(number), 1, 1))
        with pytest.raises(QueueFull) as refusal:
            scheduler.submit(Job("late", 1, 1))
        return refusal.value.retry_after

    assert 1 <= hint(1) < hint(100)


def test_a_job_never_grows_once_it_runs():
    scheduler = Scheduler(10, 2, 0, 10)
    scheduler.submit(Job("a", 5, 1))
    scheduler.admit()
    with pytest.raises(ValueError, match="holds 5 rows and cannot shrink to 6"):
        scheduler.shrink(Job("a", 6, 1))
