"""A reshare by as few as make the key: its new epoch is put together once, by a grant, before it may be valid."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from resharing import COORDINATOR, NODES, Scene, silent

import nodes.renewer
from engine.errors import AccessDenied, ManifestError, QuorumUnavailable, ShareCorrupt, StaleKey
from engine.protocol.grant import issue_trial_grant
from engine.protocol.manifest import (
    CommitCertificate,
    certificates,
    check_dealers,
    open_change_order,
    open_receipts,
    read_change_order,
    read_key_manifest,
    receipts,
)
from engine.protocol.requests import (
    SHARE_ACCEPT,
    SHARE_RELEASE,
    SHARE_RESHARE,
    SHARE_TRIAL,
    ShareCommit,
    ShareLeave,
    ShareRelease,
    ShareTrial,
)
from engine.protocol.signed import read_unverified
from engine.sharing import Share
from nodes.token import Lane, Token

LOST = "node3"
NEW = ("node2", "node4", "node5")
TRIER = "node4"


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token)
    yield made
    made.close()


def ordered(scene: Scene, **changes: Any) -> bytes:
    """A reshare of the 2-of-3 key without one holder: two deal."""
    return scene.order(NEW, **({"without": [LOST], "trial": TRIER} | changes))


def grant(scene: Scene, order: bytes, client: str = "alice", **changes: Any) -> bytes:
    told = replace(read_change_order(order), **changes)
    return issue_trial_grant(scene.world.keys[client], told, 1, scene.world.now_ms, 10_000, os.urandom(16))


def lies(monkeypatch: pytest.MonkeyPatch, dealer: str, scene: Scene) -> None:
    """One dealer deals a share that is not its own: a sharing like any other."""
    real = nodes.renewer.deal_sub_shares
    mine = scene.nodes[dealer].entry.manifest.holder(dealer).x

    def false(share: Share, *, threshold: int, xs: Any) -> list[Share]:
        y = bytes([share.y[0] ^ (share.x == mine)]) + share.y[1:]
        return real(Share(share.x, y), threshold=threshold, xs=xs)

    monkeypatch.setattr(nodes.renewer, "deal_sub_shares", false)


def test_a_key_is_reshared_by_as_few_as_make_it(scene: Scene) -> None:
    """One holder of a 2-of-3 key is lost for good: the other two deal, and node4 tries what came of it."""
    order = ordered(scene)
    record = scene.reshare(order, grant=grant(scene, order))
    holding = {name: scene.nodes[name].rows() for name in NEW}
    assert all(rows == {2: ("committed", True)} for rows in holding.values())
    assert scene.is_key(["node2", "node5"])
    told = {}
    for raw in certificates.decode(read_unverified(scene.certificate).payload).receipts:
        signed = read_unverified(raw)
        told[signed.issuer] = receipts.decode(signed.payload).tried
    assert told == {"node2": False, "node4": True, "node5": False}
    assert scene.nodes[LOST].rows() == {2: ("moved", False)}
    assert open_receipts(
        certificates.decode(read_unverified(scene.certificate).payload).receipts, record, scene.world.cluster
    )


def test_an_n_of_n_key_moves(scene: Scene) -> None:
    order = scene.order(NODES[:3], 3)
    scene.reshare(order)
    assert scene.holds(NODES[:3], 2)
    order = scene.order(NODES[1:], 2, trial="node5", known_to="node2")
    scene.reshare(order, "node2", grant(scene, order))
    assert scene.holds(NODES[1:], 3)
    assert scene.is_key(["node4", "node5"])


@pytest.mark.parametrize("liar", ["node1", "node2"])
def test_a_false_deal_is_noticed_and_the_old_epoch_stays(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, liar: str
) -> None:
    """Nobody else could have seen it; both dealers are named, for which of them lied can't be told."""
    lies(monkeypatch, liar, scene)
    order = ordered(scene)
    with pytest.raises(
        ShareCorrupt, match="node1, node2 dealt gives another key, as the trial at node4 shows"
    ) as caught:
        scene.reshare(order, grant=grant(scene, order))
    assert set(caught.value.holders) >= {"node1", "node2"}
    assert scene.given_up == [2]
    for name in NODES[:3]:
        assert scene.nodes[name].entry.row.state == "committed"
        assert scene.nodes[name].entry.row.epoch == 1
    assert scene.is_key(["node1", "node3"])
    monkeypatch.undo()
    scene.reshare(order, grant=grant(scene, order))
    assert scene.is_key(["node2", "node5"])


def test_a_new_holder_with_a_false_share_is_named_with_the_others(scene: Scene) -> None:
    """It is of no use to the trial; where one more share is there than are needed, the trial passes without it."""
    flip: Callable[[Any], Any] = lambda each: type(each)(each.x, bytes([each.y[0] ^ 1]) + each.y[1:], each.salt)  # noqa: E731
    scene.false[SHARE_RELEASE, "node5"] = flip
    order = ordered(scene)
    scene.reshare(order, grant=grant(scene, order))
    assert scene.is_key(["node2", "node4"])
    scene.false[SHARE_RELEASE, "node1"] = flip
    order = scene.order(["node1", "node4"], known_to="node4", without=["node5"], trial="node4")
    with pytest.raises(ShareCorrupt, match="node1: its share does not match") as caught:
        scene.reshare(order, "node4", grant(scene, order))
    assert "node1" in caught.value.holders


