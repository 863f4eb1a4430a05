"""Owns the long run: mixed load at a share of the measured capacity while nodes die and come back; `make soak`.

Every result is checked against what is known (a decryption against its plaintext, a signature by pyca/cryptography, a
MAC against its first value, a changed ciphertext must be refused), and every call counts: one that raises within its
deadline is lost. Memory and file descriptors of the processes that serve, and of this client, must stay flat. The exit
code is 1 if anything is wrong; ``build/bench/soak.json`` has the rows either way. ``tests/test_soak.py`` runs it
for a short time.
"""

from __future__ import annotations

import collections
import hashlib
import json
import math
import os
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
from cryptography.exceptions import InvalidSignature as PycaInvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from rich.console import Console
from rich.table import Table
from rig import HERE, KEYS, descriptors, pss_kib

import engine
from engine import Engine, EngineError, InvalidTag, LocalCluster

OUTPUT: Final = HERE.parent / "build" / "bench" / "soak.json"
THREADS: Final = 8
RSA_SHARE: Final = 0.05
TAMPERED_SHARE: Final = 0.02
MEMORY_MB: Final = 10.0
"""How much a process may grow between its first minute (or quarter) and the end."""
DESCRIPTORS: Final = 24
"""The same of its descriptors: each of the client's channels may reach a node that it did not need before."""
KILLED_AT_MOST_S: Final = 3.0
SAMPLE_S: Final = 1.0
MAX_TOLD: Final = 20
BUCKETS_PER_DOUBLING: Final = 8


class Wrong(Exception):
    """A result that is not what it must be."""


