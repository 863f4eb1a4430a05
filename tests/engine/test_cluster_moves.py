"""Moves by the balancer's orders on the real cluster: shares go elsewhere, and nothing that a thief may want goes."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator, Sequence

import pytest
from balancing_client import Mover
from users import users_of
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.client.transport import ask
from engine.errors import AccessDenied, EngineError
from engine.protocol.requests import MOVE, Move, MoveResult


def shares_of(cluster: LocalCluster, name: str) -> dict[str, list[tuple[int, str]]]:
    """Node -> epoch and state of each row with a share."""
    found = {}
    for node in cluster.nodes:
        store = sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
        try:
            found[node] = store.execute(
                "SELECT epoch, state FROM keys WHERE name = ? AND length(sealed) > 0", (name,)
            ).fetchall()
        finally:
            store.close()
    return found


def settled(cluster: LocalCluster, name: str, epoch: int, holders: Sequence[str], seconds: float = 20.0) -> None:
    """Wait until exactly these nodes have a share, committed and of this epoch."""
    expected = {node: [(epoch, "committed")] if node in holders else [] for node in cluster.nodes}
    until = time.monotonic() + seconds
    while (found := shares_of(cluster, name)) != expected:
        assert time.monotonic() < until, (found, expected)
        time.sleep(0.05)


@pytest.fixture
def mover(cluster: LocalCluster, kq: Engine) -> Iterator[Mover]:
    with Mover(cluster, kq) as made:
        yield made


def elsewhere(cluster: LocalCluster, kq: Engine, name: str) -> tuple[list[str], list[str]]:
    """The holders of a key, and the same but for one, in whose place comes another node of its site."""
    holders = list(kq.key_info(name).holders)
    sites = {node: cluster.cluster.nodes[node].location.split("/")[0] for node in cluster.nodes}
    for node in cluster.nodes:
        for place, holder in enumerate(holders):
            if node not in holders and sites[node] == sites[holder]:
                return holders, [*holders[:place], node, *holders[place + 1 :]]
    raise AssertionError((holders, sites))


def test_a_balancer_moves_and_renews_many_keys_in_one_request(cluster: LocalCluster, kq: Engine, mover: Mover) -> None:
    """Clients notice nothing; what can't be done is told for that key alone."""
    names = [f"moves/{number}" for number in range(6)]
    before, places, at = {}, {}, {}
    for name in names:
        create_whole_key(kq, name, "aes-256-gcm", threshold=2, shares=3)
        before[name] = kq.encrypt(name, name.encode())
        places[name] = elsewhere(cluster, kq, name)
        at.setdefault(places[name][0][0], []).append(name)
    for node, mine in at.items():
        manifests = {name: mover.manifest(name) for name in mine}
        orders = [mover.order(manifests[name], places[name][1]) for name in mine]
        bad = mover.order(manifests[mine[0]], places[mine[0]][1], threshold=1)
        (refused,) = mover.move(node, [bad])
        assert (refused.code, refused.epoch) == ("access-denied", 0)
        assert "may not change the threshold" in refused.text
        results = mover.move(node, orders)
        told = [(each.key_id, each.code, each.epoch) for each in results]
        assert told == [(manifests[name].key_id, "", 2) for name in mine], results
    for name in names:
        settled(cluster, name, 2, places[name][1])
        kq.flush(name)
        assert kq.decrypt(name, before[name]) == name.encode()
        info = kq.key_info(name)
        assert (info.epoch, list(info.holders), info.threshold) == (2, places[name][1], 2)
    for name in names:
        (result,) = mover.move(places[name][1][0], [mover.renewal(mover.manifest(name))])
        assert (result.code, result.epoch) == ("", 3)
        settled(cluster, name, 3, places[name][1])
        kq.flush(name)
        assert kq.decrypt(name, before[name]) == name.encode()
    assert kq.reshare_key(names[0], 2, holders=places[names[0]][0]).epoch == 4
    assert kq.decrypt(names[0], before[names[0]]) == names[0].encode()


