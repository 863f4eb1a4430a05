"""What a node that has just started must hear before it serves its keys, and what others tell it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from resharing import NODES, Scene

from engine.errors import KeyPending, ManifestError, QuorumUnavailable
from engine.protocol.requests import Destroy, SyncEntry
from nodes.catalogue import Catalogue
from nodes.returning import REPLY_BYTES, REPORT_EVERY_S, LackingReport, Returning, booked, recalled
from nodes.store import Row
from nodes.token import Lane, Token

KEY, OTHER = b"k" * 16, b"o" * 16
HOLDERS = ("node1", "node2", "node3")


@pytest.fixture
def returning(world: Any) -> Returning:
    return Returning(world.cluster, "node1", holds=True)


def others(world: Any) -> list[str]:
    return [name for name in world.cluster.nodes if name != "node1"]


def test_a_node_without_keys_is_back_at_once(world: Any) -> None:
    made = Returning(world.cluster, "node1", holds=False)
    assert (made.waits, made.heard, made.to_ask, made.problem, made.alarm) == (False, True, [], "", "")
    made.check(KEY)
    assert made.may_release(["node1"])


def test_the_only_node_is_back_at_once(world: Any) -> None:
    lone = replace(world.cluster, members={"node1": world.cluster.nodes["node1"]})
    made = Returning(lone, "node1", holds=True)
    assert (made.waits, made.heard, made.to_ask, made.problem, made.alarm) == (False, True, [], "", "")
    made.check(KEY)


def test_it_uses_no_key_before_all_were_asked(world: Any, returning: Returning) -> None:
    """Whether anybody answers or not; it says which of both it is."""
    assert returning.waits
    with pytest.raises(KeyPending, match="node1 serves no key yet: it asks the others"):
        returning.check(KEY)
    returning.read_books()
    assert returning.waits
    returning.asked([])
    assert (returning.waits, returning.problem, returning.alarm) == (False, "", "")
    returning.check(KEY)
    alone = Returning(world.cluster, "node1", holds=True)
    alone.asked([])
    assert (alone.waits, alone.heard, alone.problem) == (False, False, "")
    assert alone.alarm.startswith("it gives no shares away: neither another node nor the registry has told")
    alone.check(KEY)
    alone.asked(["node5"])
    assert (alone.heard, alone.alarm) == (True, "")


def test_a_share_waits_for_one_that_may_know_of_the_key(returning: Returning) -> None:
    """Another of its holders, or the registry; nodes that never held it can't tell that it is no more."""
    assert not returning.may_release(HOLDERS)
    returning.asked(["node4"])
    assert not returning.may_release(HOLDERS)
    returning.asked(["node3"])
    assert returning.may_release(HOLDERS)
    assert not returning.may_release(["node1", "node2"])
    returning.read_books()
    assert returning.may_release(["node1"])


def test_those_that_were_silent_are_asked_again_until_the_registry_has_told(world: Any, returning: Returning) -> None:
    names = others(world)
    assert returning.to_ask == names
    returning.asked(names[1:])
    assert returning.to_ask == names[:1]
    returning.asked([])
    assert returning.to_ask == names[:1]
    returning.read_books()
    assert returning.to_ask == []


def test_what_another_node_calls_destroyed_waits_for_the_registry(world: Any, returning: Returning) -> None:
    returning.asked(others(world), [KEY])
    returning.check(OTHER)
    with pytest.raises(KeyPending, match="waits for the registry's word"):
        returning.check(KEY)
    returning.read_books()
    returning.check(KEY)
    returning.asked([], [KEY])  # the registry's word is in already
    returning.check(KEY)


