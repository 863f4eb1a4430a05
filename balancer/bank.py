"""Fitted series side by side: predicting all at once, and how good what was said turned out to be. Plain numpy.

A bank is immutable; each function gives a new one. Shapes: S series, H = ``HORIZONS``, A = ``ALPHAS``, C = ``COLUMNS``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from balancer.features import (
    ALPHAS,
    COLUMNS,
    COUNT_MAX,
    CYCLES,
    HORIZONS,
    LAGS,
    LEVEL,
    UNREST,
    VOLATILITY,
    WINDOW,
    Known,
    clean,
    counts_of,
    design,
    last_levels,
    newest_volatility,
    roots_of,
    unrest,
)
from balancer.quantile import QUANTILE

__all__ = [
    "EMPTY",
    "NEVER",
    "ROOT_TIMES",
    "Accuracy",
    "Bank",
    "Fit",
    "Outlook",
    "Regressed",
    "Spread",
    "accuracy",
    "advance",
    "best_scaling",
    "refitted",
    "spread",
]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
Scaling = tuple[float, float]
"""What errors grow with: a power of the guess, and of the volatility."""

NORMAL_SCORE = 1.2816
"""The normal quantile: for a Poisson count with too few residuals to know better."""
NEW_ALPHA = 5
"""Index of the alpha of a series that was never fitted."""
NEVER = -(2**62)
NORMAL_ROWS = 200.0
"""A score of so many rows is half that of a normal distribution, which fewer rows tell better."""
SCORE_ROWS = 150.0
"""A score of so many rows is drawn half-way to that of a wider sample."""
MEMORY = 0.01
"""Weight of the newest step in what is told of the errors."""
JUDGED_STEPS = 30
WORSE = 1.05
"""The Ridge of a series rests while its recent errors are so many times the EWMA's, over at least the steps above."""
TRACKING = 0.03
DRIFT_MAX = 2.0
"""By which part of itself the P90's score goes with each step, and how far in all, as a logarithm."""
SCALINGS: tuple[Scaling, ...] = ((0.5, 0.0), (0.5, 1.0), (0.0, 0.0))
"""As Poisson counts, the same and as the load's own unrest, and not at all, as bursts out of silence."""
SCALING_ROWS_MIN = 100
OLDER_PART = 0.6
REGRESSED_ROWS = 300.0
"""Of so many rows the P90 is half the quantile regression's, of more it is more than half; the rest is conformal."""
REGRESSOR_WINDOW = WINDOW
SHIFT_STEPS = 2
SHIFT_ERRORS = 6.0
"""A series has left what was learnt of it when so many steps in a row were so many times the usual error away from what
was said of them, to the same side. Until it is learnt anew it is said to stay where it is now."""
SHIFT_SCORE = 2.0
"""The score of its P90, in standard deviations of a Poisson count."""
POISSON_SD = 0.5
"""Of a root of a Poisson count."""
ROOT_TIMES = 1.5
"""No root that is said is more than so many times the largest that was seen."""
P90_TIMES = 1.25
P90_MORE = 3.0
"""No mean and no P90 is more than so many times the most of the window, or of the median, and so many standard
deviations: what is learnt from a single step out of silence, or by a series that then lies, would be."""


@dataclass(frozen=True, slots=True)
class Fit:
    """What was learnt of one series.

    ``ewma`` (A, H) has the weights of the levels of the EWMA alone; ``mix`` (A, H), ``coefficients`` (C, H) and
    ``intercept`` (H,) are the mix's, None where there is too little data or the EWMA alone is best. ``quantile``
    is None where there is too little data. ``ceiling`` is the largest root seen.
    """

    step: int
    ewma: FloatArray
    ewma_spread: Spread
    mix: FloatArray | None
    coefficients: FloatArray | None
    intercept: FloatArray | None
    mix_spread: Spread
    scaling: Scaling
    quantile: Regressed | None
    ceiling: float


@dataclass(frozen=True, slots=True)
class Regressed:
    """The P90's root over the level by quantile regression: (C + UNREST, H) and (H,), of so many rows."""

    coefficients: FloatArray
    intercept: FloatArray
    rows: int


