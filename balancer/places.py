"""Where the committed keys are, counted: an index in the registry's database, kept in step with its rows.

Keys that have their shares on the same nodes, in the same shape and the same placement group, are one *crowd*: what is
to be done with one of them is to be done with all. So who plans moves looks at some thousand crowds, not at a million
keys. All of it follows from the keys' manifests and certificates; the targets, where groups are to be, do not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from balancer.database import Database, upsert
from engine.protocol.manifest import (
    KeyManifest,
    certificates,
    create_orders,
    ordered_shape,
    read_change_order,
    read_key_manifest,
)
from engine.protocol.signed import read_unverified

__all__ = ["PLACES_TABLES", "Crowd", "KeyPlace", "Places"]

PLACES_TABLES = (
    """CREATE TABLE placed (key_id BLOB PRIMARY KEY, pg INTEGER NOT NULL, nodes BLOB NOT NULL,
       threshold INTEGER NOT NULL, shares INTEGER NOT NULL, grows INTEGER NOT NULL, missing BLOB NOT NULL,
       since_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
    "CREATE INDEX placed_crowd ON placed (pg, nodes, threshold, shares, grows)",
    "CREATE INDEX placed_since ON placed (since_ms, key_id) WHERE threshold > 1",
    "CREATE INDEX placed_missing ON placed (key_id) WHERE missing != x''",
    """CREATE TABLE crowds (pg INTEGER, nodes BLOB, threshold INTEGER, shares INTEGER, grows INTEGER,
       keys INTEGER NOT NULL, PRIMARY KEY (pg, nodes, threshold, shares, grows)) STRICT, WITHOUT ROWID""",
    "CREATE TABLE targets (pg INTEGER PRIMARY KEY, nodes BLOB NOT NULL, place INTEGER NOT NULL) STRICT",
    "CREATE TABLE placed_by (id INTEGER PRIMARY KEY CHECK (id = 1), rules BLOB NOT NULL) STRICT",
)
DEGRADED_LOOKED: Final = 2_000
"""Keys that are looked at for one page of those that lack a share."""
_CROWD = "pg = ? AND nodes = ? AND threshold = ? AND shares = ? AND grows = ?"


@dataclass(frozen=True, slots=True)
class Crowd:
    """Keys that are alike: their placement group, holders in order, t, the n that a client signed, may they grow.

    A key that may grow may have more holders than n, by the balancer's order.
    """

    group: int
    holders: tuple[str, ...]
    threshold: int
    shares: int
    grows: bool = False


@dataclass(frozen=True, slots=True)
class KeyPlace:
    """A version of a key: its crowd and epoch, the holders that gave no receipt, and about when that was ordered."""

    key_id: bytes
    name: str
    epoch: int
    crowd: Crowd
    missing: tuple[str, ...] = ()
    since_ms: int = 0
    version: int = 1


