"""The registry's part in the settings of keys: one after the other, never back, and destroyed when the time comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from registry_places import Place

from balancer.registry import SqlRegistry
from engine.errors import AccessDenied, KeyExists, KeyNotFound, ManifestError, RegistryUnavailable
from engine.protocol.manifest import key_manifests
from engine.protocol.settings import SettingsOrder, book_settings, issue_settings, open_settings, read_settings
from engine.protocol.signed import read_unverified

HOUR_MS = 3_600_000


class Key:
    """A committed key, and settings made for it."""

    def __init__(self, world: Any, place: Place) -> None:
        self.world, self.place = world, place
        self.registry: SqlRegistry = world.open(place)
        self.created = world.order()
        self.manifest: bytes = world.commit(self.registry, self.created)
        told = key_manifests.decode(read_unverified(self.manifest).payload)
        self.key_id, self.nodes = told.key_id, [holder.node for holder in told.holders]

    def signed(self, serial: int, previous: int = 0, client: str = "alice", **changes: Any) -> bytes:
        """``serial`` and ``previous`` count from the world's time on; ``previous`` 0: there were none."""
        now_ms = self.world.now_ms
        fields = {
            "name": "orders",
            "lineage": self.key_id,
            "serial": now_ms + serial,
            "previous": now_ms + previous if previous else 0,
            "enabled": False,
            "min_version": 1,
            "destroy_at_ms": 0,
            "expires_ms": now_ms + 60_000,
            **changes,
        }
        return issue_settings(SettingsOrder(**fields), self.world.keys[client])

    def set(self, raw: bytes, later_ms: int = 0) -> Any:
        """What is in force then, checked as a node does."""
        booked = self.registry.settings(raw, self.world.now_ms + later_ms)
        settings = open_settings(booked, self.world.cluster, None)
        assert settings.booked
        return settings

    def told(self, node: str = "") -> Any:
        (entry,) = self.registry.sync(node or self.nodes[0], 0).entries
        return entry

    def reopen(self) -> None:
        self.registry.close()
        self.registry = self.world.open(self.place)


@pytest.fixture
def key(world: Any, place: Place) -> Iterator[Key]:
    made = Key(world, place)
    yield made
    made.registry.close()


def test_settings_are_booked_countersigned_and_told_to_every_holder(key: Key) -> None:
    pages = {node: key.registry.sync(node, 0) for node in key.nodes}
    assert all(page.entries[0].settings == b"" for page in pages.values())
    settings = key.set(key.signed(1))
    for node, page in pages.items():
        (entry,) = key.registry.sync(node, page.last).entries
        assert (entry.state, entry.settings, entry.document) == ("committed", settings.raw, b"")
    assert key.set(key.signed(1)).raw == settings.raw
    assert key.registry.sync(key.nodes[0], key.registry.sync(key.nodes[0], 0).last).entries == []
    key.reopen()
    assert key.told().settings == settings.raw
    assert key.set(key.signed(1)).raw == settings.raw


def test_of_two_clients_that_began_from_the_same_one_is_told_the_other_s(key: Key) -> None:
    """So no change gets lost: who was second begins again from what the first one ordered."""
    first = key.set(key.signed(1))
    assert key.set(key.signed(2, min_version=1, enabled=True)).raw == first.raw
    assert key.set(key.signed(2, previous=1, enabled=True)).order.enabled
    assert key.set(key.signed(1)).order.enabled


def test_who_knows_later_settings_than_a_registry_that_fell_back_goes_on_from_them(key: Key) -> None:
    assert key.set(key.signed(1)).serial == key.world.now_ms + 1
    assert key.set(key.signed(9, previous=8, enabled=True)).serial == key.world.now_ms + 9


def test_each_bad_order_is_refused_and_books_nothing(key: Key) -> None:
    now_ms = key.world.now_ms
    cases: list[tuple[bytes, int, type[Exception], str]] = [
        (key.signed(1), 66_000, ManifestError, "expired"),
        (key.signed(1, client="bob"), 0, AccessDenied, "it takes settings"),
        (key.signed(1, client="node-0"), 0, ManifestError, "may not sign"),
        (key.signed(1, lineage=bytes(16)), 0, KeyNotFound, "no key 'orders' of this id"),
        (key.signed(1, name="others"), 0, KeyNotFound, "no key 'others' of this id"),
        (key.signed(1, min_version=2), 0, ValueError, "the newest version of 'orders' is 1: 2 can't be the least"),
        (key.signed(1, destroy_at_ms=now_ms), 0, ValueError, "can't be destroyed 0 ms ago"),
        (book_settings(key.signed(1), key.world.keys["node-0"]), 0, ManifestError, "'node-0' may not sign"),
        (key.created, 0, ManifestError, "came where a 'order.settings' was expected"),
    ]
    for raw, later_ms, error, match in cases:
        with pytest.raises(error, match=match):
            key.registry.settings(raw, now_ms + later_ms)
        assert key.told().settings == b""


