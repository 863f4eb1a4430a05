"""The routing program: which combiner serves how much of each row of load. It knows no solver, socket, clock or key.

A row is the load of one request class on one placement group, or what is left of a class. Minimise the time that
requests spend in the nodes and on the way to them. Columns: w_gn, the work of row g at node n, in seconds of the
class's reference service per second (for some nodes twice, see ``AssignmentProblem.fair``); u_ns, the work in segment s
of node n; e_n, the work of capped classes beyond their cap. Rows: sum_n w_gn = load_g; the capacity row of each node,
sum_s u_ns - sum_g (service_gn / reference_g) w_gn = background_n; the cap row of each node. Loads, nodes that go and
come, and background are bounds alone, so that a solved program is solved again from its last basis. The segments
approximate the waiting of an M/M/1 queue, W(r) = r^2 / (1 - r) requests waiting at utilisation r (Kleinrock 1975, 3.2);
the last has no end, so more load than capacity still has an answer. The dual of a capacity row is the node price: the
waiting that one more second of work per second costs all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from balancer.program import FloatArray, IndexArray, Program, Solution

__all__ = ["Assignment", "AssignmentProblem", "RoutingModel", "every_node", "segments"]

BREAKPOINTS = np.array([0.0, 0.05, 0.2, 0.35, 0.5, 0.62, 0.72, 0.8, 0.87, 0.92, 0.95, 0.98])
"""Utilisations between which the waiting is taken as linear."""
OVERLOAD_STEEPER = 10.0
"""How many times steeper than the last true segment the endless one is, and how dear work beyond a cap is."""
UNEVEN_COST = 0.05
"""What is served beyond the fair part is charged this part of its service time, so that noise moves nothing."""
IDLE = 1e-9
"""Seconds of work per second that are none: the solver's own tolerance."""
SERVICE_TOLERANCE = 0.05
"""A model stays good while no service time differs by more than this from the one that it was made with."""


@dataclass(frozen=True, slots=True)
class AssignmentProblem:
    """What is to be split.

    ``demand`` (rows,) in requests per second and ``row_class`` (rows,); the eligible combiners of row g are
    ``nodes[indptr[g]:indptr[g + 1]]`` (compressed sparse rows), and by these entries go ``network_us``, the mean way
    from the clients to the node and back; ``most``, the part of a row's demand that a node can serve at most; and
    ``fair``, the part beyond which it is charged a little more. ``service_us`` is (classes, nodes); ``up``,
    ``capacity`` (seconds of work per second) and ``background`` (work that is bound to its node) are (nodes,).
    ``capped`` (classes,) are the classes that together take at most ``cap`` of a node's capacity.
    """

    demand: FloatArray
    row_class: IndexArray
    indptr: IndexArray
    nodes: IndexArray
    service_us: FloatArray
    up: NDArray[np.bool_]
    capacity: FloatArray
    background: FloatArray
    network_us: FloatArray
    most: FloatArray
    fair: FloatArray
    capped: NDArray[np.bool_]
    cap: float = 1.0

    def __post_init__(self) -> None:
        """Refuse shapes that do not match and values that are no load; ``ValueError`` names them."""
        classes, nodes = self.service_us.shape
        rows, entries = len(self.demand), len(self.nodes)
        for length, names in (
            (rows, ("demand", "row_class")),
            (rows + 1, ("indptr",)),
            (nodes, ("up", "capacity", "background")),
            (entries, ("network_us", "most", "fair")),
            (classes, ("capped",)),
        ):
            for name in names:
                if getattr(self, name).shape != (length,):
                    raise ValueError(f"{name} has shape {getattr(self, name).shape}, {(length,)} is needed")
        for name in ("demand", "service_us", "capacity", "background", "network_us", "most", "fair"):
            values = getattr(self, name)
            if not np.all(np.isfinite(values)) or np.any(values < 0):
                raise ValueError(f"{name} has a value that is negative or not finite")
        if np.any(self.capacity <= 0):
            raise ValueError("capacity has a value that is not above 0")
        if np.any(self.service_us <= 0):
            raise ValueError("service_us has a value that is not above 0")
        if not 0 < self.cap <= 1:
            raise ValueError(f"a cap of {self.cap} is not above 0 and at most 1")
        if self.indptr[0] != 0 or self.indptr[-1] != entries or np.any(np.diff(self.indptr) < 0):
            raise ValueError(f"indptr does not cut {entries} entries into rows")
        for name, bound in (("row_class", classes), ("nodes", nodes)):
            values = getattr(self, name)
            if values.size and not 0 <= values.min() <= values.max() < bound:
                raise ValueError(f"{name} has an index outside 0..{bound - 1}")

    @property
    def entry_row(self) -> IndexArray:
        """The row of each entry."""
        return np.repeat(np.arange(len(self.demand), dtype=np.int32), np.diff(self.indptr))


