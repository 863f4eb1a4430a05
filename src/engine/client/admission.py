"""What a serving member takes on: its bounds, who is within them, and whose turn it is. No socket and no clock."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from msgspec import Meta, Struct

from engine._version import __version__
from engine.client.speech import spoken
from engine.errors import Overloaded
from engine.protocol.manifest import Cluster, Member
from engine.protocol.requests import CLIENTS_TOLD, ClientSeen, Hello, ServedLimits, Welcome
from engine.protocol.wire import MAX_MESSAGE, Versions

__all__ = [
    "DEFAULT_LIMITS",
    "Admission",
    "Clients",
    "LimitsTable",
    "Refusals",
    "ServiceLimits",
    "TokenBucket",
    "Turns",
    "welcome",
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds of a serving member; the defaults are several times what one busy client needs.

    ``requests`` are those under way in all, ``member_requests`` one member's and ``connection_requests`` those that it
    may have unanswered on one connection and yet be sure of every reply. ``requests_per_s`` is what one member may
    send for ever, with ``burst_s`` seconds' worth at once. ``connections`` are those in all, where 0 means what the
    process's descriptors allow, and ``member_connections`` one member's.
    """

    requests: int = 10_000
    member_requests: int = 1_000
    connection_requests: int = 256
    requests_per_s: float = 10_000.0
    burst_s: float = 10.0
    connections: int = 0
    member_connections: int = 512

    def served(self) -> ServedLimits:
        """The same as ``hello`` tells them."""
        return ServedLimits(
            MAX_MESSAGE,
            self.requests,
            self.member_requests,
            self.connection_requests,
            int(self.requests_per_s),
            self.connections,
            self.member_connections,
        )


DEFAULT_LIMITS = ServiceLimits()
CONNECTIONS_MIN = 64
"""With fewer a member could not even have its cluster's other members connected."""


