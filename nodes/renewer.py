"""A holder's side of a refresh or reshare: deal, say what the new share would be, store it. It runs on ``local``.

No step waits for a peer, and until the last one nothing is kept: parts are encrypted to their holders, this node's own
too, and come back with the next question. What is stored in the end was checked here against everybody's statements, so
a coordinator, and fewer than t holders with it, can change neither the key nor who holds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from engine.errors import AccessDenied, ManifestError, QuorumUnavailable, ShareCorrupt, StaleKey
from engine.failpoints import failpoint
from engine.protocol.manifest import (
    Cluster,
    ClusterSource,
    FollowsCluster,
    KeyRecord,
    Member,
    RefreshOrder,
    ReshareOrder,
    check_successor,
    open_change_order,
    open_key_manifest,
    open_renewing_order,
    open_sharing_order,
)
from engine.protocol.refresh import (
    BadDeal,
    Deal,
    NewShare,
    Opener,
    PartStatement,
    Sealer,
    Terms,
    check_parts,
    check_size,
    deal_parts,
    new_share,
    open_deals,
    open_part_statement,
    open_parts,
    sign_part_statement,
)
from engine.protocol.requests import (
    Dealt,
    Prepared,
    Refreshed,
    ShareAccept,
    ShareDeal,
    ShareRefresh,
    ShareRenew,
    ShareReshare,
)
from engine.protocol.reshare import check_sub_shares, merged_share
from engine.protocol.signed import Signed
from engine.sharing import FINGERPRINT_BYTES, SALT_BYTES, Share, commitment, deal_sub_shares, deal_zero
from nodes.catalogue import Catalogue, Entry
from nodes.holder import ShareHolder
from nodes.orders import BalancerOrders
from nodes.remember import Remembered
from nodes.token import Lane

__all__ = ["Renewer"]

SEALED_TOGETHER: Final = 64
SEALER_MS: Final = 5_000
"""How many deals share an ephemeral key, and for how long."""

R = TypeVar("R")


class Renewer(FollowsCluster):
    """The new shares of one node. ``curve_secrets`` gives its X25519 private keys, ``now_ms`` the time."""

    def __init__(
        self,
        cluster: ClusterSource,
        curve_secrets: Callable[[], Sequence[bytes]],
        catalogue: Catalogue,
        holder: ShareHolder,
        orders: BalancerOrders,
        now_ms: Callable[[], int],
    ) -> None:
        self._source = cluster
        self._signing = holder.pen
        self._node = holder.pen.name
        self._curve_secrets = curve_secrets
        self._catalogue = catalogue
        self._holder = holder
        self._orders = orders
        self._now_ms = now_ms
        self._remembered = Remembered()
        self._openers: dict[bytes, Opener] = {}
        self._sealer, self._sealer_ms = Sealer(os.urandom(32)), now_ms()
        self._dealt: set[tuple[bytes, bytes, int]] = set()
        """The terms that were dealt by with this ephemeral key."""

    def deal(self, lane: Lane, body: ShareDeal, sender: Member) -> Dealt:
        """This node's sharing of zero for all holders, or of its share for the new ones. Nothing is kept of it."""
        entry, terms, balancer = self._begin(open_change_order, body.order, body.attempt, sender, body.certificate)
        if entry.record.digest != body.manifest_hash:
            raise StaleKey(f"{self._node} holds another epoch {entry.row.epoch} of {entry.row.name!r}")
        self._orders.count(terms.change, balancer)
        share, _ = self._holder.own_share(lane, entry)
        xs = [holder.x for holder in terms.holders]
        if isinstance(terms.change, ReshareOrder):
            # Or what was prepared in an earlier attempt could be committed, and this share be erased for it, after its
            # holders have put that of this attempt in its place.
            self._holder.pledge(entry.row.key_id, terms.attempt)
            masked = Share(share.x, share.y + os.urandom(FINGERPRINT_BYTES))
            updates = deal_sub_shares(masked, threshold=terms.change.threshold, xs=xs)
        else:
            check_size(entry.record, len(share.y))
            updates = deal_zero(len(share.y) + FINGERPRINT_BYTES, threshold=entry.manifest.threshold, xs=xs)
        drawn, sealer = os.urandom(SALT_BYTES * len(xs)), self._sealer_for(terms)
        statement, parts = deal_parts(terms, self._signing, self._cluster, updates, self._now_ms(), drawn, sealer)
        failpoint("holder.deal.dealt")
        return Dealt(statement, parts)

    def refresh(self, lane: Lane, body: ShareRefresh, sender: Member) -> Refreshed:
        """The signed commitment to what this node's share becomes by these deals, and the values of the check.

        It is a pledge too: this node will follow no earlier attempt. The statements of all so are what lets a holder
        put this attempt's share in the place of an earlier one's.
        """
        entry, terms, _ = self._begin(open_renewing_order, body.order, body.attempt, sender)
        deals = open_deals(terms, body.deals, self._cluster)
        new = self._new_share(lane, entry, terms, deals, body.parts)
        self._remembered.put(terms, body.deals, body.parts, deals, new)
        self._holder.pledge(entry.row.key_id, terms.attempt)
        failpoint("holder.refresh.pledged")
        statement = sign_part_statement(terms, deals, new, self._signing, self._now_ms())
        failpoint("holder.refresh.stated")
        return Refreshed(statement)

    def renew(self, lane: Lane, body: ShareRenew, sender: Member) -> Prepared:
        """Check all that the new epoch rests on and store the new share beside the old; the answer is the receipt."""
        record = open_key_manifest(body.manifest, self._cluster, self._now_ms())
        if record.dealer != sender.name:
            raise AccessDenied(f"{sender.name!r} sends the manifest of {record.dealer!r}")
        change, attempt = record.manifest.change, record.manifest.attempt
        entry, terms, _ = self._begin(open_renewing_order, change, attempt, sender, renews=record.digest)
        check_successor(record, entry.record)
        self._make_room(record, body.aborts)
        raws, parts = (body.deals, body.parts) if body.deals else self._told(record)[2:]
        known = self._remembered.take(terms, raws, parts)
        if known is None:
            deals = open_deals(terms, raws, self._cluster)
            known = deals, self._new_share(lane, entry, terms, deals, parts)
        deals, new = known
        self._check(check_parts, record, terms, deals, body.statements, new)
        return self._holder.store_prepared(lane, record, new.share, new.salt)

    def reshare(self, lane: Lane, body: ShareReshare, sender: Member) -> Refreshed:
        """As ``refresh``, by a node that is to hold a share of a key by a reshare or move order."""
        terms, issuer = self._receive(body.before, body.certificate, body.order, body.attempt, sender)
        if terms.before.manifest.holder(self._node) is None:  # else it was counted when it dealt
            self._orders.count(terms.change, issuer)
        deals = open_deals(terms, body.deals, self._cluster)
        new = self._merged(terms, deals, body.parts)
        self._remembered.put(terms, body.deals, body.parts, deals, new, body.certificate)
        self._holder.pledge(terms.before.manifest.key_id, terms.attempt)
        failpoint("holder.reshare.pledged")
        statement = sign_part_statement(terms, deals, new, self._signing, self._now_ms())
        failpoint("holder.reshare.stated")
        return Refreshed(statement)

    def accept(self, lane: Lane, body: ShareAccept, sender: Member) -> Prepared:
        """As ``renew``, by such a node; it may hold a share of the key already, or none."""
        record = open_key_manifest(body.manifest, self._cluster, self._now_ms())
        if record.dealer != sender.name:
            raise AccessDenied(f"{sender.name!r} sends the manifest of {record.dealer!r}")
        change, attempt = record.manifest.change, record.manifest.attempt
        whole = (body.before, body.certificate, body.deals, body.parts)
        before, certificate, raws, parts = whole if body.deals else self._told(record)
        terms, _ = self._receive(before, certificate, change, attempt, sender, renews=record.digest)
        check_successor(record, terms.before)
        self._make_room(record, body.aborts)
        known = self._remembered.take(terms, raws, parts)
        if known is None:
            deals = open_deals(terms, raws, self._cluster)
            known = deals, self._merged(terms, deals, parts)
        deals, new = known
        self._check(check_sub_shares, record, terms, deals, body.statements, new)
        return self._holder.store_prepared(lane, record, new.share, new.salt)

    def _told(self, record: KeyRecord) -> tuple[bytes, bytes, list[bytes], list[bytes]]:
        """What this node's last statement on a key was on, if that is not sent again; all is checked as if it was."""
        found = self._remembered.told(record.manifest.key_id)
        if found is None:
            raise StaleKey(f"{self._node} has forgotten what it was dealt of {record.manifest.name!r}")
        return found

    def _make_room(self, record: KeyRecord, aborts: Sequence[bytes]) -> None:
        """Take in abort notices; refuse to replace a prepared share that may still become valid."""
        for notice in aborts:
            self._holder.abort(notice)
        coming = self._coming(record.manifest.key_id)
        if coming is not None and coming.record.digest != record.digest and not coming.row.document:
            raise ManifestError(
                f"{record.manifest.name!r}: attempt {coming.row.attempt} is neither committed nor aborted"
            )

    def _coming(self, key_id: bytes) -> Entry | None:
        """The prepared share of the next epoch, whether this node holds one of the last or not."""
        entry = self._catalogue.by_id(key_id)
        return entry if entry is not None and entry.row.state == "prepared" else self._catalogue.next_of(key_id)

    def _receive(
        self,
        before: bytes,
        certificate: bytes,
        raw_order: bytes,
        attempt: int,
        sender: Member,
        renews: bytes = b"",
    ) -> tuple[Terms, str]:
        """As ``_begin``, for a node that is to hold a share: by the certified manifest of the epoch before."""
        order, signed = open_sharing_order(raw_order, self._cluster, self._now_ms())
        known = self._catalogue.by_id(order.key_id)
        own = known is not None and known.row.manifest == before and known.row.state == "committed"
        record = known.record if known is not None and own else open_key_manifest(before, self._cluster)
        manifest = record.manifest
        if (manifest.key_id, manifest.name, manifest.epoch) != (order.key_id, order.name, order.from_epoch):
            raise ManifestError(f"the order replaces epoch {order.from_epoch} of {order.name!r}, not the one that came")
        if manifest.holder(sender.name) is None:
            raise AccessDenied(f"{sender.name!r} is no holder of {order.name!r} and can't reshare it")
        if self._node not in order.holders:
            raise ManifestError(f"{self._node!r} is not to hold a share of {order.name!r}")
        self._holder.check_algorithm(manifest.algorithm)
        self._holder.receive(record, certificate)
        self._orders.check(order, signed, manifest)
        self._check_attempt(record, attempt, renews)
        return Terms(record, attempt, signed.digest, order), signed.issuer

    def _begin(
        self,
        open_order: Callable[[bytes, Cluster, int | None], tuple[RefreshOrder | ReshareOrder, Signed]],
        raw_order: bytes,
        attempt: int,
        sender: Member,
        certificate: bytes = b"",
        renews: bytes = b"",
    ) -> tuple[Entry, Terms, str]:
        """What a step rests on: the order, the epoch it names, which this node holds, the attempt, and who ordered it.

        ``renews`` is the hash of the manifest that is to be stored: an attempt has one, and no other is taken for it.
        """
        order, signed = open_order(raw_order, self._cluster, self._now_ms())
        entry = self._catalogue.by_id(order.key_id)
        if entry is not None and entry.row.state != "destroyed" and certificate:
            entry = self._holder.settle(entry, certificate)
        if entry is None or entry.row.state != "committed" or entry.row.name != order.name:
            raise StaleKey(f"{self._node} has no committed key {order.name!r} with id {order.key_id.hex()}")
        if entry.row.epoch != order.from_epoch:
            raise StaleKey(
                f"the order replaces epoch {order.from_epoch} of {order.name!r}, {self._node} holds {entry.row.epoch}"
            )
        if entry.manifest.holder(sender.name) is None:
            raise AccessDenied(f"{sender.name!r} is no holder of {order.name!r} and can't change it")
        if not entry.row.sealed:
            raise QuorumUnavailable(
                f"{self._node} is a holder of {order.name!r}, but has no share to deal with", [self._node]
            )
        self._orders.check(order, signed, entry.manifest)
        self._check_attempt(entry.record, attempt, renews)
        return entry, Terms(entry.record, attempt, signed.digest, order), signed.issuer

    def _check_attempt(self, before: KeyRecord, attempt: int, renews: bytes) -> None:
        key_id = before.manifest.key_id
        coming = self._coming(key_id)
        known = max(before.manifest.attempt + 1, self._holder.pledged(key_id))
        if coming is not None:
            known = max(known, coming.row.attempt + (coming.record.digest != renews))
        if attempt < known:
            raise ManifestError(
                f"attempt {attempt} of {before.manifest.name!r} was given out before; {self._node} knows {known}: the "
                "registry has fallen back to an older state"
            )

    def _new_share(
        self, lane: Lane, entry: Entry, terms: Terms, deals: Sequence[Deal], parts: Sequence[bytes]
    ) -> NewShare:
        old, _ = self._holder.own_share(lane, entry)
        return self._by_either_key(lambda opener: new_share(terms, deals, parts, old, self._node, opener))

    def _merged(self, terms: Terms, deals: Sequence[Deal], parts: Sequence[bytes]) -> NewShare:
        opened = self._by_either_key(lambda opener: open_parts(terms, deals, parts, self._node, opener))
        return merged_share(terms, deals, opened)

    def _by_either_key(self, make: Callable[[Opener], R]) -> R:
        secrets = self._curve_secrets()
        self._openers = {each: self._openers.get(each) or Opener(each) for each in secrets}
        *earlier, last = (self._openers[each] for each in secrets)
        for opener in earlier:  # while its key changes, a dealer may know the one of before alone
            with contextlib.suppress(BadDeal):
                return make(opener)
        return make(last)

    def _sealer_for(self, terms: Terms) -> Sealer:
        """The ephemeral key for what is dealt now: the same one for a while, but never twice by the same terms."""
        now_ms = self._now_ms()
        dealt = (terms.before.digest, terms.order, terms.attempt)
        if dealt in self._dealt or len(self._dealt) >= SEALED_TOGETHER or abs(now_ms - self._sealer_ms) > SEALER_MS:
            self._sealer, self._sealer_ms = Sealer(os.urandom(32)), now_ms
            self._dealt = set()
        self._dealt.add(dealt)
        return self._sealer

    def _check(
        self,
        check: Callable[[Terms, Sequence[Deal], Sequence[PartStatement]], None],
        record: KeyRecord,
        terms: Terms,
        deals: Sequence[Deal],
        raw_statements: Sequence[bytes],
        new: NewShare,
    ) -> None:
        """All statements against the deals, the manifest and each other; this node's own against its share."""
        statements = [open_part_statement(terms, deals, raw, self._cluster) for raw in raw_statements]
        check(terms, deals, statements)
        for holder, statement in zip(record.manifest.holders, statements, strict=True):
            if holder.commitment != statement.commitment:
                raise ManifestError(f"the manifest commits {holder.node!r} to another share than {holder.node!r} told")
        mine = next(each for each in statements if each.holder.node == self._node)
        if mine.commitment != commitment(new.salt, terms.context, new.share) or mine.values != new.values:
            raise ShareCorrupt(f"the statement of {self._node!r} is not on the share it was dealt", [self._node])
