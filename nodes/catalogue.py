"""What this node knows of the keys, in memory: an index over the store's rows. It decides nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from engine.errors import StaleKey
from engine.keys import ALGORITHMS, Algorithm
from engine.protocol.manifest import KeyManifest, KeyRecord, read_key_manifest
from nodes.store import Row

__all__ = ["Catalogue", "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row with its manifest parsed."""

    row: Row
    record: KeyRecord
    algorithm: Algorithm

    @property
    def manifest(self) -> KeyManifest:
        """The key's manifest."""
        return self.record.manifest


def _waits(entry: Entry) -> bool:
    """Whether it waits for its certificate; one that was aborted waits for nothing."""
    return entry.row.state == "prepared" and not entry.row.document


class Catalogue:
    """Entries by key id, and the committed ones by name; safe for several threads.

    A key has one entry, and while its shares are replaced a second one: the prepared share of the next epoch.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[bytes, Entry] = {}
        self._by_name: dict[str, Entry] = {}
        self._next: dict[bytes, Entry] = {}
        self._moved: dict[str, Entry] = {}
        self._pending: dict[str, set[bytes]] = {}
        self._watchers: list[Callable[[Entry], None]] = []
        for row in sorted(rows, key=lambda row: row.epoch):
            self.put(row)

    def watch(self, changed: Callable[[Entry], None]) -> None:
        """Have ``changed`` called with each new or changed entry, by the thread that put it in."""
        self._watchers.append(changed)

    def put(self, row: Row) -> Entry:
        """Take in a new or changed row."""
        record = read_key_manifest(row.manifest)
        entry = Entry(row, record, ALGORITHMS[record.manifest.algorithm])
        with self._lock:
            before = self._by_id.get(row.key_id)
            if row.state == "prepared" and before is not None and before.row.epoch < row.epoch:
                self._next[row.key_id] = entry
                return entry
            self._next.pop(row.key_id, None)
            self._by_id[row.key_id] = entry
            self._note_pending(entry)
            if row.state == "moved":
                self._moved[row.name] = entry
            elif (moved := self._moved.get(row.name)) is not None and moved.row.key_id == row.key_id:
                del self._moved[row.name]
            if row.state == "committed":
                self._by_name[row.name] = entry
            elif (named := self._by_name.get(row.name)) is not None and named.row.key_id == row.key_id:
                del self._by_name[row.name]
        for changed in self._watchers:
            changed(entry)
        return entry

    def remove(self, row: Row) -> None:
        """Forget a prepared row."""
        with self._lock:
            for entries in (self._by_id, self._next):
                entry = entries.get(row.key_id)
                if entry is not None and entry.row.epoch == row.epoch:
                    del entries[row.key_id]
            if row.key_id not in self._by_id:
                self._settled(row)

    def _note_pending(self, entry: Entry) -> None:
        if _waits(entry):
            self._pending.setdefault(entry.row.name, set()).add(entry.row.key_id)
        else:
            self._settled(entry.row)

    def _settled(self, row: Row) -> None:
        ids = self._pending.get(row.name)
        if ids is not None:
            ids.discard(row.key_id)
            if not ids:
                del self._pending[row.name]

    def pending(self, name: str) -> set[bytes]:
        """The keys of this name of which a share waits for its certificate, or for the word that there will be none."""
        ids = self._pending.get(name)
        return set(ids) if ids else set()

    def by_name(self, name: str) -> Entry | None:
        """The live key of that name."""
        return self._by_name.get(name)

    def moved(self, name: str) -> Entry | None:
        """The key of that name that this node held a share of once, as others hold it now."""
        return self._moved.get(name)

    def by_id(self, key_id: bytes) -> Entry | None:
        """The key of that id in whatever state."""
        return self._by_id.get(key_id)

    def next_of(self, key_id: bytes) -> Entry | None:
        """The prepared next epoch of a committed key, or of one that moved and comes back."""
        return self._next.get(key_id)

    def knows(self, key_id: bytes) -> bool:
        """Whether there is a row of that key, in whatever state."""
        return key_id in self._by_id

    def committed(self, key_id: bytes) -> Entry:
        """The live key of that id; ``StaleKey`` otherwise."""
        entry = self._by_id.get(key_id)
        if entry is None or entry.row.state != "committed":
            raise StaleKey(f"this node has no committed key with id {key_id.hex()}")
        return entry

    def names(self) -> list[str]:
        """The names of the live keys, sorted."""
        with self._lock:
            return sorted(self._by_name)

    def prepared(self) -> list[Entry]:
        """The keys and the next epochs of keys that wait for their certificate; not those that were aborted."""
        with self._lock:
            entries = (*self._by_id.values(), *self._next.values())
            return [entry for entry in entries if _waits(entry)]

    def share_count(self) -> int:
        """How many shares of live keys this node holds."""
        with self._lock:
            return sum(bool(entry.row.sealed) for entry in self._by_name.values())
