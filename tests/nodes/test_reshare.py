"""The resharing of a key: holders with real stores and a real token, and what a liar among them can say.

No socket is open here: a carrier in the place of the network brings the coordinator's messages, and changes some.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from resharing import COORDINATOR, NODES, Scene, prepared, silent

from engine.errors import (
    AccessDenied,
    KeyExists,
    ManifestError,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
    UnsupportedAlgorithm,
)
from engine.protocol.manifest import (
    CommitCertificate,
    KeyRecord,
    Receipt,
    ReshareOrder,
    certificates,
    check_successor,
    key_manifests,
    open_certificate,
    open_key_manifest,
    open_reshare_order,
    receipts,
    reshare_orders,
)
from engine.protocol.refresh import (
    BadDeal,
    Opener,
    Sealer,
    Terms,
    deal_parts,
    open_deals,
    open_part_statement,
    open_parts,
    sign_part_statement,
)
from engine.protocol.requests import (
    SHARE_ACCEPT,
    SHARE_DEAL,
    SHARE_LEAVE,
    SHARE_RESHARE,
    Dealt,
    Destroy,
    ShareCommit,
    ShareLeave,
    ShareRelease,
    SyncEntry,
)
from engine.protocol.reshare import check_reshare_size, check_sub_shares, merged_share
from engine.protocol.signed import read_unverified
from engine.sharing import FINGERPRINT_BYTES, Share, check_value, deal_sub_shares, generate_shares, reconstruct_key
from nodes.token import Lane, Token

# --- the protocol alone ---


def sealer() -> Sealer:
    return Sealer(os.urandom(32))


class Round:
    """One reshare of a key that is dealt in memory: each step as it must be, and what a liar makes of it."""

    def __init__(self, world: Any, old: tuple[int, int], new: tuple[int, int], shift: int = 0) -> None:
        self.world = world
        (self.old, shares), (self.new, count) = old, new
        self.dealt = world.deal(holders=NODES[:shares], threshold=self.old)
        holders = [NODES[(place + shift) % len(NODES)] for place in range(count)]
        order = world.reshare_order(self.dealt.record, threshold=self.new, holders=holders)
        self.terms = Terms.of(self.dealt.record, 2, order)
        self.shares = {name: Share(offer.x, offer.y) for name, offer in self.dealt.offers.items()}
        self.length = len(self.shares[NODES[0]].y)

    @property
    def xs(self) -> list[int]:
        return [holder.x for holder in self.terms.holders]

    def sub_shares(self, y: bytes, threshold: int = 0) -> list[Share]:
        masked = Share(1, y + os.urandom(FINGERPRINT_BYTES))
        return deal_sub_shares(masked, threshold=threshold or self.new, xs=self.xs)

    def deal(self, false: dict[str, list[Share]]) -> None:
        """All deals, those in ``false`` as given, and what becomes of them at each new holder."""
        raws, dealt = [], []
        for dealer in self.terms.dealers:
            updates = false.get(dealer.node) or self.sub_shares(self.shares[dealer.node].y)
            key, drawn = self.world.keys[dealer.node], os.urandom(32 * len(updates))
            raw, parts = deal_parts(self.terms, key, self.world.cluster, updates, 1, drawn, sealer())
            raws.append(raw)
            dealt.append(parts)
        self.deals = open_deals(self.terms, raws, self.world.cluster)
        self.made = {}
        for place, holder in enumerate(self.terms.holders):
            secret = self.world.curve_key(holder.node).private_bytes_raw()
            opened = open_parts(self.terms, self.deals, [parts[place] for parts in dealt], holder.node, Opener(secret))
            self.made[holder.node] = merged_share(self.terms, self.deals, opened)

    def check(self) -> None:
        told = []
        for name, made in self.made.items():
            raw = sign_part_statement(self.terms, self.deals, made, self.world.keys[name], 1)
            told.append(open_part_statement(self.terms, self.deals, raw, self.world.cluster))
        check_sub_shares(self.terms, self.deals, told)

    def is_key(self, shares: Sequence[Share]) -> bool:
        manifest = self.dealt.manifest
        secret = reconstruct_key(shares, threshold=self.new)
        return bool(check_value(secret, manifest.key_context) == manifest.check_value)


COMBINATIONS = [
    ((t, n), (u, m))
    for n, m in itertools.product(range(2, 6), range(1, 6))
    for t, u in itertools.product(range(1, n), range(1, m + 1))
]


@pytest.mark.parametrize(("old", "new"), COMBINATIONS)
def test_every_shape_becomes_every_other(world: Any, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Any t' of the new shares give the key, and the check finds nothing; none is a share of before."""
    round_ = Round(world, old, new, shift=sum(old) % 5)
    round_.deal({})
    round_.check()
    shares = [made.share for made in round_.made.values()]
    for chosen in itertools.combinations(shares, round_.new):
        assert round_.is_key(chosen)
    if old[0] > 1 and new[0] > 1:
        assert not {share.y for share in shares} & {share.y for share in round_.shares.values()}


