"""The routing table and the client's choice of a combiner. Time and randomness are arguments; no socket.

A combiner is ranked by least expected completion plus its node price: (queue + own requests under way + 1) x service
time + network round trip + price, with a charge where the key is cold. The two combiners sampled by the table's
weights, and those that have the key loaded, compete first; the others follow for failover.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated

from msgspec import Meta, Struct

from engine.errors import ManifestError
from engine.keys import ALGORITHMS
from engine.protocol.manifest import CLOCK_SKEW_MS, Cluster, ClusterSource, FollowsCluster
from engine.protocol.signed import SigningKey, sign_envelope, verify_envelope
from engine.protocol.wire import Codec, Load, Name, UInt

__all__ = ["Router", "RoutingTable", "open_table", "seal_table"]

SNAPSHOT_MAX_AGE_S = 0.2
"""A snapshot older than this says little about a queue (measured), so the queue is then taken as unknown: 0."""
COLD_CHARGE_US = 3_000
"""What gathering the shares of a cold key is taken to cost."""
MAX_LOADED = 65_536
"""How many (key, node) pairs the router remembers as loaded."""
TABLE_LIFETIME_MAX_MS = 3_600_000
"""The longest time a routing table may be good for."""
DOWN_S = 1.0
DOWN_MAX_S = 4.0
"""How long a node that failed is tried last: doubled up to the maximum each time that it fails anew after that."""
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


class RoutingTable(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the balancer publishes, ordered by (fencing epoch, counter).

    ``service_us`` and ``weights`` are rows by class, columns by node: service time in microseconds, share of the
    class's requests in 1/1000. ``price_us`` is one node price a node. ``groups`` lists only the placement groups whose
    holders differ from ``Cluster.group_holders``, as (group, node indexes). ``forecast`` is one row a class: the mean
    and P90 of the next tick in 1/1000 requests per second. ``cluster_serial`` is that of the balancer's manifest.
    """

    fencing_epoch: UInt
    counter: UInt
    issued_ms: UInt
    expires_ms: UInt
    nodes: Annotated[list[Name], Meta(max_length=4096)]
    classes: Annotated[list[Annotated[str, Meta(max_length=96)]], Meta(max_length=512)]
    service_us: list[list[UInt]]
    weights: list[list[UInt]]
    price_us: list[UInt]
    groups: list[tuple[UInt, list[UInt]]]
    forecast: list[tuple[UInt, UInt]]
    cluster_serial: UInt = 0

    @property
    def order(self) -> tuple[int, int]:
        """What makes one table newer than another."""
        return self.fencing_epoch, self.counter


table_codec = Codec(RoutingTable, "routing table", 1024 * 1024)


def seal_table(table: RoutingTable, key: SigningKey) -> bytes:
    """The table as a signed envelope."""
    return sign_envelope("table", table.counter, table_codec.encode(table), key)


def open_table(raw: bytes, cluster: Cluster, now_ms: int, newest: RoutingTable | None = None) -> RoutingTable:
    """A table signed by a balancer of the cluster.

    ``ManifestError`` if it is forged, malformed, expired or not newer than ``newest``.
    """
    table = table_codec.decode(verify_envelope(raw, "table", cluster.sign_key("balancer")).payload)
    if table.expires_ms + CLOCK_SKEW_MS < now_ms:
        raise ManifestError(f"routing table {table.order}: expired {now_ms - table.expires_ms} ms ago")
    if table.expires_ms > now_ms + TABLE_LIFETIME_MAX_MS + CLOCK_SKEW_MS:
        raise ManifestError(
            f"routing table {table.order}: expires in {table.expires_ms - now_ms} ms, "
            f"the limit is {TABLE_LIFETIME_MAX_MS}"
        )
    if newest is not None and table.order <= newest.order:
        raise ManifestError(f"routing table {table.order}: {newest.order} is in force")
    rows, columns = len(table.classes), len(table.nodes)
    matrices = (table.service_us, table.weights)
    if any(len(m) != rows or any(len(row) != columns for row in m) for m in matrices) or len(table.price_us) != columns:
        raise ManifestError(f"routing table {table.order}: its rows do not match {rows} classes and {columns} nodes")
    if len(table.forecast) != rows or any(max(indexes, default=0) >= columns for _, indexes in table.groups):
        raise ManifestError(f"routing table {table.order}: forecast or groups do not match its classes and nodes")
    return table


