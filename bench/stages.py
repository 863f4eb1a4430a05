"""Owns the table of stages: where the time of a warm AES-GCM of 1 KiB goes, in client, network and node.

``python bench/stages.py`` prints it, as Markdown with ``--markdown``, and ``--flame FILE`` has py-spy draw the flame
graph of the combiner, if it is installed. All nodes run under ``tracing.py`` then. Stages are CPU time, means without
the slowest tenth; the CPU time of the threads beside (libzmq's, the audit log's) is the kernel's count. What is left of
the round trip is waiting: for the core, and for each other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table
from rig import DATA, HERE, Rig, end_process, pin, thread_times
from tracing import CHECKS, CLIENT, NODE, REST, StageClock

OPERATIONS: Final = 20_000
STOP_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One line: microseconds and calls of an operation."""

    where: str
    name: str
    us: float
    calls: float


@dataclass(frozen=True, slots=True)
class Stages:
    """The table, in means. ``round_trip_us`` is without timing, ``traced_us`` with; ``gone`` could not be timed."""

    stages: tuple[Stage, ...]
    round_trip_us: float
    traced_us: float
    gone: tuple[str, ...]

    def of(self, where: str) -> float:
        """What the stages of the client or the node take together."""
        return sum(stage.us for stage in self.stages if stage.where == where)

    @property
    def rest_us(self) -> float:
        """What is left of the round trip: waiting for a core and for each other."""
        return max(0.0, self.round_trip_us - self.of("client") - self.of("node"))

    @property
    def checks_us(self) -> float:
        """Policy, audit and routing."""
        return sum(stage.us for stage in self.stages if stage.name in CHECKS)


