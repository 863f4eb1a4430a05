"""Who is connected to a listening socket: counted, bounded and, where a bound is passed, cut. It reads no message.

libzmq accepts whoever comes until no descriptor is left, and then spins and serves nobody; it keeps the frames of a
message that never ends, however many they are. Neither can be forbidden by an option. So the socket's own events tell
of each connection's descriptor, the kernel tells how much came in and went out by it (tcp(7), TCP_INFO), and
``shutdown(2)`` on it ends it as if the network had.
"""

from __future__ import annotations

import ctypes
import os
import resource
import socket as sockets
import struct
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final

import structlog
import zmq

from engine.client.transport import watch

__all__ = ["Connection", "Connections", "connections_allowed", "descriptors", "end_connection", "peer_of", "wire_bytes"]

LOOK_EVERY_S: Final = 0.1
"""How often ``look`` is to be called, at the least."""
RESERVE_MIN: Final = 96
RESERVE_MAX: Final = 2_048
"""Descriptors that connections leave to everything else."""
ROOM_AGAIN: Final = 0.95
ROOM_MADE: Final = 0.9
MEMBER_PROOF_BYTES: Final = 400
"""A CURVE client has sent more than this once it has proved its key: greeting, HELLO and INITIATE (RFC 26)."""
WARN_AT: Final = 0.8
GROWTH_BYTES: Final = 32 * 1024 * 1024
"""Growth of the process's memory after which the connections are looked through for who keeps it."""
MEMBER_BYTES: Final = 64 * 1024 * 1024
"""What the connections of one member may keep in memory: parts of messages without end, replies that nobody reads."""
HANDSHAKE_BYTES: Final = 1_024
SILENT_S: Final = 1.0
"""How long a connection has for its first request before it may have to make room."""
MEASURE_EVERY_S: Final = 10.0
"""How often is counted how many descriptors are in use for anything else."""
EVENTS_AT_ONCE: Final = 10_000
EXCESS_S: Final = 0.2
"""How long a connection beyond its member's number has to read that it is one too many."""
_ACKED, _RECEIVED = 120, 128
"""Offsets of tcpi_bytes_acked and tcpi_bytes_received in struct tcp_info (linux/tcp.h)."""
_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_DROP_ALL = struct.pack("HBBI", 0x06, 0, 0, 0)
"""A filter of one instruction, "return 0": take in no packet (linux/filter.h)."""
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_CLOSED | zmq.EVENT_ACCEPTED | zmq.EVENT_ACCEPT_FAILED | zmq.EVENT_DISCONNECTED

log = structlog.get_logger()


def connections_allowed(wanted: int, used: int | None = None) -> tuple[int, int]:
    """How many connections there may be with the process's limit on descriptors, and the backlog that fits to it.

    ``wanted`` 0 means as many as there can be; ``used`` are the descriptors open for anything else.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = descriptors() if used is None else used
    reserve = min(max(soft // 16, RESERVE_MIN), RESERVE_MAX)
    room = max(1, soft - used - reserve)
    return min(wanted or room, room), reserve // 2


def descriptors() -> int:
    """How many descriptors the process has open; its limit when not even one is left to find out by."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@dataclass(slots=True, eq=False)
class Connection:
    """One accepted connection. ``member`` is empty until it sent a message; bytes are as on the wire."""

    fd: int
    since_s: float
    member: str = ""
    delivered: int = 0
    sent: int = 0
    open: bool = True

    def replied(self, size: int) -> None:
        """A message of one frame of so many bytes was queued for it."""
        self.sent += wire_bytes(size)


