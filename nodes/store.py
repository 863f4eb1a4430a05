"""The node's own durable store: sealed shares, manifests, certificates. It holds nothing in plain and opens no socket.

SQLite in WAL mode with synchronous=FULL: what is acknowledged survives a power cut. SQLite itself returns flipped bits
without a sign, so every row carries an HMAC under a key that is sealed by the token's KEK.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from engine.errors import InvalidTag, ManifestError, StoreUnavailable, TokenError
from engine.failpoints import failpoint
from engine.protocol.manifest import KeyManifest
from engine.sharing import SecretBuffer, Share
from nodes.token import Lane

__all__ = ["ClockMark", "Row", "ShareStore", "StoreCorrupt", "UsedGrant", "seal_context", "tag_of"]

SCHEMA_VERSION: Final = 6
SALT_BYTES: Final = 32
UNWRITABLE: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_BUSY})
SEALED_NAME: Final = "sealed/"
"""What the names of sealed secrets begin with in ``meta``."""
SECRET_BYTES: Final = 32
PLEDGES_KNOWN: Final = 1024
"""So many pledges are remembered between the steps of a change."""
ROW_KEY: Final = "row"
"""The secret that rows are authenticated with."""
State = Literal["prepared", "committed", "moved", "destroyed"]

_SCHEMA_1: Final = """
CREATE TABLE keys (
    key_id BLOB NOT NULL, version INTEGER NOT NULL, epoch INTEGER NOT NULL, attempt INTEGER NOT NULL,
    name TEXT NOT NULL, state TEXT NOT NULL, manifest_hash BLOB NOT NULL,
    manifest BLOB NOT NULL, certificate BLOB NOT NULL, document BLOB NOT NULL,
    sealed BLOB NOT NULL, changed_ms INTEGER NOT NULL, tag BLOB NOT NULL,
    PRIMARY KEY (key_id, version, epoch)
) WITHOUT ROWID;
"""
_SCHEMA_2: Final = """
CREATE TABLE grants (
    issuer TEXT NOT NULL, nonce BLOB NOT NULL, digest BLOB NOT NULL, expires_ms INTEGER NOT NULL, tag BLOB NOT NULL,
    PRIMARY KEY (issuer, nonce)
) WITHOUT ROWID;
CREATE TABLE clock (
    one INTEGER PRIMARY KEY CHECK (one = 1), mark_ms INTEGER NOT NULL, floor_ms INTEGER NOT NULL, tag BLOB NOT NULL
);
"""
_SCHEMA_3: Final = """
CREATE TABLE pledges (key_id BLOB PRIMARY KEY, attempt INTEGER NOT NULL, tag BLOB NOT NULL) WITHOUT ROWID;
"""
_SCHEMA_4: Final = """
CREATE TABLE fencings (balancer TEXT PRIMARY KEY, epoch INTEGER NOT NULL, tag BLOB NOT NULL) WITHOUT ROWID;
"""
_SCHEMA_5: Final = """
CREATE TABLE settings (lineage BLOB PRIMARY KEY, serial INTEGER NOT NULL, document BLOB NOT NULL, tag BLOB NOT NULL)
WITHOUT ROWID;
"""
_SCHEMA_6: Final = """
CREATE TABLE quotas (
    key_id BLOB PRIMARY KEY, granted INTEGER NOT NULL, noted INTEGER NOT NULL, tag BLOB NOT NULL
) WITHOUT ROWID;
"""
MIGRATIONS: Final = {1: _SCHEMA_1, 2: _SCHEMA_2, 3: _SCHEMA_3, 4: _SCHEMA_4, 5: _SCHEMA_5, 6: _SCHEMA_6}
"""Schema version -> the statements that lead there from the one before."""


class StoreCorrupt(TokenError):
    """A row of the store does not carry its own authentication, or the store belongs to another token."""


@dataclass(frozen=True, slots=True)
class Row:
    """One epoch of one key as this node keeps it.

    ``sealed`` is the share under the KEK, or empty where the node missed the creation; ``certificate`` is empty until
    the commit; ``document`` is the client's destroy order once destroyed, or the abort notice on the next epoch of a
    key that is kept until another attempt replaces it. ``moved``: others hold the key now, as its manifest says.
    Invariant: a destroyed key and one that moved have no share.
    """

    key_id: bytes
    version: int
    epoch: int
    attempt: int
    name: str
    state: State
    manifest_hash: bytes
    manifest: bytes
    certificate: bytes
    document: bytes
    sealed: bytes
    changed_ms: int


@dataclass(frozen=True, slots=True)
class UsedGrant:
    """A grant that was used up: whose it is, its nonce, the digest of its body, and when it expires."""

    issuer: str
    nonce: bytes
    digest: bytes
    expires_ms: int


@dataclass(frozen=True, slots=True)
class ClockMark:
    """The latest time that the node has seen, and the time before which grants are refused (0: none was ever reset)."""

    mark_ms: int
    floor_ms: int


_FIELDS: Final = tuple(Row.__dataclass_fields__)
_COLUMNS: Final = ", ".join(_FIELDS)
_MARKS: Final = ", ".join("?" for _ in range(len(_FIELDS) + 1))


def seal_context(manifest: KeyManifest, x: int, node: str, manifest_hash: bytes) -> bytes:
    """The associated data of a sealed share: whose it is, so that no blob can stand in for another."""
    return msgspec.msgpack.encode(
        [
            "keyquorum/seal/1",
            manifest.key_id,
            manifest.version,
            manifest.epoch,
            x,
            manifest.threshold,
            manifest.shares,
            node,
            manifest_hash,
        ]
    )


def seal_share(lane: Lane, share: Share, salt: bytes, context: bytes) -> bytes:
    """Salt and value of a share under the KEK."""
    return lane.seal(salt + share.y, context)


def unseal_share(lane: Lane, sealed: bytes, x: int, context: bytes) -> tuple[Share, bytes]:
    """The share and its salt; ``InvalidTag`` if the blob is not the one that ``context`` names."""
    with unseal_plain(lane, sealed, context) as plain, memoryview(plain) as view:
        return Share(x, bytes(view[SALT_BYTES:])), bytes(view[:SALT_BYTES])


def unseal_plain(lane: Lane, sealed: bytes, context: bytes) -> SecretBuffer:
    """Salt and value of a share, one after the other in locked memory; errors as of ``unseal_share``."""
    plain = lane.unseal_secret(sealed, context)
    if len(plain) <= SALT_BYTES:
        plain.close()
        raise InvalidTag(f"a sealed share of {len(plain)} bytes is too short")
    return plain


def tag_of(key: bytes, table: str, values: Sequence[object]) -> bytes:
    """The tag of a row: over the table's name and every column but the tag, in the table's order."""
    return hmac.digest(key, msgspec.msgpack.encode([table, *values]), hashlib.sha256)


def secret_context(node: str, name: str) -> bytes:
    return msgspec.msgpack.encode(["keyquorum/secret/1", node, name])


class ShareStore:
    """The store of one node; safe for several threads, which take turns."""

    def __init__(self, path: Path, node: str, lane: Lane) -> None:
        self._lock = threading.RLock()
        self._together = False
        self._pledges: dict[bytes, int] = {}
        """Pledges as the file has them, of keys that were asked about of late."""
        fresh = not path.exists()
        if fresh:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=5.0)
        self._node = node
        try:
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._migrate()
            self._key = self.secret(lane, ROW_KEY)
        except sqlite3.DatabaseError as error:
            self._db.close()
            raise StoreCorrupt(f"{path}: {error}") from None
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Close the store."""
        with self._lock:
            self._db.close()

    def _migrate(self) -> None:
        with self._transaction():
            self._db.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value BLOB NOT NULL)")
            row = self._db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone()
            current = row[0] if row else 0
            if not isinstance(current, int) or current < 0:
                raise StoreCorrupt("the store's schema version is damaged")
            if current > SCHEMA_VERSION:
                raise StoreCorrupt(f"the store has schema {current}; this software knows up to {SCHEMA_VERSION}")
            for version in range(current + 1, SCHEMA_VERSION + 1):
                for statement in MIGRATIONS[version].split(";"):
                    if statement.strip():
                        self._db.execute(statement)
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('schema', ?)", (SCHEMA_VERSION,))

    def secret(self, lane: Lane, name: str) -> bytes:
        """The 32 random bytes of that name, made at the first asking and kept in the store, sealed by the KEK."""
        context = secret_context(self._node, name)
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (SEALED_NAME + name,)).fetchone()
            if row is None:
                key = os.urandom(SECRET_BYTES)
                with self._transaction():
                    self._db.execute("INSERT INTO meta VALUES (?, ?)", (SEALED_NAME + name, lane.seal(key, context)))
                return key
        try:
            return lane.unseal(row[0] if isinstance(row[0], bytes) else b"", context)
        except InvalidTag:
            raise StoreCorrupt(f"the store does not belong to the token of {self._node!r}, or was changed") from None

    @contextmanager
    def together(self) -> Iterator[None]:
        """All changes until the end are one durable transaction; one that fails is undone alone."""
        with self._lock, self._transaction():
            self._together = True
            try:
                yield
            finally:
                self._together = False

    @contextmanager
    def _step(self) -> Iterator[None]:
        """A change among others of one transaction."""
        self._db.execute("SAVEPOINT step")
        try:
            yield
        except BaseException:
            self._pledges.clear()
            if self._db.in_transaction:  # SQLite may have rolled back all of it by itself
                self._db.execute("ROLLBACK TO step")
                self._db.execute("RELEASE step")
            raise
        self._db.execute("RELEASE step")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock:
            if self._together:
                with self._step():
                    yield
                return
            durable = False
            try:
                self._db.execute("BEGIN IMMEDIATE")
                failpoint("store.write.begun")
                yield
                failpoint("store.write.changed")
                self._db.execute("COMMIT")
                durable = True
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF not in UNWRITABLE:
                    raise
                raise StoreUnavailable(f"the store of {self._node!r} can't be written: {error}") from None
            finally:
                if self._db.in_transaction:  # SQLite rolls some failures back by itself
                    self._db.execute("ROLLBACK")
                if not durable:
                    self._pledges.clear()
            failpoint("store.write.durable")

    def _tag(self, row: Row) -> bytes:
        return self._tag_of("keys", [getattr(row, field) for field in _FIELDS])

    def _tag_of(self, table: str, values: Sequence[object]) -> bytes:
        return tag_of(self._key, table, values)

    def _checked(self, table: str, values: Sequence[Any]) -> Sequence[Any]:
        """The columns of a row of ``table`` without the tag at their end; ``StoreCorrupt`` if that is not theirs."""
        try:
            good = hmac.compare_digest(self._tag_of(table, values[:-1]), values[-1])
        except TypeError:
            good = False
        if not good:
            raise StoreCorrupt(
                f"a row of the store of {self._node!r} is not authentic; the file was changed or damaged"
            )
        return values[:-1]

    def _row(self, values: tuple[object, ...]) -> Row:
        return Row(*self._checked("keys", values))

    def _write(self, row: Row) -> None:
        values = tuple(getattr(row, field) for field in _FIELDS)
        self._db.execute(f"INSERT OR REPLACE INTO keys ({_COLUMNS}, tag) VALUES ({_MARKS})", (*values, self._tag(row)))  # noqa: S608 # constants

    def _read(self, condition: str = "", *values: object) -> list[Row]:
        return [self._row(row) for row in self._select(f"SELECT {_COLUMNS}, tag FROM keys {condition}", *values)]  # noqa: S608 # constants

    def _select(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise StoreCorrupt(
                f"a row of the store of {self._node!r} is not authentic; it can't be read: {type(error).__name__}"
            ) from None

    def note_cluster_serial(self, serial: int) -> None:
        """Refuse a cluster manifest that is older than one this node has served under, and remember a newer one."""
        with self._transaction():
            row = self._db.execute("SELECT value FROM meta WHERE name = 'cluster-serial'").fetchone()
            if row is not None and int(row[0]) > serial:
                raise ManifestError(
                    f"the cluster manifest has serial {serial}; {self._node!r} has served under {row[0]} already"
                )
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('cluster-serial', ?)", (serial,))

    # --- used grants and the clock ---

    def used_grants(self) -> list[UsedGrant]:
        """The grants that were used and may not have expired yet, each row checked."""
        rows = self._select("SELECT issuer, nonce, digest, expires_ms, tag FROM grants")
        return [UsedGrant(*self._checked("grants", row)) for row in rows]

    def clock_mark(self) -> ClockMark:
        """The clock's mark, checked; zeros in a new store."""
        rows = self._select("SELECT one, mark_ms, floor_ms, tag FROM clock")
        return ClockMark(*self._checked("clock", rows[0])[1:]) if rows else ClockMark(0, 0)

    def note_grants(self, used: Sequence[UsedGrant], mark_ms: int, forget_ms: int = 0) -> None:
        """Remember used grants and the clock's mark, and forget what expired before ``forget_ms``, all at once."""
        rows = [(each.issuer, each.nonce, each.digest, each.expires_ms) for each in used]
        with self._transaction():
            if forget_ms:
                self._db.execute("DELETE FROM grants WHERE expires_ms < ?", (forget_ms,))
            self._db.executemany(
                "INSERT OR REPLACE INTO grants VALUES (?, ?, ?, ?, ?)",
                [(*row, self._tag_of("grants", row)) for row in rows],
            )
            before = self.clock_mark()
            self._write_mark(ClockMark(max(mark_ms, before.mark_ms), before.floor_ms))

    def reset_clock(self, mark_ms: int, floor_ms: int) -> None:
        """Set the mark, back too, by an operator's word; grants made before ``floor_ms`` are refused from then on."""
        with self._transaction():
            self._write_mark(ClockMark(mark_ms, max(floor_ms, self.clock_mark().floor_ms)))

    def _write_mark(self, mark: ClockMark) -> None:
        values = (1, mark.mark_ms, mark.floor_ms)
        self._db.execute("INSERT OR REPLACE INTO clock VALUES (?, ?, ?, ?)", (*values, self._tag_of("clock", values)))

    # --- pledges ---

    def pledged(self, key_id: bytes) -> int:
        """The attempt to change the key below which none is followed here any more, checked; 0 if there is none."""
        with self._lock:
            known = self._pledges.get(key_id)
            if known is None:
                rows = self._select("SELECT key_id, attempt, tag FROM pledges WHERE key_id = ?", key_id)
                known = int(self._checked("pledges", rows[0])[1]) if rows else 0
                self._know_pledge(key_id, known)
            return known

    def _know_pledge(self, key_id: bytes, attempt: int) -> None:
        """Remember it; a transaction that fails forgets all."""
        if len(self._pledges) >= PLEDGES_KNOWN:
            self._pledges.clear()
        self._pledges[key_id] = attempt

    def pledge(self, key_id: bytes, attempt: int) -> None:
        """Never follow an attempt below this one; durable."""
        with self._lock:
            if self.pledged(key_id) >= attempt:
                return
            values = (key_id, attempt)
            with self._transaction():
                self._db.execute(
                    "INSERT OR REPLACE INTO pledges VALUES (?, ?, ?)", (*values, self._tag_of("pledges", values))
                )
                self._know_pledge(key_id, attempt)

    # --- the balancers' fencing epochs ---

    def fencings(self) -> dict[str, int]:
        """Balancer -> the newest fencing epoch that was seen of it, each row checked."""
        rows = self._select("SELECT balancer, epoch, tag FROM fencings")
        return {str(balancer): int(epoch) for balancer, epoch in (self._checked("fencings", row) for row in rows)}

    def note_fencing(self, balancer: str, epoch: int) -> None:
        """Never follow an older fencing epoch of that balancer; durable."""
        with self._lock:
            if self.fencings().get(balancer, 0) >= epoch:
                return
            values = (balancer, epoch)
            with self._transaction():
                self._db.execute(
                    "INSERT OR REPLACE INTO fencings VALUES (?, ?, ?)", (*values, self._tag_of("fencings", values))
                )

    # --- the settings of keys ---

    def settings(self) -> list[bytes]:
        """The newest settings of each key that has any, each row checked."""
        rows = self._select("SELECT lineage, serial, document, tag FROM settings")
        return [self._checked("settings", row)[2] for row in rows]

    def put_settings(self, lineage: bytes, serial: int, document: bytes) -> None:
        """Keep newer settings of a key; durable."""
        values = (lineage, serial, document)
        with self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO settings VALUES (?, ?, ?, ?)", (*values, self._tag_of("settings", values))
            )

    # --- quotas ---

    def quota(self, key_id: bytes) -> tuple[int, int] | None:
        """The uses of a key that this node was granted, and those that count as made, checked; None if it has none."""
        rows = self._select("SELECT key_id, granted, noted, tag FROM quotas WHERE key_id = ?", key_id)
        if not rows:
            return None
        _, granted, noted = self._checked("quotas", rows[0])
        return int(granted), int(noted)

    def note_quota(self, key_id: bytes, granted: int, noted: int) -> None:
        """Note both anew; durable."""
        with self._transaction():
            self._write_quota(key_id, granted, noted)

    def _write_quota(self, key_id: bytes, granted: int, noted: int) -> None:
        values = (key_id, granted, noted)
        self._db.execute("INSERT OR REPLACE INTO quotas VALUES (?, ?, ?, ?)", (*values, self._tag_of("quotas", values)))

    # --- reading ---

    def rows(self) -> list[Row]:
        """Every row, each checked; a damaged one is told by ``StoreCorrupt``."""
        return self._read()

    def rows_of(self, key_id: bytes) -> list[Row]:
        """The rows of a key, each checked."""
        return self._read("WHERE key_id = ?", key_id)

    def get(self, key_id: bytes, version: int = 1, epoch: int = 1) -> Row | None:
        """One row, checked."""
        found = self._read("WHERE key_id = ? AND version = ? AND epoch = ?", key_id, version, epoch)
        return found[0] if found else None

    # --- changing; each method is one durable transaction ---

    def put(self, row: Row, quota: int = 0) -> Row:
        """Store or replace a row, durably, and return it as read back from the file.

        ``quota`` are uses that this node is granted with it.
        """
        with self._lock:
            with self._transaction():
                self._write(row)
                if quota and self.quota(row.key_id) is None:
                    self._write_quota(row.key_id, quota, 0)
            stored = self.get(row.key_id, row.version, row.epoch)
        if stored != row:
            raise StoreCorrupt(f"the store of {self._node!r} did not give back what was written")
        return stored

    def commit(self, row: Row, certificate: bytes, now_ms: int) -> Row:
        """Mark a prepared row as committed."""
        return self.put(replace(row, state="committed", certificate=certificate, document=b"", changed_ms=now_ms))

    def advance(self, row: Row) -> Row:
        """Make this epoch, committed or moved, the only one: the key's other rows go, shares and all, with it.

        secure_delete overwrites them; ``truncate_log`` follows.
        """
        return self._put_alone(row)

    def destroy(self, row: Row, order: bytes, now_ms: int) -> Row:
        """Erase the shares of all epochs (secure_delete overwrites them) and keep the order as a tombstone.

        ``truncate_log`` follows.
        """
        return self._put_alone(
            replace(row, state="destroyed", sealed=b"", document=order, changed_ms=now_ms), forget_uses=True
        )

    def _put_alone(self, row: Row, *, forget_uses: bool = False) -> Row:
        with self._lock:
            with self._transaction():
                self._db.execute("DELETE FROM keys WHERE key_id = ?", (row.key_id,))
                self._db.execute("DELETE FROM pledges WHERE key_id = ?", (row.key_id,))
                self._pledges.pop(row.key_id, None)
                if forget_uses:
                    self._db.execute("DELETE FROM quotas WHERE key_id = ?", (row.key_id,))
                self._write(row)
            stored = self._read("WHERE key_id = ?", row.key_id)
        if stored != [row]:
            raise StoreCorrupt(f"the store of {self._node!r} did not give back what was written")
        return row

    def delete(self, row: Row) -> None:
        """Remove a prepared row for good, after its abort notice; ``truncate_log`` follows."""
        with self._transaction():
            self._db.execute(
                "DELETE FROM keys WHERE key_id = ? AND version = ? AND epoch = ?", (row.key_id, row.version, row.epoch)
            )

    def truncate_log(self) -> None:
        """Move the log into the file and truncate it, so that no old copy of an erased blob stays in it.

        ``TokenError`` while another process reads the file: then the blob is not gone yet, and this is to be repeated.
        """
        with self._lock:
            busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise TokenError(f"an erased share may still be in the log of the store of {self._node!r}, which is in use")
