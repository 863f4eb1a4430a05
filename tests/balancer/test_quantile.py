"""The quantile regression behind the P90."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer.quantile import QUANTILE, quantile_fit


def noise(rows: int = 600, columns: int = 4, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, columns)), random.normal(size=(rows, 3))


@given(st.floats(0.1, 1e3), st.floats(-1e3, 1e3), st.integers(0, 5))
@settings(deadline=None, max_examples=15)
def test_it_moves_and_grows_with_what_it_is_of(factor: float, shift: float, seed: int) -> None:
    """The quantile of a y + b is a times that of y, and b; columns that say nothing weigh nothing."""
    told, wanted = noise(seed=seed)
    told[:, 2] = 7.0
    slopes, constant = quantile_fit(told, wanted, np.ones(4))
    moved, shifted = quantile_fit(told, factor * wanted + shift, np.ones(4))
    assert moved == pytest.approx(factor * slopes, rel=1e-3, abs=1e-4 * factor)
    assert shifted == pytest.approx(factor * constant + shift, rel=1e-3, abs=1e-3 * factor + 1e-6 * abs(shift))
    assert not slopes[2].any()


def test_nine_of_ten_rows_lie_below() -> None:
    """In the rows it was made of, whatever the columns."""
    told, wanted = noise()
    slopes, constant = quantile_fit(told, np.exp(wanted), np.ones(4))
    below = (np.exp(wanted) <= told @ slopes + constant + 1e-9).mean(axis=0)
    assert below == pytest.approx(np.full(3, QUANTILE), abs=0.01)


def test_it_sees_what_the_spread_goes_by() -> None:
    """Noise whose width is a column: the quantile is the level and 1.28 widths, in rows that were not seen."""
    random = np.random.default_rng(2)
    width = random.uniform(1.0, 5.0, 4000)
    level = random.normal(0.0, 3.0, 4000)
    told = np.column_stack([level, width])
    came = level + width * random.normal(size=4000)
    slopes, constant = quantile_fit(told[:2000], came[:2000, None], np.ones(2))
    quantile = (told[2000:] @ slopes + constant)[:, 0]
    calm, wild = width[2000:] < 2.0, width[2000:] > 4.0
    assert (came[2000:] <= quantile)[calm].mean() == pytest.approx(QUANTILE, abs=0.06)
    assert (came[2000:] <= quantile)[wild].mean() == pytest.approx(QUANTILE, abs=0.06)
    assert slopes[:, 0].min() > 0.5