@dataclass(frozen=True, slots=True)
class Outlook:
    """What is to come: (S, H) requests per second, step by step; ``models`` says who spoke for each series.

    The median is what has the least absolute error, the mean what a capacity is planned by.
    """

    step_ms: int
    median: FloatArray
    mean: FloatArray
    p90: FloatArray
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tracks:
    """What was said in the last H steps, (H, S, H) by step, and how good it was (S, H), recent steps counting most."""

    steps: IntArray
    said: FloatArray
    said_ewma: FloatArray
    said_p90: FloatArray
    judged: FloatArray
    error: FloatArray
    error_ewma: FloatArray
    bias: FloatArray
    covered: FloatArray
    naive: FloatArray
    """(S,): what the step before would have been wrong by."""
    load: FloatArray
    """(S,): the mean count."""


@dataclass(frozen=True, slots=True)
class Bank:
    """All of one cadence's classes, or pairs."""

    series: tuple[object, ...]
    step: int
    step_ms: int
    fitted: IntArray
    """The step at which each was fitted."""
    ridge: BoolArray
    ewma: FloatArray
    mix: FloatArray
    coefficients: FloatArray
    intercept: FloatArray
    regressed: FloatArray
    """The part of the quantile regression in the P90, of which the next two are; 0 without one."""
    over: FloatArray
    over_intercept: FloatArray
    score: FloatArray
    variance: FloatArray
    score_ewma: FloatArray
    variance_ewma: FloatArray
    bias: FloatArray
    bias_ewma: FloatArray
    scaling: FloatArray
    ceiling: FloatArray
    drift: FloatArray
    """The logarithm of what the P90's score is multiplied by, to keep its coverage."""
    tracks: Tracks
    scored: int
    """The step up to which what was said is judged."""
    outlook: Outlook

    def follow(self, series: tuple[object, ...], step: int, step_ms: int) -> tuple[Bank, bool]:
        """Go on with these series at this step, and whether these were all there are and the step is no new one."""
        if step_ms != self.step_ms:
            return replace(_fresh(series, step_ms), step=step), False
        if series == self.series:
            return replace(self, step=step), step == self.step
        places = {name: index for index, name in enumerate(self.series)}
        old = np.array([places.get(name, -1) for name in series], dtype=np.int64)
        fresh = _fresh(series, step_ms)
        here = np.flatnonzero(old >= 0)
        values = {"series": series, "step": step, "step_ms": step_ms, "scored": self.scored, "outlook": fresh.outlook}
        for name in _BY_SERIES:
            values[name] = _moved(getattr(fresh, name), getattr(self, name), here, old, axis=0)
        tracks: dict[str, NDArray[np.generic]] = {"steps": self.tracks.steps}
        for name in _TRACKS:
            axis = 1 if name.startswith("said") else 0
            tracks[name] = _moved(getattr(fresh.tracks, name), getattr(self.tracks, name), here, old, axis=axis)
        return Bank(**values, tracks=Tracks(**tracks)), False  # type: ignore[arg-type]


