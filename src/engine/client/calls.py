"""What every verb does, as generators: which node is asked, in which order, and what a refusal means.

It opens no socket and reads no clock of its own. A call yields an ``Exchange`` and is sent back the ``Reply`` (or has
the transport's error thrown in), or yields a ``Pause`` and is resumed after it; what it returns is the verb's result.
One set of generators so serves the blocking, the pipelined and the asynchronous client.

Where another node could answer as well, an exchange has a patience: when that is over the call is resumed with None,
the exchange stays under way, and the call asks the next node beside. The first good answer counts.

A call ends within its deadline. It asks each eligible node at most once a round, and a round is followed by another,
after a growing pause, only while time is left.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import structs

from engine.client._histogram import Histograms
from engine.client.speech import spoken
from engine.client.tracing import Origin, active_trace, begin_span
from engine.client.transport import KeyRefused, Moved, raise_for_status
from engine.errors import (
    AccessDenied,
    AuditUnavailable,
    DeadlineExceeded,
    EngineError,
    InvalidSignature,
    InvalidTag,
    KeyDisabled,
    KeyExhausted,
    KeyExists,
    KeyNotFound,
    KeyPending,
    ManifestError,
    NeedGrant,
    NodeUnavailable,
    OlderVersion,
    Overloaded,
    ProtocolError,
    QuorumUnavailable,
    RegistryUnavailable,
    ShareCorrupt,
    StaleKey,
    StoreUnavailable,
    TokenError,
    UnsupportedAlgorithm,
    VersionRetired,
    error_from_code,
)
from engine.keys import OPERATIONS, Algorithm, KeyKind, RequestType, algorithm, normalize_material, public_key_pem
from engine.protocol.ciphertext import version_in
from engine.protocol.grant import GRANT_LIFETIME_MAX_MS, issue_grant, issue_trial_grant
from engine.protocol.manifest import (
    MAX_VERSION,
    Cluster,
    ClusterSource,
    CreateOrder,
    DestroyOrder,
    KeyManifest,
    KeyRecord,
    Member,
    RefreshOrder,
    ReshareOrder,
    check_share_counts,
    create_orders,
    destroy_orders,
    open_certificate,
    open_key_manifest,
    read_create_order,
    refresh_orders,
    reshare_orders,
)
from engine.protocol.requests import (
    DEGRADED,
    LATENCY,
    PLAN,
    REPLY_CODECS,
    REQUEST_CODECS,
    REWRAP_MAX,
    BalancerPlan,
    BalancerStatus,
    Create,
    Degraded,
    Describe,
    Destroy,
    Empty,
    Flush,
    KeyDescription,
    KeyEntry,
    ListKeys,
    NodeLatency,
    NodeStatus,
    Operate,
    Prewarm,
    Refresh,
    Reshare,
    Result,
    Rewrap,
    Rewrapped,
    Sealed,
    Settings,
    balancer_status_codec,
    classify_request,
)
from engine.protocol.routing import Router, plain_name, version_label
from engine.protocol.settings import (
    DESTROY_DELAY_MAX_MS,
    KeyState,
    SettingsOrder,
    SettingsRecord,
    issue_settings,
    open_settings,
    read_settings,
    state_of,
)
from engine.protocol.signed import SigningKey, sign_envelope
from engine.protocol.wire import MAX_AAD, MAX_DATA, Name, Reply, reply_codec

__all__ = [
    "Await",
    "Call",
    "Calls",
    "DegradedKey",
    "Description",
    "Destroyed",
    "Ended",
    "Exchange",
    "KeyInfo",
    "KeySettings",
    "KeySummary",
    "LatencyStats",
    "MemberStatus",
    "Pause",
    "Step",
]

CREATE_TIMEOUT_S = 15.0
"""Default time for a creation or destruction: an RSA-4096 key is generated, and every holder writes durably."""
TIMEOUT_MAX_S = 600.0
ATTEMPT_MIN_S = 0.25
"""A node is given at least this long (or what is left), so that a cold gather can end."""
DESCRIBE_ATTEMPT_MAX_S = 1.0
CREATE_ATTEMPT_MIN_S = 2.0
GRANT_LIFETIME_MS = 10_000
ORDER_MARGIN_MS = 60_000
"""An order outlives the call by this, so that a dealer that began within the deadline may end."""
COLD_ROUND_TRIP_MAX_US = 1_000
"""At most this much of an exchange that may have gathered shares is taken for the network's."""
PAUSE_FIRST_S = 0.05
PAUSE_MAX_S = 0.5
MAX_DESCRIPTIONS = 10_000
MAX_CHANGE_ORDER = 2048
MAX_CIPHERTEXT = MAX_DATA + 128
MAX_PROOF = 1024
LIST_PAGE = 200
MAX_PAGES = 100_000
DEFAULT_SHARES = 5
VERSIONS_TRIED = 16
"""How many versions of a key are tried at most for a signature, a MAC or an RSA ciphertext, which tell none."""
VERSIONS_TOLD = 100
REWRAP_BYTES = 56 * 1024
REWRAP_ITEM = 16
"""What ciphertexts and associated data of one request may have, with what each takes beside them."""

T = TypeVar("T")
MemberRole = Literal["node", "balancer"]


@dataclass(frozen=True, slots=True)
class Exchange:
    """Ask ``peer``: ``body`` is the verb's encoded message; the reply is due within ``timeout_s`` seconds.

    Without an answer within ``patience_s`` the call is resumed with None, and the exchange goes on. With none to be had
    by patience (None) the call waits for this exchange alone, and gives up any that were late. A ``fresh`` one gives
    them up too: it is the first of its round, and must not be told of what an earlier round had under way.

    ``extensions`` go along with the request. ``request_class`` and ``cold`` say what it is for, to who looks on.
    """

    peer: str
    verb: str
    body: bytes
    timeout_s: float
    patience_s: float | None = None
    fresh: bool = False
    request_class: str = ""
    cold: bool = False
    extensions: Mapping[str, bytes] | None = None

    @property
    def alone(self) -> bool:
        """Whether what is under way is given up before this begins."""
        return self.fresh or self.patience_s is None


@dataclass(frozen=True, slots=True)
class Await:
    """Go on when one of the exchanges that were late has ended."""


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of an exchange that had been late: a reply, or the error in its place."""

    peer: str
    reply: Reply | None
    error: EngineError | None


@dataclass(frozen=True, slots=True)
class Pause:
    """Resume the call after ``seconds``; exchanges that were late are given up."""

    seconds: float


Step = Exchange | Await | Pause
Call = Generator[Step, Reply | Ended | None, T]


@dataclass(frozen=True, slots=True)
class KeyInfo:
    """What the signed manifest and commit certificate say about a key.

    ``holders`` are in the order of the manifest; ``stored`` are those of them whose receipts made the key valid.
    ``public_key`` is PEM, empty for a symmetric key; ``warnings`` are those of its placement.

    ``state`` is ``enabled``, ``disabled`` or, from the order on, ``destroying``; ``min_version`` the least version that
    may be used; ``destroy_at`` when it is destroyed, in seconds since the Unix epoch, or None. They are what one node
    that was asked knows. ``uses_max`` is how often this version may encrypt, sign and make MACs, 0 without a limit.
    """

    name: str
    algorithm: str
    version: int
    epoch: int
    threshold: int
    shares: int
    holders: tuple[str, ...]
    stored: tuple[str, ...]
    key_id: str
    dealer: str
    public_key: str
    warnings: tuple[str, ...] = ()
    state: KeyState = "enabled"
    min_version: int = 1
    destroy_at: float | None = None
    uses_max: int = 0


@dataclass(frozen=True, slots=True)
class KeySettings:
    """The settings of a key after they were set, for all its versions.

    ``enabled`` is what counts unless it is to be destroyed: until ``destroy_at``, in seconds since the Unix epoch, all
    uses are refused (None: it is not). ``confirmed`` are the nodes that go by them now, ``pending`` those that will
    when they are back.
    """

    name: str
    enabled: bool
    min_version: int
    destroy_at: float | None
    confirmed: tuple[str, ...]
    pending: tuple[str, ...]

    @property
    def state(self) -> KeyState:
        """``enabled``, ``disabled`` or ``destroying``."""
        return "destroying" if self.destroy_at is not None else "enabled" if self.enabled else "disabled"


@dataclass(frozen=True, slots=True)
class KeySummary:
    """One line of a listing, as the nodes tell it; ``state`` as in ``KeyInfo``."""

    name: str
    algorithm: str
    version: int
    threshold: int
    shares: int
    state: KeyState = "enabled"
    settings: int = 0
    """The serial of the settings that say so; 0 where nobody set any."""


@dataclass(frozen=True, slots=True)
class DegradedKey:
    """A version of a key of whose ``holders`` those that are ``missing`` have no share, by the registry's books.

    With more than ``threshold`` left, balancers have new shares made by themselves; with just so many, a client's
    ``repair_key`` does it; with fewer, the key is of no use until one that has its share comes back. ``name`` is empty
    if this client may not list the key.
    """

    name: str
    version: int
    threshold: int
    holders: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def left(self) -> int:
        """How many shares there are."""
        return len(self.holders) - len(self.missing)


@dataclass(frozen=True, slots=True)
class Destroyed:
    """Nodes that erased their share (``confirmed``), and those that will when they come back (``pending``)."""

    name: str
    confirmed: tuple[str, ...]
    pending: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MemberStatus:
    """A member's own account of itself, or the error that came instead of it.

    ``latency`` is told by nodes, ``plan`` by balancers, that were asked for it and know it. ``ahead_ms`` is how far its
    host's clock is ahead of this one's, right within ``within_ms``, half of the time that the answer took; None if it
    does not tell its time.
    """

    name: str
    role: MemberRole
    endpoint: str
    location: str
    status: NodeStatus | BalancerStatus | None
    error: Exception | None
    latency: NodeLatency | None = None
    plan: BalancerPlan | None = None
    ahead_ms: int | None = None
    within_ms: int = 0


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """Round trips of one request class: how many, and percentiles and maximum in seconds, within 1.6 %.

    One is from a request's sending to its answer, also where that was a refusal; a call may need several.
    """

    count: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    p999_s: float
    max_s: float


def _latency_stats(found: Histograms) -> LatencyStats:
    count = found.count()
    p50_s, p90_s, p99_s, p999_s = found.quantiles_s((0.5, 0.9, 0.99, 0.999))
    return LatencyStats(count, found.sum_s() / max(count, 1), p50_s, p90_s, p99_s, p999_s, found.max_s())


@dataclass(frozen=True, slots=True)
class Description:
    """A verified version of a key: its record, its algorithm and its eligible combiners.

    ``label`` is what the client keeps it by: the key's name, of an older version with its number.
    """

    record: KeyRecord
    algorithm: Algorithm
    holders: tuple[str, ...]
    info: KeyInfo
    label: str
    settings: SettingsRecord | None = None

    @property
    def version(self) -> int:
        """Which version it is."""
        return self.record.manifest.version

    def request_class(self, verb: str) -> str:
        """The class under which such a use of it is counted and forecast."""
        return classify_request(verb, self.algorithm.name)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What is asked of one of the ``combiners``: the first label is what is used, all are to be loaded there.

    ``message`` makes the request for a node, with grants where the key may be cold there.
    """

    verb: str
    request_class: str
    labels: tuple[str, ...]
    combiners: tuple[str, ...]
    message: Callable[[str, bool], object]


