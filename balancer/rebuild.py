"""A registry that is made anew, or brought up to date, from what the nodes keep: ``python -m balancer --rebuild``.

Each node tells all it knows of keys (verb ``books``): manifests, certificates, tombstones and settings, all of which
prove themselves. The newest of each key counts. What nobody kept is lost: reservations, which are made again, and how
many uses of a limited key were given out, so that no more are.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import structlog
import zmq

from balancer.config import Settings, prepare_data
from balancer.loop import now_ms
from balancer.mark import Mark
from balancer.registry import KnownKey, SqliteRegistry, SqlRegistry
from engine.client.backup import archive_path, read_archive, verify_backup
from engine.client.membership import Servers
from engine.client.transport import Channel, ask
from engine.errors import ConfigError, EngineError, ManifestError, RegistryUnavailable
from engine.protocol.manifest import (
    Cluster,
    KeyRecord,
    open_certificate,
    open_create_order,
    open_destroy_order,
    open_key_manifest,
)
from engine.protocol.requests import BOOKS, Sync, SyncEntry, SyncPage
from engine.protocol.settings import SettingsRecord, is_settings, open_settings

__all__ = ["Gathered", "rebuild"]

ASK_S = 10.0
LEAD_S = 15.0

log = structlog.get_logger()


@dataclass(slots=True)
class _Key:
    record: KeyRecord
    certificate: bytes
    nodes: set[str] = field(default_factory=set)
    tombstones: dict[str, bytes] = field(default_factory=dict)


class Gathered:
    """What the nodes tell, each document verified."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._keys: dict[bytes, _Key] = {}
        self._settings: dict[bytes, SettingsRecord] = {}
        self.fencing_epoch = 0
        """The newest that any node has heard of."""
        self.remarks: list[str] = []

    def take(self, node: str, page: SyncPage) -> None:
        """One node's words; those that are not good are told in ``remarks`` and left out."""
        self.fencing_epoch = max(self.fencing_epoch, page.fencing_epoch)
        for entry in page.entries:
            try:
                self._take_entry(node, entry)
            except (EngineError, ValueError) as error:
                self.remarks.append(f"{node}: what it told of the key {entry.key_id.hex()} is left out: {error}")

    def _take_entry(self, node: str, entry: SyncEntry) -> None:
        record = open_key_manifest(entry.manifest, self._cluster)
        if record.manifest.key_id != entry.key_id:
            raise ValueError("its manifest is of another key")
        destroyed = entry.state == "destroyed"
        if destroyed:
            self._check_tombstone(record, entry.document)
        if entry.certificate or not destroyed:
            open_certificate(entry.certificate, record, self._cluster)
        if entry.settings:
            settings = open_settings(entry.settings, self._cluster, None)
            before = self._settings.get(settings.order.lineage)
            if settings.booked and (before is None or before.serial < settings.serial):
                self._settings[settings.order.lineage] = settings
        known = self._keys.get(entry.key_id)
        if known is None or (not known.certificate, -known.record.manifest.epoch) > (
            not entry.certificate,
            -record.manifest.epoch,
        ):
            earlier = known
            known = self._keys[entry.key_id] = _Key(record, entry.certificate)
            if earlier is not None:
                known.nodes, known.tombstones = earlier.nodes, earlier.tombstones
        known.nodes.add(node)
        if destroyed:
            known.tombstones[node] = entry.document

    def _check_tombstone(self, record: KeyRecord, document: bytes) -> None:
        told = record.manifest
        if is_settings(document):
            settings = open_settings(document, self._cluster, None)
            if (settings.order.lineage, settings.order.name) != (told.lineage, told.name) or not settings.booked:
                raise ValueError("what destroyed it is of another key, or was never booked")
            if not settings.order.destroy_at_ms:
                raise ValueError("the settings that destroyed it order no destruction")
            return
        order, _ = open_destroy_order(document, self._cluster, None)
        if (order.key_id, order.name) != (told.lineage, told.name):
            raise ValueError("the order that destroyed it is of another key")

    def keys(self, now_ms: int) -> Iterator[KnownKey]:
        """What is known of each key, the later ones first: they have a name that an earlier one had.

        That a node says a key was destroyed is believed if the order has not expired, or a balancer signed that it was
        booked, or too few holders are left that say nothing of it: anyone who has an old order could tell it again.
        """
        gone = {
            each.record.manifest.lineage: document
            for each in self._keys.values()
            for document in each.tombstones.values()
            if self._is_gone(each, document, now_ms)
        }
        for each in sorted(self._keys.values(), key=self._created_ms, reverse=True):
            told = each.record.manifest
            tombstone = gone.get(told.lineage, b"")
            if each.tombstones and not tombstone:
                nodes = ", ".join(sorted(each.tombstones))
                self.remarks.append(
                    f"{told.name!r}: {nodes} tell of its destruction by an order that has expired, the others don't; "
                    "it is kept, and can be destroyed again"
                )
            if not tombstone and not each.certificate:
                continue
            yield KnownKey(each.record, each.certificate, tombstone, tuple(sorted(each.nodes)))

    def settings(self) -> Iterable[SettingsRecord]:
        """The newest settings of each key that has any."""
        return self._settings.values()

    def _created_ms(self, key: _Key) -> int:
        return open_create_order(key.record.manifest.order, self._cluster, None)[0].expires_ms

    def _is_gone(self, key: _Key, document: bytes, now_ms: int) -> bool:
        told = key.record.manifest
        left = [holder for holder in told.holders if holder.node in key.nodes and holder.node not in key.tombstones]
        if is_settings(document) or len(left) < told.threshold:
            return True
        try:
            open_destroy_order(document, self._cluster, now_ms)
        except EngineError:
            return False
        return True


