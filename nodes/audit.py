"""The node's audit log on the disk: a hash chain in segments, synced beside the loop, with signed heads.

A record is appended by one positioned write and chained to the line before (``engine.protocol.audit`` has the format).
Uses that go well are recorded in a ``UseBuffer`` first, which outlives the process, and chained many at a time.
A thread of its own syncs: within ``GROUP_DELAY_S`` of a record, or at once where somebody waits, and then one sync
serves all who do. A head is signed only for what is on the disk, so a power cut never makes a log fall behind it.

When the disk takes no more, what was written of a line is cut off, every later record is refused with
``AuditUnavailable``, and the thread tries again until the disk takes records; it then writes one that says so. It knows
no verb and no peer.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import hmac
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
import structlog

from engine.client.config import sync_folder
from engine.errors import AuditUnavailable, ConfigError
from engine.protocol import audit as chain
from engine.protocol.audit import (
    AuditHead,
    Record,
    chained_line,
    line_hash,
    read_link,
    read_record,
    sign_head,
)
from engine.protocol.signed import SigningKey
from nodes._usebuffer import UseBuffer
from nodes.store import ShareStore
from nodes.token import Lane

__all__ = ["AuditLog", "AuditNames", "Head"]

GROUP_DELAY_S: Final = 0.01
"""How long a record may wait for others before its sync begins; with the sync itself it stays below 20 ms."""
RETRY_S: Final = 0.5
"""How often a log that could not be written is tried again."""
FREE_MIN_BYTES: Final = 1024 * 1024
"""Free space from which on a full disk counts as usable again, so that service does not flicker."""
UNSYNCED_MAX_BYTES: Final = 64 * 1024 * 1024
"""Records that may wait for a disk that does not sync; with more the log counts as unavailable."""
TAIL_BYTES: Final = 8 * 1024 * 1024
"""How much of the log's end is checked at the start."""
NAMES_MAX: Final = 4096
KEPT: Final = (chain.PEER_HEAD, chain.PEER_FORK)
"""Events with another member's head; the newest of each is repeated in a new segment, so that the last one has all."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Head:
    """The newest signed head and the number of the line that it names."""

    seq: int
    raw: bytes


@dataclass(slots=True)
class _Segment:
    """One file. ``size`` is where the next line goes, ``durable`` what is known to be on the disk."""

    descriptor: int
    path: Path
    size: int
    durable: int
    unsynced: list[bytes] = field(default_factory=list)

    def noted_durable(self, size: int, writes: int) -> None:
        """The first ``writes`` that waited are on the disk now."""
        self.durable = size
        del self.unsynced[:writes]


@dataclass(frozen=True, slots=True)
class _End:
    """How a segment ends: its last line and its hash, where that line ends, and what stands behind it."""

    seq: int
    digest: bytes
    size: int
    torn: bytes
    broken: str


def segment_paths(folder: Path) -> list[Path]:
    """The log's files in order."""
    return sorted(folder.glob("audit-*.jsonl"))


