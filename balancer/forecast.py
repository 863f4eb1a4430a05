"""The forecast of the load by class and by the warmest (class, group) pairs. It alone imports scikit-learn.

One multi-output Ridge a series maps its lags, rolling means, levels, waves and external series (``balancer.features``)
to the next ten steps, at two cadences: ticks and minutes. It is mixed with the best EWMA, horizon by horizon, in the
part that would have been best on the newest 30 % of the history, which it had not seen; there the EWMA alone may win,
and it answers where there is little data or where what was really said of late was worse than its. The P90 is
split-conformal (Lei et al. 2018) on that same part, scaled by sqrt(y + 1), and then tracks its own coverage
(Angelopoulos et al. 2023). Fitting takes milliseconds, so a tick fits few series; in between one product of matrices
predicts all.

``predict_load`` is a pure function: snapshot and state in, forecast and next state out. It knows no node, socket or
clock. No input makes it fail: NaN is filled, the rest is clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped] # comes with scikit-learn

from balancer.bank import EMPTY, Bank, Fit, Outlook, advance, refitted, spread
from balancer.features import (
    ALPHAS,
    COLUMNS,
    HORIZONS,
    LAGS,
    LEVEL,
    PERIODS_MS,
    Known,
    clean,
    columns_of,
    counts_of,
    design,
    levels,
    penalties,
    period_steps,
    roots_of,
)
from balancer.history import HistorySnapshot

__all__ = ["Forecast", "ForecastState", "predict_load"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROWS_MIN = 60
"""Fewer rows than this to learn from, and the EWMA answers."""
ROWS_MAX = 5_000
EWMA_ROWS_MAX = 1_500
"""The EWMA's alpha is the best of so many of the newest steps."""
FITS_AT_ONCE = 32
"""Without a state so many of the busiest classes get a Ridge at once, and no pair does."""
ROWS_PER_TICK = 6_000
"""With one, as many series are fitted in a tick as have so many rows together, at least one a cadence."""
REFIT_STEPS = 30
"""A series is fitted again after so many steps, when its turn comes."""
STRENGTHS = (0.03, 0.3, 3.0)
"""The Ridge's alphas for a row and a column of variance 1, the best of which is taken."""
PARTS = (0.25, 0.5, 0.75, 1.0)
"""Parts of the Ridge in the mix with the EWMA; 0 is the EWMA alone."""
SMOOTHING = 0.25
"""How much the choice at one horizon goes by the mean over all."""
CALIBRATION_PART = 0.3
PERIODS_USED = 2
ACF_MIN = 0.1
"""A wave is looked for where the load resembles that of one wave ago at least so much."""
SD_MIN = 1e-6
"""A column that varies less says nothing."""


@dataclass(frozen=True, slots=True)
class ForecastState:
    """What is carried from tick to tick: what was fitted, and how good it was."""

    classes: Bank = EMPTY
    pairs: Bank = EMPTY
    slow_classes: Bank = EMPTY
    slow_pairs: Bank = EMPTY


@dataclass(frozen=True, slots=True)
class Forecast:
    """The load to come.

    ``mean`` and ``p90`` are the next tick's by class, ``pair_mean`` and ``pair_p90`` by pair, in requests per second;
    ``models`` says which model answered for each class (``ridge``, ``ewma``). The outlooks have all horizons:
    ``HORIZONS`` ticks, and minutes where there is a slow history. ``state`` is to be passed to the next call.
    """

    classes: tuple[str, ...]
    mean: FloatArray
    p90: FloatArray
    models: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    pair_mean: FloatArray
    pair_p90: FloatArray
    outlook: Outlook
    pair_outlook: Outlook
    slow: Outlook | None
    slow_pairs: Outlook | None
    state: ForecastState


def predict_load(history: HistorySnapshot, state: ForecastState | None = None) -> Forecast:
    """The load of the coming ticks and minutes, a pure function of the snapshot and of what the call before left.

    Classes without a request are forecast as 0. Without a state the busiest classes are fitted at once.
    """
    before = state or ForecastState()
    pairs = tuple((history.classes[index], group) for index, group in history.pairs)
    known, slow = history.known, history.slow
    # These matrices are small: more BLAS threads only wait for each other, seven times longer on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        at_once = FITS_AT_ONCE if state is None else 0
        classes = _step(before.classes, history.classes, history.counts, history.tick_ms, history.tick, known, at_once)
        of_pairs = _step(before.pairs, pairs, history.pair_counts, history.tick_ms, history.tick, known, 0)
        slow_classes, slow_pairs = before.slow_classes, before.slow_pairs
        if slow is not None:
            slow_classes = _step(
                slow_classes, history.classes, slow.counts, slow.step_ms, slow.step, history.slow_known, at_once
            )
            slow_pairs = _step(slow_pairs, pairs, slow.pair_counts, slow.step_ms, slow.step, history.slow_known, 0)
    after = ForecastState(classes, of_pairs, slow_classes, slow_pairs)
    return Forecast(
        classes=history.classes,
        mean=classes.outlook.mean[:, 0],
        p90=classes.outlook.p90[:, 0],
        models=classes.outlook.models,
        pairs=history.pairs,
        pair_mean=of_pairs.outlook.mean[:, 0],
        pair_p90=of_pairs.outlook.p90[:, 0],
        outlook=classes.outlook,
        pair_outlook=of_pairs.outlook,
        slow=None if slow is None else slow_classes.outlook,
        slow_pairs=None if slow is None else slow_pairs.outlook,
        state=after,
    )


