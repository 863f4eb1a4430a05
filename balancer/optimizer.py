"""The linear programs' solver. It alone imports highspy; it knows no socket, clock or key.

What the programs are is in ``balancer.routing`` and ``balancer.placement``; here HiGHS's dual simplex solves them
(Huangfu and Hall, Math. Prog. Comp. 10(1), 2018), again and again from the last basis where only bounds changed.
"""

from __future__ import annotations

import ctypes
import os

import highspy
import numpy as np

from balancer.placement import Infeasible, Placement, PlacementModel, PlacementProblem, explain
from balancer.program import FloatArray, Program, Solution
from balancer.rounding import plan_moves
from balancer.routing import Assignment, AssignmentProblem, RoutingModel
from engine.errors import EngineError

__all__ = [
    "PlacementSolver",
    "RoutingSolver",
    "SolverError",
    "WarmSolver",
    "optimize_assignment",
    "optimize_placement",
    "take_greeting",
]

ROUTING_S = 0.5
PLACEMENT_S = 5.0
"""How long the programs may take where nothing else is said."""


def take_greeting() -> None:
    """HiGHS prints a greeting on the process's standard output when its first solver is made: let it go nowhere."""
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        highspy.Highs()
        ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class SolverError(EngineError):
    """HiGHS found no optimum within its time; the last good answer stays in force."""


class WarmSolver:
    """HiGHS with one program in it; one thread uses it at a time. ``what`` names the program in errors."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._highs = highspy.Highs()
        for option, value in (
            ("output_flag", False),
            ("threads", 1),
            # Objectives are in whole requests and prices steer microseconds: tighter than the default is cheap here.
            ("dual_feasibility_tolerance", 1e-9),
            ("primal_feasibility_tolerance", 1e-9),
        ):
            self._highs.setOptionValue(option, value)
        self._program: Program | None = None

    @property
    def program(self) -> Program | None:
        """The program as it stands, with its newest bounds."""
        return self._program

    def load(self, program: Program) -> None:
        """Take a program in the place of the last one. Where both have the same shape, its basis is where to begin."""
        before, self._program = self._program, None
        same = (
            before is not None
            and len(before.cost) == len(program.cost)
            and np.array_equal(before.starts, program.starts)
            and np.array_equal(before.indexes, program.indexes)
        )
        basis = self._highs.getBasis() if same else None
        lp = highspy.HighsLp()
        lp.num_col_, lp.num_row_ = len(program.cost), len(program.row_lower)
        lp.col_cost_, lp.col_lower_, lp.col_upper_ = program.cost, program.lower, program.upper
        lp.row_lower_, lp.row_upper_ = program.row_lower, program.row_upper
        lp.a_matrix_.format_ = highspy.MatrixFormat.kColwise
        lp.a_matrix_.start_, lp.a_matrix_.index_, lp.a_matrix_.value_ = program.starts, program.indexes, program.values
        if self._highs.passModel(lp) == highspy.HighsStatus.kError:
            raise SolverError(f"the solver refused the {self._what} program")
        if basis is not None and basis.valid:
            self._highs.setBasis(basis)
        self._program = program

    def change(self, changed: Program) -> None:
        """Put the bounds of a program that is otherwise the same into the one that is loaded, and keep its basis."""
        before = self._program
        if before is None:
            raise SolverError(f"the {self._what} program is not loaded")
        columns = _differ(before.lower, changed.lower, before.upper, changed.upper)
        rows = _differ(before.row_lower, changed.row_lower, before.row_upper, changed.row_upper)
        self._program = None
        statuses = []
        if columns.size:
            lower, upper = changed.lower[columns], changed.upper[columns]
            statuses.append(self._highs.changeColsBounds(len(columns), columns, lower, upper))
        if rows.size:
            lower, upper = changed.row_lower[rows], changed.row_upper[rows]
            statuses.append(
                self._highs.changeRowsBounds(  # type: ignore[attr-defined] # of the base class, which has no types
                    len(rows), rows, lower, upper
                )
            )
        if highspy.HighsStatus.kError in statuses:
            raise SolverError(f"the solver refused new bounds for the {self._what} program")
        self._program = changed

    def solve(self, time_limit_s: float) -> Solution:
        """The optimum; ``SolverError`` if there is none, or if it is not found in time."""
        highs = self._highs
        # HiGHS counts the time of all runs together.
        highs.setOptionValue("time_limit", highs.getRunTime() + time_limit_s)
        highs.run()
        status = highs.getModelStatus()
        if status == highspy.HighsModelStatus.kUnknown:
            # From an old basis the simplex may end without an answer; from none it finds one.
            highs.clearSolver()
            highs.run()
            status = highs.getModelStatus()
        if status != highspy.HighsModelStatus.kOptimal:
            reason = highs.modelStatusToString(status)
            raise SolverError(f"{self._what} program: {reason} after at most {time_limit_s} s")
        found, info = highs.getSolution(), highs.getInfo()
        return Solution(
            columns=np.asarray(found.col_value, dtype=np.float64),
            duals=np.asarray(found.row_dual, dtype=np.float64),
            objective=float(info.objective_function_value),
            iterations=int(info.simplex_iteration_count),
        )


def _differ(
    lower: FloatArray, new_lower: FloatArray, upper: FloatArray, new_upper: FloatArray
) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.flatnonzero((lower != new_lower) | (upper != new_upper)).astype(np.int32)


class RoutingSolver:
    """The routing program, kept from one tick to the next: only what changed is put into it. One thread uses it."""

    def __init__(self) -> None:
        self._solver = WarmSolver("routing")
        self._model: RoutingModel | None = None

    def solve(self, problem: AssignmentProblem, time_limit_s: float = ROUTING_S) -> Assignment:
        """The split of least time in the system, and the node prices; ``SolverError`` if the solver fails."""
        model, self._model = self._model, None
        if model is not None and self._solver.program is not None and model.fits(problem):
            self._solver.change(model.rebound(self._solver.program, problem))
        else:
            model = RoutingModel(problem)
            self._solver.load(model.program(problem))
        self._model = model
        return model.read(problem, self._solver.solve(time_limit_s))


def optimize_assignment(
    problem: AssignmentProblem, *, time_limit_s: float = ROUTING_S, solver: RoutingSolver | None = None
) -> Assignment:
    """The split of least time in the system, and the node prices. ``SolverError`` if the solver fails.

    Rows without load are split evenly over their nodes that are up; where no node is up, nothing is assigned. A
    ``solver`` of earlier ticks makes it quick, and of several optima may find another one.
    """
    return (solver or RoutingSolver()).solve(problem, time_limit_s)


class PlacementSolver:
    """The placement program, kept from one plan to the next for its basis. One thread uses it."""

    def __init__(self) -> None:
        self._solver = WarmSolver("placement")

    def solve(self, problem: PlacementProblem, time_limit_s: float = PLACEMENT_S) -> Placement:
        """The plan; ``Infeasible`` says what cannot be kept, ``SolverError`` that the solver failed."""
        reason = explain(problem)
        if reason:
            raise Infeasible(reason)
        model = PlacementModel(problem)
        if not len(model.active):
            return plan_moves(model, None)
        self._solver.load(model.program())
        return plan_moves(model, self._solver.solve(time_limit_s))


def optimize_placement(
    problem: PlacementProblem, *, time_limit_s: float = PLACEMENT_S, solver: PlacementSolver | None = None
) -> Placement:
    """Which nodes hold which groups, and the moves there. ``Infeasible`` or ``SolverError`` if there is no answer."""
    return (solver or PlacementSolver()).solve(problem, time_limit_s)
