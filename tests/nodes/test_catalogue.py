"""The index of keys: what it lists and what waits, over whatever comes in and goes, by a plain look at all of it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from nodes.catalogue import NAMES_AT_ONCE, Catalogue
from nodes.store import Row

STATES = ("prepared", "committed", "moved", "destroyed")


@pytest.fixture
def rows(world: Any) -> list[Row]:
    """Prepared rows of a few keys."""
    made = []
    for number in range(6):
        record = world.deal(f"k{number}").record
        told = record.manifest
        made.append(Row(told.key_id, 1, 1, 1, told.name, "prepared", record.digest, record.raw, b"", b"", b"sealed", 0))
    return made


def plainly(catalogue: Catalogue) -> tuple[list[str], set[tuple[bytes, int]]]:
    """The names that are listed, and the epochs that wait, by a look at each entry."""
    entries = (*catalogue._by_id.values(), *catalogue._next.values())
    waiting = {
        (each.row.key_id, each.row.epoch) for each in entries if each.row.state == "prepared" and not each.row.document
    }
    return sorted({each.row.name for each in entries if each.row.state == "committed"}), waiting


@pytest.mark.parametrize("seed", range(8))
def test_what_is_listed_and_what_waits_follows_what_comes_and_goes(rows: list[Row], seed: int) -> None:
    """Rows come, change their state, get next epochs, are aborted, removed and read anew."""
    chance = random.Random(seed)
    catalogue = Catalogue([])
    for _ in range(300):
        row = replace(chance.choice(rows), epoch=chance.choice((1, 1, 2)), state=chance.choice(STATES))
        what = chance.randrange(10)
        if what < 7:
            if row.state == "prepared" and chance.random() < 0.3:
                row = replace(row, document=b"aborted")
            catalogue.put(row)
        elif what < 9:
            entries = (*catalogue._by_id.values(), *catalogue._next.values())
            if prepared := [each.row for each in entries if each.row.state == "prepared"]:
                catalogue.remove(chance.choice(prepared))
        else:
            catalogue.reload(row.key_id, [row])
        names, waiting = plainly(catalogue)
        assert list(catalogue.names()) == names
        found = [(each.row.key_id, each.row.epoch) for each in catalogue.prepared()]
        assert len(found) == len(set(found))
        assert set(found) == waiting


def test_names_go_on_behind_one_and_begin_as_asked(rows: list[Row]) -> None:
    """Whether or not that one is there, and over more than are taken at once."""
    count = 2 * NAMES_AT_ONCE + 1
    names = [f"n{number:05}" for number in range(count)]
    made = [replace(rows[0], key_id=bytes([0, *at.to_bytes(15)]), name=name) for at, name in enumerate(names)]
    catalogue = Catalogue([replace(each, state="committed") for each in made])
    assert list(catalogue.names()) == names
    assert list(catalogue.names(names[-2])) == names[-1:]
    assert list(catalogue.names(names[3] + "x")) == names[4:]
    assert list(catalogue.names("z")) == []
    for prefix, found in (("n0001", names[10:20]), (names[7], names[7:8]), ("m", []), ("o", []), ("n", names)):
        assert list(catalogue.names("", prefix)) == found
        assert list(catalogue.names(names[14], prefix)) == [each for each in found if each > names[14]]
        assert list(catalogue.names("a", prefix)) == found
        assert list(catalogue.names("z", prefix)) == []
    listing = catalogue.names(names[9])
    assert next(listing) == names[10]
    catalogue.put(replace(made[-1], state="destroyed", document=b"x", sealed=b""))
    assert list(listing) == names[11:-1]
