"""Owns the figures of the bad day: a node that is killed or stopped, and 10,000 idle connections with a flood.

``make bench-resilience`` runs it: real clusters of processes on loopback, every loop bounded in count and time. It
prints a table and writes ``build/bench/resilience.json``: a list of objects with name, value, unit, peer, peer_value,
ratio, target and met. What is compared is measured in the same run; absolute times are of this machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import zmq
from rich.console import Console
from rich.table import Table

import engine
from engine import Engine, LocalCluster
from engine.client.client import load_settings
from engine.client.transport import connect_options
from engine.protocol.requests import REQUEST_CODECS, Describe
from engine.protocol.wire import PROTOCOL_VERSION, Request, request_codec

NODES = 5
THREADS = 4
DEADLINE_S = 5.0
WATCHED_S = 3.0
"""How long the clients go on after a node has gone."""
WARM_KEYS = 8
COLD_KEYS = 160
COLD_EVERY_S = 0.08
"""Pause of a thread between two uses of cold keys, so that there are cold keys for the whole time."""
REPETITIONS = 3
ROUNDS = 5
SETTLED_S = 2.0
LEVEL_S = 3.0
IDLE = 10_000
HALF_OPEN = 500
FLOOD_PER_S = 400
IDLE_LIMIT_S = 90.0
PAYLOAD = os.urandom(256)


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the result; ``met`` says whether ``value`` (or ``ratio``, where there is a peer) is as ``target``."""

    name: str
    value: float
    unit: str
    peer: str
    peer_value: float | None
    ratio: float | None
    target: str
    met: bool


# --- clients that go on ---


@dataclass(slots=True)
class Watch:
    """What one thread of the client saw: when each operation ended, and the errors."""

    ended_s: list[float] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@contextmanager
def clients(use: Callable[[int, int], object], threads: int = THREADS, pause_s: float = 0.0) -> Iterator[list[Watch]]:
    """Threads that call ``use(thread, number)`` one after the other until the block ends."""
    stop = threading.Event()
    watches = [Watch() for _ in range(threads)]

    def run(thread: int) -> None:
        watch, number = watches[thread], 0
        while not stop.is_set():
            begun = time.monotonic()
            try:
                use(thread, number)
            except engine.EngineError as error:
                watch.errors.append(f"{type(error).__name__}: {error}"[:200])
            else:
                watch.ended_s.append(time.monotonic())
                watch.took_s.append(watch.ended_s[-1] - begun)
            number += 1
            if pause_s:
                stop.wait(pause_s)

    running = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for each in running:
        each.start()
    try:
        yield watches
    finally:
        stop.set()
        for each in running:
            each.join(2 * DEADLINE_S)


def rate(watches: Sequence[Watch], from_s: float, to_s: float) -> float:
    """Operations a second that ended within the time."""
    return sum(from_s <= end < to_s for watch in watches for end in watch.ended_s) / (to_s - from_s)


def first_success_s(watches: Sequence[Watch], after_s: float) -> float:
    """The longest that a thread had to wait for its next success."""
    return max(next((end - after_s for end in watch.ended_s if end > after_s), WATCHED_S) for watch in watches)


# --- nodes that go away ---


def await_nodes(kq: Engine, seconds: float = 30.0) -> None:
    """Wait until every node answers."""
    until = time.monotonic() + seconds
    while any(member.error for member in kq.status(timeout=2.0)):
        if time.monotonic() > until:
            raise RuntimeError("a node does not come back")


@contextmanager
def gone(cluster: LocalCluster, kq: Engine, node: str, how: str) -> Iterator[float]:
    """A node is killed or stopped; the time of that. Afterwards all nodes answer again."""
    if how == "killed":
        cluster.kill(node)
    else:
        cluster.pause(node)
    try:
        yield time.monotonic()
    finally:
        if how == "killed":
            cluster.start_node(node)
        else:
            cluster.resume(node)
        await_nodes(kq)


