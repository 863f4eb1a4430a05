"""The routing program: balance, prices, and their agreement with what the optimum really does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.optimizer import RoutingSolver, SolverError, optimize_assignment
from balancer.routing import BREAKPOINTS, UNEVEN_COST, Assignment, AssignmentProblem, every_node, segments


def problem(
    demand: list[float],
    service_us: list[list[float]],
    *,
    up: list[bool] | None = None,
    background: list[float] | None = None,
) -> AssignmentProblem:
    nodes = len(service_us[0])
    return every_node(
        np.array(demand, dtype=float),
        np.array(service_us, dtype=float),
        np.array(up if up is not None else [True] * nodes),
        np.ones(nodes),
        np.array(background if background is not None else [0.0] * nodes),
    )


def solve(*args: object, **kwargs: object) -> Assignment:
    return optimize_assignment(problem(*args, **kwargs), time_limit_s=30)  # type: ignore[arg-type]


@pytest.mark.parametrize("load", [0.001, 0.3, 0.7, 0.95, 3.0])
def test_equal_nodes_share_evenly(load: float) -> None:
    """At any load, overload included, equal nodes get equal parts of every class."""
    answer = solve([load * 4000 / 2, load * 400 / 2], [[1000.0] * 4, [10_000.0] * 4])
    assert answer.weights == pytest.approx(np.full((2, 4), 0.25), abs=1e-6)
    assert answer.utilisation == pytest.approx(np.full(4, load), rel=1e-6)


def test_noise_in_the_service_times_moves_nothing() -> None:
    """Nodes that differ by less than a measurement's noise share evenly, at low load too."""
    answer = solve([1000.0, 1000.0], [[50.0, 51.0, 49.5, 50.2], [100.0, 99.0, 101.0, 100.5]])
    assert answer.weights == pytest.approx(np.full((2, 4), 0.25), abs=0.01)


def test_faster_nodes_do_more() -> None:
    """Twice as fast is more work, and no node is left to drown."""
    answer = solve([5000.0], [[100.0, 200.0, 400.0]])
    assert answer.weights[0, 0] > answer.weights[0, 1] > answer.weights[0, 2]
    assert answer.utilisation.max() < 0.9
    assert answer.overload == 0


def test_specialists_get_their_class() -> None:
    """Nodes that are good at different classes divide them."""
    answer = solve([500.0, 500.0], [[1000.0, 10_000.0], [10_000.0, 1000.0]])
    assert answer.weights == pytest.approx(np.eye(2), abs=1e-6)


def test_no_load_is_even_and_free() -> None:
    """Without load the weights are even over the nodes that are up, and prices are zero."""
    answer = solve([0.0, 0.0], [[100.0, 200.0, 300.0]] * 2, up=[True, False, True])
    assert answer.weights.tolist() == [[0.5, 0, 0.5]] * 2
    assert answer.price.tolist() == [0, 0, 0]


def test_a_loaded_node_has_a_price_and_an_idle_one_none() -> None:
    """A busy node costs others; one with nothing to do costs nobody."""
    answer = solve([800.0], [[1000.0, 100_000.0]])
    assert answer.price[0] > 0
    assert answer.price[1] == 0
    shifted = solve([100.0], [[1000.0, 1000.0]], background=[0.8, 0.0])
    assert shifted.price[0] > shifted.price[1] > 0
    assert shifted.weights[0, 1] == pytest.approx(1)


def test_a_price_is_in_seconds_of_waiting() -> None:
    """At utilisation r one more second of work costs about dW/dr = (2r - r^2) / (1 - r)^2 of waiting."""
    answer = solve([750.0], [[1000.0]])
    exact = 1 / (1 - 0.75) ** 2 - 1
    assert answer.price[0] == pytest.approx(exact, rel=0.25)


def test_more_than_capacity_still_has_an_answer() -> None:
    """Overload is spread, told, and dear."""
    answer = solve([50_000.0], [[100.0, 200.0, 400.0]])
    assert answer.weights.sum() == pytest.approx(1)
    assert answer.overload > 1
    assert (answer.price > 100).all()
    assert np.isfinite(answer.price).all()


