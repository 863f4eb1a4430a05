"""The balancer of a simulation: the project's history, forecast, programs and table, no model of them.

The nodes' counters come to it as their statistics do, once a tick.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np

from balancer.forecast import predict_load
from balancer.history import History
from balancer.optimizer import optimize_assignment
from balancer.plan import TableStamp, assignment_problem, generate_routing_table
from balancing.events import Simulation
from engine.protocol.requests import ClassCount, NodeStats
from engine.protocol.table import RoutingTable

__all__ = ["Loop"]

TABLE_MS = 60_000
SOLVER_S = 5.0


class Loop:
    """The control loop, fed with the simulation's nodes."""

    def __init__(self, simulation: Simulation) -> None:
        scenario, arrivals = simulation.scenario, simulation.arrivals
        self._names = tuple(node.spec.name for node in simulation.nodes)
        self._classes = arrivals.classes
        tick_ms = round(scenario.tick_s * 1000)
        past = len(arrivals.past)
        self._history = History(self._names, tick_ms=tick_ms, ticks=max(past + 2, 600))
        self._past = past
        self._lanes = [node.workers for node in simulation.nodes]
        self._capacity = np.array([float(node.workers) for node in simulation.nodes])
        self._tick_ms = tick_ms
        self._groups: dict[int, int] = {}
        self._base = np.zeros((len(self._classes), len(self._names)), dtype=np.int64)
        self._busy = np.zeros_like(self._base)
        self._learn(arrivals.past, arrivals.service_s)

    def _learn(self, past: np.ndarray, service_s: np.ndarray) -> None:
        """What was counted before the start, spread evenly over the nodes."""
        nodes = len(self._names)
        for tick in range(self._past + 1):
            if tick:
                counted = past[tick - 1].astype(np.int64)
                even = counted[:, None] // nodes + (np.arange(nodes)[None, :] < counted[:, None] % nodes)
                self._base += even
                self._busy += np.round(even * service_s * 1e6).astype(np.int64)
            self._history.observe(tick, {name: self._stats(at, None) for at, name in enumerate(self._names)})

    def _stats(self, at: int, simulation: Simulation | None) -> NodeStats:
        node = simulation.nodes[at] if simulation else None
        boot = node.boot if node else 0
        requests, busy = self._base[:, at], self._busy[:, at]
        groups = self._groups if at == 0 else {}
        if boot:  # it began anew, and has forgotten what was before
            requests, busy, groups = np.zeros_like(requests), np.zeros_like(busy), {}
        if node is not None:
            requests, busy = requests + np.array(node.requests), busy + np.array(node.busy_us)
            groups = {group: groups.get(group, 0) + node.groups.get(group, 0) for group in {*groups, *node.groups}}
        return NodeStats(
            boot=at.to_bytes(8, "big") + boot.to_bytes(8, "big"),
            uptime_ms=0,
            queue=node.pending if node else 0,
            classes=[
                ClassCount(name, int(count), 0, int(us))
                for name, count, us in zip(self._classes, requests, busy, strict=True)
            ],
            groups=sorted(groups.items()),
            caches=[],
            cluster_serial=1,
        )

    def tick(self, number: int, simulation: Simulation) -> RoutingTable | None:
        """Observe and decide."""
        if number:
            reports = {node.spec.name: self._stats(node.index, simulation) for node in simulation.nodes if node.alive}
            self._history.observe(self._past + number, reports)
        now_ms = number * self._tick_ms
        snapshot = self._history.snapshot()
        forecast = predict_load(snapshot)
        problem = replace(assignment_problem(snapshot, forecast), capacity=self._capacity)
        assignment = optimize_assignment(problem, time_limit_s=SOLVER_S)
        simulation.split = dict(zip(snapshot.classes, assignment.weights.tolist(), strict=True))
        stamp = TableStamp(1, number + 1, now_ms, now_ms + TABLE_MS)
        table = generate_routing_table(snapshot, forecast, assignment, stamp)
        return msgspec.structs.replace(table, lanes=self._lanes)
