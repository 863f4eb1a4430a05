"""What a balancer may order of a key, as each holder decides it: moves, renewals, fencing epochs, rates.

Holders with real stores and a real token; ``resharing`` is in the network's place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from resharing import NODES, Scene, prepared

from engine.errors import AccessDenied, ManifestError, Overloaded, StaleKey
from engine.protocol.manifest import (
    PolicyRule,
    certificates,
    chain_pin,
    check_successor,
    issue_cluster_manifest,
    key_manifests,
    open_certificate,
    open_chain,
    open_key_manifest,
    open_move_order,
    open_renew_order,
    open_reshare_order,
    ordered_shape,
    read_key_manifest,
    reshare_orders,
    sign_orders,
)
from engine.protocol.moves import check_move
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.requests import SHARE_ACCEPT, SHARE_DEAL, SHARE_RESHARE, ShareCommit, ShareLeave
from engine.protocol.signed import read_unverified, remember_signatures
from engine.sharing import NodeLocation, check_placement, placement_risk
from nodes.orders import BalancerOrders
from nodes.remember import Remembered
from nodes.token import Lane, Token

# The nodes stand at three sites: node1 and node4 at one, node2 and node5 at another, node3 at the third.
ELSEWHERE = ("node4", "node2", "node3")
SITES = [NodeLocation(name, f"site{int(name[-1]) % 3}/room/rack/{name}") for name in NODES]


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token)
    yield made
    made.close()


def with_rules(scene: Scene, *rules: PolicyRule) -> None:
    """Have all go by a newer manifest with these rules too."""
    world = scene.world
    world.chain = issue_cluster_manifest(
        name="test",
        members=world.members,
        rules=[*world.cluster.rules, *rules],
        operators=[world.keys["op"]],
        chain=world.chain,
    )
    world.cluster = open_chain(world.chain, chain_pin(world.chain))
    for node in scene.nodes.values():
        node.restart()


def test_a_balancer_moves_and_renews_a_key(scene: Scene) -> None:
    """The holders change and nothing else; each manifest carries the orders on that it rests on."""
    world = scene.world
    order = world.move_order(scene.dealt.record, holders=list(ELSEWHERE))
    moved = scene.reshare(order)
    assert scene.holds(ELSEWHERE, 2)
    assert scene.is_key(["node4", "node3"])
    for name in ("node1", "node2"):  # once more, also where it was and is no more: it is done
        assert scene.reshare(order, name).digest == moved.digest
    with pytest.raises(StaleKey, match="which others hold"):
        scene.reshare(world.renew_order(moved), "node1")
    assert (moved.manifest.sharing, moved.manifest.placing) == (b"", b"")
    assert moved.manifest.moving == moved.manifest.change
    assert scene.nodes["node1"].catalogue.moved("orders") is not None
    renewed = scene.reshare(world.renew_order(moved), "node4")
    assert renewed.manifest.placing == moved.manifest.change
    reshared = scene.reshare(world.reshare_order(renewed, threshold=3, holders=list(NODES)), "node4")
    assert (reshared.manifest.sharing, reshared.manifest.placing, reshared.manifest.moving) == (b"", b"", b"")
    assert ordered_shape(reshared.manifest) == (3, 5)
    again = scene.reshare(world.move_order(reshared, holders=list(NODES[::-1])))
    assert (again.manifest.sharing, again.manifest.placing) == (reshared.manifest.change, b"")
    last = scene.reshare(world.refresh_order(again))
    assert (last.manifest.sharing, last.manifest.placing) == (reshared.manifest.change, again.manifest.change)
    assert scene.holds(NODES, 6)
    assert scene.is_key(NODES[1:4])
    for node in scene.nodes.values():
        node.restart()
    assert scene.is_key(NODES[:3])


def test_a_manifest_rests_on_all_of_its_orders(scene: Scene) -> None:
    """None can be left out, put in the place of another, or be another key's."""
    world = scene.world
    moved = scene.reshare(world.move_order(scene.dealt.record, holders=list(ELSEWHERE)))
    renewed = scene.reshare(world.renew_order(moved), "node4")
    told, cluster = renewed.manifest, world.cluster
    other = world.deal("other", holders=NODES[:3]).record
    reshare = world.reshare_order(scene.dealt.record, holders=list(ELSEWHERE))
    later = world.reshare_order(moved, holders=list(ELSEWHERE))
    for changes, match in (
        ({"placing": b"", "holders": told.holders[:2]}, "differs from the client's order"),
        ({"holders": told.holders[::-1]}, "differs from the balancer's move order"),
        ({"holders": [replace(each, x=each.x + 1) for each in told.holders]}, "are not 1 to n"),
        ({"threshold": 1}, "differs from the balancer's move order"),
        ({"placing": world.move_order(other, holders=list(ELSEWHERE))}, "differs from the balancer's move order"),
        ({"placing": reshare}, "an 'order.reshare'|'order.reshare' came"),
        ({"sharing": moved.manifest.change}, "'order.move' came"),
        ({"placing": world.move_order(scene.dealt.record, holders=list(ELSEWHERE), balancer="node1")}, "may not sign"),
        ({"placing": world.move_order(renewed, holders=list(ELSEWHERE))}, "differs from the balancer's move order"),
        ({"sharing": later}, "its move order is older"),
        ({"change": later}, "rests on two orders of its holders"),
        ({"change": world.move_order(moved, holders=list(ELSEWHERE))}, "rests on two orders of its holders"),
        ({"change": world.renew_order(scene.dealt.record)}, "differs from the balancer's renewal order"),
    ):
        forged = world.signed(key_manifests, "key", replace(told, **changes), "node4")
        with pytest.raises(ManifestError, match=match):
            open_key_manifest(forged, cluster)
    for record, before, changes, match in (
        (renewed, moved, {"placing": b""}, "can't change the order of its holders"),
        (
            renewed,
            moved,
            {"holders": [replace(told.holders[0], node="node5"), *told.holders[1:]]},
            "change the holders",
        ),
        (moved, scene.dealt.record, {"threshold": 1}, "a move can't change threshold"),
        (moved, scene.dealt.record, {"sharing": reshare}, "a move can't change threshold"),
    ):
        raw = world.signed(key_manifests, "key", replace(record.manifest, **changes), "node4")
        with pytest.raises(ManifestError, match=match):
            check_successor(read_key_manifest(raw), before)


