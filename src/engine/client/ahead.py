"""Which keys a client has loaded ahead of their use, where and when. No socket; time and chance are arguments.

A routing table hints which holders are about to need the keys of a group; a table or a key's newer description brings
new holders; a node that was lost comes back with nothing loaded; and another epoch may find a cache empty. Each time it
is the popular keys of this client that are worth a grant, and only those that its policy lets it use. All of it is
bounded: how many keys, how many requests a second and under way, and once a while for each key, node and epoch. Clients
wait for a random time first, so that not all of them ask a node for the same at once.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from engine.client.admission import TokenBucket
from engine.client.calls import Calls, Description
from engine.protocol.routing import POPULAR_MAX, Edition
from engine.protocol.table import RoutingTable

__all__ = ["UNDER_WAY", "Ahead", "PrewarmStats", "Warm"]

HINTS_MAX: Final = 1_024
NODES_OF_HINT: Final = 16
"""A table's hints beyond this are passed over: the hottest come first."""
SPREAD_S: Final = 0.2
HINT_SPREAD_S: Final = 1.0
"""A request waits for a random part of this. A hint is of a load that is some ticks away."""
AGAIN_S: Final = 30.0
"""A key is not loaded ahead again at the same node and in the same epoch within this."""
RENEW_S: Final = 60.0
"""Nodes drop loaded keys after a while. Where a key was loaded by a hint it is asked for again after this, as long as
the hint stands: who has it still answers at once."""
PER_S: Final = 20.0
BURST_S: Final = 1.6
"""Requests a second, and for how many seconds' worth there is room: a tenth of the shares that a holder releases to a
client (``limits.client_per_s``)."""
UNDER_WAY: Final = 4
QUEUED_MAX: Final = 512
REMEMBERED_MAX: Final = 8_192


@dataclass(frozen=True, slots=True)
class PrewarmStats:
    """Keys that this client had loaded ahead: requests sent, and how many of them went well and failed."""

    sent: int
    loaded: int
    failed: int


@dataclass(frozen=True, slots=True)
class Warm:
    """Have ``node`` load a key. A ``certain`` one is asked for although the key counts as loaded there."""

    name: str
    node: str
    certain: bool = False


