"""The balancer of a simulation: the project's history, forecast, programs and table, no model of them.

The nodes' counters come to it as their statistics do, once a tick. Moves of placement groups are planned as
``balancer.planner`` does (``"predictive"``): problem, program and agenda are its own. Beside that there are plans every
30 s alone (``"periodic"``), plans each tick by what was counted last (``"reactive"``), and none.
"""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from balancer.agenda import Agenda
from balancer.bank import Outlook
from balancer.forecast import Forecast, ForecastState, predict_load
from balancer.history import History, HistorySnapshot
from balancer.optimizer import PlacementSolver, RoutingSolver, optimize_assignment, optimize_placement
from balancer.placement import holders_wanted
from balancer.plan import TableStamp, assignment_problem, generate_routing_table
from balancer.planner import placement_problem
from balancing.events import Node, Simulation
from engine.protocol.requests import PAIRS_TOLD, ClassCount, NodeStats
from engine.protocol.table import RoutingTable

__all__ = ["Loop"]

TABLE_MS = 60_000
SOLVER_S = 5.0
WARM_UP_TICKS = 30
"""Ticks before the start in which the forecasts are fitted, few at a time as ever."""
COUNTED = 2
"""Ticks that reactive moves go by: one alone is noisy, more are late."""


class Loop:
    """The control loop, fed with the simulation's nodes."""

    def __init__(self, simulation: Simulation, moves: str = "") -> None:
        scenario, arrivals = simulation.scenario, simulation.arrivals
        self._moves = moves
        self._names = tuple(node.spec.name for node in simulation.nodes)
        self._tick_ms = round(scenario.tick_s * 1000)
        self._past = len(arrivals.past)
        self._history = History(self._names, tick_ms=self._tick_ms, ticks=max(self._past + 2, 600))
        self._capacity = np.array([float(node.workers) for node in simulation.nodes])
        self._lanes = [node.workers for node in simulation.nodes]
        self._classes = arrivals.classes
        self._base = np.zeros((len(self._classes), len(self._names)), dtype=np.int64)
        self._busy = np.zeros_like(self._base)
        self._base_pairs: list[dict[tuple[int, int], int]] = [{} for _ in self._names]
        self._state: ForecastState | None = None
        self._routing, self._placement = RoutingSolver(), PlacementSolver()
        self._holders = dict(enumerate(simulation.holders))
        self._moving: dict[int, float] = {}
        self._agenda = Agenda(0.0, urgent=moves == "predictive")
        ways_s = 2 * np.array(simulation.delay_s)
        self._network_us = np.round(ways_s.mean(axis=0) * 1e6).astype(np.int64).tolist()
        self._learn(simulation)

    def _learn(self, simulation: Simulation) -> None:
        """What was counted before the start, each tick by one node, in turn."""
        arrivals = simulation.arrivals
        for tick in range(self._past + 1):
            if tick:
                at = tick % len(self._names)
                counted = arrivals.past[tick - 1]
                self._base[:, at] += counted
                self._busy[:, at] += np.round(counted * arrivals.service_s[:, at] * 1e6).astype(np.int64)
                pairs = self._base_pairs[at]
                for kind, place in np.argwhere(arrivals.past_warm[tick - 1]).tolist():
                    pair = kind, arrivals.warm[place]
                    pairs[pair] = pairs.get(pair, 0) + int(arrivals.past_warm[tick - 1, kind, place])
            self._history.observe(tick, {node.spec.name: self._stats(node) for node in simulation.nodes})
            if simulation.scenario.hot and self._past - tick < WARM_UP_TICKS:
                self._state = predict_load(self._history.snapshot(), self._state).state

    def _stats(self, node: Node) -> NodeStats:
        requests, busy, pairs = np.array(node.requests), np.array(node.busy_us), dict(node.pairs)
        if not node.boot:  # one that began anew has forgotten what was before
            requests, busy = requests + self._base[:, node.index], busy + self._busy[:, node.index]
            for pair, count in self._base_pairs[node.index].items():
                pairs[pair] = pairs.get(pair, 0) + count
        most = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:PAIRS_TOLD]
        return NodeStats(
            boot=node.boot_id,
            uptime_ms=0,
            queue=node.pending,
            classes=[
                ClassCount(name, int(count), 0, int(us))
                for name, count, us in zip(self._classes, requests, busy, strict=True)
            ],
            pairs=[(kind, group, pairs[kind, group]) for kind, group in most],
            caches=[],
            cluster_serial=1,
            hot_window_ms=0,
            hot=[],
            network_us=self._network_us[node.index],
        )

    def tick(self, number: int, simulation: Simulation) -> RoutingTable | None:
        """Observe and decide."""
        if number:
            reports = {node.spec.name: self._stats(node) for node in simulation.nodes if node.alive}
            self._history.observe(self._past + number, reports)
        snapshot = self._history.snapshot()
        forecast = predict_load(snapshot, self._state)
        self._state = forecast.state
        problem = replace(assignment_problem(snapshot, forecast), capacity=self._capacity)
        assignment = optimize_assignment(problem, time_limit_s=SOLVER_S, solver=self._routing)
        rows = {name: row for row, name in enumerate(snapshot.classes)}
        simulation.weights = [
            assignment.weights[rows[name]].tolist() if name in rows else [1.0] * len(self._names)
            for name in self._classes
        ]
        if self._moves:
            self._move(simulation, snapshot, forecast)
        now_ms = number * self._tick_ms
        stamp = TableStamp(1, number + 1, now_ms, now_ms + TABLE_MS)
        table = generate_routing_table(snapshot, forecast, assignment, stamp)
        return msgspec.structs.replace(table, lanes=self._lanes)

    # --- moves ---

    def _move(self, simulation: Simulation, snapshot: HistorySnapshot, forecast: Forecast) -> None:
        """Plan from where the groups are when today's moves are over, and order what is new; one move a group."""
        now_s, site = simulation.now_s, simulation.scenario.site
        self._moving = {group: end for group, end in self._moving.items() if end > now_s}
        known = _as_counted(snapshot, forecast) if self._moves == "reactive" else forecast
        shape = site.threshold, site.shares
        asked = placement_problem(snapshot, known, simulation.cluster, self._holders, shape)
        if asked is None:
            return
        problem, groups = asked
        shares = np.full(len(groups), site.shares, dtype=np.int32)
        wanted = holders_wanted(
            problem.load,
            problem.service_us,
            self._capacity,
            problem.up,
            problem.domain,
            problem.threshold,
            shares,
            problem.today,
        )
        # A planner takes every node for one lane.
        problem = replace(problem, capacity=self._capacity, wanted=wanted)
        if self._moves != "reactive" and not self._agenda.due(problem, groups, now_s):
            return
        plan = optimize_placement(problem, solver=self._placement)
        for row in sorted({step.group for step in plan.steps}):
            group = groups[row]
            if group not in self._moving:
                self._holders[group] = plan.holders[row]
                self._moving[group] = now_s + simulation.scenario.move_s
                simulation.move(group, plan.holders[row])


def _as_counted(snapshot: HistorySnapshot, forecast: Forecast) -> Forecast:
    """What was counted last, in the place of what is to come."""

    def lately(outlook: Outlook, counts: NDArray[np.float64]) -> Outlook:
        rates = counts[-COUNTED:].mean(axis=0) * 1000 / snapshot.tick_ms
        return replace(outlook, p90=np.repeat(rates[:, None], outlook.p90.shape[1], axis=1))

    return replace(
        forecast,
        outlook=lately(forecast.outlook, snapshot.counts),
        pair_outlook=lately(forecast.pair_outlook, snapshot.pair_counts),
        slow=None,
        slow_pairs=None,
    )
