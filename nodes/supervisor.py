"""A small parent that ends and restarts a node whose token hangs or whose process crashes. It opens no token itself.

A call into a PKCS#11 module that never returns can be ended from outside alone. So ``python -m nodes`` runs the node as
a child, which tells over a pipe, twice a second, for how long its oldest call of the token has gone on. The parent
imports little, starts in a few milliseconds and keeps nothing. It ends with the child's exit code; see ``outcome``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NoReturn

from engine.notify import Notifier
from nodes.allocator import overwriting_environment

__all__ = ["EXIT_CRASH_LOOP", "Beat", "Patience", "Restarts", "lifeline_of", "outcome", "supervise"]

EXIT_CRASH_LOOP: Final = 75
"""The node ended again and again; EX_TEMPFAIL of sysexits.h."""
BEAT_EVERY_S: Final = 0.5
STALL_S: Final = 1.0
"""A process that was not run for longer than this was itself stopped or starved: that time counts for nobody."""
FIRST_BEAT_S: Final = 120.0
"""How long a child may take to its first beat, which it gives before it opens its token."""
STOP_S: Final = 15.0
"""How long a child that was told to stop may take."""
RUN_WELL_S: Final = 60.0
"""A child that ran for so long makes up for those before it."""
MAX_RESTARTS: Final = 6
MAX_BACKOFF_S: Final = 5.0
FRAME: Final = struct.Struct("=ddB")
"""How long the oldest call has gone on, how long it may (s), and whether the node serves."""
VALUE_OPTIONS: Final = ("--config", "--lifeline", "--log-level")
PR_SET_PDEATHSIG: Final = 1
PR_SET_DUMPABLE: Final = 4
FAILPOINTS: Final = "KEYQUORUM_FAILPOINTS"


def lifeline_of(arguments: Sequence[str]) -> tuple[bool, int | None]:
    """Whether a command line of ``python -m nodes`` runs a node that is to be supervised, and its lifeline.

    Commands, ``--check-config``, ``--help``, ``--unsupervised`` and mistakes are left to the command itself.
    """
    lifeline: int | None = None
    has_config = False
    left = list(arguments)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if name not in VALUE_OPTIONS or not (equals or left):
            return False, None
        value = value if equals else left.pop(0)
        has_config |= name == "--config"
        if name == "--lifeline":
            if not value.isdecimal():
                return False, None
            lifeline = int(value)
    return has_config, lifeline


def outcome(code: int, *, served: bool) -> Literal["end", "restart"]:
    """What follows the end of a child; ``code`` is negative for a signal, as in ``subprocess``.

    A crash is followed by a restart. So is an error of a node that has served, for its token or its disk may come back;
    not one at its first start, a mistake in its configuration (1), or a PIN that the token refused (3).
    """
    if code < 0:
        return "restart"
    return "restart" if served and code not in (0, 1, 3) else "end"


class Restarts:
    """How soon a child may be started again: at once, then ever later; at last no more."""

    def __init__(self) -> None:
        self._failures = 0

    def after_s(self, ran_s: float) -> float | None:
        """Seconds to wait after a child that ran for so long; None when there were too many in a row."""
        self._failures = 1 if ran_s >= RUN_WELL_S else self._failures + 1
        if self._failures > MAX_RESTARTS:
            return None
        return 0.0 if self._failures == 1 else min(MAX_BACKOFF_S, 0.5 * 2.0 ** (self._failures - 2))


class Patience:
    """For how long something has gone on, without the time in which this process itself did not run."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._looked_s = 0.0
        self._age_s = 0.0

    def age_s(self, since_s: float, now_s: float) -> float:
        """The age of what began at ``since_s``; to be asked often while it goes on."""
        if since_s != self._since:
            self._since, self._looked_s, self._age_s = since_s, now_s, min(now_s - since_s, STALL_S)
        else:
            self._age_s += min(now_s - self._looked_s, STALL_S)
            self._looked_s = now_s
        return self._age_s


# --- the parent ---


@dataclass(slots=True)
class _Child:
    pid: int
    beats: int
    started_s: float
    heard_s: float
    limit_s: float = FIRST_BEAT_S
    age_s: float = 0.0
    served: bool = False