@dataclass(frozen=True, slots=True)
class _Lost:
    """No reply came, or none that could be understood."""

    error: EngineError


@dataclass(slots=True, repr=False)
class _Use:
    """A use of a key as the caller asked for it, before the algorithm shapes it. ``version`` is 0 if it named none."""

    verb: RequestType
    name: str
    data: bytes
    associated_data: bytes = b""
    proof: bytes = b""
    digest: bytes | None = None
    version: int = 0

    def sought(self, known: Description) -> int:
        """The version that is asked for, or that the ciphertext says it is of; 0 for the newest."""
        tells = self.verb == RequestType.DECRYPT and known.algorithm.kind is KeyKind.AES
        return self.version or (version_in(self.data) if tells else 0)


class Lost(dict[str, Exception]):
    """Nodes that the shortest way has asked in vain, why, and how long that took in seconds."""

    spent_s = 0.0


@dataclass(slots=True)
class _Asked:
    """One node that is being asked: what for, since when, and whether it has used up the call's patience."""

    exchange: Exchange
    started_s: float
    key_name: str
    request_class: str
    cold: bool
    late: bool = False


@dataclass(slots=True)
class _Trail:
    """What one call has tried, and how much time it has left. ``clock`` counts seconds.

    ``failures`` are this round's, ``earlier`` the newest of each node from the rounds before. A call is ``hurried``
    that had less than ``ATTEMPT_MIN_S`` from the start.
    """

    what: str
    clock: Callable[[], float]
    deadline_s: float
    rounds: int = 0
    failures: dict[str, Exception] = field(default_factory=dict)
    earlier: dict[str, Exception] = field(default_factory=dict)
    quorum: list[QuorumUnavailable | ShareCorrupt] = field(default_factory=list)
    version: int = 0
    """The version of the key that was asked for last."""
    hurried: bool = field(init=False)

    def __post_init__(self) -> None:
        self.hurried = not self.earlier and self.left_s() < ATTEMPT_MIN_S

    def left_s(self) -> float:
        return self.deadline_s - self.clock()

    def attempt_s(self, floor_s: float = ATTEMPT_MIN_S, share: float = 1 / 3, most_s: float = TIMEOUT_MAX_S) -> float:
        """How long one node may take: a share of what is left, so that a silent node leaves time for the next."""
        left_s = self.left_s()
        return max(0.001, min(left_s, max(floor_s, min(most_s, left_s * share))))

    def begin_round(self) -> None:
        self.earlier |= self.failures
        self.failures = {}

    def all_are(self, kind: type[Exception]) -> bool:
        return bool(self.failures) and all(isinstance(each, kind) for each in self.failures.values())

    def told(self) -> str:
        return "; ".join(f"{peer}: {error}" for peer, error in (self.earlier | self.failures).items())[:900]

    def shortage(self) -> EngineError:
        if len(self.quorum) == 1:
            return self.quorum[0]
        missing = dict.fromkeys(name for each in self.quorum for name in getattr(each, "missing", ()))
        corrupt = dict.fromkeys(name for each in self.quorum for name in getattr(each, "holders", ()))
        message = "; ".join(dict.fromkeys(str(each) for each in self.quorum))
        if any(isinstance(each, QuorumUnavailable) for each in self.quorum):
            return QuorumUnavailable(message, [*missing, *(name for name in corrupt if name not in missing)])
        return ShareCorrupt(message, corrupt)

    def end_round(self) -> Pause:
        """The pause before another round, or the verdict raised: when it is certain, or no time is left."""
        if self.quorum:
            raise self.in_time(self.shortage())
        # While this client's own CURVE key is being changed, all may refuse it for a moment.
        refused = any(isinstance(each, KeyRefused) for each in self.failures.values())
        changing = refused and not self.rounds and self.left_s() > PAUSE_FIRST_S
        if self.all_are(AccessDenied) and not changing:
            raise AccessDenied(f"{self.what}: every node refuses this client ({self.told()})")
        for error in self.failures.values():
            if isinstance(error, KeyDisabled | VersionRetired):  # nobody served it: whoever did not say so is away
                raise type(error)(f"{self.what}: {error}")
        if self.all_are(KeyNotFound):
            raise KeyNotFound(f"{self.what}: {next(iter(self.failures.values()))}")
        exhausted = [each for each in self.failures.values() if isinstance(each, KeyExhausted)]
        if exhausted and all(isinstance(each, _NO_USES) for each in self.failures.values()):
            raise KeyExhausted(str(exhausted[0]))
        seconds = min(PAUSE_FIRST_S * 2 ** min(self.rounds, 10), PAUSE_MAX_S)
        self.rounds += 1
        if self.left_s() <= seconds:
            raise self.verdict()
        return Pause(seconds)

    def in_time(self, error: EngineError) -> EngineError:
        """The error, unless the call had too little time to find out that nodes or shares are not to be had."""
        if self.hurried and isinstance(error, QuorumUnavailable | NodeUnavailable):
            return DeadlineExceeded(f"{self.what}: not done in the time given, too short to tell why ({error})")
        return error

    def verdict(self) -> EngineError:
        """The error that the newest failures of all nodes amount to."""
        self.begin_round()
        newest = self.earlier
        if not newest:
            return DeadlineExceeded(f"{self.what}: the deadline passed before any node was asked")
        kinds = (
            Overloaded,
            TokenError,
            AuditUnavailable,
            StoreUnavailable,
            StaleKey,
            ManifestError,
            ProtocolError,
            RegistryUnavailable,
            NodeUnavailable,
        )
        if any(isinstance(each, KeyPending) for each in newest.values()):
            return KeyPending(f"{self.what}: not known in time ({self.told()})")
        for kind in kinds:
            if all(isinstance(each, kind) for each in newest.values()):
                return self.in_time(kind(f"{self.what}: {self.told()}"))
        return DeadlineExceeded(f"{self.what}: no node served it in time ({self.told()})")


_NO_USES = (KeyExhausted, NodeUnavailable, DeadlineExceeded)
"""What nodes say that have no uses of a key left, and those say nothing that can't be asked."""


def _newer(found: Description, known: Description) -> bool:
    """Whether it is of another key of that name, or later: so a node that is behind leads nobody back."""
    new, old = found.record.manifest, known.record.manifest
    return new.lineage != old.lineage or (new.version, new.epoch) > (old.version, old.epoch)


