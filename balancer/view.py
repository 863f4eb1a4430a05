"""What the control loop shows of itself: what it knew at the end of a tick, and the forms in which that is told.

The loop hands over an immutable ``View`` each tick; everything else here is a pure function of it, for whichever thread
asks. Names of keys are in none of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from balancer.bank import accuracy
from balancer.features import HORIZONS
from balancer.forecast import Forecast
from balancer.history import HistorySnapshot
from balancer.planner import Plan
from engine.protocol.requests import CLASSES_TOLD, MOVES_TOLD, BalancerPlan, ClassLoad, PlacementMove
from engine.protocol.table import RoutingTable

__all__ = ["Moment", "PlanPage", "View", "Viewer", "loads", "plan_message", "plan_page"]

FloatArray = NDArray[np.float64]

TRACK_TICKS = 300
"""So many ticks of forecast, load and prices are shown."""
SERIES_SHOWN = 16
"""Most request classes, and most nodes, with a course of their own; the busiest, and the dearest."""
GROUPS_SHOWN = 256
STEPS_SHOWN = 1_024
TOTAL = "total"
MILLI = 1000


@dataclass(frozen=True, slots=True)
class Moment:
    """What was decided in a tick: the load of the next one by class (classes,), in requests per second, and prices by
    node (nodes,), NaN for one that was silent.
    """

    tick: int
    classes: tuple[str, ...]
    mean: FloatArray
    p90: FloatArray
    nodes: tuple[str, ...]
    prices: FloatArray


@dataclass(frozen=True, slots=True)
class View:
    """What was known at the end of a tick; ``places`` are the node indexes by warm placement group."""

    snapshot: HistorySnapshot
    forecast: Forecast
    places: Mapping[int, tuple[int, ...]]
    moments: tuple[Moment, ...]


class Viewer:
    """Keeps the last moments. The control loop owns it."""

    def __init__(self) -> None:
        self._moments: deque[Moment] = deque(maxlen=TRACK_TICKS)

    def see(
        self, snapshot: HistorySnapshot, forecast: Forecast, places: Mapping[int, Sequence[int]], table: RoutingTable
    ) -> View:
        """The view of a tick, in which this was known and decided; the table has the snapshot's nodes."""
        prices = np.array(table.price, dtype=np.float64) / MILLI
        prices[~np.array(snapshot.up, dtype=bool)] = np.nan
        moment = Moment(snapshot.tick, forecast.classes, forecast.mean, forecast.p90, snapshot.nodes, prices)
        self._moments.append(moment)
        warm = {group: tuple(places[group]) for _, group in snapshot.pairs if group in places}
        return View(snapshot, forecast, warm, tuple(self._moments))


# --- as a message ---


def loads(view: View) -> FloatArray:
    """The requests per second of the newest tick by class (classes,); 0 where no node was heard."""
    counts = view.snapshot.counts
    newest = counts[-1] if len(counts) else np.zeros(len(view.snapshot.classes))
    return np.asarray(np.nan_to_num(newest) * 1000.0 / view.snapshot.tick_ms)


def plan_message(balancer: str, tick_ms: int, view: View | None, plan: Plan) -> BalancerPlan:
    """The answer to the verb ``plan``."""
    if view is None:
        return BalancerPlan(balancer, tick_ms, [], 0, [])
    nodes, outlook = view.snapshot.nodes, view.forecast.outlook
    columns = (
        loads(view),
        view.forecast.mean,
        view.forecast.p90,
        outlook.mean[:, HORIZONS - 1],
        outlook.p90[:, HORIZONS - 1],
    )
    told = [
        ClassLoad(name, *(round(max(0.0, float(column[at])) * MILLI) for column in columns))
        for at, name in enumerate(view.snapshot.classes)
    ]
    told.sort(key=lambda each: -max(each.load, each.mean))
    moves = [PlacementMove(*move) for move in plan.moves(nodes, MOVES_TOLD)]
    return BalancerPlan(balancer, tick_ms, told[:CLASSES_TOLD], len(view.places), moves)


# --- as JSON ---


class TablePart(Struct, frozen=True):
    """The table in force: service times in microseconds by class and node, the part of a node that a class may take."""

    fencing_epoch: int
    counter: int
    issued_ms: int
    expires_ms: int
    cluster_serial: int
    classes: list[str]
    service_us: list[list[float]]
    caps: list[float]
    groups: list[tuple[int, list[int]]]
    hints: list[tuple[int, list[int]]]


class NodePart(Struct, frozen=True):
    """A node: its queue, its price (seconds that others wait for one of its work), utilisation if the plan is made.

    ``network_us`` is how long the network takes from the clients to it and back in microseconds; None if not known.
    """

    name: str
    up: bool
    queue: int
    price: float
    utilisation: float | None
    network_us: float | None


