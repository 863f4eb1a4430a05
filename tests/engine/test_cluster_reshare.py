"""Resharing keys on the real cluster: other holders, another threshold, the same key; what leaves keeps nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from sampled import some
from users import users_of
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster


def rows(cluster: LocalCluster, node: str, name: str) -> list[tuple[int, str, bytes]]:
    """Epoch, state and sealed share of every row of a key in a node's store."""
    store = sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
    try:
        return store.execute("SELECT epoch, state, sealed FROM keys WHERE name = ?", (name,)).fetchall()
    finally:
        store.close()


def settled(cluster: LocalCluster, name: str, epoch: int, holders: Sequence[str], seconds: float = 20.0) -> None:
    """Wait until exactly these nodes have a share of the key, each one, committed and of this epoch."""
    until = time.monotonic() + seconds
    while True:
        found = {
            node: [(e, state) for e, state, sealed in rows(cluster, node, name) if sealed] for node in cluster.nodes
        }
        if found == {node: [(epoch, "committed")] if node in holders else [] for node in cluster.nodes}:
            return
        assert time.monotonic() < until, (found, epoch, holders)
        time.sleep(0.05)


def test_a_key_moves_and_changes_its_shape(cluster: LocalCluster, kq: Engine) -> None:
    """From 2-of-3 to other nodes, to 3-of-5 and back; the key stays, and no byte of a share of before."""
    nodes = cluster.nodes
    create_whole_key(kq, "move/data", "aes-256-gcm", threshold=2, shares=3)
    first = list(kq.key_info("move/data").holders)
    before = kq.encrypt("move/data", b"from before")
    old = {node: rows(cluster, node, "move/data")[0][2] for node in first}
    others = [*(node for node in nodes if node not in first), first[0]]
    shapes = [(2, others), (3, list(nodes)), (2, first), (2, others[:2] + first[1:])]
    for epoch, (threshold, holders) in enumerate(shapes, 2):
        info = kq.reshare_key("move/data", threshold, holders=holders)
        assert (info.epoch, info.threshold, list(info.holders), info.version) == (epoch, threshold, holders, 1)
        assert sorted(info.stored) == sorted(holders)
        assert kq.decrypt("move/data", before) == b"from before"
        kq.flush("move/data")
        assert kq.decrypt("move/data", before) == b"from before"
        settled(cluster, "move/data", epoch, holders)
    for node, sealed in old.items():
        for file in cluster.data_folder(node).glob("shares.db*"):
            assert sealed[40:72] not in file.read_bytes(), f"{file} still has the first share"
    assert kq.refresh_key("move/data").epoch == 6
    kq.flush("move/data")
    assert kq.decrypt("move/data", before) == b"from before"
    settled(cluster, "move/data", 6, shapes[-1][1])
    destroyed = kq.destroy_key("move/data")
    assert sorted(destroyed.confirmed) == sorted(shapes[-1][1])
    settled(cluster, "move/data", 6, [])
    create_whole_key(kq, "move/data", "aes-256-gcm", threshold=2, shares=3)  # where it was and is no more, too
    with pytest.raises(engine.InvalidTag):
        kq.decrypt("move/data", before)


def test_every_interface_reshares(cluster: LocalCluster, kq: Engine) -> None:
    """The blocking and the asynchronous client, and the command; what is not given stays."""
    create_whole_key(kq, "move/ways", "ecdsa-p256-sha256", threshold=2, shares=3)
    signature, holders = kq.sign("move/ways", b"m"), kq.key_info("move/ways").holders

    async def reshare() -> engine.KeyInfo:
        async with engine.aio.connect(cluster.client_config) as client:
            return await client.reshare_key("move/ways", 3, 5)

    info = asyncio.run(reshare())
    assert (info.epoch, info.threshold, sorted(info.holders)) == (2, 3, sorted(cluster.nodes))
    options = [part for node in holders for part in ("--holder", node)]
    command = [Path(sys.executable).with_name("keyquorum"), "key", "reshare", "move/ways", "--threshold", "2", *options]
    environment = {**os.environ, "KEYQUORUM_CONFIG": str(cluster.client_config)}
    done = subprocess.run([*command, "-o", "json"], env=environment, capture_output=True, timeout=60, check=True)
    told = json.loads(done.stdout)
    assert (told["epoch"], told["threshold"], tuple(told["holders"])) == (3, 2, holders)
    info = kq.reshare_key("move/ways")
    assert (info.epoch, info.threshold, info.holders) == (4, 2, holders)
    kq.flush("move/ways")
    kq.verify("move/ways", b"m", signature)
    kq.verify("move/ways", b"n", kq.sign("move/ways", b"n"))
    kq.destroy_key("move/ways")
    with pytest.raises(engine.KeyNotFound):
        kq.reshare_key("move/ways", timeout=3)


