"""The registry: names, keys, attempts and tombstones, durable before they are told. It knows no socket and no clock.

A key here is one version of what a client calls so. It goes reserved -> committed -> destroyed, or reserved -> aborted;
the versions of one name share their lineage, the id of version 1, and are destroyed together. A committed key goes from
epoch to epoch: beside it stands at most one pending change, whose attempts are numbered on over the life of the key's
id. Invariants:

1. A name and version belong to at most one reserved or committed key, and a name to one lineage of them.
2. An attempt for which an abort notice was signed never commits, not even after the registry fell back to an old copy:
   the notice on an attempt it did not know is preceded by a durable note, and later attempts are numbered beyond it.
3. A destroyed key id never comes back, and no version follows one that was destroyed.
4. An epoch follows the one that is committed, by receipts of all its holders; no notice is signed on an attempt that
   was committed once.

The registry holds no secret, and every document in it is signed; so in a file that this balancer alone can write, rows
carry a plain hash against the disk's own errors. In a database that others can write, the balancer signs each row that
is no mere index.
"""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from balancer.database import Database, SqliteDatabase, upsert
from balancer.mark import Mark
from balancer.places import PLACES_TABLES, Places
from engine.errors import (
    AccessDenied,
    ConfigError,
    EngineError,
    KeyExists,
    KeyNotFound,
    ManifestError,
    Overloaded,
    ProtocolError,
    RegistryUnavailable,
)
from engine.failpoints import failpoint
from engine.protocol.manifest import (
    CLOCK_SKEW_MS,
    AbortNotice,
    Cluster,
    ClusterSource,
    CommitCertificate,
    CreateOrder,
    FollowsCluster,
    KeyRecord,
    ReshareOrder,
    aborts,
    certificates,
    check_successor,
    first_quota,
    open_certificate,
    open_change_order,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
    open_receipts,
    read_create_order,
    read_key_manifest,
)
from engine.protocol.requests import OutcomeReply, Reserved, SyncEntry, SyncPage
from engine.protocol.settings import (
    SettingsOrder,
    SettingsRecord,
    book_settings,
    is_settings,
    open_settings,
    read_settings,
)
from engine.protocol.signed import SigningKey, encode_body, sign_bodies, sign_envelope, verify_envelope
from engine.sharing import check_placement

__all__ = ["ROW", "KnownKey", "Registry", "SqlRegistry", "SqliteRegistry", "open_seal"]

MAX_ATTEMPT = 2**31 - 1
SHAPE_SAMPLE = 200
UNKNOWN_ATTEMPT_MAX = 1_000
"""Attempts above this of a reservation that is not known here are told as pending, so that nobody uses them all up."""
ABORTS_MAX = 16
"""How many notices on earlier attempts a reservation carries."""
PAGE_BYTES_MAX = 40 * 1024
PAGE_ENTRIES_MAX = 256
REFUSED_MAX = 100_000
"""How many unknown attempts are noted; beyond that, they stay pending until old notes are pruned."""
KEEP_MS = 24 * 3_600_000
"""Aborted reservations and notes are pruned at start after this: any order they speak of expired long before."""
DUE_MAX = 64
"""How many keys are destroyed at a time whose time has come."""
CHANGE_LEASE_MS = 10_000
"""A change under way keeps those of other orders waiting for this long; then its coordinator counts as dead."""
ROTATE_LEASE_MS = 15_000
"""The same of a rotation: its dealer may have to make an RSA key."""
RESTORED_BEYOND = 1_024
"""How many attempts are passed over in books that were made anew; of revisions, so many times so many."""
QUOTA_LEAST = 1_024
"""A node is granted this part of a key's uses at least, so that the last of them take no round trip each."""
ROW = "registry.row"
"""The kind of envelope that seals a row which others could write."""


T = TypeVar("T")


class Registry(Protocol):
    """What the balancer needs of a registry. Times are milliseconds since the Unix epoch.

    Every method raises ``RegistryUnavailable`` when the store fails; nothing is then promised or lost.
    """

    @property
    def fencing_epoch(self) -> int:
        """Grows with every balancer that begins to lead."""

    @property
    def term(self) -> int:
        """The fencing epoch as long as this balancer leads, else 0; any thread may ask."""

    @property
    def leader(self) -> str:
        """The balancer that leads, as far as this one knows, or empty."""

    @property
    def problem(self) -> str:
        """Why this one can't lead, or empty."""

    def note_cluster_serial(self, serial: int) -> None:
        """Remember under which cluster manifest it served."""

    def reserve(
        self, order: bytes, dealer: str, now_ms: int, manifest: bytes = b"", certificate: bytes = b""
    ) -> Reserved:
        """Reserve the name and version of a client's create order for one attempt of ``dealer``."""

    def change(self, order: bytes, manifest: bytes, certificate: bytes, dealer: str, now_ms: int) -> Reserved:
        """Begin an attempt of ``dealer`` to carry out an order to refresh, reshare or move a committed key."""

    def commit(self, manifest: bytes, receipts: Sequence[bytes], now_ms: int) -> bytes:
        """Make the current attempt's manifest the key's; the commit certificate."""

    def commit_all(
        self, commits: Sequence[tuple[bytes, Sequence[bytes]]], now_ms: int
    ) -> list[bytes | EngineError | ValueError]:
        """``commit`` of several keys, each alone, inside ``together``; the certificates are signed together."""

    def together(self) -> AbstractContextManager[None]:
        """All that is booked until the end is durable together, when this ends; what fails alone is not booked."""

    def outcome(self, key_id: bytes, attempt: int, now_ms: int) -> OutcomeReply:
        """What became of an attempt: pending, committed or aborted."""

    def abort(self, key_id: bytes, attempt: int, dealer: str) -> OutcomeReply:
        """Give up a dealer's own attempt."""

    def destroy(self, order: bytes, now_ms: int) -> None:
        """Destroy a key by a client's order, for good."""

    def settings(self, order: bytes, now_ms: int) -> bytes:
        """Book a client's settings of a key; those in force then, countersigned."""

    def holders_of(self, settings: bytes) -> list[str]:
        """Who holds a share of any version of the key that these settings are of."""

    def destroy_due(self, now_ms: int) -> int:
        """Destroy the keys whose time has come; how many settings were carried out."""

    def quota(self, key_id: bytes, nonce: bytes, node: str) -> int:
        """Grant a holder more uses of a key whose uses are limited; 0 if there are no more."""

    def sync(self, node: str, after: int) -> SyncPage:
        """The keys a node holds a share of that changed after a change number."""

    def lacking(self, node: str, keys: Sequence[tuple[bytes, int]]) -> None:
        """Note that a node has no share of these keys, by id and epoch, although it is a holder."""

    def count(self) -> int:
        """How many keys are committed."""

    def holdings(self, now_ms: int) -> dict[str, int]:
        """Of how many keys each node holds a share, or is to hold one as soon as they are made."""

    def usual_shape(self) -> tuple[int, int] | None:
        """Threshold and shares of most committed keys, by a sample of them; None without any."""

    def places(self, ask: Callable[[Places], T]) -> T:
        """What the index of places answers; any thread may ask."""

    def set_targets(self, wanted: Mapping[int, Sequence[str]]) -> None:
        """Note durably where placement groups are to be; any thread may do so."""

    def close(self) -> None:
        """Close the store."""


@dataclass(frozen=True, slots=True)
class KnownKey:
    """What nodes prove of a key: the newest manifest and its certificate, or what destroyed it; and which nodes."""

    record: KeyRecord
    certificate: bytes
    tombstone: bytes
    nodes: tuple[str, ...]


class _State(IntEnum):
    RESERVED = 1
    COMMITTED = 2
    DESTROYED = 3
    ABORTED = 4


@dataclass(frozen=True, slots=True)
class _Row:
    """One key; the fields are the columns, in order. ``holders`` are node names joined by newlines."""

    key_id: bytes
    name: bytes
    state: int
    attempt: int
    dealer: bytes
    order_digest: bytes
    expires_ms: int
    holders: bytes
    manifest_hash: bytes
    manifest: bytes
    certificate: bytes
    tombstone: bytes

    @property
    def text(self) -> str:
        return self.name.decode()

    def expired(self, now_ms: int) -> bool:
        return self.expires_ms + CLOCK_SKEW_MS < now_ms


