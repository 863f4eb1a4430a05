"""The plan: from an immutable snapshot to a routing table that clients accept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from balancer.forecast import predict_load
from balancer.history import HistorySnapshot
from balancer.issue import TableIssuer
from balancer.loop import decide
from balancer.optimizer import optimize_assignment
from balancer.plan import (
    PairLoad,
    TableStamp,
    assignment_problem,
    generate_routing_table,
    reissue_table,
    service_times,
)
from engine.keys import ALGORITHMS
from engine.protocol.routing import Router
from engine.protocol.table import TABLE_MAX, RoutingTable, TableReader, open_table, seal_table

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
    assert opened.caps == [1000, 1000, 250]
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
    assert [made.service_us(0, node) for node in range(6)] == pytest.approx([1000] * 6, rel=0.05)


def test_measured_times_are_in_the_table(world: Any) -> None:
    """The table carries each node's own time."""
    assert table(world, snapshot(world)).service_us(0, 5) == pytest.approx(400, rel=0.05)


def test_dead_nodes_are_dear(world: Any) -> None:
    """A node that is down costs more than any load does; with none up there is a table too."""
    up = (True, False, True, True, False, True)
    made = table(world, snapshot(world, up=up))
    assert [price == 1_000_000 for price in made.price] == [not each for each in up]
    assert table(world, snapshot(world, up=(False,) * 6)).price == [1_000_000] * 6


def test_load_makes_prices(world: Any) -> None:
    """An idle cluster has no prices; a loaded one has."""
    assert table(world, snapshot(world, rate=0)).price == [0] * 6
    busy = table(world, snapshot(world, rate=40_000.0))
    assert min(busy.price) > 0
    assert busy.forecast[0][0] == pytest.approx(40_000_000, rel=0.01)
    assert busy.forecast[0][0] <= busy.forecast[0][1]


def test_a_cluster_without_requests_has_a_table(world: Any) -> None:
    """Before the first request the table names the nodes and no class."""
    empty = HistorySnapshot(
        1000, (), tuple(world.nodes), np.zeros((0, 0)), np.zeros((0, 6)), np.zeros((0, 6)), (True,) * 6, (0,) * 6
    )
    made = table(world, empty)
    assert (made.classes, made.service, made.price) == ([], b"", [0] * 6)
    assert open_table(seal_table(made, world.keys["balancer"]), world.cluster, world.now_ms) == made


def test_a_reissued_table_is_the_same_decision_with_a_new_place(world: Any) -> None:
    """Only order and times change, and it replaces its elder."""
    first = table(world, snapshot(world))
    second = reissue_table(first, replace(stamp(world, 2), expires_ms=world.now_ms + 20_000))
    assert second.order > first.order
    assert (second.service, second.price) == (first.service, first.price)
    assert open_table(seal_table(second, world.keys["balancer"]), world.cluster, world.now_ms, first) == second


def test_parts_of_different_snapshots_are_refused(world: Any) -> None:
    """A forecast for other classes is no part of this table; a node that died after the assignment is dear."""
    state = snapshot(world)
    forecast = predict_load(state)
    assignment = optimize_assignment(assignment_problem(state, forecast))
    late = replace(state, up=(False, *state.up[1:]))
    assert generate_routing_table(late, forecast, assignment, stamp(world)).price[0] == 1_000_000
    with pytest.raises(ValueError, match="do not match 3 classes and 6 nodes"):
        generate_routing_table(state, replace(forecast, classes=CLASSES[:2]), assignment, stamp(world))


def test_warm_groups_are_rows_of_their_own(world: Any) -> None:
    """A pair's load goes to its holders alone, what is left of its class to anybody, and nothing is counted twice."""
    state = snapshot(world)
    forecast = predict_load(state)
    pairs = PairLoad(
        row_class=np.array([0, 1], dtype=np.int32),
        demand=np.array([forecast.mean[0] / 2, 2 * forecast.mean[1]]),
        indptr=np.array([0, 2, 5], dtype=np.int32),
        nodes=np.array([4, 1, 0, 2, 3], dtype=np.int32),
    )
    asked = assignment_problem(state, forecast, pairs)
    assert asked.demand.tolist() == pytest.approx(
        [forecast.mean[0] / 2, 2 * forecast.mean[1], forecast.mean[0] / 2, 0, 0]
    )
    answer = optimize_assignment(asked, time_limit_s=30)
    assert answer.split[:2].sum() == pytest.approx(1)
    assert answer.split[2:5].sum() == pytest.approx(1)
    assert answer.caps.tolist() == [1, 1, 0.25]
    made = generate_routing_table(state, forecast, answer, stamp(world), groups=[(7, [1, 4])], hints=[(7, [4])])
    assert (made.groups, made.hints, made.caps) == ([(7, [1, 4])], [(7, [4])], [1000, 1000, 250])
    assert open_table(seal_table(made, world.keys["balancer"]), world.cluster, world.now_ms) == made


def test_what_goes_out_is_whole_or_a_difference(world: Any) -> None:
    """In a large cluster most tables are differences, and who reads them in order has what the balancer decided."""
    nodes = [f"node-{index}" for index in range(400)]
    issuer, reader, newest, told = TableIssuer(world.keys["balancer"]), TableReader(), None, []
    random = np.random.default_rng(4)
    base = msgspec.structs.replace(
        table(world, snapshot(world)), nodes=nodes, service=bytes(random.integers(60, 90, 1200, dtype=np.uint8))
    )
    for counter in range(1, 12):
        price = [int(each) for each in random.integers(0, 100, 400)]
        made = msgspec.structs.replace(base, counter=counter, price=price, groups=[(counter, [1, 2, 3])])
        issued = issuer.issue(made)
        told.append(len(issued.message))
        assert open_table(issued.whole, world.cluster, world.now_ms).counter == 1 + (counter - 1) // 8 * 8
        newest = reader.read(issued.message, world.cluster, world.now_ms, newest)
        assert newest == issued.table == made
    assert all(size < 0.5 * told[0] for size in told[1:8])
    assert told[8] > 0.9 * told[0]


def test_small_tables_go_out_whole(world: Any) -> None:
    """A difference that saves next to nothing is not worth a second document."""
    issuer = TableIssuer(world.keys["balancer"])
    for counter in range(1, 4):
        issued = issuer.issue(table(world, snapshot(world), counter))
        assert issued.message == issued.whole
        assert issued.remark == ""


def test_a_table_that_is_too_long_is_told(world: Any) -> None:
    """What a reply cannot hold is left out, with a remark."""
    made = msgspec.structs.replace(table(world, snapshot(world)), groups=[(g, [0, 1, 2, 3, 4, 5]) for g in range(9000)])
    issued = TableIssuer(world.keys["balancer"]).issue(made)
    assert len(issued.whole) <= TABLE_MAX
    assert "of 9000 placement groups" in issued.remark
    assert len(issued.table.groups) > 4000
