"""What a node's requests go to: bounded counters that name what is heavy."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engine.protocol.requests import HOT_KEYS_TOLD, PAIRS_TOLD
from nodes.heavy import HeavyHitters, PairCounts

SIGN, MAC = "sign/ed25519", "mac/hmac-sha256"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 20)), max_size=200), st.integers(1, 12))
def test_the_promises_of_space_saving(stream: list[tuple[int, int]], counters: int) -> None:
    """No count is too low, none is too high by more than total/counters, and every key above that is there."""
    hitters, true = HeavyHitters(counters), Counter[str]()
    for number, requests in stream:
        hitters.count(f"key-{number}", SIGN, requests)
        true[f"key-{number}"] += requests
    hitters.end_window(10.0)
    slack = true.total() / counters
    told = {key: count for key, _, count in hitters.told}
    assert len(told) <= min(counters, HOT_KEYS_TOLD)
    assert all(true[key] <= count <= true[key] + slack for key, count in told.items())
    assert {key for key, count in true.items() if count > slack} <= set(told)
    assert [count for _, _, count in hitters.told] == sorted(told.values(), reverse=True)


def test_the_hottest_of_many_keys() -> None:
    """A Zipf load over 8192 keys: the ten hottest are told, in about their order."""
    random = np.random.default_rng(3)
    weights = 1 / np.arange(1, 8193) ** 0.9
    drawn = random.choice(8192, size=40_000, p=weights / weights.sum())
    hitters = HeavyHitters()
    for number in drawn.tolist():
        hitters.count(f"key-{number}", MAC)
    hitters.end_window(10.0)
    assert {f"key-{number}" for number in range(10)} <= {key for key, _, _ in hitters.told[:20]}


def test_a_window_begins_anew() -> None:
    """What was hot before is not told for the window after; classes of one key are told apart."""
    hitters = HeavyHitters()
    hitters.count("orders", SIGN)
    hitters.count("orders", MAC, 2)
    hitters.end_window(10.0)
    assert hitters.told == [("orders", MAC, 2), ("orders", SIGN, 1)]
    hitters.end_window(12.0)
    assert (hitters.told, hitters.told_s) == ([], 12.0)


def test_pairs_are_told_with_their_totals() -> None:
    """All of them where there is room; a class that is not asked for is left out."""
    pairs = PairCounts()
    pairs.count(SIGN, 3)
    pairs.count(SIGN, 3, 4)
    pairs.count(MAC, 7)
    assert pairs.told({MAC: 0, SIGN: 1}) == [(1, 3, 5), (0, 7, 1)]
    assert pairs.told({SIGN: 0}) == [(0, 3, 5)]


def test_what_moved_of_late_is_told_first() -> None:
    """With more pairs than fit, one that was busy long ago makes room for one that is busy now."""
    pairs = PairCounts()
    for group in range(PAIRS_TOLD):
        pairs.count(SIGN, group, 1000)
    for _ in range(12):
        pairs.end_window()
    pairs.count(SIGN, 5000, 10)
    told = pairs.told({SIGN: 0})
    assert len(told) == PAIRS_TOLD
    assert told[0] == (0, 5000, 10)


def test_pairs_are_bounded() -> None:
    """Beyond the bound the coldest goes."""
    pairs = PairCounts(3)
    for group in range(3):
        pairs.count(SIGN, group, 5)
    for _ in range(12):
        pairs.end_window()
    pairs.count(SIGN, 0)
    pairs.end_window()
    pairs.count(SIGN, 9)
    assert {group for _, group, _ in pairs.told({SIGN: 0})} == {0, 2, 9}
