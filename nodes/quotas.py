"""How often this node may still use the keys whose uses are limited. It opens no socket and asks nobody.

A key's limit holds for all nodes together: each has a quota, and asks the registry for more before it is over.
Invariant: a use is made only after it was noted durably as made, so that no crash makes it come back. Uses are noted a
block at a time; what is left of a block when the node dies counts as used.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import Final

from engine.errors import KeyExhausted
from engine.protocol.manifest import first_quota
from nodes.catalogue import Entry
from nodes.store import ShareStore

__all__ = ["Quotas"]

BLOCK_MAX: Final = 65_536
"""Most uses noted at a time: at 50,000 a second a write in 1.3 s."""
BLOCK_PART: Final = 8
"""A block is this part of the whole quota at most."""
LOW_PART: Final = 4
"""More is asked for when what is not noted yet is this part of the quota, or less."""


@dataclass(slots=True)
class _Quota:
    """``granted`` uses in all, of which ``noted`` count as made; of these ``left`` are not made yet."""

    granted: int
    noted: int
    left: int = 0
    over: bool = False
    """Whether the registry has said that there are no more."""
    nonce: bytes = b""
    """Of the question to the registry that has no answer yet."""

    @property
    def block(self) -> int:
        return min(BLOCK_MAX, max(1, self.granted // BLOCK_PART))

    @property
    def low(self) -> bool:
        """Whether the next block is to be noted."""
        return 2 * self.left <= self.block

    @property
    def short(self) -> bool:
        """Whether more is to be asked for."""
        return not self.over and LOW_PART * (self.granted - self.noted) <= self.granted


class Quotas:
    """The quotas of one node; ``take`` and ``give`` are quick, the rest may wait for the disk."""

    def __init__(self, store: ShareStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._known: dict[bytes, _Quota] = {}
        self._low: dict[bytes, Entry] = {}

    def take(self, entry: Entry, most: int) -> int:
        """Uses that may be made now, at most so many; 0 where some must be noted first."""
        with self._lock:
            quota = self._known.get(entry.row.key_id)
            if quota is None:
                return 0
            taken = min(quota.left, most)
            quota.left -= taken
            if quota.low:
                self._low[entry.row.key_id] = entry
            return taken

    def ready(self, entry: Entry) -> bool:
        """Whether uses may be made now."""
        quota = self._known.get(entry.row.key_id)
        return quota is not None and quota.left > 0

    def give(self, entry: Entry, uses: int) -> None:
        """Take back uses that were not made."""
        with self._lock:
            quota = self._known.get(entry.row.key_id)
            if quota is not None:
                quota.left += uses

    def low(self) -> list[Entry]:
        """The keys of which another block is to be noted; each is told once."""
        if not self._low:
            return []
        with self._lock:
            entries, self._low = list(self._low.values()), {}
        return entries

    def check(self, entry: Entry) -> None:
        """``KeyExhausted`` if nothing is left here and there is no more to be had."""
        with self._lock:
            quota = self._known.get(entry.row.key_id)
            if quota is not None and quota.over and quota.left <= 0 and quota.granted <= quota.noted:
                raise KeyExhausted(
                    f"version {entry.row.version} of {entry.row.name!r} may be used {entry.uses_max} times to encrypt, "
                    "sign or make MACs, by all nodes together, and that is over: rotate it"
                )

    def note(self, entry: Entry) -> bool:
        """Note the next block durably, if there is one and it is time; whether more is to be asked for."""
        with self._writing:
            quota = self._load(entry)
            block = min(quota.block, quota.granted - quota.noted)
            if quota.low and block > 0:
                self._write(entry, quota, quota.granted, quota.noted + block)
            return quota.short

    def add(self, entry: Entry, uses: int) -> None:
        """Note durably that the registry has granted so many more; none says that there are no more."""
        with self._writing:
            quota = self._load(entry)
            quota.nonce = b""
            if uses:
                self._write(entry, quota, quota.granted + uses, quota.noted)
            else:
                quota.over = True

    def nonce(self, entry: Entry) -> bytes:
        """What to ask the registry for more with: the same until it has answered."""
        with self._writing:
            quota = self._load(entry)
            quota.nonce = quota.nonce or os.urandom(16)
            return quota.nonce

    def forget(self, key_id: bytes) -> None:
        """The key is gone from here; what was noted of it stays in the store as long as its row does."""
        with self._lock:
            self._known.pop(key_id, None)
            self._low.pop(key_id, None)

    def close(self) -> None:
        """Take back what was noted and not made, of a node that makes no use any more."""
        with self._writing:
            for key_id, quota in self._known.items():
                if quota.left > 0:
                    self._store.note_quota(key_id, quota.granted, quota.noted - quota.left)
                    quota.noted, quota.left = quota.noted - quota.left, 0

    def _load(self, entry: Entry) -> _Quota:
        key_id = entry.row.key_id
        quota = self._known.get(key_id)
        if quota is None:
            kept = self._store.quota(key_id)
            if kept is None:  # a holder of the first epoch has a part without asking; who came later asks
                kept = (first_quota(entry.manifest) if entry.manifest.epoch == 1 else 0, 0)
            quota = _Quota(*kept)
            with self._lock:
                self._known[key_id] = quota
        return quota

    def _write(self, entry: Entry, quota: _Quota, granted: int, noted: int) -> None:
        self._store.note_quota(entry.row.key_id, granted, noted)
        with self._lock:
            quota.left += noted - quota.noted
            quota.granted, quota.noted = granted, noted