def failover(cluster: LocalCluster, kq: Engine) -> Iterator[Figure]:
    """Errors and the wait for the first success, with loaded keys and with keys that must be gathered."""
    for how in ("killed", "stopped"):
        for state in ("warm", "cold"):
            errors, first = 0, 0.0
            for repetition in range(REPETITIONS):
                node = cluster.nodes[repetition % len(cluster.nodes)]
                kq.flush()
                if state == "warm":
                    for number in range(WARM_KEYS):
                        kq.prewarm(f"warm/{number}")
                    use: Callable[[int, int], object] = warm_use(kq)
                else:
                    use = cold_use(kq)
                with clients(use, pause_s=COLD_EVERY_S if state == "cold" else 0.0) as watches:
                    time.sleep(0.5)
                    with gone(cluster, kq, node, how) as gone_s:
                        time.sleep(WATCHED_S)
                        first = max(first, first_success_s(watches, gone_s))
                for each in watches:
                    for error in each.errors[:3]:
                        print(f"  {how}, {state}: {error}", file=sys.stderr)
                    errors += len(each.errors)
            what = f"a node {how}, {state} keys"
            yield Figure(f"{what}: errors", errors, "errors", "", None, None, "= 0", errors == 0)
            yield Figure(f"{what}: longest wait for a success", first, "s", "", None, None, "<= 1", first <= 1.0)


def warm_use(kq: Engine) -> Callable[[int, int], object]:
    """Encrypt with keys that are loaded."""
    return lambda thread, number: kq.encrypt(f"warm/{(thread + number) % WARM_KEYS}", PAYLOAD, timeout=DEADLINE_S)


def cold_use(kq: Engine) -> Callable[[int, int], object]:
    """Encrypt with a key that nobody has used since the flush, while there are such keys."""
    return lambda thread, number: kq.encrypt(
        f"cold/{(number * THREADS + thread) % COLD_KEYS}", PAYLOAD, timeout=DEADLINE_S
    )


def recovery(cluster: LocalCluster, kq: Engine) -> Iterator[Figure]:
    """The throughput from two seconds after a node went, over that with the node away from the start."""
    for how in ("killed", "stopped"):
        levels, after = [], []
        for repetition in range(ROUNDS):
            node = cluster.nodes[repetition % len(cluster.nodes)]
            with gone(cluster, kq, node, how), clients(warm_use(kq)) as watches:
                time.sleep(SETTLED_S + LEVEL_S)
                now = time.monotonic()
                levels.append(rate(watches, now - LEVEL_S, now))
            kq.flush()
            for number in range(WARM_KEYS):
                kq.prewarm(f"warm/{number}")
            with clients(warm_use(kq)) as watches:
                time.sleep(1.0)
                with gone(cluster, kq, node, how) as gone_s:
                    time.sleep(SETTLED_S + LEVEL_S)
                    after.append(rate(watches, gone_s + SETTLED_S, gone_s + SETTLED_S + LEVEL_S))
        value, level = statistics.median(after), statistics.median(levels)
        ratio = statistics.median(one / other for one, other in zip(after, levels, strict=True))
        yield Figure(
            f"throughput 2 s after a node was {how}",
            value,
            "1/s",
            "the node away from the start",
            level,
            ratio,
            ">= 0.95",
            ratio >= 0.95,
        )


# --- idle connections and floods ---


