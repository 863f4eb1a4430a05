"""The linear program that splits the load over the nodes. It alone imports highspy; it knows no socket, clock or key.

Minimise the time that requests spend in the nodes. Columns: w_cn, the part of class c that node n serves, twice (up to
the even share, and beyond it at a small charge, so that of near-equal optima the even one is taken); u_ns, the work
in segment s of node n. Rows: sum_n w_cn = 1 for each class, and the capacity row of each node,
sum_s u_ns - sum_c (load_c service_cn) w_cn = background_n, in seconds of work per second. The segments approximate the
waiting of an M/M/1 queue, W(r) = r^2 / (1 - r) requests waiting at utilisation r (Kleinrock 1975, 3.2); the last has no
end, so more load than capacity still has an answer. The dual of a capacity row is the node price: the waiting that one
more second of work per second costs all.
"""

from __future__ import annotations

from dataclasses import dataclass

import highspy
import numpy as np
from numpy.typing import NDArray

from engine.errors import EngineError

__all__ = ["Assignment", "AssignmentProblem", "SolverError", "optimize_assignment"]

FloatArray = NDArray[np.float64]

BREAKPOINTS = np.array([0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98])
"""Utilisations between which the waiting is taken as linear."""
OVERLOAD_STEEPER = 10.0
"""How many times steeper than the last true segment the endless one is."""
UNEVEN_COST = 0.05
"""What is served beyond the even share is charged this part of its service time, so that noise moves nothing."""
PRICE_MAX_US = 1e7


class SolverError(EngineError):
    """HiGHS found no optimum within its time; the last good answer stays in force."""