def test_dead_nodes_get_nothing() -> None:
    """A node that is down has no weight and no price; without any node nothing is assigned."""
    answer = solve([5000.0], [[100.0, 200.0, 400.0]], up=[False, True, True])
    assert answer.weights[0, 0] == answer.price[0] == 0
    assert answer.weights.sum() == pytest.approx(1)
    none = solve([5000.0], [[100.0, 200.0]], up=[False, False])
    assert none.weights.tolist() == [[0, 0]]


def test_no_class_and_mixed_idle_classes() -> None:
    """No class at all, and an idle class beside a busy one, are ordinary cases."""
    empty = every_node(np.zeros(0), np.zeros((0, 2)), np.ones(2, bool), np.ones(2), np.zeros(2))
    assert optimize_assignment(empty).weights.shape == (0, 2)
    answer = solve([0.0, 900.0], [[100.0, 100.0], [1000.0, 1000.0]])
    assert answer.weights == pytest.approx(np.full((2, 2), 0.5))


@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.01, 1.5),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_duals_are_the_slopes_of_the_optimum(classes: int, nodes: int, load: float, random: object) -> None:
    """A node's dual lies between what a little less and a little more work on it change the optimum by."""
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    service = rng.uniform(50, 5000, (classes, nodes))
    demand = rng.dirichlet(np.ones(classes)) * nodes * load / (service.mean(axis=1) * 1e-6)
    base = rng.uniform(0.01, 0.2, nodes)

    def optimum(background: np.ndarray) -> Assignment:
        return solve(demand.tolist(), service.tolist(), background=background.tolist())

    answer = optimum(base)
    step = 1e-5
    for node in range(nodes):
        shift = np.zeros(nodes)
        shift[node] = step
        more = (optimum(base + shift).cost - answer.cost) / step
        less = (answer.cost - optimum(base - shift).cost) / step
        tolerance = 1e-3 * (1 + abs(more))
        assert less - tolerance <= answer.price[node] <= more + tolerance


@given(st.integers(1, 5), st.integers(1, 6), st.floats(0, 3), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_any_load_is_split_whole(classes: int, nodes: int, load: float, random: object) -> None:
    """Rows sum to 1, nothing is negative or not finite, the work adds up, whatever the load."""
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    service = rng.uniform(1, 50_000, (classes, nodes))
    demand = rng.uniform(0, 1, classes) * load * nodes / (service.mean(axis=1) * 1e-6)
    up = rng.uniform(size=nodes) < 0.8
    answer = solve(demand.tolist(), service.tolist(), up=up.tolist())
    assert answer.weights.sum(axis=1) == pytest.approx(np.full(classes, float(up.any())))
    assert (answer.weights >= 0).all()
    assert not answer.weights[:, ~up].any()
    assert np.isfinite(answer.price).all()
    work = (demand[:, None] * service * 1e-6 * answer.weights).sum(axis=0)
    assert answer.utilisation == pytest.approx(work, abs=1e-6, rel=1e-6)


def test_cheaper_than_even_and_proportional_splits() -> None:
    """By the true M/M/1 waiting, the program's split beats the even one on unequal nodes."""
    demand, service = np.array([3000.0, 100.0]), np.array([[100.0, 200.0, 400.0], [4000.0, 2000.0, 4000.0]])
    answer = solve(demand.tolist(), service.tolist())

    def in_system(weights: np.ndarray) -> float:
        used = (demand[:, None] * service * 1e-6 * weights).sum(axis=0)
        return float((used / (1 - used)).sum())

    assert in_system(answer.weights) < 0.95 * in_system(np.full((2, 3), 1 / 3))


def test_a_solver_that_fails_says_so() -> None:
    """No time, no answer: an error of the project's tree, so that the last table stays."""
    with pytest.raises(SolverError, match="routing program"):
        optimize_assignment(problem([5000.0] * 20, [[100.0, 200.0, 400.0]] * 20), time_limit_s=0.0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"demand": np.array([np.nan])}, "demand has a value that is negative or not finite"),
        ({"service_us": np.array([[-1.0, 1.0]])}, "service_us has a value"),
        ({"capacity": np.zeros(2)}, "capacity has a value that is not above 0"),
        ({"up": np.ones(3, bool)}, "up has shape"),
    ],
)
def test_problems_are_validated(change: dict[str, np.ndarray], reason: str) -> None:
    """What is no load is refused at the door."""
    good = {
        "demand": np.ones(1),
        "service_us": np.ones((1, 2)),
        "up": np.ones(2, bool),
        "capacity": np.ones(2),
        "background": np.zeros(2),
    }
    with pytest.raises(ValueError, match=reason):
        every_node(**(good | change))


