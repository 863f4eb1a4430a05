"""The coordinator of a refresh: it carries what the holders say to each other, and has the registry commit the result.

It runs on the ``dealer`` worker and may wait for peers. It can read no part that is dealt, and nobody takes its word:
each holder checks the statements of all others for itself (``nodes.renewer``). Until the registry has committed, the
old epoch is the valid one; whatever fails before is aborted and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import structlog
from msgspec.structs import replace

from engine.client.transport import Channel
from engine.errors import (
    DeadlineExceeded,
    EngineError,
    ManifestError,
    NodeUnavailable,
    QuorumUnavailable,
    ShareCorrupt,
    StaleKey,
)
from engine.failpoints import failpoint
from engine.protocol.manifest import (
    ClusterSource,
    FollowsCluster,
    Holder,
    KeyRecord,
    check_successor,
    key_manifests,
    open_certificate,
    open_key_manifest,
    open_receipt,
    open_refresh_order,
)
from engine.protocol.refresh import (
    Deal,
    PartStatement,
    Terms,
    check_parts,
    check_size,
    open_deal,
    open_deals,
    open_part_statement,
)
from engine.protocol.requests import (
    REGISTRY_CHANGE,
    REGISTRY_COMMIT,
    REQUEST_CODECS,
    SHARE_DEAL,
    SHARE_REFRESH,
    SHARE_RENEW,
    Change,
    Commit,
    KeyDescription,
    Outcome,
    Reserved,
    ShareDeal,
    ShareRefresh,
    ShareRenew,
)
from engine.protocol.signed import SigningKey, sign_envelope
from nodes.catalogue import Catalogue, Entry
from nodes.deal import Conversation, Talker

__all__ = ["Coordinator"]

DEAL_PART: Final = 0.5
"""Of the time that is left, the holders get this part to deal: a silent one is told early."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class _Dealt:
    """One holder's deal: the statement as it came, checked, and the sealed parts in the manifest's order."""

    raw: bytes
    deal: Deal
    parts: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class _Stated:
    """A set of t deals that passed, with every holder's statement on it."""

    deals: tuple[_Dealt, ...]
    raws: tuple[bytes, ...]
    statements: tuple[PartStatement, ...]


