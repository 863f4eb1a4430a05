"""The coordinator of a refresh or reshare: it carries what the holders say to each other, and has the registry commit.

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
    ReshareOrder,
    check_successor,
    key_manifests,
    open_certificate,
    open_change_order,
    open_key_manifest,
    open_receipt,
    read_change_order,
    read_key_manifest,
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
    SHARE_ACCEPT,
    SHARE_DEAL,
    SHARE_LEAVE,
    SHARE_REFRESH,
    SHARE_RENEW,
    SHARE_RESHARE,
    Change,
    Commit,
    KeyDescription,
    MoveResult,
    Outcome,
    Reserved,
    ShareAccept,
    ShareDeal,
    ShareLeave,
    ShareRefresh,
    ShareRenew,
    ShareReshare,
)
from engine.protocol.reshare import check_reshare_size, check_sub_shares
from engine.protocol.signed import SigningKey, sign_envelope
from engine.sharing import check_placement
from nodes.catalogue import Catalogue, Entry
from nodes.deal import COMMIT_WAIT_S, Conversation, Talker
from nodes.orders import BalancerOrders

__all__ = ["Coordinator"]

MAX_TEXT: Final = 200
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
    """A set of deals that passed, with every new holder's statement on it."""

    deals: tuple[_Dealt, ...]
    raws: tuple[bytes, ...]
    statements: tuple[PartStatement, ...]


