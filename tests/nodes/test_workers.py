"""Workers and the mailbox: everything comes back through the loop, in order, and every queue has a bound."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.errors import Overloaded, TokenError
from nodes.workers import MAX_JOBS, MEMBER_PART, Jobs, Mailbox, Worker


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    box = Mailbox()
    yield box
    box.close()


def readable(mailbox: Mailbox, timeout_s: float = 0.0) -> bool:
    return bool(select.select([mailbox.fileno()], [], [], timeout_s)[0])


def drain(mailbox: Mailbox, done: Callable[[], bool]) -> None:
    """Run the mailbox until ``done``; bounded."""
    until_s = time.monotonic() + 40
    while not done():
        assert time.monotonic() < until_s, "the worker's answer did not come"
        if readable(mailbox, 0.2):
            mailbox.run()


def started(mailbox: Mailbox, **options: Any) -> Worker[str]:
    return Worker("test", mailbox, lambda: "state", lambda state: None, **options)


def ended(worker: Worker[Any]) -> None:
    worker.finish()
    worker.join(20)
    assert not worker._thread.is_alive()


def test_the_mailbox_is_readable_while_something_waits(mailbox: Mailbox) -> None:
    made: list[int] = []
    assert not readable(mailbox)
    mailbox.run()
    for number in range(3):
        mailbox.post(lambda number=number: made.append(number))  # type: ignore[misc]
    assert readable(mailbox)
    mailbox.run()
    assert made == [0, 1, 2]
    assert not readable(mailbox)


def test_what_is_posted_while_the_mailbox_runs_is_not_lost(mailbox: Mailbox) -> None:
    made: list[str] = []

    def first() -> None:
        made.append("first")
        mailbox.post(lambda: made.append("second"))

    mailbox.post(first)
    mailbox.run()
    assert readable(mailbox)
    mailbox.run()
    assert made == ["first", "second"]


def test_many_threads_lose_no_call(mailbox: Mailbox) -> None:
    made: list[int] = []

    def post() -> None:
        for _ in range(500):
            mailbox.post(lambda: made.append(1))

    threads = [threading.Thread(target=post) for _ in range(4)]
    for thread in threads:
        thread.start()
    drain(mailbox, lambda: len(made) == 2000)
    for thread in threads:
        thread.join(20)


def test_a_job_runs_in_the_workers_thread_and_its_end_in_the_loops(mailbox: Mailbox) -> None:
    worker = started(mailbox)
    told: list[Any] = []
    worker.submit(
        lambda state: (state, threading.current_thread().name),
        lambda result, error: told.extend([result, error, threading.current_thread()]),
    )
    drain(mailbox, lambda: bool(told))
    assert told == [("state", "test"), None, threading.main_thread()]
    ended(worker)


def test_jobs_end_in_the_order_they_came(mailbox: Mailbox) -> None:
    worker = started(mailbox)
    told: list[int] = []
    for number in range(100):
        worker.submit(lambda state, number=number: number, lambda result, error: told.append(result))  # type: ignore[misc]
    drain(mailbox, lambda: len(told) == 100)
    assert told == list(range(100))
    ended(worker)


def test_a_job_that_fails_hands_over_its_error_and_the_next_goes_on(mailbox: Mailbox) -> None:
    worker = started(mailbox)
    told: list[Any] = []

    def fail(state: str) -> None:
        raise TokenError("sick")

    worker.submit(fail, lambda result, error: told.append((result, str(error))))
    worker.submit(lambda state: 7, lambda result, error: told.append((result, error)))
    drain(mailbox, lambda: len(told) == 2)
    assert told == [(None, "sick"), (7, None)]
    ended(worker)


def test_a_full_queue_is_overloaded(mailbox: Mailbox) -> None:
    gate, running = threading.Event(), threading.Event()
    worker = started(mailbox, jobs=Jobs(8))
    told: list[Any] = []

    def wait(state: str) -> None:
        running.set()
        gate.wait(20)

    worker.submit(wait, lambda result, error: told.append(result))
    assert running.wait(20)
    worker.submit(lambda state: 1, lambda result, error: told.append(result))
    worker.submit(lambda state: 2, lambda result, error: told.append(result))
    assert worker.waiting == 2
    with pytest.raises(Overloaded):
        worker.submit(lambda state: 3, lambda result, error: told.append(result))
    gate.set()
    drain(mailbox, lambda: len(told) == 3)
    assert told == [None, 1, 2]
    ended(worker)


def test_the_queue_is_bounded_by_default(mailbox: Mailbox) -> None:
    gate, running = threading.Event(), threading.Event()
    worker = started(mailbox)
    worker.submit(lambda state: running.set() or gate.wait(20), lambda result, error: None)
    assert running.wait(20)
    for member in range(MEMBER_PART):
        for _ in range(MAX_JOBS // MEMBER_PART):
            worker.submit(lambda state: None, lambda result, error: None, f"m{member}")
    with pytest.raises(Overloaded, match=f"{MAX_JOBS} jobs wait already"):
        worker.submit(lambda state: None, lambda result, error: None, "late")
    gate.set()
    ended(worker)


def test_one_member_fills_a_part_of_the_queue_and_others_have_their_turn(mailbox: Mailbox) -> None:
    gate, running = threading.Event(), threading.Event()
    worker = started(mailbox)
    worker.submit(lambda state: running.set() or gate.wait(20), lambda result, error: None)
    assert running.wait(20)
    order: list[str] = []
    for _ in range(MAX_JOBS // MEMBER_PART):
        worker.submit(lambda state: None, lambda result, error: order.append("greedy"), "greedy")
    with pytest.raises(Overloaded, match=f"{MAX_JOBS // MEMBER_PART} jobs of 'greedy' wait already"):
        worker.submit(lambda state: None, lambda result, error: None, "greedy")
    for _ in range(3):
        worker.submit(lambda state: None, lambda result, error: order.append("modest"), "modest")
    gate.set()
    drain(mailbox, lambda: order.count("modest") == 3)
    assert order[:6] == ["greedy", "modest"] * 3
    ended(worker)


def test_to_finish_does_not_block_on_a_full_queue(mailbox: Mailbox) -> None:
    gate, running = threading.Event(), threading.Event()
    worker = started(mailbox, jobs=Jobs(1))
    worker.submit(lambda state: running.set() or gate.wait(20), lambda result, error: None)
    assert running.wait(20)
    worker.submit(lambda state: None, lambda result, error: None)
    finisher = threading.Thread(target=worker.finish)
    finisher.start()
    finisher.join(10)
    stuck = finisher.is_alive()
    gate.set()
    finisher.join(20)
    worker.join(20)
    assert not stuck
    assert not worker._thread.is_alive()


def test_the_state_is_made_and_closed_in_the_workers_thread(mailbox: Mailbox) -> None:
    names: list[str] = []
    worker: Worker[str] = Worker(
        "own",
        mailbox,
        lambda: names.append("made " + threading.current_thread().name) or "s",  # type: ignore[func-returns-value]
        lambda state: names.append(f"closed {state} " + threading.current_thread().name),
    )
    ended(worker)
    assert names == ["made own", "closed s own"]


def test_finish_lets_the_jobs_that_wait_end_first(mailbox: Mailbox) -> None:
    worker = started(mailbox)
    told: list[int] = []
    for number in range(10):
        worker.submit(lambda state, number=number: number, lambda result, error: told.append(result))  # type: ignore[misc]
    ended(worker)
    mailbox.run()
    assert told == list(range(10))


def test_two_workers_share_a_queue_and_each_ends(mailbox: Mailbox) -> None:
    jobs = Jobs(1_000)
    workers = [started(mailbox, jobs=jobs) for _ in range(2)]
    told: list[int] = []
    for number in range(50):
        workers[0].submit(lambda state, number=number: number, lambda result, error: told.append(result))  # type: ignore[misc]
    drain(mailbox, lambda: len(told) == 50)
    assert sorted(told) == list(range(50))
    for worker in workers:
        worker.finish()
    for worker in workers:
        worker.join(20)
        assert not worker._thread.is_alive()


def test_a_worker_whose_state_can_not_be_made_is_told_at_once(mailbox: Mailbox) -> None:
    def fail() -> str:
        raise TokenError("the token gives no further session")

    with pytest.raises(TokenError, match="no further session"):
        Worker("test", mailbox, fail, lambda state: None)


def test_a_worker_without_jobs_looks_after_its_state_and_still_takes_jobs(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.workers.IDLE_S", 0.01)
    seen: list[str] = []
    twice = threading.Event()

    def idle(state: str) -> None:
        seen.append(state)
        if len(seen) == 2:
            twice.set()

    worker = started(mailbox, idle=idle)
    assert twice.wait(20)
    answers: list[Any] = []
    worker.submit(lambda state: state + "!", lambda result, error: answers.append((result, error)))
    drain(mailbox, lambda: bool(answers))
    assert answers == [("state!", None)]
    ended(worker)
    assert set(seen) == {"state"}
