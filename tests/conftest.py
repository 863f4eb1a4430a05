"""Fixtures for tests on a real cluster: node processes with SoftHSM tokens and the balancer, over CURVE on loopback.

``cluster`` is shared by those tests of a file that break nothing; a test that kills or damages takes ``own_cluster``.
Each ends its processes by their ids, also when a test fails, and they end by themselves when pytest dies. None lives
longer than its file's tests: five idle nodes take a tenth of a processor.

What is marked ``long`` runs only with KEYQUORUM_ASSURANCE=1 (``make assurance``, ``make crash``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from ports import PORTS

import engine
import engine.client.local
from engine import Engine, LocalCluster, PolicyRule

HERE = Path(__file__).parent
RULES = [
    PolicyRule("local", "*", ["*"]),
    PolicyRule("limited", "app/*", ["encrypt", "decrypt"]),
    PolicyRule("limited", "app/sign/*", ["verify"]),
    PolicyRule("auditor", "*", ["status", "list"]),
]
CLIENTS = ("local", "limited", "auditor", "nobody")
STILL = {"migrate": {"enabled": False}}
"""The tests say when a key moves."""
LONG_FILES = (
    "engine/test_cluster_migrate.py",
    "engine/test_cluster_returning.py",
    "simulation/test_simulation.py",
    "engine/test_cluster_faults.py",
    "nodes/test_token_faults.py",
    "attack/test_attack.py",
    "engine/test_cluster_live.py",
    "engine/test_cluster_backup.py",
    "engine/test_cli_cluster.py",
    "balancer/test_process.py",
    "nodes/test_supervisor.py",
    "engine/test_cluster_ahead.py",
    "assurance/test_constant_time.py",
    "engine/test_cli.py",
    "engine/test_cluster_balancers.py",
    "engine/test_cluster_refresh.py",
    "nodes/test_token.py",
    "engine/test_cluster_settings.py",
    "nodes/test_audit_nodes.py",
    "engine/test_install_guide.py",
    "test_package.py",
    "engine/test_cluster_tokens.py",
    "engine/test_cluster_reshare.py",
    "nodes/test_rotation.py",
    "faults/test_faults.py",
    "engine/test_cluster_nodes.py",
)
"""The files that take longest, first of all: the last worker shall not be left with one of them at the end."""


engine.client.local.PORTS = PORTS


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long files first. Deselect what is marked as long, unless it is asked for; pytest's last line counts that."""
    places = {HERE / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if os.environ.get("KEYQUORUM_ASSURANCE"):
        return
    long = [item for item in items if item.get_closest_marker("long") is not None]
    items[:] = [item for item in items if item not in long]
    if long:
        config.hook.pytest_deselected(items=long)


@pytest.fixture(autouse=True)
def quiet_afterwards() -> Iterator[None]:
    """A command that ran in this process logged to a stderr that is closed with its test."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes in three failure domains, 3-of-5."""
    path = tmp_path_factory.mktemp("cluster")
    with LocalCluster(nodes=5, threshold=3, path=path, clients=CLIENTS, rules=RULES, balancer=STILL) as running:
        yield running


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    """The client that may do everything."""
    with engine.connect(cluster.client_config) as connected:
        yield connected


@pytest.fixture
def own_cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster that the test may break."""
    with LocalCluster(
        nodes=5, threshold=3, path=tmp_path / "kq", clients=CLIENTS, rules=RULES, balancer=STILL
    ) as running:
        yield running
