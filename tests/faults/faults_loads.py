"""Faults of load: floods by one client or by strangers, thousands of idle connections, and exhausted limits."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from course import NONE, ONE_NODE, Fault, Run

import engine

FLOODER = Path(__file__).with_name("flooder.py")
IDLE = 10_000
IDLE_S = 60.0


class Flood:
    """A flooder beside the clients; killed at the latest when the run is undone."""

    def __init__(self, run: Run, kind: str, rate: int, *endpoints: str) -> None:
        config = run.cluster.client_config_of("other")
        command = [sys.executable, str(FLOODER), kind, str(config), str(rate), *endpoints]
        self.sent = self.refused = 0
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        run.undo.later(self.end)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                self.sent, self.refused = map(int, line.split())

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def await_sent(self, count: int, seconds: float = 20.0) -> None:
        until = time.monotonic() + seconds
        while self.sent < count and self.running and time.monotonic() < until:
            time.sleep(0.02)

    def end(self) -> None:
        if self.running:
            self._process.kill()
        self._process.wait(10)
        self._reader.join(10)
        if self._process.stdout is not None:
            self._process.stdout.close()


def request_flood(run: Run) -> None:
    rate = run.rng.randint(1_000, 4_000)
    flood = Flood(run, "requests", rate)
    flood.await_sent(64)
    run.hold(1.5, 2.5)
    run.note(f"{flood.sent} requests of {rate}/s, {flood.refused} refused")
    run.expect("the flood flows", flood.sent > 500)


def ciphertext_flood(run: Run) -> None:
    """Bad ciphertexts are the caller's fault: they must not put a node out of service."""
    rate = run.rng.randint(500, 2_000)
    flood = Flood(run, "ciphertexts", rate)
    flood.await_sent(64)
    run.hold(1.5, 2.5)
    run.note(f"{flood.sent} ciphertexts of {rate}/s, {flood.refused} refused")
    run.expect("each bad ciphertext is refused", flood.sent > 200 and flood.refused == flood.sent)


def handshake_flood(run: Run) -> None:
    rate = run.rng.randint(200, 1_000)
    members = [member.endpoint for member in run.cluster.cluster.members.values() if member.endpoint]
    flood = Flood(run, "handshakes", rate, *members)
    flood.await_sent(100)
    run.hold(1.5, 2.5)
    run.note(f"{flood.sent} handshakes of {rate}/s")
    run.expect("the flood flows", flood.sent >= 100)


def idle_connections(run: Run) -> None:
    """Thousands of connections of one client to all nodes."""
    count = IDLE if run.seed % 5 == 1 else run.rng.randint(1_000, 3_000)
    endpoints = [run.cluster.cluster.members[node].endpoint for node in run.cluster.nodes]
    flood = Flood(run, "idle", count, *endpoints)
    flood.await_sent(count, IDLE_S)
    opened = sum(_descriptors(run.cluster.worker_of(node)) for node in run.cluster.nodes)
    run.note(f"{flood.sent} connections, {opened} descriptors at the nodes")
    run.expect(f"{count} connections are begun", flood.sent >= count)
    run.hold(1.0, 1.6)


def _descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def descriptors_exhausted(run: Run) -> None:
    """A node may open hardly any more descriptors, and strangers take those."""
    victim = run.node()
    pid = run.cluster.worker_of(victim)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    spare = run.rng.randint(0, 8)
    run.note(f"{spare} to spare")

    def undo() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    run.undo.later(undo)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (_descriptors(pid) + spare, before[1]))
    flood = Flood(run, "handshakes", 100, run.cluster.cluster.members[victim].endpoint)
    flood.await_sent(100)
    run.hold(1.0, 1.8)
    flood.end()
    undo()
    _well_again(run, victim)


def memory_exhausted(run: Run) -> None:
    """A node gets no more memory."""
    victim = run.node()
    pid = run.cluster.worker_of(victim)
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    more = run.rng.choice((0, 64 << 10, 1 << 20))
    run.note(f"{more >> 10} KiB more")

    def undo() -> None:
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_AS, before)

    run.undo.later(undo)
    resource.prlimit(pid, resource.RLIMIT_AS, (used + more, before[1]))
    run.hold(1.5, 2.2)
    undo()
    _well_again(run, victim)


def _well_again(run: Run, victim: str, seconds: float = 10.0) -> None:
    """It serves again by itself, or it ended and is started again; the row tells which."""
    key = run.session.elders[0]
    until = time.monotonic() + seconds
    while time.monotonic() < until and run.cluster.running()[victim] is not None:
        with contextlib.suppress(engine.EngineError):
            run.kq.flush(key.name, timeout=1.0)
            if victim in run.kq.prewarm(key.name, timeout=2.0):
                return
        time.sleep(0.1)
    ended = run.cluster.running()[victim] is None
    run.note("it ended; started again" if ended else "hung; killed")
    run.expect(f"{victim} comes back by itself, or ends so that it can be started again", ended)
    if not ended:
        run.cluster.kill(victim)
    run.cluster.start_node(victim)


LOAD = replace(NONE, refresh=frozenset({"deadline-exceeded"}))
FAULTS = [
    Fault("request-flood", "load", "1000 to 4000 requests a second of one client", LOAD, request_flood),
    Fault(
        "bad-ciphertexts",
        "load",
        "500 to 2000 bad ciphertexts a second",
        LOAD,
        ciphertext_flood,
        tells="each one is refused as a bad ciphertext",
    ),
    Fault("handshake-flood", "load", "200 to 1000 handshakes a second that lead nowhere", LOAD, handshake_flood),
    Fault(
        "idle-connections",
        "load",
        "10,000 idle connections (one seed in five; else 1000 to 3000)",
        LOAD,
        idle_connections,
    ),
    Fault(
        "descriptors",
        "load",
        "a node has no descriptors left",
        ONE_NODE,
        descriptors_exhausted,
        needs=("prlimit",),
        tells="serves again, or after a new start",
    ),
    Fault(
        "memory",
        "load",
        "a node gets no more memory",
        ONE_NODE,
        memory_exhausted,
        needs=("prlimit",),
        tells="serves again, or after a new start",
    ),
]
