"""What a forecast goes by: cleaned counts, their roots, EWMA levels, and the regression's columns. Plain numpy.

Counts are stabilised as z = sqrt(y + 3/8) (Anscombe 1948). All columns are relative to an EWMA level, so that a row of
zeros says "as the level is". Shapes: (steps, series) in, (rows, series, COLUMNS) out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ALPHAS",
    "COLUMNS",
    "COUNT_MAX",
    "HORIZONS",
    "LEVEL",
    "REGRESSORS_MAX",
    "UNREST",
    "VOLATILITY",
    "Known",
    "clean",
    "columns_of",
    "counts_of",
    "design",
    "last_levels",
    "levels",
    "newest_volatility",
    "penalties",
    "period_steps",
    "roots_of",
    "unrest",
    "volatility",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

HORIZONS = 10
LAGS = 30
ROLLING = (3, 10, LAGS)
COUNT_MAX = 1e12
"""Counts per step are clipped here."""
SHIFT = 0.375
ALPHAS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0])
LEVEL = 3
"""Index of the alpha whose level the columns are relative to."""
LEVEL_COLUMNS = (0, 1, 2, 4, 5)
"""Indexes of the alphas whose levels are columns."""
PERIODS_MS = (60_000, 120_000, 300_000, 600_000, 900_000, 1_800_000, 3_600_000, 86_400_000, 604_800_000)
"""The waves that loads have: by the clock."""
HARMONICS = 3
CYCLES = 3
"""A seasonal column is the mean of so many past waves, as far as they are known; as many are needed at all."""
REGRESSORS_MAX = 4
"""External series that enter the forecast."""
VOLATILITY = 1
"""Index of the alpha of the volatility that a score is scaled by."""
UNREST_COLUMNS = (0, 1, 3, 5)
"""Indexes of the alphas whose volatilities are columns for a quantile."""
CALM = 0.2
WINDOW = 600
"""Steps from which the newest level is made: what is older weighs less than 1e-5 of it."""
BLOCK = 64

_PERIOD_COLUMNS = HORIZONS + 2 * HARMONICS
_FIRST_PERIOD = LAGS + len(ROLLING) + len(LEVEL_COLUMNS)
_FIRST_REGRESSOR = _FIRST_PERIOD + len(PERIODS_MS) * _PERIOD_COLUMNS
COLUMNS = _FIRST_REGRESSOR + REGRESSORS_MAX * HORIZONS
UNREST = len(UNREST_COLUMNS) + 2
"""How many columns a quantile has besides."""


@dataclass(frozen=True, slots=True)
class Known:
    """External series by step: ``past`` (steps, REGRESSORS_MAX) as the counts', ``ahead`` (HORIZONS, ...) to come.

    0 where nothing is known.
    """

    past: FloatArray
    ahead: FloatArray


def clean(counts: FloatArray) -> FloatArray:
    """The counts with gaps filled by the value before (or after, at the start), and nothing negative or endless."""
    unknown = np.isnan(counts)
    values = counts
    if unknown.any():
        index = np.where(unknown, -1, np.arange(len(counts))[:, None])
        filled = np.maximum.accumulate(index, axis=0)
        filled = np.where(filled < 0, np.argmin(unknown, axis=0)[None, :], filled)
        values = np.take_along_axis(counts, filled, axis=0)
    return np.clip(np.nan_to_num(values, nan=0.0, posinf=COUNT_MAX, neginf=0.0), 0.0, COUNT_MAX)


def roots_of(counts: FloatArray) -> FloatArray:
    """z = sqrt(y + 3/8)."""
    return np.asarray(np.sqrt(counts + SHIFT))


def counts_of(roots: FloatArray, variance: FloatArray | float = 0.0) -> FloatArray:
    """Back from roots: the median, or with the variance of z the mean, as E[y] = E[z]^2 + Var z - 3/8."""
    return np.maximum(np.square(np.maximum(roots, 0.0)) + variance - SHIFT, 0.0)


def levels(roots: FloatArray) -> FloatArray:
    """EWMA levels (steps, alphas) of one series (steps,), each after its step was seen; they begin at the first."""
    blocks = -(-len(roots) // BLOCK)
    padded = np.zeros(blocks * BLOCK)
    padded[: len(roots)] = roots
    weights, fades = _block()
    told = (padded.reshape(blocks, BLOCK) @ weights).reshape(blocks, BLOCK, len(ALPHAS))
    level = np.full(len(ALPHAS), roots[0] if len(roots) else 0.0)
    for block in told:
        block += fades * level
        level = block[-1]
    return told.reshape(-1, len(ALPHAS))[: len(roots)]


@cache
def _block() -> tuple[FloatArray, FloatArray]:
    """What a step of a block adds to each later level in it, (BLOCK, BLOCK * alphas), and what is left of the level."""
    age = np.arange(BLOCK)
    lag = (age[None, :] - age[:, None])[:, :, None]
    weights = np.where(lag >= 0, ALPHAS * (1.0 - ALPHAS) ** np.maximum(lag, 0), 0.0)
    return weights.reshape(BLOCK, -1), (1.0 - ALPHAS) ** (age[:, None] + 1)


def last_levels(roots: FloatArray) -> FloatArray:
    """The newest EWMA levels (series, alphas) of series (steps, series) with at least one step."""
    tail = roots[-WINDOW:]
    age = np.arange(len(tail) - 1, -1, -1)
    weights = ALPHAS[None, :] * (1.0 - ALPHAS)[None, :] ** age[:, None]
    weights[0] = (1.0 - ALPHAS) ** age[0]
    return np.asarray(tail.T @ weights)


def volatility(roots: FloatArray) -> FloatArray:
    """How much the roots (steps,) of one series change from step to step of late, from ``CALM`` on: (steps, alphas)."""
    return CALM + levels(np.abs(np.diff(roots, prepend=roots[:1])))


def newest_volatility(roots: FloatArray) -> FloatArray:
    """The newest of series (steps, series): (series, alphas)."""
    return CALM + last_levels(np.abs(np.diff(roots, axis=0, prepend=roots[:1])))


def unrest(level: FloatArray, volatile: FloatArray) -> FloatArray:
    """What a quantile's distance goes by, (rows, UNREST), from levels and volatilities (rows, alphas)."""
    base = level[:, LEVEL]
    return np.column_stack([volatile[:, UNREST_COLUMNS], base, 1.0 / (base + 0.5)])


