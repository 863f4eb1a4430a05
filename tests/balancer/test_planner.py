"""The planner: from what the control loop knows to a plan that is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from balancer.forecast import predict_load
from balancer.groups import GroupPlaces
from balancer.history import HistorySnapshot
from balancer.optimizer import optimize_assignment, optimize_placement
from balancer.plan import assignment_problem, network_times, pair_load
from balancer.planner import Plan, Planner, placement_problem

CLASSES = ("sign/ed25519", "encrypt/aes-256-gcm")


def snapshot(world: Any, *, rate: float = 2_000.0, groups: int = 24) -> HistorySnapshot:
    """One class is used evenly, the other in a few groups far more than in others."""
    requests, busy_us = np.full((2, 6), 1000.0), np.full((2, 6), 100_000.0)
    pairs = tuple((0, group) for group in range(groups))
    hot = rate / np.arange(1, groups + 1)
    pair_counts = np.tile(hot, (120, 1))
    counts = np.column_stack([pair_counts.sum(axis=1), np.full(120, 50.0)])
    return HistorySnapshot(
        1000,
        CLASSES,
        tuple(world.cluster.nodes),
        counts,
        requests,
        busy_us,
        (True,) * 6,
        (0,) * 6,
        tick=120,
        pairs=pairs,
        pair_counts=pair_counts,
    )


def places(world: Any, state: HistorySnapshot, shares: int = 3) -> dict[int, Any]:
    groups = [group for _, group in state.pairs]
    return dict(GroupPlaces().of(world.cluster, state.nodes, groups, shares))


@pytest.fixture
def planner() -> Iterator[Planner]:
    planner = Planner(0.0)
    yield planner
    planner.stop()


def told(planner: Planner, *offered: Any) -> str:
    before = planner.plan
    until = time.monotonic() + 30
    while planner.plan is before:
        assert time.monotonic() < until
        planner.offer(*offered)  # which is not taken while an earlier one is looked at
        time.sleep(0.005)
    return planner.plan.text


def test_places_are_those_of_the_manifest_and_come_little_by_little(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first holders of the computed order; a call works out so many, and keeps them."""
    monkeypatch.setattr("balancer.groups.WORK", 12)
    known, nodes = GroupPlaces(), tuple(world.cluster.nodes)
    assert list(known.of(world.cluster, nodes, range(9), 3)) == [0, 1]
    assert list(known.of(world.cluster, nodes, range(9), 3)) == [0, 1, 2, 3]
    for group, holders in known.of(world.cluster, nodes, range(9), 3).items():
        assert tuple(nodes[index] for index in holders) == world.cluster.group_holders(group)[:3]
    assert list(known.of(world.cluster, nodes, range(9), 2)) == [0, 1]
    assert dict(known.of(world.cluster, ("node-0",), range(9), 3)) == {}


def test_the_load_of_warm_groups_goes_to_their_holders(world: Any) -> None:
    """Rows of known groups alone; what is left of the class is everybody's; nothing is counted twice."""
    state = snapshot(world)
    forecast = predict_load(state)
    known = places(world, state)
    del known[3]
    pairs = pair_load(state, forecast, known)
    assert len(pairs.demand) == 23
    problem = assignment_problem(state, forecast, pairs)
    assert problem.demand.sum() == pytest.approx(forecast.mean.sum(), rel=0.01)
    assert problem.nodes[:3].tolist() == list(known[0])


def test_a_plan_is_made_from_the_highest_forecast(world: Any) -> None:
    """Loads are P90s over the horizon, today's holders are the manifest's, what is not warm is background."""
    state = snapshot(world)
    forecast = predict_load(state)
    made = placement_problem(state, forecast, world.cluster, places(world, state), (2, 3))
    assert made is not None
    problem, groups = made
    assert groups == tuple(range(24))
    assert problem.load[:, 0] == pytest.approx(forecast.pair_outlook.p90.max(axis=1))
    assert (problem.background > 0).all()
    assert len(set(problem.domain.tolist())) == 3
    assert problem.budget == 3
    assert placement_problem(state, forecast, world.cluster, {}, (2, 3)) is None


def test_nothing_is_planned_while_the_figures_are_of_other_nodes(world: Any) -> None:
    """A node came or went since the nodes were asked: the next figures are of those that there are."""
    state = snapshot(world)
    forecast, known = predict_load(state), places(world, state)
    one = replace(state, nodes=state.nodes[:-1], requests=state.requests[:, :-1], up=state.up[:-1])
    assert placement_problem(one, forecast, world.cluster, known, (2, 3)) is None
    assert (
        placement_problem(replace(state, nodes=("other", *state.nodes[1:])), forecast, world.cluster, known, (2, 3))
        is None
    )
    assert placement_problem(state, forecast, world.cluster, known, (2, 3)) is not None