def test_the_breakpoints_grow() -> None:
    """The waiting is convex only if the segments are in order; the last true one ends below saturation."""
    assert (np.diff(BREAKPOINTS) > 0).all()
    assert BREAKPOINTS[-1] < 1


# --- rows of placement groups, caps, and warm starts ---


def grouped(
    rng: np.random.Generator, load: float, *, nodes: int = 7, rows: int = 12, classes: int = 3
) -> AssignmentProblem:
    """Rows with two to four holders each, ways of different length, unequal nodes, the last class capped."""
    counts = rng.integers(2, 5, rows)
    holders = np.concatenate([rng.choice(nodes, count, replace=False) for count in counts])
    service = rng.uniform(50, 5000, (classes, nodes))
    row_class = rng.integers(0, classes, rows)
    demand = rng.dirichlet(np.ones(rows)) * nodes * load / (service.mean(axis=1)[row_class] * 1e-6)
    entries = len(holders)
    return AssignmentProblem(
        demand=demand,
        row_class=row_class.astype(np.int32),
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        nodes=holders.astype(np.int32),
        service_us=service,
        up=np.ones(nodes, dtype=bool),
        capacity=rng.uniform(0.5, 4.0, nodes),
        background=rng.uniform(0.0, 0.1, nodes),
        network_us=rng.uniform(50, 3000, entries),
        most=rng.choice([0.6, 1.0], entries),
        fair=np.full(entries, 0.3),
        capped=np.arange(classes) == classes - 1,
        cap=0.25,
    )


def check_optimal(problem: AssignmentProblem, answer: Assignment) -> None:
    """The conditions of Karush, Kuhn and Tucker: no part of a row costs less at another of its nodes with room.

    What is charged is a request's service and way, the node's price, and beyond the cap the cap's own price; only where
    no capped class is near its cap is the latter known, so others are left out.
    """
    service = problem.service_us * 1e-6
    _, slopes = segments()
    for row, demand in enumerate(problem.demand):
        entries = np.arange(problem.indptr[row], problem.indptr[row + 1])
        entries = entries[problem.up[problem.nodes[entries]]]
        kind = problem.row_class[row]
        if not entries.size or demand == 0 or problem.capped[kind]:
            continue
        at = problem.nodes[entries]
        split, most = answer.split[entries], problem.most[entries]
        assert split.sum() == pytest.approx(min(1, most.sum()))
        assert (split <= most + 1e-6).all()
        cost = service[kind, at] * (1 + answer.price[at]) + problem.network_us[entries] * 1e-6
        dearer = UNEVEN_COST * service[kind, at]
        fair = problem.fair[entries]
        taken = np.where(split > fair + 1e-6, cost + dearer, np.where(split > 1e-6, cost, -np.inf))
        open_at = np.where(split < fair - 1e-6, cost, np.where(split < most - 1e-6, cost + dearer, np.inf))
        assert taken.max() <= open_at.min() + 1e-7 * (1 + slopes[-1] * service[kind].max())


def check_prices(problem: AssignmentProblem, answer: Assignment) -> None:
    """Each node's price is a slope of the waiting where the node stands, and the work adds up."""
    _, slopes = segments()
    work = np.zeros(len(problem.up))
    per_entry = (problem.demand * problem.service_us[problem.row_class].T).T * 1e-6
    rows = problem.entry_row
    np.add.at(work, problem.nodes, answer.split * per_entry[rows, problem.nodes])
    used = np.where(problem.up, (work + problem.background) / problem.capacity, 0)
    assert answer.utilisation[problem.up] == pytest.approx(used[problem.up], rel=1e-6, abs=1e-6)
    for node in np.flatnonzero(problem.up):
        left = np.searchsorted(BREAKPOINTS, answer.utilisation[node] - 1e-6, side="left") - 1
        right = np.searchsorted(BREAKPOINTS, answer.utilisation[node] + 1e-6, side="right") - 1
        assert slopes[max(left, 0)] - 1e-6 <= answer.price[node] <= slopes[right] + 1e-6


