"""The registry: each rule on every back end, with real signed documents, across reopening and against a plain model."""

from __future__ import annotations

import itertools
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from registry_places import FilePlace, Place

from balancer import database as database_module
from balancer import registry as registry_module
from balancer.registry import SqlRegistry
from engine.errors import AccessDenied, ConfigError, KeyExists, KeyNotFound, ManifestError, RegistryUnavailable
from engine.protocol.manifest import CLOCK_SKEW_MS, create_orders, open_abort, open_certificate, open_key_manifest
from engine.protocol.requests import REPLY_CODECS, OutcomeReply
from engine.protocol.settings import SettingsOrder, issue_settings
from engine.protocol.signed import read_unverified, sign_envelope


@pytest.fixture
def registry(world: Any, place: Place) -> Iterator[SqlRegistry]:
    opened = world.open(place)
    yield opened
    opened.close()


def key_id_of(order: bytes) -> bytes:
    return create_orders.decode(read_unverified(order).payload).key_id


def late(world: Any) -> int:
    """A time at which the orders of ``World.order`` have expired, skew included."""
    return int(world.now_ms + 60_000 + CLOCK_SKEW_MS + 1)


# --- reserve ---


def test_a_reservation_names_the_groups_first_holders(world: Any, registry: SqlRegistry) -> None:
    """A first reservation is attempt 1 with the placement group's first n nodes, and no document yet."""
    reserved = registry.reserve(world.order("k", shares=4), "node-0", world.now_ms)
    expected = world.cluster.group_holders(world.cluster.group_of("k"))[:4]
    assert (reserved.attempt, tuple(reserved.holders)) == (1, expected)
    assert (reserved.aborts, reserved.manifest, reserved.certificate) == ([], b"", b"")


def test_too_few_nodes(world: Any, registry: SqlRegistry) -> None:
    """More shares than nodes is the caller's mistake and names both numbers."""
    with pytest.raises(ValueError, match="7 shares need as many nodes; the cluster has 6"):
        registry.reserve(world.order(shares=7), "node-0", world.now_ms)


def test_what_the_nodes_hold(world: Any, registry: SqlRegistry) -> None:
    """Keys count at their holders, reserved ones too until they expire; destroyed ones do not."""
    assert registry.holdings(world.now_ms) == {}
    orders = [world.order(f"k{number}") for number in range(5)]
    held: list[list[str]] = []
    for order in orders:
        manifest = open_key_manifest(world.commit(registry, order), world.cluster).manifest
        held.append([holder.node for holder in manifest.holders])
    expected = Counter(node for nodes in held for node in nodes)
    assert registry.holdings(world.now_ms) == expected
    coming = registry.reserve(world.order("coming"), "node-0", world.now_ms)
    assert registry.holdings(world.now_ms) == expected + Counter(coming.holders)
    assert registry.holdings(late(world)) == expected
    registry.destroy(world.destroy_order(orders[0]), world.now_ms)
    assert registry.holdings(late(world)) == expected - Counter(held[0])


def test_what_is_asked_of_all_keys_takes_no_longer_with_more_of_them(world: Any, tmp_path: Path) -> None:
    """By the steps of SQLite's machine: holdings of keys that are alike; settings, a rotation and a refresh of one."""

    def steps(registry: SqlRegistry, ask: Callable[[], object]) -> int:
        store, counted = registry._store, [0]
        assert isinstance(store, database_module.SqliteDatabase)

        def count() -> int:
            counted[0] += 1
            return 0

        store.file.set_progress_handler(count, 1)
        ask()
        store.file.set_progress_handler(None, 0)
        return counted[0]

    def settle(registry: SqlRegistry, order: bytes, serial: int) -> None:
        told = create_orders.decode(read_unverified(order).payload)
        wanted = SettingsOrder(told.name, told.key_id, serial, 0, False, 1, 0, world.now_ms + 60_000)
        registry.settings(issue_settings(wanted, world.keys["alice"]), world.now_ms)

    taken = []
    with closing(world.open(FilePlace(tmp_path / "registry.db"))) as registry:
        names = (name for number in itertools.count() if world.cluster.group_of(name := f"k{number}") == 1)
        for keys in (8, 160):
            orders = [world.order(next(names)) for _ in range(keys)]
            for order in orders:
                world.commit(registry, order)
            asked: list[Callable[[], object]] = [
                lambda: registry.holdings(world.now_ms),
                lambda order=orders[0]: settle(registry, order, world.now_ms + 1),
                lambda order=orders[1]: registry.reserve(world.rotation(order), "node-0", world.now_ms),
                lambda order=orders[2]: registry._note_everywhere([key_id_of(order)]),
            ]
            taken.append([steps(registry, each) for each in asked])
    few, many = taken
    assert all(later <= 2 * before for before, later in zip(few, many, strict=True)), taken