@dataclass(frozen=True, slots=True)
class _Version:
    """Which version of which lineage a reserved or committed key is, and when it was last reserved."""

    key_id: bytes
    version: int
    lineage: bytes
    began_ms: int


@dataclass(frozen=True, slots=True)
class _Checked:
    """An epoch that is to be certified: its manifest, the key's row before, and the certificate's payload."""

    record: KeyRecord
    row: _Row
    payload: bytes


class _ChangeState(IntEnum):
    PENDING = 1
    ENDED = 2


@dataclass(frozen=True, slots=True)
class _Change:
    """The last attempt to change a committed key; the fields are the columns, in order."""

    key_id: bytes
    attempt: int
    state: int
    dealer: bytes
    order_digest: bytes
    began_ms: int
    expires_ms: int

    @property
    def pending(self) -> bool:
        return self.state == _ChangeState.PENDING

    def expired(self, now_ms: int) -> bool:
        return self.expires_ms + CLOCK_SKEW_MS < now_ms


@dataclass(frozen=True, slots=True)
class _Settings:
    """The newest settings of a key; the fields are the columns, in order.

    ``due_ms`` is when the key is to be destroyed by them, or 0: also once that is done.
    """

    lineage: bytes
    name: bytes
    serial: int
    due_ms: int
    document: bytes


