"""Virtual time, tasks, connections, disks: the parts of the simulated world that know nothing of keys.

One ``random.Random`` decides everything that is decided by chance. Exactly one thread runs at any moment: the
scheduler's, or that of the one task which it has handed control to; so a seed gives one course of events.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

from engine.client.listener import Listener
from engine.client.speech import spoken
from engine.client.transport import Arrival
from engine.errors import DeadlineExceeded, EngineError, NodeUnavailable, Overloaded, ProtocolError
from engine.protocol.manifest import Cluster
from engine.protocol.wire import (
    MAX_TIMEOUT_MS,
    PROTOCOL_VERSION,
    Request,
    reply_codec,
    request_codec,
)

KEPT_EVENTS = 200
MAX_EVENTS = 200_000
"""More events than this in one seed is a fault of the code (or of the scenario): something goes round for ever."""


class Crashed(BaseException):
    """The process that runs this has just been killed. No ``except Exception`` of the code may outlive it."""


class Violated(BaseException):
    """An invariant does not hold. No ``except Exception`` of the code may hide it."""


# --- time and tasks ---


class _Thread:
    """A thread that tasks run on, one after the other; threads are kept, since starting one costs more than a task."""

    def __init__(self, idle: list[_Thread]) -> None:
        self._idle = idle
        self._go = threading.Lock()
        self._back = threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._work: Callable[[], None] = lambda: None
        self.failure: BaseException | None = None
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, work: Callable[[], None]) -> None:
        self._work = work

    def resume(self) -> None:
        """Run the task until it waits or ends (by the scheduler)."""
        self._go.release()
        self._back.acquire()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def pause(self) -> None:
        """Give control back until resumed (by the task)."""
        self._back.release()
        self._go.acquire()

    def _run(self) -> None:
        while True:
            self._go.acquire()
            try:
                self._work()
            except BaseException as error:  # raised in the scheduler, where the seed is reported
                self.failure = error
            self._idle.append(self)
            self._back.release()


_idle_threads: list[_Thread] = []


class Task:
    """Blocking code under way, and whether its process still lives."""

    def __init__(self, sim: Sim, alive: Callable[[], bool]) -> None:
        self._sim = sim
        self._alive = alive
        self._thread = _idle_threads.pop() if _idle_threads else _Thread(_idle_threads)
        self._owner = sim.running
        self._turn = 0
        self.waiting = False

    def start(self, work: Callable[[], None]) -> None:
        def body() -> None:
            try:
                if self._alive():
                    work()
            except Crashed:
                return

        self._thread.begin(body)
        self._step()

    def _step(self) -> None:
        before, self._sim.task = self._sim.task, self
        running, self._sim.running = self._sim.running, self._owner
        try:
            self._thread.resume()
        finally:
            self._sim.task = before
            self._sim.running = running

    def wait(self, until_s: float) -> None:
        """Wait until ``wake`` or the time; ``Crashed`` if the process has died meanwhile."""
        self._turn += 1
        turn = self._turn
        self.waiting = True
        self._sim.at(until_s, lambda: self._wake(turn))
        self._thread.pause()
        if not self._alive():
            raise Crashed

    def wake(self) -> None:
        turn = self._turn
        if self.waiting:
            self._sim.at(self._sim.now, lambda: self._wake(turn))

    def _wake(self, turn: int) -> None:
        if self.waiting and turn == self._turn:
            self.waiting = False
            self._step()


class Sim:
    """The scheduler and its record of what happened."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.task: Task | None = None
        self.running: Any = None
        """The process whose code runs now."""
        self.tasks: list[Task] = []
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._digest = hashlib.blake2b(digest_size=16)
        self.recent: deque[str] = deque(maxlen=KEPT_EVENTS)
        self.steps = 0

    def at(self, when_s: float, do: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (max(when_s, self.now), next(self._numbers), do))

    def after(self, delay_s: float, do: Callable[[], None]) -> None:
        """Do something after a time."""
        self.at(self.now + delay_s, do)

    def run(self, until_s: float, done: Callable[[], bool] = lambda: False) -> None:
        """Let time pass, at most until a time; earlier when ``done``."""
        events = self._events
        while events and events[0][0] <= until_s and not done():
            when, _, do = heapq.heappop(events)
            self.now = max(self.now, when)
            self.steps += 1
            if self.steps > MAX_EVENTS:
                raise Violated(f"more than {MAX_EVENTS} events")
            do()
        if not done():
            self.now = max(self.now, until_s)

    def skip(self, seconds: float) -> None:
        """Let time pass for which all sleep; what was to be done meanwhile is done afterwards."""
        self.now += seconds

    def tell(self, what: str) -> None:
        """Note an event: it counts for the trace's hash, and the last ones are shown when an invariant fails."""
        line = f"{self.now:10.4f} {what}"
        self._digest.update(line.encode())
        self.recent.append(line)

    @property
    def trace(self) -> str:
        """The hash of everything noted."""
        return self._digest.hexdigest()

    def spawn(self, alive: Callable[[], bool], work: Callable[[], None]) -> None:
        """Run blocking code as a task of a process."""
        task = Task(self, alive)
        self.tasks.append(task)
        task.start(work)

    def end(self) -> None:
        """End the tasks that still wait, so that their threads are free for the next seed."""
        self._events.clear()
        for task in self.tasks:
            while task.waiting:
                task._alive = lambda: False
                task.waiting = False
                task._step()


