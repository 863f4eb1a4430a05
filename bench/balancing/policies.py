"""The ways to choose a node: the project's own router, and its rivals. Each is one object for all clients of a run."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect
from collections.abc import Callable, Mapping
from itertools import accumulate
from random import Random

from msgspec.structs import replace

from balancing.events import Simulation
from engine.protocol.manifest import Cluster
from engine.protocol.routing import Router
from engine.protocol.snapshot import Newest, snapshot_codec
from engine.protocol.table import RoutingTable
from engine.protocol.wire import Load

__all__ = ["POLICIES", "Own", "Rival"]


class Source:
    """The one manifest of a simulated cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster


class Own:
    """A ``Router`` for each client, used as ``engine.client`` uses it."""

    hears = True

    def __init__(self, simulation: Simulation, *, priced: bool = True, slow_start: bool = True) -> None:
        source = Source(simulation.cluster)
        clients = range(len(simulation.scenario.crowd.zones))
        self.routers = [Router(source) for _ in clients]
        self._priced = priced
        self._slow_start = slow_start
        self._names = [node.spec.name for node in simulation.nodes]
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._classes, self._keys = simulation.arrivals.classes, simulation.arrivals.names
        self._eligible: dict[tuple[int, ...], tuple[str, ...]] = {}
        self._newest = [[Newest() for _ in self._names] for _ in clients]

    def pick(self, client: int, kind: int, key: int, holders: tuple[int, ...], now_s: float) -> int:
        """The shortest way first, then the ordinary one, as the client does."""
        eligible = self._eligible.get(holders)
        if eligible is None:
            eligible = self._eligible[holders] = tuple(self._names[at] for at in holders)
        router, request_class, name = self.routers[client], self._classes[kind], self._keys[key]
        direct = router.begin_direct(request_class, name, eligible, now_s)
        if direct is not None:
            return self._numbers[direct[0]]
        node = router.rank(request_class, name, eligible, now_s)[0]
        router.sent(node, now_s)
        return self._numbers[node]

    def reply(
        self, client: int, node: int, kind: int, key: int, queue: int, service_s: float, elapsed_s: float, now_s: float
    ) -> None:
        """Every reply says that the key is loaded now."""
        load = Load(queue, round(service_s * 1e6), True)
        self.routers[client].answered_direct(
            self._names[node], self._keys[key], self._classes[kind], load, elapsed_s, now_s
        )

    def lost(self, client: int, node: int, now_s: float) -> None:
        """The connection is gone."""
        self.routers[client].failed(self._names[node], now_s)

    def back(self, client: int, node: int, now_s: float) -> None:
        """The connection is there again."""
        router, name = self.routers[client], self._names[node]
        router.came_up(name, now_s)
        if not self._slow_start:
            router._nodes[name].slow_until_s = now_s

    def heard(self, client: int, node: int, publication: bytes, now_s: float) -> None:
        """A publication, taken in as ``engine.client.follower`` does."""
        snapshot = snapshot_codec.decode(publication)
        if self._newest[client][node].takes(snapshot):
            self.routers[client].heard(self._names[node], snapshot.queue, now_s, serving=snapshot.serving)

    def install(self, client: int, table: RoutingTable) -> None:
        """A table."""
        if not self._priced:
            table = replace(table, price=[0] * len(table.nodes))
        self.routers[client].install(table)


class Rival(ABC):
    """What the rivals have in common: own requests under way, and nodes that are known to be down."""

    hears = False

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._nodes = simulation.nodes
        self._random = Random(f"{simulation.seed}/rival")
        clients, nodes = len(simulation.scenario.crowd.zones), len(self._nodes)
        self.own = [[0] * nodes for _ in range(clients)]
        """Requests under way by client and node."""
        self._down = [[False] * nodes for _ in range(clients)]

    def pick(self, client: int, kind: int, key: int, holders: tuple[int, ...], now_s: float) -> int:
        """A choice among those that are up, if there are any."""
        down = self._down[client]
        up = tuple(at for at in holders if not down[at]) or holders
        chosen = self.choose(client, kind, key, up, now_s) if len(up) > 1 else up[0]
        self.own[client][chosen] += 1
        return chosen

    @abstractmethod
    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        """Which of the nodes, of which there are several; each rival has its own way."""

    def _two(self, up: tuple[int, ...]) -> tuple[int, int]:
        first = int(self._random.random() * len(up))
        second = int(self._random.random() * (len(up) - 1))
        return up[first], up[second + (second >= first)]

    def reply(
        self, client: int, node: int, kind: int, key: int, queue: int, service_s: float, elapsed_s: float, now_s: float
    ) -> None:
        """One less is under way."""
        self.own[client][node] -= 1

    def lost(self, client: int, node: int, now_s: float) -> None:
        """It is not asked until it is back."""
        self.own[client][node] -= 1
        self._down[client][node] = True

    def back(self, client: int, node: int, now_s: float) -> None:
        """It is asked again."""
        self._down[client][node] = False

    def heard(self, client: int, node: int, publication: bytes, now_s: float) -> None:  # noqa: B027 - rivals do not hear
        """Nothing to be learned."""

    def install(self, client: int, table: RoutingTable) -> None:  # noqa: B027 - most rivals go by no table
        """No use for it."""