@dataclass(frozen=True, slots=True)
class AssignmentProblem:
    """What is to be split.

    ``demand`` (classes,) in requests per second; ``service_us`` (classes, nodes); ``up`` (nodes,); ``capacity``
    (nodes,) seconds of work per second a node can do; ``background`` (nodes,) work that is bound to its node.
    """

    demand: FloatArray
    service_us: FloatArray
    up: NDArray[np.bool_]
    capacity: FloatArray
    background: FloatArray

    def __post_init__(self) -> None:
        """Refuse shapes that do not match and values that are no load; ``ValueError`` names them."""
        classes, nodes = self.service_us.shape
        shapes = {"demand": (classes,), "up": (nodes,), "capacity": (nodes,), "background": (nodes,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, {shape} is needed")
        for name in ("demand", "service_us", "capacity", "background"):
            values = getattr(self, name)
            if not np.all(np.isfinite(values)) or np.any(values < 0):
                raise ValueError(f"{name} has a value that is negative or not finite")
        if np.any(self.capacity <= 0):
            raise ValueError("capacity has a value that is not above 0")


@dataclass(frozen=True, slots=True)
class Assignment:
    """The split.

    ``weights`` (classes, nodes), each row sums to 1 (to 0 where no node is up). ``price`` (nodes,) is the dual in
    seconds of waiting per second of work; ``price_us`` (nodes,) the same for one mean request of the mix, in
    microseconds, as the routing table carries it. ``utilisation`` is (nodes,), ``cost`` the optimum in requests in the
    system, ``overload`` the work in seconds per second beyond the last breakpoint.
    """

    weights: FloatArray
    price: FloatArray
    price_us: FloatArray
    utilisation: FloatArray
    cost: float
    overload: float


def optimize_assignment(problem: AssignmentProblem, *, time_limit_s: float = 0.5) -> Assignment:
    """The split of least time in the system, and the node prices. ``SolverError`` if the solver fails.

    Classes without load are split evenly over the nodes that are up; where no node is up, nothing is assigned.
    """
    classes, nodes = problem.service_us.shape
    up = np.flatnonzero(problem.up)
    weights = np.zeros((classes, nodes))
    zeros = np.zeros(nodes)
    if not up.size:
        return Assignment(weights, zeros, zeros, zeros, 0.0, 0.0)
    weights[:, up] = 1.0 / up.size
    busy = np.flatnonzero(problem.demand * problem.service_us[:, up].max(axis=1, initial=0.0) > 0)
    if not busy.size and not problem.background[up].any():
        return Assignment(weights, zeros, zeros, zeros, 0.0, 0.0)
    work = problem.demand[busy, None] * problem.service_us[np.ix_(busy, up)] * 1e-6
    solved = _solve(work, problem.capacity[up], problem.background[up], time_limit_s)
    weights[np.ix_(busy, up)] = solved.split
    price, utilisation = zeros.copy(), zeros.copy()
    price[up] = solved.duals
    utilisation[up] = solved.used / problem.capacity[up]
    demand = problem.demand[busy]
    mean_service_us = demand @ problem.service_us[busy] / demand.sum() if demand.sum() else zeros
    price_us = np.clip(price * mean_service_us, 0.0, PRICE_MAX_US)
    return Assignment(weights, price, price_us, utilisation, solved.cost, solved.overload)


@dataclass(frozen=True, slots=True)
class _Solution:
    split: FloatArray
    duals: FloatArray
    used: FloatArray
    cost: float
    overload: float


def _segments() -> tuple[FloatArray, FloatArray]:
    """Widths and slopes of the waiting's segments, for a capacity of 1; the last is endless."""
    waiting = BREAKPOINTS**2 / (1.0 - BREAKPOINTS)
    widths = np.diff(BREAKPOINTS)
    slopes = np.diff(waiting) / widths
    # Without load there is no waiting to be had: the first segment is free, as the derivative at 0 is.
    slopes[0] = 0.0
    return np.append(widths, np.inf), np.append(slopes, slopes[-1] * OVERLOAD_STEEPER)


def _solve(work: FloatArray, capacity: FloatArray, background: FloatArray, time_limit_s: float) -> _Solution:
    """Solve for ``work`` (classes, nodes): what a node has to do for the whole of a class, in seconds per second."""
    classes, nodes = work.shape
    widths, slopes = _segments()
    cells, segments = classes * nodes, len(widths)
    upper = np.concatenate(
        [np.full(cells, 1.0 / nodes), np.full(cells, np.inf), np.outer(capacity, widths).ravel()],
    )
    flat = work.ravel()
    cost = np.concatenate([flat, flat * (1.0 + UNEVEN_COST), np.tile(slopes, nodes)])
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(cost), classes + nodes
    lp.col_cost_, lp.col_lower_, lp.col_upper_ = cost, np.zeros(len(cost)), upper
    right = np.concatenate([np.ones(classes), background])
    lp.row_lower_, lp.row_upper_ = right, right
    starts, indexes, values = _columns(flat, classes, nodes, segments)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
    lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = starts, indexes, values
    solution, optimum = _run(lp, time_limit_s)
    column = np.maximum(np.asarray(solution.col_value, dtype=np.float64), 0.0)
    split = (column[:cells] + column[cells : 2 * cells]).reshape(classes, nodes)
    used = column[2 * cells :].reshape(nodes, segments)
    duals = np.maximum(np.asarray(solution.row_dual, dtype=np.float64)[classes:], 0.0)
    return _Solution(
        split / split.sum(axis=1, keepdims=True), duals, used.sum(axis=1), optimum, float(used[:, -1].sum())
    )


def _columns(
    flat: FloatArray, classes: int, nodes: int, segments: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], FloatArray]:
    """The matrix by columns: each w has its class row and its capacity row, each u its capacity row alone."""
    cells = classes * nodes
    class_rows = np.repeat(np.arange(classes), nodes)
    node_rows = classes + np.tile(np.arange(nodes), classes)
    pairs = np.stack([class_rows, node_rows], axis=1).ravel()
    coefficients = np.stack([np.ones(cells), -flat], axis=1).ravel()
    pooled = np.repeat(classes + np.arange(nodes), segments)
    starts = np.concatenate([2 * np.arange(2 * cells), 4 * cells + np.arange(nodes * segments + 1)])
    indexes = np.concatenate([pairs, pairs, pooled])
    values = np.concatenate([coefficients, coefficients, np.ones(nodes * segments)])
    return starts.astype(np.int32), indexes.astype(np.int32), values


def _run(lp: highspy.HighsLp, time_limit_s: float) -> tuple[highspy.HighsSolution, float]:
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("threads", 1)
    solver.setOptionValue("time_limit", time_limit_s)
    # The objective is in whole requests and the prices steer microseconds: tighter than the default is cheap here.
    solver.setOptionValue("dual_feasibility_tolerance", 1e-9)
    solver.setOptionValue("primal_feasibility_tolerance", 1e-9)
    if solver.passModel(lp) == highspy.HighsStatus.kError:
        raise SolverError("the solver refused the routing program")
    solver.run()
    status = solver.getModelStatus()
    if status != highspy.HighsModelStatus.kOptimal:
        raise SolverError(f"routing program: {solver.modelStatusToString(status)} after at most {time_limit_s} s")
    return solver.getSolution(), float(solver.getInfo().objective_function_value)