def test_a_balancers_order_says_what_it_must(scene: Scene) -> None:
    world, record = scene.world, scene.dealt.record
    for opener, order in ((open_move_order, world.move_order), (open_renew_order, world.renew_order)):
        for changes, match in (
            ({"balancer": "alice"}, "may not sign"),
            ({"balancer": "node1"}, "may not sign"),
            ({"fencing": 0}, "fencing epoch 0"),
            ({"expires_in_ms": -60_000}, "expired"),
            ({"expires_in_ms": 3_600_000}, "the limit is"),
        ):
            with pytest.raises(ManifestError, match=match):
                opener(order(record, **changes), world.cluster, world.now_ms)
        good = order(record)
        assert opener(good, world.cluster, world.now_ms)[1].issuer == "balancer"
        assert opener(good, world.cluster, None)[0].fencing == 1
    for changes, match in (
        ({"holders": ["node1", "node1"]}, "names a holder twice"),
        ({"holders": ["node1", "node9"]}, "'node9' is no node"),
        ({"without": ["node1", "node1"]}, "to do without twice"),
        ({"threshold": 4}, "threshold 4 of 3"),
    ):
        with pytest.raises(ManifestError, match=match):
            open_move_order(world.move_order(record, **changes), world.cluster, world.now_ms)
    with pytest.raises(ManifestError, match="a client's has none"):
        open_reshare_order(world.reshare_order(record, fencing=1), world.cluster, world.now_ms)


@pytest.mark.parametrize("step", [SHARE_DEAL, SHARE_RESHARE, SHARE_ACCEPT])
def test_each_holder_decides_for_itself(scene: Scene, step: str) -> None:
    """A coordinator and balancer that agree on a bad move get it at no step from any holder."""
    world, record = scene.world, scene.dealt.record
    prepared(scene, ELSEWHERE)
    body = scene.bodies[step, "node2"]
    for changes, error, match in (
        ({"threshold": 1}, AccessDenied, "may not change the threshold"),
        ({"holders": ["node2", "node3"]}, AccessDenied, "2 holders; its client ordered 3"),
        ({"holders": ["node4", "node2", "node3", "node5"]}, AccessDenied, "no rule of the policy lets it grow"),
        ({"holders": ["node1", "node2", "node4"]}, ManifestError, "could reconstruct it alone, 0 before"),
        ({"holders": ["node2", "node3", "node9"]}, ManifestError, "'node9' is no node"),
        ({"balancer": "alice"}, ManifestError, "may not sign"),
        ({"expires_in_ms": -60_000}, ManifestError, "expired"),
    ):
        order = world.move_order(record, **{"holders": list(ELSEWHERE)} | changes)
        if step == SHARE_ACCEPT:
            told = read_key_manifest(body.manifest).manifest
            raw = world.signed(key_manifests, "key", replace(told, change=order), "node1")
            asked = replace(body, manifest=raw)
        else:
            asked = replace(body, order=order)
        with pytest.raises((error, ManifestError), match=f"{match}|differs from"):
            scene.step(step, "node2", asked)
        if step != SHARE_ACCEPT:  # there the manifest gives it away before
            with pytest.raises(error, match=match):
                scene.step(step, "node2", asked)
    assert scene.is_key(NODES[:2])


