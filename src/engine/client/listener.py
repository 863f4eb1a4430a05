"""The serving side of a CURVE socket: who may connect, and which member sent a message. It knows no verbs.

CURVE fails open without a ZAP handler, so every server socket has ZAP_ENFORCE_DOMAIN set: with a dead handler nobody
gets in. The ``User-Id`` that ZAP attached is looked up for every single message; a routing id proves nothing.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import replace as replace_limits
from typing import Any

import structlog
import zmq
from msgspec.structs import replace
from zmq.auth.thread import ThreadAuthenticator

from engine.client.admission import DEFAULT_LIMITS, Admission, ServiceLimits
from engine.client.config import CurveIdentity
from engine.client.connections import Connection, Connections, descriptors, end_connection, peer_of, wire_bytes
from engine.client.transport import FRAME_MAX, HANDSHAKE_MS, HIGH_WATER_MARK, check_zmq_version
from engine.errors import EngineError, Overloaded, ProtocolError
from engine.protocol.manifest import Cluster, ClusterSource, FollowsCluster, Member
from engine.protocol.requests import HELLO, ServiceCount
from engine.protocol.wire import (
    PROTOCOL_VERSION,
    ErrorBody,
    Load,
    Reply,
    Request,
    Status,
    check_version,
    error_codec,
    reply_codec,
    request_codec,
)

__all__ = [
    "IDLE",
    "Bound",
    "Gate",
    "Incoming",
    "Listener",
    "curve_server",
    "error_body",
    "user_id",
]

ZAP_DOMAIN = "keyquorum"
IDLE = Load(0, 0, False)
BACKLOG = 1024
GARBAGE_IN_A_ROW = 256
REBIND_S = 1.0
LEAVE_S = 2.0
"""How long an endpoint is served that a newer manifest leaves out: members take a manifest one after the other."""
RECEIVED_MAX = 64
"""Messages of one connection that wait in the socket; then its peer waits, by TCP."""
SENT_TIMES = 2
"""Replies that wait for one connection, over the requests that it may have unanswered: libzmq tells of room only when
half of a queue is free, and so may take a half-full queue for a full one."""

log = structlog.get_logger()


class _MembersOnly:
    """ZAP's question, answered from the cluster manifest (RFC 27/ZAP)."""

    def __init__(self, source: ClusterSource) -> None:
        self._source = source

    def callback(self, domain: str, key: bytes) -> bool:
        return domain == ZAP_DOMAIN and key.decode("ascii", "replace") in self._source.cluster.by_curve


class Gate:
    """The ZAP handler of a context: it lets in the CURVE keys of the cluster's members and nobody else."""

    def __init__(self, context: zmq.Context[Any], cluster: ClusterSource) -> None:
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(ZAP_DOMAIN, credentials_provider=_MembersOnly(cluster))

    def close(self) -> None:
        """Stop the handler; nobody can connect any more."""
        self._authenticator.stop()


def curve_server(socket: zmq.Socket[bytes], identity: CurveIdentity) -> None:
    """Set what every binding socket has: CURVE server, ZAP enforced, bounds on size, handshake and queues."""
    check_zmq_version()
    socket.curve_server = True
    socket.curve_secretkey = identity.secret
    socket.curve_publickey = identity.public
    socket.zap_domain = ZAP_DOMAIN.encode()
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.maxmsgsize = FRAME_MAX
    socket.handshake_ivl = HANDSHAKE_MS
    socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK
    socket.backlog = BACKLOG
    socket.linger = 100


@dataclass(frozen=True, slots=True)
class Incoming:
    """A well-formed request, the member whose key sent it, and the way back.

    ``read_s`` is how long it took to read it, in seconds; negative where nobody looked.
    """

    route: bytes
    member: Member
    request: Request
    connection: Connection | None = None
    read_s: float = -1.0


