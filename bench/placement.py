"""Owns the figures of the balancer's two programs, of its tables and of a whole tick.

``bench/control_loop.py --only programs`` runs it. The peer of a warm solve is the cold one of the
same problem in the same run, and of building a program by arrays it is building it row by row. Times are medians; what
was solved is checked. A tick is what the balancer does between its nodes' reports and what goes out: the reports are
entered into the history, forecast, split, made a table, sealed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import highspy
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from figures import Row
from numpy.typing import NDArray

from balancer.forecast import ForecastState, predict_load
from balancer.history import CLASSES, History
from balancer.issue import TableIssuer
from balancer.loop import decide
from balancer.optimizer import PlacementSolver, RoutingSolver
from balancer.placement import Placement, PlacementProblem, holders_wanted
from balancer.plan import TableStamp
from balancer.routing import AssignmentProblem, RoutingModel
from engine.protocol.requests import PAIRS_TOLD, ClassCount, NodeStats
from engine.protocol.signed import SigningKey
from engine.protocol.table import TABLE_MAX, RoutingTable, seal_table

FloatArray = NDArray[np.float64]

NODES: Final = 1000
GROUPS: Final = 4096
HOLDERS: Final = 3
ZONES: Final = 5
LOAD: Final = 0.65
SKEW: Final = 0.4
"""Zipf's exponent over the groups: the hottest are more than a node can do, as many keys fall into each group."""
SOLVER_S: Final = 60.0
MOVED_PART: Final = 0.05
CLASSES_OF_GROUP: Final = 3
"""In so many classes each group's keys are used."""


def row(
    name: str,
    value: float,
    unit: str,
    *,
    peer: str = "",
    peer_value: float | None = None,
    target: float | None = None,
    stretch: float | None = None,
) -> Row:
    """The row with what follows from its figures."""
    return Row(
        name,
        round(value, 4),
        unit,
        peer,
        None if peer_value is None else round(peer_value, 4),
        None if not peer_value or target is not None else round(value / peer_value, 4),  # a target is in milliseconds
        target,
        stretch,
        None if target is None else value <= target,
        None if stretch is None else value <= stretch,
    )


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of one call."""
    begun = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - begun)


# --- routing ---


def routing_problem(random: np.random.Generator) -> AssignmentProblem:
    """Unequal nodes in zones, rows of groups with three holders each, 20 classes."""
    speed, classes = random.choice([0.5, 1.0, 2.0], NODES), 20
    holders = np.stack([random.choice(NODES, HOLDERS, replace=False) for _ in range(GROUPS)])
    row_class, base = random.integers(0, classes, GROUPS), random.choice([20.0, 50.0, 100.0, 1000.0], classes)
    rate = 1.0 / random.permutation(np.arange(1, GROUPS + 1)) ** SKEW
    demand = LOAD * speed.sum() * rate / (rate @ (base[row_class] * 1e-6))
    entries = GROUPS * HOLDERS
    return AssignmentProblem(
        demand=demand,
        row_class=row_class.astype(np.int32),
        indptr=np.arange(0, entries + 1, HOLDERS, dtype=np.int32),
        nodes=holders.ravel().astype(np.int32),
        service_us=base[:, None] / speed * random.uniform(0.9, 1.1, (classes, NODES)),
        up=np.ones(NODES, dtype=bool),
        capacity=np.ones(NODES),
        background=np.zeros(NODES),
        network_us=random.choice([100.0, 300.0, 1000.0], entries),
        most=np.ones(entries),
        fair=np.ones(entries),
        capped=np.zeros(classes, dtype=bool),
    )


def by_rows(problem: AssignmentProblem) -> None:
    """The same program put together row by row, as the solver's own interface invites to."""
    program = RoutingModel(problem).program(problem)
    highs = highspy.Highs()
    highs.setOptionValue("output_flag", False)
    for lower, upper in zip(program.lower.tolist(), program.upper.tolist(), strict=True):
        highs.addVar(lower, upper)
    lines: list[list[tuple[int, float]]] = [[] for _ in program.row_lower]
    for column, (start, end) in enumerate(zip(program.starts[:-1].tolist(), program.starts[1:].tolist(), strict=True)):
        for at in range(start, end):
            lines[int(program.indexes[at])].append((column, float(program.values[at])))
    for line, lower, upper in zip(lines, program.row_lower.tolist(), program.row_upper.tolist(), strict=True):
        indexes = np.array([column for column, _ in line], dtype=np.int32)
        highs.addRow(lower, upper, len(line), indexes, np.array([value for _, value in line]))