def test_a_key_is_destroyed_when_its_time_comes(key: Key) -> None:
    """Not before; then for good, for holders that come back later too, and its name is free."""
    at_ms = key.world.now_ms + HOUR_MS
    due = key.set(key.signed(1, destroy_at_ms=at_ms))
    assert key.registry.destroy_due(at_ms - 1) == 0
    assert key.told().state == "committed"
    with pytest.raises(KeyExists):
        key.registry.reserve(key.world.order(), "node-0", key.world.now_ms)
    key.reopen()
    assert key.registry.destroy_due(at_ms) == 1
    assert key.registry.destroy_due(at_ms + HOUR_MS) == 0
    for node in key.nodes:
        entry = key.told(node)
        assert (entry.state, entry.document, entry.settings) == ("destroyed", due.raw, due.raw)
    assert key.registry.count() == 0
    with pytest.raises(KeyNotFound):
        key.registry.settings(key.signed(2, previous=1, enabled=True), key.world.now_ms)
    assert key.registry.reserve(key.world.order(), "node-0", key.world.now_ms).attempt == 1


def test_a_destruction_is_taken_back_until_its_time_and_not_after(key: Key) -> None:
    at_ms = key.world.now_ms + 30_000
    key.set(key.signed(1, destroy_at_ms=at_ms))
    restored = key.signed(2, previous=1, enabled=True)
    with pytest.raises(KeyNotFound, match="the time of the key 'orders' has come"):
        key.registry.settings(restored, at_ms)
    key.set(restored, later_ms=29_999)
    assert key.registry.destroy_due(at_ms + HOUR_MS) == 0
    assert key.told().state == "committed"


def test_a_registry_that_fell_back_is_told_by_nodes(key: Key) -> None:
    """Also where it has destroyed meanwhile what was restored before: the nodes never did."""
    at_ms = key.world.now_ms + HOUR_MS
    due = key.set(key.signed(1, destroy_at_ms=at_ms))
    key.registry.close()
    saved = key.place.save()
    key.registry = key.world.open(key.place)
    restored = key.set(key.signed(2, previous=1, enabled=True))
    key.registry.close()
    key.place.put_back(saved)
    key.registry = key.world.open(key.place)
    assert key.told().settings == due.raw
    assert key.registry.destroy_due(at_ms) == 1
    assert key.told().state == "destroyed"
    assert key.set(restored.raw, later_ms=30 * 24 * HOUR_MS).raw == restored.raw
    entry = key.told()
    assert (entry.state, entry.document, entry.settings) == ("committed", b"", restored.raw)
    assert key.set(due.raw).raw == restored.raw
    assert key.registry.destroy_due(at_ms + HOUR_MS) == 0


def test_what_is_booked_stays_after_its_client_left(key: Key) -> None:
    """A countersigned document is taken long after it expired; one that is not, is not."""
    raw = key.signed(1)
    booked = book_settings(raw, key.world.keys["balancer"])
    with pytest.raises(ManifestError, match="expired"):
        key.registry.settings(raw, key.world.now_ms + HOUR_MS)
    assert key.set(booked, later_ms=HOUR_MS).digest == read_settings(raw).digest


def test_damaged_settings_are_told_and_not_taken_for_none(key: Key) -> None:
    key.set(key.signed(1))
    key.registry.close()
    key.place.execute("UPDATE settings SET serial = serial - 1")
    key.registry = key.world.open(key.place)
    with pytest.raises(RegistryUnavailable, match="damaged"):
        key.registry.sync(key.nodes[0], 0)
    with pytest.raises(RegistryUnavailable, match="damaged"):
        key.registry.settings(key.signed(2), key.world.now_ms)


def test_another_key_of_the_name_has_no_settings(key: Key) -> None:
    key.set(key.signed(1))
    key.registry.destroy(key.world.destroy_order(key.created), key.world.now_ms)
    order = key.world.order()
    key.world.commit(key.registry, order)
    entries = [each for each in key.registry.sync(key.nodes[0], 0).entries if each.state == "committed"]
    assert [each.settings for each in entries] == [b""]
