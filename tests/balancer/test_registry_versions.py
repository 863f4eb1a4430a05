"""Versions of keys in the registry: who may make one, what becomes of a lost one, and what ends with the key."""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from registry_places import LEAD_S, FilePlace, Place, ServerPlace

from balancer import registry as registry_module
from balancer.postgres import PostgresRegistry
from balancer.registry import _MIGRATIONS, ROTATE_LEASE_MS, SqlRegistry
from engine.errors import AccessDenied, ConfigError, KeyExists, KeyNotFound, ManifestError, Overloaded
from engine.protocol.manifest import create_orders, read_key_manifest
from engine.protocol.signed import read_unverified


@pytest.fixture
def registry(world: Any, place: Place) -> SqlRegistry:
    return world.open(place)


def newest(registry: SqlRegistry, node: str) -> list[tuple[int, str]]:
    """Version and state of each key that the books tell a node of."""
    entries = registry.sync(node, 0).entries
    return [(read_key_manifest(each.manifest).manifest.version, each.state) for each in entries]


def test_a_version_follows_the_newest_one(world: Any, registry: SqlRegistry) -> None:
    """By one, of the same lineage, name and algorithm; each has the holders of the one before, who hear of it."""
    first = world.order("k")
    world.commit(registry, first)
    for order, kind, match in (
        (world.rotation(first, 3), ManifestError, "version 3 of 'k' does not follow the newest, 1"),
        (world.rotation(first, name="other"), KeyNotFound, "no key 'other' of this lineage"),
        (world.rotation(first, lineage=bytes(16)), KeyNotFound, "no key 'k' of this lineage"),
        (world.rotation(first, algorithm="aes-128-gcm"), ManifestError, "'k' is aes-256-gcm"),
        (world.rotation(first, client="bob"), AccessDenied, "may not rotate"),
    ):
        with pytest.raises(kind, match=match):
            registry.reserve(order, "node-0", world.now_ms)
    second = world.rotation(first)
    manifest = world.commit(registry, second)
    told = read_key_manifest(manifest).manifest
    assert (told.version, told.lineage) == (2, create_orders.decode(read_unverified(first).payload).key_id)
    assert registry.count() == 2
    assert newest(registry, told.holders[0].node) == [(1, "committed"), (2, "committed")]
    with pytest.raises(KeyExists, match="the name 'k' is taken"):
        registry.reserve(world.order("k"), "node-0", world.now_ms)


def test_who_comes_too_late_gets_the_version_that_is_there(world: Any, registry: SqlRegistry) -> None:
    """Whatever its order was for; and the order that made it, again."""
    first = world.order("k")
    world.commit(registry, first)
    second, late = world.rotation(first), world.rotation(first)
    manifest = world.commit(registry, second)
    for order in (late, second):
        reserved = registry.reserve(order, "node-1", world.now_ms)
        assert (reserved.attempt, reserved.manifest) == (0, manifest)
    third = world.commit(registry, world.rotation(first, 3))
    assert registry.reserve(late, "node-1", world.now_ms).manifest == third


def test_one_rotation_at_a_time(world: Any, registry: SqlRegistry) -> None:
    """Another order waits until the one under way is done, or its dealer counts as dead: then it never commits."""
    first = world.order("k")
    world.commit(registry, first)
    slow, next_ = world.rotation(first), world.rotation(first)
    reserved = registry.reserve(slow, "node-0", world.now_ms)
    with pytest.raises(Overloaded, match=f"'k' is being rotated; its dealer has {ROTATE_LEASE_MS} ms left"):
        registry.reserve(next_, "node-1", world.now_ms)
    later_ms = world.now_ms + ROTATE_LEASE_MS
    manifest = world.commit(registry, next_, later_ms, "node-1")
    dead = world.manifest(slow, reserved.attempt, reserved.holders)
    with pytest.raises(ManifestError, match="attempt 1 is aborted"):
        registry.commit(dead, world.receipts(dead), later_ms)
    assert registry.outcome(read_key_manifest(dead).manifest.key_id, 1, later_ms).state == "aborted"
    assert registry.reserve(slow, "node-0", later_ms).manifest == manifest


def test_destruction_is_of_all_versions(world: Any, registry: SqlRegistry) -> None:
    """Also of one that is being made; an order that names a later version destroys nothing. The name is free."""
    first = world.order("k")
    world.commit(registry, first)
    second = world.rotation(first)
    world.commit(registry, second)
    third = world.rotation(first, 3)
    reserved = registry.reserve(third, "node-0", world.now_ms)
    with pytest.raises(KeyNotFound, match="no key 'k' of this id"):
        registry.destroy(world.destroy_order(second), world.now_ms)
    for _ in range(2):
        registry.destroy(world.destroy_order(first), world.now_ms)
    assert registry.count() == 0
    late = world.manifest(third, reserved.attempt, reserved.holders)
    with pytest.raises(ManifestError, match="is aborted"):
        registry.commit(late, world.receipts(late), world.now_ms)
    for order in (third, world.rotation(first, 3)):
        with pytest.raises(KeyNotFound, match="no key 'k' of this lineage"):
            registry.reserve(order, "node-0", world.now_ms)
    assert newest(registry, reserved.holders[0]) == [(1, "destroyed"), (2, "destroyed")]
    world.commit(registry, world.order("k"))


