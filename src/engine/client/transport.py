"""Requests over CURVE sockets: a channel is a set of connections, a DEALER to each peer, used by one thread at a time.

It matches replies to requests, notices broken connections and refused keys by the sockets' monitors, and knows nothing
of what the requests mean.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import socket as sockets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import zmq
import zmq.utils.z85
from zmq.utils.monitor import parse_monitor_message

from engine._version import __version__
from engine.client._fastline import Line
from engine.client.config import CurveIdentity, CurveSource
from engine.client.speech import spoken
from engine.errors import (
    AccessDenied,
    DeadlineExceeded,
    EngineError,
    NodeUnavailable,
    ProtocolError,
    error_from_code,
)
from engine.protocol.manifest import Member
from engine.protocol.requests import HELLO, REPLY_CODECS, REQUEST_CODECS, Hello, Welcome
from engine.protocol.wire import (
    MAX_MESSAGE,
    MAX_TIMEOUT_MS,
    Reply,
    Request,
    Status,
    Versions,
    error_codec,
    reply_codec,
    request_codec,
)

__all__ = [
    "Arrival",
    "Channel",
    "Greeting",
    "KeyRefused",
    "Moved",
    "ask",
    "check_zmq_version",
    "connect_options",
    "raise_for_status",
]

CONNECT_TIMEOUT_S = 0.5
"""How long a request waits for a first connection (TCP and CURVE handshake) before the peer counts as unreachable."""
REDIAL_TIMEOUT_S = 0.05
"""The same for a peer whose connection was lost or never came about; meanwhile libzmq goes on dialling."""
HELLO_TIMEOUT_S = 10.0
REOPEN_S = 3.0
"""A connection that has been down for so long is dialled anew by another socket, when it is next needed.

libzmq dials again by itself, except after bytes that are no ZMTP or CURVE: then it gives the connection up for good,
and one flipped bit in a handshake would part two members until one is started again. A handshake may take less.
"""
RECONNECT_MS = 5
RECONNECT_MAX_MS = 200
HANDSHAKE_MS = 2_000
SILENCE_MS = 250
LOST_MS = 750
"""Between nodes and balancers alone, and only while a reply is waited for: who is silent for so long is asked for a
sign of life, and counts as away, stopped or cut off, after the second time. An idle connection costs nothing so. A
client does not ask: it goes to another node anyway."""
KEEPALIVE_S = 60
HIGH_WATER_MARK = 1_000
FRAME_MAX = MAX_MESSAGE + 64
"""ZMQ_MAXMSGSIZE of the sockets for messages: it counts the 33 bytes that CURVE adds to each frame too."""
MIN_ZMQ = (4, 3, 5)

EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_DISCONNECTED
_FIRST_EVENTS = EVENTS | zmq.EVENT_CONNECT_RETRIED


class KeyRefused(AccessDenied):
    """The peer lets nobody with this process's own CURVE key in. Nothing is said of whom it asks for."""


class Moved(EngineError):
    """The node is no eligible combiner of the key; ``names`` are those that are, in order."""

    code = "moved"

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"moved to {', '.join(names)}")
        self.names = names


def check_zmq_version() -> None:
    """Refuse a libzmq older than 4.3.5, whose predecessors have known vulnerabilities (the loaded one counts)."""
    if zmq.zmq_version_info() < MIN_ZMQ:
        raise EngineError(f"libzmq {zmq.zmq_version()} is loaded; {'.'.join(map(str, MIN_ZMQ))} or newer is needed")


def connect_options(socket: zmq.Socket[bytes], identity: CurveIdentity, peer: Member) -> None:
    """Set what every connecting socket has: CURVE with the peer's pinned key, bounds, quick reconnection."""
    socket.curve_secretkey = identity.secret
    socket.curve_publickey = identity.public
    socket.curve_serverkey = peer.curve_z85.encode()
    socket.linger = 0
    socket.reconnect_ivl = RECONNECT_MS
    socket.reconnect_ivl_max = RECONNECT_MAX_MS
    socket.handshake_ivl = HANDSHAKE_MS
    socket.sndhwm = socket.rcvhwm = HIGH_WATER_MARK


