"""Owns one client process of the benchmarks: it reads orders, a JSON object a line, and answers each with one.

``python bench/worker.py client.toml [p11-kit module, socket, PIN file]``; ``rig.Crew`` starts and orders it. Several
threads share one ``Engine``. An open loop's latencies count from when an operation was due, not from when a thread was
free for it. It knows no target.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rig import DATA, DIGEST, Uses, in_threads, open_loop, p11_uses

import engine

BULK: Final = 500
"""Encryptions in one ``encrypt_many``."""

Act = Callable[[], object]


class Worker:
    """The engine, and the same operations over p11-kit."""

    def __init__(self, config: str, peer: list[str]) -> None:
        self._kq = engine.connect(config)
        self._p11: Uses | None = p11_uses(*peer) if peer else None
        self._acts: dict[str, Act] = {}
        self.add_keys()
        if self._p11 is not None:
            self._acts |= {"p11-sign": self._p11.sign, "p11-rsa": self._p11.rsa}

    def add_keys(self, suffix: str = "", **_: Any) -> dict[str, Any]:
        """Have the operations on the keys with this suffix too, by their names."""
        sign, rsa, gcm = (name + suffix for name in ("sign", "rsa", "gcm"))
        self._acts |= {
            sign: lambda: self._kq.sign(sign, digest=DIGEST),
            rsa: lambda: self._kq.sign(rsa, digest=DIGEST),
            gcm: lambda: self._kq.encrypt(gcm, DATA),
        }
        return {}

    def close(self) -> None:
        """End the engine."""
        self._kq.close()

    def warm(self, **_: Any) -> dict[str, Any]:
        """Connect and load: each operation a few times."""
        for act in self._acts.values():
            for _ in range(3):
                act()
        return {}

    def closed(
        self, *, what: str, seconds: float, start: float, number: int, threads: int = 1, rsa_share: float = 0.0
    ) -> dict[str, Any]:
        """As many operations as there is time for, each thread one at a time; ``mix`` is RSA by its share, else GCM."""
        done = [0] * threads
        until = start + seconds

        def run(index: int) -> None:
            draw = random.Random(number * 100 + index)
            count = 0
            time.sleep(max(0.0, start - time.monotonic()))
            while not count or time.monotonic() < until:
                self._acts[what if what != "mix" else "rsa" if draw.random() < rsa_share else "gcm"]()
                count += 1
            done[index] = count

        in_threads(run, threads)
        return {"operations": sum(done), "seconds": time.monotonic() - start}

    def open(
        self, *, rate: float, rsa_share: float, seconds: float, start: float, number: int, seed: int, threads: int
    ) -> dict[str, Any]:
        """Poisson arrivals at ``rate`` a second; what each took from when it was due, in microseconds."""
        draw = random.Random(seed * 1000 + number)
        due: list[tuple[float, bool]] = []
        at = start + draw.expovariate(rate)
        while at < start + seconds:
            due.append((at, draw.random() < rsa_share))
            at += draw.expovariate(rate)
        taken: dict[bool, list[float]] = {False: [], True: []}

        def act(at: float, is_rsa: bool) -> None:
            self._acts["rsa" if is_rsa else "gcm"]()
            taken[is_rsa].append((time.monotonic() - at) * 1e6)

        open_loop(due, act, threads)
        return {"gcm": [round(each, 1) for each in taken[False]], "rsa": [round(each, 1) for each in taken[True]]}

    def bulk(self, *, operations: int, **_: Any) -> dict[str, Any]:
        """Encryptions with 64 under way."""
        begun = time.monotonic()
        for first in range(0, operations, BULK):
            count = min(BULK, operations - first)
            assert len(self._kq.encrypt_many("gcm", [DATA] * count)) == count
        return {"operations": operations, "seconds": time.monotonic() - begun}


def main() -> None:
    """Serve orders until the input ends."""
    worker = Worker(str(Path(sys.argv[1])), sys.argv[2:])
    orders = {"warm": worker.warm, "closed": worker.closed, "open": worker.open, "bulk": worker.bulk}
    orders["add_keys"] = worker.add_keys
    try:
        for line in sys.stdin:
            order = json.loads(line)
            print(json.dumps(orders[order.pop("do")](**order)), flush=True)
    finally:
        worker.close()


if __name__ == "__main__":
    main()
