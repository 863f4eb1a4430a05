"""Publications: an XPUB socket for members only, and who subscribes to it. It knows no message's content.

libzmq serves it. CURVE fails open there without a ZAP handler, so the socket has ZAP_ENFORCE_DOMAIN set: with a dead
handler nobody gets in. Who was a member when it connected need not be one any more, so the socket is an XPUB, which
tells who subscribes by which connection: those of others are cut. It accepts whoever comes, so connections are counted
by its monitor, and where there are too many it stops listening for a while; requests are served by other sockets.
"""

from __future__ import annotations

import resource
import socket as sockets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import structlog
import zmq
from zmq.auth.thread import ThreadAuthenticator
from zmq.utils.monitor import parse_monitor_message

from engine.client.config import CurveIdentity
from engine.client.listener import BACKLOG, KEEPALIVE
from engine.client.transport import FRAME_MAX, HANDSHAKE_MS, HIGH_WATER_MARK, check_zmq_version, watch
from engine.errors import EngineError
from engine.protocol.manifest import Cluster, ClusterSource

__all__ = ["Gate", "Publisher", "curve_server", "end_connection", "peer_of"]

ZAP_DOMAIN: Final = "keyquorum"
REBIND_S: Final = 1.0
MESSAGES_AT_A_TIME: Final = 10_000
"""Messages of subscribers that are taken in before the next publication."""
MESSAGES_OF_CONNECTION: Final = 1_000
"""A subscriber that sends more than this is cut: one subscription is enough."""
MOST_CONNECTIONS: Final = 8_192
PART_OF_FILES: Final = 8
"""Connections that there may be, no more than one descriptor in so many of the process's."""
ACCEPTED_PER_S: Final = 4_096
"""More that come are a flood, also where each is gone at once."""
GONE_S: Final = 0.25
"""How long after the end of a connection libzmq has closed its descriptor for certain."""
PAUSE_S: Final = 1.0
"""How long the socket does not listen then."""
WARN_EVERY_S: Final = 10.0

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
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE[sockets.TCP_KEEPIDLE])
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE[sockets.TCP_KEEPINTVL])
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE[sockets.TCP_KEEPCNT])
    socket.setsockopt(zmq.TCP_MAXRT, KEEPALIVE[sockets.TCP_USER_TIMEOUT])


def connections_allowed() -> int:
    """How many connections of subscribers there may be with the process's limit on descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft // PART_OF_FILES)


class _Bound:
    """The endpoints that a socket is bound to, each with the CURVE pair that it serves there.

    libzmq takes a listening socket's options when it is bound, so each endpoint goes on with its own pair.
    """

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._bound: dict[str, tuple[bytes, str]] = {}

    def follow(self, wanted: Mapping[str, CurveIdentity]) -> None:
        """Be bound to these endpoints and no others. ``EngineError`` if one can't be had."""
        left = False
        for endpoint, (public, real) in list(self._bound.items()):
            if endpoint not in wanted or wanted[endpoint].public != public:
                self._socket.unbind(real)
                del self._bound[endpoint]
                left = True
        for endpoint, pair in wanted.items():
            if endpoint not in self._bound:
                self._bind(endpoint, pair, patient=left)

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


@dataclass(slots=True)
class _Subscriber:
    """One connection by which something came: its other end, the CURVE key that it proved, and how much came."""

    peer: tuple[str, int]
    key: str
    messages: int = 0