def open_line(identity: CurveIdentity, peer: Member) -> Line | None:
    """A connection of its own for direct uses; None where there is none to be had in ``REDIAL_TIMEOUT_S``.

    It says ``hello`` first, so that it speaks what the peer does now.
    """
    host, _, port = peer.endpoint.removeprefix("tcp://").rpartition(":")
    until_s = time.monotonic() + REDIAL_TIMEOUT_S
    try:
        socket = sockets.create_connection((host.strip("[]"), int(port)), REDIAL_TIMEOUT_S)
    except (OSError, ValueError):
        return None
    socket.setsockopt(sockets.IPPROTO_TCP, sockets.TCP_NODELAY, 1)
    greeting = Greeting(peer.name)
    line = Line(socket.detach(), limit=FRAME_MAX, version=greeting.version)
    own_public, own_secret, server = map(
        zmq.utils.z85.decode, (identity.public, identity.secret, peer.curve_z85.encode())
    )
    if not line.shake(own_public, own_secret, server, max(0.001, until_s - time.monotonic())):
        return None
    answer = line.ask(greeting.frame(1), max(0.001, until_s - time.monotonic()))
    if answer is None:
        return None
    try:
        greeting.reply_in([answer])
    except ProtocolError:
        line.close()
        return None
    line.version = greeting.version
    return line


def watch(context: zmq.Context[Any], socket: zmq.Socket[bytes], events: int) -> zmq.Socket[bytes]:
    """A reader of the socket's events; the one before, if any, gets no more.

    Its queue is unbounded, since libzmq's I/O thread waits for room in a full one (after 2,000 events), and every
    socket of the context with it. So ``events`` must not hold what repeats while nobody reads.
    """
    address = f"inproc://keyquorum-monitor-{next(_monitors)}"
    socket.monitor(address, events)
    reader: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    reader.linger = 0
    reader.rcvhwm = 0
    reader.connect(address)
    return reader


_monitors = itertools.count(1)


def request_frame(
    version: int,
    number: int,
    verb: str,
    body: bytes,
    timeout_s: float,
    extensions: Mapping[str, bytes] | None = None,
) -> bytes:
    """A request of that version and id; the peer is told ``timeout_s``, which ``MAX_TIMEOUT_MS`` bounds."""
    timeout_ms = max(1, min(int(timeout_s * 1000), MAX_TIMEOUT_MS))
    return request_codec.encode(Request(version, number, verb, timeout_ms, body, dict(extensions or {})))


@dataclass(slots=True)
class Arrival:
    """The end of one request: a reply, or the error that took its place. ``elapsed_us`` is in microseconds."""

    token: int
    peer: str
    verb: str
    reply: Reply | None
    error: EngineError | None
    elapsed_us: float


class Greeting:
    """``hello`` on one connection: sent before the first request after each connecting, and what the peer said.

    ``version`` is what is spoken on it: the newest that both sides speak, and until the peer has said what it speaks
    the newest of this side, which the peer takes if it is a neighbour. ``number`` is that of the hello under way, 0 if
    none is; ``refusal`` why the peer's versions do not fit. ``said`` is told what the peer answers.
    """

    __slots__ = ("_said", "_versions", "due", "number", "peer", "refusal", "version", "welcome")

    def __init__(
        self, peer: str, said: Callable[[Welcome], None] = lambda welcome: None, versions: Versions | None = None
    ) -> None:
        self.peer = peer
        self._said = said
        self._versions = versions or spoken()
        self.lost()
        self.welcome: Welcome | None = None

    def lost(self) -> None:
        """The connection broke: who answers the next one may be another start or another version."""
        self.due, self.number = True, 0
        self.version = self._versions.highest
        self.refusal: ProtocolError | None = None

    def frame(self, number: int) -> bytes:
        """The hello to be sent under that id, with no wait for its answer."""
        self.due, self.number = False, number
        body = REQUEST_CODECS[HELLO].encode(Hello(self._versions.highest, __version__))
        return request_frame(self._versions.highest, number, HELLO, body, HELLO_TIMEOUT_S)

    def reply_in(self, frames: list[bytes]) -> Reply | None:
        """The reply in a message of this connection; None if it was the answer to ``hello``, which is taken in here.

        ``ProtocolError`` if it is none, or of a version that does not fit.
        """
        if len(frames) != 1:
            raise ProtocolError(f"a reply of {len(frames)} frames, not 1")
        reply = reply_codec.decode(frames[0])
        if self.number and reply.id == self.number:
            self._answered(reply)
            return None
        self._versions.check(reply.version)
        return reply

    def _answered(self, reply: Reply) -> None:
        """Take in the answer; ``ProtocolError``, kept as ``refusal``, if the two versions do not fit."""
        self.number = 0
        try:
            raise_for_status(reply)
            told: Welcome = REPLY_CODECS[HELLO].decode(reply.body)
        except (EngineError, ValueError) as error:
            try:
                self._versions.check(reply.version)  # if it fits, whatever else kept it from answering is no matter
            except ProtocolError:
                self.refusal = ProtocolError(f"{self.peer}: {error}")
                raise self.refusal from None
            return
        self.welcome = told
        version = self._versions.common(told.lowest, told.version)
        if not version:
            theirs = Versions(told.lowest, told.version)
            self.refusal = ProtocolError(
                f"{self.peer} (keyquorum {told.software}) speaks protocol version {theirs}; "
                f"this side (keyquorum {__version__}) speaks {self._versions}"
            )
            raise self.refusal
        self.version = version
        self._said(told)