# --- the network ---


@dataclass(frozen=True)
class Wire:
    """The listening end of a channel's connection: where replies go, and the CURVE key that it has proved."""

    route: str
    user: str


class SimRouter:
    """The listening end of one process: a queue of requests in, replies out to where they came from."""

    def __init__(self, net: Network, name: str) -> None:
        self._net = net
        self._name = name
        self._queue: deque[tuple[Wire, bytes, int]] = deque()
        self.owed: dict[tuple[str, int], int] = {}

    def put(self, route: str, data: bytes, user: str) -> None:
        request_id = request_codec.decode(data).id if data else 0
        self.owed[route, request_id] = self.owed.get((route, request_id), 0) + 1
        self._queue.append((Wire(route, user), data, 1))

    def receive(self) -> tuple[Wire, bytes, int] | None:
        return self._queue.popleft() if self._queue else None

    def send(self, connection: Wire, data: bytes) -> bool:
        route, request_id = connection.route, reply_codec.decode(data).id
        left = self.owed.get((route, request_id), 0)
        if not left:
            raise Violated(f"{self._name} answers request {request_id} of {route} a second time")
        self.owed[route, request_id] = left - 1
        self._net.reply(self._name, route, data)
        return True

    def unanswered(self) -> list[tuple[str, int]]:
        """Requests that came and got no answer."""
        return [which for which, left in self.owed.items() if left]


class SimListener(Listener):
    """The real listener over a simulated router."""

    def __init__(self, net: Network, name: str, cluster: Cluster) -> None:
        self.versions = spoken()
        self._source = cluster
        self.refused = 0
        self._next_warning_s = 0.0
        self.undeliverable = 0
        self.connections: Any = SimpleNamespace(heard=lambda connection, member: False)
        self.router: Any = SimRouter(net, name)