@dataclass(slots=True)
class NodeState:
    outstanding: int = 0
    queue: int = 0
    seen_s: float = float("-inf")
    down_for_s: float = 0.0
    down_until_s: float = float("-inf")
    probing: bool = False
    round_trip_us: float = 300.0
    service_us: dict[str, float] = field(default_factory=dict)

    def down(self, now_s: float) -> None:
        if self.probing or self.down_until_s <= now_s:  # of many requests that fail together one counts
            self.probing = False
            self.down_for_s = min(max(DOWN_S, 2 * self.down_for_s), DOWN_MAX_S)
            self.down_until_s = now_s + self.down_for_s

    def up(self) -> None:
        self.down_for_s, self.down_until_s, self.probing = 0.0, float("-inf"), False


@dataclass(slots=True)
class _Pace:
    """Smoothed mean and mean deviation of what exchanges of one kind took, as TCP keeps them (RFC 6298)."""

    mean_s: float
    deviation_s: float

    def add(self, seconds: float) -> None:
        self.deviation_s += (abs(seconds - self.mean_s) - self.deviation_s) / 4
        self.mean_s += (seconds - self.mean_s) / 8


class _Nodes(dict[str, NodeState]):
    """What is known of each node; of one that nobody asked yet, nothing."""

    def __missing__(self, name: str) -> NodeState:
        made = self[name] = NodeState()
        return made


@dataclass(frozen=True, slots=True)
class _Indexed:
    """A table with its rows and columns by name."""

    table: RoutingTable
    rows: Mapping[str, int]
    columns: Mapping[str, int]