class _Descriptions:
    """Verified descriptions by their label, the longest unused forgotten beyond ``MAX_DESCRIPTIONS``; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Description] = OrderedDict()

    def get(self, name: str) -> Description | None:
        with self._lock:
            found = self._known.get(name)
            if found is not None:
                self._known.move_to_end(name)
            return found

    def peek(self, name: str) -> Description | None:
        """As ``get``, but it counts as no use."""
        return self._known.get(name)

    def put(self, name: str, description: Description) -> None:
        with self._lock:
            self._known[name] = description
            self._known.move_to_end(name)
            if len(self._known) > MAX_DESCRIPTIONS:
                self._known.popitem(last=False)

    def drop(self, name: str = "") -> None:
        with self._lock:
            if name:
                self._known.pop(name, None)
            else:
                self._known.clear()


_FINAL = (InvalidTag, InvalidSignature, AccessDenied, UnsupportedAlgorithm, ValueError)
"""Answers that another node would give too."""
_CREATE_FINAL = (KeyExists, UnsupportedAlgorithm, AccessDenied, ValueError)


class Calls:
    """The verbs of one client. Safe for several threads; the generators it returns are each for one.

    ``clock`` gives monotonic seconds, ``now_ms`` milliseconds since the Unix epoch, ``random_bytes`` n random bytes.
    """

    def __init__(
        self,
        cluster: ClusterSource,
        signing: SigningKey,
        router: Router,
        *,
        clock: Callable[[], float],
        now_ms: Callable[[], int],
        random_bytes: Callable[[int], bytes],
        rotates: bool = True,
    ) -> None:
        self._source = cluster
        self._rotates = rotates
        self.router = router
        self._signing = signing
        self.clock = clock
        self._now_ms = now_ms
        self._random_bytes = random_bytes
        self._descriptions = _Descriptions()
        self._round_trips: dict[str, Histograms] = {}
        self.on_description: Callable[[str, Description], None] = lambda name, known: None
        """Told of each key that was described."""

    def round_trips(self) -> dict[str, LatencyStats]:
        """How long the answers to requests took, by request class."""
        return {name: _latency_stats(found) for name, found in sorted(self._round_trips.items())}

    def times_of(self, request_class: str) -> Histograms:
        """Where is noted how long answers take."""
        found = self._round_trips.get(request_class)
        return self._round_trips.setdefault(request_class, Histograms()) if found is None else found

    def _took(self, request_class: str, elapsed_s: float) -> None:
        self.times_of(request_class).record(0, elapsed_s)

    @property
    def cluster(self) -> Cluster:
        """The newest manifest."""
        return self._source.cluster

    def may_use(self, label: str) -> bool:
        """Whether the policy lets this client have the key loaded: whoever may use it, or load it."""
        name = plain_name(label)
        return any(self.cluster.allows(self._signing.name, each, name) for each in (RequestType.PREWARM, *OPERATIONS))

    # --- uses of a key ---

    # ``lost`` is what the shortest way has tried before.

    def encrypt(
        self, name: str, plaintext: bytes, associated_data: bytes, timeout_s: float, *, lost: Lost | None = None
    ) -> Call[bytes]:
        """The ciphertext; ``ValueError`` for more than 48 KiB."""
        data = as_bytes("plaintext", plaintext)
        if len(data) > MAX_DATA:
            raise ValueError(f"plaintext of {len(data)} bytes; the limit is {MAX_DATA}, encrypt_stream has none")
        aad = as_bytes("associated_data", associated_data)
        return self._operate(_Use(RequestType.ENCRYPT, name, data, _bounded_aad(aad)), timeout_s, lost)

    # ``version`` is the one that something was made by; 0 where it tells that itself, or all are to be tried.

    def decrypt(
        self,
        name: str,
        ciphertext: bytes,
        associated_data: bytes,
        timeout_s: float,
        *,
        version: int = 0,
        lost: Lost | None = None,
    ) -> Call[bytes]:
        """The plaintext, or ``InvalidTag``."""
        data = as_bytes("ciphertext", ciphertext)
        if len(data) > MAX_CIPHERTEXT:
            raise ValueError(
                f"ciphertext of {len(data)} bytes; the limit is {MAX_CIPHERTEXT}, decrypt_stream takes what "
                "encrypt_stream made"
            )
        aad = as_bytes("associated_data", associated_data)
        use = _Use(RequestType.DECRYPT, name, data, _bounded_aad(aad), version=version)
        return self._operate(use, timeout_s, lost)

    def sign(
        self, name: str, message: bytes | None, digest: bytes | None, timeout_s: float, *, lost: Lost | None = None
    ) -> Call[bytes]:
        """The signature of a message, or of its digest where the algorithm hashes first."""
        return self._operate(_Use(RequestType.SIGN, name, *_message(message, digest)), timeout_s, lost)

    def verify(
        self,
        name: str,
        message: bytes | None,
        signature: bytes,
        digest: bytes | None,
        timeout_s: float,
        *,
        version: int = 0,
        lost: Lost | None = None,
    ) -> Call[bytes]:
        """Nothing, or ``InvalidSignature``."""
        data, _, _, hashed = _message(message, digest)
        proof = _proof("signature", signature)
        use = _Use(RequestType.VERIFY, name, data, b"", proof, hashed, version)
        return self._operate(use, timeout_s, lost)

    def mac(self, name: str, message: bytes, timeout_s: float, *, lost: Lost | None = None) -> Call[bytes]:
        """The MAC of a message."""
        return self._operate(_Use(RequestType.MAC, name, as_bytes("message", message)), timeout_s, lost)

    def verify_mac(
        self,
        name: str,
        message: bytes,
        tag: bytes,
        timeout_s: float,
        *,
        version: int = 0,
        lost: Lost | None = None,
    ) -> Call[bytes]:
        """Nothing, or ``InvalidSignature``."""
        data, proof = as_bytes("message", message), _proof("MAC", tag)
        use = _Use(RequestType.VERIFY_MAC, name, data, b"", proof, version=version)
        return self._operate(use, timeout_s, lost)

    def _operate(self, use: _Use, timeout_s: float, lost: Lost | None) -> Call[bytes]:
        if not isinstance(use.name, str):
            raise TypeError(f"a key's name must be str, not {type(use.name).__name__}")
        if use.name != plain_name(use.name):
            check_name(use.name)  # it would be the label of an older version
        origin = active_trace()
        called = self._operating(use, check_timeout(timeout_s), lost)
        return called if origin is None else _traced(use.verb, called, origin)

    def _operating(self, use: _Use, timeout_s: float, lost: Lost | None) -> Call[bytes]:
        lost = Lost() if lost is None else lost
        deadline_s = self.clock() + timeout_s - lost.spent_s
        kept = self._descriptions.get(use.name)
        if kept is not None and use.verb not in kept.algorithm.operations:
            # The name may be another key's by now, of an algorithm that can do this.
            self._descriptions.drop(use.name)
        trail = self._trail_of(use, deadline_s, lost)
        try:
            while True:
                try:
                    return (yield from self._using(use, trail))
                except KeyExhausted as error:
                    yield from self._renewed(use.name, trail, error)
                    trail = self._trail_of(use, deadline_s, Lost())
        except (OlderVersion, InvalidSignature, InvalidTag) as error:
            known = self._descriptions.peek(use.name)
            if known is None or use.sought(known) or known.algorithm.kind is KeyKind.AES:
                raise _unfit(use, error) from None
            unfit = error
        return (yield from self._trying(use, known, deadline_s, unfit))

    def _renewed(self, name: str, trail: _Trail, exhausted: KeyExhausted) -> Call[None]:
        """Rotate a key that was used as often as it may be, unless somebody has; raise it where this client may not."""
        left_s = trail.left_s()
        if not self._rotates or not self.cluster.allows(self._signing.name, RequestType.ROTATE, name) or left_s <= 0:
            raise exhausted
        rotation = _Trail(f"rotate {name!r}", self.clock, self.clock() + left_s)
        yield from self._rotating(name, left_s, rotation, trail.version)

    def _trail_of(self, use: _Use, deadline_s: float, lost: Lost) -> _Trail:
        return _Trail(f"{use.verb} with {use.name[:128]!r}", self.clock, deadline_s, earlier=lost)

    def _trying(self, use: _Use, newest: Description, deadline_s: float, unfit: EngineError) -> Call[bytes]:
        """What does not fit to the newest version may fit to another one: try these, the newest first."""
        tried = newest.version
        if isinstance(unfit, OlderVersion):
            self._descriptions.drop(use.name)
            newest = yield from self._described(use.name, self._trail_of(use, deadline_s, Lost()), unlike=newest)
        lowest = max(1, newest.version - VERSIONS_TRIED)
        for version in range(newest.version, lowest - 1, -1):
            if version == tried:
                continue
            try:
                older = replace(use, version=version)
                return (yield from self._using(older, self._trail_of(use, deadline_s, Lost())))
            except (OlderVersion, InvalidSignature, InvalidTag):
                continue
            except (KeyNotFound, VersionRetired):
                break  # that is how far back the key goes
        raise _unfit(use, unfit)

    def _resolved(self, use: _Use, trail: _Trail, unlike: Description | None = None) -> Call[Description]:
        """The version that a use is of, by what is known; ``unlike`` proved old somewhere."""
        if unlike is not None:
            self._descriptions.drop(use.name)
            self._descriptions.drop(unlike.label)
        newest = yield from self._described(use.name, trail, unlike)
        sought = use.sought(newest)
        if sought > newest.version:
            self._descriptions.drop(use.name)
            newest = yield from self._described(use.name, trail, unlike=newest)
        if not 0 < sought < newest.version:
            return newest
        return (yield from self._described(use.name, trail, unlike, sought))

    def _using(self, use: _Use, trail: _Trail) -> Call[bytes]:
        known = yield from self._resolved(use, trail)
        refreshed = False
        while True:
            trail.begin_round()
            trail.version = known.version
            answer = yield from self._round(self._wanted(use, known, trail), trail, refreshed)
            if isinstance(answer, Result):
                return bytes(answer.data)
            if answer is not None:
                # The key changed under us: learn what it is now and begin again, once a round.
                refreshed = True
                known = yield from self._resolved(use, trail, unlike=known)
                continue
            pause = trail.end_round()
            yield pause
            refreshed = False  # by now the key may have changed again

    def peek(self, name: str) -> Description | None:
        """What is known of a key."""
        return self._descriptions.peek(name)

    @staticmethod
    def direct_any(frame: bytes) -> Reply | None:
        """The reply in a frame, if it is one."""
        try:
            reply = reply_codec.decode(frame)
        except ProtocolError:
            return None
        return reply if spoken().takes(reply.version) else None

    @classmethod
    def direct_reply(cls, frame: bytes, number: int) -> Reply | None:
        """The reply in a frame, if it is to that request."""
        reply = cls.direct_any(frame)
        return reply if reply is not None and reply.id == number else None

    def direct_outcome(
        self, node: str, verb: str, reply: Reply, started_s: float, key_name: str, request_class: str
    ) -> bytes | None:
        """What a use by the shortest way comes to that got another answer than the plain one; None if it goes on."""
        outcome = _outcome(verb, reply, "node")
        self.learn(node, reply, outcome, started_s, key_name, request_class, False)
        if isinstance(outcome, _FINAL):
            known = self._descriptions.peek(key_name)
            if isinstance(outcome, InvalidSignature | InvalidTag) and known is not None and known.version > 1:
                return None  # another version may fit
            raise outcome
        return None if isinstance(outcome, Exception | _Lost) else bytes(outcome.data)

    def _round(self, wanted: _Wanted, trail: _Trail, refreshed: bool) -> Call[Any]:
        """Ask the combiners in turn: the result, the word that the description is old, or None when all failed."""
        label = wanted.labels[0]
        queue = deque(self.router.rank(wanted.request_class, label, wanted.combiners, self.clock()))
        asked: set[str] = set()
        granted: set[str] = set()
        wanting: set[str] = set()
        with _Race(self, trail) as race:
            while trail.left_s() > 0:
                node = _next(queue, asked)
                if node:
                    cold = node in wanting or not all(self.router.is_loaded(each, node) for each in wanted.labels)
                    if cold:
                        granted.add(node)
                    message = wanted.message(node, cold)
                    ended = yield from race.ask(node, wanted.verb, message, label, wanted.request_class, cold=cold)
                elif race.waiting:
                    ended = yield from race.wait()
                else:
                    break
                if ended is None:
                    continue
                node, outcome = ended
                if isinstance(outcome, NeedGrant) and node not in granted:
                    wanting.add(node)
                    asked.discard(node)
                    queue.appendleft(node)
                elif isinstance(outcome, Moved):
                    if not refreshed and node in wanted.combiners and not set(outcome.names) <= set(wanted.combiners):
                        return outcome  # it was a holder, and others are now
                    queue.extendleft(name for name in reversed(outcome.names) if name in self.cluster.nodes)
                    trail.failures[node] = outcome
                elif isinstance(outcome, StaleKey | KeyNotFound):
                    if not refreshed:
                        return outcome
                    trail.failures[node] = outcome
                elif isinstance(outcome, Exception | _Lost):
                    self._refused(node, outcome, trail)
                else:
                    return outcome
        return None

    def _refused(self, node: str, outcome: Exception | _Lost, trail: _Trail) -> None:
        """Raise what is final; keep the rest, so that the next node is asked."""
        if isinstance(outcome, _Lost):
            trail.failures[node] = outcome.error
            return
        trail.failures[node] = outcome
        if isinstance(outcome, (*_FINAL, OlderVersion)):
            raise outcome
        if isinstance(outcome, QuorumUnavailable | ShareCorrupt):
            # Those that it misses are asked all the same: they may be on the other side of a partition, with enough.
            trail.quorum.append(outcome)

    def _wanted(self, use: _Use, known: Description, trail: _Trail) -> _Wanted:
        data, digested = _shape(use, known.algorithm)

        def message(node: str, cold: bool) -> Operate:
            return Operate(
                key=use.name,
                key_id=known.record.manifest.key_id,
                data=data,
                associated_data=use.associated_data,
                proof=use.proof,
                digested=digested,
                grant=self._grant(known.record, use.verb, node, trail.left_s()) if cold else b"",
            )

        return _Wanted(use.verb, known.request_class(use.verb), (known.label,), known.holders, message)

    # --- what an older version encrypted, encrypted anew ---

    def rewrap(
        self, name: str, items: Sequence[tuple[bytes, bytes]], timeout_s: float
    ) -> Call[list[bytes | Exception]]:
        """The ciphertexts of some (ciphertext, associated data) by the newest version, or an error for each.

        All are of one version, and fit one request (``rewrap_batches``).
        """
        check_name(name)
        trail = self._trail(f"rewrap of {name!r}", timeout_s)
        return _maybe_traced("rewrap", self._rewrapping(name, items, trail))

    def _rewrapping(
        self, name: str, items: Sequence[tuple[bytes, bytes]], trail: _Trail
    ) -> Call[list[bytes | Exception]]:
        use = _Use(RequestType.DECRYPT, name, items[0][0])
        old = yield from self._resolved(use, trail)
        refreshed = False
        while True:
            new = yield from self._described(name, trail)
            if new.algorithm.kind is not KeyKind.AES:
                raise ValueError(f"the key {name!r} is {new.algorithm.name}: rewrapping is for AES-GCM alone")
            trail.begin_round()
            answer = yield from self._round(self._rewrap_wanted(old, new, items, trail), trail, refreshed)
            if isinstance(answer, Rewrapped):
                if len(answer.results) != len(items):
                    raise ProtocolError(f"rewrap of {name!r}: {len(answer.results)} results for {len(items)}")
                return [error_from_code(each.code, each.text) if each.code else each.data for each in answer.results]
            if answer is not None:
                refreshed = True
                old = yield from self._resolved(use, trail, unlike=new)
                continue
            try:
                pause = trail.end_round()
            except KeyExhausted as error:
                trail.version = new.version
                yield from self._renewed(name, trail, error)
                continue
            yield pause
            refreshed = False

    def _rewrap_wanted(
        self, old: Description, new: Description, items: Sequence[tuple[bytes, bytes]], trail: _Trail
    ) -> _Wanted:
        name = new.info.name
        combiners = tuple(node for node in new.holders if node in old.holders)
        if not combiners:
            raise NodeUnavailable(
                f"no node holds both version {old.version} and {new.version} of {name!r}: reshare one to the other's"
            )

        def message(node: str, cold: bool) -> Rewrap:
            grants = [
                self._grant(each.record, RequestType.REWRAP, node, trail.left_s()) if cold else b""
                for each in (old, new)
            ]
            ids = old.record.manifest.key_id, new.record.manifest.key_id
            return Rewrap(name, *ids, [Sealed(*item) for item in items], *grants)

        request_class = new.request_class(RequestType.REWRAP)
        return _Wanted(RequestType.REWRAP, request_class, (new.label, old.label), combiners, message)

    def _grant(self, record: KeyRecord, operation: str, combiner: str, left_s: float) -> bytes:
        lifetime_ms = max(1_000, min(GRANT_LIFETIME_MS, int(left_s * 1000) + 1))
        return issue_grant(
            self._signing, record, operation, combiner, self._now_ms(), lifetime_ms, self._random_bytes(16)
        )

    # --- what a key is ---

    def key_info(self, name: str, timeout_s: float, version: int = 0) -> Call[KeyInfo]:
        """What the newest description says, of the newest version (0) or another one; asked afresh."""
        trail = self._trail(f"describe {str(name)[:128]!r}", timeout_s)
        check_name(name)
        return _maybe_traced("describe", self._key_info(name, version, trail))

    def _key_info(self, name: str, version: int, trail: _Trail) -> Call[KeyInfo]:
        self._descriptions.drop(name)
        newest = yield from self._described(name, trail)
        if version in (0, newest.version):
            return newest.info
        self._descriptions.drop(version_label(name, version))
        return (yield from self._described(name, trail, version=version)).info

    def key_versions(self, name: str, timeout_s: float) -> Call[tuple[KeyInfo, ...]]:
        """The versions of a key that there are, the newest first."""
        trail = self._trail(f"describe {str(name)[:128]!r}", timeout_s)
        check_name(name)
        return _maybe_traced("describe", self._key_versions(name, trail))

    def _key_versions(self, name: str, trail: _Trail) -> Call[tuple[KeyInfo, ...]]:
        found = [(yield from self._key_info(name, 0, trail))]
        for version in range(found[0].version - 1, max(0, found[0].version - VERSIONS_TOLD), -1):
            try:
                found.append((yield from self._key_info(name, version, trail)))
            except KeyNotFound:
                continue
        return tuple(found)

    def describe(self, name: str, timeout_s: float, version: int = 0) -> Call[Description]:
        """The verified description, kept from an earlier call if there was one."""
        trail = self._trail(f"describe {str(name)[:128]!r}", timeout_s)
        check_name(name)
        return _maybe_traced("describe", self._describing(name, version, trail))

    def _describing(self, name: str, version: int, trail: _Trail) -> Call[Description]:
        newest = yield from self._described(name, trail)
        return newest if version in (0, newest.version) else (yield from self._described(name, trail, version=version))

    def public_key(self, name: str, timeout_s: float, version: int = 0) -> Call[str]:
        """The public key as PEM; ``ValueError`` for a symmetric key."""
        return self._public_key(name, self.describe(name, timeout_s, version))

    def _public_key(self, name: str, describe: Call[Description]) -> Call[str]:
        known = yield from describe
        if not known.info.public_key:
            raise ValueError(f"the key {name!r} is symmetric ({known.algorithm.name}): it has no public key")
        return known.info.public_key

    def _described(
        self, name: str, trail: _Trail, unlike: Description | None = None, version: int = 0
    ) -> Call[Description]:
        """Ask for the key's description, preferring one that is newer than ``unlike``, which proved old somewhere.

        ``version`` is an older one, or 0 for the newest.
        """
        known = self._descriptions.get(version_label(name, version) if version else name)
        if known is not None:
            return known
        check_name(name)
        while True:
            trail.begin_round()
            found = yield from self._describe_round(name, trail, unlike, version)
            if found is not None:
                self._keep(found)
                return found
            self._unknown(name, version, trail)
            pause = trail.end_round()
            yield pause

    def _describe_round(
        self, name: str, trail: _Trail, unlike: Description | None, version: int
    ) -> Call[Description | None]:
        same: Description | None = None
        nodes = tuple(dict.fromkeys((*self.router.holders(name), *self.cluster.nodes)))
        queue = deque(self.router.order(nodes, self.clock()))
        asked: set[str] = set()
        with _Race(self, trail, DESCRIBE_ATTEMPT_MAX_S) as race:
            while trail.left_s() > 0:
                node = _next(queue, asked)
                if node:
                    ended = yield from race.ask(node, RequestType.DESCRIBE, Describe(name, version))
                elif race.waiting:
                    ended = yield from race.wait()
                else:
                    break
                if ended is None:
                    continue
                node, outcome = ended
                if isinstance(outcome, _Lost):
                    trail.failures[node] = outcome.error
                elif isinstance(outcome, AccessDenied | ValueError):
                    raise outcome
                elif isinstance(outcome, Exception):
                    trail.failures[node] = outcome
                else:
                    try:
                        found = self._opened(name, outcome, version)
                    except (ManifestError, ProtocolError, AccessDenied) as error:
                        trail.failures[node] = ManifestError(f"its description of the key does not verify: {error}")
                        continue
                    if unlike is None or (version and version != unlike.version) or _newer(found, unlike):
                        return found
                    older = found.record.digest != unlike.record.digest
                    same = same or (unlike if older else found)
        return same

    def _keep(self, description: Description) -> None:
        """Keep it by its label; what was the newest version before is kept as an older one."""
        name, label = description.info.name, description.label
        before = self._descriptions.peek(name) if label == name else None
        if (
            before is not None
            and before.record.manifest.lineage == description.record.manifest.lineage
            and before.version < description.version
        ):
            older = version_label(name, before.version)
            self._descriptions.put(older, replace(before, label=older))
        self._descriptions.put(label, description)
        self.on_description(label, description)

    def _unknown(self, name: str, version: int, trail: _Trail) -> None:
        """Raise ``KeyNotFound`` if a node said so and none knew the key; it names the nodes that could not be asked.

        Not while a node has a share of one that may have been made: it finds that out.
        """
        failures = trail.failures
        kinds = {type(error) for error in failures.values()}
        if KeyNotFound not in kinds or KeyPending in kinds:
            return
        silent = [node for node in self.router.holders(name) if not isinstance(failures.get(node), KeyNotFound | Moved)]
        what = f"version {version} of the key" if version else "the key"
        message = f"no node that answers knows {what} {name!r}"
        if silent:
            message += f"; of its placement group could not be asked: {', '.join(silent)}"
        raise KeyNotFound(message)

    def _opened(self, name: str, described: KeyDescription, version: int = 0) -> Description:
        """The description verified: the dealer's signature, the client's order in it, the certificate's receipts.

        ``version`` is the one that was asked for, 0 for the newest.
        """
        record = open_key_manifest(described.manifest, self.cluster)
        manifest = record.manifest
        if manifest.name != name:
            raise ManifestError(f"it is of {manifest.name!r}")
        if version and manifest.version != version:
            raise ManifestError(f"it is of version {manifest.version}, not {version}")
        stored = open_certificate(described.certificate, record, self.cluster)
        settings = open_settings(described.settings, self.cluster, None) if described.settings else None
        if settings is not None and (settings.order.lineage, settings.order.name) != (manifest.lineage, name):
            raise ManifestError(f"its settings are those of {settings.order.name!r}")
        try:
            public_key = public_key_pem(manifest.public_key) if manifest.public_key else ""
        except ValueError as error:
            raise ManifestError(f"the public key of {name!r}: {error}") from None
        info = KeyInfo(
            name=name,
            algorithm=manifest.algorithm,
            version=manifest.version,
            epoch=manifest.epoch,
            threshold=manifest.threshold,
            shares=manifest.shares,
            holders=tuple(holder.node for holder in manifest.holders),
            stored=stored,
            key_id=manifest.key_id.hex(),
            dealer=record.dealer,
            public_key=public_key,
            warnings=tuple(described.warnings),
            state=state_of(settings),
            min_version=settings.order.min_version if settings is not None else 1,
            destroy_at=_seconds(settings.order.destroy_at_ms) if settings is not None else None,
            uses_max=manifest.uses_max,
        )
        label = version_label(name, version) if version else name
        return Description(record, algorithm(manifest.algorithm), info.holders, info, label, settings)

    # --- loading ahead ---

    def prewarm_at(self, node: str, name: str, timeout_s: float) -> Call[str]:
        """Have one combiner gather and load the key before its first use; its name."""
        trail = self._trail(f"prewarm {str(name)[:128]!r} at {node}", timeout_s)
        return _maybe_traced("prewarm", self._prewarming(node, name, trail))

    def _prewarming(self, node: str, name: str, trail: _Trail) -> Call[str]:
        known = yield from self._described(name, trail)
        left_s = max(0.001, trail.left_s())
        message = self._prewarm(known, node, left_s)
        outcome = yield from self._ask(node, RequestType.PREWARM, message, left_s, key_name=name, cold=True)
        if isinstance(outcome, _Lost):
            raise outcome.error
        if isinstance(outcome, Exception):
            raise outcome
        return node

    def _prewarm(self, known: Description, node: str, left_s: float) -> Prewarm:
        # The grant names an operation this client may do: any of them would load the key as well.
        name, able = known.info.name, sorted(known.algorithm.operations)
        operation = next((each for each in able if self.cluster.allows(self._signing.name, each, name)), able[0])
        grant = self._grant(known.record, operation, node, left_s)
        return Prewarm(name, known.record.manifest.key_id, grant)

    def warm_at(self, node: str, label: str, timeout_s: float) -> Call[bool]:
        """Have a holder load a key that is known here, beside everything else: whether it has it loaded now.

        A node that is no holder, or says that the key is another one by now, is asked what it knows of it first: who
        became a holder knows. The router is not told how the exchanges went, for they are nobody's use of the key.
        """
        trail = self._trail(f"prewarm {label!r} at {node}", timeout_s)
        known = self._descriptions.peek(label)
        if known is not None and node in known.holders:
            outcome = yield from self._warm(node, known, trail)
            if not isinstance(outcome, StaleKey | KeyNotFound):
                return not isinstance(outcome, Exception | _Lost)
        if known is None:
            return False
        name, version = known.info.name, known.version if known.label != known.info.name else 0
        described = yield from self._ask(
            node, RequestType.DESCRIBE, Describe(name, version), max(0.001, trail.left_s()), counted=False
        )
        if isinstance(described, Exception | _Lost):
            return False
        try:
            found = self._opened(name, described, version)
        except (ManifestError, ProtocolError, AccessDenied):
            return False
        if not _newer(found, known):
            return False
        self._keep(found)
        if node not in found.holders:
            return False
        return not isinstance((yield from self._warm(node, found, trail)), Exception | _Lost)

    def _warm(self, node: str, known: Description, trail: _Trail) -> Call[Any]:
        left_s = max(0.001, trail.left_s())
        message = self._prewarm(known, node, left_s)
        return (yield from self._ask(node, RequestType.PREWARM, message, left_s, counted=False))

    # --- creation and destruction ---

    def create_key(
        self,
        name: str,
        algorithm_name: str,
        threshold: int | None,
        shares: int | None,
        timeout_s: float,
        uses_max: int | None = None,
    ) -> Call[KeyInfo]:
        """Generate a key on a node of the cluster, split t-of-n."""
        order = self._order("generate", name, algorithm(algorithm_name), threshold, shares, timeout_s)
        if uses_max is not None:
            order = structs.replace(order, uses_max=_uses(algorithm(algorithm_name), uses_max))
        return _maybe_traced("generate", self._creating(order, b"", self._trail(f"create {name!r}", timeout_s)))

    def import_key(
        self,
        name: str,
        algorithm_name: str,
        key_material: bytes,
        threshold: int | None,
        shares: int | None,
        timeout_s: float,
    ) -> Call[KeyInfo]:
        """Bring a key in; its material is checked and made canonical here, before anything is sent."""
        algo = algorithm(algorithm_name)
        material = normalize_material(algo, key_material)
        order = self._order("import", name, algo, threshold, shares, timeout_s)
        return _maybe_traced("import", self._creating(order, material, self._trail(f"import {name!r}", timeout_s)))

    def _order(
        self,
        operation: Literal["generate", "import"],
        name: str,
        algo: Algorithm,
        threshold: int | None,
        shares: int | None,
        timeout_s: float,
    ) -> CreateOrder:
        check_name(name)
        nodes = len(self.cluster.nodes)
        count = min(DEFAULT_SHARES, nodes) if shares is None else _as_int("shares", shares)
        needed = count // 2 + 1 if threshold is None else _as_int("threshold", threshold)
        check_share_counts(needed, count)
        if count > nodes:
            raise ValueError(f"{count} shares; the cluster has {nodes} nodes, and each holds one share at most")
        return CreateOrder(
            key_id=self._random_bytes(16),
            name=name,
            algorithm=algo.name,
            threshold=needed,
            shares=count,
            operation=operation,
            expires_ms=self._now_ms() + int(timeout_s * 1000) + ORDER_MARGIN_MS,
        )

    def rotate_key(self, name: str, timeout_s: float) -> Call[KeyInfo]:
        """Make the next version of a key; the newest one, if another client makes that meanwhile."""
        check_name(name)
        trail = self._trail(f"rotate {name!r}", timeout_s)
        return _maybe_traced("rotate", self._rotating(name, timeout_s, trail))

    def _rotating(self, name: str, timeout_s: float, trail: _Trail, exhausted: int = 0) -> Call[KeyInfo]:
        """With an ``exhausted`` version only if that is still the newest one."""
        self._descriptions.drop(name)
        known = yield from self._described(name, trail)
        manifest = known.record.manifest
        if exhausted and manifest.version > exhausted:
            return known.info
        if manifest.version >= MAX_VERSION:
            raise ValueError(f"{name!r} has version {manifest.version}, and there is none beyond {MAX_VERSION}")
        order = CreateOrder(
            key_id=self._random_bytes(16),
            name=name,
            algorithm=manifest.algorithm,
            threshold=manifest.threshold,
            shares=manifest.ordered_shares,
            operation="rotate",
            expires_ms=self._now_ms() + int(timeout_s * 1000) + ORDER_MARGIN_MS,
            version=manifest.version + 1,
            lineage=manifest.lineage,
            uses_max=read_create_order(manifest.order).uses_max,
        )
        return (yield from self._creating(order, b"", trail, known.holders))

    def _creating(self, order: CreateOrder, material: bytes, trail: _Trail, first: Sequence[str] = ()) -> Call[KeyInfo]:
        raw = sign_envelope("order.create", self._now_ms(), create_orders.encode(order), self._signing)
        verb = RequestType(order.operation)
        asked: set[str] = set()
        message, request_class = Create(raw, material), classify_request(verb, order.algorithm)
        described = yield from self._dealing(verb, order.name, lambda: message, trail, asked, request_class, first)
        known = self._opened(order.name, described)
        told = known.record.manifest
        if told.key_id != order.key_id and order.lineage and told.lineage == order.lineage:
            if told.version < order.version:
                raise ManifestError(f"rotate {order.name!r}: the dealer answered with version {told.version}")
            self._keep(known)  # another client's order came before
            return known.info
        if told.key_id != order.key_id:
            raise ManifestError(f"create {order.name!r}: the dealer answered with another key of that name")
        if known.record.dealer not in asked:
            # The dealer knows the key. Who passes the order on to a dealer of its own choice could have it made there.
            raise ManifestError(
                f"create {order.name!r}: {known.record.dealer!r} dealt the key, which was never asked to; it may know "
                "it: destroy it"
            )
        self._keep(known)
        return known.info

    def _dealing(
        self,
        verb: str,
        name: str,
        message: Callable[[], object],
        trail: _Trail,
        asked: set[str] | None = None,
        request_class: str = "",
        first: Sequence[str] = (),
    ) -> Call[Any]:
        """Send an order to one dealer after the other until one carries it out; the order makes that idempotent.

        ``message`` makes the one for each in turn. Those in ``first`` come first. ``asked`` takes in who was sent it.
        Those come last that have worked on this ``request_class`` for more than its part of them.
        """
        without_registry = 0
        asked = set() if asked is None else asked
        while True:
            trail.begin_round()
            members = (*first, *self.router.holders(name), *self.cluster.nodes)
            nodes = tuple(node for node in dict.fromkeys(members) if node in self.cluster.nodes)
            for node in self.router.order(nodes, self.clock(), request_class):
                if trail.left_s() <= 0:
                    break
                timeout_s = trail.attempt_s(CREATE_ATTEMPT_MIN_S, 1 / 2)
                asked.add(node)
                begun_s = self.clock()
                outcome = yield from self._ask(node, verb, message(), timeout_s, counted=False)
                self.router.worked(node, request_class, self.clock() - begun_s, self.clock())
                if isinstance(outcome, _Lost):
                    trail.failures[node] = outcome.error
                    continue
                if not isinstance(outcome, Exception):
                    return outcome
                trail.failures[node] = outcome
                if isinstance(outcome, _CREATE_FINAL):
                    raise outcome
                if isinstance(outcome, RegistryUnavailable | QuorumUnavailable):
                    # Another dealer may reach what this one does not; a third would only say the same.
                    without_registry += 1
                    if without_registry > 1:
                        raise outcome
            if without_registry:
                raise next(e for e in trail.failures.values() if isinstance(e, RegistryUnavailable | QuorumUnavailable))
            pause = trail.end_round()
            yield pause

    def destroy_key(self, name: str, timeout_s: float) -> Call[Destroyed]:
        """Destroy a key for good, all versions of it."""
        check_name(name)
        trail = self._trail(f"destroy {name!r}", timeout_s)
        return _maybe_traced("destroy", self._destroying(name, timeout_s, trail))

    def _destroying(self, name: str, timeout_s: float, trail: _Trail) -> Call[Destroyed]:
        self._descriptions.drop(name)
        known = yield from self._described(name, trail)
        expires_ms = self._now_ms() + int(timeout_s * 1000) + ORDER_MARGIN_MS
        order = DestroyOrder(known.record.manifest.lineage, name, expires_ms)
        raw = sign_envelope("order.destroy", self._now_ms(), destroy_orders.encode(order), self._signing)
        done = yield from self._dealing(RequestType.DESTROY, name, partial(Destroy, raw), trail)
        for label in (name, *(version_label(name, version) for version in range(1, known.version))):
            self._descriptions.drop(label)
            self.router.forget_loaded(label)
        return Destroyed(name, tuple(done.confirmed), tuple(done.pending))

    # --- settings ---

    def disable_key(self, name: str, timeout_s: float) -> Call[KeySettings]:
        """Have every use of a key refused until it is enabled again."""
        return self._set("disable", name, lambda order: structs.replace(order, enabled=False), timeout_s)

    def enable_key(self, name: str, timeout_s: float) -> Call[KeySettings]:
        """Let a disabled key be used again."""
        return self._set("enable", name, lambda order: structs.replace(order, enabled=True), timeout_s)

    def set_min_version(self, name: str, version: int, timeout_s: float) -> Call[KeySettings]:
        """Have uses of the versions of a key below ``version`` refused."""
        if not 1 <= _as_int("version", version) < 2**32:
            raise ValueError(f"version {version}; it must lie in 1..{2**32 - 1}")
        return self._set(
            "set min_version of", name, lambda order: structs.replace(order, min_version=version), timeout_s
        )

    def destroy_later(self, name: str, after_s: float, timeout_s: float) -> Call[KeySettings]:
        """Have a key destroyed after some seconds, and refused from now on; till then it can be restored."""
        if isinstance(after_s, bool) or not isinstance(after_s, int | float):
            raise TypeError(f"after must be a number of seconds, not {type(after_s).__name__}")
        if not 0 < after_s <= DESTROY_DELAY_MAX_MS / 1000:
            most_s = DESTROY_DELAY_MAX_MS // 1000
            raise ValueError(
                f"after {after_s} s; it must be above 0 and at most {most_s} s, which is {most_s // 86_400} days"
            )
        at_ms = self._now_ms() + int(after_s * 1000)
        return self._set("destroy", name, lambda order: structs.replace(order, destroy_at_ms=at_ms), timeout_s)

    def restore_key(self, name: str, timeout_s: float) -> Call[KeySettings]:
        """Take back the order to destroy a key; it is enabled or disabled as it was before."""
        return self._set("restore", name, lambda order: structs.replace(order, destroy_at_ms=0), timeout_s)

    def _set(
        self, what: str, name: str, change: Callable[[SettingsOrder], SettingsOrder], timeout_s: float
    ) -> Call[KeySettings]:
        check_name(name)
        trail = self._trail(f"{what} {name!r}", timeout_s)
        return _maybe_traced("settings", self._setting(name, change, timeout_s, trail))

    def _setting(
        self, name: str, change: Callable[[SettingsOrder], SettingsOrder], timeout_s: float, trail: _Trail
    ) -> Call[KeySettings]:
        """Change what the newest settings say; begun again from another's that came before."""
        self._descriptions.drop(name)
        known = yield from self._described(name, trail)
        lineage = known.record.manifest.lineage
        settings = known.settings
        while True:
            now_ms = self._now_ms()
            before = settings.order if settings is not None else SettingsOrder(name, lineage, 0, 0, True, 1, 0, 0)
            wanted = change(before)
            if wanted == before and settings is None:
                return KeySettings(name, True, 1, None, (), ())
            if settings is None or wanted != before:
                serial = max(now_ms, before.serial + 1)
                expires_ms = max(now_ms + int(timeout_s * 1000) + ORDER_MARGIN_MS, serial)
                raw = issue_settings(
                    structs.replace(wanted, serial=serial, previous=before.serial, expires_ms=expires_ms), self._signing
                )
            else:
                raw = settings.raw  # nothing is to be changed, but maybe somebody is to be told
            done = yield from self._dealing(
                RequestType.SETTINGS, name, partial(Settings, raw), trail, first=known.holders
            )
            told = open_settings(done.settings, self.cluster, None)
            if (told.order.lineage, told.order.name) != (lineage, name):
                raise ManifestError(f"{trail.what}: the answer is about {told.order.name!r}")
            self._descriptions.drop(name)
            if not told.booked:
                raise ManifestError(f"{trail.what}: the answer is not countersigned by the registry")
            if told.digest == read_settings(raw).digest:
                return _key_settings(told.order, done.confirmed, done.pending)
            if settings is not None and told.serial <= settings.serial:
                raise ManifestError(f"{trail.what}: the registry answered with older settings, {told.serial}")
            settings = told

    def refresh_key(self, name: str, timeout_s: float) -> Call[KeyInfo]:
        """Replace the shares of a key by new ones: an epoch that was begun after this call."""
        check_name(name)

        def order(known: KeyManifest, expires_ms: int) -> tuple[Callable[[], object], bytes]:
            told = RefreshOrder(known.key_id, name, known.epoch, self._random_bytes(16), expires_ms)
            raw = sign_envelope("order.refresh", self._now_ms(), refresh_orders.encode(told), self._signing)
            return partial(Refresh, raw), raw

        trail = self._trail(f"refresh {name!r}", timeout_s)
        return _maybe_traced("refresh", self._changing(RequestType.REFRESH, name, order, timeout_s, trail))

    def reshare_key(
        self,
        name: str,
        threshold: int | None,
        shares: int | None,
        holders: Sequence[str] | None,
        without: Sequence[str],
        timeout_s: float,
        version: int = 0,
    ) -> Call[KeyInfo]:
        """Share a version of a key (0: the newest) among other holders, by an epoch that was begun after this call.

        What is None stays as it is; if only ``shares`` is given, the holders are the first of the placement group.
        """
        check_name(name)
        for what, names in (("holders", holders), ("without", without)):
            if isinstance(names, str):
                raise TypeError(f"{what} must be several names, not a str")
        if holders is not None and shares is not None and len(holders) != shares:
            raise ValueError(f"{shares} shares for {len(holders)} holders")

        def order(known: KeyManifest, expires_ms: int) -> tuple[Callable[[], object], bytes]:
            told = [holder.node for holder in known.holders] if holders is None else list(holders)
            if holders is None and shares is not None:
                told = list(self.cluster.first_holders(self.cluster.group_of(name), shares))
                if len(told) < shares:
                    raise ValueError(
                        f"{shares} shares need as many nodes; the cluster has {len(told)} that are not draining"
                    )
            needed = known.threshold if threshold is None else threshold
            if not told:
                raise ValueError(f"no holders are given; {name!r} needs at least {needed}")
            check_share_counts(needed, len(told))
            twice = next((node for node in told if told.count(node) > 1), None)
            if twice is not None:
                raise ValueError(f"a node can hold one share of a key alone, but {twice!r} stands twice")
            for node in told:
                if node not in self.cluster.nodes:
                    raise ValueError(f"{node!r} is to hold a share of {name!r}, but is no node of the cluster")
                if node in self.cluster.draining and known.holder(node) is None:
                    raise ValueError(f"{node!r} is to hold a share of {name!r}, but is draining")
            for node in without:
                if known.holder(node) is None:
                    raise ValueError(f"{node!r} is no holder of {name!r}, and so there is nothing to give up")
            dealers = [holder.node for holder in known.holders if holder.node not in without]
            trial = ""
            if len(dealers) == known.threshold:  # then by somebody who deals nothing, if there is one
                trial = next((node for node in told if node not in dealers), told[0])
            nonce = self._random_bytes(16)
            wanted = ReshareOrder(
                known.key_id, name, known.epoch, needed, told, list(without), nonce, expires_ms, trial=trial
            )
            raw = sign_envelope("order.reshare", self._now_ms(), reshare_orders.encode(wanted), self._signing)
            if len(raw) > MAX_CHANGE_ORDER:
                raise ValueError(
                    f"{len(told)} holders make an order of {len(raw)} bytes; the limit is {MAX_CHANGE_ORDER}"
                )

            def message() -> Reshare:  # a grant is good once, and so each coordinator gets its own
                grant = b""
                if trial:
                    now_ms, nonce = self._now_ms(), self._random_bytes(16)
                    grant = issue_trial_grant(
                        self._signing, wanted, known.version, now_ms, GRANT_LIFETIME_MAX_MS, nonce
                    )
                return Reshare(raw, grant)

            return message, raw

        trail = self._trail(f"reshare {name!r}", timeout_s)
        return _maybe_traced("reshare", self._changing(RequestType.RESHARE, name, order, timeout_s, trail, version))

    def repair_key(self, name: str, timeout_s: float, version: int, missing: Sequence[str]) -> Call[KeyInfo]:
        """Have the shares of holders that have none made anew: there, or at others where they are no nodes any more."""
        check_name(name)
        trail = self._trail(f"repair {name!r}", timeout_s)
        return _maybe_traced("reshare", self._repairing(name, timeout_s, version, missing, trail))

    def _repairing(
        self, name: str, timeout_s: float, version: int, missing: Sequence[str], trail: _Trail
    ) -> Call[KeyInfo]:
        known = yield from self._key_info(name, version, trail)
        nodes = self.cluster.nodes.keys() - self.cluster.draining
        group = self.cluster.first_holders(self.cluster.group_of(name), len(nodes))
        free = (node for node in group if node not in known.holders)
        holders = []
        for node in known.holders:
            place = node if node not in missing or node in nodes else next(free, "")
            if not place:
                raise ValueError(
                    f"{len(known.holders)} holders of {name!r} need as many nodes; there is none to take the place of "
                    f"{node!r}: add one"
                )
            holders.append(place)
        lacking = [node for node in known.holders if node in missing]
        return (yield from self.reshare_key(name, None, None, holders, lacking, trail.left_s(), version))

    def _changing(
        self,
        verb: RequestType,
        name: str,
        make: Callable[[KeyManifest, int], tuple[Callable[[], object], bytes]],
        timeout_s: float,
        trail: _Trail,
        version: int = 0,
    ) -> Call[KeyInfo]:
        """Have an order carried out that ``make`` signs for the last epoch: what makes its messages, and the order."""
        self._descriptions.drop(name)
        known = yield from self._described(name, trail)
        older = version if version not in (0, known.version) else 0
        if older:
            self._descriptions.drop(version_label(name, older))
            known = yield from self._described(name, trail, version=older)
        expires_ms = self._now_ms() + int(timeout_s * 1000) + ORDER_MARGIN_MS
        while True:
            manifest = known.record.manifest
            message, raw = make(manifest, expires_ms)
            described = yield from self._dealing(verb, name, message, trail, first=known.holders)
            new = self._opened(name, described, older)
            told = new.record.manifest
            if told.key_id != manifest.key_id or told.epoch <= manifest.epoch:
                raise ManifestError(
                    f"{verb} {name!r}: the coordinator answered with epoch {told.epoch} of another time"
                )
            self._keep(new)
            if told.change == raw:
                return new.info
            # What we knew was old already, or another's change came before ours: ours begins from there.
            known = new

    def degraded_keys(self, without: str, timeout_s: float) -> Call[tuple[DegradedKey, ...]]:
        """The versions of keys of which a holder has no share, and of which one would have none without a node."""
        if not isinstance(without, str):
            raise TypeError(f"without must be a node's name, not {type(without).__name__}")
        if without and without not in self.cluster.nodes:
            raise ValueError(f"{without!r} is no node of the cluster; there are {', '.join(self.cluster.nodes)}")
        return _maybe_traced("degraded", self._degraded(without, self._trail("degraded keys", timeout_s)))

    def _degraded(self, without: str, trail: _Trail) -> Call[tuple[DegradedKey, ...]]:
        problems = []
        for balancer in self.cluster.of_role("balancer"):
            found: list[DegradedKey] = []
            after = b""
            try:
                while True:
                    page = yield from self._ask_one(
                        balancer.name, DEGRADED, Degraded(without, after), trail, "balancer"
                    )
                    found += [
                        DegradedKey(each.name, each.version, each.threshold, tuple(each.holders), tuple(each.missing))
                        for each in page.entries
                    ]
                    if page.after <= after:
                        return tuple(sorted(found, key=lambda key: (key.name, key.version)))
                    after = page.after
            except (NodeUnavailable, DeadlineExceeded, RegistryUnavailable, Moved) as error:
                problems.append(f"{balancer.name}: {error}")
        told = "; ".join(problems) or "the cluster manifest names no balancer"
        raise RegistryUnavailable(f"which keys lack a share is not known ({told})")

    # --- questions to one member; the drivers put them to all at once ---

    def list_at(self, node: str, pattern: str, timeout_s: float) -> Call[tuple[KeySummary, ...]]:
        """The names at one node that match the shell glob, page after page."""
        trail = self._trail(f"list at {node}", timeout_s)
        if not isinstance(pattern, str):
            raise TypeError(f"a pattern must be str, not {type(pattern).__name__}")
        if not 1 <= len(pattern) <= 128:
            raise ValueError(f"a pattern of {len(pattern)} characters; 1 to 128 are allowed")
        return _maybe_traced("list", self._listing(node, pattern, trail))

    def _listing(self, node: str, pattern: str, trail: _Trail) -> Call[tuple[KeySummary, ...]]:
        found: list[KeySummary] = []
        after = ""
        for _ in range(MAX_PAGES):
            page = yield from self._ask_one(node, RequestType.LIST, ListKeys(pattern, after, LIST_PAGE), trail)
            found += [_summary(entry) for entry in page.entries]
            if not page.more or not page.entries or page.entries[-1].key <= after:
                break
            after = page.entries[-1].key
        return tuple(found)

    def flush_at(self, node: str, name: str, timeout_s: float) -> Call[int]:
        """Drop one key (or with an empty name all) from a node's cache; how many it dropped."""
        if name:
            check_name(name)
        return _maybe_traced("flush", self._flushing(node, name, self._trail(f"flush at {node}", timeout_s)))

    def _flushing(self, node: str, name: str, trail: _Trail) -> Call[int]:
        flushed = yield from self._ask_one(node, RequestType.FLUSH, Flush(name), trail)
        return int(flushed.dropped)

    def status_at(
        self, member: Member, timeout_s: float, *, latency: bool = False, plan: bool = False
    ) -> Call[MemberStatus]:
        """A node's or balancer's status, or the error in its place; it raises no ``EngineError``.

        With ``latency`` a node is asked for that too, with ``plan`` a balancer for that.
        """
        return _maybe_traced(
            "status", self._status(member, self._trail(f"status of {member.name}", timeout_s), latency, plan)
        )

    def _status(self, member: Member, trail: _Trail, latency: bool, plan: bool) -> Call[MemberStatus]:
        role: MemberRole = "balancer" if member.role == "balancer" else "node"
        status: Any = None
        failure: Exception | None = None
        times: NodeLatency | None = None
        planned: BalancerPlan | None = None
        ahead_ms, within_ms = None, 0
        try:
            asked_ms = self._now_ms()
            status = yield from self._ask_one(member.name, RequestType.STATUS, Empty(), trail, role)
            told_ms = self._now_ms()
            if status.host.time_ms:
                within_ms = (told_ms - asked_ms + 1) // 2
                ahead_ms = status.host.time_ms - (asked_ms + told_ms) // 2
            if latency and role == "node":
                times = yield from self._ask_if_known(member.name, LATENCY, trail)
            if plan and role == "balancer":
                planned = yield from self._ask_if_known(member.name, PLAN, trail, role)
        except (EngineError, ValueError) as error:
            failure = error
        return MemberStatus(
            member.name,
            role,
            member.endpoint,
            member.location,
            status,
            failure,
            times,
            planned,
            ahead_ms,
            within_ms,
        )

    def _ask_if_known(self, peer: str, verb: str, trail: _Trail, role: MemberRole = "node") -> Call[Any]:
        """What a member answers; None of one that does not know the verb."""
        try:
            told = yield from self._ask_one(peer, verb, Empty(), trail, role)
        except ProtocolError:
            return None
        return told

    def _ask_one(self, peer: str, verb: str, message: object, trail: _Trail, role: MemberRole = "node") -> Call[Any]:
        outcome = yield from self._ask(peer, verb, message, max(0.001, trail.left_s()), counted=False, role=role)
        if isinstance(outcome, _Lost):
            raise outcome.error
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    # --- one exchange ---

    def _trail(self, what: str, timeout_s: float) -> _Trail:
        return _Trail(what, self.clock, self.clock() + check_timeout(timeout_s))

    def _ask(
        self,
        peer: str,
        verb: str,
        message: object,
        timeout_s: float,
        *,
        key_name: str = "",
        cold: bool = False,
        counted: bool = True,
        role: MemberRole = "node",
    ) -> Call[Any]:
        """One exchange: the decoded body of an ok reply, the error of another one, or ``_Lost``; none is raised.

        A ``counted`` exchange feeds the router; creations and the like would only spoil its picture of round trips.
        """
        body = REQUEST_CODECS[verb].encode(message)
        started_s = self.clock()
        if counted:
            self.router.sent(peer, started_s)
        try:
            reply = yield Exchange(peer, verb, body, timeout_s, cold=cold)
        except EngineError as error:
            if counted:
                self.router.failed(peer, self.clock())
            return _Lost(error)
        except BaseException:
            # The caller gave the call up, most often because this node was slow; the router counts it so.
            if counted:
                self.router.failed(peer, self.clock())
            raise
        if not isinstance(reply, Reply):
            raise RuntimeError("an exchange must be answered with a reply")
        outcome = _outcome(verb, reply, role)
        if counted:
            self.learn(peer, reply, outcome, started_s, key_name, "", cold)
        return outcome

    def learn(
        self,
        peer: str,
        reply: Reply,
        outcome: Any,
        started_s: float,
        key_name: str,
        request_class: str,
        cold: bool,
    ) -> None:
        """Feed the router with a reply that was asked for at ``started_s``."""
        now_s = self.clock()
        if isinstance(outcome, Overloaded | TokenError | AuditUnavailable | StoreUnavailable | _Lost):
            self.router.failed(peer, now_s)
            return
        self.router.took(request_class, cold, now_s - started_s)
        if request_class:
            self._took(request_class, now_s - started_s)
        elapsed_us = (now_s - started_s) * 1e6
        if cold:
            elapsed_us = min(elapsed_us, reply.load.service_us + COLD_ROUND_TRIP_MAX_US)
        self.router.answered(peer, key_name, request_class, reply.load, elapsed_us, now_s)