class Bound:
    """The endpoints that a socket is bound to, each with the CURVE pair that it serves there.

    libzmq takes a listening socket's options when it is bound, so each endpoint goes on with its own pair.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._bound: dict[str, tuple[bytes, str]] = {}

    def follow(self, wanted: Mapping[str, CurveIdentity]) -> list[str]:
        """Be bound to these endpoints and no others; those that are left. ``EngineError`` if one can't be had."""
        left = []
        for endpoint, (public, real) in list(self._bound.items()):
            if endpoint not in wanted or wanted[endpoint].public != public:
                self._socket.unbind(real)
                del self._bound[endpoint]
                left.append(real)
        for endpoint, pair in wanted.items():
            if endpoint not in self._bound:
                self._bind(endpoint, pair, patient=bool(left))
        return left

    def _bind(self, endpoint: str, pair: CurveIdentity, *, patient: bool) -> None:
        """Bind; ``patient`` where the endpoint may just have been left, which takes libzmq a moment."""
        self._socket.curve_secretkey, self._socket.curve_publickey = pair.secret, pair.public
        until_s = time.monotonic() + (REBIND_S if patient else 0.0)
        while True:
            try:
                self._socket.bind(endpoint)
            except zmq.ZMQError as error:
                if time.monotonic() >= until_s:
                    raise EngineError(f"can't bind {endpoint}: {error}") from None
                time.sleep(REBIND_S / 100)
            else:
                break
        self._bound[endpoint] = pair.public, _last_endpoint(self._socket)


def _last_endpoint(socket: zmq.Socket[bytes]) -> str:
    told: Any = socket.get(zmq.LAST_ENDPOINT)
    return bytes(told).rstrip(b"\0").decode("ascii")