def test_users_notice_nothing_of_moves(cluster: LocalCluster, kq: Engine, mover: Mover) -> None:
    create_whole_key(kq, "moves/load", "aes-256-gcm", threshold=2, shares=3)
    with users_of(cluster, kq, "moves/load", 4):
        for epoch in range(2, 22):
            holders, others = elsewhere(cluster, kq, "moves/load")
            (result,) = mover.move(holders[0], [mover.order(mover.manifest("moves/load"), others)])
            assert (result.code, result.epoch, result.text) == ("", epoch, "")


def test_a_stolen_balancer_gets_nothing_by_moves(cluster: LocalCluster, kq: Engine, mover: Mover) -> None:
    """No other threshold, fewer holders, strangers, or orders of other times; and nobody else may send them."""
    create_whole_key(kq, "moves/wanted", "aes-256-gcm", threshold=3, shares=5)
    manifest = mover.manifest("moves/wanted")
    holders = [each.node for each in manifest.holders]
    tries = {
        "a smaller threshold": mover.order(manifest, holders, threshold=1),
        "fewer holders": mover.order(manifest, holders[:3]),
        "an epoch to come": mover.order(manifest, holders, from_epoch=9),
        "expired": mover.order(manifest, holders, expires_ms=1),
        "no node": mover.order(manifest, [*holders[:4], mover.client.name]),
        "no fencing epoch": mover.order(manifest, holders, fencing=0),
    }
    for what, order in tries.items():
        for node in cluster.nodes:
            try:
                (result,) = mover.move(node, [order])
            except EngineError:
                continue
            assert result.code, (what, node)
    for node in cluster.nodes:
        with pytest.raises(AccessDenied, match="a client, may not send 'move'"):
            ask(mover.of_client, node, MOVE, Move(list(tries.values())), 5.0)
    assert kq.key_info("moves/wanted").epoch == 1


def test_orders_of_a_balancer_of_before_are_over(own_cluster: LocalCluster) -> None:
    """After a restart of the balancer nodes go by its new fencing epoch, and so does the registry."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=3)
        with Mover(own_cluster, kq) as before:
            holders, others = elsewhere(own_cluster, kq, "data")
            own_cluster.kill_balancer()
            own_cluster.start_balancer()
            (result,) = before.move(holders[0], [before.order(before.manifest("data"), others)])
            assert result.code in ("access-denied", "manifest-error"), result
            assert "fencing epoch" in result.text
        with Mover(own_cluster, kq) as now:
            assert now.fencing > before.fencing
            (result,) = now.move(holders[0], [now.order(now.manifest("data"), others)])
            assert (result.code, result.epoch) == ("", 2)
        settled(own_cluster, "data", 2, others)


POINTS = (
    "dealer.reshare.dealt",
    "dealer.reshare.renewed",
    "dealer.reshare.committed",
    "dealer.move.recorded",
    "dealer.move.answered",
)


def test_who_carries_moves_out_may_die(own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is whole all the while, and the same order or the next one goes through at another holder."""
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "data", "aes-256-gcm", threshold=2, shares=3)
        before = kq.encrypt("data", b"from before")
        with Mover(own_cluster, kq) as mover:
            for point in POINTS:
                holders, others = elsewhere(own_cluster, kq, "data")
                victim, other = holders[0], holders[1]
                own_cluster.kill(victim)
                with monkeypatch.context() as patch:
                    patch.setenv("KEYQUORUM_FAILPOINTS", f"{point}=kill")
                    own_cluster.start_node(victim)
                while any(member.error for member in kq.status(timeout=5.0)):
                    time.sleep(0.05)
                manifest = mover.manifest("data")
                order = mover.order(manifest, others)
                until_s = time.monotonic() + 60
                while own_cluster.running()[victim] is not None:
                    assert time.monotonic() < until_s, f"{point} was never passed"
                    with contextlib.suppress(engine.EngineError):
                        mover.move(victim, [order], 5.0)
                kq.flush()
                assert kq.decrypt("data", before, timeout=20) == b"from before", point
                own_cluster.start_node(victim)
                told: list[MoveResult] = []
                while not told or told[0].code:
                    assert time.monotonic() < until_s, (point, told)
                    with contextlib.suppress(engine.EngineError):  # others may not have found it again
                        told = mover.move(other, [order], 15.0)
                epoch = told[0].epoch
                assert epoch > manifest.epoch
                settled(own_cluster, "data", epoch, others)
                assert kq.decrypt("data", before, timeout=20) == b"from before", point