def test_a_share_that_a_holder_lacks_is_noted(world: Any, registry: SqlRegistry, place: Place) -> None:
    """By its own word alone, and for the last epoch; so it is over a restart."""

    def lacking(opened: SqlRegistry) -> dict[bytes, tuple[str, ...]]:
        return {each.key_id: each.missing for each in opened.places(lambda p: p.lacking(late(world), None, 10))}

    order = world.order("k")
    told = open_key_manifest(world.commit(registry, order), world.cluster).manifest
    holders = [holder.node for holder in told.holders]
    stranger = next(node for node in world.cluster.nodes if node not in holders)
    registry.lacking(stranger, [(told.key_id, 1)])
    registry.lacking(holders[0], [(told.key_id, 2), (b"unknown-unknown-", 1)])
    assert lacking(registry) == {}
    for _ in range(2):
        registry.lacking(holders[0], [(told.key_id, 1)])
        assert lacking(registry) == {told.key_id: (holders[0],)}
    registry.lacking(holders[1], [(told.key_id, 1)])
    registry.close()
    with closing(world.open(place)) as again:
        assert lacking(again) == {told.key_id: (holders[0], holders[1])}
        again.destroy(world.destroy_order(order), world.now_ms)
        assert lacking(again) == {}
        again.lacking(holders[0], [(told.key_id, 1)])
        assert lacking(again) == {}


def test_the_same_order_again_aborts_the_earlier_attempt(world: Any, registry: SqlRegistry) -> None:
    """A repeated order gets the next attempt and notices on the earlier ones, which can't commit any more."""
    order = world.order()
    first = registry.reserve(order, "node-0", world.now_ms)
    second = registry.reserve(order, "node-1", world.now_ms)
    assert second.attempt == 2
    notices = [open_abort(each, world.cluster) for each in second.aborts]
    assert [(each.key_id, each.attempt) for each in notices] == [(key_id_of(order), 1)]
    old = world.manifest(order, first.attempt, first.holders)
    with pytest.raises(ManifestError, match="attempt 1 of 'orders' can't commit: attempt 2 is reserved"):
        registry.commit(old, world.receipts(old), world.now_ms)
    assert registry.outcome(key_id_of(order), 1, world.now_ms).state == "aborted"
    new = world.manifest(order, 2, second.holders, "node-1")
    assert registry.commit(new, world.receipts(new), world.now_ms)


def test_at_most_16_notices(world: Any, registry: SqlRegistry) -> None:
    """After many attempts a reservation carries notices on the last 16, small enough for the message."""
    order = world.order()
    for _ in range(20):
        reserved = registry.reserve(order, "node-0", world.now_ms)
    assert [open_abort(each, world.cluster).attempt for each in reserved.aborts] == list(range(4, 20))
    assert REPLY_CODECS["registry.reserve"].encode(reserved)


def test_a_committed_order_comes_back_as_attempt_0(world: Any, registry: SqlRegistry) -> None:
    """The retry of an order that made its key gets the key, also when the order has expired since."""
    order = world.order()
    manifest = world.commit(registry, order)
    for now_ms in (world.now_ms, late(world)):
        again = registry.reserve(order, "node-3", now_ms)
        assert (again.attempt, again.manifest) == (0, manifest)
        record = open_key_manifest(again.manifest, world.cluster)
        assert len(open_certificate(again.certificate, record, world.cluster)) == 3


def test_a_name_is_taken_once(world: Any, registry: SqlRegistry) -> None:
    """Another key's name can't be reserved, whether that key is committed or only being created."""
    order = world.order("k")
    registry.reserve(order, "node-0", world.now_ms)
    with pytest.raises(KeyExists, match="'k' is being created; that order runs out in 65000 ms"):
        registry.reserve(world.order("k"), "node-0", world.now_ms)
    world.commit(registry, order)
    with pytest.raises(KeyExists, match="'k' is taken"):
        registry.reserve(world.order("k", expires_ms=late(world)), "node-0", late(world))


