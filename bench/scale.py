"""Owns the figures of scale: what grows with the keys, on 15 real nodes, and in the books and tables of 50 nodes.

``make bench-scale`` makes keys on a real cluster on loopback, step by step, and looks at each step how long things take
and how much memory and disk they need (``nodes``); then the same books, lists, plans and tables, with keys that are
signed and no processes of nodes (``books``, in ``scale_books.py``). It prints a table and writes
``build/bench/scale.json``. With ``--path`` the cluster is kept, and the next run goes on from the keys that are there;
``--minutes`` ends the making of keys, and the last step is then at what there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import click
import scale_books
from figures import Row, show, write
from rig import family, machine, pss_kib

import engine
from engine import Engine, LocalCluster, aio
from engine.errors import EngineError, KeyExists
from engine.protocol.table import table_codec

ROOT: Final = Path(__file__).parents[1]
OUTPUT: Final = ROOT / "build" / "bench" / "scale.json"
PARTS: Final = ("nodes", "books")
STEPS: Final = (1_000, 5_000, 20_000, 50_000, 100_000)
NODES: Final = 15
THRESHOLD: Final = 2
SHARES: Final = 3
MAKERS: Final = 48
"""Keys that are being made at a time."""
TRIES: Final = 8
HELD_S: Final = 15.0
HELD_ROUNDS: Final = 20
"""Names that a failed order holds are tried again so often, and until then waited for."""
RATED: Final = 200
"""Of fewer keys no rate is told."""
TOLD_S: Final = 5.0
"""So often it is told how far it is."""
TIMEOUT_S: Final = 120.0
STILL: Final = {"migrate": {"enabled": False}}
"""No keys move: that has its own figures, and takes processor time from what is measured."""
SETTLE_S: Final = 5.0
SETTLED_S: Final = 120.0
IDLE_S: Final = 5.0
TABLES: Final = 8
CLIENTS: Final = 8
"""Clients that each published table is waited for at."""
ACTS: Final = 9
STARTS: Final = 5
FRESH: Final = """
import sys, engine
with engine.connect(sys.argv[1]) as kq:
    kq.encrypt(sys.argv[2], b"first")
"""

Teller = Callable[[str], None]


def name_of(number: int) -> str:
    """The name of the so manieth key."""
    return f"scale/{number:07}"


# --- keys ---


async def _make(config: Path, numbers: Sequence[int], until_s: float, tell: Teller) -> int:
    """Make these keys, many at a time, until it is that late; how many of them there are then."""
    todo, made, held, told_s = iter(numbers), 0, 0, time.monotonic() + TOLD_S
    begun_s = time.monotonic()

    async def run(kq: aio.AsyncEngine) -> None:
        nonlocal made, held, told_s
        for number in todo:
            for tried in range(1, TRIES + 1):
                try:
                    await kq.create_key(
                        name_of(number), "aes-256-gcm", threshold=THRESHOLD, shares=SHARES, timeout=TIMEOUT_S
                    )
                except KeyExists:
                    # An order that failed may hold the name until it expires: that key is left for later.
                    held += not await _is_there(kq, name_of(number))
                except EngineError:
                    if tried == TRIES:
                        raise
                    await asyncio.sleep(0.1 * tried)
                    continue
                break
            made += 1
            now_s = time.monotonic()
            if now_s >= told_s:
                told_s = now_s + TOLD_S
                rate = made / (now_s - begun_s)
                tell(f"{number + 1:,} keys, {rate:.0f} a second; {(len(numbers) - made) / rate:.0f} s to the next step")
            if now_s >= until_s:
                return

    async with aio.connect(config) as kq:
        await asyncio.gather(*(run(kq) for _ in range(MAKERS)))
    return made - held


async def _is_there(kq: aio.AsyncEngine, name: str) -> bool:
    try:
        await kq.key_info(name)
    except EngineError:  # such as that it is not known yet
        return False
    return True


# --- what is looked at ---


def timed(act: Callable[[], object]) -> float:
    """Seconds of one call."""
    begun_s = time.perf_counter()
    act()
    return time.perf_counter() - begun_s


def cpu_s(pids: Sequence[int]) -> float:
    """Processor time of processes until now."""
    spent_ns = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                spent_ns += int(Path(f"/proc/{pid}/task/{task}/schedstat").read_text(encoding="ascii").split()[0])
    return spent_ns / 1e9


def disk_bytes(folder: Path, pattern: str) -> int:
    """The files of SQLite's that match, logs included."""
    return sum(each.stat().st_size for each in folder.rglob(pattern) if each.is_file())


