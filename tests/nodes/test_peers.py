"""Whom to ask first: by measured latency, with bounded hedges, and no holder is written off for good."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.peers import (
    DOWN_MAX_S,
    ENOUGH,
    EXPLORE_AFTER_S,
    EXPLORE_EVERY,
    HEDGE_MAX_S,
    HEDGE_MIN_S,
    SAMPLES,
    UNKNOWN_S,
    Peers,
)

NAMES = ("h1", "h2", "h3", "h4")


def measured(**seconds: float) -> Peers:
    """Holders with a full ring of one latency each, measured at time 0."""
    peers = Peers()
    for name, each in seconds.items():
        for _ in range(SAMPLES):
            peers.answered(name, each, 0.0)
    return peers


def test_nothing_known_is_the_order_given_and_the_default_hedge() -> None:
    plan = Peers().plan(NAMES, 2, 0.0)
    assert plan.holders == NAMES
    assert set(plan.hedge_s.values()) == {UNKNOWN_S}


def test_the_quickest_are_asked_first_and_the_unknown_before_the_slow() -> None:
    peers = measured(h1=0.2, h2=0.003, h3=0.001)
    assert peers.plan(NAMES, 2, 0.0).holders == ("h3", "h2", "h4", "h1")


def test_a_hedge_is_the_holders_own_p95_within_bounds() -> None:
    peers = measured(h1=0.000_1, h2=3.0)
    for i in range(100):
        peers.answered("h3", 0.02 if i % 10 else 0.1, 0.0)
    hedge_s = peers.plan(NAMES, 2, 0.0).hedge_s
    assert hedge_s == {"h1": HEDGE_MIN_S, "h2": HEDGE_MAX_S, "h3": pytest.approx(0.1), "h4": UNKNOWN_S}


def test_few_samples_give_no_p95() -> None:
    peers = Peers()
    for count in range(1, ENOUGH + 1):
        peers.answered("h1", 0.010, 0.0)
        assert peers.plan(NAMES, 2, 0.0).hedge_s["h1"] == (0.010 if count >= ENOUGH else UNKNOWN_S)


def test_a_holder_that_became_slow_is_passed_over_after_three_and_one_that_became_quick_comes_back() -> None:
    peers = measured(h1=0.001, h2=0.002, h3=0.003)
    for _ in range(3):
        peers.answered("h1", 0.3, 1.0)
    assert peers.plan(NAMES, 2, 1.0).holders[:2] == ("h2", "h3")
    for _ in range(3):
        peers.answered("h1", 0.001, 2.0)
    assert peers.plan(NAMES, 2, 2.0).holders[0] == "h1"


def test_one_that_is_late_twice_or_unreachable_is_asked_last_for_a_while() -> None:
    peers = measured(h1=0.001, h2=0.002, h3=0.003, h4=0.4)
    peers.late("h1", 0.006, 10.0)
    assert peers.plan(NAMES, 2, 10.0).holders[0] == "h1"  # once may happen
    peers.late("h1", 0.006, 10.1)
    peers.failed("h2", 10.1)
    assert peers.plan(NAMES, 2, 10.2).holders == ("h3", "h4", "h1", "h2")
    assert [told.down for told in peers.latencies(10.2).values()] == [True, True, False, False]
    assert peers.plan(NAMES, 2, 11.2).holders[:2] == ("h1", "h2")


def test_the_time_out_doubles_up_to_its_bound_and_ends_with_an_answer() -> None:
    peers, now = measured(h1=0.001, h2=0.002), 0.0
    waits = []
    for _ in range(8):
        peers.failed("h1", now)
        start = now
        while peers.plan(("h1", "h2"), 0, now).holders[0] != "h1":
            now += 0.5
        waits.append(now - start)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, DOWN_MAX_S, DOWN_MAX_S, DOWN_MAX_S]
    peers.answered("h1", 0.001, now)
    peers.failed("h1", now)
    assert peers.plan(("h1", "h2"), 0, now + 1.0).holders[0] == "h1"


def test_a_slow_holder_is_tried_again_now_and_then_without_patience() -> None:
    peers = measured(h1=0.001, h2=0.001, h3=0.2)
    now = EXPLORE_AFTER_S
    plans = [peers.plan(("h1", "h2", "h3"), 2, now) for _ in range(3 * EXPLORE_EVERY)]
    tried = [plan for plan in plans if "h3" in plan.holders[:2]]
    assert len(tried) == 3
    assert {plan.hedge_s["h3"] for plan in tried} == {HEDGE_MIN_S}  # as long as the one in whose place it is asked
    assert {plan.holders for plan in tried} == {("h1", "h3", "h2")}


def test_nobody_is_tried_who_was_measured_lately_or_is_down() -> None:
    peers = measured(h1=0.001, h2=0.001, h3=0.2)
    assert all(peers.plan(("h1", "h2", "h3"), 2, 1.0).holders[2] == "h3" for _ in range(40))
    peers.failed("h3", 100.0)
    assert all(peers.plan(("h1", "h2", "h3"), 2, 100.5).holders[2] == "h3" for _ in range(40))


def test_all_needed_or_none_needed_leaves_nothing_to_try() -> None:
    peers = measured(h1=0.001, h2=0.2)
    for needed in (0, 2, 3):
        assert all(peers.plan(("h1", "h2"), needed, 99.0).holders == ("h1", "h2") for _ in range(40))


events = st.lists(
    st.tuples(
        st.sampled_from(["answered", "late", "failed", "plan"]),
        st.sampled_from(NAMES),
        st.floats(0, 10),
        st.integers(0, 5),
    ),
    max_size=150,
)


@given(events)
@settings(deadline=None)
def test_whatever_happens_a_plan_is_everybody_once(
    happened: list[tuple[str, str, float, int]],
) -> None:
    peers, now = Peers(), 0.0
    for kind, name, seconds, needed in happened:
        now += seconds / 10
        call: Any = {"answered": peers.answered, "late": peers.late}.get(kind)
        if call is not None:
            call(name, seconds, now)
        elif kind == "failed":
            peers.failed(name, now)
        plan = peers.plan(NAMES, needed, now)
        assert sorted(plan.holders) == list(NAMES)
        assert all(HEDGE_MIN_S <= plan.hedge_s[each] <= HEDGE_MAX_S for each in NAMES)
        down = {each for each, told in peers.latencies(now).items() if told.down}
        assert set(plan.holders[len(NAMES) - len(down) :]) == down
    # After the longest time-out nobody is down, and everybody is asked first sooner or later.
    now += DOWN_MAX_S + EXPLORE_AFTER_S
    asked = set()
    for _ in range(len(NAMES) * EXPLORE_EVERY):
        first = peers.plan(NAMES, 1, now).holders[0]
        asked.add(first)
        peers.answered(first, 0.001, now)
        now += EXPLORE_AFTER_S
    assert asked == set(NAMES)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=200))
@settings(deadline=None)
def test_the_statistics_are_those_of_the_newest_samples(seconds: list[float]) -> None:
    peers = Peers()
    for each in seconds:
        peers.answered("h1", each, 0.0)
    (told,) = peers.latencies(0.0).values()
    kept = sorted(seconds[-SAMPLES:])
    assert told.samples == len(kept)
    newest = sorted(seconds[-5:])
    assert told.expected_s == newest[len(newest) // 2]
    if len(kept) >= ENOUGH:
        assert sum(each <= told.p95_s for each in kept) >= 0.95 * len(kept)
    else:
        assert told.p95_s == UNKNOWN_S
