"""Where keys are, as the registry counts it: by group and holders, what lacks a share, what is old, and targets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from registry_places import Place

from balancer import places as places_module
from balancer.places import Crowd, KeyPlace
from balancer.registry import SqlRegistry
from engine.protocol.manifest import PolicyRule, chain_pin, issue_cluster_manifest, open_chain


@pytest.fixture
def registry(world: Any, place: Place) -> Iterator[SqlRegistry]:
    opened = world.open(place)
    yield opened
    opened.close()


def made(world: Any, registry: SqlRegistry, name: str, *, without: str = "", **shape: int) -> bytes:
    """A committed key, of which one holder may have given no receipt; its order."""
    order = world.order(name, **shape)
    reserved = registry.reserve(order, "node-0", world.now_ms)
    manifest = world.manifest(order, reserved.attempt, reserved.holders)
    signed = [node for node in reserved.holders if node != without]
    registry.commit(manifest, world.receipts(manifest, signed_by=signed), world.now_ms)
    return bytes(order)


def crowd(world: Any, name: str, threshold: int = 2, shares: int = 3, *, grows: bool = False) -> Crowd:
    group = world.cluster.group_of(name)
    return Crowd(group, world.cluster.group_holders(group)[:shares], threshold, shares, grows)


def test_keys_are_counted_and_found_by_where_they_are(world: Any, registry: SqlRegistry) -> None:
    """A key counts from its commit to its destruction, in one crowd; keys of a crowd come page by page."""
    names = [f"key/{number}" for number in range(40)]
    orders = {name: made(world, registry, name) for name in names}
    made(world, registry, "other", threshold=3, shares=5)
    registry.reserve(world.order("reserved"), "node-0", world.now_ms)
    expected = Counter(crowd(world, name) for name in names)
    expected[crowd(world, "other", 3, 5)] += 1
    assert registry.places(lambda places: places.crowds()) == expected
    for each, count in expected.items():
        found = registry.places(lambda places, each=each: places.of_crowd(each, None, 100))
        assert [key.crowd for key in found] == [each] * count
        assert [key.key_id for key in found] == sorted(key.key_id for key in found)
        second = registry.places(lambda places, each=each, found=found: places.of_crowd(each, found[0], 100))
        assert second == found[1:]
    assert {
        key.name for each in expected for key in registry.places(lambda p, each=each: p.of_crowd(each, None, 9))
    } == {
        *names,
        "other",
    }
    registry.destroy(world.destroy_order(orders["key/0"]), world.now_ms)
    expected -= Counter([crowd(world, "key/0")])
    assert registry.places(lambda places: places.crowds()) == expected


def test_keys_that_lack_a_share_are_told_when_their_order_is_over(world: Any, registry: SqlRegistry) -> None:
    made(world, registry, "whole")
    holders = world.cluster.group_holders(world.cluster.group_of("thin"))[:5]
    order = made(world, registry, "thin", without=holders[4], threshold=3, shares=5)
    expires_ms = world.now_ms + 60_000
    assert registry.places(lambda places: places.lacking(expires_ms, None, 9)) == []
    (found,) = registry.places(lambda places: places.lacking(expires_ms + 1, None, 9))
    assert (found.name, found.missing, found.epoch, found.since_ms) == ("thin", (holders[4],), 1, expires_ms)
    assert registry.places(lambda places: places.count_lacking(expires_ms + 1)) == 1
    assert registry.places(lambda places: places.lacking(expires_ms + 1, found, 9)) == []
    registry.destroy(world.destroy_order(order), world.now_ms)
    assert registry.places(lambda places: places.count_lacking(expires_ms + 1)) == 0


def test_degraded_keys_come_page_by_page(world: Any, registry: SqlRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a holder that is no node, or that gave no receipt in time, whichever way the pages are cut."""
    holders = world.cluster.group_holders(world.cluster.group_of("thin"))[:5]
    made(world, registry, "thin", without=holders[4], threshold=3, shares=5)
    for number in range(20):
        made(world, registry, f"key/{number}")
    late_ms, nodes = world.now_ms + 60_001, world.cluster.nodes.keys()

    def degraded(gone: str, now_ms: int, most: int) -> list[KeyPlace]:
        found, after, pages = [], b"", 0
        while after or not pages:
            some, after = registry.places(lambda p, after=after: p.degraded(nodes - {gone}, now_ms, after, most))
            assert len(some) <= most
            found, pages = [*found, *some], pages + 1
        return found

    assert degraded("", world.now_ms, 9) == []
    assert [(each.name, each.missing, each.version) for each in degraded("", late_ms, 9)] == [
        ("thin", (holders[4],), 1)
    ]
    on_first = {name for name in ("thin", *(f"key/{n}" for n in range(20))) if holders[0] in crowd(world, name).holders}
    for looked in (1, 2, 5, 21, 22, 2_000):
        monkeypatch.setattr(places_module, "DEGRADED_LOOKED", looked)
        for most in (1, 3, 100):
            found = degraded(holders[0], late_ms, most)
            assert [each.key_id for each in found] == sorted({each.key_id for each in found})
            assert {each.name for each in found} == {*on_first, "thin"}
            assert {each.missing for each in found if each.name == "thin"} == {(holders[0], holders[4])}


