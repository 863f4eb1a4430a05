"""Ports for tests: below those that the kernel gives to outgoing connections, so that no connection takes one.

A port is free when it is chosen and bound a little later, by another process: so each worker of a run has its own.
"""

from __future__ import annotations

import contextlib
import os
import socket
from random import SystemRandom

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
PORTS = range(20_000 + WORKER, 32_000, WORKERS)
TRIES = 500
_random = SystemRandom()


def free_ports(count: int) -> list[int]:
    """So many different ports of 127.0.0.1 that nobody has now."""
    ports: list[int] = []
    with contextlib.ExitStack() as held:
        for _ in range(TRIES + count):
            if len(ports) == count:
                return ports
            bound = held.enter_context(socket.socket())
            port = _random.choice(PORTS)
            with contextlib.suppress(OSError):
                bound.bind(("127.0.0.1", port))
                ports.append(port)
    raise RuntimeError(f"no free port found in {PORTS.start}..{PORTS.stop - 1} in {TRIES} tries")


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has now."""
    return free_ports(1)[0]
