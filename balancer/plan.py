"""From a snapshot of the history to the routing table: pure functions. It knows no socket, clock or solver's API."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from balancer.forecast import Forecast
from balancer.history import HistorySnapshot
from balancer.routing import Assignment, AssignmentProblem, every_node
from engine.keys import ALGORITHMS, RequestType
from engine.protocol.routing import RoutingTable

__all__ = ["TableStamp", "assignment_problem", "generate_routing_table", "reissue_table", "service_times"]

FloatArray = NDArray[np.float64]

PRIOR_REQUESTS = 20.0
"""A prior service time counts as much as so many measured requests."""
PRIOR_US = {RequestType.GENERATE.value: 50_000.0, RequestType.IMPORT.value: 10_000.0}
"""First guesses for the types that are no token operation on a loaded key, in microseconds."""
CAPACITY = 1.0
"""Seconds of work that a node does in a second: its token is one."""
LARGEST = 2**62
PERMILLE = 1000


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


def assignment_problem(history: HistorySnapshot, forecast: Forecast) -> AssignmentProblem:
    """What the optimiser has to split: the mean forecast (the P90 in its place makes prices worse: measured)."""
    nodes = len(history.nodes)
    return every_node(
        demand=forecast.mean,
        service_us=service_times(history),
        up=np.array(history.up, dtype=bool),
        capacity=np.full(nodes, CAPACITY),
        background=np.zeros(nodes),
    )


def generate_routing_table(
    history: HistorySnapshot, forecast: Forecast, assignment: Assignment, stamp: TableStamp
) -> RoutingTable:
    """The table: weights in 1/1000 (rows sum to 1000; 0 for a node that is down), service times and node prices.

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
        service_us=[_integers(row) for row in service_times(history)],
        weights=[_permille(np.where(up, row, 0.0)) for row in assignment.weights],
        price_us=_integers(assignment.price_us),
        groups=[],
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


def _permille(row: FloatArray) -> list[int]:
    """The row in 1/1000 by largest remainders: the sum is kept, and 0 stays 0."""
    total = float(row.sum())
    if total <= 0:
        return [0] * len(row)
    exact = row / total * PERMILLE
    floor = np.floor(exact).astype(np.int64)
    missing = PERMILLE - int(floor.sum())
    floor[np.argsort(-(exact - floor), kind="stable")[:missing]] += 1
    return [int(value) for value in floor]