_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE keys (key_id BLOB PRIMARY KEY, name BLOB NOT NULL, state INTEGER NOT NULL,
           attempt INTEGER NOT NULL, dealer BLOB NOT NULL, order_digest BLOB NOT NULL, expires_ms INTEGER NOT NULL,
           holders BLOB NOT NULL, manifest_hash BLOB NOT NULL, manifest BLOB NOT NULL, certificate BLOB NOT NULL,
           tombstone BLOB NOT NULL, hash BLOB NOT NULL) STRICT, WITHOUT ROWID""",
        "CREATE UNIQUE INDEX live_names ON keys (name) WHERE state IN (1, 2)",
        "CREATE INDEX by_state ON keys (state)",
        """CREATE TABLE shares (node BLOB, key_id BLOB, changed INTEGER NOT NULL,
           PRIMARY KEY (node, key_id)) STRICT, WITHOUT ROWID""",
        "CREATE INDEX by_change ON shares (node, changed)",
        "CREATE TABLE refused (key_id BLOB PRIMARY KEY, attempt INTEGER NOT NULL, noted_ms INTEGER NOT NULL) STRICT",
        "CREATE TABLE counters (id INTEGER PRIMARY KEY, value INTEGER NOT NULL, hash BLOB NOT NULL) STRICT",
        """CREATE TABLE cluster (id INTEGER PRIMARY KEY CHECK (id = 1), pin BLOB NOT NULL,
           serial INTEGER NOT NULL) STRICT""",
    ),
    (
        """CREATE TABLE changes (key_id BLOB PRIMARY KEY, attempt INTEGER NOT NULL, state INTEGER NOT NULL,
           dealer BLOB NOT NULL, order_digest BLOB NOT NULL, began_ms INTEGER NOT NULL, expires_ms INTEGER NOT NULL,
           hash BLOB NOT NULL) STRICT, WITHOUT ROWID""",
        "CREATE TABLE past (key_id BLOB, attempt INTEGER, PRIMARY KEY (key_id, attempt)) STRICT, WITHOUT ROWID",
    ),
    (
        """CREATE TABLE settings (lineage BLOB PRIMARY KEY, name BLOB NOT NULL, serial INTEGER NOT NULL,
           due_ms INTEGER NOT NULL, document BLOB NOT NULL, hash BLOB NOT NULL) STRICT, WITHOUT ROWID""",
        "CREATE INDEX by_due ON settings (due_ms) WHERE due_ms > 0",
    ),
    PLACES_TABLES,
    (
        """CREATE TABLE versions (key_id BLOB PRIMARY KEY, name BLOB NOT NULL, version INTEGER NOT NULL,
           lineage BLOB NOT NULL, began_ms INTEGER NOT NULL) STRICT, WITHOUT ROWID""",
        "CREATE UNIQUE INDEX live_versions ON versions (name, version)",
        "CREATE INDEX by_lineage ON versions (lineage)",
        "INSERT INTO versions SELECT key_id, name, 1, key_id, 0 FROM keys WHERE state IN (1, 2)",
        "DROP INDEX live_names",
    ),
    (
        "CREATE TABLE quotas (key_id BLOB PRIMARY KEY, given INTEGER NOT NULL, hash BLOB NOT NULL) STRICT",
        """CREATE TABLE grants (key_id BLOB, node BLOB, nonce BLOB NOT NULL, uses INTEGER NOT NULL,
           PRIMARY KEY (key_id, node)) STRICT, WITHOUT ROWID""",
    ),
    ("ALTER TABLE grants ADD COLUMN hash BLOB NOT NULL DEFAULT x''",),
    ("CREATE INDEX by_name ON keys (name, state)", "CREATE INDEX shares_of ON shares (key_id)"),
)
"""Statements that take the schema from version i to i + 1."""
_FENCING_EPOCH, _SERIAL, _CHANGE, _REVISION = 1, 2, 3, 4


class SqlRegistry(FollowsCluster):
    """The registry in a database, from ``lead`` on.

    Each transaction that changes anything raises the *revision*. By ``mark``, a file of the balancer's own, a database
    that fell back to an earlier one is noticed.
    """

    def __init__(self, store: Database, cluster: ClusterSource, signing: SigningKey, mark: Mark | None = None) -> None:
        self._store = store
        self._source = cluster
        self._signing = signing
        self._mark = mark
        self._booked: list[str] | None = None
        """The steps of the transaction that many requests share, while there is one."""
        # Threads take turns: the service's, and the one that moves keys, which reads some rows at a time.
        self._turn = threading.RLock()
        self._places = Places(store, self._group_of, self._may_grow)
        self._fencing_epoch = 0
        self._term = 0
        self._revision: int | None = None
        self.problem = ""

    def lead(self, now_ms: int, term: int = 0) -> None:
        """Begin to lead, under the fencing epoch ``term`` or, where nobody gives one, the next; migrates the schema.

        ``ConfigError`` if the database belongs to another cluster, was written by a newer version, or fell back to an
        older state than this balancer has seen; or ``RegistryUnavailable``.
        """
        with self._reading():
            self._term, self._revision = term, None
            version = self._store.version()
            if not 0 <= version <= len(_MIGRATIONS):
                raise ConfigError(
                    f"{self._store.where}: schema version {version}; this software knows 1 to {len(_MIGRATIONS)}"
                )
            with self._transaction("open"):
                for statement in (each for step in _MIGRATIONS[version:] for each in step):
                    self._store.execute(statement)
                self._store.set_version(len(_MIGRATIONS))
                self._check_cluster()
                self._check_mark()
                self._prune(now_ms)
                self._places.prepare(self._grow_rules())
                fencing_epoch = self._raise_to(term) if term else self._next(_FENCING_EPOCH)
            self._fencing_epoch = self._term = fencing_epoch
            self._note_mark()

    def _check_cluster(self) -> None:
        known = (self._cluster.pin, self._cluster.serial)
        self._store.execute("INSERT INTO cluster VALUES (1, ?, ?) ON CONFLICT DO NOTHING", known)
        pin, serial = self._store.execute("SELECT pin, serial FROM cluster").fetchone()
        if pin != self._cluster.pin:
            raise ConfigError(
                f"{self._store.where}: belongs to the cluster pinned by {pin.hex()}, not {self._cluster.pin.hex()}"
            )
        if serial > self._cluster.serial:
            raise ConfigError(
                f"{self._store.where}: was served under serial {serial} of the cluster manifest, "
                f"the one given is older: {self._cluster.serial}"
            )
        self._store.execute("UPDATE cluster SET serial = ?", (self._cluster.serial,))

    def _check_mark(self) -> None:
        if self._mark is not None:
            self._mark.check(self._store.where, self._counter(_FENCING_EPOCH), self._counter(_REVISION))

    def _note_mark(self) -> None:
        if self._mark is not None and self._revision is not None:
            self._mark.note(self._fencing_epoch, self._revision)

    def _raise_to(self, term: int) -> int:
        if term <= self._counter(_FENCING_EPOCH):
            raise RegistryUnavailable(f"the fencing epoch {term} is over")
        self._set_counter(_FENCING_EPOCH, term)
        return term

    def _group_of(self, name: str) -> int:
        return self._cluster.group_of(name)

    def _may_grow(self, name: str) -> bool:
        return self._cluster.may_grow(self._signing.name, name)

    def _grow_rules(self) -> bytes:
        """What ``_may_grow`` goes by, in short."""
        rules = [rule for rule in self._cluster.rules if "grow" in rule.operations]
        return hashlib.sha256(msgspec.msgpack.encode([self._signing.name, *rules])).digest()

    @property
    def fencing_epoch(self) -> int:
        """Grows with every beginning."""
        return self._fencing_epoch

    @property
    def term(self) -> int:
        """The fencing epoch, from ``lead`` on."""
        return self._term

    @property
    def leader(self) -> str:
        """This balancer, once it leads."""
        return self._signing.name if self.term else ""

    def note_cluster_serial(self, serial: int) -> None:
        """Remember under which manifest it served, so that it never serves under an older one."""
        with self._transaction("manifest"):
            self._store.execute("UPDATE cluster SET serial = ? WHERE serial < ?", (serial, serial))
            self._places.prepare(self._grow_rules())

    def close(self) -> None:
        """Close the database; what was promised is in it."""
        self._term = 0
        self._store.close()
        if self._mark is not None:
            self._mark.close()

    def count(self) -> int:
        """How many keys are committed."""
        with self._reading():
            return int(self._store.execute("SELECT COUNT(*) FROM keys WHERE state = 2").fetchone()[0])

    def holdings(self, now_ms: int) -> dict[str, int]:
        """By the holders of committed keys and of reservations that have not expired; others are missing."""
        with self._reading():
            found = self._store.execute(
                "SELECT nodes, SUM(keys) FROM crowds GROUP BY nodes UNION ALL "
                "SELECT holders, COUNT(*) FROM keys WHERE state = 1 AND expires_ms >= ? GROUP BY holders",
                (now_ms - CLOCK_SKEW_MS,),
            ).fetchall()
        told: Counter[str] = Counter()
        for holders, keys in found:
            told.update(dict.fromkeys(holders.decode().split("\n"), int(keys)))
        return dict(told)

    def usual_shape(self) -> tuple[int, int] | None:
        """Threshold and shares of most of the first so many committed keys."""
        with self._reading():
            found = self._store.execute("SELECT manifest FROM keys WHERE state = 2 LIMIT ?", (SHAPE_SAMPLE,)).fetchall()
        told = Counter((each.threshold, each.shares) for (raw,) in found for each in [read_key_manifest(raw).manifest])
        return told.most_common(1)[0][0] if told else None

    # --- the verbs ---

    def reserve(
        self, order: bytes, dealer: str, now_ms: int, manifest: bytes = b"", certificate: bytes = b""
    ) -> Reserved:
        """Reserve the name and version for one attempt of ``dealer``; earlier attempts of the order are aborted.

        An order that has already made its key gets that back, as attempt 0, and so does one for a version that another
        order has made: the newest one. ``manifest`` and ``certificate`` are of the version before, as the dealer knows
        it: one that the books lack is taken in first. ``KeyExists``: the name is taken or being created;
        ``Overloaded``: this version is being made by another order; ``ManifestError``: the order is forged, expired,
        differs from an earlier one of its key id or follows no version that is there; ``AccessDenied``;
        ``KeyNotFound``: the key was destroyed; ``ValueError``: too few nodes.
        """
        wanted, signed = open_create_order(order, self._cluster, None)
        row = self._row(wanted.key_id)
        if row is not None:
            if (row.text, row.order_digest) != (wanted.name, signed.digest):
                raise ManifestError(f"the key id of {wanted.name!r} was used by another order")
            if row.state == _State.DESTROYED:
                raise KeyNotFound(f"the key {wanted.name!r} of this order was destroyed")
            if row.state == _State.COMMITTED:
                return Reserved(0, _names(row), [], row.manifest, row.certificate)
        open_create_order(order, self._cluster, now_ms)
        if dealer not in self._cluster.nodes:
            raise AccessDenied(f"{dealer!r} is no node and can't deal a key")
        before = None
        if wanted.operation == "rotate":
            self._take_in_version(wanted, manifest, certificate, now_ms)
            before = self._newest(wanted)
            if self._version(before.key_id).version >= wanted.version:
                return Reserved(0, _names(before), [], before.manifest, before.certificate)
        holders = self._holders(wanted, before)
        with self._transaction("reserve"):
            self._free_name(wanted, now_ms)
            attempt = max(row.attempt if row else 0, self._refused(wanted.key_id)) + 1
            if attempt > MAX_ATTEMPT:
                raise ValueError(f"attempt {attempt} of {wanted.name!r}; the limit is {MAX_ATTEMPT}")
            self._put(
                _Row(
                    key_id=wanted.key_id,
                    name=wanted.name.encode(),
                    state=_State.RESERVED,
                    attempt=attempt,
                    dealer=dealer.encode(),
                    order_digest=signed.digest,
                    expires_ms=wanted.expires_ms,
                    holders="\n".join(holders).encode(),
                    manifest_hash=b"",
                    manifest=b"",
                    certificate=b"",
                    tombstone=b"",
                )
            )
            self._put_version(wanted, now_ms)
        notices = [self._notice(wanted.key_id, each) for each in range(max(1, attempt - ABORTS_MAX), attempt)]
        return Reserved(attempt, list(holders), notices, b"", b"")

    def _newest(self, wanted: CreateOrder) -> _Row:
        """The newest committed version of the key that is to be rotated."""
        with self._reading():
            found = self._store.execute(
                # The sign has SQLite not begin with all committed keys.
                """SELECT versions.key_id FROM versions JOIN keys USING (key_id)
                   WHERE lineage = ? AND +state = 2 ORDER BY version DESC LIMIT 1""",
                (wanted.lineage,),
            ).fetchone()
        row = self._row(found[0]) if found else None
        if row is None or row.text != wanted.name:
            raise KeyNotFound(f"no key {wanted.name!r} of this lineage is committed")
        version = self._version(row.key_id).version
        if version < wanted.version - 1:
            raise ManifestError(f"version {wanted.version} of {wanted.name!r} does not follow the newest, {version}")
        algorithm = read_key_manifest(row.manifest).manifest.algorithm
        if wanted.algorithm != algorithm:
            raise ManifestError(f"{wanted.name!r} is {algorithm}: its versions can't be {wanted.algorithm}")
        return row

    def _take_in_version(self, wanted: CreateOrder, manifest: bytes, certificate: bytes, now_ms: int) -> None:
        """Book what a certificate proves: a version whose holders know better than a registry that fell back."""
        if not manifest:
            return
        record = open_key_manifest(manifest, self._cluster)
        told = record.manifest
        if (told.name, told.lineage) != (wanted.name, wanted.lineage):
            raise ManifestError(f"the manifest of {told.name!r} is of another key")
        known = self._row(told.key_id)
        if told.version < 2 or (known is not None and known.state in (_State.COMMITTED, _State.DESTROYED)):
            return
        first = self._row(told.lineage)
        if first is None or first.state != _State.COMMITTED:
            raise KeyNotFound(f"no key {wanted.name!r} of this lineage is committed")
        open_certificate(certificate, record, self._cluster)
        order = read_create_order(told.order)
        with self._transaction("take-in"):
            self._free_name(order, now_ms, certified=True)
            self._put(self._certified(record, certificate))
            self._put_version(order, now_ms)
            self._note_change(told.key_id, self._told_of(record))

    def _certified(self, record: KeyRecord, certificate: bytes) -> _Row:
        told = record.manifest
        order, signed = open_create_order(told.order, self._cluster, None)
        return _Row(
            key_id=told.key_id,
            name=told.name.encode(),
            state=_State.COMMITTED,
            attempt=told.attempt,
            dealer=record.dealer.encode(),
            order_digest=signed.digest,
            expires_ms=order.expires_ms,
            holders="\n".join(holder.node for holder in told.holders).encode(),
            manifest_hash=record.digest,
            manifest=record.raw,
            certificate=certificate,
            tombstone=b"",
        )

    def change(self, order: bytes, manifest: bytes, certificate: bytes, dealer: str, now_ms: int) -> Reserved:
        """Begin an attempt of ``dealer`` to change a committed key by an order; earlier ones are aborted for good.

        If the epoch that the order names is not the last one any more, the last one comes back as attempt 0.
        ``manifest`` and ``certificate`` are the dealer's: an epoch that is newer than the books is taken in first, for
        its holders know better than a registry that fell back. ``KeyNotFound``; ``AccessDenied``; ``ManifestError``:
        the order is forged, expired, of another key, or of an older fencing epoch; ``Overloaded``: a change by another
        order is under way.
        """
        wanted, signed = open_change_order(order, self._cluster, now_ms)
        if 0 < wanted.fencing < self._fencing_epoch:
            raise ManifestError(
                f"the order for {wanted.name!r} is of the fencing epoch {wanted.fencing}, now is {self._fencing_epoch}"
            )
        row = self._row(wanted.key_id)
        if row is None or row.state != _State.COMMITTED or row.text != wanted.name:
            raise KeyNotFound(f"no key {wanted.name!r} of this id is committed")
        row = self._take_in(row, manifest, certificate)
        current = read_key_manifest(row.manifest).manifest
        if current.epoch > wanted.from_epoch:
            return Reserved(0, _names(row), [], row.manifest, row.certificate)
        if current.epoch < wanted.from_epoch:
            raise ManifestError(
                f"the order replaces epoch {wanted.from_epoch} of {wanted.name!r}, the last is {current.epoch}"
            )
        if current.holder(dealer) is None:
            raise AccessDenied(f"{dealer!r} is no holder of {wanted.name!r} and can't change it")
        with self._transaction("change"):
            before = self._change(wanted.key_id)
            if before is not None and before.pending and before.order_digest != signed.digest:
                wait_ms = before.began_ms + CHANGE_LEASE_MS - now_ms
                if 0 < wait_ms <= CHANGE_LEASE_MS:
                    raise Overloaded(f"{wanted.name!r} is being changed; its coordinator has {wait_ms} ms left")
            attempt = max(row.attempt, before.attempt if before else 0, self._refused(wanted.key_id)) + 1
            if attempt > MAX_ATTEMPT:
                raise ValueError(f"attempt {attempt} of {wanted.name!r}; the limit is {MAX_ATTEMPT}")
            self._put_change(
                _Change(
                    key_id=wanted.key_id,
                    attempt=attempt,
                    state=_ChangeState.PENDING,
                    dealer=dealer.encode(),
                    order_digest=signed.digest,
                    began_ms=now_ms,
                    expires_ms=wanted.expires_ms,
                )
            )
            if isinstance(wanted, ReshareOrder):
                self._note_change(wanted.key_id, wanted.holders)
        # Those after the last commit alone: what was committed once is never called aborted.
        given_up = range(max(row.attempt + 1, attempt - ABORTS_MAX), attempt)
        notices = [self._notice(wanted.key_id, each) for each in given_up]
        return Reserved(attempt, _names(row), notices, row.manifest, row.certificate)

    def _take_in(self, row: _Row, manifest: bytes, certificate: bytes) -> _Row:
        """The row after what a certificate proves: all holders store a newer epoch than the books tell of."""
        if manifest == row.manifest:
            return row
        record = open_key_manifest(manifest, self._cluster)
        told, known = record.manifest, read_key_manifest(row.manifest).manifest
        if told.key_id != row.key_id:
            raise ManifestError(f"the manifest of {told.name!r} is of another key id")
        if told.epoch <= known.epoch:
            return row
        open_certificate(certificate, record, self._cluster)
        newer = replace(
            row,
            attempt=told.attempt,
            dealer=record.dealer.encode(),
            holders="\n".join(holder.node for holder in told.holders).encode(),
            manifest_hash=record.digest,
            manifest=manifest,
            certificate=certificate,
        )
        with self._transaction("adopt"):
            self._advance(row, newer)
        return newer

    def _advance(self, row: _Row, newer: _Row) -> None:
        """Write the newer epoch of a committed key, inside a transaction."""
        self._store.execute("INSERT INTO past VALUES (?, ?) ON CONFLICT DO NOTHING", (row.key_id, row.attempt))
        change = self._change(row.key_id)
        if change is not None and change.attempt <= newer.attempt:
            self._put_change(replace(change, state=_ChangeState.ENDED))
        self._put(newer)
        # Who leaves hears of it too, and who was to come by an attempt that was given up.
        told = self._store.execute("SELECT node FROM shares WHERE key_id = ?", (row.key_id,)).fetchall()
        self._note_change(row.key_id, list({*_names(newer), *(node.decode() for (node,) in told)}))
        newest = self._lineage(self._version(row.key_id).lineage)[-1]
        if newest.key_id != row.key_id and newest.state == _State.COMMITTED:
            self._note_change(newest.key_id, _names(newer))

    def commit(self, manifest: bytes, receipts: Sequence[bytes], now_ms: int) -> bytes:
        """Make the manifest the key's; the certificate. The same manifest again gets the same certificate.

        ``ManifestError``: it is forged, not of the current attempt, its dealer, order or holders are not the reserved
        ones, a receipt is wrong, too few holders gave one, or the order has expired. An epoch after the first must
        follow the committed one, and all its holders give a receipt.
        """
        checked = self._checked(manifest, receipts, now_ms)
        if not isinstance(checked, _Checked):
            return checked
        with self._transaction("commit"):
            (certificate,) = self._certify([checked])
            self._book(checked, certificate)
        return certificate

    def commit_all(
        self, commits: Sequence[tuple[bytes, Sequence[bytes]]], now_ms: int
    ) -> list[bytes | EngineError | ValueError]:
        """``commit`` of several keys, each alone, inside ``together``; the certificates are signed together."""
        checked: list[_Checked | bytes | EngineError | ValueError] = []
        for manifest, receipts in commits:
            try:
                one = self._checked(manifest, receipts, now_ms)
                if isinstance(one, _Checked) and any(
                    isinstance(each, _Checked) and each.row.key_id == one.row.key_id for each in checked
                ):
                    raise ManifestError(f"two manifests of {one.row.text!r} at once; each must be of another key")
                checked.append(one)
            except (EngineError, ValueError) as error:
                checked.append(error)
        certified = iter(self._certify([each for each in checked if isinstance(each, _Checked)]))
        made: list[bytes | EngineError | ValueError] = []
        for each in checked:
            if not isinstance(each, _Checked):
                made.append(each)
                continue
            certificate = next(certified)
            try:
                with self._transaction("commit"):
                    self._book(each, certificate)
                made.append(certificate)
            except EngineError as error:
                made.append(error)
        return made

    def _certify(self, checked: Sequence[_Checked]) -> list[bytes]:
        """Their certificates, inside a transaction."""
        name = self._signing.name
        bodies = [encode_body("certificate", self._next(_SERIAL), each.payload, name) for each in checked]
        return sign_bodies(bodies, self._signing)

    def _checked(self, manifest: bytes, receipts: Sequence[bytes], now_ms: int) -> _Checked | bytes:
        """What is to be certified, with all that it rests on checked; or the certificate, if that was done before."""
        record = open_key_manifest(manifest, self._cluster)
        told = record.manifest
        row = self._row(told.key_id)
        if row is not None and row.manifest_hash == record.digest:
            return row.certificate
        row = (self._check_first if told.epoch == 1 else self._check_next)(record, row, now_ms)
        found = open_receipts(receipts, record, self._cluster)
        payload = certificates.encode(CommitCertificate(told.key_id, record.digest, list(found.values())))
        return _Checked(record, row, payload)

    def _book(self, checked: _Checked, certificate: bytes) -> None:
        """Make the certified epoch the key's, inside a transaction."""
        record, row = checked.record, checked.row
        told = record.manifest
        newer = replace(
            row,
            state=_State.COMMITTED,
            attempt=told.attempt,
            dealer=record.dealer.encode(),
            holders="\n".join(holder.node for holder in told.holders).encode(),
            manifest_hash=record.digest,
            manifest=record.raw,
            certificate=certificate,
        )
        if told.epoch == 1:
            self._put(newer)
            self._note_change(told.key_id, self._told_of(record))
        else:
            self._advance(row, newer)

    def _told_of(self, record: KeyRecord) -> list[str]:
        """The holders of a version that was made, and those of the others: they shall know that it is the newest."""
        told = {holder.node: None for holder in record.manifest.holders}
        if record.manifest.version > 1:
            for row in self._lineage(record.manifest.lineage):
                told |= dict.fromkeys(_names(row))
        return list(told)

    def _note_change(self, key_id: bytes, nodes: Sequence[str]) -> None:
        change = self._next(_CHANGE)
        self._store.executemany(
            upsert("shares", "node, key_id", "changed"), [(node.encode(), key_id, change) for node in nodes]
        )

    def outcome(self, key_id: bytes, attempt: int, now_ms: int) -> OutcomeReply:
        """What became of an attempt. The abort of an expired or unknown one is durable before its notice is signed."""
        if not 1 <= attempt <= MAX_ATTEMPT:
            raise ValueError(f"attempt {attempt} is not in 1..{MAX_ATTEMPT}")
        row = self._row(key_id)
        settled = row is not None and row.state in (_State.COMMITTED, _State.DESTROYED)
        if row is not None and settled and (attempt > row.attempt or self._is_past(key_id, attempt)):
            return self._outcome_of_change(row, attempt, now_ms)
        if row is not None and attempt == row.attempt:
            if settled:
                return OutcomeReply("committed", row.certificate)
            if row.state == _State.RESERVED:
                if not row.expired(now_ms):
                    return OutcomeReply("pending", b"")
                with self._transaction("expire"):
                    self._put(replace(row, state=_State.ABORTED))
        elif row is not None and attempt > row.attempt:
            # No node can have prepared it honestly: whoever asks gets nothing signed about what was never given out.
            return OutcomeReply("pending", b"")
        elif row is None and (attempt > UNKNOWN_ATTEMPT_MAX or not self._refuse(key_id, attempt, now_ms)):
            return OutcomeReply("pending", b"")
        return OutcomeReply("aborted", self._notice(key_id, attempt))

    def _outcome_of_change(self, row: _Row, attempt: int, now_ms: int) -> OutcomeReply:
        """What became of an attempt to change a committed key. One whose epoch is past is told by the last one's."""
        change = self._change(row.key_id)
        if attempt <= row.attempt:
            return OutcomeReply("committed", row.certificate)
        if change is None or attempt > change.attempt:
            return OutcomeReply("pending", b"")
        if attempt == change.attempt and change.pending:
            if row.state == _State.COMMITTED and not change.expired(now_ms):
                return OutcomeReply("pending", b"")
            with self._transaction("expire"):
                self._put_change(replace(change, state=_ChangeState.ENDED))
        return OutcomeReply("aborted", self._notice(row.key_id, attempt))

    def abort(self, key_id: bytes, attempt: int, dealer: str) -> OutcomeReply:
        """Give up an attempt on its dealer's word, so that its name is free at once; the signed notice of it.

        An attempt that was committed after all is told by its certificate. ``AccessDenied``: it is another dealer's.
        """
        row = self._row(key_id)
        change = self._change(key_id)
        if change is not None and row is not None and attempt == change.attempt > row.attempt:
            if change.dealer != dealer.encode():
                raise AccessDenied(f"{dealer!r} deals no attempt {attempt} of the key with id {key_id.hex()}")
            if change.pending:
                with self._transaction("abort"):
                    self._put_change(replace(change, state=_ChangeState.ENDED))
            return OutcomeReply("aborted", self._notice(key_id, attempt))
        if row is None or row.attempt != attempt or row.dealer != dealer.encode():
            raise AccessDenied(f"{dealer!r} deals no attempt {attempt} of the key with id {key_id.hex()}")
        if row.state in (_State.COMMITTED, _State.DESTROYED):
            return OutcomeReply("committed", row.certificate)
        if row.state == _State.RESERVED:
            with self._transaction("abort"):
                self._put(replace(row, state=_State.ABORTED))
        return OutcomeReply("aborted", self._notice(key_id, attempt))

    def destroy(self, order: bytes, now_ms: int) -> None:
        """Mark all versions of the key destroyed and keep the order as their tombstone; once more changes nothing.

        ``KeyNotFound``: no committed key's version 1 has this id; ``ManifestError``: the order is forged, expired or
        names another key; ``AccessDenied``.
        """
        wanted, _ = open_destroy_order(order, self._cluster, None)
        row = self._row(wanted.key_id)
        if row is None or row.state not in (_State.COMMITTED, _State.DESTROYED) or self._is_later(row):
            raise KeyNotFound(f"no key {wanted.name!r} of this id is committed")
        if row.text != wanted.name:
            raise ManifestError(f"the destroy order names {wanted.name!r}, the key is {row.text!r}")
        if row.state == _State.DESTROYED:
            return
        open_destroy_order(order, self._cluster, now_ms)
        with self._transaction("destroy"):
            for version in self._lineage(wanted.key_id):
                if version.state == _State.COMMITTED:
                    self._put(replace(version, state=_State.DESTROYED, tombstone=order))
                    change = self._next(_CHANGE)  # one for each: a page of the books may end between them
                    self._store.execute("UPDATE shares SET changed = ? WHERE key_id = ?", (change, version.key_id))
                else:
                    self._put(replace(version, state=_State.ABORTED))

    def settings(self, order: bytes, now_ms: int) -> bytes:
        """Book a client's settings of a key, unless others came before it knew of; those in force then, countersigned.

        So of two clients that began from the same settings one is told the other's, and begins again from there. What
        is countersigned already and newer than the books is taken in: nodes know better than a registry that fell back.
        ``KeyNotFound``: no committed key is meant, or its time has come; ``ManifestError``: forged, expired, or of
        another key; ``AccessDenied``; ``ValueError``: a version that is not there, or a time that is over.
        """
        told = open_settings(order, self._cluster, None)
        wanted = told.order
        row = self._row(wanted.lineage)
        if row is None or row.text != wanted.name:
            raise KeyNotFound(f"no key {wanted.name!r} of this id is committed")
        current = self._settings(wanted.lineage)
        if current is not None and wanted.serial <= current.serial:
            return current.document
        if told.booked:
            self._revive(told)
        elif current is not None and wanted.previous < current.serial:
            return current.document
        else:
            open_settings(order, self._cluster, now_ms)
            self._check_settings(wanted, current, now_ms)
        versions = [row.key_id for row in self._rows_of(wanted)]
        if not versions:
            raise KeyNotFound(f"no key {wanted.name!r} of this id is committed")
        document = order if told.booked else book_settings(order, self._signing)
        with self._transaction("settings"):
            self._put_settings(
                _Settings(wanted.lineage, wanted.name.encode(), wanted.serial, wanted.destroy_at_ms, document)
            )
            self._note_everywhere(versions)
        return document

    def holders_of(self, settings: bytes) -> list[str]:
        """The holders of all committed versions: a node may know the versions alone that it holds itself."""
        rows = self._rows_of(read_settings(settings).order)
        return sorted({node for row in rows for node in row.holders.decode().split("\n") if node})

    def _check_settings(self, wanted: SettingsOrder, current: _Settings | None, now_ms: int) -> None:
        if current is not None and 0 < current.due_ms <= now_ms:
            raise KeyNotFound(f"the time of the key {wanted.name!r} has come: it is being destroyed")
        if 0 < wanted.destroy_at_ms <= now_ms:
            raise ValueError(
                f"the key {wanted.name!r} can't be destroyed {now_ms - wanted.destroy_at_ms} ms ago; "
                "a destruction without delay needs no settings"
            )
        newest = max((read_key_manifest(row.manifest).manifest.version for row in self._rows_of(wanted)), default=1)
        if wanted.min_version > newest:
            raise ValueError(
                f"the newest version of {wanted.name!r} is {newest}: {wanted.min_version} can't be the least"
            )

    def _revive(self, told: SettingsRecord) -> None:
        """Take back what a registry that fell back destroyed by settings that these had replaced before."""
        order = told.order
        dead = [row for row in self._rows_of(order, _State.DESTROYED) if is_settings(row.tombstone)]
        late = [row for row in dead if read_settings(row.tombstone).serial < order.serial]
        with self._reading():
            taken = self._store.execute(
                "SELECT 1 FROM keys WHERE name = ? AND state IN (1, 2)", (order.name.encode(),)
            ).fetchone()
        if not late or order.destroy_at_ms or taken is not None:
            return
        with self._transaction("revive"):
            for row in late:
                self._put(replace(row, state=_State.COMMITTED, tombstone=b""))
                self._put_version(read_create_order(read_key_manifest(row.manifest).manifest.order), 0)

    def destroy_due(self, now_ms: int) -> int:
        """Destroy the keys whose time has come, all versions, at most so many; how many settings were carried out.

        From here on it can't be undone. A holder erases its share on the settings, if by its own clock it is time too.
        """
        with self._reading():
            found = self._store.execute(
                "SELECT lineage FROM settings WHERE due_ms > 0 AND due_ms <= ? ORDER BY due_ms LIMIT ?",
                (now_ms, DUE_MAX),
            ).fetchall()
        for (lineage,) in found:
            settings = self._settings(lineage)
            if settings is None:
                raise RegistryUnavailable(f"the registry has lost the settings of the key {lineage.hex()}")
            order = read_settings(settings.document).order
            with self._transaction("due"):
                rows = self._rows_of(order)
                for row in self._lineage(lineage):
                    if row.state == _State.RESERVED:  # a version that is being made
                        self._put(replace(row, state=_State.ABORTED))
                for row in rows:
                    self._put(replace(row, state=_State.DESTROYED, tombstone=settings.document))
                self._note_everywhere([row.key_id for row in rows])
                self._put_settings(replace(settings, due_ms=0))
        return len(found)

    def _rows_of(self, order: SettingsOrder, state: _State = _State.COMMITTED) -> list[_Row]:
        """The rows of a key's versions in one state."""
        with self._reading():
            found = self._store.execute(
                "SELECT key_id FROM keys WHERE name = ? AND state = ?", (order.name.encode(), state)
            ).fetchall()
        rows = [row for (key_id,) in found for row in [self._row(key_id)] if row is not None]
        return [row for row in rows if read_key_manifest(row.manifest).manifest.lineage == order.lineage]

    def _note_everywhere(self, key_ids: Sequence[bytes]) -> None:
        """Have every node that a key's shares concern hear of it again."""
        for key_id in key_ids:
            change = self._next(_CHANGE)
            self._store.execute("UPDATE shares SET changed = ? WHERE key_id = ?", (change, key_id))

    def quota(self, key_id: bytes, nonce: bytes, node: str) -> int:
        """Grant a holder more uses of a key whose uses are limited, durably; 0 if there are no more.

        What is granted counts as used. So that one node does not take it all, it is a part of what is left; the first
        holders have half of all without asking. The same ``nonce`` again gets the same: its answer may have been lost.
        ``KeyNotFound``; ``AccessDenied``: the node holds no share; ``ValueError``: the key has no limit.
        """
        row = self._row(key_id)
        if row is None or row.state != _State.COMMITTED:
            raise KeyNotFound(f"no key with id {key_id.hex()} is committed")
        holders = _names(row)
        if node not in holders:
            raise AccessDenied(f"{node!r} is no holder of {row.text!r} and has no use of it")
        manifest = read_key_manifest(row.manifest).manifest
        limit = manifest.uses_max
        if not limit:
            raise ValueError(f"the uses of {row.text!r} are not limited")
        with self._transaction("quota"):
            last = self._store.execute(
                "SELECT uses, hash FROM grants WHERE key_id = ? AND node = ? AND nonce = ?",
                (key_id, node.encode(), nonce),
            ).fetchone()
            if last is not None and self._is_sealed("grants", (key_id, node.encode(), nonce, last[0]), last[1]):
                return int(last[0])
            given = self._given(key_id, read_create_order(manifest.order).shares * first_quota(manifest))
            uses = max(0, min(limit - given, max(1, limit // QUOTA_LEAST, (limit - given) // (2 * len(holders)))))
            self._put_sealed("quotas", "key_id", key_id=key_id, given=given + uses)
            self._put_sealed("grants", "key_id, node", key_id=key_id, node=node.encode(), nonce=nonce, uses=uses)
        return uses

    def _given(self, key_id: bytes, first: int) -> int:
        """How many uses of a key were given out; ``first`` before any was asked for."""
        found = self._store.execute("SELECT given, hash FROM quotas WHERE key_id = ?", (key_id,)).fetchone()
        if found is None:
            return first
        if not self._is_sealed("quotas", (key_id, found[0]), found[1]):
            raise RegistryUnavailable(f"the registry's count of the uses of the key {key_id.hex()} is damaged")
        return int(found[0])

    def sync(self, node: str, after: int) -> SyncPage:
        """The node's keys that changed after a change number, in order, at most 256 entries or 40 KiB of documents."""
        with self._reading():
            found = self._store.execute(
                "SELECT key_id, changed FROM shares WHERE node = ? AND changed > ? ORDER BY changed LIMIT ?",
                (node.encode(), after, PAGE_ENTRIES_MAX + 1),
            ).fetchall()
        entries: list[SyncEntry] = []
        size = 0
        last = after
        for key_id, changed in found[:PAGE_ENTRIES_MAX]:
            row = self._row(key_id)
            if row is None:
                raise RegistryUnavailable(f"the registry has lost the key {key_id.hex()}")
            settings = self._settings(read_key_manifest(row.manifest).manifest.lineage)
            document = settings.document if settings is not None else b""
            size += len(row.manifest) + len(row.certificate) + len(row.tombstone) + len(document)
            if entries and size > PAGE_BYTES_MAX:
                break
            state = "destroyed" if row.state == _State.DESTROYED else "committed"
            entries.append(SyncEntry(key_id, state, row.manifest, row.certificate, row.tombstone, document))
            last = changed
        return SyncPage(entries, len(entries) < len(found), last, self._fencing_epoch)

    def restore(self, known: KnownKey, now_ms: int) -> str:
        """Book what the holders of a key prove of it, if the books are behind; what is to be said of that, or empty.

        Attempts after it are numbered far beyond, as notices on the next ones may have been signed; uses that are
        limited count as given out.
        """
        record, told = known.record, known.record.manifest
        row = self._row(told.key_id)
        if row is not None and row.state == _State.DESTROYED:
            return ""
        behind = row is None or row.state != _State.COMMITTED
        if row is not None and row.state == _State.COMMITTED:
            behind = read_key_manifest(row.manifest).manifest.epoch < told.epoch
        if not behind and not known.tombstone:
            return ""
        if not known.tombstone and self._other_of(told.name, told.version, told.key_id) is not None:
            return f"{told.name!r}: the name is taken by another key than {told.key_id.hex()}, which is left out"
        with self._transaction("restore"):
            newer = self._certified(record, known.certificate)
            if row is not None and row.state == _State.COMMITTED and not behind:
                newer = row
            if known.tombstone:
                self._put(replace(newer, state=_State.DESTROYED, tombstone=known.tombstone))
            else:
                if row is not None and row.state == _State.COMMITTED:
                    self._store.execute(
                        "INSERT INTO past VALUES (?, ?) ON CONFLICT DO NOTHING", (row.key_id, row.attempt)
                    )
                self._put(newer)
                self._put_version(read_create_order(told.order), now_ms)
                if told.uses_max:
                    self._put_sealed("quotas", "key_id", key_id=told.key_id, given=told.uses_max)
            beyond = max(self._refused(told.key_id), told.attempt + RESTORED_BEYOND)
            self._store.execute(upsert("refused", "key_id", "attempt", "noted_ms"), (told.key_id, beyond, now_ms))
            self._note_change(told.key_id, sorted({*_names(newer), *known.nodes}))
        return ""

    def _other_of(self, name: str, version: int, key_id: bytes) -> _Row | None:
        """The other committed key that has a name and version; one that is only reserved loses them."""
        with self._reading():
            found = self._store.execute(
                "SELECT key_id FROM versions WHERE name = ? AND version = ? AND key_id != ?",
                (name.encode(), version, key_id),
            ).fetchone()
        row = self._row(found[0]) if found else None
        if row is not None and row.state == _State.RESERVED:
            with self._transaction("expire"):
                self._put(replace(row, state=_State.ABORTED))
            return None
        return row

    def restore_settings(self, told: SettingsRecord) -> None:
        """Book settings that nodes keep, countersigned, if they are newer than the books."""
        order = told.order
        current = self._settings(order.lineage)
        if not told.booked or (current is not None and current.serial >= order.serial):
            return
        with self._transaction("settings"):
            due_ms = order.destroy_at_ms if self._rows_of(order) else 0
            self._put_settings(_Settings(order.lineage, order.name.encode(), order.serial, due_ms, told.raw))

    def restored(self, fencing_epoch: int, revision: int) -> tuple[int, int]:
        """Go on beyond this fencing epoch and revision, which were seen; where it is then, in these."""
        with self._transaction("restore"):
            self._set_counter(_FENCING_EPOCH, max(fencing_epoch, self._counter(_FENCING_EPOCH)))
            self._set_counter(_REVISION, RESTORED_BEYOND**2 + max(revision, self._counter(_REVISION)))
        with self._reading():
            return self._counter(_FENCING_EPOCH), self._counter(_REVISION)

    def places(self, ask: Callable[[Places], T]) -> T:
        """What the index of places answers."""
        with self._reading():
            return ask(self._places)

    def set_targets(self, wanted: Mapping[int, Sequence[str]]) -> None:
        """Note where placement groups are to be."""
        with self._transaction("targets"):
            self._places.set_targets(wanted)

    def lacking(self, node: str, keys: Sequence[tuple[bytes, int]]) -> None:
        """Note it of those whose last epoch it is, and of which the node is a holder, until their next epoch."""
        found = []
        for key_id, epoch in keys:
            row = self._row(key_id)
            if row is None or row.state != _State.COMMITTED:
                continue
            told = read_key_manifest(row.manifest).manifest
            if told.epoch == epoch and told.holder(node) is not None:
                found.append(key_id)
        if found:
            with self._transaction("lacking"):
                for key_id in found:
                    self._places.lose(key_id, node)

    # --- their parts ---

    def _holders(self, order: CreateOrder, before: _Row | None = None) -> tuple[str, ...]:
        """The nodes that are to hold a key: those of its version before, if there are as many and no better ones."""
        holders = self._cluster.group_holders(self._cluster.group_of(order.name))[: order.shares]
        if len(holders) < order.shares:
            raise ValueError(
                f"{order.shares} shares need as many nodes; the cluster has {len(holders)} that are not draining"
            )
        earlier = tuple(_names(before)) if before is not None else ()
        if len(earlier) == order.shares and set(earlier) <= set(self._cluster.nodes) - set(self._cluster.draining):
            places, level = self._cluster.locations, self._cluster.domain_level
            worse = check_placement(places, earlier, order.threshold, domain_level=level)
            if len(worse) <= len(check_placement(places, holders, order.threshold, domain_level=level)):
                return earlier
        return holders

    def _free_name(self, order: CreateOrder, now_ms: int, *, certified: bool = False) -> None:
        """Refuse a name and version that another key has; a reservation that nobody works on is aborted instead.

        So is one in whose place others have made a version that is ``certified``.
        """
        found = self._store.execute(
            "SELECT key_id FROM versions WHERE name = ? AND version = ? AND key_id != ?",
            (order.name.encode(), order.version, order.key_id),
        ).fetchone()
        row = self._row(found[0]) if found else None
        if row is None:
            return
        if row.state == _State.COMMITTED:
            raise KeyExists(f"the name {order.name!r} is taken by another key")
        if order.version > 1 and not row.expired(now_ms) and not certified:
            wait_ms = self._version(row.key_id).began_ms + ROTATE_LEASE_MS - now_ms
            if 0 < wait_ms <= ROTATE_LEASE_MS:
                raise Overloaded(f"{order.name!r} is being rotated; its dealer has {wait_ms} ms left")
        elif not row.expired(now_ms) and not certified:
            wait_ms = row.expires_ms + CLOCK_SKEW_MS - now_ms
            raise KeyExists(f"a key {order.name!r} is being created; that order runs out in {wait_ms} ms")
        self._put(replace(row, state=_State.ABORTED))

    def _check_first(self, record: KeyRecord, row: _Row | None, now_ms: int) -> _Row:
        told = record.manifest
        if row is None or row.state != _State.RESERVED or row.attempt != told.attempt:
            current = f"attempt {row.attempt} is {_State(row.state).name.lower()}" if row else "it was never reserved"
            raise ManifestError(f"attempt {told.attempt} of {told.name!r} can't commit: {current}")
        self._check_reserved(record, row, now_ms)
        return row

    def _check_next(self, record: KeyRecord, row: _Row | None, now_ms: int) -> _Row:
        """The committed row that this manifest follows, by the order and attempt that are pending."""
        told = record.manifest
        change = self._change(told.key_id)
        if row is None or row.state != _State.COMMITTED or change is None:
            raise ManifestError(f"epoch {told.epoch} of {told.name!r} can't commit: the key is not being changed")
        if not change.pending or change.attempt != told.attempt:
            state = _ChangeState(change.state).name.lower()
            raise ManifestError(
                f"attempt {told.attempt} of {told.name!r} can't commit: attempt {change.attempt} is {state}"
            )
        check_successor(record, read_key_manifest(row.manifest))
        if open_change_order(told.change, self._cluster, now_ms)[1].digest != change.order_digest:
            raise ManifestError(f"key manifest of {told.name!r}: its order is not the one of this attempt")
        if record.dealer != change.dealer.decode():
            raise ManifestError(
                f"key manifest of {told.name!r}: dealt by {record.dealer!r}, begun by {change.dealer.decode()!r}"
            )
        return row

    def _check_reserved(self, record: KeyRecord, row: _Row, now_ms: int) -> None:
        told = record.manifest
        if open_create_order(told.order, self._cluster, now_ms)[1].digest != row.order_digest:
            raise ManifestError(f"key manifest of {told.name!r}: its order is not the reserved one")
        if record.dealer != row.dealer.decode():
            raise ManifestError(
                f"key manifest of {told.name!r}: dealt by {record.dealer!r}, reserved by {row.dealer.decode()!r}"
            )
        holders, reserved = {holder.node for holder in told.holders}, set(_names(row))
        if holders != reserved:
            raise ManifestError(
                f"key manifest of {told.name!r}: its holders are not the reserved ones "
                f"(missing {', '.join(sorted(reserved - holders)) or 'none'})"
            )

    def _notice(self, key_id: bytes, attempt: int) -> bytes:
        return sign_envelope("abort", attempt, aborts.encode(AbortNotice(key_id, attempt)), self._signing)

    def _refused(self, key_id: bytes) -> int:
        found = self._store.execute("SELECT attempt FROM refused WHERE key_id = ?", (key_id,)).fetchone()
        return int(found[0]) if found else 0

    def _refuse(self, key_id: bytes, attempt: int, now_ms: int) -> bool:
        """Note durably that attempts up to this one of an unknown reservation will never be given out."""
        with self._transaction("refuse"):
            if self._refused(key_id) >= attempt:
                return True
            if self._store.execute("SELECT COUNT(*) FROM refused").fetchone()[0] >= REFUSED_MAX:
                return False
            self._store.execute(upsert("refused", "key_id", "attempt", "noted_ms"), (key_id, attempt, now_ms))
        return True

    def _prune(self, now_ms: int) -> None:
        self._store.execute("DELETE FROM keys WHERE state = 4 AND expires_ms < ?", (now_ms - KEEP_MS,))
        self._store.execute("DELETE FROM refused WHERE noted_ms < ?", (now_ms - KEEP_MS,))

    # --- the store ---

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with self._turn:
                yield
        except self._store.failures as error:
            raise RegistryUnavailable(f"the registry's store failed: {error}") from None

    @contextmanager
    def _transaction(self, step: str) -> Iterator[None]:
        """All or nothing; durable when it returns. ``step`` names its failpoints."""
        failpoint(f"registry.{step}.before")
        with self._reading():  # it is this thread's turn from here on, and so are the steps of a bundle
            booked = self._booked
            if booked is None:
                with self._writing():
                    yield
                    failpoint(f"registry.{step}.changed")
            else:
                with self._step():
                    yield
                    failpoint(f"registry.{step}.changed")
        if booked is not None:
            booked.append(step)
            return
        failpoint(f"registry.{step}.durable")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """A transaction under the own fencing epoch, which makes one revision."""
        try:
            self._store.begin(self._term)
            self._check_revision()
            yield
            revision = self._next(_REVISION)
            self._store.commit()
            self._revision = revision
            self._note_mark()
        except BaseException:
            self._store.rollback()
            raise

    def _check_revision(self) -> None:
        """What was read before this transaction is so still, unless the revision is not as this balancer left it.

        A commit whose answer was lost may have been carried out after all; or somebody put an older database there.
        """
        known = self._revision
        if known is None or known == (found := self._counter(_REVISION)):
            return
        if found < known:
            raise RegistryUnavailable(f"{self._store.where} fell back from revision {known} to {found}")
        self._revision = found
        raise RegistryUnavailable(f"{self._store.where}: an earlier change was made after all; please try again")

    @contextmanager
    def _step(self) -> Iterator[None]:
        self._store.execute("SAVEPOINT step")
        try:
            yield
            self._store.execute("RELEASE SAVEPOINT step")
        except BaseException:
            if self._store.in_transaction:  # SQLite may have rolled back all of it by itself
                for statement in ("ROLLBACK TO SAVEPOINT step", "RELEASE SAVEPOINT step"):
                    self._store.execute(statement)
            raise

    @contextmanager
    def together(self) -> Iterator[None]:
        """What is booked until the end is one transaction; what fails alone is undone alone."""
        booked: list[str] = []
        with self._reading():
            try:
                with self._writing():
                    self._booked = booked
                    yield
            finally:
                self._booked = None
        for step in booked:
            failpoint(f"registry.{step}.durable")

    def _row(self, key_id: bytes) -> _Row | None:
        with self._reading():
            found = self._store.execute("SELECT * FROM keys WHERE key_id = ?", (key_id,)).fetchone()
        if found is None:
            return None
        row = _Row(*found[:-1])
        if not self._is_sealed("keys", _values(row), found[-1]):
            raise RegistryUnavailable(f"the registry's row of the key {key_id.hex()} is damaged")
        return row

    def _version(self, key_id: bytes) -> _Version:
        """Which version a reserved or committed key is."""
        with self._reading():
            found = self._store.execute(
                "SELECT key_id, version, lineage, began_ms FROM versions WHERE key_id = ?", (key_id,)
            ).fetchone()
        if found is None:
            raise RegistryUnavailable(f"the registry has lost which version the key {key_id.hex()} is")
        return _Version(*found)

    def _put_version(self, order: CreateOrder, now_ms: int) -> None:
        self._store.execute(
            """INSERT INTO versions VALUES (?, ?, ?, ?, ?)
               ON CONFLICT (key_id) DO UPDATE SET began_ms = excluded.began_ms""",
            (order.key_id, order.name.encode(), order.version, order.lineage or order.key_id, now_ms),
        )

    def _lineage(self, lineage: bytes) -> list[_Row]:
        """The reserved and committed versions of a key, the newest last."""
        with self._reading():
            found = self._store.execute(
                "SELECT key_id FROM versions WHERE lineage = ? ORDER BY version", (lineage,)
            ).fetchall()
        return [row for (key_id,) in found if (row := self._row(key_id)) is not None]

    @staticmethod
    def _is_later(row: _Row) -> bool:
        """Whether it is another version of its key than the first."""
        return read_key_manifest(row.manifest).manifest.version > 1

    def _put(self, row: _Row) -> None:
        if row.state not in (_State.RESERVED, _State.COMMITTED):
            self._store.execute("DELETE FROM versions WHERE key_id = ?", (row.key_id,))
        self._put_sealed("keys", "key_id", **_columns(row))
        committed = row.state == _State.COMMITTED
        self._places.put(row.key_id, row.manifest if committed else b"", row.certificate)

    def _change(self, key_id: bytes) -> _Change | None:
        with self._reading():
            found = self._store.execute("SELECT * FROM changes WHERE key_id = ?", (key_id,)).fetchone()
        if found is None:
            return None
        change = _Change(*found[:-1])
        if not self._is_sealed("changes", _values(change), found[-1]):
            raise RegistryUnavailable(f"the registry's row of a change of the key {key_id.hex()} is damaged")
        return change

    def _put_change(self, change: _Change) -> None:
        self._put_sealed("changes", "key_id", **_columns(change))

    def _settings(self, lineage: bytes) -> _Settings | None:
        with self._reading():
            found = self._store.execute("SELECT * FROM settings WHERE lineage = ?", (lineage,)).fetchone()
        if found is None:
            return None
        settings = _Settings(*found[:-1])
        if not self._is_sealed("settings", _values(settings), found[-1]):
            raise RegistryUnavailable(f"the registry's settings of the key {lineage.hex()} are damaged")
        return settings

    def _put_settings(self, settings: _Settings) -> None:
        self._put_sealed("settings", "lineage", **_columns(settings))

    def _is_past(self, key_id: bytes, attempt: int) -> bool:
        with self._reading():
            found = self._store.execute("SELECT 1 FROM past WHERE key_id = ? AND attempt = ?", (key_id, attempt))
            return found.fetchone() is not None

    def _next(self, counter: int) -> int:
        value = 1 + self._counter(counter)
        self._set_counter(counter, value)
        return value

    def _counter(self, counter: int) -> int:
        found = self._store.execute("SELECT value, hash FROM counters WHERE id = ?", (counter,)).fetchone()
        if found is not None and not self._is_sealed("counters", (counter, found[0]), found[1]):
            raise RegistryUnavailable(f"the registry's counter {counter} is damaged")
        return int(found[0]) if found else 0

    def _set_counter(self, counter: int, value: int) -> None:
        self._put_sealed("counters", "id", id=counter, value=value)

    def _put_sealed(self, table: str, keys: str, **columns: object) -> None:
        fields = tuple(columns.values())
        others = list(columns)[keys.count(",") + 1 :]
        self._store.execute(upsert(table, keys, *others, "hash"), (*fields, self._sealed(table, fields)))

    def _sealed(self, table: str, fields: tuple[object, ...]) -> bytes:
        if not self._store.shared:
            return _hash(fields)
        return sign_envelope(ROW, self._term, _hash((table, *fields)), self._signing)

    def _is_sealed(self, table: str, fields: tuple[object, ...], seal: bytes) -> bool:
        """Whether this is what a balancer wrote."""
        if not self._store.shared:
            return seal == _hash(fields)
        try:
            return open_seal(seal, self._cluster) == _hash((table, *fields))
        except (ManifestError, ProtocolError):
            return False


class SqliteRegistry(SqlRegistry):
    """The registry in one SQLite file that this process alone has open, and so leads.

    Opening it raises the fencing epoch. ``ConfigError`` as with ``lead``, or if the file is in use or damaged.
    """

    _store: SqliteDatabase

    def __init__(
        self, path: Path, cluster: ClusterSource, signing: SigningKey, now_ms: int, mark: Mark | None = None
    ) -> None:
        super().__init__(SqliteDatabase(path), cluster, signing, mark)
        try:
            self.lead(now_ms)
        except RegistryUnavailable as error:
            self._store.close()
            raise ConfigError(f"{path}: no usable registry: {error}") from None
        except BaseException:
            self._store.close()
            raise


def open_seal(raw: bytes, cluster: Cluster) -> bytes:
    """The hash of the row that a balancer sealed, the seal's signature checked."""
    return verify_envelope(raw, ROW, cluster.sign_key_ever("balancer")).payload


def _names(row: _Row) -> list[str]:
    return row.holders.decode().split("\n")


def _columns(row: _Row | _Change | _Settings) -> dict[str, object]:
    return {name: getattr(row, name) for name in row.__dataclass_fields__}


def _values(row: _Row | _Change | _Settings) -> tuple[object, ...]:
    """The columns of a row, in order (``dataclasses.astuple`` would copy each)."""
    return tuple(getattr(row, name) for name in row.__dataclass_fields__)


def _hash(fields: tuple[object, ...]) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(fields), digest_size=16).digest()