def test_a_registry_that_fell_back_takes_a_version_in(world: Any, place: Place) -> None:
    """By the manifest and certificate of the next one's dealer, checked; not of another key, not without receipts."""
    before = world.open(place)
    first = world.order("k")
    world.commit(before, first)
    before.close()
    saved = place.save()
    after = world.open(place)
    second = world.rotation(first)
    reserved = after.reserve(second, "node-0", world.now_ms)
    manifest = world.manifest(second, reserved.attempt, reserved.holders)
    certificate = after.commit(manifest, world.receipts(manifest), world.now_ms)
    after.close()
    place.put_back(saved)
    fallen = world.open(place)
    third = world.rotation(first, 3)
    with pytest.raises(ManifestError, match="does not follow the newest, 1"):
        fallen.reserve(third, "node-0", world.now_ms)
    with pytest.raises(ManifestError):
        fallen.reserve(third, "node-0", world.now_ms, manifest, manifest)
    other = world.commit(fallen, world.order("other"))
    with pytest.raises(ManifestError, match="is of another key"):
        fallen.reserve(third, "node-0", world.now_ms, other, certificate)
    assert fallen.reserve(third, "node-0", world.now_ms, manifest, certificate).attempt == 1
    assert newest(fallen, reserved.holders[0])[-1] == (2, "committed")
    fallen.close()


def test_a_registry_of_an_earlier_release_is_taken_over_whole(world: Any, tmp_path: Path) -> None:
    """Its tables are those of schema 5, written by the software of then for this very cluster."""
    place = FilePlace(tmp_path / "registry.db")
    store = sqlite3.connect(place.path)
    store.executescript((Path(__file__).parent / "data" / "registry_schema_5.sql").read_text(encoding="utf-8"))
    store.close()
    assert place.execute("PRAGMA user_version") == [(5,)]
    place.execute("UPDATE cluster SET pin = ?", world.cluster.pin)  # the manifest has more fields by now
    registry = world.open(place)
    assert registry.count() == 2
    holder = next(name for name in world.nodes if newest(registry, name))
    assert newest(registry, holder) == [(1, "committed"), (2, "committed"), (1, "destroyed")]
    with pytest.raises(KeyExists, match="the name 'orders' is taken"):
        registry.reserve(world.order("orders", bytes(15) + b"\x63"), "node-0", world.now_ms)
    made = world.commit(registry, world.order("new", bytes(15) + b"\x64"))
    key_id = read_key_manifest(made).manifest.key_id
    assert registry.quota(key_id, bytes(16), read_key_manifest(made).manifest.holders[0].node) > 0
    registry.close()
    assert place.execute("PRAGMA user_version") == [(len(_MIGRATIONS),)]


def test_an_earlier_schema_is_brought_to_todays_and_a_later_one_refused(
    world: Any, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file and in PostgreSQL alike. A balancer that does not know the schema changes nothing and does not lead."""
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "_MIGRATIONS", _MIGRATIONS[:-1])
        before = world.open(place)
        order = world.order("k")
        made = read_key_manifest(world.commit(before, order)).manifest
        before.close()
    registry = world.open(place)
    assert registry.count() == 1
    assert registry.quota(made.key_id, bytes(16), made.holders[0].node) > 0  # in a column that the last step added
    registry.close()
    refused = f"schema version {len(_MIGRATIONS)}; this software knows 1 to {len(_MIGRATIONS) - 1}"
    with monkeypatch.context() as patch:
        patch.setattr(registry_module, "_MIGRATIONS", _MIGRATIONS[:-1])
        if isinstance(place, ServerPlace):
            other = PostgresRegistry(place.conninfo, world.cluster, world.keys["balancer"], lambda: world.now_ms)
            with closing(other):
                other.start()
                until = time.monotonic() + LEAD_S
                while refused not in other.problem:
                    assert time.monotonic() < until, other.problem
                    time.sleep(0.01)
                assert not other.term
        else:
            with pytest.raises(ConfigError, match=refused):
                world.open(place)
    again = world.open(place)
    assert again.count() == 1
    again.close()


def test_keys_from_before_versions_are_version_1(world: Any, tmp_path: Path) -> None:
    """A registry of the schema before goes on: its keys are rotated, and their names are taken."""
    place = FilePlace(tmp_path / "registry.db")
    registry = world.open(place)
    first = world.order("k")
    world.commit(registry, first)
    registry.close()
    store = sqlite3.connect(place.path)
    store.executescript(
        "DROP TABLE quotas; DROP TABLE grants; DROP TABLE versions; DROP INDEX by_name; DROP INDEX shares_of;"
        "CREATE UNIQUE INDEX live_names ON keys (name) WHERE state IN (1, 2);"
        "PRAGMA user_version = 4"
    )
    store.close()
    registry = world.open(place)
    with pytest.raises(KeyExists, match="the name 'k' is taken"):
        registry.reserve(world.order("k"), "node-0", world.now_ms)
    assert read_key_manifest(world.commit(registry, world.rotation(first))).manifest.version == 2
