"""How much the service suffers while keys are moved, from the nodes' statistics. It knows no socket and no clock.

What a request takes is its service, as the nodes count it by class, and its wait, which grows with their queues. Both
are held against what was usual when nothing was moved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.protocol.requests import NodeStats

__all__ = ["Strain"]

USUAL_PART = 0.1
"""What is usual follows what is measured by this part a tick."""
NEW_PART = 0.5
"""The strain follows by this part: one bad tick alone is no news."""
REQUESTS_MIN = 20
"""Fewer requests in a tick say nothing of how long they take."""


@dataclass(slots=True)
class _Counts:
    boot: bytes = b""
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)


class Strain:
    """Takes in the reports of each tick; ``value`` is how many times as long as usual a request takes."""

    def __init__(self) -> None:
        self._seen: dict[str, _Counts] = {}
        self._usual_us: dict[str, float] = {}
        self._usual_queue: float | None = None
        self.value = 1.0

    def observe(self, reports: Mapping[str, NodeStats], *, calm: bool) -> float:
        """The strain after a tick's reports; ``calm``: nothing was moved in it, so that it is usual."""
        counted = self._counted(reports)
        queue = sum(told.queue for told in reports.values()) / max(1, len(reports))
        requests = sum(number for number, _ in counted.values())
        spent = sum(busy for _, busy in counted.values())
        expected = sum(
            number * self._usual_us.get(name, busy / number) for name, (number, busy) in counted.items() if number
        )
        service = spent / expected if requests >= REQUESTS_MIN and expected > 0 else 1.0
        wait = 1.0 if self._usual_queue is None else (1.0 + queue) / (1.0 + self._usual_queue)
        self.value += NEW_PART * (service * max(wait, 1.0) - self.value)
        if calm:
            self._learn(counted, queue)
        return self.value

    def _counted(self, reports: Mapping[str, NodeStats]) -> dict[str, tuple[int, int]]:
        """Requests and microseconds by class since the reports before; a node that began anew counts from its next."""
        counted: dict[str, tuple[int, int]] = {}
        for node, told in reports.items():
            before = self._seen.get(node)
            now = {each.request_class: (each.requests, each.busy_us) for each in told.classes}
            self._seen[node] = _Counts(told.boot, now)
            if before is None or before.boot != told.boot:
                continue
            for name, (requests, busy) in now.items():
                earlier = before.classes.get(name, (0, 0))
                number, spent = counted.get(name, (0, 0))
                counted[name] = (
                    number + max(0, requests - earlier[0]),
                    spent + max(0, busy - earlier[1]),
                )
        return counted

    def _learn(self, counted: Mapping[str, tuple[int, int]], queue: float) -> None:
        for name, (requests, busy) in counted.items():
            if requests:
                usual = self._usual_us.setdefault(name, busy / requests)
                self._usual_us[name] = usual + USUAL_PART * (busy / requests - usual)
        before = queue if self._usual_queue is None else self._usual_queue
        self._usual_queue = before + USUAL_PART * (queue - before)