shapes = st.sampled_from([(old, new) for old, new in COMBINATIONS if new[1] > new[0]])
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)


@relaxed
@given(shapes, st.data())
def test_a_dealer_of_another_secret_is_seen(
    world: Any, shape: tuple[tuple[int, int], tuple[int, int]], data: st.DataObject
) -> None:
    """One changed bit is enough. It is named where two more than t deal, and honest dealers alone never are."""
    round_ = Round(world, *shape, shift=data.draw(st.integers(0, 4)))
    liar = data.draw(st.sampled_from([each.node for each in round_.terms.dealers]))
    false = bytearray(round_.shares[liar].y)
    false[data.draw(st.integers(0, round_.length - 1))] ^= data.draw(st.integers(1, 255))
    round_.deal({liar: round_.sub_shares(bytes(false))})
    with pytest.raises(BadDeal, match="is not its share") as caught:
        round_.check()
    assert liar in caught.value.holders
    if len(round_.terms.dealers) >= round_.old + 2:
        assert caught.value.holders == (liar,)


@relaxed
@given(shapes, st.data())
def test_a_deal_of_a_higher_degree_names_its_dealer(
    world: Any, shape: tuple[tuple[int, int], tuple[int, int]], data: st.DataObject
) -> None:
    round_ = Round(world, *shape)
    liar = data.draw(st.sampled_from([each.node for each in round_.terms.dealers]))
    round_.deal({liar: round_.sub_shares(round_.shares[liar].y, round_.new + 1)})
    with pytest.raises(BadDeal) as caught:
        round_.check()
    assert caught.value.holders[0] == liar


@relaxed
@given(shapes, st.data())
def test_liars_who_know_of_each_other_are_seen_while_t_are_honest(
    world: Any, shape: tuple[tuple[int, int], tuple[int, int]], data: st.DataObject
) -> None:
    """Some m - t dealers share a consistent other key, as far as they alone can make it consistent."""
    round_ = Round(world, *shape)
    dealers = [each.node for each in round_.terms.dealers]
    spare = len(dealers) - round_.old
    liars = data.draw(st.lists(st.sampled_from(dealers), min_size=1, max_size=spare, unique=True))
    other = generate_shares(os.urandom(round_.length), threshold=round_.old, shares=len(dealers))
    changes = {name: share.y for name, share in zip(dealers, other, strict=True)}
    false = {}
    for name in liars:
        changed = bytes(a ^ b for a, b in zip(round_.shares[name].y, changes[name], strict=True))
        false[name] = round_.sub_shares(changed)
    round_.deal(false)
    with pytest.raises(BadDeal, match="is not its share"):
        round_.check()


@relaxed
@given(shapes, st.data())
def test_a_new_holder_that_tells_something_false_is_seen(
    world: Any, shape: tuple[tuple[int, int], tuple[int, int]], data: st.DataObject
) -> None:
    """Of a deal: it or the dealer, of a gap it alone, where two more than t' hold a share; else it is one of all."""
    round_ = Round(world, *shape)
    round_.deal({})
    liar = data.draw(st.sampled_from(list(round_.made)))
    values = list(round_.made[liar].values)
    place = data.draw(st.integers(0, len(values) - 1))
    values[place] = bytes(a ^ b for a, b in zip(values[place], b"\x01" * 16, strict=True))
    round_.made[liar] = dataclasses.replace(round_.made[liar], values=tuple(values))
    with pytest.raises(ShareCorrupt) as caught:
        round_.check()
    if len(round_.made) >= round_.new + 2:
        of_deal = place < len(round_.deals)
        assert caught.value.holders == ((round_.deals[place].dealer.node, liar) if of_deal else (liar,))
    assert liar in caught.value.holders


