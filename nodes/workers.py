"""Threads beside the loop: each has one session or channel of its own and a bounded queue of jobs.

A worker never touches what belongs to the loop; what it made comes back through ``Mailbox`` and is used there.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import structlog

from engine.errors import Overloaded

__all__ = ["Mailbox", "Worker"]

MAX_JOBS: Final = 1_000
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
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        """The descriptor to poll."""
        return self._event

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop make this call; from any thread, also from a signal handler."""
        self._calls.append(call)
        os.eventfd_write(self._event, 1)

    def run(self) -> None:
        """Make the calls that wait; by the loop's thread."""
        try:
            os.eventfd_read(self._event)
        except BlockingIOError:
            return
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def close(self) -> None:
        """Close the descriptor; nothing may be posted any more."""
        os.close(self._event)


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
        jobs: queue.Queue[Any] | None = None,
        idle: Callable[[S], None] | None = None,
    ) -> None:
        self._jobs: queue.Queue[Any] = queue.Queue(MAX_JOBS) if jobs is None else jobs
        self._mailbox = mailbox
        self._make_state = make_state
        self._close_state = close_state
        self._idle = idle
        self._ending = False
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
        return self._jobs.qsize()

    def submit(self, work: Callable[[S], R], done: Done) -> None:
        """Queue a job; ``done(result, error)`` is then called by the loop. ``Overloaded`` if the queue is full."""
        try:
            self._jobs.put_nowait((work, done))
        except queue.Full:
            raise Overloaded(f"{MAX_JOBS} jobs wait already") from None

    def finish(self) -> None:
        """Have one of the workers on this queue end after the jobs that wait. It never blocks."""
        for _ in range(2):
            try:
                self._jobs.put_nowait((None, None))
            except queue.Full:
                self._ending = True  # seen after the job under way; the second try is for one that ended just now
            else:
                return

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
            while not (self._ending and self._jobs.empty()):
                try:
                    work, done = self._jobs.get(timeout=None if self._idle is None else IDLE_S)
                except queue.Empty:
                    if self._idle is not None:
                        self._idle(state)
                    continue
                if work is None:
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