def rebuild(settings: Settings, without: Iterable[str] = (), backup: Path | None = None) -> None:
    """Take what all nodes but those ``without`` keep into this balancer's registry; it must not run meanwhile.

    Of a ``backup`` the documents in its archives count too, as what their nodes tell. ``RegistryUnavailable`` if a node
    does not answer, or another balancer leads; ``ManifestError`` if the backup is not whole.
    """
    membership, identity = settings.membership, settings.identity
    gathered = Gathered(membership.cluster)
    left_out = set(without)
    if unknown := left_out - set(membership.cluster.nodes):
        raise ConfigError(f"--without {', '.join(sorted(unknown))}: no such node")
    if backup is not None:
        _read_backup(backup, gathered, membership.cluster)
    path = prepare_data(settings)
    mark = Mark(path.with_name(f"{path.name}.mark"))
    registry = _open(settings)
    try:
        context: zmq.Context[Any] = zmq.Context()
        try:
            with Channel(settings.own, Servers(membership), context, watchful=True) as channel:
                _ask_all(channel, [name for name in membership.cluster.nodes if name not in left_out], gathered)
        finally:
            context.destroy(0)
        counts = _book(registry, gathered)
        seen = mark.seen
        mark.put(*registry.restored(max(gathered.fencing_epoch, seen[0]), seen[1]))
    finally:
        registry.close()
    for remark in gathered.remarks:
        sys.stdout.write(f"{remark}\n")
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    sys.stdout.write(f"the registry of {identity.name} is up to date: {told}\n")


def _read_backup(folder: Path, gathered: Gathered, cluster: Cluster) -> None:
    """What the archives of a backup tell; no secret is needed for that, and none is opened."""
    report = verify_backup(folder, cluster.pin, cluster=cluster)
    if report.problems:
        raise ManifestError(f"{folder} is not whole: {report.problems[0]}")
    for node in report.archives:
        _, pages = read_archive(archive_path(folder, node), cluster)
        for keys in pages:
            entries = [
                SyncEntry(
                    key.key_id,
                    "destroyed" if key.state == "destroyed" else "committed",
                    key.manifest,
                    key.certificate,
                    key.document,
                    key.settings,
                )
                for key in keys
            ]
            gathered.take(node, SyncPage(entries, False, 0, 0))


def _open(settings: Settings) -> SqlRegistry:
    signing = settings.identity.signing
    if not settings.postgresql:
        return SqliteRegistry(prepare_data(settings), settings.membership, signing, now_ms())
    from balancer.postgres import PostgresRegistry

    registry = PostgresRegistry(settings.postgresql, settings.membership, signing, now_ms)
    registry.start()
    until_s = time.monotonic() + LEAD_S
    while not registry.term:
        if time.monotonic() > until_s:
            leader, problem = registry.leader, registry.problem
            registry.close()
            why = f"{leader!r} leads; stop it" if leader else problem or "it does not answer"
            raise RegistryUnavailable(f"the registry can't be rebuilt: {why}")
        time.sleep(0.05)
    return registry


def _ask_all(channel: Channel, nodes: Iterable[str], gathered: Gathered) -> None:
    silent: dict[str, str] = {}
    for node in nodes:
        try:
            after, more = 0, True
            while more:
                page: SyncPage = ask(channel, node, BOOKS, Sync(after), ASK_S)
                gathered.take(node, page)
                more, after = page.more and page.last > after, page.last
        except EngineError as error:
            silent[node] = str(error)
    if silent:
        told = "; ".join(f"{node}: {error}" for node, error in silent.items())
        raise RegistryUnavailable(
            f"not all nodes tell what they keep ({told}). Without them keys may be missing, or be of an earlier epoch; "
            "--without NODE does without"
        )


def _book(registry: SqlRegistry, gathered: Gathered) -> Mapping[str, int]:
    before = registry.count()
    for known in gathered.keys(now_ms()):
        remark = registry.restore(known, now_ms())
        if remark:
            gathered.remarks.append(remark)
    for settings in gathered.settings():
        registry.restore_settings(settings)
    return {"keys": registry.count(), "more than before": registry.count() - before}
