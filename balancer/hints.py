"""Hints: which of today's holders should have a group's popular keys loaded before its load comes. A pure function.

A group's keys are warm where its load is served by now. When its highest P90 within the horizon would make these
combiners too busy, they are named with the idlest of its other holders, as many as it takes. Clients load the keys that
they use there, so that the first requests of a burst find more than one warm combiner. A hint stays until one combiner
alone would do again, and none would be given anew, so that noise makes none come and go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from balancer.forecast import Forecast
from balancer.history import HistorySnapshot
from balancer.plan import load_ahead
from balancer.program import FloatArray
from balancer.routing import Assignment, AssignmentProblem

__all__ = ["HINTS_MAX", "Hints", "plan_hints"]

Hints = Sequence[tuple[int, Sequence[int]]]
"""Placement groups, the hottest first, and the indexes of nodes that should have their popular keys loaded."""

FULL = 0.7
"""Combiners that would be busier than this with the load to come will not do."""
HOLDS = 0.5
"""A hint ends when one combiner alone would be no busier than this."""
HOT = 0.1
"""A group that is less of a node's work than this needs no second combiner."""
WARM_PART = 0.25
"""Who does this part of what the group's busiest combiner does today has its keys loaded too."""
HINTS_MAX = 64
NODES_MAX = 16


def plan_hints(
    history: HistorySnapshot,
    forecast: Forecast,
    problem: AssignmentProblem,
    assignment: Assignment,
    places: Mapping[int, Sequence[int]],
    before: Hints = (),
) -> list[tuple[int, list[int]]]:
    """The hints of a tick. ``problem`` has the warm pairs whose group is in ``places`` as its first rows, and is solved
    by ``assignment``; ``before`` are the hints of the tick before.
    """
    of_group: dict[int, list[int]] = {}
    pairs = [at for at, (_, group) in enumerate(history.pairs) if group in places]
    for row, at in enumerate(pairs):
        of_group.setdefault(history.pairs[at][1], []).append(row)
    if not of_group:
        return []
    high = _high(history, forecast, problem, pairs)
    row_of = problem.entry_row
    seconds = problem.service_us[problem.row_class[row_of], problem.nodes] * 1e-6 * assignment.split
    ahead = high[row_of] * seconds
    busy = problem.background + np.bincount(problem.nodes, ahead, minlength=len(problem.up))
    hinted = {group: set(nodes) for group, nodes in before}
    found: list[tuple[float, int, list[int]]] = []
    for group, rows in of_group.items():
        holders = np.array([node for node in places[group] if problem.up[node]], dtype=np.int64)
        if len(holders) < 2:
            continue
        work = high[rows] @ problem.service_us[problem.row_class[rows]][:, holders] * 1e-6
        if work.min() < HOT * problem.capacity[holders].min():
            continue
        own, now = np.zeros(len(busy)), np.zeros(len(busy))
        for row in rows:
            part = slice(problem.indptr[row], problem.indptr[row + 1])
            own[problem.nodes[part]] += ahead[part]
            now[problem.nodes[part]] += problem.demand[row] * seconds[part]
        others = (busy - own)[holders] / problem.capacity[holders]
        order = np.argsort(others, kind="stable")
        work = work / problem.capacity[holders]
        warm = now[holders] >= WARM_PART * now[holders].max()
        idlest = order == order[0]
        # A hint stays while it would be given anew, too: the idlest holder may do alone, and not those that are warm.
        rules = [(idlest, HOLDS)] if group in hinted else []
        for first, limit in (*rules, (warm if now.any() else idlest, FULL)):
            chosen = _enough(others, work, np.flatnonzero(first).tolist(), order.tolist(), limit)
            if len(chosen) > int(first.sum()):
                nodes = [int(holders[at]) for at in chosen]
                kept = [node for node in holders.tolist() if node in hinted.get(group, ()) and node not in nodes]
                found.append((float(work.mean()), group, [*nodes, *kept][:NODES_MAX]))
                break
    found.sort(key=lambda each: (-each[0], each[1]))
    return [(group, nodes) for _, group, nodes in found[:HINTS_MAX]]


def _high(history: HistorySnapshot, forecast: Forecast, problem: AssignmentProblem, pairs: Sequence[int]) -> FloatArray:
    """The load ahead by the problem's rows: the pairs, then what is left of each class; no less than its demand."""
    of_pair, of_class = load_ahead(history, forecast)
    known = of_pair[pairs]
    rest = of_class - np.bincount(problem.row_class[: len(pairs)], known, minlength=len(of_class))
    return np.asarray(np.maximum(np.concatenate([known, rest]), problem.demand))


def _enough(others: FloatArray, work: FloatArray, chosen: list[int], order: Sequence[int], limit: float) -> list[int]:
    """The chosen holders, and the idlest of the rest until none of them is busier than ``limit``."""
    chosen = list(chosen)
    for at in order:
        if _level(others[chosen], work[chosen]) <= limit:
            break
        if at not in chosen:
            chosen.append(at)
    return chosen


def _level(others: FloatArray, work: FloatArray) -> float:
    """How busy nodes are that share a group's work so that all who take part are equally busy.

    ``others`` is how busy each is without it, and ``work`` what each would have of it alone.
    """
    order = np.argsort(others, kind="stable")
    room = np.cumsum(1.0 / work[order])
    filled = (1.0 + np.cumsum(others[order] / work[order])) / room
    return float(filled.min())
