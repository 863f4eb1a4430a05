"""Two balancers on one PostgreSQL server: the leader dies, or is stopped; the database goes away, or is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_server import PostgresServer, postgres_server
from steering import until
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.client.config import load_identity
from engine.client.membership import OwnCurve, Servers, open_membership
from engine.client.transport import Channel, Moved, ask
from engine.errors import EngineError, RegistryUnavailable
from engine.protocol.requests import REGISTRY_SYNC, BalancerStatus, Sync

NODES = 3


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres_server() as made:
        yield made


@pytest.fixture(scope="module")
def cluster(server: PostgresServer) -> Iterator[LocalCluster]:
    registry = {"registry": {"postgresql": server.conninfo}, "tick_ms": 200}
    with LocalCluster(nodes=NODES, threshold=2, shares=NODES, balancers=2, balancer=registry) as made:
        yield made


@pytest.fixture
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as client:
        until(lambda: bool(leader_of(client)), "a balancer leads")
        yield client


def balancers(kq: Engine) -> dict[str, BalancerStatus]:
    told = {member.name: member.status for member in kq.status(timeout=2.0) if member.role == "balancer"}
    return {name: status for name, status in told.items() if isinstance(status, BalancerStatus)}


def leader_of(kq: Engine) -> str:
    """The balancer that publishes tables, or empty."""
    return next((name for name, told in balancers(kq).items() if told.table_counter), "")


def test_another_balancer_leads_when_the_leader_dies(cluster: LocalCluster, kq: Engine) -> None:
    """Keys are made, used and destroyed as before, by the same client and nodes; the one that is back stands by."""
    create_whole_key(kq, "before", "aes-256-gcm", threshold=2, shares=NODES)
    dead = leader_of(kq)
    epoch = balancers(kq)[dead].fencing_epoch
    other = next(name for name in cluster.balancers if name != dead)
    assert balancers(kq)[other].moving == f"stands by: {dead} leads"
    cluster.kill(dead)
    create_whole_key(kq, "after", "aes-256-gcm", threshold=2, shares=NODES)
    assert balancers(kq)[other].fencing_epoch > epoch
    kq.destroy_key("before")
    cluster.start_node(dead)
    until(lambda: balancers(kq)[dead].moving == f"stands by: {other} leads", "the one that died stands by")
    assert kq.decrypt("after", kq.encrypt("after", b"x")) == b"x"


@contextlib.contextmanager
def node_channel(cluster: LocalCluster, node: str) -> Iterator[Channel]:
    folder = cluster.path / "nodes" / node
    membership = open_membership(cluster.path / "cluster.manifest", cluster.cluster.pin.hex())
    identity = load_identity(folder / "identity.toml")
    with Channel(OwnCurve(identity, membership, folder / "identity.toml"), Servers(membership)) as channel:
        yield channel


def test_a_leader_that_was_stopped_for_a_while_leads_no_more(cluster: LocalCluster, kq: Engine) -> None:
    """It believed that it led: nobody reads its books or goes by its tables, and it finds out by itself."""
    stopped = leader_of(kq)
    other = next(name for name in cluster.balancers if name != stopped)
    pid = cluster.running()[stopped]
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        create_whole_key(kq, "meanwhile", "aes-256-gcm", threshold=2, shares=NODES)
        until(lambda: leader_of(kq) == other, "the other leads")
        epoch = balancers(kq)[other].fencing_epoch
    finally:
        os.kill(pid, signal.SIGCONT)
    with node_channel(cluster, "node1") as channel:

        def answer() -> object:
            try:
                return ask(channel, stopped, REGISTRY_SYNC, Sync(0), 5.0)
            except Moved as moved:
                return moved.names
            except EngineError:
                return None

        until(lambda: answer() == (other,), "it sends nodes to the leader", lambda: str(answer()))
    until(lambda: balancers(kq)[stopped].table_counter == 0, "it publishes no more")
    assert balancers(kq)[stopped].fencing_epoch < epoch
    newest = kq._calls.router.table
    until(lambda: (kq._calls.router.table or newest).fencing_epoch == epoch, "clients go by the leader's tables")
    kq.destroy_key("meanwhile")


def test_keys_are_used_without_the_database(cluster: LocalCluster, kq: Engine, server: PostgresServer) -> None:
    """Warm and cold; none is made. When it is back, all goes on without any restart."""
    create_whole_key(kq, "used", "aes-256-gcm", threshold=2, shares=NODES)
    pids = cluster.running()
    server.stop(signal.SIGQUIT)
    until(lambda: not leader_of(kq), "nobody leads")
    for _ in range(2):
        assert kq.decrypt("used", kq.encrypt("used", b"x")) == b"x"
        kq.flush()
    with pytest.raises(RegistryUnavailable):
        kq.create_key("none", "aes-256-gcm", threshold=2, shares=NODES)
    server.start()
    until(lambda: bool(leader_of(kq)), "a balancer leads again")
    create_whole_key(kq, "again", "aes-256-gcm", threshold=2, shares=NODES)
    assert cluster.running() == pids


def test_a_lost_registry_is_made_again_from_the_nodes(
    cluster: LocalCluster, kq: Engine, server: PostgresServer
) -> None:
    """``keyquorum registry rebuild`` finds every key, the settings and what was destroyed; an empty one is refused."""
    for name in ("kept", "set", "gone"):
        create_whole_key(kq, name, "aes-256-gcm", threshold=2, shares=NODES)
    kq.disable_key("set")
    kq.destroy_key("gone")
    keys = balancers(kq)[leader_of(kq)].keys
    for name in cluster.balancers:
        cluster.stop_node(name)
    config = cluster.path / cluster.balancers[0] / "balancer.toml"
    tables = server.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    for (table,) in tables:
        server.execute(f"DROP TABLE {table} CASCADE")
    cluster.start_node(cluster.balancers[0])
    fell_back = "fell back to revision"
    until(lambda: fell_back in balancers(kq)[cluster.balancers[0]].last_error, "it is noticed")
    cluster.stop_node(cluster.balancers[0])
    told = _keyquorum("registry", "rebuild", str(config))
    assert told.returncode == 0, told.stderr
    assert f"{keys} keys" in told.stdout
    cluster.start_node(cluster.balancers[0])
    cluster.start_node(cluster.balancers[1])
    until(lambda: bool(leader_of(kq)), "a balancer leads again")
    assert balancers(kq)[leader_of(kq)].keys == keys
    with pytest.raises(engine.KeyExists):
        kq.create_key("kept", "aes-256-gcm", threshold=2, shares=NODES)
    kq.enable_key("set")
    assert kq.decrypt("set", kq.encrypt("set", b"x")) == b"x"
    create_whole_key(kq, "gone", "aes-256-gcm", threshold=2, shares=NODES)
    kq.refresh_key("kept")
    kq.destroy_key("kept")


def _keyquorum(*words: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("keyquorum"), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
