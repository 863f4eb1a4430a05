"""The refresh of a key's shares: holders with real stores and a real token, and what a liar among them can say.

No socket is open here: the test carries the messages, as the coordinator does, and changes them on the way.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from holder_node import HolderNode
from msgspec.structs import replace

from engine.errors import (
    AccessDenied,
    EngineError,
    ManifestError,
    NodeUnavailable,
    ProtocolError,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
)
from engine.protocol.manifest import (
    CommitCertificate,
    KeyRecord,
    certificates,
    key_manifests,
    open_certificate,
    open_receipt,
    open_refresh_order,
    read_key_manifest,
)
from engine.protocol.refresh import (
    BadDeal,
    Opener,
    Sealer,
    Terms,
    check_parts,
    check_size,
    deal_parts,
    new_share,
    open_deals,
    open_part_statement,
    refresh_parts,
)
from engine.protocol.requests import (
    REGISTRY_CHANGE,
    REGISTRY_COMMIT,
    REQUEST_CODECS,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_REFRESH,
    SHARE_RENEW,
    Dealt,
    Destroy,
    Reserved,
    ShareCommit,
    ShareDeal,
    SharePrepare,
    ShareRefresh,
    ShareRelease,
    ShareRenew,
    SyncEntry,
)
from engine.protocol.signed import read_unverified, sign_envelope
from engine.sharing import FINGERPRINT_BYTES, Share, check_value, deal_zero, reconstruct_key
from nodes.catalogue import Catalogue
from nodes.refresh import Coordinator
from nodes.token import Lane, Token

COORDINATOR = "node1"


class Scene:
    """A key on several holders, and the steps of its refresh."""

    def __init__(self, world: Any, path: Path, lane: Lane, token: Token, threshold: int = 3, shares: int = 5) -> None:
        self.world, self.path, self.lane, self.token = world, path, lane, token
        self.names = tuple(f"node{i}" for i in range(1, shares + 1))
        self.dealt = world.deal(holders=self.names, threshold=threshold)
        self.key_id = self.dealt.key_id
        self.nodes = {
            name: HolderNode(world, name, path, lane, list(token.algorithms), self.key_id) for name in self.names
        }
        certificate = world.certificate(self.dealt)
        for name, node in self.nodes.items():
            node.holder.prepare(lane, self.dealt.offers[name], self.member(COORDINATOR))
            node.holder.commit(ShareCommit(self.key_id, certificate))
        self.attempt = 1
        self.order = self.new_order()

    def close(self) -> None:
        for node in self.nodes.values():
            node.store.close()

    def member(self, name: str) -> Any:
        return self.world.cluster.members[name]

    @property
    def record(self) -> KeyRecord:
        record: KeyRecord = self.nodes[COORDINATOR].entry.record
        return record

    def new_order(self, **changes: Any) -> bytes:
        self.attempt += 1
        order: bytes = self.world.refresh_order(self.record, **changes)
        self.terms = Terms.of(self.record, self.attempt, order)
        return order

    # --- the steps ---

    def deal(self, name: str, **changes: Any) -> Dealt:
        fields = {
            "order": self.order,
            "attempt": self.attempt,
            "manifest_hash": self.record.digest,
            "certificate": b"",
            **changes,
        }
        return self.nodes[name].renewer.deal(self.lane, ShareDeal(**fields), self.member(COORDINATOR))

    def false_deal(self, name: str, updates: Sequence[Share]) -> Dealt:
        """A deal as a node can make it that does not keep to the protocol."""
        key, drawn = self.world.keys[name], os.urandom(32 * len(updates))
        sealer = Sealer(os.urandom(32))
        return Dealt(*deal_parts(self.terms, key, self.world.cluster, updates, 1, drawn, sealer))

    def deals(self, **false: Dealt) -> dict[str, Dealt]:
        """Deals of the first t holders, in the manifest's order."""
        first = self.names[: self.dealt.manifest.threshold]
        return {name: false.get(name) or self.deal(name) for name in first}

    def message(self, name: str, deals: Mapping[str, Dealt], **changes: Any) -> ShareRefresh:
        place = self.names.index(name)
        fields = {
            "order": self.order,
            "attempt": self.attempt,
            "deals": [each.statement for each in deals.values()],
            "parts": [each.parts[place] for each in deals.values()],
            **changes,
        }
        return ShareRefresh(**fields)

    def state(self, name: str, deals: Mapping[str, Dealt], **changes: Any) -> bytes:
        body = self.message(name, deals, **changes)
        return self.nodes[name].renewer.refresh(self.lane, body, self.member(COORDINATOR)).statement

    def statements(self, deals: Mapping[str, Dealt]) -> dict[str, bytes]:
        return {name: self.state(name, deals) for name in self.names}

    def check(self, deals: Mapping[str, Dealt], statements: Mapping[str, bytes]) -> None:
        """What coordinator and holders do with the statements."""
        opened = open_deals(self.terms, [each.statement for each in deals.values()], self.world.cluster)
        told = [open_part_statement(self.terms, opened, raw, self.world.cluster) for raw in statements.values()]
        check_parts(self.terms, opened, told)

    def manifest(self, statements: Mapping[str, bytes], **changes: Any) -> bytes:
        told = [refresh_parts.decode(read_unverified(raw).payload) for raw in statements.values()]
        before = self.record.manifest
        manifest = replace(
            before,
            epoch=before.epoch + 1,
            attempt=self.attempt,
            previous=self.record.digest,
            change=self.order,
            holders=[replace(old, commitment=new.commitment) for old, new in zip(before.holders, told, strict=True)],
        )
        raw: bytes = self.world.signed(key_manifests, "key", replace(manifest, **changes), COORDINATOR)
        return raw

    def renew(
        self,
        name: str,
        deals: Mapping[str, Dealt],
        statements: Mapping[str, bytes],
        manifest: bytes = b"",
        sender: str = COORDINATOR,
        **changes: Any,
    ) -> bytes:
        place = self.names.index(name)
        fields = {
            "manifest": manifest or self.manifest(statements),
            "deals": [each.statement for each in deals.values()],
            "parts": [each.parts[place] for each in deals.values()],
            "statements": list(statements.values()),
            "aborts": [],
            **changes,
        }
        return self.nodes[name].renewer.renew(self.lane, ShareRenew(**fields), self.member(sender)).receipt

    def prepared(self) -> tuple[KeyRecord, bytes]:
        """All holders have the next epoch prepared: its record and certificate."""
        deals = self.deals()
        statements = self.statements(deals)
        manifest = self.manifest(statements)
        receipts = [self.renew(name, deals, statements, manifest) for name in self.names]
        record = read_key_manifest(manifest)
        return record, self.certificate(record, receipts)

    def certificate(self, record: KeyRecord, receipts: Sequence[bytes]) -> bytes:
        body = CommitCertificate(self.key_id, record.digest, list(receipts))
        raw: bytes = self.world.signed(certificates, "certificate", body, "balancer")
        return raw

    def commit(self, names: Sequence[str], certificate: bytes) -> None:
        for name in names:
            self.nodes[name].holder.commit(ShareCommit(self.key_id, certificate))

    def refreshed(self) -> tuple[KeyRecord, bytes]:
        record, certificate = self.prepared()
        self.commit(self.names, certificate)
        self.order = self.new_order()
        return record, certificate

    def is_key(self, shares: Sequence[Share]) -> bool:
        manifest = self.dealt.manifest
        secret = reconstruct_key(shares, threshold=manifest.threshold)
        return check_value(secret, manifest.key_context) == manifest.check_value


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token)
    yield made
    made.close()


