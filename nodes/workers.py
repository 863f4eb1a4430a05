"""Threads beside the loop: each has one session or channel of its own and a bounded queue of jobs.

Jobs wait by the member that asked for them, and the members are served in turn, so that none keeps others waiting. A
worker never touches what belongs to the loop; what it made comes back through ``Mailbox`` and is used there.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import structlog

from engine.client.admission import Turns

__all__ = ["Jobs", "Mailbox", "Worker"]

MAX_JOBS: Final = 1_000
MEMBER_PART: Final = 4
"""One member's jobs fill a queue up to a part of one in so many."""
IDLE_S: Final = 1.0
"""A worker that had no job for so long looks after its state, each time anew."""

S = TypeVar("S")
R = TypeVar("R")
Done = Callable[[Any, Exception | None], None]

log = structlog.get_logger()


class Mailbox:
    """What worker threads hand to the loop; ``fileno`` is readable while something waits."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._told = False
        """Whether the loop is told already that something waits."""
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._event

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop make this call; from any thread, also from a signal handler."""
        self._calls.append(call)
        if not self._told:
            self._told = True
            os.eventfd_write(self._event, 1)

    def run(self) -> None:
        """Make the calls that wait; by the loop's thread."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return
        self._told = False  # before it looks: whoever adds something from here on tells it again
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def close(self) -> None:
        """Close the descriptor; nothing may be posted any more."""
        os.close(self._event)


class Jobs:
    """The jobs that wait for one or more workers, at most ``most``; safe for several threads.

    The node's own jobs, of the member "", have a part of the queue and their turn like any member's.
    """

    def __init__(self, most: int = MAX_JOBS) -> None:
        self._turns: Turns[Any] = Turns(most, max(1, most // MEMBER_PART))
        self._ends = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._turns)

    def put(self, member: str, job: Any) -> None:
        """Have a job wait; ``Overloaded`` if too many do."""
        with self._changed:
            self._turns.put(member, job)
            self._changed.notify()

    def end(self) -> None:
        """Have one of the workers end once nothing waits."""
        with self._changed:
            self._ends += 1
            self._changed.notify_all()

    def take(self, timeout_s: float | None) -> Any:
        """The next job; ``TimeoutError`` if none came in time, ``EOFError`` if the worker is to end."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._turns) or self._ends, timeout_s):
                raise TimeoutError
            if len(self._turns):
                return self._turns.take()
            self._ends -= 1
            raise EOFError


class Worker(Generic[S]):
    """One thread with a state of its own (made and closed in that thread) and a queue of at most 1,000 jobs.

    Making it waits until the state is made, and raises what that raised: a worker that exists takes jobs.
    """

    def __init__(
        self,
        name: str,
        mailbox: Mailbox,
        make_state: Callable[[], S],
        close_state: Callable[[S], None],
        jobs: Jobs | None = None,
        idle: Callable[[S], None] | None = None,
    ) -> None:
        self._jobs = Jobs() if jobs is None else jobs
        self._mailbox = mailbox
        self._make_state = make_state
        self._close_state = close_state
        self._idle = idle
        self._failure: Exception | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._jobs)

    def submit(self, work: Callable[[S], R], done: Done, member: str = "") -> None:
        """Queue a member's job; ``done(result, error)`` is then called by the loop. ``Overloaded`` if too many wait."""
        self._jobs.put(member, (work, done))

    def finish(self) -> None:
        """Have one of the workers on this queue end after the jobs that wait. It never blocks."""
        self._jobs.end()

    def join(self, timeout_s: float) -> None:
        """Wait for this worker's end, at most ``timeout_s``."""
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            state = self._make_state()
        except Exception as error:  # raised where the worker is made
            self._failure = error
            return
        finally:
            self._ready.set()
        try:
            while True:
                try:
                    work, done = self._jobs.take(None if self._idle is None else IDLE_S)
                except TimeoutError:
                    if self._idle is not None:
                        self._idle(state)
                    continue
                except EOFError:
                    return
                self._mailbox.post(_outcome(work, state, done))
                del work, done
        finally:
            self._close_state(state)


def _outcome(work: Callable[[S], R], state: S, done: Done) -> Callable[[], None]:
    try:
        result = work(state)
    except Exception as error:  # handed to the loop, which answers and logs it
        failure = error
        return lambda: done(None, failure)
    return lambda: done(result, None)