def routing_rows(repeats: int) -> list[Row]:
    """The routing program, cold and warm."""
    random = np.random.default_rng(1)
    base = routing_problem(random)
    cold = statistics.median(timed(lambda: RoutingSolver().solve(base, SOLVER_S)) for _ in range(3))
    solver, drift, deaths, times = RoutingSolver(), [], [], []
    solver.solve(base, SOLVER_S)
    for _ in range(repeats):
        asked = replace(base, demand=base.demand * random.uniform(0.9, 1.1, GROUPS))
        drift.append(timed(lambda asked=asked: solver.solve(asked, SOLVER_S)))  # type: ignore[misc]
        up = np.ones(NODES, dtype=bool)
        up[random.integers(NODES)] = False
        asked = replace(asked, up=up)
        deaths.append(timed(lambda asked=asked: solver.solve(asked, SOLVER_S)))  # type: ignore[misc]
        warm, fresh = solver.solve(asked, SOLVER_S), RoutingSolver().solve(asked, SOLVER_S)
        assert abs(warm.cost - fresh.cost) <= 1e-6 * fresh.cost
        solver.solve(replace(asked, up=np.ones(NODES, dtype=bool)), SOLVER_S)
        other = base.service_us * random.uniform(0.93, 1.07, base.service_us.shape)
        times.append(timed(lambda other=other: solver.solve(replace(base, service_us=other), SOLVER_S)))  # type: ignore[misc]
        solver.solve(base, SOLVER_S)
    model = RoutingModel(base)
    arrays = statistics.median(timed(lambda: model.program(base)) for _ in range(5))
    name = f"routing, {NODES} nodes, {GROUPS} rows"
    told = [
        (f"{name}: 10 % drift, warm", drift, 30.0, 10.0),
        (f"{name}: a node dies, warm", deaths, 30.0, 10.0),
        (f"{name}: other service times, warm", times, None, None),
    ]
    return [
        *(
            row(what, statistics.median(taken), "ms", peer="cold", peer_value=cold, target=must, stretch=stretch)
            for what, taken, must, stretch in told
        ),
        row(f"{name}: built by arrays", arrays, "ms", peer="row by row", peer_value=timed(lambda: by_rows(base))),
    ]


# --- placement ---


