"""The forecast of the load by class and by the warmest (class, group) pairs. It alone imports scikit-learn.

One multi-output Ridge a series maps its lags, rolling means, levels, waves and external series (``balancer.features``)
to the next ten steps, at two cadences: ticks and minutes. It is mixed with the best EWMA, horizon by horizon, in the
part that would have been best on the newest 30 % of the history, which it had not seen; there the EWMA alone may win,
and it answers where there is little data or where what was really said of late was worse than its. The P90 is between
a quantile regression's on the same columns (``balancer.quantile``) and a split-conformal one (Lei et al. 2018) on that
same part, scaled by what the series' errors grow with; it then tracks its own coverage (Angelopoulos et al. 2023).
Fitting takes milliseconds, so a tick fits few series; in between one product of matrices predicts all.

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

from balancer.bank import (
    EMPTY,
    NEVER,
    ROOT_TIMES,
    Bank,
    Fit,
    Outlook,
    Regressed,
    advance,
    best_scaling,
    refitted,
    spread,
)
from balancer.features import (
    ALPHAS,
    COLUMNS,
    COUNT_MAX,
    HORIZONS,
    LAGS,
    LEVEL,
    PERIODS_MS,
    UNREST,
    VOLATILITY,
    WINDOW,
    Known,
    clean,
    columns_of,
    counts_of,
    design,
    levels,
    penalties,
    period_steps,
    roots_of,
    unrest,
    volatility,
)
from balancer.history import HistorySnapshot
from balancer.quantile import quantile_fit

__all__ = ["Forecast", "ForecastState", "predict_load"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROWS_MIN = 60
"""Fewer rows than this to learn from, and the EWMA answers."""
ROWS_MAX = 2_000
"""More add nothing but time."""
STEPS_MAX = 5_000
"""Among so many steps a wave is looked for."""
EWMA_ROWS_MAX = 1_500
"""The EWMA's alpha is the best of so many of the newest steps."""
FITS_AT_ONCE = 6
"""Without a state so many of the busiest classes get a Ridge at once, at each cadence, and no pair does: more would
keep the first table waiting. The other classes come in the next ticks, before any turn of another bank."""
ROWS_PER_TICK = 2_000
"""With one, a tick fits series of classes or of pairs, of ticks or of minutes, by turns: as many as have so many rows
together, at least one. That is one class with a long history, or two pairs."""
ROWS_EACH = 1_000
"""A fit costs as if it had at least so many rows."""
REFIT_STEPS = 30
"""A series is fitted again after so many steps, when its turn comes."""
STRENGTHS = (0.0005, 0.02, 0.5)
"""The Ridge's alphas for a row and a column of variance 1, the best of which is taken."""
PARTS = (0.35, 0.7, 1.0)
"""Parts of the Ridge in the mix with the EWMA; 0 is the EWMA alone."""
SMOOTHING = 0.5
"""How much the choice at one horizon goes by the mean over all."""
CALIBRATION_PART = 0.3
PERIODS_USED = 2
ACF_MIN = 0.1
"""A wave is looked for where the load resembles that of one wave ago at least so much."""
NEAR = 0.3
"""Rows that are nearer than this part of the usual error weigh no more for it."""
QUANTILE_ROWS_MAX = 1_000
JITTER = 1e-7
"""Columns that say the same make X'X singular; this is far below any strength."""
SD_MIN = 1e-6
"""A column that varies less says nothing."""

_NONE: FloatArray = np.zeros((0, 0))


@dataclass(frozen=True, slots=True)
class ForecastState:
    """What is carried from tick to tick: what was fitted, and how good it was."""

    classes: Bank = EMPTY
    pairs: Bank = EMPTY
    slow_classes: Bank = EMPTY
    slow_pairs: Bank = EMPTY

    @property
    def banks(self) -> tuple[Bank, ...]:
        """All of them."""
        return self.classes, self.pairs, self.slow_classes, self.slow_pairs


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
    tick, minute = _Cadence(history.tick_ms, history.tick, history.known), None
    if history.slow is not None:
        minute = _Cadence(history.slow.step_ms, history.slow.step, history.slow_known)
    banks: list[tuple[Bank, tuple[object, ...], FloatArray, _Cadence | None]] = [
        (before.classes, history.classes, history.counts, tick),
        (before.pairs, pairs, history.pair_counts, tick),
        (before.slow_classes, history.classes, history.slow.counts if history.slow else _NONE, minute),
        (before.slow_pairs, pairs, history.slow.pair_counts if history.slow else _NONE, minute),
    ]
    at_once = FITS_AT_ONCE if state is None else 0
    # These matrices are small: more BLAS threads only wait for each other, seven times longer on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        after, fitted = list(before.banks), False
        order = [(history.tick + turn) % len(banks) for turn in range(len(banks))]
        if (before.classes.fitted == NEVER).any():
            order.sort(key=bool)
        for place in order:
            bank, series, counts, cadence = banks[place]
            if cadence is not None:
                many = at_once if place % 2 == 0 else 0
                after[place], fits = _step(bank, series, counts, cadence, many, rests=fitted and not many)
                fitted = fitted or fits
    classes, of_pairs, slow_classes, slow_pairs = after
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
        slow=None if minute is None else slow_classes.outlook,
        slow_pairs=None if minute is None else slow_pairs.outlook,
        state=ForecastState(*after),
    )


