"""The bounded history of requests per class and per (class, placement group), from the nodes' counters.

It knows no socket and no clock. Two cadences: the tick, and the minute. The nodes count since their start (``boot``);
here the differences are kept. A report that cannot be true (a counter that fell, a rate beyond all hardware, a class
twice) is dropped and the node starts anew from its next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from balancer.features import Known
from balancer.rings import PAIRS_MAX, PairPlaces, Ring
from engine.keys import ALGORITHMS, RequestType, request_class
from engine.protocol.requests import PAIRS_TOLD, NodeStats

__all__ = ["CLASSES", "History", "HistorySnapshot", "HotKey", "SlowHistory", "Stored"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

CLASSES: tuple[str, ...] = tuple(
    request_class(kind, algo.name)
    for algo in ALGORITHMS.values()
    for kind in (*sorted(algo.operations), RequestType.GENERATE, RequestType.IMPORT)
)
"""Every class that is counted; a node's word for another one (of a newer version, say) is passed over."""
HISTORY_TICKS_MAX = 7_200
REQUESTS_PER_S_MAX = 1_000_000
"""More requests per second of one class than this are no node's: the report is dropped."""
WORKERS_MAX = 1_024
"""No node works on more requests at a time than this, so it can't be busy for longer than this times the clock."""
WINDOW_REQUESTS = 2_000
"""A node's service time of a class is the mean of about so many of its newest requests."""
NETWORK_US_MAX = 1_000_000
NETWORK_NEWS_US = 100.0
NETWORK_NEWS_PART = 0.25
"""A node's network time that differs by less from the one in use, in microseconds or in parts of it, is no news."""
DEAD_TICKS = 2
"""A node that was not heard for so many ticks counts as down: one lost report is no death."""

SLOW_MS = 60_000
"""The slower of the two cadences."""
SLOW_STEPS = 10_080
"""A week of minutes."""
PAIR_TICKS_MAX = 600
PAIR_SLOW_STEPS = 1_440
"""Series of pairs are shorter: they are many."""
HOT_KEYS_MAX = 64
GROUPS_MAX = 65_536
"""More placement groups than any cluster has; a pair's number is its class's times this, and its group's."""

_COLUMNS = {name: index for index, name in enumerate(CLASSES)}
_CLASS_COLUMNS = np.arange(len(CLASSES))
_PAIRS = len(CLASSES) * GROUPS_MAX


@dataclass(frozen=True, slots=True)
class HotKey:
    """A key among the most used of the cluster. Its name is for decisions, never for a log or a metric's label."""

    name: str
    request_class: str
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class SlowHistory:
    """The counts of whole minutes, as in ``HistorySnapshot``; ``step`` is the newest one's number since the epoch."""

    step_ms: int
    step: int
    counts: FloatArray
    pair_counts: FloatArray


def _no_counts() -> FloatArray:
    return np.zeros((0, 0))


@dataclass(frozen=True, slots=True)
class HistorySnapshot:
    """What is known at the end of a tick; the arrays are read-only.

    ``counts`` is (ticks, classes), requests in each tick, oldest first, NaN where no node was heard. ``requests`` and
    ``busy_us`` are (classes, nodes) over each node's newest requests. ``up`` and ``queue`` are by node. ``tick`` is the
    newest tick's number. ``pairs`` are (index of the class, placement group), the counts of which are also in their
    class's; ``pair_counts`` is (ticks, pairs), of fewer ticks than ``counts`` where that is long. ``network_us``
    (nodes,) is how long the network takes from the clients to each and back; 0 where nobody knows, or empty.
    """

    tick_ms: int
    classes: tuple[str, ...]
    nodes: tuple[str, ...]
    counts: FloatArray
    requests: FloatArray
    busy_us: FloatArray
    up: tuple[bool, ...]
    queue: tuple[int, ...]
    tick: int = 0
    pairs: tuple[tuple[int, int], ...] = ()
    pair_counts: FloatArray = field(default_factory=_no_counts)
    slow: SlowHistory | None = None
    known: Known | None = None
    slow_known: Known | None = None
    hot: tuple[HotKey, ...] = ()
    network_us: FloatArray = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True)