class Network:
    """Connections between channels and listeners: authenticated, but slow, broken, and sometimes lossy.

    A connection breaks as TCP's do: what is under way on it is lost, and its channel is told.
    """

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.listeners: dict[str, tuple[SimListener, Callable[[], None]]] = {}
        self.channels: dict[str, SimChannel] = {}
        self.cut: set[tuple[str, str]] = set()
        self.loss = 0.0
        self.double = 0.0
        self.slow = 0.0
        self._routes = itertools.count(1)
        self.tap: Callable[[str, str, str, bytes], None] = lambda sender, to, verb, body: None

    def delay(self) -> float:
        r = self.sim.random
        base = 0.0002 + r.random() * 0.002
        if self.slow and r.random() < self.slow:
            base += r.random() * 0.8
        return base

    def reachable(self, owner: str, peer: str) -> bool:
        return peer in self.listeners and (owner, peer) not in self.cut

    def route(self, channel: SimChannel) -> str:
        route = f"{channel.owner}#{next(self._routes)}"
        self.channels[route] = channel
        return route

    def request(self, channel: SimChannel, peer: str, data: bytes, verb: str) -> None:
        r = self.sim.random
        for _ in range(2 if self.double and r.random() < self.double else 1):
            if self.loss and r.random() < self.loss:
                self.sim.tell(f"lost {channel.owner}->{peer} {verb}")
                continue
            listener = self.listeners.get(peer)
            self.sim.after(self.delay(), partial(self._deliver, listener, channel, peer, data, verb))

    def _deliver(self, sent_to: Any, channel: SimChannel, peer: str, data: bytes, verb: str) -> None:
        listener = self.listeners.get(peer)
        if listener is None or listener is not sent_to or (channel.owner, peer) in self.cut or channel.closed:
            return
        self.sim.tell(f"{channel.owner}->{peer} {verb}")
        listener[0].router.put(channel.route, data, channel.user)
        listener[1]()

    def reply(self, sender: str, route: str, data: bytes) -> None:
        channel = self.channels.get(route)
        r = self.sim.random
        for _ in range(2 if self.double and r.random() < self.double else 1):
            if channel is None or (self.loss and r.random() < self.loss):
                continue
            self.sim.after(self.delay(), lambda: channel.received(sender, data))

    def gone(self, name: str) -> None:
        """A process died: its connections, in and out, break."""
        self.listeners.pop(name, None)
        for route, channel in list(self.channels.items()):
            if channel.owner == name:
                channel.closed = True
                del self.channels[route]
            else:
                channel.broke(name)

    def break_between(self, owner: str, peer: str) -> None:
        """Break one process's connections to another; they can be made anew at once."""
        for channel in list(self.channels.values()):
            if channel.owner == owner:
                channel.broke(peer)


class SimChannel:
    """What ``engine.client.transport.Channel`` is to its user, over the simulated network.

    ``user`` is the CURVE key that its connections authenticate with.
    """

    def __init__(self, net: Network, owner: str, user: str) -> None:
        self._net = net
        self._sim = net.sim
        self.owner = owner
        self.user = user
        self.closed = False
        self.route = net.route(self)
        self._tokens = itertools.count(1)
        self._pending: dict[int, tuple[str, str, float, float]] = {}
        self._done: list[Arrival] = []
        self._task: Task | None = None
        self.arrived: Callable[[Arrival], None] | None = None
        """For users that do not block: called with each arrival, at its time."""

    def close(self) -> None:
        self.closed = True
        self._net.channels.pop(self.route, None)

    def dial(self, peers: Any) -> None:
        """Connections need no time here."""

    def start(self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Any = None) -> int:
        if not self._net.reachable(self.owner, peer):
            if self._sim.task is not None:
                self._sim.task.wait(self._sim.now + min(timeout_s, 0.05))
            if not self._net.reachable(self.owner, peer):
                raise NodeUnavailable(f"{peer} can't be reached")
        token = next(self._tokens)
        timeout_ms = max(1, min(int(timeout_s * 1000), MAX_TIMEOUT_MS))
        data = request_codec.encode(Request(PROTOCOL_VERSION, token, verb, timeout_ms, body, {}))
        deadline_s = self._sim.now + timeout_s
        self._pending[token] = (peer, verb, self._sim.now, deadline_s)
        self._net.tap(self.owner, peer, verb, body)
        self._net.request(self, peer, data, verb)
        if self.arrived is not None:
            self._sim.at(deadline_s, self._expire)
        return token

    def abandon(self, token: int) -> None:
        self._pending.pop(token, None)

    def poll(self, timeout_s: float) -> list[Arrival]:
        until = self._sim.now + timeout_s
        while True:
            self._expire()
            if self._done or self._sim.now >= until or timeout_s <= 0:
                break
            task = self._sim.task
            if task is None:
                raise Violated(f"{self.owner}: the loop waits for a peer")
            self._task = task
            task.wait(min([until, *(each[3] for each in self._pending.values())]))
        done, self._done = self._done, []
        return done

    def call(self, peer: str, verb: str, body: bytes, timeout_s: float) -> Any:
        token = self.start(peer, verb, body, timeout_s)
        while True:
            for arrival in self.poll(timeout_s):
                if arrival.token != token:
                    continue
                if arrival.reply is None:
                    raise arrival.error or DeadlineExceeded(f"{peer}: no reply")
                return arrival.reply

    def received(self, peer: str, data: bytes) -> None:
        if self.closed or (self.owner, peer) in self._net.cut:
            return
        try:
            reply = reply_codec.decode(data)
            spoken().check(reply.version)
        except ProtocolError as error:
            for token, each in list(self._pending.items()):
                if each[0] == peer:
                    self._finish(token, None, error)
            return
        pending = self._pending.get(reply.id)
        if pending is not None and pending[0] == peer:
            self._sim.tell(f"{self.owner}<-{peer} {pending[1]} {reply.status}")
            self._finish(reply.id, reply, None)

    def broke(self, peer: str) -> None:
        """The connection to a peer broke: what was under way ends."""
        for token, each in list(self._pending.items()):
            if each[0] == peer:
                self._finish(token, None, NodeUnavailable(f"{peer}: the connection broke"))

    def _expire(self) -> None:
        for token, each in list(self._pending.items()):
            if each[3] <= self._sim.now:
                self._finish(token, None, DeadlineExceeded(f"{each[0]}: no reply to {each[1]} in time"))

    def _finish(self, token: int, reply: Any, error: EngineError | None) -> None:
        peer, verb, since, _ = self._pending.pop(token)
        arrival = Arrival(token, peer, verb, reply, error, (self._sim.now - since) * 1e6)
        if self.arrived is not None:
            self._sim.at(self._sim.now, lambda: self.closed or self.arrived(arrival))  # type: ignore[misc]
            return
        self._done.append(arrival)
        if self._task is not None:
            self._task.wake()