def test_a_far_node_gets_less_to_do_and_to_hold(world: Any) -> None:
    """Both programs know how far the clients are; a node that nobody measured is as far as the others on average."""
    state = snapshot(world, rate=200.0)
    forecast, known = predict_load(state), places(world, state)
    far = known[0][0]
    ways = np.full(6, 200.0)
    ways[far], ways[known[0][1]] = 20_000.0, 0.0

    def decided(state: HistorySnapshot) -> tuple[float, int]:
        pairs = pair_load(state, forecast, known)
        problem = assignment_problem(state, forecast, pairs)
        split = optimize_assignment(problem).split
        made = placement_problem(state, forecast, world.cluster, known, (2, 3))
        assert made is not None
        plan = optimize_placement(made[0])
        return float(split[problem.nodes == far].sum()), sum(not step.add and step.node == far for step in plan.steps)

    near = decided(state)
    away = decided(replace(state, network_us=ways))
    assert away[0] < near[0] / 2
    assert away[1] > near[1]
    assert network_times(replace(state, network_us=ways))[known[0][1]] == pytest.approx((20_000 + 4 * 200) / 5)


def test_what_was_counted_last_counts_where_the_forecast_says_less(world: Any) -> None:
    """Over two ticks that were heard."""
    state = snapshot(world)
    forecast, known = predict_load(state), places(world, state)

    def load(*newest: float) -> float:
        counts = state.pair_counts.copy()
        counts[-len(newest) :, 5] = newest
        made = placement_problem(replace(state, pair_counts=counts), forecast, world.cluster, known, (2, 3))
        assert made is not None
        return float(made[0].load[5, 0])

    usual = float(forecast.pair_outlook.p90[5].max())
    assert load(9_000.0, 9_000.0) == 9_000.0
    assert load(5_000.0, 9_000.0) == 7_000.0
    assert load(9_000.0, 5.0, 5.0) == usual
    assert load(9_000.0, float("nan")) == usual


def test_plans_are_told(world: Any, planner: Planner) -> None:
    """A hot cluster gets moves, one that cannot be placed a sentence, and the last good plan stays."""
    state = snapshot(world)
    forecast = predict_load(state)
    first = told(planner, state, forecast, world.cluster, places(world, state), (2, 3))
    assert first.startswith("24 warm placement groups; ")
    assert planner.plan.placement is not None
    good = planner.plan.placement
    assert (
        told(planner, state, forecast, world.cluster, places(world, state, 5), (2, 5))
        == "3 failure domains with 6 nodes up cannot keep 2-of-5 below the threshold"
    )
    assert planner.plan.placement is good
    broken = replace(state, up=(True,))
    with capture_logs() as logged:
        assert "Error" in told(planner, broken, forecast, world.cluster, places(world, state), (2, 3))
    assert next(each["event"] for each in logged) == "no placement"
    assert planner.plan.placement is good
    assert told(planner, state, forecast, world.cluster, {}, (2, 3)) == "no warm placement group"


def test_plans_are_made_now_and_then_and_when_holders_will_not_do(world: Any) -> None:
    now = [0.0]
    planner = Planner(30.0, lambda: now[0])

    def offered(at_s: float, rate: float) -> Plan:
        now[0] = at_s
        state = snapshot(world, rate=rate)
        planner.offer(state, predict_load(state), world.cluster, places(world, state), (2, 3))
        assert planner._running is not None
        planner._running.result(30)
        return planner.plan

    assert offered(29.0, 2_000.0).placement is None
    timely = offered(30.0, 2_000.0)
    assert timely.placement is not None
    assert offered(35.0, 2_000.0) is timely
    urgent = offered(36.0, 16_000.0)
    assert urgent is not timely
    assert urgent.placement is not timely.placement
    assert offered(39.0, 16_000.0) is urgent
    planner.stop()


def test_one_plan_at_a_time(world: Any, planner: Planner) -> None:
    """What is offered while one is made is not looked at."""
    go_on = threading.Event()
    planner._running = running = planner._pool.submit(lambda: go_on.wait(30) and None)
    state = snapshot(world)
    planner.offer(state, predict_load(state), world.cluster, places(world, state), (2, 3))
    assert planner._running is running
    go_on.set()