class Stored:
    """Steps of one cadence as they are kept on the disk: (steps,) numbers, (steps, classes) and (steps, pairs) counts.

    ``pairs`` are numbers of pairs (class index * ``GROUPS_MAX`` + group) with the indexes of ``CLASSES``.
    """

    steps: IntArray
    counts: FloatArray
    pairs: IntArray
    pair_counts: FloatArray


@dataclass(frozen=True, slots=True)
class _Seen:
    boot: bytes
    tick: int
    requests: IntArray
    busy_us: IntArray
    queue: int
    pairs: IntArray
    """Numbers of the pairs told, in order, and how often each was counted."""
    pair_requests: IntArray
    complete: bool
    """All pairs were told: one that was not had counted nothing."""
    hot: tuple[HotKey, ...]


@dataclass(frozen=True, slots=True)
class _Told:
    """Reports side by side: ``requests`` and ``busy_us`` are (reports, classes); pairs are by report, then in order.

    ``owner`` is the report's index of each pair, ``pairs`` their numbers; ``network_us`` is
    (reports,). What is not ``true`` can't be.
    """

    reports: tuple[NodeStats, ...]
    true: BoolArray
    requests: IntArray
    busy_us: IntArray
    owner: IntArray
    pairs: IntArray
    pair_requests: IntArray
    network_us: FloatArray

    def ends(self) -> IntArray:
        """(reports + 1,): where the pairs of each begin and end."""
        return np.searchsorted(self.owner, np.arange(len(self.reports) + 1))


class _Cadence:
    """The rings of one cadence: classes, and the pairs that have a place."""

    def __init__(self, steps: int, pair_steps: int) -> None:
        self.classes = Ring(steps, len(CLASSES))
        self.pairs = Ring(pair_steps, PAIRS_MAX)

    def advance(self, step: int) -> None:
        self.classes.advance(step)
        self.pairs.advance(step)

    def stored(self, first: int, places: IntArray, numbers: IntArray) -> Stored:
        """The steps from ``first`` on in which somebody was heard."""
        newest = -1 if self.classes.step is None else self.classes.step
        last = max(0, min(newest - first + 1, self.pairs.length))
        counts = self.classes.read(_CLASS_COLUMNS, last)
        steps = np.arange(newest - len(counts) + 1, newest + 1)
        known = ~np.isnan(counts).all(axis=1)
        return Stored(steps[known], counts[known], numbers, self.pairs.read(places, last)[known])

    def restore(self, stored: Stored, places: IntArray) -> None:
        kept = places >= 0
        self.classes.reach(int(stored.steps[0]))
        self.pairs.reach(int(stored.steps[0]))
        for row, step in enumerate(stored.steps.tolist()):
            self.classes.put(step, stored.counts[row])
            pairs = np.zeros(PAIRS_MAX)
            pairs[places[kept]] = stored.pair_counts[row, kept]
            self.pairs.put(step, pairs)