class Router(FollowsCluster):
    """One client's view of the nodes; safe for several threads.

    The invariant: a table only ever replaces an older one, whole.
    """

    def __init__(self, cluster: ClusterSource, random: Random) -> None:
        self._source = cluster
        self._random = random
        self._lock = threading.Lock()
        self._nodes = _Nodes()
        self._loaded: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._paces: dict[tuple[str, bool], _Pace] = {}
        self._indexed: _Indexed | None = None
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
        )
        with self._lock:
            if self._indexed is not None and table.order <= self._indexed.table.order:
                return False
            self._indexed = indexed
            self.changes += 1
            return True

    def holders(self, key_name: str) -> tuple[str, ...]:
        """The nodes of the key's placement group, in order, by the table in force or else the cluster's own rule."""
        group = self._cluster.group_of(key_name)
        indexed = self._indexed
        if indexed is not None:
            for number, indexes in indexed.table.groups:
                if number == group:
                    return tuple(name for i in indexes if (name := indexed.table.nodes[i]) in self._cluster.nodes)
        return self._cluster.group_holders(group)

    def sent(self, node: str) -> None:
        """A request went to the node."""
        with self._lock:
            self._nodes[node].outstanding += 1

    def begin_direct(
        self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float
    ) -> tuple[str, float, NodeState] | None:
        """Count a request to the best node that has the key loaded: the node, its patience in seconds, and its state.

        None where another way is to be taken: no such node is best, or one that failed is due to be tried again.
        """
        with self._lock:
            states = [self._nodes[name] for name in eligible]
            if any(state.down_for_s and state.down_until_s <= now_s for state in states):
                return None
            order = self._rank(request_class, key_name, eligible, now_s)
            if not order or (key_name, order[0]) not in self._loaded or self._nodes[order[0]].down_for_s:
                return None
            state = self._nodes[order[0]]
            state.outstanding += 1
            return order[0], self._patience_s(state, request_class, False), state

    def answered_direct(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_s: float, now_s: float
    ) -> None:
        """``took`` and ``answered`` in one."""
        with self._lock:
            self._took(request_class, False, elapsed_s)
            self._answered(node, key_name, request_class, load, elapsed_s * 1e6, now_s)

    def learned_direct(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_s: float, now_s: float
    ) -> None:
        """As ``answered_direct``, of requests that are not counted as under way.

        It tells of a while ago: a key that was forgotten since, after a flush, does not count as loaded by it.
        """
        with self._lock:
            self._took(request_class, False, elapsed_s)
            known = key_name if (key_name, node) in self._loaded else ""
            self._learned(node, known, request_class, load, elapsed_s * 1e6, now_s)

    def answered(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        """A reply with its snapshot came back."""
        with self._lock:
            self._answered(node, key_name, request_class, load, elapsed_us, now_s)

    def _answered(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        state = self._nodes[node]
        if state.outstanding:
            state.outstanding -= 1
        self._learned(node, key_name, request_class, load, elapsed_us, now_s)

    def _learned(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        state = self._nodes[node]
        state.queue, state.seen_s = load.queue, now_s
        if state.down_for_s or state.probing:
            state.up()
        network_us = elapsed_us - load.service_us
        network_us = 0.0 if network_us < 0.0 else 1e6 if network_us > 1e6 else network_us
        state.round_trip_us += 0.1 * (network_us - state.round_trip_us)
        if load.service_us and request_class:
            before = state.service_us.get(request_class, float(load.service_us))
            state.service_us[request_class] = before + 0.1 * (load.service_us - before)
        if key_name:
            if load.loaded:
                self._loaded[key_name, node] = None
                self._loaded.move_to_end((key_name, node))
                if len(self._loaded) > MAX_LOADED:
                    self._loaded.popitem(last=False)
            elif (key_name, node) in self._loaded:
                del self._loaded[key_name, node]
                self.changes += 1

    def heard(self, node: str, queue: int, now_s: float, *, serving: bool = True) -> None:
        """A publication of the node came at ``now_s``; a reply that came later knows more.

        It says nothing of requests, so it ends no time as down: a node may publish and yet answer none. One that says
        it does not serve is tried last for as long as it says so.
        """
        with self._lock:
            state = self._nodes[node]
            if now_s < state.seen_s:
                return
            state.queue, state.seen_s = queue, now_s
            if not serving and state.down_until_s <= now_s:
                state.down_for_s, state.down_until_s = max(DOWN_S, state.down_for_s), now_s + DOWN_S
                self.changes += 1

    def dropped(self, node: str) -> None:
        """A request's answer is no longer waited for, and the node is not to blame."""
        with self._lock:
            state = self._nodes[node]
            state.outstanding = max(0, state.outstanding - 1)

    def failed(self, node: str, now_s: float) -> None:
        """No reply came; the node is tried last for a while, and what it had loaded is forgotten."""
        with self._lock:
            state = self._nodes[node]
            state.outstanding = max(0, state.outstanding - 1)
            state.down(now_s)
            self.changes += 1
            for pair in [pair for pair in self._loaded if pair[1] == node]:
                del self._loaded[pair]

    def late(self, node: str, now_s: float) -> None:
        """A request's patience is over: the node is tried last for a while, unless the answer still comes."""
        with self._lock:
            self._nodes[node].down(now_s)
            self.changes += 1

    def came_up(self, node: str) -> None:
        """A lost connection to the node is there again: it need not be tried last any more."""
        with self._lock:
            state = self._nodes.get(node)
            if state is not None:
                state.up()

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
            return self._patience_s(self._nodes[node], request_class, cold)

    def _patience_s(self, state: NodeState, request_class: str, cold: bool) -> float:
        pace = self._paces.get((request_class, cold))
        if pace is None:
            return PROBE_PATIENCE_S if state.probing else PATIENCE_COLD_S if cold else PATIENCE_UNKNOWN_S
        usual_s = PATIENCE_TIMES * (pace.mean_s + 4 * pace.deviation_s)
        if state.probing:
            return min(max(usual_s, PROBE_PATIENCE_MIN_S), PROBE_PATIENCE_S)
        return min(max(usual_s, PATIENCE_MIN_S), PATIENCE_MAX_S)

    def is_loaded(self, key_name: str, node: str) -> bool:
        """Whether the node's last reply said that it has the key loaded."""
        return (key_name, node) in self._loaded

    def forget_loaded(self, key_name: str = "") -> None:
        """Forget what is loaded, of one key or of all: after a flush."""
        with self._lock:
            for pair in [pair for pair in self._loaded if key_name in ("", pair[0])]:
                del self._loaded[pair]
            self.changes += 1

    def rank(self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float) -> tuple[str, ...]:
        """The eligible combiners, best first."""
        with self._lock:
            order = self._rank(request_class, key_name, eligible, now_s)
            if len(order) > 1:
                self._probe(order[0], now_s)
            return tuple(order)

    def _rank(self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float) -> list[str]:
        names = [name for name in eligible if name in self._cluster.nodes]
        if len(names) < 2:
            return names
        scores = {name: self._score(request_class, key_name, name, now_s) for name in names}
        up = [name for name in names if self._nodes[name].down_until_s <= now_s]
        first = self._sample(request_class, up)
        first |= {name for name in up if (key_name, name) in self._loaded}
        return sorted(names, key=lambda name: (name not in up, name not in first, scores[name]))

    def order(self, names: Sequence[str], now_s: float) -> tuple[str, ...]:
        """The names as given, but those last that are down."""
        with self._lock:
            order = sorted(names, key=lambda name: self._nodes[name].down_until_s > now_s)
            self._probe(order[0], now_s)
            return tuple(order)

    def _probe(self, name: str, now_s: float) -> None:
        """If this node's time as down is over, one request finds out how it is; the others go elsewhere meanwhile."""
        state = self._nodes[name]
        if state.down_for_s and state.down_until_s <= now_s:
            state.probing, state.down_until_s = True, now_s + PROBE_S

    def _score(self, request_class: str, key_name: str, name: str, now_s: float) -> float:
        state = self._nodes[name]
        service = state.service_us.get(request_class) or self._table_service(request_class, name)
        queue = state.queue if now_s - state.seen_s <= SNAPSHOT_MAX_AGE_S else 0
        price = 0
        indexed = self._indexed
        if indexed is not None and (column := indexed.columns.get(name)) is not None:
            price = indexed.table.price_us[column]
        cold = 0 if (key_name, name) in self._loaded else COLD_CHARGE_US
        return (queue + state.outstanding + 1) * service + state.round_trip_us + price + cold

    def _table_service(self, request_class: str, name: str) -> float:
        indexed = self._indexed
        if indexed is not None:
            row, column = indexed.rows.get(request_class), indexed.columns.get(name)
            if row is not None and column is not None and (known := indexed.table.service_us[row][column]):
                return float(known)
        algo = ALGORITHMS.get(request_class.partition("/")[2])
        return float(algo.prior_us) if algo else 100.0

    def _sample(self, request_class: str, names: Sequence[str]) -> set[str]:
        """Two of the names, drawn without replacement by the table's weights (evenly where it has none)."""
        weights = [1000] * len(names)
        indexed = self._indexed
        if indexed is not None and (row := indexed.rows.get(request_class)) is not None:
            line = indexed.table.weights[row]
            weights = [line[column] if (column := indexed.columns.get(name)) is not None else 0 for name in names]
        chosen: set[str] = set()
        pool = [(name, weight) for name, weight in zip(names, weights, strict=True) if weight]
        while pool and len(chosen) < 2:
            pick = self._random.choices(pool, [weight for _, weight in pool])[0]
            chosen.add(pick[0])
            pool.remove(pick)
        return chosen