class AuditLog:
    """The log in ``folder``; safe for several threads, but one process at a time.

    ``post`` hands a call to the loop. ``sync`` is ``os.fdatasync``, or what a test puts in its place.
    """

    def __init__(
        self,
        folder: Path,
        signing: SigningKey,
        *,
        boot: str,
        post: Callable[[Callable[[], None]], None],
        now_ms: Callable[[], int],
        detail: str = "",
        segment_bytes: int = 256 * 1024 * 1024,
        head_every_s: float = 10.0,
        head_every_records: int = 10_000,
        sync: Callable[[int], None] = os.fdatasync,
    ) -> None:
        self._folder = folder
        self._signing = signing
        self._boot = boot
        self._post = post
        self._now_ms = now_ms
        self._segment_bytes = segment_bytes
        self._head_every_s = head_every_s
        self._head_every_records = head_every_records
        self._sync_file = sync
        self._lock = threading.Lock()
        self._dirty, self._urgent, self._sealed = threading.Event(), threading.Event(), threading.Event()
        self._closing = self._reported = False
        self._problem = ""
        self._waiters: list[tuple[int, Callable[[AuditUnavailable | None], None]]] = []
        self._kept: dict[str, Record] = {}
        self._owed: list[Record] = []
        self._opened: list[tuple[str, str]] = []
        self._unheaded = 0
        self._head_wanted = True
        self._last_head_s = 0.0
        self.head: Head | None = None
        self.broken = ""
        """What was found wrong with the log's end at the start; the node goes on, and says it."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sync_folder(folder.parent)  # else a power cut could take the folder with all that is synced in it
        self._seq, self._hash, self._log_id = 0, b"", b""
        self._durable = (0, b"")
        try:
            self._uses = UseBuffer(str(folder / "uses"), now_ms, self._stir, self._drain_now)
        except OSError as error:
            raise ConfigError(f"{folder / 'uses'}: no room for the records of uses: {error.strerror}") from None
        self._left = self._uses.count > 0 or self._uses.damaged
        self._segment = self._open()
        if self._segment.size == 0:
            with self._lock:
                self._begin_segment()
        with self._lock, suppress(AuditUnavailable):
            self._drain()
        for event, text in self._opened:
            self._own(event, text)
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)
        self._thread.start()
        self._own(chain.START, detail, durable=True)

    # --- for the loop and the workers ---

    @property
    def problem(self) -> str:
        """Why records can't be written now; empty while they can."""
        return self._problem

    @property
    def log_id(self) -> bytes:
        """The log's random id, 32 bytes: what the first line is chained to."""
        return self._log_id

    @property
    def kept(self) -> list[Record]:
        """The newest record of each other member's head that this log has."""
        return list(self._kept.values())

    def write(self, record: Record, *, durable: bool = False) -> int:
        """Append a record and return its number; ``durable`` returns once it is on the disk (never on the loop).

        ``AuditUnavailable`` says that it was not written, or is not known to be on the disk.
        """
        with self._lock:
            seq = self._append(record)
        if durable:
            done = threading.Event()
            failures: list[AuditUnavailable] = []

            def noted(failure: AuditUnavailable | None) -> None:
                failures.extend([failure] if failure else [])
                done.set()

            self._wait_for(seq, noted)
            done.wait()
            if failures:
                raise failures[0]
        return seq

    @property
    def uses(self) -> UseBuffer:
        """Where uses of keys that go well are recorded; ``AuditUnavailable`` there says that one was not."""
        return self._uses

    def drain(self) -> None:
        """Chain and write what was recorded of uses. What the disk does not take stays where it is, on the disk too."""
        with self._lock, suppress(AuditUnavailable):
            self._drain()

    def when_durable(self, seq: int, then: Callable[[AuditUnavailable | None], None]) -> None:
        """Have the loop call ``then`` once record ``seq`` is on the disk, or with the error once that has failed."""
        self._wait_for(seq, lambda failure: self._post(lambda: then(failure)))

    def seal(self, timeout_s: float) -> Head | None:
        """Sign a head of all there is; None if that did not come about in time."""
        until_s = time.monotonic() + timeout_s
        with self._lock:
            with suppress(AuditUnavailable):
                self._drain()
            last = self._seq
            self._head_wanted = self._unheaded > 0 or self.head is None
        while not self._problem:
            head = self.head
            if head is not None and (head.seq >= last or not self._head_wanted):
                return head
            self._sealed.clear()
            self._urgent.set()
            self._dirty.set()
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                break
            self._sealed.wait(min(left_s, RETRY_S))
        return None

    def stop(self, timeout_s: float) -> Head | None:
        """Write the record of a clean stop and sign a head of it."""
        self._own(chain.STOP, "")
        return self.seal(timeout_s)

    def close(self) -> None:
        """Sync and close; what came after ``stop`` gets a head too."""
        if self._closing:
            return
        if self._unheaded or self._uses.count:
            self.seal(5.0)
        self._closing = True
        self._urgent.set()
        self._dirty.set()
        self._thread.join(10)
        with self._lock:
            os.close(self._segment.descriptor)
            self._refuse(self._problem or "the log is closed")

    # --- appending; under the lock ---

    def _append(self, record: Record) -> int:
        self._drain()
        return self._add(record)

    def _add(self, record: Record) -> int:
        line = chained_line(self._seq + 1, self._hash, record)
        self._put(line + b"\n", 1, line_hash(line))
        if record.event in KEPT:
            self._keep(record)
        elif record.event != chain.HEAD:
            self._unheaded += 1
        if not self._uses.count:
            self._uses.take(0, 0, self._seq)
        return self._seq

    def _drain(self) -> None:
        """Chain what was recorded of uses, in one write."""
        if self._left:
            self._chain_left()
        if not self._uses.count:
            return
        data, last, count, end = self._uses.chained(self._seq + 1, self._hash)
        self._put(data, 2 * count, last)
        self._uses.take(count, end, self._seq)
        self._unheaded += 2 * count

    def _drain_now(self) -> None:
        with self._lock:
            self._drain()

    def _stir(self) -> None:
        if not self._dirty.is_set():
            self._dirty.set()

    def _chain_left(self) -> None:
        """Chain the uses that a killed process recorded and had not chained. Some may be in the log already."""
        waiting, base = self._uses.waiting(), self._uses.base
        damaged = self._uses.damaged
        known = _bodies_after(segment_paths(self._folder)[-2:], base)
        for body in waiting:
            if known is None or body in known:
                continue
            line = b'{"seq":%d,"prev":"%b",%b' % (self._seq + 1, self._hash.hex().encode(), body)
            damaged = read_record(line) is None
            if damaged:
                break
            self._put(line + b"\n", 1, line_hash(line))
            self._unheaded += 1
        self._uses.take(self._uses.count, 0, self._seq)
        self._left = False
        if damaged:
            text = "what was recorded of the last uses before a crash was changed or damaged"
            log.error("the audit log was changed or damaged", reason=text)
            self._opened.append((chain.BROKEN, text))
            self.broken = self.broken or text

    def _put(self, data: bytes, lines: int, last_hash: bytes) -> None:
        """Write lines that are chained to what there is, the hash of the last of them being ``last_hash``."""
        if self._problem:
            raise self._unavailable()
        segment = self._segment
        try:
            if segment.size - segment.durable > UNSYNCED_MAX_BYTES:
                raise OSError(errno.EIO, f"the disk has not synced {segment.size - segment.durable} bytes")
            written = os.pwrite(segment.descriptor, data, segment.size)
            if written != len(data):
                raise OSError(errno.ENOSPC, f"the disk took {written} of {len(data)} bytes: it is full, or at a quota")
        except OSError as error:
            self._broke(error)
            raise self._unavailable() from None
        segment.size += len(data)
        segment.unsynced.append(data)
        self._seq, self._hash = self._seq + lines, last_hash
        if not self._dirty.is_set():
            self._dirty.set()

    def _keep(self, record: Record) -> None:
        self._kept[record.member] = msgspec.structs.replace(record, event=chain.PEER_HEAD, detail="known before")

    def _refuse(self, problem: str) -> None:
        """Take no record while there is a problem; the empty text is none."""
        self._problem = problem
        self._uses.refusal = self._unavailable if problem else None

    def _broke(self, error: OSError) -> None:
        """Note that the disk refuses, and cut off what it took of a line; under the lock."""
        self._refuse(error.strerror or str(error))
        with suppress(OSError):  # the thread does it again before the log is used
            os.ftruncate(self._segment.descriptor, self._segment.size)
        self._dirty.set()
        if not self._reported:
            self._reported = True
            log.error("the audit log can't be written; this node serves nothing until it can", reason=self._problem)

    def _wait_for(self, seq: int, then: Callable[[AuditUnavailable | None], None]) -> None:
        with self._lock:
            if self._durable[0] < seq and not self._problem:
                self._waiters.append((seq, then))
                self._urgent.set()
                self._dirty.set()
                return
            failure = None if self._durable[0] >= seq else self._unavailable()
        then(failure)

    def _unavailable(self) -> AuditUnavailable:
        return AuditUnavailable(f"{self._signing.name}: the audit log can't be written: {self._problem}")

    def _own(self, event: str, detail: str, *, durable: bool = False, head: str = "") -> None:
        """Write a record of the node's own; one that can't be written now is owed."""
        record = Record(self._now_ms(), self._signing.name, self._boot, 0, event, detail=detail, head=head)
        try:
            self.write(record, durable=durable)
        except AuditUnavailable:
            if event not in (chain.STOP, chain.HEAD):
                self._owed.append(record)

    # --- the thread that syncs ---

    def _run(self) -> None:
        while True:
            self._dirty.wait(self._next_s())
            if not self._closing and not self._problem:
                self._urgent.wait(GROUP_DELAY_S if self._dirty.is_set() else 0)
            self._dirty.clear()
            self._urgent.clear()
            closing = self._closing
            if self._problem:
                self._fail_waiters()
                if closing:
                    return
                self._recover()
                continue
            well = self._sync() and self._make_head()
            if well and closing:
                return
            if well and self._segment.size >= self._segment_bytes:
                self._rotate()

    def _next_s(self) -> float | None:
        if self._problem:
            return RETRY_S
        if self._unheaded:
            return max(0.0, self._last_head_s + self._head_every_s - time.monotonic())
        return None

    def _sync(self) -> bool:
        """Bring what was written to the disk, and tell who waits for it."""
        try:
            with self._lock:
                self._drain()
                reached, segment = (self._seq, self._hash), self._segment
                size, writes = segment.size, len(segment.unsynced)
        except AuditUnavailable:
            self._fail_waiters()
            return False
        try:
            if segment.durable < size:
                self._sync_file(segment.descriptor)
        except OSError as error:
            with self._lock:
                self._broke(error)
            self._fail_waiters()
            return False
        with self._lock:
            segment.noted_durable(size, writes)
            self._durable = reached
            ready = [then for seq, then in self._waiters if seq <= reached[0]]
            self._waiters = [each for each in self._waiters if each[0] > reached[0]]
        for then in ready:
            then(None)
        return True

    def _fail_waiters(self) -> None:
        with self._lock:
            failed, self._waiters = self._waiters, []
            failure = self._unavailable()
        for _, then in failed:
            then(failure)

    def _make_head(self) -> bool:
        """Sign and write a head if one is due."""
        now = time.monotonic()
        with self._lock:
            due = self._head_wanted or (
                self._unheaded
                and (now - self._last_head_s >= self._head_every_s or self._unheaded >= self._head_every_records)
            )
            if not due:
                return True
            reached, self._unheaded, self._head_wanted = self._durable, max(0, self._seq - self._durable[0]), False
        self._last_head_s = now
        head = AuditHead(self._signing.name, self._log_id, reached[0], reached[1], self._now_ms())
        raw = sign_head(head, self._signing)
        self._own(chain.HEAD, "", head=base64.b64encode(raw).decode())
        self.head = Head(reached[0], raw)
        self._sealed.set()
        return self._sync()

    def _rotate(self) -> None:
        """Go on in a new file. The old one is on the disk before, so that a power cut leaves no gap between the two."""
        try:
            segment = self._create(_number(self._segment.path) + 1)
            with self._lock:
                self._drain()
                old = self._segment
                self._sync_file(old.descriptor)
                self._durable = self._seq, self._hash
                self._segment = segment
                self._begin_segment()
            os.close(old.descriptor)
        except AuditUnavailable:
            return
        except OSError as error:
            with self._lock:
                self._broke(error)

    def _begin_segment(self) -> None:
        """The first records of a segment; under the lock."""
        try:
            for record in self._head_of_segment():
                self._add(record)
        except AuditUnavailable:
            return
        self._head_wanted = True

    def _head_of_segment(self) -> list[Record]:
        first = Record(self._now_ms(), self._signing.name, self._boot, 0, chain.SEGMENT, log=self._log_id.hex())
        return [first, *self._kept.values()]

    def _recover(self) -> None:
        """Write again what is not known to be on the disk, then a record that says what happened."""
        problem, segment = self._problem, self._segment
        try:
            room = os.statvfs(self._folder)
            if room.f_bavail * room.f_frsize < FREE_MIN_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            data = b"".join(segment.unsynced)
            if os.pwrite(segment.descriptor, data, segment.durable) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.ftruncate(segment.descriptor, segment.size)
            self._sync_file(segment.descriptor)
            with self._lock:
                segment.noted_durable(segment.size, len(segment.unsynced))
                self._refuse("")
                for record in [] if segment.size else self._head_of_segment():
                    self._add(record)
                while self._owed:
                    self._append(self._owed[0])
                    del self._owed[0]
                self._append(self._resumed(problem))
        except (OSError, AuditUnavailable):
            with self._lock:
                self._refuse(self._problem or problem)
                self._dirty.clear()
            return
        if self._sync():
            self._reported = False
            log.warning("the audit log is written again", after=problem)

    def _resumed(self, problem: str) -> Record:
        return Record(
            self._now_ms(), self._signing.name, self._boot, 0, chain.RESUMED, detail=f"records were refused: {problem}"
        )

    # --- opening ---

    def _create(self, number: int) -> _Segment:
        path = self._folder / f"audit-{number:06d}.jsonl"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        sync_folder(self._folder)
        return _Segment(descriptor, path, 0, 0)

    def _open(self) -> _Segment:
        """Find the log's end, cut off what a crash left of a line, and go on behind it."""
        paths = segment_paths(self._folder)
        ends: list[_End] = []
        for path in reversed(paths):
            ends.insert(0, _read_end(path))
            if ends[0].seq:
                break
        if not ends or not ends[0].seq:
            self._log_id = self._hash = secrets.token_bytes(32)
        else:
            begun = paths[-len(ends)]
            self._log_id, self._seq, self._hash = _log_id(begun), ends[0].seq, ends[0].digest
            for record in _kept_records(begun, ends[0].size):
                self._keep(record)
            self.broken = ends[0].broken
        if not paths:
            return self._create(1)
        for path, end in zip(paths[-len(ends) :], ends, strict=True):
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if end.torn:
                os.ftruncate(descriptor, end.size)
                self._opened.append((chain.TORN, _torn_text(path, end)))
            os.fsync(descriptor)
            if path != paths[-1]:
                os.close(descriptor)
        if self.broken:
            log.error("the audit log was changed or damaged", reason=self.broken)
            self._opened.append((chain.BROKEN, self.broken))
        return _Segment(descriptor, paths[-1], ends[-1].size, ends[-1].size)