def test_with_as_many_holders_as_suffice_everybody_is_named(world: Any) -> None:
    """Nothing is there to tell a holder's lie from a dealer's."""
    round_ = Round(world, (2, 5), (3, 3))
    round_.deal({})
    made = round_.made["node2"]
    round_.made["node2"] = dataclasses.replace(made, values=(*made.values[:-1], bytes(16)))
    with pytest.raises(BadDeal, match="or a new holder tells it wrong") as caught:
        round_.check()
    assert set(caught.value.holders) == {"node5", "node1", "node2", "node3"}


def test_a_dealer_of_another_length_is_named(world: Any) -> None:
    round_ = Round(world, (2, 4), (2, 3))
    with pytest.raises(BadDeal, match=r"node3 dealt [0-9]+ bytes, most") as caught:
        round_.deal({"node3": round_.sub_shares(round_.shares["node3"].y[:-1])})
    assert caught.value.holders == ("node3",)


def test_deals_are_of_all_dealers_and_one_more_than_the_threshold(world: Any) -> None:
    round_ = Round(world, (2, 4), (2, 3))
    round_.deal({})
    raws = []
    for dealer in round_.terms.dealers:
        updates = round_.sub_shares(round_.shares[dealer.node].y)
        raws.append(
            deal_parts(round_.terms, world.keys[dealer.node], world.cluster, updates, 1, os.urandom(96), sealer())[0]
        )
    for some in (raws[:3], raws[1:], [*raws[:3], raws[2]], raws[::-1]):
        with pytest.raises(ManifestError, match="deals for"):
            open_deals(round_.terms, some, world.cluster)
    order = world.reshare_order(round_.dealt.record, threshold=2, holders=NODES[:3], without=["node3", "node4"])
    few = Terms.of(round_.dealt.record, 2, order)
    two = [
        deal_parts(
            few, world.keys[name], world.cluster, round_.sub_shares(round_.shares[name].y), 1, os.urandom(96), sealer()
        )
        for name in NODES[:2]
    ]
    with pytest.raises(ManifestError, match="one more than the threshold"):
        open_deals(few, [raw for raw, _ in two], world.cluster)
    given_up = world.keys["node3"], world.cluster, round_.sub_shares(bytes(round_.length))
    with pytest.raises(ManifestError, match="'node3' is no holder of 'orders' that deals"):
        deal_parts(few, *given_up, 1, os.urandom(96), sealer())


# --- holders with stores, and the coordinator ---


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token)
    yield made
    made.close()


def test_a_key_goes_to_other_nodes_and_comes_back(scene: Scene) -> None:
    """Each time exactly the ordered nodes have a share; who left tells who has, and no byte of its share is left."""
    old = scene.nodes["node1"].entry.row.sealed
    record = scene.reshare(scene.order(NODES[2:]))
    assert scene.holds(NODES[2:], 2)
    assert scene.is_key(["node3", "node5"])
    for name in NODES[:2]:
        moved = scene.nodes[name].catalogue.moved("orders")
        assert moved is not None
        assert [holder.node for holder in moved.manifest.holders] == list(NODES[2:])
        assert scene.nodes[name].catalogue.by_name("orders") is None
        assert scene.nodes[name].rows() == {2: ("moved", False)}
        scene.nodes[name].restart()
        assert scene.nodes[name].catalogue.moved("orders") is not None
    for path in scene.path.glob("node1.db*"):
        assert old[40:72] not in path.read_bytes()
    assert len(open_certificate(scene.certificate, record, scene.world.cluster)) == 3
    scene.reshare(scene.order(NODES, 3, known_to="node3"), "node3")
    assert scene.holds(NODES, 3)
    assert scene.nodes["node1"].catalogue.moved("orders") is None
    assert scene.is_key(["node1", "node3", "node4"])
    scene.reshare(scene.order(NODES[:1], 1))
    assert scene.holds(NODES[:1], 4)
    assert scene.is_key(["node1"])


