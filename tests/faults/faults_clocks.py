"""Faults of clocks: one process gets another time of day, which jumps while it runs."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import sysconfig
import time
from dataclasses import replace
from pathlib import Path

from client_process import ClientProcess
from course import NO_BALANCER, NONE, ONE_NODE, Fault, Run
from harness import BALANCER, run

HOUR_S = 3600
SOURCE = Path(__file__).with_name("clock_shim.c")


class Clock:
    """The time of a member that was started with ``clock_shim.c`` preloaded, which may change while it runs."""

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.clock"
        self._path.write_bytes(struct.pack("=dd", 0.0, 1.0))
        self._library = _built(folder)

    def set(self, offset_s: float, pace: float = 1.0) -> None:
        """So many seconds beside the machine's time, or a clock that is too fast or too slow."""
        with self._path.open("r+b") as stream:
            stream.write(struct.pack("=dd", offset_s, pace))

    @property
    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CLOCK_SHIM": str(self._path)}


def _built(folder: Path) -> Path:
    target = folder / "clock_shim.so"
    if not target.exists():
        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
        run(*compiler, "-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o", target, SOURCE, "-ldl")
    return target


def _clock_of(run_: Run, name: str) -> Clock:
    """Start a member again with a clock that can be set; at the end it has the machine's."""
    cluster = run_.cluster
    clock = Clock(cluster.path, name)
    cluster.stop_node(name)
    cluster.environments[name] = clock.environment

    def undo() -> None:
        cluster.environments.pop(name)
        if cluster.running()[name] is not None:
            cluster.stop_node(name)

    run_.undo.later(undo)
    cluster.start_node(name)
    return clock


def _reset(run_: Run, victim: str) -> None:
    """What an operator does for a node that has seen the future: set its clock right, and have it believe that."""
    cluster = run_.cluster
    cluster.environments.pop(victim)
    cluster.stop_node(victim)
    command = [sys.executable, "-P", "-m", "nodes", "reset-clock", "--config", str(cluster.config_file(victim))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    run_.expect(f"reset-clock works: {done.stderr[-200:]}", done.returncode == 0)
    cluster.environments[victim] = {}
    cluster.start_node(victim)


def node_ahead(run_: Run) -> None:
    victim = run_.node()
    _clock_of(run_, victim).set(run_.rng.randint(60, HOUR_S))
    run_.hold(1.2, 2.0)
    _reset(run_, victim)


def node_behind(run_: Run) -> None:
    victim = run_.node()
    clock = _clock_of(run_, victim)
    time.sleep(0.2)
    clock.set(-run_.rng.randint(60, HOUR_S))
    run_.eventually(
        f"the status of {victim} tells that its clock was set back", lambda: bool(run_.status(victim).clock)
    )
    run_.hold(0.8, 1.6)
    clock.set(0)


def node_drifts(run_: Run) -> None:
    """A node's clock runs at another pace."""
    victim = run_.node()
    clock = _clock_of(run_, victim)
    pace = run_.rng.choice((0.5, 0.9, 1.1, 2.0))
    run_.note(f"x{pace}")
    clock.set(0, pace)
    run_.hold(1.2, 2.0)
    clock.set(0)


def balancer_wrong(run_: Run) -> None:
    offset = run_.rng.choice((-1, 1)) * run_.rng.randint(60, HOUR_S)
    run_.note(f"{offset:+} s")
    _clock_of(run_, BALANCER).set(offset)
    run_.hold(1.2, 2.0)


def client_wrong(run_: Run) -> None:
    """One client's clock is wrong: it is refused, and others are not."""
    offset = run_.rng.choice((-1, 1)) * run_.rng.randint(60, HOUR_S)
    run_.note(f"{offset:+} s")
    clock = Clock(run_.cluster.path, "client")
    clock.set(offset)
    config = run_.cluster.client_config_of("other")
    prefix = f"{run_.workload.prefix}/wrong"
    with ClientProcess(config, prefix, run_.seed, clock.environment) as client:
        client.await_events(3)
        run_.hold(0.5, 1.0)
        client.kill()
        refused = [event for event in client.events if event.error]
        run_.note(f"it was refused {len(refused)} times, as {', '.join(sorted({event.error for event in refused}))}")
        run_.expect("a client whose clock is wrong is refused", bool(refused))


FAULTS = [
    Fault(
        "node-ahead",
        "clocks",
        "a node's clock jumps up to an hour ahead",
        ONE_NODE,
        node_ahead,
        tells="whole after reset-clock",
    ),
    Fault(
        "node-behind",
        "clocks",
        "a node's clock jumps up to an hour back",
        ONE_NODE,
        node_behind,
        tells="its status says so",
    ),
    Fault("node-drifts", "clocks", "a node's clock runs at half to double pace", ONE_NODE, node_drifts),
    Fault(
        "balancer-clock",
        "clocks",
        "the balancer's clock is up to an hour wrong",
        replace(NO_BALANCER, create=frozenset({"*"}), destroy=frozenset({"*"}), refresh=frozenset({"*"})),
        balancer_wrong,
    ),
    Fault(
        "client-clock",
        "clocks",
        "a client's clock is up to an hour wrong",
        NONE,
        client_wrong,
        tells="that client is refused",
    ),
]