# --- workers ---


class SimWorker:
    """What ``nodes.workers.Worker`` is to its user: one job at a time, beside the loop, results back on the loop.

    With ``threads`` its jobs may wait for peers; with 0 they may not, and each is one step.
    """

    def __init__(
        self,
        sim: Sim,
        alive: Callable[[], bool],
        state: Any,
        limit: int,
        threads: int,
        inside: Callable[[Callable[[], Any]], Callable[[], None]],
    ) -> None:
        self._sim = sim
        self._inside = inside
        self._alive = alive
        self._blocks = threads > 0
        self._states = list(state) if threads > 1 else [state]
        self._limit = limit
        self._jobs: deque[tuple[Callable[[Any], Any], Callable[[Any, Exception | None], None]]] = deque()

    @property
    def waiting(self) -> int:
        return len(self._jobs)

    def submit(
        self, work: Callable[[Any], Any], done: Callable[[Any, Exception | None], None], member: str = ""
    ) -> None:
        if len(self._jobs) >= self._limit:
            raise Overloaded(f"{self._limit} jobs wait already")
        self._jobs.append((work, done))
        self._sim.after(self._sim.random.random() * 0.0005, self._inside(self._next))

    def _next(self) -> None:
        if not self._jobs or not self._states or not self._alive():
            return
        state = self._states.pop()
        work, done = self._jobs.popleft()
        if self._blocks:
            self._sim.spawn(self._alive, lambda: self._run(state, work, done))
        else:
            self._run(state, work, done)

    def _run(self, state: Any, work: Callable[[Any], Any], done: Callable[[Any, Exception | None], None]) -> None:
        result, failure = None, None
        try:
            result = work(state)
        except Exception as error:  # handed to the loop, as the real worker does
            failure = error
        self._states.append(state)
        self._sim.after(0.00001, self._inside(lambda: done(result, failure)))
        if self._jobs:
            self._sim.after(0.00001, self._inside(self._next))


# --- disks ---


