"""Backups in a folder: made of the nodes' archives, verified without a secret, opened by operators, and restored.

The folder's layout (docs/protocol.md has the documents)::

    order                  the operators' export order
    cluster.manifest       the chain of manifests as it was then
    nodes/<name>.archive   one archive for each node
    contributions/<name>   an operator's, for each archive, to a restore

A file of archives or contributions is the magic and then parts: their length in four bytes, big-endian, and the signed
document. It never holds a share or an archive key in plain.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final
from urllib.parse import quote

import zmq

from engine.client.client import ClientSettings
from engine.client.config import Identity, sync_folder, write_private
from engine.client.membership import Membership, Servers
from engine.client.transport import Channel, ask
from engine.errors import ClusterError, ConfigError, DeadlineExceeded, EngineError, ManifestError, NodeUnavailable
from engine.protocol.backup import (
    Archive,
    ArchivedKey,
    ArchiveReader,
    Contribution,
    check_quorum,
    contribute,
    contributions,
    key_record,
    open_export_order,
    open_piece,
    read_export_order,
)
from engine.protocol.manifest import Cluster, chain_pin, open_chain, open_destroy_order, open_receipt
from engine.protocol.refresh import Opener, Sealer
from engine.protocol.requests import (
    SHARE_EXPORT,
    SHARE_RESTORE,
    ExportedPart,
    RestoredPart,
    RestoredShare,
    ShareExport,
    ShareRestore,
)
from engine.protocol.settings import is_settings, open_settings
from engine.protocol.signed import read_unverified
from engine.protocol.wire import MAX_MESSAGE

__all__ = [
    "BackedUpKey",
    "Report",
    "Restored",
    "archive_path",
    "contributions_by_run",
    "contributions_of",
    "create_backup",
    "open_archives",
    "read_archive",
    "read_parts",
    "restore_backup",
    "verify_backup",
]

MAGIC: Final = b"KQBACKUP\x01"
ORDER_FILE: Final = "order"
MANIFEST_FILE: Final = "cluster.manifest"
ARCHIVES: Final = "nodes"
CONTRIBUTIONS: Final = "contributions"
SUFFIX: Final = ".archive"
ORDER_MAX: Final = 64 * 1024
MANIFEST_MAX: Final = 64 * 1024 * 1024
TRIES: Final = 3
"""How often a part is asked for, or sent, whose reply does not come."""
PART_TIMEOUT_S: Final = 30.0

Progress = Callable[[str, int, int], None]
"""Called with the node, how many of its keys are done, and of how many."""


def _no_progress(node: str, done: int, total: int) -> None:
    pass


@dataclass(slots=True)
class BackedUpKey:
    """One version of a key in a backup. ``nodes`` are those whose share of its newest ``epoch`` is in it."""

    name: str
    version: int
    algorithm: str
    epoch: int
    threshold: int
    shares: int
    digest: bytes
    nodes: list[str] = field(default_factory=list)
    destroyed: bool = False

    @property
    def short(self) -> bool:
        """Whether it can't be restored, though it was not destroyed: fewer than t shares of one epoch are there."""
        return not self.destroyed and len(self.nodes) < self.threshold


@dataclass(slots=True)
class Report:
    """What is in a backup. ``missing`` are nodes of the cluster without an archive, ``problems`` what is wrong."""

    cluster: Cluster
    export_id: bytes
    threshold: int
    recipients: tuple[str, ...]
    archives: dict[str, Archive] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Node -> keys and shares in its archive."""
    keys: dict[bytes, BackedUpKey] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def short(self) -> list[BackedUpKey]:
        """The keys that can't be restored from it."""
        return [key for key in self.keys.values() if key.short]

    def take(self, node: str, key: ArchivedKey) -> None:
        """Count an archived key in, its documents checked; what is wrong with it is told in ``problems``."""
        try:
            record = key_record(key, self.cluster)
            if key.state == "destroyed":
                _check_tombstone(key, self.cluster)
        except (EngineError, ValueError) as error:
            self.problems.append(f"{node}: the key {key.key_id.hex()}: {error}")
            return
        manifest = record.manifest
        if key.problem:
            self.problems.append(f"{node}: {manifest.name!r}: {key.problem}")
        known = self.keys.get(key.key_id)
        if known is None or known.epoch < manifest.epoch:
            known = self.keys[key.key_id] = BackedUpKey(
                manifest.name,
                manifest.version,
                manifest.algorithm,
                manifest.epoch,
                manifest.threshold,
                manifest.shares,
                record.digest,
                destroyed=known.destroyed if known is not None else False,
            )
        known.destroyed |= key.state == "destroyed"
        if key.sealed and manifest.epoch == known.epoch:
            if record.digest != known.digest:
                self.problems.append(f"{node}: {manifest.name!r} has two manifests of epoch {manifest.epoch}")
            elif manifest.holder(node) is None:
                self.problems.append(f"{node}: it is no holder of {manifest.name!r}, of which it has a share")
            else:
                known.nodes.append(node)


