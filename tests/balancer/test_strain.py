"""How much the service suffers, from counts that nodes tell: against what is usual, whatever is asked for."""

from __future__ import annotations

import pytest

from balancer.strain import Strain
from engine.protocol.requests import ClassCount, NodeStats


class Nodes:
    """Two nodes that count."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, list[int]]] = {"n1": {}, "n2": {}}
        self.boots = {"n1": b"1" * 16, "n2": b"2" * 16}
        self.queue = 0

    def serve(self, name: str, requests: int, each_us: int) -> None:
        for counts in self.counts.values():
            count = counts.setdefault(name, [0, 0])
            count[0] += requests
            count[1] += requests * each_us

    def reports(self) -> dict[str, NodeStats]:
        return {
            node: NodeStats(
                self.boots[node], 1, self.queue,
                [ClassCount(name, requests, 0, busy) for name, (requests, busy) in counts.items()],
                [], [], 1, 0, [], 0,
            )
            for node, counts in self.counts.items()
        }  # fmt: skip


@pytest.fixture
def nodes() -> Nodes:
    return Nodes()


def settled(nodes: Nodes, strain: Strain, ticks: int = 20, *, calm: bool = True, **classes: int) -> float:
    for _ in range(ticks):
        for name, each_us in classes.items():
            nodes.serve(name, 100, each_us)
        strain.observe(nodes.reports(), calm=calm)
    return strain.value


def test_slower_service_and_longer_queues_are_strain(nodes: Nodes) -> None:
    strain = Strain()
    assert settled(nodes, strain, sign=200) == pytest.approx(1.0)
    assert settled(nodes, strain, calm=False, sign=500) == pytest.approx(2.5, rel=0.01)
    assert settled(nodes, strain, calm=False, sign=200) == pytest.approx(1.0, rel=0.01)
    nodes.queue = 3
    assert settled(nodes, strain, calm=False, sign=200) == pytest.approx(4.0, rel=0.01)
    nodes.queue = 0
    assert settled(nodes, strain, calm=False, sign=100) == pytest.approx(0.5, rel=0.01)


def test_another_mixture_of_requests_is_none(nodes: Nodes) -> None:
    """Many of a slow class take long, as they always do."""
    strain = Strain()
    settled(nodes, strain, sign=200, rsa=9_000)
    nodes.serve("rsa", 5_000, 9_000)
    nodes.serve("sign", 30, 200)
    assert strain.observe(nodes.reports(), calm=False) == pytest.approx(1.0)


def test_what_lasts_in_calm_becomes_usual_and_nothing_else(nodes: Nodes) -> None:
    strain = Strain()
    settled(nodes, strain, sign=200)
    assert settled(nodes, strain, 100, calm=False, sign=400) == pytest.approx(2.0, rel=0.01)
    assert settled(nodes, strain, 100, calm=True, sign=400) == pytest.approx(1.0, rel=0.01)


def test_few_requests_and_nodes_that_begin_anew_say_nothing(nodes: Nodes) -> None:
    strain = Strain()
    settled(nodes, strain, sign=200)
    nodes.serve("sign", 4, 90_000)
    assert strain.observe(nodes.reports(), calm=False) == pytest.approx(1.0)
    nodes.boots["n1"], nodes.boots["n2"] = b"3" * 16, b"4" * 16
    nodes.counts = {"n1": {"sign": [50, 10**9]}, "n2": {"sign": [50, 10**9]}}
    assert strain.observe(nodes.reports(), calm=False) == pytest.approx(1.0)
    assert strain.observe({}, calm=False) == pytest.approx(1.0)
