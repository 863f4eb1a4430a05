"""The forecast: better than naive where there is something to learn, and never a failure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from balancer.bank import JUDGED_STEPS, accuracy
from balancer.features import ALPHAS, HORIZONS, Known, clean, last_levels, levels, period_steps, roots_of
from balancer.forecast import FITS_AT_ONCE, REFIT_STEPS, ROWS_MIN, Forecast, ForecastState, predict_load
from balancer.history import CLASSES, HistorySnapshot, SlowHistory


def snapshot(counts: np.ndarray, tick_ms: int = 1000, tick: int = 0, **more: Any) -> HistorySnapshot:
    """A history of these counts, (ticks, classes)."""
    classes = counts.shape[1]
    nothing = np.zeros((classes, 1))
    return HistorySnapshot(tick_ms, CLASSES[:classes], ("a",), counts, nothing, nothing, (True,), (0,), tick, **more)


def rolling(series: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Means and P90s forecast from rolling origins, each with the state of the one before, and the models used."""
    told: list[Forecast] = []
    for end in range(first, len(series)):
        told.append(predict_load(snapshot(series[:end, None], tick=end), told[-1].state if told else None))
    means = np.array([each.mean[0] for each in told])
    return means, np.array([each.p90[0] for each in told]), {each.models[0] for each in told}


def check(forecast: Forecast, classes: int) -> None:
    assert forecast.mean.shape == forecast.p90.shape == (classes,)
    for outlook in (forecast.outlook, forecast.pair_outlook, forecast.slow, forecast.slow_pairs):
        if outlook is not None:
            for told in (outlook.median, outlook.mean, outlook.p90):
                assert told.shape == (len(outlook.models), HORIZONS)
                assert np.isfinite(told).all()
                assert (told >= 0).all()
            assert (outlook.p90 >= outlook.mean).all()


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


@pytest.mark.parametrize(("before", "after"), [(0.0, 1_000.0), (10.0, 1_000.0), (1_000.0, 0.0), (1_000.0, 4_000.0)])
def test_another_level_is_known_after_three_ticks(before: float, after: float) -> None:
    """After a minute of another level, and before anything is learnt anew; nor is that a wild quantile's then."""
    random = np.random.default_rng(3)
    series = random.poisson(np.repeat([before, after], [60, 90])).astype(float)
    told = []
    for end in range(2, len(series)):
        told.append(predict_load(snapshot(series[:end, None], tick=end), told[-1].state if told else None))
    for forecast in told[60 + 3 - 2 :]:
        outlook = forecast.outlook
        assert outlook.mean[0, 0] == pytest.approx(after, rel=0.2, abs=0.02 * before)
        assert np.abs(outlook.median[0] - after).max() <= 0.1 * before + 0.4 * after
        assert outlook.p90.max() <= 1.6 * max(before, after) + 10.0


def test_it_is_a_pure_function_and_bounded() -> None:
    """The same snapshot gives the same forecast; at first the busiest classes alone get a Ridge."""
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


def test_all_horizons_of_a_wave_are_seen() -> None:
    """Ten ticks of a wave of 24 to come, each told about as well as the first."""
    random = np.random.default_rng(11)
    wave = 400 + 300 * np.sin(2 * np.pi * np.arange(520) / 24)
    series = random.poisson(wave).astype(float)
    told = [predict_load(snapshot(series[:end, None])).outlook.median[0] for end in range(480, 510, 5)]
    came = [wave[end : end + HORIZONS] for end in range(480, 510, 5)]
    assert np.abs(np.array(told) - np.array(came)).mean(axis=0).max() < 40


def test_minutes_and_pairs_have_their_own_outlooks() -> None:
    """Rates per second of each cadence; a pair is known by its class and group; its P90 lies above its mean."""
    random = np.random.default_rng(2)
    pairs = random.poisson(30, (200, 2)).astype(float)
    slow = SlowHistory(60_000, 7, random.poisson(6_000, (300, 1)).astype(float), random.poisson(1_800, (300, 2)) * 1.0)
    state = snapshot(random.poisson(100, (200, 1)).astype(float), pairs=((0, 5), (0, 9)), pair_counts=pairs, slow=slow)
    forecast = predict_load(state)
    check(forecast, 1)
    assert forecast.pairs == ((0, 5), (0, 9))
    assert forecast.pair_mean == pytest.approx([30, 30], rel=0.25)
    assert forecast.slow is not None
    assert forecast.slow.mean[0] == pytest.approx(np.full(HORIZONS, 100), rel=0.1)
    assert forecast.slow_pairs is not None
    assert forecast.slow_pairs.mean[:, -1] == pytest.approx([30, 30], rel=0.2)