class _Race:
    """One round's exchanges, of which the first good answer counts; those without one by then are given up.

    Each node has as long as the router's patience says, each further one twice as long, until the next is asked; and at
    most the trail's time for an attempt (``most_s`` seconds) in all.
    """

    def __init__(self, calls: Calls, trail: _Trail, most_s: float = TIMEOUT_MAX_S) -> None:
        self._calls = calls
        self._trail = trail
        self._most_s = most_s
        self.waiting: dict[str, _Asked] = {}

    def __enter__(self) -> _Race:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tell the router of those that did not answer: they are slow, unless they were not even late."""
        router, now_s = self._calls.router, self._calls.clock()
        given_up = kind is not None and not issubclass(kind, Exception)
        for peer, asked in self.waiting.items():
            if kind is None:
                self._trail.failures.setdefault(peer, DeadlineExceeded(f"{peer}: no reply in time"))
            if asked.late or given_up:
                router.failed(peer, now_s)
            else:
                router.dropped(peer)
        self.waiting.clear()

    def ask(
        self, peer: str, verb: str, message: object, key_name: str = "", request_class: str = "", *, cold: bool = False
    ) -> Call[tuple[str, Any] | None]:
        """Ask one more node: who answered, and its outcome as in ``Calls._ask``; None when it is late."""
        router = self._calls.router
        timeout_s = self._trail.attempt_s(most_s=self._most_s)
        patience_s = min(router.patience_s(peer, request_class, cold) * 2 ** len(self.waiting), timeout_s)
        fresh = not self.waiting
        body = REQUEST_CODECS[verb].encode(message)
        exchange = Exchange(peer, verb, body, timeout_s, patience_s, fresh, request_class, cold)
        asked = _Asked(exchange, self._calls.clock(), key_name, request_class, cold)
        router.sent(peer, asked.started_s)
        self.waiting[peer] = asked
        try:
            answer = yield exchange
        except EngineError as error:
            return self._ended(peer, None, error)
        if answer is None:
            asked.late = True
            router.late(peer, self._calls.clock())
            return None
        if isinstance(answer, Ended):
            return self._ended(answer.peer, answer.reply, answer.error)
        return self._ended(peer, answer, None)

    def wait(self) -> Call[tuple[str, Any] | None]:
        """Wait for one of those that were asked."""
        answer = yield Await()
        if not isinstance(answer, Ended):
            raise RuntimeError("who waits must be told which exchange ended")
        return self._ended(answer.peer, answer.reply, answer.error)

    def _ended(self, peer: str, reply: Reply | None, error: EngineError | None) -> tuple[str, Any]:
        asked = self.waiting.pop(peer)
        if reply is None:
            self._calls.router.failed(peer, self._calls.clock())
            return peer, _Lost(error or DeadlineExceeded(f"{peer}: no reply"))
        outcome = _outcome(asked.exchange.verb, reply, "node")
        self._calls.learn(peer, reply, outcome, asked.started_s, asked.key_name, asked.request_class, asked.cold)
        return peer, outcome


def _maybe_traced(verb: str, call: Call[T]) -> Call[T]:
    """The call, in a span where it belongs to a trace."""
    origin = active_trace()
    return call if origin is None else _traced(verb, call, origin)


def _traced(verb: str, call: Call[T], origin: Origin) -> Call[T]:
    """The call in a span of its own, which each of its requests carries along."""
    span = begin_span(verb, origin)
    failure: BaseException | None = None
    try:
        step = next(call)
        while True:
            if isinstance(step, Exchange):
                span.asks(step.peer, step.request_class, cold=step.cold)
                step = replace(step, extensions=span.extensions)
            try:
                answer = yield step
            except GeneratorExit:
                raise
            except BaseException as error:
                step = call.throw(error)
            else:
                step = call.send(answer)
    except StopIteration as stop:
        result: T = stop.value
        return result
    except BaseException as error:
        failure = error
        raise
    finally:
        call.close()
        span.end(failure)


def _next(queue: deque[str], asked: set[str]) -> str:
    """The next node that was not asked yet, which is then noted; empty if there is none."""
    while queue:
        node = queue.popleft()
        if node not in asked:
            asked.add(node)
            return node
    return ""


def _outcome(verb: str, reply: Reply, role: MemberRole) -> Any:
    try:
        raise_for_status(reply)
    except ProtocolError as error:
        return _Lost(error)
    except (EngineError, ValueError) as error:
        return error
    codec: Any = balancer_status_codec if role == "balancer" and verb == RequestType.STATUS else REPLY_CODECS[verb]
    try:
        return codec.decode(reply.body)
    except ProtocolError as error:
        return _Lost(error)


# --- the boundary ---


def as_bytes(what: str, value: object) -> bytes:
    """The bytes of a bytes-like value; ``TypeError`` names anything else by its type alone."""
    if type(value) is bytes:
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise TypeError(f"{what} must be bytes, not {type(value).__name__}")


def check_name(name: object) -> str:
    """The name, or ``ValueError`` with the rule."""
    if not isinstance(name, str):
        raise TypeError(f"a key's name must be str, not {type(name).__name__}")
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        pass
    else:
        if not name.endswith("\n"):
            return name
    raise ValueError(
        f"key name {name[:140]!r} of {len(name)} characters: a name has 1 to 128 of letters, digits and ._:/@+-, "
        "and begins with a letter or digit"
    )


def check_timeout(timeout_s: object) -> float:
    """The time in seconds, or ``ValueError`` with the limit."""
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float):
        raise TypeError(f"timeout must be a number of seconds, not {type(timeout_s).__name__}")
    if not 0 < timeout_s <= TIMEOUT_MAX_S:
        raise ValueError(f"timeout of {timeout_s} s; it must be above 0 and at most {TIMEOUT_MAX_S:g}")
    return float(timeout_s)


def _uses(algo: Algorithm, value: object) -> int:
    uses = _as_int("uses_max", value)
    most = algo.uses_max or 2**63 - 1
    if not 1 <= uses <= most:
        raise ValueError(f"uses_max {uses}; for {algo.name} it must lie in 1..{most}")
    return uses


def _as_int(what: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{what} must be int, not {type(value).__name__}")
    return value


def _bounded_aad(associated_data: bytes) -> bytes:
    if len(associated_data) > MAX_AAD:
        raise ValueError(f"associated_data of {len(associated_data)} bytes; the limit is {MAX_AAD}")
    return associated_data


def as_version(value: object) -> int:
    """The number of a version, 0 for None; ``ValueError`` with the limits."""
    if value is None:
        return 0
    version = _as_int("version", value)
    if not 1 <= version <= MAX_VERSION:
        raise ValueError(f"version {version}; it must lie in 1..{MAX_VERSION}")
    return version


def _unfit(use: _Use, error: EngineError) -> EngineError:
    """What a caller is told where a use does not fit to any version that was tried."""
    if not isinstance(error, OlderVersion):
        return error
    return (InvalidTag if use.verb == RequestType.DECRYPT else InvalidSignature)(str(error))


def _proof(what: str, value: object) -> bytes:
    proof = as_bytes(what, value)
    if not 1 <= len(proof) <= MAX_PROOF:
        raise InvalidSignature(f"no {what} has {len(proof)} bytes")
    return proof


def _message(message: object, digest: object) -> tuple[bytes, bytes, bytes, bytes | None]:
    """The data, associated data, proof and digest of a use that is given a message or its digest."""
    if (message is None) == (digest is None):
        raise TypeError("give either a message or its digest")
    if digest is not None:
        return b"", b"", b"", as_bytes("digest", digest)
    return as_bytes("message", message), b"", b"", None


def _shape(use: _Use, algo: Algorithm) -> tuple[bytes, bool]:
    """What is sent for ``use`` under the key's algorithm: the data, and whether it is already the digest."""
    if use.verb not in algo.operations:
        can = ", ".join(sorted(algo.operations))
        raise ValueError(f"the key {use.name!r} is {algo.name}: it can {can}, not {use.verb}")
    if use.digest is not None:
        if not algo.prehashed:
            raise ValueError(f"{algo.name} takes whole messages, not a digest")
        size = hashlib.new(algo.hash_name).digest_size
        if len(use.digest) != size:
            raise ValueError(f"a digest of {len(use.digest)} bytes; {algo.name} signs {size} ({algo.hash_name})")
        return use.digest, True
    if algo.prehashed:
        return hashlib.new(algo.hash_name, use.data).digest(), True
    if len(use.data) > MAX_DATA and algo.kind in (KeyKind.HMAC, KeyKind.ED25519):
        raise ValueError(
            f"a message of {len(use.data)} bytes; {algo.name} takes whole messages of at most {MAX_DATA} bytes "
            "(hash longer ones yourself)"
        )
    return use.data, False


def _summary(entry: KeyEntry) -> KeySummary:
    return KeySummary(
        entry.key, entry.algorithm, entry.version, entry.threshold, entry.shares, entry.state, entry.serial
    )


def _seconds(at_ms: int) -> float | None:
    return at_ms / 1000 if at_ms else None


def _key_settings(order: SettingsOrder, confirmed: Sequence[str], pending: Sequence[str]) -> KeySettings:
    return KeySettings(
        order.name,
        order.enabled,
        order.min_version,
        _seconds(order.destroy_at_ms),
        tuple(confirmed),
        tuple(pending),
    )


def rewrap_batches(items: Sequence[tuple[bytes, bytes]]) -> list[list[int]]:
    """Places of the items that go into one request each: of one version, and no more than it can carry."""
    batches: list[list[int]] = []
    open_: dict[int, tuple[list[int], int]] = {}
    for place, (ciphertext, aad) in enumerate(items):
        if len(ciphertext) > MAX_CIPHERTEXT:
            raise ValueError(f"ciphertext of {len(ciphertext)} bytes; the limit is {MAX_CIPHERTEXT}")
        version, size = version_in(ciphertext), len(ciphertext) + len(_bounded_aad(aad)) + REWRAP_ITEM
        batch, filled = open_.get(version, ([], 0))
        if not batch or len(batch) == REWRAP_MAX or filled + size > REWRAP_BYTES:
            batch, filled = [], 0
            batches.append(batch)
        batch.append(place)
        open_[version] = batch, filled + size
    return batches


