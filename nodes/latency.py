"""How long a node's requests took since it started, stage by stage, by request class. It reads no clock.

What is told of a class are percentiles; the buckets of classic histograms are counted from the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from engine.client._histogram import Histograms
from engine.protocol.requests import STAGES, ClassLatency, StageLatency

__all__ = ["Buckets", "Latencies"]

PARSE, POLICY, CACHE, WAIT, GATHER, TOKEN, WORK, AUDIT, REPLY, TOTAL = range(len(STAGES))
"""``_fastpath.pyx`` knows some of these places too."""
QUANTILES: Final = (0.5, 0.9, 0.99, 0.999)
MAX_CLASSES: Final = 128
"""There are fewer verbs, and uses of an algorithm: what does not fit would be told as ``other``."""
OTHER: Final = "other"


@dataclass(frozen=True, slots=True)
class Buckets:
    """One stage of a class: how many were not above each bound, how many there were, and their sum in seconds."""

    request_class: str
    stage: str
    counts: Sequence[int]
    count: int
    sum_s: float


class Latencies:
    """The histograms of a node's request classes: at most 128 of 75 KB each, made when they are first needed."""

    def __init__(self) -> None:
        self._classes: dict[str, Histograms] = {}
        self._errors: dict[str, int] = {}

    def of(self, request_class: str) -> Histograms:
        """The histograms of a class, one for each of ``STAGES``."""
        found = self._classes.get(request_class)
        if found is None:
            name = request_class if len(self._classes) < MAX_CLASSES - 1 else OTHER
            found = self._classes.setdefault(name, Histograms(len(STAGES)))
        return found

    def note(self, request_class: str, spent_s: list[float], *, ok: bool) -> None:
        """A request was answered; ``spent_s`` are the seconds of its stages, negative for what it did not have."""
        self.of(request_class).record_all(spent_s)
        if not ok:
            name = request_class if request_class in self._classes else OTHER
            self._errors[name] = self._errors.get(name, 0) + 1

    @property
    def errors(self) -> dict[str, int]:
        """How many requests of each class were not answered with ok."""
        return {name: self._errors.get(name, 0) for name in self._classes}

    def told(self) -> list[ClassLatency]:
        """Count, percentiles and maximum of every stage of every class."""
        return [
            ClassLatency(name, self._errors.get(name, 0), list(_stages(found)))
            for name, found in sorted(self._classes.items())
        ]

    def buckets(self, bounds_s: Sequence[float]) -> list[Buckets]:
        """The same as classic histograms with these bounds, in seconds."""
        return [
            Buckets(name, stage, found.up_to(bounds_s, number), found.count(number), found.sum_s(number))
            for name, found in sorted(self._classes.items())
            for number, stage in enumerate(STAGES)
            if found.count(number)
        ]


def _stages(found: Histograms) -> Iterator[StageLatency]:
    for number, stage in enumerate(STAGES):
        count = found.count(number)
        if count:
            times_s = (*found.quantiles_s(QUANTILES, number), found.max_s(number))
            yield StageLatency(stage, count, *(round(each * 1e9) for each in times_s))