# --- a refresh ---


def test_a_refresh_keeps_the_key_and_replaces_every_share(scene: Scene) -> None:
    """Old and new shares each give the key, and no mixture of them does."""
    old = {name: node.share() for name, node in scene.nodes.items()}
    record, certificate = scene.refreshed()
    new = {name: node.share() for name, node in scene.nodes.items()}
    assert scene.is_key(list(old.values())[:3])
    assert scene.is_key(list(new.values())[:3])
    assert scene.is_key(list(new.values())[2:])
    assert not any(old[name] == new[name] for name in old)
    assert not scene.is_key([old["node1"], old["node2"], new["node3"]])
    assert not scene.is_key([old["node1"], new["node2"], new["node3"]])
    assert (record.manifest.epoch, len(open_certificate(certificate, record, scene.world.cluster))) == (2, 5)
    for _ in range(2):
        scene.refreshed()
    assert scene.record.manifest.epoch == 4
    assert scene.is_key([node.share() for node in scene.nodes.values()][1:4])


def test_nothing_of_the_old_share_is_left_in_the_store(scene: Scene) -> None:
    """Row, file and log hold no byte of the sealed share of the epoch before. Before the commit they do."""

    def found(blob: bytes) -> bool:
        return any(blob in path.read_bytes() for path in scene.path.glob("node2.db*"))

    old = scene.nodes["node2"].entry.row.sealed
    _, certificate = scene.prepared()
    new = scene.nodes["node2"].catalogue.next_of(scene.key_id)
    assert new is not None
    assert found(old[40:72])
    scene.commit(["node2"], certificate)
    assert not found(old[40:72])
    assert found(new.row.sealed[40:72])
    assert scene.nodes["node2"].epochs() == {2: "committed"}


def test_until_the_last_step_nothing_is_kept(scene: Scene) -> None:
    deals = scene.deals()
    statements = scene.statements(deals)
    for node in scene.nodes.values():
        assert node.epochs() == {1: "committed"}
    scene.renew("node2", deals, statements)
    assert scene.nodes["node2"].epochs() == {1: "committed", 2: "prepared"}
    assert scene.nodes["node2"].share() == Share(2, scene.dealt.offers["node2"].y)


def test_both_rows_survive_a_restart_and_either_can_come_of_it(scene: Scene) -> None:
    record, certificate = scene.prepared()
    for node in scene.nodes.values():
        node.restart()
        assert node.entry.row.epoch == 1
        assert [each.row.epoch for each in node.catalogue.prepared()] == [2]
    scene.nodes["node1"].holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    scene.nodes["node1"].restart()
    assert scene.nodes["node1"].entry.row.epoch == 1
    assert scene.nodes["node1"].catalogue.prepared() == []  # nobody is asked about it any more
    scene.commit(["node2"], certificate)
    scene.nodes["node2"].restart()
    assert scene.nodes["node2"].entry.record.digest == record.digest
    assert scene.nodes["node2"].catalogue.next_of(scene.key_id) is None


def test_a_step_can_be_asked_again(scene: Scene) -> None:
    """The same statement and receipt come of the same messages, so a lost reply does no harm."""
    deals = scene.deals()
    assert read_unverified(scene.state("node3", deals)).payload == read_unverified(scene.state("node3", deals)).payload
    statements = scene.statements(deals)
    manifest = scene.manifest(statements)
    first = scene.renew("node3", deals, statements, manifest)
    again = scene.renew("node3", deals, statements, manifest)
    record = read_key_manifest(manifest)
    assert {open_receipt(raw, record, scene.world.cluster) for raw in (first, again)} == {"node3"}