@dataclass(slots=True)
class Tally:
    """What happened; safe for several threads under ``lock``."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    done: int = 0
    wrong: int = 0
    lost: int = 0
    told: list[str] = field(default_factory=list)
    latencies: collections.Counter[int] = field(default_factory=collections.Counter)

    def note(self, operations: int, late_s: float, error: Exception | None) -> None:
        """Count what one act ended with; ``late_s`` since it was due."""
        bucket = max(0, int(math.log2(max(1.0, late_s * 1e6)) * BUCKETS_PER_DOUBLING))
        with self.lock:
            self.latencies[bucket] += 1
            if error is None:
                self.done += operations
                return
            self.wrong += isinstance(error, Wrong)
            self.lost += not isinstance(error, Wrong)
            if len(self.told) < MAX_TOLD:
                self.told.append(f"{type(error).__name__}: {error}"[:300])

    def percentile_ms(self, share: float) -> float:
        """The latency below which this share of the acts ended, within a tenth."""
        left = share * sum(self.latencies.values())
        for bucket in sorted(self.latencies):
            left -= self.latencies[bucket]
            if left <= 0:
                return float(2 ** ((bucket + 1) / BUCKETS_PER_DOUBLING) / 1000)
        return 0.0


class Acts:
    """What the client does, each with its check."""

    def __init__(self, kq: Engine, deadline_s: float) -> None:
        self._kq = kq
        self._deadline_s = deadline_s
        self._sign = serialization.load_pem_public_key(kq.public_key("sign").encode())
        self._rsa = serialization.load_pem_public_key(kq.public_key("rsa").encode())
        self._messages = [hashlib.sha256(bytes([number])).digest() * (number + 1) for number in range(16)]
        self._macs = [kq.mac("mac", message) for message in self._messages]

    def one(self, draw: random.Random) -> int:
        """Do one act, check its result, and give the number of operations in it."""
        if draw.random() < RSA_SHARE:
            return self._signed("rsa", draw)
        act: Callable[[random.Random], int] = draw.choice([self._encrypted, self._encrypted, self._ecdsa, self._mac])
        return act(draw)

    def _encrypted(self, draw: random.Random) -> int:
        plaintext, associated = draw.randbytes(draw.randrange(0, 2048)), draw.randbytes(8)
        ciphertext = self._kq.encrypt("gcm", plaintext, associated_data=associated, timeout=self._deadline_s)
        if draw.random() < TAMPERED_SHARE:
            changed = bytearray(ciphertext)
            changed[-1 - draw.randrange(16)] ^= 1 << draw.randrange(8)
            try:
                self._kq.decrypt("gcm", bytes(changed), associated_data=associated, timeout=self._deadline_s)
            except InvalidTag:
                return 2
            raise Wrong("a changed ciphertext was decrypted")
        if self._kq.decrypt("gcm", ciphertext, associated_data=associated, timeout=self._deadline_s) != plaintext:
            raise Wrong("a decryption gave another plaintext")
        return 2

    def _ecdsa(self, draw: random.Random) -> int:
        return self._signed("sign", draw)

    def _signed(self, name: str, draw: random.Random) -> int:
        message = draw.randbytes(64)
        signature = self._kq.sign(name, message, timeout=self._deadline_s)
        try:
            if isinstance(self._rsa, rsa.RSAPublicKey) and name == "rsa":
                self._rsa.verify(signature, message, padding.PKCS1v15(), hashes.SHA256())
            elif isinstance(self._sign, ec.EllipticCurvePublicKey):
                self._sign.verify(signature, message, ec.ECDSA(hashes.SHA256()))
        except PycaInvalidSignature:
            raise Wrong(f"a signature of {name!r} does not verify") from None
        return 1

    def _mac(self, draw: random.Random) -> int:
        index = draw.randrange(len(self._messages))
        if self._kq.mac("mac", self._messages[index], timeout=self._deadline_s) != self._macs[index]:
            raise Wrong("a MAC is another than before")
        return 1


def capacity(acts: Acts, seconds: float) -> float:
    """Acts a second of all threads in a closed loop."""
    until = time.monotonic() + seconds
    counts = [0] * THREADS

    def run(index: int) -> None:
        draw = random.Random(index)
        while time.monotonic() < until:
            acts.one(draw)
            counts[index] += 1

    begun = time.monotonic()
    _in_threads(run)
    return max(1.0, sum(counts) / (time.monotonic() - begun))


def load(acts: Acts, tally: Tally, rate: float, seconds: float, seed: int) -> int:
    """Acts at a fixed rate (Poisson), whatever becomes of those before; how many were begun. All have ended then."""
    arrivals = random.Random(seed)
    start = time.monotonic()
    lock = threading.Lock()
    state = {"at": start, "begun": 0}

    def next_due() -> float | None:
        with lock:
            state["at"] += arrivals.expovariate(rate)
            if state["at"] > start + seconds:
                return None
            state["begun"] += 1
            return state["at"]

    def run(index: int) -> None:
        draw = random.Random(seed * 1000 + index)
        while (due := next_due()) is not None:
            ahead = due - time.monotonic()
            if ahead > 0:
                time.sleep(ahead)
            error: Exception | None = None
            operations = 0
            try:
                operations = acts.one(draw)
            except (EngineError, Wrong, ValueError, TypeError) as failure:
                error = failure
            tally.note(operations, time.monotonic() - due, error)

    _in_threads(run)
    return int(state["begun"])


def _in_threads(run: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(index: int) -> None:
        try:
            run(index)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=guarded, args=(index,), daemon=True) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


class Reaper(threading.Thread):
    """Kills nodes by SIGKILL and starts them again; never the first one, which shows memory over the whole time."""

    def __init__(self, cluster: LocalCluster, every_s: float, seed: int) -> None:
        super().__init__(name="reaper")
        self._cluster = cluster
        self._every_s = every_s
        self._draw = random.Random(seed)
        self._ending = threading.Event()
        self.killed = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        """Until told to end; a node that was killed is started again before that."""
        try:
            while not self._ending.wait(self._every_s):
                victims = self._draw.sample(self._cluster.nodes[1:], self._draw.choice([1, 1, 2]))
                for node in victims:
                    self._cluster.kill(node)
                    self.killed += 1
                self._ending.wait(self._draw.uniform(0.2, KILLED_AT_MOST_S))
                for node in victims:
                    self._cluster.start_node(node)
        except Exception as error:  # told at the end
            self.failure = error

    def end(self) -> None:
        """Stop killing."""
        self._ending.set()
        self.join()


@dataclass(frozen=True, slots=True)
class Sample:
    """A process at a moment: seconds since the start, KiB and descriptors."""

    at_s: float
    kib: int
    files: int


class Watch(threading.Thread):
    """Samples memory and descriptors of each serving process, and of this one."""

    def __init__(self, cluster: LocalCluster) -> None:
        super().__init__(name="watch")
        self._cluster = cluster
        self._ending = threading.Event()
        self.samples: dict[tuple[str, int], list[Sample]] = {}

    def run(self) -> None:
        """Until told to end."""
        begun = time.monotonic()
        while not self._ending.wait(SAMPLE_S):
            pids = {name: pid for name, pid in self._cluster.serving().items() if pid is not None}
            for name, pid in {**pids, "client": os.getpid()}.items():
                sample = Sample(time.monotonic() - begun, pss_kib(pid), descriptors(pid))
                if sample.kib and sample.files:
                    self.samples.setdefault((name, pid), []).append(sample)

    def end(self) -> None:
        """Stop sampling."""
        self._ending.set()
        self.join()

    def growth(self, settle_s: float) -> dict[str, tuple[float, int]]:
        """Process -> MB and descriptors that it has more at its end than once it had settled, if it lived so long."""
        found: dict[str, tuple[float, int]] = {}
        for (name, pid), samples in self.samples.items():
            settled = [each for each in samples if each.at_s - samples[0].at_s >= settle_s]
            if len(settled) < 6:
                continue
            part = max(2, len(settled) // 4)
            first, last = settled[:part], settled[-part:]
            kib = statistics.median(s.kib for s in last) - statistics.median(s.kib for s in first)
            files = statistics.median(s.files for s in last) - statistics.median(s.files for s in first)
            found[f"{name} ({pid})"] = (kib / 1024, round(files))
        return found


def soak(
    seconds: float,
    share: float,
    kill_every_s: float,
    deadline_s: float,
    seed: int,
    path: Path,
    tell: Callable[[str], None],
) -> tuple[list[dict[str, Any]], Sequence[str]]:
    """Run it: the rows, and what was told of wrong and lost results."""
    with LocalCluster(nodes=5, threshold=3, path=path) as cluster, engine.connect(cluster.client_config) as kq:
        for name, algorithm in KEYS.items():
            kq.create_key(name, algorithm, threshold=3, shares=5, timeout=60)
        acts = Acts(kq, deadline_s)
        capacity(acts, min(2.0, seconds / 20))
        reached = capacity(acts, min(10.0, seconds / 10))
        tell(f"capacity {reached:.0f} acts/s; {share:.0%} of it for {seconds:.0f} s")
        tally, reaper, watch = Tally(), Reaper(cluster, kill_every_s, seed), Watch(cluster)
        watch.start()
        reaper.start()
        try:
            begun = load(acts, tally, reached * share, seconds, seed)
        finally:
            reaper.end()
            watch.end()
        if reaper.failure is not None:
            raise reaper.failure
        if down := [name for name, pid in cluster.running().items() if pid is None]:
            raise RuntimeError(f"these do not run at the end: {', '.join(down)}")
        ended = sum(tally.latencies.values())
        settle_s = min(60.0, seconds / 4)
        grown = watch.growth(settle_s)
        nodes = {name: each for name, each in grown.items() if name.split()[0] in cluster.nodes}
        clients = {name: each for name, each in grown.items() if name.startswith("client")}
    rows = [
        _row("wrong results", tally.wrong, "", 0),
        _row("lost operations", tally.lost + (begun - ended), "", 0),
        _row("nodes killed and restarted", reaper.killed, "", None),
        _row("operations", tally.done, "", None),
        _row("acts a second", ended / seconds, "1/s", None),
        _row("p50 from when due", tally.percentile_ms(0.5), "ms", None),
        _row("p99 from when due", tally.percentile_ms(0.99), "ms", None),
    ]
    for what, group in (("node", nodes), ("client", clients)):
        worst_mb = max(((mb, name) for name, (mb, _) in group.items()), default=(0.0, "none lived long enough"))
        worst_files = max(((files, name) for name, (_, files) in group.items()), default=(0, "none lived long enough"))
        rows.append(_row(f"memory, worst {what}: {worst_mb[1]}", worst_mb[0], "MB more", MEMORY_MB))
        rows.append(_row(f"descriptors, worst {what}: {worst_files[1]}", worst_files[0], "more", DESCRIPTORS))
    return rows, tally.told


def _row(name: str, value: float, unit: str, target: float | None) -> dict[str, Any]:
    return {
        "name": name,
        "value": round(value, 3),
        "unit": unit,
        "peer": "",
        "peer_value": None,
        "ratio": None,
        "target": target,
        "met": None if target is None else value <= target,
    }


@click.command()
@click.option("--seconds", type=click.FloatRange(10, 86_400), default=600.0, show_default=True, help="Of the load.")
@click.option("--share", type=click.FloatRange(0.05, 1.0), default=0.8, show_default=True, help="Of the capacity.")
@click.option("--kill-every", type=click.FloatRange(1, 3600), default=20.0, show_default=True, help="Seconds.")
@click.option("--deadline", type=click.FloatRange(1, 60), default=5.0, show_default=True, help="Of a call, in seconds.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=OUTPUT, help="Where the rows go.")
def main(seconds: float, share: float, kill_every: float, deadline: float, seed: int, output: Path) -> None:
    """Mixed load while nodes are killed and restarted: no wrong result, none lost, memory and descriptors flat."""
    with tempfile.TemporaryDirectory(prefix="keyquorum-soak-") as folder:
        rows, told = soak(seconds, share, kill_every, deadline, seed, Path(folder) / "kq", click.echo)
    table = Table("what", "value", "at most", "", title=f"soak of {seconds:.0f} s, seed {seed}")
    for row in rows:
        verdict = "" if row["met"] is None else "[green]met[/green]" if row["met"] else "[red]missed[/red]"
        bound = "-" if row["target"] is None else f"{row['target']:g}"
        table.add_row(row["name"], f"{row['value']:,.6g} {row['unit']}", bound, verdict)
    Console(width=120).print(table)
    for text in told:
        click.echo(text)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if not all(row["met"] in (None, True) for row in rows):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
