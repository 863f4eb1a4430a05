"""Owns the figures of a tick of the balancer by size: forecast, routing program, table; it knows nothing of sockets.

Run with ``pytest bench/bench_balancer.py --benchmark-enable``. Results are checked. Times are of this machine alone.
"""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pytest_benchmark.fixture import BenchmarkFixture

from balancer.forecast import predict_load
from balancer.history import CLASSES, HistorySnapshot
from balancer.loop import decide
from balancer.optimizer import optimize_assignment
from balancer.plan import TableStamp, assignment_problem
from engine.protocol.signed import SigningKey
from engine.protocol.table import RoutingTable, seal_table

SIZES = [
    pytest.param((5, 4), id="5x4"),
    pytest.param((8, 20), id="8x20"),
    pytest.param((100, len(CLASSES)), id="100x48"),
]
SOLVER_S = 60.0


def snapshot(nodes: int, classes: int) -> HistorySnapshot:
    """600 ticks of a seasonal load that keeps unequal nodes about half busy."""
    random = np.random.default_rng(11)
    service = random.uniform(50, 2000, (classes, nodes))
    rate = 0.5 * nodes / classes / (service.mean(axis=1) * 1e-6)
    season = 1 + 0.5 * np.sin(2 * np.pi * np.arange(600)[:, None] / 60)
    requests = np.full((classes, nodes), 2000.0)
    return HistorySnapshot(
        tick_ms=1000,
        classes=CLASSES[:classes],
        nodes=tuple(f"node-{index}" for index in range(nodes)),
        counts=random.poisson(rate[None, :] * season).astype(float),
        requests=requests,
        busy_us=requests * service,
        up=(True,) * nodes,
        queue=(0,) * nodes,
    )


@pytest.mark.parametrize("size", SIZES)
def test_forecast(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    """``predict_load`` over 600 ticks, the fits included."""
    state = snapshot(*size)
    benchmark.group = f"balancer {size[0]} nodes x {size[1]} classes"
    forecast = benchmark(predict_load, state)
    assert np.abs(forecast.mean / state.counts[-1] - 1).max() < 0.5


@pytest.mark.parametrize("size", SIZES)
def test_assignment(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    """``optimize_assignment``, built and solved cold."""
    state = snapshot(*size)
    problem = assignment_problem(state, predict_load(state))
    benchmark.group = f"balancer {size[0]} nodes x {size[1]} classes"
    answer = benchmark(optimize_assignment, problem, time_limit_s=SOLVER_S)
    assert answer.overload == 0
    assert answer.weights.sum(axis=1) == pytest.approx(np.ones(size[1]))


@pytest.mark.parametrize("size", SIZES)
def test_tick(benchmark: BenchmarkFixture, size: tuple[int, int]) -> None:
    """The whole decision, sealed: forecast, program, table, signature."""
    state = snapshot(*size)
    key = SigningKey("balancer", Ed25519PrivateKey.generate())
    stamp = TableStamp(1, 1, 0, 10_000)
    benchmark.group = f"balancer {size[0]} nodes x {size[1]} classes"

    def tick() -> tuple[RoutingTable, bytes]:
        table = decide(state, stamp, SOLVER_S)
        return table, seal_table(table, key)

    table, sealed = benchmark(tick)
    assert len(table.service) == size[0] * size[1]
    benchmark.extra_info["table_bytes"] = len(sealed)
