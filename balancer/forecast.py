"""The forecast of the load by request class. It alone imports scikit-learn; it knows no node, socket or clock.

Counts are stabilised as z = sqrt(y + 3/8) (Anscombe 1948) and taken relative to an EWMA level; one multi-output Ridge a
class maps 30 lags and rolling means to the coming ticks. The P90 is split-conformal: the quantile of the residuals on
the newest part of the history, scaled by sqrt(y + 1). Where there is little data, or where the Ridge did worse than the
tuned EWMA on that part, the EWMA answers. No input makes it fail: NaN is filled, the rest is clipped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped] # comes with scikit-learn

from balancer.history import HistorySnapshot

__all__ = ["Forecast", "predict_load"]

FloatArray = NDArray[np.float64]

LAGS = 30
ROLLING = (3, 10, LAGS)
HORIZON_TICKS = 1
ROWS_MIN = 60
"""Fewer rows than this to learn from, and the EWMA answers."""
ROWS_MAX = 5_000
RIDGE_CLASSES_MAX = 32
"""The busiest classes get a Ridge, a few milliseconds each, the others the EWMA: a tick has an end."""
RIDGE_ALPHA = 10.0
CALIBRATION_PART = 0.3
QUANTILE = 0.9
COUNT_MAX = 1e12
"""Counts per tick are clipped here."""
SHIFT = 0.375
EWMA_ALPHAS = np.array([0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0])
LEVEL = 2
"""Index of the alpha whose level the Ridge works relative to."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """The next tick by class: mean and P90 in requests per second, and the model that said so (``ridge``, ``ewma``)."""

    classes: tuple[str, ...]
    mean: FloatArray
    p90: FloatArray
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Guess:
    """A model's next count, and what it would have said (predicted, actual) on the calibration part."""

    model: str
    count: float
    predicted: FloatArray
    actual: FloatArray

    @property
    def error(self) -> float:
        return float(np.mean(np.abs(self.predicted - self.actual))) if self.actual.size else math.inf

    @property
    def p90(self) -> float:
        """Split-conformal upper bound; with too few residuals the normal quantile of a Poisson count."""
        residuals = np.sort((self.actual - self.predicted) / np.sqrt(self.predicted + 1))
        rank = math.ceil((residuals.size + 1) * QUANTILE)
        score = float(residuals[rank - 1]) if rank <= residuals.size else 1.2816
        return self.count + max(0.0, score) * math.sqrt(self.count + 1)


def predict_load(history: HistorySnapshot) -> Forecast:
    """The load of the next tick by class, in requests per second.

    A pure function of the snapshot. Classes without a request in it are forecast as 0.
    """
    counts = _clean(history.counts)[-ROWS_MAX:]
    per_s = 1000.0 / history.tick_ms
    roots = np.sqrt(counts + SHIFT)
    levels = _levels(roots)
    busiest = set(np.argsort(-counts.sum(axis=0), kind="stable")[:RIDGE_CLASSES_MAX].tolist())
    # These matrices are small: more BLAS threads only wait for each other, seven times longer on a busy machine.
    with _thread_pools().limit(limits=1, user_api="blas"):
        guesses = [
            _class_guess(roots[:, column], levels[:, :, column], ridge=column in busiest)
            for column in range(counts.shape[1])
        ]
    return Forecast(
        classes=history.classes,
        mean=np.array([guess.count * per_s for guess in guesses], dtype=np.float64),
        p90=np.array([guess.p90 * per_s if guess.count else 0.0 for guess in guesses], dtype=np.float64),
        models=tuple(guess.model for guess in guesses),
    )


@cache
def _ridge() -> Any:
    """scikit-learn's Ridge, loaded when there is enough to learn from: a start need not wait a second for that."""
    from sklearn.linear_model import Ridge

    return Ridge


@cache
def _thread_pools() -> ThreadpoolController:
    return ThreadpoolController()


def _clean(counts: FloatArray) -> FloatArray:
    """The counts with gaps filled by the value before (or after, at the start), and nothing negative or endless."""
    known = ~np.isnan(counts)
    index = np.where(known, np.arange(len(counts))[:, None], -1)
    filled = np.maximum.accumulate(index, axis=0) if len(counts) else index
    if len(counts):
        filled = np.where(filled < 0, np.argmax(known, axis=0)[None, :], filled)
    values = np.take_along_axis(counts, filled, axis=0)
    return np.clip(np.nan_to_num(values, nan=0.0, posinf=COUNT_MAX, neginf=0.0), 0.0, COUNT_MAX)