def test_a_rule_lets_a_balancer_grow_a_key_and_no_more(scene: Scene) -> None:
    """``*`` is not enough; n never falls below what the client ordered."""
    world, record = scene.world, scene.dealt.record
    wide = ["node1", "node2", "node3", "node5"]
    with_rules(scene, PolicyRule("*", "*", ["*"]))
    with pytest.raises(AccessDenied, match="lets it grow"):
        scene.reshare(world.move_order(record, holders=wide, threshold=2))
    with_rules(scene, PolicyRule("balancer", "ord*", ["grow"]))
    with pytest.raises(ManifestError, match="failure domain"):
        scene.reshare(world.move_order(record, holders=wide))
    three = scene.reshare(world.reshare_order(record, threshold=3, holders=list(NODES[:4])))
    five = scene.reshare(world.move_order(three, holders=list(NODES)))
    assert scene.holds(NODES, 3)
    assert scene.is_key(NODES[2:])
    assert ordered_shape(five.manifest) == (3, 4)
    with pytest.raises(ManifestError, match="1 shares too few, 0 before"):
        scene.reshare(world.move_order(five, holders=list(NODES[1:])))
    with pytest.raises(AccessDenied, match="its client ordered 4"):
        scene.reshare(world.move_order(five, holders=list(NODES[1:4])), "node2")
    grown = open_key_manifest(five.raw, world.cluster)
    forged = world.signed(
        key_manifests, "key", replace(grown.manifest, order=world.order("orders", "aes-256-gcm", 2, 3)), "node1"
    )
    with pytest.raises(ManifestError, match="differs from the client's order"):
        open_key_manifest(forged, world.cluster)


def test_an_older_fencing_epoch_is_over(scene: Scene) -> None:
    """Each node goes by the newest that it has heard, from orders or the registry, also after a restart."""
    world, record = scene.world, scene.dealt.record
    moved = scene.reshare(world.move_order(record, holders=list(ELSEWHERE), fencing=7))
    with pytest.raises(AccessDenied, match="is of the fencing epoch 6; 7 has begun"):
        scene.reshare(world.renew_order(moved, fencing=6), "node4")
    node = scene.nodes["node2"]
    node.orders.heard("balancer", 9)
    node.restart()
    with pytest.raises(AccessDenied, match="8; 9 has begun"):
        scene.reshare(world.renew_order(moved, fencing=8), "node4")
    node.orders.heard("somebody", 99)  # who is no balancer any more
    node.restart()
    scene.reshare(world.renew_order(moved, fencing=9), "node4")
    assert scene.holds(ELSEWHERE, 3)


@pytest.mark.parametrize("name", ["node2", "node4"])
def test_a_balancer_has_shares_dealt_at_a_bounded_rate(scene: Scene, name: str) -> None:
    """Dealers count what they deal, newcomers what they take in; a client's orders are not counted."""
    world, node, record = scene.world, scene.nodes[name], scene.dealt.record
    node.renewer._orders = BalancerOrders(world.cluster, node.store, lambda: 0.0, per_s=0.1)
    record = scene.reshare(world.move_order(record, holders=list(ELSEWHERE)), "node2")
    with pytest.raises(Overloaded, match=r"'balancer' orders more than limits\.changes_per_s = 0\.1 allows"):
        scene.reshare(world.move_order(record, holders=list(NODES[:3])), "node2")
    scene.reshare(world.reshare_order(record, holders=list(NODES[:3])), "node2")
    assert scene.holds(NODES[:3], 3)


# --- where the holders may be ---

