"""From a snapshot of the history to the routing table: pure functions. It knows no socket, clock or solver's API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from balancer.forecast import Forecast
from balancer.history import HistorySnapshot
from balancer.program import FloatArray, IndexArray
from balancer.routing import Assignment, AssignmentProblem, every_node
from engine.keys import ALGORITHMS, RequestType
from engine.protocol.table import RoutingTable, pack_service

__all__ = [
    "PairLoad",
    "TableStamp",
    "assignment_problem",
    "generate_routing_table",
    "load_ahead",
    "network_times",
    "pair_load",
    "reissue_table",
    "service_times",
]

PRIOR_REQUESTS = 20.0
"""A prior service time counts as much as so many measured requests."""
PRIOR_US = {RequestType.GENERATE.value: 50_000.0, RequestType.IMPORT.value: 10_000.0}
"""First guesses for the types that are no token operation on a loaded key, in microseconds."""
CAPACITY = 1.0
"""Seconds of work that a node does in a second: its token is one."""
LARGEST = 2**62
PERMILLE = 1000
CAPPED = (RequestType.GENERATE.value,)
CAP = 0.25
"""Slow requests take no more than this part of a node: capping them beats predicting them (measured)."""
COUNTED = 2
"""So many ticks tell what is asked for just now: one alone is noisy, more are late."""
DOWN_PRICE = 1_000.0
"""What a node that is down costs: seconds of waiting for each second of its work."""


@dataclass(frozen=True, slots=True)
class TableStamp:
    """A table's place in the order of tables, its times in milliseconds since the Unix epoch, the manifest's serial."""

    fencing_epoch: int
    counter: int
    issued_ms: int
    expires_ms: int
    cluster_serial: int = 0


def service_times(history: HistorySnapshot) -> FloatArray:
    """Service times (classes, nodes) in microseconds, at least 1.

    Measured; for few requests blended with what the other nodes take for the class, and that with the algorithm's
    prior. A node that was never asked is so taken for an average one, neither for a marvel nor for a wreck.
    """
    prior = np.array([_prior_us(each) for each in history.classes], dtype=np.float64).reshape(-1, 1)
    usual = _blended(history.busy_us.sum(axis=1, keepdims=True), history.requests.sum(axis=1, keepdims=True), prior)
    return np.asarray(np.maximum(_blended(history.busy_us, history.requests, usual), 1.0))


def _blended(busy_us: FloatArray, requests: FloatArray, prior_us: FloatArray) -> FloatArray:
    return np.asarray((busy_us + PRIOR_REQUESTS * prior_us) / (requests + PRIOR_REQUESTS))


def _prior_us(request_class: str) -> float:
    kind, _, algorithm = request_class.partition("/")
    return PRIOR_US.get(kind) or float(ALGORITHMS[algorithm].prior_us)


def network_times(history: HistorySnapshot) -> FloatArray:
    """How long the network takes from the clients to each node and back (nodes,), in microseconds.

    A node that nobody has measured yet is taken for an average one; all are 0 while none is.
    """
    told = history.network_us
    known = told[told > 0]
    if not known.size:
        return np.zeros(len(history.nodes))
    return np.asarray(np.where(told > 0, told, known.mean()))


def load_ahead(history: HistorySnapshot, forecast: Forecast) -> tuple[FloatArray, FloatArray]:
    """The highest P90 within both horizons by pair and by class, in requests per second.

    It is no less than what was counted last, which a forecast follows some ticks behind where nobody could foresee it.
    """
    return (
        np.maximum(
            _highest(forecast.pair_outlook.p90, None if forecast.slow_pairs is None else forecast.slow_pairs.p90),
            _counted(history.pair_counts, history.tick_ms),
        ),
        np.maximum(
            _highest(forecast.outlook.p90, None if forecast.slow is None else forecast.slow.p90),
            _counted(history.counts, history.tick_ms),
        ),
    )


def _highest(ticks: FloatArray, minutes: FloatArray | None) -> FloatArray:
    both = ticks if minutes is None else np.concatenate([ticks, minutes], axis=1)
    return np.asarray(both.max(axis=1, initial=0.0))


def _counted(counts: FloatArray, tick_ms: int) -> FloatArray:
    """Requests per second over the newest ticks (ticks, series); 0 if no node was heard in one of them."""
    newest = counts[-COUNTED:]
    if not len(newest) or not np.isfinite(newest).all():
        return np.zeros(counts.shape[1])
    return np.asarray(newest.mean(axis=0) * 1000 / tick_ms)


@dataclass(frozen=True, slots=True)
class PairLoad:
    """The load of the warmest (class, placement group) pairs, and which nodes hold their groups.

    ``row_class`` (pairs,) are indexes of the history's classes, ``demand`` (pairs,) requests per second; the holders of
    pair g are ``nodes[indptr[g]:indptr[g + 1]]``.
    """

    row_class: IndexArray
    demand: FloatArray
    indptr: IndexArray
    nodes: IndexArray


def pair_load(history: HistorySnapshot, forecast: Forecast, places: Mapping[int, Sequence[int]]) -> PairLoad:
    """The forecast load of the pairs whose group's holders are known (``places``: node indexes by group)."""
    rows = [at for at, (_, group) in enumerate(history.pairs) if group in places]
    holders = [places[history.pairs[at][1]] for at in rows]
    return PairLoad(
        row_class=np.array([history.pairs[at][0] for at in rows], dtype=np.int32),
        demand=np.asarray(forecast.pair_mean[rows], dtype=np.float64),
        indptr=np.cumsum([0, *map(len, holders)]).astype(np.int32),
        nodes=np.array([node for row in holders for node in row], dtype=np.int32),
    )


