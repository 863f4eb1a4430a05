"""The serving side of CURVE: who may connect, and which member sent a message. It knows no verbs.

Requests come by a ``Router`` (``publications`` has the sockets of the others). The CURVE key that a connection has
proved is looked up for every single message.
"""

from __future__ import annotations

import resource
import socket as sockets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_limits
from itertools import islice

import structlog
import zmq.utils.z85
from msgspec.structs import replace

from engine.client._router import Connection, Router
from engine.client.admission import DEFAULT_LIMITS, Admission, ServiceLimits
from engine.client.config import CurveIdentity
from engine.client.connections import Connections, descriptors
from engine.client.speech import spoken
from engine.client.transport import FRAME_MAX, HANDSHAKE_MS
from engine.errors import EngineError, Overloaded, ProtocolError
from engine.protocol.manifest import Cluster, ClusterSource, FollowsCluster, Member
from engine.protocol.requests import HELLO, ServiceCount
from engine.protocol.wire import (
    ErrorBody,
    Load,
    Reply,
    Request,
    Status,
    Versions,
    error_codec,
    reply_codec,
    request_codec,
)

__all__ = [
    "IDLE",
    "Incoming",
    "Listener",
    "error_body",
]

IDLE = Load(0, 0, False)
BACKLOG = 1024
GARBAGE_IN_A_ROW = 256
LEAVE_S = 2.0
"""How long an endpoint is served that a newer manifest leaves out: members take a manifest one after the other."""
KEEPALIVE = {
    sockets.TCP_KEEPIDLE: 60,
    sockets.TCP_KEEPINTVL: 15,
    sockets.TCP_KEEPCNT: 4,
    sockets.TCP_USER_TIMEOUT: 120_000,
}
"""In seconds, times, and ms: a connection whose host is gone is held for two minutes, be it idle or owed a reply."""
NETWORK_ASKED_MAX = 256
"""Of so many connections the network's time is taken, about a microsecond each."""
SENT_TIMES = 2
"""Replies that wait for one connection, over the requests that it may have unanswered."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Incoming:
    """A well-formed request, the member whose key sent it, and the connection that it came by.

    ``read_s`` is how long it took to read it, in seconds; negative where nobody looked.
    """

    member: Member
    request: Request
    connection: Connection
    read_s: float = -1.0


class _Places:
    """The endpoints that a router listens at, each with the CURVE pair that it serves there."""

    def __init__(self, router: Router, backlog: int) -> None:
        self._router = router
        self._backlog = backlog
        self._bound: dict[str, tuple[bytes, int]] = {}
        self._numbers: dict[str, int] = {}

    def number(self, endpoint: str) -> int:
        """What ``Connection.place`` says of those that came in there, by whichever pair."""
        return self._numbers.setdefault(endpoint, len(self._numbers))

    def follow(self, wanted: Mapping[str, CurveIdentity]) -> tuple[list[str], EngineError | None]:
        """Listen at these endpoints and no others, as far as they can be had.

        Those that are left, and the error of one that could not be had.
        """
        left = []
        for endpoint, (public, fd) in list(self._bound.items()):
            if endpoint not in wanted or wanted[endpoint].public != public:
                self._router.leave(fd)
                del self._bound[endpoint]
                left.append(endpoint)
        failed: EngineError | None = None
        for endpoint, pair in wanted.items():
            if endpoint not in self._bound:
                try:
                    fd = listen(endpoint, self._backlog).detach()
                except EngineError as error:
                    failed = error
                    continue
                self._bound[endpoint] = pair.public, fd
                decode = zmq.utils.z85.decode
                self._router.listen(fd, self.number(endpoint), decode(pair.public), decode(pair.secret))
        return left, failed

    def lack(self, wanted: Mapping[str, CurveIdentity]) -> bool:
        """Whether one of these is not listened at, or not with its pair."""
        return any(
            endpoint not in self._bound or self._bound[endpoint][0] != pair.public for endpoint, pair in wanted.items()
        )


def listen(endpoint: str, backlog: int) -> sockets.socket:
    """A listening TCP socket at ``tcp://host:port``, the host being a name, an address or ``*``; ``EngineError``.

    The connections that are accepted there have its ``KEEPALIVE`` (tcp(7)).
    """
    scheme, _, place = endpoint.partition("://")
    host, _, port = place.rpartition(":")
    made: sockets.socket | None = None
    try:
        if scheme != "tcp" or not host:
            raise ValueError("no endpoint tcp://host:port")
        found = sockets.getaddrinfo(
            None if host == "*" else host.strip("[]"),
            0 if port == "*" else int(port),
            type=sockets.SOCK_STREAM,
            family=sockets.AF_INET if host == "*" else sockets.AF_UNSPEC,
            flags=sockets.AI_PASSIVE,
        )
        made = sockets.socket(found[0][0], sockets.SOCK_STREAM)
        made.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        made.setsockopt(sockets.SOL_SOCKET, sockets.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            made.setsockopt(sockets.IPPROTO_TCP, option, value)
        made.setblocking(False)
        made.bind(found[0][4])
        made.listen(backlog)
    except (OSError, ValueError) as error:
        if made is not None:
            made.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise EngineError(f"can't bind {endpoint}: {reason}") from None
    return made


class Listener(FollowsCluster):
    """Where a member serves the requests of others, in the protocol version of each."""

    def __init__(
        self,
        identity: CurveIdentity,
        endpoint: str,
        cluster: ClusterSource,
        limits: ServiceLimits = DEFAULT_LIMITS,
        *,
        versions: Versions | None = None,
    ) -> None:
        self._source = cluster
        self.versions = versions or spoken()
        self.refused = 0
        self._lacking = ""
        self._next_warning_s = 0.0
        self.undeliverable = 0
        self.router = Router(self._admits, limit=FRAME_MAX, replies_max=SENT_TIMES * limits.connection_requests)
        self.connections = Connections(self.router, limits.connections, limits.member_connections)
        self.limits = replace_limits(limits, connections=self.connections.most)
        try:
            self._bound = _Places(self.router, min(BACKLOG, self.connections.backlog))
            self._places: dict[str, CurveIdentity] = {endpoint: identity}
            self._leaving: dict[str, tuple[CurveIdentity, float]] = {}
            self._follow()
        except EngineError:
            self.close()
            raise

    def _admits(self, user: str) -> bool:
        """Whether a CURVE key is a member's."""
        return user in self._cluster.by_curve

    def look(self) -> None:
        """Look after the connections; to be called every ``engine.client.connections.LOOK_EVERY_S``."""
        if HANDSHAKE_MS:
            self.router.expire(time.monotonic() - HANDSHAKE_MS / 1000)
        self.connections.look()

    def serve(self, places: Mapping[str, CurveIdentity]) -> None:
        """Listen at these endpoints, each with its pair; at one that is left out for ``LEAVE_S`` more (``settle``).

        One that can't be had is told in the log, and ``settle`` tries it again; the others are served meanwhile.
        """
        until_s = time.monotonic() + LEAVE_S
        left = {endpoint: (pair, until_s) for endpoint, pair in self._places.items() if endpoint not in places}
        going_on = {endpoint: each for endpoint, each in self._leaving.items() if endpoint not in places}
        self._leaving = left | going_on
        self._places = dict(places)
        self._try_to_follow()

    def settle(self) -> None:
        """Leave the endpoints whose time is up, cut the connections that came in there, and try what was not had."""
        now = time.monotonic()
        over = [endpoint for endpoint, (_, until_s) in self._leaving.items() if until_s <= now]
        for endpoint in over:
            del self._leaving[endpoint]
        if over or self._bound.lack(self._places):
            self._try_to_follow()

    def _try_to_follow(self) -> None:
        try:
            self._follow()
            self._lacking = ""
        except EngineError as error:
            if str(error) != self._lacking:
                self._lacking = str(error)
                log.error("not listening where the manifest says; it is tried again", reason=self._lacking)

    def _follow(self) -> None:
        wanted = {endpoint: pair for endpoint, (pair, _) in self._leaving.items()} | self._places
        left, failed = self._bound.follow(wanted)
        for endpoint in left:
            log.info("no longer listening", endpoint=endpoint)
            if endpoint not in wanted:
                self.connections.end_at(self._bound.number(endpoint))
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Close everything; replies that wait for their peers are lost."""
        self.connections.close()
        self.router.close()

    def members_changed(self, before: Cluster, now: Cluster) -> None:
        """Another manifest is in force: cut the connections of those who are no members any more, or by other keys."""
        gone = before.by_curve.keys() - now.by_curve.keys()
        if gone:
            self.connections.end_of(gone)

    def counts(self, admission: Admission) -> ServiceCount:
        """How full this member is, with what it has under way."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return ServiceCount(
            admission.under_way,
            len(self.connections),
            self.connections.most,
            descriptors(),
            max(0, soft),
            admission.refused,
            self.refused,
            self.undeliverable,
            self.connections.cut,
        )

    def network_us(self) -> int:
        """The clients' mean way here and back over the network, in microseconds; 0 while none is connected."""
        members = self._cluster.by_curve
        clients = (
            each for each in self.router.connections if (member := members.get(each.user)) and member.role == "client"
        )
        known = [us for each in islice(clients, NETWORK_ASKED_MAX) if (us := each.network_us)]
        return round(sum(known) / len(known)) if known else 0

    def receive(self) -> Incoming | None:
        """The next request, or None when there is none now. Garbage is answered where it can be, and counted.

        None too after much garbage in a row, so that its sender can't keep the caller here.
        """
        for _ in range(GARBAGE_IN_A_ROW):
            message = self.router.receive()
            if message is None:
                return None
            incoming = self.open(*message)
            if incoming is not None:
                return incoming
        return None

    def open(self, connection: Connection, data: bytes, parts: int) -> Incoming | None:
        """The request in a message of so many frames that came by a connection; None for garbage."""
        incoming = self._open(connection, data, parts)
        if incoming is None:
            self.refused += 1
        return incoming

    def _open(self, connection: Connection, data: bytes, parts: int) -> Incoming | None:
        begun_s = time.monotonic()
        member = self._cluster.by_curve.get(connection.user)
        if member is None:
            self._tell("", "its connection's key is no member's")
            self.router.end(connection)
            return None
        excess = self.connections.heard(connection, member.name)
        request_id, version = 0, self.versions.lowest
        try:
            if parts != 1:
                raise ProtocolError(f"a request has 1 frame, this one {parts}")
            request = request_codec.decode(data)
            request_id, version = request.id, self.versions.reply_to(request.version)
            if request.verb != HELLO:  # which is how two versions get to know each other
                self.versions.check(request.version)
        except ProtocolError as error:
            self._tell(member.name, str(error))
            self._send(Reply(version, request_id, Status.ERROR, error_body(error), IDLE, {}), connection)
            return None
        incoming = Incoming(member, request, connection, time.monotonic() - begun_s)
        if excess:
            most = self.limits.member_connections
            surplus = Overloaded(f"{member.name!r} has limits.member_connections = {most} already; this one is cut")
            self._tell(member.name, str(surplus))
            self.fail(incoming, surplus)
            return None
        return incoming

    def _tell(self, member: str, reason: str) -> None:
        """Log a refused message, once a second at most: who sends garbage shall not fill the disk with it."""
        now = time.monotonic()
        if now >= self._next_warning_s:
            self._next_warning_s = now + 1.0
            log.warning("message refused", member=member, reason=reason, refused_so_far=self.refused + 1)

    def reply(self, incoming: Incoming, status: int, body: bytes, load: Load = IDLE) -> None:
        """Answer a request, in the version that it came in."""
        request = incoming.request
        reply = Reply(self.versions.reply_to(request.version), request.id, status, body, load, {})
        self._send(reply, incoming.connection)

    def fail(self, incoming: Incoming, error: Exception, load: Load = IDLE) -> None:
        """Answer a request with an error."""
        self.reply(incoming, Status.ERROR, error_body(error), load)

    def _send(self, reply: Reply, connection: Connection) -> None:
        try:
            data = reply_codec.encode(reply)
        except ValueError as error:  # longer than a message may be
            data = reply_codec.encode(replace(reply, status=Status.ERROR, body=error_body(ProtocolError(str(error)))))
        if not self.router.send(connection, data):
            self.lost()

    def lost(self) -> None:
        """Count a reply that its client did not take: it went away, or does not read."""
        self.undeliverable += 1


def error_body(error: Exception) -> bytes:
    """The body of an error reply: the code of an ``EngineError``; a caller's mistake; nothing of anything else."""
    if isinstance(error, EngineError):
        names = list(getattr(error, "missing", ()) or getattr(error, "holders", ()))
        return error_codec.encode(ErrorBody(error.code, str(error)[:1024], names))
    if isinstance(error, ValueError | TypeError):
        return error_codec.encode(ErrorBody("invalid-request", str(error)[:1024], []))
    return error_codec.encode(ErrorBody("error", "internal error; the node's log says more", []))