def test_a_tick_fits_few_series_and_all_have_their_turn() -> None:
    """With a state, a tick fits one class at most (here two, of short histories), none twice before all had a turn."""
    random = np.random.default_rng(4)
    wave = 60 + 50 * np.sin(2 * np.pi * np.arange(260) / 12)
    counts = random.poisson(wave[:, None] + np.arange(12)[None, :]).astype(float)
    state, before, most = ForecastState(), 0, 0
    for tick in range(200, 200 + REFIT_STEPS):
        state = predict_load(snapshot(counts[:tick], tick=tick), state).state
        fitted = int((state.classes.fitted >= 200).sum())
        most, before = max(most, fitted - before), fitted
    assert (most, before) == (2, 12)
    assert state.classes.ridge.all()
    assert len(set(state.classes.fitted.tolist())) == 6


def test_series_come_and_go() -> None:
    """What was learnt of a class stays with it when others come before it or go; a class that comes begins anew."""
    random = np.random.default_rng(6)
    counts = random.poisson(80 + 60 * np.sin(2 * np.pi * np.arange(300) / 16)[:, None], (300, 3)).astype(float)
    first = predict_load(snapshot(counts[:, :1], tick=300))
    nothing = np.zeros((3, 1))
    names = (CLASSES[2], CLASSES[0], CLASSES[1])
    state = HistorySnapshot(1000, names, ("a",), counts[:, [2, 0, 1]], nothing, nothing, (True,), (0,), 301)
    second = predict_load(state, first.state).state.classes
    assert np.array_equal(second.coefficients[1], first.state.classes.coefficients[0])
    assert second.fitted[1] == 300
    third = predict_load(snapshot(counts[:, :1], tick=302), predict_load(state, first.state).state).state.classes
    assert np.array_equal(third.coefficients[0], first.state.classes.coefficients[0])


def test_the_ridge_rests_while_it_is_worse_than_the_ewma() -> None:
    """A wave that stops: after some steps of larger errors the EWMA answers, though nothing was fitted anew."""
    random = np.random.default_rng(8)
    wave = np.concatenate([500 + 400 * np.sin(2 * np.pi * np.arange(400) / 16), np.full(80, 500.0)])
    series = random.poisson(wave).astype(float)
    state, models = None, []
    for end in range(400, 480):
        forecast = predict_load(snapshot(series[:end, None], tick=end), state)
        # As if its turn never came.
        state = ForecastState(replace(forecast.state.classes, fitted=np.array([10**6])))
        models.append(forecast.models[0])
    assert models[0] == "ridge"
    assert set(models[JUDGED_STEPS + 20 :]) == {"ewma"}


def test_the_p90_is_further_away_where_the_load_is_unrestful() -> None:
    """Blocks of calm and of restless load about the same level: the P90 knows in which it is."""
    random = np.random.default_rng(14)
    wild = np.arange(1100) // 50 % 2 == 1
    series = random.poisson(100 * np.where(wild, random.gamma(4.0, 0.25, 1100), 1.0)).astype(float)
    distance = [
        (told.p90 - told.median)[0, 0]
        for end in (1040, 1045, 1090, 1095)
        for told in [predict_load(snapshot(series[:end, None])).outlook]
    ]
    assert min(distance[2:]) > 1.5 * max(distance[:2])


def test_no_class_waits_for_pairs_and_minutes() -> None:
    """The first forecast fits a few classes; all have a fit before any pair, one a tick."""
    random = np.random.default_rng(15)
    counts = random.poisson(100, (2_100, FITS_AT_ONCE + 3)).astype(float)
    pairs = random.poisson(10, (600, 1)).astype(float)
    state = None
    for tick in range(4):
        told = predict_load(snapshot(counts, tick=2_100 + tick, pairs=((0, 1),), pair_counts=pairs), state).state
        assert (told.classes.fitted > 0).sum() == FITS_AT_ONCE + tick
        assert (told.pairs.fitted > 0).sum() == 0
        state = told


