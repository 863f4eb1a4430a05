"""The registry's part in a refresh or reshare: one attempt at a time, each epoch after the last, no word taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from registry_places import Place

from balancer.registry import CHANGE_LEASE_MS, SqlRegistry
from engine.errors import AccessDenied, KeyNotFound, ManifestError, Overloaded, RegistryUnavailable
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    Holder,
    RefreshOrder,
    ReshareOrder,
    key_manifests,
    open_abort,
    open_certificate,
    open_key_manifest,
    refresh_orders,
    reshare_orders,
)
from engine.protocol.signed import read_unverified, sign_envelope


class Key:
    """A committed key and the documents of its changes."""

    def __init__(self, world: Any, registry: SqlRegistry) -> None:
        self.world, self.registry = world, registry
        self.created = world.order()
        self.manifest: bytes = world.commit(registry, self.created)
        self.certificate: bytes = registry.reserve(self.created, "node-0", world.now_ms).certificate
        self.key_id: bytes = self.told.key_id
        self.dealer = self.told.holders[0].node
        self.nonce = 0

    @property
    def told(self) -> Any:
        return key_manifests.decode(read_unverified(self.manifest).payload)

    def order(self, client: str = "alice", **changes: Any) -> bytes:
        self.nonce += 1
        order = RefreshOrder(
            self.key_id, "orders", self.told.epoch, self.nonce.to_bytes(16, "big"), self.world.now_ms + 60_000
        )
        payload = refresh_orders.encode(replace(order, **changes))
        return sign_envelope("order.refresh", 1, payload, self.world.keys[client])

    def reshare_order(self, holders: list[str], threshold: int = 2, **changes: Any) -> bytes:
        self.nonce += 1
        nonce = self.nonce.to_bytes(16, "big")
        order = ReshareOrder(
            self.key_id, "orders", self.told.epoch, threshold, holders, [], nonce, self.world.now_ms + 60_000
        )
        payload = reshare_orders.encode(replace(order, **changes))
        return sign_envelope("order.reshare", 1, payload, self.world.keys["alice"])

    def reshared(self, order: bytes, attempt: int, **changes: Any) -> bytes:
        told = reshare_orders.decode(read_unverified(order).payload)
        holders = [Holder(node, x, bytes([attempt]) * 32) for x, node in enumerate(told.holders, 1)]
        return self.next_manifest(order, attempt, **{"threshold": told.threshold, "holders": holders, **changes})

    def books(self, node: str) -> list[tuple[int, str]]:
        """The epochs and states that a node is told of the key."""
        entries = self.registry.sync(node, 0).entries
        return [(key_manifests.decode(read_unverified(each.manifest).payload).epoch, each.state) for each in entries]

    def change(self, order: bytes, dealer: str = "", later_ms: int = 0) -> Any:
        now_ms = self.world.now_ms + later_ms
        return self.registry.change(order, self.manifest, self.certificate, dealer or self.dealer, now_ms)

    def next_manifest(self, order: bytes, attempt: int, dealer: str = "", **changes: Any) -> bytes:
        manifest = replace(
            self.told,
            epoch=self.told.epoch + 1,
            attempt=attempt,
            previous=read_unverified(self.manifest).digest,
            change=order,
            holders=[replace(holder, commitment=bytes([attempt]) * 32) for holder in self.told.holders],
        )
        payload = key_manifests.encode(replace(manifest, **changes))
        return sign_envelope("key", 1, payload, self.world.keys[dealer or self.dealer])

    def commit(self, manifest: bytes, receipts: list[bytes] | None = None) -> bytes:
        given = self.world.receipts(manifest) if receipts is None else receipts
        return self.registry.commit(manifest, given, self.world.now_ms)

    def refresh(self) -> None:
        order = self.order()
        manifest = self.next_manifest(order, self.change(order).attempt)
        self.certificate, self.manifest = self.commit(manifest), manifest


@pytest.fixture
def key(world: Any, place: Place) -> Iterator[Key]:
    opened = world.open(place)
    made = Key(world, opened)
    yield made
    made.registry.close()


def test_epochs_follow_each_other_and_attempts_count_on(key: Key) -> None:
    """Each certificate is good; the create order now gets the newest epoch back."""
    for epoch in (2, 3, 4):
        key.refresh()
        record = open_key_manifest(key.manifest, key.world.cluster)
        assert len(open_certificate(key.certificate, record, key.world.cluster)) == 3
        assert (record.manifest.epoch, record.manifest.attempt) == (epoch, epoch)
        assert key.commit(key.manifest) == key.certificate
        (entry,) = key.registry.sync(key.dealer, 0).entries
        assert (entry.manifest, entry.certificate, entry.state) == (key.manifest, key.certificate, "committed")
    again = key.registry.reserve(key.created, "node-0", key.world.now_ms)
    assert (again.attempt, again.manifest) == (0, key.manifest)


def test_an_epoch_that_is_past_needs_nothing_more(key: Key) -> None:
    order = key.order()
    key.refresh()
    done = key.change(order)
    assert (done.attempt, done.manifest, done.certificate, done.aborts) == (0, key.manifest, key.certificate, [])


def test_the_same_order_again_aborts_its_earlier_attempt(key: Key) -> None:
    """Another coordinator goes on at once; the first attempt can't commit any more."""
    order = key.order()
    assert key.change(order).attempt == 2
    second = key.change(order, key.told.holders[1].node)
    assert (second.attempt, len(second.aborts)) == (3, 1)
    notice = open_abort(second.aborts[0], key.world.cluster)
    assert (notice.key_id, notice.attempt) == (key.key_id, 2)
    with pytest.raises(ManifestError, match=r"attempt 2 .* can't commit: attempt 3 is pending"):
        key.commit(key.next_manifest(order, 2))
    assert key.registry.outcome(key.key_id, 2, key.world.now_ms).state == "aborted"
    assert key.registry.outcome(key.key_id, 3, key.world.now_ms).state == "pending"
    assert key.registry.outcome(key.key_id, 4, key.world.now_ms).state == "pending"


