"""Waiting for what a cluster comes to, and leading a client to one of its nodes."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine import Engine

PATIENCE_S = 90


def until(condition: Callable[[], bool], what: str, tell: Callable[[], str] = str) -> None:
    """Wait for it; ``tell`` says more if it does not come."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < end, f"{what}: not in time; {tell()}"
        time.sleep(0.05)


def prefer(kq: Engine, node: str) -> None:
    """Have the client try this node first: by itself it spreads, and keeps away from one that was sick."""
    router = kq._calls.router
    rank = router.rank
    router.rank = lambda *about: tuple(sorted(rank(*about), key=lambda name: name != node))  # type: ignore[method-assign]