def test_a_refresh_after_a_reshare_rests_on_its_order(scene: Scene) -> None:
    """The manifest carries the client's word for t, n and holders on; no refresh gets around it."""
    reshared = scene.reshare(scene.order(NODES, 3))
    refreshed = scene.reshare(scene.world.refresh_order(reshared))
    again = scene.reshare(scene.world.refresh_order(refreshed))
    assert scene.holds(NODES, 4)
    assert scene.is_key(NODES[2:])
    assert (reshared.manifest.sharing, refreshed.manifest.sharing) == (b"", reshared.manifest.change)
    assert again.manifest.sharing == reshared.manifest.change
    cluster, world = scene.world.cluster, scene.world
    for change, match in (
        ({"sharing": b""}, "differs from the client's order"),
        ({"threshold": 2}, "differs from the client's reshare order"),
        ({"holders": refreshed.manifest.holders[:4]}, "differs from the client's reshare order"),
        ({"holders": [replace(each, x=each.x + 1) for each in refreshed.manifest.holders]}, "are not 1 to n"),
        ({"sharing": world.refresh_order(scene.dealt.record)}, "is not an order.reshare|expected"),
        ({"change": reshared.manifest.change}, "rests on two|differs"),
    ):
        forged = world.signed(key_manifests, "key", replace(refreshed.manifest, **change), COORDINATOR)
        with pytest.raises(ManifestError, match=match):
            open_key_manifest(forged, cluster)
    other = scene.order(NODES, 3, from_epoch=2)
    forged = world.signed(key_manifests, "key", replace(refreshed.manifest, sharing=other), COORDINATOR)
    with pytest.raises(ManifestError, match="a refresh can't change"):
        check_successor(open_key_manifest(forged, cluster), reshared)


def test_shares_of_before_are_refused_and_fit_nothing(scene: Scene) -> None:
    old = {name: scene.nodes[name].share() for name in NODES[:3]}
    scene.reshare(scene.order(NODES[1:4]))
    new = {name: scene.nodes[name].share() for name in NODES[1:4]}
    context = scene.dealt.manifest.key_context
    mixed = reconstruct_key([old["node1"], new["node3"]], threshold=2)
    assert check_value(mixed, context) != scene.dealt.manifest.check_value
    for name in NODES[:3]:
        body = ShareRelease(scene.key_id, scene.world.grant(scene.dealt, "node4"), b"")
        with pytest.raises(StaleKey):
            scene.nodes[name].holder.release(scene.lane, body, scene.member("node4"))


@pytest.mark.parametrize("verb", [SHARE_DEAL, SHARE_RESHARE, SHARE_ACCEPT])
def test_who_is_silent_is_named_and_nothing_changes(scene: Scene, verb: str) -> None:
    holders = NODES[1:4]
    name = "node2"
    scene.false[verb, name] = silent
    order = scene.order(holders)
    with pytest.raises(QuorumUnavailable, match="a reshare needs all 3 holders") as caught:
        scene.reshare(order)
    assert caught.value.missing == (name,)
    assert scene.given_up == [scene.attempt]
    assert all(scene.nodes[each].entry.row.epoch == 1 for each in NODES[:3])
    assert scene.is_key(NODES[:2])
    scene.false.clear()
    scene.reshare(order)  # the same order again, by the next attempt, which has the notice on the first
    assert scene.holds(holders, 2)
    assert scene.is_key(["node3", "node4"])