def test_another_order_waits_until_the_coordinator_counts_as_dead(key: Key) -> None:
    first, other = key.order(), key.order()
    key.change(first)
    with pytest.raises(Overloaded, match="is being changed"):
        key.change(other, later_ms=CHANGE_LEASE_MS - 1)
    taken = key.change(other, later_ms=CHANGE_LEASE_MS)
    assert taken.attempt == 3
    with pytest.raises(ManifestError, match="its order is not the one of this attempt"):
        key.commit(key.next_manifest(first, 3))
    assert key.commit(key.next_manifest(other, 3))


def test_no_notice_is_signed_on_what_was_committed(key: Key) -> None:
    """Not among those of a new attempt, and not on a question: a past epoch is answered with the last certificate."""
    key.refresh()
    key.refresh()
    order = key.order()
    assert key.change(order).aborts == []
    again = key.change(order)
    assert [open_abort(raw, key.world.cluster).attempt for raw in again.aborts] == [4]
    for attempt in (1, 2, 3):
        told = key.registry.outcome(key.key_id, attempt, key.world.now_ms + 10**9)
        assert (told.state, told.document) == ("committed", key.certificate)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"previous": bytes(32)}, "does not follow the epoch"),
        ({"check_value": b"x" * 32}, "can't change check_value"),
        ({"epoch": 3}, "differs from the client's refresh order"),
        ({"threshold": 1}, "differs from the client's order"),
    ],
)
def test_what_does_not_follow_does_not_commit(key: Key, changes: dict[str, Any], match: str) -> None:
    order = key.order()
    attempt = key.change(order).attempt
    with pytest.raises(ManifestError, match=match):
        key.commit(key.next_manifest(order, attempt, **changes))
    with pytest.raises(ManifestError, match=r"attempt 3 .* can't commit"):
        key.commit(key.next_manifest(order, attempt + 1))
    swapped = [replace(key.told.holders[0], x=3), key.told.holders[1], replace(key.told.holders[2], x=1)]
    with pytest.raises(ManifestError, match="can't change the holders"):
        key.commit(key.next_manifest(order, attempt, holders=swapped))
    with pytest.raises(ManifestError, match="dealt by"):
        key.commit(key.next_manifest(order, attempt, key.told.holders[1].node))
    assert key.commit(key.next_manifest(order, attempt))


