"""Ports for tests: below those that the kernel gives to outgoing connections, so that no connection takes one."""

from __future__ import annotations

import contextlib
import socket
from random import SystemRandom

PORTS = range(20_000, 32_000)
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
