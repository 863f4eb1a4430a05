"""Histograms of durations in fixed memory, log-linear as HdrHistogram's: 32 buckets for each doubling.

What is read out is within 1.6 % of what was taken in, from 1 microsecond to 100 seconds; a shorter one is within 8 ns,
and above 137 s only the count, the sum and the longest are told rightly. One histogram is 7.5 KB. Taking in a duration
costs a few nanoseconds and no object. Who records and who reads must hold the GIL or be the same thread.
"""

from collections.abc import Iterable
from typing import final

@final
class Histograms:
    """``size`` histograms (1 to 64), numbered from 0."""

    size: int
    def __new__(cls, size: int = 1) -> Histograms: ...
    def record(self, which: int, seconds: float) -> None:
        """Take in a duration in seconds; a negative one counts as 0."""

    def record_all(self, seconds: list[float]) -> None:
        """Take in a duration for each histogram, in order; a negative one is none."""

    def count(self, which: int = 0) -> int:
        """How many durations were taken in."""

    def sum_s(self, which: int = 0) -> float:
        """Their sum in seconds, exactly."""

    def max_s(self, which: int = 0) -> float:
        """The longest in seconds, exactly; 0 without any."""

    def quantiles_s(self, quantiles: Iterable[float], which: int = 0) -> list[float]:
        """For each of the ascending quantiles (0 to 1) the shortest duration, in seconds, that so large a part of all
        does not exceed; 0 without any."""

    def up_to(self, bounds_s: Iterable[float], which: int = 0) -> list[int]:
        """For each of the ascending bounds in seconds, how many durations are not above it. One that is within 1.6 % of
        a bound may count on its other side."""