class ErrorPart(Struct, frozen=True):
    """How good the forecast of a class was of late, at one horizon; None until something is known.

    ``mase`` is over the error of saying the last count again, ``coverage`` how often the P90 held, ``bias`` over the
    load.
    """

    mase: float | None
    coverage: float | None
    bias: float | None


class ClassPart(Struct, frozen=True):
    """A request class, in requests per second: the last tick's, the next tick's, and all that is forecast."""

    name: str
    model: str
    load: float
    mean: float
    p90: float
    outlook_mean: list[float]
    outlook_p90: list[float]
    minutes_mean: list[float]
    minutes_p90: list[float]
    error: ErrorPart
    error_tenth: ErrorPart


class SeriesPart(Struct, frozen=True):
    """What came, what was forecast for it one tick before (None where that is not known), and what is forecast."""

    load: list[float | None]
    mean: list[float | None]
    p90: list[float | None]
    outlook_mean: list[float]
    outlook_p90: list[float]


class HistoryPart(Struct, frozen=True):
    """The last ticks, the first of which began at ``first_ms``: load by class and in all, prices by node (None where
    the node was silent).
    """

    first_ms: int
    step_ms: int
    ticks: int
    series: dict[str, SeriesPart]
    prices: dict[str, list[float | None]]


class GroupPart(Struct, frozen=True):
    """A warm placement group: its expected load, its holders, and those that it is to have, as indexes of nodes."""

    group: int
    load: float
    holders: list[int]
    planned: list[int]


class PlacementPart(Struct, frozen=True):
    """The assignment matrix, and the steps of the newest plan: (group, node, whether it is to hold it)."""

    text: str
    cost: float | None
    cost_today: float | None
    groups: list[GroupPart]
    steps: list[tuple[int, int, bool]]


class PlanPage(Struct, frozen=True):
    """``/v1/plan``. Times are in milliseconds since the Unix epoch; ``problem`` is what is wrong with the loop now."""

    balancer: str
    cluster: str
    cluster_serial: int
    software: str
    now_ms: int
    tick_ms: int
    ticks: int
    problem: str
    series_problems: dict[str, str]
    table: TablePart | None = None
    nodes: list[NodePart] = []
    classes: list[ClassPart] = []
    history: HistoryPart | None = None
    placement: PlacementPart | None = None


def plan_page(head: PlanPage, table: RoutingTable | None, view: View | None, plan: Plan) -> PlanPage:
    """All that the balancer shows, as it is told in JSON: ``head``, and what there is beside it."""
    if table is None or view is None:
        return head
    return replace(
        head,
        table=_table(table),
        nodes=_nodes(view, table, plan),
        classes=_classes(view),
        history=_history(view),
        placement=_placement(view, plan),
    )


def _table(table: RoutingTable) -> TablePart:
    return TablePart(
        table.fencing_epoch,
        table.counter,
        table.issued_ms,
        table.expires_ms,
        table.cluster_serial,
        table.classes,
        [
            [_short(table.service_us(row, column)) for column in range(len(table.nodes))]
            for row in range(len(table.classes))
        ],
        [cap / MILLI for cap in table.caps],
        table.groups,
        table.hints,
    )


def _nodes(view: View, table: RoutingTable, plan: Plan) -> list[NodePart]:
    snapshot = view.snapshot
    prices = dict(zip(table.nodes, table.price, strict=True))
    used = () if plan.placement is None else plan.placement.utilisation.tolist()
    fits = plan.nodes == snapshot.nodes
    network_us = snapshot.network_us if snapshot.network_us.size else np.zeros(len(snapshot.nodes))
    return [
        NodePart(
            name,
            snapshot.up[at],
            snapshot.queue[at],
            prices.get(name, 0) / MILLI,
            _short(used[at]) if fits else None,
            float(network_us[at]) or None,
        )
        for at, name in enumerate(snapshot.nodes)
    ]


def _classes(view: View) -> list[ClassPart]:
    forecast, now = view.forecast, loads(view)
    told = accuracy(forecast.state.classes)
    rows = {name: row for row, name in enumerate(told.series)}

    def error(name: str, horizon: int) -> ErrorPart:
        row = rows.get(name)
        if row is None:
            return ErrorPart(None, None, None)
        return ErrorPart(*(_known(each[row, horizon]) for each in (told.mase, told.coverage, told.bias)))

    parts = [
        ClassPart(
            name,
            forecast.models[at],
            _short(now[at]),
            _short(forecast.mean[at]),
            _short(forecast.p90[at]),
            _shorts(forecast.outlook.mean[at]),
            _shorts(forecast.outlook.p90[at]),
            [] if forecast.slow is None else _shorts(forecast.slow.mean[at]),
            [] if forecast.slow is None else _shorts(forecast.slow.p90[at]),
            error(name, 0),
            error(name, HORIZONS - 1),
        )
        for at, name in enumerate(forecast.classes)
    ]
    return sorted(parts, key=lambda part: -max(part.load, part.mean))