_BY_SERIES = (
    "fitted",
    "ridge",
    "ewma",
    "mix",
    "coefficients",
    "intercept",
    "regressed",
    "over",
    "over_intercept",
    "score",
    "variance",
    "score_ewma",
    "variance_ewma",
    "bias",
    "bias_ewma",
    "scaling",
    "ceiling",
    "drift",
)
_TRACKS = (
    "said",
    "said_ewma",
    "said_p90",
    "judged",
    "error",
    "error_ewma",
    "bias",
    "covered",
    "naive",
    "load",
)


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How good the forecasts of a bank were of late: (S, H), NaN where nothing was judged yet.

    ``mase`` is the mean absolute error over that of the step before said again for the next; ``bias`` is the mean error
    over the mean load, above 0 where too much was said; ``coverage`` is how often the P90 held.
    """

    series: tuple[object, ...]
    models: tuple[str, ...]
    mase: FloatArray
    coverage: FloatArray
    bias: FloatArray


@dataclass(frozen=True, slots=True)
class Spread:
    """How what came lay about what was guessed, by horizon (H,).

    ``score`` is the split-conformal quantile of (y - guess) over its scale, in counts, drawn to the normal one;
    ``bias`` and ``variance`` are those of the roots' errors; ``rows`` is how many it is of.
    """

    score: FloatArray
    bias: FloatArray
    variance: FloatArray
    rows: int

    def drawn_to(self, wide: Spread) -> Spread:
        """With the score drawn to that of a wider sample, the more the fewer rows this one has."""
        part = self.rows / (self.rows + SCORE_ROWS)
        return replace(self, score=part * self.score + (1.0 - part) * wide.score)


def spread(guess: FloatArray, said: FloatArray, unrest: FloatArray, scaling: Scaling) -> Spread:
    """From roots (rows, H) that were guessed, and that came, and the volatility (rows,) at the origins."""
    rows = len(said)
    rank = math.ceil((rows + 1) * QUANTILE)
    errors = said - guess if rows > 1 else np.zeros((1, HORIZONS))
    bias, variance = errors.mean(axis=0), errors.var(axis=0)
    if rank > rows:
        return Spread(np.full(HORIZONS, NORMAL_SCORE), bias, variance, rows)
    counts = counts_of(guess)
    residuals = (counts_of(said) - counts) / _scale(counts, unrest, *scaling)
    normal = residuals.mean(axis=0) + NORMAL_SCORE * residuals.std(axis=0)
    part = rows / (rows + NORMAL_ROWS)
    score = part * np.partition(residuals, rank - 1, axis=0)[rank - 1] + (1.0 - part) * normal
    return Spread(np.maximum(score, 0.0), bias, variance, rows)


def best_scaling(guess: FloatArray, said: FloatArray, unrest: FloatArray) -> Scaling:
    """What the errors of a series grow with: scores of the older part have the least pinball loss on the newer one."""
    rows = len(said)
    split = int(rows * OLDER_PART)
    rank = math.ceil((split + 1) * QUANTILE)
    if rows < SCALING_ROWS_MIN or rank > split:
        return SCALINGS[0]
    counts = counts_of(guess)
    errors = counts_of(said) - counts
    losses = []
    for scaling in SCALINGS:
        scale = _scale(counts, unrest, *scaling)
        score = np.maximum(np.partition(errors[:split] / scale[:split], rank - 1, axis=0)[rank - 1], 0.0)
        over = errors[split:] - score * scale[split:]
        losses.append(float(np.maximum(QUANTILE * over, (QUANTILE - 1.0) * over).mean()))
    return SCALINGS[int(np.argmin(losses))]


def _scale(counts: FloatArray, unrest: FloatArray, power: FloatArray | float, part: FloatArray | float) -> FloatArray:
    """What a score is multiplied by, (rows, H): (count + 1)^power x volatility^part."""
    return np.asarray((counts + 1.0) ** power * (unrest**part)[:, None])


def refitted(bank: Bank, fits: Mapping[int, Fit]) -> Bank:
    """The bank with these series learnt anew."""
    if not fits:
        return bank
    copies = {name: getattr(bank, name).copy() for name in _BY_SERIES if name != "drift"}
    for index, fit in fits.items():
        copies["fitted"][index] = fit.step
        copies["ridge"][index] = fit.mix is not None
        copies["ewma"][index] = fit.ewma
        for each, ending in ((fit.mix_spread, ""), (fit.ewma_spread, "_ewma")):
            copies[f"score{ending}"][index] = each.score
            copies[f"bias{ending}"][index] = each.bias
            copies[f"variance{ending}"][index] = each.variance
        copies["ceiling"][index] = fit.ceiling
        copies["scaling"][index] = fit.scaling
        copies["regressed"][index] = 0.0
        if fit.quantile is not None:
            copies["regressed"][index] = fit.quantile.rows / (fit.quantile.rows + REGRESSED_ROWS)
            copies["over"][index] = fit.quantile.coefficients
            copies["over_intercept"][index] = fit.quantile.intercept
        if fit.mix is not None:
            copies["mix"][index] = fit.mix
            copies["coefficients"][index] = fit.coefficients
            copies["intercept"][index] = fit.intercept
    return replace(bank, **copies)


def advance(bank: Bank, counts: FloatArray, lengths: tuple[int, ...], known: Known | None) -> Bank:
    """Judge what was said of the newest step, and say what comes after it. ``counts`` is (steps, S)."""
    series = len(bank.series)
    if not series or not len(counts):
        return replace(bank, outlook=_silence(bank.series, bank.step_ms))
    if bank.scored < bank.step:
        bank = _judged(bank, counts)
    tail = clean(counts[-WINDOW:])
    roots = roots_of(tail)
    level = last_levels(roots)
    limit = (ROOT_TIMES * np.maximum(bank.ceiling, roots.max(axis=0)))[:, None]
    ewma = np.einsum("sa,sah->sh", level, bank.ewma)
    rests = _rests(bank)
    speaks = bank.ridge & ~rests & (len(counts) >= LAGS)
    volatile = newest_volatility(roots)
    here = np.flatnonzero(bank.ridge | (bank.regressed > 0)) if len(counts) >= LAGS else np.zeros(0, dtype=np.int64)
    mixed, over = ewma.copy(), np.zeros_like(ewma)
    if here.size:
        columns = _newest(counts[:, here], roots[:, here], level[here], lengths, bank.step, known)
        mixed[here] = (
            np.einsum("sc,sch->sh", columns, bank.coefficients[here])
            + bank.intercept[here]
            + np.einsum("sa,sah->sh", level[here], bank.mix[here])
        )
        mixed = np.where(bank.ridge[:, None] & np.isfinite(mixed), mixed, ewma)
        columns = np.hstack([columns, unrest(level[here], volatile[here])])
        over[here] = (
            np.einsum("sc,sch->sh", columns, bank.over[here]) + bank.over_intercept[here] + level[here, LEVEL][:, None]
        )
    mixed, ewma = np.clip(mixed, 0.0, limit), np.clip(ewma, 0.0, limit)
    shifted = _shifted(bank, roots, speaks)[:, None]
    said = np.where(speaks[:, None], mixed, ewma)
    said = np.where(shifted, roots[-SHIFT_STEPS:].mean(axis=0)[:, None], said)
    lives = (tail.max(axis=0) > 0)[:, None]
    median = np.where(lives, counts_of(said), 0.0)
    variance = np.where(speaks[:, None], bank.variance, bank.variance_ewma)
    bias = np.where(speaks[:, None], bank.bias, bank.bias_ewma)
    mean = np.where(shifted, median, np.where(lives, counts_of(said + bias, variance), 0.0))
    above = np.where(speaks[:, None], bank.score, bank.score_ewma) * _scale(
        median, volatile[:, VOLATILITY], bank.scaling[:, :1], bank.scaling[:, 1]
    )
    regressed = np.maximum(counts_of(np.clip(np.nan_to_num(over), 0.0, limit)) - median, 0.0)
    part = bank.regressed[:, None] if len(counts) >= LAGS else 0.0
    above = (part * regressed + (1.0 - part) * above) * np.exp(bank.drift)
    above = np.where(shifted, SHIFT_SCORE * np.sqrt(median + 1.0), above)
    most = np.maximum(tail.max(axis=0)[:, None], median)
    most = P90_TIMES * most + P90_MORE * np.sqrt(most + 1.0)
    mean, p90 = np.minimum(mean, most), np.minimum(median + above, most)
    p90 = np.where(lives, np.maximum(p90, mean), 0.0)
    median, mean, p90 = (np.minimum(each, COUNT_MAX) for each in (median, mean, p90))
    per_s = 1000.0 / bank.step_ms
    outlook = Outlook(
        bank.step_ms, median * per_s, mean * per_s, p90 * per_s, tuple("ridge" if each else "ewma" for each in speaks)
    )
    place = bank.step % HORIZONS
    tracks = bank.tracks
    steps, said_mix = tracks.steps.copy(), tracks.said.copy()
    said_ewma, said_p90 = tracks.said_ewma.copy(), tracks.said_p90.copy()
    steps[place] = bank.step
    # The mix is judged even while it rests: so it is known when it is better again.
    said_mix[place] = np.where(lives, counts_of(mixed), 0.0)
    said_ewma[place] = np.where(lives, counts_of(ewma), 0.0)
    said_p90[place] = p90
    tracks = replace(tracks, steps=steps, said=said_mix, said_ewma=said_ewma, said_p90=said_p90)
    return replace(bank, tracks=tracks, outlook=outlook)


def accuracy(bank: Bank) -> Accuracy:
    """What is known of a bank's errors."""
    tracks = bank.tracks
    unknown = tracks.judged < 1
    error = np.where(_rests(bank)[:, None] | ~bank.ridge[:, None], tracks.error_ewma, tracks.error)
    with np.errstate(divide="ignore", invalid="ignore"):
        mase = error / tracks.naive[:, None]
        bias = tracks.bias / tracks.load[:, None]
    return Accuracy(
        bank.series,
        bank.outlook.models,
        np.where(unknown | ~np.isfinite(mase), np.nan, mase),
        np.where(unknown, np.nan, tracks.covered),
        np.where(unknown | ~np.isfinite(bias), np.nan, bias),
    )


