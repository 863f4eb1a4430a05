"""The discrete events: requests, nodes and the network between them. It decides nothing: a policy and a balancer do.

Everything random is drawn beforehand (``arrivals``), and events of one instant happen in the order in which they were
scheduled, so that a seed gives the same course for ever. Times are in seconds since the start.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from balancing.arrivals import Arrivals, cluster_of, draw
from balancing.scenarios import NodeSpec, Scenario
from engine.client.follower import GATHER_S
from engine.protocol.manifest import Cluster
from engine.protocol.snapshot import Telling
from engine.protocol.table import RoutingTable

__all__ = ["Balancer", "Node", "Outcome", "Policy", "Simulation"]

NEVER = float("inf")
FRESH, SENT, REPLIED, DONE = range(4)
"""The stages of a request."""
RETRY_S = 0.05
"""When a client that found no holder up tries again."""


class Policy(Protocol):
    """What every client goes by; ``client`` says which one asks. Nodes and classes are numbers, keys too."""

    def pick(self, client: int, kind: int, key: int, holders: tuple[int, ...], now_s: float) -> int:
        """The node for a request, which counts as sent."""

    def reply(
        self, client: int, node: int, kind: int, key: int, queue: int, service_s: float, elapsed_s: float, now_s: float
    ) -> None:
        """A reply with its snapshot came."""

    def lost(self, client: int, node: int, now_s: float) -> None:
        """A request was lost with its connection, or refused because there is none."""

    def back(self, client: int, node: int, now_s: float) -> None:
        """There is a connection to the node again."""

    hears: bool
    """Whether its clients listen to what the nodes publish."""

    def heard(self, client: int, node: int, publication: bytes, now_s: float) -> None:
        """A node's publication was read."""

    def install(self, client: int, table: RoutingTable) -> None:
        """A routing table came."""


class Balancer(Protocol):
    """What decides beside the data path, once a tick."""

    def tick(self, number: int, simulation: Simulation) -> RoutingTable | None:
        """The table to publish; it may order moves at the simulation."""


class Node:
    """A node: a queue for its workers, and the keys it has loaded."""

    __slots__ = (
        "alive",
        "boot",
        "busy",
        "busy_us",
        "cache",
        "due_s",
        "gathering",
        "index",
        "noticed_s",
        "pairs",
        "pending",
        "queue",
        "requests",
        "spec",
        "told",
        "work_s",
        "workers",
    )

    def __init__(self, index: int, spec: NodeSpec, classes: int) -> None:
        self.index, self.spec, self.workers = index, spec, spec.workers
        self.alive, self.boot, self.noticed_s = True, 0, NEVER
        self.busy = self.pending = self.told = 0
        self.queue: deque[int] = deque()
        self.cache: OrderedDict[int, float] = OrderedDict()
        self.gathering: dict[int, list[int]] = {}
        self.requests = [0] * classes
        self.busy_us = [0] * classes
        self.pairs: dict[tuple[int, int], int] = {}
        """Requests by class and placement group, where the scenario wants them counted."""
        self.work_s = 0.0
        """What all requests that were sent to it and are not finished take by the means of their classes."""
        self.due_s: dict[int, tuple[float, float]] = {}
        """What runs: when it began, and what it takes by the mean."""

    @property
    def boot_id(self) -> bytes:
        """What ``hello`` would say."""
        return self.index.to_bytes(8, "big") + self.boot.to_bytes(8, "big")

    def backlog_s(self, now_s: float) -> float:
        """The expected work before a request that is sent now, with every request on its way known."""
        done = 0.0
        for began, takes in self.due_s.values():
            ran = now_s - began
            done += ran if ran < takes else takes
        return self.work_s - done


@dataclass(slots=True)
class Outcome:
    """What came of it, by request: latency (NaN for those that got no answer), node, how often it was served."""

    scenario: Scenario
    arrivals: Arrivals
    latency_s: NDArray[np.float64]
    node: NDArray[np.int64]
    served: NDArray[np.int64]
    attempts: NDArray[np.int64]
    waiting_at_end: int
    """Requests without an answer when the last one came."""
    tables: list[RoutingTable] = field(default_factory=list)
    moves: list[tuple[float, int, tuple[int, ...]]] = field(default_factory=list)

    def window(self, begin_s: float = -1.0, end_s: float = NEVER) -> NDArray[np.float64]:
        """The latencies of what came in a time, from the end of the warm-up if none is given."""
        begin_s = self.scenario.warmup_s if begin_s < 0 else begin_s
        times = self.arrivals.time_s
        return np.asarray(self.latency_s[(times >= begin_s) & (times < end_s)])

    @property
    def stable(self) -> bool:
        """Whether the requests without an answer at the end are fewer than come in a quarter of a second."""
        return self.waiting_at_end < 0.25 * len(self.arrivals) / self.scenario.seconds