def test_who_deals_a_false_share_is_named(scene: Scene) -> None:
    scene.reshare(scene.order(NODES[:4]))

    def false(dealt: Dealt) -> Dealt:
        body = scene.bodies[SHARE_DEAL, "node3"]
        terms = Terms.of(scene.nodes["node3"].entry.record, body.attempt, body.order)
        masked = Share(1, os.urandom(64 + FINGERPRINT_BYTES))
        updates = deal_sub_shares(masked, threshold=2, xs=[1, 2, 3])
        key, drawn = scene.world.keys["node3"], os.urandom(96)
        return Dealt(*deal_parts(terms, key, scene.world.cluster, updates, 1, drawn, sealer()))

    scene.false[SHARE_DEAL, "node3"] = false
    with pytest.raises(BadDeal, match="what node3 dealt for 'orders' is not its share") as caught:
        scene.reshare(scene.order(NODES[:3]))
    assert caught.value.holders == ("node3",)
    scene.false.clear()
    scene.reshare(scene.order(NODES[:3], without=["node3"]))
    assert scene.holds(NODES[:3], 3)
    assert scene.is_key(["node1", "node3"])


def test_each_new_holder_checks_for_itself(scene: Scene) -> None:
    """What a coordinator with a mind of its own changes, it refuses, and stores nothing."""
    record, _ = prepared(scene, NODES[2:])
    node = scene.nodes["node4"]
    node.store.delete(node.entry.row)  # as if it had not been asked yet
    node.restart()
    ask, accept = scene.bodies[SHARE_RESHARE, "node4"], scene.bodies[SHARE_ACCEPT, "node4"]
    world, manifest = scene.world, record.manifest
    other = world.deal("other", holders=NODES[:3])

    def signed(**changes: Any) -> bytes:
        raw: bytes = world.signed(key_manifests, "key", replace(manifest, **changes), COORDINATOR)
        return raw

    holders = manifest.holders
    strange = [replace(holders[0], commitment=bytes(32)), *holders[1:]]
    for body, error, match in (
        (replace(ask, certificate=world.certificate(other)), ManifestError, "not for this manifest"),
        (replace(ask, certificate=world.certificate(scene.dealt, NODES[:2])), ManifestError, "2 receipts"),
        (replace(ask, before=other.record.raw), ManifestError, "not the one that came"),
        (replace(ask, order=scene.order(NODES[:3])), ManifestError, "is not to hold a share"),
        (replace(ask, order=scene.order(NODES[2:], client="bob")), AccessDenied, "may not reshare"),
        (replace(ask, order=world.refresh_order(scene.dealt.record)), ManifestError, "order"),
        (replace(ask, order=scene.order(NODES[2:])), ManifestError, "of another refresh"),
        (replace(ask, attempt=1), ManifestError, "given out before"),
        (replace(ask, attempt=3), ManifestError, "of another refresh"),
        (replace(ask, parts=ask.parts[::-1]), BadDeal, "does not open"),
        (replace(accept, manifest=signed(holders=strange)), ManifestError, "to another share than"),
        (replace(accept, manifest=signed(threshold=3)), ManifestError, "reshare order"),
        (replace(accept, manifest=signed(check_value=bytes(32))), ManifestError, "can't change check_value"),
        (replace(accept, manifest=signed(previous=bytes(32))), ManifestError, "does not follow"),
        (replace(accept, statements=accept.statements[:2]), ManifestError, "not one of each"),
        (replace(accept, deals=accept.deals[:2], parts=accept.parts[:2]), ManifestError, "3 are needed"),
    ):
        verb = SHARE_RESHARE if type(body) is type(ask) else SHARE_ACCEPT
        with pytest.raises(error, match=match):
            scene.step(verb, "node4", body)
    for sender in ("node2", "node4"):
        with pytest.raises(AccessDenied):
            scene.step(SHARE_ACCEPT, "node4", accept, sender)
    with pytest.raises(AccessDenied, match="'node5' is no holder"):
        scene.step(SHARE_RESHARE, "node4", ask, "node5")
    assert node.rows() == {}
    scene.step(SHARE_ACCEPT, "node4", accept)
    assert node.rows() == {2: ("prepared", True)}
    with pytest.raises(ManifestError, match="given out before"):
        scene.step(SHARE_RESHARE, "node4", ask)
    node.algorithms = []
    node.restart()
    with pytest.raises(UnsupportedAlgorithm, match="can't serve 'aes-256-gcm'"):
        scene.step(SHARE_ACCEPT, "node4", accept)