class TracedNodes:
    """The nodes of a rig's cluster under the stage clock, in place of the ones that ran."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._nodes: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> TracedNodes:
        cluster = self._rig.cluster
        try:
            for name in cluster.nodes:
                cluster.stop_node(name)
                config = cluster.path / "nodes" / name / "node.toml"
                self._nodes[name] = subprocess.Popen(
                    [sys.executable, str(HERE / "tracing.py"), str(config)], stdout=subprocess.PIPE, text=True
                )
            until = time.monotonic() + 60
            while any(member.error for member in self._rig.kq.status(timeout=2) if member.role == "node"):
                if time.monotonic() > until:
                    raise RuntimeError("the traced nodes did not come up")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def pids(self) -> dict[str, int]:
        """Their processes."""
        return {name: process.pid for name, process in self._nodes.items()}

    def finish(self) -> list[dict[str, Any]]:
        """Stop them, and give what each counted."""
        for process in self._nodes.values():
            process.send_signal(signal.SIGTERM)
        said = [json.loads(process.communicate(timeout=STOP_S)[0]) for process in self._nodes.values()]
        self._nodes.clear()
        return said

    def __exit__(self, *_: object) -> None:
        for process in self._nodes.values():
            end_process(process)
        self._nodes.clear()
        for name in self._rig.cluster.nodes:
            if self._rig.cluster.running()[name] is None:
                self._rig.cluster.start_node(name)


def measure(rig: Rig, operations: int = OPERATIONS, flame: Path | None = None) -> Stages:
    """Time a warm GCM with and without the clock, client and all nodes on one core."""
    encrypt = lambda: rig.kq.encrypt("gcm", DATA)  # noqa: E731
    with rig.placed("one"):
        round_trip = statistics.fmean(_times(encrypt, max(200, operations // 4)))
    with TracedNodes(rig) as nodes:
        _times(encrypt, 200)
        core = next(iter(sorted(rig.cpus)))
        pin(nodes.pids.values(), {core})
        with rig.placed("one"):
            if flame:
                _draw(rig, nodes, flame, encrypt)
            clock = StageClock()
            clock.install(CLIENT)
            try:
                clock.reset()
                before = _threads(nodes)
                traced = statistics.fmean(_times(encrypt, operations))
                after = _threads(nodes)
            finally:
                clock.remove()
        client, said = clock.report(), nodes.finish()
    node = max(said, key=lambda each: each["calls"].get("token", 0))
    stages = [*_stages("client", client, operations, CLIENT), *_stages("node", node, node["calls"]["token"], NODE)]
    main_us = (after[1]["main"] - before[1]["main"]) / operations
    timed_us = sum(each.us for each in stages if each.where == "node")
    stages.append(Stage("node", REST, max(0.0, main_us - timed_us), 0.0))
    for where, then, now in zip(("client", "node"), before, after, strict=True):
        for kind, name in (("libzmq", "libzmq's threads: CURVE, TCP"), ("others", "other threads of ours")):
            stages.append(Stage(where, name, (now[kind] - then[kind]) / operations, 0.0))
    return Stages(tuple(stages), round_trip, traced, tuple(dict.fromkeys([*client["gone"], *node["gone"]])))


def _threads(nodes: TracedNodes) -> tuple[dict[str, float], dict[str, float]]:
    """CPU time of this process's threads, and of all nodes' together: which one combines may change."""
    each = [thread_times(pid) for pid in nodes.pids.values()]
    return thread_times(os.getpid()), {kind: sum(node[kind] for node in each) for kind in each[0]}


def _times(act: Any, count: int) -> list[float]:
    clock, taken = time.perf_counter_ns, []
    for _ in range(count):
        begun = clock()
        act()
        taken.append((clock() - begun) / 1000)
    return taken


def _stages(where: str, said: dict[str, Any], operations: int, order: Any) -> list[Stage]:
    names = dict.fromkeys(name for name, _ in order)
    return [
        Stage(where, name, max(0.0, said["nanoseconds"][name] / operations / 1000), said["calls"][name] / operations)
        for name in names
        if name in said["nanoseconds"]
    ]


def _draw(rig: Rig, nodes: TracedNodes, flame: Path, encrypt: Any) -> None:
    """py-spy on the combiner for some seconds of warm encryptions."""
    program = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if program is None:
        print("NOT DRAWN: py-spy is not installed (pip install py-spy)", file=sys.stderr)
        return
    (combiner, *_) = rig.combiners([encrypt])
    command = [
        program,
        "record",
        "--pid",
        str(nodes.pids[combiner]),
        "--duration",
        "5",
        "--native",
        "--output",
        str(flame),
    ]
    drawing = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while drawing.poll() is None:
        _times(encrypt, 100)


def show(found: Stages, markdown: bool) -> None:
    """Print the table."""
    rows = [
        (each.where, each.name, f"{each.us:.1f}", f"{each.calls:.1f}" if each.calls else "") for each in found.stages
    ]
    rows.append(("client", "together", f"{found.of('client'):.1f}", ""))
    rows.append(("node", "together", f"{found.of('node'):.1f}", ""))
    rows.append(("", "waiting (the rest)", f"{found.rest_us:.1f}", ""))
    rows.append(("", "round trip (mean, as all of these)", f"{found.round_trip_us:.1f}", ""))
    if markdown:
        print("| where | stage | µs | calls |\n|---|---|---:|---:|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    else:
        table = Table("where", "stage", "µs", "calls", title="a warm AES-GCM of 1 KiB, one core")
        for row in rows:
            table.add_row(*row)
        Console(width=120).print(table)
    share = 100 * found.checks_us / found.round_trip_us
    print(f"policy, audit and routing: {found.checks_us:.1f} µs, {share:.1f} % of the round trip")
    print(f"(with the clock a round trip took {found.traced_us:.1f} µs)")
    for place in found.gone:
        print(f"NOT MEASURED, since it is not there: {place}")


@click.command()
@click.option("--operations", type=click.IntRange(100, 1_000_000), default=OPERATIONS, show_default=True)
@click.option("--markdown", is_flag=True, help="As the table of docs/performance.md.")
@click.option(
    "--flame", type=click.Path(path_type=Path, dir_okay=False), help="Have py-spy draw the combiner's flames."
)
def main(operations: int, markdown: bool, flame: Path | None) -> None:
    """Print where the time of a warm AES-GCM goes."""
    with Rig(with_p11=False) as rig:
        show(measure(rig, operations, flame), markdown)


if __name__ == "__main__":
    main()