def test_all_holders_must_have_stored(key: Key) -> None:
    order = key.order()
    manifest = key.next_manifest(order, key.change(order).attempt)
    receipts = key.world.receipts(manifest)
    for given in (receipts[:2], [*receipts[:2], receipts[0]]):
        with pytest.raises(ManifestError, match="2 receipts, 3 are needed"):
            key.commit(manifest, given)
    assert key.commit(manifest, receipts)


def test_who_may_begin_and_who_may_give_up(key: Key) -> None:
    order = key.order()
    stranger = next(node for node in key.world.nodes if node not in {each.node for each in key.told.holders})
    with pytest.raises(AccessDenied, match="is no holder"):
        key.change(order, stranger)
    with pytest.raises(AccessDenied, match="may not refresh"):
        key.change(key.order("bob"))
    with pytest.raises(ManifestError, match="expired"):
        key.change(order, later_ms=60_000 + CLOCK_SKEW_MS + 1)
    attempt = key.change(order).attempt
    with pytest.raises(AccessDenied, match="deals no attempt"):
        key.registry.abort(key.key_id, attempt, key.told.holders[1].node)
    for _ in range(2):
        told = key.registry.abort(key.key_id, attempt, key.dealer)
        assert open_abort(told.document, key.world.cluster).attempt == attempt
    with pytest.raises(ManifestError, match="is ended"):
        key.commit(key.next_manifest(order, attempt))
    assert key.change(key.order()).attempt == attempt + 1


def test_an_expired_attempt_is_aborted_when_it_is_asked_about(key: Key) -> None:
    order = key.order()
    attempt = key.change(order).attempt
    late = key.world.now_ms + 60_000 + CLOCK_SKEW_MS + 1
    assert key.registry.outcome(key.key_id, attempt, late).state == "aborted"
    with pytest.raises(ManifestError, match="is ended"):
        key.commit(key.next_manifest(order, attempt))


def test_a_destroyed_key_is_not_refreshed(key: Key) -> None:
    order = key.order()
    attempt = key.change(order).attempt
    key.registry.destroy(key.world.destroy_order(key.created), key.world.now_ms)
    with pytest.raises(ManifestError, match="is not being changed"):
        key.commit(key.next_manifest(order, attempt))
    with pytest.raises(KeyNotFound):
        key.change(key.order())
    assert key.registry.outcome(key.key_id, attempt, key.world.now_ms).state == "aborted"


def test_what_was_begun_and_committed_survives_a_restart(key: Key, place: Place) -> None:
    key.refresh()
    order = key.order()
    attempt = key.change(order).attempt
    key.registry.close()
    key.registry = key.world.open(place)
    key.certificate = key.commit(key.next_manifest(order, attempt))
    assert key.registry.outcome(key.key_id, 2, key.world.now_ms).state == "committed"
    assert key.registry.count() == 1


def test_a_registry_that_fell_back_takes_in_what_the_holders_prove(key: Key, place: Place) -> None:
    """An old copy of the file knows epoch 1; the coordinator's certificate tells it of epoch 3."""
    key.registry.close()
    saved = place.save()
    key.registry = key.world.open(place)
    key.refresh()
    key.refresh()
    key.registry.close()
    place.put_back(saved)
    key.registry = key.world.open(place)
    forged = key.certificate[:-1] + bytes([key.certificate[-1] ^ 1])
    with pytest.raises(ManifestError):
        key.registry.change(key.order(), key.manifest, forged, key.dealer, key.world.now_ms)
    reserved = key.change(key.order())
    assert reserved.attempt == 4
    assert key.registry.sync(key.dealer, 0).entries[0].manifest == key.manifest


def test_a_damaged_row_of_a_change_is_noticed(key: Key, place: Place) -> None:
    key.change(key.order())
    key.registry.close()
    place.execute("UPDATE changes SET attempt = 9")
    key.registry = key.world.open(place)
    with pytest.raises(RegistryUnavailable, match="damaged"):
        key.change(key.order())


# --- a reshare ---