places = st.lists(st.sampled_from(NODES), min_size=1, max_size=5, unique=True)


@given(places, places, st.integers(1, 5))
def test_a_move_is_let_through_exactly_if_it_leaves_no_more_to_be_warned_of(
    before: list[str], after: list[str], threshold: int
) -> None:
    """Of a safe placement to a safe one always, of a safe one to another never."""
    if threshold > min(len(before), len(after)):
        return
    then = placement_risk(SITES, after, threshold)
    today = placement_risk(SITES, before, threshold)
    # The same by the sentences that operators read, in which each domain has its own.
    told = [each for each in check_placement(SITES, after, threshold) if "domain" in each and "apart" not in each]
    alone = sum("alone" in each for each in told)
    fatal = sum("losing" in each for each in told)
    assert (then.alone, then.fatal) == (alone if threshold > 1 else 0, fatal)
    assert (then.missing > 0) == (fatal > 0)
    safe = (then.alone, then.fatal, then.missing) == (0, 0, 0)
    if safe:
        assert then.worse_than(today) == ""
    if (today.alone, today.fatal, today.missing) == (0, 0, 0):
        assert bool(then.worse_than(today)) == (not safe)
    assert then.worse_than(then) == ""


def test_a_placement_that_is_bad_may_stay_so_or_mend(world: Any) -> None:
    """All at one site: any move within is as good; and of holders that are no members nothing is left to lose."""
    record = world.deal(holders=["node1", "node4"], threshold=2).record

    def tried(holders: list[str], before: Any = record.manifest) -> None:
        order, _ = open_move_order(world.move_order(record, holders=holders), world.cluster, world.now_ms)
        check_move(order, "balancer", before, world.cluster)

    for pair in itertools.permutations(NODES, 2):
        tried(list(pair))
    gone = [replace(record.manifest.holders[0], node="gone"), record.manifest.holders[1]]
    tried(["node2", "node4"], replace(record.manifest, holders=gone))
    spread = [replace(record.manifest.holders[0], node="node2"), record.manifest.holders[1]]
    with pytest.raises(ManifestError, match="could reconstruct it alone, 0 before"):
        tried(["node1", "node4"], replace(record.manifest, holders=spread))


def test_a_node_that_is_draining_gets_no_share_that_has_none(scene: Scene) -> None:
    """By each holder's own manifest; one that holds a share already may stay among the holders."""
    world = scene.world

    def drain(*names: str) -> None:
        world.chain = issue_cluster_manifest(
            name="test",
            members=world.members,
            rules=world.cluster.rules,
            operators=[world.keys["op"]],
            chain=world.chain,
            draining=names,
        )
        world.cluster = open_chain(world.chain, chain_pin(world.chain))
        for node in scene.nodes.values():
            node.restart()

    drain("node4")
    order = world.move_order(scene.dealt.record, holders=list(ELSEWHERE))
    told, _ = open_move_order(order, world.cluster, world.clock())
    with pytest.raises(ManifestError, match="node4 is draining"):
        check_move(told, "balancer", scene.dealt.record.manifest, world.cluster)
    with pytest.raises((ValueError, ManifestError), match="node4 is draining"):
        scene.reshare(order)
    drain("node2", "node3")
    assert scene.reshare(order).manifest.epoch == 2
    assert scene.holds(ELSEWHERE, 2)


# --- many at once ---


def test_what_is_stored_together_is_durable_together_or_not_at_all(scene: Scene) -> None:
    """One step that fails is undone alone; if the transaction fails, nothing of it is left, nor known."""
    _, certificate = prepared(scene, ELSEWHERE)
    node = scene.nodes["node2"]
    before = node.rows()

    def commit_and_fail() -> None:
        with node.holder.together():
            node.holder.commit(ShareCommit(scene.key_id, certificate))
            assert node.rows() == {2: ("committed", True)}
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        commit_and_fail()
    assert node.rows() == before == {1: ("committed", True), 2: ("prepared", True)}
    assert node.entry.row.epoch == 1
    coming = node.catalogue.next_of(scene.key_id)
    assert coming is not None
    assert coming.row.epoch == 2
    with node.holder.together():
        with contextlib.suppress(ZeroDivisionError), node.store._transaction():
            node.store.delete(coming.row)
            raise ZeroDivisionError
        node.holder.commit(ShareCommit(scene.key_id, certificate))
    node.restart()
    assert node.rows() == {2: ("committed", True)}
    leaver = scene.nodes["node1"]
    sealed = leaver.entry.row.sealed
    with leaver.holder.together():
        leaver.holder.leave(ShareLeave(coming.row.manifest, certificate))
    assert leaver.rows() == {2: ("moved", False)}
    assert all(sealed[40:72] not in path.read_bytes() for path in scene.path.glob("node1.db*"))


