"""The cache of loaded keys: which are in the token now and how long they may stay. Time is an argument (monotonic, s).

It owns no token object's life: what leaves the cache is handed back to the caller, who destroys it on its own lane.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["KeyCache"]

V = TypeVar("V")


@dataclass(slots=True)
class _Entry(Generic[V]):
    value: V
    expires_s: float


class KeyCache(Generic[V]):
    """Least recently used first, at most ``max_entries``, each for at most ``ttl_s`` seconds from its loading.

    The TTL counts from loading and use does not prolong it, so that a combiner forgets every key in bounded time.
    Invariant: what was put leaves through ``on_evict`` exactly once.
    """

    def __init__(self, max_entries: int, ttl_s: float, on_evict: Callable[[V], None]) -> None:
        self._entries: OrderedDict[bytes, _Entry[V]] = OrderedDict()
        self._max = max_entries
        self._ttl_s = ttl_s
        self._on_evict = on_evict
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes, now_s: float) -> V | None:
        """The value, unless absent or expired; counts a hit or a miss."""
        entry = self._entries.get(key)
        if entry is not None and entry.expires_s > now_s:
            self._entries.move_to_end(key)
            self.hits += 1
            return entry.value
        self.misses += 1
        if entry is not None:
            self.drop(key)
        return None

    def contains(self, key: bytes, now_s: float) -> bool:
        """Whether a ``get`` would hit; counts nothing."""
        entry = self._entries.get(key)
        return entry is not None and entry.expires_s > now_s

    def put(self, key: bytes, value: V, now_s: float) -> None:
        """Keep a value; an older one of the same key, and the least recently used beyond the limit, leave."""
        self.drop(key)
        self._entries[key] = _Entry(value, now_s + self._ttl_s)
        while len(self._entries) > self._max:
            self.evictions += 1
            self.drop(next(iter(self._entries)))

    def drop(self, key: bytes) -> bool:
        """Let one leave; whether it was there."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self._on_evict(entry.value)
        return True

    def clear(self) -> int:
        """Let all leave; how many there were."""
        count = len(self._entries)
        for key in list(self._entries):
            self.drop(key)
        return count

    def expire(self, now_s: float) -> int:
        """Let the expired ones leave; how many there were."""
        gone = [key for key, entry in self._entries.items() if entry.expires_s <= now_s]
        for key in gone:
            self.evictions += 1
            self.drop(key)
        return len(gone)