class AuditNames:
    """What stands in the log for a key's name: an HMAC-SHA256 of it under a key that the token's KEK seals."""

    def __init__(self, store: ShareStore, lane: Lane) -> None:
        self._key = store.secret(lane, "audit-names")
        self._known: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        """The first 16 bytes of the HMAC, in hex."""
        found = self._known.get(name)
        if found is None:
            if len(self._known) >= NAMES_MAX:
                self._known.clear()
            found = self._known[name] = hmac.digest(self._key, name.encode(), hashlib.sha256)[:16].hex()
        return found


def _number(path: Path) -> int:
    return int(path.stem.rpartition("-")[2])


def _torn_text(path: Path, end: _End) -> str:
    digest, begin = hashlib.sha256(end.torn).hexdigest(), base64.b64encode(end.torn[:96]).decode()
    return (
        f"cut {len(end.torn)} bytes of an unfinished line off {path.name}, behind its byte {end.size}: "
        f"SHA-256 {digest}, base64 {begin}"
    )


def _read_end(path: Path) -> _End:
    """How the file ends, its last ``TAIL_BYTES`` checked. ``ConfigError`` if it is no audit log.

    What stands behind the last newline is what a crash left of a line. A whole line that is no record is not: it was
    changed or damaged, and stays.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        begin = max(0, size - TAIL_BYTES)
        stream.seek(begin)
        tail = stream.read()
    if begin:
        cut = tail.find(b"\n") + 1
        begin, tail = begin + cut, tail[cut:]
    whole = tail.rfind(b"\n") + 1
    if not whole:
        return _End(0, b"", 0, tail, "")
    seq, digest, broken = _check_tail(tail[:whole], path)
    if not seq:
        raise ConfigError(f"{path}: no record of an audit log in it; move it aside to begin a new log")
    return _End(seq, digest, begin + whole, tail[whole:], broken)


def _check_tail(tail: bytes, path: Path) -> tuple[int, bytes, str]:
    """Number and hash of the last line, and what is wrong with the chain up to it."""
    seq, digest, broken = 0, b"", ""
    for line in _lines(tail):
        link = read_link(line)
        if link is None or read_record(line) is None:
            broken = broken or f"{path.name}: behind record {seq} stands a line that is no record"
            continue
        if seq and link != (seq + 1, digest):
            broken = broken or f"{path.name}: record {link[0]} is not chained to record {seq} before it"
        seq, digest = link[0], line_hash(line)
    return seq, digest, broken


def _bodies_after(paths: list[Path], seq: int) -> set[bytes] | None:
    """What stands behind number and hash in the lines after ``seq``; None if they are more than ``TAIL_BYTES``.

    So much never waits: what was recorded then is in the log.
    """
    tail, cut = b"", False
    for path in paths:
        with path.open("rb") as stream:
            begin = max(0, path.stat().st_size - TAIL_BYTES)
            stream.seek(begin)
            tail, cut = (b"" if begin else tail) + stream.read(), cut or begin > 0
    found = [(link[0], line) for line in _lines(tail) if (link := read_link(line)) is not None]
    if cut and (not found or found[0][0] > seq):
        return None
    return {line.split(b'",', 1)[1] for number, line in found if number > seq}


def _lines(data: bytes) -> Iterator[bytes]:
    start = 0
    while (end := data.find(b"\n", start)) >= 0:
        yield data[start:end]
        start = end + 1


def _log_id(path: Path) -> bytes:
    with path.open("rb") as stream:
        line = stream.readline(chain.MAX_LINE).rstrip(b"\n")
    record = read_record(line)
    try:
        found = bytes.fromhex(record.log) if record is not None and record.event == chain.SEGMENT else b""
    except ValueError:
        found = b""
    if len(found) != 32:
        raise ConfigError(f"{path}: its first line does not name the log; move the folder aside to begin a new log")
    return found


def _kept_records(path: Path, size: int) -> Iterator[Record]:
    """The records of other members' heads in a file, oldest first."""
    with path.open("rb") as stream:
        while stream.tell() < size:
            line = stream.readline(chain.MAX_LINE)
            if b'"event":"peer-' in line:
                record = read_record(line.rstrip(b"\n"))
                if record is not None and record.event in KEPT:
                    yield record
