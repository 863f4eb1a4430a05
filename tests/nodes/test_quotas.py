"""The quota of one node: what was noted is what may be used, and no death makes a use come back."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from engine.errors import KeyExhausted
from engine.protocol.manifest import create_orders, first_quota
from engine.protocol.signed import read_unverified
from nodes.catalogue import Catalogue, Entry
from nodes.quotas import Quotas
from nodes.store import Row, ShareStore, StoreCorrupt
from nodes.token import Lane

ME = "node2"
KEY_ID = b"k" * 16
LIMIT = 600
FIRST = 100
"""A third of half of the limit."""


class Scene:
    """The quotas of node2, and a key that it is the second of three holders of."""

    def __init__(self, world: Any, path: Path, lane: Lane) -> None:
        self.path, self.lane = path, lane
        dealt = world.deal("few", order=self._order(world), key_id=KEY_ID)
        manifest = dealt.record
        self.row = Row(
            dealt.key_id, 1, 1, 1, "few", "committed", manifest.digest, manifest.raw, b"", b"", b"sealed", world.now_ms
        )
        self.open()
        self.store.put(self.row, first_quota(manifest.manifest))
        self.entry: Entry = Catalogue([]).put(self.row)

    @staticmethod
    def _order(world: Any) -> bytes:
        order = world.order("few", "aes-256-gcm", 2, 3, key_id=KEY_ID)
        told = structs.replace(create_orders.decode(read_unverified(order).payload), uses_max=LIMIT)
        return bytes(world.signed(create_orders, "order.create", told, "alice"))

    def open(self) -> None:
        self.store = ShareStore(self.path, ME, self.lane)
        self.quotas = Quotas(self.store)

    def die(self) -> None:
        self.store.close()
        self.open()

    def use(self, most: int) -> int:
        """Use it by so many at most, noting as a node does."""
        self.quotas.note(self.entry)
        return self.quotas.take(self.entry, most)

    def use_up(self) -> int:
        made = 0
        while uses := self.use(7):
            made += uses
        return made


@pytest.fixture
def scene(world: Any, tmp_path: Path, lane: Lane) -> Iterator[Scene]:
    made = Scene(world, tmp_path / "shares.db", lane)
    yield made
    made.store.close()


def test_a_holder_of_the_first_epoch_has_its_part(scene: Scene) -> None:
    """Which it uses and no more, and a restart gives none of it back."""
    assert scene.use_up() == FIRST
    assert scene.quotas.note(scene.entry)  # more is to be asked for
    scene.die()
    assert scene.use_up() == 0


def test_no_use_before_it_is_noted(scene: Scene) -> None:
    """And not more than one block ahead: the store counts each as made before it is."""
    assert scene.quotas.take(scene.entry, 5) == 0
    made = 0
    while uses := scene.use(3):
        made += uses
        granted, noted = scene.store.quota(KEY_ID) or (0, 0)
        assert granted == FIRST
        assert made <= noted <= made + 2 * (FIRST // 8)


@pytest.mark.parametrize("seed", range(20))
def test_deaths_bring_no_use_back(scene: Scene, seed: int) -> None:
    """Whatever is taken, given back, granted, and at whatever moment the node dies."""
    rng = random.Random(seed)
    granted, made = FIRST, 0
    for _ in range(300):
        step = rng.random()
        if step < 0.8:
            uses = scene.use(rng.randint(1, 9))
            back = rng.randint(0, uses)
            scene.quotas.give(scene.entry, back)
            made += uses - back
        elif step < 0.87:
            more = rng.randint(1, 40)
            scene.quotas.add(scene.entry, more)
            granted += more
        elif step < 0.97:
            scene.quotas.forget(KEY_ID)  # as of a key that leaves this node, and comes back
        else:
            scene.die()
        assert made <= granted
    made += scene.use_up()
    assert made <= granted == (scene.store.quota(KEY_ID) or (0, 0))[0]


def test_a_stop_takes_back_what_was_not_made(scene: Scene) -> None:
    """Only a death loses what is left of a block."""
    made = scene.use(3)
    scene.quotas.close()
    scene.die()
    assert made + scene.use_up() == FIRST


def test_one_question_until_it_has_an_answer(scene: Scene) -> None:
    """So that the registry grants it once; the next is another one."""
    nonce = scene.quotas.nonce(scene.entry)
    assert scene.quotas.nonce(scene.entry) == nonce
    scene.quotas.add(scene.entry, 1)
    assert scene.quotas.nonce(scene.entry) != nonce


def test_exhausted_only_when_there_is_no_more_to_be_had(scene: Scene) -> None:
    """The registry has said so, and all that is here was used; more is not asked for then."""
    scene.quotas.note(scene.entry)
    scene.quotas.add(scene.entry, 0)
    scene.quotas.check(scene.entry)
    assert scene.use_up() == FIRST
    with pytest.raises(KeyExhausted, match="version 1 of 'few' may be used 600 times"):
        scene.quotas.check(scene.entry)
    assert not scene.quotas.note(scene.entry)


def test_a_quota_that_was_changed_is_refused(scene: Scene) -> None:
    """The store authenticates it."""
    scene.store.close()
    with closing(sqlite3.connect(scene.path)) as db, db:
        db.execute("UPDATE quotas SET granted = granted + 1")
    scene.open()
    with pytest.raises(StoreCorrupt):
        scene.quotas.note(scene.entry)


def test_a_destroyed_key_leaves_no_quota(scene: Scene) -> None:
    """One that was made again under its id would be another key."""
    scene.use(3)
    scene.store.destroy(scene.row, b"order", 1)
    assert scene.store.quota(KEY_ID) is None