def test_a_node_that_has_another_key_of_that_name_or_another_epoch_refuses(scene: Scene) -> None:
    prepared(scene, NODES[2:])
    accept = {name: scene.bodies[SHARE_ACCEPT, name] for name in NODES[2:]}
    taken = scene.world.deal("orders", holders=("node4",), threshold=1)
    node = scene.nodes["node4"]
    node.store.delete(node.entry.row)
    node.restart()
    node.holder.prepare(scene.lane, taken.offers["node4"], scene.member(COORDINATOR))
    node.holder.commit(ShareCommit(taken.key_id, scene.world.certificate(taken)))
    with pytest.raises(KeyExists, match="with another id"):
        scene.step(SHARE_ACCEPT, "node4", accept["node4"])
    scene.nodes["node3"].holder.destroy(Destroy(scene.world.destroy_order(scene.key_id, "orders")))
    with pytest.raises(StaleKey, match="was destroyed"):
        scene.step(SHARE_ACCEPT, "node3", accept["node3"])


# --- attempts, notices and certificates ---


def test_a_notice_marks_what_a_newcomer_stored_and_a_certificate_counts_still(scene: Scene) -> None:
    """A registry that calls an attempt aborted at some and commits it at others costs no share."""
    _, certificate = prepared(scene, NODES[2:])
    node = scene.nodes["node4"]
    node.holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    assert node.catalogue.prepared() == []
    node.restart()
    assert node.rows() == {2: ("prepared", True)}
    node.holder.commit(ShareCommit(scene.key_id, certificate))
    assert node.rows() == {2: ("committed", True)}
    assert node.entry.row.document == b""


def test_a_prepared_share_of_a_newcomer_is_of_no_use(scene: Scene) -> None:
    record, certificate = prepared(scene, NODES[2:])
    grant = scene.world.grant(scene.dealt, "node5", epoch=2)
    body = ShareRelease(scene.key_id, grant, b"")
    with pytest.raises(StaleKey, match="no committed share"):
        scene.nodes["node4"].holder.release(scene.lane, body, scene.member("node5"))
    released = scene.nodes["node4"].holder.release(
        scene.lane, replace(body, certificate=certificate), scene.member("node5")
    )
    assert released.x == 2
    assert scene.nodes["node4"].entry.record.digest == record.digest


def test_what_a_newcomer_stored_goes_when_another_attempt_is_committed(scene: Scene) -> None:
    """By the registry's books, which go on telling it, or when it is asked again."""
    prepared(scene, NODES[2:])
    aside = scene.nodes["node5"]
    sealed = aside.entry.row.sealed
    for name in NODES[2:]:
        scene.nodes[name].holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    record = scene.reshare(scene.order(NODES[:2], 1))
    assert aside.rows() == {2: ("prepared", True)}
    entry = SyncEntry(scene.key_id, "committed", record.raw, scene.certificate, b"", b"")
    for _ in range(2):
        assert aside.holder.catch_up(entry) == []
        assert aside.rows() == {}
    assert all(sealed[40:72] not in path.read_bytes() for path in scene.path.glob("node5.db*"))
    scene.reshare(scene.order((*NODES[:2], "node4"), 2))
    assert scene.nodes["node4"].rows() == {3: ("committed", True)}
    assert scene.is_key(["node1", "node4"])


def test_books_of_an_older_epoch_change_nothing(scene: Scene) -> None:
    prepared(scene, NODES[2:])
    entry = SyncEntry(scene.key_id, "committed", scene.dealt.record.raw, scene.world.certificate(scene.dealt), b"", b"")
    assert scene.nodes["node4"].holder.catch_up(entry) == []
    assert scene.nodes["node4"].rows() == {2: ("prepared", True)}
    assert scene.nodes["node3"].rows() == {1: ("committed", True), 2: ("prepared", True)}


