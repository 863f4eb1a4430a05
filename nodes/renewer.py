"""A holder's side of a refresh: deal zero, say what the new share would be, store it. It runs on the ``local`` worker.

No step waits for a peer, and until the last one nothing is kept: parts are encrypted to their holders, this node's own
too, and come back with the next question. What is stored in the end was checked here against everybody's statements, so
a coordinator, and fewer than t holders with it, can change neither the key nor who holds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence

from engine.errors import AccessDenied, ManifestError, QuorumUnavailable, ShareCorrupt, StaleKey
from engine.failpoints import failpoint
from engine.protocol.manifest import (
    ClusterSource,
    FollowsCluster,
    KeyRecord,
    Member,
    check_successor,
    open_key_manifest,
    open_refresh_order,
)
from engine.protocol.refresh import (
    BadDeal,
    Deal,
    NewShare,
    Terms,
    check_parts,
    check_size,
    deal_parts,
    new_share,
    open_deals,
    open_part_statement,
    sign_part_statement,
)
from engine.protocol.requests import Dealt, Prepared, Refreshed, ShareDeal, ShareRefresh, ShareRenew
from engine.protocol.signed import SigningKey
from engine.sharing import FINGERPRINT_BYTES, commitment, deal_zero
from nodes.catalogue import Catalogue, Entry
from nodes.holder import ShareHolder
from nodes.token import Lane

__all__ = ["Renewer"]


class Renewer(FollowsCluster):
    """The refreshing of one node's shares. ``curve_secrets`` gives its X25519 private keys, ``now_ms`` the time."""

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        curve_secrets: Callable[[], Sequence[bytes]],
        catalogue: Catalogue,
        holder: ShareHolder,
        now_ms: Callable[[], int],
    ) -> None:
        self._source = cluster
        self._signing = signing
        self._node = signing.name
        self._curve_secrets = curve_secrets
        self._catalogue = catalogue
        self._holder = holder
        self._now_ms = now_ms

    def deal(self, lane: Lane, body: ShareDeal, sender: Member) -> Dealt:
        """This node's sharing of zero for all holders. Nothing is kept of it."""
        entry, terms = self._begin(body.order, body.attempt, sender, body.certificate)
        if entry.record.digest != body.manifest_hash:
            raise StaleKey(f"{self._node} holds another epoch {entry.row.epoch} of {entry.row.name!r}")
        share, _ = self._holder.own_share(lane, entry)
        check_size(entry.record, len(share.y))
        xs = [holder.x for holder in entry.manifest.holders]
        updates = deal_zero(len(share.y) + FINGERPRINT_BYTES, threshold=entry.manifest.threshold, xs=xs)
        drawn = os.urandom(64 * len(xs))
        statement, parts = deal_parts(terms, self._signing, self._cluster, updates, self._now_ms(), drawn)
        failpoint("holder.deal.dealt")
        return Dealt(statement, parts)

    def refresh(self, lane: Lane, body: ShareRefresh, sender: Member) -> Refreshed:
        """The signed commitment to what this node's share becomes by these deals, and the values of the check.

        It is a pledge too: this node will follow no earlier attempt. The statements of all so are what lets a holder
        put this attempt's share in the place of an earlier one's.
        """
        entry, terms = self._begin(body.order, body.attempt, sender)
        deals = open_deals(terms, body.deals, self._cluster)
        new = self._new_share(lane, entry, terms, deals, body.parts)
        self._holder.pledge(entry, terms.attempt)
        failpoint("holder.refresh.pledged")
        statement = sign_part_statement(terms, deals, new, self._signing, self._now_ms())
        failpoint("holder.refresh.stated")
        return Refreshed(statement)

    def renew(self, lane: Lane, body: ShareRenew, sender: Member) -> Prepared:
        """Check all that the new epoch rests on and store the new share beside the old; the answer is the receipt."""
        record = open_key_manifest(body.manifest, self._cluster, self._now_ms())
        if record.dealer != sender.name:
            raise AccessDenied(f"{sender.name!r} sends the manifest of {record.dealer!r}")
        entry, terms = self._begin(record.manifest.change, record.manifest.attempt, sender, renews=record.digest)
        check_successor(record, entry.record)
        for notice in body.aborts:
            self._holder.abort(notice)
        coming = self._catalogue.next_of(entry.row.key_id)
        if coming is not None and coming.record.digest != record.digest and not coming.row.document:
            raise ManifestError(f"{entry.row.name!r}: attempt {coming.row.attempt} is neither committed nor aborted")
        deals = open_deals(terms, body.deals, self._cluster)
        new = self._new_share(lane, entry, terms, deals, body.parts)
        self._check(record, terms, deals, body.statements, new)
        return self._holder.store_prepared(lane, record, new.share, new.salt)

    def _begin(
        self, raw_order: bytes, attempt: int, sender: Member, certificate: bytes = b"", renews: bytes = b""
    ) -> tuple[Entry, Terms]:
        """What a step rests on: the client's order, the epoch it names, which this node holds, and the attempt.

        ``renews`` is the hash of the manifest that is to be stored: an attempt has one, and no other is taken for it.
        """
        order, signed = open_refresh_order(raw_order, self._cluster, self._now_ms())
        entry = self._catalogue.by_id(order.key_id)
        if entry is not None and entry.row.state != "destroyed" and certificate:
            entry = self._holder.settle(entry, certificate)
        if entry is None or entry.row.state != "committed" or entry.row.name != order.name:
            raise StaleKey(f"{self._node} has no committed key {order.name!r} with id {order.key_id.hex()}")
        if entry.row.epoch != order.from_epoch:
            raise StaleKey(
                f"the order refreshes epoch {order.from_epoch} of {order.name!r}, {self._node} holds {entry.row.epoch}"
            )
        if entry.manifest.holder(sender.name) is None:
            raise AccessDenied(f"{sender.name!r} is no holder of {order.name!r} and can't refresh it")
        if not entry.row.sealed:
            raise QuorumUnavailable(
                f"{self._node} is a holder of {order.name!r}, but has no share; a refresh needs all", [self._node]
            )
        coming = self._catalogue.next_of(order.key_id)
        known = max(entry.row.attempt + 1, self._holder.pledged(entry))
        if coming is not None:
            known = max(known, coming.row.attempt + (coming.record.digest != renews))
        if attempt < known:
            raise ManifestError(
                f"attempt {attempt} of {order.name!r} was given out before; {self._node} knows {known}: the registry "
                "has fallen back to an older state"
            )
        return entry, Terms(entry.record, attempt, signed.digest)

    def _new_share(
        self, lane: Lane, entry: Entry, terms: Terms, deals: Sequence[Deal], parts: Sequence[bytes]
    ) -> NewShare:
        old, _ = self._holder.own_share(lane, entry)
        *earlier, last = self._curve_secrets()
        for secret in earlier:  # while its key changes, a dealer may know the one of before alone
            with contextlib.suppress(BadDeal):
                return new_share(terms, deals, parts, old, self._node, secret)
        return new_share(terms, deals, parts, old, self._node, last)

    def _check(
        self, record: KeyRecord, terms: Terms, deals: Sequence[Deal], raw_statements: Sequence[bytes], new: NewShare
    ) -> None:
        """All statements against the deals, the manifest and each other; this node's own against its share."""
        statements = [open_part_statement(terms, deals, raw, self._cluster) for raw in raw_statements]
        check_parts(terms, deals, statements)
        for holder, statement in zip(record.manifest.holders, statements, strict=True):
            if holder.commitment != statement.commitment:
                raise ManifestError(f"the manifest commits {holder.node!r} to another share than {holder.node!r} told")
        mine = next(each for each in statements if each.holder.node == self._node)
        if mine.commitment != commitment(new.salt, terms.context, new.share) or mine.values != new.values:
            raise ShareCorrupt(f"the statement of {self._node!r} is not on the share it was dealt", [self._node])
