"""The client's choice of a combiner. Time is an argument; no socket.

A combiner is ranked by least expected completion plus its node price: the wait for what its newest snapshot tells of
its queue, and for the own requests sent since; the request's own service, with what that costs others by the price;
the network's round trip; and a charge where the key is cold. ``bench/simulator.py`` measures it beside other ways.
"""

from __future__ import annotations

import heapq
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.keys import ALGORITHMS
from engine.protocol._nodestate import DOWN_S, RELEARN_S, NodeState, best, score
from engine.protocol.manifest import Cluster, ClusterSource, FollowsCluster
from engine.protocol.table import RoutingTable
from engine.protocol.wire import Load

__all__ = ["Edition", "Router"]

SETTLE_TIMES = 2.0
"""After so many mean times of service a queue is half way from what it was told to be to what it is on average."""
PRICE_PART = 0.1
"""A table's price is the dual of a split that does not look at queues. The router does, and needs this part of it."""
OUTLIER_TIMES = 3.0
"""One measured service counts as so many times what is usual at most: a pause of the node or its token is no habit."""
COLD_CHARGE_US = 3_000.0
COLD_CHARGE_MAX_US = 100_000.0
"""What a cold key is taken to cost until that is measured, and at most."""
COLD_PART = 0.25
"""Loading a key pays at each later use: so much of one is set against the charge for each use until now."""
MAX_KEYS = 65_536
"""How many keys the router remembers as loaded somewhere."""
MAX_VIEWS = 8_192
HALF_LIFE_S = 30.0
"""A use counts half for how popular its key is after so long."""
AT_ONCE_S = 0.1
"""Uses so near to each other count as at the same time."""
POPULAR_USES = 2.0
"""A key with fewer uses of late is not worth loading ahead of them."""
POPULAR_MAX = 64
"""The most popular keys that are loaded again at a node which lost what it had."""
POPULAR_SEEN = 4_096
"""So many of the newest used keys may be popular."""
HELD_S = 60.0
HELD_UNHEARD_S = 10.0
"""How long popular keys keep away from a node that lost them, if nothing is heard of it: the latter is for a node of
which no publications come, so that requests have to try how it is."""
MISSED_S = 5.0
"""A node that said so long ago, or less, that it has a key no more had it until a new epoch came."""
PROBE_S = 1.0
"""How long one request that tries such a node again keeps others from it."""
PATIENCE_MIN_S = 0.25
PATIENCE_MAX_S = 0.6
PATIENCE_UNKNOWN_S = 0.3
PATIENCE_COLD_S = 0.5
"""How long a node has for its answer until another one is asked too: several times what answers usually take, within
these bounds; and where nothing was measured, by whether shares may have to be gathered."""
PATIENCE_TIMES = 4
PROBE_PATIENCE_MIN_S = 0.005
PROBE_PATIENCE_S = 0.05
"""The bounds for a node that failed and is tried again: most often it is still away, and who finds that out has lost so
much. A stopped node accepts, and says nothing."""


@dataclass(slots=True)
class _Pace:
    """Smoothed mean and mean deviation of what exchanges of one kind took, as TCP keeps them (RFC 6298)."""

    mean_s: float
    deviation_s: float

    def add(self, seconds: float) -> None:
        self.deviation_s += (abs(seconds - self.mean_s) - self.deviation_s) / 4
        self.mean_s += (seconds - self.mean_s) / 8


def version_label(name: str, version: int) -> str:
    """What an older version of a key goes by here, beside the newest, which goes by its name."""
    return f"{name}#{version}"


def plain_name(label: str) -> str:
    """The key's own name, in which there is no such mark."""
    return label.partition("#")[0]


class Edition(NamedTuple):
    """Which key a name means, in which epoch, and who holds it."""

    key_id: bytes
    version: int
    epoch: int
    holders: tuple[str, ...]


_NO_NODES: frozenset[NodeState] = frozenset()