class RoundRobin(Rival):
    """One after the other, by client and set of holders."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._turn: dict[tuple[int, tuple[int, ...]], int] = {}

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        turn = self._turn.get((client, up), client)
        self._turn[client, up] = turn + 1
        return up[turn % len(up)]


class Uniform(Rival):
    """Any of them."""

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        return up[int(self._random.random() * len(up))]


class LeastOwn(Rival):
    """Fewest of the client's own requests under way."""

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        own, random = self.own[client], self._random.random
        return min(up, key=lambda at: (own[at], random()))


class LeastStale(Rival):
    """Fewest requests at the node as of the last whole second, and those that the client sent since."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._second = -1
        self._told = [0] * len(self._nodes)
        self._since = [[0] * len(self._nodes) for _ in self.own]

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        if int(now_s) != self._second:
            self._second = int(now_s)
            self._told = [node.pending for node in self._nodes]
            self._since = [[0] * len(self._nodes) for _ in self.own]
        told, since, random = self._told, self._since[client], self._random.random
        chosen = min(up, key=lambda at: (told[at] + since[at], random()))
        since[chosen] += 1
        return chosen


class LeastPerfect(Rival):
    """Fewest requests at the node now and on their way to it, of whomever."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._all = [0] * len(self._nodes)

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        own, random = self.own, self._random.random
        return min(up, key=lambda at: (sum(line[at] for line in own), random()))


class TwoOwn(Rival):
    """Of two at random, the one with fewer own requests under way (Mitzenmacher 2001)."""

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        first, second = self._two(up)
        own = self.own[client]
        return first if own[first] <= own[second] else second


class TwoFresh(Rival):
    """Of two at random, the one with fewer requests in it at this moment: a probe that costs nothing."""

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        first, second = self._two(up)
        return first if self._nodes[first].pending <= self._nodes[second].pending else second


class PeakEwma(Rival):
    """Of two at random, the lower product of latency and own requests under way, as Finagle and Linkerd do.

    The latency rises at once to a higher one and decays with a time constant of 10 s, Finagle's default.
    """

    DECAY_S = 10.0

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._cost = [[0.0] * len(self._nodes) for _ in self.own]
        self._stamp = [[0.0] * len(self._nodes) for _ in self.own]

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        first, second = self._two(up)
        own, cost = self.own[client], self._cost[client]
        return first if cost[first] * (own[first] + 1) <= cost[second] * (own[second] + 1) else second

    def reply(
        self, client: int, node: int, kind: int, key: int, queue: int, service_s: float, elapsed_s: float, now_s: float
    ) -> None:
        """A sample of the latency."""
        self.own[client][node] -= 1
        cost = self._cost[client]
        if elapsed_s > cost[node]:
            cost[node] = elapsed_s
        else:
            weight = math.exp((self._stamp[client][node] - now_s) / self.DECAY_S)
            cost[node] = cost[node] * weight + elapsed_s * (1 - weight)
        self._stamp[client][node] = now_s


class Perfect(Rival):
    """Least expected completion by perfect knowledge: every request in a node and on its way, and every mean time."""

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        service, delay = self._simulation.service_s[kind], self._simulation.delay_s[client]
        site = self._simulation.scenario.site
        best, least = up[0], math.inf
        for at in up:
            node = self._nodes[at]
            completion = service[at] + 2 * delay[at]
            if len(node.due_s) >= node.workers or node.workers == 1:
                # What is on its way gets there first, or arrives with it.
                completion += node.backlog_s(now_s) / node.workers
            if node.cache.get(key, -1.0) <= now_s:
                completion += site.load_s + site.release_s + 2 * site.near_s
            if completion < least:
                best, least = at, completion
        return best


class Weighted(Rival):
    """The routing program's split as ratios: a node is drawn by the class's weights among the holders."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._drawn: dict[tuple[int, tuple[int, ...]], list[float]] = {}

    def install(self, client: int, table: RoutingTable) -> None:
        """There is a new split."""
        self._drawn = {}

    def choose(self, client: int, kind: int, key: int, up: tuple[int, ...], now_s: float) -> int:
        sums = self._drawn.get((kind, up))
        if sums is None:
            weights = self._simulation.weights[kind]
            sums = list(accumulate(weights[at] for at in up))
            if not sums[-1]:
                sums = [float(at + 1) for at in range(len(up))]
            self._drawn[kind, up] = sums
        return up[bisect(sums, self._random.random() * sums[-1])]


POLICIES: Mapping[str, Callable[[Simulation], Own | Rival]] = {
    "own": Own,
    "own, no prices": lambda simulation: Own(simulation, priced=False),
    "own, no slow start": lambda simulation: Own(simulation, slow_start=False),
    "round robin": RoundRobin,
    "random": Uniform,
    "least outstanding, own": LeastOwn,
    "least outstanding, 1 s stale": LeastStale,
    "least outstanding, perfect": LeastPerfect,
    "two choices, own": TwoOwn,
    "two choices, fresh probes": TwoFresh,
    "peak EWMA": PeakEwma,
    "LP weights as ratios": Weighted,
    "least completion, perfect": Perfect,
}
