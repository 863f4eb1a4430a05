"""What requests go to: counters of (class, placement group) pairs, and the most used keys. No clock, no socket.

Both are bounded. Keys are counted by space-saving (Metwally, Agrawal, El Abbadi 2005): a key that is not among
``KEYS_COUNTED`` takes the place and the count of the least used one. So a count is never too low, and too high by at
most the requests of the window divided by ``KEYS_COUNTED``; every key above that is there. Names stay in here and in
the statistics for the balancer: no log and no metric shows them.
"""

from __future__ import annotations

import heapq

from engine.protocol.requests import HOT_KEYS_TOLD, PAIRS_TOLD

__all__ = ["HeavyHitters", "PairCounts"]

KEYS_COUNTED = 512
"""Counters of keys in a window."""
WINDOW_S = 10.0
PAIRS_MAX = 16_384
"""Counters of pairs; beyond it the one that was longest not counted goes."""
COOLING = 0.5
"""What is left of a pair's heat with each window."""
HEAT_MIN = 0.01


class HeavyHitters:
    """The most used (key, class) of the window under way and of the last whole one."""

    def __init__(self, counters: int = KEYS_COUNTED) -> None:
        self._most = counters
        self._counts: dict[tuple[str, str], int] = {}
        self._heap: list[tuple[int, tuple[str, str]]] = []
        self.told: list[tuple[str, str, int]] = []
        """(key, class, requests) of the last whole window, the most used first."""
        self.told_s = 0.0
        """How long that window was."""

    def count(self, key: str, request_class: str, requests: int = 1) -> None:
        """Count requests for a key."""
        item = (key, request_class)
        counts = self._counts
        before = counts.get(item)
        if before is not None:
            counts[item] = before + requests
        elif len(counts) < self._most:
            counts[item] = requests
            heapq.heappush(self._heap, (requests, item))
        else:
            counts[item] = self._evict() + requests
            heapq.heappush(self._heap, (counts[item], item))

    def end_window(self, seconds: float) -> None:
        """A window of so many seconds is over: what it held is told from now on."""
        hottest = heapq.nsmallest(HOT_KEYS_TOLD, self._counts.items(), key=lambda each: (-each[1], each[0]))
        self.told = [(key, request_class, requests) for (key, request_class), requests in hottest]
        self.told_s = seconds
        self._counts = {}
        self._heap = []

    def _evict(self) -> int:
        """Let the least used one go; its count. The heap's counts may be old, and are then brought up to date."""
        while True:
            noted, item = self._heap[0]
            now = self._counts[item]
            if now == noted:
                heapq.heappop(self._heap)
                del self._counts[item]
                return now
            heapq.heapreplace(self._heap, (now, item))


class PairCounts:
    """Requests by (class, placement group) since the start, the warmest told first."""

    def __init__(self, most: int = PAIRS_MAX) -> None:
        self._most = most
        self._counts: dict[tuple[str, int], int] = {}
        self._cooled: dict[tuple[str, int], tuple[float, int]] = {}

    def count(self, request_class: str, group: int, requests: int = 1) -> None:
        """Count requests for a pair."""
        pair = (request_class, group)
        counts = self._counts
        if pair not in counts and len(counts) >= self._most:
            coldest = next(iter(counts))
            del counts[coldest]
            self._cooled.pop(coldest, None)
        counts[pair] = counts.get(pair, 0) + requests

    def told(self, classes: dict[str, int]) -> list[tuple[int, int, int]]:
        """(index of the class, group, requests since the start) of the warmest pairs, the warmest first."""
        known = [(pair, count) for pair, count in self._counts.items() if pair[0] in classes]
        if len(known) > PAIRS_TOLD:
            known = heapq.nsmallest(PAIRS_TOLD, known, key=lambda each: (-self._heat(*each), each[0]))
        return [(classes[request_class], group, count) for (request_class, group), count in known]

    def end_window(self) -> None:
        """Let what was counted until now matter less."""
        cooled = {pair: (COOLING * self._heat(pair, count), count) for pair, count in self._counts.items()}
        # The order is that in which pairs go when there is no room: those that were cold for longest first.
        self._counts = dict(sorted(self._counts.items(), key=lambda each: cooled[each[0]][0] >= HEAT_MIN))
        self._cooled = cooled

    def _heat(self, pair: tuple[str, int], count: int) -> float:
        heat, before = self._cooled.get(pair, (0.0, 0))
        return heat + count - before
