"""Nodes that come back: after a pause, from an old copy of their disk, with and without the registry."""

from __future__ import annotations

import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.errors import EngineError, KeyNotFound

VICTIM = "node2"
SHAPE = {"threshold": 2, "shares": 4}


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Five nodes; the victim has a manifest file of its own, as on a host of its own."""
    with LocalCluster(5, 2, tmp_path / "kq", shares=4) as made:
        folder = made.path / "nodes" / VICTIM
        made.stop_node(VICTIM)
        shutil.copy(made.path / "cluster.manifest", folder / "own.manifest")
        text = (folder / "node.toml").read_text()
        (folder / "node.toml").write_text(text.replace("../../cluster.manifest", "own.manifest"))
        made.start_node(VICTIM)
        yield made


@pytest.fixture
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as client:
        yield client


def key_on(kq: Engine, prefix: str, holder: str = VICTIM, **shape: int) -> str:
    """A key that a node holds a share of."""
    for number in range(100):
        name = f"{prefix}-{number}"
        if holder in create_whole_key(kq, name, "aes-256-gcm", **(shape or SHAPE)).holders:
            return name
    raise AssertionError(f"{holder} is given no key")


def rows(cluster: LocalCluster, node: str, name: str) -> list[tuple[int, str, bool]]:
    """Epoch, state and whether there is a share, of every row of a key in a node's store."""
    store = sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
    try:
        return store.execute("SELECT epoch, state, length(sealed) > 0 FROM keys WHERE name = ?", (name,)).fetchall()
    finally:
        store.close()


def soon(what: Callable[[], object], expected: object, seconds: float = 30.0) -> None:
    """Wait until a look gives what is expected."""
    until = time.monotonic() + seconds
    while (found := what()) != expected:
        assert time.monotonic() < until, (found, expected)
        time.sleep(0.1)


def status_of(kq: Engine, node: str, what: str) -> Any:
    """Of a node's status, or why it does not tell."""
    [member] = [each for each in kq.status() if each.name == node]
    return str(member.error) if member.status is None else getattr(member.status, what)


def store_problem(kq: Engine, node: str) -> Any:
    """Why a node serves nothing but loaded keys."""
    return status_of(kq, node, "store")


def alarms(kq: Engine, node: str) -> Any:
    """What is wrong there; that its audit log was put back too is another matter."""
    return [each for each in status_of(kq, node, "alarms") if "audit" not in each]


def away_from(kq: Engine, name: str, cluster: LocalCluster, *, given_up: bool = False) -> None:
    """Have a key leave the victim for the node that has no share yet."""
    holders = kq.key_info(name).holders
    [free] = [node for node in cluster.nodes if node not in holders]
    others = [free if node == VICTIM else node for node in holders]
    kq.reshare_key(name, holders=others, without=[VICTIM] if given_up else [], timeout=60.0)


def test_a_node_comes_back_by_what_its_peers_know(cluster: LocalCluster, kq: Engine) -> None:
    """With no registry: the newest manifest, what moved, what was destroyed; and then it serves what it holds."""
    stays, moves, goes = (key_on(kq, prefix) for prefix in ("stays", "moves", "goes"))
    sealed = kq.encrypt(stays, b"kept")
    cluster.stop_node(VICTIM)
    away_from(kq, moves, cluster, given_up=True)
    assert VICTIM in kq.destroy_key(goes, timeout=60.0).pending
    cluster.add_client("late")
    cluster.kill_balancer()
    cluster.start_node(VICTIM)
    soon(lambda: rows(cluster, VICTIM, moves), [(2, "moved", False)])
    soon(lambda: rows(cluster, VICTIM, goes), [(1, "destroyed", False)])
    soon(lambda: status_of(kq, VICTIM, "cluster_serial"), cluster.cluster.serial)
    assert (store_problem(kq, VICTIM), alarms(kq, VICTIM)) == ("", [])
    helper = next(node for node in kq.key_info(stays).holders if node != VICTIM)
    for node in cluster.nodes:
        if node not in (VICTIM, helper):
            cluster.kill(node)
    assert kq.decrypt(stays, sealed) == b"kept", "with its own share"


def test_an_old_copy_of_a_node_gives_away_nothing_that_is_over(cluster: LocalCluster, kq: Engine) -> None:
    """By its peers it drops what was refreshed, moved or destroyed, by the registry the rest; then it is made whole."""
    kept, renewed, moved, goes = (key_on(kq, prefix) for prefix in ("kept", "renewed", "moved", "goes"))
    single = key_on(kq, "single", threshold=1, shares=1)
    names = (kept, renewed, moved, goes, single)
    sealed = {name: kq.encrypt(name, name.encode()) for name in names}
    data, copy = cluster.data_folder(VICTIM), cluster.path / "copy"
    cluster.stop_node(VICTIM)
    shutil.copytree(data, copy)
    cluster.start_node(VICTIM)
    soon(lambda: store_problem(kq, VICTIM), "")
    assert kq.refresh_key(renewed, timeout=60.0).epoch == 2
    away_from(kq, moved, cluster)
    for name in (goes, single):
        kq.destroy_key(name, timeout=60.0)
    cluster.stop_node(VICTIM)
    shutil.rmtree(data)
    shutil.copytree(copy, data)
    others = [node for node in cluster.nodes if node != VICTIM]
    cluster.kill_balancer()
    for node in others:
        cluster.kill(node)

    cluster.start_node(VICTIM)
    with engine.connect(cluster.client_config) as stale:
        for name in (goes, renewed, kept):
            with pytest.raises(EngineError):
                stale.decrypt(name, sealed[name], timeout=3.0)
    soon(lambda: "neither another node nor the registry has told" in str(alarms(kq, VICTIM)), True)
    assert rows(cluster, VICTIM, renewed) == [(1, "committed", True)]

    for node in others:
        cluster.start_node(node)
    soon(lambda: rows(cluster, VICTIM, renewed), [(1, "committed", True), (2, "committed", False)])
    soon(lambda: alarms(kq, VICTIM), [])
    assert rows(cluster, VICTIM, moved) == [(2, "moved", False)]
    assert [each[1:] for each in rows(cluster, VICTIM, goes)] == [("destroyed", False)]
    for name in (kept, renewed, moved):
        kq.flush(name)
        assert kq.decrypt(name, sealed[name]) == name.encode()

    cluster.start_balancer()
    soon(lambda: [each[1:] for each in rows(cluster, VICTIM, single)], [("destroyed", False)])
    with pytest.raises(KeyNotFound):
        kq.decrypt(single, sealed[single])
    # What it lacks is made anew, without anybody's order.
    soon(lambda: [each[1:] for each in rows(cluster, VICTIM, renewed)], [("committed", True)], 240.0)
    for name in (kept, renewed, moved):
        kq.flush(name)
        assert kq.decrypt(name, sealed[name]) == name.encode()