def _shifted(bank: Bank, roots: FloatArray, speaks: BoolArray) -> BoolArray:
    """Which series (S,) have left what was learnt of them, by what was said of their newest steps."""
    tracks = bank.tracks
    origins = bank.step - 1 - np.arange(SHIFT_STEPS)
    places = origins % HORIZONS
    if len(roots) < SHIFT_STEPS or (tracks.steps[places] != origins).any():
        return np.zeros(len(bank.series), dtype=bool)
    said = np.where(speaks, tracks.said[places, :, 0], tracks.said_ewma[places, :, 0])
    errors = roots[-1 : -1 - SHIFT_STEPS : -1] - roots_of(said)
    variance = np.where(speaks, bank.variance[:, 0], bank.variance_ewma[:, 0])
    usual = np.sqrt(np.maximum(variance, POISSON_SD**2))
    away = np.abs(errors).min(axis=0) > SHIFT_ERRORS * usual
    return np.asarray(away & (np.abs(np.sign(errors).sum(axis=0)) == SHIFT_STEPS))


def _rests(bank: Bank) -> BoolArray:
    tracks = bank.tracks
    enough = tracks.judged.min(axis=1) >= JUDGED_STEPS
    scale = np.maximum(tracks.error_ewma, 1e-9)
    return np.asarray(enough & ((tracks.error / scale).mean(axis=1) > WORSE))