def every_node(
    demand: FloatArray,
    service_us: FloatArray,
    up: NDArray[np.bool_],
    capacity: FloatArray,
    background: FloatArray,
    *,
    capped: NDArray[np.bool_] | None = None,
    cap: float = 1.0,
) -> AssignmentProblem:
    """The problem in which each class is one row and every node is eligible; the even share is fair."""
    classes, nodes = service_us.shape
    entries = classes * nodes
    return AssignmentProblem(
        demand=demand,
        row_class=np.arange(classes, dtype=np.int32),
        indptr=np.arange(0, entries + 1, max(nodes, 1), dtype=np.int32) if nodes else np.zeros(classes + 1, np.int32),
        nodes=np.tile(np.arange(nodes, dtype=np.int32), classes),
        service_us=service_us,
        up=up,
        capacity=capacity,
        background=background,
        network_us=np.zeros(entries),
        most=np.ones(entries),
        fair=np.full(entries, 1.0 / max(1, int(up.sum()))),
        capped=np.zeros(classes, dtype=bool) if capped is None else capped,
        cap=cap,
    )


@dataclass(frozen=True, slots=True)
class Assignment:
    """The split.

    ``split`` (entries of the problem,) is the part of its row's demand that an entry serves: 1 over each row, or what
    its nodes that are up can serve at most. ``weights`` (classes, nodes) is the same by class. ``price`` (nodes,) is
    the dual in seconds of waiting per second of work. ``utilisation`` is (nodes,), ``cost`` the optimum in requests in
    the system, ``overload`` the work in seconds per second beyond the last breakpoint, ``over_cap`` (nodes,) that of
    capped classes beyond their cap, ``unserved`` the requests per second that no node is there for.
    """

    split: FloatArray
    weights: FloatArray
    price: FloatArray
    utilisation: FloatArray
    cost: float
    overload: float
    caps: FloatArray
    over_cap: FloatArray
    unserved: float


@cache
def segments() -> tuple[FloatArray, FloatArray]:
    """Widths and slopes of the waiting's segments, for a capacity of 1; the last is endless."""
    waiting = BREAKPOINTS**2 / (1.0 - BREAKPOINTS)
    widths = np.diff(BREAKPOINTS)
    slopes = np.diff(waiting) / widths
    # Without load there is no waiting to be had: the first segment is free, as the derivative at 0 is.
    slopes[0] = 0.0
    both = np.append(widths, np.inf), np.append(slopes, slopes[-1] * OVERLOAD_STEEPER)
    for each in both:
        each.setflags(write=False)
    return both


