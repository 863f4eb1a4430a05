"""The coordinator of a refresh or reshare: it carries what the holders say to each other, and has the registry commit.

It runs on the ``dealer`` worker and may wait for peers. It can read no part that is dealt, and nobody takes its word:
each holder checks the statements of all others for itself (``nodes.renewer``). Until the registry has committed, the
old epoch is the valid one; whatever fails before is aborted and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    RefreshOrder,
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
    SHARE_ACCEPT,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_LEAVE,
    SHARE_REFRESH,
    SHARE_RENEW,
    SHARE_RESHARE,
    SHARE_TRIAL,
    Change,
    Commit,
    KeyDescription,
    MoveResult,
    Outcome,
    Reserved,
    ShareAccept,
    ShareCommit,
    ShareDeal,
    ShareLeave,
    ShareRefresh,
    ShareRenew,
    ShareReshare,
    ShareTrial,
)
from engine.protocol.reshare import check_reshare_size, check_sub_shares
from engine.protocol.signed import SigningKey, encode_body, sign_bodies
from engine.sharing import check_placement
from nodes.bundles import ask_many, ask_registry_many
from nodes.catalogue import Catalogue, Entry
from nodes.deal import COMMIT_WAIT_S, Conversation, Talker
from nodes.orders import BalancerOrders

__all__ = ["Coordinator"]

MAX_TEXT: Final = 200
DEAL_PART: Final = 0.5
"""Of the time that is left, the holders get this part to deal: a silent one is told early."""

NONE_RESERVED: Final = Reserved(0, [], [], b"", b"")

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


@dataclass(slots=True, eq=False)
class _Job:
    """One key that is being changed, as far as it has come; ``outcome`` is there once nothing is left to do."""

    raw_order: bytes
    order: RefreshOrder | ReshareOrder
    entry: Entry
    terms: Terms
    record: KeyRecord
    """Of the epoch before, until the new manifest is made."""
    reserved: Reserved = NONE_RESERVED
    dealt: list[_Dealt] = field(default_factory=list)
    stated: _Stated | None = None
    receipts: dict[str, bytes] = field(default_factory=dict)
    grant: bytes = b""
    """For the node that the order has try the new epoch."""
    certificate: bytes = b""
    error: EngineError | ValueError | None = None
    outcome: KeyDescription | EngineError | ValueError | None = None

    @property
    def reshares(self) -> bool:
        """Whether the key gets other holders; else its shares are refreshed."""
        return isinstance(self.order, ReshareOrder)

    @property
    def step(self) -> str:
        """What the names of its failpoints begin with."""
        return "dealer.reshare" if self.reshares else "dealer.refresh"

    @property
    def holders(self) -> list[str]:
        """The nodes that are to hold a share."""
        return [holder.node for holder in self.terms.holders]

    @property
    def before(self) -> tuple[bytes, bytes]:
        """The manifest and certificate of the epoch that is replaced."""
        return self.terms.before.raw, self.entry.row.certificate

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What fails in here ends this key's change, and no other's."""
        try:
            yield
        except (EngineError, ValueError) as error:
            self.error = error


