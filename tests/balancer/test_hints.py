"""Hints: which holders should have a group's keys loaded before its load comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from balancer.bank import Outlook
from balancer.forecast import Forecast, ForecastState
from balancer.hints import HINTS_MAX, plan_hints
from balancer.history import HistorySnapshot
from balancer.loop import decide
from balancer.optimizer import optimize_assignment
from balancer.plan import TableStamp, assignment_problem, pair_load

SERVICE_US = 1_000.0
CLASSES = ("sign/ed25519", "sign/rsa-2048-pss-sha256")


def history(pairs: Sequence[tuple[int, int]], now: Sequence[float], *, nodes: int = 6) -> HistorySnapshot:
    """Nodes of a millisecond, and ``now`` requests per second of each pair in the last ticks."""
    counts = np.tile(np.array(now, dtype=float), (4, 1))
    of_class = np.stack([counts[:, [row for row, _ in pairs].index(0) :].sum(axis=1), np.zeros(4)], axis=1)
    return HistorySnapshot(
        1000,
        CLASSES,
        tuple(f"node-{index}" for index in range(nodes)),
        of_class,
        np.full((2, nodes), 1e6),
        np.full((2, nodes), 1e6 * SERVICE_US),
        (True,) * nodes,
        (0,) * nodes,
        tick=4,
        pairs=tuple(pairs),
        pair_counts=counts,
    )


def foreseen(
    told: HistorySnapshot, mean: Sequence[float], p90: Sequence[float], slow_p90: Sequence[float] | None = None
) -> Forecast:
    """The pairs' mean of the next tick, and their highest P90 of ten ticks, at the last of them."""

    def outlook(tick: Sequence[float], high: Sequence[float]) -> Outlook:
        means = np.tile(np.array(tick, dtype=float)[:, None], (1, 10))
        highs = means.copy()
        highs[:, -1] = high
        return Outlook(1000, means, means, highs, ("ewma",) * len(means))

    of_class, high_class = [float(np.sum(mean)), 0.0], [float(np.sum(p90)), 0.0]
    pairs, classes = outlook(mean, p90), outlook(of_class, high_class)
    return Forecast(
        classes=told.classes,
        mean=classes.mean[:, 0],
        p90=classes.p90[:, 0],
        models=classes.models,
        pairs=told.pairs,
        pair_mean=pairs.mean[:, 0],
        pair_p90=pairs.p90[:, 0],
        outlook=classes,
        pair_outlook=pairs,
        slow=None if slow_p90 is None else classes,
        slow_pairs=None if slow_p90 is None else outlook(mean, slow_p90),
        state=ForecastState(),
    )


def hints(
    told: HistorySnapshot,
    forecast: Forecast,
    places: Mapping[int, Sequence[int]],
    before: Sequence[tuple[int, Sequence[int]]] = (),
) -> list[tuple[int, list[int]]]:
    problem = assignment_problem(told, forecast, pair_load(told, forecast, places))
    return plan_hints(told, forecast, problem, optimize_assignment(problem), places, before)


PLACES = {7: (0, 1, 2)}


def of_one(now: float, p90: float, before: Sequence[tuple[int, Sequence[int]]] = (), **more: Sequence[float]) -> int:
    """How many holders a group of three is hinted with: 1,000 requests a second keep one node busy."""
    told = history([(0, 7)], [now])
    found = hints(told, foreseen(told, [now], [p90], more.get("slow")), PLACES, before)
    assert [group for group, _ in found] in ([], [7])
    assert all(set(nodes) <= {0, 1, 2} for _, nodes in found)
    return len(found[0][1]) if found else 0


def test_a_burst_that_one_combiner_cannot_do_names_more() -> None:
    """As many as it takes to be no busier than 0.7."""
    assert of_one(20, 600) == 0
    assert of_one(20, 1_000) == 2
    assert of_one(20, 1_500) == 3
    assert of_one(20, 9_000) == 3
    assert of_one(0, 1_000) == 2


def test_the_minutes_ahead_count_too() -> None:
    assert of_one(20, 20, slow=[1_000]) == 2


def test_who_serves_the_load_already_needs_no_hint() -> None:
    """Two combiners share 1,000 requests a second by now, and all three share 2,000."""
    assert of_one(1_000, 1_000) == 0
    assert of_one(2_000, 2_050) == 0