@pytest.mark.parametrize("client", ["limited", "auditor", "nobody"])
def test_who_may_not_reshare_is_refused(cluster: LocalCluster, kq: Engine, client: str) -> None:
    name = f"app/move/{client}"
    kq.create_key(name, "aes-256-gcm", threshold=2, shares=3)
    with engine.connect(cluster.client_config_of(client)) as other, pytest.raises(engine.AccessDenied):
        other.reshare_key(name, 3, 5)
    assert kq.key_info(name).epoch == 1


def test_what_can_t_be_is_refused_before_anything_is_asked(cluster: LocalCluster, kq: Engine) -> None:
    """Bad orders are errors of the caller's, and fewer than the threshold can't deal."""
    create_whole_key(kq, "move/two", "aes-256-gcm", threshold=2, shares=2)
    holders = kq.key_info("move/two").holders
    for arguments, match in (
        ({"threshold": 4}, "threshold 4 must lie in 1..2"),
        ({"threshold": 1, "holders": ["elsewhere"]}, "'elsewhere' is to hold a share of 'move/two', but is no node"),
        ({"holders": [holders[0], holders[0]]}, "stands twice"),
        ({"holders": cluster.nodes, "shares": 4}, "4 shares for 5 holders"),
        ({"shares": 9}, "the cluster has 5"),
        ({"without": [holders[0]]}, "by 1 of its 2 holders: it takes 3"),
        ({"without": [next(node for node in cluster.nodes if node not in holders)]}, "is no holder"),
    ):
        with pytest.raises(ValueError, match=match):
            kq.reshare_key("move/two", **arguments)
    with pytest.raises(TypeError, match="not a str"):
        kq.reshare_key("move/two", holders="node1")
    assert kq.key_info("move/two").epoch == 1


def test_a_threshold_of_one_can_be_raised(cluster: LocalCluster, kq: Engine) -> None:
    create_whole_key(kq, "move/single", "hmac-sha256", threshold=1, shares=3)
    tag = kq.mac("move/single", b"m")
    for epoch, (threshold, shares) in enumerate(((3, 4), (1, 2), (1, 1), (2, 3)), 2):
        assert kq.reshare_key("move/single", threshold, shares).epoch == epoch
        kq.flush("move/single")
        kq.verify_mac("move/single", b"m", tag)


def test_users_notice_nothing_of_30_moves(cluster: LocalCluster, kq: Engine) -> None:
    """Warm and cold uses all the while, from two clients; not one error, not one wrong result."""
    create_whole_key(kq, "move/load", "aes-256-gcm", threshold=2, shares=3)
    holders: list[str] = []
    with users_of(cluster, kq, "move/load", 5):
        for epoch in range(2, 32):
            nodes = cluster.nodes
            shift = epoch % len(nodes)
            holders = [*nodes[shift:], *nodes[:shift]][: 3 + epoch % 3]
            info = kq.reshare_key("move/load", 2 + (epoch % 3 > 1), holders=holders, timeout=60)
            assert (info.epoch, list(info.holders)) == (epoch, holders)
    settled(cluster, "move/load", 31, holders)


# --- what dies ---