def period_steps(step_ms: int, steps: int) -> tuple[int, ...]:
    """The waves' lengths in steps; 0 for one too short for a column of its own or too long for this history."""
    told = []
    for period in PERIODS_MS:
        length = period // step_ms if period % step_ms == 0 else 0
        told.append(length if length > LAGS // 2 and length * CYCLES <= steps else 0)
    return tuple(told)


def columns_of(period: int | None = None, *, regressors: bool = False) -> slice:
    """Where the columns of a wave (its index), of the external series, or of everything else are."""
    if regressors:
        return slice(_FIRST_REGRESSOR, COLUMNS)
    if period is None:
        return slice(0, _FIRST_PERIOD)
    return slice(_FIRST_PERIOD + period * _PERIOD_COLUMNS, _FIRST_PERIOD + (period + 1) * _PERIOD_COLUMNS)


@cache
def penalties() -> FloatArray:
    """How much more a column's coefficient is shrunk than others': old lags more (Litterman 1986)."""
    told = np.ones(COLUMNS)
    told[:LAGS] = np.arange(1.0, LAGS + 1.0) ** 2
    return told


def design(
    roots: FloatArray, level: FloatArray, at: IntArray, lengths: tuple[int, ...], step: int, known: Known | None
) -> FloatArray:
    """The columns (rows, series, COLUMNS) at these indexes into ``roots`` (steps, series), each at least LAGS - 1.

    ``level`` is (rows, series, alphas) there; ``lengths`` the waves' in steps, 0 for none; ``step`` the number of the
    last step of ``roots`` since the epoch, which gives the phase.
    """
    rows, series = len(at), roots.shape[1]
    # Column after column in memory: those of waves that are not there are never touched.
    told = np.zeros((COLUMNS, rows, series)).transpose(1, 2, 0)
    base = level[:, :, LEVEL]
    for lag in range(LAGS):
        told[:, :, lag] = roots[at - lag] - base
    mean = np.zeros((rows, series))
    for lag in range(LAGS):
        mean += told[:, :, lag]
        if lag + 1 in ROLLING:
            told[:, :, LAGS + ROLLING.index(lag + 1)] = mean / (lag + 1)
    for place, index in enumerate(LEVEL_COLUMNS):
        told[:, :, LAGS + len(ROLLING) + place] = level[:, :, index] - base
    for index, length in enumerate(lengths):
        if length:
            part = told[:, :, columns_of(index)]
            _seasonal(roots, base, at, length, part)
            phase = 2 * np.pi * ((step - (len(roots) - 1 - at)) % length) / length
            for harmonic in range(1, HARMONICS + 1):
                part[:, :, HORIZONS + 2 * harmonic - 2] = np.sin(harmonic * phase)[:, None]
                part[:, :, HORIZONS + 2 * harmonic - 1] = np.cos(harmonic * phase)[:, None]
    if known is not None:
        told[:, :, columns_of(regressors=True)] = _regressors(known, at, len(roots))[:, None, :]
    return told


def _seasonal(roots: FloatArray, base: FloatArray, at: IntArray, length: int, part: FloatArray) -> None:
    """What came after this point of the last waves, each of the horizons; where none is known, the level."""
    total, found = np.zeros((len(at), roots.shape[1], HORIZONS)), np.zeros(len(at))
    for cycle in range(1, CYCLES + 1):
        index = at + 1 - cycle * length
        known = index >= 0
        ahead = index[known, None] + np.arange(HORIZONS)
        total[known] += roots[ahead].transpose(0, 2, 1) - base[known, :, None]
        found += known
    part[:, :, :HORIZONS] = total / np.maximum(found, 1.0)[:, None, None]


def _regressors(known: Known, at: IntArray, steps: int) -> FloatArray:
    """(rows, REGRESSORS_MAX * HORIZONS): how each external series will differ from its level as of now."""
    past = known.past[-steps:]
    if len(past) < steps:
        past = np.concatenate([np.repeat(past[:1], steps - len(past), axis=0), past]) if len(past) else past
    whole = np.concatenate([past, known.ahead])
    level = np.stack([levels(past[:, column])[:, LEVEL] for column in range(past.shape[1])], axis=1)
    told = np.stack([whole[at + 1 + horizon] - level[at] for horizon in range(HORIZONS)], axis=2)
    return told.reshape(len(at), -1)
