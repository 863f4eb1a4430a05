"""Nodes that come, are emptied, go and are replaced, on real clusters that serve meanwhile."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from installed_cli import command
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.errors import ClusterError


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of four nodes, which the tests of this file change one after the other; they move the keys, too."""
    still = {"migrate": {"enabled": False}}
    with LocalCluster(4, 2, tmp_path_factory.mktemp("nodes") / "kq", shares=3, balancer=still) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(grown: LocalCluster) -> Iterator[Engine]:
    with engine.connect(grown.client_config) as kq:
        yield kq


def keys_on(kq: Engine, prefix: str, node: str, at_least: int = 3, **shape: int) -> list[str]:
    """Make keys until so many have a share on a node; their names."""
    found = []
    for number in range(200):
        name = f"{prefix}/{number}"
        if node in create_whole_key(kq, name, "aes-256-gcm", **shape).holders:
            found.append(name)
        if len(found) >= at_least:
            return found
    raise AssertionError(f"{node} is given no key")


def test_keys_are_made_on_a_node_that_came_and_not_on_one_that_is_to_go(grown: LocalCluster, client: Engine) -> None:
    """Two nodes come and are used; one is marked, and is given none of the keys that are made then."""
    create_whole_key(client, "before", "aes-256-gcm", threshold=2, shares=3)
    kept = client.encrypt("before", b"kept")
    pids = grown.running()
    fifth = grown.add_node()
    sixth = grown.add_node("spare", location="site2/room9/rack9/host9")
    assert (fifth, sixth) == ("node5", "spare")
    assert grown.nodes == ("node1", "node2", "node3", "node4", fifth, sixth)
    assert {name: pid for name, pid in grown.running().items() if name in pids} == pids, "others were restarted"
    places = grown.cluster.nodes
    assert places[sixth].location == "site2/room9/rack9/host9"
    assert places[fifth].location.split("/")[0] in {"site2", "site3"}, "not at a site with the fewest nodes"
    assert client.decrypt("before", kept) == b"kept"
    on_fifth = keys_on(client, "came", fifth, threshold=2, shares=3)
    sealed = client.encrypt(on_fifth[0], b"on a node that came")
    held = grown.keys_by_node()
    assert held[fifth] >= 3

    grown.drain_node(fifth)
    assert grown.cluster.draining == {fifth}
    for number in range(30):
        holders = create_whole_key(client, f"later/{number}", "aes-256-gcm", threshold=2, shares=3).holders
        assert fifth not in holders
    assert grown.keys_by_node()[fifth] == held[fifth]
    assert client.decrypt(on_fifth[0], sealed) == b"on a node that came"
    with pytest.raises(ValueError, match=f"{fifth}.* is draining"):
        client.reshare_key("before", holders=[fifth, sixth, "node1"])
    with pytest.raises(ClusterError, match=f"{fifth} holds shares of {held[fifth]} keys"):
        grown.remove_node(fifth)
    with pytest.raises(ClusterError, match="spare is not draining"):
        grown.remove_node(sixth)


def test_a_node_that_was_emptied_is_removed(grown: LocalCluster, client: Engine) -> None:
    """Its keys go elsewhere, here by a client's order; then it leaves, and everything works as before."""
    [leaving] = grown.cluster.draining
    moved = [name for name in client.list_keys() if leaving in client.key_info(name.name).holders]
    assert moved
    sealed = {each.name: client.encrypt(each.name, each.name.encode()) for each in moved}
    for each in moved:
        holders = client.key_info(each.name).holders
        free = [node for node in grown.nodes if node not in holders]
        client.reshare_key(each.name, holders=[free[0] if node == leaving else node for node in holders])
    grown.drain_node(leaving, timeout_s=20)
    assert leaving not in grown.keys_by_node()
    data = grown.data_folder(leaving)
    grown.remove_node(leaving)
    assert leaving not in grown.nodes
    assert leaving not in grown.running()
    assert leaving not in grown.cluster.members
    assert grown.cluster.draining == set()
    assert data.exists()
    for name, ciphertext in sealed.items():
        client.flush(name)
        assert client.decrypt(name, ciphertext) == name.encode()
    assert grown.add_node() == "node6", "a name that was a node's before"
    reopened = LocalCluster.open(grown.path)
    assert reopened.nodes == grown.nodes
    assert reopened.running() == grown.running()


def test_the_command_does_the_same(grown: LocalCluster, client: Engine) -> None:
    """``keyquorum node`` on a local cluster's folder; what it refuses names the reason and changes nothing."""
    where = ("--dir", grown.path)
    nodes = grown.nodes
    told = command("node", "list", *where, "-o", "json")
    assert told.returncode == 0, told.stderr
    held = {each["node"]: each["keys"] for each in json.loads(told.stdout)["nodes"]}
    assert held == {name: grown.keys_by_node().get(name, 0) for name in nodes}
    victim = max(held, key=lambda name: held[name])
    for arguments, code, reason in (
        (("remove", victim), 2, f"{victim} is not draining"),
        (("drain", "nobody"), 1, "'nobody' is no node of the cluster"),
        (("remove", "nobody", "--lost"), 1, "'nobody' is no node of the cluster"),
        (("replace", "nobody"), 1, "'nobody' is no node of the cluster"),
        (("add", "--name", "node1"), 1, "the name 'node1' is a member's already"),
        (("add", "--card", "x.card"), 1, "needs --operator"),
    ):
        refused = command("node", *arguments, *where)
        assert refused.returncode == code, refused
        assert reason in refused.stderr
        assert "Traceback" not in refused.stderr
    assert LocalCluster.open(grown.path).cluster.serial == grown.cluster.serial
    drained = command("node", "drain", victim, *where, "--no-wait", "-o", "json")
    assert drained.returncode == 0, drained.stderr
    assert json.loads(drained.stdout) == {"serial": grown.cluster.serial, "node": victim, "keys": held[victim]}
    assert grown.cluster.draining == {victim}
    refused = command("node", "remove", victim, *where)
    assert (refused.returncode, f"holds shares of {held[victim]} keys" in refused.stderr) == (2, True), refused
    status = command("status", "--config", grown.client_config)
    assert [line.split()[2] for line in status.stdout.splitlines() if line.startswith(f"{victim} ")] == ["draining"]
    undone = command("node", "drain", victim, "--undo", *where)
    assert (undone.returncode, grown.cluster.draining) == (0, set()), undone
