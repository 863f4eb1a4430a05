"""The audit log's format: chained lines, signed heads, and the check of both. It opens no file and reads no clock.

A log is JSON lines. Each begins with its number ``seq`` (from 1 on, without a gap) and ``prev``, the SHA-256 of the
line before it, in hex and without its newline; that of the first is the log's random id. So who changes a line must
change every later one, and the heads that the node has signed, and those that other nodes wrote into their own logs.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec
from msgspec import Struct

from engine.errors import ManifestError, ProtocolError
from engine.protocol._fastlines import UseLines
from engine.protocol.signed import SigningKey, sign_envelope, verify_envelope
from engine.protocol.wire import Codec, Digest, Name, UInt

__all__ = [
    "AuditHead",
    "ChainCheck",
    "Claim",
    "Finding",
    "Record",
    "UseLines",
    "chained_line",
    "line_hash",
    "open_head",
    "sign_head",
    "use_lines",
]

MAX_HEAD: Final = 1024
"""Longest envelope of a head in bytes."""
MAX_LINE: Final = 64 * 1024
"""Longest line of a log in bytes; a node writes far shorter ones."""
MAX_GAPS: Final = 1_000
"""Gaps that a check remembers, to tell a line that was moved from one that was made up."""
SEGMENT, START, STOP, TORN, BROKEN, RESUMED = "segment", "start", "stop", "torn", "broken", "resumed"
HEAD, PEER_HEAD, PEER_FORK = "head", "peer-head", "peer-fork"
REQUEST, REPLY, STEP, BOOKS, REFUSED = "request", "reply", "step", "books", "refused"

_PREFIX: Final = re.compile(rb'\{"seq":([0-9]{1,18}),"prev":"([0-9a-f]{64})",')


class Record(Struct, frozen=True, omit_defaults=True):
    """What a line says beside ``seq`` and ``prev``. It has no room for key or data bytes.

    ``time_ms`` is since the Unix epoch, ``boot`` names a start of the node, ``request`` numbers the request within it.
    ``log`` is the log's id, ``head`` the base64 of a signed head.
    """

    time_ms: int
    node: str
    boot: str
    request: int
    event: str
    member: str = ""
    verb: str = ""
    key: str = ""
    outcome: str = ""
    detail: str = ""
    elapsed_us: int = 0
    log: str = ""
    head: str = ""


class AuditHead(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``[node, log_id, seq, hash, time_ms]``: the node's log ``log_id`` had, as line ``seq``, one with this hash."""

    node: Name
    log_id: Digest
    seq: UInt
    hash: Digest
    time_ms: UInt


_heads = Codec(AuditHead, "audit head", MAX_HEAD)
_encode_record = msgspec.json.Encoder().encode
_decode_record = msgspec.json.Decoder(Record).decode


def line_hash(line: bytes) -> bytes:
    """The SHA-256 by which the next line and a head name this one; ``line`` is without its newline."""
    return hashlib.sha256(line).digest()


def chained_line(seq: int, previous: bytes, record: Record) -> bytes:
    """The line of a record, without its newline; ``previous`` is the hash of the line before, or the log's id."""
    return b'{"seq":%d,"prev":"%b",%b' % (seq, previous.hex().encode(), _encode_record(record)[1:])


def use_lines(*, node: str, boot: str, member: str, verb: str, key: str) -> UseLines:
    """What writes the records of such uses of a key that go well, as ``chained_line`` would."""
    text = msgspec.json.encode
    of = b'"member":%b,"verb":%b,"key":%b' % (text(member), text(verb), text(key))
    return UseLines(
        source=b'"node":%b,"boot":%b,"request":' % (text(node), text(boot)),
        event=b',"event":%b,%b}' % (text(REQUEST), of),
        outcome=b',"event":%b,%b,"outcome":"ok"' % (text(REPLY), of),
    )


def read_link(line: bytes) -> tuple[int, bytes] | None:
    """Number and predecessor's hash of a line, or None if it is no line of a log."""
    found = _PREFIX.match(line)
    if found is None or not line.endswith(b"}"):
        return None
    return int(found[1]), bytes.fromhex(found[2].decode())


