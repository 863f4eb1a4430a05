"""Measures what the publication of a node's queue costs: processor time of the node, and the latency of requests.

A local cluster; one client uses a loaded key of one node, alone and while others subscribe to that node, in turns. Only
what subscribers add counts: the same run without them is the peer. It prints a table and writes
``build/bench/publication.json``. Run it with ``.venv/bin/python bench/publication.py``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click

import engine
from engine import Engine, LocalCluster
from engine.client import follower
from engine.client.config import load_identity
from engine.protocol.snapshot import PUBLISH_EVERY_S

OUTPUT: Final = Path(__file__).parents[1] / "build" / "bench" / "publication.json"
SUBSCRIBERS: Final = (1, 100)
CPU_TARGET_MS: Final = 10.0
"""Milliseconds of processor time a second that one subscriber may cost a node: 1 % of a core."""
P99_TARGET: Final = 1.1
MEMBER: Final = """
import sys, time, zmq
public, secret, server, endpoint = (each.encode() for each in sys.argv[2:6])
context = zmq.Context()
for _ in range(int(sys.argv[1])):
    socket = context.socket(zmq.SUB)
    socket.curve_publickey, socket.curve_secretkey, socket.curve_serverkey = public, secret, server
    socket.conflate = True
    socket.subscribe(b"")
    socket.connect(endpoint.decode())
    last = socket
assert last.poll(20_000)
print("ready", flush=True)
sys.stdin.read()
"""


def cpu_ms(pid: int) -> float:
    """Processor time of a process and its children until now."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split())]
    spent_ns = 0
    for each in pids:
        for thread in os.listdir(f"/proc/{each}/task"):
            spent_ns += int(Path(f"/proc/{each}/task/{thread}/schedstat").read_text(encoding="ascii").split()[0])
    return spent_ns / 1e6


@contextmanager
def subscribed(local: LocalCluster, node: str, count: int) -> Iterator[None]:
    """So many subscribers to the node, in a process of their own, which sleeps."""
    if not count:
        yield
        return
    own, member = load_identity(local.client_config.parent / "identity.toml").transport, local.cluster.members[node]
    words = [str(count), own.public.decode(), own.secret.decode(), member.curve_z85, member.publish_endpoint]
    process = subprocess.Popen([sys.executable, "-c", MEMBER, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        if process.stdout.readline() != b"ready\n":
            raise RuntimeError("nothing was published")
        yield
    finally:
        process.communicate()


def uses(kq: Engine, seconds: float) -> list[float]:
    """How long each warm AES-GCM took, in microseconds."""
    taken, until = [], time.perf_counter() + seconds
    while (begun := time.perf_counter()) < until:
        kq.encrypt("k", b"x" * 32)
        taken.append((time.perf_counter() - begun) * 1e6)
    return sorted(taken)


def row(name: str, value: float, unit: str, peer: str, peer_value: float, target: float | None, met: bool) -> Any:
    """One line of the table, and of the file."""
    made = {"name": name, "value": round(value, 2), "unit": unit, "peer": peer, "peer_value": round(peer_value, 2)}
    made |= {"ratio": round(value / peer_value, 3), "target": target, "met": met if target is not None else None}
    click.echo(f"{name:48} {value:9.2f} {unit:6} {peer_value:9.2f} without   met: {made['met']}")
    return made


@click.command()
@click.option("--seconds", default=3.0, help="For each measurement.")
@click.option("--rounds", default=3, help="How often each is made; the median counts.")
def main(seconds: float, rounds: int) -> None:
    """Measure what subscribers cost a node."""
    follower.MOST_NODES = 0  # type: ignore[misc] # the client that measures does not subscribe itself
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalCluster(nodes=2, threshold=2, path=Path(folder) / "kq") as local,
        engine.connect(local.client_config) as kq,
    ):
        kq.create_key("k", "aes-256-gcm", threshold=2, shares=2)
        uses(kq, 0.5)
        pids = {name: pid for name in local.nodes if (pid := local.running()[name]) is not None}
        before = {name: cpu_ms(pid) for name, pid in pids.items()}
        uses(kq, 0.5)
        node = max(pids, key=lambda name: cpu_ms(pids[name]) - before[name])
        for _ in range(rounds):
            for count in (0, *SUBSCRIBERS):
                with subscribed(local, node, count):
                    begun, at = cpu_ms(pids[node]), time.monotonic()
                    time.sleep(seconds)
                    idle = (cpu_ms(pids[node]) - begun) / (time.monotonic() - at)
                    taken = uses(kq, seconds)
                    found.setdefault(("idle", count), []).append((idle, 0.0))
                    p50, p99 = (taken[int(len(taken) * share)] for share in (0.5, 0.99))
                    found.setdefault(("busy", count), []).append((p50, p99))
                time.sleep(2 * PUBLISH_EVERY_S + 0.5)

    def median(kind: str, count: int, place: int) -> float:
        return sorted(each[place] for each in found[kind, count])[rounds // 2]

    rows = []
    for count in SUBSCRIBERS:
        idle, without = median("idle", count, 0), median("idle", 0, 0)
        target = without + CPU_TARGET_MS if count == 1 else None
        name = f"processor time of an idle node, {count} subscribers"
        rows.append(row(name, idle, "ms/s", "no subscribers", without, target, idle <= (target or 0)))
        for place, what in enumerate(("p50", "p99")):
            value, peer = median("busy", count, place), median("busy", 0, place)
            bound = P99_TARGET if place and count == 1 else None
            name = f"{what} of warm AES-GCM, {count} subscribers"
            rows.append(row(name, value, "us", "no subscribers", peer, bound, value <= peer * (bound or 0)))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
