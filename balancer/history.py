"""The bounded ring of request counts per class and tick, from the nodes' counters. It knows no socket and no clock.

The nodes count since their start (``boot``); here the differences are kept. A report that cannot be true (a counter
that fell, a rate beyond all hardware, a class twice) is dropped and the node starts anew from its next one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.keys import ALGORITHMS, RequestType, request_class
from engine.protocol.requests import NodeStats

__all__ = ["CLASSES", "History", "HistorySnapshot"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

CLASSES: tuple[str, ...] = tuple(
    request_class(kind, algo.name)
    for algo in ALGORITHMS.values()
    for kind in (*sorted(algo.operations), RequestType.GENERATE, RequestType.IMPORT)
)
"""Every class that is counted; a node's word for another one (of a newer version, say) is passed over."""
HISTORY_TICKS_MAX = 7_200
REQUESTS_PER_S_MAX = 10_000_000
"""More requests per second of one class than this are no node's: the report is dropped."""
WORKERS_MAX = 1_024
"""No node works on more requests at a time than this, so it can't be busy for longer than this times the clock."""
WINDOW_REQUESTS = 2_000
"""A node's service time of a class is the mean of about so many of its newest requests."""
DEAD_TICKS = 2
"""A node that was not heard for so many ticks counts as down: one lost report is no death."""

_COLUMNS = {name: index for index, name in enumerate(CLASSES)}


@dataclass(frozen=True, slots=True)
class HistorySnapshot:
    """What is known at the end of a tick; the arrays are read-only.

    ``counts`` is (ticks, classes), requests in each tick, oldest first, NaN where no node was heard. ``requests`` and
    ``busy_us`` are (classes, nodes) over each node's newest requests. ``up`` and ``queue`` are by node.
    """

    tick_ms: int
    classes: tuple[str, ...]
    nodes: tuple[str, ...]
    counts: FloatArray
    requests: FloatArray
    busy_us: FloatArray
    up: tuple[bool, ...]
    queue: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Seen:
    boot: bytes
    tick: int
    requests: IntArray
    busy_us: IntArray
    queue: int


