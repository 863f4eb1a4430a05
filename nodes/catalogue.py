"""What this node knows of the keys, in memory: an index over the store's rows. It decides nothing."""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

from engine.errors import KeyDisabled, StaleKey, VersionRetired
from engine.keys import ALGORITHMS, Algorithm
from engine.protocol.manifest import KeyManifest, KeyRecord, read_key_manifest
from engine.protocol.settings import SettingsRecord, check_usable, read_settings
from nodes.store import Row

__all__ = ["Catalogue", "Entry"]

NAMES_AT_ONCE = 256
"""So many names are taken under one lock."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row with its manifest parsed, and the key's settings where it has any."""

    row: Row
    record: KeyRecord
    algorithm: Algorithm
    lineage: bytes
    uses_max: int
    settings: SettingsRecord | None = None

    @property
    def manifest(self) -> KeyManifest:
        """The key's manifest."""
        return self.record.manifest

    def check_usable(self) -> None:
        """Refuse what its settings refuse: ``KeyDisabled``, ``VersionRetired``."""
        check_usable(self.row.name, self.manifest.version, self.settings)

    @property
    def usable(self) -> bool:
        """Whether its settings let it be used."""
        try:
            self.check_usable()
        except (KeyDisabled, VersionRetired):
            return False
        return True


def _age(entry: Entry) -> int:
    return entry.row.version


def _waits(entry: Entry) -> bool:
    """Whether it waits for its certificate; one that was aborted waits for nothing."""
    return entry.row.state == "prepared" and not entry.row.document


