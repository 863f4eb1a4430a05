"""The wall clock that grants, orders and expiry see: it never goes backwards. It knows no store and no document.

A machine's clock can be set back, by mistake or by an attacker, and what had expired would be good again. So time here
is the later of the machine's clock and of the last time seen plus what a clock that nobody can set counted since. The
last time seen outlives a restart as a high-water mark, which ``nodes.ledger`` keeps in the node's store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from engine.protocol.manifest import CLOCK_SKEW_MS

__all__ = ["TrustedClock", "time_text"]


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


def _steady_ms() -> int:
    """Milliseconds since the machine's start, time asleep included (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


class TrustedClock:
    """Milliseconds since the Unix epoch that only grow; safe for several threads.

    ``mark_ms`` is the latest time that an earlier start is known to have seen. ``wall_ms`` and ``steady_ms`` are the
    two clocks it goes by.
    """

    def __init__(
        self,
        mark_ms: int = 0,
        *,
        wall_ms: Callable[[], int] = _wall_ms,
        steady_ms: Callable[[], int] = _steady_ms,
    ) -> None:
        self._wall_ms = wall_ms
        self._steady_ms = steady_ms
        self._lock = threading.Lock()
        self._base_ms = mark_ms
        self._base_steady_ms = steady_ms()

    def now_ms(self) -> int:
        """The time: never less than what this returned before, nor than the mark."""
        return self._read()[0]

    def _read(self) -> tuple[int, int]:
        with self._lock:
            steady_ms, wall_ms = self._steady_ms(), self._wall_ms()
            now_ms = max(wall_ms, self._base_ms + max(0, steady_ms - self._base_steady_ms))
            self._base_ms, self._base_steady_ms = now_ms, steady_ms
            return now_ms, wall_ms

    def complaint(self) -> str:
        """What is wrong when the machine's clock is behind by more than clocks may differ; empty when all is well."""
        now_ms, wall_ms = self._read()
        if now_ms - wall_ms <= CLOCK_SKEW_MS:
            return ""
        return (
            f"the machine's clock says {time_text(wall_ms)}, but this node has seen {time_text(now_ms)} and goes by "
            "that; what is made by a clock behind it is refused as expired. Set the machine's clock right; if it is "
            "right, it was ahead once: stop the node and run reset-clock (docs/deployment.md)"
        )


def time_text(time_ms: int) -> str:
    """A time as people read it, in UTC."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return f"{time_ms} ms"