def _history(view: View) -> HistoryPart:
    snapshot = view.snapshot
    tick_s, ticks = snapshot.tick_ms / 1000.0, min(TRACK_TICKS, len(snapshot.counts))
    first = snapshot.tick - ticks + 1
    load = snapshot.counts[len(snapshot.counts) - ticks :] / tick_s
    mean, p90 = np.full(load.shape, np.nan), np.full(load.shape, np.nan)
    columns = {name: column for column, name in enumerate(snapshot.classes)}
    names = sorted(range(len(columns)), key=lambda column: -float(np.nansum(load[:, column])))[:SERIES_SHOWN]
    prices: dict[str, list[float | None]] = {name: [None] * ticks for name in _dearest(view)}
    for moment in view.moments:
        at = moment.tick + 1 - first
        if 0 <= at < ticks:
            for index, name in enumerate(moment.classes):
                if (column := columns.get(name)) is not None:
                    mean[at, column], p90[at, column] = moment.mean[index], moment.p90[index]
        if 0 <= at - 1 < ticks:
            places = _places(moment.nodes)
            for name in prices.keys() & places.keys():
                prices[name][at - 1] = _known(float(moment.prices[places[name]]))
    outlook = view.forecast.outlook
    series = {
        snapshot.classes[column]: SeriesPart(
            _maybe(load[:, column]),
            _maybe(mean[:, column]),
            _maybe(p90[:, column]),
            _shorts(outlook.mean[column]),
            _shorts(outlook.p90[column]),
        )
        for column in names
    }
    # The P90 of a sum is not the sum of P90s: none is told.
    whole = SeriesPart(_maybe(_sums(load)), _maybe(_sums(mean)), [], _shorts(outlook.mean.sum(axis=0)), [])
    return HistoryPart(first * snapshot.tick_ms, snapshot.tick_ms, ticks, {TOTAL: whole, **series}, prices)


@lru_cache(maxsize=4)
def _places(nodes: tuple[str, ...]) -> dict[str, int]:
    return {name: place for place, name in enumerate(nodes)}


def _sums(values: FloatArray) -> FloatArray:
    """By row; NaN where nothing is known."""
    return np.asarray(np.where(np.isnan(values).all(axis=1), np.nan, np.nansum(values, axis=1)))


def _dearest(view: View) -> list[str]:
    """The nodes with the highest prices of late, in their order."""
    of_late = dict.fromkeys(view.snapshot.nodes, 0.0)
    for moment in view.moments[:: max(1, len(view.moments) // 10)]:
        for name, price in zip(moment.nodes, np.nan_to_num(moment.prices).tolist(), strict=True):
            if name in of_late:
                of_late[name] += price
    dearest = sorted(of_late, key=lambda name: -of_late[name])[:SERIES_SHOWN]
    return [name for name in of_late if name in dearest]


def _placement(view: View, plan: Plan) -> PlacementPart:
    load: dict[int, float] = dict.fromkeys(view.places, 0.0)
    for at, (_, group) in enumerate(view.snapshot.pairs):
        if group in load:
            load[group] += max(0.0, float(view.forecast.pair_mean[at]))
    made, places = plan.placement, _places(view.snapshot.nodes)
    planned: dict[int, list[int]] = {}
    steps = [(group, places[node], add) for group, node, add in plan.moves(places, STEPS_SHOWN)]
    for group, holders in zip(plan.groups, () if made is None else made.holders, strict=made is not None):
        names = [plan.nodes[node] for node in holders]
        if all(name in places for name in names):
            planned[group] = [places[name] for name in names]
    hottest = sorted(load, key=lambda group: (-load[group], group))[:GROUPS_SHOWN]
    return PlacementPart(
        plan.text,
        None if made is None else _short(made.cost),
        None if made is None else _short(made.cost_today),
        [GroupPart(group, _short(load[group]), list(view.places[group]), planned.get(group, [])) for group in hottest],
        steps,
    )


def _short(value: float) -> float:
    """Four digits, so that many numbers are short to tell."""
    return float(f"{value:.4g}")


def _shorts(values: FloatArray) -> list[float]:
    return [_short(value) for value in values.tolist()]


def _maybe(values: FloatArray) -> list[float | None]:
    return [_known(value) for value in values.tolist()]


def _known(value: float) -> float | None:
    return _short(value) if np.isfinite(value) else None