def test_an_expired_reservation_loses_its_name(world: Any, registry: SqlRegistry) -> None:
    """A name reserved by an order that ran out goes to the next; the old attempt is aborted for good."""
    old = world.order("k")
    reserved = registry.reserve(old, "node-0", world.now_ms)
    now_ms = late(world)
    assert registry.reserve(world.order("k", expires_ms=now_ms), "node-0", now_ms).attempt == 1
    manifest = world.manifest(old, reserved.attempt, reserved.holders)
    with pytest.raises(ManifestError, match="attempt 1 is aborted"):
        registry.commit(manifest, world.receipts(manifest), world.now_ms)
    assert registry.outcome(key_id_of(old), 1, now_ms).state == "aborted"


def test_a_key_id_belongs_to_one_order(world: Any, registry: SqlRegistry) -> None:
    """A key id with another name or another t-of-n is refused."""
    order = world.order("k")
    registry.reserve(order, "node-0", world.now_ms)
    for other in (world.order("other", key_id_of(order)), world.order("k", key_id_of(order), shares=4)):
        with pytest.raises(ManifestError, match="was used by another order"):
            registry.reserve(other, "node-0", world.now_ms)


def test_orders_are_verified(world: Any, registry: SqlRegistry) -> None:
    """Forged, expired, unlawful and node-less orders are refused, and leave the name free."""
    forged = sign_envelope("order.create", 1, read_unverified(world.order()).payload, world.keys["node-0"])
    with pytest.raises(ManifestError, match="may not sign"):
        registry.reserve(forged, "node-0", world.now_ms)
    with pytest.raises(AccessDenied, match="'bob' may not generate"):
        registry.reserve(world.order(client="bob"), "node-0", world.now_ms)
    with pytest.raises(ManifestError, match="expired"):
        registry.reserve(world.order(), "node-0", late(world))
    with pytest.raises(AccessDenied, match="'alice' is no node"):
        registry.reserve(world.order(), "alice", world.now_ms)
    assert registry.reserve(world.order(), "node-0", world.now_ms).attempt == 1


# --- commit ---


def test_a_commit_is_certified_and_repeatable(world: Any, registry: SqlRegistry) -> None:
    """The certificate verifies, a repeated commit returns the same one, and serials grow."""
    manifest = world.commit(registry, world.order("k"))
    first = registry.commit(manifest, world.receipts(manifest), late(world))
    assert first == registry.commit(manifest, [], world.now_ms)
    assert open_certificate(first, open_key_manifest(manifest, world.cluster), world.cluster)
    other = world.commit(registry, world.order("l"))
    second = registry.commit(other, [], world.now_ms)
    assert read_unverified(second).serial > read_unverified(first).serial
    assert registry.count() == 2


def test_receipts_are_counted_and_checked(world: Any, registry: SqlRegistry) -> None:
    """t+1 distinct holders must have given a receipt for this very manifest."""
    order = world.order(threshold=2, shares=5)
    reserved = registry.reserve(order, "node-0", world.now_ms)
    manifest = world.manifest(order, 1, reserved.holders)
    good = world.receipts(manifest)
    with pytest.raises(ManifestError, match="2 receipts, 3 are needed"):
        registry.commit(manifest, [good[0], good[1], good[1], good[0]], world.now_ms)
    other = world.receipts(world.manifest(order, 1, reserved.holders, salt=b"other"))
    with pytest.raises(ManifestError, match="not for this manifest"):
        registry.commit(manifest, [*good[:2], other[2]], world.now_ms)
    assert registry.commit(manifest, good[1:4], world.now_ms)


