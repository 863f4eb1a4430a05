"""The forecast: better than naive where there is something to learn, and never a failure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from balancer.forecast import FITS_AT_ONCE, Forecast, predict_load
from balancer.history import CLASSES, HistorySnapshot


def snapshot(counts: np.ndarray, tick_ms: int = 1000) -> HistorySnapshot:
    """A history of these counts, (ticks, classes)."""
    classes = counts.shape[1]
    nothing = np.zeros((classes, 1))
    return HistorySnapshot(tick_ms, CLASSES[:classes], ("a",), counts, nothing, nothing, (True,), (0,))


def rolling(series: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Means and P90s forecast from rolling origins, and the models that were used."""
    told = [predict_load(snapshot(series[:end, None])) for end in range(first, len(series))]
    means = np.array([each.mean[0] for each in told])
    return means, np.array([each.p90[0] for each in told]), {each.models[0] for each in told}


def check(forecast: Forecast, classes: int) -> None:
    assert forecast.mean.shape == forecast.p90.shape == (classes,)
    assert np.isfinite(forecast.mean).all()
    assert np.isfinite(forecast.p90).all()
    assert (forecast.mean >= 0).all()
    assert (forecast.p90 >= forecast.mean).all()


@pytest.mark.parametrize(
    ("shape", "factor"), [("season", 0.5), ("trend and season", 0.7), ("noise", 0.85)], ids=lambda value: str(value)
)
def test_better_than_naive(shape: str, factor: float) -> None:
    """A known season, a trend with one, and plain Poisson noise: the error is a fraction of the naive forecast's."""
    random = np.random.default_rng(7)
    ticks = np.arange(500)
    rate = {
        "season": 200 + 150 * np.sin(2 * np.pi * ticks / 24),
        "trend and season": 300 + ticks + 200 * np.sin(2 * np.pi * ticks / 20),
        "noise": np.full(500, 100.0),
    }[shape]
    series = random.poisson(rate).astype(float)
    means, p90, models = rolling(series, 350)
    actual = series[350:]
    error, naive = np.abs(means - actual).mean(), np.abs(series[349:-1] - actual).mean()
    assert error < factor * naive
    assert 0.80 <= (actual <= p90).mean() <= 0.98
    if shape != "noise":
        assert models == {"ridge"}


def test_rates_are_per_second() -> None:
    """Counts per tick of 250 ms come out as requests per second."""
    forecast = predict_load(snapshot(np.full((200, 1), 10.0), tick_ms=250))
    assert forecast.mean[0] == pytest.approx(40, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 1.0, 5.0, 1e6])
@pytest.mark.parametrize("ticks", [1, 2, 10, 95, 200])
def test_a_constant_series_is_its_own_forecast(value: float, ticks: int) -> None:
    """With much or little data, a constant load is forecast as it is."""
    forecast = predict_load(snapshot(np.full((ticks, 1), value)))
    check(forecast, 1)
    assert forecast.mean[0] == pytest.approx(value, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    "counts",
    [
        np.zeros((0, 3)),
        np.zeros((50, 0)),
        np.full((300, 2), np.nan),
        np.full((300, 1), np.inf),
        np.full((300, 1), -np.inf),
        -np.ones((300, 1)),
        np.exp(np.arange(300.0) / 2)[:, None],
        np.where(np.arange(300) % 7 == 0, np.nan, 50.0)[:, None],
        np.concatenate([np.full(299, 10.0), [1e300]])[:, None],
    ],
    ids=["empty", "no class", "nan", "inf", "-inf", "negative", "exploding", "gaps", "spike"],
)
def test_no_series_makes_it_fail(counts: np.ndarray) -> None:
    """Whatever the history holds, the forecast is finite, not negative, and its P90 is not below its mean."""
    check(predict_load(snapshot(counts)), counts.shape[1])


def test_gaps_are_filled_not_zeroed() -> None:
    """Ticks in which nobody was heard do not look like a load of zero, at the start or later."""
    counts = np.full((200, 1), 50.0)
    counts[:20] = np.nan
    counts[::7] = np.nan
    assert predict_load(snapshot(counts)).mean[0] == pytest.approx(50, rel=1e-6)


def test_a_step_is_followed() -> None:
    """After the load doubled, the forecast is soon at the new level."""
    random = np.random.default_rng(3)
    series = np.concatenate([random.poisson(100.0, 300), random.poisson(200.0, 20)]).astype(float)
    assert predict_load(snapshot(series[:, None])).mean[0] == pytest.approx(200, rel=0.15)


def test_it_is_a_pure_function_and_bounded() -> None:
    """The same snapshot gives the same forecast; beyond 32 classes the least busy ones get the EWMA."""
    random = np.random.default_rng(5)
    ticks = np.arange(200)[:, None]
    counts = random.poisson(60 + 50 * np.sin(2 * np.pi * ticks / 12) + np.arange(40)[None, :]).astype(float)
    first, second = predict_load(snapshot(counts)), predict_load(snapshot(counts))
    assert np.array_equal(first.mean, second.mean)
    assert first.models.count("ridge") == FITS_AT_ONCE
    assert set(first.models[:8]) == {"ewma"}


@given(arrays(np.float64, st.tuples(st.integers(0, 120), st.integers(0, 3))))
@settings(deadline=None, max_examples=40)
def test_any_floats(counts: np.ndarray) -> None:
    """Any array of floats, NaN and infinities included, has a forecast."""
    check(predict_load(snapshot(counts)), counts.shape[1])
