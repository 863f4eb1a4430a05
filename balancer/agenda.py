"""When to plan placements: now and then, and when today's holders will not do. It knows no clock.

How busy today's holders would be is asked of the routing program: the groups' P90, the highest within the horizon, is
split over them at best. A busy node alone is no reason, as each plan costs moves: see ``Agenda``.
"""

from __future__ import annotations

import numpy as np

from balancer.optimizer import RoutingSolver, optimize_assignment
from balancer.placement import PlacementProblem
from balancer.routing import AssignmentProblem

__all__ = ["DISTANCE_S", "FULL", "PLAN_S", "Agenda", "busiest"]

PLAN_S = 30.0
"""From one plan to the next, if nothing is urgent."""
DISTANCE_S = 2.0
"""An urgent plan is no nearer to the one before."""
FULL = 0.95
"""Holders that would be busier than this, each group's load split at best, will not do."""
HOLDS = 0.85
"""At no more than this they do: what is above ``FULL`` after that is urgent again."""
WORSE = 1.1
"""So many times as busy as when it was last urgent is urgent again too."""


def busiest(problem: PlacementProblem, *, solver: RoutingSolver | None = None) -> float:
    """The utilisation of the busiest node when today's holders share each group's load at best; 0 without load.

    If they cannot do it, it is 1 and the work in seconds per second that is too much for them. ``SolverError`` if there
    is no answer. A ``solver`` of earlier calls makes it quick.
    """
    rows, kinds = np.nonzero(problem.load)
    held = problem.today[rows] >= 0
    if not held.any():
        return 0.0
    entries = int(held.sum())
    asked = AssignmentProblem(
        demand=problem.load[rows, kinds],
        row_class=kinds.astype(np.int32),
        indptr=np.concatenate([[0], np.cumsum(held.sum(axis=1))]).astype(np.int32),
        nodes=problem.today[rows][held].astype(np.int32),
        service_us=problem.service_us,
        up=problem.up,
        capacity=problem.capacity,
        background=problem.background,
        network_us=np.zeros(entries),
        most=np.ones(entries),
        fair=np.ones(entries),
        capped=np.zeros(len(problem.service_us), dtype=bool),
    )
    split = optimize_assignment(asked, solver=solver)
    # Which nodes get what is too much says nothing: it costs the same at each.
    return min(float(split.utilisation.max(initial=0.0)), 1.0) + split.overload


class Agenda:
    """Says when it is time for a plan. One thread uses it.

    It is each ``every_s``; and when today's holders will not do, but then not within ``DISTANCE_S`` of the last plan,
    and not again for the same load and the same holders: that would be answered as before. So the load must have been
    back below ``HOLDS``, or be ``WORSE``, or a planned group must have other holders by now.
    """

    def __init__(self, now_s: float, every_s: float = PLAN_S, *, urgent: bool = True) -> None:
        self._every_s = every_s
        self._urgent = urgent
        self._planned_s = now_s
        self._solver = RoutingSolver()
        self._armed = True
        self._busy = 0.0
        self._holders: dict[int, frozenset[int]] = {}
        self.urgent = 0
        """How many plans were made because they were urgent."""

    def due(self, problem: PlacementProblem, groups: tuple[int, ...], now_s: float) -> bool:
        """Whether to plan this now; then it counts as planned. ``groups`` are the problem's by row."""
        timely = now_s >= self._planned_s + self._every_s
        urgent = self._urgent and self._is_urgent(problem, groups, now_s)
        if not timely and not urgent:
            return False
        self.urgent += not timely
        self._planned_s = now_s
        self._holders = _holders(problem, groups)
        return True

    def _is_urgent(self, problem: PlacementProblem, groups: tuple[int, ...], now_s: float) -> bool:
        busy = busiest(problem, solver=self._solver)
        if busy <= HOLDS:
            self._armed = True
        if busy <= FULL or now_s < self._planned_s + DISTANCE_S:
            return False
        holders = _holders(problem, groups)
        moved = any(self._holders.get(group, nodes) != nodes for group, nodes in holders.items())
        if not (self._armed or moved or busy >= WORSE * self._busy):
            return False
        self._armed, self._busy = False, busy
        return True


def _holders(problem: PlacementProblem, groups: tuple[int, ...]) -> dict[int, frozenset[int]]:
    return {group: frozenset(row) - {-1} for group, row in zip(groups, problem.today.tolist(), strict=True)}
