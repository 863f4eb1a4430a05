"""Fixtures for tests on a real cluster: node processes with SoftHSM tokens and the balancer, over CURVE on loopback.

``cluster`` is shared by all tests that break nothing; a test that kills or damages takes ``own_cluster``. Each ends its
processes by their ids, also when a test fails, and they end by themselves when pytest dies.

What is marked ``long`` runs only with KEYQUORUM_ASSURANCE=1 (``make assurance``, ``make crash``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import engine
from engine import Engine, LocalCluster, PolicyRule

RULES = [
    PolicyRule("local", "*", ["*"]),
    PolicyRule("limited", "app/*", ["encrypt", "decrypt"]),
    PolicyRule("limited", "app/sign/*", ["verify"]),
    PolicyRule("auditor", "*", ["status", "list"]),
]
CLIENTS = ("local", "limited", "auditor", "nobody")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is marked as long, unless it is asked for; pytest's last line counts what was left out."""
    if os.environ.get("KEYQUORUM_ASSURANCE"):
        return
    long = [item for item in items if item.get_closest_marker("long") is not None]
    items[:] = [item for item in items if item not in long]
    if long:
        config.hook.pytest_deselected(items=long)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes in three failure domains, 3-of-5."""
    path = tmp_path_factory.mktemp("cluster")
    with LocalCluster(nodes=5, threshold=3, path=path, clients=CLIENTS, rules=RULES) as running:
        yield running


@pytest.fixture(scope="session")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    """The client that may do everything."""
    with engine.connect(cluster.client_config) as connected:
        yield connected


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster that the test may break."""
    with LocalCluster(nodes=5, threshold=3, path=tmp_path / "kq", clients=CLIENTS, rules=RULES) as running:
        yield running