def _check_tombstone(key: ArchivedKey, cluster: Cluster) -> None:
    if is_settings(key.document):
        open_settings(key.document, cluster, None)
    else:
        open_destroy_order(key.document, cluster, None)


# --- files of parts ---


@contextmanager
def _writing_parts(path: Path) -> Iterator[Callable[[bytes], None]]:
    """A new file of mode 0600 that parts are written to, durable when the block ends; without one if it fails."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(MAGIC)
            yield lambda part: _write_part(stream, part)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _write_part(stream: BinaryIO, part: bytes) -> None:
    stream.write(len(part).to_bytes(4, "big") + part)


def read_parts(path: Path) -> Iterator[bytes]:
    """The parts of a file; ``ManifestError`` names the file that is none, or is cut off."""
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:
            raise ManifestError(f"{path}: no file of a backup")
        while prefix := stream.read(4):
            size = int.from_bytes(prefix, "big")
            if len(prefix) < 4 or not 1 <= size <= MAX_MESSAGE:
                raise ManifestError(f"{path}: cut off, or damaged: a part of {size} bytes, the limit is {MAX_MESSAGE}")
            part = stream.read(size)
            if len(part) < size:
                raise ManifestError(f"{path}: cut off in a part")
            yield part


def read_archive(path: Path, cluster: Cluster) -> tuple[Archive, Iterator[list[ArchivedKey]]]:
    """An archive, and its keys page by page, each checked; ``ManifestError`` also where it ends without its end."""
    parts = read_parts(path)
    head = next(parts, b"")
    if not head:
        raise ManifestError(f"{path}: an empty archive")
    reader = _named(path, lambda: ArchiveReader(head, cluster))

    def pages() -> Iterator[list[ArchivedKey]]:
        for part in parts:
            keys = _named(path, lambda part=part: reader.part(part))  # type: ignore[misc]
            if keys:
                yield keys
        if not reader.ended:
            raise ManifestError(f"{path}: the archive of {reader.archive.node!r} is cut off: its end is missing")

    return reader.archive, pages()


def _named(path: Path, what: Callable[[], Any]) -> Any:
    """What is given; an error of its documents names the file."""
    try:
        return what()
    except EngineError as error:
        raise ManifestError(f"{path}: {error}") from None


def archive_path(folder: Path, node: str) -> Path:
    """Where a node's archive is."""
    return folder / ARCHIVES / f"{quote(node, safe='')}{SUFFIX}"


