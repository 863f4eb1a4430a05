"""The one mechanism of all caches in a node: what may stay, for how long, how often used. Time is an argument (s).

It knows nothing of what it keeps. What leaves is handed to ``on_evict``, so that keys leave the token and shares are
wiped; see ``Handlers`` for loaded keys, ``shares`` for unsealed ones and ``remember`` for checked signatures.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Final, Generic, Literal, TypeVar

__all__ = ["REASONS", "Cache", "CacheLimits", "CacheStatistics", "Reason"]

Reason = Literal["ttl", "uses", "room", "changed", "flushed"]
"""Why an entry left: its time, its uses, the limits on entries and bytes, newer truth, or somebody's word."""
REASONS: Final[tuple[Reason, ...]] = ("ttl", "uses", "room", "changed", "flushed")

FEW: Final = 64

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """At most so many entries and bytes, each for ``ttl_s`` seconds from its loading and for ``max_uses`` uses."""

    ttl_s: float
    max_entries: int
    max_uses: int = 2**62
    max_bytes: int = 2**62


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """``entries`` and ``bytes`` are of now, the rest counted since the start; ``evictions`` by reason."""

    entries: int
    bytes: int
    hits: int
    misses: int
    evictions: dict[Reason, int]


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    size: int
    expires_s: float
    uses_left: int


@dataclass(slots=True)
class _Tally:
    hits: int = 0
    misses: int = 0
    evictions: dict[Reason, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))


class Cache(Generic[K, V]):
    """The least recently used leaves first; safe for several threads.

    The TTL counts from loading and use does not prolong it, so that everything is forgotten in bounded time.
    Invariants: the limits hold after each call; what was kept leaves through ``on_evict`` exactly once, after it can no
    longer be found. ``on_evict`` is called without the lock, by the thread whose call made the entry leave.
    """

    def __init__(self, limits: CacheLimits, on_evict: Callable[[V], None] = lambda value: None) -> None:
        self._entries: OrderedDict[K, _Entry[V]] = OrderedDict()
        self._ages: deque[tuple[K, _Entry[V]]] = deque()
        """The entries in the order of their loading, which is that of their ends; some have left meanwhile."""
        self._spent: set[K] = set()
        """Keys of entries that had no use left when they were last used."""
        self._limits = limits
        self._on_evict = on_evict
        self._bytes = 0
        self._tally = _Tally()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def statistics(self) -> CacheStatistics:
        """What it holds now, and what happened since the start."""
        with self._lock:
            tally = self._tally
            return CacheStatistics(len(self._entries), self._bytes, tally.hits, tally.misses, dict(tally.evictions))

    def get(self, key: K, now_s: float, *, counted: bool = True) -> V | None:
        """The value, unless absent, expired or used up; takes one of its uses and, if ``counted``, is a hit or miss."""
        return self.read(key, now_s, lambda value: value, counted=counted)

    def lease(self, key: K, now_s: float, most: int) -> tuple[V, int, float] | None:
        """The value with up to ``most`` of its uses, taken in advance, and when its time is over.

        None where there is nothing; then nothing is counted and nothing leaves: that is the next ``get``'s. ``settle``
        ends it.
        """
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or self._over(entry, now_s) is not None:
                return None
            self._entries.move_to_end(key)
            taken = min(most, entry.uses_left)
            entry.uses_left -= taken
            if entry.uses_left < 1:
                self._spent.add(key)
            return entry.value, taken, entry.expires_s

    def settle(self, key: K, value: V, used: int, unused: int) -> None:
        """Count the uses of a lease as hits, and give back those that are left, if the value is still there."""
        with self._lock:
            self._tally.hits += used
            entry = self._entries.get(key)
            if entry is not None and entry.value is value:
                entry.uses_left += unused

    def read(self, key: K, now_s: float, reader: Callable[[V], R], *, counted: bool = True) -> R | None:
        """As ``get``, but gives what ``reader`` makes of the value, which can't leave while it is read."""
        with self._lock:
            entry = self._entries.get(key)
            reason = self._over(entry, now_s) if entry is not None else None
            if entry is not None and reason is None:
                self._entries.move_to_end(key)
                entry.uses_left -= 1
                if entry.uses_left < 1:
                    self._spent.add(key)
                self._tally.hits += counted
                return reader(entry.value)
            self._tally.misses += counted
            gone = [] if reason is None else self._take([key], reason)
        self._let_go(gone)
        return None

    def contains(self, key: K, now_s: float) -> bool:
        """Whether a ``get`` would find it; counts nothing."""
        with self._lock:
            entry = self._entries.get(key)
            return entry is not None and self._over(entry, now_s) is None

    def put(self, key: K, value: V, now_s: float, size: int = 0) -> bool:
        """Keep a value of ``size`` bytes; an older one of the same key leaves, and the least recently used beyond room.

        False for a value larger than all room: it was not kept and stays the caller's.
        """
        if size > self._limits.max_bytes:
            return False
        with self._lock:
            gone = self._take([key], "changed")
            entry = _Entry(value, size, now_s + self._limits.ttl_s, self._limits.max_uses)
            self._entries[key] = entry
            self._ages.append((key, entry))
            if len(self._ages) > 2 * len(self._entries) + FEW:
                self._ages = deque((key, aged) for key, aged in self._ages if self._entries.get(key) is aged)
            self._bytes += size
            while len(self._entries) > self._limits.max_entries or self._bytes > self._limits.max_bytes:
                gone += self._take([next(iter(self._entries))], "room")
        self._let_go(gone)
        return True

    def drop(self, chosen: Callable[[K], bool], reason: Reason) -> int:
        """Let those leave whose key is ``chosen``; how many there were."""
        with self._lock:
            gone = self._take([key for key in self._entries if chosen(key)], reason)
        self._let_go(gone)
        return len(gone)

    def drop_values(self, chosen: Callable[[V], bool], reason: Reason) -> int:
        """Let those leave whose value is ``chosen``; how many there were."""
        with self._lock:
            gone = self._take([key for key, entry in self._entries.items() if chosen(entry.value)], reason)
        self._let_go(gone)
        return len(gone)

    def clear(self, reason: Reason) -> int:
        """Let all leave; how many there were."""
        return self.drop(lambda key: True, reason)

    def expire(self, now_s: float) -> int:
        """Let those leave whose time or uses are over; how many there were."""
        with self._lock:
            gone: list[V] = []
            while self._ages and self._ages[0][1].expires_s <= now_s:
                key, aged = self._ages.popleft()
                if self._entries.get(key) is aged:
                    gone += self._take([key], "ttl")
            for key in self._spent:
                entry = self._entries.get(key)
                if entry is not None and entry.uses_left < 1:
                    gone += self._take([key], "uses")
            self._spent.clear()
        self._let_go(gone)
        return len(gone)

    @staticmethod
    def _over(entry: _Entry[V], now_s: float) -> Reason | None:
        if entry.expires_s <= now_s:
            return "ttl"
        return "uses" if entry.uses_left < 1 else None

    def _take(self, keys: list[K], reason: Reason) -> list[V]:
        """Remove what is there of the keys, under the lock."""
        gone = []
        for key in keys:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self._bytes -= entry.size
                self._tally.evictions[reason] += 1
                gone.append(entry.value)
        return gone

    def _let_go(self, gone: list[V]) -> None:
        """Hand over what left; an error of one does not keep the others, and is raised at the end."""
        failure: Exception | None = None
        for value in gone:
            try:
                self._on_evict(value)
            except Exception as error:
                failure = failure or error
        if failure is not None:
            raise failure