def read_record(line: bytes) -> Record | None:
    """The record of a line, or None if it is none."""
    try:
        return _decode_record(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def sign_head(head: AuditHead, key: SigningKey) -> bytes:
    """The envelope of a head, signed by the node whose log it is."""
    return sign_envelope("audit.head", head.seq, _heads.encode(head), key)


def open_head(raw: bytes, keys: Mapping[str, bytes] | Mapping[str, tuple[bytes, ...]]) -> AuditHead:
    """The head in an envelope that its own node signed; ``ManifestError`` or ``ProtocolError`` says what is wrong."""
    signed = verify_envelope(raw, "audit.head", keys)
    head = _heads.decode(signed.payload)
    if head.node != signed.issuer:
        raise ManifestError(f"audit.head: {signed.issuer!r} signed a head of {head.node!r}")
    if head.seq < 1:
        raise ManifestError(f"audit.head: {head.node!r} signed a head of no line")
    return head


def head_of_text(text: str, keys: Mapping[str, tuple[bytes, ...]]) -> AuditHead:
    """The head in a record's ``head`` field."""
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:  # also of text that is not ASCII
        raise ProtocolError("audit.head: no valid base64") from None
    return open_head(raw, keys)


# --- the check of one log -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that must not be. ``kind`` is one word; ``line`` counts from 1, and 0 is the file as a whole."""

    kind: str
    file: str
    line: int
    text: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A head that somebody kept: line ``seq`` of that log had this hash. ``file`` and ``line`` are where it is kept."""

    head: AuditHead
    file: str
    line: int


@dataclass(slots=True)
class ChainCheck:
    """The check of one log, fed line by line; it keeps a bounded state.

    ``on_claim`` is given each validly signed head in the log, of its own node and of others. ``line_at`` is called
    with (seq, hash, file, line) of each line that stands at its place.
    """

    keys: Mapping[str, tuple[bytes, ...]]
    on_claim: Callable[[Claim], None] = lambda claim: None
    line_at: Callable[[int, bytes, str, int], None] = lambda seq, digest, file, line: None
    partial: bool = False
    node: str = ""
    log_id: bytes = b""
    seq: int = 0
    """The number of the last line that stood at its place."""
    records: int = 0
    first: int = 0
    notes: list[tuple[str, int, str]] = field(default_factory=list)
    _hash: bytes = b""
    _before: bytes = b""
    _rival: bytes = b""
    _missing: dict[int, int] = field(default_factory=dict)
    _where: tuple[str, int] = ("", 0)

    def feed(self, file: str, number: int, line: bytes) -> Iterator[Finding]:
        """Take the next line, without its newline."""
        link, record = read_link(line), read_record(line)
        if link is None or record is None:
            yield Finding("edit", file, number, "no record of an audit log stands here")
            return
        self.records += 1
        seq, previous = link
        digest = line_hash(line)
        if self.records != 1 and seq <= self.seq:
            yield from self._out_of_place(file, number, seq, previous, digest)
        else:
            yield from self._next(file, number, seq, previous, digest)
            self.line_at(seq, digest, file, number)
        if self.node and record.node != self.node:
            yield Finding("insertion", file, number, f"the record is of {record.node!r}, the log of {self.node!r}")
        self.node = self.node or record.node
        yield from self._content(file, number, seq, record)

    def torn_end(self, file: str, number: int, length: int) -> None:
        """The last line has no newline: a crash, or the node is writing it now."""
        self.notes.append((file, number, f"the end is torn: {length} bytes of a line that was not finished"))

    def _next(self, file: str, number: int, seq: int, previous: bytes, digest: bytes) -> Iterator[Finding]:
        if self.records == 1:
            self.first = seq
            if seq == 1:
                self.log_id = previous
            elif not self.partial:
                yield Finding(
                    "deletion", file, number, f"the log begins with record {seq}: those before it are missing"
                )
        elif seq > self.seq + 1:
            self._missing[self.seq + 1] = seq - 1
            if len(self._missing) > MAX_GAPS:
                del self._missing[next(iter(self._missing))]
            gone = f"record {seq - 1} is" if seq == self.seq + 2 else f"records {self.seq + 1} to {seq - 1} are"
            yield Finding("deletion", file, number, f"{gone} not where it should be, before record {seq}")
        elif previous == self._rival:
            yield Finding("insertion", *self._where, f"record {self.seq} does not belong: record {seq} follows another")
        elif previous != self._hash:
            yield Finding(
                "edit", *self._where, f"record {self.seq} is not the one that record {seq} was chained to"
            )  # or its successor was changed; the log alone can't tell
        self._before, self._hash, self._rival = self._hash if self.records > 1 else previous, digest, b""
        self.seq, self._where = seq, (file, number)

    def _out_of_place(self, file: str, number: int, seq: int, previous: bytes, digest: bytes) -> Iterator[Finding]:
        for low, high in self._missing.items():
            if low <= seq <= high:
                yield Finding("reorder", file, number, f"record {seq} stands behind record {self.seq}")
                return
        if seq == self.seq and digest != self._hash:
            self._rival = digest
        yield Finding("insertion", file, number, f"a second record {seq} stands behind record {self.seq}")

    def _content(self, file: str, number: int, seq: int, record: Record) -> Iterator[Finding]:
        if record.event == SEGMENT and record.log:
            told = bytes.fromhex(record.log) if re.fullmatch("[0-9a-f]{64}", record.log) else b""
            if self.log_id and told != self.log_id:
                yield Finding("fork", file, number, f"a segment of the log {record.log[:16]} stands in another log")
            self.log_id = self.log_id or told
        elif record.event in (HEAD, PEER_HEAD):
            yield from self._head(file, number, seq, record)
        elif record.event == PEER_FORK:
            yield Finding("alarm", file, number, f"{record.node} saw a contradiction: {record.detail}")
            yield from self._head(file, number, seq, record)
        elif record.event == BROKEN:
            yield Finding("alarm", file, number, f"{record.node} found its own log damaged: {record.detail}")
        elif record.event in (TORN, RESUMED):
            self.notes.append((file, number, f"{record.event}: {record.detail}"))

    def _head(self, file: str, number: int, seq: int, record: Record) -> Iterator[Finding]:
        whose = record.node if record.event == HEAD else record.member
        try:
            head = head_of_text(record.head, self.keys)
        except (ManifestError, ProtocolError) as error:
            yield Finding("forgery", file, number, f"a head of {whose!r} is not good: {error}")
            return
        if head.node != whose:
            yield Finding("forgery", file, number, f"a head of {head.node!r} stands for one of {whose!r}")
            return
        if record.event == HEAD:
            if head.seq >= seq:
                yield Finding("insertion", file, number, f"record {seq} is a head of the later record {head.seq}")
            elif self.log_id and head.log_id != self.log_id:
                yield Finding("fork", file, number, f"the head is of the log {head.log_id.hex()[:16]}, not of this one")
        self.on_claim(Claim(head, file, number))