@dataclass(slots=True)
class _Pending:
    peer: str
    verb: str
    started_s: float
    deadline_s: float


@dataclass(slots=True)
class _Connection:
    member: Member
    own: CurveIdentity
    current: CurveIdentity
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    greeting: Greeting
    opened_s: float
    down_s: float
    up: bool = False
    refused: bool = False
    unreachable: bool = False
    first: bool = False
    ahead: bool = False
    """Dialled before it was needed, and never up yet."""
    lost: bool = False
    """It broke, or nobody listened where it was to lead: libzmq may be waiting for its next try."""
    heard_s: float = 0.0
    """When the peer last said something."""
    asked_s: float = 0.0
    """When it was asked for a sign of life, which has not come yet; else 0."""
    pending: set[int] = field(default_factory=set)


class Channel:
    """Connections to the members of a cluster, opened when first used.

    Not safe for two threads at once; handing it over under a lock is fine. ``members`` maps names to members with
    endpoints. ``came_up`` is told a peer whose connection is there again, or for the first time, and ``said`` what it
    answered to ``hello``. With ``watchful`` a peer that is silent altogether counts as gone, and what is under way
    there ends at once. ``versions`` are what this side speaks, by default what the process does.
    """

    def __init__(
        self,
        identity: CurveSource,
        members: Mapping[str, Member],
        context: zmq.Context[Any] | None = None,
        came_up: Callable[[str], None] = lambda peer: None,
        said: Callable[[Welcome], None] = lambda welcome: None,
        *,
        watchful: bool = False,
        versions: Versions | None = None,
    ) -> None:
        check_zmq_version()
        self._versions = versions or spoken()
        self._identity = identity
        self._members = members
        self._came_up = came_up
        self._said = said
        self._watchful = watchful
        self._context: zmq.Context[Any] = context or zmq.Context.instance()
        self._connections: dict[str, _Connection] = {}
        self._pending: dict[int, _Pending] = {}
        self._by_monitor: dict[zmq.Socket[bytes], str] = {}
        self._by_socket: dict[zmq.Socket[bytes], str] = {}
        self._done: list[Arrival] = []
        self._tokens = itertools.count(1)
        self._poller = zmq.Poller()

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection; what is under way is given up."""
        for name in list(self._connections):
            self._drop(name)
        self._pending.clear()

    def dial(self, peers: Iterable[str]) -> None:
        """Begin to connect, so that a later request need not wait for it."""
        for peer in peers:
            if peer not in self._connections:
                self._open(peer).ahead = True

    def start(
        self, peer: str, verb: str, body: bytes, timeout_s: float, extensions: Mapping[str, bytes] | None = None
    ) -> int:
        """Send a request and return its token; its end comes from ``poll``, at the latest at its deadline.

        ``NodeUnavailable`` if there is no connection, ``KeyRefused`` if the peer refuses this key.
        """
        connection = self._connected(peer, timeout_s)
        if connection.greeting.refusal is not None:
            raise connection.greeting.refusal
        token = next(self._tokens)
        data = request_frame(connection.greeting.version, token, verb, body, timeout_s, extensions)
        now = time.monotonic()
        try:
            if connection.greeting.due:
                connection.socket.send(connection.greeting.frame(next(self._tokens)), zmq.DONTWAIT)
            connection.socket.send(data, zmq.DONTWAIT)
        except zmq.Again:
            connection.greeting.lost()
            raise NodeUnavailable(f"{peer}: the connection is down or its send queue is full") from None
        connection.pending.add(token)
        self._pending[token] = _Pending(peer, verb, now, now + timeout_s)
        return token

    def welcome(self, peer: str) -> Welcome | None:
        """What the peer said of itself when it was last connected to; None if it has not yet."""
        connection = self._connections.get(peer)
        return connection.greeting.welcome if connection else None

    def abandon(self, token: int) -> None:
        """Forget a request; a late reply is dropped."""
        pending = self._pending.pop(token, None)
        if pending is not None and pending.peer in self._connections:
            self._connections[pending.peer].pending.discard(token)

    def poll(self, timeout_s: float) -> list[Arrival]:
        """What has ended since, waiting at most ``timeout_s`` for a first one."""
        until = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            self._expire(now)
            if self._done or (now >= until and timeout_s > 0):
                break
            next_s = min((each.deadline_s for each in self._pending.values()), default=until)
            if self._watchful and self._pending:
                next_s = min(next_s, self._look_after_silent(now))
            wait_s = max(0.0, min(until, next_s) - now)
            if self._poller.sockets:
                # Rounded up, so that the last millisecond before a deadline is no busy loop.
                for socket, _ in self._poller.poll(int(wait_s * 1000 + 0.999)):
                    self._readable(socket)
                if self._watchful and self._pending:
                    self._give_up_silent()
            else:
                time.sleep(wait_s)  # pyzmq's poller does not wait if it has no socket
            if timeout_s <= 0:
                break
        done, self._done = self._done, []
        return done

    def call(self, peer: str, verb: str, body: bytes, timeout_s: float) -> Reply:
        """Send one request and wait for its reply; the channel must have nothing else under way."""
        token = self.start(peer, verb, body, timeout_s)
        while True:
            for arrival in self.poll(timeout_s):
                if arrival.token != token:
                    continue
                if arrival.reply is None:
                    raise arrival.error or DeadlineExceeded(f"{peer}: no reply")
                return arrival.reply

    # --- connections ---

    def _connected(self, peer: str, timeout_s: float) -> _Connection:
        connection = self._of_today(peer)
        if not connection.pending and int(connection.monitor.get(zmq.EVENTS)) & zmq.POLLIN:
            # What broke while nothing was under way must not end the request that is sent now.
            self._read_monitor(connection.monitor)
        if connection.ahead and not (connection.up or connection.refused):
            # It may serve by now, and libzmq wait for its next try. Who is not there ends another one at once.
            self._drop(peer)
            connection = self._open(peer, first=True)
        if not (connection.up or connection.pending) and (
            # Another socket dials at once, and tells as soon if nobody listens.
            (connection.lost and not connection.refused) or time.monotonic() - connection.down_s > REOPEN_S
        ):
            connection = self._reopen(peer)
        if not connection.up:
            dialling_s = time.monotonic() - connection.opened_s
            self._await_up(connection, min(timeout_s, max(REDIAL_TIMEOUT_S, CONNECT_TIMEOUT_S - dialling_s)))
        if connection.up:
            return connection
        other = None if not connection.refused else self._identity.instead(connection.own)
        if other is not None and connection.own is connection.current:
            self._drop(peer)
            connection = self._open(peer, first=True, pair=other)
            self._await_up(connection, min(timeout_s, CONNECT_TIMEOUT_S))
            if connection.up:
                return connection
        if connection.refused:
            # Closed, since libzmq would knock again every few milliseconds for ever.
            self._drop(peer)
            raise KeyRefused(f"{peer} refuses the key of {connection.own.name!r}: it is no member's in its manifest")
        raise NodeUnavailable(f"{peer} at {connection.member.endpoint} can't be reached")

    def _of_today(self, peer: str) -> _Connection:
        """The connection to the peer as the newest manifest has it: endpoint and key may have changed, or all of it."""
        connection = self._connections.get(peer)
        if connection is None:
            return self._open(peer, first=True)
        member, own = self._members.get(peer), self._identity.current
        if connection.member is not member or connection.current is not own:
            old = connection.member
            if (
                member is None
                or (member.endpoint, member.curve_public) != (old.endpoint, old.curve_public)
                or connection.current.public != own.public
            ):
                for token in list(connection.pending):
                    self._finish(token, None, NodeUnavailable(f"{peer}: the cluster manifest has changed"))
                self._drop(peer)
                return self._open(peer, first=True)
            connection.member, connection.current = member, own
        return connection

    def _open(self, peer: str, first: bool = False, pair: CurveIdentity | None = None) -> _Connection:
        """Begin to connect; with ``first`` the events tell of a failed attempt too, until ``_await_up`` is done.

        ``pair`` is used instead of the one that the newest manifest wants.
        """
        member = self._members.get(peer)
        if member is None:
            raise NodeUnavailable(f"{peer!r} is no member with an endpoint")
        socket = self._context.socket(zmq.DEALER)
        current = self._identity.current
        own = pair or current
        connect_options(socket, own, member)
        socket.immediate = 1
        socket.maxmsgsize = FRAME_MAX
        if self._watchful:  # or a firewall between hosts may forget an idle connection
            socket.tcp_keepalive, socket.tcp_keepalive_idle = 1, KEEPALIVE_S
        monitor = watch(self._context, socket, _FIRST_EVENTS if first else EVENTS)
        now, greeting = time.monotonic(), Greeting(peer, self._said, self._versions)
        connection = _Connection(member, own, current, socket, monitor, greeting, now, now, first=first)
        self._connections[peer] = connection
        self._by_socket[socket], self._by_monitor[monitor] = peer, peer
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)
        socket.connect(member.endpoint)
        return connection

    def _reopen(self, peer: str) -> _Connection:
        """Another socket to the peer; it has no longer to come up than the one before had."""
        opened_s = self._connections[peer].opened_s
        self._drop(peer)
        connection = self._open(peer, first=True)
        connection.opened_s = opened_s
        return connection

    def _await_up(self, connection: _Connection, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while not (connection.up or connection.refused or connection.unreachable):
            wait_ms = int((until - time.monotonic()) * 1000 + 0.999)
            if wait_ms <= 0 or not connection.monitor.poll(wait_ms):
                break
            self._read_monitor(connection.monitor)
        if connection.first:
            self._watch_on(connection)
        if not connection.up:
            # The monitor may lag behind: what counts is whether a message would go out.
            connection.up = bool(connection.socket.poll(0, zmq.POLLOUT))

    def _watch_on(self, connection: _Connection) -> None:
        """Go on without the events of failed attempts, which repeat for as long as the peer is away."""
        old = connection.monitor
        peer = self._by_monitor.pop(old)
        connection.monitor = watch(self._context, connection.socket, EVENTS)
        connection.lost = connection.lost or connection.unreachable
        connection.first = connection.unreachable = False
        self._by_monitor[connection.monitor] = peer
        self._poller.unregister(old)
        self._poller.register(connection.monitor, zmq.POLLIN)
        old.close(0)

    def _drop(self, name: str) -> None:
        connection = self._connections.pop(name)
        for socket in (connection.socket, connection.monitor):
            self._poller.unregister(socket)
        self._by_socket.pop(connection.socket)
        self._by_monitor.pop(connection.monitor)
        with contextlib.suppress(zmq.ContextTerminated):
            connection.socket.monitor(None, 0)
        connection.monitor.close(0)
        connection.socket.close(0)

    # --- events ---

    def _readable(self, socket: Any) -> None:
        if socket in self._by_monitor:
            self._read_monitor(socket)
            return
        peer = self._by_socket[socket]
        while True:
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._received(peer, frames)

    def _look_after_silent(self, now: float) -> float:
        """Ask who owes a reply and has been silent for a sign of life; when to look again."""
        next_s = math.inf
        for peer, connection in self._connections.items():
            if not connection.pending or not connection.up:
                continue
            if not connection.asked_s:
                since_s = max(connection.heard_s, min(self._pending[token].started_s for token in connection.pending))
                if since_s + SILENCE_MS / 1000 > now:
                    next_s = min(next_s, since_s + SILENCE_MS / 1000)
                    continue
                connection.asked_s = now
                with contextlib.suppress(zmq.Again):  # its queue is full of what it does not read
                    connection.socket.send(
                        Greeting(peer, versions=self._versions).frame(next(self._tokens)), zmq.DONTWAIT
                    )
            next_s = min(next_s, connection.asked_s + (LOST_MS - SILENCE_MS) / 1000)
        return next_s

    def _give_up_silent(self) -> None:
        """Take who was asked and has still said nothing for gone; what has arrived must have been read."""
        now = time.monotonic()
        for peer, connection in self._connections.items():
            if connection.asked_s and connection.pending and now - connection.asked_s >= (LOST_MS - SILENCE_MS) / 1000:
                self._broke(peer, connection, f"{peer}: silent for {LOST_MS} ms")

    def _broke(self, peer: str, connection: _Connection, why: str) -> None:
        """The connection is of no use any more; what was under way there ends."""
        if connection.up:
            connection.down_s, connection.lost = time.monotonic(), True
        connection.up = False
        connection.asked_s = 0.0
        connection.greeting.lost()
        for token in list(connection.pending):
            self._finish(token, None, NodeUnavailable(why))

    def _received(self, peer: str, frames: list[bytes]) -> None:
        connection = self._connections[peer]
        connection.heard_s, connection.asked_s = time.monotonic(), 0.0
        try:
            reply = connection.greeting.reply_in(frames)
        except ProtocolError as error:
            # Without an id the reply ends no request; the request's deadline does.
            for token in list(connection.pending):
                self._finish(token, None, ProtocolError(f"{peer}: {error}"))
            return
        if reply is not None:
            self._finish(reply.id, reply, None, peer)

    def _read_monitor(self, monitor: zmq.Socket[bytes]) -> None:
        peer = self._by_monitor[monitor]
        connection = self._connections[peer]
        while monitor.poll(0):
            event = parse_monitor_message(monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                connection.up, connection.refused = True, False
                connection.ahead = connection.lost = False
                self._came_up(peer)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                connection.refused, connection.up = True, False
            elif event == zmq.EVENT_CONNECT_RETRIED:
                connection.unreachable = True
            elif event == zmq.EVENT_DISCONNECTED:
                self._broke(peer, connection, f"{peer}: the connection broke")

    def _expire(self, now: float) -> None:
        for token in [token for token, each in self._pending.items() if each.deadline_s <= now]:
            each = self._pending[token]
            waited_ms = round((each.deadline_s - each.started_s) * 1000)
            self._finish(token, None, DeadlineExceeded(f"{each.peer}: no reply to {each.verb} within {waited_ms} ms"))

    def _finish(self, token: int, reply: Reply | None, error: EngineError | None, peer: str | None = None) -> None:
        pending = self._pending.get(token)
        if pending is None or (peer is not None and pending.peer != peer):
            return
        del self._pending[token]
        self._connections[pending.peer].pending.discard(token)
        elapsed_us = (time.monotonic() - pending.started_s) * 1e6
        self._done.append(Arrival(token, pending.peer, pending.verb, reply, error, elapsed_us))


def raise_for_status(reply: Reply) -> None:
    """Raise the error that an error or ``moved`` reply carries."""
    if reply.status == Status.OK:
        return
    body = error_codec.decode(reply.body)
    if reply.status == Status.MOVED:
        raise Moved(tuple(body.names))
    raise error_from_code(body.code, body.message, body.names)


def ask(channel: Channel, peer: str, verb: str, message: object, timeout_s: float) -> Any:
    """Send ``message`` as the verb's body and return the decoded body of an ok reply; raises an error reply's error."""
    reply = channel.call(peer, verb, REQUEST_CODECS[verb].encode(message), timeout_s)
    raise_for_status(reply)
    return REPLY_CODECS[verb].decode(reply.body)