class Coordinator(FollowsCluster):
    """Refreshes and reshares keys that this node holds a share of; many go through the same steps together."""

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

    def change(self, talker: Talker, raw_order: bytes, deadline_s: float, grant: bytes = b"") -> KeyDescription:
        """Replace the shares of the epoch that the order names; the description of the key after it.

        Idempotent: if that epoch is not the last one any more, there is nothing to do. ``QuorumUnavailable`` names the
        holders that are down; ``ValueError``: the key is too large for its number of shares, has threshold 1 and is to
        be refreshed, or has too few holders for a reshare that can be checked. ``grant`` is for the node that a reshare
        order has try the new epoch.
        """
        (outcome,) = self._carry_out(talker, [raw_order], deadline_s, grant)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def move(self, talker: Talker, orders: Sequence[bytes], deadline_s: float) -> list[MoveResult]:
        """Carry out a balancer's orders, each of another key; what became of each, in order."""
        ids = [read_change_order(raw).key_id for raw in orders]
        if len(set(ids)) != len(ids):
            raise ValueError("two orders for one key; each must be of another")
        outcomes = self._carry_out(talker, orders, deadline_s)
        return [_result(key_id, outcome) for key_id, outcome in zip(ids, outcomes, strict=True)]

    def _carry_out(
        self, talker: Talker, orders: Sequence[bytes], deadline_s: float, grant: bytes = b""
    ) -> list[KeyDescription | EngineError | ValueError]:
        """The orders, step by step for all that have come so far; what each came to."""
        made = [self._opened(raw) for raw in orders]
        jobs = [each for each in made if isinstance(each, _Job)]
        for job in jobs:
            job.grant = grant
        channel = talker.channel
        made_new = (self._reserve, self._deals, self._statements, self._renew)
        for step in (*made_new, self._pass_on_settings, self._try, self._commit):
            if live := [job for job in jobs if job.error is None and job.outcome is None]:
                step(talker, live, deadline_s)
        for job in jobs:
            if job.error is not None:
                self._give_up(channel, job, job.error)
        if live := [job for job in jobs if job.outcome is None]:
            self._announce(channel, live, deadline_s)
        outcomes = [each.outcome if isinstance(each, _Job) else each for each in made]
        return [each for each in outcomes if each is not None]

    def _opened(self, raw_order: bytes) -> _Job | KeyDescription | EngineError | ValueError:
        """The job that an order is, or what is to be said of it at once."""
        try:
            return self._begun(raw_order)
        except (EngineError, ValueError) as error:
            return error

    def _begun(self, raw_order: bytes) -> _Job | KeyDescription:
        order, signed = open_change_order(raw_order, self._cluster, self._now_ms())
        entry = self._catalogue.by_id(order.key_id)
        if entry is None or entry.row.state != "moved":
            entry = self._catalogue.committed(order.key_id)
        if entry.row.name != order.name:
            raise ManifestError(f"the order names {order.name!r}, the key is {entry.row.name!r}")
        if entry.row.epoch > order.from_epoch:
            return KeyDescription(entry.row.manifest, entry.row.certificate, [], b"")
        if entry.row.state == "moved":
            raise StaleKey(f"{self._node} holds no share of {order.name!r}, which others hold")
        if entry.row.epoch < order.from_epoch:
            raise StaleKey(f"{self._node} knows epoch {entry.row.epoch} of {order.name!r}, not {order.from_epoch} yet")
        self._orders.check(order, signed, entry.manifest)
        if isinstance(order, ReshareOrder):
            self._check_reshare(entry, raw_order, order)
        else:
            self._check(entry)
        return _Job(raw_order, order, entry, Terms(entry.record, 1, signed.digest, order), entry.record)

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
        if len(dealers) < manifest.threshold + (not order.trial):
            more = (
                ""
                if order.trial
                else ", one more than its threshold, to see that none deals a false share, or a client's "
                "`key reshare --without`, which tries the key"
            )
            raise ValueError(
                f"{order.name!r} can't be reshared by {len(dealers)} of its {len(names)} holders: it takes "
                f"{manifest.threshold + (not order.trial)}{more}"
            )
        check_reshare_size(entry.record, entry.row.certificate, raw_order, order, len(entry.row.sealed))

    # --- the steps, each for all jobs that have come so far ---

    def _reserve(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """An attempt for each, of the registry; or what it knows to be done already."""
        changes = [Change(job.raw_order, *job.before) for job in jobs]
        asker, channel = self._conversation, talker.channel
        for job, reserved in zip(
            jobs, ask_registry_many(asker, channel, REGISTRY_CHANGE, changes, deadline_s), strict=True
        ):
            if isinstance(reserved, EngineError):
                job.outcome = reserved
                continue
            failpoint(f"{job.step}.reserved")
            if reserved.attempt == 0:
                job.outcome = self._already(talker, reserved)
                continue
            job.reserved = reserved
            job.terms = Terms(job.entry.record, reserved.attempt, job.terms.order, job.order)

    def _already(self, talker: Talker, reserved: Reserved) -> KeyDescription | EngineError:
        try:
            return self._conversation.already(talker, reserved)
        except EngineError as error:
            return error

    def _deals(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """A deal of every dealer, in the manifest's order. Those that don't verify are left out of a refresh."""
        now = self._clock()
        until_s = now + (deadline_s - now) * DEAL_PART
        asked = [
            (job, holder.node, ShareDeal(job.raw_order, job.terms.attempt, job.entry.record.digest, job.before[1]))
            for job in jobs
            for holder in job.terms.dealers
        ]
        for job, replies in self._ask(talker.channel, SHARE_DEAL, asked, until_s):
            with job.guarded():
                job.dealt = self._checked_deals(job, _whole(job, replies))
                failpoint(f"{job.step}.dealt")

    def _checked_deals(self, job: _Job, replies: dict[str, Any]) -> list[_Dealt]:
        dealt = []
        for name, reply in replies.items():
            try:
                deal = open_deal(job.terms, reply.statement, self._cluster)
                if deal.dealer.node != name or len(reply.parts) != len(job.terms.holders):
                    raise ManifestError(f"{name} sent the deal of another, or {len(reply.parts)} parts")
            except EngineError as error:
                if job.reshares:
                    raise ShareCorrupt(f"{job.order.name!r}: {name} sent a bad deal: {error}", [name]) from None
                log.error("bad deal", key=job.order.name, dealer=name, reason=str(error))
                continue
            dealt.append(_Dealt(reply.statement, deal, tuple(reply.parts)))
        return dealt

    def _statements(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """Every new holder's statement: on all deals of a reshare, on the first t of a refresh that all can use.

        A dealer that is named as wrong in a refresh is left out, and the next one taken in its place.
        """
        for verb, some in (
            (SHARE_REFRESH, [job for job in jobs if not job.reshares]),
            (SHARE_RESHARE, [job for job in jobs if job.reshares]),
        ):
            pending = [(job, list(job.dealt)) for job in some]
            while pending:
                pending = self._state(talker.channel, verb, pending, deadline_s)
        bodies: dict[_Job, bytes] = {}
        for job in jobs:
            if job.error is None:
                with job.guarded():
                    bodies[job] = self._manifest(job)
        for job, raw in zip(bodies, sign_bodies(list(bodies.values()), self._signing), strict=True):
            with job.guarded():
                record = open_key_manifest(raw, self._cluster)
                check_successor(record, job.terms.before)
                job.record = record
                failpoint(f"{job.step}.stated")

    def _state(
        self, channel: Channel, verb: str, pending: Sequence[tuple[_Job, list[_Dealt]]], deadline_s: float
    ) -> list[tuple[_Job, list[_Dealt]]]:
        """Ask for the statements once; those that are to be asked again, with the deals that are left."""
        chosen: dict[_Job, tuple[_Dealt, ...]] = {}
        deals: dict[_Job, list[Deal]] = {}
        asked: list[tuple[_Job, str, object]] = []
        for job, usable in pending:
            with job.guarded():
                some = tuple(usable if job.reshares else usable[: job.terms.before.manifest.threshold])
                deals[job] = open_deals(job.terms, [each.raw for each in some], self._cluster)
                chosen[job] = some
                asked += [(job, name, message) for name, message in self._questions(job, some)]
        again = []
        left = dict(pending)
        for job, replies in self._ask(channel, verb, asked, deadline_s):
            with job.guarded():
                try:
                    job.stated = self._checked_statements(job, chosen[job], deals[job], _whole(job, replies))
                except ShareCorrupt as error:
                    rest = _without_named(chosen[job], left[job], error)
                    if job.reshares or len(rest) == len(left[job]) or len(rest) < job.terms.before.manifest.threshold:
                        raise
                    log.error("bad deal", key=job.order.name, dealer=error.holders[0], reason=str(error))
                    again.append((job, rest))
        return again

    def _questions(self, job: _Job, chosen: Sequence[_Dealt]) -> Iterator[tuple[str, ShareRefresh | ShareReshare]]:
        raws = [each.raw for each in chosen]
        for place, name in enumerate(job.holders):
            parts = [each.parts[place] for each in chosen]
            if job.reshares:
                yield name, ShareReshare(*job.before, job.raw_order, job.terms.attempt, raws, parts)
            else:
                yield name, ShareRefresh(job.raw_order, job.terms.attempt, raws, parts)

    def _checked_statements(
        self, job: _Job, chosen: tuple[_Dealt, ...], deals: list[Deal], replies: dict[str, Any]
    ) -> _Stated:
        raws = tuple(replies[name].statement for name in job.holders)
        statements = tuple(open_part_statement(job.terms, deals, raw, self._cluster) for raw in raws)
        (check_sub_shares if job.reshares else check_parts)(job.terms, deals, statements)
        return _Stated(chosen, raws, statements)

    def _manifest(self, job: _Job) -> bytes:
        """The manifest of the new epoch, to be signed: that of before with what a refresh or reshare changes."""
        before, order, stated = job.terms.before, job.order, job.stated
        if stated is None:
            raise ShareCorrupt(
                f"{order.name!r}: {len(job.dealt)} holders dealt as they must, {before.manifest.threshold} are needed"
            )
        of_client = job.reshares and not order.fencing
        manifest = replace(
            before.manifest,
            threshold=order.threshold if isinstance(order, ReshareOrder) else before.manifest.threshold,
            sharing=b"" if of_client else before.manifest.resharing,
            placing=b"" if job.reshares else before.manifest.moving,
            epoch=job.terms.epoch,
            attempt=job.terms.attempt,
            holders=[Holder(each.holder.node, each.holder.x, each.commitment) for each in stated.statements],
            previous=before.digest,
            change=job.raw_order,
        )
        return encode_body("key", self._now_ms(), key_manifests.encode(manifest), self._node)

    def _renew(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """Have every holder store its new share; their receipts."""
        for verb, some in (
            (SHARE_RENEW, [job for job in jobs if not job.reshares]),
            (SHARE_ACCEPT, [job for job in jobs if job.reshares]),
        ):
            for job, replies in self._stored(talker.channel, verb, some, deadline_s):
                with job.guarded():
                    for name, reply in _whole(job, replies).items():
                        if open_receipt(reply.receipt, job.record, self._cluster) != name:
                            raise ManifestError(f"{name} sent the receipt of another")
                        job.receipts[name] = reply.receipt
                    failpoint(f"{job.step}.renewed")

    def _stored(
        self, channel: Channel, verb: str, jobs: Sequence[_Job], deadline_s: float
    ) -> list[tuple[_Job, dict[str, Any]]]:
        """What the holders reply; of many keys, only who has forgotten what its statement was on is told that again."""
        brief = len(jobs) > 1
        asked = [(job, name, message) for job in jobs for name, message in _renewals(job, brief=brief)]
        found = dict(self._ask(channel, verb, asked, deadline_s))
        again = [
            (job, name, message)
            for job, replies in found.items()
            if brief and any(isinstance(reply, StaleKey) for reply in replies.values())
            for name, message in _renewals(job)
            if isinstance(replies[name], StaleKey)
        ]
        for job, replies in self._ask(channel, verb, again, deadline_s):
            found[job] |= replies
        return list(found.items())

    def _pass_on_settings(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """Have new holders know the keys' settings before their shares count."""
        for job in jobs:
            newcomers = [name for name in job.holders if job.entry.manifest.holder(name) is None]
            if job.entry.settings is not None and newcomers:
                with job.guarded():
                    self._conversation.spread_settings(talker.channel, job.entry.settings.raw, newcomers, deadline_s)

    def _try(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        """Have the node that an order names combine the new epoch; its receipt then says whether it is the key."""
        for job in jobs:
            order = job.order
            if not isinstance(order, ReshareOrder) or not order.trial:
                continue
            message = ShareTrial(order.key_id, job.record.digest, job.grant)
            ((_, replies),) = self._ask(talker.channel, SHARE_TRIAL, [(job, order.trial, message)], deadline_s)
            with job.guarded():
                receipt = self._tried(job, order.trial, replies)
                if open_receipt(receipt, job.record, self._cluster) != order.trial:
                    raise ManifestError(f"{order.trial} sent the receipt of another")
                job.receipts[order.trial] = receipt
                failpoint("dealer.reshare.tried")

    @staticmethod
    def _tried(job: _Job, trial: str, replies: dict[str, Any]) -> bytes:
        """The receipt of the node that tried the new epoch; ``ShareCorrupt`` names all who may have lied."""
        try:
            return bytes(_whole(job, replies)[trial].receipt)
        except ShareCorrupt as error:
            dealers = [each.node for each in job.terms.dealers]
            raise ShareCorrupt(
                f"{job.order.name!r}: what {', '.join(dealers)} dealt gives another key, as the trial at {trial} "
                f"shows: one of them dealt a false share, or a new holder lies ({error})",
                list(dict.fromkeys([*dealers, *job.holders])),
            ) from None

    def _commit(self, talker: Talker, jobs: Sequence[_Job], deadline_s: float) -> None:
        messages = [Commit(job.record.raw, list(job.receipts.values())) for job in jobs]
        asker, channel = self._conversation, talker.channel
        for job, reply in zip(
            jobs, ask_registry_many(asker, channel, REGISTRY_COMMIT, messages, deadline_s), strict=True
        ):
            if isinstance(reply, EngineError):
                job.error = reply
            else:
                job.certificate = reply.certificate

    def _give_up(self, channel: Channel, job: _Job, error: EngineError | ValueError) -> None:
        """Have the registry abort the attempt; if only its reply was lost, the key goes on."""
        attempt = Outcome(job.order.key_id, job.reserved.attempt)
        names = [holder.node for holder in job.terms.holders]
        try:
            job.certificate = self._conversation.give_up(channel, job.order.name, attempt, names, error)
            if job.record is job.entry.record:
                raise error
        except (EngineError, ValueError) as failure:
            job.outcome = failure

    def _announce(self, channel: Channel, jobs: Sequence[_Job], deadline_s: float) -> None:
        """Tell the new holders, then those that leave. Who misses it learns it from a combiner or the registry."""
        told = []
        for job in jobs:
            failpoint(f"{job.step}.committed")
            try:
                open_certificate(job.certificate, job.record, self._cluster)
            except EngineError as error:
                job.outcome = error
                continue
            told.append(job)
        commits = [(job, name, ShareCommit(job.order.key_id, job.certificate)) for job in told for name in job.holders]
        until_s = min(deadline_s, self._clock() + COMMIT_WAIT_S)
        for job, replies in self._ask(channel, SHARE_COMMIT, commits, until_s):
            for name, reply in replies.items():
                if isinstance(reply, EngineError):
                    log.warning("commit not taken in yet", key=job.order.name, holder=name, reason=str(reply))
        for job in told:
            failpoint(f"{job.step}.announced")
        pending = self._dismiss(channel, [job for job in told if job.reshares], deadline_s)
        for job in told:
            warnings = [*self._warnings(job.order), *pending.get(job, [])] if job.reshares else []
            job.outcome = KeyDescription(job.record.raw, job.certificate, warnings[:16], b"")

    def _warnings(self, order: RefreshOrder | ReshareOrder) -> list[str]:
        """What is to be said of the placement that a client ordered."""
        if not isinstance(order, ReshareOrder) or order.fencing:
            return []
        level = self._cluster.domain_level
        return list(check_placement(self._cluster.locations, order.holders, order.threshold, domain_level=level))

    def _dismiss(self, channel: Channel, jobs: Sequence[_Job], deadline_s: float) -> dict[_Job, list[str]]:
        """Have the holders of before that are none any more erase their share; warnings of those that did not say so.

        They learn it from the registry's books, too.
        """
        asked: list[tuple[_Job, str, object]] = []
        for job in jobs:
            message = ShareLeave(job.record.raw, job.certificate)
            leaving = {each.node for each in job.terms.before.manifest.holders} - set(job.holders)
            asked += [(job, name, message) for name in sorted(leaving) if name in self._cluster.nodes]
        until_s = min(deadline_s, self._clock() + COMMIT_WAIT_S)
        warnings: dict[_Job, list[str]] = {}
        for job, replies in self._ask(channel, SHARE_LEAVE, asked, until_s):
            pending = [name for name, reply in replies.items() if isinstance(reply, EngineError)]
            for name in pending:
                reason = str(replies[name])
                log.warning("a share is not erased yet", key=job.order.name, holder=name, reason=reason)
            if pending:
                warnings[job] = [f"{', '.join(pending)} did not say yet that its old share is erased"]
        if jobs:
            failpoint("dealer.reshare.dismissed")
        return warnings

    def _ask(
        self, channel: Channel, verb: str, asked: Sequence[tuple[_Job, str, object]], deadline_s: float
    ) -> list[tuple[_Job, dict[str, Any]]]:
        """Each job with what its nodes replied, errors too."""
        replies = ask_many(self._conversation, channel, verb, [(name, each) for _, name, each in asked], deadline_s)
        found: dict[_Job, dict[str, Any]] = {}
        for (job, name, _), reply in zip(asked, replies, strict=True):
            found.setdefault(job, {})[name] = reply
        return list(found.items())


def _whole(job: _Job, replies: dict[str, Any]) -> dict[str, Any]:
    """The replies of all that were asked; else the first refusal, or ``QuorumUnavailable`` that names the silent."""
    silent: dict[str, EngineError] = {}
    for name, reply in replies.items():
        if isinstance(reply, NodeUnavailable | DeadlineExceeded):
            silent[name] = reply
        elif isinstance(reply, EngineError):
            raise reply
    if silent:
        told = "; ".join(f"{name}: {error}" for name, error in silent.items())
        raise QuorumUnavailable(f"{_what(job.terms)} needs all {len(replies)} holders ({told})", list(silent))
    return replies


def _without_named(chosen: Sequence[_Dealt], usable: Sequence[_Dealt], error: ShareCorrupt) -> list[_Dealt]:
    """The deals that are left without that of the dealer which an error names first."""
    named = {each.deal.dealer.node for each in chosen} & set(error.holders[:1])
    return [each for each in usable if each.deal.dealer.node not in named]


def _renewals(job: _Job, *, brief: bool = False) -> Iterator[tuple[str, ShareRenew | ShareAccept]]:
    """What each holder is to store; ``brief``: without what its statement was on, which it has at hand."""
    stated = job.stated or _Stated((), (), ())
    raws, deals, aborts = list(stated.raws), [each.raw for each in stated.deals], list(job.reserved.aborts)
    for place, name in enumerate(job.holders):
        parts = [each.parts[place] for each in stated.deals]
        if brief and job.reshares:
            yield name, ShareAccept(b"", b"", job.record.raw, [], [], raws, aborts)
        elif brief:
            yield name, ShareRenew(job.record.raw, [], [], raws, aborts)
        elif job.reshares:
            yield name, ShareAccept(*job.before, job.record.raw, deals, parts, raws, aborts)
        else:
            yield name, ShareRenew(job.record.raw, deals, parts, raws, aborts)


def _result(key_id: bytes, outcome: KeyDescription | EngineError | ValueError) -> MoveResult:
    if isinstance(outcome, KeyDescription):
        return MoveResult(key_id, read_key_manifest(outcome.manifest).manifest.epoch, "", "")
    code = outcome.code if isinstance(outcome, EngineError) else "invalid-request"
    return MoveResult(key_id, 0, code, str(outcome)[:MAX_TEXT])


def _what(terms: Terms) -> str:
    kind = "reshare" if isinstance(terms.change, ReshareOrder) else "refresh"
    return f"{terms.before.manifest.name}: a {kind}"