class Connections:
    """The connections of one bound socket; made before it is bound, and used by the thread of the socket.

    At ``most`` connections new ones are not accepted (their packets are dropped) until there is room, and those are cut
    that sent no request in their first second: all that proved no member's key, then the oldest others.
    ``most_of_member`` bounds those of one member.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        socket: zmq.Socket[bytes],
        wanted: int,
        most_of_member: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.monitor = watch(context, socket, _EVENTS)
        self.most, self.backlog = connections_allowed(wanted)
        self._wanted = wanted
        self._next_measure_s = 0.0
        self._refused = 0
        self.cut = 0
        self._socket = socket
        self._most_of_member = most_of_member
        self._clock = clock
        self._open: dict[int, Connection] = {}
        self._members: Counter[str] = Counter()
        self._excess: list[Connection] = []
        self._listening: set[int] = set()
        self._deaf = False
        self._warned = False
        self._next_look_s = 0.0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._lowest = self._resident_bytes()
        self._trim = False

    def __len__(self) -> int:
        return len(self._open)

    def close(self) -> None:
        """Read no more events; the socket itself is its owner's."""
        self._socket.disable_monitor()
        self.monitor.close(0)
        os.close(self._statm)

    # --- what the listener tells ---

    def heard(self, fd: int, member: str, size: int) -> tuple[Connection, bool]:
        """A message of so many bytes on the wire came by a descriptor: its connection, and if that is one too many."""
        connection = self._open.get(fd)
        if connection is None:  # its event was not read yet
            connection = self._open[fd] = Connection(fd, self._clock())
        connection.delivered += size
        if connection.member != member:
            self._leave(connection)
            connection.member = member
            self._members[member] += 1
            if self._members[member] > self._most_of_member:
                self._excess.append(connection)
        return connection, bool(self._excess) and connection in self._excess

    def known(self, fd: int, member: str) -> Connection | None:
        """The connection of a descriptor, if this member was heard by it before and none is one too many."""
        connection = self._open.get(fd)
        return None if connection is None or connection.member != member or self._excess else connection

    def end_of(self, members: Collection[str]) -> None:
        """Cut every connection of these members, who are none any more."""
        self._read()
        self._end([each for each in self._open.values() if each.member in members], "its key is no member's any more")

    def end_at(self, port: int) -> None:
        """Cut every connection that came in at a port where nobody listens any more."""
        self._read()
        self._end([each for each in self._open.values() if _port_of(each.fd) == port], "its endpoint is given up")

    # --- what happens by itself ---

    def look(self) -> None:
        """Take in the events, and ten times a second at most look after the bounds."""
        self._read()
        now = self._clock()
        if now < self._next_look_s and not self._refused:
            return
        self._next_look_s = now + LOOK_EVERY_S
        if now >= self._next_measure_s and not self._refused:
            self._next_measure_s = now + MEASURE_EVERY_S
            self.most, _ = connections_allowed(self._wanted, descriptors() - len(self._open))
        for connection in [each for each in self._excess if now - each.since_s > EXCESS_S]:
            self._end((connection,), "its member has too many connections")
        self._hold_number()
        self._hold_memory()

    def _read(self) -> None:
        now = self._clock()
        for _ in range(EVENTS_AT_ONCE):
            try:
                event, value = struct.unpack("=HI", self.monitor.recv_multipart(zmq.DONTWAIT)[0])
            except zmq.Again:
                return
            if event == zmq.EVENT_ACCEPTED:
                self._open.setdefault(value, Connection(value, now))
            elif event == zmq.EVENT_DISCONNECTED:
                connection = self._open.pop(value, None)
                if connection is not None:
                    connection.open = False
                    self._leave(connection)
            elif event == zmq.EVENT_LISTENING:
                self._listening.add(value)
            elif event == zmq.EVENT_CLOSED:
                self._listening.discard(value)
            elif event == zmq.EVENT_ACCEPT_FAILED:
                self._refused += 1

    def _leave(self, connection: Connection) -> None:
        if connection.member:
            self._members[connection.member] -= 1
            if self._members[connection.member] <= 0:
                del self._members[connection.member]
        if connection in self._excess:
            self._excess.remove(connection)

    def _hold_number(self) -> None:
        """Warn, cut the silent ones, or stop accepting, as it fills up."""
        count = len(self._open)
        if self._refused:
            # More came in a moment than there are descriptors: libzmq asks again and again until there is one.
            log.error("no descriptor left", times=self._refused, connections=count)
            self._refused = 0
            self._hear(False)
            self._make_room(max(count, self.most), 0.0)
        elif count >= (self.most * ROOM_AGAIN if self._deaf else self.most):
            self._make_room(count, SILENT_S)
            self._hear(False)
        elif self._deaf:
            self._hear(True)
        full = count >= self.most * WARN_AT
        if full != self._warned:
            self._warned = full
            if full:
                log.warning("many connections", connections=count, limit=self.most)

    def _make_room(self, count: int, silent_s: float) -> None:
        """Cut those without a request for so long: all that did not prove a member's key, then the oldest others."""
        long_ago = self._clock() - silent_s
        silent = [each for each in self._open.values() if not each.member and each.since_s <= long_ago]
        strangers: list[Connection] = []
        others: list[Connection] = []
        for each in silent:
            (strangers if _received_bytes(each) < MEMBER_PROOF_BYTES else others).append(each)
        self._end(strangers, "there are too many connections, and these are no member's")
        wanted = count - len(strangers) - int(self.most * ROOM_MADE)
        if wanted > 0:
            others.sort(key=lambda each: each.since_s)
            self._end(others[:wanted], "there are too many connections, and these were never used")

    def _hear(self, hear: bool) -> None:
        """Accept connections, or have the kernel drop what asks for one: others are not touched by that."""
        if self._deaf is not hear or not self._listening:
            return
        if hear:
            for listening in self._listening:
                _option(listening, _SO_DETACH_FILTER, 0)
        else:
            code = ctypes.create_string_buffer(_DROP_ALL, len(_DROP_ALL))
            for listening in self._listening:
                _option(listening, _SO_ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(code)))
        self._deaf = not hear
        log.warning("accepts connections again" if hear else "accepts no connections", connections=len(self._open))

    def _hold_memory(self) -> None:
        """When the process grew: find out which member's connections keep much, and cut the largest of them."""
        resident = self._resident_bytes()
        if self._trim:
            self._trim = False
            _libc.malloc_trim(0)
            resident = self._resident_bytes()
        self._lowest = min(self._lowest, resident)
        if resident < self._lowest + GROWTH_BYTES:
            return
        self._lowest = resident
        kept: dict[str, list[tuple[int, Connection]]] = {}
        for connection in self._open.values():
            size = _kept_bytes(connection)
            if size > 0:
                kept.setdefault(connection.member, []).append((size, connection))
        for member, sizes in kept.items():
            total = sum(size for size, _ in sizes)
            for size, connection in sorted(sizes, key=lambda each: -each[0]):
                if total <= MEMBER_BYTES:
                    break
                total -= size
                self._trim = True
                self._end((connection,), f"{member or 'a member'} keeps more than {MEMBER_BYTES} bytes in memory")

    def _resident_bytes(self) -> int:
        return int(os.pread(self._statm, 256, 0).split()[1]) * _PAGE

    def _end(self, connections: Iterable[Connection], reason: str) -> None:
        """Cut connections; the events of that come later, and the peer sees a connection that broke."""
        count = 0
        for connection in connections:
            count += 1
            if connection in self._excess:
                self._excess.remove(connection)
            _on_socket(connection.fd, lambda socket: socket.shutdown(sockets.SHUT_RDWR))
        if count:
            self.cut += count
            log.warning("connections cut", reason=reason, count=count, cut_so_far=self.cut)