def _judged(bank: Bank, counts: FloatArray) -> Bank:
    """The newest step against what was said of it 1..H steps ago."""
    tracks, newest = bank.tracks, counts[-1]
    known = np.isfinite(newest) & (newest >= 0) & (newest <= COUNT_MAX)
    if not known.any():
        return replace(bank, scored=bank.step)
    actual = np.where(known, newest, 0.0)
    horizons = np.arange(HORIZONS)
    places = (bank.step - 1 - horizons) % HORIZONS
    there = tracks.steps[places] == bank.step - 1 - horizons
    said, by_ewma, p90 = (each[places, :, horizons].T for each in (tracks.said, tracks.said_ewma, tracks.said_p90))
    valid = there[None, :] & known[:, None]
    judged = np.where(valid, tracks.judged + 1, tracks.judged)
    weight: FloatArray = np.where(valid, np.maximum(MEMORY, 1.0 / np.maximum(judged, 1)), 0.0)
    above = actual[:, None] > p90
    before = counts[-2] if len(counts) > 1 else newest
    stepped = known & np.isfinite(before)
    of_series = np.where(stepped, np.maximum(MEMORY, 1.0 / np.maximum(judged[:, 0], 1)), 0.0)
    pull = TRACKING * (above - (1.0 - QUANTILE))
    drift = np.clip(bank.drift + np.where(valid, pull, 0.0), -DRIFT_MAX, DRIFT_MAX)

    def mean(old: FloatArray, new: FloatArray, weights: FloatArray) -> FloatArray:
        return np.asarray(old + weights * (new - old))

    tracks = replace(
        tracks,
        judged=judged,
        error=mean(tracks.error, np.abs(said - actual[:, None]), weight),
        error_ewma=mean(tracks.error_ewma, np.abs(by_ewma - actual[:, None]), weight),
        bias=mean(tracks.bias, np.where(bank.ridge[:, None], said, by_ewma) - actual[:, None], weight),
        covered=mean(tracks.covered, np.where(above, 0.0, 1.0), weight),
        naive=mean(tracks.naive, np.where(stepped, np.abs(actual - before), 0.0), of_series),
        load=mean(tracks.load, actual, of_series),
    )
    return replace(bank, tracks=tracks, drift=drift, scored=bank.step)