def test_a_hint_stays_until_one_combiner_would_do_again() -> None:
    """So a forecast around the limit makes none come and go."""
    before = [(7, [1, 0])]
    assert of_one(20, 600, before) == 2
    assert of_one(20, 480, before) == 0
    assert of_one(900, 900, before) == 2
    assert of_one(1_200, 1_200, before) == 3
    flips, last, given = 0, 0, list[tuple[int, Sequence[int]]]()
    random = np.random.default_rng(3)
    for _ in range(60):
        told = history([(0, 7)], [20])
        given = list(hints(told, foreseen(told, [20], [random.uniform(620, 780)]), PLACES, given))
        flips += len(given) != last
        last = len(given)
    assert flips == 1


def test_what_the_holders_do_beside_counts() -> None:
    """Half of a node's work fits to an idle one, and not to one that another group will keep half busy."""
    places = {7: (0, 1, 2), 8: (0,), 9: (1,), 10: (2,)}
    now = [0.0, 1.0, 1.0, 1.0]
    told = history([(0, group) for group in places], now)
    assert hints(told, foreseen(told, now, [500, 1, 1, 1]), places) == []
    ((group, nodes),) = hints(told, foreseen(told, now, [500, 500, 500, 500]), places)
    assert (group, sorted(nodes)) == (7, [0, 1, 2])


def test_a_node_that_is_down_is_not_named() -> None:
    told = replace(history([(0, 7)], [20]), up=(True, False, True, True, True, True))
    assert sorted(hints(told, foreseen(told, [20], [9_000]), PLACES)[0][1]) == [0, 2]
    told = replace(told, up=(True, False, False, True, True, True))
    assert hints(told, foreseen(told, [20], [9_000]), PLACES) == []


def test_they_are_bounded_and_the_hottest_come_first() -> None:
    """Groups whose place is not known, and those that one combiner has done with, are none of them."""
    groups = range(200)
    told = history([(0, group) for group in groups], [1.0] * 200, nodes=200)
    p90 = [800.0 + group for group in groups]
    places = {group: (group, (group + 1) % 200, (group + 2) % 200) for group in groups if group != 199}
    found = hints(told, foreseen(told, [1.0] * 200, p90), places)
    assert len(found) == HINTS_MAX
    assert [group for group, _ in found] == list(range(198, 198 - HINTS_MAX, -1))


@given(st.integers(0, 2**32), st.booleans())
@example(27257, True)  # the warm holder is busy with other things, the idlest would do alone
@settings(deadline=None, max_examples=60)
def test_hints_name_holders_of_today_that_are_up(seed: int, settled: bool) -> None:
    """Whatever the load: holders of the group, up, none twice, two at least, and what was decided is decided again."""
    random = np.random.default_rng(seed)
    nodes, count = int(random.integers(2, 9)), int(random.integers(1, 12))
    pairs = [(0, group) for group in range(count)]
    now = random.exponential(200.0, count) * random.integers(0, 2, count)
    told = history(pairs, now.tolist(), nodes=nodes)
    told = replace(told, up=tuple((random.random(nodes) < 0.8).tolist()))
    forecast = foreseen(told, now.tolist(), random.exponential(1_500.0, count).tolist())
    places = {
        group: tuple(random.choice(nodes, int(random.integers(1, nodes + 1)), replace=False).tolist())
        for group in range(count)
    }
    found = hints(told, forecast, places)
    again = hints(told, forecast, places, found if settled else ())
    for group, named in (*found, *again):
        assert set(named) <= set(places[group])
        assert all(told.up[node] for node in named)
        assert 2 <= len(named) == len(set(named))
    assert {group for group, _ in found} <= {group for group, _ in again}
    for group, named in again if settled else ():
        assert set(dict(found).get(group, ())) <= set(named)


def test_the_table_has_them_and_goes_on_from_those_of_before() -> None:
    """Of other nodes than before nobody knows what their indexes meant."""
    told = history([(0, 7)], [20])
    stamp = TableStamp(1, 1, 0, 10_000)
    table = decide(told, stamp, 10.0, foreseen(told, [20], [1_000]), places=PLACES)
    assert [group for group, _ in table.hints] == [7]
    lower = foreseen(told, [20], [600])
    assert decide(told, stamp, 10.0, lower, places=PLACES).hints == []
    assert decide(told, stamp, 10.0, lower, places=PLACES, before=table).hints == table.hints
    others = replace(told, nodes=tuple(f"other-{index}" for index in range(6)))
    assert decide(others, stamp, 10.0, lower, places=PLACES, before=table).hints == []