class Coordinator(FollowsCluster):
    """Refreshes keys that this node holds a share of."""

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        catalogue: Catalogue,
        conversation: Conversation,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._source = cluster
        self._signing = signing
        self._node = signing.name
        self._catalogue = catalogue
        self._conversation = conversation
        self._now_ms = now_ms
        self._clock = clock

    def refresh(self, talker: Talker, raw_order: bytes, deadline_s: float) -> KeyDescription:
        """Replace the shares of the epoch that the client's order names; the description of the key after it.

        Idempotent: if that epoch is not the last one any more, there is nothing to do. ``QuorumUnavailable`` names the
        holders that are down; ``ValueError``: the key is too large for its number of shares, or has threshold 1.
        """
        order, signed = open_refresh_order(raw_order, self._cluster, self._now_ms())
        entry = self._catalogue.committed(order.key_id)
        self._check(entry, order.name)
        if entry.row.epoch > order.from_epoch:
            return KeyDescription(entry.row.manifest, entry.row.certificate, [])
        if entry.row.epoch < order.from_epoch:
            raise StaleKey(f"{self._node} knows epoch {entry.row.epoch} of {order.name!r}, not {order.from_epoch} yet")
        change = Change(raw_order, entry.row.manifest, entry.row.certificate)
        reserved = self._conversation.ask_registry(talker.channel, REGISTRY_CHANGE, change, deadline_s)
        failpoint("dealer.refresh.reserved")
        if reserved.attempt == 0:
            return self._conversation.already(talker, reserved)
        terms = Terms(entry.record, reserved.attempt, signed.digest)
        certificate = b""
        record: KeyRecord | None = None
        try:
            dealt = self._deals(talker.channel, terms, raw_order, entry, deadline_s)
            failpoint("dealer.refresh.dealt")
            stated = self._statements(talker.channel, terms, raw_order, dealt, deadline_s)
            record = self._manifest(terms, raw_order, stated)
            failpoint("dealer.refresh.stated")
            receipts = self._renew(talker.channel, record, terms, stated, reserved, deadline_s)
            failpoint("dealer.refresh.renewed")
            certificate = self._conversation.ask_registry(
                talker.channel, REGISTRY_COMMIT, Commit(record.raw, receipts), deadline_s
            ).certificate
        except (EngineError, ValueError) as error:
            holders = [holder.node for holder in entry.manifest.holders]
            attempt = Outcome(order.key_id, reserved.attempt)
            certificate = self._conversation.give_up(talker.channel, order.name, attempt, holders, error)
            if record is None:
                raise
        failpoint("dealer.refresh.committed")
        holders = list(open_certificate(certificate, record, self._cluster))
        self._conversation.announce(talker.channel, record, certificate, holders, deadline_s)
        failpoint("dealer.refresh.announced")
        return KeyDescription(record.raw, certificate, [])

    def _check(self, entry: Entry, name: str) -> None:
        if entry.row.name != name:
            raise ManifestError(f"the order names {name!r}, the key is {entry.row.name!r}")
        if entry.manifest.threshold < 2:
            raise ValueError(f"{name!r} has threshold 1: its share is the key itself, and no refresh changes it")
        if not entry.row.sealed:
            raise QuorumUnavailable(
                f"{self._node} is a holder of {name!r}, but has no share; a refresh needs all", [self._node]
            )
        check_size(entry.record, len(entry.row.sealed))  # a little more than the share's own length

    def _everybody(
        self, channel: Channel, verb: str, messages: dict[str, Any], deadline_s: float, what: str
    ) -> dict[str, Any]:
        """The replies of all holders; else the first refusal, or ``QuorumUnavailable`` that names the silent."""
        bodies = {name: REQUEST_CODECS[verb].encode(message) for name, message in messages.items()}
        replies: dict[str, Any] = {}
        silent: dict[str, EngineError] = {}
        for holder, reply in self._conversation.ask_all(channel, verb, bodies, deadline_s, None):
            if isinstance(reply, NodeUnavailable | DeadlineExceeded):
                silent[holder] = reply
            elif isinstance(reply, EngineError):
                raise reply
            else:
                replies[holder] = reply
        if silent:
            told = "; ".join(f"{name}: {error}" for name, error in silent.items())
            raise QuorumUnavailable(f"{what}: a refresh needs all {len(bodies)} holders ({told})", list(silent))
        return replies

    def _deals(self, channel: Channel, terms: Terms, raw_order: bytes, entry: Entry, deadline_s: float) -> list[_Dealt]:
        """A deal of every holder, in the manifest's order; those that don't verify are left out."""
        message = ShareDeal(raw_order, terms.attempt, entry.record.digest, entry.row.certificate)
        now = self._clock()
        until_s = now + (deadline_s - now) * DEAL_PART
        names = [holder.node for holder in entry.manifest.holders]
        replies = self._everybody(channel, SHARE_DEAL, dict.fromkeys(names, message), until_s, entry.row.name)
        dealt = []
        for name in names:
            reply = replies[name]
            try:
                deal = open_deal(terms, reply.statement, self._cluster)
                if deal.dealer.node != name or len(reply.parts) != len(names):
                    raise ManifestError(f"{name} sent the deal of another, or {len(reply.parts)} parts")
            except EngineError as error:
                log.error("bad deal", key=entry.row.name, dealer=name, reason=str(error))
                continue
            dealt.append(_Dealt(reply.statement, deal, tuple(reply.parts)))
        return dealt

    def _statements(
        self, channel: Channel, terms: Terms, raw_order: bytes, dealt: Sequence[_Dealt], deadline_s: float
    ) -> _Stated:
        """Every holder's statement on the first t deals that all can use.

        A dealer that is named as wrong is left out, and the next one taken in its place.
        """
        manifest = terms.before.manifest
        usable = list(dealt)
        problem: ShareCorrupt | None = None
        while len(usable) >= manifest.threshold:
            chosen = tuple(usable[: manifest.threshold])
            try:
                return self._state(channel, terms, raw_order, chosen, deadline_s)
            except ShareCorrupt as error:
                problem = error
                named = {each.deal.dealer.node for each in chosen} & set(error.holders[:1])
                if not named:
                    raise
                log.error("bad deal", key=manifest.name, dealer=error.holders[0], reason=str(error))
                usable = [each for each in usable if each.deal.dealer.node not in named]
        raise problem or ShareCorrupt(
            f"{manifest.name!r}: {len(usable)} holders dealt as they must, {manifest.threshold} are needed"
        )

    def _state(
        self, channel: Channel, terms: Terms, raw_order: bytes, chosen: Sequence[_Dealt], deadline_s: float
    ) -> _Stated:
        manifest = terms.before.manifest
        deals = open_deals(terms, [each.raw for each in chosen], self._cluster)
        messages = {
            holder.node: ShareRefresh(
                raw_order, terms.attempt, [each.raw for each in chosen], [each.parts[place] for each in chosen]
            )
            for place, holder in enumerate(manifest.holders)
        }
        replies = self._everybody(channel, SHARE_REFRESH, messages, deadline_s, manifest.name)
        raws = tuple(replies[holder.node].statement for holder in manifest.holders)
        statements = tuple(open_part_statement(terms, deals, raw, self._cluster) for raw in raws)
        check_parts(terms, deals, statements)
        return _Stated(tuple(chosen), raws, statements)

    def _manifest(self, terms: Terms, raw_order: bytes, stated: _Stated) -> KeyRecord:
        """The manifest of the new epoch: the one before with the new commitments."""
        before = terms.before
        manifest = replace(
            before.manifest,
            epoch=terms.epoch,
            attempt=terms.attempt,
            holders=[Holder(each.holder.node, each.holder.x, each.commitment) for each in stated.statements],
            previous=before.digest,
            change=raw_order,
        )
        raw = sign_envelope("key", self._now_ms(), key_manifests.encode(manifest), self._signing)
        record = open_key_manifest(raw, self._cluster)
        check_successor(record, before)
        return record

    def _renew(
        self,
        channel: Channel,
        record: KeyRecord,
        terms: Terms,
        stated: _Stated,
        reserved: Reserved,
        deadline_s: float,
    ) -> list[bytes]:
        """Have every holder store its new share; their receipts."""
        messages = {
            holder.node: ShareRenew(
                record.raw,
                [each.raw for each in stated.deals],
                [each.parts[place] for each in stated.deals],
                list(stated.raws),
                list(reserved.aborts),
            )
            for place, holder in enumerate(terms.before.manifest.holders)
        }
        replies = self._everybody(channel, SHARE_RENEW, messages, deadline_s, record.manifest.name)
        receipts = []
        for name, reply in replies.items():
            if open_receipt(reply.receipt, record, self._cluster) != name:
                raise ManifestError(f"{name} sent the receipt of another")
            receipts.append(reply.receipt)
        return receipts