class Coordinator(FollowsCluster):
    """Refreshes and reshares keys that this node holds a share of."""

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        catalogue: Catalogue,
        conversation: Conversation,
        orders: BalancerOrders,
        now_ms: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._source = cluster
        self._signing = signing
        self._node = signing.name
        self._catalogue = catalogue
        self._conversation = conversation
        self._orders = orders
        self._now_ms = now_ms
        self._clock = clock

    def change(self, talker: Talker, raw_order: bytes, deadline_s: float) -> KeyDescription:
        """Replace the shares of the epoch that the order names; the description of the key after it.

        Idempotent: if that epoch is not the last one any more, there is nothing to do. ``QuorumUnavailable`` names the
        holders that are down; ``ValueError``: the key is too large for its number of shares, has threshold 1 and is to
        be refreshed, or has too few holders for a reshare that can be checked.
        """
        order, signed = open_change_order(raw_order, self._cluster, self._now_ms())
        entry = self._catalogue.by_id(order.key_id)
        if entry is None or entry.row.state != "moved":
            entry = self._catalogue.committed(order.key_id)
        if entry.row.name != order.name:
            raise ManifestError(f"the order names {order.name!r}, the key is {entry.row.name!r}")
        if entry.row.epoch > order.from_epoch:
            return KeyDescription(entry.row.manifest, entry.row.certificate, [])
        if entry.row.state == "moved":
            raise StaleKey(f"{self._node} holds no share of {order.name!r}, which others hold")
        if entry.row.epoch < order.from_epoch:
            raise StaleKey(f"{self._node} knows epoch {entry.row.epoch} of {order.name!r}, not {order.from_epoch} yet")
        self._orders.check(order, signed, entry.manifest)
        reshare = order if isinstance(order, ReshareOrder) else None
        if reshare is None:
            self._check(entry)
        else:
            self._check_reshare(entry, raw_order, reshare)
        step = "dealer.refresh" if reshare is None else "dealer.reshare"
        change = Change(raw_order, entry.row.manifest, entry.row.certificate)
        reserved = self._conversation.ask_registry(talker.channel, REGISTRY_CHANGE, change, deadline_s)
        failpoint(f"{step}.reserved")
        if reserved.attempt == 0:
            return self._conversation.already(talker, reserved)
        terms = Terms(entry.record, reserved.attempt, signed.digest, order)
        names = [holder.node for holder in terms.holders]
        certificate = b""
        record: KeyRecord | None = None
        try:
            dealt = self._deals(talker.channel, terms, raw_order, entry, deadline_s)
            failpoint(f"{step}.dealt")
            states = self._statements if reshare is None else self._state
            stated = states(talker.channel, terms, raw_order, entry, dealt, deadline_s)
            record = self._manifest(terms, raw_order, stated)
            failpoint(f"{step}.stated")
            receipts = self._renew(talker.channel, record, terms, entry, stated, reserved, deadline_s)
            failpoint(f"{step}.renewed")
            self._pass_on_settings(talker.channel, entry, names, deadline_s)
            certificate = self._conversation.ask_registry(
                talker.channel, REGISTRY_COMMIT, Commit(record.raw, receipts), deadline_s
            ).certificate
        except (EngineError, ValueError) as error:
            attempt = Outcome(order.key_id, reserved.attempt)
            certificate = self._conversation.give_up(talker.channel, order.name, attempt, names, error)
            if record is None:
                raise
        failpoint(f"{step}.committed")
        open_certificate(certificate, record, self._cluster)
        self._conversation.announce(talker.channel, record, certificate, names, deadline_s)
        failpoint(f"{step}.announced")
        warnings = []
        if reshare is not None:
            warnings = self._warnings(reshare) + self._dismiss(talker.channel, record, terms, certificate, deadline_s)
            failpoint("dealer.reshare.dismissed")
        return KeyDescription(record.raw, certificate, warnings[:16])

    def move(self, talker: Talker, orders: Sequence[bytes], deadline_s: float) -> list[MoveResult]:
        """Carry out a balancer's orders; what became of each, in order."""
        return [self._moved(talker, raw, deadline_s) for raw in orders]

    def _moved(self, talker: Talker, raw_order: bytes, deadline_s: float) -> MoveResult:
        key_id = read_change_order(raw_order).key_id
        try:
            described = self.change(talker, raw_order, deadline_s)
        except EngineError as error:
            return MoveResult(key_id, 0, error.code, str(error)[:MAX_TEXT])
        except ValueError as error:
            return MoveResult(key_id, 0, "invalid-request", str(error)[:MAX_TEXT])
        return MoveResult(key_id, read_key_manifest(described.manifest).manifest.epoch, "", "")

    def _pass_on_settings(self, channel: Channel, entry: Entry, names: Sequence[str], deadline_s: float) -> None:
        """Have new holders know the key's settings before their shares count."""
        newcomers = [name for name in names if entry.manifest.holder(name) is None]
        if entry.settings is not None and newcomers:
            self._conversation.spread_settings(channel, entry.settings.raw, newcomers, deadline_s)

    def _check(self, entry: Entry) -> None:
        name = entry.row.name
        if entry.manifest.threshold < 2:
            raise ValueError(f"{name!r} has threshold 1: its share is the key itself, and no refresh changes it")
        if not entry.row.sealed:
            raise QuorumUnavailable(
                f"{self._node} is a holder of {name!r}, but has no share; a refresh needs all", [self._node]
            )
        check_size(entry.record, len(entry.row.sealed))  # a little more than the share's own length

    def _check_reshare(self, entry: Entry, raw_order: bytes, order: ReshareOrder) -> None:
        manifest = entry.manifest
        names = [holder.node for holder in manifest.holders]
        strangers = [name for name in order.without if name not in names]
        if strangers:
            raise ValueError(
                f"{', '.join(strangers)} is no holder of {order.name!r}, and so there is nothing to give up"
            )
        dealers = [name for name in names if name not in order.without]
        if emptied := [name for name in order.holders if name in self._cluster.draining and name not in names]:
            raise ValueError(f"{', '.join(emptied)} is draining, and can't be given a share of {order.name!r}")
        if len(dealers) <= manifest.threshold:
            raise ValueError(
                f"{order.name!r} can't be reshared by {len(dealers)} of its {len(names)} holders: it takes "
                f"{manifest.threshold + 1}, one more than its threshold, to see that none deals a false share"
            )
        check_reshare_size(entry.record, entry.row.certificate, raw_order, order, len(entry.row.sealed))

    def _warnings(self, order: ReshareOrder) -> list[str]:
        """What is to be said of the placement that the client ordered."""
        level = self._cluster.domain_level
        return list(check_placement(self._cluster.locations, order.holders, order.threshold, domain_level=level))

    def _dismiss(
        self, channel: Channel, record: KeyRecord, terms: Terms, certificate: bytes, deadline_s: float
    ) -> list[str]:
        """Have the holders of before that are none any more erase their share; a warning of those that did not say so.

        They learn it from the registry's books, too.
        """
        leaving = [each.node for each in terms.before.manifest.holders if record.manifest.holder(each.node) is None]
        body = REQUEST_CODECS[SHARE_LEAVE].encode(ShareLeave(record.raw, certificate))
        until_s = min(deadline_s, self._clock() + COMMIT_WAIT_S)
        pending = []
        here = [name for name in leaving if name in self._cluster.nodes]
        for name, reply in self._conversation.ask_all(channel, SHARE_LEAVE, dict.fromkeys(here, body), until_s, None):
            if isinstance(reply, EngineError):
                log.warning("a share is not erased yet", key=record.manifest.name, holder=name, reason=str(reply))
                pending.append(name)
        return [f"{', '.join(pending)} did not say yet that its old share is erased"] if pending else []

    def _everybody(
        self, channel: Channel, verb: str, messages: dict[str, Any], deadline_s: float, what: str
    ) -> dict[str, Any]:
        """The replies of all these; else the first refusal, or ``QuorumUnavailable`` that names the silent."""
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
            raise QuorumUnavailable(f"{what} needs all {len(bodies)} holders ({told})", list(silent))
        return replies

    def _deals(self, channel: Channel, terms: Terms, raw_order: bytes, entry: Entry, deadline_s: float) -> list[_Dealt]:
        """A deal of every dealer, in the manifest's order. Those that don't verify are left out of a refresh."""
        message = ShareDeal(raw_order, terms.attempt, entry.record.digest, entry.row.certificate)
        now = self._clock()
        until_s = now + (deadline_s - now) * DEAL_PART
        names = [holder.node for holder in terms.dealers]
        replies = self._everybody(channel, SHARE_DEAL, dict.fromkeys(names, message), until_s, _what(terms))
        dealt = []
        for name in names:
            reply = replies[name]
            try:
                deal = open_deal(terms, reply.statement, self._cluster)
                if deal.dealer.node != name or len(reply.parts) != len(terms.holders):
                    raise ManifestError(f"{name} sent the deal of another, or {len(reply.parts)} parts")
            except EngineError as error:
                if isinstance(terms.change, ReshareOrder):
                    raise ShareCorrupt(f"{entry.row.name!r}: {name} sent a bad deal: {error}", [name]) from None
                log.error("bad deal", key=entry.row.name, dealer=name, reason=str(error))
                continue
            dealt.append(_Dealt(reply.statement, deal, tuple(reply.parts)))
        return dealt

    def _statements(
        self,
        channel: Channel,
        terms: Terms,
        raw_order: bytes,
        entry: Entry,
        dealt: Sequence[_Dealt],
        deadline_s: float,
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
                return self._state(channel, terms, raw_order, entry, chosen, deadline_s)
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
        self,
        channel: Channel,
        terms: Terms,
        raw_order: bytes,
        entry: Entry,
        chosen: Sequence[_Dealt],
        deadline_s: float,
    ) -> _Stated:
        deals = open_deals(terms, [each.raw for each in chosen], self._cluster)
        raw_deals = [each.raw for each in chosen]
        names = [holder.node for holder in terms.holders]
        dealt = {name: [each.parts[place] for each in chosen] for place, name in enumerate(names)}
        messages: dict[str, ShareRefresh | ShareReshare]
        if isinstance(terms.change, ReshareOrder):
            before = terms.before.raw, entry.row.certificate
            messages = {
                name: ShareReshare(*before, raw_order, terms.attempt, raw_deals, parts) for name, parts in dealt.items()
            }
            verb, check = SHARE_RESHARE, check_sub_shares
        else:
            messages = {name: ShareRefresh(raw_order, terms.attempt, raw_deals, parts) for name, parts in dealt.items()}
            verb, check = SHARE_REFRESH, check_parts
        replies = self._everybody(channel, verb, messages, deadline_s, _what(terms))
        raws = tuple(replies[name].statement for name in names)
        statements = tuple(open_part_statement(terms, deals, raw, self._cluster) for raw in raws)
        check(terms, deals, statements)
        return _Stated(tuple(chosen), raws, statements)

    def _manifest(self, terms: Terms, raw_order: bytes, stated: _Stated) -> KeyRecord:
        """The manifest of the new epoch: the one before with the new commitments, and what a reshare changes."""
        before, change = terms.before, terms.change
        reshare = isinstance(change, ReshareOrder)
        signed_by_client = reshare and not change.fencing
        manifest = replace(
            before.manifest,
            threshold=change.threshold if isinstance(change, ReshareOrder) else before.manifest.threshold,
            sharing=b"" if signed_by_client else before.manifest.resharing,
            placing=b"" if reshare else before.manifest.moving,
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
        entry: Entry,
        stated: _Stated,
        reserved: Reserved,
        deadline_s: float,
    ) -> list[bytes]:
        """Have every holder store its new share; their receipts."""
        raw_deals, raws, aborts = [each.raw for each in stated.deals], list(stated.raws), list(reserved.aborts)
        before = terms.before.raw, entry.row.certificate
        reshare = isinstance(terms.change, ReshareOrder)
        messages: dict[str, ShareRenew | ShareAccept] = {}
        for place, holder in enumerate(terms.holders):
            parts = [each.parts[place] for each in stated.deals]
            messages[holder.node] = (
                ShareAccept(*before, record.raw, raw_deals, parts, raws, aborts)
                if reshare
                else ShareRenew(record.raw, raw_deals, parts, raws, aborts)
            )
        verb = SHARE_ACCEPT if reshare else SHARE_RENEW
        replies = self._everybody(channel, verb, messages, deadline_s, _what(terms))
        receipts = []
        for name, reply in replies.items():
            if open_receipt(reply.receipt, record, self._cluster) != name:
                raise ManifestError(f"{name} sent the receipt of another")
            receipts.append(reply.receipt)
        return receipts


def _what(terms: Terms) -> str:
    kind = "reshare" if isinstance(terms.change, ReshareOrder) else "refresh"
    return f"{terms.before.manifest.name}: a {kind}"