def test_lacking_shares_are_reported_once_in_a_while(world: Any) -> None:
    """And again to a registry that started anew, or after some minutes; a share that is there again is not."""
    stored, lacked = (world.deal(name, holders=NODES[:3]) for name in ("stored", "lacked"))

    def row(dealt: Any, epoch: int = 1, sealed: bytes = b"") -> Row:
        told = dealt.record
        key_id, name = told.manifest.key_id, told.manifest.name
        return Row(key_id, 1, epoch, 1, name, "committed", told.digest, told.raw, b"c", b"", sealed, 0)

    catalogue = Catalogue([row(stored, sealed=b"s"), row(lacked)])
    report = LackingReport(catalogue)
    keys = [(lacked.record.manifest.key_id, 1)]
    assert report.due(7, 0.0) == keys
    assert report.due(7, 1.0) == keys, "the registry has not heard of it yet"
    report.told(keys)
    assert report.due(7, 2.0) == []
    assert report.due(8, 3.0) == keys
    report.told(keys)
    assert report.due(8, 4.0) == []
    assert report.due(8, 3.0 + REPORT_EVERY_S) == keys
    catalogue.put(row(lacked, epoch=2, sealed=b"s"))
    assert report.due(9, 5000.0) == []
    assert catalogue.lacking() == []


# --- what others tell ---


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane, token: Token) -> Iterator[Scene]:
    made = Scene(world, tmp_path, lane, token)
    yield made
    made.close()


def told_by(node: Any, epoch: int) -> list[SyncEntry]:
    """What another node answers to one that knows this epoch of the key."""
    answer = recalled(node.catalogue, [(node.key_id, epoch, 0)])
    assert answer.done == 1
    return list(answer.entries)


def test_a_share_of_an_epoch_that_is_over_is_not_used(scene: Scene) -> None:
    """An old copy of a store learns the later epoch from another holder, and puts its share aside."""
    node, other = scene.nodes["node1"], scene.nodes["node2"]
    node.store.truncate_log()
    copy = node.path.with_suffix(".copy")
    shutil.copy(node.path, copy)
    record = scene.reshare(scene.world.refresh_order(scene.dealt.record))
    assert told_by(node, 2) == []
    node.store.close()
    shutil.copy(copy, node.path)
    node.open()
    assert node.rows() == {1: ("committed", True)}
    assert told_by(node, 2) == [], "what is older is not told"
    [entry] = told_by(other, 1)
    assert node.holder.recall(entry) == ([], None)
    assert node.rows() == {1: ("committed", True), 2: ("committed", False)}
    assert [each.row.key_id for each in node.catalogue.lacking()] == [scene.key_id]
    assert node.holder.recall(entry) == ([], None)
    node.restart()
    assert node.rows() == {1: ("committed", True), 2: ("committed", False)}
    assert record.manifest.epoch == 2
    with pytest.raises(QuorumUnavailable, match="holds no share"):
        node.share()
    node.holder.destroy(Destroy(scene.world.destroy_order(scene.key_id, "orders")))
    assert node.rows() == {2: ("destroyed", False)}


def test_no_false_word_costs_a_share(scene: Scene) -> None:
    """Neither a certificate that is another manifest's, nor that of an attempt which this node has given up."""
    node = scene.nodes["node1"]
    node.store.truncate_log()
    copy = node.path.with_suffix(".copy")
    shutil.copy(node.path, copy)
    scene.reshare(scene.world.refresh_order(scene.dealt.record))
    [entry] = told_by(scene.nodes["node2"], 1)
    node.store.close()
    shutil.copy(copy, node.path)
    node.open()
    false = SyncEntry(entry.key_id, "committed", entry.manifest, scene.world.certificate(scene.dealt), b"", b"")
    with pytest.raises(ManifestError, match="not for this manifest"):
        node.holder.recall(false)
    node.holder.pledge(scene.key_id, scene.attempt + 1)
    assert node.holder.recall(entry) == ([], None)
    assert node.rows() == {1: ("committed", True)}