class History:
    """The ring itself; one thread owns it and hands out snapshots."""

    def __init__(self, nodes: Sequence[str], *, tick_ms: int, ticks: int) -> None:
        if not 2 <= ticks <= HISTORY_TICKS_MAX:
            raise ValueError(f"a history of {ticks} ticks is not in 2..{HISTORY_TICKS_MAX}")
        if tick_ms < 1:
            raise ValueError(f"a tick of {tick_ms} ms; at least 1 ms is needed")
        self._nodes = tuple(nodes)
        self._tick_ms = tick_ms
        self._ring: FloatArray = np.full((ticks, len(CLASSES)), np.nan)
        self._length = 0
        self._tick: int | None = None
        self._seen: dict[str, _Seen] = {}
        self._used = np.zeros(len(CLASSES), dtype=bool)
        self._requests: FloatArray = np.zeros((len(CLASSES), len(nodes)))
        self._busy_us: FloatArray = np.zeros((len(CLASSES), len(nodes)))

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose reports it takes, in the order of the columns."""
        return self._nodes

    def follow(self, nodes: Sequence[str]) -> None:
        """Go on with other nodes: what is known of those that stay is kept, and the counts of all stay."""
        columns = [self._nodes.index(node) if node in self._nodes else -1 for node in nodes]
        for name in ("_requests", "_busy_us"):
            padded = np.hstack([getattr(self, name), np.zeros((len(CLASSES), 1))])  # column -1: of a new node
            setattr(self, name, padded[:, columns])
        self._seen = {node: seen for node, seen in self._seen.items() if node in nodes}
        self._nodes = tuple(nodes)

    def observe(self, tick: int, reports: Mapping[str, NodeStats]) -> tuple[str, ...]:
        """Enter the reports heard in a tick; the names of the nodes whose reports were dropped come back.

        Ticks are numbered by the caller's clock and must grow; numbers left out are ticks in which nothing was heard.
        """
        if self._tick is not None and tick <= self._tick:
            raise ValueError(f"tick {tick} does not follow tick {self._tick}")
        self._advance(tick)
        dropped = []
        for column, node in enumerate(self._nodes):
            report = reports.get(node)
            if report is not None and not self._enter(tick, column, node, report):
                dropped.append(node)
                self._seen.pop(node, None)
        return tuple(dropped)

    def snapshot(self) -> HistorySnapshot:
        """The newest state, independent of what is observed later."""
        tick = -1 if self._tick is None else self._tick
        used = np.flatnonzero(self._used)
        order = np.arange(tick - self._length + 1, tick + 1) % len(self._ring)
        seen = [self._seen.get(node) for node in self._nodes]
        return HistorySnapshot(
            tick_ms=self._tick_ms,
            classes=tuple(CLASSES[index] for index in used),
            nodes=self._nodes,
            counts=_frozen(self._ring[np.ix_(order, used)]),
            requests=_frozen(self._requests[used]),
            busy_us=_frozen(self._busy_us[used]),
            up=tuple(state is not None and tick - state.tick < DEAD_TICKS for state in seen),
            queue=tuple(0 if state is None else state.queue for state in seen),
        )

    def _advance(self, tick: int) -> None:
        passed = 1 if self._tick is None else min(tick - self._tick, len(self._ring))
        self._ring[np.arange(tick - passed + 1, tick + 1) % len(self._ring)] = np.nan
        self._length = min(self._length + passed, len(self._ring))
        self._tick = tick

    def _enter(self, tick: int, column: int, node: str, report: NodeStats) -> bool:
        counters = _counters(report)
        if counters is None:
            return False
        requests, busy_us = counters
        before = self._seen.get(node)
        self._seen[node] = _Seen(report.boot, tick, requests, busy_us, report.queue)
        self._used |= requests > 0
        if before is None:
            # Nobody knows when these were counted: they are the base line, and the tick was heard.
            self._add(tick, 1, np.zeros(len(CLASSES)))
            return True
        gap = tick - before.tick
        if before.boot == report.boot:
            requests, busy_us = requests - before.requests, busy_us - before.busy_us
        else:
            gap = min(gap, 1 + report.uptime_ms // self._tick_ms)
        seconds = gap * self._tick_ms / 1000
        if requests.min() < 0 or busy_us.min() < 0 or requests.max() > REQUESTS_PER_S_MAX * seconds:
            return False
        if busy_us.sum(dtype=np.float64) > WORKERS_MAX * 1e6 * (seconds + 1):
            return False
        self._add(tick, gap, requests.astype(np.float64))
        self._measure(column, requests, busy_us)
        return True

    def _add(self, tick: int, gap: int, requests: FloatArray) -> None:
        """Spread what was counted over the ticks since the last report: when in them it came is not known."""
        rows = np.arange(tick - min(gap, self._length) + 1, tick + 1) % len(self._ring)
        self._ring[rows] = np.nan_to_num(self._ring[rows], nan=0.0) + requests / gap

    def _measure(self, column: int, requests: IntArray, busy_us: IntArray) -> None:
        self._requests[:, column] += requests
        self._busy_us[:, column] += busy_us
        shrink = WINDOW_REQUESTS / np.maximum(self._requests[:, column], WINDOW_REQUESTS)
        self._requests[:, column] *= shrink
        self._busy_us[:, column] *= shrink


def _counters(report: NodeStats) -> tuple[IntArray, IntArray] | None:
    """The report's counters by class, requests and busy microseconds; None if it names a class twice."""
    requests, busy_us = np.zeros(len(CLASSES), dtype=np.int64), np.zeros(len(CLASSES), dtype=np.int64)
    if len({each.request_class for each in report.classes}) != len(report.classes):
        return None
    for each in report.classes:
        column = _COLUMNS.get(each.request_class)
        if column is not None:
            requests[column], busy_us[column] = each.requests, each.busy_us
    return requests, busy_us


def _frozen(array: FloatArray) -> FloatArray:
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy
