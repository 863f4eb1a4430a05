"""The verbs of a node: what happens to a request from its arrival to its reply. It owns no socket and no thread.

Quick work (an operation with a loaded key, a look-up) is done at once on the loop's own lane. What writes or releases
shares goes to the ``local`` worker, slow token operations to ``slow``, gathering to the ``talkers``, and what makes or
destroys keys to the ``dealer``: none blocks the loop, and none keeps another kind waiting. Requests for a key that is
being gathered wait for that one gathering.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, NoReturn, Protocol

import structlog
from msgspec import structs

from engine._version import __version__
from engine.client._router import Connection
from engine.client.admission import Admission, Clients, ServiceLimits, welcome
from engine.client.bundles import answer_bundle, check_bundle
from engine.client.listener import IDLE, Incoming
from engine.client.membership import Membership
from engine.client.speech import spoken
from engine.client.spreading import Desk, Gossip
from engine.errors import (
    AccessDenied,
    AuditUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyDisabled,
    KeyNotFound,
    KeyPending,
    NeedGrant,
    NodeUnavailable,
    OlderVersion,
    Overloaded,
    ProtocolError,
    RegistryUnavailable,
    StaleKey,
    TokenError,
    VersionRetired,
)
from engine.failpoints import failpoint
from engine.keys import OPERATIONS, PRODUCING, USES, KeyKind, RequestType
from engine.protocol import audit as chain
from engine.protocol.audit import Record
from engine.protocol.ciphertext import version_in
from engine.protocol.grant import check_grant, read_grant
from engine.protocol.manifest import (
    Cluster,
    ClusterSource,
    CreateOrder,
    FollowsCluster,
    Member,
    RefreshOrder,
    ReshareOrder,
    aborts,
    destroy_orders,
    open_change_order,
    open_create_order,
    open_destroy_order,
    open_refresh_order,
    open_reshare_order,
    read_certificate,
    read_change_order,
    read_key_manifest,
)
from engine.protocol.requests import (
    AUDIT_HEAD,
    BOOKS,
    BUNDLE_MAX,
    HELLO,
    LATENCY,
    MANIFEST_FETCH,
    MANIFEST_OFFER,
    MOVE,
    REPLY_CODECS,
    REQUEST_CODECS,
    SHARE_ABORT,
    SHARE_ACCEPT,
    SHARE_COMMIT,
    SHARE_DEAL,
    SHARE_DESTROY,
    SHARE_EXPORT,
    SHARE_LEAVE,
    SHARE_MANY,
    SHARE_PREPARE,
    SHARE_RECALL,
    SHARE_REFRESH,
    SHARE_RELEASE,
    SHARE_RENEW,
    SHARE_RESHARE,
    SHARE_RESTORE,
    SHARE_SETTINGS,
    SHARE_TRIAL,
    STAGES,
    STATS,
    Abort,
    AuditNotice,
    Bundle,
    BundleResults,
    CacheCount,
    ClassCount,
    Create,
    Describe,
    Destroy,
    Empty,
    Flush,
    Flushed,
    Hello,
    HolderLatency,
    HostHealth,
    KeyDescription,
    KeyEntry,
    KeyList,
    ListKeys,
    ManifestFetch,
    ManifestOffer,
    Move,
    MoveResults,
    NodeLatency,
    NodeStats,
    NodeStatus,
    Operate,
    OutcomeReply,
    Prewarm,
    Refresh,
    Reshare,
    Result,
    Rewrap,
    Rewrapped,
    RewrapResult,
    ServiceCount,
    Settings,
    ShareAccept,
    ShareCommit,
    ShareDeal,
    ShareExport,
    ShareLeave,
    SharePrepare,
    ShareRecall,
    ShareRefresh,
    ShareRelease,
    ShareRenew,
    ShareReshare,
    ShareRestore,
    ShareSettings,
    ShareTrial,
    Sync,
    SyncEntry,
    TokenHealth,
    classify_request,
)
from engine.protocol.settings import SettingsRecord, open_settings, read_settings, state_of
from engine.protocol.signed import Signed, read_unverified
from engine.protocol.wire import (
    ErrorBody,
    Load,
    Request,
    Status,
    error_codec,
)
from engine.sharing import unblind
from nodes._fastpath import FastPath, Plan
from nodes.archive import Exporter, Restorer
from nodes.audit import AuditLog
from nodes.bundles import sign_replies
from nodes.cache import Cache, CacheLimits, CacheStatistics
from nodes.catalogue import Catalogue, Entry
from nodes.deal import Conversation, Cursor, Gathered, Talker
from nodes.health import Kind, TokenFault
from nodes.heavy import WINDOW_S, HeavyHitters, PairCounts
from nodes.holder import ShareHolder
from nodes.latency import (
    AUDIT,
    CACHE,
    GATHER,
    OTHER,
    PARSE,
    POLICY,
    REPLY,
    TOKEN,
    TOTAL,
    WAIT,
    WORK,
    Buckets,
    Latencies,
)
from nodes.ledger import GrantLedger
from nodes.limits import GenerationLimit
from nodes.operations import bound, check_operation, most_data
from nodes.orders import BalancerOrders
from nodes.policy import check_key, check_verb
from nodes.quotas import Quotas
from nodes.refresh import Coordinator
from nodes.remember import SignatureCache
from nodes.renewer import Renewer
from nodes.returning import LackingReport, Returning, booked, recalled
from nodes.token import Lane, LoadedKey, Token, Use, is_slow
from nodes.tracing import NO_SPANS, Span, Tracer, child_of
from nodes.trial import Trial
from nodes.witness import Heard, Witness
from nodes.workers import Worker

__all__ = ["Handlers", "Moved", "Replier", "Snapshot"]

MOVED_MAX: Final = 8
"""How many combiners a ``moved`` reply names."""
LEASE_USES: Final = 64
"""Warm uses that a plan has admitted in advance, so that limits and cache are asked for many at a time ..."""
LEASE_S: Final = 0.01
"""... and for how long. Any request of the ordinary way, and every pause, ends that."""
LOOK_AGAIN_S: Final = 1.0
"""How often at most it does so because somebody spoke of an epoch, version or key that it does not know."""
BOOKS_EVERY_S: Final = 5.0
"""How often the node asks the registry what changed of its keys; a destruction that it missed is carried out then."""
HELD_BACK: Final = frozenset({*OPERATIONS, RequestType.PREWARM})
"""Uses of keys, which a node that has just started keeps until it has asked what became of them."""
DURABLE_VERBS: Final = frozenset(
    {
        RequestType.GENERATE,
        RequestType.IMPORT,
        RequestType.ROTATE,
        RequestType.DESTROY,
        RequestType.REFRESH,
        RequestType.RESHARE,
        MOVE,
        RequestType.SETTINGS,
        SHARE_PREPARE,
        SHARE_COMMIT,
        SHARE_ABORT,
        SHARE_RELEASE,
        SHARE_DESTROY,
        SHARE_RENEW,
        SHARE_ACCEPT,
        SHARE_TRIAL,
        SHARE_LEAVE,
        SHARE_SETTINGS,
        SHARE_MANY,
        SHARE_EXPORT,
        SHARE_RESTORE,
    }
)
"""Verbs whose audit record is on the disk before the reply goes out, in every mode."""
UNRECORDED: Final = frozenset({HELLO, MANIFEST_FETCH, STATS, BOOKS, AUDIT_HEAD, SHARE_RECALL})
"""Verbs that are recorded only where they fail: introductions, manifests and documents of keys that are asked for,
figures for the balancer, and heads, which have their own records."""
WITHOUT_TOKEN: Final = frozenset(
    {
        RequestType.DESCRIBE,
        RequestType.LIST,
        RequestType.FLUSH,
        RequestType.STATUS,
        RequestType.SETTINGS,
        HELLO,
        MANIFEST_FETCH,
        MANIFEST_OFFER,
        STATS,
        BOOKS,
        LATENCY,
        AUDIT_HEAD,
        SHARE_COMMIT,
        SHARE_ABORT,
        SHARE_DESTROY,
        SHARE_LEAVE,
        SHARE_SETTINGS,
        SHARE_RECALL,
    }
)
"""Verbs that need no token, and are served while it is out of service."""
ALWAYS_ANSWERED: Final = frozenset({HELLO, RequestType.STATUS})
"""Verbs that are answered also while no record can be written."""
HEADS_EVERY_S: Final = 1.0
"""How often the node looks whether others are to be told of its audit log's head."""
HEADS_RETRY_S: Final = 10.0
"""The same after one of them could not be told."""
HEADS_TIMEOUT_S: Final = 1.0
QUOTA_TIMEOUT_S: Final = 5.0
"""How long the registry is asked ahead for more uses of a key."""
FAREWELL_S: Final = 0.3
"""What a node that stops gives the others to take in its last head."""
MAX_ERROR_DETAIL: Final = 200
STEPS: Final[dict[str, str]] = {
    **dict.fromkeys(USES, "combiner.operate"),
    RequestType.GENERATE: "dealer.create",
    RequestType.IMPORT: "dealer.create",
    RequestType.ROTATE: "dealer.create",
    RequestType.DESTROY: "dealer.destroy",
    RequestType.REFRESH: "dealer.refresh",
    RequestType.RESHARE: "dealer.reshare",
    MOVE: "dealer.move",
    RequestType.SETTINGS: "dealer.settings",
    SHARE_PREPARE: "holder.prepare",
    SHARE_COMMIT: "holder.commit",
    SHARE_ABORT: "holder.abort",
    SHARE_RELEASE: "holder.release",
    SHARE_DESTROY: "holder.destroy",
    SHARE_DEAL: "holder.deal",
    SHARE_REFRESH: "holder.refresh",
    SHARE_RENEW: "holder.renew",
    SHARE_RESHARE: "holder.reshare",
    SHARE_ACCEPT: "holder.accept",
    SHARE_TRIAL: "holder.trial",
    SHARE_LEAVE: "holder.leave",
    SHARE_SETTINGS: "holder.settings",
    SHARE_MANY: "holder.many",
    SHARE_EXPORT: "holder.export",
    SHARE_RESTORE: "holder.restore",
}
"""Verb -> the failpoints of its end: ``.recorded`` once the audit record is durable, ``.answered`` after the reply."""
RECORDED: Final = {verb: f"{step}.recorded" for verb, step in STEPS.items()}
ANSWERED: Final = {verb: f"{step}.answered" for verb, step in STEPS.items()}
REPLY_MARGIN_S: Final = 0.05
REPLY_PART: Final = 0.25
"""What a gathering leaves of the client's deadline for its answer: so much, and of a short one that part at most."""
COMPLAIN_EVERY_S: Final = 60.0
"""How often the log repeats that the machine's clock is behind."""

log = structlog.get_logger()


class Moved(EngineError):
    """This node is no eligible combiner of the key; ``names`` are."""

    code = "moved"

    def __init__(self, key: str, names: Sequence[str]) -> None:
        super().__init__(f"{key!r} is not on this node; ask those named")
        self.names = tuple(names)


class Replier(Protocol):
    """Where replies go: the listener."""

    def reply(self, incoming: Incoming, status: int, body: bytes, load: Load = IDLE) -> None:
        """Answer a request."""

    def fail(self, incoming: Incoming, error: Exception, load: Load = IDLE) -> None:
        """Answer a request with an error."""


class Health(Protocol):
    """How the token is: its keeper."""

    @property
    def problem(self) -> str:
        """Why it serves nothing; empty if it serves."""

    def told(self) -> TokenHealth:
        """For ``status``."""


@dataclass(slots=True)
class _Call:
    """One request on its way. ``deadline_s`` is monotonic; ``service_us`` what its token operation took.

    ``busy_s`` is the processor time that making a key took.
    """

    incoming: Incoming
    number: int
    started_s: float
    deadline_s: float
    verb: str
    cluster: Cluster
    key: str = ""
    request_class: str = ""
    entry: Entry | None = None
    grant: bytes = b""
    service_us: int = 0
    busy_s: float = 0.0
    detail: str = ""
    recording: bool = True
    unused: int = 0
    """Uses of a limited key that were counted for it and not made yet."""
    cold_since_s: float = 0.0
    span: Span | None = None
    spent_s: list[float] = field(default_factory=lambda: [-1.0] * len(STAGES))
    """Seconds of each of ``STAGES``; negative where it was not there."""

    @property
    def gather_until_s(self) -> float:
        """Until when its key may be gathered: something of its time is left for the answer."""
        return self.deadline_s - min(REPLY_MARGIN_S, REPLY_PART * (self.deadline_s - self.started_s))

    def spend(self, stage: int, seconds: float) -> None:
        """Add to a stage's time."""
        self.spent_s[stage] = max(self.spent_s[stage], 0.0) + seconds


@dataclass(slots=True)
class _Loaded:
    """A loaded key, whether it lives on the slow worker's lane, and the bytes of its material."""

    key: LoadedKey
    slow: bool
    size: int


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request that waits for a gathering, its client's grant, and what to do with the key then."""

    call: _Call
    grant: bytes
    use: Callable[[_Loaded], None]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a node counts, at one instant: its status, its latencies, and the jobs that wait for each of its workers."""

    status: NodeStatus
    latencies: Sequence[Buckets]
    errors: Mapping[str, int]
    waiting: Mapping[str, int]


@dataclass(slots=True)
class _Count:
    requests: int = 0
    errors: int = 0
    busy_us: int = 0


class Handlers(FollowsCluster):
    """The node's behaviour. All methods are called by the loop's thread."""

    def __init__(
        self,
        *,
        node: str,
        boot: bytes,
        cluster: ClusterSource,
        token: Token,
        lane: Lane,
        catalogue: Catalogue,
        holder: ShareHolder,
        renewer: Renewer,
        conversation: Conversation,
        coordinator: Coordinator,
        trial: Trial,
        orders: BalancerOrders,
        audit: AuditLog,
        audit_strict: bool,
        audit_name: Callable[[str], str] | None,
        witness: Witness,
        local: Worker[Lane],
        slow: Worker[Lane],
        talkers: Worker[Talker],
        dealer: Worker[Talker],
        mover: Worker[Talker],
        replier: Replier,
        cache_limits: CacheLimits,
        signatures: SignatureCache,
        quotas: Quotas,
        ledger: GrantLedger,
        limits: ServiceLimits,
        health: Health,
        host: Callable[[], HostHealth],
        counts: Callable[[Admission], ServiceCount],
        network_us: Callable[[], int],
        generation: GenerationLimit,
        known: Callable[[Connection, str], bool] = lambda connection, member: False,
        connected: Callable[[str], int] = lambda member: 0,
        fast: FastPath | None = None,
        clock: Callable[[], float] = time.monotonic,
        tracer: Tracer = NO_SPANS,
        returning: Returning | None = None,
        curve_secrets: Callable[[], Sequence[bytes]] = tuple,
    ) -> None:
        self._node = node
        self._boot = boot
        self._boot_text = boot.hex()[:8]
        self._source = cluster
        self._desk = Desk(cluster, clock)
        self._gossip = Gossip(cluster, node)
        self._token = token
        self._lane = lane
        self._catalogue = catalogue
        self._holder = holder
        self._renewer = renewer
        self._conversation = conversation
        self._coordinator = coordinator
        self._trial = trial
        self._orders = orders
        self._audit = audit
        self._audit_strict = audit_strict
        self._audit_name = audit_name
        self._witness = witness
        self._next_heads_s = 0.0
        self._telling = False
        self._local = local
        self._slow = slow
        self._talkers = talkers
        self._dealer = dealer
        self._mover = mover
        self._replier = replier
        self._ledger = ledger
        self._limits = limits
        self._host = host
        self._health = health
        self._service_counts = counts
        self._network_us = network_us
        self._generation = generation
        self._known = known
        self._connected = connected
        self._clients = Clients()
        self._fast = fast
        self._now_ms = ledger.clock.now_ms
        self._writing_ledger = False
        self._clock_complaint = ""
        self.token_alarm = ""
        """What is wrong with the places of the nodes that share this one's token."""
        self._next_complaint_s = 0.0
        self._clock = clock
        self._started_s = self._clock()
        self._cache: Cache[tuple[bytes, int], _Loaded] = Cache(cache_limits, self._unload)
        self._signatures = signatures
        self._quotas = quotas
        self._gathering: dict[bytes, list[_Waiting]] = {}
        self._unloading: list[_Loaded] = []
        self._counts: dict[str, _Count] = {}
        self._latencies = Latencies()
        self._tracer = tracer
        self._pairs = PairCounts()
        self._hot = HeavyHitters()
        self._window_s = self._started_s
        self.number = 0
        self._admission = Admission(limits)
        self._cursor = Cursor()
        self._next_books_s = self._looked_s = 0.0
        self._asking_uses: dict[bytes, list[Callable[[Any, Exception | None], None]]] = {}
        self._doubted: set[bytes] = set()
        """Keys that were asked for while nobody had told whether they were made: the registry is asked."""
        self._settle_after_ms = 0
        self._catching_up = False
        self._returning = returning or Returning(cluster, node, holds=False)
        self._lacking = LackingReport(catalogue)
        self._exporter = Exporter(cluster, holder, catalogue, self._now_ms, clock)
        self._restorer = Restorer(cluster, curve_secrets, holder, self._now_ms, clock, self._pause)
        self._recalling = False
        self._next_recall_s = 0.0
        self._parked: list[tuple[_Call, Callable[[], None]]] = []
        self._verbs: dict[str, Callable[[_Call, Any], None]] = {
            **dict.fromkeys(OPERATIONS, self._operate),
            RequestType.GENERATE: self._create,
            RequestType.IMPORT: self._create,
            RequestType.ROTATE: self._create,
            RequestType.DESTROY: self._destroy,
            RequestType.REFRESH: self._refresh,
            RequestType.RESHARE: self._reshare,
            RequestType.SETTINGS: self._set,
            RequestType.DESCRIBE: self._describe,
            RequestType.LIST: self._list,
            RequestType.REWRAP: self._rewrap,
            RequestType.PREWARM: self._prewarm,
            RequestType.FLUSH: self._flush,
            RequestType.STATUS: self._status,
            HELLO: self._hello,
            MANIFEST_FETCH: self._manifest_fetch,
            MANIFEST_OFFER: self._manifest_offer,
            STATS: self._stats,
            BOOKS: self._books,
            LATENCY: self._latency,
            MOVE: self._move,
            SHARE_PREPARE: self._share_prepare,
            SHARE_COMMIT: self._share_commit,
            SHARE_ABORT: self._share_abort,
            SHARE_RELEASE: self._share_release,
            SHARE_DESTROY: self._share_destroy,
            AUDIT_HEAD: self._audit_head,
            SHARE_DEAL: self._share_deal,
            SHARE_REFRESH: self._share_refresh,
            SHARE_RENEW: self._share_renew,
            SHARE_RESHARE: self._share_reshare,
            SHARE_ACCEPT: self._share_accept,
            SHARE_TRIAL: self._share_trial,
            SHARE_LEAVE: self._share_leave,
            SHARE_SETTINGS: self._share_settings,
            SHARE_RECALL: self._share_recall,
            SHARE_MANY: self._share_many,
            SHARE_EXPORT: self._share_export,
            SHARE_RESTORE: self._share_restore,
        }
        self._bundled: dict[str, Callable[[Lane, Any, Member], object]] = {
            SHARE_DEAL: lambda lane, body, sender: renewer.deal(lane, body, sender),
            SHARE_REFRESH: lambda lane, body, sender: renewer.refresh(lane, body, sender),
            SHARE_RENEW: lambda lane, body, sender: renewer.renew(lane, body, sender),
            SHARE_RESHARE: lambda lane, body, sender: renewer.reshare(lane, body, sender),
            SHARE_ACCEPT: lambda lane, body, sender: renewer.accept(lane, body, sender),
            SHARE_COMMIT: lambda lane, body, sender: holder.commit(body),
            SHARE_LEAVE: lambda lane, body, sender: holder.leave(body),
        }

    @property
    def pending(self) -> int:
        """Requests under way."""
        return self._admission.under_way

    @property
    def serves(self) -> bool:
        """Whether uses of keys are served now; what is here may be read by any thread."""
        return not (self._health.problem or self._audit.problem or self._returning.waits) and self._is_member()

    # --- the way in and out ---

    def handle(self, incoming: Incoming) -> None:
        """Take a request; its reply may go out later."""
        now = self._clock()
        self.number += 1
        request = incoming.request
        call = _Call(incoming, self.number, now, now + request.timeout_ms / 1000, request.verb, self._cluster)
        call.spent_s[PARSE] = incoming.read_s
        try:
            self._admission.begin(incoming.member.name, now)
        except Overloaded as error:  # told and recorded in one for many, since there is no end to them
            self._replier.fail(incoming, error, Load(self.pending, 0, False))
            return
        if request.extensions:
            call.span = self._tracer.begin(request.verb, request.extensions)
        try:
            if request.verb in UNRECORDED and not self._audit.problem:
                call.recording = False
            elif request.verb not in ALWAYS_ANSWERED or not self._audit.problem:
                begun_s = self._clock()
                self._record(call, chain.REQUEST)
                call.spend(AUDIT, self._clock() - begun_s)
            check_verb(self._cluster, incoming.member, request.verb)
            if request.verb in USES and not self._is_member():
                raise NodeUnavailable(f"{self._node} is no member of the cluster any more")
            if self._health.problem and request.verb not in WITHOUT_TOKEN:
                raise TokenError(f"{self._node}: {self._health.problem}")
            body = REQUEST_CODECS[request.verb].decode(request.body)
            self._checked(call)
            self._dispatch(call, body)
        except Exception as error:  # every request gets exactly one answer
            self._fail(call, error)

    def _dispatch(self, call: _Call, body: Any) -> None:
        """Have a checked request carried out; a use of a key once the others were asked what became of the keys."""
        if call.verb in HELD_BACK and self._returning.waits:
            self._parked.append((call, lambda: self._dispatch(call, body)))
            return
        self._verbs[call.verb](call, body)

    def _checked(self, call: _Call) -> float:
        """So far everything was a check, but for the first record; the time now."""
        now_s = self._clock()
        call.spent_s[POLICY] = now_s - call.started_s - max(call.spent_s[AUDIT], 0.0)
        return now_s

    # --- the shortest way: uses of loaded keys that went well before ---

    def _plan(self, call: _Call, body: Operate, loaded: _Loaded, use: Use) -> None:
        """Have such uses by this member served without being looked at anew, until something changes."""
        entry = call.entry
        if self._fast is None or entry is None or self._audit_strict or body.grant:
            return
        algo = entry.algorithm
        if not body.key_id and call.verb == RequestType.DECRYPT and entry.row.version > 1:
            return  # each ciphertext says of which version it is
        name = call.key if self._audit_name is None else self._audit_name(call.key)
        member = call.incoming.member
        plan = Plan(
            member=member.name,
            verb=call.verb,
            name=call.key,
            cluster=call.cluster,
            entry=entry,
            loaded=loaded,
            cached_as=_cached_as(entry),
            count=self._counts.setdefault(call.request_class, _Count()),
            group=self._cluster.group_of(call.key),
            request_class=call.request_class,
            key_id=entry.row.key_id,
            use=use,
            digested=body.digested,
            associated=algo.kind is KeyKind.AES,
            proves=call.verb in (RequestType.VERIFY, RequestType.VERIFY_MAC),
            newest=call.verb in PRODUCING or not body.key_id,
            most=most_data(algo, call.verb),
            lines=chain.use_lines(node=self._node, boot=self._boot_text, member=member.name, verb=call.verb, key=name),
            times=self._latencies.of(call.request_class),
            worker=self._slow if loaded.slow else None,
        )
        self._fast.remember(member.curve_z85, body.key_id, plan)

    def lease_planned(self, plan: Plan, connection: Connection, now_s: float) -> tuple[int, float] | None:
        """Admit uses by a plan over a connection in advance: how many, and until when (monotonic seconds).

        Each is taken from the member's rate and from the key's uses, and what is not used is given back by
        ``settle_planned``. None where a use has to be looked at in every respect.
        """
        if not self._known(connection, plan.member):
            return None
        admitted = self._admission.take(plan.member, LEASE_USES, now_s)
        if not admitted:
            return None
        lease = self._cache.lease(plan.cached_as, now_s, admitted)
        if lease is None:
            self._admission.give(plan.member, admitted)
            return None
        loaded, uses, until_s = lease
        self._admission.give(plan.member, admitted - uses)
        counted = self._quotas.take(plan.entry, uses) if _counts(plan) else uses
        if loaded is not plan.loaded or not counted:
            self._admission.give(plan.member, uses)
            self._cache.settle(plan.cached_as, loaded, 0, uses)
            if _counts(plan):
                self._quotas.give(plan.entry, counted)
            return None
        if counted < uses:
            self._admission.give(plan.member, uses - counted)
            self._cache.settle(plan.cached_as, loaded, 0, uses - counted)
        return counted, min(until_s, now_s + LEASE_S)

    def settle_planned(self, plan: Plan, leased: int, used: int, failed: int, busy_us: int) -> None:
        """Count what was done by a lease, in microseconds, and take back the rest.

        Uses that failed are counted already.
        """
        self._admission.give(plan.member, leased - used)
        self._cache.settle(plan.cached_as, plan.loaded, used, leased - used)
        if _counts(plan):
            self._quotas.give(plan.entry, leased - used)
        plan.count.requests += used - failed
        plan.count.busy_us += busy_us
        if used > failed:
            self._pairs.count(plan.request_class, plan.group, used - failed)
            self._hot.count(plan.name, plan.request_class, used - failed)

    def begin_planned(self, plan: Plan) -> int:
        """Begin a use that was leased: how many requests are under way, or -1 if its plan does not hold."""
        key = plan.loaded.key
        if (
            self._health.problem
            # What makes nothing new is done with older versions too, where they are named.
            or (self._catalogue.by_name(plan.name) if plan.newest else self._catalogue.by_id(plan.key_id))
            is not plan.entry
            or key.generation != key.lane.generation  # as ``lives``, which costs a call
        ):
            return -1
        self.number += 1
        return self._admission.under_way

    def check_plan(self, plan: Plan) -> None:
        """Whether who asked by the manifest of before may still have the result."""
        self._check_still(plan.cluster.members[plan.member], plan.verb, plan.name)

    def begin_aside(self, plan: Plan) -> bool:
        """Count in a use that was leased and that a worker is to make; not if there are too many."""
        if self._admission.full(plan.member):
            return False
        self._admission.resume(plan.member)
        return True

    def overdue(self) -> NoReturn:
        """A worker had no time for a use before its client's deadline."""
        raise DeadlineExceeded(f"{self._node}: the deadline passed while the request waited")

    def end_aside(self, plan: Plan, number: int, elapsed_us: int, busy_us: int) -> int:
        """A use by its plan that a worker made went well: record it. How many requests are under way."""
        if plan.cluster is not self._source.cluster:
            self.check_plan(plan)
        self._audit.uses.record(plan.lines, number, elapsed_us)
        self._admission.end(plan.member)
        plan.count.requests += 1
        plan.count.busy_us += busy_us
        self._pairs.count(plan.request_class, plan.group)
        self._hot.count(plan.name, plan.request_class)
        return self._admission.under_way

    def _check_still(self, before: Member, verb: str, name: str) -> None:
        """Whether a member of an earlier manifest may do this by the newest, with a key if it has a name."""
        member = self._cluster.by_curve.get(before.curve_z85)
        if member is None:
            raise AccessDenied(f"{before.name!r} is no member any more")
        check_verb(self._cluster, member, verb)
        if name:
            check_key(self._cluster, member, verb, name)

    def plan_broke(self, error: Exception) -> None:
        """A plan could not even be followed: that is a fault of this code, which shall cost no more than the plans."""
        log.error("a plan could not be followed", kind=type(error).__name__, exc_info=error)
        self._forget_plans()

    def fail_planned(
        self, plan: Plan, version: int, request_id: int, connection: Connection, started_s: float, error: Exception
    ) -> None:
        """A use by its plan failed: record and answer that as that of any other."""
        self._admission.resume(plan.member)
        self.fail_aside(plan, version, request_id, self.number, connection, started_s, error)

    def fail_aside(
        self,
        plan: Plan,
        version: int,
        request_id: int,
        number: int,
        connection: Connection,
        started_s: float,
        error: Exception,
    ) -> None:
        """As ``fail_planned``, of a use that was counted in."""
        request = Request(version, request_id, plan.verb, 1, b"", {})
        incoming = Incoming(plan.cluster.members[plan.member], request, connection)
        call = _Call(incoming, number, started_s, started_s, plan.verb, plan.cluster, plan.name)
        call.request_class, call.entry, call.recording = plan.request_class, plan.entry, False
        self._fail(call, error)

    def _forget_plans(self) -> None:
        if self._fast is not None:
            self._fast.forget()

    # --- answers ---

    def _answer(self, call: _Call, message: object) -> None:
        """Reply with an ok message."""
        try:
            if call.cluster is not self._cluster:
                self._check_again(call)
            body = REPLY_CODECS[call.verb].encode(message, spoken().reply_to(call.incoming.request.version))
        except Exception as error:
            self._fail(call, error)
            return
        self._finish(
            call,
            "ok",
            call.detail,
            lambda: self._replier.reply(call.incoming, Status.OK, body, self._load(call)),
        )

    def _check_again(self, call: _Call) -> None:
        """Another manifest came while the request was under way: who may no longer ask gets no result."""
        self._check_still(call.incoming.member, call.verb, call.key if call.entry is not None else "")
        call.cluster = self._cluster

    def _fail(self, call: _Call, error: Exception) -> None:
        """Reply with an error; one that nobody foresaw is logged and told without details."""
        if call.unused and call.entry is not None:
            self._quotas.give(call.entry, call.unused)
            call.unused = 0
        if isinstance(error, Moved):
            body = error_codec.encode(ErrorBody(error.code, str(error), list(error.names)))
            self._finish(
                call,
                "moved",
                ",".join(error.names),
                lambda: self._replier.reply(call.incoming, Status.MOVED, body, self._load(call)),
            )
            return
        if isinstance(error, StaleKey):
            self._outdated(call)
        elif isinstance(error, InvalidSignature | InvalidTag):
            error = self._unless_older(call, error)
        code = error.code if isinstance(error, EngineError) else "invalid-request"
        if not isinstance(error, EngineError | ValueError | TypeError):
            code = "error"
            log.error("request failed", verb=call.verb, key=call.key, kind=type(error).__name__, exc_info=error)
        detail = str(error)[:MAX_ERROR_DETAIL] if code != "error" else type(error).__name__
        if self._audit_name is not None:
            detail = call.detail  # an error's text may hold names of keys
        self._finish(call, code, detail, lambda: self._replier.fail(call.incoming, error, self._load(call)))

    def _unless_older(self, call: _Call, error: EngineError) -> EngineError:
        """The error, or that another version may fit: signatures, MACs and RSA ciphertexts do not tell theirs."""
        entry = call.entry
        if entry is None or (call.verb == RequestType.DECRYPT and entry.algorithm.kind is KeyKind.AES):
            return error
        newest = self._catalogue.newest(call.key)
        if newest is None or newest.row.version <= entry.row.version:
            return error
        return OlderVersion(f"{error} (by version {entry.row.version} of {call.key!r}, {newest.row.version} is newest)")

    def _finish(self, call: _Call, outcome: str, detail: str, reply: Callable[[], None]) -> None:
        """Record the outcome, then reply: at once, or once the record is on the disk. Without a record no reply."""

        def answer(failure: AuditUnavailable | None) -> None:
            begun_s = self._clock()
            call.spend(AUDIT, begun_s - ended_s)
            self._admission.end(call.incoming.member.name)
            try:
                if failure is not None:
                    raise failure
                if outcome == "ok" and call.verb in DURABLE_VERBS:
                    failpoint(RECORDED[call.verb])
            except EngineError as error:
                self._replier.fail(call.incoming, error, self._load(call))
                self._answered(call, error.code, begun_s)
                return
            reply()
            self._answered(call, outcome, begun_s)
            if outcome == "ok":
                failpoint(ANSWERED.get(call.verb, ""))

        ended_s = self._clock()

        if call.request_class:
            count = self._counts.setdefault(call.request_class, _Count())
            count.requests += 1
            count.errors += outcome != "ok"
            count.busy_us += call.service_us
            self._pairs.count(call.request_class, self._cluster.group_of(call.key))
            self._hot.count(call.key, call.request_class)
        if not call.recording and outcome == "ok":
            answer(None)
            return
        try:
            if not call.recording:
                self._record(call, chain.REQUEST)
            number = self._record(call, chain.REPLY, outcome, detail)
        except AuditUnavailable as failure:
            answer(None if call.verb in ALWAYS_ANSWERED else failure)
            return
        if (self._audit_strict and call.verb not in ALWAYS_ANSWERED) or call.verb in DURABLE_VERBS:
            self._audit.when_durable(number, answer)
        else:
            answer(None)

    def _answered(self, call: _Call, outcome: str, begun_s: float) -> None:
        """The reply, begun at ``begun_s``, is on its way: note where the request's time went."""
        now_s = self._clock()
        call.spent_s[REPLY], call.spent_s[TOTAL] = now_s - begun_s, now_s - call.started_s
        known = call.request_class or (call.verb if call.verb in self._verbs else OTHER)
        self._latencies.note(known, call.spent_s, ok=outcome == "ok")
        if call.span is not None:
            attributes: dict[str, str | bool] = {"keyquorum.class": known, "keyquorum.node": self._node}
            if call.spent_s[CACHE] >= 0:
                attributes["keyquorum.cold"] = call.cold_since_s > 0
            call.span.end(outcome, attributes)

    def _record(self, call: _Call, event: str, outcome: str = "", detail: str = "") -> int:
        elapsed_us = int((self._clock() - call.started_s) * 1e6) if event == chain.REPLY else 0
        key = call.key if self._audit_name is None or not call.key else self._audit_name(call.key)
        record = Record(
            time_ms=self._now_ms(),
            node=self._node,
            boot=self._boot_text,
            request=call.number,
            event=event,
            member=call.incoming.member.name,
            verb=call.verb,
            key=key,
            outcome=outcome,
            detail=detail,
            elapsed_us=elapsed_us,
        )
        return self._audit.write(record)

    def _load(self, call: _Call) -> Load:
        loaded = call.entry is not None and self._cache.contains(_cached_as(call.entry), self._clock())
        return Load(self.pending, call.service_us, loaded)

    def _aside(
        self,
        call: _Call,
        worker: Worker[Any],
        work: Callable[[Any], Any],
        then: Callable[[Any], Any] = lambda message: message,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Have a worker make the reply's message, unless the client's deadline is over by then.

        ``then`` is called by the loop and makes the message of what the worker gave; ``ended`` too, whatever came of
        it.
        """

        submitted_s = self._clock()

        def job(state: Any) -> Any:
            begun_s = self._clock()
            call.spend(WAIT, begun_s - submitted_s)
            if begun_s >= call.deadline_s:
                self.overdue()
            try:
                return work(state)
            finally:
                if call.spent_s[TOKEN] < 0:
                    call.spend(WORK, self._clock() - begun_s)

        def done(result: Any, error: Exception | None) -> None:
            ended()
            if error is None:
                self._answer(call, then(result))
            else:
                self._fail(call, error)

        worker.submit(job, done, call.incoming.member.name)

    # --- operations ---

    def _entry(self, call: _Call, name: str, key_id: bytes = b"") -> Entry:
        """The live key of that name, policy checked; ``key_id`` is the incarnation meant, or empty."""
        call.key = name
        check_key(self._cluster, call.incoming.member, call.verb, name)
        entry = self._catalogue.by_name(name)
        if key_id and (entry is None or key_id != entry.row.key_id):
            entry = self._meant(call, name, key_id) or entry
        if entry is None:
            doubted = self._catalogue.pending(name)
            if doubted:
                # Its dealer may have fallen silent between the registry's word and its own to the holders.
                self._doubted |= doubted
                self.look_again()
                raise KeyPending(f"whether the key {name!r} was made is not known yet on {self._node}")
            moved = self._catalogue.moved(name)
            if moved is not None:
                raise _moved(moved)
            # A key of n shares is made on the first n of its group: if there is one, those before this node know it.
            order = self._cluster.group_holders(self._cluster.group_of(name))
            before = order[: order.index(self._node)] if self._node in order else order
            if before:
                raise Moved(name, before[:MOVED_MAX])
            raise KeyNotFound(f"no key {name!r} on {self._node}")
        if key_id and key_id != entry.row.key_id:
            raise StaleKey(f"{name!r} has another id than the request says")
        if call.verb in HELD_BACK:
            self._returning.check(entry.row.key_id)
        call.entry = entry
        return entry

    def _meant(self, call: _Call, name: str, key_id: bytes) -> Entry | None:
        """The older version of a key that a request names by its id, if there is one."""
        entry = self._catalogue.by_id(key_id)
        if entry is None or entry.row.name != name:
            return None
        if entry.row.state == "prepared":
            self._doubted.add(key_id)  # somebody knows that it was made
        newest = self._catalogue.newest(name)
        if newest is None or entry.lineage != newest.lineage or entry.row.state not in ("committed", "moved"):
            return None
        if call.verb in PRODUCING and entry is not newest:
            raise StaleKey(f"{name!r} has a newer version than {entry.row.version}, which makes nothing new any more")
        if entry.row.state == "moved":
            raise _moved(entry)
        return entry

    def _operate(self, call: _Call, body: Operate) -> None:
        entry = self._entry(call, body.key, body.key_id)
        if call.verb == RequestType.DECRYPT and not body.key_id:
            entry = call.entry = self._version_of(entry, body.data)
        call.request_class = classify_request(call.verb, entry.algorithm.name)
        entry.check_usable()
        check_operation(entry.algorithm, call.verb, body)

        def use() -> None:
            self._with_key(call, entry, body.grant, lambda loaded: self._perform(call, body, loaded))

        if call.verb not in PRODUCING or not entry.uses_max or self._counted(call, entry, 1, use):
            use()

    # --- uses that are limited ---

    def _counted(self, call: _Call, entry: Entry, uses: int, go_on: Callable[[], None]) -> bool:
        """Whether so many uses of a key may be made now; else ``go_on`` is called, or the call fails, later."""
        call.unused += self._quotas.take(entry, uses - call.unused)
        if call.unused == uses:
            return True

        def noted(error: Exception | None) -> None:
            try:
                if error is not None:
                    raise error
                if self._counted(call, entry, uses, go_on):
                    go_on()
            except Exception as failure:
                self._fail(call, failure)

        self._quotas.check(entry)
        if self._clock() >= call.deadline_s:
            raise DeadlineExceeded(f"{self._node}: the deadline passed while uses of the key were asked for")
        self._note_uses(entry, call.deadline_s, noted)
        return False

    def _note_uses(self, entry: Entry, until_s: float, then: Callable[[Exception | None], None]) -> None:
        """Note the next uses of a key durably, and ask the registry for more if there are none."""

        def noted(short: bool | None, error: Exception | None) -> None:
            if error is not None or not short:
                then(error)
                return
            if self._quotas.ready(entry):
                self._ask_uses(entry, self._clock() + QUOTA_TIMEOUT_S, _ignore)
                then(None)
            else:
                self._ask_uses(entry, until_s, lambda _, failure: then(failure))

        self._local.submit(lambda lane: self._quotas.note(entry), noted)

    def _ask_uses(self, entry: Entry, until_s: float, then: Callable[[Any, Exception | None], None]) -> None:
        """Ask the registry for more uses of a key, unless that is under way; ``then`` is told when it is done."""
        key_id = entry.row.key_id
        waiting = self._asking_uses.get(key_id)
        if waiting is not None:
            waiting.append(then)
            return
        self._asking_uses[key_id] = [then]

        def done(result: Any, error: Exception | None) -> None:
            for each in self._asking_uses.pop(key_id, []):
                each(result, error)

        def ask(talker: Talker) -> None:
            uses = self._conversation.quota(talker, entry, self._quotas.nonce(entry), until_s)
            self._quotas.add(entry, uses)
            self._quotas.note(entry)

        try:
            self._dealer.submit(ask, done)
        except Overloaded as error:
            done(None, error)

    def _note_ahead(self) -> None:
        """Have the next uses noted of keys that are near the end of those that are."""
        for entry in self._quotas.low():
            with contextlib.suppress(Overloaded):  # whoever needs them has it done
                self._note_uses(entry, self._clock() + QUOTA_TIMEOUT_S, lambda error: None)

    def _version_of(self, entry: Entry, ciphertext: bytes) -> Entry:
        """The version that a ciphertext says it is of, for who names none."""
        version = version_in(ciphertext) if entry.algorithm.kind is KeyKind.AES else 0
        older = self._catalogue.version(entry.row.name, version) if 0 < version < entry.row.version else None
        if older is not None and older.row.state == "moved":
            raise _moved(older)
        return older or entry

    def _rewrap(self, call: _Call, body: Rewrap) -> None:
        new = self._entry(call, body.key, body.to_id)
        if new is not self._catalogue.newest(body.key):
            raise StaleKey(f"{body.key!r} has a newer version than {new.row.version}")
        old = self._entry(call, body.key, body.from_id)
        if new.algorithm.kind is not KeyKind.AES:
            raise ValueError(f"rewrap is no operation of {new.algorithm.name}: it is for AES-GCM alone")
        call.entry, call.request_class = new, classify_request(call.verb, new.algorithm.name)
        new.check_usable()
        old.check_usable()

        def load_both() -> None:
            self._with_key(
                call,
                old,
                body.from_grant,
                lambda before: self._with_key(
                    call, new, body.to_grant, lambda after: self._rewrapped(call, body, old, before, after)
                ),
            )

        if old is new or not new.uses_max or self._counted(call, new, len(body.items), load_both):
            load_both()

    def _rewrapped(self, call: _Call, body: Rewrap, old: Entry, before: _Loaded, after: _Loaded) -> None:
        """Decrypt with one version and encrypt with the other; a bad ciphertext costs the others nothing."""
        new = call.entry
        if new is None:
            raise RuntimeError("a rewrapping has two versions")
        begun_s = self._clock()
        call.unused = 0
        opens = bound(self._lane, before.key, RequestType.DECRYPT.value, old.row.version, digested=False)
        closes = bound(self._lane, after.key, RequestType.ENCRYPT.value, new.row.version, digested=False)
        results: list[RewrapResult] = []
        for item in body.items:
            try:
                if old is new:  # it is held against its tag, and stays as it is
                    opens.then(None, item.data, item.associated_data)
                    results.append(RewrapResult("", "", item.data))
                else:
                    results.append(RewrapResult("", "", opens.then(closes, item.data, item.associated_data)))
            except InvalidTag as error:
                results.append(RewrapResult(error.code, str(error)[:MAX_ERROR_DETAIL], b""))
        call.spend(TOKEN, self._clock() - begun_s)
        call.service_us = max(1, int(call.spent_s[TOKEN] * 1e6))
        done = sum(not each.code for each in results)
        call.detail = f"{done} of {len(results)} from version {old.row.version} to {new.row.version}"
        self._answer(call, Rewrapped(results))

    def _prewarm(self, call: _Call, body: Prewarm) -> None:
        entry = self._entry(call, body.key, body.key_id)
        entry.check_usable()
        self._with_key(call, entry, body.grant, lambda loaded: self._answer(call, Empty()))

    def _with_key(self, call: _Call, entry: Entry, grant: bytes, use: Callable[[_Loaded], None]) -> None:
        """Use the key now if it is loaded, else when it has been gathered under the client's grant."""
        begun_s = self._checked(call)
        loaded = self._cache.get(_cached_as(entry), begun_s)
        if loaded is not None and not loaded.key.lives:
            self.token_renewed()
            loaded = None
        now_s = self._clock()
        call.spent_s[CACHE] = now_s - begun_s
        if loaded is not None:
            use(loaded)
            return
        call.grant, call.cold_since_s = grant, now_s
        self._admit(call, grant, entry)
        waiting = self._gathering.get(entry.row.key_id)
        if waiting is not None:
            waiting.append(_Waiting(call, grant, use))
            return
        self._gather(entry, [_Waiting(call, grant, use)])

    def _gather(self, entry: Entry, waiting: list[_Waiting]) -> None:
        """Have the key gathered for all who wait, under the grant and by the deadline of the one with the most time.

        That one is served first, so that its grant is spent when the key's uses don't suffice for all.
        """
        leader = max(waiting, key=lambda each: each.call.deadline_s)
        self._gathering[entry.row.key_id] = [leader, *(each for each in waiting if each is not leader)]
        try:
            self._talkers.submit(
                lambda talker: self._gather_once(talker, entry, leader),
                lambda gathered, error: self._gathered(entry, leader, gathered, error),
                leader.call.incoming.member.name,
            )
        except Overloaded:
            del self._gathering[entry.row.key_id]
            raise

    def _gather_once(self, talker: Talker, entry: Entry, leader: _Waiting) -> Gathered:
        """Gather on a talker; that the grants of those who wait were used is on the disk before the key is combined.

        So it is for those who came meanwhile, before the key is used. It is written while the holders write the same:
        they release nothing a second time for a grant of which a crash left this node no memory.
        """
        span = leader.call.span
        with child_of(span, "gather") as extensions:
            gathered = self._conversation.gather(
                talker, entry, leader.grant, leader.call.gather_until_s, extensions, self._ledger.flush
            )
            try:
                self._ledger.flush()
            except Exception:
                gathered.secret.close()
                raise
        return gathered

    def _admit(self, call: _Call, raw: bytes, entry: Entry) -> None:
        """Whether this request may have a cold key gathered: it needs its client's own, unused grant for this node."""
        if not raw:
            raise NeedGrant(f"{entry.row.name!r} is not loaded on {self._node}; a grant is needed")
        issuer = read_unverified(raw).issuer
        if issuer != call.incoming.member.name:
            raise NeedGrant(f"the grant is {issuer!r}'s, not {call.incoming.member.name!r}'s")
        grant, signed = check_grant(raw, entry.record, self._node, self._cluster, self._now_ms())
        if call.verb != RequestType.PREWARM and call.verb not in grant.operations:
            raise NeedGrant(f"the grant is for {', '.join(grant.operations)}, not for {call.verb}")
        try:
            self._ledger.spend(grant, signed)
        except AccessDenied as error:
            raise NeedGrant(f"{error}, and {entry.row.name!r} is not loaded on {self._node}") from None

    def _gathered(self, entry: Entry, leader: _Waiting, gathered: Gathered | None, error: Exception | None) -> None:
        """The gathering ended: load the key on its lane, then serve who waited."""
        if gathered is None:
            self._not_gathered(entry, leader, error)
            return
        if is_slow(entry.algorithm):
            self._load_aside(entry, gathered, last=False)
            return
        size = len(gathered.secret)
        try:
            try:
                key = self._load_key(self._lane, entry, gathered)
            except TokenFault as fault:
                if not self._makes_room(fault):
                    raise
                key = self._load_key(self._lane, entry, gathered)
        except Exception as failure:
            self._release_waiting(entry, None, failure)
            return
        finally:
            gathered.secret.close()
        failpoint("combiner.gather.loaded")
        self._release_waiting(entry, _Loaded(key, slow=False, size=size), None)

    def _asker(self, entry: Entry) -> str:
        """The member for whom the key is gathered."""
        waiting = self._gathering.get(entry.row.key_id)
        return waiting[0].call.incoming.member.name if waiting else ""

    def _load_aside(self, entry: Entry, gathered: Gathered, *, last: bool) -> None:
        """Have the slow worker load the key; once more, after those that it has are destroyed, if it has no room."""
        size = len(gathered.secret)

        def done(key: LoadedKey | None, failure: Exception | None) -> None:
            if not last and isinstance(failure, TokenFault) and self._makes_room(failure):
                self._load_aside(entry, gathered, last=True)
                return
            gathered.secret.close()
            self._release_waiting(entry, None if key is None else _Loaded(key, slow=True, size=size), failure)

        try:
            self._slow.submit(lambda lane: self._load_key(lane, entry, gathered), done, self._asker(entry))
        except Overloaded as failure:
            gathered.secret.close()
            self._release_waiting(entry, None, failure)

    def _makes_room(self, fault: TokenFault) -> bool:
        """Let every loaded key go where the token says that it is full; whether there were any."""
        if fault.kind is not Kind.MEMORY or not len(self._cache):
            return False
        log.warning("the token is full; the loaded keys leave it", reason=str(fault))
        return self._cache.clear("room") > 0

    def _not_gathered(self, entry: Entry, leader: _Waiting, error: Exception | None) -> None:
        """Tell who waited; if the leader's time was too short, those who came later with more of it try again."""
        waiting = self._gathering[entry.row.key_id]
        now = self._clock()
        rest = []
        if now >= leader.call.gather_until_s:
            rest = [each for each in waiting if each.call.gather_until_s > now]
            self._gathering[entry.row.key_id] = [each for each in waiting if each not in rest]
        self._release_waiting(entry, None, error)
        self._gather_again(entry, rest)

    @staticmethod
    def _load_key(lane: Lane, entry: Entry, gathered: Gathered) -> LoadedKey:
        return lane.load(entry.algorithm, unblind(gathered.secret), entry.manifest.public_key)

    def _release_waiting(self, entry: Entry, loaded: _Loaded | None, error: Exception | None) -> None:
        waiting = self._gathering.pop(entry.row.key_id, [])
        current = self._catalogue.by_id(entry.row.key_id)
        if loaded is not None and (refused := _refused_meanwhile(entry, current)) is not None:
            self._unload(loaded)
            loaded, error = None, refused
        if loaded is None:
            for each in waiting:
                self._cold_no_more(each.call)
                self._fail(each.call, error or EngineError("the key could not be loaded"))
            return
        now, rest = self._clock(), list[_Waiting]()
        kept = self._cache.put(_cached_as(entry), loaded, now, loaded.size)
        for each in waiting:
            if kept and self._cache.get(_cached_as(entry), now, counted=False) is None:
                rest.append(each)  # the key's uses are over: it is gathered again, under another's grant
                continue
            try:
                self._cold_no_more(each.call)
                each.use(loaded)
            except Exception as failure:
                self._fail(each.call, failure)
        if not kept:
            self._unload(loaded)
        self._gather_again(entry, rest)

    def _cold_no_more(self, call: _Call) -> None:
        """The gathering that a request waited for has ended."""
        call.spent_s[GATHER] = self._clock() - call.cold_since_s

    def _gather_again(self, entry: Entry, waiting: list[_Waiting]) -> None:
        if not waiting:
            return
        try:
            self._gather(entry, waiting)
        except Overloaded as failure:
            for each in waiting:
                self._fail(each.call, failure)

    def _perform(self, call: _Call, body: Operate, loaded: _Loaded) -> None:
        version = call.entry.manifest.version if call.entry else 1

        def timed(lane: Lane) -> tuple[Result, Use]:
            call.unused = 0
            with child_of(call.span, "token"):
                begun = self._clock()
                try:
                    use = bound(lane, loaded.key, call.verb, version, digested=body.digested)
                    return Result(use(body.data, body.associated_data, body.proof)), use
                finally:
                    call.spent_s[TOKEN] = self._clock() - begun
                    call.service_us = max(1, int(call.spent_s[TOKEN] * 1e6))

        def planned(made: tuple[Result, Use]) -> Result:
            result, use = made
            self._plan(call, body, loaded, use)
            return result

        if loaded.slow:
            self._aside(call, self._slow, timed, planned)
        else:
            self._answer(call, planned(timed(self._lane)))

    def _unload(self, loaded: _Loaded) -> None:
        """Destroy a key's objects on the lane that made them, after what is queued there for it."""
        self._forget_plans()
        if not loaded.slow:
            loaded.key.destroy()
            return
        try:
            self._slow.submit(lambda lane: loaded.key.destroy(), _ignore)
        except Overloaded:
            log.warning("a loaded key outlives its time", reason="the slow worker's queue is full")
            self._unloading.append(loaded)

    # --- the life of a key ---

    def _create(self, call: _Call, body: Create) -> None:
        order, signed = open_create_order(body.order, self._cluster, self._now_ms())
        call.key = order.name
        call.request_class = classify_request(call.verb, order.algorithm)
        if order.operation != call.verb or signed.issuer != call.incoming.member.name:
            raise ValueError(
                f"the order is {signed.issuer!r}'s to {order.operation}, the request is another's or another"
            )
        begun = self._clock()
        earlier = self._earlier(order) if order.operation == "rotate" else []

        # What was carried out already is told again, however much else was made.
        limited = order.operation != "import" and not self._catalogue.knows(order.key_id)
        if limited:
            self._generation.begin(order.algorithm, begun)

        def work(talker: Talker) -> KeyDescription:
            since_s = time.thread_time()
            try:
                return self._conversation.create(talker, body.order, body.material, call.deadline_s, earlier)
            finally:
                call.service_us = int((self._clock() - begun) * 1e6)
                call.busy_s = time.thread_time() - since_s

        def described(message: KeyDescription) -> KeyDescription:
            return structs.replace(message, settings=self._settings_of(earlier[0])) if earlier else message

        def ended() -> None:
            if limited:
                self._generation.ended(order.algorithm, call.busy_s)

        try:
            self._aside(call, self._dealer, work, described, ended)
        except Overloaded:
            ended()
            raise

    def _earlier(self, order: CreateOrder) -> list[Entry]:
        """The versions of the key that is to be rotated, as this holder of the newest knows them; the oldest first."""
        versions = [each for each in self._catalogue.versions(order.lineage) if each.row.name == order.name]
        live = [each for each in versions if each.row.state in ("committed", "moved")]
        if not live:
            raise KeyNotFound(f"no key {order.name!r} of the lineage {order.lineage.hex()} on {self._node}")
        if live[-1].row.state == "moved":
            raise _moved(live[-1])
        return live

    def _destroy(self, call: _Call, body: Destroy) -> None:
        order, signed = open_destroy_order(body.order, self._cluster, self._now_ms())
        call.key = order.name
        if signed.issuer != call.incoming.member.name:
            raise ValueError(f"the order is {signed.issuer!r}'s")
        entries = [each for each in self._catalogue.versions(order.key_id) if each.row.name == order.name]
        if not entries:
            raise KeyNotFound(f"no key {order.name!r} with id {order.key_id.hex()} on {self._node}")
        if all(each.row.state == "moved" for each in entries):
            raise _moved(entries[-1])
        self._aside(
            call,
            self._dealer,
            lambda talker: self._conversation.destroy(talker, body.order, entries, call.deadline_s),
        )

    def _set(self, call: _Call, body: Settings) -> None:
        """Have a client's settings booked and kept by the key's holders. Those that are booked are told once more."""
        told = read_settings(body.order)
        settings = open_settings(body.order, self._cluster, None if told.booked else self._now_ms())
        order = settings.order
        call.key, call.detail = order.name, settings.told
        check_key(self._cluster, call.incoming.member, call.verb, order.name)
        if not settings.booked and settings.issuer != call.incoming.member.name:
            raise ValueError(f"the settings are {settings.issuer!r}'s")
        entries = [each for each in self._catalogue.versions(order.lineage) if each.row.state == "committed"]
        if not entries:
            moved = self._catalogue.moved(order.name)
            if moved is not None and moved.manifest.lineage == order.lineage:
                raise _moved(moved)
            raise KeyNotFound(f"no key {order.name!r} with id {order.lineage.hex()} on {self._node}")
        self._aside(
            call,
            self._dealer,
            lambda talker: self._conversation.settle_settings(talker, settings, entries, call.deadline_s),
        )

    def _refresh(self, call: _Call, body: Refresh) -> None:
        self._change(call, body.order, b"", *open_refresh_order(body.order, self._cluster, self._now_ms()))

    def _reshare(self, call: _Call, body: Reshare) -> None:
        self._change(call, body.order, body.grant, *open_reshare_order(body.order, self._cluster, self._now_ms()))

    def _change(
        self, call: _Call, raw_order: bytes, grant: bytes, order: RefreshOrder | ReshareOrder, signed: Signed
    ) -> None:
        entry = self._ordered(call, order, signed)

        def described(message: KeyDescription) -> KeyDescription:
            return structs.replace(message, settings=self._settings_of(entry))

        def work(talker: Talker) -> KeyDescription:
            return self._coordinator.change(talker, raw_order, call.deadline_s, grant)

        self._aside(call, self._dealer, work, described)

    def _settings_of(self, entry: Entry) -> bytes:
        """The key's settings, for a message."""
        known = self._catalogue.settings_of(entry.manifest.lineage)
        return known.raw if known is not None else b""

    def _move(self, call: _Call, body: Move) -> None:
        """Carry out a balancer's orders, beside what clients order."""
        for raw in body.orders:
            order, signed = open_change_order(raw, self._cluster, self._now_ms())
            if signed.issuer != call.incoming.member.name:
                raise ValueError(f"an order for {order.name!r} is {signed.issuer!r}'s")

        def work(talker: Talker) -> MoveResults:
            results = self._coordinator.move(talker, body.orders, call.deadline_s)
            done = sum(not each.code for each in results)
            call.detail = f"{done} of {len(results)} keys"
            return MoveResults(results)

        self._aside(call, self._mover, work)

    def _ordered(self, call: _Call, order: RefreshOrder | ReshareOrder, signed: Signed) -> Entry:
        """The key that an order of the one who asks is about."""
        call.key = order.name
        if signed.issuer != call.incoming.member.name:
            raise ValueError(f"the order is {signed.issuer!r}'s")
        entry = self._catalogue.by_id(order.key_id)
        if entry is None or entry.row.name != order.name:
            raise KeyNotFound(f"no key {order.name!r} with id {order.key_id.hex()} on {self._node}")
        if entry.row.state == "moved":
            raise _moved(entry)
        return entry

    def _describe(self, call: _Call, body: Describe) -> None:
        entry = self._of_version(call, body.key, body.version) if body.version else self._entry(call, body.key)
        self._answer(call, KeyDescription(entry.row.manifest, entry.row.certificate, [], self._settings_of(entry)))

    def _of_version(self, call: _Call, name: str, version: int) -> Entry:
        """That version of the live key of that name, policy checked."""
        entry = self._catalogue.version(name, version)
        if entry is None:
            self._entry(call, name)  # another node may know the name
            raise KeyNotFound(f"no version {version} of the key {name!r} on {self._node}")
        call.key = name
        check_key(self._cluster, call.incoming.member, call.verb, name)
        if entry.row.state == "moved":
            raise _moved(entry)
        call.entry = entry
        return entry

    def _list(self, call: _Call, body: ListKeys) -> None:
        member = call.incoming.member.name
        found: list[KeyEntry] = []
        literal = re.match(r"[^*?\[]*", body.pattern)
        for name in self._catalogue.names(body.after, literal[0] if literal else ""):
            entry = self._catalogue.by_name(name)
            if entry is None or not self._cluster.allows(member, call.verb, name):
                continue
            if not fnmatchcase(name, body.pattern):
                continue
            if len(found) == body.limit:
                self._answer(call, KeyList(found, True))
                return
            manifest = entry.manifest
            settings = entry.settings
            found.append(
                KeyEntry(
                    name,
                    manifest.algorithm,
                    manifest.version,
                    manifest.threshold,
                    manifest.shares,
                    state_of(settings),
                    settings.serial if settings else 0,
                )
            )
        self._answer(call, KeyList(found, False))

    def _flush(self, call: _Call, body: Flush) -> None:
        member = call.incoming.member.name
        if not body.key:
            if not self._cluster.allows_every_key(member, call.verb):
                raise AccessDenied(f"{member!r} may not {call.verb} every key")
            self._signatures.clear("flushed")
            self._answer(call, Flushed(self._cache.clear("flushed"), self._holder.shares.clear("flushed")))
            return
        call.key = body.key
        check_key(self._cluster, call.incoming.member, call.verb, body.key)
        ids = {entry.row.key_id for entry in self._catalogue.held(body.key)}
        if not ids:
            raise KeyNotFound(f"no key {body.key!r} on {self._node}")
        self._signatures.clear("flushed")
        keys = self._cache.drop(lambda cached: cached[0] in ids, "flushed")
        self._answer(call, Flushed(keys, sum(self._holder.shares.drop(each, "flushed") for each in ids)))

    def _status(self, call: _Call, body: Empty) -> None:
        self._answer(call, self._node_status())

    def _node_status(self) -> NodeStatus:
        missing = [f"{name}: {what}" for name, what in self._token.missing.items()]
        return NodeStatus(
            node=self._node,
            software=__version__,
            cluster_serial=self._cluster.serial,
            uptime_ms=int((self._clock() - self._started_s) * 1000),
            shares=self._catalogue.share_count(),
            loaded=len(self._cache),
            caches=self._caches(),
            holders=[
                HolderLatency(name, told.samples, int(told.expected_s * 1e6), int(told.p95_s * 1e6), told.down)
                for name, told in self._conversation.peers.latencies(self._clock()).items()
            ],
            queue=self.pending,
            token=self._token.description,
            algorithms=list(self._token.algorithms),
            missing=missing,
            audit=self._audit.problem[:MAX_ERROR_DETAIL],
            store=(self._ledger.problem or self._returning.problem)[:MAX_ERROR_DETAIL],
            alarms=[
                each
                for each in (
                    self._manifest_problem(),
                    self._returning.alarm,
                    self.token_alarm,
                    self._audit.broken,
                    *self._witness.alarms.values(),
                )
                if each
            ],
            clock=self._ledger.clock.complaint(),
            health=self._health.told(),
            service=self._service_counts(self._admission),
            host=self._host(),
            protocol=spoken().highest,
            clients=self._clients.seen(self._cluster, self._connected, self._clock()),
        )

    def _hello(self, call: _Call, body: Hello) -> None:
        self._clients.heard(call.incoming.member, body, self._clock())
        self._answer(call, welcome(body, self._node, self._boot, self._cluster, self._limits))

    def _manifest_problem(self) -> str:
        if not self._is_member():
            return f"the cluster manifest with serial {self._cluster.serial} does not name {self._node!r} as a node"
        return self._source.problem if isinstance(self._source, Membership) else ""

    def _is_member(self) -> bool:
        return self._node in self._cluster.nodes

    def _stats(self, call: _Call, body: Empty) -> None:
        now_s = self._clock()
        if now_s - self._window_s >= WINDOW_S:
            self._hot.end_window(now_s - self._window_s)
            self._pairs.end_window()
            self._window_s = now_s
        places = {name: index for index, name in enumerate(self._counts)}
        self._answer(
            call,
            NodeStats(
                boot=self._boot,
                uptime_ms=int((now_s - self._started_s) * 1000),
                queue=self.pending,
                classes=[
                    ClassCount(name, count.requests, count.errors, count.busy_us)
                    for name, count in self._counts.items()
                ],
                pairs=self._pairs.told(places),
                caches=self._caches(),
                cluster_serial=self._cluster.serial,
                hot_window_ms=int(self._hot.told_s * 1000),
                hot=[(key, places[name], count) for key, name, count in self._hot.told if name in places],
                network_us=self._network_us(),
            ),
        )

    def _latency(self, call: _Call, body: Empty) -> None:
        uptime_ms = int((self._clock() - self._started_s) * 1000)
        self._answer(call, NodeLatency(self._node, uptime_ms, self._latencies.told()))

    def snapshot(self, bounds_s: Sequence[float]) -> Snapshot:
        """What the node counts now; latencies as numbers below these bounds, in seconds."""
        workers: dict[str, Worker[Any]] = {
            "local": self._local,
            "slow": self._slow,
            "talkers": self._talkers,
            "dealer": self._dealer,
            "mover": self._mover,
        }
        return Snapshot(
            self._node_status(),
            self._latencies.buckets(bounds_s),
            self._latencies.errors,
            {name: worker.waiting for name, worker in workers.items()},
        )

    def _manifest_fetch(self, call: _Call, body: ManifestFetch) -> None:
        self._answer(call, self._desk.fetch(body))

    def _manifest_offer(self, call: _Call, body: ManifestOffer) -> None:
        self._answer(call, self._desk.offer(call.incoming.member.name, body))

    def _caches(self) -> list[CacheCount]:
        return [
            _cache_count("keys", self._cache.statistics()),
            _cache_count("shares", self._holder.shares.statistics()),
            _cache_count("signatures", self._signatures.statistics()),
        ]

    # --- shares ---

    def _share_prepare(self, call: _Call, body: SharePrepare) -> None:
        call.key = read_key_manifest(body.manifest).manifest.name
        self._aside(call, self._local, lambda lane: self._holder.prepare(lane, body, call.incoming.member))

    def _share_commit(self, call: _Call, body: ShareCommit) -> None:
        call.key = self._name_of(body.key_id)
        self._aside(call, self._local, lambda lane: self._holder.commit(body))

    def _share_abort(self, call: _Call, body: Abort) -> None:
        call.key = self._name_of(aborts.decode(read_unverified(body.notice).payload).key_id)

        def work(lane: Lane) -> Empty:
            self._holder.abort(body.notice)
            return Empty()

        self._aside(call, self._local, work)

    def _share_release(self, call: _Call, body: ShareRelease) -> None:
        call.key, call.grant = self._name_of(body.key_id), body.grant
        grant = read_unverified(body.grant)  # checked before the share leaves
        call.detail = f"by the grant {grant.digest.hex()} of {grant.issuer}"
        self._once_back(call, body.key_id, lambda lane: self._holder.release(lane, body, call.incoming.member))

    def _once_back(self, call: _Call, key_id: bytes, work: Callable[[Lane], Any]) -> None:
        """Do what gives away something of a share, as soon as this node has heard what became of the key."""
        entry = self._catalogue.by_id(key_id)
        if entry is not None and not self._returning.may_release(holder.node for holder in entry.manifest.holders):
            self._parked.append((call, lambda: self._once_back(call, key_id, work)))
            self._next_recall_s = 0.0  # who asks can be asked
            return
        self._returning.check(key_id)
        self._aside(call, self._local, work)

    def _unpark(self) -> None:
        """Go on with what waited, or say that it waited too long."""
        parked, self._parked = self._parked, []
        for call, again in parked:
            try:
                if self._clock() >= call.deadline_s:
                    raise KeyPending(f"{self._node} has not heard yet what became of the key while it was away")
                again()
            except Exception as error:  # every request gets exactly one answer
                self._fail(call, error)

    def _name_of(self, key_id: bytes) -> str:
        """The name for the audit record, if the node knows the key."""
        entry = self._catalogue.by_id(key_id)
        return entry.row.name if entry else ""

    def _share_destroy(self, call: _Call, body: Destroy) -> None:
        call.key = self._name_of(destroy_orders.decode(read_unverified(body.order).payload).key_id)

        def forget(ids: Sequence[bytes]) -> Empty:
            for key_id in ids:
                self._forget(key_id)
            return Empty()

        self._aside(call, self._local, lambda lane: self._holder.destroy(body), forget)

    def _share_settings(self, call: _Call, body: ShareSettings) -> None:
        told = read_settings(body.settings)
        call.key, call.detail = told.order.name, told.told

        def taken(settings: SettingsRecord) -> Empty:
            for entry in self._catalogue.versions(settings.order.lineage):
                self.key_changed(entry)  # at once: what is acknowledged holds from now on
            return Empty()

        self._aside(call, self._local, lambda lane: self._holder.take_settings(body), taken)

    def _share_deal(self, call: _Call, body: ShareDeal) -> None:
        order = read_change_order(body.order)
        call.key = order.name
        self._once_back(call, order.key_id, lambda lane: self._renewer.deal(lane, body, call.incoming.member))

    def _share_refresh(self, call: _Call, body: ShareRefresh) -> None:
        call.key = read_change_order(body.order).name
        self._aside(call, self._local, lambda lane: self._renewer.refresh(lane, body, call.incoming.member))

    def _share_renew(self, call: _Call, body: ShareRenew) -> None:
        call.key = read_key_manifest(body.manifest).manifest.name
        self._aside(call, self._local, lambda lane: self._renewer.renew(lane, body, call.incoming.member))

    def _share_reshare(self, call: _Call, body: ShareReshare) -> None:
        call.key = read_change_order(body.order).name
        self._aside(call, self._local, lambda lane: self._renewer.reshare(lane, body, call.incoming.member))

    def _share_accept(self, call: _Call, body: ShareAccept) -> None:
        call.key = read_key_manifest(body.manifest).manifest.name
        self._aside(call, self._local, lambda lane: self._renewer.accept(lane, body, call.incoming.member))

    def _share_trial(self, call: _Call, body: ShareTrial) -> None:
        call.key, call.grant = self._name_of(body.key_id), body.grant
        grant = read_unverified(body.grant)
        call.detail = f"by the grant {grant.digest.hex()} of {grant.issuer}"
        sender = call.incoming.member
        self._aside(call, self._talkers, lambda talker: self._trial.run(talker, body, sender, call.deadline_s))

    def _share_leave(self, call: _Call, body: ShareLeave) -> None:
        call.key = read_key_manifest(body.manifest).manifest.name
        self._aside(call, self._local, lambda lane: self._holder.leave(body))

    def _share_recall(self, call: _Call, body: ShareRecall) -> None:
        self._answer(call, recalled(self._catalogue, body.keys))

    def _books(self, call: _Call, body: Sync) -> None:
        self._answer(call, booked(self._catalogue, body.after, self._orders.newest))

    def _share_many(self, call: _Call, body: Bundle) -> None:
        """Many steps about different keys at once: each is checked as if it came alone, and all are one transaction."""
        check_bundle(body, self._bundled)
        step, sender = self._bundled[body.verb], call.incoming.member
        call.detail = f"{body.verb}, {len(body.bodies)} keys"

        def work(lane: Lane) -> BundleResults:
            names: list[str] = []

            def one(message: Any) -> object:
                made = step(lane, message, sender)
                names.append(self._name_in(message))
                return made

            with self._holder.together():
                results = answer_bundle(body, one, lambda: self._clock() >= call.deadline_s, self._sign_replies)
            if body.verb in DURABLE_VERBS:
                self._record_steps(call, body.verb, names)
            return results

        self._aside(call, self._local, work)

    def _sign_replies(self, replies: Sequence[Any]) -> list[Any]:
        return sign_replies(replies, self._holder.pen)

    def _name_in(self, message: Any) -> str:
        """The name of the key that a step is about."""
        if isinstance(message, ShareCommit):
            return self._name_of(message.key_id)
        if isinstance(message, ShareRenew | ShareAccept | ShareLeave):
            return read_key_manifest(message.manifest).manifest.name
        return read_change_order(message.order).name

    def _record_steps(self, call: _Call, verb: str, names: Sequence[str]) -> None:
        """Record what was done for each key of a bundle, before the record of the whole; by the worker that did it."""
        for name in names:
            self._audit.write(
                Record(
                    time_ms=self._now_ms(),
                    node=self._node,
                    boot=self._boot_text,
                    request=call.number,
                    event=chain.STEP,
                    member=call.incoming.member.name,
                    verb=verb,
                    key=name if self._audit_name is None else self._audit_name(name),
                    outcome="ok",
                )
            )

    # --- backups ---

    def _share_export(self, call: _Call, body: ShareExport) -> None:
        """A part of an archive, recorded with each key in it before it leaves."""
        order = read_unverified(body.order)  # checked before anything leaves
        signers = ", ".join(order.signers)
        call.detail = f"part {body.part} by the order {order.digest.hex()} of {signers}"[:MAX_ERROR_DETAIL]
        if self._returning.waits:
            raise KeyPending(f"{self._node} gives nothing away yet: {self._returning.problem}")
        sender = call.incoming.member

        def work(lane: Lane) -> object:
            part, names = self._exporter.export(lane, body, sender)
            self._record_steps(call, SHARE_EXPORT, names)
            return part

        self._aside(call, self._local, work)

    def _share_restore(self, call: _Call, body: ShareRestore) -> None:
        """A part of an archive. What comes out of one may be long over: the others are asked, as after an absence."""
        signers = ", ".join(read_unverified(each).issuer for each in body.contributions)
        call.detail = f"part {body.part}{' by the contributions of ' if signers else ''}{signers}"[:MAX_ERROR_DETAIL]
        sender = call.incoming.member

        def work(lane: Lane) -> object:
            part, names = self._restorer.restore(lane, body, sender)
            self._record_steps(call, SHARE_RESTORE, names)
            return part

        self._aside(call, self._local, work, ended=self._come_back)

    def _pause(self) -> None:
        """Use no key and give no share away from now on; by the worker, before it stores what is in an archive."""
        self._returning = Returning(self._source, self._node, holds=True, paused=True)

    def _come_back(self) -> None:
        """After a pause, ask the others, and the registry, what became of all keys here, and go by that."""
        if self._returning.paused:
            self._returning = Returning(self._source, self._node, holds=True)
            self._cursor = Cursor()
            self._next_recall_s = self._next_books_s = 0.0

    # --- the heads of audit logs ---

    def _audit_head(self, call: _Call, body: AuditNotice) -> None:
        """Write another node's head into this log, so that it can't take it back."""
        heard = self._witness.hear(body.head, call.incoming.member, self._clock())
        if heard is None:
            self._answer(call, Empty())
            return

        def written(failure: AuditUnavailable | None) -> None:
            if failure is None:
                self._witness.wrote(heard)
                self._answer(call, Empty())
            else:
                self._fail(call, failure)

        # Its node tells it once: what it takes for confirmed must outlive a power cut here.
        self._audit.when_durable(self._witnessed(call.incoming.member.name, heard), written)

    def _witnessed(self, member: str, heard: Heard) -> int:
        if heard.event == chain.PEER_FORK:
            log.error("audit logs contradict each other", member=member, reason=heard.detail)
        return self._audit.write(
            Record(
                time_ms=self._now_ms(),
                node=self._node,
                boot=self._boot_text,
                request=0,
                event=heard.event,
                member=member,
                detail=heard.detail,
                head=heard.text,
            )
        )

    def _tell_head(self, timeout_s: float) -> None:
        """Have the dealer's worker tell the newest head to those who have not confirmed it."""
        head = self._audit.head
        names = self._witness.to_tell(head.seq) if head is not None else ()
        if head is None or not names or self._telling:
            return

        def done(told: list[str] | None, error: Exception | None) -> None:
            self._telling = False
            if told is None:
                log.warning("the audit log's head could not be told", reason=str(error))
            else:
                self._witness.told(told, head.seq)
            if told is None or len(told) < len(names):
                self._next_heads_s = self._clock() + HEADS_RETRY_S

        self._telling = True
        try:
            self._dealer.submit(lambda talker: self._conversation.tell(talker, names, head.raw, timeout_s), done)
        except Overloaded:
            self._telling = False

    def farewell(self) -> None:
        """Tell the last head, of the log of a node that stops."""
        self._telling = False
        self._tell_head(FAREWELL_S)

    # --- from time to time ---

    def tick(self, settle_after_ms: int) -> None:
        """Let expired keys go, and every few seconds catch up with the registry's books on this node's keys."""
        now = self._clock()
        self._settle_after_ms = settle_after_ms
        self._cache.expire(now)
        self._holder.shares.expire()
        self._signatures.expire()
        self._exporter.expire()
        self._restorer.expire()
        self._watch_clock(now)
        self._note_ahead()
        self._tell_refusals()
        overdue, self._unloading = self._unloading, []
        for each in overdue:
            self._unload(each)
        if self._returning.to_ask and now >= self._next_recall_s:
            self._recall()
        self._unpark()
        if now >= self._next_heads_s:
            self._next_heads_s = now + HEADS_EVERY_S
            self._tell_head(HEADS_TIMEOUT_S)
        if now >= self._next_books_s:
            self._read_books(now)

    def _tell_refusals(self) -> None:
        """Log and record what was refused since the last tick: one line for each member."""
        for each in self._admission.refusals():
            log.warning("requests refused", member=each.member, count=each.count, reason=each.reason)
            record = Record(
                time_ms=self._now_ms(),
                node=self._node,
                boot=self._boot_text,
                request=0,
                event=chain.REFUSED,
                member=each.member,
                outcome=Overloaded.code,
                detail=f"{each.count} requests: {each.reason}"[:MAX_ERROR_DETAIL],
            )
            with contextlib.suppress(AuditUnavailable):  # the log above has it, and nothing was done for them
                self._audit.write(record)

    def look_again(self) -> None:
        """Read the registry's books soon: at once, unless that was done within the last second."""
        now = self._clock()
        self._next_books_s = min(self._next_books_s, self._looked_s + LOOK_AGAIN_S)
        if now >= self._next_books_s:
            self._read_books(now)

    def _read_books(self, now: float) -> None:
        if self._catching_up:
            return
        self._looked_s, self._next_books_s = now, now + BOOKS_EVERY_S
        oldest = self._now_ms() - self._settle_after_ms
        stale = [
            entry
            for entry in self._catalogue.prepared()
            if entry.row.changed_ms <= oldest or entry.row.key_id in self._doubted
        ]
        self._doubted.clear()
        self._catching_up = True
        returning = self._returning
        try:
            self._dealer.submit(
                lambda talker: self._ask_registry(talker, stale),
                lambda told, error: self._caught_up(returning, told, error),
            )
        except Overloaded:
            self._catching_up = False

    def _recall(self) -> None:
        """Ask the other nodes what has become of this one's keys; those that were silent again after a while."""
        if self._recalling:
            return
        returning = self._returning
        names, keys = returning.to_ask, self._catalogue.known()
        self._recalling = True
        try:
            self._dealer.submit(
                lambda talker: self._conversation.recall(talker, names, keys),
                lambda told, error: self._recalled(returning, told, error),
            )
        except Overloaded:
            self._recalling = False

    def _recalled(
        self, returning: Returning, told: tuple[list[str], list[SyncEntry]] | None, error: Exception | None
    ) -> None:
        self._next_recall_s = self._clock() + (BOOKS_EVERY_S if self._returning.heard else 0.0)
        if told is None or self._audit.problem:
            self._recalling = False
            if told is None:
                log.warning("asking the others failed", reason=str(error))
            return
        answered, entries = told

        def done(taken: tuple[list[bytes], list[bytes]] | None, failure: Exception | None) -> None:
            self._recalling = False
            if taken is None:
                log.error("what the others told could not be taken in", reason=str(failure))
                return
            gone, doubted = taken
            if answered or returning.waits:
                log.info("asked the others", answered=sorted(answered), changed=len(entries))
            returning.asked(answered, doubted)
            for key_id in (*gone, *doubted):
                self._forget(key_id)
            self._unpark()

        try:
            self._local.submit(lambda lane: self._take_in_recalled(entries), done)
        except Overloaded:
            self._recalling = False

    def _take_in_recalled(self, entries: Sequence[SyncEntry]) -> tuple[list[bytes], list[bytes]]:
        """Carry out what other nodes told: the ids of keys destroyed meanwhile, and of those that may be."""
        gone: list[bytes] = []
        doubted: list[bytes] = []
        for item in entries:
            before = self._catalogue.by_id(item.key_id)
            try:
                erased, doubtful = self._holder.recall(item)
                self._record_change(item.key_id, before)
            except (EngineError, ValueError) as error:
                log.warning("what another node told was refused", key_id=item.key_id.hex(), reason=str(error))
                continue
            gone += erased
            doubted += [doubtful] if doubtful else []
        return gone, doubted

    def _watch_clock(self, now_s: float) -> None:
        """Have the ledger written now and then, and say when the machine's clock is behind what was seen."""
        complaint = self._ledger.clock.complaint()
        if complaint and (not self._clock_complaint or now_s >= self._next_complaint_s):
            log.error("clock behind", reason=complaint)
            self._next_complaint_s = now_s + COMPLAIN_EVERY_S
        self._clock_complaint = complaint
        if self._writing_ledger or not self._ledger.due():
            return

        def done(result: object, error: Exception | None) -> None:
            self._writing_ledger = False
            if error is not None:
                log.error("the used grants can't be written", reason=str(error))

        try:
            self._local.submit(lambda lane: self._ledger.flush(), done)
            self._writing_ledger = True
        except Overloaded:
            pass  # at the next tick

    def _ask_registry(
        self, talker: Talker, stale: Sequence[Entry]
    ) -> tuple[list[SyncEntry], Cursor, list[tuple[Entry, OutcomeReply]], list[SyncEntry]]:
        """The books that are new, what became of the stale entries, and what other nodes tell where that says nothing.

        A registry that fell back gives an attempt's number out anew: then it tells what became of the later one, of
        which this node has only a certificate that does not fit to its own manifest, and may be no holder.
        """
        self._gossip.look(talker.channel)
        for settings in self._holder.unbooked():
            self._conversation.offer_settings(talker, settings)
        books, cursor = self._conversation.registry_books(talker, self._cursor)
        self._report_lacking(talker, cursor.fencing_epoch)
        outcomes, unlike = [], []
        for entry in stale:
            outcome = self._conversation.outcome(talker, entry)
            alike = outcome.state != "committed" or read_certificate(outcome.document) == entry.record.digest
            if alike or self._catalogue.by_id(entry.row.key_id) is not entry:
                outcomes.append((entry, outcome))
            else:
                unlike.append((entry.row.key_id, 0, 0))
        others = [name for name in self._cluster.nodes if name != self._node]
        told = self._conversation.recall(talker, others, unlike)[1] if unlike else []
        return books, cursor, outcomes, told

    def _report_lacking(self, talker: Talker, fencing_epoch: int) -> None:
        keys = self._lacking.due(fencing_epoch, self._clock())
        if not keys:
            return
        try:
            self._conversation.report_lacking(talker, keys)
        except EngineError as error:
            log.info("the registry does not hear of lacking shares", reason=str(error))
        else:
            self._lacking.told(keys)

    def _caught_up(self, returning: Returning, told: Any, error: Exception | None) -> None:
        if told is None:
            self._catching_up = False
            if not isinstance(error, RegistryUnavailable):
                log.warning("catching up with the registry failed", reason=str(error))
            return
        if self._audit.problem:  # no share goes without a record; the books are read again
            self._catching_up = False
            return
        books, cursor, outcomes, recalled = told

        def done(taken: tuple[list[bytes], bool] | None, failure: Exception | None) -> None:
            self._catching_up = False
            if taken is None:
                log.error("catching up with the registry failed", reason=str(failure))
                return
            gone, well = taken
            if well and returning is self._returning:  # else what was refused is asked for again
                self._cursor = cursor
            returning.read_books()
            self._unpark()
            for key_id in gone:
                self._forget(key_id)

        try:
            self._local.submit(lambda lane: self._take_in(books, cursor, outcomes, recalled), done)
        except Overloaded:
            self._catching_up = False

    def _take_in(
        self,
        books: Sequence[SyncEntry],
        cursor: Cursor,
        outcomes: Sequence[tuple[Entry, OutcomeReply]],
        recalled: Sequence[SyncEntry] = (),
    ) -> tuple[list[bytes], bool]:
        """Carry out what the registry told: the ids of keys destroyed meanwhile, and whether all went well.

        A bad entry does not stop the rest.
        """
        gone: list[bytes] = []
        well = True
        self._orders.heard(cursor.balancer, cursor.fencing_epoch)
        try:
            self._holder.tidy()
        except EngineError as error:
            log.warning("an erasure is not finished yet", reason=str(error))
        for at in range(0, len(books), BUNDLE_MAX):
            taken: list[tuple[bytes, Entry | None]] = []
            with self._holder.together():
                for item in books[at : at + BUNDLE_MAX]:
                    before = self._catalogue.by_id(item.key_id)
                    try:
                        gone += self._holder.catch_up(item)
                        taken.append((item.key_id, before))
                    except EngineError as error:
                        log.warning("the registry's entry was refused", key_id=item.key_id.hex(), reason=str(error))
                        well = False
            for key_id, entry in taken:
                self._record_change(key_id, entry)
        for entry, outcome in outcomes:
            before = self._catalogue.by_id(entry.row.key_id)
            try:
                if outcome.state == "committed":
                    self._holder.commit(ShareCommit(entry.row.key_id, outcome.document))
                elif outcome.state == "aborted":
                    self._holder.abort(outcome.document)
                self._record_change(entry.row.key_id, before)
            except EngineError as error:
                log.warning("the registry's outcome was refused", key=entry.row.name, reason=str(error))
        if recalled:
            gone += self._take_in_recalled(recalled)[0]
        return gone, well

    def _record_change(self, key_id: bytes, before: Entry | None) -> None:
        """Record what became of a key by the registry's word, without any request; by the worker that did it."""
        now = self._catalogue.by_id(key_id)
        entry = now or before
        if entry is None or now is before:
            return
        name = entry.row.name
        self._audit.write(
            Record(
                time_ms=self._now_ms(),
                node=self._node,
                boot=self._boot_text,
                request=0,
                event=chain.BOOKS,
                key=name if self._audit_name is None else self._audit_name(name),
                outcome=now.row.state if now else "aborted",
                detail=f"epoch {entry.row.epoch}" + (f", {entry.settings.told}" if entry.settings else ""),
            )
        )

    def close(self) -> None:
        """Let every loaded key go."""
        self._cache.clear("flushed")
        self._holder.shares.clear("flushed")
        with contextlib.suppress(EngineError):  # what is not taken back counts as used
            self._quotas.close()

    # --- what changed ---

    def members_changed(self, before: Cluster, now: Cluster) -> None:
        """Another manifest is in force: drop what was kept by the word of who is no member any more."""
        self._forget_plans()
        self._signatures.clear("changed")
        gone = sorted(set(before.members) - set(now.members))
        if gone:
            log.info("members left", members=gone, serial=now.serial)
        if self._node in gone:
            log.error("removed from the cluster", node=self._node, serial=now.serial)

    def token_renewed(self) -> None:
        """Every loaded key is gone from the token; forget those that were loaded before."""
        self._forget_plans()
        self._cache.drop_values(lambda loaded: not loaded.key.lives, "flushed")

    def key_changed(self, entry: Entry) -> None:
        """Another version of a key, or its end: what was loaded leaves. A new epoch of a version changes nothing."""
        if entry.row.state in ("destroyed", "moved") or not entry.usable:
            self._forget(entry.row.key_id)
        elif entry.row.state == "committed":
            current = _cached_as(entry)
            self._cache.drop(lambda cached: cached[0] == current[0] and cached[1] < current[1], "changed")

    def _forget(self, key_id: bytes) -> None:
        self._quotas.forget(key_id)
        self._cache.drop(lambda cached: cached[0] == key_id, "changed")

    def _outdated(self, call: _Call) -> None:
        """A request did not fit what this node knows of its key: if the node is what is behind, it catches up.

        The word of a member is enough, as all that it can cost is an unsealing and one look at the books a second.
        """
        if call.grant:
            try:
                grant = read_grant(call.grant)
            except ProtocolError:
                return
            entry = self._catalogue.by_id(grant.key_id)
            if entry is not None:
                if (grant.version, grant.epoch) <= (entry.manifest.version, entry.manifest.epoch):
                    return
                self._holder.shares.drop_older(grant.key_id, grant.version, grant.epoch)
        self.look_again()


def _moved(entry: Entry) -> Moved:
    """Who holds a key of which this node had a share once."""
    return Moved(entry.row.name, [holder.node for holder in entry.manifest.holders][:MOVED_MAX])


def _refused_meanwhile(entry: Entry, current: Entry | None) -> EngineError | None:
    """Why a key that was being gathered may not be used any more, by what is known of it now."""
    if current is None or current.row.state != "committed":
        return KeyNotFound(f"the key {entry.row.name!r} was destroyed meanwhile")
    try:
        current.check_usable()
    except (KeyDisabled, VersionRetired) as error:
        return error
    return None


def _counts(plan: Plan) -> bool:
    """Whether uses by a plan are counted against their key's limit."""
    return plan.verb in PRODUCING and plan.entry.uses_max > 0


def _cached_as(entry: Entry) -> tuple[bytes, int]:
    """What a loaded key is kept under: it is the same in every epoch of its version."""
    return entry.row.key_id, entry.row.version


def _cache_count(name: str, told: CacheStatistics) -> CacheCount:
    return CacheCount(name, told.entries, told.bytes, told.hits, told.misses, **told.evictions)


def _ignore(result: object, error: Exception | None) -> None:
    if error is not None:
        log.warning("a loaded key could not be destroyed", reason=str(error))
