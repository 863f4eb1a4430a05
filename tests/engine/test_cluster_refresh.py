"""Refreshing keys on the real cluster: the key stays, every share changes, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
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


def agree(cluster: LocalCluster, name: str, epoch: int = 0, seconds: float = 20.0) -> int:
    """Wait until every node has exactly one row of the key, committed and of the same epoch; that epoch."""
    until = time.monotonic() + seconds
    while True:
        found = {node: [(e, state) for e, state, _ in rows(cluster, node, name)] for node in cluster.nodes}
        epochs = {each[0][0] for each in found.values() if len(each) == 1 and each[0][1] == "committed"}
        if all(len(each) == 1 for each in found.values()) and len(epochs) == 1 and epochs <= {epoch or min(epochs)}:
            return epochs.pop()
        assert time.monotonic() < until, found
        time.sleep(0.05)


def test_the_key_stays_and_the_epoch_grows(cluster: LocalCluster, kq: Engine) -> None:
    """Ciphertexts and signatures of before are good after, also cold; of the old shares no byte is left on any disk."""
    create_whole_key(kq, "fresh/data", "aes-256-gcm", threshold=3, shares=5)
    create_whole_key(kq, "fresh/sign", "rsa-4096-pss-sha256", threshold=3, shares=5)
    before = kq.encrypt("fresh/data", b"from before")
    signature, public = kq.sign("fresh/sign", b"m"), kq.public_key("fresh/sign")
    old = {node: rows(cluster, node, "fresh/data")[0][2] for node in cluster.nodes}
    for epoch in (2, 3):
        info = kq.refresh_key("fresh/data")
        assert (info.epoch, info.version, info.threshold) == (epoch, 1, 3)
        assert sorted(info.stored) == sorted(cluster.nodes)
        assert kq.key_info("fresh/data").epoch == epoch
        assert kq.decrypt("fresh/data", before) == b"from before"
        kq.flush("fresh/data")
        assert kq.decrypt("fresh/data", before) == b"from before"
    assert agree(cluster, "fresh/data") == 3
    for node, sealed in old.items():
        for file in cluster.data_folder(node).glob("shares.db*"):
            assert sealed[40:72] not in file.read_bytes(), f"{file} still has the first share"
    assert kq.refresh_key("fresh/sign").epoch == 2
    kq.flush("fresh/sign")
    assert kq.public_key("fresh/sign") == public
    kq.verify("fresh/sign", b"m", signature)
    kq.verify("fresh/sign", b"n", kq.sign("fresh/sign", b"n"))
    kq.destroy_key("fresh/data")
    with pytest.raises(engine.KeyNotFound):
        kq.refresh_key("fresh/data", timeout=3)


def test_loaded_keys_stay_loaded(kq: Engine) -> None:
    """A refresh changes shares, not the key: no combiner has to gather again."""
    create_whole_key(kq, "fresh/warm", "hmac-sha256", threshold=3, shares=5)
    loaded = set(kq.prewarm("fresh/warm"))
    kq.refresh_key("fresh/warm")
    assert kq.flush("fresh/warm") == len(loaded) == 5


def test_every_interface_refreshes(cluster: LocalCluster, kq: Engine) -> None:
    """The blocking and the asynchronous client, and the command."""
    kq.create_key("fresh/ways", "aes-128-gcm")

    async def refresh() -> int:
        async with engine.aio.connect(cluster.client_config) as client:
            return (await client.refresh_key("fresh/ways")).epoch

    assert asyncio.run(refresh()) == 2
    command = [Path(sys.executable).with_name("keyquorum"), "key", "refresh", "fresh/ways", "-o", "json"]
    environment = {**os.environ, "KEYQUORUM_CONFIG": str(cluster.client_config)}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert json.loads(done.stdout)["epoch"] == 3
    assert kq.key_info("fresh/ways").epoch == 3


@pytest.mark.parametrize("client", ["limited", "auditor", "nobody"])
def test_who_may_not_refresh_is_refused(cluster: LocalCluster, kq: Engine, client: str) -> None:
    """Neither the right to use a key nor that to list it is a right to refresh it."""
    name = f"app/fresh/{client}"
    kq.create_key(name, "aes-256-gcm")
    with engine.connect(cluster.client_config_of(client)) as other, pytest.raises(engine.AccessDenied):
        other.refresh_key(name)
    assert kq.key_info(name).epoch == 1


def test_what_has_no_share_to_renew_is_refused(kq: Engine) -> None:
    """With threshold 1 a share is the key."""
    kq.create_key("fresh/single", "aes-256-gcm", threshold=1, shares=3)
    with pytest.raises(ValueError, match="threshold 1"):
        kq.refresh_key("fresh/single")


def test_refreshes_at_the_same_time_follow_each_other(cluster: LocalCluster, kq: Engine) -> None:
    """Each call gets an epoch of its own, and none is lost."""
    create_whole_key(kq, "fresh/many", "aes-256-gcm", threshold=3, shares=5)
    before = kq.encrypt("fresh/many", b"from before")
    with engine.connect(cluster.client_config) as other, ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(each.refresh_key, "fresh/many", timeout=60) for each in (kq, other) * 4]
        epochs = sorted(call.result().epoch for call in calls)
    assert epochs == list(range(2, 10))
    assert agree(cluster, "fresh/many") == 9
    kq.flush("fresh/many")
    assert kq.decrypt("fresh/many", before) == b"from before"


def test_users_notice_nothing_of_50_refreshes(cluster: LocalCluster, kq: Engine) -> None:
    """Warm and cold uses all the while, from two clients; not one error, not one wrong result."""
    create_whole_key(kq, "fresh/load", "aes-256-gcm", threshold=3, shares=5)
    with users_of(cluster, kq, "fresh/load", 20):
        for epoch in range(2, 52):
            assert kq.refresh_key("fresh/load", timeout=60).epoch == epoch
    assert agree(cluster, "fresh/load") == 51


# --- what dies ---


def test_a_holder_or_the_registry_that_is_down(own_cluster: LocalCluster) -> None:
    """The refresh is refused by name and changes nothing; later it works."""
    late = own_cluster.nodes[3]
    with engine.connect(own_cluster.client_config) as kq:
        kq.create_key("data", "aes-256-gcm", threshold=3, shares=5)
        before = kq.encrypt("data", b"from before")
        own_cluster.kill(late)
        with pytest.raises(engine.QuorumUnavailable, match="a refresh needs all 5 holders") as caught:
            kq.refresh_key("data")
        assert caught.value.missing == (late,)
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"
        own_cluster.start_node(late)
        assert agree(own_cluster, "data") == 1
        assert kq.refresh_key("data", timeout=30).epoch == 2
        own_cluster.kill_balancer()
        with pytest.raises(engine.RegistryUnavailable):
            kq.refresh_key("data", timeout=8)
        own_cluster.start_balancer()
        assert kq.refresh_key("data", timeout=30).epoch == 3
        kq.flush()
        assert kq.decrypt("data", before) == b"from before"


SOME = ("dealer.refresh.renewed", "dealer.refresh.committed", "holder.renew.recorded", "holder.commit.written")


def _crash_through(cluster: LocalCluster, points: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the coordinator, a holder too, die at each point: the key stays whole, and the next refresh works."""
    with engine.connect(cluster.client_config) as kq:
        kq.create_key("data", "aes-256-gcm", threshold=3, shares=5)
        before = kq.encrypt("data", b"from before")
        epoch = 1
        coordinator = kq.key_info("data").holders[0]
        for point in points:
            cluster.kill(coordinator)
            with monkeypatch.context() as patch:
                patch.setenv("KEYQUORUM_FAILPOINTS", f"{point}=kill")
                cluster.start_node(coordinator)
            while any(member.error for member in kq.status(timeout=5.0)):
                time.sleep(0.05)
            try:
                told = kq.refresh_key("data", timeout=10).epoch
            except engine.EngineError:
                told = 0
            until_s = time.monotonic() + 20  # its own commit may come after its reply
            while cluster.running()[coordinator] is not None:
                assert time.monotonic() < until_s, f"{point} was never passed"
                time.sleep(0.05)
            kq.flush()
            assert kq.decrypt("data", before, timeout=20) == b"from before"
            cluster.start_node(coordinator)
            # Either the old epoch or the new one, and everywhere the same, however it ended for the client.
            info = kq.refresh_key("data", timeout=60)
            assert info.epoch > max(told, epoch)
            assert info.epoch <= epoch + 2
            epoch = agree(cluster, "data", info.epoch)
            kq.flush()
            assert kq.decrypt("data", before, timeout=20) == b"from before", point


def test_a_member_that_dies_in_the_middle_leaves_the_key_whole(
    own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 at four steps, with a restart of everything at the end."""
    _crash_through(own_cluster, SOME, monkeypatch)
    own_cluster.stop()
    own_cluster.start()
    with engine.connect(own_cluster.client_config) as kq:
        epoch = agree(own_cluster, "data")
        assert kq.decrypt("data", kq.encrypt("data", b"x")) == b"x"
        assert kq.refresh_key("data", timeout=30).epoch == epoch + 1
