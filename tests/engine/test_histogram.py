"""The histograms of durations, against the sorted durations themselves."""

from __future__ import annotations

import math
from bisect import bisect_right

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.client._histogram import Histograms

ERROR = 0.03
"""What docs/performance.md promises; the buckets are a little finer."""
QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999, 1.0)
SHORTEST_S, LONGEST_S = 1e-6, 100.0

durations = st.one_of(
    st.floats(SHORTEST_S, LONGEST_S),
    st.floats(math.log(SHORTEST_S), math.log(LONGEST_S)).map(lambda each: min(max(math.exp(each), 1e-6), 100.0)),
    st.integers(6, 32).flatmap(
        # The edges of the buckets, a little below and above.
        lambda shift: st.integers(32, 63).map(lambda bucket: min((bucket << (shift - 5)) * 16e-9, LONGEST_S))
    ),
)


def filled(samples_s: list[float]) -> Histograms:
    made = Histograms()
    for each in samples_s:
        made.record(0, each)
    return made


def nearest_rank(ordered_s: list[float], quantile: float) -> float:
    return ordered_s[max(math.ceil(quantile * len(ordered_s) * (1 - 1e-12)), 1) - 1]


@given(st.lists(durations, min_size=1, max_size=300))
@example([SHORTEST_S, LONGEST_S])
def test_quantiles_are_those_of_the_sorted_samples_within_three_percent(samples_s: list[float]) -> None:
    ordered_s = sorted(samples_s)
    found_s = filled(samples_s).quantiles_s(QUANTILES)
    for quantile, told_s in zip(QUANTILES, found_s, strict=True):
        assert told_s == pytest.approx(nearest_rank(ordered_s, quantile), rel=ERROR)
    assert found_s == sorted(found_s)


@given(st.lists(durations, min_size=1, max_size=300))
def test_count_sum_and_maximum_are_exact(samples_s: list[float]) -> None:
    made = filled(samples_s)
    assert made.count() == len(samples_s)
    assert made.sum_s() == pytest.approx(math.fsum(samples_s))
    assert made.max_s() == max(samples_s)


@given(st.lists(durations, max_size=300), st.lists(durations, min_size=1, max_size=20).map(sorted))
def test_what_is_below_a_bound_is_counted_but_for_what_is_beside_it(
    samples_s: list[float], bounds_s: list[float]
) -> None:
    """The numbers rise, and a sample counts on the wrong side only within three percent of the bound."""
    ordered_s = sorted(samples_s)
    counts = filled(samples_s).up_to(bounds_s)
    assert counts == sorted(counts)
    for bound_s, count in zip(bounds_s, counts, strict=True):
        least = bisect_right(ordered_s, bound_s / (1 + ERROR))
        most = bisect_right(ordered_s, bound_s * (1 + ERROR))
        assert least <= count <= most


@pytest.mark.parametrize("odd", [-1.0, 0.0, float("nan"), 1e-12, 137.4, 1e6, 1e300, float("inf")])
def test_odd_durations_are_counted_and_break_nothing(odd: float) -> None:
    made = filled([odd])
    assert made.count() == 1
    assert 0 <= made.quantiles_s([1.0])[0] <= made.max_s() <= 1e9
    assert made.up_to([1000.0]) == [1]
    assert math.isfinite(made.sum_s())


def test_short_durations_are_exact_to_some_nanoseconds() -> None:
    for nanoseconds in range(1, 1000, 7):
        (told_s,) = filled([nanoseconds * 1e-9, 1.0]).quantiles_s([0.5])
        assert told_s == pytest.approx(nanoseconds * 1e-9, abs=8.1e-9)


def test_histograms_do_not_mix() -> None:
    made = Histograms(3)
    made.record_all([1e-3, -1.0, 2e-3])
    made.record(0, 3e-3)
    assert [made.count(number) for number in range(3)] == [2, 0, 1]
    assert (made.size, made.max_s(0), made.max_s(1), made.max_s(2)) == (3, 3e-3, 0.0, 2e-3)
    assert made.quantiles_s([0.5], 1) == [0.0]
    for wrong in (-1, 3):
        with pytest.raises(IndexError, match="there are 3"):
            made.record(wrong, 1.0)


@pytest.mark.parametrize("size", [-1, 0, 65])
def test_there_are_one_to_sixty_four(size: int) -> None:
    with pytest.raises(ValueError, match="1 to 64"):
        Histograms(size)


@pytest.mark.parametrize("wrong", [[0.9, 0.5], [1.1], [-0.1], [float("nan")]])
def test_quantiles_are_parts_in_order(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        Histograms().quantiles_s(wrong)
