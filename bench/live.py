"""Plays a scenario of the simulator on a real cluster: node processes, SoftHSM tokens made as slow as is said, clients.

Each policy gets the same requests at the same times as in the simulator, and where a rival chooses the node the
simulator's own rival does, inside the real client (``ChosenRouter``): connections, retries and what is learned of nodes
that fail are the client's. A latency counts from when a request was due, not from when a thread was free for it.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from balancing.arrivals import Arrivals
from balancing.events import Outcome, Simulation
from balancing.measured import CLASS, Measured, poisson, site_of, spaced, staged
from balancing.policies import POLICIES, Rival
from balancing.scenarios import Scenario, Site
from numpy.typing import NDArray
from resilience import gone
from rig import open_loop

import engine
from engine import Engine, PolicyRule
from engine.client.client import load_settings
from engine.protocol._nodestate import NodeState
from engine.protocol.manifest import ClusterSource
from engine.protocol.routing import Router
from engine.protocol.wire import Load

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "shim"))

from shim_cluster import ShimCluster

__all__ = ["NODES", "OWN", "THRESHOLD", "ChosenRouter", "Live", "Played"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

OWN: Final = "own"
NODES: Final = 5
THRESHOLD: Final = 3
THREADS: Final = 12
"""Requests of one client that are under way at a time; more wait for a thread, which their latency tells."""
ALGORITHM: Final = CLASS.partition("/")[2]
PACE: Final = 1.5
"""From one request to the next at a node where none is to wait, in times of service."""
SETTLE_S: Final = 0.7
"""The first part of what is measured, in which connections are made, does not count."""
START_S: Final = 0.3
"""From the start of the threads to the first request."""


class Notes:
    """What the routers of a play are told: which node answered a thread last, in what service, and what failed when."""

    def __init__(self) -> None:
        self.missed_s: list[float] = []
        self._last = threading.local()

    def answered(self, node: str, service_us: int) -> None:
        """By the thread that asked."""
        self._last.answer = node, service_us

    def take(self) -> tuple[str, int]:
        """What answered this thread since it was asked for that; no node where the router was not told of each answer.

        While one request follows another to the same node, it is told of many of them as one.
        """
        found: tuple[str, int] = self._last.__dict__.pop("answer", ("", 0))
        return found


class NotingRouter(Router):
    """The client's router, which notes what it is told."""

    def __init__(self, source: ClusterSource, *, notes: Notes) -> None:
        super().__init__(source)
        self._notes = notes

    def answered_direct(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_s: float, now_s: float
    ) -> None:
        """An answer by the shortest way."""
        self._notes.answered(node, load.service_us)
        super().answered_direct(node, key_name, request_class, load, elapsed_s, now_s)

    def answered(
        self, node: str, key_name: str, request_class: str, load: Load, elapsed_us: float, now_s: float
    ) -> None:
        """An answer by another way."""
        self._notes.answered(node, load.service_us)
        super().answered(node, key_name, request_class, load, elapsed_us, now_s)

    def failed(self, node: str, now_s: float) -> None:
        """No answer."""
        self._notes.missed_s.append(now_s)
        super().failed(node, now_s)


@dataclass(frozen=True, slots=True)
class Playing:
    """What becomes of each request, by number."""

    notes: Notes
    arrivals: Arrivals
    numbers: Mapping[str, int]
    latency_s: FloatArray
    service_s: FloatArray
    node: IntArray


class ChosenRouter(NotingRouter):
    """The same, but a rival of the simulator chooses which of the nodes that are up is asked first."""

    def __init__(
        self, source: ClusterSource, *, notes: Notes, client: int, rival: Rival, numbers: Mapping[str, int]
    ) -> None:
        super().__init__(source, notes=notes)
        self._client, self._rival, self._numbers = client, rival, numbers
        self._before = threading.local()
        """What a thread's request was to go to that finds no connection there, and asks for another way."""

    def begin_direct(
        self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float
    ) -> tuple[str, float, NodeState] | None:
        """As the router's, and each choice is for one request."""
        with self._lock:
            known, view = self._keys.get(key_name), self._view(eligible)
            if known is None:
                return None
            self._before.node = chosen = self._chosen(view, now_s)
            if chosen not in known.nodes or chosen.down_for_s:
                return None
            self._sent(chosen, now_s)
            self.changes += 1
            return chosen.name, self._patience_s(chosen, request_class, False), chosen

    def rank(self, request_class: str, key_name: str, eligible: Sequence[str], now_s: float) -> tuple[str, ...]:
        """The choice first, and those last that are down."""
        with self._lock:
            view = self._view(eligible)
            chosen = self._before.__dict__.pop("node", None)
            if chosen not in view or chosen.down_until_s > now_s:
                chosen = self._chosen(view, now_s)
            others = sorted((each for each in view if each is not chosen), key=lambda each: each.down_until_s > now_s)
            self._probe(chosen, now_s)
            return (chosen.name, *(each.name for each in others))

    def _chosen(self, view: Sequence[NodeState], now_s: float) -> NodeState:
        up = [state for state in view if state.down_until_s <= now_s] or list(view)
        own = self._rival.own[self._client]
        by_number = {self._numbers[state.name]: state for state in up}
        for number, state in by_number.items():
            own[number] = state.outstanding
        numbers = tuple(by_number)
        alone = len(numbers) == 1
        return by_number[numbers[0] if alone else self._rival.choose(self._client, 0, 0, numbers, now_s)]