def test_a_manifest_must_be_the_reserved_one(world: Any, registry: SqlRegistry) -> None:
    """Another attempt, dealer, set of holders or order, an unknown key and an expired order can't commit."""
    order = world.order("k", shares=3)
    holders = registry.reserve(order, "node-0", world.now_ms).holders
    others = [*holders[:2], next(node for node in world.nodes if node not in holders)]
    unknown = world.order("u")
    cases = [
        (world.manifest(order, 2, holders), "attempt 1 is reserved"),
        (world.manifest(order, 1, holders, "node-1"), "dealt by 'node-1', reserved by 'node-0'"),
        (world.manifest(order, 1, others), f"not the reserved ones \\(missing {holders[2]}\\)"),
        (world.manifest(unknown, 1, holders), "it was never reserved"),
        (world.manifest(world.order("k", key_id_of(order), threshold=1), 1, holders), "order is not the reserved one"),
    ]
    for manifest, reason in cases:
        with pytest.raises(ManifestError, match=reason):
            registry.commit(manifest, world.receipts(manifest), world.now_ms)
    manifest = world.manifest(order, 1, holders)
    with pytest.raises(ManifestError, match="expired"):
        registry.commit(manifest, world.receipts(manifest), late(world))
    assert registry.count() == 0
    assert registry.commit(manifest, world.receipts(manifest), world.now_ms)
    rival = world.manifest(order, 1, holders, salt=b"rival")
    with pytest.raises(ManifestError, match="attempt 1 is committed"):
        registry.commit(rival, world.receipts(rival), world.now_ms)


# --- outcome ---


def test_outcomes(world: Any, registry: SqlRegistry) -> None:
    """Pending, then committed with the certificate; earlier attempts are aborted, nothing is signed of later ones."""
    order = world.order()
    registry.reserve(order, "node-0", world.now_ms)
    assert registry.outcome(key_id_of(order), 1, world.now_ms).state == "pending"
    manifest = world.commit(registry, order)
    reply = registry.outcome(key_id_of(order), 2, world.now_ms)
    assert (reply.state, reply.document) == ("committed", registry.commit(manifest, [], world.now_ms))
    reply = registry.outcome(key_id_of(order), 1, world.now_ms)
    assert (reply.state, open_abort(reply.document, world.cluster).attempt) == ("aborted", 1)
    assert registry.outcome(key_id_of(order), 3, world.now_ms) == OutcomeReply("pending", b"")
    with pytest.raises(ValueError, match="attempt 0 is not in"):
        registry.outcome(key_id_of(order), 0, world.now_ms)


def test_an_expired_reservation_is_aborted_when_asked(world: Any, registry: SqlRegistry) -> None:
    """Once told as aborted it stays so, even for a clock that went back."""
    order = world.order()
    reserved = registry.reserve(order, "node-0", world.now_ms)
    assert registry.outcome(key_id_of(order), 1, late(world) - 1).state == "pending"
    assert registry.outcome(key_id_of(order), 1, late(world)).state == "aborted"
    manifest = world.manifest(order, 1, reserved.holders)
    with pytest.raises(ManifestError, match="attempt 1 is aborted"):
        registry.commit(manifest, world.receipts(manifest), world.now_ms)
    assert registry.reserve(order, "node-0", world.now_ms).attempt == 2


def test_a_registry_that_fell_back_never_reuses_an_aborted_attempt(world: Any, place: Place) -> None:
    """The notice on an attempt that an old copy of the registry does not know is kept by a later reservation."""
    order = world.order()
    world.open(place).close()
    registry = world.open(place)
    reply = registry.outcome(key_id_of(order), 3, world.now_ms)
    assert (reply.state, open_abort(reply.document, world.cluster).attempt) == ("aborted", 3)
    registry.close()
    registry = world.open(place)
    reserved = registry.reserve(order, "node-0", world.now_ms)
    assert reserved.attempt == 4
    assert registry.outcome(key_id_of(order), 4, world.now_ms).state == "pending"
    assert registry.outcome(key_id_of(order), 6, world.now_ms).state == "pending"
    manifest = world.manifest(order, 4, reserved.holders)
    assert registry.commit(manifest, world.receipts(manifest), world.now_ms)
    registry.close()