def test_many_keys_are_signed_for_together_and_nothing_is_sent_twice(scene: Scene) -> None:
    """What a holder's statement was on it has at hand; who has forgotten it is sent it. Each document stands alone."""
    world = scene.world
    others = [world.deal(f"more/{number}", holders=NODES[:3], threshold=2) for number in range(4)]
    for dealt in others:
        for name in NODES[:3]:
            holder = scene.nodes[name].holder
            holder.prepare(scene.lane, dealt.offers[name], scene.member("node1"))
            holder.commit(ShareCommit(dealt.key_id, world.certificate(dealt)))
    records = [scene.dealt.record, *(dealt.record for dealt in others)]
    asked: list[tuple[str, Any]] = []
    forgetful = {"node4"}
    step = Scene.step

    def watched(verb: str, name: str, body: Any, sender: str = "") -> Any:
        if verb == SHARE_ACCEPT:
            asked.append((name, body))
            if name in forgetful:
                scene.nodes[name].renewer._remembered = Remembered()
        return step(scene, verb, name, body, sender)

    scene.step = watched  # type: ignore[method-assign]
    scene.attempt, scene.coordinator = 2, "node2"
    orders = sign_orders(
        [
            reshare_orders.decode(read_unverified(world.move_order(each, holders=list(ELSEWHERE))).payload)
            for each in records
        ],
        world.keys["balancer"],
        world.now_ms,
    )
    talker: Any = type("Talker", (), {"channel": None})()
    results = scene.coordinator_of("node2").move(talker, orders, 10.0)
    assert [(each.epoch, each.code) for each in results] == [(2, "")] * 5
    assert [name for name, body in asked if body.deals] == ["node4"] * 5
    assert sorted(name for name, body in asked if not body.deals) == sorted(ELSEWHERE * 5)
    for record in records:
        entries = [scene.nodes[name].catalogue.by_id(record.manifest.key_id) for name in ELSEWHERE]
        for entry in entries:
            assert entry is not None
            assert (entry.row.epoch, entry.row.state) == (2, "committed")
            remember_signatures(None)
            assert open_certificate(entry.row.certificate, entry.record, fresh(world)) == ELSEWHERE
            signatures = [
                msgspec.msgpack.decode(each)[1][0][1]
                for each in (
                    entry.row.manifest,
                    *certificates.decode(read_unverified(entry.row.certificate).payload).receipts,
                )
            ]
            assert [len(each) for each in signatures] == [64 + 1 + 3 * 32] * 4
    assert scene.is_key(["node4", "node3"])


def fresh(world: Any) -> Any:
    """The cluster as somebody sees it who has opened nothing yet."""
    return open_chain(world.chain, chain_pin(world.chain))


def test_an_order_for_a_key_comes_once_in_a_request(scene: Scene) -> None:
    world = scene.world
    orders = [world.renew_order(scene.dealt.record), world.renew_order(scene.dealt.record)]
    with pytest.raises(ValueError, match="two orders for one key"):
        scene.coordinator_of("node1").move(None, orders, 10.0)


def test_a_dealers_key_is_used_for_one_part_of_a_context(scene: Scene) -> None:
    """Deals of many keys share it; a deal by the same terms once more does not."""
    prepared(scene, ELSEWHERE)
    body = scene.bodies[SHARE_DEAL, "node1"]
    first, second = (scene.step(SHARE_DEAL, "node1", body) for _ in range(2))
    assert len({part[:32] for part in first.parts}) == 1
    assert first.parts[0][:32] != second.parts[0][:32]
    sealer = Sealer(bytes(range(32)))
    public = scene.world.curve_key("node2").public_key().public_bytes_raw()
    sealer.seal(public, b"a", b"context")
    with pytest.raises(ValueError, match="was sealed before"):
        sealer.seal(public, b"b", b"context")
    opener = Opener(scene.world.curve_key("node2").private_bytes_raw())
    assert opener.open(sealer.seal(public, b"b", b"another"), b"another") == b"b"