class Site:
    """The cluster with its clients."""

    def __init__(self, local: LocalCluster, kq: Engine) -> None:
        self.local, self.kq = local, kq
        running = {name: pid for name, pid in local.running().items() if pid is not None}
        self.balancer = family(running["balancer"])
        self.serving = [pid for name in local.nodes if (pid := local.serving()[name]) is not None]
        every = {each for name in local.nodes for each in family(running[name])}
        self.supervisors = sorted(every - set(self.serving))

    @property
    def pids(self) -> list[int]:
        """All processes of the cluster."""
        return [*self.balancer, *self.serving, *self.supervisors]

    def settle(self) -> float:
        """Wait until its processes do no less from one moment to the next; the processor time that they have taken."""
        until_s, last_s, spent_s = time.monotonic() + SETTLED_S, float("inf"), cpu_s(self.pids)
        while time.monotonic() < until_s:
            time.sleep(SETTLE_S)
            before_s, spent_s = spent_s, cpu_s(self.pids)
            if spent_s - before_s > 0.9 * last_s:
                break
            last_s = spent_s - before_s
        return spent_s

    def look(self, keys: int) -> dict[str, float]:
        """All that is measured with so many keys."""
        self.settle()
        found: dict[str, float] = {"keys": keys}
        before = cpu_s(self.balancer), cpu_s(self.serving)
        time.sleep(IDLE_S)
        found["balancer, idle"] = 1e3 * (cpu_s(self.balancer) - before[0]) / IDLE_S
        found["node, idle"] = 1e3 * (cpu_s(self.serving) - before[1]) / IDLE_S / len(self.serving)
        found["node, memory"] = sum(map(pss_kib, self.serving)) / 1024 / len(self.serving)
        found["balancer, memory"] = sum(map(pss_kib, self.balancer)) / 1024
        found["supervisor, memory"] = sum(map(pss_kib, self.supervisors)) / 1024 / len(self.local.nodes)
        found["registry, disk"] = disk_bytes(self.local.path, "registry.db*") / 2**20
        found["node, disk"] = disk_bytes(self.local.path / "nodes", "*.db*") / 2**20 / len(self.local.nodes)
        names: list[str] = []
        found["list"] = timed(lambda: names.extend(each.name for each in self.kq.list_keys(timeout=TIMEOUT_S)))
        # A look that was cut off may have left a key of its own.
        if (listed := sum(each.startswith("scale/") for each in names)) != keys:
            raise RuntimeError(f"{listed} keys are listed; {keys} were made")
        found["list of one"] = timed(lambda: self.kq.list_keys(name_of(0), timeout=TIMEOUT_S))
        found["holdings"] = timed(self.local.keys_by_node)
        found |= self._changes(keys)
        found |= self._publication()
        found["client start"] = self._starts(keys)
        return found

    def _changes(self, keys: int) -> dict[str, float]:
        """Changes of single keys, spread over all of them: the median of each."""
        taken: dict[str, list[float]] = {"create": [], "refresh": [], "settings": [], "rotate": []}
        for number in range(ACTS):
            name = name_of(number * (keys - 1) // (ACTS - 1))
            spare = f"spare/{keys}-{number}"
            taken["create"].append(
                timed(
                    lambda spare=spare: self.kq.create_key(spare, "aes-256-gcm", THRESHOLD, SHARES, timeout=TIMEOUT_S)
                )  # type: ignore[misc]
            )
            taken["rotate"].append(timed(lambda spare=spare: self.kq.rotate_key(spare, timeout=TIMEOUT_S)))  # type: ignore[misc]
            self.kq.destroy_key(spare, timeout=TIMEOUT_S)
            taken["refresh"].append(timed(lambda name=name: self.kq.refresh_key(name, timeout=TIMEOUT_S)))  # type: ignore[misc]
            taken["settings"].append(timed(lambda name=name: self.kq.disable_key(name, timeout=TIMEOUT_S)))  # type: ignore[misc]
            self.kq.enable_key(name, timeout=TIMEOUT_S)
        return {name: statistics.median(each) for name, each in taken.items()}

    def _publication(self) -> dict[str, float]:
        """The table's length, and from when it is made until the last of some clients goes by it."""
        waits, sizes = [], []
        with contextlib.ExitStack() as stack:
            config = self.local.client_config
            clients = [stack.enter_context(engine.connect(config)) for _ in range(CLIENTS)]
            seen, until_s = -1, time.monotonic() + TIMEOUT_S
            while len(waits) <= TABLES and time.monotonic() < until_s:
                tables = [client.routing_table for client in clients]
                counters = {-1 if table is None else table.counter for table in tables}
                if len(counters) == 1 and (counter := counters.pop()) > seen and (table := tables[0]) is not None:
                    seen = counter
                    waits.append(time.time() - table.issued_ms / 1000)
                    sizes.append(len(table_codec.encode(table)))
                time.sleep(0.001)
        if len(waits) <= TABLES:
            raise RuntimeError("no routing tables came")
        return {"publication": statistics.median(waits[1:]), "table": float(max(sizes))}

    def _starts(self, keys: int) -> float:
        """A client's process from its start until its first use of a key that nobody has loaded has been answered."""
        taken = []
        for number in range(STARTS):
            name = name_of((2 * number + 1) * keys // (2 * STARTS))
            command = [sys.executable, "-c", FRESH, str(self.local.client_config), name]
            taken.append(timed(lambda command=command: subprocess.run(command, check=True, timeout=TIMEOUT_S)))  # type: ignore[misc]
        return statistics.median(taken)


# --- the rows ---


@dataclass(frozen=True, slots=True)
class Figure:
    """One column of the table: its name and unit, and by how much what was measured is multiplied."""

    name: str
    unit: str
    factor: float = 1.0


FIGURES: Final = {
    "create rate": Figure("keys made", "keys/s"),
    "create, processor": Figure("processor time of the cluster for a key that is made", "ms", 1e3),
    "create": Figure("a key is made", "ms", 1e3),
    "rotate": Figure("a key gets a version", "ms", 1e3),
    "refresh": Figure("a key is refreshed", "ms", 1e3),
    "settings": Figure("a key's settings are changed", "ms", 1e3),
    "list": Figure("all keys are listed", "s"),
    "list of one": Figure("one key is listed, by its name", "ms", 1e3),
    "holdings": Figure("keys are counted by node", "ms", 1e3),
    "table": Figure("routing table", "bytes"),
    "publication": Figure(f"routing table, from its making until {CLIENTS} clients have it", "ms", 1e3),
    "client start": Figure("client process, from its start to its first answer", "ms", 1e3),
    "node, memory": Figure("memory of a node", "MiB"),
    "balancer, memory": Figure("memory of the balancer", "MiB"),
    "supervisor, memory": Figure("memory of a supervisor", "MiB"),
    "node, disk": Figure("disk of a node", "MiB"),
    "registry, disk": Figure("disk of the registry", "MiB"),
    "node, idle": Figure("idle node", "ms/s"),
    "balancer, idle": Figure("idle balancer", "ms/s"),
    "start": Figure("the cluster is started again", "s"),
    "start, processor": Figure("processor time of the cluster from its start until it is idle", "s"),
}


def rows_of(steps: Sequence[dict[str, float]]) -> Iterator[Row]:
    """The rows of the steps; each is beside the first step's, and memory per key over the step before the first."""
    first = steps[0]
    for what, figure in FIGURES.items():
        for step in steps:
            if what not in step:
                continue
            name = f"{NODES} nodes, {step['keys']:,.0f} keys: {figure.name}"
            value = step[what] * figure.factor
            if step is first or what not in first:
                yield Row(name, value, figure.unit)
            else:
                peer = first[what] * figure.factor
                yield Row(name, value, figure.unit, f"{first['keys']:,.0f} keys", peer, value / peer if peer else None)
    if len(steps) > 1:
        last, more = steps[-1], steps[-1]["keys"] - first["keys"]
        for what, parts in (("node, memory", SHARES / NODES), ("balancer, memory", 1.0)):
            grown = (last[what] - first[what]) * 2**20 / more / parts
            told = "of a share on a node" if parts < 1 else "of a key in the balancer"
            yield Row(f"{NODES} nodes: memory {told}", grown, "bytes")


def measure_nodes(path: Path, steps: Sequence[int], minutes: float, tell: Teller) -> list[Row]:
    """Make the keys of each step, and look."""
    notes = path.parent / f"{path.name}.steps.json"
    done: list[dict[str, float]] = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else []
    until_s = time.monotonic() + 60 * minutes
    had = (path / "cluster.toml").exists()
    begun_s = time.monotonic()
    with (
        LocalCluster(nodes=NODES, threshold=THRESHOLD, shares=SHARES, path=path, balancer=STILL) as local,
        engine.connect(local.client_config) as kq,
    ):
        started_s = time.monotonic() - begun_s
        there = len(kq.list_keys("scale/*", timeout=TIMEOUT_S)) if had else 0
        tell(f"the cluster {'goes on' if had else 'is new'}: {there:,} keys, started in {started_s:.1f} s")
        if had and done and done[-1]["keys"] == there:
            done[-1] |= {"start": started_s, "start, processor": Site(local, kq).settle()}
            notes.write_text(json.dumps(done), encoding="utf-8")
        for step in steps:
            if any(each["keys"] >= step for each in done):
                continue
            site, missing = Site(local, kq), _missing(kq, step) if there else range(step)
            begun_s, spent_s = time.monotonic(), cpu_s(site.pids)
            made = asyncio.run(_make(local.client_config, missing, until_s, tell))
            took_s, spent_s = time.monotonic() - begun_s, cpu_s(site.pids) - spent_s
            for _ in range(HELD_ROUNDS):
                there = len(kq.list_keys("scale/*", timeout=TIMEOUT_S))
                if there >= step or time.monotonic() >= until_s:
                    break
                time.sleep(HELD_S)
                asyncio.run(_make(local.client_config, _missing(kq, step), until_s, tell))
            if there <= (done[-1]["keys"] if done else 0):
                break
            tell(f"looks at {there:,} keys")
            found = site.look(there)
            if made >= RATED:
                found |= {"create rate": made / took_s, "create, processor": spent_s / made}
            done.append(found)
            notes.write_text(json.dumps(done), encoding="utf-8")
            if there < step:
                tell(f"the time is over at {there:,} of {step:,} keys")
                break
    return list(rows_of(done))


def _missing(kq: Engine, keys: int) -> list[int]:
    """Which of so many keys are not there."""
    known = {each.name for each in kq.list_keys("scale/*", timeout=TIMEOUT_S)}
    return [number for number in range(keys) if name_of(number) not in known]


@click.command()
@click.option("--keys", type=click.IntRange(20), default=STEPS[-1], show_default=True, help="The last step.")
@click.option("--minutes", type=float, default=60.0, show_default=True, help="No keys are made after so long.")
@click.option(
    "--path", type=click.Path(path_type=Path, file_okay=False), help="Keep the cluster here, and go on with it."
)
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="These parts alone.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=OUTPUT, help="Where the rows go.")
def main(keys: int, minutes: float, path: Path | None, only: tuple[str, ...], output: Path) -> None:
    """Measure what grows with the keys."""
    click.echo(f"machine: {machine()}")
    begun_s = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun_s:5.0f} s] {text}")

    steps = [*(step for step in STEPS if step < keys), keys]
    # What the other part measured stays in the file.
    kept: list[Any] = json.loads(output.read_text(encoding="utf-8")) if output.exists() and only else []
    rows = [Row(**each) for each in kept if not any(each["name"].startswith(HEADS[part]) for part in only)]
    for part in only or PARTS:
        with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as text:
            if part == "books":
                found = scale_books.rows(Path(text), steps, tell)
            else:
                found = measure_nodes(path or Path(text) / "kq", steps, minutes, tell)
        show(f"scale: {part}", found)
        rows += found
        write(rows, output)
    click.echo(f"{len(rows)} rows in {output}, {time.monotonic() - begun_s:.0f} s")


HEADS: Final = {"nodes": f"{NODES} nodes", "books": f"{scale_books.NODES} nodes"}
"""How the names of a part's rows begin."""


if __name__ == "__main__":
    main()