def test_the_oldest_come_first_and_those_of_threshold_1_never(world: Any, registry: SqlRegistry) -> None:
    for name, expires_ms in (("b", 3_000), ("a", 1_000), ("c", 3_000), ("d", 9_000)):
        order = world.order(name, expires_ms=world.now_ms + expires_ms)
        world.commit(registry, order)
    made(world, registry, "single", threshold=1, shares=2)
    due = world.now_ms + 5_000

    def older(after: Any, most: int) -> list[Any]:
        return registry.places(lambda places: places.older(due, after, most))

    found = older(None, 9)
    assert [key.name for key in found] == ["a", "b", "c"]
    assert older(found[0], 1) == found[1:2]
    assert older(found[1], 9) == found[2:]
    assert registry.places(lambda places: places.count_older(due, 9)) == 3
    assert registry.places(lambda places: places.count_older(due, 2)) == 2


def test_targets_are_kept_in_their_order(world: Any, place: Place) -> None:
    """Over a restart; a later one of a group comes last, and the others stay."""
    registry = world.open(place)
    registry.set_targets({7: ["node-1", "node-2"], 3: ["node-4"]})
    registry.set_targets({7: ["node-0"], 9: ["node-5", "node-3"]})
    registry.close()
    registry = world.open(place)
    told = registry.places(lambda places: places.targets())
    assert list(told.items()) == [(3, ("node-4",)), (7, ("node-0",)), (9, ("node-5", "node-3"))]
    registry.close()


def test_which_keys_may_grow_follows_the_policy(world: Any, place: Place) -> None:
    """Where it changed while nobody served; what a holder said that it lacks is not forgotten for it."""
    registry = world.open(place)
    made(world, registry, "hot/a")
    made(world, registry, "cold/a")
    key = registry.places(lambda places: places.of_crowd(crowd(world, "hot/a"), None, 9))[0]
    registry.lacking(key.crowd.holders[0], [(key.key_id, 1)])
    registry.close()
    before = world.cluster

    def ruled(*rules: PolicyRule) -> Any:
        members = list(world.cluster.members.values())
        chain = issue_cluster_manifest(name="test", members=members, rules=rules, operators=[world.keys["op"]])
        made = open_chain(chain, chain_pin(chain))
        return replace(made, pin=before.pin)

    for rules, hot in (([PolicyRule("bal*", "hot/*", ["grow"])], True), ([PolicyRule("*", "*", ["*"])], False)):
        world.cluster = ruled(*rules)
        registry = world.open(place)
        expected = {crowd(world, "hot/a", grows=hot): 1, crowd(world, "cold/a"): 1}
        assert registry.places(lambda places: places.crowds()) == expected
        (lacks,) = registry.places(lambda places: places.lacking(2**50, None, 9))
        assert (lacks.name, lacks.missing) == ("hot/a", key.crowd.holders[:1])
        registry.close()