def raise_files(wanted: int) -> int:
    """Raise the limit on descriptors; what it is then."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
            return wanted
        except (ValueError, PermissionError):
            wanted = hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


def attack(config: str, node: str, idle: int, half_open: int, per_s: int) -> None:
    """In a process of its own: hold idle connections, open half ones anew, and send requests at a fixed rate.

    It says ``ready`` once the idle connections are there, and ends when its standard input does, or in time.
    """
    settings = load_settings(config)
    member = settings.cluster.members[node]
    context: zmq.Context[Any] = zmq.Context()
    context.max_sockets = 1_000
    holder = context.socket(zmq.ROUTER)  # which, unlike a DEALER, connects as often as it is told to
    connect_options(holder, settings.identity.transport, member)
    holder.handshake_ivl = 60_000
    monitor = holder.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
    end_s, up = time.monotonic() + IDLE_LIMIT_S, 0
    for number in range(idle):
        holder.connect(member.endpoint)
        while number - up > 200 and monitor.poll(1_000):
            monitor.recv_multipart()
            up += 1
    while up < idle and time.monotonic() < end_s and monitor.poll(2_000):
        monitor.recv_multipart()
        up += 1
    print(f"ready {up}", flush=True)
    flood = context.socket(zmq.DEALER)
    connect_options(flood, settings.identity.transport, member)
    flood.connect(member.endpoint)
    body = REQUEST_CODECS["describe"].encode(Describe("warm/0", 0))
    host, port = member.endpoint.removeprefix("tcp://").rsplit(":", 1)
    half: list[socket.socket] = []
    begun, sent = time.monotonic(), 0
    while time.monotonic() < end_s:
        if select_stdin():
            break
        due = int((time.monotonic() - begun) * per_s)
        while sent < due:
            sent += 1
            try:
                flood.send(
                    request_codec.encode(Request(PROTOCOL_VERSION, sent, "describe", 1_000, body, {})), zmq.DONTWAIT
                )
            except zmq.Again:
                break
        while flood.poll(0):
            flood.recv()
        if half_open and len(half) < half_open:
            half.append(socket.create_connection((host, int(port)), 2))
        elif half_open:
            half.pop(0).close()
    for each in half:
        each.close()
    context.destroy(linger=0)


def select_stdin() -> bool:
    """Whether the standard input has ended; waits for 5 ms."""
    poller = zmq.Poller()
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    return bool(poller.poll(5))


def burn(share: float) -> None:
    """In a process of its own: take this share of one core, until the standard input ends or in time."""
    end_s = time.monotonic() + IDLE_LIMIT_S
    while time.monotonic() < end_s and not select_stdin():
        begun = time.process_time()
        while time.process_time() - begun < 0.005 * share / max(0.01, 1 - share):
            pass


@contextmanager
def helper(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """This file in a process of its own, with a lifeline."""
    process = subprocess.Popen(
        [sys.executable, __file__, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.communicate(timeout=60)


def cpu_s(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(kq: Engine) -> tuple[float, float]:
    """Operations a second, and the 99th percentile of their times in milliseconds."""
    with clients(warm_use(kq), threads=2) as watches:
        time.sleep(0.5)
        begun = time.monotonic()
        skipped = [len(watch.took_s) for watch in watches]
        time.sleep(LEVEL_S)
        end = time.monotonic()
        times = sorted(t for watch, n in zip(watches, skipped, strict=True) for t in list(watch.took_s)[n:])
        return rate(watches, begun, end), times[int(0.99 * len(times))] * 1e3


def floods(cluster: LocalCluster, kq: Engine, idle: int) -> Iterator[Figure]:
    """The client's throughput and p99 beside the attack, over those beside a plain loop that burns the same CPU."""
    for number in range(WARM_KEYS):
        kq.prewarm(f"warm/{number}")
    node = cluster.nodes[0]
    rates, p99s, plain_rates, plain_p99s, held = [], [], [], [], 0
    for _ in range(REPETITIONS):
        with helper("--attack", cluster.client_config, node, idle, HALF_OPEN, FLOOD_PER_S) as attacker:
            assert attacker.stdout is not None
            held = int(attacker.stdout.readline().split()[1])
            before, begun = cpu_s(attacker.pid), time.monotonic()
            one, other = measured(kq)
            share = (cpu_s(attacker.pid) - before) / (time.monotonic() - begun)
        rates.append(one)
        p99s.append(other)
        with helper("--burn", round(min(share, 0.99), 3)):
            one, other = measured(kq)
        plain_rates.append(one)
        plain_p99s.append(other)
    told = f"{held} idle connections, {HALF_OPEN} half-open ones, {FLOOD_PER_S} requests/s"
    ratio = statistics.median(one / other for one, other in zip(rates, plain_rates, strict=True))
    peer = "the same CPU in a plain loop"
    yield Figure(
        f"throughput beside {told}",
        statistics.median(rates),
        "1/s",
        peer,
        statistics.median(plain_rates),
        ratio,
        ">= 0.8",
        ratio >= 0.8 and held >= idle,
    )
    ratio = statistics.median(one / other for one, other in zip(p99s, plain_p99s, strict=True))
    yield Figure(
        f"p99 beside {told}",
        statistics.median(p99s),
        "ms",
        peer,
        statistics.median(plain_p99s),
        ratio,
        "<= 3",
        ratio <= 3.0,
    )