class Ahead:
    """Safe for several threads. ``chance`` gives numbers from 0 to 1; ``woken`` is called when there is more to do."""

    def __init__(self, calls: Calls, chance: Callable[[], float], woken: Callable[[], None] = lambda: None) -> None:
        self._calls = calls
        self._router = calls.router
        self._chance = chance
        self.woken = woken
        self._lock = threading.Lock()
        self._table: RoutingTable | None = None
        self._queue: list[tuple[float, int, Warm]] = []
        self._queued: set[tuple[str, str]] = set()
        self._numbers = itertools.count()
        self._sent: OrderedDict[tuple[str, str], tuple[bytes, float]] = OrderedDict()
        self._bucket = TokenBucket(PER_S, BURST_S, calls.clock())
        self._under_way = 0
        self._counts = [0, 0, 0]
        calls.on_description = self.described
        calls.router.prewarms = True

    @property
    def stats(self) -> PrewarmStats:
        """What was done so far."""
        return PrewarmStats(*self._counts)

    # --- what is wanted ---

    def look(self) -> None:
        """Take in a newer table, and nodes that are back."""
        now_s = self._calls.clock()
        for node, names in self._router.take_returned(now_s):
            with self._lock:
                for name in names:
                    self._sent.pop((name, node), None)  # whatever was loaded there is not any more
            self._want([Warm(name, node) for name in names], SPREAD_S, now_s)
        table, before = self._router.table, self._table
        if table is not None and table is not before:
            self._table = table
            self._want(self._hinted(table, now_s), HINT_SPREAD_S, now_s)
            if before is not None:
                self._want(self._moved(table, before, now_s), SPREAD_S, now_s)

    def described(self, name: str, known: Description) -> None:
        """A key was described: if it is another epoch, or another key, it is loaded again where it was."""
        manifest, now_s = known.record.manifest, self._calls.clock()
        edition = Edition(manifest.key_id, manifest.version, manifest.epoch, known.holders)
        nodes = self._router.described(name, edition, now_s)
        if nodes:
            self._want([Warm(name, node, certain=True) for node in nodes], SPREAD_S, now_s)

    def _hinted(self, table: RoutingTable, now_s: float) -> list[Warm]:
        hints = {group: nodes[:NODES_OF_HINT] for group, nodes in table.hints[:HINTS_MAX]}
        if not hints:
            return []
        found = []
        for name, group in self._router.popular(hints, POPULAR_MAX, now_s):
            known = self._calls.peek(name)
            holders = known.holders if known is not None else ()
            found += [Warm(name, node) for index in hints[group] if (node := table.nodes[index]) in holders]
        return found

    def _moved(self, table: RoutingTable, before: RoutingTable, now_s: float) -> list[Warm]:
        """Popular keys of groups that have holders which they had not in the table before."""
        if table.groups == before.groups and table.nodes == before.nodes:
            return []
        now, then = _by_name(table), _by_name(before)
        changed = {group for group in now.keys() | then.keys() if now.get(group) != then.get(group)}
        cluster, found = self._calls.cluster, []
        for name, group in self._router.popular(changed, POPULAR_MAX, now_s):
            known = self._calls.peek(name)
            # A key of n shares is at the first n by the rule. A table tells of all holders, which may be more than the
            # key was described to have; what it is not described to be at is looked up anew.
            usual = cluster.group_holders(group)[: len(known.holders)] if known is not None else ()
            old = then.get(group, usual)
            found += [Warm(name, node) for node in now.get(group, usual)[:NODES_OF_HINT] if node not in old]
        return found

    def _want(self, wanted: Iterable[Warm], spread_s: float, now_s: float) -> None:
        added = False
        for warm in wanted if self._router.prewarms else ():
            place = (warm.name, warm.node)
            with self._lock:
                new = place not in self._queued and len(self._queue) < QUEUED_MAX and self._due(warm, now_s)
                if new:
                    added = True
                    self._router.expect(warm.name, warm.node)
                    self._queued.add(place)
                    due_s = now_s + spread_s * self._chance()
                    heapq.heappush(self._queue, (due_s, next(self._numbers), warm))
                elif place not in self._queued:
                    self._router.warmed(warm.name, warm.node, None)
        if added:
            self.woken()

    def _due(self, warm: Warm, now_s: float) -> bool:
        """Whether it is worth a request: allowed, not loaded, and not asked for a moment ago in the same epoch."""
        if warm.node not in self._calls.cluster.nodes or not self._calls.may_use(warm.name):
            return False
        digest, sent_s = self._sent.get((warm.name, warm.node), (b"", 0.0))
        if not warm.certain and self._router.is_loaded(warm.name, warm.node):
            return digest != b"" and now_s - sent_s >= RENEW_S
        return digest != self._digest(warm.name) or now_s - sent_s >= AGAIN_S

    def _digest(self, name: str) -> bytes:
        known = self._calls.peek(name)
        return known.record.digest if known is not None else b"-"

    # --- what is done ---

    def wait_s(self) -> float | None:
        """How long there is nothing to begin; None until something is wanted."""
        with self._lock:
            if not self._queue:
                return None
            now_s = self._calls.clock()
            due_s = max(0.0, self._queue[0][0] - now_s)
            return due_s if self._bucket.holds_one(now_s) else max(due_s, 1.0 / PER_S)

    def begin(self) -> list[Warm]:
        """What is to be sent now, a few at a time; each is to be ``ended``."""
        begun: list[Warm] = []
        now_s = self._calls.clock()
        with self._lock:
            while self._queue and self._queue[0][0] <= now_s and self._under_way < UNDER_WAY:
                if not self._bucket.holds_one(now_s):
                    break
                warm = heapq.heappop(self._queue)[2]
                if not self._due(warm, now_s):
                    self._queued.discard((warm.name, warm.node))
                    self._router.warmed(warm.name, warm.node, None)
                    continue
                self._bucket.take()
                self._under_way += 1
                self._counts[0] += 1
                self._sent[warm.name, warm.node] = (self._digest(warm.name), now_s)
                self._sent.move_to_end((warm.name, warm.node))
                if len(self._sent) > REMEMBERED_MAX:
                    self._sent.popitem(last=False)
                begun.append(warm)
        return begun

    def ended(self, warm: Warm, *, loaded: bool) -> None:
        """A request that was begun went well, or did not."""
        with self._lock:
            self._under_way -= 1
            self._counts[1 if loaded else 2] += 1
            self._queued.discard((warm.name, warm.node))
            self._router.warmed(warm.name, warm.node, loaded)

    def stop(self) -> None:
        """Nobody sends any more: no use waits for what will not be."""
        with self._lock:
            self._queue.clear()
            self._router.stop_prewarming()


def _by_name(table: RoutingTable) -> Mapping[int, tuple[str, ...]]:
    return {group: tuple(table.nodes[index] for index in nodes) for group, nodes in table.groups}