def _step(
    bank: Bank, series: Sequence[object], counts: FloatArray, step_ms: int, step: int, known: Known | None, at_once: int
) -> Bank:
    """Fit whose turn it is, and predict all."""
    lengths = period_steps(step_ms, len(counts))
    bank, same = bank.follow(tuple(series), step, step_ms)
    due = _due(bank, counts, at_once)
    if same and not due:
        return bank
    fits = {index: _fit(counts[:, index], lengths, step, known) for index in due}
    return advance(refitted(bank, fits), counts, lengths, known)


def _due(bank: Bank, counts: FloatArray, at_once: int) -> list[int]:
    """Whose turn it is: who never was fitted, the busiest first, then who was longest ago."""
    if not counts.size:
        return []
    load = np.nan_to_num(counts[-LAGS:], nan=0.0, posinf=0.0, neginf=0.0).sum(axis=0)
    rows = max(1, min(len(counts), ROWS_MAX))
    waited = bank.step - bank.fitted
    most = at_once or max(1, ROWS_PER_TICK // rows)
    order = np.lexsort((-load, bank.fitted))
    return [int(index) for index in order if waited[index] >= REFIT_STEPS][:most]


@cache
def _ridge() -> Any:
    """scikit-learn's Ridge, loaded when there is enough to learn from: a start need not wait a second for that."""
    from sklearn.linear_model import Ridge

    return Ridge


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


# --- one series ---


def _fit(counts: FloatArray, lengths: tuple[int, ...], step: int, known: Known | None) -> Fit:
    """Fit one series (steps,)."""
    roots = roots_of(clean(counts[-ROWS_MAX - LAGS - HORIZONS :, None])[:, 0])
    steps = len(roots)
    level = levels(roots)
    if known is not None:
        known = Known(known.past[-steps:], known.ahead)
    lengths = _waves(roots - level[:, 1], lengths)
    first = max(LAGS - 1, max(lengths, default=0))
    rows = np.arange(first, steps - HORIZONS)[-ROWS_MAX:]
    # Row t has what came after t.
    targets = (
        np.lib.stride_tricks.sliding_window_view(roots[1:], HORIZONS) if steps > HORIZONS else np.zeros((0, HORIZONS))
    )
    judged = np.arange(min(5, steps - 1), steps - HORIZONS)[-EWMA_ROWS_MAX:] if steps > HORIZONS + 1 else rows[:0]
    alphas = _best_alphas(level[judged], targets[judged]) if judged.size else np.full(HORIZONS, ALPHAS.size - 3)
    ewma = np.zeros((len(ALPHAS), HORIZONS))
    ewma[alphas, np.arange(HORIZONS)] = 1.0
    if len(rows) < ROWS_MIN:
        part = judged[-max(1, judged.size * 2 // 3) :]
        apart = spread(level[part] @ ewma, targets[part])
        return Fit(step, ewma, apart, None, None, None, apart, float(roots.max(initial=0.0)))
    split = int(len(rows) * (1.0 - CALIBRATION_PART))
    early, late = rows[: split - HORIZONS], rows[split:]
    if len(early) < ROWS_MIN // 2:
        early = rows[:split]
    told = design(roots[:, None], level[rows][:, None, :], rows, lengths, step, known)[:, 0]
    base = level[rows, LEVEL][:, None]
    wanted = targets[rows] - base
    groups = [columns_of(), *(columns_of(index) for index, length in enumerate(lengths) if length)]
    used = np.zeros(COLUMNS, dtype=bool)
    for group in groups:
        used[group] = True
    sets = [used]
    if known is not None:
        sets.append(used | (np.arange(COLUMNS) >= columns_of(regressors=True).start))
    said = targets[late]
    by_ewma = level[late] @ ewma
    guesses: list[tuple[tuple[NDArray[np.bool_], float], FloatArray]] = []
    for columns in sets:
        for strength, (coefficients, intercept) in zip(
            STRENGTHS, _solve(told[: len(early)], wanted[: len(early)], columns, STRENGTHS), strict=True
        ):
            guesses.append(((columns, strength), told[split:] @ coefficients + intercept + base[split:]))
    choice, parts, mixed = _mix([guess for _, guess in guesses], by_ewma, said)
    full: dict[int, tuple[FloatArray, FloatArray]] = {}
    coefficients, intercept = np.zeros((COLUMNS, HORIZONS)), np.zeros(HORIZONS)
    mix = ewma * (1.0 - parts)
    mix[LEVEL] += parts
    for horizon in np.flatnonzero(parts):
        which = int(choice[horizon])
        if which not in full:
            columns, strength = guesses[which][0]
            ((matrix, constant),) = _solve(told, wanted, columns, (strength,))
            full[which] = matrix, constant
        coefficients[:, horizon] = parts[horizon] * full[which][0][:, horizon]
        intercept[horizon] = parts[horizon] * full[which][1][horizon]
    some = bool(parts.any())
    return Fit(
        step,
        ewma,
        spread(by_ewma, said),
        mix if some else None,
        coefficients if some else None,
        intercept if some else None,
        spread(mixed, said),
        float(roots.max()),
    )


def _waves(detrended: FloatArray, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The lengths of those waves that the series has, the strongest ``PERIODS_USED``; 0 for the others."""
    centred = detrended - detrended.mean()
    power = float(centred @ centred)
    strength = np.zeros(len(PERIODS_MS))
    for index, length in enumerate(lengths):
        if length and power > 0 and len(centred) > 2 * length:
            strength[index] = float(centred[length:] @ centred[:-length]) / power
    best = np.argsort(-strength, kind="stable")[:PERIODS_USED]
    return tuple(length if index in best and strength[index] > ACF_MIN else 0 for index, length in enumerate(lengths))


def _solve(
    told: FloatArray, wanted: FloatArray, columns: NDArray[np.bool_], strengths: Sequence[float]
) -> list[tuple[FloatArray, FloatArray]]:
    """Coefficients (COLUMNS, HORIZONS) and intercepts by strength, of a Ridge on these columns."""
    spread = told.std(axis=0)
    chosen = np.flatnonzero(columns & (spread > SD_MIN))
    solved = []
    if not chosen.size:
        return [(np.zeros((COLUMNS, HORIZONS)), wanted.mean(axis=0)) for _ in strengths]
    scale = spread[chosen] * np.sqrt(penalties()[chosen])
    middle = told[:, chosen].mean(axis=0)
    scaled = (told[:, chosen] - middle) / scale
    constant = wanted.mean(axis=0)
    for strength in strengths:
        model = _ridge()(alpha=strength * len(told), fit_intercept=False, solver="cholesky")
        model.fit(scaled, wanted - constant)
        part = np.atleast_2d(model.coef_).T / scale[:, None]
        coefficients = np.zeros((COLUMNS, HORIZONS))
        coefficients[chosen] = part
        solved.append((coefficients, constant - middle @ part))
    return solved


def _errors(guess: FloatArray, said: FloatArray) -> FloatArray:
    """Mean absolute errors in counts, by horizon."""
    return np.asarray(np.abs(counts_of(guess) - counts_of(said)).mean(axis=0))


def _smoothed(errors: FloatArray) -> FloatArray:
    """Errors (candidates, horizons) relative to the least, each drawn to its candidate's mean over the horizons."""
    relative = errors / np.maximum(errors.min(axis=0), 1e-12)
    return np.asarray((1.0 - SMOOTHING) * relative + SMOOTHING * relative.mean(axis=1, keepdims=True))


def _best_alphas(level: FloatArray, said: FloatArray) -> IntArray:
    errors = np.stack([_errors(level[:, [index]], said) for index in range(len(ALPHAS))])
    return np.asarray(_smoothed(errors).argmin(axis=0))


def _mix(guesses: Sequence[FloatArray], ewma: FloatArray, said: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
    """By horizon: which guess is mixed in, in which part, and what the mix says."""
    options = [(0, 0.0), *((index, part) for index in range(len(guesses)) for part in PARTS)]
    mixes = [part * guesses[index] + (1.0 - part) * ewma for index, part in options]
    best = _smoothed(np.stack([_errors(mix, said) for mix in mixes])).argmin(axis=0)
    horizons = np.arange(HORIZONS)
    mixed = np.stack(mixes)[best, :, horizons].T
    return (
        np.array([options[index][0] for index in best]),
        np.array([options[index][1] for index in best]),
        mixed,
    )