def test_a_reshare_changes_holders_and_threshold(key: Key) -> None:
    """Who comes is told, and who leaves; the next coordinator is one of the new holders, and the books name them."""
    nodes = key.world.nodes
    before = [each.node for each in key.told.holders]
    after = [*(node for node in nodes if node not in before), before[0]]
    order = key.reshare_order(after, 3)
    manifest = key.reshared(order, key.change(order).attempt)
    given = key.world.receipts(manifest)
    with pytest.raises(ManifestError, match=f"3 receipts, {len(after)} are needed"):
        key.commit(manifest, given[:3])
    key.certificate, key.manifest = key.commit(manifest, given), manifest
    assert key.registry.reserve(key.created, "node-0", key.world.now_ms).holders == after
    for node in nodes:
        assert key.books(node) == [(2, "committed")], node
    with pytest.raises(AccessDenied, match="is no holder"):
        key.change(key.order(), before[1])
    refresh = key.order()
    sharing = {"sharing": key.told.change, "dealer": after[0]}
    attempt = key.change(refresh, after[0]).attempt
    with pytest.raises(ManifestError, match="differs from the client's order"):
        key.commit(key.next_manifest(refresh, attempt, after[0]))
    assert key.commit(key.next_manifest(refresh, attempt, **sharing))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"threshold": 1}, "differs from the client's reshare order"),
        ({"check_value": b"x" * 32}, "can't change check_value"),
        ({"epoch": 3}, "differs from the client's reshare order"),
        ({"holders": [Holder("node-0", 1, bytes(32)), Holder("node-1", 2, bytes(32))]}, "client's reshare order"),
    ],
)
def test_another_reshare_than_was_ordered_does_not_commit(key: Key, changes: dict[str, Any], match: str) -> None:
    order = key.reshare_order(key.world.nodes[:4])
    attempt = key.change(order).attempt
    with pytest.raises(ManifestError, match=match):
        key.commit(key.reshared(order, attempt, **changes))
    other = key.reshare_order(key.world.nodes[:4])
    with pytest.raises(ManifestError, match="its order is not the one of this attempt"):
        key.commit(key.reshared(other, attempt))
    assert key.commit(key.reshared(order, attempt))


def test_who_was_to_come_by_an_attempt_that_was_given_up_hears_of_the_next_epoch(key: Key) -> None:
    """It may have stored a share, which it can erase by that; a key that is destroyed is told to all of them too."""
    stranger = next(node for node in key.world.nodes if node not in {each.node for each in key.told.holders})
    assert key.books(stranger) == []
    attempt = key.change(key.reshare_order([key.dealer, stranger])).attempt
    assert key.books(stranger) == [(1, "committed")]
    last = key.registry.sync(stranger, 0).last
    key.registry.abort(key.key_id, attempt, key.dealer)
    key.refresh()
    (entry,) = key.registry.sync(stranger, last).entries
    assert entry.manifest == key.manifest
    assert key.books(stranger) == [(2, "committed")]


def test_a_registry_that_fell_back_takes_in_other_holders(key: Key, place: Place) -> None:
    key.registry.close()
    saved = place.save()
    key.registry = key.world.open(place)
    after = key.world.nodes[1:5]
    order = key.reshare_order(after)
    manifest = key.reshared(order, key.change(order).attempt)
    key.certificate, key.manifest = key.commit(manifest), manifest
    key.registry.close()
    place.put_back(saved)
    key.registry = key.world.open(place)
    assert key.change(key.order(), after[0]).holders == after
    assert key.books(after[-1]) == [(2, "committed")]


def test_who_may_reshare(key: Key) -> None:
    for changes, error, match in (
        ({"holders": ["node-0", "node-1", "node-9"]}, ManifestError, "is no node"),
        ({"from_epoch": 2}, ManifestError, "the order replaces epoch 2 of 'orders', the last is 1"),
        ({"name": "other"}, KeyNotFound, "no key 'other'"),
        ({"expires_ms": 1}, ManifestError, "expired"),
    ):
        with pytest.raises(error, match=match):
            key.change(key.reshare_order(**{"holders": key.world.nodes[:3], **changes}))


def test_what_is_booked_together_is_booked_together(key: Key) -> None:
    """What fails in a bundle is undone alone; if the whole fails, nothing of it is there."""
    order = key.reshare_order(key.world.nodes[:4])

    def change_and_fail() -> None:
        with key.registry.together():
            assert key.change(order).attempt == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        change_and_fail()
    with key.registry.together():
        with pytest.raises(ManifestError, match="replaces epoch 5"):
            key.change(key.reshare_order(key.world.nodes[:4], from_epoch=5))
        assert key.change(order).attempt == 2
    assert key.change(order).attempt == 3
