"""The archives of one node: its shares out, encrypted, by the operators' order, and back in by their contributions.

It runs on the ``local`` worker's lane and opens no socket. Nothing leaves without an order that the quorum of operators
signed, and nothing comes back in that was not sealed to this node by enough of them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import structlog

from engine.errors import AccessDenied, EngineError, ShareCorrupt, StaleKey
from engine.failpoints import failpoint
from engine.protocol.backup import (
    PAGE_BYTES,
    Archive,
    ArchivedKey,
    ArchiveEnd,
    ArchiveHead,
    ArchiveReader,
    Piece,
    RecoveryCard,
    check_combined,
    decrypt_share,
    encrypt_share,
    key_record,
    open_export_order,
    piece_context,
    piece_seal_context,
)
from engine.protocol.manifest import ClusterSource, FollowsCluster, KeyRecord, Member
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.requests import ExportedPart, RestoredPart, RestoredShare, ShareExport, ShareRestore
from engine.sharing import SecretBuffer, commitment, generate_shares, new_salt
from nodes.catalogue import Catalogue, Entry
from nodes.holder import ShareHolder
from nodes.token import Lane

__all__ = ["Exporter", "Restorer"]

IDLE_S: Final = 300.0
"""An archive whose next part is not asked for, or sent, within this time is given up, and its key wiped."""
ARCHIVE_KEY_BYTES: Final = 32
KEYS_A_PAGE: Final = 256

Outcome = Literal["restored", "present", "noted", "destroyed", "refused"]

log = structlog.get_logger()


@dataclass(slots=True)
class _Export:
    """An archive that is being made. ``last`` is the newest part, which is told again if its reply was lost."""

    archive: Archive
    courier: str
    key: SecretBuffer
    ids: list[bytes]
    touched_s: float
    last: ExportedPart
    previous: bytes
    at: int = 0
    part: int = 0
    keys: int = 0
    shares: int = 0
    nonces: int = 0
    """How often the key was used."""
    names: list[str] = field(default_factory=list)
    """Of the shares in the newest part."""


class Exporter(FollowsCluster):
    """Makes archives, one at a time: another one that is begun ends it. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        cluster: ClusterSource,
        holder: ShareHolder,
        catalogue: Catalogue,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._source = cluster
        self._holder = holder
        self._catalogue = catalogue
        self._now_ms = now_ms
        self._clock = clock
        self._lock = threading.Lock()
        self._export: _Export | None = None

    def export(self, lane: Lane, body: ShareExport, sender: Member) -> tuple[ExportedPart, Sequence[str]]:
        """A part of an archive, and the names of the keys whose shares are in it.

        ``ManifestError`` if the order is not the operators', has expired or is another cluster's; ``AccessDenied`` if
        it names another client; ``StaleKey`` if that archive is not being made, or not at this part.
        """
        order, cards = open_export_order(body.order, self._cluster, self._now_ms())
        if order.courier != sender.name:
            raise AccessDenied(f"the export order names {order.courier!r} to bring it, not {sender.name!r}")
        with self._lock:
            if body.part == 0:
                begun = self._begin(body, cards, sender)
                self._end()
                self._export = begun
                failpoint("holder.export.begun")
                return begun.last, ()
            export = self._running(body.run, sender)
            if body.part == export.part:
                return export.last, export.names
            if body.part != export.part + 1:
                raise StaleKey(f"the archive is at part {export.part}, asked for is {body.part}")
            export.last, export.names = self._next(lane, export)
            export.part += 1
            failpoint("holder.export.made")
            return export.last, export.names

    def expire(self) -> None:
        """Give up an archive that nobody asks for any more; by the loop, which waits for no page that is being made."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._export is not None and self._clock() - self._export.touched_s > IDLE_S:
                self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        if self._export is not None:
            self._export.key.close()
            self._export = None

    def _running(self, run: bytes, sender: Member) -> _Export:
        export = self._export
        if export is None or (export.archive.head.run, export.courier) != (run, sender.name):
            raise StaleKey("no such archive is being made here: another one was begun, or it took too long")
        export.touched_s = self._clock()
        return export

    def _begin(self, body: ShareExport, cards: Sequence[RecoveryCard], sender: Member) -> _Export:
        """A fresh archive key, split among the recipients and sealed to them; the head."""
        order, _ = open_export_order(body.order, self._cluster, self._now_ms())
        pen, run = self._holder.pen, os.urandom(16)
        ids = [each.row.key_id for each in _all(self._catalogue)]
        key = SecretBuffer.random(ARCHIVE_KEY_BYTES)
        try:
            head = ArchiveHead(
                body.order,
                run,
                pen.name,
                self._cluster.serial,
                self._now_ms(),
                len(ids),
                _pieces(key, order.threshold, cards, run, pen.name),
            )
            archive, raw = Archive.begin(head, order, pen)
        except BaseException:
            key.close()
            raise
        part = ExportedPart(run, raw, False)
        return _Export(archive, sender.name, key, ids, self._clock(), part, archive.digest)

    def _next(self, lane: Lane, export: _Export) -> tuple[ExportedPart, list[str]]:
        """The next page; the end where there is none."""
        keys: list[ArchivedKey] = []
        names: list[str] = []
        size, at = 0, export.at
        while at < len(export.ids) and len(keys) < KEYS_A_PAGE:
            entry = self._catalogue.by_id(export.ids[at])
            if entry is not None and entry.row.state != "prepared":
                key = self._archived(lane, export, entry)
                size += sum(map(len, (key.manifest, key.certificate, key.document, key.settings, key.sealed)))
                if keys and size > PAGE_BYTES:
                    break
                keys.append(key)
                names += [entry.row.name] if key.sealed else []
            at += 1
        run, pen = export.archive.head.run, self._holder.pen
        if not keys:
            end = ArchiveEnd(run, export.part, export.keys, export.shares, export.previous)
            raw = export.archive.sign_end(end, pen)
            export.key.wipe()
            return ExportedPart(run, raw, True), []
        raw, export.previous = export.archive.sign_page(export.part + 1, export.previous, keys, pen)
        export.at = at
        export.keys += len(keys)
        export.shares += len(names)
        return ExportedPart(run, raw, False), names

    def _archived(self, lane: Lane, export: _Export, entry: Entry) -> ArchivedKey:
        row, sealed, problem = entry.row, b"", ""
        mine = entry.manifest.holder(self._holder.pen.name)
        if row.state == "committed" and row.sealed and mine is not None:
            try:
                with self._holder.own_plain(lane, entry) as plain:
                    export.nonces += 1
                    sealed = encrypt_share(export.key, export.archive, entry.record, mine.x, plain, export.nonces)
            except ShareCorrupt as error:
                log.error("a share can't be archived", key=row.name, reason=str(error))
                problem = str(error)[:1024]
        return ArchivedKey(
            row.key_id,
            "destroyed" if row.state == "destroyed" else "moved" if row.state == "moved" else "committed",
            row.manifest,
            row.certificate,
            row.document if row.state == "destroyed" else b"",
            entry.settings.raw if entry.settings is not None else b"",
            sealed,
            problem,
        )


def _all(catalogue: Catalogue) -> Iterator[Entry]:
    after = 0
    while found := catalogue.some(after, 1024):
        yield from found
        after += len(found)


def _pieces(key: SecretBuffer, threshold: int, cards: Sequence[RecoveryCard], run: bytes, node: str) -> list[Piece]:
    """The archive key split among the recipients, each piece sealed to its operator."""
    sealer = Sealer(os.urandom(32))
    made = []
    for card, share in zip(cards, generate_shares(key, threshold=threshold, shares=len(cards)), strict=True):
        salt = new_salt()
        sealed = sealer.seal(card.public, salt + share.y, piece_seal_context(run, node, card.name))
        made.append(Piece(card.name, share.x, commitment(salt, piece_context(run, node), share), sealed))
    return made


@dataclass(slots=True)
class _Restore:
    """An archive that is being restored. ``last`` are the results of the newest part."""

    reader: ArchiveReader
    courier: str
    key: SecretBuffer
    touched_s: float
    last: RestoredPart
    part: int = 0


class Restorer(FollowsCluster):
    """Takes archives in, one at a time. ``curve_secrets`` gives this node's X25519 private keys.

    ``before`` is called before keys are stored.
    """

    def __init__(
        self,
        cluster: ClusterSource,
        curve_secrets: Callable[[], Sequence[bytes]],
        holder: ShareHolder,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._source = cluster
        self._before = before
        self._curve_secrets = curve_secrets
        self._holder = holder
        self._now_ms = now_ms
        self._clock = clock
        self._lock = threading.Lock()
        self._restore: _Restore | None = None

    def restore(self, lane: Lane, body: ShareRestore, sender: Member) -> tuple[RestoredPart, Sequence[str]]:
        """Take in a part of an archive; the names of the keys whose shares were in it.

        Part 0 checks the head and combines the archive key. ``ManifestError`` if it is another node's archive, another
        cluster's, a part is changed or out of order, or too few operators contribute. What can't be restored is told
        with the key, and does not stop the rest.
        """
        with self._lock:
            if body.part == 0:
                begun = self._begin(body, sender)  # first: what is refused ends nobody's
                self._end()
                self._restore = begun
                return begun.last, ()
            running = self._restore
            if running is None or (running.last.run, running.courier) != (body.run, sender.name):
                raise StaleKey("no such archive is being restored here: another one was begun, or it took too long")
            running.touched_s = self._clock()
            if body.part == running.part:
                return running.last, ()
            if body.part != running.part + 1:
                raise StaleKey(f"the restore is at part {running.part}, sent is {body.part}")
            keys = running.reader.part(body.data)
            results, names = self._take(lane, running, keys)
            running.last, running.part = RestoredPart(body.run, results), body.part
            if running.reader.ended:
                running.key.wipe()
            failpoint("holder.restore.taken")
            return running.last, names

    def expire(self) -> None:
        """Give up a restore of which nothing comes any more; by the loop, which waits for no page that is taken in."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            if self._restore is not None and self._clock() - self._restore.touched_s > IDLE_S:
                self._end()
        finally:
            self._lock.release()

    def _end(self) -> None:
        if self._restore is not None:
            self._restore.key.close()
            self._restore = None

    def _begin(self, body: ShareRestore, sender: Member) -> _Restore:
        node = self._holder.pen.name
        reader = ArchiveReader(body.data, self._cluster)
        if reader.archive.node != node:
            raise AccessDenied(f"the archive is that of {reader.archive.node!r}; {node!r} restores none but its own")
        openers = {opener.public: opener for opener in map(Opener, self._curve_secrets())}
        key = check_combined(reader.archive, body.contributions, self._cluster, self._now_ms(), openers.get)
        return _Restore(reader, sender.name, key, self._clock(), RestoredPart(os.urandom(16), []))

    def _take(
        self, lane: Lane, running: _Restore, keys: Sequence[ArchivedKey]
    ) -> tuple[list[RestoredShare], list[str]]:
        """Store what a page has, in one transaction, and sign for the shares that were stored."""
        taken: list[tuple[ArchivedKey, Outcome, str, KeyRecord | None]] = []
        if keys:
            self._before()
        with self._holder.together():
            for key in keys:
                try:
                    record = key_record(key, self._cluster)
                    taken.append((key, self._take_key(lane, running, key, record), "", record))
                except (EngineError, ValueError) as error:
                    outcome: Outcome = "destroyed" if isinstance(error, StaleKey) else "refused"
                    taken.append((key, outcome, str(error)[:1024], None))
        results, names = [], []
        for key, outcome, text, checked in taken:
            receipt = b""
            mine = checked.manifest.holder(running.reader.archive.node) if checked is not None else None
            if checked is not None and mine is not None and key.sealed and outcome in ("restored", "present"):
                receipt = self._holder.receipt(checked, mine.x)
                names.append(checked.manifest.name)
            results.append(RestoredShare(key.key_id, outcome, text, receipt))
        return results, names

    def _take_key(self, lane: Lane, running: _Restore, key: ArchivedKey, record: KeyRecord) -> Outcome:
        archive, holder = running.reader.archive, self._holder
        if key.state == "destroyed":
            holder.restore_destroyed(record, key.document)
            return "destroyed"
        share, salt = None, b""
        mine = record.manifest.holder(archive.node)
        if key.sealed:
            if mine is None:
                raise ShareCorrupt(f"{archive.node} is no holder of {record.manifest.name!r}", [archive.node])
            share, salt = decrypt_share(running.key, archive, record, mine.x, key.sealed)
        changed = holder.restore(lane, record, key.certificate, share, salt)
        if key.settings:
            holder.restore_settings(key.settings)
        return ("restored" if key.sealed else "noted") if changed else "present"