def test_who_missed_that_it_leaves_learns_it_from_the_books(scene: Scene) -> None:
    """Also when the key has gone on twice meanwhile; and who comes back takes its share as anybody does."""
    scene.false[SHARE_LEAVE, "node1"] = silent
    late = scene.nodes["node2"]
    scene.nodes["node2"].holder.leave = silent  # type: ignore[method-assign, assignment]
    scene.reshare(scene.order(NODES[2:]))
    assert scene.described.warnings[-1] == "node1, node2 did not say yet that its old share is erased"
    assert late.rows() == {1: ("committed", True)}
    record = scene.reshare(scene.order(NODES[3:], 1, known_to="node3"), "node3")
    late.restart()
    entry = SyncEntry(scene.key_id, "committed", record.raw, scene.certificate, b"", b"")
    assert late.holder.catch_up(entry) == []
    assert late.rows() == {3: ("moved", False)}
    assert late.holder.catch_up(entry) == []
    assert scene.nodes["node1"].rows() == {2: ("moved", False)}
    scene.false.clear()
    scene.reshare(scene.order(NODES[:3], known_to="node4"), "node4")
    assert scene.holds(NODES[:3], 4)
    assert scene.is_key(["node1", "node2"])


def test_a_share_goes_for_a_whole_certificate_alone(scene: Scene) -> None:
    """Not for one of another manifest, with too few receipts, or of a manifest that does not follow."""
    record, certificate = prepared(scene, NODES[2:])
    world, node = scene.world, scene.nodes["node1"]
    stranger = world.deal("other", holders=NODES[2:])

    def certified(**changes: Any) -> ShareLeave:
        raw = world.signed(key_manifests, "key", replace(record.manifest, **changes), "node1")
        made = open_key_manifest(raw, world.cluster)
        given = [
            world.signed(receipts, "receipt", Receipt(scene.key_id, made.digest, holder.x), holder.node)
            for holder in made.manifest.holders
        ]
        body = CommitCertificate(scene.key_id, made.digest, given)
        return ShareLeave(raw, world.signed(certificates, "certificate", body, "balancer"))

    few = certificates.decode(read_unverified(certificate).payload)
    short = world.signed(certificates, "certificate", replace(few, receipts=few.receipts[:2]), "balancer")
    for body, match in (
        (ShareLeave(record.raw, scene.certificate), "not for this manifest"),
        (ShareLeave(record.raw, world.certificate(stranger)), "not for this manifest"),
        (ShareLeave(record.raw, short), "2 receipts, 3 are needed"),
        (ShareLeave(scene.dealt.record.raw, scene.certificate), "node1 is a holder of epoch 1"),
        (certified(previous=bytes(32)), "does not follow"),
        (certified(check_value=bytes(32)), "can't change check_value"),
        (certified(attempt=1), "attempt 1 does not follow"),
    ):
        with pytest.raises(ManifestError, match=match):
            node.holder.leave(body)
    assert node.rows() == {1: ("committed", True)}
    node.holder.leave(ShareLeave(record.raw, certificate))
    node.holder.leave(ShareLeave(record.raw, certificate))
    assert node.rows() == {2: ("moved", False)}
    assert scene.nodes["node4"].holder.leave(ShareLeave(stranger.record.raw, b"")) is not None  # nothing is known of it


def test_who_dealt_for_a_later_attempt_keeps_its_share_for_it(scene: Scene) -> None:
    """Else both could be lost: the share of before, and what an earlier attempt had made of it at those who come."""
    record, certificate = prepared(scene, NODES[2:])
    for name in NODES[2:]:
        scene.nodes[name].holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    later, of_later = prepared(scene, NODES[1:4])
    for name in NODES[:3]:
        scene.nodes[name].restart()
    scene.nodes["node1"].holder.leave(ShareLeave(record.raw, certificate))
    assert scene.nodes["node1"].rows() == {1: ("committed", True)}
    scene.nodes["node3"].holder.commit(ShareCommit(scene.key_id, certificate))
    assert scene.nodes["node3"].rows() == {1: ("committed", True), 2: ("prepared", True)}
    with pytest.raises(ManifestError, match="not for this manifest"):
        scene.nodes["node4"].holder.commit(ShareCommit(scene.key_id, certificate))
    assert scene.is_key(["node1", "node2"])
    for name in NODES[1:4]:
        scene.nodes[name].holder.commit(ShareCommit(scene.key_id, of_later))
    scene.nodes["node1"].holder.leave(ShareLeave(later.raw, of_later))
    assert scene.nodes["node1"].rows() == {2: ("moved", False)}
    assert scene.is_key(["node2", "node4"])


