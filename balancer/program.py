"""A linear program as arrays, by columns. It knows no solver: ``balancer.optimizer`` solves it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatArray", "IndexArray", "Program", "Solution"]

FloatArray = NDArray[np.float64]
IndexArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Program:
    """Minimise ``cost`` x, with ``lower`` <= x <= ``upper`` and ``row_lower`` <= A x <= ``row_upper``.

    Column j of A has ``values[k]`` in row ``indexes[k]`` for k in ``starts[j]`` .. ``starts[j + 1]``.
    """

    cost: FloatArray
    lower: FloatArray
    upper: FloatArray
    row_lower: FloatArray
    row_upper: FloatArray
    starts: IndexArray
    indexes: IndexArray
    values: FloatArray


@dataclass(frozen=True, slots=True)
class Solution:
    """An optimum: the columns, the dual of each row (the optimum's change by one more on its right side), its value."""

    columns: FloatArray
    duals: FloatArray
    objective: float
    iterations: int
