"""A registry that is made anew from what nodes keep: the same books, whatever one of the nodes says."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs
from registry_places import FilePlace, Place

from balancer.rebuild import Gathered
from balancer.registry import SqlRegistry
from engine.errors import KeyExists, KeyNotFound
from engine.protocol.manifest import create_orders, read_key_manifest
from engine.protocol.requests import SyncEntry, SyncPage
from engine.protocol.settings import SettingsOrder, issue_settings
from engine.protocol.signed import read_unverified, sign_envelope

LATER_MS = 3_600_000


def told_by(registry: SqlRegistry, world: Any, fencing_epoch: int = 7) -> dict[str, SyncPage]:
    """What each node keeps that knows what this registry's books tell it."""
    return {
        node: structs.replace(registry.sync(node, 0), fencing_epoch=fencing_epoch)
        for node in world.nodes
        if registry.sync(node, 0).entries
    }


def rebuilt(registry: SqlRegistry, world: Any, pages: Iterable[tuple[str, SyncPage]]) -> list[str]:
    """Have the registry take it in; the remarks."""
    gathered = Gathered(world.cluster)
    for node, page in pages:
        gathered.take(node, page)
    remarks = [registry.restore(known, world.now_ms) for known in gathered.keys(world.now_ms)]
    for settings in gathered.settings():
        registry.restore_settings(settings)
    registry.restored(gathered.fencing_epoch, 0)
    return [*gathered.remarks, *filter(None, remarks)]


def books(registry: SqlRegistry, world: Any) -> dict[str, set[SyncEntry]]:
    return {node: set(registry.sync(node, 0).entries) for node in world.nodes}


def settings_of(world: Any, manifest: bytes, **changes: Any) -> bytes:
    told = read_key_manifest(manifest).manifest
    fields = {
        "name": told.name, "lineage": told.lineage, "serial": world.now_ms, "previous": 0, "enabled": False,
        "min_version": 1, "destroy_at_ms": 0, "expires_ms": world.now_ms + 60_000,
    }  # fmt: skip
    return issue_settings(SettingsOrder(**(fields | changes)), world.keys["alice"])


def limited(world: Any, name: str) -> bytes:
    order = structs.replace(create_orders.decode(read_unverified(world.order(name)).payload), uses_max=64)
    return sign_envelope("order.create", 1, create_orders.encode(order), world.keys["alice"])


def test_the_same_books_come_out(world: Any, place: Place, tmp_path: Path) -> None:
    """Keys, versions, settings, tombstones; then everything goes on, and nothing that was signed before is repeated."""
    first = world.order("plain")
    with closing(world.open(FilePlace(tmp_path / "lost.db"))) as lost:
        manifest = world.commit(lost, first)
        world.commit(lost, world.rotation(first))
        gone = world.order("gone")
        world.commit(lost, gone)
        lost.destroy(world.destroy_order(gone), world.now_ms)
        lost.settings(settings_of(world, world.commit(lost, world.order("off"))), world.now_ms)
        few = read_key_manifest(world.commit(lost, limited(world, "few"))).manifest
        due = settings_of(world, world.commit(lost, world.order("due")), destroy_at_ms=world.now_ms + LATER_MS)
        lost.settings(due, world.now_ms)
        lost.destroy_due(world.now_ms + LATER_MS)
        pages, expected = told_by(lost, world), books(lost, world)
    with closing(world.open(place)) as registry:
        assert rebuilt(registry, world, pages.items()) == []
        assert books(registry, world) == expected
        assert registry.count() == 4
        assert rebuilt(registry, world, pages.items()) == []
        assert books(registry, world) == expected
        assert registry.quota(few.key_id, bytes(16), few.holders[0].node) == 0
        with pytest.raises(KeyNotFound, match="was destroyed"):
            registry.reserve(gone, "node-0", world.now_ms)
        with pytest.raises(KeyExists):
            registry.reserve(world.order("plain"), "node-0", world.now_ms)
        key_id = read_key_manifest(manifest).manifest.key_id
        assert registry.outcome(key_id, 1, world.now_ms).state == "committed"
        assert registry.outcome(key_id, 2, world.now_ms).state == "pending"
        world.commit(registry, world.rotation(first, 3))
        registry.destroy(world.destroy_order(first), world.now_ms)
    with closing(world.open(place)) as again:
        assert again.fencing_epoch > 7
        assert again.count() == 2