class Listener(FollowsCluster):
    """A bound ROUTER socket of a member."""

    def __init__(
        self,
        context: zmq.Context[Any],
        identity: CurveIdentity,
        endpoint: str,
        cluster: ClusterSource,
        limits: ServiceLimits = DEFAULT_LIMITS,
    ) -> None:
        self._source = cluster
        self.refused = 0
        self._next_warning_s = 0.0
        self.undeliverable = 0
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.connections = Connections(context, self.socket, limits.connections, limits.member_connections)
        self.limits = replace_limits(limits, connections=self.connections.most)
        try:
            curve_server(self.socket, identity)
            self.socket.sndhwm = SENT_TIMES * limits.connection_requests
            self.socket.rcvhwm = RECEIVED_MAX
            self.socket.backlog = min(BACKLOG, self.connections.backlog)
            self.socket.router_mandatory = 1
            self._bound = Bound(self.socket)
            self._places: dict[str, CurveIdentity] = {endpoint: identity}
            self._leaving: dict[str, tuple[CurveIdentity, float]] = {}
            self._bound.follow(self._places)
        except (EngineError, zmq.ZMQError) as error:
            self.connections.close()
            self.socket.close(0)
            raise error if isinstance(error, EngineError) else EngineError(f"can't bind {endpoint}: {error}") from None

    def serve(self, places: Mapping[str, CurveIdentity]) -> None:
        """Listen at these endpoints, each with its pair; at one that is left out for ``LEAVE_S`` more (``settle``)."""
        until_s = time.monotonic() + LEAVE_S
        left = {endpoint: (pair, until_s) for endpoint, pair in self._places.items() if endpoint not in places}
        going_on = {endpoint: each for endpoint, each in self._leaving.items() if endpoint not in places}
        self._leaving = left | going_on
        self._places = dict(places)
        self._follow()

    def settle(self) -> None:
        """Leave the endpoints whose time is up; connections that came in there are cut."""
        now = time.monotonic()
        if any(until_s <= now for _, until_s in self._leaving.values()):
            self._leaving = {endpoint: each for endpoint, each in self._leaving.items() if each[1] > now}
            self._follow()

    def _follow(self) -> None:
        wanted = {endpoint: pair for endpoint, (pair, _) in self._leaving.items()} | self._places
        for endpoint in self._bound.follow(wanted):
            log.info("no longer listening", endpoint=endpoint)
            if endpoint not in wanted:
                self.connections.end_at(int(endpoint.rpartition(":")[2]))

    def close(self) -> None:
        """Close the socket; replies under way get 100 ms."""
        self.connections.close()
        self.socket.close()

    def members_changed(self, before: Cluster, now: Cluster) -> None:
        """Another manifest is in force: cut the connections of those who are no members any more, or by other keys."""
        gone = {member.name for key, member in before.by_curve.items() if key not in now.by_curve}
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

    def receive(self) -> Incoming | None:
        """The next request, or None when there is none now. Garbage is answered where it can be, and counted.

        None too after much garbage in a row, so that its sender can't keep the caller here.
        """
        for _ in range(GARBAGE_IN_A_ROW):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
            except zmq.Again:
                return None
            last: Any = frames[-1]
            content = [frame.bytes for frame in frames]
            incoming = self.open(content[0], content[1:], user_id(last), int(last.get(zmq.SRCFD)))
            if incoming is not None:
                return incoming
        return None

    def open(self, route: bytes, frames: list[bytes], user: str, fd: int) -> Incoming | None:
        """The request in the frames that came by a descriptor from the CURVE key ``user``; None for garbage."""
        incoming = self._open(route, frames, user, fd)
        if incoming is None:
            self.refused += 1
        return incoming

    def _open(self, route: bytes, frames: list[bytes], user: str, fd: int) -> Incoming | None:
        begun_s = time.monotonic()
        member = self._cluster.by_curve.get(user)
        if member is None:
            self._tell("", "its connection's key is no member's")
            peer = peer_of(fd)
            if peer is not None:
                end_connection(fd, peer)
            return None
        size = sum(wire_bytes(len(frame)) for frame in frames)
        connection, excess = self.connections.heard(fd, member.name, size)
        request_id = 0
        try:
            if len(frames) != 1:
                raise ProtocolError(f"a request has 1 frame, this one {len(frames)}")
            request = request_codec.decode(frames[0])
            request_id = request.id
            if request.verb != HELLO:  # which is how two versions get to know each other
                check_version(request.version)
        except ProtocolError as error:
            self._tell(member.name, str(error))
            self._send(
                route, Reply(PROTOCOL_VERSION, request_id, Status.ERROR, error_body(error), IDLE, {}), connection
            )
            return None
        incoming = Incoming(route, member, request, connection, time.monotonic() - begun_s)
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
        """Answer a request."""
        reply = Reply(PROTOCOL_VERSION, incoming.request.id, status, body, load, {})
        self._send(incoming.route, reply, incoming.connection)

    def fail(self, incoming: Incoming, error: Exception, load: Load = IDLE) -> None:
        """Answer a request with an error."""
        self.reply(incoming, Status.ERROR, error_body(error), load)

    def _send(self, route: bytes, reply: Reply, connection: Connection | None) -> None:
        try:
            data = reply_codec.encode(reply)
        except ValueError as error:  # longer than a message may be
            data = reply_codec.encode(replace(reply, status=Status.ERROR, body=error_body(ProtocolError(str(error)))))
        self.send(route, data, connection)

    def send(self, route: bytes, data: bytes, connection: Connection | None) -> None:
        """Send a reply's frame, if its client takes it."""
        if not (self._sent(route, data) or self._sent(route, data)):
            # Only that client waits: it went away, or does not read.
            self.undeliverable += 1
        elif connection is not None:
            connection.replied(len(data))

    def _sent(self, route: bytes, data: bytes) -> bool:
        try:
            self.socket.send_multipart([route, data], zmq.DONTWAIT)
        except zmq.Again:
            # Its queue is full, or was when the socket last looked: which it does now.
            self.socket.get(zmq.EVENTS)
            return False
        except zmq.ZMQError:  # EHOSTUNREACH: it went away
            return False
        return True


def user_id(frame: Any) -> str:
    """The CURVE key, in Z85, of the connection that a frame came by; empty if there is none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def error_body(error: Exception) -> bytes:
    """The body of an error reply: the code of an ``EngineError``; a caller's mistake; nothing of anything else."""
    if isinstance(error, EngineError):
        names = list(getattr(error, "missing", ()) or getattr(error, "holders", ()))
        return error_codec.encode(ErrorBody(error.code, str(error)[:1024], names))
    if isinstance(error, ValueError | TypeError):
        return error_codec.encode(ErrorBody("invalid-request", str(error)[:1024], []))
    return error_codec.encode(ErrorBody("error", "internal error; the node's log says more", []))