def assignment_problem(
    history: HistorySnapshot, forecast: Forecast, pairs: PairLoad | None = None
) -> AssignmentProblem:
    """What the optimiser has to split: the mean forecast (the P90 in its place makes prices worse: measured).

    A row for each pair, and one for what is left of each class, which any node may serve, but none more than what is
    left of the groups that it holds.
    """
    nodes, network_us = len(history.nodes), network_times(history)
    capped = np.array([each.partition("/")[0] in CAPPED for each in history.classes], dtype=bool)
    whole = every_node(
        forecast.mean,
        service_times(history),
        np.array(history.up, dtype=bool),
        np.full(nodes, CAPACITY),
        np.zeros(nodes),
        capped=capped,
        cap=CAP,
    )
    whole = replace(whole, network_us=network_us[whole.nodes])
    if pairs is None or not len(pairs.demand):
        return whole
    known = np.bincount(pairs.row_class, pairs.demand, minlength=len(history.classes))
    entries, up = len(pairs.nodes), max(1, sum(history.up))
    held = min(1.0, entries / len(pairs.demand) / up)
    return replace(
        whole,
        demand=np.concatenate([pairs.demand, np.maximum(forecast.mean - known, 0.0)]),
        row_class=np.concatenate([pairs.row_class, whole.row_class]),
        indptr=np.concatenate([pairs.indptr, entries + whole.indptr[1:]]).astype(np.int32),
        nodes=np.concatenate([pairs.nodes, whole.nodes]),
        network_us=np.concatenate([network_us[pairs.nodes], whole.network_us]),
        most=np.concatenate([np.ones(entries), np.full(len(whole.nodes), held)]),
        fair=np.concatenate([np.ones(entries), whole.fair]),
    )


def generate_routing_table(
    history: HistorySnapshot,
    forecast: Forecast,
    assignment: Assignment,
    stamp: TableStamp,
    *,
    groups: Sequence[tuple[int, Sequence[int]]] = (),
    hints: Sequence[tuple[int, Sequence[int]]] = (),
) -> RoutingTable:
    """The table: service times, node prices and class caps in 1/1000, and the groups that are not where they would be.

    ``groups`` and ``hints`` are (group, node indexes), the hottest first. A node that is down is told as dear.
    ``ValueError`` if the parts do not speak of the same classes and nodes.
    """
    shape = (len(history.classes), len(history.nodes))
    if forecast.classes != history.classes or assignment.weights.shape != shape:
        raise ValueError(f"forecast or assignment do not match {shape[0]} classes and {shape[1]} nodes")
    up = np.array(history.up, dtype=bool)
    return RoutingTable(
        fencing_epoch=stamp.fencing_epoch,
        counter=stamp.counter,
        issued_ms=stamp.issued_ms,
        expires_ms=stamp.expires_ms,
        nodes=list(history.nodes),
        classes=list(history.classes),
        service=pack_service(service_times(history).tolist()),
        price=_integers(np.where(up, assignment.price, DOWN_PRICE) * PERMILLE),
        caps=_integers(assignment.caps * PERMILLE),
        groups=[(group, list(nodes)) for group, nodes in groups],
        hints=[(group, list(nodes)) for group, nodes in hints],
        forecast=[
            (mean, p90)
            for mean, p90 in zip(_integers(forecast.mean * 1000), _integers(forecast.p90 * 1000), strict=True)
        ],
        cluster_serial=stamp.cluster_serial,
    )


def reissue_table(table: RoutingTable, stamp: TableStamp) -> RoutingTable:
    """The same decision with a new place in the order and a new expiry."""
    return msgspec.structs.replace(
        table,
        fencing_epoch=stamp.fencing_epoch,
        counter=stamp.counter,
        issued_ms=stamp.issued_ms,
        expires_ms=stamp.expires_ms,
        cluster_serial=stamp.cluster_serial,
    )


def _integers(values: FloatArray) -> list[int]:
    return [round(value) for value in np.clip(values, 0.0, float(LARGEST)).tolist()]
