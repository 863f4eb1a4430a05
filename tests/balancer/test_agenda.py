"""When to plan: how busy today's holders would be, and what of that is reason for a plan."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from balancer.agenda import DISTANCE_S, FULL, HOLDS, PLAN_S, WORSE, Agenda, busiest
from balancer.placement import PlacementProblem
from balancer.program import FloatArray

NODES = 6
GROUPS = (7, 11)


def problem(*work: float, today: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3)), rest: float = 0.0) -> PlacementProblem:
    """Groups with so much work in seconds per second, on nodes that take a millisecond for a request."""
    width = max(map(len, today))
    return PlacementProblem(
        load=np.array(work)[:, None] * 1000,
        service_us=np.full((1, NODES), 1000.0),
        capacity=np.ones(NODES),
        background=np.full(NODES, rest),
        network_us=np.zeros(NODES),
        price=np.zeros(NODES),
        up=np.ones(NODES, dtype=bool),
        domain=np.arange(NODES, dtype=np.int32),
        near=(),
        threshold=np.full(len(work), 2, np.int32),
        wanted=np.full(len(work), 2, np.int32),
        today=np.array([[*row, *[-1] * (width - len(row))] for row in today], np.int32),
        budget=4,
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (problem(0.0, 0.0), 0.0),
        (problem(1.0, 0.4), 0.5),
        (problem(1.0, 0.4, rest=0.3), 0.8),
        (problem(3.0, 0.4), 2.0),
        (problem(0.9, 0.9, today=((0, 1), (1, 2))), 0.6),
        (problem(1.5, 0.4, today=((0, 1, 4), (2, 3))), 0.5),
        (replace(problem(0.5, 0.5), up=np.arange(NODES) > 0), 0.5),
    ],
    ids=["none", "even", "background", "too much", "shared", "three holders", "one down"],
)
def test_the_busiest_node_has_what_the_best_split_leaves_it(asked: PlacementProblem, expected: float) -> None:
    assert busiest(asked) == pytest.approx(expected, abs=0.12)  # the waiting is linear in between
    assert (busiest(asked) > FULL) == (expected > FULL)


def test_a_settled_load_is_planned_now_and_then_alone() -> None:
    """Whatever the noise, as long as today's holders do."""
    agenda = Agenda(0.0)
    random = np.random.default_rng(4)
    times = [at for at in range(200) if agenda.due(problem(*noisy(random, 1.5)), GROUPS, float(at))]
    assert times == [30, 60, 90, 120, 150, 180]
    assert agenda.urgent == 0


def noisy(random: np.random.Generator, work: float) -> FloatArray:
    return np.asarray(work * random.uniform(0.8, 1.2, 2))


def test_a_load_that_holders_cannot_do_is_planned_at_once_and_once() -> None:
    """At any tick of the period; not again for the same load and holders, however it trembles."""
    agenda = Agenda(0.0)
    random = np.random.default_rng(5)
    assert not agenda.due(problem(1.0, 0.5), GROUPS, 10.0)
    assert agenda.due(problem(3.0, 0.5), GROUPS, 11.0)
    assert agenda.urgent == 1
    again = [at for at in range(12, 100) if agenda.due(problem(*(noisy(random, 1.0) * [3, 0.5] / 1.2)), GROUPS, at)]
    assert again == [41, 71]
    assert agenda.urgent == 1


def test_it_is_urgent_again_once_it_was_well_is_worse_or_holders_moved() -> None:
    hot = problem(3.0, 0.5)

    def after_one() -> Agenda:
        agenda = Agenda(0.0)
        assert agenda.due(hot, GROUPS, 10.0)
        return agenda

    agenda = after_one()
    assert not agenda.due(problem(FULL + HOLDS, 0.5), GROUPS, 13.0)
    assert not agenda.due(hot, GROUPS, 14.0)
    agenda = after_one()
    assert not agenda.due(problem(1.0, 0.5), GROUPS, 13.0)
    assert agenda.due(hot, GROUPS, 14.0)
    assert after_one().due(problem(3.0 * WORSE, 0.5), GROUPS, 13.0)
    moved = problem(3.5, 0.5, today=((0, 1, 4), (2, 3)))
    assert after_one().due(moved, GROUPS, 13.0)
    assert not after_one().due(moved, GROUPS, 10.0 + DISTANCE_S / 2)


def test_it_can_be_had_without_urgency() -> None:
    agenda = Agenda(0.0, urgent=False)
    assert not agenda.due(problem(3.0, 0.5), GROUPS, PLAN_S - 1)
    assert agenda.due(problem(3.0, 0.5), GROUPS, PLAN_S)