def test_older_books_are_brought_up_to_date(world: Any, place: Place) -> None:
    """What they have is kept, also where no node tells of it any more."""
    registry = world.open(place)
    world.commit(registry, world.order("before"))
    only_here = world.order("reserved")
    registry.reserve(only_here, "node-0", world.now_ms)
    registry.close()
    saved = place.save()
    registry = world.open(place)
    world.commit(registry, world.order("after"))
    pages, expected = told_by(registry, world), books(registry, world)
    registry.close()
    place.put_back(saved)
    with closing(world.open(place)) as older:
        assert rebuilt(older, world, pages.items()) == []
        assert {node: {each.key_id for each in found} for node, found in books(older, world).items()} == {
            node: {each.key_id for each in found} for node, found in expected.items()
        }
        assert older.reserve(only_here, "node-0", world.now_ms).attempt == 2


def test_what_one_node_makes_up_changes_nothing(world: Any, tmp_path: Path) -> None:
    """Forged or mixed up documents are left out and told; a destruction by an old order needs more than its word."""
    order = world.order("k", threshold=2, shares=3)
    with closing(world.open(FilePlace(tmp_path / "lost.db"))) as lost:
        one, other = (read_key_manifest(world.commit(lost, each)) for each in (order, world.order("l")))
        pages = told_by(lost, world)
        expected = books(lost, world)
        entries = {each.key_id: each for page in pages.values() for each in page.entries}
    good, second = entries[one.manifest.key_id], entries[other.manifest.key_id]
    stale = world.destroy_order(order, expires_ms=world.now_ms - LATER_MS)
    off = settings_of(world, one.raw)
    liar = structs.replace(
        pages[one.manifest.holders[0].node],
        entries=[
            structs.replace(good, certificate=second.certificate),
            structs.replace(good, key_id=second.key_id),
            structs.replace(good, manifest=world.manifest(world.order("m", client="bob"), 1, ["node-0"])),
            structs.replace(good, state="destroyed", document=world.destroy_order(order, name="l")),
            structs.replace(good, state="destroyed", document=off),
            structs.replace(good, settings=off),
            structs.replace(good, state="destroyed", document=stale),
        ],
    )
    pages[one.manifest.holders[0].node] = liar
    with closing(world.open(FilePlace(tmp_path / "new.db"))) as registry:
        remarks = rebuilt(registry, world, pages.items())
        assert len(remarks) == 6
        assert sum("is left out" in each for each in remarks) == 5
        assert any("tell of its destruction by an order that has expired" in each for each in remarks)
        assert {each.key_id for found in books(registry, world).values() for each in found} == {
            each.key_id for found in expected.values() for each in found
        }
        assert all(each.state == "committed" and not each.settings for each in registry.sync("node-0", 0).entries)


def test_a_destruction_that_leaves_too_few_holders_is_carried_out(world: Any, tmp_path: Path) -> None:
    """Also where its order has expired: the key could not be put together any more."""
    order = world.order("k", threshold=2, shares=3)
    with closing(world.open(FilePlace(tmp_path / "lost.db"))) as lost:
        told = read_key_manifest(world.commit(lost, order)).manifest
        pages = told_by(lost, world)
    stale = world.destroy_order(order, expires_ms=world.now_ms - LATER_MS)
    for holder in told.holders[:2]:
        (entry,) = pages[holder.node].entries
        gone = structs.replace(entry, state="destroyed", document=stale)
        pages[holder.node] = structs.replace(pages[holder.node], entries=[gone])
    with closing(world.open(FilePlace(tmp_path / "new.db"))) as registry:
        assert rebuilt(registry, world, pages.items()) == []
        assert registry.count() == 0
        assert registry.sync(told.holders[2].node, 0).entries[0].state == "destroyed"


def test_of_two_keys_of_one_name_the_later_one_has_it(world: Any, tmp_path: Path) -> None:
    """As where a holder missed the destruction of the first; that one is told and left out."""
    pages = []
    for number, later_ms in enumerate((0, 10_000)):
        with closing(world.open(FilePlace(tmp_path / f"{number}.db"))) as lost:
            order = world.order("k", expires_ms=world.now_ms + 20_000 + later_ms)
            newest = read_key_manifest(world.commit(lost, order)).manifest.key_id
            pages += told_by(lost, world).items()
    with closing(world.open(FilePlace(tmp_path / "new.db"))) as registry:
        (remark,) = rebuilt(registry, world, pages)
        assert "the name is taken by another key" in remark
        assert {each.key_id for found in books(registry, world).values() for each in found} == {newest}