# --- what a dealer can lie about ---


def zero(scene: Scene, threshold: int = 3) -> list[Share]:
    length = len(scene.nodes["node1"].share().y) + FINGERPRINT_BYTES
    return deal_zero(length, threshold=threshold, xs=[holder.x for holder in scene.dealt.manifest.holders])


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


def constant(scene: Scene) -> list[Share]:
    """Shares the key's first byte with 1 added to it."""
    return [Share(each.x, flipped(each.y, 0)) for each in zero(scene)]


def too_high(scene: Scene) -> list[Share]:
    """A degree that would need one share more from now on."""
    return zero(scene, threshold=4)


def one_wrong(scene: Scene) -> list[Share]:
    """One holder's share would be worthless."""
    return [each if each.x != 4 else Share(4, flipped(each.y, 20)) for each in zero(scene)]


def false_mask(scene: Scene) -> list[Share]:
    return [each if each.x != 4 else Share(4, flipped(each.y, len(each.y) - 1)) for each in zero(scene)]


def masked(scene: Scene) -> list[Share]:
    """A constant, and in the mask the same one: as if the weights were all 1."""
    return [Share(each.x, flipped(flipped(each.y, 0), len(each.y) - 1)) for each in zero(scene)]


@pytest.mark.parametrize("lie", [constant, too_high, one_wrong, false_mask, masked])
def test_a_dealer_that_does_not_share_zero_is_named(scene: Scene, lie: Callable[[Scene], list[Share]]) -> None:
    """The check finds it, and no holder stores what would come of it."""
    deals = scene.deals(node2=scene.false_deal("node2", lie(scene)))
    statements = scene.statements(deals)
    with pytest.raises(BadDeal) as caught:
        scene.check(deals, statements)
    assert caught.value.holders[0] == "node2"
    if lie in (one_wrong, false_mask):
        assert caught.value.holders == ("node2", "node4")
    for name in scene.names:
        with pytest.raises(BadDeal):
            scene.renew(name, deals, statements)
        assert scene.nodes[name].epochs() == {1: "committed"}


def test_a_part_that_is_not_the_one_committed_to_names_its_dealer(scene: Scene) -> None:
    """Another update for one holder, however it is sealed."""
    good, other = scene.deal("node2"), scene.deal("node2")
    deals = scene.deals(node2=Dealt(good.statement, [*good.parts[:3], other.parts[3], *good.parts[4:]]))
    assert scene.state("node1", deals)
    with pytest.raises(BadDeal, match="not the one it committed to") as caught:
        scene.state("node4", deals)
    assert caught.value.holders == ("node2",)


def test_a_part_of_another_length_names_its_dealer(scene: Scene) -> None:
    short = [Share(each.x, each.y[:-1]) for each in zero(scene)]
    deals = scene.deals(node3=scene.false_deal("node3", short))
    with pytest.raises(BadDeal, match="node3 dealt node1 79 bytes"):
        scene.state("node1", deals)


def test_a_part_opens_for_its_holder_alone(scene: Scene) -> None:
    """Not for another holder, not as the part of another dealer, and not in another attempt."""
    deals = scene.deals()
    raws = [each.statement for each in deals.values()]
    opened = open_deals(scene.terms, raws, scene.world.cluster)
    parts = [each.parts[3] for each in deals.values()]
    old = scene.nodes["node4"].share()
    mine, theirs = (Opener(scene.world.curve_key(name).private_bytes_raw()) for name in ("node4", "node1"))
    assert new_share(scene.terms, opened, parts, old, "node4", mine)
    with pytest.raises(BadDeal, match="does not open"):
        new_share(scene.terms, opened, parts, old, "node4", theirs)
    with pytest.raises(BadDeal, match="does not open"):
        new_share(scene.terms, opened, parts[::-1], old, "node4", mine)
    later = dataclasses.replace(scene.terms, attempt=scene.terms.attempt + 1)
    with pytest.raises(BadDeal, match="does not open"):
        new_share(later, opened, parts, old, "node4", mine)
    with pytest.raises(ManifestError, match="holds no share"):
        new_share(scene.terms, opened, parts, old, "node3", mine)