def _read_small(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if len(data) > limit:
        raise ConfigError(f"{path}: longer than {limit} bytes")
    return data


# --- create ---


def create_backup(
    settings: ClientSettings, order: bytes, folder: Path, now_ms: int, progress: Progress = _no_progress
) -> Report:
    """Have every node give an archive of its shares, into a new folder, which appears whole or not at all.

    A node that does not answer is in ``missing`` with the reason; ``ClusterError`` if none answers. The order is
    checked first: ``ManifestError``.
    """
    cluster, source = settings.cluster, settings.source
    if not isinstance(source, Membership):
        raise ConfigError("a backup takes a client with a manifest file")
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; a backup is never overwritten")
    report = _report(order, cluster, now_ms)
    courier = read_export_order(order)[0].courier
    if courier != settings.identity.name:
        raise ManifestError(
            f"the export order names {courier!r} to bring it; this client is {settings.identity.name!r}"
        )
    parent = folder.resolve().parent
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:100]}.", suffix=".part", dir=parent))
    try:
        (draft / ARCHIVES).mkdir(mode=0o700)
        write_private(draft / ORDER_FILE, order)
        write_private(draft / MANIFEST_FILE, source.after(0))
        with _channel(settings) as channel:
            for node in cluster.nodes:
                try:
                    _fetch(channel, node, order, archive_path(draft, node), report, progress)
                except EngineError as error:
                    report.missing[node] = str(error)
        if not report.archives:
            told = "; ".join(f"{node}: {why}" for node, why in report.missing.items())
            raise ClusterError(f"no node gave an archive ({told})")
        sync_folder(draft / ARCHIVES)
        sync_folder(draft)
        draft.replace(folder)
        sync_folder(parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return report


def _report(order: bytes, cluster: Cluster, now_ms: int | None) -> Report:
    told, cards = open_export_order(order, cluster, now_ms)
    return Report(cluster, told.export_id, told.threshold, tuple(card.name for card in cards))


@contextmanager
def _channel(settings: ClientSettings) -> Iterator[Channel]:
    with zmq.Context() as context, Channel(settings.own_curve(), Servers(settings.source), context) as channel:
        yield channel


def _ask(channel: Channel, node: str, verb: str, message: object) -> Any:
    """The reply; asked for again where none comes, which a node answers as it did."""
    for attempt in range(1, TRIES + 1):
        try:
            return ask(channel, node, verb, message, PART_TIMEOUT_S)
        except (DeadlineExceeded, NodeUnavailable):
            if attempt == TRIES:
                raise
    raise AssertionError  # the loop returns or raises


def _fetch(channel: Channel, node: str, order: bytes, path: Path, report: Report, progress: Progress) -> None:
    """One node's archive into a file, each part checked as it comes; it counts once it is whole, as it was written."""
    begun: ExportedPart = _ask(channel, node, SHARE_EXPORT, ShareExport(order, b"", 0))
    reader = ArchiveReader(begun.data, report.cluster)
    archive, done = reader.archive, 0
    if archive.node != node or archive.head.order != order:
        raise ManifestError(f"{node} gave the archive of {archive.node!r}, or by another order")
    with _writing_parts(path) as write:
        write(begun.data)
        progress(node, 0, archive.head.keys)
        number, last = 0, begun.last
        while not last:
            number += 1
            part: ExportedPart = _ask(channel, node, SHARE_EXPORT, ShareExport(order, begun.run, number))
            done, last = done + len(reader.part(part.data)), part.last
            write(part.data)
            progress(node, done, archive.head.keys)
    if not reader.ended:
        raise ManifestError(f"the archive of {node} came without its end")
    _verify_archive(path, node, order, report, _no_progress)  # what is on the disk is what counts


# --- verify ---


def open_folder(folder: Path, pin: bytes | None = None) -> tuple[bytes, Cluster]:
    """The order in a backup and the cluster as it was then, its chain checked from the pin (its own, if None)."""
    chain = _read_small(folder / MANIFEST_FILE, MANIFEST_MAX)
    cluster = open_chain(chain, chain_pin(chain) if pin is None else pin)
    return _read_small(folder / ORDER_FILE, ORDER_MAX), cluster


def verify_backup(
    folder: Path, pin: bytes | None = None, progress: Progress = _no_progress, cluster: Cluster | None = None
) -> Report:
    """Check all that can be without a secret: signatures, places and counts of all parts, documents of all keys.

    What is wrong is in the report. ``cluster`` is a later manifest of the same cluster, if there is one.
    """
    order, then = open_folder(folder, pin)
    if cluster is not None and cluster.pin != then.pin:
        raise ManifestError(f"{folder}: of the cluster with the pin {then.pin.hex()}, not {cluster.pin.hex()}")
    check_quorum(order, then)
    report = _report(order, cluster or then, None)
    for node in then.nodes:
        path = archive_path(folder, node)
        if not path.exists():
            report.missing[node] = "no archive in the backup"
            continue
        try:
            _verify_archive(path, node, order, report, progress)
        except (EngineError, OSError) as error:
            report.problems.append(str(error))
    return report


def _verify_archive(path: Path, node: str, order: bytes, report: Report, progress: Progress) -> None:
    archive, pages = read_archive(path, report.cluster)
    if archive.node != node:
        raise ManifestError(f"{path}: the archive of {archive.node!r}, not of {node!r}")
    if archive.head.order != order:
        raise ManifestError(f"{path}: made by another order than the backup's")
    done = shares = 0
    for keys in pages:
        for key in keys:
            report.take(node, key)
        done, shares = done + len(keys), shares + sum(bool(each.sealed) for each in keys)
        progress(node, done, archive.head.keys)
    report.archives[node], report.counts[node] = archive, (done, shares)


# --- open: an operator's part ---


def open_archives(
    folder: Path,
    identity: Identity,
    opener: Opener,
    target: Cluster,
    expires_ms: int,
    now_ms: int,
    public: bytes | None = None,
) -> tuple[dict[str, bytes], list[str]]:
    """An operator's contributions, by node, and what can't be opened. ``target`` is the cluster that is restored into.

    Each is sealed to the X25519 key that the target's manifest has for the node of that name, or to ``public``. The
    archives are verified to their ends first.
    """
    report = verify_backup(folder, target.pin, cluster=target)
    sealer = Sealer(os.urandom(32))
    made: dict[str, bytes] = {}
    problems = list(report.problems)
    for node, archive in report.archives.items():
        if node not in target.nodes and public is None:
            problems.append(f"{node}: no node of the cluster by its manifest {target.serial}")
            continue
        key = public or target.nodes[node].curve_public
        try:
            plain = open_piece(archive, identity.name, opener)
            made[node] = contribute(archive, plain, identity.signing, key, expires_ms, sealer, now_ms)
        except EngineError as error:
            problems.append(str(error))
    return made, problems


def write_contributions(path: Path, made: Iterable[bytes]) -> None:
    """An operator's contributions into a new file of mode 0600; it replaces an older one whole."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    with _writing_parts(draft) as write:
        for each in made:
            write(each)
    draft.replace(path)
    sync_folder(path.parent)


def contributions_path(folder: Path, operator: str) -> Path:
    """Where an operator's contributions are, unless it is told elsewhere."""
    return folder / CONTRIBUTIONS / quote(operator, safe="")


def contributions_of(files: Iterable[Path]) -> dict[bytes, list[bytes]]:
    """The contributions in these files, unchecked, by the run of the archive that they are for."""
    return contributions_by_run(part for path in files for part in read_parts(path))


def contributions_by_run(raws: Iterable[bytes]) -> dict[bytes, list[bytes]]:
    """The same of signed contributions; of an operator's several for one archive the last."""
    found: dict[bytes, dict[str, bytes]] = {}
    for raw in raws:
        signed = read_unverified(raw)
        told: Contribution = contributions.decode(signed.payload)
        found.setdefault(told.run, {})[signed.issuer] = raw
    return {run: list(each.values()) for run, each in found.items()}


# --- restore ---


@dataclass(slots=True)
class Restored:
    """What became of a restore. ``results`` are by node; ``keys`` how many receipts each key of the backup has."""

    report: Report
    results: dict[str, list[tuple[ArchivedKey, RestoredShare]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    receipts: dict[bytes, set[str]] = field(default_factory=dict)

    @property
    def short(self) -> list[BackedUpKey]:
        """The keys of which fewer than t shares are back, though they were not destroyed."""
        return [
            key
            for key_id, key in self.report.keys.items()
            if not key.destroyed and len(self.receipts.get(key_id, ())) < key.threshold
        ]

    def counts(self, node: str) -> Mapping[str, int]:
        """Outcome -> how many keys of a node had it."""
        found: dict[str, int] = {}
        for _, result in self.results.get(node, ()):
            found[result.outcome] = found.get(result.outcome, 0) + 1
        return found

    @property
    def refused(self) -> list[str]:
        """What was refused, each in a sentence."""
        return [
            f"{node}: {result.text}"
            for node, results in self.results.items()
            for _, result in results
            if result.outcome == "refused"
        ]


def restore_backup(
    settings: ClientSettings, folder: Path, files: Iterable[Path], progress: Progress = _no_progress
) -> Restored:
    """Give each node of the cluster its archive, with the operators' contributions in ``files``.

    The backup is verified first: ``ManifestError`` names what is wrong with it, and nothing is restored. A node that
    refuses its archive, or does not answer, is in ``failed``.
    """
    cluster = settings.cluster
    report = verify_backup(folder, cluster.pin, cluster=cluster)
    if report.problems:
        raise ManifestError(f"the backup is not whole: {'; '.join(report.problems)}"[:2000])
    given, restored = contributions_of(files), Restored(report)
    with _channel(settings) as channel:
        for node, archive in report.archives.items():
            if node not in cluster.nodes:
                restored.failed[node] = f"no node of the cluster by its manifest {cluster.serial}"
                continue
            try:
                _send(channel, archive_path(folder, node), archive, given.get(archive.head.run, []), restored, progress)
            except EngineError as error:
                restored.failed[node] = str(error)
    return restored


def _send(
    channel: Channel, path: Path, archive: Archive, given: list[bytes], restored: Restored, progress: Progress
) -> None:
    """One archive to its node, part by part; its receipts are checked and counted."""
    node, cluster = archive.node, restored.report.cluster
    results = restored.results.setdefault(node, [])
    parts = read_parts(path)
    reader = ArchiveReader(head := next(parts, b""), cluster)
    begun: RestoredPart = _ask(channel, node, SHARE_RESTORE, ShareRestore(b"", 0, head, given))
    for number, part in enumerate(parts, 1):
        keys = reader.part(part)
        reply: RestoredPart = _ask(channel, node, SHARE_RESTORE, ShareRestore(begun.run, number, part, []))
        if [each.key_id for each in reply.results] != [each.key_id for each in keys]:
            raise ManifestError(f"{node} answered for other keys than it was sent")
        for key, result in zip(keys, reply.results, strict=True):
            results.append((key, result))
            record = key_record(key, cluster) if result.receipt else None
            if record is None or record.digest != restored.report.keys[key.key_id].digest:
                continue
            if open_receipt(result.receipt, record, cluster) == node:
                restored.receipts.setdefault(key.key_id, set()).add(node)
        progress(node, len(results), archive.head.keys)