@dataclass(slots=True, eq=False)
class _Known:
    """A key that was used: where it is loaded, where it is about to be (``coming``), and how often it was used here.

    ``of_late`` are its uses as they counted at ``used_s``; ``missed`` are nodes that had lost it by ``missed_s``.
    """

    nodes: set[NodeState] = field(default_factory=set)
    uses: int = 0
    coming: frozenset[NodeState] = _NO_NODES
    of_late: float = 0.0
    used_s: float = 0.0
    missed: frozenset[NodeState] = _NO_NODES
    missed_s: float = 0.0
    edition: Edition | None = None
    group: int = -1

    def popularity(self, now_s: float) -> float:
        """Its uses of late: each counts half after ``HALF_LIFE_S``."""
        return self.of_late * float(0.5 ** (max(0.0, now_s - self.used_s) / HALF_LIFE_S))

    def used(self, uses: int, now_s: float) -> None:
        if now_s - self.used_s > AT_ONCE_S:
            self.of_late, self.used_s = self.popularity(now_s), now_s
        self.of_late += uses

    def misses(self, state: NodeState, now_s: float) -> None:
        """A node has it loaded no more, by its own word."""
        self.nodes.remove(state)
        self.missed = frozenset({state}) | (self.missed if now_s - self.missed_s < MISSED_S else _NO_NODES)
        self.missed_s = now_s

    def had(self, now_s: float) -> frozenset[NodeState]:
        """Where it is loaded, or was until a moment ago."""
        return self.missed | self.nodes if now_s - self.missed_s < MISSED_S else frozenset(self.nodes)


_NOWHERE = _Known()


@dataclass(slots=True)
class _Lost:
    """The popular keys that a node had loaded when it failed, since when, and whether something is heard of it again.

    They keep away from it (``held``) for a while, and again when it is back, until they are loaded there.
    """

    since_s: float
    keys: set[str] = field(default_factory=set)
    held: bool = True
    back: bool = False


@dataclass(frozen=True, slots=True)
class _Indexed:
    """A table with its rows and columns by name, and its groups by number."""

    table: RoutingTable
    rows: Mapping[str, int]
    columns: Mapping[str, int]
    groups: Mapping[int, Sequence[int]]