class Catalogue:
    """Entries by key id, and by name those of the newest version; safe for several threads.

    A version has one entry, and while its shares are replaced a second one: the prepared share of the next epoch.
    """

    def __init__(self, rows: Iterable[Row], settings: Iterable[bytes] = ()) -> None:
        self._lock = threading.Lock()
        self._settings = {each.order.lineage: each for each in map(read_settings, settings)}
        self._lineages: dict[bytes, set[bytes]] = {}
        self._by_id: dict[bytes, Entry] = {}
        self._by_name: dict[str, Entry] = {}
        self._next: dict[bytes, Entry] = {}
        self._moved: dict[str, Entry] = {}
        self._live: dict[str, dict[bytes, Entry]] = {}
        """By name, what is committed or moved."""
        self._pending: dict[str, set[bytes]] = {}
        self._lacking: dict[bytes, Entry] = {}
        self._watchers: list[Callable[[Entry], None]] = []
        self._noted: set[bytes] | None = None
        self._sorted: list[str] | None = None
        """What ``_by_name`` has names of, in their order, from when that is first asked for."""
        for row in sorted(rows, key=lambda row: row.epoch):
            self.put(row)

    def watch(self, changed: Callable[[Entry], None]) -> None:
        """Have ``changed`` called with each new or changed entry, by the thread that put it in."""
        self._watchers.append(changed)

    def put(self, row: Row) -> Entry:
        """Take in a new or changed row."""
        record = read_key_manifest(row.manifest)
        lineage = record.manifest.lineage
        with self._lock:
            entry = Entry(
                row,
                record,
                ALGORITHMS[record.manifest.algorithm],
                lineage,
                record.manifest.uses_max,
                self._settings.get(lineage),
            )
            self._lineages.setdefault(lineage, set()).add(row.key_id)
            if self._noted is not None:
                self._noted.add(row.key_id)
            before = self._by_id.get(row.key_id)
            if row.state == "prepared" and before is not None and before.row.epoch < row.epoch:
                self._next[row.key_id] = entry
                return entry
            self._next.pop(row.key_id, None)
            self._by_id[row.key_id] = entry
            self._lacking.pop(row.key_id, None)
            if row.state == "committed" and not row.sealed:
                self._lacking[row.key_id] = entry
            self._note_pending(entry)
            live = self._live.setdefault(row.name, {})
            if row.state in ("committed", "moved"):
                live[row.key_id] = entry
            else:
                live.pop(row.key_id, None)
            self._choose(row.name, live)
        for changed in self._watchers:
            changed(entry)
        return entry

    def set_settings(self, settings: SettingsRecord) -> None:
        """Have all versions of a key go by these from now on: each gets another entry, which replaces its last one."""
        changed_entries = []
        with self._lock:
            self._settings[settings.order.lineage] = settings
            for key_id in self._lineages.get(settings.order.lineage, ()):
                for entries in (self._by_id, self._next):
                    entry = entries.get(key_id)
                    if entry is None:
                        continue
                    fresh = entries[key_id] = replace(entry, settings=settings)
                    for named in (self._by_name, self._moved):
                        if named.get(entry.row.name) is entry:
                            named[entry.row.name] = fresh
                    live = self._live.get(entry.row.name, {})
                    if live.get(key_id) is entry:
                        live[key_id] = fresh
                    changed_entries += [fresh] if entries is self._by_id else []
        for fresh in changed_entries:
            for changed in self._watchers:
                changed(fresh)

    def settings_of(self, lineage: bytes) -> SettingsRecord | None:
        """The newest settings of a key, by the id of its first version."""
        return self._settings.get(lineage)

    def versions(self, lineage: bytes) -> list[Entry]:
        """The key's versions that are known here, in whatever state, the oldest first."""
        with self._lock:
            found = [self._by_id[key_id] for key_id in self._lineages.get(lineage, ()) if key_id in self._by_id]
        return sorted(found, key=_age)

    def _choose(self, name: str, live: dict[bytes, Entry]) -> None:
        """Note which version of a name is the newest, and whether this node is a holder of it.

        Where this node has shares, the newest is of that lineage: one that moved away before may be destroyed by now.
        """
        here = max((each for each in live.values() if each.row.state == "committed"), key=_age, default=None)
        mine = [each for each in live.values() if here is None or each.lineage == here.lineage]
        newest = max(mine, key=_age, default=None)
        for entries, state in ((self._by_name, "committed"), (self._moved, "moved")):
            if newest is not None and newest.row.state == state:
                entries[name] = newest
            else:
                entries.pop(name, None)
        self._note_name(name)
        if not live:
            self._live.pop(name, None)

    def _note_name(self, name: str) -> None:
        names = self._sorted
        if names is None:
            return
        at = bisect_left(names, name)
        known = at < len(names) and names[at] == name
        if known and name not in self._by_name:
            del names[at]
        elif not known and name in self._by_name:
            insort(names, name)

    def remove(self, row: Row) -> None:
        """Forget a prepared row."""
        with self._lock:
            if self._noted is not None:
                self._noted.add(row.key_id)
            for entries in (self._by_id, self._next):
                entry = entries.get(row.key_id)
                if entry is not None and entry.row.epoch == row.epoch:
                    del entries[row.key_id]
            if row.key_id not in self._by_id:
                self._settled(row)
                self._leave_lineage(row)

    def _leave_lineage(self, row: Row) -> None:
        lineage = read_key_manifest(row.manifest).manifest.lineage
        ids = self._lineages.get(lineage, set())
        ids.discard(row.key_id)
        if not ids:
            self._lineages.pop(lineage, None)

    def note_changes(self) -> set[bytes]:
        """From now on, the ids of the keys that change here, until ``forget_changes``."""
        self._noted = set()
        return self._noted

    def forget_changes(self) -> None:
        """End that."""
        self._noted = None

    def reload(self, key_id: bytes, rows: Iterable[Row]) -> None:
        """Take a key as these rows tell it: what was put in since they were stored is undone."""
        with self._lock:
            self._next.pop(key_id, None)
            entry = self._by_id.pop(key_id, None)
            if entry is not None:
                self._settled(entry.row)
                for entries in (self._by_name, self._moved):
                    named = entries.get(entry.row.name)
                    if named is not None and named.row.key_id == key_id:
                        del entries[entry.row.name]
                self._note_name(entry.row.name)
        for row in sorted(rows, key=lambda row: row.epoch):
            self.put(row)

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
        """The newest version of the live key of that name, if this node is a holder of it."""
        return self._by_name.get(name)

    def moved(self, name: str) -> Entry | None:
        """The newest version of the key of that name, if others hold it: this node had a share of it, or of another."""
        return self._moved.get(name)

    def newest(self, name: str) -> Entry | None:
        """The newest version of the key of that name, whoever holds it."""
        return self._by_name.get(name) or self._moved.get(name)

    def version(self, name: str, version: int) -> Entry | None:
        """That version of the key of that name, whoever holds it."""
        with self._lock:
            newest = self._by_name.get(name) or self._moved.get(name)
            live = self._live.get(name, {}).values()
            return next(
                (each for each in live if newest and (each.lineage, each.row.version) == (newest.lineage, version)),
                None,
            )

    def held(self, name: str) -> list[Entry]:
        """The versions of the key of that name that this node is a holder of."""
        with self._lock:
            return [each for each in self._live.get(name, {}).values() if each.row.state == "committed"]

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

    def names(self, after: str = "", prefix: str = "") -> Iterator[str]:
        """The names of the live keys behind ``after`` that begin with ``prefix``, in their order."""
        while True:
            with self._lock:
                if self._sorted is None:
                    self._sorted = sorted(self._by_name)
                names = self._sorted
                at = bisect_right(names, after) if after >= prefix else bisect_left(names, prefix)
                some = names[at : at + NAMES_AT_ONCE]
            for name in some:
                if not name.startswith(prefix):
                    return
                yield name
            if len(some) < NAMES_AT_ONCE:
                return
            after = some[-1]

    def prepared(self) -> list[Entry]:
        """The keys and the next epochs of keys that wait for their certificate; not those that were aborted."""
        with self._lock:
            first = [self._by_id[key_id] for ids in self._pending.values() for key_id in ids]
            return first + [entry for entry in self._next.values() if _waits(entry)]

    def known(self) -> list[tuple[bytes, int, int]]:
        """The keys that are not destroyed here, each with what is known of it: its epoch, and its settings' serial.

        The epoch is the last that is known to be committed, 0 if there is none; so is the serial.
        """
        with self._lock:
            entries = [entry for entry in self._by_id.values() if entry.row.state != "destroyed"]
        return [
            (
                entry.row.key_id,
                0 if entry.row.state == "prepared" else entry.row.epoch,
                entry.settings.serial if entry.settings is not None else 0,
            )
            for entry in entries
        ]

    def some(self, after: int, most: int) -> list[Entry]:
        """Some of all entries by id, from a place on; the order is that in which they came."""
        with self._lock:
            return list(islice(self._by_id.values(), after, after + most))

    def lacking(self) -> list[Entry]:
        """The live keys that this node is to hold a share of, and has none."""
        with self._lock:
            return list(self._lacking.values())

    def share_count(self) -> int:
        """How many shares of live keys this node holds."""
        with self._lock:
            live = (entry for entries in self._live.values() for entry in entries.values())
            return sum(bool(entry.row.sealed) for entry in live)
