"""Linear quantile regression for all horizons at once. Plain numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["QUANTILE", "quantile_fit"]

FloatArray = NDArray[np.float64]

QUANTILE = 0.9
STRENGTH = 0.05
"""Ridge penalty for a column of variance 1."""
STRENGTH_OF_MEAN = 0.02
STEPS = 6
MOMENTUM = 0.5
BANDS = (1.0, 0.5)
"""The kernel's half width at the first and at the last step, in standard deviations of the errors."""
SD_MIN = 1e-6


def quantile_fit(told: FloatArray, wanted: FloatArray, penalties: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients (columns, H) and intercepts (H,) of the 90 % quantiles of ``wanted`` (rows, H).

    Convolution-smoothed quantile regression with a uniform kernel (Fernandes et al. 2021; He et al. 2023), begun at the
    least squares fit. The smoothed loss has a second derivative of at most 1 / (2 band), so that X'X, the same for all
    horizons and steps, bounds its Hessian: a step is two products of matrices. ``penalties`` (columns,) say how much
    more than others each is shrunk.
    """
    rows = len(told)
    centre, sd = told.mean(axis=0), told.std(axis=0)
    chosen = np.flatnonzero(sd > SD_MIN)
    scale = sd[chosen] * np.sqrt(penalties[chosen])
    scaled = (told[:, chosen] - centre[chosen]) / scale
    gram = scaled.T @ scaled / rows
    one = np.eye(chosen.size)
    mean = wanted.mean(axis=0)
    slopes = np.linalg.solve(gram + STRENGTH_OF_MEAN * one, scaled.T @ (wanted - mean) / rows)
    errors = wanted - mean - scaled @ slopes
    spread = errors.std(axis=0) + SD_MIN
    rank = int(QUANTILE * (rows - 1))
    constant = mean + np.partition(errors, rank, axis=0)[rank]
    inverse = np.linalg.inv(gram + STRENGTH * one)
    moved, shifted = np.zeros_like(slopes), np.zeros_like(constant)
    for band in np.linspace(*BANDS, STEPS):
        double = 2.0 * band * spread
        errors = wanted - constant - scaled @ slopes
        pull = (QUANTILE - np.clip(0.5 - errors / double, 0.0, 1.0)) * double
        moved = MOMENTUM * moved + inverse @ (scaled.T @ pull / rows - STRENGTH * slopes)
        shifted = MOMENTUM * shifted + pull.mean(axis=0)
        slopes, constant = slopes + moved, constant + shifted
    errors = wanted - constant - scaled @ slopes
    constant = constant + np.partition(errors, rank, axis=0)[rank]
    coefficients = np.zeros((told.shape[1], wanted.shape[1]))
    coefficients[chosen] = slopes / scale[:, None]
    return coefficients, constant - centre @ coefficients