class Publisher:
    """A bound XPUB socket; one thread uses it at a time. The context needs a ``Gate``, else nobody gets in.

    ``places`` says for each manifest at which endpoints to publish, and with which pair. ``queued`` messages wait for a
    subscriber that is behind; it loses what comes then. ``most`` bounds the connections.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        places: Callable[[], Mapping[str, CurveIdentity]],
        *,
        queued: int,
        most: int | None = None,
    ) -> None:
        self._places = places
        self._most = connections_allowed() if most is None else most
        self._open: set[int] = set()
        self._subscribers: dict[int, _Subscriber] = {}
        self._check_s = float("-inf")
        """When the subscribers are to be looked through."""
        self._checked = 0
        self._lacking = ""
        self._counted_s = time.monotonic()
        self._follow_s = self._next_warning_s = float("-inf")
        self.cut = 0
        wanted = places()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.XPUB)
        self._monitor = watch(context, self._socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        try:
            for pair in wanted.values():
                curve_server(self._socket, pair)
                break
            self._socket.xpub_verbose = 1
            self._socket.sndhwm = queued
            self._socket.linger = 0
            self._bound = _Bound(self._socket)
            self._bound.follow(wanted)
        except (EngineError, zmq.ZMQError) as error:
            self.close()
            raise error if isinstance(error, EngineError) else EngineError(f"can't publish: {error}") from None

    @property
    def socket(self) -> zmq.Socket[bytes]:
        """To be polled: it is readable when somebody subscribes, or the last one goes."""
        return self._socket

    def __len__(self) -> int:
        """Connections by which somebody subscribed; one that ended counts for ``GONE_S`` more."""
        return len(self._subscribers)

    def publish(self, message: bytes) -> None:
        """Send a message of one frame to everybody who subscribed; never waits. ``look`` goes before it."""
        self._socket.send(message, zmq.DONTWAIT)

    def look(self, cluster: Cluster) -> bool:
        """Note who subscribed, and cut those who are no members by this manifest; whether somebody is new."""
        self._count()
        came = self._take_in()
        now = time.monotonic()
        changed = self._checked != cluster.serial
        if came or changed or now >= self._check_s:
            self._check(cluster)
        if changed and now >= self._follow_s:
            self._checked = cluster.serial
            self._follow()
        return came

    def _count(self) -> None:
        """Take in which connections came and went, and stop listening where they are too many."""
        now = time.monotonic()
        accepted, most = 0, int(ACCEPTED_PER_S * max(1.0, now - self._counted_s))
        self._counted_s = now
        while accepted < most and _readable(self._monitor):
            told = parse_monitor_message(self._monitor.recv_multipart())
            if told["event"] == zmq.EVENT_ACCEPTED:
                accepted += 1
                self._open.add(told["value"])
            else:
                self._open.discard(told["value"])
                if told["value"] in self._subscribers:  # it is told of before the descriptor is closed
                    self._check_s = now + GONE_S
        if accepted >= most or len(self._open) > self._most:
            self._pause(now)

    def _pause(self, now: float) -> None:
        """Close what listens, which ends all its connections, for ``PAUSE_S``."""
        if now >= self._next_warning_s:
            self._next_warning_s = now + WARN_EVERY_S
            log.error("too many subscribers; not publishing for a while", open=len(self._open), limit=self._most)
        self.cut += len(self._open)
        self._bound.follow({})
        self._open.clear()
        while _readable(self._monitor):
            self._monitor.recv_multipart()
        self._subscribers.clear()
        self._follow_s, self._checked = now + PAUSE_S, 0

    def _take_in(self) -> bool:
        """What subscribers sent; whether one subscribed."""
        came = False
        for _ in range(MESSAGES_AT_A_TIME):
            if not _readable(self._socket):
                break
            frame = self._socket.recv(zmq.DONTWAIT, copy=False)
            key = user_id(frame)
            if not key:  # libzmq's own word of a connection that ended, which came by none
                continue
            came = True
            self._note(int(frame.get(zmq.SRCFD)), key)
        return came

    def _note(self, fd: int, key: str) -> None:
        peer = peer_of(fd)
        if peer is None:
            return
        subscriber = self._subscribers.get(fd)
        if subscriber is None or (subscriber.peer, subscriber.key) != (peer, key):
            subscriber = self._subscribers[fd] = _Subscriber(peer, key)
        subscriber.messages += 1
        if subscriber.messages > MESSAGES_OF_CONNECTION:
            self._cut(fd, "it subscribes without end")

    def _check(self, cluster: Cluster) -> None:
        self._check_s = float("inf")
        for fd, each in list(self._subscribers.items()):
            if peer_of(fd) != each.peer:
                del self._subscribers[fd]
            elif each.key not in cluster.by_curve:
                self._cut(fd, "its key is no member's any more")

    def _cut(self, fd: int, reason: str) -> None:
        log.warning("subscriber cut", reason=reason)
        end_connection(fd, self._subscribers.pop(fd).peer)
        self.cut += 1

    def _follow(self) -> None:
        try:
            self._bound.follow(self._places())
            self._lacking = ""
        except EngineError as error:
            self._checked, self._follow_s = 0, time.monotonic() + REBIND_S  # it is tried again then
            if str(error) != self._lacking:
                self._lacking = str(error)
                log.error("not publishing where the manifest says; it is tried again", reason=self._lacking)

    def close(self) -> None:
        """Close the socket."""
        self._socket.monitor(None, 0)
        self._monitor.close(0)
        self._socket.close(0)


def _readable(socket: zmq.Socket[bytes]) -> bool:
    """As ``poll(0)``, which makes a poller each time."""
    return bool(int(socket.get(zmq.EVENTS)) & zmq.POLLIN)


def user_id(frame: Any) -> str:
    """The CURVE key, in Z85, of the connection that a frame came by; empty if there is none."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""


def peer_of(fd: int) -> tuple[str, int] | None:
    """The other end of a connection that libzmq owns; None if it is gone."""
    address = _on_socket(fd, lambda socket: socket.getpeername()[:2])
    return None if address is None else (str(address[0]), int(address[1]))


def end_connection(fd: int, peer: tuple[str, int]) -> None:
    """End a connection that libzmq owns as if the network had, unless the descriptor is another one's by now."""
    if peer_of(fd) == peer:
        _on_socket(fd, lambda socket: socket.shutdown(sockets.SHUT_RDWR))


def _on_socket(fd: int, use: Callable[[sockets.socket], Any]) -> Any:
    """Use a descriptor that libzmq owns, and may have closed meanwhile: then None."""
    try:
        socket = sockets.socket(sockets.AF_INET, sockets.SOCK_STREAM, sockets.IPPROTO_TCP, fileno=fd)
    except OSError:  # it is closed, or another file's by now
        return None
    try:
        return use(socket)
    except OSError:
        return None
    finally:
        socket.detach()