def _levels(roots: FloatArray) -> FloatArray:
    """EWMA levels (ticks, alphas, classes), each after its tick was seen."""
    levels = np.empty((len(roots), len(EWMA_ALPHAS), roots.shape[1]))
    alphas = EWMA_ALPHAS[:, None]
    level = np.repeat(roots[:1], len(EWMA_ALPHAS), axis=0)
    for tick, row in enumerate(roots):
        level = level + alphas * (row[None, :] - level)
        levels[tick] = level
    return levels


def _counts(roots: FloatArray, variance: float = 0.0) -> FloatArray:
    """Back from roots: E[y] = E[z]^2 + Var z - 3/8."""
    return np.maximum(np.square(np.maximum(roots, 0.0)) + variance - SHIFT, 0.0)


def _class_guess(roots: FloatArray, levels: FloatArray, *, ridge: bool) -> _Guess:
    if not roots.size or roots.max() ** 2 <= SHIFT:
        return _Guess("ewma", 0.0, np.empty(0), np.empty(0))
    rows = len(roots) - LAGS - HORIZON_TICKS + 1
    calibration = int(rows * CALIBRATION_PART) if rows >= ROWS_MIN else max(0, len(roots) - 5)
    ewma = _ewma_guess(roots, levels, calibration)
    if not ridge or rows < ROWS_MIN:
        return ewma
    learned = _ridge_guess(roots, levels[:, LEVEL], calibration)
    return learned if math.isfinite(learned.count) and learned.error <= ewma.error else ewma


def _ewma_guess(roots: FloatArray, levels: FloatArray, calibration: int) -> _Guess:
    errors = np.abs(roots[1:, None] - levels[:-1])
    judged = errors[: len(errors) - calibration] if len(errors) - calibration >= ROWS_MIN else errors
    best = int(np.argmin(judged.mean(axis=0))) if len(judged) else len(EWMA_ALPHAS) - 1
    before, after = levels[:-1, best][len(errors) - calibration :], roots[1:][len(errors) - calibration :]
    variance = _variance(after - before)
    return _Guess("ewma", float(_counts(levels[-1:, best], variance)[0]), _counts(before, variance), _counts(after))


def _ridge_guess(roots: FloatArray, level: FloatArray, calibration: int) -> _Guess:
    features = _features(roots, level)
    rows = len(features) - HORIZON_TICKS
    base = level[LAGS - 1 : LAGS - 1 + rows, None]
    ahead = np.lib.stride_tricks.sliding_window_view(roots[LAGS:], HORIZON_TICKS)
    targets = ahead - base
    split = rows - calibration
    ceiling = 2.0 * float(roots.max())
    early = _ridge()(alpha=RIDGE_ALPHA).fit(features[:split], targets[:split])
    told = np.reshape(early.predict(features[split:rows]), (calibration, HORIZON_TICKS))
    tested = np.clip(told + base[split:], 0.0, ceiling)[:, 0]
    variance = _variance(ahead[split:, 0] - tested)
    full = _ridge()(alpha=RIDGE_ALPHA).fit(features[:rows], targets)
    newest = np.clip(np.ravel(full.predict(features[-1:]))[:1] + level[-1], 0.0, ceiling)
    return _Guess(
        "ridge", float(_counts(newest, variance)[0]), _counts(tested, variance), _counts(np.asarray(ahead[split:, 0]))
    )


def _variance(residuals: FloatArray) -> float:
    return float(residuals.var()) if residuals.size > 1 else 0.0


def _features(roots: FloatArray, level: FloatArray) -> FloatArray:
    """One row for each tick that has LAGS ticks up to it: the lags and rolling means, relative to the level then."""
    windows = np.lib.stride_tricks.sliding_window_view(roots, LAGS)
    means = np.stack([windows[:, -length:].mean(axis=1) for length in ROLLING], axis=1)
    return np.asarray(np.concatenate([windows, means], axis=1) - level[LAGS - 1 :, None])