def test_notes_on_unknown_attempts_are_bounded(
    world: Any, registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the notes are full, an unknown attempt stays pending: never an abort that is not durable."""
    monkeypatch.setattr(registry_module, "REFUSED_MAX", 2)
    states = [registry.outcome(world.key_id(), 1, world.now_ms).state for _ in range(3)]
    assert states == ["aborted", "aborted", "pending"]


def test_nobody_uses_up_the_attempts_of_a_key_to_come(world: Any, registry: SqlRegistry) -> None:
    """A question about an absurdly high attempt of an unknown key leaves its numbers to the true dealer."""
    order = world.order()
    assert registry.outcome(key_id_of(order), 2**31 - 1, world.now_ms).state == "pending"
    assert registry.reserve(order, "node-0", world.now_ms).attempt == 1


# --- abort ---


def test_a_dealer_gives_up_its_attempt(world: Any, registry: SqlRegistry) -> None:
    """The name is free at once, the attempt never commits, and the same order may be tried again."""
    order = world.order("k")
    reserved = registry.reserve(order, "node-0", world.now_ms)
    reply = registry.abort(key_id_of(order), reserved.attempt, "node-0")
    assert (reply.state, open_abort(reply.document, world.cluster).attempt) == ("aborted", 1)
    assert registry.abort(key_id_of(order), 1, "node-0").state == "aborted"
    manifest = world.manifest(order, 1, reserved.holders)
    with pytest.raises(ManifestError, match="attempt 1 is aborted"):
        registry.commit(manifest, world.receipts(manifest), world.now_ms)
    assert world.commit(registry, world.order("k"))
    with pytest.raises(KeyExists):
        registry.reserve(order, "node-0", world.now_ms)


def test_only_the_dealer_gives_up_its_attempt(world: Any, registry: SqlRegistry) -> None:
    """Another node, another attempt and an unknown key are refused; a committed key is told by its certificate."""
    order = world.order("k")
    registry.reserve(order, "node-0", world.now_ms)
    for key_id, attempt, dealer in (
        (key_id_of(order), 1, "node-1"),
        (key_id_of(order), 2, "node-0"),
        (bytes(16), 1, "node-0"),
    ):
        with pytest.raises(AccessDenied, match="deals no attempt"):
            registry.abort(key_id, attempt, dealer)
    manifest = world.commit(registry, order)
    reply = registry.abort(key_id_of(order), 2, "node-0")
    assert (reply.state, reply.document) == ("committed", registry.commit(manifest, [], world.now_ms))
    assert registry.count() == 1


# --- destroy and sync ---


def test_destroy_is_for_good(world: Any, registry: SqlRegistry) -> None:
    """A destroyed key's name is free, its create order is void, its tombstone reaches the holders; twice is once."""
    order = world.order("k")
    manifest = world.commit(registry, order)
    tombstone = world.destroy_order(order)
    registry.destroy(tombstone, world.now_ms)
    registry.destroy(world.destroy_order(order, expires_ms=world.now_ms + 1), late(world))
    holder = open_key_manifest(manifest, world.cluster).manifest.holders[0].node
    entry = registry.sync(holder, 0).entries[0]
    assert (entry.state, entry.document, entry.manifest) == ("destroyed", tombstone, manifest)
    with pytest.raises(KeyNotFound, match="was destroyed"):
        registry.reserve(order, "node-0", world.now_ms)
    assert registry.count() == 0
    assert world.commit(registry, world.order("k"))


def test_destroy_orders_are_verified(world: Any, registry: SqlRegistry) -> None:
    """Unknown, uncommitted and misnamed keys, expired and unlawful orders: nothing is destroyed."""
    order = world.order("k")
    with pytest.raises(KeyNotFound):
        registry.destroy(world.destroy_order(order), world.now_ms)
    registry.reserve(order, "node-0", world.now_ms)
    with pytest.raises(KeyNotFound):
        registry.destroy(world.destroy_order(order), world.now_ms)
    world.commit(registry, order)
    with pytest.raises(ManifestError, match="names 'l', the key is 'k'"):
        registry.destroy(world.destroy_order(order, name="l"), world.now_ms)
    with pytest.raises(ManifestError, match="expired"):
        registry.destroy(world.destroy_order(order), late(world))
    with pytest.raises(AccessDenied):
        registry.destroy(world.destroy_order(order, client="bob"), world.now_ms)
    assert registry.count() == 1


def test_sync_pages_through_a_nodes_keys(world: Any, registry: SqlRegistry) -> None:
    """Every key of a node comes once, in order, in pages that fit a message; keys of others do not come."""
    held: dict[str, set[bytes]] = {node: set() for node in world.nodes}
    for number in range(40):
        order = world.order(f"key-{number}")
        manifest = open_key_manifest(world.commit(registry, order), world.cluster).manifest
        for holder in manifest.holders:
            held[holder.node].add(manifest.key_id)
    for node in world.nodes:
        seen: list[bytes] = []
        after, pages, more = 0, 0, True
        while more:
            page = registry.sync(node, after)
            assert len(REPLY_CODECS["registry.sync"].encode(page)) < 48 * 1024
            seen += [entry.key_id for entry in page.entries]
            after, pages, more = page.last, pages + 1, page.more
        assert len(seen) == len(set(seen))
        assert set(seen) == held[node]
        assert registry.sync(node, after).entries == []
    assert registry.sync("stranger", 0).entries == []


def test_sync_tells_what_changed_since(world: Any, registry: SqlRegistry) -> None:
    """After the last change number come only newer keys and keys destroyed since, whatever their ids."""
    orders = [world.order(f"k{number}", shares=6) for number in range(4)]
    for order in orders[:3]:
        world.commit(registry, order)
    page = registry.sync("node-0", 0)
    assert [entry.key_id for entry in page.entries] == [key_id_of(order) for order in orders[:3]]
    world.commit(registry, orders[3])
    registry.destroy(world.destroy_order(orders[0]), world.now_ms)
    later = registry.sync("node-0", page.last)
    told = [(entry.key_id, entry.state) for entry in later.entries]
    assert told == [(key_id_of(orders[3]), "committed"), (key_id_of(orders[0]), "destroyed")]
    assert later.fencing_epoch == registry.fencing_epoch
    assert registry.sync("node-0", later.last).entries == []


def test_sync_uses_several_pages(world: Any, registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page ends at its byte limit, but has at least one entry."""
    monkeypatch.setattr(registry_module, "PAGE_BYTES_MAX", 1)
    manifests = [world.commit(registry, world.order(f"k{number}", shares=6)) for number in range(3)]
    page = registry.sync("node-0", 0)
    assert (len(page.entries), page.more, page.entries[0].manifest) == (1, True, manifests[0])
    assert registry.sync("node-0", registry.sync("node-0", page.last).last).more is False


# --- the store ---


def test_everything_survives_reopening(world: Any, place: Place) -> None:
    """Reservations, keys, aborts, tombstones and serials are on the disk when their call returns."""
    first = world.open(place)
    kept, dead, open_order, lost = (world.order(name) for name in ("kept", "dead", "open", "lost"))
    manifest, _ = world.commit(first, kept), world.commit(first, dead)
    first.destroy(world.destroy_order(dead), world.now_ms)
    first.reserve(open_order, "node-0", world.now_ms)
    first.reserve(lost, "node-0", world.now_ms)
    first.outcome(key_id_of(lost), 1, late(world))
    certificate, epoch = first.commit(manifest, [], world.now_ms), first.fencing_epoch
    first.close()
    second = world.open(place)
    assert second.fencing_epoch == epoch + 1
    assert second.commit(manifest, [], world.now_ms) == certificate
    assert second.outcome(key_id_of(open_order), 1, world.now_ms).state == "pending"
    assert second.outcome(key_id_of(lost), 1, world.now_ms).state == "aborted"
    with pytest.raises(KeyNotFound):
        second.reserve(dead, "node-0", world.now_ms)
    other = second.commit(world.commit(second, world.order("new")), [], world.now_ms)
    assert read_unverified(other).serial == read_unverified(certificate).serial + 2
    second.close()


def test_the_file_is_private_and_used_by_one(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode 0600; a second balancer on the same file does not start."""
    place = FilePlace(tmp_path / "registry.db")
    with closing(world.open(place)):
        assert stat.S_IMODE(place.path.stat().st_mode) == 0o600
        monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.01)
        with pytest.raises(ConfigError, match="in use by another process"):
            world.open(place)


def test_many_keys_are_certified_together_and_each_alone(world: Any, registry: SqlRegistry) -> None:
    """One that is refused keeps no other; two manifests of one key are not both taken; once more is the same."""
    manifests = []
    for number in range(4):
        order = world.order(f"key-{number}")
        reserved = registry.reserve(order, "node-0", world.now_ms)
        manifests.append(world.manifest(order, reserved.attempt, reserved.holders))
    other = world.manifest(order, reserved.attempt, reserved.holders, salt=b"other")
    commits = [(each, world.receipts(each)) for each in (*manifests, other)]
    commits[1] = (manifests[1], [])
    with registry.together():
        first, refused, *last, twice = registry.commit_all(commits, world.now_ms)
    assert "0 receipts" in str(refused)
    assert "two manifests of 'key-3' at once" in str(twice)
    assert isinstance(refused, ManifestError)
    assert isinstance(twice, ManifestError)
    made = [first, *last]
    for raw, manifest in zip(made, (manifests[0], *manifests[2:]), strict=True):
        assert isinstance(raw, bytes)
        open_certificate(raw, open_key_manifest(manifest, world.cluster), world.cluster)
    assert len({read_unverified(raw).serial for raw in made if isinstance(raw, bytes)}) == 3
    assert registry.count() == 3
    with registry.together():
        assert registry.commit_all([commits[0], commits[3]], world.now_ms) == [made[0], made[2]]
    assert registry.commit(manifests[1], world.receipts(manifests[1]), world.now_ms)
    assert registry.count() == 4


def test_foreign_newer_and_damaged_files_are_refused(
    world: Any, make_world: Callable[..., Any], tmp_path: Path
) -> None:
    """Another cluster's registry, a newer schema and garbage are refused by name."""
    place = FilePlace(tmp_path / "registry.db")
    world.open(place).close()
    with pytest.raises(ConfigError, match="belongs to the cluster pinned by"):
        make_world("other").open(place)
    place.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="schema version 99; this software knows 1 to 8"):
        world.open(place)
    place.path.write_bytes(b"no database" * 1000)
    with pytest.raises(ConfigError, match="no usable registry"):
        world.open(place)