@dataclass(frozen=True, slots=True)
class Played:
    """What came of a play: latencies and nodes, service where it is known (NaN elsewhere), when a node was missed."""

    outcome: Outcome
    service_s: FloatArray
    missed_s: tuple[float, ...]


class Live:
    """The cluster, its clients and keys. ``base_s`` is what each token sleeps for a use, beside what it computes."""

    def __init__(self, folder: Path, clients: int, keys: int, base_s: float) -> None:
        names = tuple(f"client{number}" for number in range(clients))
        self._stack = contextlib.ExitStack()
        try:
            self.cluster = ShimCluster(
                nodes=NODES,
                threshold=THRESHOLD,
                path=folder / "kq",
                clients=names,
                rules=[PolicyRule(name, "*", ["*"]) for name in names],
                start_timeout_s=180.0,
            )
            self._stack.enter_context(self.cluster)
            self.kq: Engine = self._stack.enter_context(engine.connect(self.cluster.client_config))
            self.keys = tuple(f"key{number}" for number in range(keys))
            self._digest = hashlib.sha256(b"what is signed").digest()
            self._proofs = {}
            for name in self.keys:
                self.kq.create_key(name, ALGORITHM, threshold=THRESHOLD, shares=NODES, timeout=60)
                self._proofs[name] = self.kq.sign(name, digest=self._digest)
        except BaseException:
            self._stack.close()
            raise
        self.base_s = base_s
        self.slow()

    def close(self) -> None:
        """End everything."""
        self._stack.close()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def slow(self, times: Mapping[str, float] | None = None) -> None:
        """Have tokens sleep, those named here so many times as long as the others."""
        for name, shim in self.cluster.shims.items():
            shim.delay("C_Verify", self.base_s * (times or {}).get(name, 1.0))

    def use(self, kq: Engine, name: str) -> None:
        """One request: whether the key made this signature. It costs the token little but what it sleeps."""
        kq.verify(name, None, self._proofs[name], digest=self._digest, timeout=10.0)

    # --- playing ---

    @contextlib.contextmanager
    def clients(
        self, policy: str, simulation: Simulation, numbers: Mapping[str, int], notes: Notes
    ) -> Iterator[list[Engine]]:
        """Clients that choose by the policy, and know that every node has every key loaded."""
        made: list[Callable[[ClusterSource], Router]]
        if policy == OWN:
            made = [partial(NotingRouter, notes=notes) for _ in self.cluster.clients]
        else:
            rival = POLICIES[policy](simulation)
            assert isinstance(rival, Rival)
            choosing = partial(ChosenRouter, notes=notes, rival=rival, numbers=numbers)
            made = [partial(choosing, client=at) for at in range(len(self.cluster.clients))]
        with contextlib.ExitStack() as stack:
            engines = []
            for router, name in zip(made, self.cluster.clients, strict=True):
                settings = replace(load_settings(self.cluster.client_config_of(name)), router=router)
                engines.append(stack.enter_context(engine.connect(settings)))
            for each in engines:
                for key in self.keys:
                    if len(each.prewarm(key)) < NODES:
                        raise RuntimeError(f"{key} is not loaded everywhere")
            yield engines

    def play(self, policy: str, scenario: Scenario, arrivals: Arrivals, seed: int) -> Played:
        """One policy; a node that dies in the scenario is killed, and started again afterwards."""
        size, notes = len(arrivals), Notes()
        numbers = {name: number for number, name in enumerate(self.cluster.nodes)}
        simulation = Simulation(scenario, seed, arrivals, self.cluster.cluster)
        playing = Playing(notes, arrivals, numbers, np.full(size, np.nan), np.full(size, np.nan), np.full(size, -1))
        with self.clients(policy, simulation, numbers, notes) as engines, contextlib.ExitStack() as stack:
            gc.collect()
            start_s = time.monotonic() + START_S
            loops = stack.enter_context(ThreadPoolExecutor(len(engines)))
            running = []
            for client, kq in enumerate(engines):
                mine = np.flatnonzero(arrivals.client == client).tolist()
                due = [(start_s + float(arrivals.time_s[at]), at) for at in mine]
                running.append(loops.submit(open_loop, due, partial(self._act, kq, playing), THREADS))
            for flush in scenario.flushes:
                time.sleep(max(0.0, start_s + flush.at_s - time.monotonic()))
                self.kq.flush()
            for death in scenario.deaths:
                time.sleep(max(0.0, start_s + death.at_s - time.monotonic()))
                stack.enter_context(gone(self.cluster, self.kq, self.cluster.nodes[death.node], "killed"))
            for each in running:
                each.result()
            missed_s = tuple(sorted(at - start_s for at in notes.missed_s))
        answered = (~np.isnan(playing.latency_s)).astype(np.int64)
        lost = int(size - answered.sum())
        outcome = Outcome(scenario, arrivals, playing.latency_s, playing.node, answered, answered, lost)
        return Played(outcome, playing.service_s, missed_s)

    def _act(self, kq: Engine, playing: Playing, due_s: float, at: int) -> None:
        playing.notes.take()
        with contextlib.suppress(engine.EngineError):
            self.use(kq, playing.arrivals.names[playing.arrivals.key[at]])
            playing.latency_s[at] = time.monotonic() - due_s
            node, service_us = playing.notes.take()
            if node:
                playing.node[at], playing.service_s[at] = playing.numbers[node], service_us * 1e-6

    # --- measuring ---

    # Requests follow each other at an even pace, each node in its turn, so that none waits for another one.

    def service(self, slow: str, times: float, seconds: int) -> tuple[Measured, Measured]:
        """Service with all tokens alike, and with one that sleeps so many times as long; the charge for a cold key."""
        self.slow()
        cold_s = self._cold_s()
        alike = self._service(seconds, PACE * self.base_s / NODES)
        self.slow({slow: times})
        one_slow = self._service(seconds, PACE * times * self.base_s / NODES)
        return replace(alike, cold_s=cold_s), replace(one_slow, cold_s=cold_s)

    def way_s(self, rate: float, seconds: int) -> float:
        """What a request takes beside its service, a late start included, with all tokens alike, at ``rate`` a second.

        It is not the same at each rate: the longer processors and threads sleep the more slowly they wake.
        """
        self.slow()
        played = self._evenly(seconds, 1 / rate)
        return float(
            np.nanmean((played.outcome.latency_s - played.service_s)[played.outcome.arrivals.time_s >= SETTLE_S])
        )

    def _service(self, seconds: int, every_s: float) -> Measured:
        played = self._evenly(seconds, every_s)
        means, noise = {}, []
        for number, name in enumerate(self.cluster.nodes):
            found = played.service_s[played.outcome.node == number]
            means[name] = float(found.mean())
            noise += (found / found.mean()).tolist()
        return Measured(means, tuple(noise))

    def _evenly(self, seconds: int, every_s: float) -> Played:
        guess = Measured(dict.fromkeys(self.cluster.nodes, self.base_s), (1.0,))
        scenario = self.staged("measuring", guess, seconds, SETTLE_S)
        return self.play("round robin", scenario, spaced(scenario, self.cluster.cluster, self.keys, guess, every_s), 1)

    def _cold_s(self) -> float:
        """What the first use of a key takes more than the next one, where no node has it loaded and no client knows."""
        more = []
        with engine.connect(self.cluster.client_config_of(self.cluster.clients[1])) as kq:
            for key in self.keys:
                self.use(kq, key)
            self.kq.flush()
            for key in self.keys:
                begun = time.monotonic()
                self.use(kq, key)
                loaded = time.monotonic()
                self.use(kq, key)
                more.append(2 * loaded - begun - time.monotonic())
        return statistics.fmean(more)

    # --- what is played ---

    def site(self, measured: Measured) -> Site:
        """This cluster as the simulator takes it."""
        return site_of(self.cluster.cluster, self.cluster.nodes, measured)

    def staged(self, name: str, measured: Measured, seconds: int, warmup_s: float) -> Scenario:
        """A scenario on this cluster."""
        return staged(name, self.site(measured), len(self.cluster.clients), seconds, warmup_s)

    def arrivals(
        self, scenario: Scenario, measured: Measured, rate: float, seed: int, keys: int | None = None
    ) -> Arrivals:
        """Poisson arrivals at ``rate`` a second for it, over all keys or the first few."""
        return poisson(scenario, self.cluster.cluster, self.keys[:keys], measured, rate, seed)
