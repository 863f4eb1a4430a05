"""Owns the figures of keys that live: moves by plan, refresh and creation over their fsyncs, and service meanwhile.

``make bench-lifecycle`` runs it on a real cluster of seven nodes on loopback; every loop is bounded. It prints a table
and writes ``build/bench/lifecycle.json`` as ``figures`` does. Floors are measured in the same run, on the same disk,
between what they are compared with; absolute times are of this machine alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import figures
from balancing_client import Mover
from figures import Row
from rig import Crew, family, in_threads, percentile, pss_kib

import engine
from engine import Engine, LocalCluster, PolicyRule
from engine.protocol.manifest import KeyManifest

NODES: Final = 7
THRESHOLD: Final = 2
SHARES: Final = 3
BATCH: Final = 64
"""Orders in one message to a coordinator."""
AT_ONCE: Final = 3
"""Coordinators that are at work at the same time."""
MAKERS: Final = 8
CLIENTS: Final = ("manager", "service")
RULES: Final = tuple(PolicyRule(name, "*", ["*"]) for name in CLIENTS)
CHANGES: Final = 40
"""Refreshes and creations that are measured."""
SERVICE_S: Final = 10.0
SERVICE_RATE: Final = 100.0
"""Uses a second."""
SERVICE_THREADS: Final = 2
WARM_S: Final = 2.0
PACE: Final = 25.0
"""Keys a second that are moved while the service is measured: what a budget leaves free goes to clients."""
TIMEOUT_S: Final = 120.0
RETRIES: Final = 5

# The fsyncs that a client waits for, one after the other. SQLite's WAL takes one for a transaction, and emptying it of
# what was erased two; an audit record that a reply waits for takes one.
REFRESH_FSYNCS: Final[Mapping[str, int]] = {
    "the registry notes the attempt": 1,
    "a holder pledges to follow no earlier one": 1,
    "a holder stores the new share, and its record": 2,
    "the registry commits": 1,
    "a holder makes it the valid one, erases the old one, and its record": 4,
    "the coordinator's record": 1,
}
CREATE_FSYNCS: Final[Mapping[str, int]] = {
    "the registry reserves the name": 1,
    "a holder stores its share, and its record": 2,
    "the registry commits": 1,
    "a holder makes it valid, and its record": 2,
    "the dealer's record": 1,
}


@dataclass(frozen=True, slots=True)
class Step:
    """One key of the plan: who coordinates its move, the manifest of before, and the holders to be."""

    coordinator: str
    manifest: KeyManifest
    holders: tuple[str, ...]


class Site:
    """The cluster with a client, and its processes."""

    def __init__(self, local: LocalCluster, kq: Engine) -> None:
        self.local = local
        self.kq = kq
        self.pids = [pid for pid in family(os.getpid()) if pid != os.getpid()]
        self.sites = {name: node.location.split("/")[0] for name, node in local.cluster.nodes.items()}

    def create(self, names: Sequence[str]) -> None:
        """Make the keys, from several threads."""
        with ThreadPoolExecutor(MAKERS) as pool:
            list(pool.map(self._create, names))

    def _create(self, name: str) -> None:
        for attempt in range(RETRIES):
            try:
                self.kq.create_key(name, "aes-256-gcm", threshold=THRESHOLD, shares=SHARES, timeout=TIMEOUT_S)
            except engine.QuorumUnavailable:
                if attempt == RETRIES - 1:
                    raise
            else:
                return

    def step(self, manifest: KeyManifest) -> Step:
        """The move of one share of a key to another node of the same site."""
        holders = [each.node for each in manifest.holders]
        for place, holder in enumerate(holders):
            for node in self.sites:
                if node not in holders and self.sites[node] == self.sites[holder]:
                    moved = (*holders[:place], node, *holders[place + 1 :])
                    stays = next(each for each in holders if each in moved)
                    return Step(stays, manifest, moved)
        raise RuntimeError(f"no other node for {manifest.name!r} on {holders}")

    def memory_kib(self) -> int:
        """The proportional set size of all processes of the cluster."""
        return sum(pss_kib(pid) for pid in self.pids)


def plan_of(site: Site, names: Sequence[str]) -> list[Step]:
    """A plan that moves each key."""
    with Mover(site.local, site.kq) as mover:
        return [site.step(mover.manifest(name)) for name in names]


def carry_out(site: Site, plan: Sequence[Step], pace: float, looked: Callable[[int], None]) -> tuple[int, Counter[str]]:
    """Carry a plan out, at most ``pace`` keys a second (0: as fast as can be); keys moved, and errors by their code.

    ``looked`` is called with how many are done, after each batch.
    """
    by_coordinator: dict[str, list[Step]] = defaultdict(list)
    for step in plan:
        by_coordinator[step.coordinator].append(step)
    chunks = [some[at : at + BATCH] for some in by_coordinator.values() for at in range(0, len(some), BATCH)]
    todo = iter(sorted(chunks, key=lambda chunk: -len(chunk)))
    lock, begun_s = threading.Lock(), time.monotonic()
    done, errors = [0], Counter[str]()
    with Mover(site.local, site.kq) as shared:
        fencing = shared.fencing

    def run(_: int) -> None:
        with Mover(site.local, site.kq, fencing) as mover:
            while True:
                with lock:
                    chunk = next(todo, None)
                if chunk is None:
                    return
                left = list(chunk)
                for _ in range(RETRIES):
                    orders = mover.orders([(step.manifest, step.holders) for step in left])
                    results = mover.move(left[0].coordinator, orders, TIMEOUT_S)
                    failed = [step for step, result in zip(left, results, strict=True) if result.code]
                    with lock:
                        done[0] += len(left) - len(failed)
                        errors.update(result.code for result in results if result.code)
                    left = failed
                    if not left:
                        break
                with lock:
                    looked(done[0])
                    ahead_s = done[0] / pace - (time.monotonic() - begun_s) if pace else 0.0
                if ahead_s > 0:
                    time.sleep(ahead_s)

    in_threads(run, AT_ONCE if not pace else 1)
    return done[0], errors


def measure_moves(site: Site, keys: int) -> Iterator[Row]:
    """All keys moved in one plan, and what the cluster's memory grew by from a fifth of it to the end."""
    names = [f"moves/{number:05}" for number in range(keys)]
    site.create(names)
    plan = plan_of(site, names)
    memory: dict[str, int] = {}

    def looked(done: int) -> None:
        if done >= keys // 5 and "fifth" not in memory:
            memory["fifth"] = site.memory_kib()

    begun_s = time.monotonic()
    moved, errors = carry_out(site, plan, 0.0, looked)
    took_s = time.monotonic() - begun_s
    rate = moved / took_s
    grown_mib = (site.memory_kib() - memory["fifth"]) / 1024
    name = f"{moved:,} of {keys:,} keys moved in one plan"
    told = f"{sum(errors.values())} tried again" if errors else ""
    yield Row(name, rate, "keys/s", told, None, None, 100.0, 300.0, moved == keys and rate >= 100, rate >= 300)
    yield Row("growth of the cluster's memory from a fifth of that to its end", grown_mib, "MiB")