class Disk:
    """One process's disk: committed SQLite transactions outlive the process, nothing else does.

    ``full`` fails every commit. ``crash_in`` counts commits down; at 0 the process dies, before or after the commit.
    """

    def __init__(self, sim: Sim, owner: str) -> None:
        self._sim = sim
        self.owner = owner
        self.full = False
        self.crash_in = -1
        self.crash_after_commit = False
        self.on_crash: Callable[[], None] = lambda: None
        self.on_commit: Callable[[], None] = lambda: None
        self.files: dict[str, sqlite3.Connection] = {}
        self.commits = 0
        self.rolls_back = sim.random.random() < 0.5
        """Whether SQLite rolls back by itself when the disk is full; it says that it may or may not."""
        self.unsynced: dict[str, bytes] = {}

    def path(self, name: str) -> DiskPath:
        return DiskPath(self, name)

    def power_cut(self) -> None:
        """What was not committed is gone; so is what was committed without ``synchronous=FULL``."""
        for name, raw in self.files.items():
            if raw.in_transaction:
                raw.rollback()
            if name in self.unsynced:
                raw.deserialize(self.unsynced.pop(name))

    def close(self) -> None:
        for connection in self.files.values():
            connection.close()

    def before_commit(self) -> None:
        if self.full:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        self.commits += 1
        self.crash_in -= 1
        if self.crash_in == 0 and not self.crash_after_commit:
            self.die("before")

    def after_commit(self) -> None:
        self.on_commit()
        if self.crash_in == 0:
            self.die("after")

    def die(self, when: str) -> None:
        self._sim.tell(f"{self.owner} dies {when} a commit")
        self.on_crash()
        raise Crashed


FRESH_FILES: dict[tuple[str, str], bytes] = {}
"""(process, file) -> the file as its first start leaves it, so that not every seed makes every table."""


class DiskPath:
    """What the stores take for their file's path."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk = disk
        self.name = name

    def __fspath__(self) -> str:
        return "/dev/null"

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        return True


class Connection:
    """A connection to a simulated file: SQLite itself in memory, with the disk's faults at every commit."""

    def __init__(self, path: DiskPath) -> None:
        self._disk = path.disk
        raw = self._disk.files.get(path.name)
        if raw is None:
            raw = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._disk.files[path.name] = raw
            fresh = FRESH_FILES.get((self._disk.owner, path.name))
            if fresh is not None:
                raw.deserialize(fresh)
        self._raw = raw
        self._name = path.name
        self._synchronous = False

    @property
    def in_transaction(self) -> bool:
        return self._raw.in_transaction

    def execute(self, sql: str, parameters: Any = ()) -> sqlite3.Cursor | _Rows:
        if sql.startswith("PRAGMA wal_checkpoint"):
            return _Rows((0, 0, 0))
        if sql.startswith("PRAGMA quick_check"):
            return _Rows(("ok",))
        if sql == "PRAGMA synchronous=FULL":
            self._synchronous = True
        if sql == "BEGIN IMMEDIATE" and not self._synchronous:
            with contextlib.suppress(sqlite3.OperationalError):  # it can't write an empty database
                self._disk.unsynced[self._name] = self._raw.serialize()
        if sql != "COMMIT":
            return self._raw.execute(sql, parameters)
        try:
            self._disk.before_commit()
        except sqlite3.OperationalError:
            if self._disk.rolls_back:
                self._raw.execute("ROLLBACK")
            raise
        cursor = self._raw.execute(sql)
        self._disk.after_commit()
        return cursor

    def executemany(self, sql: str, rows: Any) -> sqlite3.Cursor:
        return self._raw.executemany(sql, rows)

    def close(self) -> None:
        if self._raw.in_transaction:
            self._raw.rollback()


class _Rows:
    def __init__(self, row: tuple[Any, ...]) -> None:
        self._row = row

    def fetchone(self) -> tuple[Any, ...]:
        return self._row

    def fetchall(self) -> list[tuple[Any, ...]]:
        return [self._row]


def connect(path: DiskPath, **options: Any) -> Connection:
    """In place of ``sqlite3.connect`` in the modules under simulation."""
    return Connection(path)


SQLITE: Any = SimpleNamespace(**{**vars(sqlite3), "connect": connect})
"""In place of the module ``sqlite3`` in the modules under simulation."""
