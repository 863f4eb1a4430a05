"""A holder checks everything for itself: with a real token, a real store and signed documents, each refusal once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import (
    AccessDenied,
    EngineError,
    KeyExists,
    ManifestError,
    Overloaded,
    ProtocolError,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
    TokenError,
    UnsupportedAlgorithm,
)
from engine.protocol.grant import GRANT_LIFETIME_MAX_MS
from engine.protocol.manifest import CLOCK_SKEW_MS, ORDER_LIFETIME_MAX_MS, open_receipt
from engine.protocol.requests import Destroy, Empty, ShareCommit, SharePrepare, ShareRelease, SyncEntry
from engine.sharing import Share, reconstruct_key
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.holder import ShareHolder
from nodes.ledger import RETRY_WINDOW_MS, GrantLedger
from nodes.limits import Limits
from nodes.store import ShareStore
from nodes.token import Lane, Token

ME, DEALER, OTHER = "node2", "node1", "node3"
EARLY_MS = ORDER_LIFETIME_MAX_MS + CLOCK_SKEW_MS + 1


class Scene:
    """One holder, node2, with the world around it."""

    def __init__(self, world: Any, path: Path, lane: Lane, algorithms: tuple[str, ...]) -> None:
        self.world = world
        self.path = path
        self.lane = lane
        self.algorithms = algorithms
        self.limits = Limits()
        self.monotonic_s = 0.0
        self.open()

    def open(self) -> None:
        """As a start of the node does."""
        self.store = ShareStore(self.path, ME, self.lane)
        self.catalogue = Catalogue(self.store.rows())
        clock = TrustedClock(self.store.clock_mark().mark_ms, wall_ms=self.world.clock, steady_ms=lambda: 0)
        self.ledger = GrantLedger(self.store, clock, self.limits, lambda: self.monotonic_s)
        self.holder = ShareHolder(
            self.world.cluster, self.world.keys[ME], self.store, self.catalogue, self.algorithms, self.ledger
        )

    def restart(self) -> None:
        self.store.close()
        self.open()

    def member(self, name: str) -> Any:
        return self.world.cluster.members[name]

    def prepare(self, dealt: Any, sender: str = DEALER, **changes: Any) -> bytes:
        offer = dealt.offers[ME]
        fields = {"manifest": offer.manifest, "x": offer.x, "y": offer.y, "salt": offer.salt, "aborts": offer.aborts}
        body = SharePrepare(**{**fields, **changes})
        return self.holder.prepare(self.lane, body, self.member(sender)).receipt

    def commit(self, dealt: Any, certificate: bytes | None = None) -> None:
        told = self.world.certificate(dealt) if certificate is None else certificate
        assert self.holder.commit(ShareCommit(dealt.key_id, told)) == Empty()

    def committed(self, *arguments: Any, **options: Any) -> Any:
        dealt = self.world.deal(*arguments, **options)
        self.prepare(dealt)
        self.commit(dealt)
        return dealt

    def release(self, dealt: Any, grant: bytes, sender: str = OTHER, certificate: bytes = b"") -> Any:
        return self.holder.release(self.lane, ShareRelease(dealt.key_id, grant, certificate), self.member(sender))

    def state(self, dealt: Any) -> str:
        row = self.store.get(dealt.key_id)
        return row.state if row else "none"

    def item(self, dealt: Any, state: str = "committed", certificate: bytes = b"", document: bytes = b"") -> SyncEntry:
        told = certificate or self.world.certificate(dealt)
        return SyncEntry(dealt.key_id, state, dealt.record.raw, told, document, b"")


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path / "shares.db", lane, token.algorithms)
    yield made
    made.store.close()


def offered(dealt: Any) -> tuple[int, bytes, bytes]:
    offer = dealt.offers[ME]
    return offer.x, offer.y, offer.salt


def released(answer: Any) -> tuple[int, bytes, bytes]:
    return answer.x, answer.y, answer.salt


# --- prepare ---


def test_a_prepared_share_is_sealed_stored_and_receipted(scene: Scene) -> None:
    dealt = scene.world.deal()
    receipt = scene.prepare(dealt)
    assert open_receipt(receipt, dealt.record, scene.world.cluster) == ME
    row = scene.store.get(dealt.key_id)
    assert row is not None
    assert (row.state, row.name, row.manifest, row.manifest_hash) == (
        "prepared",
        "orders",
        dealt.record.raw,
        dealt.record.digest,
    )
    assert dealt.offers[ME].y not in row.sealed
    assert scene.catalogue.by_name("orders") is None
    assert scene.catalogue.prepared()[0].row == row


def test_to_prepare_the_same_again_gives_another_receipt(scene: Scene) -> None:
    dealt = scene.world.deal()
    scene.prepare(dealt)
    assert open_receipt(scene.prepare(dealt), dealt.record, scene.world.cluster) == ME
    assert len(scene.store.rows()) == 1


def refused(scene: Scene, error: type[EngineError], match: str, dealt: Any, **options: Any) -> None:
    before = scene.store.rows()
    with pytest.raises(error, match=match):
        scene.prepare(dealt, **options)
    assert scene.store.rows() == before


def test_a_share_from_another_than_its_dealer_is_refused(scene: Scene) -> None:
    refused(scene, AccessDenied, "'node3' sends a share that 'node1' dealt", scene.world.deal(), sender=OTHER)


def test_a_share_that_does_not_match_its_commitment_is_refused(scene: Scene) -> None:
    dealt = scene.world.deal()
    _, y, _ = offered(dealt)
    for changes in (
        {"y": bytes([y[0] ^ 1]) + y[1:]},
        {"y": y + b"\0"},
        {"y": y[:-1]},
        {"salt": bytes(32)},
        {"y": dealt.offers[OTHER].y, "salt": dealt.offers[OTHER].salt},
    ):
        refused(scene, ShareCorrupt, "does not match its commitment", dealt, **changes)
    with pytest.raises(ShareCorrupt) as caught:
        scene.prepare(dealt, salt=bytes(32))
    assert caught.value.holders == (ME,)


def test_a_share_of_another_holders_x_is_refused(scene: Scene) -> None:
    dealt = scene.world.deal()
    other = dealt.offers[OTHER]
    refused(scene, ManifestError, "no share with x = 3", dealt, x=other.x, y=other.y, salt=other.salt)


def test_a_share_for_a_node_that_holds_none_is_refused(scene: Scene) -> None:
    dealt = scene.world.deal(holders=("node1", "node3", "node4"))
    dealt.offers[ME] = dealt.offers[OTHER]
    refused(scene, ManifestError, "gives 'node2' no share", dealt)


def test_an_algorithm_the_token_lacks_is_refused(scene: Scene) -> None:
    dealt = scene.world.deal("oaep", "rsa-2048-oaep-sha256")
    refused(scene, UnsupportedAlgorithm, "can't serve 'rsa-2048-oaep-sha256'", dealt)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "others"}, "differs from the client's order"),
        ({"algorithm": "aes-128-gcm"}, "differs from the client's order"),
        ({"threshold": 1}, "differs from the client's order"),
        ({"version": 2}, "differs from the client's order"),
        ({"epoch": 2}, "epoch 2 names no predecessor"),
        ({"previous": bytes(32)}, "the first one has no predecessor"),
        ({"public_key": b"x"}, "public key missing or out of place"),
    ],
)
def test_a_manifest_that_is_not_the_clients_order_is_refused(scene: Scene, changes: dict[str, Any], match: str) -> None:
    refused(scene, ManifestError, match, scene.world.deal(check=False, manifest=changes))


@pytest.mark.parametrize("dealer", ["alice", "balancer", "op"])
def test_a_manifest_dealt_by_no_node_is_refused(scene: Scene, dealer: str) -> None:
    refused(scene, ManifestError, f"'{dealer}' may not sign this", scene.world.deal(dealer=dealer, check=False))


def test_a_forged_manifest_is_refused(scene: Scene) -> None:
    forged = type(scene.world.stranger)(DEALER, scene.world.stranger._private)
    refused(scene, ManifestError, "signature of 'node1' is wrong", scene.world.deal(dealer=forged, check=False))
    dealt = scene.world.deal()
    raw = bytearray(dealt.record.raw)
    raw[len(raw) // 2] ^= 1
    with pytest.raises((ManifestError, ProtocolError)):
        scene.prepare(dealt, manifest=bytes(raw))


@pytest.mark.parametrize("client", ["bob", "carol"])
def test_an_order_its_client_may_not_give_is_refused(scene: Scene, client: str) -> None:
    key_id = os.urandom(16)
    order = scene.world.order("orders", "aes-256-gcm", 2, 3, key_id=key_id, client=client)
    dealt = scene.world.deal(order=order, key_id=key_id, check=False)
    refused(scene, AccessDenied, f"'{client}' may not generate the key 'orders'", dealt)


@pytest.mark.parametrize("signer", ["node1", "balancer", "op"])
def test_an_order_of_no_client_is_refused(scene: Scene, signer: str) -> None:
    key_id = os.urandom(16)
    order = scene.world.order("orders", "aes-256-gcm", 2, 3, key_id=key_id, client=signer)
    dealt = scene.world.deal(order=order, key_id=key_id, check=False)
    refused(scene, ManifestError, f"'{signer}' may not sign this", dealt)


def test_an_order_out_of_its_time_is_refused(scene: Scene) -> None:
    dealt = scene.world.deal()
    begun = scene.world.now_ms
    key_id = os.urandom(16)
    order = scene.world.order("early", "aes-256-gcm", 2, 3, key_id=key_id, expires_in_ms=EARLY_MS)
    early = scene.world.deal("early", order=order, key_id=key_id)
    refused(scene, ManifestError, "create order: expires in", early)
    scene.world.now_ms = begun + 60_000 + CLOCK_SKEW_MS
    scene.prepare(dealt)
    scene.world.now_ms += 1
    refused(scene, ManifestError, "create order: expired", dealt)


def test_another_key_of_a_taken_name_is_refused(scene: Scene) -> None:
    first = scene.committed()
    refused(scene, KeyExists, "the key 'orders' exists", scene.world.deal())
    assert scene.catalogue.by_name("orders").row.key_id == first.key_id


def test_two_keys_of_one_name_may_be_prepared_but_one_committed(scene: Scene) -> None:
    first, second = scene.world.deal(), scene.world.deal()
    scene.prepare(first)
    scene.prepare(second)
    scene.commit(first)
    with pytest.raises(KeyExists, match="exists with another id"):
        scene.commit(second)
    assert (scene.state(first), scene.state(second)) == ("committed", "prepared")


def again(scene: Scene, dealt: Any, **options: Any) -> Any:
    """Another attempt at the same order."""
    return scene.world.deal(order=dealt.order, key_id=dealt.key_id, attempt=2, **options)


def test_an_open_attempt_stands_in_the_way_until_its_abort_notice(scene: Scene) -> None:
    first = scene.world.deal()
    scene.prepare(first)
    refused(scene, ManifestError, "attempt 1 is neither committed nor aborted", again(scene, first))
    second = again(scene, first, aborts=[scene.world.abort(first.key_id)])
    scene.prepare(second)
    row = scene.store.get(first.key_id)
    assert row is not None
    assert (row.attempt, row.manifest_hash) == (2, second.record.digest)


@pytest.mark.parametrize("signer", ["node1", "alice", "op"])
def test_an_abort_notice_of_no_balancer_clears_nothing(scene: Scene, signer: str) -> None:
    first = scene.world.deal()
    scene.prepare(first)
    notice = scene.world.abort(first.key_id, signer=signer)
    refused(scene, ManifestError, f"'{signer}' may not sign this", again(scene, first, aborts=[notice]))
    with pytest.raises(ManifestError):
        scene.holder.abort(notice)
    assert scene.state(first) == "prepared"


def test_a_committed_or_destroyed_key_is_never_dealt_again(scene: Scene) -> None:
    dealt = scene.committed()
    notice = scene.world.abort(dealt.key_id, attempt=9)
    refused(scene, KeyExists, "is committed already", again(scene, dealt, aborts=[notice]))
    refused(scene, KeyExists, "is committed already", dealt)
    scene.holder.destroy(Destroy(scene.world.destroy_order(dealt.key_id, "orders")))
    refused(scene, KeyExists, "is destroyed already", again(scene, dealt, aborts=[notice]))
    refused(scene, KeyExists, "is destroyed already", dealt)


# --- commit ---


def test_a_certificate_makes_a_share_valid_and_a_restart_keeps_it(scene: Scene) -> None:
    dealt = scene.committed()
    scene.restart()
    entry = scene.catalogue.by_name("orders")
    assert entry is not None
    share, salt = scene.holder.own_share(scene.lane, entry)
    assert (share.x, share.y, salt) == offered(dealt)
    scene.commit(dealt)  # again is harmless


def not_committed(scene: Scene, error: type[EngineError], match: str, dealt: Any, certificate: bytes) -> None:
    with pytest.raises(error, match=match):
        scene.commit(dealt, certificate)
    assert scene.state(dealt) == "prepared"
    assert scene.catalogue.by_name(dealt.manifest.name) is None


def test_each_certificate_that_proves_too_little_is_refused(scene: Scene) -> None:
    world = scene.world
    dealt, other = world.deal(), world.deal("other")
    scene.prepare(dealt)
    three, two = ("node1", "node2", "node3"), ("node1", "node2")
    good = [world.receipt(dealt, node) for node in three]
    for certificate, match in (
        (world.certificate(dealt, two), "2 receipts, 3 are needed"),
        (world.certificate(dealt, given=[good[0], good[0], good[1]]), "2 receipts, 3 are needed"),
        (world.certificate(dealt, given=[*good[:2], world.receipt(other, "node3")]), "not for this manifest"),
        (world.certificate(dealt, given=[*good[:2], world.receipt(dealt, "node3", x=9)]), "not for this manifest"),
        (
            world.certificate(dealt, given=[*good[:2], world.receipt(dealt, "node3", signer="node4")]),
            "receipt of 'node4': not for this manifest",
        ),
        (world.certificate(dealt, given=[*good[:2], world.receipt(dealt, "node3", signer="alice")]), "may not sign"),
        (world.certificate(other), "not for this manifest"),
        (world.certificate(dealt, manifest_hash=bytes(32)), "not for this manifest"),
        (world.certificate(dealt, key_id=bytes(16)), "not for this manifest"),
        (world.certificate(dealt, signer="node1"), "'node1' may not sign this"),
        (world.certificate(dealt, signer="alice"), "'alice' may not sign this"),
        (world.abort(dealt.key_id), "came where a 'certificate' was expected"),
    ):
        not_committed(scene, ManifestError, match, dealt, certificate)
    not_committed(scene, ProtocolError, "signed envelope", dealt, b"\x00")
    not_committed(scene, ProtocolError, "signed envelope", dealt, b"")
    scene.commit(dealt)


def test_a_certificate_for_nothing_that_is_held_is_stale(scene: Scene) -> None:
    dealt = scene.world.deal()
    with pytest.raises(StaleKey, match="has no share of a key"):
        scene.commit(dealt)
    held = scene.committed("second")
    scene.holder.destroy(Destroy(scene.world.destroy_order(held.key_id, "second")))
    with pytest.raises(StaleKey, match="was destroyed on node2"):
        scene.commit(held)
    assert scene.state(held) == "destroyed"


# --- abort ---


def test_an_abort_notice_deletes_the_prepared_share_and_its_bytes(scene: Scene) -> None:
    dealt = scene.world.deal()
    scene.prepare(dealt)
    sealed = scene.store.get(dealt.key_id).sealed
    scene.holder.abort(scene.world.abort(dealt.key_id))
    assert scene.state(dealt) == "none"
    assert scene.catalogue.by_id(dealt.key_id) is None
    assert all(sealed[20:60] not in file.read_bytes() for file in scene.path.parent.iterdir())


def test_an_abort_of_an_earlier_attempt_or_another_key_deletes_nothing(scene: Scene) -> None:
    first = scene.world.deal()
    scene.prepare(again(scene, first))
    scene.holder.abort(scene.world.abort(first.key_id, attempt=1))
    scene.holder.abort(scene.world.abort(os.urandom(16)))
    assert scene.state(first) == "prepared"


def test_an_abort_never_deletes_a_committed_share(scene: Scene) -> None:
    dealt = scene.committed()
    scene.holder.abort(scene.world.abort(dealt.key_id, attempt=9))
    assert scene.state(dealt) == "committed"


# --- release ---


def test_a_share_goes_to_the_combiner_of_the_clients_grant(scene: Scene) -> None:
    dealt = scene.committed()
    answer = scene.release(dealt, scene.world.grant(dealt, OTHER))
    assert released(answer) == offered(dealt)
    mine = Share(answer.x, answer.y)
    other = Share(dealt.offers[OTHER].x, dealt.offers[OTHER].y)
    assert reconstruct_key([mine, other], threshold=2)[:-32] == dealt.key


GRANTS: dict[str, tuple[type[EngineError], str, Callable[[Any, Any], bytes]]] = {
    "wrong combiner": (AccessDenied, "is for the combiner 'node1', 'node3' asks", lambda w, d: w.grant(d, "node1")),
    "not a holder": (AccessDenied, "is for the combiner 'node5'", lambda w, d: w.grant(d, "node5")),
    "another key": (StaleKey, "for another key", lambda w, d: w.grant(w.deal("other"), OTHER)),
    "another key's id": (StaleKey, "for another key", lambda w, d: w.grant(d, OTHER, key_id=bytes(16))),
    "wrong epoch": (StaleKey, "version 1 epoch 2", lambda w, d: w.grant(d, OTHER, epoch=2)),
    "wrong version": (StaleKey, "version 0 epoch 1", lambda w, d: w.grant(d, OTHER, version=0)),
    "not yet valid": (
        ManifestError,
        "begins in",
        lambda w, d: w.grant(
            d, OTHER, not_before_ms=w.now_ms + CLOCK_SKEW_MS + 1, expires_ms=w.now_ms + CLOCK_SKEW_MS + 10
        ),
    ),
    "expired": (
        ManifestError,
        "expired",
        lambda w, d: w.grant(d, OTHER, not_before_ms=w.now_ms - 20_000, expires_ms=w.now_ms - CLOCK_SKEW_MS - 1),
    ),
    "too long-lived": (
        ManifestError,
        "lives 30001 ms, at most 30000",
        lambda w, d: w.grant(d, OTHER, expires_ms=w.now_ms + GRANT_LIFETIME_MAX_MS + 1),
    ),
    "unknown client": (
        ManifestError,
        "'stranger' may not sign this",
        lambda w, d: w.grant(d, OTHER, client=w.stranger),
    ),
    "client without any right": (AccessDenied, "'bob' may not encrypt", lambda w, d: w.grant(d, OTHER, client="bob")),
    "client without the right to this key": (
        AccessDenied,
        "'carol' may not encrypt",
        lambda w, d: w.grant(d, OTHER, client="carol"),
    ),
    "one operation of two is not allowed": (
        AccessDenied,
        "'carol' may not",
        lambda w, d: w.grant(d, OTHER, client="carol", operations=["encrypt", "decrypt"]),
    ),
    "an operation that uses no key": (
        AccessDenied,
        "may not destroy with the key",
        lambda w, d: w.grant(d, OTHER, operations=["destroy"]),
    ),
    "any operation": (AccessDenied, "may not \\* with the key", lambda w, d: w.grant(d, OTHER, operations=["*"])),
    "an unknown operation": (AccessDenied, "may not x with", lambda w, d: w.grant(d, OTHER, operations=["x"])),
    "no operation": (ProtocolError, "grant", lambda w, d: w.grant(d, OTHER, operations=[])),
    "balancer-signed": (ManifestError, "may not sign this", lambda w, d: w.grant(d, OTHER, client="balancer")),
    "node-signed": (ManifestError, "may not sign this", lambda w, d: w.grant(d, OTHER, client=OTHER)),
    "operator-signed": (ManifestError, "may not sign this", lambda w, d: w.grant(d, OTHER, client="op")),
    "forged": (
        ManifestError,
        "signature of 'alice' is wrong",
        lambda w, d: w.grant(d, OTHER, client=type(w.stranger)("alice", w.stranger._private)),
    ),
    "another document": (ManifestError, "came where a 'grant' was expected", lambda w, d: d.order),
    "none": (ProtocolError, "signed envelope", lambda w, d: b""),
    "garbage": (ProtocolError, "signed envelope", lambda w, d: os.urandom(200)),
}


@pytest.mark.parametrize("case", GRANTS)
def test_each_bad_grant_is_refused(scene: Scene, case: str) -> None:
    error, match, make = GRANTS[case]
    dealt = scene.committed()
    with pytest.raises(error, match=match):
        scene.release(dealt, make(scene.world, dealt))
    assert released(scene.release(dealt, scene.world.grant(dealt, OTHER))) == offered(dealt)


def test_a_grant_for_a_node_that_is_no_holder_is_refused_to_that_very_node(scene: Scene) -> None:
    dealt = scene.committed()
    with pytest.raises(AccessDenied, match="'node5' is no eligible combiner"):
        scene.release(dealt, scene.world.grant(dealt, "node5"), sender="node5")


def test_a_grant_of_the_right_length_is_good_to_its_last_millisecond(scene: Scene) -> None:
    dealt = scene.committed()
    begun = scene.world.now_ms
    grant = scene.world.grant(dealt, OTHER, expires_ms=begun + GRANT_LIFETIME_MAX_MS)
    early = scene.world.grant(dealt, OTHER, not_before_ms=begun + CLOCK_SKEW_MS + 1)
    with pytest.raises(ManifestError, match="begins in"):
        scene.release(dealt, early)
    scene.world.now_ms = begun + 1
    assert released(scene.release(dealt, early)) == offered(dealt)
    scene.world.now_ms = begun + GRANT_LIFETIME_MAX_MS + CLOCK_SKEW_MS
    assert released(scene.release(dealt, grant)) == offered(dealt)
    scene.world.now_ms += 1
    with pytest.raises(ManifestError, match="expired"):
        scene.release(dealt, grant)


def test_a_grant_is_good_once_and_asked_again_at_once_gets_the_same_share(scene: Scene) -> None:
    dealt = scene.committed()
    grant, other = scene.world.grant(dealt, OTHER), scene.world.grant(dealt, OTHER)
    for _ in range(3):
        assert released(scene.release(dealt, grant)) == offered(dealt)
    scene.monotonic_s += RETRY_WINDOW_MS / 1000
    with pytest.raises(AccessDenied, match="was used already"):
        scene.release(dealt, grant)
    assert released(scene.release(dealt, other)) == offered(dealt)
    scene.restart()
    for used in (grant, other):
        with pytest.raises(AccessDenied, match="was used already"):
            scene.release(dealt, used)


def test_another_grant_with_a_used_nonce_is_refused(scene: Scene) -> None:
    dealt, second = scene.committed(), scene.committed("second")
    nonce = os.urandom(16)
    scene.release(dealt, scene.world.grant(dealt, OTHER, nonce=nonce))
    for again in (
        scene.world.grant(dealt, OTHER, nonce=nonce, expires_ms=scene.world.now_ms + 10_001),
        scene.world.grant(dealt, OTHER, "decrypt", nonce=nonce),
    ):
        with pytest.raises(AccessDenied, match="another grant of 'alice' with this nonce"):
            scene.release(dealt, again)
    with pytest.raises(AccessDenied, match="another grant"):
        scene.release(second, scene.world.grant(second, OTHER, nonce=nonce))
    with pytest.raises(AccessDenied, match="another grant"):
        scene.release(dealt, scene.world.grant(dealt, DEALER, nonce=nonce), sender=DEALER)
    shared = scene.committed("shared/a")  # another client's nonces are its own
    assert released(scene.release(shared, scene.world.grant(shared, OTHER, client="carol", nonce=nonce)))


def test_a_grant_is_used_up_by_a_share_alone(scene: Scene) -> None:
    """What is refused for another reason leaves the grant good for the one it is for."""
    dealt = scene.committed()
    grant = scene.world.grant(dealt, OTHER)
    for sender in (DEALER, "node4"):
        with pytest.raises(AccessDenied):
            scene.release(dealt, grant, sender=sender)
    assert released(scene.release(dealt, grant)) == offered(dealt)


def test_the_use_of_a_grant_is_on_the_disk_before_the_share_is_opened(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = scene.committed()
    grant = scene.world.grant(dealt, OTHER)
    steps: list[str] = []
    note, own = scene.store.note_grants, scene.holder.own_share
    monkeypatch.setattr(scene.store, "note_grants", lambda *told: (note(*told), steps.append("written")))
    monkeypatch.setattr(scene.holder, "own_share", lambda *told: (steps.append("opened"), own(*told))[1])
    scene.release(dealt, grant)
    assert steps == ["written", "opened"]

    def full(*told: Any) -> None:
        raise TokenError("the disk is full")

    monkeypatch.setattr(scene.store, "note_grants", full)
    for _ in range(2):  # the same request again is no way around the disk
        with pytest.raises(TokenError, match="the disk is full"):
            scene.release(dealt, scene.world.grant(dealt, OTHER, nonce=bytes(16)))
    assert steps == ["written", "opened"]


def test_a_node_is_not_asked_for_its_share_by_its_own_key(scene: Scene) -> None:
    dealt = scene.committed()
    with pytest.raises(AccessDenied, match="'node2' is asked by its own key"):
        scene.release(dealt, scene.world.grant(dealt, ME), sender=ME)


def test_a_clock_set_back_makes_no_grant_and_no_order_good_again(scene: Scene) -> None:
    dealt = scene.committed()
    begun = scene.world.now_ms
    grant, used = scene.world.grant(dealt, OTHER), scene.world.grant(dealt, OTHER)
    order = scene.world.destroy_order(dealt.key_id, "orders", expires_in_ms=10_000)
    scene.release(dealt, used)
    scene.world.now_ms = begun + 15_001
    for _ in range(2):
        with pytest.raises(ManifestError, match="grant: it expired 5001 ms ago"):
            scene.release(dealt, grant)
        with pytest.raises(ManifestError, match="grant: it expired"):
            scene.release(dealt, used)
        with pytest.raises(ManifestError, match="destroy order: expired"):
            scene.holder.destroy(Destroy(order))
        scene.world.now_ms = begun
    assert "2027-01-15T08:00:00Z" in scene.ledger.clock.complaint()
    scene.ledger.flush()
    scene.restart()
    for each in (grant, used):
        with pytest.raises(ManifestError, match="grant: it expired"):
            scene.release(dealt, each)
    with pytest.raises(ManifestError, match="destroy order: expired"):
        scene.holder.destroy(Destroy(order))


@pytest.mark.parametrize("limit", ["client_per_s", "combiner_per_s", "total_per_s"])
def test_each_limit_on_releases_holds_and_lets_go_with_time(scene: Scene, limit: str) -> None:
    scene.limits = Limits(
        **{**dict.fromkeys(("client_per_s", "combiner_per_s", "total_per_s"), 1e6), limit: 2.0, "burst_s": 2}
    )
    scene.restart()
    dealt = scene.committed("shared/a")
    for _ in range(4):
        scene.release(dealt, scene.world.grant(dealt, OTHER))
    with pytest.raises(Overloaded, match=f"limits.{limit} = 2"):
        scene.release(dealt, scene.world.grant(dealt, OTHER))
    others = {
        "client_per_s": (OTHER, "carol"),
        "combiner_per_s": (DEALER, "alice"),
    }
    if limit in others:
        sender, client = others[limit]
        assert released(scene.release(dealt, scene.world.grant(dealt, sender, client=client), sender=sender))
    scene.monotonic_s += 0.5
    scene.release(dealt, scene.world.grant(dealt, OTHER))
    with pytest.raises(Overloaded):
        scene.release(dealt, scene.world.grant(dealt, OTHER))


def test_bad_grants_use_up_their_senders_limit_alone(scene: Scene) -> None:
    scene.limits = Limits(1.0, 1.0, 1.0, 5.0)
    scene.restart()
    dealt = scene.committed()
    forged = scene.world.grant(dealt, OTHER, client=type(scene.world.stranger)("alice", scene.world.stranger._private))
    for _ in range(5):
        with pytest.raises(ManifestError):
            scene.release(dealt, forged)
    with pytest.raises(Overloaded, match="'node3' asks for more shares"):
        scene.release(dealt, forged)
    assert released(scene.release(dealt, scene.world.grant(dealt, DEALER), sender=DEALER)) == offered(dealt)


def test_carol_may_grant_what_the_policy_gives_her(scene: Scene) -> None:
    dealt = scene.committed("shared/a")
    assert released(scene.release(dealt, scene.world.grant(dealt, OTHER, client="carol"))) == offered(dealt)
    with pytest.raises(AccessDenied, match="'carol' may not decrypt"):
        scene.release(dealt, scene.world.grant(dealt, OTHER, "decrypt", client="carol"))


def test_a_prepared_share_is_released_with_its_certificate_alone(scene: Scene) -> None:
    dealt = scene.world.deal()
    scene.prepare(dealt)
    grant = scene.world.grant(dealt, OTHER)
    with pytest.raises(StaleKey, match="no committed share"):
        scene.release(dealt, grant)
    with pytest.raises(ManifestError, match="2 receipts, 3 are needed"):
        scene.release(dealt, grant, certificate=scene.world.certificate(dealt, ("node1", "node2")))
    assert scene.state(dealt) == "prepared"
    assert released(scene.release(dealt, grant, certificate=scene.world.certificate(dealt))) == offered(dealt)
    assert scene.state(dealt) == "committed"


def test_what_is_not_held_or_destroyed_is_not_released(scene: Scene) -> None:
    unknown = scene.world.deal("unknown")
    with pytest.raises(StaleKey, match="no committed share"):
        scene.release(unknown, scene.world.grant(unknown, OTHER), certificate=scene.world.certificate(unknown))
    dealt = scene.committed()
    grant = scene.world.grant(dealt, OTHER)
    scene.holder.destroy(Destroy(scene.world.destroy_order(dealt.key_id, "orders")))
    with pytest.raises(StaleKey, match="no committed share"):
        scene.release(dealt, grant, certificate=scene.world.certificate(dealt))


def test_a_node_that_only_knows_the_key_has_nothing_to_release(scene: Scene) -> None:
    dealt = scene.world.deal()
    scene.holder.catch_up(scene.item(dealt))
    with pytest.raises(QuorumUnavailable, match="holds no share") as caught:
        scene.release(dealt, scene.world.grant(dealt, OTHER))
    assert caught.value.missing == (ME,)


def test_a_sealed_share_that_does_not_open_is_a_corrupt_share(scene: Scene) -> None:
    dealt = scene.committed()
    row = scene.store.get(dealt.key_id)
    scene.catalogue.put(replace(row, sealed=scene.lane.seal(b"x" * 100, b"another context")))
    with pytest.raises(ShareCorrupt, match="does not open") as caught:
        scene.release(dealt, scene.world.grant(dealt, OTHER))
    assert caught.value.holders == (ME,)


# --- destroy ---


def test_a_destroyed_share_is_gone_and_its_order_stays(scene: Scene) -> None:
    dealt = scene.committed()
    sealed = scene.store.get(dealt.key_id).sealed
    order = scene.world.destroy_order(dealt.key_id, "orders")
    assert scene.holder.destroy(Destroy(order)) == [dealt.key_id]
    assert scene.holder.destroy(Destroy(order)) == [dealt.key_id]
    scene.restart()
    row = scene.store.get(dealt.key_id)
    assert (row.state, row.sealed, row.document) == ("destroyed", b"", order)
    assert scene.catalogue.by_name("orders") is None
    assert all(sealed[20:60] not in file.read_bytes() for file in scene.path.parent.iterdir())


def test_the_name_of_a_destroyed_key_is_free(scene: Scene) -> None:
    old = scene.committed()
    scene.holder.destroy(Destroy(scene.world.destroy_order(old.key_id, "orders")))
    new = scene.committed()
    assert scene.catalogue.by_name("orders").row.key_id == new.key_id
    # A repeated order for the old one does not touch the new one.
    scene.holder.destroy(Destroy(scene.world.destroy_order(old.key_id, "orders")))
    assert scene.state(new) == "committed"


def test_each_bad_destroy_order_is_refused(scene: Scene) -> None:
    dealt = scene.committed()
    other = scene.committed("shared/x")
    world = scene.world
    for order, error, match in (
        (world.destroy_order(dealt.key_id, "orders", client="bob"), AccessDenied, "'bob' may not destroy"),
        (world.destroy_order(other.key_id, "shared/x", client="carol"), AccessDenied, "'carol' may not destroy"),
        (world.destroy_order(dealt.key_id, "orders", client="node1"), ManifestError, "may not sign"),
        (world.destroy_order(dealt.key_id, "orders", client="balancer"), ManifestError, "may not sign"),
        (world.destroy_order(dealt.key_id, "orders", client=world.stranger), ManifestError, "may not sign"),
        (world.destroy_order(dealt.key_id, "other"), ManifestError, "names 'other', the key is 'orders'"),
        (world.destroy_order(bytes(16), "orders"), StaleKey, "knows no key"),
        (dealt.order, ManifestError, "came where a 'order.destroy' was expected"),
    ):
        with pytest.raises(error, match=match):
            scene.holder.destroy(Destroy(order))
    assert scene.state(dealt) == scene.state(other) == "committed"


def test_an_order_that_expired_destroys_only_where_the_registry_booked_it(scene: Scene) -> None:
    """A holder that was down when the key was destroyed carries it out when it is back."""
    dealt = scene.committed()
    order = scene.world.destroy_order(dealt.key_id, "orders")
    scene.world.now_ms += ORDER_LIFETIME_MAX_MS * 100
    with pytest.raises(ManifestError, match="destroy order: expired"):
        scene.holder.destroy(Destroy(order))
    assert scene.state(dealt) == "committed"
    assert scene.holder.catch_up(scene.item(dealt, "destroyed", document=order)) == [dealt.key_id]
    assert scene.state(dealt) == "destroyed"


# --- catching up ---


def test_a_missed_commit_is_caught_up(scene: Scene) -> None:
    dealt = scene.world.deal()
    scene.prepare(dealt)
    assert scene.holder.catch_up(scene.item(dealt)) == []
    assert scene.state(dealt) == "committed"
    assert released(scene.release(dealt, scene.world.grant(dealt, OTHER))) == offered(dealt)


def test_a_missed_creation_is_noted_without_a_share(scene: Scene) -> None:
    dealt = scene.world.deal()
    assert scene.holder.catch_up(scene.item(dealt)) == []
    assert scene.state(dealt) == "committed"
    assert scene.catalogue.share_count() == 0
    assert scene.catalogue.by_name("orders").row.sealed == b""


def test_a_missed_destruction_is_caught_up(scene: Scene) -> None:
    dealt = scene.committed()
    order = scene.world.destroy_order(dealt.key_id, "orders")
    assert scene.holder.catch_up(scene.item(dealt, "destroyed", document=order)) == [dealt.key_id]
    assert scene.state(dealt) == "destroyed"
    assert scene.holder.catch_up(scene.item(dealt, "destroyed", document=order)) == []


def test_a_share_that_comes_after_its_keys_destruction_is_refused(scene: Scene) -> None:
    """A dealer's link may be slower than the books: what was destroyed meanwhile must not come to life by it."""
    dealt = scene.world.deal()
    order = scene.world.destroy_order(dealt.key_id, "orders")
    assert scene.holder.catch_up(scene.item(dealt, "destroyed", document=order)) == []
    with pytest.raises(KeyExists, match="with this id is destroyed already"):
        scene.prepare(dealt)
    with pytest.raises(StaleKey, match="was destroyed on node2"):
        scene.holder.commit(ShareCommit(dealt.key_id, scene.world.certificate(dealt)))
    assert scene.catalogue.by_name("orders") is None
    scene.committed()  # its name is free


