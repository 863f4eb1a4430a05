"""Plans placements beside the control loop, in a thread of its own. ``balancer.mover`` carries out what it plans."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import structlog

from balancer.agenda import PLAN_S, Agenda
from balancer.forecast import Forecast
from balancer.history import HistorySnapshot
from balancer.optimizer import PlacementSolver, SolverError
from balancer.placement import Infeasible, Placement, PlacementProblem, holders_wanted
from balancer.places import Crowd
from balancer.plan import CAPACITY, load_ahead, network_times, service_times
from engine.protocol.manifest import Cluster

__all__ = ["Plan", "Planner", "placement_problem"]

SOLVER_S = 5.0
MOVED_PART = 0.05
"""The part of the shares that one plan may move."""

log = structlog.get_logger()


def placement_problem(
    history: HistorySnapshot,
    forecast: Forecast,
    cluster: Cluster,
    places: Mapping[int, Sequence[int]],
    shape: tuple[int, int],
    held: Mapping[int, Crowd] | None = None,
) -> tuple[PlacementProblem, tuple[int, ...]] | None:
    """What is to be placed, and the groups by row; None where no warm group is known, or nodes came or went meanwhile.

    The load is that of ``load_ahead``: a move takes time, and is for what is to come. Groups that are not warm stay
    where they are; what they need is evenly spread. ``held`` has the shape of most of a group's keys, and whether they
    may have further holders; where nothing is known of them they may, in the usual ``shape``.
    """
    of_pair = [(row, at, group) for at, (row, group) in enumerate(history.pairs) if group in places]
    groups = tuple(sorted({group for _, _, group in of_pair}))
    if not groups or tuple(history.nodes) != tuple(location.name for location in cluster.locations):
        return None
    number = {group: index for index, group in enumerate(groups)}
    high, whole = load_ahead(history, forecast)
    load = np.zeros((len(groups), len(history.classes)))
    for row, at, group in of_pair:
        load[number[group], row] += high[at]
    service, up = service_times(history), np.array(history.up, dtype=bool)
    # A node that is draining is given nothing, as one that is down: its groups go elsewhere.
    up &= np.array([node not in cluster.draining for node in history.nodes], dtype=bool)
    nodes = len(up)
    rest = np.maximum(whole - load.sum(axis=0), 0.0) @ service * 1e-6 / max(1, int(up.sum()))
    shapes = [_shape(held.get(group) if held else None, shape) for group in groups]
    width = max(len(places[group]) for group in groups)
    today = np.array([[*places[group], *[-1] * (width - len(places[group]))] for group in groups], dtype=np.int32)
    thresholds = np.array([threshold for threshold, _, _ in shapes], dtype=np.int32)
    shares = np.array([number for _, number, _ in shapes], dtype=np.int32)
    grows = np.array([grow for _, _, grow in shapes], dtype=bool)
    paths = [location.path for location in cluster.locations]
    depth = max(len(path) for path in paths)
    level = cluster.domain_level
    domain = _numbers([path[:level] for path in paths])
    capacity = np.full(nodes, CAPACITY)
    return (
        PlacementProblem(
            load=load,
            service_us=service,
            capacity=capacity,
            background=rest,
            network_us=network_times(history),
            price=np.zeros(nodes),
            up=up,
            domain=domain,
            near=[_numbers([path[:each] for path in paths]) for each in (depth, depth - 1) if each > level],
            threshold=thresholds,
            wanted=np.where(
                grows, holders_wanted(load, service, capacity, up, domain, thresholds, shares, today), shares
            ).astype(np.int32),
            today=today,
            budget=max(1, int(MOVED_PART * shares.sum())),
        ),
        groups,
    )


def _shape(crowd: Crowd | None, usual: tuple[int, int]) -> tuple[int, int, bool]:
    """Threshold, shares, and whether there may be more."""
    return (*usual, True) if crowd is None else (crowd.threshold, crowd.shares, crowd.grows)


def _numbers(labels: Sequence[tuple[str, ...]]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    known = {label: index for index, label in enumerate(dict.fromkeys(labels))}
    return np.array([known[label] for label in labels], dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Plan:
    """The last good plan: its groups by row, its nodes by index, and what was decided.

    ``text`` tells an operator, errors included.
    """

    groups: tuple[int, ...] = ()
    placement: Placement | None = None
    text: str = "no plan yet"
    nodes: tuple[str, ...] = ()

    def moves(self, members: Collection[str], most: int) -> list[tuple[int, str, bool]]:
        """The first ``most`` steps in their order, as (group, node, whether it is to hold it).

        A group's steps, which belong together, are all there or none: none, if one of its nodes is no member any more.
        """
        found: list[tuple[int, str, bool]] = []
        if self.placement is None or not self.nodes:
            return found
        for row, steps in groupby(self.placement.steps, key=lambda step: step.group):
            told = [(self.groups[row], self.nodes[step.node], step.add) for step in steps]
            if len(found) + len(told) > most:
                break
            if all(node in members for _, node, _ in told):
                found += told
        return found

    def targets(self) -> dict[int, tuple[str, ...]]:
        """Where the plan wants the groups that it would move: their nodes, the most urgent group first."""
        if self.placement is None or not self.nodes:
            return {}
        rows = dict.fromkeys(step.group for step in self.placement.steps)
        return {self.groups[row]: tuple(self.nodes[node] for node in self.placement.holders[row]) for row in rows}


class Planner:
    """Takes what the control loop knows, tick by tick; ``plan`` is the newest answer."""

    def __init__(self, every_s: float = PLAN_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._agenda = Agenda(clock(), every_s)
        self._solver = PlacementSolver()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="placement")
        self._running: Future[None] | None = None
        self.plan = Plan()

    def offer(
        self,
        history: HistorySnapshot,
        forecast: Forecast,
        cluster: Cluster,
        places: Mapping[int, Sequence[int]],
        shape: tuple[int, int],
        held: Mapping[int, Crowd] | None = None,
    ) -> None:
        """Look whether it is time for a plan from this, and make it, unless that still goes on with an earlier one."""
        if self._running is not None and not self._running.done():
            return
        ask = partial(placement_problem, history, forecast, cluster, dict(places), shape, held)
        self._running = self._pool.submit(self._look, ask, history.nodes, self._clock())

    def stop(self) -> None:
        """End, after the plan under way."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look(
        self, ask: Callable[[], tuple[PlacementProblem, tuple[int, ...]] | None], nodes: tuple[str, ...], now_s: float
    ) -> None:
        last = self.plan
        try:
            asked = ask()
            if asked is None:
                self.plan = Plan(text="no warm placement group")
            elif self._agenda.due(*asked, now_s):
                self.plan = self._made(*asked, nodes)
        except (Infeasible, SolverError) as error:
            self.plan = replace(last, text=str(error))
        except Exception as error:  # whatever it is, the last good plan stays
            self.plan = replace(last, text=f"{type(error).__name__}: {error}")
            if self.plan.text != last.text:
                log.error("no placement", exc_info=True)
        if self.plan.text != last.text:
            log.info("placement", plan=self.plan.text)

    def _made(self, problem: PlacementProblem, groups: tuple[int, ...], nodes: tuple[str, ...]) -> Plan:
        made = self._solver.solve(problem, SOLVER_S)
        return Plan(groups, made, _told(made, len(groups)), nodes)


def _told(made: Placement, groups: int) -> str:
    new = sum(step.add for step in made.steps)
    saved = 1.0 - made.cost / made.cost_today if made.cost_today > 0 else 0.0
    parts = [f"{groups} warm placement groups", f"{new} new holders would save {max(0.0, saved):.0%}"]
    return "; ".join([*(parts if new else [*parts[:1], "nothing to move"]), *made.remarks])