# --- running ---


@contextmanager
def cluster_of(path: Path, limits: str) -> Iterator[tuple[LocalCluster, Engine]]:
    """A running cluster whose nodes have these lines in ``[limits]``, with keys."""
    cluster = LocalCluster(nodes=NODES, threshold=3, path=path, start_timeout_s=300)
    try:
        for node in cluster.nodes:
            config = path / "nodes" / node / "node.toml"
            config.write_text(config.read_text(encoding="utf-8") + f"\n[limits]\n{limits}\n", encoding="utf-8")
            cluster.restart(node)
        with engine.connect(cluster.client_config) as kq:
            await_nodes(kq)
            for number in range(WARM_KEYS):
                kq.create_key(f"warm/{number}", "aes-256-gcm", threshold=3, shares=5)
            for number in range(COLD_KEYS):
                kq.create_key(f"cold/{number}", "aes-256-gcm", threshold=3, shares=5)
            yield cluster, kq
    finally:
        cluster.close()


def show(figures: Sequence[Figure]) -> None:
    """The table."""
    table = Table()
    for head in ("what", "value", "unit", "over", "its value", "ratio", "target", "met"):
        table.add_column(head, overflow="fold")
    for each in figures:
        table.add_row(
            each.name,
            f"{each.value:.4g}",
            each.unit,
            each.peer,
            "" if each.peer_value is None else f"{each.peer_value:.4g}",
            "" if each.ratio is None else f"{each.ratio:.3f}",
            each.target,
            "yes" if each.met else "NO",
        )
    Console(width=150).print(table)


def main() -> int:
    """Run all parts, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["failover", "recovery", "floods"], help="some of the three parts")
    parser.add_argument("--idle", type=int, default=IDLE)
    parser.add_argument("--output", type=Path, default=Path("build/bench/resilience.json"))
    parser.add_argument("--attack", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--burn", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.attack:
        config, node, *numbers = options.attack
        raise_files(65_536)
        attack(config, node, *map(int, numbers))
        return 0
    if options.burn is not None:
        burn(options.burn)
        return 0
    files = raise_files(65_536)
    idle = min(options.idle, files - 2_000)
    figures: list[Figure] = []
    parts: dict[str, Callable[..., Iterator[Figure]]] = {"failover": failover, "recovery": recovery, "floods": floods}
    unknown = sorted(set(options.parts) - set(parts))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(parts)}")
    limits = f"connections = {idle + 4_000}\nmember_connections = {idle + 2_000}"
    with (
        tempfile.TemporaryDirectory(prefix="keyquorum-bench-") as folder,
        cluster_of(Path(folder) / "cluster", limits) as (cluster, kq),
    ):
        for name in options.parts:
            arguments = (idle,) if name == "floods" else ()
            for figure in parts[name](cluster, kq, *arguments):
                figures.append(figure)
                print(f"{figure.name}: {figure.value:.4g} {figure.unit}", file=sys.stderr)
    show(figures)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps([asdict(each) for each in figures], indent=1) + "\n", encoding="utf-8")
    return 0 if all(each.met for each in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
