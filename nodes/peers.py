"""How quickly each holder gave its shares, and so whom to ask first and when to ask another. Time is an argument (s).

It asks nobody and knows no key. A holder that was slow once is tried again now and then, at the risk of one hedge.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["HEDGE_MAX_S", "HEDGE_MIN_S", "UNKNOWN_S", "PeerLatency", "Peers", "Plan"]

UNKNOWN_S: Final = 0.05
"""The latency taken for a holder that was not measured: between those that are quick and those that are known slow."""
HEDGE_MIN_S: Final = 0.005
HEDGE_MAX_S: Final = 0.5
SAMPLES: Final = 64
NEWEST: Final = 5
"""The expected latency is the median of so many newest samples, so that a change shows after three."""
ENOUGH: Final = 8
"""Fewer samples than this give no p95."""
EXPLORE_EVERY: Final = 16
EXPLORE_AFTER_S: Final = 5.0
"""One in so many gatherings asks a holder that was not measured for so long, in the place of the last one chosen."""
SILENT_MAX: Final = 2
"""A holder that was late so often without an answer in between counts as down."""
DOWN_S: Final = 1.0
DOWN_MAX_S: Final = 30.0
"""A holder that is down is asked last, for this long at first, doubled each time up to the maximum."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Whom to ask, best first, and after how many seconds each is late."""

    holders: tuple[str, ...]
    hedge_s: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PeerLatency:
    """What is known of one holder: the number of samples kept, seconds, and whether it counts as down now."""

    samples: int
    expected_s: float
    p95_s: float
    down: bool


@dataclass(slots=True)
class _Peer:
    samples: deque[float] = field(default_factory=lambda: deque(maxlen=SAMPLES))
    expected_s: float = UNKNOWN_S
    p95_s: float = UNKNOWN_S
    measured_s: float = float("-inf")
    silent: int = 0
    down_for_s: float = 0.0
    down_until_s: float = float("-inf")

    def add(self, seconds: float) -> None:
        self.samples.append(seconds)
        newest = sorted(list(self.samples)[-NEWEST:])
        self.expected_s = newest[len(newest) // 2]
        if len(self.samples) >= ENOUGH:
            self.p95_s = sorted(self.samples)[int(0.95 * len(self.samples))]

    @property
    def hedge_s(self) -> float:
        return min(max(self.p95_s, HEDGE_MIN_S), HEDGE_MAX_S)


class Peers:
    """The last 64 round trips of each holder; safe for several threads."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}
        self._lock = threading.Lock()
        self._plans = 0

    def plan(self, holders: Sequence[str], needed: int, now_s: float) -> Plan:
        """Whom to ask for ``needed`` shares: by expected latency (ties as given), those that are down last."""
        with self._lock:
            known = {name: self._peers.get(name) or _Peer() for name in holders}
            order = sorted(known, key=lambda name: (known[name].down_until_s > now_s, known[name].expected_s))
            hedge_s = {name: peer.hedge_s for name, peer in known.items()}
            self._plans += 1
            if self._plans % EXPLORE_EVERY == 0 and 0 < needed < len(order):
                self._explore(order, needed, known, hedge_s, now_s)
            return Plan(tuple(order), hedge_s)

    @staticmethod
    def _explore(
        order: list[str], needed: int, known: Mapping[str, _Peer], hedge_s: dict[str, float], now_s: float
    ) -> None:
        """Put the one least recently measured in the place of the last chosen, and be no more patient with it."""
        waiting = [
            name
            for name in order[needed:]
            if known[name].down_until_s <= now_s and now_s - known[name].measured_s >= EXPLORE_AFTER_S
        ]
        if not waiting:
            return
        chosen = min(waiting, key=lambda name: known[name].measured_s)
        replaced = order[needed - 1]
        order.remove(chosen)
        order.insert(needed - 1, chosen)
        hedge_s[chosen] = min(hedge_s[chosen], hedge_s[replaced])

    def answered(self, holder: str, seconds: float, now_s: float) -> None:
        """A holder gave a share after so many seconds."""
        with self._lock:
            peer = self._peers.setdefault(holder, _Peer())
            peer.add(seconds)
            peer.measured_s = now_s
            peer.silent, peer.down_for_s, peer.down_until_s = 0, 0.0, float("-inf")

    def late(self, holder: str, seconds: float, now_s: float) -> None:
        """A holder was later than it should be and had not answered after so many seconds, when others had."""
        with self._lock:
            peer = self._peers.setdefault(holder, _Peer())
            peer.add(seconds)
            peer.measured_s = now_s
            peer.silent += 1
            if peer.silent >= SILENT_MAX:
                self._down(peer, now_s)

    def failed(self, holder: str, now_s: float) -> None:
        """A holder could not be reached."""
        with self._lock:
            self._down(self._peers.setdefault(holder, _Peer()), now_s)

    @staticmethod
    def _down(peer: _Peer, now_s: float) -> None:
        peer.down_for_s = min(max(DOWN_S, 2 * peer.down_for_s), DOWN_MAX_S)
        peer.down_until_s = now_s + peer.down_for_s

    def latencies(self, now_s: float) -> dict[str, PeerLatency]:
        """What is known of each holder that was asked."""
        with self._lock:
            return {
                name: PeerLatency(len(peer.samples), peer.expected_s, peer.p95_s, peer.down_until_s > now_s)
                for name, peer in sorted(self._peers.items())
            }