def floor_s(folder: Path, fsyncs: int) -> float:
    """How long so many fsyncs take one after the other, each of one page at the end of a file."""
    with (folder / "floor").open("ab", buffering=0) as file:
        begun_s = time.perf_counter()
        for _ in range(fsyncs):
            file.write(bytes(4096))
            os.fdatasync(file.fileno())
        return time.perf_counter() - begun_s


def over_floor(name: str, folder: Path, fsyncs: Mapping[str, int], act: Callable[[int], object]) -> Row:
    """An act's median time over that of its fsyncs, each measured between two others."""
    count = sum(fsyncs.values())
    times, floors = [], []
    for number in range(CHANGES):
        floors.append(floor_s(folder, count))
        begun_s = time.perf_counter()
        act(number)
        times.append(time.perf_counter() - begun_s)
    took_s, floor = statistics.median(times), statistics.median(floors)
    ratio = took_s / floor
    peer = f"its {count} fsyncs"
    return Row(name, took_s * 1e3, "ms", peer, floor * 1e3, ratio, 3.0, 2.0, ratio <= 3.0, ratio <= 2.0)


def measure_changes(site: Site, _: int) -> Iterator[Row]:
    """A refresh of a key over all its holders, and a creation, over their fsyncs."""
    folder = site.local.path.parent  # the disk that the cluster is on
    site.create(["changes/refreshed"])
    site.kq.refresh_key("changes/refreshed", timeout=TIMEOUT_S)
    yield over_floor(
        f"refresh of a key over its {SHARES} holders",
        folder,
        REFRESH_FSYNCS,
        lambda number: site.kq.refresh_key("changes/refreshed", timeout=TIMEOUT_S),
    )
    yield over_floor(
        f"creation of a key, {THRESHOLD} of {SHARES}",
        folder,
        CREATE_FSYNCS,
        lambda number: site.kq.create_key(
            f"changes/{number}", "aes-256-gcm", threshold=THRESHOLD, shares=SHARES, timeout=TIMEOUT_S
        ),
    )