@pytest.mark.parametrize("change", ["attempt = 7", "state = 2", "certificate = name", "holders = name"])
def test_a_changed_row_is_noticed(world: Any, place: Place, change: str) -> None:
    """A row that the disk changed, or somebody who can write the database, is refused and not believed."""
    order = world.order()
    first = world.open(place)
    first.reserve(order, "node-0", world.now_ms)
    first.close()
    place.execute(f"UPDATE keys SET {change}")  # noqa: S608 - the parameters above
    second = world.open(place)
    with pytest.raises(RegistryUnavailable, match="damaged"):
        second.outcome(key_id_of(order), 1, world.now_ms)
    second.close()


def test_old_leftovers_are_pruned(world: Any, place: Place) -> None:
    """Aborted reservations and notes go a day after, at the next start; keys stay."""
    first = world.open(place)
    lost = world.order("lost")
    first.reserve(lost, "node-0", world.now_ms)
    first.outcome(key_id_of(lost), 1, late(world))
    first.outcome(world.key_id(), 1, world.now_ms)
    world.commit(first, world.order("kept"))
    first.close()
    world.open(place, world.now_ms + 3 * registry_module.KEEP_MS).close()
    assert place.execute("SELECT COUNT(*) FROM keys") == [(1,)]
    assert place.execute("SELECT COUNT(*) FROM refused") == [(0,)]


