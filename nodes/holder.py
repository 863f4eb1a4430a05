"""The holder's side: store, commit, release and erase this node's share. It runs on one lane, beside the loop.

Each holder checks everything for itself, against its own copy of the cluster manifest: no balancer and no dealer is
taken at its word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, TypeVar

import structlog

from engine.errors import (
    AccessDenied,
    InvalidTag,
    KeyExists,
    ManifestError,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
    TokenError,
    UnsupportedAlgorithm,
)
from engine.failpoints import failpoint
from engine.protocol.grant import check_grant, check_trial_grant, is_trial
from engine.protocol.manifest import (
    ClusterSource,
    FollowsCluster,
    KeyManifest,
    KeyRecord,
    Member,
    Receipt,
    check_successor,
    destroy_orders,
    first_quota,
    open_abort,
    open_certificate,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
    read_certificate,
    read_key_manifest,
    receipts,
)
from engine.protocol.requests import (
    Destroy,
    Empty,
    Prepared,
    ReleasedShare,
    ShareCommit,
    ShareLeave,
    SharePrepare,
    ShareRelease,
    ShareSettings,
    SyncEntry,
)
from engine.protocol.settings import SettingsRecord, is_settings, open_settings
from engine.protocol.signed import Pen, SigningKey, read_unverified, sign_envelope
from engine.sharing import SALT_BYTES, SecretBuffer, SecretShare, Share, commitment
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue, Entry
from nodes.ledger import GrantLedger
from nodes.shares import ShareCache, ShareKey
from nodes.store import Row, ShareStore, seal_context, seal_share, unseal_plain, unseal_share
from nodes.token import Lane

__all__ = ["ShareHolder"]

log = structlog.get_logger()

S = TypeVar("S", Share, SecretShare)


class ShareHolder(FollowsCluster):
    """The shares of one node. ``ledger`` has the clock and the used grants; ``shares`` keeps what was unsealed."""

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        store: ShareStore,
        catalogue: Catalogue,
        algorithms: Sequence[str],
        ledger: GrantLedger,
        shares: ShareCache | None = None,
    ) -> None:
        self._source = cluster
        self.pen = Pen(signing)
        self._node = signing.name
        self._store = store
        self._catalogue = catalogue
        self._algorithms = frozenset(algorithms)
        self._ledger = ledger
        self._now_ms = ledger.clock.now_ms
        # An empty cache is false: `or` would put another one in its place.
        self.shares = ShareCache(CacheLimits(60.0, 16), time.monotonic) if shares is None else shares
        catalogue.watch(self._changed)
        self._untidy = True  # an earlier start may have ended before it could
        self._unbooked: dict[bytes, bytes] = {}
        self._together = False

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is stored and erased until the end is one transaction, durable when this ends; or none of it is.

        What this node signs meanwhile is left to be signed by its ``pen`` afterwards.
        """
        changed = self._catalogue.note_changes()
        self._together = True
        try:
            with self._store.together(), self.pen.later():
                yield
        except BaseException:
            for key_id in changed:
                self._catalogue.reload(key_id, self._store.rows_of(key_id))
            raise
        finally:
            self._together = False
            self._catalogue.forget_changes()
        if self._untidy:
            self._erase_soon()

    # --- creation ---

    def prepare(self, lane: Lane, body: SharePrepare, sender: Member) -> Prepared:
        """Store a share durably, read it back, unseal and check it; the answer is the signed receipt."""
        record = open_key_manifest(body.manifest, self._cluster, self._now_ms())
        if record.manifest.epoch != 1:
            raise ManifestError(
                f"epoch {record.manifest.epoch} of {record.manifest.name!r} comes by a refresh or reshare"
            )
        share = self._check_offer(record, body, sender)
        self._make_room(record, body.aborts)
        return self.store_prepared(lane, record, share, body.salt)

    def store_prepared(self, lane: Lane, record: KeyRecord, share: Share, salt: bytes) -> Prepared:
        """Seal and store a checked share of a checked manifest, read it back, unseal, compare, and sign for it."""
        context = seal_context(record.manifest, share.x, self._node, record.digest)
        failpoint("holder.prepare.checked")
        row = self._row(record, "prepared", sealed=seal_share(lane, share, salt, context))
        failpoint("holder.prepare.sealed")
        row = self._store.put(row, first_quota(record.manifest) if record.manifest.epoch == 1 else 0)
        failpoint("holder.prepare.written")
        self._catalogue.put(row)  # before the check: an abort notice must find what is stored, good or not
        if unseal_share(lane, row.sealed, share.x, context) != (share, salt):
            raise ShareCorrupt(f"{self._node}: the stored share is not the one that came", [self._node])
        failpoint("holder.prepare.read-back")
        receipt = self.receipt(record, share.x)
        failpoint("holder.prepare.signed")
        return Prepared(receipt)

    def check_algorithm(self, name: str) -> None:
        """Refuse a key that this node's token can't serve."""
        if name not in self._algorithms:
            raise UnsupportedAlgorithm(f"the token of {self._node!r} can't serve {name!r}")

    def _check_offer(self, record: KeyRecord, body: SharePrepare, sender: Member) -> Share:
        manifest = record.manifest
        if record.dealer != sender.name:
            raise AccessDenied(f"{sender.name!r} sends a share that {record.dealer!r} dealt")
        self.check_algorithm(manifest.algorithm)
        mine = manifest.holder(self._node)
        share = Share(body.x, body.y)
        if mine is None or mine.x != body.x:
            raise ManifestError(f"the manifest of {manifest.name!r} gives {self._node!r} no share with x = {body.x}")
        if commitment(body.salt, manifest.context, share) != mine.commitment:
            raise ShareCorrupt(f"the share for {self._node!r} does not match its commitment", [self._node])
        return share

    def _make_room(self, record: KeyRecord, aborts: Sequence[bytes]) -> None:
        """Clear what stands in the way, by abort notices alone; refuse what must stay."""
        manifest = record.manifest
        self._check_name(record)
        newest = self._catalogue.newest(manifest.name)
        if newest is not None and newest.lineage == manifest.lineage and newest.row.version > manifest.version:
            raise KeyExists(f"the key {manifest.name!r} has version {newest.row.version} already")
        for raw in aborts:
            self.abort(raw)
        before = self._catalogue.by_id(manifest.key_id)
        if before is None or (before.row.manifest_hash == record.digest and before.row.state == "prepared"):
            return
        if before.row.state == "prepared":
            raise ManifestError(f"{manifest.name!r}: attempt {before.row.attempt} is neither committed nor aborted")
        raise KeyExists(f"the key {manifest.name!r} with this id is {before.row.state} already")

    def _check_name(self, record: KeyRecord) -> None:
        """Refuse a key whose name another one has here; versions of one key differ in nothing but that."""
        manifest = record.manifest
        for each in self._catalogue.held(manifest.name):
            if each.row.key_id == manifest.key_id:
                continue
            if each.lineage != manifest.lineage:
                raise KeyExists(f"the key {manifest.name!r} exists with another id")
            if each.row.version == manifest.version:
                raise KeyExists(f"version {manifest.version} of the key {manifest.name!r} exists with another id")

    def receipt(self, record: KeyRecord, x: int, *, tried: bool = False) -> bytes:
        """This node's word on its stored share; ``tried``: also that it has combined that epoch and got the key."""
        payload = receipts.encode(Receipt(record.manifest.key_id, record.digest, x, tried))
        return sign_envelope("receipt", self._now_ms(), payload, self.pen)

    def commit(self, body: ShareCommit) -> Empty:
        """Make a prepared share valid."""
        entry = self._catalogue.by_id(body.key_id)
        if entry is None:
            raise StaleKey(f"{self._node} has no share of a key with id {body.key_id.hex()}")
        self.settle(entry, body.certificate)
        return Empty()

    def settle(self, entry: Entry, certificate: bytes) -> Entry:
        """The entry after what the certificate proves: that of the key, or of its next epoch.

        A certificate of another epoch changes nothing: of an earlier one, or of one that this node never prepared. Nor
        does one of an attempt that this node has pledged not to follow: others count on that.
        """
        if entry.row.state in ("committed", "moved"):
            coming = self._catalogue.next_of(entry.row.key_id)
            if coming is None or read_certificate(certificate) != coming.record.digest:
                return entry
            if self._gave_up(coming, certificate):
                return entry
            return self._advance(entry, coming, certificate)
        if entry.row.state == "destroyed":
            raise StaleKey(f"the key {entry.row.name!r} with this id was destroyed on {self._node}")
        open_certificate(certificate, entry.record, self._cluster)
        if self._gave_up(entry, certificate):
            return entry
        self._check_name(entry.record)
        failpoint("holder.commit.checked")
        row = self._store.commit(entry.row, certificate, self._now_ms())
        failpoint("holder.commit.written")
        return self._catalogue.put(row)

    def _gave_up(self, coming: Entry, certificate: bytes) -> bool:
        """Whether this node told others that it will not follow the attempt that is certified now."""
        if self.pledged(coming.row.key_id) <= coming.row.attempt:
            return False
        open_certificate(certificate, coming.record, self._cluster)
        self._contradicted(coming.record)
        return True

    @staticmethod
    def _contradicted(record: KeyRecord) -> None:
        log.error(
            "a certificate of an attempt that was given up: the registry contradicts itself",
            key=record.manifest.name,
            attempt=record.manifest.attempt,
        )

    def _advance(self, entry: Entry, coming: Entry, certificate: bytes) -> Entry:
        """Make the prepared epoch the committed one, and erase the share of the epoch before in the same transaction.

        At no time has this node neither: the certificate says that all holders have stored their new share.
        """
        if entry.row.state == "committed":  # else it was held against its predecessor when it was stored
            check_successor(coming.record, entry.record)
        open_certificate(certificate, coming.record, self._cluster)
        failpoint("holder.commit.checked")
        now_ms = self._now_ms()
        row = replace(coming.row, state="committed", certificate=certificate, document=b"", changed_ms=now_ms)
        row = self._store.advance(row)
        failpoint("holder.commit.written")
        advanced = self._catalogue.put(row)
        self._erase_soon()
        return advanced

    def pledged(self, key_id: bytes) -> int:
        """The first attempt at the next epoch that this node may still follow, by what it told others; 0 for any."""
        return self._store.pledged(key_id)

    def pledge(self, key_id: bytes, attempt: int) -> None:
        """Never go on to an epoch that an attempt below this one made; durable when this returns."""
        self._store.pledge(key_id, attempt)

    def receive(self, record: KeyRecord, certificate: bytes) -> None:
        """Be ready to take a share of the epoch after ``record``, if that is certified and nothing known here is later.

        A share that was prepared for an epoch which others made in another attempt is deleted.
        """
        manifest = record.manifest
        entry = self._catalogue.by_id(manifest.key_id)
        if entry is None or (entry.row.manifest, entry.row.certificate) != (record.raw, certificate):
            open_certificate(certificate, record, self._cluster)
        self._check_name(record)
        if entry is None:
            return
        if read_certificate(certificate) in (entry.record.digest, self._next_digest(entry)):
            entry = self.settle(entry, certificate)
        if entry.row.state == "prepared" and entry.row.epoch <= manifest.epoch:
            self._supersede(entry, record)
            return
        if entry.row.state == "destroyed":
            raise StaleKey(f"the key {manifest.name!r} with this id was destroyed on {self._node}")
        if entry.row.state == "committed" and entry.record.digest != record.digest:
            raise StaleKey(f"{self._node} holds another epoch {entry.row.epoch} of {manifest.name!r}")
        if entry.row.state == "moved" and entry.row.epoch > manifest.epoch:
            raise StaleKey(f"{self._node} knows the later epoch {entry.row.epoch} of {manifest.name!r}")

    def _next_digest(self, entry: Entry) -> bytes:
        coming = self._catalogue.next_of(entry.row.key_id)
        return coming.record.digest if coming is not None else b""

    def leave(self, body: ShareLeave) -> Empty:
        """Erase the share of a key that others hold now, as the certificate of the later epoch proves.

        A holder of an earlier version takes in who holds a later one.
        """
        record = open_key_manifest(body.manifest, self._cluster)
        entry = self._catalogue.by_id(record.manifest.key_id)
        if entry is not None:
            self._leave(entry, record, body.certificate)
        else:
            self._note_elsewhere(record, body.certificate)
        return Empty()

    def _note_elsewhere(self, record: KeyRecord, certificate: bytes) -> None:
        """Keep who holds a version, if this node knows another version of that key: nothing new is made by that."""
        manifest = record.manifest
        known = self._catalogue.versions(manifest.lineage)
        if manifest.holder(self._node) is not None or all(each.row.state == "destroyed" for each in known):
            return
        open_certificate(certificate, record, self._cluster)
        self._check_name(record)
        self._catalogue.put(self._store.put(self._row(record, "moved", certificate=certificate)))

    def _leave(self, entry: Entry, record: KeyRecord, certificate: bytes) -> None:
        """Keep who holds the key now in the place of the share. All of these have stored and checked theirs.

        An epoch that is not the next one is good too: its holders have seen those between.
        """
        manifest, row = record.manifest, entry.row
        if manifest.holder(self._node) is not None:
            raise ManifestError(f"{self._node} is a holder of epoch {manifest.epoch} of {manifest.name!r}")
        open_certificate(certificate, record, self._cluster)
        if row.state == "destroyed":
            return
        if row.state == "prepared":
            if row.epoch <= manifest.epoch and row.manifest_hash != record.digest:
                self._supersede(entry, record)
            return
        if row.epoch >= manifest.epoch:
            if row.epoch == manifest.epoch and row.manifest_hash != record.digest:
                raise ManifestError(f"two manifests of epoch {row.epoch} of {row.name!r}; {self._node} keeps the first")
            return
        if row.epoch + 1 == manifest.epoch:
            check_successor(record, entry.record)
        if self.pledged(row.key_id) > manifest.attempt:
            self._contradicted(record)
            return
        failpoint("holder.leave.checked")
        moved = self._store.advance(self._row(record, "moved", certificate=certificate))
        failpoint("holder.leave.written")
        self._catalogue.put(moved)
        self._erase_soon()

    def _supersede(self, entry: Entry, record: KeyRecord) -> None:
        """Delete a prepared share in whose place others have an epoch that is certified: it never will be valid.

        Not for an attempt that this node has pledged not to follow: for a later one the holders of before keep theirs.
        """
        if self.pledged(entry.row.key_id) > record.manifest.attempt:
            self._contradicted(record)
            raise ManifestError(
                f"attempt {record.manifest.attempt} of {entry.row.name!r} was given up, as others were told here"
            )
        self._store.delete(entry.row)
        self._catalogue.remove(entry.row)
        self._erase_traces()

    def _erase_soon(self) -> None:
        """Empty the store's log of what was erased now, or where it is in use, at the next ``tidy``."""
        try:
            self._erase_traces()
        except TokenError as error:
            log.info("an erasure is not finished yet", reason=str(error))

    def abort(self, raw: bytes) -> None:
        """Delete the prepared share of exactly the attempt that the registry says will never be committed.

        That of a next epoch is only marked, so that a later attempt may replace it: if the registry lied to some of the
        holders, and has others go on to that epoch, the certificate that those have can still commit it here.
        """
        notice = open_abort(raw, self._cluster)
        coming = self._catalogue.next_of(notice.key_id)
        if coming is not None:
            if coming.row.attempt == notice.attempt and not coming.row.document:
                failpoint("holder.abort.checked")
                self._catalogue.put(self._store.put(replace(coming.row, document=raw)))
            return
        entry = self._catalogue.by_id(notice.key_id)
        if entry is not None and entry.row.state == "prepared" and entry.row.attempt == notice.attempt:
            failpoint("holder.abort.checked")
            if entry.row.epoch > 1:
                self._catalogue.put(self._store.put(replace(entry.row, document=raw)))
                return
            self._store.delete(entry.row)
            failpoint("holder.abort.deleted")
            self._catalogue.remove(entry.row)
            self._erase_traces()
            failpoint("holder.abort.erased")

    # --- use ---

    def release(self, lane: Lane, body: ShareRelease, sender: Member) -> ReleasedShare:
        """This node's share, to the combiner that a client's grant names and whose connection asks, once.

        The grant's use is on the disk before the share is opened. The same request again within a short time is
        answered again, as ``nodes.ledger`` tells.
        """
        if sender.name == self._node:
            raise AccessDenied(f"{self._node!r} is asked by its own key; a node has its own share without asking")
        self._ledger.asked(sender.name)
        if is_trial(body.grant):
            return self._release_prepared(lane, body, sender)
        entry = self._catalogue.by_id(body.key_id)
        if entry is not None and entry.row.state != "destroyed":
            entry.check_usable()
        coming = self._committed_by(entry, body.certificate)
        if entry is None or (coming is None and entry.row.state != "committed"):
            raise StaleKey(f"{self._node} has no committed share of a key with id {body.key_id.hex()}")
        grant, signed = check_grant(body.grant, (coming or entry).record, sender.name, self._cluster, self._now_ms())
        failpoint("holder.release.checked")
        if coming is not None:
            entry = self.settle(entry, body.certificate)
            if entry.record.digest != coming.record.digest:
                # Certified, but this node pledged not to follow it, and so keeps both shares: each can be had.
                entry = coming
        self._ledger.release(grant, signed)
        failpoint("holder.release.spent")
        share, salt = self.own_share(lane, entry)
        failpoint("holder.release.unsealed")
        return ReleasedShare(share.x, share.y, salt)

    def _release_prepared(self, lane: Lane, body: ShareRelease, sender: Member) -> ReleasedShare:
        """This node's share of an epoch that is prepared, to the node that the client's reshare order has try it."""
        entry = self.coming(body.key_id)
        if entry is None:
            raise StaleKey(f"{self._node} has prepared no share of a key with id {body.key_id.hex()}")
        grant, signed = check_trial_grant(body.grant, entry.record, sender.name, self._cluster, self._now_ms())
        failpoint("holder.release.checked")
        self._ledger.release(grant, signed)
        failpoint("holder.release.spent")
        share, salt = self.own_share(lane, entry)
        failpoint("holder.release.unsealed")
        return ReleasedShare(share.x, share.y, salt)

    def coming(self, key_id: bytes) -> Entry | None:
        """The share of the next epoch, which waits for its certificate; this node may hold one of the last or not."""
        entry = self._catalogue.by_id(key_id)
        found = entry if entry is not None and entry.row.state == "prepared" else self._catalogue.next_of(key_id)
        return found if found is not None and not found.row.document else None

    def _committed_by(self, entry: Entry | None, certificate: bytes) -> Entry | None:
        """What is prepared here and the certificate, unchecked, speaks of: the key itself or its next epoch."""
        if entry is None or entry.row.state == "destroyed" or not certificate:
            return None
        if entry.row.state == "prepared":
            return entry
        coming = self._catalogue.next_of(entry.row.key_id)
        return coming if coming is not None and read_certificate(certificate) == coming.record.digest else None

    def own_share(self, lane: Lane, entry: Entry) -> tuple[Share, bytes]:
        """This node's share of a committed key and its salt, for a message; ``ShareCorrupt`` if it does not open."""
        return self._opened(lane, entry, self.shares.share)

    def own_secret(self, lane: Lane, entry: Entry) -> tuple[SecretShare, bytes]:
        """As ``own_share``, in locked memory, which the caller closes."""
        return self._opened(lane, entry, self.shares.secret)

    def own_plain(self, lane: Lane, entry: Entry) -> SecretBuffer:
        """Salt and value of this node's share, for an archive: in locked memory, which the caller closes, in no cache.

        ``ShareCorrupt`` if it does not open, or is not the one that its manifest commits to.
        """
        mine = entry.manifest.holder(self._node)
        if mine is None or not entry.row.sealed:
            raise QuorumUnavailable(f"{self._node} holds no share of {entry.row.name!r}", [self._node])
        context = seal_context(entry.manifest, mine.x, self._node, entry.record.digest)
        try:
            plain = self.shares.with_room(lambda: unseal_plain(lane, entry.row.sealed, context))
        except InvalidTag:
            raise ShareCorrupt(f"{self._node}: its share of {entry.row.name!r} does not open", [self._node]) from None
        try:
            with memoryview(plain) as view, SecretBuffer.copy_of(view[SALT_BYTES:]) as value:
                told = commitment(bytes(view[:SALT_BYTES]), entry.manifest.context, SecretShare(mine.x, value))
            if told != mine.commitment:
                raise ShareCorrupt(
                    f"{self._node}: its share of {entry.row.name!r} does not match its commitment", [self._node]
                )
        except BaseException:
            plain.close()
            raise
        return plain

    def _opened(
        self, lane: Lane, entry: Entry, how: Callable[[ShareKey, int, Callable[[], SecretBuffer]], tuple[S, bytes]]
    ) -> tuple[S, bytes]:
        mine = entry.manifest.holder(self._node)
        if mine is None or not entry.row.sealed:
            raise QuorumUnavailable(f"{self._node} holds no share of {entry.row.name!r}", [self._node])
        context = seal_context(entry.manifest, mine.x, self._node, entry.record.digest)
        try:
            opened = how(_share_key(entry), mine.x, lambda: unseal_plain(lane, entry.row.sealed, context))
        except InvalidTag:
            # It says nothing of the client's ciphertext, so it must not reach the client as an invalid tag.
            raise ShareCorrupt(f"{self._node}: its share of {entry.row.name!r} does not open", [self._node]) from None
        now = self._catalogue.by_id(entry.row.key_id)
        if now is not None and now is not entry:
            self._changed(now)  # it changed while the share was opened, which must not outlive that in the cache
        return opened

    def _changed(self, entry: Entry) -> None:
        """Let cached shares go that rest on what is no longer the truth."""
        if entry.row.state == "destroyed" or entry.row.state == "moved" or not entry.usable:
            self.shares.drop(entry.row.key_id, "changed")
        elif entry.row.state == "committed":
            self.shares.keep_only(_share_key(entry))

    # --- settings ---

    def take_settings(self, body: ShareSettings) -> SettingsRecord:
        """Keep newer settings of a key, durably, and go by them from now on; those in force come back.

        Older ones are refused with ``StaleKey``, and those that the registry has not countersigned.
        """
        settings = open_settings(body.settings, self._cluster, None)
        entries = self._catalogue.versions(settings.order.lineage)
        if not entries:
            raise StaleKey(f"{self._node} knows no key with id {settings.order.lineage.hex()}")
        if entries[0].row.name != settings.order.name:
            raise ManifestError(f"the settings name {settings.order.name!r}, the key is {entries[0].row.name!r}")
        known = self._catalogue.settings_of(settings.order.lineage)
        if known is not None and known.serial > settings.serial:
            raise StaleKey(
                f"settings {settings.serial} of {settings.order.name!r} are older than {known.serial} on {self._node}"
            )
        return self._keep_settings(settings, known)

    def _keep_settings(self, settings: SettingsRecord, known: SettingsRecord | None) -> SettingsRecord:
        """Those in force after these came: never older ones, and of one serial those that were first."""
        order = settings.order
        if not settings.booked:
            raise ManifestError(f"settings {settings.serial} of {order.name!r} are not countersigned by the registry")
        if known is not None and known.serial >= settings.serial:
            return known
        failpoint("holder.settings.checked")
        self._store.put_settings(order.lineage, order.serial, settings.raw)
        failpoint("holder.settings.written")
        self._catalogue.set_settings(settings)
        return settings

    def unbooked(self) -> list[bytes]:
        """Settings that the registry has fallen behind, to be offered to it; each is told once."""
        told, self._unbooked = list(self._unbooked.values()), {}
        return told

    def _catch_up_settings(self, item: SyncEntry) -> None:
        """Take in the settings of the registry's entry. A registry that fell back is offered those that it lost."""
        entry = self._catalogue.by_id(item.key_id)
        if entry is None and not item.settings:
            return
        manifest = read_key_manifest(item.manifest).manifest if entry is None else entry.manifest
        lineage = manifest.lineage
        known = self._catalogue.settings_of(lineage)
        if item.settings:
            told, known = self._told_settings(item, manifest)
            if known is None or told.serial > known.serial:
                self._keep_settings(told, known)
                return
            if told.serial == known.serial:
                return
        if known is not None:
            log.warning("the registry has older settings of a key", key=known.order.name, has=known.told)
            self._unbooked[lineage] = known.raw

    def _told_settings(self, item: SyncEntry, manifest: KeyManifest) -> tuple[SettingsRecord, SettingsRecord | None]:
        """The settings in an entry on a key, checked, and those that are known here."""
        told = open_settings(item.settings, self._cluster, None)
        if (told.order.lineage, told.order.name) != (manifest.lineage, manifest.name):
            raise ManifestError(f"the settings in an entry for {item.key_id.hex()} are another key's")
        return told, self._catalogue.settings_of(manifest.lineage)

    # --- from a backup ---

    def restore(self, lane: Lane, record: KeyRecord, certificate: bytes, share: Share | None, salt: bytes) -> bool:
        """Store a committed epoch out of an archive, its documents and share checked; whether there was anything to do.

        Without a share, only who holds it. It never takes the place of a share that is here, nor of another epoch:
        ``KeyExists``. What was destroyed stays destroyed: ``StaleKey``. Uses of a limited key are not given out again.
        """
        manifest = record.manifest
        entry = self._catalogue.by_id(manifest.key_id)
        if entry is not None and entry.row.state == "destroyed":
            raise StaleKey(f"the key {manifest.name!r} with this id was destroyed on {self._node}")
        if entry is not None and (entry.row.manifest_hash, entry.row.state) != (record.digest, "committed"):
            if share is None and entry.row.state == "moved" and entry.row.manifest_hash == record.digest:
                return False
            raise KeyExists(
                f"{self._node} has epoch {entry.row.epoch} of {manifest.name!r}, {entry.row.state}; "
                f"the archived share is of epoch {manifest.epoch}"
            )
        if entry is not None and (entry.row.sealed or share is None):
            return False
        self._check_name(record)
        sealed = b""
        if share is not None:
            self.check_algorithm(manifest.algorithm)
            context = seal_context(manifest, share.x, self._node, record.digest)
            sealed = seal_share(lane, share, salt, context)
            if unseal_share(lane, sealed, share.x, context) != (share, salt):
                raise ShareCorrupt(f"{self._node}: the sealed share is not the one that came", [self._node])
        held = manifest.holder(self._node) is not None
        row = self._row(record, "committed" if held else "moved", certificate=certificate, sealed=sealed)
        row = self._store.put(row)
        if manifest.uses_max and self._store.quota(manifest.key_id) is None:
            self._store.note_quota(manifest.key_id, 0, 0)
        self._catalogue.put(row)
        return True

    def restore_destroyed(self, record: KeyRecord, document: bytes) -> bool:
        """Keep the tombstone of an archived key; ``KeyExists`` for one that lives here."""
        entry = self._catalogue.by_id(record.manifest.key_id)
        if entry is not None:
            if entry.row.state == "destroyed":
                return False
            raise KeyExists(
                f"{self._node} has the key {record.manifest.name!r}, {entry.row.state}; the archived one is gone"
            )
        self._check_destruction(record, document)
        self._catalogue.put(self._store.put(self._row(record, "destroyed", document=document)))
        return True

    def restore_settings(self, raw: bytes) -> None:
        """Keep archived settings of a key, if they are newer than those known here."""
        settings = open_settings(raw, self._cluster, None)
        self._keep_settings(settings, self._catalogue.settings_of(settings.order.lineage))

    # --- the end ---

    def destroy(self, body: Destroy) -> list[bytes]:
        """Erase the shares of all versions on the client's signed order; their ids. Repeating it is harmless.

        An expired order counts only where the registry has booked it, which it did in time (``catch_up``).
        """
        order, _ = open_destroy_order(body.order, self._cluster, self._now_ms())
        entries = self._catalogue.versions(order.key_id)
        if not entries:
            raise StaleKey(f"{self._node} knows no key with id {order.key_id.hex()}")
        if entries[0].row.name != order.name:
            raise ManifestError(f"the destroy order names {order.name!r}, the key is {entries[0].row.name!r}")
        return self._erase(entries, body.order)

    def _erase(self, entries: Sequence[Entry], document: bytes) -> list[bytes]:
        """Erase the shares of versions for good, and keep what ordered it as their tombstone; their ids."""
        for entry in entries:  # the newest last: so none before it becomes that
            if entry.row.state != "destroyed":
                failpoint("holder.destroy.checked")
                row = self._store.destroy(entry.row, document, self._now_ms())
                failpoint("holder.destroy.written")
                self._catalogue.put(row)
        self._erase_traces()
        failpoint("holder.destroy.erased")
        return [entry.row.key_id for entry in entries]

    def _check_destruction(self, record: KeyRecord, document: bytes) -> None:
        """Whether what the registry booked destroys this key: a client's order, or settings whose time has come."""
        manifest = record.manifest
        if not is_settings(document):
            if destroy_orders.decode(read_unverified(document).payload).key_id != manifest.lineage:
                raise ManifestError(
                    f"the destroy order in the registry's entry for {manifest.key_id.hex()} is for another key"
                )
            open_destroy_order(document, self._cluster, None)
            return
        settings = open_settings(document, self._cluster, None)
        order = settings.order
        if (order.lineage, order.name) != (manifest.lineage, manifest.name) or not settings.booked:
            raise ManifestError(f"the settings by which {manifest.name!r} is to be destroyed are not its booked ones")
        known = self._catalogue.settings_of(manifest.lineage)
        if known is not None and known.serial > settings.serial:
            raise ManifestError(
                f"the registry would destroy {manifest.name!r} by settings {settings.serial}, "
                f"which {known.serial} have replaced"
            )
        left_ms = order.destroy_at_ms - self._now_ms()
        if not order.destroy_at_ms or left_ms > 0:
            raise ManifestError(f"{manifest.name!r} is not to be destroyed yet: {max(left_ms, 0)} ms are left")

    def _erase_traces(self) -> None:
        """Empty the store's log of what was erased; if that can't be done now, ``tidy`` does it later."""
        self._untidy = True
        if self._together:  # the log is emptied once for all
            return
        self._store.truncate_log()
        self._untidy = False

    def tidy(self) -> None:
        """Finish an erasure that the store's readers were in the way of."""
        if self._untidy:
            self._erase_traces()

    # --- catching up ---

    def catch_up(self, item: SyncEntry) -> list[bytes]:
        """Take in what the registry's books say of one key; the ids of its versions if it was destroyed meanwhile."""
        self._catch_up_settings(item)
        return self._catch_up_key(item)

    def _catch_up_key(self, item: SyncEntry) -> list[bytes]:
        entry = self._catalogue.by_id(item.key_id)
        if entry is not None and entry.row.manifest == item.manifest and entry.row.state == item.state:
            return []
        record = open_key_manifest(item.manifest, self._cluster)
        if record.manifest.key_id != item.key_id:
            raise ManifestError(f"the registry's entry for {item.key_id.hex()} is of another key")
        if record.manifest.holder(self._node) is None:  # it was a holder once
            if entry is None:
                if item.state == "committed":
                    self._note_elsewhere(record, item.certificate)
                return []
            if item.state == "committed":
                self._leave(entry, record, item.certificate)
                return []
        if item.state == "committed":
            if entry is not None and entry.row.state == "prepared" and entry.row.epoch > record.manifest.epoch:
                return []
            if entry is not None and entry.row.manifest_hash != record.digest and entry.row.state == "prepared":
                # Another attempt was committed; this one never will be, as the certificate proves.
                open_certificate(item.certificate, record, self._cluster)
                self._supersede(entry, record)
                entry = None
            if entry is None:
                self._adopt(record, item.certificate)
            else:
                self._follow(entry, record, item.certificate)
            return []
        if entry is not None and entry.row.state == "destroyed":
            return []
        self._check_destruction(record, item.document)
        if entry is None:
            self._note_destroyed(record, item.document)
            return []
        return self._erase(self._catalogue.versions(entry.lineage), item.document)

    def recall(self, item: SyncEntry) -> tuple[list[bytes], bytes | None]:
        """Take in what another node tells of a key that this one knows: the ids that were erased, and one in doubt.

        That proves itself but for one thing: whether an expired destroy order was booked in time, the registry alone
        can say. Until then the key is doubted.
        """
        entry = self._catalogue.by_id(item.key_id)
        if entry is None or entry.row.state == "destroyed":
            return [], None
        if item.settings:
            self._keep_settings(*self._told_settings(item, entry.manifest))
        if item.state == "committed":
            return self._catch_up_key(item), None
        if is_settings(item.document):
            self._check_destruction(entry.record, item.document)
            return self._erase(self._catalogue.versions(entry.lineage), item.document), None
        order, _ = open_destroy_order(item.document, self._cluster, None)
        if (order.key_id, order.name) != (entry.lineage, entry.row.name):
            raise ManifestError(f"a destroy order that was told for {entry.row.name!r} is for another key")
        try:
            return self.destroy(Destroy(item.document)), None
        except (ManifestError, AccessDenied):
            log.warning("another node says that a key was destroyed", key=entry.row.name)
            return [], item.key_id

    def _note_destroyed(self, record: KeyRecord, document: bytes) -> None:
        """Note the destruction of a key that this node does not know, if its share may still be on a slow way here."""
        try:
            open_create_order(record.manifest.order, self._cluster, self._now_ms())
        except (ManifestError, AccessDenied):
            return  # so nothing of it is taken any more
        self._catalogue.put(self._store.put(self._row(record, "destroyed", document=document)))

    def _follow(self, entry: Entry, record: KeyRecord, certificate: bytes) -> None:
        """Go on to what the registry says is committed of a key that this node knows.

        Epochs compare as (number, manifest hash): an older one is the word of a registry that fell back, and another
        one of the same number is refused.
        """
        new, old = record.manifest, entry.manifest
        if entry.row.state == "committed" and new.epoch < old.epoch:
            return
        if entry.row.state == "committed" and new.epoch == old.epoch and record.digest != entry.record.digest:
            raise ManifestError(f"two manifests of epoch {new.epoch} of {new.name!r}; this node keeps the first")
        if self.settle(entry, certificate).record.digest == record.digest:
            return
        if new.epoch <= old.epoch:
            return  # it knows of a later one that others hold
        open_certificate(certificate, record, self._cluster)
        if self.pledged(new.key_id) > new.attempt:
            self._contradicted(record)
            return
        # All holders gave a receipt for that epoch, this one too, so it lost what it had stored: its store is an older
        # copy. Its share is of an epoch that is over, and is used no more; but it is erased only with its successor at
        # hand, so that no word of a registry's costs the last one that is left.
        log.error("this node has lost its share of a newer epoch", key=new.name, epoch=new.epoch, had=old.epoch)
        self._catalogue.put(self._store.put(self._row(record, "committed", certificate=certificate)))

    def _adopt(self, record: KeyRecord, certificate: bytes) -> None:
        """Note a key whose creation this node missed; it can combine it, but holds no share."""
        open_certificate(certificate, record, self._cluster)
        self._check_name(record)
        row = self._row(record, "committed", certificate=certificate)
        self._catalogue.put(self._store.put(row))

    def _row(
        self,
        record: KeyRecord,
        state: Literal["prepared", "committed", "moved", "destroyed"],
        *,
        certificate: bytes = b"",
        document: bytes = b"",
        sealed: bytes = b"",
    ) -> Row:
        manifest = record.manifest
        return Row(
            key_id=manifest.key_id,
            version=manifest.version,
            epoch=manifest.epoch,
            attempt=manifest.attempt,
            name=manifest.name,
            state=state,
            manifest_hash=record.digest,
            manifest=record.raw,
            certificate=certificate,
            document=document,
            sealed=sealed,
            changed_ms=self._now_ms(),
        )


def _share_key(entry: Entry) -> ShareKey:
    return ShareKey(entry.row.key_id, entry.manifest.version, entry.manifest.epoch, entry.record.digest)