@dataclass(frozen=True, slots=True)
class _Cadence:
    step_ms: int
    step: int
    known: Known | None


def _step(
    bank: Bank, series: tuple[object, ...], counts: FloatArray, cadence: _Cadence, at_once: int, *, rests: bool
) -> tuple[Bank, bool]:
    """Fit whose turn it is, nobody if it ``rests``, and predict all; whether there was something to fit."""
    lengths = period_steps(cadence.step_ms, len(counts))
    bank, same = bank.follow(series, cadence.step, cadence.step_ms)
    due = [] if rests else _due(bank, counts, at_once)
    if same and not due:
        return bank, False
    fits = {index: _fit(counts[:, index], lengths, cadence.step, cadence.known) for index in due}
    return advance(refitted(bank, fits), counts, lengths, cadence.known), bool(fits)


def _due(bank: Bank, counts: FloatArray, at_once: int) -> list[int]:
    """Whose turn it is: who never was fitted, the busiest first, then who was longest ago."""
    if not counts.size:
        return []
    load = np.clip(np.nan_to_num(counts[-WINDOW:], nan=0.0), 0.0, COUNT_MAX).sum(axis=0)
    most = at_once or max(1, ROWS_PER_TICK // max(ROWS_EACH, min(len(counts), ROWS_MAX)))
    order = np.lexsort((-load, bank.fitted))
    return [int(index) for index in order if bank.step - bank.fitted[index] >= REFIT_STEPS][:most]


@cache
def _ridge() -> Any:
    """scikit-learn's Ridge, loaded when there is enough to learn from: a start need not wait a second for that."""
    from sklearn import config_context
    from sklearn.linear_model import ridge_regression

    return ridge_regression, config_context


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


# --- one series ---


def _fit(counts: FloatArray, lengths: tuple[int, ...], step: int, known: Known | None) -> Fit:
    """Fit one series (steps,)."""
    roots = roots_of(clean(counts[-STEPS_MAX - LAGS - HORIZONS :, None])[:, 0])
    steps = len(roots)
    level, volatile = levels(roots), volatility(roots)
    uneasy = volatile[:, VOLATILITY]
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
    scaling = best_scaling(level[judged] @ ewma, targets[judged], uneasy[judged])
    wide = spread(level[judged] @ ewma, targets[judged], uneasy[judged], scaling)
    if len(rows) < ROWS_MIN:
        return Fit(step, ewma, wide, None, None, None, wide, scaling, None, float(roots.max(initial=0.0)))
    split = int(len(rows) * (1.0 - CALIBRATION_PART))
    early, late = rows[: split - HORIZONS], rows[split:]
    if len(early) < ROWS_MIN // 2:
        early = rows[:split]
    base = level[rows, LEVEL][:, None]
    wanted = targets[rows] - base
    groups = [columns_of(), *(columns_of(index) for index, length in enumerate(lengths) if length)]
    used = np.zeros(COLUMNS, dtype=bool)
    for group in (*groups, *([columns_of(regressors=True)] if known is not None else [])):
        used[group] = True
    columns = np.flatnonzero(used)
    told = design(roots[:, None], level[rows][:, None, :], rows, lengths, step, known)[:, 0][:, columns]
    penalty = penalties()[columns]
    sets = [np.searchsorted(columns, columns_of(regressors=True).start)]
    if known is not None:
        sets.append(columns.size)
    said = targets[late]
    by_ewma = level[late] @ ewma
    guesses, origins = [], []
    for many in sets:
        learnt = _robust(told[: len(early), :many], wanted[: len(early)], penalty[:many])
        for strength in STRENGTHS:
            matrix, constant = learnt.solve(strength)
            guesses.append(told[split:, :many] @ matrix + constant + base[split:])
            origins.append((many, strength))
    choice, parts, mixed = _mix(guesses, by_ewma, said)
    mixed = np.clip(mixed, 0.0, ROOT_TIMES * roots.max())
    coefficients, intercept = np.zeros((COLUMNS, HORIZONS)), np.zeros(HORIZONS)
    mix = ewma * (1.0 - parts)
    mix[LEVEL] += parts
    for many in sets:
        mine = (parts > 0) & np.array([origins[index][0] == many for index in choice])
        if mine.any():
            learnt = _robust(told[:, :many], wanted, penalty[:many])
            for index in np.unique(choice[mine]):
                matrix, constant = learnt.solve(origins[index][1])
                here = mine & (choice == index)
                coefficients[np.ix_(columns[:many], here)] = parts[here] * matrix[:, here]
                intercept[here] = parts[here] * constant[here]
    # External series that no horizon's guess goes by would only be noise in the quantile too.
    many = max((origins[index][0] for index in choice[parts > 0]), default=sets[0])
    newest = rows[-QUANTILE_ROWS_MAX:]
    steep, constant = quantile_fit(
        np.hstack([told[-QUANTILE_ROWS_MAX:, :many], unrest(level[newest], volatile[newest])]),
        wanted[-QUANTILE_ROWS_MAX:],
        np.concatenate([penalty[:many], np.ones(UNREST)]),
    )
    over = np.zeros((COLUMNS + UNREST, HORIZONS))
    over[columns[:many]], over[COLUMNS:] = steep[:many], steep[many:]
    some = bool(parts.any())
    return Fit(
        step,
        ewma,
        wide,
        mix if some else None,
        coefficients if some else None,
        intercept if some else None,
        spread(mixed, said, uneasy[late], scaling).drawn_to(wide),
        scaling,
        Regressed(over, constant, len(newest)),
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


class _Rows:
    """Rows to learn from, brought down to as many as there are columns.

    A Ridge is a matter of X'X and X'Y alone. With R'R = X'X the rows R and R'^-1 X'Y have the same, so that one pass
    over the history serves every strength.
    """

    def __init__(
        self, told: FloatArray, wanted: FloatArray, penalty: FloatArray, weights: FloatArray | None = None
    ) -> None:
        self._rows, self._columns = told.shape
        weighed = told if weights is None else told * weights[:, None]
        self._constant = wanted.mean(axis=0) if weights is None else weights @ wanted / self._rows
        mean = weighed.mean(axis=0)
        spread = np.sqrt(np.maximum(np.einsum("rc,rc->c", weighed, told) / self._rows - mean**2, 0.0))
        self._chosen = np.flatnonzero(spread > SD_MIN)
        self._scale = spread[self._chosen] * np.sqrt(penalty[self._chosen])
        self._mean = mean[self._chosen]
        scaled = (told[:, self._chosen] - self._mean) / self._scale
        left = scaled if weights is None else scaled * weights[:, None]
        gram = left.T @ scaled
        gram[np.diag_indices_from(gram)] += JITTER * self._rows
        self._root = np.linalg.cholesky(gram).T
        self._right = np.linalg.solve(self._root.T, left.T @ (wanted - self._constant))

    def solve(self, strength: float) -> tuple[FloatArray, FloatArray]:
        """Coefficients (columns, targets) and intercepts of a Ridge."""
        coefficients = np.zeros((self._columns, self._right.shape[1]))
        if not self._chosen.size:
            return coefficients, self._constant
        regression, configured = _ridge()
        with configured(assume_finite=True, skip_parameter_validation=True):
            part = regression(
                self._root, self._right, alpha=strength * self._rows, solver="cholesky", check_input=False
            )
        part = np.reshape(part, (-1, self._chosen.size)).T / self._scale[:, None]
        coefficients[self._chosen] = part
        return coefficients, self._constant - self._mean @ part


def _robust(told: FloatArray, wanted: FloatArray, penalty: FloatArray) -> _Rows:
    """Rows that weigh less the further they were from a first fit, over all horizons together.

    One step of iteratively reweighted least squares towards least absolute errors (Schlossmacher 1973): bursts do not
    pull the forecast away from what is usual.
    """
    coefficients, intercept = _Rows(told, wanted, penalty).solve(STRENGTHS[len(STRENGTHS) // 2])
    errors = np.abs(wanted - told @ coefficients - intercept)
    away = (errors / (np.median(errors, axis=0) + 1e-9)).mean(axis=1)
    weights = 1.0 / np.maximum(away, NEAR)
    return _Rows(told, wanted, penalty, weights / weights.mean())


def _smoothed(errors: FloatArray) -> FloatArray:
    """Errors (candidates, horizons) relative to the least, each drawn to its candidate's mean over the horizons."""
    relative = errors / np.maximum(errors.min(axis=0), 1e-12)
    return np.asarray((1.0 - SMOOTHING) * relative + SMOOTHING * relative.mean(axis=1, keepdims=True))


def _best_alphas(level: FloatArray, said: FloatArray) -> IntArray:
    counts, guesses = counts_of(said), counts_of(level)
    errors = [np.abs(guesses[:, [index]] - counts).mean(axis=0) for index in range(len(ALPHAS))]
    return np.asarray(_smoothed(np.stack(errors)).argmin(axis=0))


def _mix(guesses: Sequence[FloatArray], ewma: FloatArray, said: FloatArray) -> tuple[IntArray, FloatArray, FloatArray]:
    """By horizon: which guess is mixed in, in which part, and what the mix says."""
    options = [(0, 0.0), *((index, part) for index in range(len(guesses)) for part in PARTS)]
    counts = counts_of(said)
    mixes = [part * guesses[index] + (1.0 - part) * ewma for index, part in options]
    best = _smoothed(np.stack([np.abs(counts_of(mix) - counts).mean(axis=0) for mix in mixes])).argmin(axis=0)
    mixed = np.stack([mixes[option][:, horizon] for horizon, option in enumerate(best)], axis=1)
    return np.array([options[option][0] for option in best]), np.array([options[option][1] for option in best]), mixed