class RoutingModel:
    """The program of problems that differ in nothing but load, background, and which nodes are up."""

    def __init__(self, problem: AssignmentProblem) -> None:
        self._first = problem
        self._rows, self._entries = len(problem.demand), len(problem.nodes)
        self._entry_row = problem.entry_row
        by_entry = problem.row_class[self._entry_row]
        service = problem.service_us[by_entry, problem.nodes]
        self._reference_s = problem.service_us.mean(axis=1)[problem.row_class] * 1e-6
        self._work = service * 1e-6 / self._reference_s[self._entry_row]
        self._second = np.flatnonzero(problem.fair < problem.most)
        self._capped = np.append(problem.capped, False)[by_entry]
        self._widths, self._slopes = segments()

    def fits(self, problem: AssignmentProblem) -> bool:
        """Whether the problem differs from the model's in bounds alone, or in service times by very little."""
        first = self._first
        same = (
            problem.cap == first.cap
            and np.array_equal(problem.row_class, first.row_class)
            and np.array_equal(problem.indptr, first.indptr)
            and np.array_equal(problem.nodes, first.nodes)
            and np.array_equal(problem.capped, first.capped)
            and problem.service_us.shape == first.service_us.shape
            and np.array_equal(np.flatnonzero(problem.fair < problem.most), self._second)
        )
        return bool(
            same
            and np.all(np.abs(problem.service_us - first.service_us) <= SERVICE_TOLERANCE * first.service_us)
            and np.allclose(problem.network_us, first.network_us, rtol=SERVICE_TOLERANCE, atol=1.0)
        )

    def program(self, problem: AssignmentProblem) -> Program:
        """The whole program."""
        nodes, segments = len(problem.up), len(self._widths)
        second, capped = self._second, bool(self._capped.any())
        way = problem.network_us * 1e-6 / self._reference_s[self._entry_row]
        cost = [self._work + way, (self._work * (1.0 + UNEVEN_COST) + way)[second], np.tile(self._slopes, nodes)]
        first_row = np.concatenate([self._entry_row, self._entry_row[second]])
        node_of = np.concatenate([problem.nodes, problem.nodes[second]])
        work = np.concatenate([self._work, self._work[second]])
        in_cap = np.concatenate([self._capped, self._capped[second]])
        # Each w is in its load row, its node's capacity row and, if its class is capped, its node's cap row.
        counts = [2 + in_cap.astype(np.int64), np.ones(nodes * segments, np.int64)]
        triple = np.stack([first_row, self._rows + node_of, self._rows + nodes + node_of], axis=1)
        signed = np.stack([np.ones(len(work)), -work, work], axis=1)
        kept = np.ones(triple.shape, dtype=bool)
        kept[:, 2] = in_cap
        indexes = [triple[kept], np.repeat(self._rows + np.arange(nodes), segments)]
        values = [signed[kept], np.ones(nodes * segments)]
        if capped:
            cost.append(np.full(nodes, self._slopes[-1]))
            counts.append(np.ones(nodes, np.int64))
            indexes.append(self._rows + nodes + np.arange(nodes))
            values.append(np.full(nodes, -1.0))
        lower, upper, row_lower, row_upper = self._bounds(problem)
        return Program(
            cost=np.concatenate(cost),
            lower=lower,
            upper=upper,
            row_lower=row_lower,
            row_upper=row_upper,
            starts=np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int32),
            indexes=np.concatenate(indexes).astype(np.int32),
            values=np.concatenate(values),
        )

    def rebound(self, program: Program, problem: AssignmentProblem) -> Program:
        """The program with the bounds of another problem that the model fits."""
        lower, upper, row_lower, row_upper = self._bounds(problem)
        return replace(program, lower=lower, upper=upper, row_lower=row_lower, row_upper=row_upper)

    def _bounds(self, problem: AssignmentProblem) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Lower and upper bounds of the columns, then of the rows."""
        nodes, second = len(problem.up), self._second
        load = problem.demand * self._reference_s
        up, room = problem.up[problem.nodes], self._room(problem)
        of_entry = load[self._entry_row]
        most = np.where(problem.most < 1.0, problem.most * of_entry, np.inf)
        both = problem.fair < problem.most
        ends = [
            np.where(up, np.where(both, problem.fair * of_entry, most), 0.0),
            np.where(up, most - np.where(both, problem.fair * of_entry, 0.0), 0.0)[second],
            np.outer(problem.capacity, self._widths).ravel(),
        ]
        right = [load * room, problem.background]
        left = list(right)
        if self._capped.any():
            ends.append(np.full(nodes, np.inf))
            right.append(problem.cap * problem.capacity)
            left.append(np.full(nodes, -np.inf))
        upper = np.concatenate(ends)
        return np.zeros(len(upper)), upper, np.concatenate(left), np.concatenate(right)

    def _room(self, problem: AssignmentProblem) -> FloatArray:
        """The part of each row that its nodes that are up can serve."""
        return np.minimum(
            np.bincount(self._entry_row, problem.most * problem.up[problem.nodes], minlength=self._rows), 1.0
        )

    def read(self, problem: AssignmentProblem, solution: Solution) -> Assignment:
        """The split and the prices that an optimum stands for."""
        classes, nodes = problem.service_us.shape
        entries, segments = self._entries, len(self._widths)
        columns = np.maximum(solution.columns, 0.0)
        served = columns[:entries].copy()
        served[self._second] += columns[entries : entries + len(self._second)]
        pooled = columns[entries + len(self._second) :][: nodes * segments].reshape(nodes, segments)
        over_cap = columns[entries + len(self._second) + nodes * segments :]
        up, room = problem.up[problem.nodes], self._room(problem)
        total = np.bincount(self._entry_row, served, minlength=self._rows)
        # A row without load is split by what its nodes can serve, and no row over nodes that are down.
        served = np.where((total <= IDLE)[self._entry_row], problem.most, served) * up
        total = np.bincount(self._entry_row, served, minlength=self._rows)
        split = served * (room / np.where(total > 0, total, 1.0))[self._entry_row]
        by_class = np.zeros((classes, nodes))
        demand = np.bincount(problem.row_class, problem.demand, minlength=classes)
        scale = np.where(demand[problem.row_class] > 0, problem.demand, 1.0)[self._entry_row]
        np.add.at(by_class, (problem.row_class[self._entry_row], problem.nodes), split * scale)
        sums = by_class.sum(axis=1, keepdims=True)
        price = np.where(problem.up, np.maximum(solution.duals[self._rows : self._rows + nodes], 0.0), 0.0)
        return Assignment(
            split=split,
            weights=by_class / np.where(sums > 0, sums, 1.0),
            price=price,
            utilisation=np.where(problem.up, pooled.sum(axis=1) / problem.capacity, 0.0),
            cost=solution.objective,
            overload=float(pooled[problem.up, -1].sum()),
            caps=np.where(problem.capped, problem.cap, 1.0),
            over_cap=over_cap if over_cap.size else np.zeros(nodes),
            unserved=float(problem.demand @ (1.0 - room)),
        )
