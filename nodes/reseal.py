"""A store's content under another KEK: opens everything that is sealed in it, and seals it anew into a fresh file.

Here is the one list of what the store seals. It knows no token folder, no PIN and no rotation.
"""

from __future__ import annotations

import hmac
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from engine.protocol.manifest import read_key_manifest
from nodes.store import (
    ROW_KEY,
    SEALED_NAME,
    SECRET_BYTES,
    ShareStore,
    StoreCorrupt,
    seal_context,
    secret_context,
    tag_of,
)
from nodes.token import Lane

__all__ = ["SEALED", "check_store", "reseal_store"]


def _share_seal(values: Mapping[str, Any], node: str) -> bytes:
    """The associated data of the share in a row of ``keys``."""
    record = read_key_manifest(values["manifest"])
    mine = record.manifest.holder(node)
    if mine is None:
        raise StoreCorrupt(f"the store of {node!r} has a share of {values['name']!r}, of which it is no holder")
    return seal_context(record.manifest, mine.x, node, record.digest)


SEALED: Final[Mapping[str, Mapping[str, Callable[[Mapping[str, Any], str], bytes]]]] = {
    "keys": {"sealed": _share_seal},
    "grants": {},
    "clock": {},
    "pledges": {},
    "fencings": {},
    "settings": {},
    "quotas": {},
}
"""Table -> column sealed by the KEK -> its associated data, of a row and the node's name.

Every table of the store but ``meta`` is here, also one that seals nothing. Each has a column ``tag``, made by
``tag_of``. The 32-byte secrets in ``meta`` are found by their names.
"""

Use = Callable[[bytes, bytes], bytes]


def check_store(path: Path, node: str, lane: Lane) -> int:
    """Authenticate every row and open every sealed thing; how many rows there are."""

    def opened(blob: bytes, context: bytes) -> bytes:
        lane.unseal_secret(blob, context).close()
        return blob

    with closing(ShareStore(path, node, lane)) as store:
        key = store.secret(lane, ROW_KEY)
    with closing(sqlite3.connect(path)) as db:
        for name, value in _secrets(db):
            opened(value, secret_context(node, name))
        return sum(1 for _ in _rows(db, node, key, opened))


def reseal_store(
    source: Path, target: Path, node: str, old: Lane, new: Lane, progress: Callable[[int, int], None]
) -> None:
    """Copy a store to a fresh file, all sealed by another KEK and with a fresh row key. The caller syncs the file.

    ``progress`` is told (rows done, of all). ``StoreCorrupt``: a row or a table is not what it should be.
    """
    with closing(ShareStore(source, node, old)) as store:
        key = store.secret(old, ROW_KEY)
        store.truncate_log()
    os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with closing(sqlite3.connect(source)) as db, closing(sqlite3.connect(target, isolation_level=None)) as fresh:
        # No journal and no syncs: it does not count before it was synced and checked whole.
        fresh.execute("PRAGMA synchronous=OFF")
        fresh.execute("PRAGMA journal_mode=OFF")
        for (statement,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL"):
            fresh.execute(statement)
        fresh.execute("BEGIN")
        fresh.executemany("INSERT INTO meta VALUES (?, ?)", db.execute("SELECT name, value FROM meta"))
        row_key = os.urandom(SECRET_BYTES)
        for name, value in _secrets(db):
            context = secret_context(node, name)
            blob = new.seal(row_key, context) if name == ROW_KEY else old.reseal(value, context, new)
            fresh.execute("UPDATE meta SET value = ? WHERE name = ?", (blob, SEALED_NAME + name))
        total = sum(db.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0] for table in _tables(db))  # noqa: S608
        resealed = _rows(db, node, key, lambda blob, context: old.reseal(blob, context, new))
        for number, (table, row) in enumerate(resealed, 1):
            row["tag"] = tag_of(row_key, table, [value for name, value in row.items() if name != "tag"])
            names, marks = ", ".join(row), ", ".join("?" * len(row))
            fresh.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", list(row.values()))  # noqa: S608
            progress(number, total)
        fresh.execute("COMMIT")


def _secrets(db: sqlite3.Connection) -> list[tuple[str, bytes]]:
    found = db.execute("SELECT name, value FROM meta WHERE name GLOB ?", (f"{SEALED_NAME}*",)).fetchall()
    return [(name.removeprefix(SEALED_NAME), value) for name, value in found]


def _tables(db: sqlite3.Connection) -> list[str]:
    """The store's tables but ``meta``, each known here, so that none is copied with what it seals left as it was."""
    found = {name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")} - {"meta"}
    if unknown := sorted(found - SEALED.keys()):
        raise StoreCorrupt(f"the store has the tables {', '.join(unknown)}; it is not known what in them is sealed")
    return sorted(found)


def _rows(db: sqlite3.Connection, node: str, key: bytes, use: Use) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row, authenticated, with ``use(blob, associated data)`` in place of what is sealed in it."""
    for table in _tables(db):
        cursor = db.execute(f"SELECT * FROM {table}")  # noqa: S608 # a name of SEALED
        columns = [each[0] for each in cursor.description]
        for values in cursor:
            row = dict(zip(columns, values, strict=True))
            told = [value for name, value in row.items() if name != "tag"]
            if not hmac.compare_digest(tag_of(key, table, told), row["tag"]):
                raise StoreCorrupt(f"a row of the store of {node!r} is not authentic; the file was changed or damaged")
            for column, context in SEALED[table].items():
                if row[column]:
                    row[column] = use(row[column], context(row, node))
            yield table, row