class Router(FollowsCluster):
    """One client's view of the nodes; safe for several threads.

    The invariant: a table only ever replaces an older one, whole.
    """

    def __init__(self, cluster: ClusterSource) -> None:
        self._source = cluster
        self._lock = threading.Lock()
        self._nodes: dict[str, NodeState] = {}
        self._keys: OrderedDict[str, _Known] = OrderedDict()
        self._views: dict[tuple[str, ...], tuple[NodeState, ...]] = {}
        self._viewed: Cluster | None = None
        # What requests took beyond service and way, where the key was known to be loaded and where it was not.
        self._warm_us, self._cold_us = 0.0, COLD_CHARGE_US
        self._paces: dict[tuple[str, bool], _Pace] = {}
        self._resting: dict[tuple[str, str], float] = {}
        """Until when a node is to rest from a class that has a cap, of which it did more than that."""
        self._indexed: _Indexed | None = None
        self._lost: dict[NodeState, _Lost] = {}
        self._publishing: set[NodeState] = set()
        self.prewarms = False
        """Whether somebody loads popular keys ahead, and is so to be told where: see ``engine.client.ahead``."""
        self.returned = False
        """Whether a node that lost popular keys is back: then ``take_returned`` has something to give."""
        self.changes = 0
        """Counts what a choice that was made before should not outlive."""

    @property
    def table(self) -> RoutingTable | None:
        """The table in force."""
        indexed = self._indexed
        return indexed.table if indexed else None

    def install(self, table: RoutingTable) -> bool:
        """Put a verified table in force, unless a newer one is."""
        indexed = _Indexed(
            table,
            {name: index for index, name in enumerate(table.classes)},
            {name: index for index, name in enumerate(table.nodes)},
            dict(table.groups),
        )
        with self._lock:
            if self._indexed is not None and table.order <= self._indexed.table.order:
                return False
            self._indexed = indexed
            for state in self._nodes.values():
                self._rate(state)
            self.changes += 1
            return True

    def holders(self, key_name: str) -> tuple[str, ...]:
        """The nodes of the key's placement group, in order, by the table in force or else the cluster's own rule."""
        group = self._cluster.group_of(key_name)
        indexed = self._indexed
        if indexed is not None:
            indexes = indexed.groups.get(group, ())
            if indexes:
                return tuple(name for i in indexes if (name := indexed.table.nodes[i]) in self._cluster.nodes)
        return self._cluster.group_holders(group)

    def sent(self, node: str, now_s: float) -> None:
        """A request went to the node."""
        with self._lock:
            self._sent(self._state(node), now_s)

    def _sent(self, state: NodeState, now_s: float) -> None:
        state.outstanding += 1
        state.sent_s.append(now_s)

    def begin_direct(
        self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float
    ) -> tuple[str, float, NodeState] | None:
        """Count a request to the best node that has the key loaded: the node, its patience in seconds, and its state.

        None where another way is to be taken: no such node is best, or the best one failed and is to be tried again.
        """
        with self._lock:
            known = self._keys.get(key_name, _NOWHERE)
            if not known.nodes:
                return None
            view, cold_us = self._view(eligible), self._cold_charge_us(known)
            if known.coming:
                view = tuple(state for state in view if state not in known.coming)
            first = best(view, request_class, known.nodes, cold_us, now_s, self._told_us)
            if first is None or first not in known.nodes:
                return None
            self._sent(first, now_s)
            return first.name, self._patience_s(first, request_class, False), first

    def answered_direct(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_s: float, now_s: float
    ) -> None:
        """``took`` and ``answered`` in one."""
        with self._lock:
            self._took(request_class, False, elapsed_s)
            self._answered(node, key_name, request_class, load, elapsed_s * 1e6, now_s)

    def learned_direct(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_s: float, now_s: float, uses: int = 1
    ) -> None:
        """As ``answered_direct``, of so many requests that are not counted as under way.

        It tells of a while ago: a key that was forgotten since, after a flush, does not count as loaded by it.
        """
        with self._lock:
            self._took(request_class, False, elapsed_s)
            state, known = self._state(node), self._keys.get(key_name, _NOWHERE)
            still = key_name if state in known.nodes else ""
            self._learned(state, still, request_class, load, elapsed_s * 1e6, now_s)
            if still and uses > 1:
                known.used(uses - 1, now_s)

    def answered(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        """A reply with its snapshot came back."""
        with self._lock:
            self._answered(node, key_name, request_class, load, elapsed_us, now_s)

    def _answered(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        state = self._state(node)
        if state.outstanding:
            state.outstanding -= 1
        self._learned(state, key_name, request_class, load, elapsed_us, now_s)

    def _learned(
        self, state: NodeState, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        anew = now_s - state.way_s > RELEARN_S
        state.way_s = now_s
        if state.down_for_s or state.probing:
            state.up(now_s)
            self._came_back(state)
        service_us = load.service_us
        beside_us = min(max(elapsed_us - service_us, 0.0), 1e6)
        # What a reply took beside its service is the way, and waiting; the least of it, of late, is the way.
        way_us = state.round_trip_us
        way_us += (0.25 if beside_us < way_us else 0.002) * (beside_us - way_us)
        state.round_trip_us = way_us
        if service_us and request_class:
            before = state.service_us.get(request_class)
            if before is not None and now_s - state.measured_s[request_class] > RELEARN_S:
                before = None
            usual_us = self._told_us(state, request_class) if before is None else before
            measured_us = min(float(service_us), OUTLIER_TIMES * usual_us)
            state.measured_s[request_class] = now_s
            state.service_us[request_class] = measured_us if before is None else before + 0.1 * (measured_us - before)
            if anew or not state.usual_us:
                state.usual_us = measured_us
            else:
                state.usual_us += 0.05 * (measured_us - state.usual_us)
            state.settle_s = SETTLE_TIMES * 1e-6 * state.usual_us
            state.wait_us = state.usual_us / state.lanes
        self._told(state, load.queue, now_s)
        if key_name:
            self._learned_key(state, key_name, load.loaded, beside_us - way_us, now_s)
            if request_class and (known := self._keys.get(key_name)) is not None:
                known.used(1, now_s)

    def _learned_key(self, state: NodeState, key_name: str, loaded: bool, more_us: float, now_s: float) -> None:
        known = self._keys.get(key_name)
        if known is not None and state in known.nodes:
            self._warm_us += 0.05 * (more_us - self._warm_us)
            known.uses += 1
            if not loaded:
                known.misses(state, now_s)
                self.changes += 1
        elif loaded:
            self._cold_us += 0.05 * (more_us - self._cold_us)
            if known is None:
                known = self._new_key(key_name)
            known.nodes.add(state)
            known.coming -= {state}
            known.uses += 1
        else:
            return
        self._keys.move_to_end(key_name)

    def _new_key(self, key_name: str) -> _Known:
        known = self._keys[key_name] = _Known()
        if len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)
        return known

    def _told(self, state: NodeState, queue: float, now_s: float) -> None:
        """Take in a snapshot: it is as old as half the way, and what was sent on the other half it does not know."""
        state.mean_queue += 0.02 * (queue - state.mean_queue)
        state.excess, state.seen_s = queue - state.mean_queue, now_s
        sent_s, known_s = state.sent_s, now_s - 1e-6 * state.round_trip_us
        while sent_s and sent_s[0] < known_s:
            sent_s.popleft()

    def heard(self, node: str, queue: int, now_s: float, *, serving: bool = True) -> None:
        """A publication of the node came at ``now_s``; a reply that came later knows more.

        It says nothing of requests, so it ends no time as down: a node may publish and yet answer none. One that says
        it does not serve is tried last for as long as it says so.
        """
        with self._lock:
            state = self._state(node)
            if now_s < state.seen_s:
                return
            self._told(state, queue, now_s)
            self._publishing.add(state)
            if serving and self._lost:
                self._came_back(state)
            if not serving and state.down_until_s <= now_s:
                state.down_for_s, state.down_until_s = max(DOWN_S, state.down_for_s), now_s + DOWN_S
                self.changes += 1

    def dropped(self, node: str) -> None:
        """A request's answer is no longer waited for, and the node is not to blame."""
        with self._lock:
            state = self._state(node)
            state.outstanding = max(0, state.outstanding - 1)

    def failed(self, node: str, now_s: float) -> None:
        """No reply came; the node is tried last for a while, and what it had loaded is forgotten."""
        with self._lock:
            state = self._state(node)
            state.outstanding = max(0, state.outstanding - 1)
            state.sent_s.clear()
            state.down(now_s)
            self._forget_at(state, now_s)

    def restarted(self, node: str, now_s: float) -> None:
        """The node was started anew, whether or not a request has failed there: nothing is loaded."""
        with self._lock:
            state = self._state(node)
            self._forget_at(state, now_s)
            self._came_back(state)

    def _forget_at(self, state: NodeState, now_s: float) -> None:
        self.changes += 1
        lost = [(known, name) for name, known in self._keys.items() if state in known.nodes]
        for known, _ in lost:
            known.nodes.remove(state)
        if lost and self.prewarms:
            self._lose(state, lost, now_s)

    def late(self, node: str, now_s: float) -> None:
        """A request's patience is over: the node is tried last for a while, unless the answer still comes."""
        with self._lock:
            self._state(node).down(now_s)
            self.changes += 1

    def came_up(self, node: str, now_s: float) -> None:
        """A lost connection to the node is there again: it need not be tried last any more."""
        with self._lock:
            state = self._nodes.get(node)
            if state is not None:
                state.up(now_s)
                self._came_back(state)

    # --- what is loaded ahead ---

    def _lose(self, state: NodeState, lost: Sequence[tuple[_Known, str]], now_s: float) -> None:
        """Note the popular ones of the keys that a node has lost; they keep away from it for a while."""
        popular = [(uses, name) for known, name in lost if (uses := known.popularity(now_s)) >= POPULAR_USES]
        if not popular:
            return
        gone = self._lost.setdefault(state, _Lost(now_s))
        gone.since_s, gone.held, gone.back = now_s, True, False
        gone.keys.update(name for _, name in heapq.nlargest(POPULAR_MAX - len(gone.keys), popular))
        self._hold(state, gone)

    def _hold(self, state: NodeState, gone: _Lost) -> None:
        for name in gone.keys:
            known = self._keys.get(name)
            if known is not None and state not in known.nodes:
                known.coming |= {state}

    def _came_back(self, state: NodeState) -> None:
        gone = self._lost.get(state)
        if gone is not None and not gone.back:
            gone.back = self.returned = True
            self._hold(state, gone)

    def stop_prewarming(self) -> None:
        """Nobody loads keys ahead any more."""
        with self._lock:
            self.prewarms = self.returned = False
            self._lost.clear()
            for known in self._keys.values():
                known.coming = _NO_NODES

    def take_returned(self, now_s: float) -> list[tuple[str, list[str]]]:
        """The nodes that are back, each with the popular keys that it lost; they are given once.

        Of a node that is silent for longer the keys keep away no more, so that requests try how it is.
        """
        with self._lock:
            self.returned = False
            back = []
            for state, gone in list(self._lost.items()):
                if gone.back:
                    del self._lost[state]
                    back.append((state.name, sorted(gone.keys)))
                elif gone.held and now_s - gone.since_s > (HELD_S if state in self._publishing else HELD_UNHEARD_S):
                    gone.held = False
                    for name in gone.keys:
                        if (known := self._keys.get(name)) is not None:
                            known.coming -= {state}
            return back

    def popular(self, groups: Collection[int], most: int, now_s: float) -> list[tuple[str, int]]:
        """The most popular of the newest used keys of these groups, each with its group."""
        with self._lock:
            newest = [
                (uses, name, known)
                for _, (name, known) in zip(range(POPULAR_SEEN), reversed(self._keys.items()), strict=False)
                if (uses := known.popularity(now_s)) >= POPULAR_USES
            ]
        for _, name, known in newest:
            if known.group < 0:
                known.group = self._cluster.group_of(plain_name(name))  # how many groups there are never changes
        return [
            (name, known.group)
            for _, name, known in heapq.nlargest(
                most, (each for each in newest if each[2].group in groups), key=lambda each: each[0]
            )
        ]

    def described(self, key_name: str, edition: Edition, now_s: float) -> tuple[str, ...]:
        """A key's description was read: where it is to be loaded now, if it is popular and was another one before.

        In a new epoch that is where it was loaded, as far as that may have changed, and its new holders; another key of
        the name has to be loaded where the one before was.
        """
        with self._lock:
            known = self._keys.get(key_name) or self._new_key(key_name)
            before = known.edition
            same = before is not None and (before.key_id, before.version) == (edition.key_id, edition.version)
            if before is not None and same and edition.epoch <= before.epoch:
                return ()
            known.edition = edition
            if before is None:
                return ()
            had_it = {state.name for state in known.had(now_s)}
            if not same:
                known.nodes.clear()
                self.changes += 1
            if known.popularity(now_s) < POPULAR_USES:
                return ()
            wanted = tuple(name for name in edition.holders if name in had_it or name not in before.holders)
            for name in wanted:
                self._expect(known, name)
            return wanted

    def expect(self, key_name: str, node: str) -> None:
        """The key is about to be loaded at the node: others that have it come first until then."""
        with self._lock:
            known = self._keys.get(key_name)
            if known is not None:
                self._expect(known, node)

    def _expect(self, known: _Known, node: str) -> None:
        state = self._state(node)
        if self.prewarms and state not in known.nodes:
            known.coming |= {state}

    def warmed(self, key_name: str, node: str, loaded: bool | None) -> None:
        """What was expected is over: the node has the key loaded, or it has not, or (None) nobody knows."""
        with self._lock:
            known = self._keys.get(key_name)
            if known is not None:
                state = self._state(node)
                known.coming -= {state}
                if loaded:
                    known.nodes.add(state)
                elif loaded is not None:
                    known.nodes.discard(state)

    def took(self, request_class: str, cold: bool, seconds: float) -> None:
        """An exchange was answered after so many seconds."""
        with self._lock:
            self._took(request_class, cold, seconds)

    def _took(self, request_class: str, cold: bool, seconds: float) -> None:
        pace = self._paces.get((request_class, cold))
        if pace is None:
            self._paces[request_class, cold] = _Pace(seconds, seconds / 2)
        else:
            pace.add(seconds)

    def patience_s(self, node: str, request_class: str, cold: bool) -> float:
        """How long to wait for a node before another is asked beside."""
        with self._lock:
            return self._patience_s(self._state(node), request_class, cold)

    def _patience_s(self, state: NodeState, request_class: str, cold: bool) -> float:
        pace = self._paces.get((request_class, cold))
        if pace is None:
            return PROBE_PATIENCE_S if state.probing else PATIENCE_COLD_S if cold else PATIENCE_UNKNOWN_S
        usual_s = PATIENCE_TIMES * (pace.mean_s + 4 * pace.deviation_s)
        if state.probing:
            return min(max(usual_s, PROBE_PATIENCE_MIN_S), PROBE_PATIENCE_S)
        return PATIENCE_MIN_S if usual_s < PATIENCE_MIN_S else min(usual_s, PATIENCE_MAX_S)

    def is_loaded(self, key_name: str, node: str) -> bool:
        """Whether the node's last reply said that it has the key loaded."""
        return self._nodes.get(node) in self._keys.get(key_name, _NOWHERE).nodes

    def forget_loaded(self, key_name: str = "") -> None:
        """Forget what is loaded, of one key or of all: after a flush."""
        with self._lock:
            if key_name:
                self._keys.pop(key_name, None)
            else:
                self._keys.clear()
                self._lost.clear()
            self.changes += 1

    def rank(self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float) -> tuple[str, ...]:
        """The eligible combiners, best first."""
        with self._lock:
            states = self._view(eligible)
            if len(states) < 2:
                return tuple(state.name for state in states)
            known = self._keys.get(key_name, _NOWHERE)
            cold_us = self._cold_charge_us(known)
            scored = sorted(
                (
                    state.down_until_s > now_s,
                    score(state, request_class, known.nodes, cold_us, now_s, self._told_us),
                    at,
                )
                for at, state in enumerate(states)
            )
            if known.coming and known.nodes:
                scored.sort(key=lambda each: (each[0], states[each[2]] in known.coming))
            self._probe(states[scored[0][2]], now_s)
            return tuple(states[at].name for _, _, at in scored)

    def order(self, names: Sequence[str], now_s: float, request_class: str = "") -> tuple[str, ...]:
        """The names as given, but those later that worked on the class for longer than its cap, and last that are down.

        Of those with too much of a class first the one that has had its rest first.
        """
        with self._lock:
            resting = self._resting
            states = sorted(
                map(self._state, names),
                key=lambda state: (
                    state.down_until_s > now_s,
                    max(now_s, resting.get((state.name, request_class), now_s)),
                ),
            )
            self._probe(states[0], now_s)
            return tuple(state.name for state in states)

    def worked(self, node: str, request_class: str, seconds: float, now_s: float) -> None:
        """The node worked on a request of ours for so long; by a cap of its class it is to rest from the class then."""
        indexed = self._indexed
        row = None if indexed is None else indexed.rows.get(request_class)
        if indexed is None or row is None or not 0 < indexed.table.caps[row] < 1000:
            return
        with self._lock:
            place = node, request_class
            since_s = max(now_s - seconds, self._resting.get(place, 0.0))
            self._resting[place] = since_s + seconds * 1000 / indexed.table.caps[row]

    def _probe(self, state: NodeState, now_s: float) -> None:
        """If this node's time as down is over, one request finds out how it is; the others go elsewhere meanwhile."""
        if state.down_for_s and state.down_until_s <= now_s:
            state.probing, state.down_until_s = True, now_s + PROBE_S

    def _state(self, name: str) -> NodeState:
        """What is known of a node; of one that nobody asked yet, nothing."""
        state = self._nodes.get(name)
        if state is None:
            state = self._nodes[name] = NodeState(name)
            self._rate(state)
        return state

    def _view(self, eligible: Sequence[str]) -> tuple[NodeState, ...]:
        """The states of those that are members."""
        cluster, names = self._cluster, tuple(eligible)
        if self._viewed is not cluster or len(self._views) > MAX_VIEWS:
            self._views.clear()
            self._viewed = cluster
        view = self._views.get(names)
        if view is None:
            view = self._views[names] = tuple(self._state(name) for name in names if name in cluster.nodes)
        return view

    def _cold_charge_us(self, known: _Known) -> float:
        charge = self._cold_us - self._warm_us
        if charge <= 0.0:  # comparisons, since each warm use comes along here, and min and max are calls
            return 0.0
        return (charge if charge < COLD_CHARGE_MAX_US else COLD_CHARGE_MAX_US) / (1.0 + COLD_PART * known.uses)

    def _told_us(self, state: NodeState, request_class: str) -> float:
        """A class's service time by the table, or else a first guess."""
        indexed = self._indexed
        if indexed is not None:
            row, column = indexed.rows.get(request_class), indexed.columns.get(state.name)
            if row is not None and column is not None and (known := indexed.table.service_us(row, column)):
                return known
        algo = ALGORITHMS.get(request_class.partition("/")[2])
        return float(algo.prior_us) if algo else 100.0

    def _rate(self, state: NodeState) -> None:
        """Take from the table what it says of a node as such."""
        state.cost, state.lanes = 1.0, 1.0
        indexed = self._indexed
        if indexed is not None and (column := indexed.columns.get(state.name)) is not None:
            table = indexed.table
            state.cost += PRICE_PART * table.price[column] / 1000
            state.lanes = float(table.lanes[column] or 1) if table.lanes else 1.0
        state.others, state.wait_us = state.lanes - 1.0, state.usual_us / state.lanes