def _newest(
    counts: FloatArray,
    roots: FloatArray,
    level: FloatArray,
    lengths: tuple[int, ...],
    step: int,
    known: Known | None,
) -> FloatArray:
    """The columns (series, C) of the newest step. Of what is older than the window only the waves' rows are made."""
    steps, tail = len(counts), len(roots)
    long = max(lengths, default=0) * CYCLES
    if long > tail:
        rows = np.unique(
            np.concatenate(
                [
                    np.arange(steps - cycle * length, steps - cycle * length + HORIZONS)
                    for length in lengths
                    if length
                    for cycle in range(1, CYCLES + 1)
                ]
            )
        )
        rows = rows[(rows >= 0) & (rows < steps - tail)]
        whole = np.empty((steps, counts.shape[1]))
        whole[rows] = roots_of(clean(counts[rows]))
        whole[steps - tail :] = roots
        roots = whole
    near = None
    if known is not None:
        near = Known(known.past[-REGRESSOR_WINDOW:], known.ahead)
    at = np.array([len(roots) - 1])
    return np.asarray(design(roots, level[None], at, lengths, step, near)[0])


def _moved(
    fresh: NDArray[np.generic], old: NDArray[np.generic], here: IntArray, places: IntArray, *, axis: int
) -> NDArray[np.generic]:
    told = fresh.copy()
    if axis:
        told[:, here] = old[:, places[here]]
    else:
        told[here] = old[places[here]]
    return told


def _silence(series: tuple[object, ...], step_ms: int) -> Outlook:
    nothing = np.zeros((len(series), HORIZONS))
    return Outlook(step_ms, nothing, nothing, nothing, ("ewma",) * len(series))


def _fresh(series: tuple[object, ...], step_ms: int) -> Bank:
    many, levels = len(series), len(ALPHAS)
    ewma = np.zeros((many, levels, HORIZONS))
    ewma[:, NEW_ALPHA] = 1.0
    zeros = np.zeros((many, HORIZONS))
    said = np.zeros((HORIZONS, many, HORIZONS))
    none = np.zeros(many)
    return Bank(
        series=series,
        step=0,
        step_ms=step_ms,
        fitted=np.full(many, NEVER, dtype=np.int64),
        ridge=np.zeros(many, dtype=bool),
        ewma=ewma,
        mix=np.zeros((many, levels, HORIZONS)),
        coefficients=np.zeros((many, COLUMNS, HORIZONS)),
        intercept=zeros,
        regressed=none,
        over=np.zeros((many, COLUMNS + UNREST, HORIZONS)),
        over_intercept=zeros,
        score=np.full((many, HORIZONS), NORMAL_SCORE),
        variance=zeros,
        score_ewma=np.full((many, HORIZONS), NORMAL_SCORE),
        variance_ewma=zeros,
        bias=zeros,
        bias_ewma=zeros,
        scaling=np.tile(np.array(SCALINGS[0]), (many, 1)),
        ceiling=none,
        drift=zeros,
        tracks=Tracks(
            np.full(HORIZONS, NEVER, dtype=np.int64), said, said, said, zeros, zeros, zeros, zeros, zeros, none, none
        ),
        scored=NEVER,
        outlook=_silence(series, step_ms),
    )


EMPTY = _fresh((), 0)