def test_accuracy_is_what_it_was() -> None:
    """Errors, coverage and bias of noise about a level: MASE near 1/sqrt(2), coverage near 90 %, no bias."""
    random = np.random.default_rng(9)
    series = random.poisson(100, 700).astype(float)
    state = None
    for end in range(300, 700):
        state = predict_load(snapshot(series[:end, None], tick=end), state).state
    assert state is not None
    told = accuracy(state.classes)
    assert told.mase[0] == pytest.approx(np.full(HORIZONS, 2**-0.5), rel=0.15)
    assert told.coverage[0] == pytest.approx(np.full(HORIZONS, 0.9), abs=0.06)
    assert np.abs(told.bias[0]).max() < 0.05
    fresh = accuracy(predict_load(snapshot(series[:300, None])).state.classes)
    assert np.isnan(fresh.mase).all()


def test_a_known_event_is_seen_before_it_comes() -> None:
    """A calendar says when the load triples, at no regular times: told ten ticks before; without it, it is not."""
    random = np.random.default_rng(12)
    event = np.zeros(900 + HORIZONS)
    for begin in (60, 170, 330, 380, 505, 640, 790, 896):
        event[begin : begin + 12] = 1.0
    series = random.poisson(100 * (1 + 2 * event)).astype(float)
    regressors = np.zeros((len(event), 4))
    regressors[:, 0] = event
    known = Known(regressors[:892], regressors[892 : 892 + HORIZONS])
    with_it = predict_load(snapshot(series[:892, None], known=known)).outlook.median[0]
    without = predict_load(snapshot(series[:892, None])).outlook.median[0]
    assert with_it[:4] == pytest.approx(np.full(4, 100), rel=0.3)
    assert with_it[4:].min() > 200
    assert without.max() < 160


def test_a_series_that_says_nothing_changes_little() -> None:
    """Noise as an external series: the forecast is about what it is without."""
    random = np.random.default_rng(13)
    series = random.poisson(100 + 80 * np.sin(2 * np.pi * np.arange(500) / 20)).astype(float)
    regressors = random.normal(0, 1e6, (500 + HORIZONS, 4))
    known = Known(regressors[:500], regressors[500:])
    with_it = predict_load(snapshot(series[:, None], known=known)).outlook.median[0]
    without = predict_load(snapshot(series[:, None])).outlook.median[0]
    assert with_it == pytest.approx(without, rel=0.15)


@given(arrays(np.float64, st.integers(1, 300), elements=st.floats(0, 1e5)))
@settings(deadline=None, max_examples=25)
def test_levels_are_those_of_the_recursion(roots: np.ndarray) -> None:
    """Levels by blocks, and the newest alone, are what the EWMA's definition gives."""
    level, told = np.full(len(ALPHAS), roots[0]), []
    for root in roots:
        level = level + ALPHAS * (root - level)
        told.append(level)
    assert levels(roots) == pytest.approx(np.array(told), rel=1e-9, abs=1e-6)
    assert last_levels(roots[:, None])[0] == pytest.approx(level, rel=1e-9, abs=1e-6)


def test_bursts_of_each_other_minute_are_seen_ahead() -> None:
    """Ten seconds of them, as jobs by the clock come: the next step is forecast with half of the naive error."""
    random = np.random.default_rng(5)
    series = random.poisson(np.where(np.arange(900) % 120 < 10, 520.0, 20.0)).astype(float)
    medians, state = [], None
    for end in range(500, len(series)):
        forecast = predict_load(snapshot(series[:end, None], tick=end), state)
        state = forecast.state
        medians.append(forecast.outlook.median[0, 0])
    error = np.abs(np.array(medians) - series[500:]).mean()
    assert error < 0.7 * np.abs(series[499:-1] - series[500:]).mean()


def test_periods_are_those_of_the_clock() -> None:
    """A minute in seconds, a day in tens of minutes; none that is too short, or of which there are no three waves."""
    assert period_steps(1000, 1000) == (60, 120, 300, 0, 0, 0, 0, 0, 0)
    assert period_steps(600_000, 2016) == (0, 0, 0, 0, 0, 0, 0, 144, 0)
    assert period_steps(7_000, 10**6) == (0, 0, 0, 0, 0, 0, 0, 0, 86_400)
    assert ROWS_MIN > HORIZONS


def test_cleaned_counts_and_roots() -> None:
    """Gaps take the value before, or after at the start."""
    counts = np.array([[np.nan], [4.0], [np.nan], [-1.0], [np.inf]])
    assert clean(counts)[:, 0].tolist() == [4, 4, 4, 0, 1e12]
    assert roots_of(np.array([0.625]))[0] == pytest.approx(1.0)