def serve(crew: Crew, seconds: float) -> list[float]:
    """What warm uses of a key take, from when each was due, in microseconds: another process's, at a steady rate."""
    rate, seed, threads = SERVICE_RATE, 1, SERVICE_THREADS
    (said,) = crew.order("open", rate=rate, rsa_share=0.0, seconds=seconds, seed=seed, threads=threads)
    taken: list[float] = said["gcm"]
    return taken


def measure_service(site: Site, _: int) -> Iterator[Row]:
    """The p99 of warm uses while keys are moved, over that of before."""
    site.create(["gcm"])
    names = [f"paced/{number:05}" for number in range(int(PACE * SERVICE_S * 1.5))]
    site.create(names)
    plan = plan_of(site, names)
    crew = Crew(site.local, ["service"], None)
    try:
        serve(crew, WARM_S)
        before = percentile(serve(crew, SERVICE_S), 0.99)
        counts: list[int] = []
        moving = threading.Thread(target=carry_out, args=(site, plan, PACE, counts.append))
        moving.start()
        during = percentile(serve(crew, SERVICE_S), 0.99)
        moved = max(counts, default=0)
        moving.join()
    finally:
        crew.close()
    ratio = during / before
    name = f"p99 of warm uses while {moved / SERVICE_S:.0f} keys/s are moved"
    yield Row(name, during / 1e3, "ms", "before", before / 1e3, ratio, 2.0, 1.3, ratio <= 2.0, ratio <= 1.3)


PARTS: Final[Mapping[str, Callable[[Site, int], Iterator[Row]]]] = {
    "changes": measure_changes,
    "service": measure_service,
    "moves": measure_moves,
}


def main() -> int:
    """Measure, print and write; 1 if a figure that must be met is not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keys", type=int, default=10_000, help="keys in the plan")
    parser.add_argument("--only", choices=list(PARTS), action="append", help="measure this part alone; repeatable")
    parser.add_argument("--output", type=Path, default=Path("build/bench/lifecycle.json"))
    options = parser.parse_args()
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as text,
        LocalCluster(
            nodes=NODES, threshold=THRESHOLD, shares=SHARES, path=Path(text) / "kq", clients=CLIENTS, rules=RULES
        ) as local,
        engine.connect(local.client_config) as kq,
    ):
        site = Site(local, kq)
        for name, measure in PARTS.items():
            for row in measure(site, options.keys) if name in (options.only or PARTS) else ():
                rows.append(row)
                sys.stderr.write(f"{row.name}: {row.value:.3f} {row.unit}\n")
    figures.show("Keys that live", rows)
    figures.write(rows, options.output)
    return 0 if all(row.met for row in rows if row.met is not None) else 1


if __name__ == "__main__":
    sys.exit(main())