def test_no_changed_byte_of_a_part_or_statement_is_accepted(scene: Scene) -> None:
    """One bit at each of 600 places of a sealed part and of a statement."""
    deals = scene.deals()
    part, statement = deals["node2"].parts[0], deals["node2"].statement
    for place in range(0, len(part), max(1, len(part) // 300)):
        false = Dealt(statement, [flipped(part, place), *deals["node2"].parts[1:]])
        with pytest.raises(BadDeal):
            scene.state("node1", {**deals, "node2": false})
    for place in range(0, len(statement), max(1, len(statement) // 300)):
        false = Dealt(flipped(statement, place), deals["node2"].parts)
        with pytest.raises((ManifestError, ProtocolError)):
            scene.state("node1", {**deals, "node2": false})


def test_the_value_of_a_deal_does_not_depend_on_the_other_deals(scene: Scene) -> None:
    """Else a coordinator could ask for many linear forms of one update, and solve for it."""
    deals = scene.deals()
    others = {**deals, "node2": scene.deal("node2"), "node3": scene.deal("node3")}
    told = [refresh_parts.decode(read_unverified(scene.state("node5", each)).payload) for each in (deals, others)]
    assert told[0].values[0] == told[1].values[0]
    assert told[0].values[1] != told[1].values[1]
    assert told[0].deals != told[1].deals


@pytest.mark.parametrize(
    ("choose", "match"),
    [
        (lambda deals: list(deals.values())[:2], "2 deals"),
        (lambda deals: [*deals.values(), *deals.values()][:4], "4 deals"),
        (lambda deals: [deals["node1"], deals["node1"], deals["node2"]], "not in the manifest's order"),
        (lambda deals: [deals["node2"], deals["node1"], deals["node3"]], "not in the manifest's order"),
    ],
)
def test_exactly_t_dealers_each_once_and_in_order(
    scene: Scene, choose: Callable[[dict[str, Dealt]], list[Dealt]], match: str
) -> None:
    """With fewer, those who collude could be all of them, and know every update."""
    chosen = choose(scene.deals())
    with pytest.raises(ManifestError, match=match):
        scene.state("node4", {str(i): each for i, each in enumerate(chosen)})


# --- what a holder can lie about ---


@pytest.mark.parametrize("liar", ["node1", "node4"])
def test_a_holder_that_lies_about_a_value_is_named_with_its_dealer(scene: Scene, liar: str) -> None:
    deals = scene.deals()
    statements = scene.statements(deals)
    told = refresh_parts.decode(read_unverified(statements[liar]).payload)
    false = replace(told, values=[flipped(told.values[0], 3), *told.values[1:]])
    statements[liar] = scene.world.signed(refresh_parts, "refresh.part", false, liar)
    with pytest.raises(BadDeal) as caught:
        scene.check(deals, statements)
    assert caught.value.holders == ("node1", liar)[: 2 if liar != "node1" else None]
    with pytest.raises(BadDeal):
        scene.renew("node2", deals, statements)


@pytest.mark.parametrize("field", ["attempt", "epoch", "version", "x", "deals", "key_id"])
def test_a_statement_of_something_else_is_refused(scene: Scene, field: str) -> None:
    deals = scene.deals()
    statements = scene.statements(deals)
    told = refresh_parts.decode(read_unverified(statements["node3"]).payload)
    value = getattr(told, field)
    false = replace(told, **{field: value + 1 if isinstance(value, int) else flipped(value, 0)})
    statements["node3"] = scene.world.signed(refresh_parts, "refresh.part", false, "node3")
    with pytest.raises(ManifestError, match=r"of another refresh|not for its share"):
        scene.renew("node2", deals, statements)


def test_statements_of_strangers_twice_or_out_of_order_are_refused(scene: Scene) -> None:
    deals = scene.deals()
    good = scene.statements(deals)
    told = read_unverified(good["node3"]).payload
    for changed, match in (
        ({**good, "node3": sign_envelope("refresh.part", 1, told, scene.world.stranger)}, "may not sign"),
        ({**good, "node3": sign_envelope("refresh.part", 1, told, scene.world.keys["balancer"])}, "may not sign"),
        ({**good, "node3": good["node2"]}, "not one of each holder"),
        ({name: good[name] for name in reversed(scene.names)}, "not one of each holder"),
        ({name: good[name] for name in scene.names[:4]}, "not one of each holder"),
    ):
        with pytest.raises(ManifestError, match=match):
            scene.renew("node1", deals, changed, scene.manifest(good))


# --- what a coordinator can lie about ---


def wrong_commitment(scene: Scene) -> dict[str, Any]:
    holders = scene.record.manifest.holders
    return {"holders": [*holders[:4], replace(holders[4], commitment=bytes(32))]}


MANIFESTS: dict[str, tuple[Callable[[Scene], dict[str, Any]], str]] = {
    "predecessor": (lambda scene: {"previous": bytes(32)}, "does not follow"),
    "no predecessor": (lambda scene: {"previous": b""}, "names no predecessor"),
    "epoch": (lambda scene: {"epoch": 3}, "differs from the client's refresh order"),
    "first again": (lambda scene: {"epoch": 1}, "the first one has no predecessor"),
    "threshold": (lambda scene: {"threshold": 2}, "differs from the client's order"),
    "check value": (lambda scene: {"check_value": bytes(32)}, "can't change check_value"),
    "holders": (lambda scene: {"holders": scene.record.manifest.holders[::-1]}, "can't change the holders"),
    "commitment": (wrong_commitment, r"commits 'node[0-9]' to another share"),
    "order": (lambda scene: {"change": scene.world.refresh_order(scene.record)}, "of another refresh"),
    "attempt": (lambda scene: {"attempt": scene.attempt + 1}, "of another refresh"),
    "earlier attempt": (lambda scene: {"attempt": 1}, "was given out before"),
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_manifest_that_is_not_the_next_one_is_refused(scene: Scene, what: str) -> None:
    change, match = MANIFESTS[what]
    deals = scene.deals()
    statements = scene.statements(deals)
    with pytest.raises(ManifestError, match=match):
        scene.renew("node2", deals, statements, scene.manifest(statements, **change(scene)))
    assert scene.nodes["node2"].epochs() == {1: "committed"}


def test_who_may_coordinate(scene: Scene) -> None:
    deals = scene.deals()
    statements = scene.statements(deals)
    with pytest.raises(AccessDenied, match="sends the manifest of"):
        scene.renew("node2", deals, statements, sender="node3")
    small = Scene(scene.world, scene.path / "small", scene.lane, scene.token, 2, 3) if _made(scene) else scene
    message = ShareDeal(small.order, small.attempt, small.record.digest, b"")
    with pytest.raises(AccessDenied, match="is no holder"):
        small.nodes["node1"].renewer.deal(small.lane, message, small.member("node5"))
    small.close()


def _made(scene: Scene) -> bool:
    (scene.path / "small").mkdir()
    return True


ORDERS: dict[str, tuple[dict[str, Any], type[EngineError], str]] = {
    "without the right": ({"client": "bob"}, AccessDenied, "may not refresh"),
    "with other rights": ({"client": "carol"}, AccessDenied, "may not refresh"),
    "a node's": ({"client": "node1"}, ManifestError, "may not sign"),
    "expired": ({"expires_in_ms": -6_000}, ManifestError, "expired"),
    "too long": ({"expires_in_ms": 3_600_000}, ManifestError, "the limit is"),
    "of an epoch to come": ({"from_epoch": 2}, StaleKey, "holds 1"),
    "of another key": ({"key_id": b"x" * 16}, StaleKey, "no committed key"),
    "of another name": ({"name": "others"}, StaleKey, "no committed key"),
}


@pytest.mark.parametrize("what", ORDERS)
def test_an_order_that_is_none_starts_nothing(scene: Scene, what: str) -> None:
    changes, kind, match = ORDERS[what]
    scene.order = scene.new_order(**changes)
    with pytest.raises(kind, match=match):
        scene.deal("node2")


def test_an_order_is_good_for_one_epoch(scene: Scene) -> None:
    """Carried out, it is refused: neither a deal, nor a statement, nor the old messages again."""
    deals = scene.deals()
    statements = scene.statements(deals)
    manifest = scene.manifest(statements)
    receipts = [scene.renew(name, deals, statements, manifest) for name in scene.names]
    scene.commit(scene.names, scene.certificate(read_key_manifest(manifest), receipts))
    with pytest.raises(StaleKey, match="holds 2"):
        scene.deal("node2")
    with pytest.raises(StaleKey, match="holds 2"):
        scene.state("node2", deals)
    with pytest.raises(StaleKey, match="holds 2"):
        scene.renew("node2", deals, statements, manifest)


def test_a_coordinator_s_first_manifest_is_no_way_around(scene: Scene) -> None:
    """``share.prepare`` stores first epochs alone."""
    _, certificate = scene.prepared()
    row = scene.nodes["node2"].catalogue.next_of(scene.key_id)
    assert row is not None
    body = SharePrepare(row.row.manifest, 2, bytes(64), bytes(32), [])
    with pytest.raises(ManifestError, match="comes by a refresh or reshare"):
        scene.nodes["node2"].holder.prepare(scene.lane, body, scene.member(COORDINATOR))
    scene.commit(["node2"], certificate)


# --- attempts ---


def test_a_later_attempt_needs_the_notice_on_the_earlier(scene: Scene) -> None:
    scene.prepared()
    given_up = scene.attempt
    scene.attempt += 1
    scene.terms = dataclasses.replace(scene.terms, before=scene.record, attempt=scene.attempt)
    deals = scene.deals()
    statements = scene.statements(deals)
    with pytest.raises(ManifestError, match=f"attempt {given_up} is neither committed nor aborted"):
        scene.renew("node2", deals, statements)
    notice = scene.world.abort(scene.key_id, given_up)
    assert scene.renew("node2", deals, statements, aborts=[notice])
    coming = scene.nodes["node2"].catalogue.next_of(scene.key_id)
    assert coming is not None
    assert coming.row.attempt == scene.attempt
    assert scene.nodes["node2"].epochs() == {1: "committed", 2: "prepared"}


def test_notices_on_other_attempts_delete_nothing(scene: Scene) -> None:
    scene.prepared()
    for attempt in (1, scene.attempt + 1):
        scene.nodes["node2"].holder.abort(scene.world.abort(scene.key_id, attempt))
    assert scene.nodes["node2"].epochs() == {1: "committed", 2: "prepared"}


def test_an_attempt_that_was_given_out_before_is_refused(scene: Scene) -> None:
    """A registry that fell back to an older state begins to count anew."""
    scene.refreshed()
    scene.attempt -= 1
    with pytest.raises(ManifestError, match="the registry has fallen back"):
        scene.deal("node2")


# --- certificates ---


@pytest.mark.parametrize("missing", [1, 2])
def test_a_certificate_without_all_holders_is_none(scene: Scene, missing: int) -> None:
    """Nobody erases an old share before all have a new one."""
    record, certificate = scene.prepared()
    told = certificates.decode(read_unverified(certificate).payload)
    short = scene.certificate(record, told.receipts[missing:])
    with pytest.raises(ManifestError, match=f"{5 - missing} receipts, 5 are needed"):
        scene.commit(["node2"], short)
    doubled = scene.certificate(record, [*told.receipts[1:], told.receipts[1]])
    with pytest.raises(ManifestError, match="4 receipts, 5 are needed"):
        scene.commit(["node2"], doubled)
    assert scene.nodes["node2"].epochs() == {1: "committed", 2: "prepared"}


def test_old_certificates_change_nothing(scene: Scene) -> None:
    first = scene.nodes["node2"].entry.row.certificate
    _, certificate = scene.refreshed()
    scene.commit(["node2"], first)
    scene.commit(["node2"], certificate)
    assert scene.nodes["node2"].epochs() == {2: "committed"}


def test_who_missed_the_certificate_learns_it_from_a_combiner(scene: Scene) -> None:
    record, certificate = scene.prepared()
    scene.commit(["node1"], certificate)
    holder = scene.nodes["node3"].holder
    key = scene.dealt
    old = scene.world.grant(key, "node1")
    assert holder.release(scene.lane, ShareRelease(scene.key_id, old, b""), scene.member("node1")).x == 3
    new = scene.world.grant(key, "node1", epoch=2)
    with pytest.raises(StaleKey, match="epoch 2"):
        holder.release(scene.lane, ShareRelease(scene.key_id, new, b""), scene.member("node1"))
    released = holder.release(scene.lane, ShareRelease(scene.key_id, new, certificate), scene.member("node1"))
    assert Share(released.x, released.y) == scene.nodes["node3"].share()
    assert scene.nodes["node3"].entry.record.digest == record.digest
    with pytest.raises(StaleKey, match="epoch 1"):
        holder.release(scene.lane, ShareRelease(scene.key_id, old, b""), scene.member("node1"))


def test_who_missed_the_certificate_learns_it_from_the_next_refresh(scene: Scene) -> None:
    _, certificate = scene.prepared()
    scene.commit([name for name in scene.names if name != "node3"], certificate)
    scene.order = scene.new_order()
    with pytest.raises(StaleKey, match="holds 1"):
        scene.deal("node3")
    assert scene.deal("node3", certificate=certificate).parts
    assert scene.nodes["node3"].epochs() == {2: "committed"}


def books(scene: Scene, record: KeyRecord, certificate: bytes) -> SyncEntry:
    return SyncEntry(scene.key_id, "committed", record.raw, certificate, b"", b"")


def test_who_missed_the_certificate_learns_it_from_the_books(scene: Scene) -> None:
    record, certificate = scene.prepared()
    first = books(scene, scene.record, scene.nodes["node3"].entry.row.certificate)
    for _ in range(2):
        assert scene.nodes["node3"].holder.catch_up(books(scene, record, certificate)) == []
        assert scene.nodes["node3"].epochs() == {2: "committed"}
    # A registry that fell back tells of the epoch before.
    assert scene.nodes["node3"].holder.catch_up(first) == []
    assert scene.nodes["node3"].epochs() == {2: "committed"}


def test_there_are_no_two_of_one_epoch(scene: Scene) -> None:
    """Another manifest of the same epoch, with all receipts, as after a registry fell back, is refused."""
    _, other_certificate = scene.prepared()
    other = scene.nodes["node1"].catalogue.next_of(scene.key_id)
    assert other is not None
    for node in scene.nodes.values():
        node.holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    scene.order = scene.new_order()
    record, certificate = scene.prepared()
    scene.commit(["node3"], certificate)
    with pytest.raises(ManifestError, match="two manifests of epoch 2"):
        scene.nodes["node3"].holder.catch_up(books(scene, other.record, other_certificate))
    scene.commit(["node3"], other_certificate)
    assert scene.nodes["node3"].entry.record.digest == record.digest


def test_a_registry_that_lies_to_some_holders_costs_no_share(scene: Scene) -> None:
    """It has everybody's receipts, tells some that the attempt was aborted, and gives others the certificate.

    The others' certificate, which comes with the next request of a combiner, puts it right.
    """
    record, certificate = scene.prepared()
    for name in ("node1", "node2", "node3"):
        scene.nodes[name].holder.abort(scene.world.abort(scene.key_id, scene.attempt))
    scene.commit(["node4", "node5"], certificate)
    for name in ("node1", "node2", "node3"):
        scene.nodes[name].restart()
        grant = scene.world.grant(scene.dealt, "node4", epoch=2)
        body = ShareRelease(scene.key_id, grant, certificate)
        scene.nodes[name].holder.release(scene.lane, body, scene.member("node4"))
        assert scene.nodes[name].epochs() == {2: "committed"}
        assert scene.nodes[name].entry.record.digest == record.digest
    assert scene.is_key([node.share() for node in scene.nodes.values()][:3])


def test_a_share_is_not_erased_without_its_successor(scene: Scene) -> None:
    """Books with a true certificate of an epoch that this node has no share of: the old one stays, and is not used."""
    record, certificate = scene.prepared()
    node = scene.nodes["node3"]
    before = node.share()
    coming = node.catalogue.next_of(scene.key_id)
    assert coming is not None
    node.store.delete(coming.row)
    node.restart()
    for _ in range(2):
        assert node.holder.catch_up(books(scene, record, certificate)) == []
        assert node.rows() == {1: ("committed", True), 2: ("committed", False)}
        with pytest.raises(QuorumUnavailable, match="holds no share"):
            node.share()
        node.restart()
    first = Catalogue([row for row in node.store.rows() if row.epoch == 1]).by_id(scene.key_id)
    assert node.holder.own_share(node.lane, first)[0] == before


def test_a_node_without_a_share_says_so(scene: Scene) -> None:
    """It missed the creation and only knows the key: there is nothing to renew."""
    node = scene.nodes["node3"]
    node.catalogue.put(node.store.put(dataclasses.replace(node.entry.row, sealed=b"")))
    with pytest.raises(QuorumUnavailable, match="has no share") as caught:
        scene.deal("node3")
    assert caught.value.missing == ("node3",)


def test_destruction_takes_both_epochs(scene: Scene) -> None:
    _, certificate = scene.prepared()
    node = scene.nodes["node2"]
    sealed = [row.sealed for row in node.store.rows()]
    order = scene.world.destroy_order(scene.key_id, "orders")
    node.holder.destroy(Destroy(order))
    assert node.epochs() == {1: "destroyed"}
    assert node.catalogue.prepared() == []
    for path in scene.path.glob("node2.db*"):
        assert not any(blob[40:72] in path.read_bytes() for blob in sealed)
    with pytest.raises(StaleKey, match="was destroyed"):
        scene.commit(["node2"], certificate)
    with pytest.raises(StaleKey):
        scene.deal("node2")


# --- the coordinator ---


class Carrier:
    """What the coordinator talks to: the holders in this process, and a registry that gives out attempts."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.verbs: list[str] = []
        self.given_up: list[int] = []
        self.false: dict[tuple[str, str], Callable[[Any], Any]] = {}
        """(verb, holder) -> what becomes of its reply, or an error in its place."""

    def ask_registry(self, channel: object, verb: str, message: Any, deadline_s: float) -> Any:
        self.verbs.append(verb)
        if verb == REGISTRY_CHANGE:
            return Reserved(self.scene.attempt, list(self.scene.names), [], b"", b"")
        assert verb == REGISTRY_COMMIT
        record = read_key_manifest(message.manifest)
        self.certificate = self.scene.certificate(record, message.receipts)
        return type("Committed", (), {"certificate": self.certificate})()

    def ask_all(self, channel: object, verb: str, bodies: dict[str, bytes], *rest: object) -> Iterator[tuple[str, Any]]:
        self.verbs.append(verb)
        for name, body in bodies.items():
            if verb == SHARE_COMMIT:
                yield name, self.scene.nodes[name].holder.commit(REQUEST_CODECS[verb].decode(body))
                continue
            renewer = self.scene.nodes[name].renewer
            step = {SHARE_DEAL: renewer.deal, SHARE_REFRESH: renewer.refresh, SHARE_RENEW: renewer.renew}[verb]
            try:
                reply: Any = step(self.scene.lane, REQUEST_CODECS[verb].decode(body), self.scene.member(COORDINATOR))
                reply = self.false.get((verb, name), lambda each: each)(reply)
            except EngineError as error:
                reply = error
            yield name, reply

    def give_up(self, channel: object, name: str, attempt: Any, holders: Any, error: Exception) -> bytes:
        self.given_up.append(attempt.attempt)
        raise error


@pytest.fixture
def carrier(scene: Scene) -> Carrier:
    return Carrier(scene)


def coordinate(scene: Scene, carrier: Carrier) -> Any:
    node = scene.nodes[COORDINATOR]
    coordinator = Coordinator(
        scene.world.cluster,
        scene.world.keys[COORDINATOR],
        node.catalogue,
        carrier,  # type: ignore[arg-type]
        node.orders,
        scene.world.clock,
        lambda: 0.0,
    )
    talker: Any = type("Talker", (), {"channel": None})()
    return coordinator.change(talker, scene.order, 10.0)


def test_the_coordinator_takes_every_step_once(scene: Scene, carrier: Carrier) -> None:
    described = coordinate(scene, carrier)
    steps = [SHARE_DEAL, SHARE_REFRESH, SHARE_RENEW]
    assert carrier.verbs == [REGISTRY_CHANGE, *steps, REGISTRY_COMMIT, SHARE_COMMIT]
    assert (scene.record.raw, scene.record.manifest.epoch) == (described.manifest, 2)
    assert all(node.epochs() == {2: "committed"} for node in scene.nodes.values())
    assert not carrier.given_up
    again = coordinate(scene, carrier)  # the same order: the epoch that it names is past
    assert again.manifest == described.manifest
    assert len(carrier.verbs) == 6


def test_a_false_dealer_is_left_out(scene: Scene, carrier: Carrier) -> None:
    """Two of five lie, one by its sharing and one by a part; the other three carry the refresh."""
    wrong = scene.false_deal("node2", constant(scene))
    carrier.false[SHARE_DEAL, "node2"] = lambda _: wrong
    carrier.false[SHARE_DEAL, "node3"] = lambda dealt: Dealt(dealt.statement, [dealt.parts[1], *dealt.parts[1:]])
    coordinate(scene, carrier)
    assert carrier.verbs.count(SHARE_REFRESH) == 3
    assert scene.record.manifest.epoch == 2
    assert scene.is_key([node.share() for node in scene.nodes.values()][2:])


def test_too_many_false_dealers_are_named_and_change_nothing(scene: Scene, carrier: Carrier) -> None:
    for name in ("node1", "node2", "node4"):
        wrong = scene.false_deal(name, constant(scene))
        carrier.false[SHARE_DEAL, name] = lambda _, wrong=wrong: wrong
    with pytest.raises(ShareCorrupt) as caught:
        coordinate(scene, carrier)
    assert caught.value.holders == ("node4",)
    assert carrier.given_up == [scene.attempt]
    assert scene.record.manifest.epoch == 1


@pytest.mark.parametrize("verb", [SHARE_DEAL, SHARE_REFRESH, SHARE_RENEW])
def test_a_holder_that_is_silent_at_any_step_is_named(scene: Scene, carrier: Carrier, verb: str) -> None:
    def silent(reply: Any) -> Any:
        raise NodeUnavailable("node4 is down")

    carrier.false[verb, "node4"] = silent
    with pytest.raises(QuorumUnavailable, match="a refresh needs all 5 holders") as caught:
        coordinate(scene, carrier)
    assert caught.value.missing == ("node4",)
    assert carrier.given_up == [scene.attempt]
    assert REGISTRY_COMMIT not in carrier.verbs
    assert all(node.entry.row.epoch == 1 for node in scene.nodes.values())


@pytest.mark.parametrize(("threshold", "shares", "fits"), [(3, 5, True), (5, 9, True), (2, 20, True), (13, 25, False)])
def test_what_does_not_fit_a_message_is_refused_before_it_begins(
    scene: Scene, threshold: int, shares: int, fits: bool
) -> None:
    """The share of a 4096-bit RSA key has about 2400 bytes."""
    holders = [replace(scene.record.manifest.holders[0], x=x + 1, node=f"node{x}") for x in range(shares)]
    manifest = replace(scene.record.manifest, threshold=threshold, holders=holders)
    record = KeyRecord(manifest, bytes(32), "node1", bytes(2_000))
    if fits:
        check_size(record, 2_450)
    else:
        with pytest.raises(ValueError, match=r"takes messages of [0-9]+ bytes, the limit is 65536"):
            check_size(record, 2_450)


def test_a_threshold_of_one_can_t_be_refreshed(world: Any, tmp_path: Path, lane: Lane, token: Token) -> None:
    scene = Scene(world, tmp_path, lane, token, threshold=1, shares=2)
    try:
        with pytest.raises(ValueError, match="threshold 1"):
            coordinate(scene, Carrier(scene))
    finally:
        scene.close()


def test_the_order_of_a_past_epoch_stands(scene: Scene) -> None:
    """Neither time nor the client's rights of today undo an epoch that exists."""
    record, _ = scene.refreshed()
    scene.world.now_ms += 3_600_000
    order, signed = open_refresh_order(record.manifest.change, scene.world.cluster, None)
    assert (order.from_epoch, signed.issuer) == (1, "alice")
    with pytest.raises(ManifestError, match="expired"):
        open_refresh_order(record.manifest.change, scene.world.cluster, scene.world.now_ms)


# --- a coordinator with the balancer's key ---


def test_an_attempt_has_one_manifest(scene: Scene) -> None:
    """A holder that gave its receipt for one gives none for another with the same number, aborted or not."""
    sets = [scene.deals(), scene.deals()]
    stated = [scene.statements(deals) for deals in sets]
    first, other = [scene.manifest(statements) for statements in stated]
    assert scene.renew("node2", sets[0], stated[0], first)
    for notices in ([], [scene.world.abort(scene.key_id, scene.attempt)]):
        with pytest.raises(ManifestError, match="was given out before"):
            scene.renew("node2", sets[1], stated[1], other, aborts=notices)
    assert scene.renew("node2", sets[0], stated[0], first)
    assert scene.renew("node3", sets[1], stated[1], other)


def test_an_attempt_that_others_count_on_being_given_up_stays_so(scene: Scene) -> None:
    """The statement on a later one is a pledge, kept over a restart: no receipt, no deal and no commit any more."""
    early, late = scene.attempt, scene.attempt + 1
    order, terms = scene.order, scene.terms
    deals = scene.deals()
    statements = scene.statements(deals)
    later_attempt(scene)
    scene.state("node2", scene.deals())
    scene.nodes["node2"].restart()
    assert scene.nodes["node2"].store.pledged(scene.key_id) == late
    scene.attempt, scene.order, scene.terms = early, order, terms
    for step in (
        lambda: scene.deal("node2"),
        lambda: scene.state("node2", deals),
        lambda: scene.renew("node2", deals, statements),
    ):
        with pytest.raises(ManifestError, match="was given out before"):
            step()
    assert scene.nodes["node2"].epochs() == {1: "committed"}


def later_attempt(scene: Scene) -> None:
    """Go on to the next attempt of the same order, as a registry does."""
    scene.attempt += 1
    scene.terms = dataclasses.replace(scene.terms, before=scene.record, attempt=scene.attempt)


def serving(scene: Scene, names: Sequence[str], epoch: int, certificate: bytes) -> list[Share]:
    """The shares of an epoch that a combiner gets of these holders under a client's fresh grants."""
    shares = []
    for name in names:
        grant = scene.world.grant(scene.dealt, COORDINATOR, epoch=epoch)
        try:
            body = ShareRelease(scene.key_id, grant, certificate)
            released = scene.nodes[name].holder.release(scene.lane, body, scene.member(COORDINATOR))
        except EngineError:
            continue
        shares.append(Share(released.x, released.y))
    return shares


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("committed", [2, 1])
def test_two_attempts_at_one_epoch_do_not_split_the_holders(scene: Scene, committed: int, early: bool) -> None:
    """One holder that coordinates, with the balancer's key, can't leave the four others without a common epoch.

    It has an attempt prepared by all, which so can commit; calls it aborted where that suits it, and has a later
    attempt take its place there; and commits the first one at the rest. Its own share it keeps to itself.
    """
    rest = scene.names[1:]
    record, certificate = scene.prepared()
    later_attempt(scene)
    deals = scene.deals()
    if early:
        scene.commit(rest[:committed], certificate)
    statements = {}
    for name in scene.names:
        try:
            statements[name] = scene.state(name, deals)
        except EngineError:
            assert early
    notice = scene.world.abort(scene.key_id, record.manifest.attempt)
    for name in rest[committed:]:
        if len(statements) == len(scene.names):
            scene.renew(name, deals, statements, aborts=[notice])
    scene.commit(rest, certificate)
    for node in scene.nodes.values():
        node.restart()
    certificates_of = {1: b"", 2: certificate}
    assert any(len(serving(scene, rest, epoch, certificates_of[epoch])) >= 3 for epoch in (1, 2))