class Simulation:
    """One run of a scenario: the same seed, the same outcome."""

    def __init__(
        self, scenario: Scenario, seed: int, arrivals: Arrivals | None = None, cluster: Cluster | None = None
    ) -> None:
        self.scenario, self.seed = scenario, seed
        self.cluster = cluster or cluster_of(scenario.site)
        self.arrivals = arrivals or draw(scenario, self.cluster, seed)
        site = scenario.site
        self.nodes = [Node(at, spec, len(self.arrivals.classes)) for at, spec in enumerate(site.nodes)]
        numbers = {node.spec.name: node.index for node in self.nodes}
        self.holders: list[tuple[int, ...]] = [
            tuple(numbers[name] for name in self.cluster.group_holders(group)[: site.shares])
            for group in range(site.groups)
        ]
        """By placement group, as the clients know them."""
        self.service_s: list[list[float]] = self.arrivals.service_s.tolist()
        self.delay_s = [[site.delay_s(zone, node.zone) for node in site.nodes] for zone in scenario.crowd.zones]
        self.weights: list[list[float]] = []
        """The balancer's split by class and node, for those that go by it: a table does not tell it."""
        self.now_s = 0.0
        self._between_s = [[site.delay_s(one.zone, other.zone) for other in site.nodes] for one in site.nodes]
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._group: list[int] = self.arrivals.group.tolist()
        self._arrived: list[float] = self.arrivals.time_s.tolist()
        self._client: list[int] = self.arrivals.client.tolist()
        self._kind: list[int] = self.arrivals.kind.tolist()
        self._key: list[int] = self.arrivals.key.tolist()
        self._noise: list[float] = self.arrivals.noise.tolist()
        size = len(self._arrived)
        self._stage = [FRESH] * size
        self._sent_s = [0.0] * size
        self._at = [-1] * size
        self._served = [0] * size
        self._attempts = [0] * size
        self._latency = [float("nan")] * size
        self._extra_s: dict[int, float] = {}
        self._telling = [Telling(node.boot_id) for node in self.nodes]
        self._unread: list[dict[int, bytes]] = [{} for _ in scenario.crowd.zones]
        """By client, the last publication of each node that it has not read."""
        self._reads_s = [0.0] * len(scenario.crowd.zones)
        self._counts_pairs = bool(scenario.hot)
        self._begun = 0
        self._done = 0
        self._moves: list[tuple[float, int, tuple[int, ...]]] = []
        self._tables: list[RoutingTable] = []
        self._policy: Policy
        self._balancer: Balancer | None = None
        if site.warm:
            self._warm_all()

    def run(self, policy: Policy, balancer: Balancer | None = None) -> Outcome:
        """Play it. Once, for the state of the nodes is used up."""
        self._policy, self._balancer = policy, balancer
        self._schedule_all()
        events, arrived, size = self._events, self._arrived, len(self._arrived)
        waiting_at_end, following = 0, arrived[0] if size else NEVER
        send, end = self._send, float(self.scenario.seconds)
        while True:
            if events and events[0][0] <= following:
                self.now_s, _, act, given = heappop(events)
                if self.now_s >= end and self._begun == size and self._done == size:
                    break
                act(*given)
            elif self._begun < size:
                self.now_s = following
                request = self._begun
                self._begun += 1
                following = arrived[request + 1] if self._begun < size else NEVER
                send(request)
                if self._begun == size:
                    waiting_at_end = size - self._done
            else:
                break
        return Outcome(
            self.scenario,
            self.arrivals,
            np.array(self._latency),
            np.array(self._at),
            np.array(self._served),
            np.array(self._attempts),
            waiting_at_end,
            self._tables,
            self._moves,
        )

    def later(self, delay_s: float, act: Callable[..., None], *given: Any) -> None:
        """Have something happen."""
        heappush(self._events, (self.now_s + delay_s, next(self._order), act, given))

    def move(self, group: int, holders: Sequence[int]) -> None:
        """Have a group's holders be these when a move's time is over; the new ones load what the old ones have."""
        self.later(self.scenario.move_s, self._moved, group, tuple(holders))

    # --- a request's way ---

    def _send(self, request: int) -> None:
        client, key = self._client[request], self._key[request]
        holders = self.holders[self._group[key]]
        kind, now_s = self._kind[request], self.now_s
        for _ in range(len(holders) + 1):
            number = self._policy.pick(client, kind, key, holders, now_s)
            node = self.nodes[number]
            if node.alive or now_s < node.noticed_s:
                break
            self._policy.lost(client, number, now_s)
        else:
            self.later(RETRY_S, self._send, request)
            return
        self._at[request], self._sent_s[request], self._stage[request] = number, now_s, SENT
        self._attempts[request] += 1
        node.work_s += self.service_s[kind][number]
        heappush(
            self._events,
            (now_s + self.delay_s[client][number], next(self._order), self._reach, (request, node, node.boot)),
        )

    def _reach(self, request: int, node: Node, boot: int) -> None:
        if node.boot != boot or not node.alive:
            return
        node.pending += 1
        key = self._key[request]
        loaded_until = node.cache.get(key)
        if loaded_until is not None and loaded_until > self.now_s:
            node.cache.move_to_end(key)
            if node.busy < node.workers:
                self._start(request, node)
            else:
                node.queue.append(request)
            return
        waiting = node.gathering.get(key)
        if waiting is not None:
            waiting.append(request)
            return
        node.gathering[key] = [request]
        self.later(self._gathering_s(node, key), self._gathered, key, node, node.boot)

    def _gathering_s(self, node: Node, key: int) -> float:
        """The way to the last of the quickest holders that are asked and back, and the release of the share."""
        site = self.scenario.site
        holders = self.holders[self._group[key]]
        others = sorted(self._between_s[node.index][at] for at in holders if at != node.index and self.nodes[at].alive)
        needed = site.threshold - (node.index in holders)
        if needed > len(others):
            return RETRY_S
        return 2 * others[needed - 1] + site.release_s if needed else 0.0

    def _gathered(self, key: int, node: Node, boot: int) -> None:
        if node.boot != boot:
            return
        self._load(node, key)
        first = True
        for request in node.gathering.pop(key):
            if first:
                # Loading takes the token's time, so it is done by a worker, with the request that it is for.
                first = False
                self._extra_s[request] = self.scenario.site.load_s
            if node.busy < node.workers:
                self._start(request, node)
            else:
                node.queue.append(request)

    def _load(self, node: Node, key: int) -> None:
        node.cache[key] = self.now_s + self.scenario.site.cache_ttl_s
        node.cache.move_to_end(key)
        if len(node.cache) > self.scenario.site.cache_entries:
            node.cache.popitem(last=False)

    def _start(self, request: int, node: Node) -> None:
        node.busy += 1
        mean_s = self.service_s[self._kind[request]][node.index]
        service_s = mean_s * self._noise[request]
        takes_s = service_s
        if request in self._extra_s:
            takes_s += self._extra_s.pop(request)
        node.due_s[request] = (self.now_s, mean_s)
        heappush(
            self._events,
            (self.now_s + takes_s, next(self._order), self._finish, (request, node, node.boot, service_s)),
        )

    def _finish(self, request: int, node: Node, boot: int, took_s: float) -> None:
        if node.boot != boot:
            return
        kind = self._kind[request]
        node.busy -= 1
        node.pending -= 1
        _, mean_s = node.due_s.pop(request)
        node.work_s -= mean_s
        node.requests[kind] += 1
        node.busy_us[kind] += round(took_s * 1e6)
        if self._counts_pairs:
            pair = kind, self._group[self._key[request]]
            node.pairs[pair] = node.pairs.get(pair, 0) + 1
        self._served[request] += 1
        self._stage[request] = REPLIED
        heappush(
            self._events,
            (
                self.now_s + self.delay_s[self._client[request]][node.index],
                next(self._order),
                self._replied,
                (request, node.index, node.pending, took_s),
            ),
        )
        if node.queue:
            self._start(node.queue.popleft(), node)

    def _replied(self, request: int, node: int, queue: int, service_s: float) -> None:
        now_s = self.now_s
        self._stage[request] = DONE
        self._done += 1
        self._latency[request] = now_s - self._arrived[request]
        self._policy.reply(
            self._client[request],
            node,
            self._kind[request],
            self._key[request],
            queue,
            service_s,
            now_s - self._sent_s[request],
            now_s,
        )

    # --- what else happens ---

    def _schedule_all(self) -> None:
        scenario = self.scenario
        for death in scenario.deaths:
            self.later(death.at_s, self._die, self.nodes[death.node])
            if death.back_s < NEVER:
                self.later(death.back_s, self._come_back, self.nodes[death.node])
        for flush in scenario.flushes:
            self.later(flush.at_s, self._flush)
        if self._balancer is not None:
            self._tick(0)
        if scenario.publishes and self._policy.hears:
            every_s = Telling.interval_s(len(scenario.crowd.zones))
            for node in self.nodes:
                # They do not look all at one time.
                self.later(every_s * (node.index + 1) / len(self.nodes), self._publish, node, every_s)

    def _tick(self, number: int) -> None:
        assert self._balancer is not None
        table = self._balancer.tick(number, self)
        if table is not None:
            self._tables.append(table)
            if number:
                self.later(self.scenario.decision_s, self._install, table)
            else:
                self._install(table)
        if self.now_s + self.scenario.tick_s < self.scenario.seconds:
            self.later(self.scenario.tick_s, self._tick, number + 1)

    def _install(self, table: RoutingTable) -> None:
        for client in range(len(self.scenario.crowd.zones)):
            self._policy.install(client, table)

    def _publish(self, node: Node, every_s: float) -> None:
        said = self._telling[node.index].due(node.pending, True, self.now_s) if node.alive else None
        if said is not None:
            for delay_s in sorted({line[node.index] for line in self.delay_s}):
                self.later(delay_s, self._published, node.index, delay_s, said)
        if self.now_s < self.scenario.seconds:
            self.later(every_s, self._publish, node, every_s)

    def _published(self, node: int, delay_s: float, said: bytes) -> None:
        for client, line in enumerate(self.delay_s):
            if line[node] != delay_s:
                continue
            unread = self._unread[client]
            if not unread:
                self.later(max(0.0, self._reads_s[client] - self.now_s), self._read, client)
            unread[node] = said

    def _read(self, client: int) -> None:
        """A client reads what came, the last of each node, and pauses after that."""
        unread, self._unread[client] = self._unread[client], {}
        self._reads_s[client] = self.now_s + GATHER_S
        for node, said in unread.items():
            self._policy.heard(client, node, said, self.now_s)

    def _die(self, node: Node) -> None:
        node.alive, node.noticed_s = False, self.now_s + self.scenario.detection_s
        node.boot += 1
        self._telling[node.index] = Telling(node.boot_id)
        node.queue.clear()
        node.cache.clear()
        node.gathering.clear()
        node.due_s.clear()
        node.busy = node.pending = 0
        node.requests, node.busy_us, node.pairs = [0] * len(node.requests), [0] * len(node.busy_us), {}
        self.later(self.scenario.detection_s, self._notice, node)

    def _notice(self, node: Node) -> None:
        """The clients' connections to a node are found broken: what was under way there is asked of others."""
        again = [
            request
            for request in range(self._begun)
            if self._at[request] == node.index and self._stage[request] == SENT
        ]
        node.work_s = 0.0
        for request in again:
            self._policy.lost(self._client[request], node.index, self.now_s)
        for request in again:
            self._send(request)

    def _come_back(self, node: Node) -> None:
        node.alive, node.noticed_s = True, NEVER
        for client in range(len(self.scenario.crowd.zones)):
            self._policy.back(client, node.index, self.now_s)

    def _flush(self) -> None:
        for node in self.nodes:
            node.cache.clear()

    def _moved(self, group: int, holders: tuple[int, ...]) -> None:
        before = self.holders[group]
        self._moves.append((self.now_s, group, holders))
        for key in np.flatnonzero(self.arrivals.group == group).tolist():
            if any(key in self.nodes[at].cache for at in before):
                for at in holders:
                    if at not in before and self.nodes[at].alive:
                        self._load(self.nodes[at], key)
        self.holders[group] = holders

    def _warm_all(self) -> None:
        """Every holder has its keys loaded, the most popular ones last."""
        for key in range(len(self._group) - 1, -1, -1):
            for at in self.holders[self._group[key]]:
                self._load(self.nodes[at], key)