def wire_bytes(size: int) -> int:
    """What a frame of so many bytes is on the wire: CURVE adds 33 (RFC 26), ZMTP 2 or for a long one 9 (RFC 23)."""
    return size + 33 + (2 if size + 33 < 256 else 9)


def peer_of(fd: int) -> tuple[str, int] | None:
    """The other end of a connection that libzmq owns; None if it is gone."""
    address = _on_socket(fd, lambda socket: socket.getpeername()[:2])
    return None if address is None else (str(address[0]), int(address[1]))


def _port_of(fd: int) -> int:
    """The port on this side of a connection."""
    address = _on_socket(fd, lambda socket: socket.getsockname())
    return 0 if address is None else int(address[1])


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


def _option(fd: int, option: int, value: int | bytes) -> None:
    _on_socket(fd, lambda socket: socket.setsockopt(sockets.SOL_SOCKET, option, value))


def _traffic(connection: Connection) -> tuple[int, int] | None:
    """Bytes that came in by it, and bytes that its peer's machine took; None if it is gone."""
    told = _on_socket(connection.fd, lambda socket: socket.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, 256))
    if told is None or len(told) < _RECEIVED + 8:
        return None
    (acked,), (received,) = struct.unpack_from("=Q", told, _ACKED), struct.unpack_from("=Q", told, _RECEIVED)
    return int(received), int(acked)


def _received_bytes(connection: Connection) -> int:
    traffic = _traffic(connection)
    return 0 if traffic is None else traffic[0]


def _kept_bytes(connection: Connection) -> int:
    """What came in by it and was not delivered as messages, and what was sent to it and not taken by its machine."""
    traffic = _traffic(connection)
    if traffic is None:
        return 0
    received, acked = traffic
    undelivered = received - connection.delivered - HANDSHAKE_BYTES
    return int(max(0, undelivered) + max(0, connection.sent - acked))


_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None)