def merge_lists(pages: Iterable[Sequence[KeySummary]]) -> tuple[KeySummary, ...]:
    """The union of several nodes' listings, sorted by name; of several versions and settings of a key the newest."""
    merged: dict[str, KeySummary] = {}
    for page in pages:
        for entry in page:
            known = merged.setdefault(entry.name, entry)
            newest = max(known, entry, key=lambda each: each.version)
            latest = max(known, entry, key=lambda each: each.settings)
            merged[entry.name] = replace(newest, state=latest.state, settings=latest.settings)
    return tuple(merged[name] for name in sorted(merged))


def succeeded(outcomes: Iterable[T | Exception]) -> tuple[T, ...]:
    """The results among them; the first error raised where there is none."""
    listed = list(outcomes)
    results = tuple(each for each in listed if not isinstance(each, Exception))
    if not results:
        for each in listed:
            if isinstance(each, Exception):
                raise each
    return results


def answered_by_any(outcomes: Mapping[str, T | Exception]) -> list[T]:
    """The results among what the nodes said; raises where one refused or none answered."""
    results = [each for each in outcomes.values() if not isinstance(each, Exception)]
    lost = (NodeUnavailable, DeadlineExceeded, ProtocolError, Overloaded, AuditUnavailable)
    # One node that refuses this client (it may know an older manifest) does not hide what the others say.
    # And a node that does not hold a key has nothing of it to tell, as long as another one has.
    passed_over = (*lost, AccessDenied, KeyNotFound) if results else lost
    for error in outcomes.values():
        if isinstance(error, Exception) and not isinstance(error, passed_over):
            raise error
    if not results:
        told = "; ".join(f"{node}: {error}" for node, error in outcomes.items())[:900]
        raise NodeUnavailable(f"no node answered ({told})")
    return results
