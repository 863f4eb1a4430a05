"""The simulator's figures: rows beside their peers and targets, and what is found in one run's outcome."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from figures import Row
from numpy.typing import NDArray

from balancing.events import Outcome

__all__ = ["SETTLED", "Target", "last_above_s", "mean_ms", "p99_ms", "recovered_s", "row"]

FloatArray = NDArray[np.float64]

BIN_S = 0.1
SETTLED = 1.5


@dataclass(frozen=True, slots=True)
class Target:
    """What is promised; a figure is to be at most that."""

    must: float
    stretch: float | None = None


def row(
    name: str,
    values: Sequence[float],
    unit: str,
    peer: str = "",
    peer_values: Sequence[float] = (),
    target: Target | None = None,
    worst: bool = False,
) -> Row:
    """A row of one figure for each seed: medians, and the median of the ratios seed by seed, or the worst of them."""
    middle = max if worst else statistics.median
    ratio = None
    if peer_values:
        ratio = middle([value / other for value, other in zip(values, peer_values, strict=True)])
    judged = ratio if ratio is not None else middle(values)
    stretch = target.stretch if target else None
    return Row(
        name,
        round(middle(values), 4),
        unit,
        peer,
        round(middle(peer_values), 4) if peer_values else None,
        None if ratio is None else round(ratio, 4),
        target.must if target else None,
        stretch,
        judged <= target.must if target else None,
        None if stretch is None else judged <= stretch,
    )


def mean_ms(outcome: Outcome, begin_s: float = -1.0, end_s: float = float("inf")) -> float:
    """Mean latency in milliseconds of what came in a time."""
    return float(outcome.window(begin_s, end_s).mean() * 1e3)


def p99_ms(outcome: Outcome, begin_s: float = -1.0, end_s: float = float("inf")) -> float:
    """The 99th percentile of the same."""
    return float(np.percentile(outcome.window(begin_s, end_s), 99) * 1e3)


def recovered_s(outcome: Outcome, death_s: float, within_s: float, settled: tuple[float, float]) -> float:
    """How long after a death the p99 of what arrives in a tenth of a second is more than 1.5 times the settled one."""
    limit_ms = SETTLED * p99_ms(outcome, *settled)
    return last_above_s(outcome.arrivals.time_s - death_s, outcome.latency_s * 1e3, limit_ms, within_s)


def last_above_s(after_s: FloatArray, latency_ms: FloatArray, limit_ms: float, within_s: float) -> float:
    """The end of the last tenth of a second, in the time that is looked at, whose p99 is above a limit; 0 if none is.

    ``after_s`` says when each request arrived.
    """
    last = 0.0
    for at in range(round(within_s / BIN_S)):
        within = latency_ms[(after_s >= at * BIN_S) & (after_s < (at + 1) * BIN_S)]
        if len(within) and np.percentile(within, 99) > limit_ms:
            last = (at + 1) * BIN_S
    return last
