"""Who is connected to a router: counted, bounded and, where a bound is passed, cut. It reads no message.

Strangers may open connections until no descriptor is left, and members may have a router keep replies that they don't
read. What follows from that, for whom, is decided here.
"""

from __future__ import annotations

import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from typing import Final

import structlog

from engine.client._router import Connection, Router

__all__ = ["Connections", "connections_allowed", "descriptors"]

LOOK_EVERY_S: Final = 0.1
"""How often ``look`` is to be called, at the least."""
RESERVE_MIN: Final = 96
RESERVE_MAX: Final = 2_048
"""Descriptors that connections leave to everything else."""
ROOM_AGAIN: Final = 0.95
ROOM_MADE: Final = 0.9
WARN_AT: Final = 0.8
GROWTH_BYTES: Final = 32 * 1024 * 1024
"""Growth of the process's memory after which the connections are looked through for who keeps it."""
MEMBER_BYTES: Final = 64 * 1024 * 1024
"""What the connections of one member may keep in memory: parts of messages, replies that nobody reads."""
SILENT_S: Final = 1.0
"""How long a connection has for its first request before it may have to make room."""
MEASURE_EVERY_S: Final = 10.0
"""How often is counted how many descriptors are in use for anything else."""
EXCESS_S: Final = 0.2
"""How long a connection beyond its member's number has to read that it is one too many."""

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


class Connections:
    """The connections of one router, used by its thread.

    At ``most`` connections new ones are not accepted until there is room, and those are cut that sent no request in
    their first second: all that proved no member's key, then the oldest others. ``most_of_member`` bounds those of one
    member.
    """

    def __init__(
        self, router: Router, wanted: int, most_of_member: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.most, self.backlog = connections_allowed(wanted)
        self.cut = 0
        self._router = router
        self._wanted = wanted
        self._most_of_member = most_of_member
        self._clock = clock
        self._members: Counter[str] = Counter()
        self._excess: list[Connection] = []
        self._failed = 0
        self._warned = False
        self._next_look_s = self._next_measure_s = 0.0
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._lowest = self._resident_bytes()
        router.most = self.most
        router.gone = self._leave

    def __len__(self) -> int:
        return len(self._router)

    def close(self) -> None:
        """Look no more; the router itself is its owner's."""
        self._router.gone = None
        os.close(self._statm)

    # --- what the listener tells ---

    def heard(self, connection: Connection, member: str) -> bool:
        """A request of a member came: whether its connection is one too many."""
        if connection.member != member:
            self._leave(connection)
            connection.member = member
            self._members[member] += 1
            if self._members[member] > self._most_of_member:
                self._excess.append(connection)
        return bool(self._excess) and connection in self._excess

    def count_of(self, member: str) -> int:
        """How many connections of a member there are that it sent a request by."""
        return self._members[member]

    def known(self, connection: Connection, member: str) -> bool:
        """Whether this member was heard by the connection before, which is not one too many."""
        return connection.member == member and not (self._excess and connection in self._excess)

    def end_of(self, users: Collection[str]) -> None:
        """Cut every connection with one of these CURVE keys, which are no member's any more."""
        self._end([each for each in self._router.connections if each.user in users], "its key is no member's any more")

    def end_at(self, place: int) -> None:
        """Cut every connection that came in at a place where nobody listens any more."""
        self._end([each for each in self._router.connections if each.place == place], "its endpoint is given up")

    # --- what happens by itself ---

    def look(self) -> None:
        """Look after the bounds, ten times a second at most."""
        now = self._clock()
        if now < self._next_look_s and self._router.failed == self._failed:
            return
        self._next_look_s = now + LOOK_EVERY_S
        if now >= self._next_measure_s and self._router.failed == self._failed:
            self._next_measure_s = now + MEASURE_EVERY_S
            self.most, _ = connections_allowed(self._wanted, descriptors() - len(self))
            self._router.most = self.most
        for connection in [each for each in self._excess if now - each.since_s > EXCESS_S]:
            self._end((connection,), "its member has too many connections")
        self._hold_number()
        self._hold_memory()

    def _leave(self, connection: Connection) -> None:
        """It is closed, or another member's."""
        if connection.member:
            self._members[connection.member] -= 1
            if self._members[connection.member] <= 0:
                del self._members[connection.member]
        if connection in self._excess:
            self._excess.remove(connection)

    def _hold_number(self) -> None:
        """Warn, cut the silent ones, or accept again, as it fills up or empties."""
        count = len(self)
        if self._router.failed != self._failed:
            log.error("no descriptor left", times=self._router.failed - self._failed, connections=count)
            self._failed = self._router.failed
            self._make_room(max(count, self.most), 0.0)
        elif not self._router.accepting:
            if count >= self.most * ROOM_AGAIN:
                self._make_room(count, SILENT_S)
            else:
                self._router.accept(True)
                log.warning("accepts connections again", connections=count)
        elif count >= self.most:
            self._make_room(count, SILENT_S)
        full = count >= self.most * WARN_AT
        if full != self._warned:
            self._warned = full
            if full:
                log.warning("many connections", connections=count, limit=self.most)

    def _make_room(self, count: int, silent_s: float) -> None:
        """Cut those without a request for so long: all that did not prove a member's key, then the oldest others."""
        long_ago = self._clock() - silent_s
        silent = [each for each in self._router.connections if not each.member and each.since_s <= long_ago]
        strangers = [each for each in silent if not each.proved]
        others = [each for each in silent if each.proved]
        self._end(strangers, "there are too many connections, and these are no member's")
        wanted = count - len(strangers) - int(self.most * ROOM_MADE)
        if wanted > 0:
            others.sort(key=lambda each: each.since_s)
            self._end(others[:wanted], "there are too many connections, and these were never used")

    def _hold_memory(self) -> None:
        """When the process grew: find out which member's connections keep much, and cut the largest of them."""
        resident = self._resident_bytes()
        self._lowest = min(self._lowest, resident)
        if resident < self._lowest + GROWTH_BYTES:
            return
        self._lowest = resident
        kept: dict[str, list[tuple[int, Connection]]] = {}
        for connection in self._router.connections:
            if connection.held:
                kept.setdefault(connection.member, []).append((connection.held, connection))
        for member, sizes in kept.items():
            total = sum(size for size, _ in sizes)
            for size, connection in sorted(sizes, key=lambda each: -each[0]):
                if total <= MEMBER_BYTES:
                    break
                total -= size
                self._end((connection,), f"{member or 'a member'} keeps more than {MEMBER_BYTES} bytes in memory")

    def _resident_bytes(self) -> int:
        return int(os.pread(self._statm, 256, 0).split()[1]) * _PAGE

    def _end(self, connections: Iterable[Connection], reason: str) -> None:
        """Cut connections; the peer sees one that broke."""
        count = 0
        for connection in connections:
            count += 1
            self._router.end(connection)
        if count:
            self.cut += count
            log.warning("connections cut", reason=reason, count=count, cut_so_far=self.cut)


_PAGE = os.sysconf("SC_PAGE_SIZE")