class LimitsTable(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The section ``[limits]`` of a serving member's configuration."""

    requests: Annotated[int, Meta(ge=1, le=1_000_000)] = DEFAULT_LIMITS.requests
    member_requests: Annotated[int, Meta(ge=1, le=1_000_000)] = DEFAULT_LIMITS.member_requests
    connection_requests: Annotated[int, Meta(ge=1, le=10_000)] = DEFAULT_LIMITS.connection_requests
    requests_per_s: Annotated[float, Meta(gt=0, le=10_000_000)] = DEFAULT_LIMITS.requests_per_s
    burst_s: Annotated[float, Meta(gt=0, le=3_600)] = DEFAULT_LIMITS.burst_s
    connections: Annotated[int, Meta(ge=0, le=1_000_000)] = DEFAULT_LIMITS.connections
    member_connections: Annotated[int, Meta(ge=1, le=1_000_000)] = DEFAULT_LIMITS.member_connections

    def __post_init__(self) -> None:
        if 0 < self.connections < CONNECTIONS_MIN:
            raise ValueError(
                f"connections = {self.connections}; at least {CONNECTIONS_MIN}, or 0 for what the descriptors allow"
            )

    def service(self) -> ServiceLimits:
        """The limits that it sets."""
        return ServiceLimits(
            self.requests,
            self.member_requests,
            self.connection_requests,
            self.requests_per_s,
            self.burst_s,
            self.connections,
            self.member_connections,
        )


def welcome(
    hello: Hello, name: str, boot: bytes, cluster: Cluster, limits: ServiceLimits, versions: Versions | None = None
) -> Welcome:
    """The answer to ``hello``; ``ProtocolError`` to one whose version is too far away."""
    versions = versions or spoken()
    versions.check(hello.version)
    return Welcome(
        versions.highest,
        versions.lowest,
        versions.highest + 1,
        __version__,
        name,
        boot,
        cluster.serial,
        cluster.digest,
        limits.served(),
    )


class Clients:
    """Which clients said ``hello`` since this process began, and what they are: they listen nowhere to be asked.

    Clients are as few as the members of a cluster's manifest; those that are none any more are forgotten.
    """

    def __init__(self) -> None:
        self._heard: dict[str, tuple[Hello, float]] = {}

    def heard(self, member: Member, hello: Hello, now_s: float) -> None:
        """A member said ``hello``."""
        if member.role == "client":
            self._heard[member.name] = (hello, now_s)

    def seen(self, cluster: Cluster, connections: Callable[[str], int], now_s: float) -> list[ClientSeen]:
        """The last ``CLIENTS_TOLD`` of them, the latest first; ``connections`` says how many a member has now."""
        self._heard = {name: each for name, each in self._heard.items() if name in cluster.members}
        latest = sorted(self._heard.items(), key=lambda each: -each[1][1])[:CLIENTS_TOLD]
        return [
            ClientSeen(name, told.software, told.version, connections(name), max(0, int((now_s - at_s) * 1000)))
            for name, (told, at_s) in latest
        ]


class TokenBucket:
    """``per_s`` tokens a second flow in, at most ``burst_s`` seconds' worth (and one at least); it begins full."""

    __slots__ = ("_at_s", "_level", "_per_s", "_room")

    def __init__(self, per_s: float, burst_s: float, now_s: float) -> None:
        self._per_s = per_s
        self._room = max(1.0, per_s * burst_s)
        self._level = self._room
        self._at_s = now_s

    def holds_one(self, now_s: float) -> bool:
        """Whether there is a token to take."""
        self._level = min(self._room, self._level + max(0.0, now_s - self._at_s) * self._per_s)
        self._at_s = max(self._at_s, now_s)
        return self._level >= 1.0

    def take(self, count: float = 1.0) -> None:
        """Take a token that ``holds_one`` saw, or what is owed: then there is none until that has flowed in."""
        self._level -= count

    def take_some(self, most: int, now_s: float) -> int:
        """Take up to so many tokens, a quarter of those there are at most; how many."""
        if not self.holds_one(now_s):
            return 0
        count = max(1, min(most, int(self._level / 4)))
        self._level -= count
        return count

    def give(self, count: int) -> None:
        """Put back what was taken and not used."""
        self._level = min(self._room, self._level + count)


@dataclass(frozen=True, slots=True)
class Refusals:
    """Requests of one member that were refused since this was last told, and the reason for the last of them."""

    member: str
    count: int
    reason: str


class Admission:
    """Which requests are begun, by the number under way and by each member's rate; used by one thread.

    Members are few, so it forgets none. What it refuses is counted, to be told in one line instead of one each.
    """

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self._under_way: Counter[str] = Counter()
        self._buckets: dict[str, TokenBucket] = {}
        self._refused: dict[str, Refusals] = {}
        self.under_way = 0
        self.refused = 0

    def begin(self, member: str, now_s: float) -> None:
        """Count a request in, or ``Overloaded``; each one begun is to be ended by ``end``."""
        reason = self._objection(member, now_s)
        if reason:
            self._refuse(member, reason)

    def take(self, member: str, most: int, now_s: float) -> int:
        """Admit up to so many short requests in advance, each of which is over before anything else begins; how many.

        0 where ``begin`` would refuse one. What is not used is put back by ``give``.
        """
        if self.full(member):
            return 0
        return self._bucket(member, now_s).take_some(most, now_s)

    def full(self, member: str) -> bool:
        """Whether so many requests are under way that ``begin`` refuses one more of this member."""
        return self._under_way[member] >= self._limits.member_requests or self.under_way >= self._limits.requests

    def give(self, member: str, count: int) -> None:
        """Put back what ``take`` admitted and nobody used."""
        self._buckets[member].give(count)

    def resume(self, member: str) -> None:
        """Count an admitted request in; it is to be ended by ``end``."""
        self._under_way[member] += 1
        self.under_way += 1

    def _bucket(self, member: str, now_s: float) -> TokenBucket:
        bucket = self._buckets.get(member)
        if bucket is None:
            bucket = self._buckets[member] = TokenBucket(self._limits.requests_per_s, self._limits.burst_s, now_s)
        return bucket

    def _objection(self, member: str, now_s: float) -> str:
        """Count a request in, or say why not."""
        limits, bucket = self._limits, self._bucket(member, now_s)
        if not bucket.holds_one(now_s):
            return f"more requests than limits.requests_per_s = {limits.requests_per_s:g} allows"
        if self._under_way[member] >= limits.member_requests:
            return f"limits.member_requests = {limits.member_requests} are under way"
        if self.under_way >= limits.requests:
            return f"limits.requests = {limits.requests} are under way, of all members"
        bucket.take()
        self.resume(member)
        return ""

    def end(self, member: str) -> None:
        """A request that was begun has its answer."""
        self._under_way[member] -= 1
        self.under_way -= 1

    def _refuse(self, member: str, reason: str) -> None:
        before = self._refused.get(member)
        self._refused[member] = Refusals(member, (before.count if before else 0) + 1, reason)
        self.refused += 1
        raise Overloaded(f"{member!r}: {reason}")

    def refusals(self) -> list[Refusals]:
        """What was refused since the last call of this, by member."""
        told, self._refused = list(self._refused.values()), {}
        return told


class Turns(Generic[T]):
    """Items that wait, first come first served for each member, and the members in turn: none keeps others waiting.

    At most ``most`` in all and ``most_of_member`` of one.
    """

    def __init__(self, most: int, most_of_member: int) -> None:
        self._most = most
        self._most_of_member = most_of_member
        self._waiting: OrderedDict[str, deque[T]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def put(self, member: str, item: T) -> None:
        """Have an item wait; ``Overloaded`` names the bound that is reached."""
        if self._count >= self._most:
            raise Overloaded(f"{self._most} jobs wait already")
        waiting = self._waiting.setdefault(member, deque())
        if len(waiting) >= self._most_of_member:
            raise Overloaded(f"{self._most_of_member} jobs of {member!r} wait already")
        waiting.append(item)
        self._count += 1

    def take(self) -> T:
        """The next item of the member whose turn it is; ``IndexError`` if nothing waits."""
        if not self._count:
            raise IndexError("nothing waits")
        member, waiting = next(iter(self._waiting.items()))
        item = waiting.popleft()
        self._count -= 1
        if waiting:
            self._waiting.move_to_end(member)
        else:
            del self._waiting[member]
        return item
