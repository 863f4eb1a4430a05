"""The routing program: balance, prices, and their agreement with what the optimum really does."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.optimizer import BREAKPOINTS, Assignment, AssignmentProblem, SolverError, optimize_assignment


def problem(
    demand: list[float],
    service_us: list[list[float]],
    *,
    up: list[bool] | None = None,
    background: list[float] | None = None,
) -> AssignmentProblem:
    nodes = len(service_us[0])
    return AssignmentProblem(
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
    assert answer.price_us.tolist() == [0, 0, 0]


def test_a_loaded_node_has_a_price_and_an_idle_one_none() -> None:
    """A busy node costs others; one with nothing to do costs nobody."""
    answer = solve([800.0], [[1000.0, 100_000.0]])
    assert answer.price_us[0] > 0
    assert answer.price_us[1] == 0
    shifted = solve([100.0], [[1000.0, 1000.0]], background=[0.8, 0.0])
    assert shifted.price[0] > shifted.price[1] > 0
    assert shifted.weights[0, 1] == pytest.approx(1)


def test_a_price_is_in_microseconds_of_waiting() -> None:
    """At utilisation r one more request of s microseconds costs about s (dW/dr) = s (2r - r^2) / (1 - r)^2."""
    answer = solve([750.0], [[1000.0]])
    exact = 1000 * (1 / (1 - 0.75) ** 2 - 1)
    assert answer.price_us[0] == pytest.approx(exact, rel=0.25)


def test_more_than_capacity_still_has_an_answer() -> None:
    """Overload is spread, told, and dear."""
    answer = solve([50_000.0], [[100.0, 200.0, 400.0]])
    assert answer.weights.sum() == pytest.approx(1)
    assert answer.overload > 1
    assert (answer.price_us > 1000).all()
    assert np.isfinite(answer.price_us).all()


def test_dead_nodes_get_nothing() -> None:
    """A node that is down has no weight and no price; without any node nothing is assigned."""
    answer = solve([5000.0], [[100.0, 200.0, 400.0]], up=[False, True, True])
    assert answer.weights[0, 0] == answer.price[0] == 0
    assert answer.weights.sum() == pytest.approx(1)
    none = solve([5000.0], [[100.0, 200.0]], up=[False, False])
    assert none.weights.tolist() == [[0, 0]]


def test_no_class_and_mixed_idle_classes() -> None:
    """No class at all, and an idle class beside a busy one, are ordinary cases."""
    empty = AssignmentProblem(np.zeros(0), np.zeros((0, 2)), np.ones(2, bool), np.ones(2), np.zeros(2))
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
    assert np.isfinite(answer.price_us).all()
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
        AssignmentProblem(**(good | change))


def test_the_breakpoints_grow() -> None:
    """The waiting is convex only if the segments are in order; the last true one ends below saturation."""
    assert (np.diff(BREAKPOINTS) > 0).all()
    assert BREAKPOINTS[-1] < 1
