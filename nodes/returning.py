"""What a node has to hear after its start before it goes by what it remembers of its keys. It opens no socket.

It may have been away for long, or its disk is an old copy: keys that it takes for its own may be destroyed, moved or
refreshed since. So it asks every other node and the registry. It uses no key before all were asked, and gives nothing
of a share away before another holder of the key, or the registry, has told what it knows. Who was silent is asked
again, until the registry has told.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from engine.errors import KeyPending
from engine.protocol.manifest import ClusterSource, FollowsCluster
from engine.protocol.requests import RECALLED, Recalled, SyncEntry, SyncPage
from nodes.catalogue import Catalogue, Entry

__all__ = ["LackingReport", "Returning", "booked", "recalled"]

REPLY_BYTES: Final = 40 * 1024
REPLY_ENTRIES: Final = 256
REPORT_EVERY_S: Final = 300.0
"""So often the registry hears again of shares that are lacking: it may have been put back, too."""


def recalled(catalogue: Catalogue, keys: Sequence[tuple[bytes, int, int]]) -> Recalled:
    """What this node knows of another's keys that is later than what that one knows; of the first of them, at least."""
    entries: list[SyncEntry] = []
    size = done = 0
    for key_id, epoch, serial in keys:
        entry = catalogue.by_id(key_id)
        if entry is not None and _is_later(entry, epoch, serial):
            told = _told(entry)
            size += len(told.manifest) + len(told.certificate) + len(told.document) + len(told.settings)
            if entries and (size > REPLY_BYTES or len(entries) == REPLY_ENTRIES):
                break
            entries.append(told)
        done += 1
    return Recalled(done, entries)


def booked(catalogue: Catalogue, after: int, fencing_epoch: int) -> SyncPage:
    """What this node knows of keys, from a place in its catalogue on, for a registry that is built anew."""
    found = catalogue.some(after, REPLY_ENTRIES + 1)
    entries: list[SyncEntry] = []
    size, last = 0, after
    for entry in found[:REPLY_ENTRIES]:
        if entry.row.state != "prepared":
            told = _told(entry)
            size += len(told.manifest) + len(told.certificate) + len(told.document) + len(told.settings)
            if entries and size > REPLY_BYTES:
                break
            entries.append(told)
        last += 1
    return SyncPage(entries, last - after < len(found), last, fencing_epoch)


def _is_later(entry: Entry, epoch: int, serial: int) -> bool:
    row, settings = entry.row, entry.settings
    if row.state == "destroyed" or (settings is not None and settings.serial > serial):
        return row.state != "prepared"
    return row.state != "prepared" and row.epoch > epoch


def _told(entry: Entry) -> SyncEntry:
    row, gone = entry.row, entry.row.state == "destroyed"
    return SyncEntry(
        key_id=row.key_id,
        state="destroyed" if gone else "committed",
        manifest=row.manifest,
        certificate=row.certificate,
        document=row.document if gone else b"",
        settings=entry.settings.raw if entry.settings is not None else b"",
    )


class Returning(FollowsCluster):
    """How far a node has come back. One that held no key at its start is back at once."""

    def __init__(self, cluster: ClusterSource, node: str, *, holds: bool, paused: bool = False) -> None:
        """``paused``: keys are being put in that nobody was asked of, so nobody is; another one takes its place."""
        self.paused = paused
        self._source = cluster
        self._node = node
        self._holds = holds
        self._asked = False
        self._books = False
        self._answered: set[str] = set()
        self._suspended: set[bytes] = set()

    @property
    def to_ask(self) -> list[str]:
        """The other nodes that have not told yet what they know; nobody, once all were asked and the registry told."""
        if not self._holds or self.paused or (self._asked and self._books):
            return []
        return [name for name in self._cluster.nodes if name != self._node and name not in self._answered]

    @property
    def waits(self) -> bool:
        """Whether the others were not asked yet, so that no key is used."""
        return self.paused or (self._holds and not self._asked and not self._alone)

    @property
    def heard(self) -> bool:
        """Whether anybody has told yet; a node that holds no key, or is the only one, has nobody to hear from."""
        return not self._holds or self._books or bool(self._answered) or self._alone

    @property
    def _alone(self) -> bool:
        return set(self._cluster.nodes) <= {self._node}

    @property
    def problem(self) -> str:
        """Why it uses no key yet; empty if it does."""
        return "it asks the others what became of its keys while it was away" if self.waits else ""

    @property
    def alarm(self) -> str:
        """What is wrong where nobody can be asked; empty if somebody has told."""
        if self.waits or self.heard:
            return ""
        return "it gives no shares away: neither another node nor the registry has told what became of its keys"

    def asked(self, answered: Iterable[str], destroyed: Iterable[bytes] = ()) -> None:
        """All were asked; those ``answered``, and what they told was taken in.

        The keys that they call ``destroyed`` are held back until the registry's books were read.
        """
        self._asked = True
        self._answered.update(answered)
        if not self._books:
            self._suspended.update(destroyed)

    def read_books(self) -> None:
        """All that the registry tells of this node's keys was taken in; what it knows to be destroyed is erased."""
        self._books = True
        self._suspended.clear()

    def check(self, key_id: bytes) -> None:
        """``KeyPending`` for a key that is not to be used yet, as far as is known now.

        If nobody could be reached, it may be: who needs the shares of others gets them from such as know.
        """
        if self.waits:
            raise KeyPending(f"{self._node} serves no key yet: {self.problem}")
        if key_id in self._suspended:
            raise KeyPending(f"{self._node} has heard that the key was destroyed, and waits for the registry's word")

    def may_release(self, holders: Iterable[str]) -> bool:
        """Whether one that may know of the key's end has told: the registry, or another of its holders."""
        if self.paused:
            return False
        return not self._holds or self._books or not self._answered.isdisjoint(holders)


class LackingReport:
    """Which shares the registry is to hear of that this node is to hold and has not: each once in a while."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._told: set[tuple[bytes, int]] = set()
        self._fencing_epoch = 0
        self._again_s = 0.0

    def due(self, fencing_epoch: int, now_s: float) -> list[tuple[bytes, int]]:
        """Some keys with their epochs that the registry of this fencing epoch has not heard of lately."""
        if fencing_epoch != self._fencing_epoch or now_s >= self._again_s:
            self._told.clear()
            self._fencing_epoch, self._again_s = fencing_epoch, now_s + REPORT_EVERY_S
        lacking = {(entry.row.key_id, entry.row.epoch) for entry in self._catalogue.lacking()}
        return sorted(lacking - self._told)[:RECALLED]

    def told(self, keys: Iterable[tuple[bytes, int]]) -> None:
        """The registry has heard of these."""
        self._told.update(keys)