def test_a_holder_that_is_down_is_named_or_given_up(own_cluster: LocalCluster) -> None:
    """A lost node is replaced by another one, without its share; when it comes back it erases that."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=4)
        before = kq.encrypt("data", b"from before")
        holders = list(kq.key_info("data").holders)
        (spare,) = set(own_cluster.nodes) - set(holders)
        lost = holders[1]
        own_cluster.kill(lost)
        healed = [spare if node == lost else node for node in holders]
        with pytest.raises(engine.QuorumUnavailable, match="a reshare needs all 4 holders") as caught:
            kq.reshare_key("data", holders=healed)
        assert caught.value.missing == (lost,)
        assert kq.key_info("data").epoch == 1
        assert kq.reshare_key("data", holders=healed, without=[lost], timeout=30).epoch == 2
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"
        own_cluster.start_node(lost)
        settled(own_cluster, "data", 2, healed)
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"
        own_cluster.kill_balancer()
        with pytest.raises(engine.RegistryUnavailable):
            kq.reshare_key("data", timeout=8)
        own_cluster.start_balancer()
        assert kq.reshare_key("data", 3, holders=own_cluster.nodes, timeout=30).epoch == 3
        own_cluster.stop()
        own_cluster.start()
    with engine.connect(own_cluster.client_config) as kq:
        settled(own_cluster, "data", 3, own_cluster.nodes)
        assert kq.decrypt("data", before) == b"from before"


def test_as_few_as_make_the_key_reshare_it_with_a_trial(own_cluster: LocalCluster) -> None:
    """A 2-of-3 key that has lost a node for good, then a 2-of-2 key: one new holder combines the new epoch first."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=3)
        before = kq.encrypt("data", b"from before")
        holders = list(kq.key_info("data").holders)
        lost, *left = holders
        spare = [node for node in own_cluster.nodes if node not in holders]
        own_cluster.kill(lost)
        info = kq.reshare_key("data", holders=[*left, spare[0]], without=[lost], timeout=30)
        assert (info.epoch, info.threshold) == (2, 2)
        for threshold, shares in ((2, [left[0], spare[1]]), (3, [*left, *spare])):
            kq.flush()
            assert kq.decrypt("data", before) == b"from before"
            assert list(kq.reshare_key("data", threshold, holders=shares, timeout=30).holders) == shares
        own_cluster.start_node(lost)
        settled(own_cluster, "data", 4, [*left, *spare])
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"
    logs = [path for node in own_cluster.nodes for path in (own_cluster.data_folder(node) / "audit").glob("*.jsonl")]
    records = [json.loads(line) for path in logs for line in path.read_text(encoding="utf-8").splitlines()]
    tried = [each["node"] for each in records if each.get("verb") == "share.trial"]
    assert set(tried) == {spare[0], left[1]}  # the second time three holders dealt


COORDINATOR = (
    "dealer.reshare.dealt",
    "dealer.reshare.renewed",
    "dealer.reshare.committed",
    "dealer.reshare.announced",
    "holder.leave.checked",
    "holder.leave.written",
)
"""Points at which the coordinator dies, which is a holder that leaves."""
NEWCOMER = ("holder.reshare.pledged", "holder.prepare.written", "holder.accept.recorded", "holder.commit.written")
"""Points at which a node dies that comes to hold a share."""


def test_who_dies_in_the_middle_leaves_the_key_whole(
    own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 of who leaves and of who comes; the key is whole all the while, and the next reshare works."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=3)
        before = kq.encrypt("data", b"from before")
        epoch = 1
        for point in some((*COORDINATOR, *NEWCOMER)):
            info = kq.key_info("data", timeout=20)
            holders = list(info.holders)
            spare = next(node for node in own_cluster.nodes if node not in holders)
            victim = holders[0] if point in COORDINATOR else spare
            own_cluster.kill(victim)
            with monkeypatch.context() as patch:
                patch.setenv("KEYQUORUM_FAILPOINTS", f"{point}=kill")
                own_cluster.start_node(victim)
            while any(member.error for member in kq.status(timeout=5.0)):
                time.sleep(0.05)
            until_s = time.monotonic() + 60
            answered = False
            while own_cluster.running()[victim] is not None:
                assert time.monotonic() < until_s, f"{point} was never passed"
                if answered:  # its own commit may come after its reply
                    time.sleep(0.05)
                    continue
                with contextlib.suppress(engine.EngineError):  # others may not have found it again
                    kq.reshare_key("data", holders=[*holders[1:], spare], timeout=10)
                    answered = True
            kq.flush()
            assert kq.decrypt("data", before, timeout=20) == b"from before", point
            own_cluster.start_node(victim)
            info = kq.reshare_key("data", holders=holders, timeout=60)
            assert info.epoch > epoch
            epoch = info.epoch
            settled(own_cluster, "data", epoch, holders)
            kq.flush()
            assert kq.decrypt("data", before, timeout=20) == b"from before", point


def test_a_node_that_was_taken_out_is_given_up(own_cluster: LocalCluster) -> None:
    """It can't be asked any more, nor be a holder; a reshare without it makes the key whole, and a refresh works."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=4)
        before = kq.encrypt("data", b"from before")
        holders = list(kq.key_info("data").holders)
        gone = holders[-1]
        own_cluster.sign_manifest([each for each in own_cluster.cluster.members.values() if each.name != gone])
        until = time.monotonic() + 20
        while gone in kq.cluster.nodes:
            assert time.monotonic() < until
            time.sleep(0.05)
        with pytest.raises(ValueError, match=f"'{gone}' is to hold a share of 'data', but is no node"):
            kq.reshare_key("data")
        left = [node for node in own_cluster.nodes if node != gone]
        info = kq.reshare_key("data", 3, holders=left, without=[gone], timeout=30)
        assert (info.epoch, info.threshold, list(info.holders)) == (2, 3, left)
        assert kq.refresh_key("data", timeout=30).epoch == 3
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"