def test_an_old_destruction_of_an_unknown_key_leaves_nothing(scene: Scene) -> None:
    """Once the order to create it is over no share of it is taken, so nothing has to be kept."""
    dealt = scene.world.deal()
    order = scene.world.destroy_order(dealt.key_id, "orders")
    scene.world.now_ms += 3_600_000
    assert scene.holder.catch_up(scene.item(dealt, "destroyed", document=order)) == []
    assert scene.store.rows() == []


def test_another_attempt_that_was_committed_replaces_the_prepared_one(scene: Scene) -> None:
    first = scene.world.deal()
    scene.prepare(first)
    second = again(scene, first)
    with pytest.raises(ManifestError):
        scene.holder.catch_up(scene.item(second, certificate=scene.world.certificate(second, ("node1",))))
    assert scene.store.get(first.key_id).attempt == 1
    scene.holder.catch_up(scene.item(second))
    row = scene.store.get(first.key_id)
    assert (row.attempt, row.state, row.sealed) == (2, "committed", b"")


def test_a_destroyed_key_never_comes_back_from_the_books(scene: Scene) -> None:
    """A registry that fell back, or lies, can't undo what the client ordered."""
    dealt = scene.committed()
    scene.holder.destroy(Destroy(scene.world.destroy_order(dealt.key_id, "orders")))
    with pytest.raises(StaleKey, match="was destroyed on node2"):
        scene.holder.catch_up(scene.item(dealt))
    row = scene.store.get(dealt.key_id)
    assert (row.state, row.sealed) == ("destroyed", b"")
    assert scene.catalogue.by_name("orders") is None
    scene.committed()  # its name stays free