def test_who_stored_for_a_later_attempt_keeps_that_too(scene: Scene) -> None:
    """A registry that certifies an attempt which it had given up can't have a newcomer drop the next one's share."""
    record, certificate = prepared(scene, NODES[2:4])
    for name in NODES[2:4]:
        scene.nodes[name].holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    _, of_later = prepared(scene, NODES[2:])
    aside = scene.nodes["node5"]
    entry = SyncEntry(scene.key_id, "committed", record.raw, certificate, b"", b"")
    for step in (
        lambda: aside.holder.leave(ShareLeave(record.raw, certificate)),
        lambda: aside.holder.catch_up(entry),
        lambda: scene.nodes["node4"].holder.catch_up(entry),
        lambda: aside.holder.receive(record, certificate),
    ):
        with pytest.raises(ManifestError, match="attempt 2 of 'orders' was given up"):
            step()
    for name in NODES[2:]:
        scene.nodes[name].holder.commit(ShareCommit(scene.key_id, of_later))
    assert scene.is_key(["node4", "node5"])


def test_a_key_that_moved_is_destroyed_where_it_was_too(scene: Scene) -> None:
    """Its old holders get the tombstone, by the order itself or the registry's books."""
    record = scene.reshare(scene.order(NODES[2:]))
    order = scene.world.destroy_order(scene.key_id, "orders")
    scene.nodes["node1"].holder.destroy(Destroy(order))
    entry = SyncEntry(scene.key_id, "destroyed", record.raw, scene.certificate, order, b"")
    assert scene.nodes["node2"].holder.catch_up(entry) == [scene.key_id]
    for name in NODES[:2]:
        assert scene.nodes[name].rows() == {2: ("destroyed", False)}
        assert scene.nodes[name].catalogue.moved("orders") is None


def test_a_reshare_order_says_what_it_must(scene: Scene) -> None:
    """Signed by a client that may, in time, of nodes that are there, each once."""
    world, record = scene.world, scene.dealt.record
    for changes, error, match in (
        ({"client": "bob"}, AccessDenied, "may not reshare"),
        ({"client": "node1"}, ManifestError, "may not sign"),
        ({"expires_in_ms": -60_000}, ManifestError, "expired"),
        ({"expires_in_ms": 3_600_000}, ManifestError, "the limit is"),
        ({"holders": ["node1", "node9"]}, ManifestError, "'node9' is no node"),
        ({"holders": ["node1", "node1"]}, ManifestError, "names a holder twice"),
        ({"without": ["node1", "node1"]}, ManifestError, "to do without twice"),
        ({"threshold": 4}, ManifestError, "threshold 4 of 3 shares"),
    ):
        with pytest.raises(error, match=match):
            open_reshare_order(world.reshare_order(record, **changes), world.cluster, world.now_ms)
    good = world.reshare_order(record)
    order, signed = open_reshare_order(good, world.cluster, world.now_ms)
    assert (order.holders, signed.issuer) == (list(NODES[:3]), "alice")
    world.now_ms += 3_600_000
    assert open_reshare_order(good, world.cluster, None)[0] == order


@pytest.mark.parametrize(("dealers", "count", "fits"), [(5, 5, True), (9, 5, True), (20, 5, False), (5, 30, False)])
def test_what_does_not_fit_a_message_is_refused_before_it_begins(
    world: Any, dealers: int, count: int, fits: bool
) -> None:
    """The share of a 4096-bit RSA key has about 2400 bytes."""
    record = world.deal().record
    holders = [replace(record.manifest.holders[0], x=x + 1, node=f"node{x}") for x in range(dealers)]
    many = KeyRecord(replace(record.manifest, holders=holders), bytes(32), "node1", bytes(2_000))
    raw = world.reshare_order(record, holders=[f"node{x}" for x in range(count)])
    order = reshare_orders.decode(read_unverified(raw).payload)
    assert isinstance(order, ReshareOrder)
    if fits:
        check_reshare_size(many, bytes(2_000), raw, order, 2_450)
    else:
        with pytest.raises(ValueError, match=r"take messages of [0-9]+ bytes, the limit is 65536"):
            check_reshare_size(many, bytes(2_000), raw, order, 2_450)