@given(st.integers(0, 2**32), st.floats(0.05, 1.3), st.booleans())
@settings(deadline=None, max_examples=60)
def test_rows_of_groups_are_split_at_least_cost(seed: int, load: float, death: bool) -> None:
    """Any rows, ways and nodes: the split is optimal by its own prices, and keeps every bound."""
    rng = np.random.default_rng(seed)
    asked = grouped(rng, load)
    if death:
        asked = replace(asked, up=rng.uniform(size=7) < 0.7)
    answer = optimize_assignment(asked, time_limit_s=30)
    assert not answer.split[~asked.up[asked.nodes]].any()
    assert (answer.split >= 0).all()
    check_optimal(asked, answer)
    check_prices(asked, answer)
    room = np.add.reduceat(asked.most * asked.up[asked.nodes], asked.indptr[:-1])
    assert answer.unserved == pytest.approx(asked.demand @ np.maximum(0, 1 - room))


@given(st.integers(0, 2**32))
@settings(deadline=None, max_examples=25)
def test_a_solver_that_is_kept_finds_what_a_new_one_finds(seed: int) -> None:
    """Loads, deaths, returns, new service times, other rows: the cost is the cold one's, tick by tick."""
    rng = np.random.default_rng(seed)
    kept, asked = RoutingSolver(), grouped(rng, 0.6)
    for step in range(8):
        if step == 5:
            asked = grouped(rng, 0.6)
        asked = replace(asked, demand=asked.demand * rng.uniform(0.5, 1.5, 12), up=rng.uniform(size=7) < 0.8)
        if step == 3:
            asked = replace(asked, service_us=asked.service_us * rng.uniform(0.7, 1.4, asked.service_us.shape))
        warm = optimize_assignment(asked, time_limit_s=30, solver=kept)
        cold = optimize_assignment(asked, time_limit_s=30)
        assert warm.cost == pytest.approx(cold.cost, rel=1e-6, abs=1e-9)
        check_optimal(asked, warm)


def test_small_changes_of_service_times_keep_the_model() -> None:
    """The solver goes on with a model whose times are a little off: a tick without new coefficients is quick."""
    asked = grouped(np.random.default_rng(5), 0.5)
    solver = RoutingSolver()
    first = solver.solve(asked, 30)
    assert solver.solve(replace(asked, service_us=asked.service_us * 1.04), 30).cost == pytest.approx(first.cost)
    assert solver.solve(replace(asked, service_us=asked.service_us * 1.2), 30).cost > first.cost * 1.01


def test_a_solver_that_failed_goes_on() -> None:
    """After a tick without time the next one has its answer."""
    asked, solver = grouped(np.random.default_rng(6), 0.7, nodes=40, rows=300), RoutingSolver()
    with pytest.raises(SolverError, match="routing program"):
        solver.solve(asked, 0.0)
    assert solver.solve(asked, 30).cost == pytest.approx(optimize_assignment(asked, time_limit_s=30).cost)


def test_slow_classes_keep_to_their_part_of_a_node() -> None:
    """Generation takes a quarter of the fast node and goes elsewhere with the rest; too much of it is told."""
    service = np.array([[50_000.0, 80_000.0, 80_000.0], [100.0, 100.0, 100.0]])

    def capped(demand: float, cap: float) -> Assignment:
        asked = every_node(
            np.array([demand, 100.0]),
            service,
            np.ones(3, bool),
            np.ones(3),
            np.zeros(3),
            capped=np.array([True, False]),
            cap=cap,
        )
        return optimize_assignment(asked, time_limit_s=30)

    free, held = capped(9.0, 1.0), capped(9.0, 0.25)
    assert free.weights[0, 0] * 9.0 * 0.05 > 0.25
    assert (held.weights[0] * 9.0 * service[0] * 1e-6 <= 0.25 + 1e-6).all()
    assert not held.over_cap.any()
    assert held.weights[0].sum() == pytest.approx(1)
    assert capped(20.0, 0.25).over_cap.sum() > 0.1


def test_a_near_node_is_preferred_until_it_waits() -> None:
    """The way counts: little load stays near, more load spills."""
    service, ones = np.full((1, 2), 1000.0), np.ones(2)
    near = replace(every_node(np.array([100.0]), service, ones > 0, ones, 0 * ones), network_us=np.array([0.0, 2000.0]))
    assert optimize_assignment(near, time_limit_s=30).weights[0].tolist() == [1.0, 0.0]
    assert optimize_assignment(replace(near, demand=np.array([950.0])), time_limit_s=30).weights[0, 1] > 0.2
