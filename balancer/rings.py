"""Rings of counts per step and series, and which (class, placement group) pairs have a series. No socket, no clock.

Pairs are many (48 classes x 4,096 groups), so only the ``PAIRS_MAX`` warmest have one: a pair that comes takes a free
place, or that of the coldest if it is clearly warmer. What has no series is still in its class's count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["PAIRS_MAX", "PairPlaces", "Ring"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PAIRS_MAX = 256
"""How many (class, group) pairs have a series of their own."""
HEAT_ALPHA = 0.03
"""A pair's heat is the EWMA of its count per step with this weight."""
WARMER = 2.0
"""A pair takes another's place if its count in one step is so many times the other's heat ..."""
WARMER_REQUESTS = 4.0
"""... and so many requests more."""


class Ring:
    """``length`` steps of ``columns`` counts; a step in which nobody was heard is NaN."""

    def __init__(self, length: int, columns: int) -> None:
        self._rows: FloatArray = np.full((length, columns), np.nan)
        self.length = 0
        """Steps that were entered, at most as many as there are rows."""
        self.step: int | None = None
        """Number of the newest step."""

    def advance(self, step: int) -> None:
        """Begin a step; those left out are unknown."""
        passed = 1 if self.step is None else min(step - self.step, len(self._rows))
        self._rows[np.arange(step - passed + 1, step + 1) % len(self._rows)] = np.nan
        self.length = min(self.length + passed, len(self._rows))
        self.step = step

    def reach(self, step: int) -> None:
        """Take the steps from this one on, of which nothing is known yet, for entered."""
        if self.step is not None:
            self.length = min(max(self.length, self.step - step + 1), len(self._rows))

    def add(self, step: int, gap: int, counts: FloatArray, first: int = 0) -> None:
        """Spread counts evenly over ``gap`` steps that end with this one, in the columns from ``first`` on.

        When in the gap they came is not known.
        """
        rows = np.arange(step - min(gap, self.length) + 1, step + 1) % len(self._rows)
        part = self._rows[rows, first : first + len(counts)]
        self._rows[rows, first : first + len(counts)] = np.nan_to_num(part, nan=0.0) + counts / gap

    def heard(self, step: int) -> None:
        """What is still unknown of a step in which a node was heard is 0."""
        row = self._rows[step % len(self._rows)]
        np.nan_to_num(row, copy=False, nan=0.0)

    def put(self, step: int, counts: FloatArray) -> None:
        """Set a whole step that is in the ring."""
        if self.step is not None and self.step - self.length < step <= self.step:
            self._rows[step % len(self._rows)] = counts

    def clear(self, columns: IntArray) -> None:
        """Columns that begin anew: nothing was counted in the steps that are known."""
        part = self._rows[:, columns]
        self._rows[:, columns] = np.where(np.isnan(part), np.nan, 0.0)

    def read(self, columns: IntArray, last: int | None = None) -> FloatArray:
        """The newest ``last`` steps (all, if None) of these columns, oldest first: (steps, columns), read-only."""
        steps = self.length if last is None else min(last, self.length)
        newest = -1 if self.step is None else self.step
        order = np.arange(newest - steps + 1, newest + 1) % len(self._rows)
        taken = self._rows[np.ix_(order, columns)]
        taken.setflags(write=False)
        return taken


class PairPlaces:
    """Which pair has which place of ``PAIRS_MAX``. A pair is one number, made by its owner."""

    def __init__(self, places: int = PAIRS_MAX) -> None:
        self.pairs: IntArray = np.full(places, -1, dtype=np.int64)
        self._heat: FloatArray = np.zeros(places)

    def settle(self, pairs: IntArray, counts: FloatArray) -> tuple[IntArray, IntArray]:
        """Places of these pairs, each named once, with their counts in this step, and the places that changed hands.

        -1 is the place of a pair that gets none.
        """
        places = self._find(pairs)
        coming = np.flatnonzero((places < 0) & (counts > 0))
        coming = coming[np.argsort(-counts[coming], kind="stable")][: len(self.pairs)]
        stays = np.zeros(len(self.pairs), dtype=bool)
        stays[places[places >= 0]] = True
        heat = np.where(self.pairs < 0, -np.inf, self._heat)
        coldest = np.argsort(heat, kind="stable")[: len(coming)]
        taken = (heat[coldest] == -np.inf) | (
            (counts[coming] > WARMER * heat[coldest]) & (counts[coming] > heat[coldest] + WARMER_REQUESTS)
        )
        # A pair that is counted in this very step goes only if it is cold by its heat and by this count.
        now = np.zeros(len(self.pairs))
        now[places[places >= 0]] = counts[places >= 0]
        taken &= counts[coming] > WARMER * now[coldest]
        changed = coldest[taken]
        places[np.isin(places, changed)] = -1
        self.pairs[changed] = pairs[coming[taken]]
        places[coming[taken]] = changed
        self._heat *= 1.0 - HEAT_ALPHA
        self._heat[changed] = 0.0
        found = places >= 0
        self._heat[places[found]] += HEAT_ALPHA * counts[found]
        return places, changed

    def restore(self, pairs: IntArray, heat: FloatArray) -> IntArray:
        """Give places to pairs, the warmest first, where there is room; their places, -1 for none."""
        places = np.full(len(pairs), -1, dtype=np.int64)
        free = np.flatnonzero(self.pairs < 0)
        order = np.argsort(-heat, kind="stable")[: len(free)]
        places[order] = free[: len(order)]
        self.pairs[free[: len(order)]] = pairs[order]
        self._heat[free[: len(order)]] = heat[order]
        return places

    def _find(self, pairs: IntArray) -> IntArray:
        order = np.argsort(self.pairs, kind="stable")
        at = np.minimum(np.searchsorted(self.pairs, pairs, sorter=order), len(order) - 1)
        return np.where(self.pairs[order[at]] == pairs, order[at], -1)