def test_no_epoch_counts_before_its_trial(scene: Scene) -> None:
    """A certificate with the receipts of all, but without the trial's, moves no share, old or new."""
    scene.false[SHARE_TRIAL, TRIER] = silent
    order = ordered(scene)
    with pytest.raises(QuorumUnavailable):
        scene.reshare(order, grant=grant(scene, order))
    accepted = scene.bodies[SHARE_ACCEPT, TRIER]
    record = read_key_manifest(accepted.manifest)
    given = [scene.step(SHARE_ACCEPT, name, scene.bodies[SHARE_ACCEPT, name]).receipt for name in NEW]
    with pytest.raises(ManifestError, match="epoch 2 of 'orders' was not tried by 'node4'"):
        open_receipts(given, record, scene.world.cluster)
    body = CommitCertificate(scene.key_id, record.digest, given)
    forged = scene.world.signed(certificates, "certificate", body, "balancer")
    for name in (*NEW, "node1", LOST):
        holder: Any = scene.nodes[name].holder
        told = ShareCommit(scene.key_id, forged) if name in NEW else ShareLeave(record.raw, forged)
        with pytest.raises(ManifestError, match="was not tried by"):
            (holder.commit if name in NEW else holder.leave)(told)
    assert scene.is_key(["node1", "node3"])
    # Another holder's word, or a word on another epoch, is not that of the node that was named.
    for name in ("node2", "node5"):
        mine = record.manifest.holder(name)
        assert mine is not None
        other = [*given, scene.nodes[name].holder.receipt(record, mine.x, tried=True)]
        with pytest.raises(ManifestError, match="was not tried by"):
            open_receipts(other, record, scene.world.cluster)


def test_a_trial_s_grant_opens_the_prepared_epoch_to_one_node_once(scene: Scene) -> None:
    scene.false[SHARE_TRIAL, TRIER] = silent
    order = ordered(scene)
    with pytest.raises(QuorumUnavailable):
        scene.reshare(order, grant=grant(scene, order))
    record = read_key_manifest(scene.bodies[SHARE_ACCEPT, TRIER].manifest)
    node = scene.nodes["node5"]

    def ask(raw: bytes, sender: str = TRIER) -> Any:
        return node.holder.release(scene.lane, ShareRelease(scene.key_id, raw, b""), scene.member(sender))

    for raw, sender, error in (
        (grant(scene, order), "node2", AccessDenied),
        (grant(scene, order, trial="node2"), "node2", AccessDenied),
        (grant(scene, order, client="bob"), TRIER, AccessDenied),
        (grant(scene, order, from_epoch=3), TRIER, StaleKey),
        (scene.world.grant(scene.dealt, TRIER, epoch=2), TRIER, StaleKey),
    ):
        with pytest.raises(error):
            ask(raw, sender)
    good = grant(scene, order)
    assert ask(good).x == 3
    node.restart()
    with pytest.raises(AccessDenied, match="used"):
        ask(good)
    trial = ShareTrial(scene.key_id, record.digest, good)
    with pytest.raises(AccessDenied, match="asks for the trial of what 'node1' coordinates"):
        scene.trial(TRIER, trial, "node2")
    with pytest.raises(StaleKey, match="has not prepared this epoch"):
        scene.trial(TRIER, replace(trial, manifest_hash=bytes(32)), COORDINATOR)
    with pytest.raises(AccessDenied, match="did not order that 'node2' tries"):
        scene.trial("node2", replace(trial, grant=grant(scene, order, trial="node2")), COORDINATOR)
    node.holder.abort(scene.aborts[0])
    with pytest.raises(StaleKey, match="has prepared no share"):  # it will never count
        ask(grant(scene, order))


def test_a_trial_s_grant_is_none_for_a_key_that_is_valid(scene: Scene) -> None:
    order = ordered(scene)
    scene.reshare(order, grant=grant(scene, order))
    fresh = ShareRelease(scene.key_id, grant(scene, order), b"")
    with pytest.raises(StaleKey, match="has prepared no share"):
        scene.nodes["node5"].holder.release(scene.lane, fresh, scene.member(TRIER))


def test_too_few_dealers_without_a_trial_are_refused_by_each_holder(scene: Scene) -> None:
    """Whatever the coordinator thinks of it; and a trial is a client's to order."""
    with pytest.raises(ValueError, match="can't be reshared by 2 of its 3 holders: it takes 3, one more"):
        scene.reshare(ordered(scene, trial=""))
    order = ordered(scene)
    scene.reshare(order, grant=grant(scene, order))
    body = scene.bodies[SHARE_RESHARE, "node5"]
    untried = ordered(scene, trial="", from_epoch=1)
    before = scene.dealt.record
    scene.nodes["node5"].store.delete(scene.nodes["node5"].entry.row)
    scene.nodes["node5"].restart()
    with pytest.raises(ManifestError):
        scene.step(SHARE_RESHARE, "node5", replace(body, order=untried))
    told = read_change_order(untried)
    with pytest.raises(ManifestError, match="2 deals for 'orders' are too few: it takes 3"):
        check_dealers(told, before.manifest)
    with pytest.raises(ManifestError, match="1 deals for 'orders' are too few: it takes 2, and a trial"):
        check_dealers(replace(told, without=["node2", LOST], trial=TRIER), before.manifest)
    cluster, now_ms = scene.world.cluster, scene.world.now_ms
    with pytest.raises(ManifestError, match="a client alone can order"):
        open_change_order(scene.world.move_order(before, holders=list(NEW), trial=TRIER), cluster, now_ms)
    with pytest.raises(ManifestError, match="'node1' is to try the new epoch, but holds no share of it"):
        open_change_order(ordered(scene, trial="node1", from_epoch=1), cluster, now_ms)
