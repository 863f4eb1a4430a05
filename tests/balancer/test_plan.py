"""The plan: from an immutable snapshot to a routing table that clients accept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.forecast import predict_load
from balancer.history import HistorySnapshot
from balancer.loop import decide
from balancer.optimizer import optimize_assignment
from balancer.plan import (
    TableStamp,
    _permille,
    assignment_problem,
    generate_routing_table,
    reissue_table,
    service_times,
)
from engine.keys import ALGORITHMS
from engine.protocol.routing import Router, RoutingTable, open_table, seal_table

CLASSES = ("sign/ed25519", "encrypt/aes-256-gcm", "generate/rsa-2048-pss-sha256")


def snapshot(world: Any, *, up: tuple[bool, ...] = (True,) * 6, rate: float = 100.0) -> HistorySnapshot:
    requests, busy_us = np.zeros((3, 6)), np.zeros((3, 6))
    requests[0], busy_us[0] = 1000.0, 1000.0 * np.array([100.0, 100, 100, 100, 100, 400])
    return HistorySnapshot(
        1000,
        CLASSES,
        tuple(world.cluster.nodes),
        np.full((120, 3), [rate, 2 * rate, 0]),
        requests,
        busy_us,
        up,
        (0,) * 6,
    )


def stamp(world: Any, counter: int = 1, epoch: int = 1) -> TableStamp:
    return TableStamp(epoch, counter, world.now_ms, world.now_ms + 10_000)


def table(world: Any, state: HistorySnapshot, counter: int = 1) -> RoutingTable:
    return decide(state, stamp(world, counter), 10.0)


def test_a_table_is_accepted_by_clients(world: Any) -> None:
    """A sealed table opens, its rows fit, and a client's router ranks by it."""
    made = table(world, snapshot(world))
    opened = open_table(seal_table(made, world.keys["balancer"]), world.cluster, world.now_ms)
    assert opened == made
    assert (tuple(opened.classes), tuple(opened.nodes)) == (CLASSES, tuple(world.cluster.nodes))
    assert [sum(row) for row in opened.weights] == [1000, 1000, 1000]
    router = Router(world.cluster)
    assert router.install(opened)
    assert set(router.rank(CLASSES[0], "k", world.nodes, 0.0)) == set(world.nodes)


def test_service_times_are_measured_or_prior(world: Any) -> None:
    """Many requests speak for themselves; where there is none the algorithm's prior stands."""
    times = service_times(snapshot(world))
    assert times[0] == pytest.approx([100, 100, 100, 100, 100, 400], rel=0.02)
    assert times[1] == pytest.approx(np.full(6, ALGORITHMS["aes-256-gcm"].prior_us))
    assert (times[2] > 10_000).all()


def test_a_node_never_asked_is_taken_for_an_average_one(world: Any) -> None:
    """A prior that is far off does not draw all requests to the nodes that were not measured."""
    state = snapshot(world)
    requests, busy_us = np.zeros((3, 6)), np.zeros((3, 6))
    requests[0, :2], busy_us[0, :2] = 500.0, 500.0 * 1000
    made = table(world, replace(state, requests=requests, busy_us=busy_us))
    assert made.service_us[0] == pytest.approx([1000] * 6, rel=0.02)
    assert max(made.weights[0]) < 200


def test_measured_times_are_in_the_table(world: Any) -> None:
    """The table carries each node's own time."""
    assert table(world, snapshot(world)).service_us[0][5] == pytest.approx(400, rel=0.02)


def test_dead_nodes_have_no_weight(world: Any) -> None:
    """A node that is down gets 0 in every class, the rest still sums to 1000; with none up all is 0."""
    up = (True, False, True, True, False, True)
    made = table(world, snapshot(world, up=up))
    for row in made.weights:
        assert [row[1], row[4], sum(row)] == [0, 0, 1000]
    assert table(world, snapshot(world, up=(False,) * 6)).weights == [[0] * 6] * 3


def test_load_makes_prices(world: Any) -> None:
    """An idle cluster has no prices; a loaded one has."""
    assert table(world, snapshot(world, rate=0)).price_us == [0] * 6
    busy = table(world, snapshot(world, rate=40_000.0))
    assert min(busy.price_us) > 0
    assert busy.forecast[0][0] == pytest.approx(40_000_000, rel=0.01)
    assert busy.forecast[0][0] <= busy.forecast[0][1]


def test_a_cluster_without_requests_has_a_table(world: Any) -> None:
    """Before the first request the table names the nodes and no class."""
    empty = HistorySnapshot(
        1000, (), tuple(world.nodes), np.zeros((0, 0)), np.zeros((0, 6)), np.zeros((0, 6)), (True,) * 6, (0,) * 6
    )
    made = table(world, empty)
    assert (made.classes, made.weights, made.price_us) == ([], [], [0] * 6)
    assert open_table(seal_table(made, world.keys["balancer"]), world.cluster, world.now_ms) == made


def test_a_reissued_table_is_the_same_decision_with_a_new_place(world: Any) -> None:
    """Only order and times change, and it replaces its elder."""
    first = table(world, snapshot(world))
    second = reissue_table(first, replace(stamp(world, 2), expires_ms=world.now_ms + 20_000))
    assert second.order > first.order
    assert (second.weights, second.price_us) == (first.weights, first.price_us)
    assert open_table(seal_table(second, world.keys["balancer"]), world.cluster, world.now_ms, first) == second


def test_parts_of_different_snapshots_are_refused(world: Any) -> None:
    """A forecast for other classes is no part of this table; a node that died after the assignment gets nothing."""
    state = snapshot(world)
    forecast = predict_load(state)
    assignment = optimize_assignment(assignment_problem(state, forecast))
    late = replace(state, up=(False, *state.up[1:]))
    assert generate_routing_table(late, forecast, assignment, stamp(world)).weights[0][0] == 0
    with pytest.raises(ValueError, match="do not match 3 classes and 6 nodes"):
        generate_routing_table(state, replace(forecast, classes=CLASSES[:2]), assignment, stamp(world))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_permille_keeps_the_sum_and_zeros(row: list[float]) -> None:
    """Rounded weights sum to 1000 (0 if there is nothing), zeros stay zeros, nothing moves by more than one."""
    exact = np.array(row)
    rounded = _permille(exact)
    assert sum(rounded) == (1000 if exact.sum() > 0 else 0)
    assert all(value == 0 for value, given_value in zip(rounded, row, strict=True) if given_value == 0)
    if exact.sum() > 0:
        assert np.abs(np.array(rounded) - exact / exact.sum() * 1000).max() <= 1