class Places:
    """The index, in the registry's own database: whoever calls ``put`` has a transaction open.

    ``group_of`` and ``may_grow`` say what a key's name means today.
    """

    def __init__(self, store: Database, group_of: Callable[[str], int], may_grow: Callable[[str], bool]) -> None:
        self._store = store
        self._group_of = group_of
        self._may_grow = may_grow

    def prepare(self, rules: bytes) -> None:
        """Have the index be of all committed keys, by what ``rules`` stands for; in a transaction, as ``put``.

        It is made where there is none, and follows where the rules are others than those that it was made by.
        """
        made = self._store.execute("SELECT rules FROM placed_by").fetchone()
        if made is not None and made[0] == rules:
            return
        if made is None:
            for each in self._store.execute("SELECT key_id, manifest, certificate FROM keys WHERE state = 2"):
                self.put(*each)
        else:
            self._regrow()
        self._store.execute(upsert("placed_by", "id", "rules"), (1, rules))

    def _regrow(self) -> None:
        found = self._store.execute(
            "SELECT placed.key_id, name, pg, nodes, threshold, shares, grows FROM placed JOIN keys USING (key_id)"
        )
        changed = [
            (key_id, crowd, grows)
            for key_id, name, *crowd in found
            if (grows := int(self._may_grow(name.decode()))) != crowd[-1]
        ]
        for key_id, crowd, grows in changed:
            self._store.execute("UPDATE placed SET grows = ? WHERE key_id = ?", (grows, key_id))
            self._count(crowd, -1)
            self._count([*crowd[:-1], grows], 1)

    def put(self, key_id: bytes, manifest: bytes, certificate: bytes) -> None:
        """Note where a committed key is; empty documents: it is no more."""
        before = self._store.execute(
            "SELECT pg, nodes, threshold, shares, grows FROM placed WHERE key_id = ?", (key_id,)
        ).fetchone()
        if before is not None:
            self._count(before, -1)
            self._store.execute("DELETE FROM placed WHERE key_id = ?", (key_id,))
        if not manifest:
            return
        told = read_key_manifest(manifest).manifest
        holders = [each.node for each in told.holders]
        heard = {
            read_unverified(raw).issuer for raw in certificates.decode(read_unverified(certificate).payload).receipts
        }
        crowd = (
            self._group_of(told.name),
            _joined(holders),
            told.threshold,
            ordered_shape(told)[1],
            int(self._may_grow(told.name)),
        )
        missing = _joined([name for name in holders if name not in heard])
        self._store.execute(
            "INSERT INTO placed VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (key_id, *crowd, missing, _ordered_ms(told))
        )
        self._count(crowd, 1)

    def lose(self, key_id: bytes, node: str) -> None:
        """Note that a holder has no share of a key any more, until its next epoch; in a transaction, as ``put``."""
        found = self._store.execute("SELECT missing FROM placed WHERE key_id = ?", (key_id,)).fetchone()
        if found is not None and node not in _parted(found[0]):
            missing = _joined([*_parted(found[0]), node])
            self._store.execute("UPDATE placed SET missing = ? WHERE key_id = ?", (missing, key_id))

    def _count(self, crowd: Sequence[object], change: int) -> None:
        self._store.execute(
            "INSERT INTO crowds VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (pg, nodes, threshold, shares, grows) "
            "DO UPDATE SET keys = crowds.keys + excluded.keys",
            (*crowd, change),
        )
        if change < 0:
            self._store.execute(f"DELETE FROM crowds WHERE {_CROWD} AND keys <= 0", tuple(crowd))  # noqa: S608 - fixed text

    def crowds(self) -> dict[Crowd, int]:
        """How many keys there are of each kind and place."""
        return {
            _crowd(row[:5]): int(row[5])
            for row in self._store.execute("SELECT pg, nodes, threshold, shares, grows, keys FROM crowds")
        }

    def of_crowd(self, crowd: Crowd, after: KeyPlace | None, most: int) -> list[KeyPlace]:
        """Keys of a crowd in the order of their ids, after one."""
        told = (crowd.group, _joined(crowd.holders), crowd.threshold, crowd.shares, int(crowd.grows))
        return self._read(f"{_CROWD} AND placed.key_id > ? ORDER BY placed.key_id LIMIT ?", (*told, _id(after), most))

    def lacking(self, before_ms: int, after: KeyPlace | None, most: int) -> list[KeyPlace]:
        """Keys of which a holder gave no receipt before their order expired, in the order of their ids, after one."""
        condition = "missing != x'' AND since_ms < ? AND placed.key_id > ? ORDER BY placed.key_id LIMIT ?"
        return self._read(condition, (before_ms, _id(after), most))

    def older(self, than_ms: int, after: KeyPlace | None, most: int) -> list[KeyPlace]:
        """Keys whose epoch was ordered before a time, and that a refresh changes; the oldest first, after one."""
        since_ms = after.since_ms if after is not None else -1
        return self._read(
            "threshold > 1 AND since_ms < ? AND (since_ms, placed.key_id) > (?, ?) "
            "ORDER BY since_ms, placed.key_id LIMIT ?",
            (than_ms, since_ms, _id(after), most),
        )

    def count_lacking(self, before_ms: int) -> int:
        """How many keys ``lacking`` would tell."""
        counted = "SELECT COUNT(*) FROM placed WHERE missing != x'' AND since_ms < ?"
        return int(self._store.execute(counted, (before_ms,)).fetchone()[0])

    def count_older(self, than_ms: int, most: int) -> int:
        """How many keys ``older`` would tell, counted up to ``most``."""
        counted = "SELECT COUNT(*) FROM (SELECT 1 FROM placed WHERE threshold > 1 AND since_ms < ? LIMIT ?) AS found"
        return int(self._store.execute(counted, (than_ms, most)).fetchone()[0])

    def degraded(self, nodes: Collection[str], before_ms: int, after: bytes, most: int) -> tuple[list[KeyPlace], bytes]:
        """Keys with a holder that has no share or is none of ``nodes``, after a key id, and where to go on, or b"".

        Those holders are the ``missing``. A receipt that has not come before a key's order expires counts as no share.
        """
        query = "SELECT key_id, nodes, missing, since_ms FROM placed WHERE key_id > ? ORDER BY key_id LIMIT ?"
        looked = self._store.execute(query, (after, DEGRADED_LOOKED)).fetchall()
        found: list[KeyPlace] = []
        for at, (key_id, joined, lacking, since_ms) in enumerate(looked, 1):
            silent = _parted(lacking) if since_ms < before_ms else ()
            missing = tuple(each for each in _parted(joined) if each in silent or each not in nodes)
            if missing:
                key = self._read("placed.key_id = ?", (key_id,))[0]
                found.append(replace(key, missing=missing))
            if len(found) == most and at < len(looked):
                return found, bytes(key_id)
        return found, bytes(looked[-1][0]) if len(looked) == DEGRADED_LOOKED else b""

    def _read(self, condition: str, values: Sequence[object]) -> list[KeyPlace]:
        columns = "pg, nodes, threshold, shares, grows, missing, placed.key_id, name, manifest, since_ms"
        query = f"SELECT {columns} FROM placed JOIN keys USING (key_id) WHERE {condition}"  # noqa: S608 - fixed texts
        rows = self._store.execute(query, tuple(values))
        return [_key_place(row) for row in rows]

    # --- where groups are to be ---

    def targets(self) -> dict[int, tuple[str, ...]]:
        """The nodes that placement groups are to be at, by group, the most urgent first."""
        found = self._store.execute("SELECT pg, nodes FROM targets ORDER BY place, pg").fetchall()
        return {int(group): _parted(holders) for group, holders in found}

    def set_targets(self, wanted: Mapping[int, Sequence[str]]) -> None:
        """Have groups be elsewhere, in this order of urgency; the targets of other groups stay."""
        last = self._store.execute("SELECT COALESCE(MAX(place), 0) FROM targets").fetchone()[0]
        self._store.executemany(
            upsert("targets", "pg", "nodes", "place"),
            [(group, _joined(nodes), last + at) for at, (group, nodes) in enumerate(wanted.items(), 1)],
        )


def _crowd(row: Sequence[Any]) -> Crowd:
    group, holders, threshold, shares, grows = row
    return Crowd(group, _parted(holders), threshold, shares, bool(grows))


def _key_place(row: Sequence[Any]) -> KeyPlace:
    told = read_key_manifest(row[8]).manifest
    return KeyPlace(
        key_id=row[6],
        name=row[7].decode(),
        epoch=told.epoch,
        crowd=_crowd(row[:5]),
        version=told.version,
        missing=_parted(row[5]),
        since_ms=row[9],
    )


def _id(key: KeyPlace | None) -> bytes:
    return key.key_id if key is not None else b""


def _joined(names: Sequence[str]) -> bytes:
    return "\n".join(names).encode()


def _parted(names: bytes) -> tuple[str, ...]:
    return tuple(names.decode().split("\n")) if names else ()


def _ordered_ms(manifest: KeyManifest) -> int:
    """About when the epoch was ordered: when its order expires, some minutes later at most.

    It is in the manifest, so that it is the same after the registry was rebuilt.
    """
    if manifest.change:
        return read_change_order(manifest.change).expires_ms
    return create_orders.decode(read_unverified(manifest.order).payload).expires_ms