# --- against a model ---


@dataclass
class Model:
    """What should be true of one key id."""

    order: bytes
    name: str
    expires_ms: int
    state: str = "new"
    attempt: int = 0
    dealer: str = ""
    holders: list[str] = field(default_factory=list)
    told_aborted: set[int] = field(default_factory=set)
    manifest: bytes = b""


class RegistryMachine(RuleBasedStateMachine):
    """Random orders, retries, commits, questions, destructions, restarts and time, beside a plain model."""

    world: Any

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="kq-registry-"))
        self.place = FilePlace(self.folder / "r.db")
        self.now = self.world.now_ms
        self.registry = self.world.open(self.place)
        self.keys: list[Model] = []

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    def expired(self, key: Model) -> bool:
        return key.expires_ms + CLOCK_SKEW_MS < self.now

    @rule(name=st.sampled_from("abc"), lifetime=st.integers(1, 60_000))
    def new_order(self, name: str, lifetime: int) -> None:
        if len(self.keys) < 12:
            expires = self.now + lifetime
            self.keys.append(Model(self.world.order(name, expires_ms=expires), name, expires))

    @rule(pick=st.randoms(use_true_random=False), dealer=st.sampled_from(["node-0", "node-1"]))
    def reserve(self, pick: Any, dealer: str) -> None:
        if not self.keys:
            return
        key = pick.choice(self.keys)
        rivals = [each for each in self.keys if each is not key and each.name == key.name]
        blocked = any(
            each.state == "committed" or (each.state == "reserved" and not self.expired(each)) for each in rivals
        )
        if key.state == "committed":
            again = self.registry.reserve(key.order, dealer, self.now)
            assert (again.attempt, again.manifest) == (0, key.manifest)
        elif key.state == "destroyed" or self.expired(key) or blocked:
            with pytest.raises((KeyNotFound, ManifestError, KeyExists)):
                self.registry.reserve(key.order, dealer, self.now)
        else:
            reserved = self.registry.reserve(key.order, dealer, self.now)
            assert reserved.attempt > key.attempt
            assert reserved.attempt not in key.told_aborted
            key.told_aborted |= {open_abort(each, self.world.cluster).attempt for each in reserved.aborts}
            key.state, key.attempt, key.dealer, key.holders = "reserved", reserved.attempt, dealer, reserved.holders
            for each in rivals:
                if each.state == "reserved":
                    each.state = "aborted"

    @rule(pick=st.randoms(use_true_random=False), back=st.integers(0, 1))
    def commit(self, pick: Any, back: int) -> None:
        tried = [each for each in self.keys if each.attempt > back]
        if not tried:
            return
        key = pick.choice(tried)
        attempt = key.attempt - back
        manifest = self.world.manifest(key.order, attempt, key.holders, key.dealer)
        may = key.state == "reserved" and back == 0 and not self.expired(key)
        if may or (key.state in ("committed", "destroyed") and manifest == key.manifest):
            assert attempt not in key.told_aborted
            self.registry.commit(manifest, self.world.receipts(manifest), self.now)
            if may:
                key.state, key.manifest = "committed", manifest
        else:
            with pytest.raises(ManifestError):
                self.registry.commit(manifest, self.world.receipts(manifest), self.now)

    @rule(pick=st.randoms(use_true_random=False), attempt=st.integers(1, 6))
    def ask(self, pick: Any, attempt: int) -> None:
        if not self.keys:
            return
        key = pick.choice(self.keys)
        reply = self.registry.outcome(key_id_of(key.order), attempt, self.now)
        if reply.state == "aborted":
            key.told_aborted.add(attempt)
            if attempt == key.attempt:
                assert key.state == "aborted" or (key.state == "reserved" and self.expired(key))
                key.state = "aborted"
        elif reply.state == "committed":
            assert key.state in ("committed", "destroyed")
            assert attempt == key.attempt
        else:
            assert attempt > key.attempt or (key.state, attempt) == ("reserved", key.attempt)

    @rule(pick=st.randoms(use_true_random=False))
    def destroy(self, pick: Any) -> None:
        if not self.keys:
            return
        key = pick.choice(self.keys)
        order = self.world.destroy_order(key.order, expires_ms=self.now)
        if key.state in ("committed", "destroyed"):
            self.registry.destroy(order, self.now)
            key.state = "destroyed"
        else:
            with pytest.raises(KeyNotFound):
                self.registry.destroy(order, self.now)

    @rule(passed=st.integers(1, 40_000))
    def wait(self, passed: int) -> None:
        self.now += passed

    @rule()
    def restart(self) -> None:
        epoch = self.registry.fencing_epoch
        self.registry.close()
        self.registry = self.world.open(self.place, self.now)
        assert self.registry.fencing_epoch == epoch + 1

    @invariant()
    def books_agree(self) -> None:
        """One live key a name; the pages tell exactly the committed and destroyed ones."""
        live = [each.name for each in self.keys if each.state == "committed"]
        assert len(set(live)) == len(live) == self.registry.count()
        found = {
            (entry.key_id, entry.state) for node in self.world.nodes for entry in self.registry.sync(node, 0).entries
        }
        assert found == {
            (key_id_of(each.order), each.state) for each in self.keys if each.state in ("committed", "destroyed")
        }


def test_against_a_model(make_world: Callable[..., Any]) -> None:
    """No sequence of calls, restarts and time breaks the registry's invariants."""
    machine = type("Machine", (RegistryMachine,), {"world": make_world()})
    run_state_machine_as_test(
        machine, settings=settings(max_examples=30, stateful_step_count=40, deadline=None, derandomize=True)
    )


def test_the_usual_shape_is_that_of_most_keys(world: Any, place: Place) -> None:
    """Threshold and shares of most committed keys, for the planner; nothing without a key."""
    with closing(world.open(place)) as registry:
        assert registry.usual_shape() is None
        world.commit(registry, world.order("a", threshold=2, shares=4))
        for name in ("b", "c"):
            world.commit(registry, world.order(name, threshold=3, shares=5))
        assert registry.usual_shape() == (3, 5)