class _Parent:
    def __init__(self, arguments: Sequence[str], lifeline: int | None, begin: Callable[[str], NoReturn] | None) -> None:
        self._arguments = list(arguments)
        self._begin = begin
        self._lifeline = lifeline
        self._restarts = Restarts()
        self._served = False
        self._stop_s = 0.0
        self._wake, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        self._child: _Child | None = None
        self._notifier = Notifier()

    def _stop(self, number: int, frame: object) -> None:
        if not self._stop_s:
            self._stop_s = time.monotonic() + STOP_S
            self._notifier.stopping()
        if self._child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child.pid, signal.SIGTERM)

    def run(self) -> int:
        while True:
            child = self._child = self._start()
            if self._stop_s:
                self._stop(signal.SIGTERM, None)
            code = self._watch(child)
            self._child = None
            os.close(child.beats)
            self._served |= child.served
            if self._stop_s or outcome(code, served=self._served) == "end":
                return 128 - code if code < 0 else code
            wait_s = self._restarts.after_s(time.monotonic() - child.started_s)
            if wait_s is None:
                _log("error", "node given up", reason=f"it ended {MAX_RESTARTS + 1} times in a row", code=code)
                return EXIT_CRASH_LOOP
            _log("error", "node restarted", reason=_ended(code), after_s=wait_s)
            self._notifier.status(f"restarting: {_ended(code)}")
            if not self._pause(wait_s):
                return 0

    def _start(self) -> _Child:
        beats, theirs = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(beats, False)
        os.set_inheritable(theirs, True)
        if self._lifeline is not None:
            os.set_inheritable(self._lifeline, True)
        pid = self._spawn(theirs) if self._begin is None else self._fork(theirs, self._begin)
        os.close(theirs)
        now = time.monotonic()
        return _Child(pid, beats, now, now)

    def _spawn(self, theirs: int) -> int:
        """The child, by the command line of this process."""
        own = len(sys.orig_argv) - len(self._arguments)
        command = [sys.executable, *sys.orig_argv[1:own], f"--supervised={os.getpid()}:{theirs}", *self._arguments]
        return os.posix_spawn(
            sys.executable,
            command,
            overwriting_environment(os.environ) or os.environ,  # or it would begin anew for them
            setsigdef=[signal.SIGTERM, signal.SIGINT, signal.SIGCHLD],
        )

    def _fork(self, theirs: int, begin: Callable[[str], NoReturn]) -> int:
        """The child, by a fork of this process, which has imported all that it needs and has one thread."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            begin(f"{parent}:{theirs}")
        return pid

    def _watch(self, child: _Child) -> int:
        """Wait for the child's end, and bring it about when it hangs; its exit code, negative for a signal."""
        patience, killed = Patience(), False
        while True:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            self._wait_for_news(child.beats)
            self._hear(child)
            self._notifier.alive()
            now = time.monotonic()
            silent_s = patience.age_s(child.heard_s, now)
            late = self._stop_s and now > self._stop_s
            if not killed and (late or silent_s > child.limit_s or child.age_s > child.limit_s):
                what = f"a call of its token has gone on for {child.age_s:.1f} s"
                if child.age_s <= child.limit_s:
                    what = "it did not stop" if late else f"it gave no sign of life for {silent_s:.1f} s"
                _log("error", "node killed", reason=what, limit_s=child.limit_s, pid=child.pid)
                os.kill(child.pid, signal.SIGKILL)
                killed = True

    def _wait_for_news(self, *descriptors: int) -> None:
        """Until a signal comes, the lifeline ends or a descriptor is readable; half a second at most."""
        watched = [self._wake, *descriptors, *([] if self._lifeline is None else [self._lifeline])]
        ready = select.select(watched, [], [], BEAT_EVERY_S)[0]
        if self._wake in ready:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake, 1024)
        if self._lifeline is not None and self._lifeline in ready:
            os.set_inheritable(self._lifeline, False)
            self._lifeline = None
            self._stop(signal.SIGTERM, None)

    def _hear(self, child: _Child) -> None:
        with contextlib.suppress(BlockingIOError):
            told = os.read(child.beats, 1024 * FRAME.size)
            if len(told) >= FRAME.size:
                child.age_s, child.limit_s, served = FRAME.unpack(told[-FRAME.size :])
                if served and not child.served:
                    child.served = True
                    self._notifier.ready("serving")
                child.heard_s = time.monotonic()
            elif not told:
                time.sleep(0.02)  # it ends; there is nothing to hear any more

    def _pause(self, wait_s: float) -> bool:
        """Whether the child is still wanted after the pause."""
        end = time.monotonic() + wait_s
        while not self._stop_s and time.monotonic() < end:
            self._wait_for_news()
            self._notifier.alive()
        return not self._stop_s


def supervise(arguments: Sequence[str], lifeline: int | None, begin: Callable[[str], NoReturn] | None = None) -> int:
    """Run the node of this command line in a child until it ends for good; the exit code.

    A process that has imported the node gives ``begin``, which runs it in a fork, given what ``--supervised`` tells.
    """
    # The environment may hold the PIN.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    return _Parent(arguments, lifeline, begin).run()


def _ended(code: int) -> str:
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        return f"it was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was ended by signal {-code}"


def _log(level: str, event: str, **told: Any) -> None:
    """As the node logs: one JSON object a line."""
    moment = time.time()
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment)) + f".{int(moment % 1 * 1e6):06d}Z"
    line = json.dumps({**told, "event": event, "level": level, "timestamp": stamp}) + "\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())


# --- the child's side ---


class Beat:
    """Tells the parent, on a thread of its own, how long the oldest call has gone on, and how long the loop was silent.

    ``told`` is what ``--supervised`` was given: the parent's process id and the pipe's descriptor. This process ends
    with its parent. ``oldest`` gives when the oldest call in progress began, or 0.
    """

    def __init__(self, told: str, limit_s: float) -> None:
        parent, _, descriptor = told.partition(":")
        self._descriptor = int(descriptor)
        os.set_inheritable(self._descriptor, False)
        os.set_blocking(self._descriptor, False)
        self._limit_s = limit_s
        self.oldest: Callable[[], float] = lambda: 0.0
        self.looped_s = 0.0
        """When the loop was last seen; 0 until it begins, and when it ends."""
        self.serves = False
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):
            os._exit(1)  # it is gone already
        self._beat(Patience(), Patience())
        threading.Thread(target=self._run, name="beat", daemon=True).start()

    def _run(self) -> None:
        call, loop = Patience(), Patience()
        while True:
            time.sleep(BEAT_EVERY_S)
            self._beat(call, loop)

    def _beat(self, call: Patience, loop: Patience) -> None:
        now, since, looped = time.monotonic(), self.oldest(), self.looped_s
        ages = [call.age_s(since, now) if since else 0.0, loop.age_s(looped, now) if looped else 0.0]
        try:
            os.write(self._descriptor, FRAME.pack(max(ages), self._limit_s, self.serves))
        except BlockingIOError:
            return  # the parent is stopped
        except OSError:
            os._exit(1)  # the parent is gone