class History:
    """The history itself; one thread owns it and hands out snapshots."""

    def __init__(self, nodes: Sequence[str], *, tick_ms: int, ticks: int) -> None:
        if not 2 <= ticks <= HISTORY_TICKS_MAX:
            raise ValueError(f"a history of {ticks} ticks is not in 2..{HISTORY_TICKS_MAX}")
        if tick_ms < 1:
            raise ValueError(f"a tick of {tick_ms} ms; at least 1 ms is needed")
        self._nodes = tuple(nodes)
        self._tick_ms = tick_ms
        self._fast = _Cadence(ticks, min(ticks, PAIR_TICKS_MAX))
        self._slow = _Cadence(SLOW_STEPS, PAIR_SLOW_STEPS) if tick_ms < SLOW_MS else None
        self._minute: int | None = None
        self._minute_counts: FloatArray = np.zeros(len(CLASSES))
        self._minute_pairs: FloatArray = np.zeros(PAIRS_MAX)
        self._minute_heard = False
        self._minute_whole = False
        self._places = PairPlaces()
        self._tick: int | None = None
        self._seen: dict[str, _Seen] = {}
        self._used = np.zeros(len(CLASSES), dtype=bool)
        self._requests: FloatArray = np.zeros((len(CLASSES), len(nodes)))
        self._busy_us: FloatArray = np.zeros((len(CLASSES), len(nodes)))
        self._network_us: FloatArray = np.zeros(len(nodes))
        self._slow_read: tuple[tuple[object, ...], SlowHistory] | None = None

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
        self._network_us = np.append(self._network_us, 0.0)[columns]
        self._seen = {node: seen for node, seen in self._seen.items() if node in nodes}
        self._nodes = tuple(nodes)

    def observe(self, tick: int, reports: Mapping[str, NodeStats]) -> tuple[str, ...]:
        """Enter the reports heard in a tick; the names of the nodes whose reports were dropped come back.

        Ticks are numbered by the caller's clock and must grow; numbers left out are ticks in which nothing was heard.
        """
        if self._tick is not None and tick <= self._tick:
            raise ValueError(f"tick {tick} does not follow tick {self._tick}")
        self._advance(tick)
        heard = [column for column, node in enumerate(self._nodes) if node in reports]
        if not heard:
            return ()
        told = _told([reports[self._nodes[column]] for column in heard])
        true = self._enter(tick, np.array(heard), told)
        dropped = tuple(self._nodes[column] for column, each in zip(heard, true.tolist(), strict=True) if not each)
        for node in dropped:
            self._seen.pop(node, None)
        return dropped

    def snapshot(self) -> HistorySnapshot:
        """The newest state, independent of what is observed later."""
        tick = -1 if self._tick is None else self._tick
        used = np.flatnonzero(self._used)
        places, pairs = self._taken(used)
        seen = [self._seen.get(node) for node in self._nodes]
        up = tuple(state is not None and tick - state.tick < DEAD_TICKS for state in seen)
        return HistorySnapshot(
            tick_ms=self._tick_ms,
            classes=tuple(CLASSES[index] for index in used),
            nodes=self._nodes,
            counts=self._fast.classes.read(used),
            requests=_frozen(self._requests[used]),
            busy_us=_frozen(self._busy_us[used]),
            up=up,
            queue=tuple(0 if state is None else state.queue for state in seen),
            tick=max(tick, 0),
            pairs=pairs,
            pair_counts=self._fast.pairs.read(places),
            slow=self._slow_snapshot(used, places),
            hot=_hottest(state.hot for state, lives in zip(seen, up, strict=True) if state is not None and lives),
            network_us=_frozen(self._network_us),
        )

    def stored(self, tick: int, minute: int) -> tuple[Stored, Stored]:
        """What is to be kept on the disk of the ticks from ``tick`` and the minutes from ``minute`` on."""
        places = np.flatnonzero(self._places.pairs >= 0)
        numbers = self._places.pairs[places]
        fast = self._fast.stored(tick, places, numbers)
        return fast, (self._slow or self._fast).stored(minute if self._slow else 2**62, places, numbers)

    def restore(self, tick: int, fast: Stored, slow: Stored) -> None:
        """Begin with what an earlier process knew; ``tick`` is the one before the first that will be observed."""
        if self._tick is not None:
            raise ValueError("a history that was begun takes nothing in")
        self._advance(tick)
        self._minute_heard = False
        numbers = np.union1d(fast.pairs, slow.pairs)
        heat = np.zeros(len(numbers))
        for stored in (fast, slow):
            recent = np.nan_to_num(stored.pair_counts[-PAIR_TICKS_MAX:])
            np.add.at(heat, np.searchsorted(numbers, stored.pairs), recent.mean(axis=0) if len(recent) else 0.0)
        places = self._places.restore(numbers, heat)
        self._used[np.unique(numbers // GROUPS_MAX)] = True
        for cadence, stored in ((self._fast, fast), (self._slow, slow)):
            if cadence is not None and len(stored.steps):
                cadence.restore(stored, places[np.searchsorted(numbers, stored.pairs)])
                self._used |= np.nansum(stored.counts, axis=0) > 0

    def _taken(self, used: IntArray) -> tuple[IntArray, tuple[tuple[int, int], ...]]:
        """The places of pairs in use, and the pairs by index of their class among those used."""
        places = np.flatnonzero(self._places.pairs >= 0)
        columns, groups = np.divmod(self._places.pairs[places], GROUPS_MAX)
        indexes = np.searchsorted(used, columns)
        return places, tuple(zip(indexes.tolist(), groups.tolist(), strict=True))

    def _slow_snapshot(self, used: IntArray, places: IntArray) -> SlowHistory | None:
        """Read anew only when a minute has ended or other series are kept: it is long."""
        if self._slow is None:
            return None
        state = (self._slow.classes.step, used.tobytes(), self._places.pairs.tobytes())
        if self._slow_read is None or self._slow_read[0] != state:
            step = self._slow.classes.step
            told = SlowHistory(
                SLOW_MS, 0 if step is None else step, self._slow.classes.read(used), self._slow.pairs.read(places)
            )
            self._slow_read = (state, told)
        return self._slow_read[1]

    def _advance(self, tick: int) -> None:
        if self._slow is not None:
            minute = tick * self._tick_ms // SLOW_MS
            if self._minute is not None and minute > self._minute:
                self._end_minute(self._slow, minute)
            elif self._minute is None:
                self._slow.advance(minute - 1)
            self._minute = minute
        self._fast.advance(tick)
        self._tick = tick

    def _end_minute(self, slow: _Cadence, minute: int) -> None:
        ended = minute - 1 if self._minute is None else self._minute
        slow.advance(ended)
        if self._minute_heard and self._minute_whole:
            slow.classes.put(ended, self._minute_counts)
            slow.pairs.put(ended, self._minute_pairs)
        if minute - 1 > ended:
            slow.advance(minute - 1)
        self._minute_counts = np.zeros(len(CLASSES))
        self._minute_pairs = np.zeros(PAIRS_MAX)
        self._minute_heard = False
        self._minute_whole = True

    def _enter(self, tick: int, columns: IntArray, told: _Told) -> BoolArray:
        """Enter the reports of the nodes in these columns; which of them can be true."""
        befores = [self._seen.get(self._nodes[column]) for column in columns.tolist()]
        self._remember(tick, columns, told)
        self._hear_network(columns[told.true], told.network_us[told.true])
        self._used |= (told.requests[told.true] > 0).any(axis=0)
        known = told.true & np.array([before is not None for before in befores])
        # What was never heard before was counted at any time: it is a base line, and says nothing of this tick.
        rows = np.flatnonzero(known)
        if not rows.size:
            return told.true
        since = [before for before, goes_on in zip(befores, known.tolist(), strict=True) if goes_on and before]
        same = np.array(
            [before.boot == told.reports[row].boot for before, row in zip(since, rows.tolist(), strict=True)]
        )
        uptimes = np.array([told.reports[row].uptime_ms // self._tick_ms for row in rows.tolist()])
        gaps = tick - np.array([before.tick for before in since])
        gaps = np.where(same, gaps, np.minimum(gaps, 1 + uptimes))
        requests = told.requests[rows] - same[:, None] * np.stack([before.requests for before in since])
        busy_us = told.busy_us[rows] - same[:, None] * np.stack([before.busy_us for before in since])
        seconds = gaps * (self._tick_ms / 1000)
        fine = (requests.min(axis=1) >= 0) & (busy_us.min(axis=1) >= 0)
        fine &= requests.max(axis=1) <= REQUESTS_PER_S_MAX * seconds
        fine &= busy_us.sum(axis=1, dtype=np.float64) <= WORKERS_MAX * 1e6 * (seconds + 1)
        place = np.full(len(known), -1)
        place[rows] = np.arange(len(rows))
        mine = known[told.owner]
        owner, pairs, counted = place[told.owner[mine]], told.pairs[mine], told.pair_requests[mine]
        more = _more(
            owner, pairs, counted, [before if each else None for before, each in zip(since, same, strict=True)]
        )
        fine &= np.bincount(owner, weights=more, minlength=len(rows)) <= requests.sum(axis=1, dtype=np.float64)
        self._measure(columns[rows[fine]], requests[fine], busy_us[fine])
        whole = fine[owner]
        for gap in np.unique(gaps[fine]).tolist():
            self._add(tick, gap, requests[fine & (gaps == gap)].sum(axis=0, dtype=np.float64))
        for gap in np.unique(gaps[fine]).tolist():
            here = whole & (gaps[owner] == gap)
            self._add_pairs(tick, gap, pairs[here], more[here])
        true = told.true.copy()
        true[rows[~fine]] = False
        return true

    def _remember(self, tick: int, columns: IntArray, told: _Told) -> None:
        ends = told.ends().tolist()
        for row, (column, report) in enumerate(zip(columns.tolist(), told.reports, strict=True)):
            part = slice(ends[row], ends[row + 1])
            self._seen[self._nodes[column]] = _Seen(
                report.boot,
                tick,
                told.requests[row],
                told.busy_us[row],
                report.queue,
                told.pairs[part],
                told.pair_requests[part],
                len(report.pairs) < PAIRS_TOLD,
                _hot_keys(report) if report.hot else (),
            )

    def _hear_network(self, columns: IntArray, told_us: FloatArray) -> None:
        """Small changes are none: a plan for the placement, or a hot basis, is not to be lost over them."""
        known_us = self._network_us[columns]
        news = np.abs(told_us - known_us) > np.maximum(NETWORK_NEWS_US, NETWORK_NEWS_PART * known_us)
        news |= known_us == 0.0
        news &= told_us > 0.0  # else no client is connected just now
        self._network_us[columns[news]] = told_us[news]

    def _add(self, tick: int, gap: int, requests: FloatArray) -> None:
        self._fast.classes.add(tick, gap, requests)
        self._fast.pairs.heard(tick)
        self._minute_counts += requests
        self._minute_heard = True

    def _add_pairs(self, tick: int, gap: int, numbers: IntArray, more: IntArray) -> None:
        pairs, inverse = np.unique(numbers, return_inverse=True)
        counts = np.zeros(len(pairs))
        np.add.at(counts, inverse, more.astype(np.float64))
        if not len(pairs):
            return
        self._used[np.unique(pairs // GROUPS_MAX)] = True
        places, changed = self._places.settle(pairs, counts)
        if changed.size:
            for cadence in (self._fast, self._slow):
                if cadence is not None:
                    cadence.pairs.clear(changed)
            self._minute_pairs[changed] = 0.0
        row = np.zeros(PAIRS_MAX)
        row[places[places >= 0]] = counts[places >= 0]
        self._fast.pairs.add(tick, gap, row)
        self._minute_pairs += row

    def _measure(self, columns: IntArray, requests: IntArray, busy_us: IntArray) -> None:
        together = self._requests[:, columns] + requests.T
        shrink = WINDOW_REQUESTS / np.maximum(together, WINDOW_REQUESTS)
        self._requests[:, columns] = together * shrink
        self._busy_us[:, columns] = (self._busy_us[:, columns] + busy_us.T) * shrink


@lru_cache(maxsize=1024)
def _columns(names: tuple[str, ...]) -> IntArray | None:
    """The columns of classes, -1 for one that is not counted; None if one is named twice."""
    if len(set(names)) != len(names):
        return None
    return np.array([_COLUMNS.get(name, -1) for name in names], dtype=np.int64)


def _told(reports: Sequence[NodeStats]) -> _Told:
    """Reports side by side; one that names a class or a pair twice, or a class it has not, can't be true."""
    many = len(reports)
    found = [_columns(tuple([each.request_class for each in report.classes])) for report in reports]
    true = np.array([columns is not None for columns in found])
    places = [
        columns if columns is not None else np.full(len(reports[row].classes), -1) for row, columns in enumerate(found)
    ]
    kinds = np.array([len(columns) for columns in places])
    column = np.concatenate(places)
    counted = column >= 0
    of_class = np.repeat(np.arange(many), kinds)[counted]
    requests, busy_us = (np.zeros((many, len(CLASSES)), dtype=np.int64) for _ in range(2))
    for counters, values in (
        (requests, [each.requests for report in reports for each in report.classes]),
        (busy_us, [each.busy_us for report in reports for each in report.classes]),
    ):
        counters[of_class, column[counted]] = np.array(values, dtype=np.int64)[counted]
    lengths = np.array([len(report.pairs) for report in reports])
    chained = itertools.chain.from_iterable(itertools.chain.from_iterable(report.pairs for report in reports))
    kind, group, told = np.fromiter(chained, dtype=np.int64, count=3 * int(lengths.sum())).reshape(-1, 3).T
    owner = np.repeat(np.arange(many), lengths)
    wrong = (kind >= kinds[owner]) | (group >= GROUPS_MAX)
    true[owner[wrong]] = False
    taken = true[owner]
    owner, kind, group, told = owner[taken], kind[taken], group[taken], told[taken]
    number = column[(np.cumsum(kinds) - kinds)[owner] + kind]
    number, known = number * GROUPS_MAX + group, number >= 0
    owner, number, told = owner[known], number[known], told[known]
    order = np.argsort(owner * _PAIRS + number, kind="stable")
    owner, number, told = owner[order], number[order], told[order]
    twice = (owner[1:] == owner[:-1]) & (number[1:] == number[:-1])
    true[owner[1:][twice]] = False
    network_us = np.array([float(min(report.network_us, NETWORK_US_MAX)) for report in reports])
    return _Told(tuple(reports), true, requests, busy_us, owner, number, told, network_us)


def _more(owner: IntArray, pairs: IntArray, requests: IntArray, befores: Sequence[_Seen | None]) -> IntArray:
    """How much more each pair was counted than before, by its owner's state before; None for a node that began anew.

    A pair that was not told before had counted nothing, if all were told; else nobody knows, and it begins now.
    """
    states = [(index, before) for index, before in enumerate(befores) if before is not None]
    complete = np.ones(len(befores), dtype=bool)
    complete[[index for index, before in states if not before.complete]] = False
    base = np.where(complete[owner], 0, requests)
    if states:
        many = [len(before.pairs) for _, before in states]
        keys = np.repeat([index * _PAIRS for index, _ in states], many)
        keys += np.concatenate([before.pairs for _, before in states])
        if keys.size:
            wanted = owner * _PAIRS + pairs
            at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
            known = keys[at] == wanted
            base = np.where(known, np.concatenate([before.pair_requests for _, before in states])[at], base)
    # A node that had no room for a pair counts it anew from 0.
    return requests - np.where(base > requests, 0, base)


def _hot_keys(report: NodeStats) -> tuple[HotKey, ...]:
    classes = [each.request_class for each in report.classes]
    return tuple(
        HotKey(name, classes[index], requests * 1000.0 / report.hot_window_ms)
        for name, index, requests in report.hot
        if index < len(classes) and classes[index] in _COLUMNS and report.hot_window_ms
    )


def _hottest(told: Iterable[tuple[HotKey, ...]]) -> tuple[HotKey, ...]:
    """The nodes' hottest keys together: summaries of space-saving add up (Agarwal et al. 2012)."""
    rates: dict[tuple[str, str], float] = {}
    for key in itertools.chain.from_iterable(told):
        rates[key.name, key.request_class] = rates.get((key.name, key.request_class), 0.0) + key.requests_per_s
    hottest = sorted(rates.items(), key=lambda item: (-item[1], item[0]))[:HOT_KEYS_MAX]
    return tuple(HotKey(name, request_class, rate) for (name, request_class), rate in hottest)


def _frozen(array: FloatArray) -> FloatArray:
    copy = np.array(array, dtype=np.float64)
    copy.setflags(write=False)
    return copy