def test_a_destroyed_key_is_erased_or_doubted(scene: Scene) -> None:
    """By an order that is in time it goes at once; an expired one has it held back until the registry has told."""
    world, record = scene.world, scene.dealt.record

    def entry(order: bytes) -> SyncEntry:
        return SyncEntry(scene.key_id, "destroyed", record.raw, world.certificate(scene.dealt), order, b"")

    late = world.destroy_order(scene.key_id, "orders", expires_in_ms=-60_000)
    node = scene.nodes["node1"]
    assert node.holder.recall(entry(late)) == ([], scene.key_id)
    assert node.rows() == {1: ("committed", True)}
    for order, match in (
        (world.destroy_order(scene.key_id, "other"), "for another key"),
        (world.destroy_order(b"o" * 16, "orders"), "for another key"),
        (world.destroy_order(scene.key_id, "orders", client="node2"), "may not sign"),
    ):
        with pytest.raises(ManifestError, match=match):
            node.holder.recall(entry(order))
    assert node.rows() == {1: ("committed", True)}
    assert node.holder.recall(entry(world.destroy_order(scene.key_id, "orders"))) == ([scene.key_id], None)
    assert node.rows() == {1: ("destroyed", False)}
    [told] = told_by(node, 1)
    assert (told.state, told_by(node, 99)) == ("destroyed", [told])
    assert node.holder.recall(told) == ([], None)


def test_an_answer_ends_before_it_is_too_long(scene: Scene) -> None:
    """And says how many of the keys it is about, so that the others are asked for again."""
    row = scene.nodes["node1"].entry.row
    rows = [
        replace(row, key_id=number.to_bytes(16, "big"), name=f"k{number}", epoch=2, state="moved", sealed=b"")
        for number in range(200)
    ]
    catalogue = Catalogue(rows)
    keys = [(each.key_id, 1, 0) for each in rows]
    done = 0
    found: list[bytes] = []
    while done < len(keys):
        answer = recalled(catalogue, keys[done:])
        assert 0 < sum(len(each.manifest) for each in answer.entries) <= REPLY_BYTES
        found += [each.key_id for each in answer.entries]
        done += answer.done
    assert found == [each.key_id for each in rows]
    assert recalled(catalogue, [(each.key_id, 2, 0) for each in rows]).entries == []
    assert recalled(catalogue, [(b"s" * 16, 0, 0)]).done == 1


def test_a_registry_that_is_made_anew_is_told_of_every_key(scene: Scene) -> None:
    """In pages that are no longer than a message; of what is only prepared nothing, and how far fencing epochs went."""
    row = scene.nodes["node1"].entry.row
    rows = [
        replace(row, key_id=number.to_bytes(16, "big"), name=f"k{number}", state=state)
        for number in range(100)
        for state in [("prepared", "committed", "moved", "destroyed")[number % 4]]
    ]
    catalogue = Catalogue(rows)
    after, found, pages = 0, [], 0
    while True:
        page = booked(catalogue, after, 7)
        assert 0 < sum(len(each.manifest) for each in page.entries) <= REPLY_BYTES
        found += [(each.key_id, each.state) for each in page.entries]
        pages, after = pages + 1, page.last
        assert page.fencing_epoch == 7
        if not page.more:
            break
    told = {"committed": "committed", "moved": "committed", "destroyed": "destroyed"}
    assert found == [(each.key_id, told[each.state]) for each in rows if each.state != "prepared"]
    assert (pages > 1, booked(catalogue, after, 7).entries) == (True, [])


def test_a_pause_ends_for_nobody_but_by_another_one(world: Any) -> None:
    """While keys come out of an archive nobody is asked, and whoever answers nonetheless changes nothing."""
    paused = Returning(world.cluster, "node1", holds=True, paused=True)
    assert (paused.waits, paused.to_ask) == (True, [])
    paused.asked(others(world))
    paused.read_books()
    assert paused.waits
    assert not paused.may_release(HOLDERS)
    with pytest.raises(KeyPending, match="node1 serves no key yet"):
        paused.check(KEY)
    lone = replace(world.cluster, members={"node1": world.cluster.nodes["node1"]})
    assert Returning(lone, "node1", holds=True, paused=True).waits, "also where there is nobody to ask"