def test_a_key_that_moved_on_before_it_was_known_is_no_matter(scene: Scene) -> None:
    """The books go on telling a node of a key whose holder it was; with a new store it has nothing to erase."""
    foreign = scene.world.deal("foreign", holders=("node1", "node3", "node4"))
    for state in ("committed", "destroyed"):
        document = scene.world.destroy_order(foreign.key_id, "foreign") if state == "destroyed" else b""
        assert scene.holder.catch_up(scene.item(foreign, state, document=document)) == []
    assert scene.store.rows() == []


def test_each_bad_entry_of_the_books_is_refused(scene: Scene) -> None:
    world = scene.world
    held, missed = scene.committed(), world.deal("missed")
    taken = world.deal("orders")
    prepared = world.deal("prepared")
    scene.prepare(prepared)
    before = scene.store.rows()
    for item, error, match in (
        (replace_item(scene.item(missed), key_id=held.key_id), ManifestError, "is of another key"),
        (scene.item(taken), KeyExists, "exists with another id"),
        (scene.item(missed, certificate=world.certificate(missed, ("node1",))), ManifestError, "1 receipts"),
        (scene.item(missed, certificate=world.certificate(missed, signer="node1")), ManifestError, "may not sign"),
        (scene.item(prepared, certificate=world.certificate(missed)), ManifestError, "not for this manifest"),
        (scene.item(held, "destroyed", document=world.destroy_order(held.key_id, "orders", client="bob")),
         AccessDenied, "'bob' may not destroy"),
        (scene.item(held, "destroyed", document=world.destroy_order(held.key_id, "orders", client="balancer")),
         ManifestError, "may not sign"),
        (scene.item(held, "destroyed"), ProtocolError, "signed envelope"),
        (scene.item(held, "nonsense"), EngineError, "signed envelope"),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            scene.holder.catch_up(item)
        assert scene.store.rows() == before


def replace_item(item: SyncEntry, **changes: Any) -> SyncEntry:
    fields = {name: getattr(item, name) for name in item.__struct_fields__}
    return SyncEntry(**{**fields, **changes})


def test_a_destruction_of_one_key_never_rides_on_another(scene: Scene) -> None:
    first, second = scene.committed("first"), scene.committed("second")
    order = scene.world.destroy_order(second.key_id, "second")
    with pytest.raises(ManifestError, match="is for another key"):
        scene.holder.catch_up(scene.item(first, "destroyed", document=order))
    assert (scene.state(first), scene.state(second)) == ("committed", "committed")