def placement_problem(random: np.random.Generator) -> PlacementProblem:
    """Unequal nodes in five failure domains with ten racks each; 2-of-3; groups in unequal demand."""
    base = np.array([20.0, 50.0, 100.0, 1000.0, 20.0, 50.0, 100.0, 30.0])
    speed = random.choice([0.5, 1.0, 2.0], NODES)
    service = base[:, None] / speed * random.uniform(0.95, 1.05, (len(base), NODES))
    domain = (np.arange(NODES) % ZONES).astype(np.int32)
    rack = (domain * 10 + np.arange(NODES) // ZONES % 10).astype(np.int32)
    rate = 1.0 / random.permutation(np.arange(1, GROUPS + 1)) ** SKEW
    load = (rate / rate.sum())[:, None] * random.dirichlet(np.full(len(base), 0.5), GROUPS)
    load *= LOAD * speed.sum() / (load @ (base * 1e-6)).sum()
    members = [np.flatnonzero(domain == each) for each in range(ZONES)]
    today = [[random.choice(members[zone]) for zone in random.permutation(ZONES)[:HOLDERS]] for _ in range(GROUPS)]
    problem = PlacementProblem(
        load=load,
        service_us=service,
        capacity=np.ones(NODES),
        background=np.zeros(NODES),
        network_us=(100.0 + 200.0 * domain).astype(float),
        price=np.zeros(NODES),
        up=np.ones(NODES, dtype=bool),
        domain=domain,
        near=[np.arange(NODES, dtype=np.int32), rack],
        threshold=np.full(GROUPS, 2, dtype=np.int32),
        wanted=np.full(GROUPS, HOLDERS, dtype=np.int32),
        today=np.array(today, dtype=np.int32),
        budget=int(MOVED_PART * GROUPS * HOLDERS),
    )
    return with_load(problem, load)


def with_load(problem: PlacementProblem, load: FloatArray) -> PlacementProblem:
    """The problem with another load, and as many holders as it asks for."""
    wanted = holders_wanted(
        load,
        problem.service_us,
        problem.capacity,
        problem.up,
        problem.domain,
        problem.threshold,
        np.full(GROUPS, HOLDERS),
        problem.today,
    )
    return replace(problem, load=load, wanted=wanted)


def check(problem: PlacementProblem, plan: Placement) -> int:
    """Hold a plan against the constraints; how many new holders it has."""
    added = 0
    for group, holders in enumerate(plan.holders):
        before = {int(node) for node in problem.today[group] if node >= 0}
        assert len(set(holders)) == len(holders)
        added += len(set(holders) - before)
        domains = np.bincount(problem.domain[list(holders)])
        assert domains.max() < problem.threshold[group], "a failure domain has the threshold"
        assert len(holders) - domains.max() >= problem.threshold[group]
    assert added <= problem.budget
    return added


def moved_on(problem: PlacementProblem, plan: Placement, load: FloatArray) -> PlacementProblem:
    """The problem after the plan was carried out, with another load."""
    most = max(map(len, plan.holders))
    today = np.array([[*holders, *[-1] * (most - len(holders))] for holders in plan.holders], dtype=np.int32)
    return with_load(replace(problem, today=today), load)


def placement_rows(repeats: int) -> list[Row]:
    """The placement program with rounding and repair: as load drifts, and as hot groups come up."""
    random = np.random.default_rng(1)
    problem, solver = placement_problem(random), PlacementSolver()
    settling = []
    for _ in range(6):
        begun = time.perf_counter()
        plan = solver.solve(problem, SOLVER_S)
        settling.append(1000 * (time.perf_counter() - begun))
        check(problem, plan)
        problem = moved_on(problem, plan, problem.load)
    base, told = problem.load, []
    for what in ("drift of 10 %", "2 % of groups 3 times as hot"):
        taken, moved = [], []
        for _ in range(repeats):
            load = base * random.uniform(0.9, 1.1, base.shape)
            if what != "drift of 10 %":
                load *= np.where(random.uniform(size=GROUPS) < 0.02, 3.0, 1.0)[:, None]
            asked, found = with_load(problem, load), []
            taken.append(timed(lambda asked=asked, found=found: found.append(solver.solve(asked, SOLVER_S))))  # type: ignore[misc]
            moved.append(check(asked, found[0]) / (GROUPS * HOLDERS))
        told.append((what, taken, moved))
    name = f"placement, {NODES} nodes x {GROUPS} groups"
    cold = max(settling) / 1000
    found_rows = []
    for what, taken, moved in told:
        found_rows += [
            row(
                f"{name}: {what}, warm, rounded and repaired",
                statistics.median(taken) / 1000,
                "s",
                peer="from any placement",
                peer_value=cold,
                target=1.0,
                stretch=0.3,
            ),
            row(f"{name}: {what}, the slowest", max(taken) / 1000, "s", target=1.0, stretch=0.3),
            row(f"{name}: {what}, shares moved at most", max(moved), "part", target=MOVED_PART),
        ]
    return found_rows


# --- ticks and tables ---


class Cluster:
    """Nodes that count, with as many placement groups; each tick all report."""

    def __init__(self, nodes: int, groups: int, classes: int = 12) -> None:
        self.random = np.random.default_rng(5)
        self.names = tuple(f"node-{index:04d}" for index in range(nodes))
        self.classes = CLASSES[:classes]
        self.places = {
            group: tuple(int(node) for node in self.random.choice(nodes, HOLDERS, replace=False))
            for group in range(groups)
        }
        self.service_us = self.random.choice([50.0, 100.0, 400.0], (classes, 1)) * self.random.choice(
            [0.5, 1.0, 2.0], nodes
        )
        weight = 1.0 / self.random.permutation(np.arange(1, groups + 1)) ** 0.9
        used = self.random.permuted(np.tile(np.arange(classes) < CLASSES_OF_GROUP, (groups, 1)), axis=1)
        self.rates = weight[:, None] * np.where(used, self.random.uniform(0.1, 1.0, used.shape), 0.0)
        self.rates *= 0.5 * nodes / (self.rates.sum(axis=0) @ self.service_us.mean(axis=1) * 1e-6)
        self.counted = np.zeros((groups, classes, HOLDERS), dtype=np.int64)
        self.busy = np.zeros((classes, nodes))
        self.at = np.array([self.places[group] for group in range(groups)])

    def reports(self) -> dict[str, NodeStats]:
        """A second of load later: what each node tells."""
        nodes, classes = len(self.names), len(self.classes)
        more = self.random.poisson(self.rates[:, :, None] / HOLDERS, self.counted.shape)
        self.counted += more
        new = np.zeros((classes, nodes))
        total = np.zeros((classes, nodes), dtype=np.int64)
        for holder in range(HOLDERS):
            np.add.at(new.T, self.at[:, holder], more[:, :, holder])
            np.add.at(total.T, self.at[:, holder], self.counted[:, :, holder])
        self.busy += new * self.service_us * self.random.uniform(0.97, 1.03, self.service_us.shape)
        pairs: list[list[tuple[int, int, int]]] = [[] for _ in self.names]
        for group, kind, holder in np.argwhere(self.counted > 0).tolist():
            pairs[self.at[group, holder]].append((kind, group, int(self.counted[group, kind, holder])))
        return {
            name: NodeStats(
                boot=index.to_bytes(16, "big"),
                uptime_ms=1_000_000,
                queue=0,
                classes=[
                    ClassCount(each, int(total[kind, index]), 0, int(self.busy[kind, index]))
                    for kind, each in enumerate(self.classes)
                ],
                pairs=sorted(sorted(pairs[index], key=lambda each: -each[2])[:PAIRS_TOLD]),
                caches=[],
                cluster_serial=1,
                hot_window_ms=0,
                hot=[],
                network_us=0,
            )
            for index, name in enumerate(self.names)
        }


def tick_rows(nodes: int, groups: int, ticks: int, target: float, stretch: float) -> list[Row]:
    """Whole ticks, after the first few; and how long what goes out is."""
    cluster = Cluster(nodes, groups)
    history, solver = History(cluster.names, tick_ms=1000, ticks=600), RoutingSolver()
    issuer = TableIssuer(SigningKey("balancer", Ed25519PrivateKey.generate()))
    state: ForecastState | None = None
    parts: dict[str, list[float]] = {"history": [], "forecast": [], "decision": [], "table sealed": [], "": []}
    whole, deltas = [], []
    for tick in range(1, ticks + 1):
        reports, begun = cluster.reports(), time.perf_counter()
        marks = [begun]
        history.observe(tick, reports)
        snapshot = history.snapshot()
        marks.append(time.perf_counter())
        forecast = predict_load(snapshot, state)
        state = forecast.state
        marks.append(time.perf_counter())
        stamp = TableStamp(1, tick, 1000 * tick, 1000 * tick + 10_000, 1)
        table = decide(snapshot, stamp, SOLVER_S, forecast, solver=solver, places=cluster.places)
        marks.append(time.perf_counter())
        issued = issuer.issue(table)
        marks.append(time.perf_counter())
        assert issued.remark == ""
        assert tick < 3 or len(snapshot.pairs) > 0
        (whole if issued.message == issued.whole else deltas).append(len(issued.message))
        if tick > ticks // 2:
            for name, taken in zip(parts, [*np.diff(marks), marks[-1] - begun], strict=True):
                parts[name].append(1000 * float(taken))
    name = f"tick, {nodes} nodes x {groups} groups"
    told = [
        row(f"{name}: whole, median", statistics.median(parts[""]), "ms", target=target, stretch=stretch),
        row(f"{name}: whole, the slowest", max(parts[""]), "ms", target=target, stretch=stretch),
        *(row(f"{name}: {part}", statistics.median(taken), "ms") for part, taken in parts.items() if part),
        row(f"{name}: whole table", max(whole), "bytes", target=float(TABLE_MAX)),
    ]
    if deltas:
        told.append(
            row(f"{name}: difference", statistics.median(deltas), "bytes", peer="whole", peer_value=float(max(whole)))
        )
    return told


def table_rows() -> list[Row]:
    """The longest tables that fit a reply: all classes, and groups that were moved."""
    random = np.random.default_rng(3)
    key = SigningKey("balancer", Ed25519PrivateKey.generate())

    def size(classes: int, moved: int) -> int:
        groups = [(group, random.integers(0, NODES, HOLDERS).tolist()) for group in range(moved)]
        table = RoutingTable(
            1,
            2**20,
            2**40,
            2**40,
            [f"node-{index:04d}" for index in range(NODES)],
            list(CLASSES[:classes]),
            bytes(random.integers(40, 120, classes * NODES, dtype=np.uint8)),
            random.integers(0, 5000, NODES).tolist(),
            [1000] * classes,
            groups,
            [],
            [(10**6, 10**6)] * classes,
        )
        return len(seal_table(table, key))

    name = f"table, {NODES} nodes"
    return [
        row(f"{name} x {GROUPS} groups: {classes} classes, {moved} groups moved", size(classes, moved), "bytes")
        for classes, moved in ((8, 0), (12, int(MOVED_PART * GROUPS)), (48, 0), (12, GROUPS), (48, GROUPS))
    ]


def rows(quick: bool) -> list[Row]:
    """All rows of the two programs, the tables and the ticks."""
    return [
        *routing_rows(2 if quick else 15),
        *placement_rows(1 if quick else 7),
        *tick_rows(100, 1024, 8 if quick else 60, 100.0, 50.0),
        *tick_rows(1000, 4096, 6 if quick else 30, 400.0, 200.0),
        *table_rows(),
    ]
