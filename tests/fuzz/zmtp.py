"""ZMTP with CURVE: hostile ends with every key of their own, somebody in the middle without any, and the sockets.

An input is a script, a MessagePack list of steps: what one end says, with which faults, in which pieces. The hostile
end is written anew, and so is the ``read`` that says what a stream of bytes means by RFC 37 and RFC 26: what the code
makes of the same bytes must be the very same, however they were split. A connection's keys are random; no outcome
depends on them.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import socket
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Final

import msgpack
import zmq
from mutate import change_message
from targets import Finding, Target, require
from zmq.utils import z85

from engine.client._fastline import BROKEN, DONE, NOT_SENT, OTHER, Line
from engine.client._router import Connection, Router
from engine.client._zmtp import Peer
from engine.errors import ProtocolError
from engine.protocol._fastwire import read_result
from engine.protocol.requests import REPLY_CODECS, Result
from engine.protocol.wire import PROTOCOL_VERSION, Load, Reply, Status, reply_codec

STEPS_MAX: Final = 24
CONTENT_MAX: Final = 3_000
LIMIT: Final = 1_500
"""Of a frame, so that scripts exceed it."""
COMMAND_MAX: Final = 2_048
PARTS_MAX: Final = 64
HELD_MAX: Final = 4 * (LIMIT + 9) + 2_048
STRANGER_HELD_MAX: Final = COMMAND_MAX + 2_048
GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
REFUSED: Final = b"\x05ERROR\x03400"

# --- the arithmetic ---


_found = sorted((Path(zmq.__file__).parents[1] / "pyzmq.libs").glob("libsodium*.so*"))
_sodium = ctypes.CDLL(str(_found[0]) if _found else "libsodium.so.23")


def _pair(label: str) -> tuple[bytes, bytes]:
    secret, public = hashlib.sha256(label.encode()).digest(), ctypes.create_string_buffer(32)
    _sodium.crypto_scalarmult_base(public, secret)
    return public.raw, secret


SERVER, MEMBER, STRANGER, SHORT, OTHER_SHORT = map(_pair, ("server", "member", "stranger", "short", "other"))
SECRETS: Final = dict((SERVER, MEMBER, STRANGER, SHORT, OTHER_SHORT))


@lru_cache(2_048)
def shared(public: bytes, secret: bytes) -> bytes | None:
    """The key of a box; None where the public key is none."""
    key = ctypes.create_string_buffer(32)
    return key.raw if _sodium.crypto_box_beforenm(key, public, secret) == 0 else None


def sealed(data: bytes, nonce: bytes, key: bytes | None) -> bytes:
    """A box of the data."""
    out = ctypes.create_string_buffer(len(data) + 16)
    _sodium.crypto_box_easy_afternm(out, data, ctypes.c_ulonglong(len(data)), nonce, key or bytes(32))
    return out.raw


def opened(box: bytes, nonce: bytes, key: bytes | None) -> bytes | None:
    """What is in a box; None if it was not made so."""
    if key is None or len(box) < 16:
        return None
    out = ctypes.create_string_buffer(max(1, len(box) - 16))
    good = _sodium.crypto_box_open_easy_afternm(out, box, ctypes.c_ulonglong(len(box)), nonce, key) == 0
    return out.raw[: len(box) - 16] if good else None


# --- what a stream of bytes means ---


@dataclass
class Meaning:
    """What an end must make of a stream: "waits", "open" or "ended"; whose key was proved; the frames."""

    state: str = "waits"
    stage: str = "greeting"
    proved: bytes = b""
    refused: bool = False
    frames: list[tuple[int, bytes]] = field(default_factory=list)


def frame_at(data: bytes, at: int, limit: int) -> tuple[int, bytes, int] | None:
    """(flags, body, end) of a frame; None if it is not whole; ``ProtocolError`` if it is none, or too long."""
    if len(data) - at < 2:
        return None
    flags = data[at]
    if flags > 7 or flags & 5 == 5:
        raise ProtocolError("flags")
    begin = at + (9 if flags & 2 else 2)
    if len(data) < begin:
        return None
    size = int.from_bytes(data[at + 1 : begin], "big")
    if size > limit:
        raise ProtocolError("too long")
    return None if len(data) < begin + size else (flags, data[begin : begin + size], begin + size)


def metadata_fits(data: bytes, types: Collection[bytes]) -> bool:
    """Whether it is well-formed and names one of these types."""
    found, at = False, 0
    while at < len(data):
        size = data[at]
        name, at = data[at + 1 : at + 1 + size], at + 1 + size
        length = data[at : at + 4]
        value = data[at + 4 : at + 4 + int.from_bytes(length, "big")]
        at += 4 + int.from_bytes(length, "big")
        if not size or len(length) < 4 or at > len(data):
            return False
        found = found or (name.lower() == b"socket-type" and value in types)
    return found


def read(stream: bytes, *, server: bool, said: bytes, members: Collection[bytes], limit: int) -> Meaning:
    """What the server's end, or the client's, must make of a stream, where it has said that itself."""
    told = Meaning()
    if not _greets(stream):
        told.state = "ended"
        return told
    if len(stream) < len(GREETING):
        return told
    reader = (_ServerReads if server else _ClientReads)(told, said, members)
    at = len(GREETING)
    told.stage = reader.first
    try:
        while (found := frame_at(stream, at, limit if told.state == "open" else COMMAND_MAX)) is not None:
            flags, body, at = found
            if told.state == "open":
                told.frames.append(reader.message(flags, body))
            elif not flags & 4:
                raise ProtocolError("no command")
            else:
                reader.command(body)
    except ProtocolError:
        told.state = "ended"
    return told


def _greets(stream: bytes) -> bool:
    if stream[:1] not in (b"", b"\xff") or (len(stream) > 9 and not stream[9] & 1):
        return False
    if len(stream) > 10 and stream[10] < 3:
        return False
    return len(stream) < 64 or stream[12:32] == GREETING[12:32]


def _must(condition: object) -> None:
    if not condition:
        raise ProtocolError("against the rules")


class _Reads:
    first = ""

    def __init__(self, told: Meaning, said: bytes, members: Collection[bytes]) -> None:
        self.told, self.said, self.members = told, said, members
        self.key: bytes | None = None
        self.seen = 0
        self.letter = b""

    def command(self, body: bytes) -> None:
        """Take a command of the handshake."""

    def message(self, flags: int, body: bytes) -> tuple[int, bytes]:
        _must(not flags & 5 and len(body) >= 33 and body[:8] == b"\x07MESSAGE")
        number = int.from_bytes(body[8:16], "big")
        _must(number > self.seen)
        plain = opened(body[16:], b"CurveZMQMESSAGE" + self.letter + body[8:16], self.key)
        if plain is None:
            raise ProtocolError("forged")
        self.seen = number
        return plain[0], plain[1:]


class _ServerReads(_Reads):
    first = "HELLO"

    def command(self, body: bytes) -> None:
        self.letter = b"C"
        if self.told.stage == "HELLO":
            _must(len(body) == 200 and body[:8] == b"\x05HELLO\x01\x00")
            self.short = body[80:112]
            key = shared(self.short, SERVER[1])
            _must(opened(body[120:], b"CurveZMQHELLO---" + body[112:120], key) == bytes(64))
            self.seen = int.from_bytes(body[112:120], "big")
            welcome = self.said[66:234]
            require(self.said[64:66] == b"\x04\xa8" and welcome[:8] == b"\x07WELCOME", "no WELCOME is said")
            inner = opened(welcome[24:], b"WELCOME-" + welcome[8:24], key)
            require(inner is not None, "a WELCOME for somebody else is said")
            assert inner is not None
            self.theirs, self.cookie = inner[:32], inner[32:]
            self.told.stage = "INITIATE"
            return
        _must(len(body) >= 257 and body[:9] == b"\x08INITIATE" and body[9:105] == self.cookie)
        number = int.from_bytes(body[105:113], "big")
        _must(number > self.seen and self.short in SECRETS)
        self.key, self.seen = shared(self.theirs, SECRETS[self.short]), number
        inner = opened(body[113:], b"CurveZMQINITIATE" + body[105:113], self.key)
        _must(inner is not None and inner[:32] in SECRETS)
        assert inner is not None
        vouch = opened(inner[48:128], b"VOUCH---" + inner[32:48], shared(self.theirs, SECRETS[inner[:32]]))
        _must(vouch == self.short + SERVER[0])
        _must(metadata_fits(inner[128:], (b"DEALER", b"ROUTER", b"REQ")))
        self.told.proved = inner[:32]
        self.told.refused = self.told.proved not in self.members
        answer = frame_at(self.said, 234, COMMAND_MAX)
        require(answer is not None and answer[0] & 4, "who proved a key is not answered")
        assert answer is not None
        require((answer[1] == REFUSED) == self.told.refused, "READY to who is refused, or the other way round")
        _must(not self.told.refused)
        ready = opened(answer[1][14:], b"CurveZMQREADY---" + answer[1][6:14], self.key)
        require(answer[1][:6] == b"\x05READY" and ready is not None, "no READY is said")
        require(metadata_fits(ready or b"", (b"ROUTER",)), "READY names no ROUTER")
        self.told.stage, self.told.state = "", "open"


class _ClientReads(_Reads):
    first = "WELCOME"

    def command(self, body: bytes) -> None:
        self.letter = b"S"
        if body == REFUSED:
            self.told.refused = True
            raise ProtocolError("refused")
        if self.told.stage == "WELCOME":
            hello = self.said[66:266]
            require(self.said[64:66] == b"\x04\xc8" and hello[:8] == b"\x05HELLO\x01\x00", "no HELLO is said")
            _must(len(body) == 168 and body[:8] == b"\x07WELCOME")
            short = hello[80:112]
            inner = opened(body[24:], b"WELCOME-" + body[8:24], shared(short, SERVER[1]))
            _must(inner is not None)
            assert inner is not None
            theirs, cookie = inner[:32], inner[32:]
            _must(shared(theirs, MEMBER[1]))
            self.key = shared(short, SECRETS[theirs]) if theirs in SECRETS else None
            initiate = frame_at(self.said, 266, COMMAND_MAX)
            require(initiate is not None and initiate[1][:105] == b"\x08INITIATE" + cookie, "no INITIATE is said")
            if self.key is not None and initiate is not None:
                vouches = opened(initiate[1][113:], b"CurveZMQINITIATE" + initiate[1][105:113], self.key) or b""
                key = shared(MEMBER[0], SECRETS[theirs])
                vouch = opened(vouches[48:128], b"VOUCH---" + vouches[32:48], key)
                require(vouches[:32] == MEMBER[0] and vouch == short + SERVER[0], "it vouches for something else")
                require(metadata_fits(vouches[128:], (b"DEALER",)), "INITIATE names no DEALER")
            self.told.stage = "READY"
            return
        _must(len(body) >= 30 and body[:6] == b"\x05READY")
        inner = opened(body[14:], b"CurveZMQREADY---" + body[6:14], self.key)
        _must(inner is not None and metadata_fits(inner, (b"ROUTER", b"DEALER", b"REP")))
        self.seen = int.from_bytes(body[6:14], "big")
        self.told.stage, self.told.state = "", "open"


# --- the hostile end ---

KINDS: Final = ("greeting", "first", "second", "message", "bytes", "frame", "again", "error")
GREETS, FIRST, SECOND, MESSAGE, BYTES, FRAME, AGAIN, ERROR = range(len(KINDS))
DEALER: Final = b"\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"
ROUTER: Final = b"\x0bSocket-Type\0\0\0\x06ROUTER"


@dataclass(frozen=True)
class Step:
    """What is said, in pieces of ``piece`` bytes (0: in one), with bytes changed and so many left out at its end."""

    kind: int
    number: int = 1
    variant: int = 0
    data: bytes = b""
    edits: tuple[tuple[int, int], ...] = ()
    cut: int = 0
    piece: int = 0

    def packed(self) -> list[Any]:
        """As a script has it."""
        edits = [list(each) for each in self.edits]
        return [self.kind, self.number, self.variant, self.data, edits, self.cut, self.piece]


def script(*steps: Step) -> bytes:
    """A script of these steps."""
    return bytes(msgpack.packb([each.packed() for each in steps], use_bin_type=True))


NO_SCRIPT: Final = (ValueError, TypeError, LookupError, OverflowError, MemoryError)
"""What msgpack, or taking apart what it gives, raises for bytes that are no script."""


def steps_of(data: bytes) -> list[Step]:
    """The steps of a script; ``ProtocolError`` if it is none."""
    try:
        tree = msgpack.unpackb(data, raw=False)
        made = []
        for kind, number, variant, content, edits, cut, piece in tree[:STEPS_MAX]:
            if not isinstance(content, bytes) or len(content) > CONTENT_MAX:
                raise ValueError("data")
            pairs = tuple((int(at), int(by) % 256 or 1) for at, by in edits[:8])
            made.append(Step(int(kind) % 8, int(number), int(variant), content, pairs, int(cut), int(piece)))
    except NO_SCRIPT:
        raise ProtocolError("no script") from None
    return made


class Hostile:
    """Says what a script wants to a server's end, or to a client's. It has every key but the other's of a moment."""

    def __init__(self, *, to_server: bool) -> None:
        self._to_server = to_server
        self._number = 0
        self._short = SHORT
        self._theirs: bytes | None = None
        self._cookie = bytes(96)
        self._key: bytes | None = None
        self.spoken: list[bytes] = []

    def says(self, step: Step, said: bytes) -> Iterator[bytes]:
        """The pieces of a step, after the other end has said that."""
        data = bytearray(self._made(step, said))
        for at, by in step.edits:
            if data:
                data[at % len(data)] ^= by
        if step.cut > 0:
            del data[max(0, len(data) - step.cut) :]
        self.spoken.append(bytes(data))
        size = step.piece if step.piece > 0 else len(data) or 1
        if len(data) // size > 300:
            size = len(data) // 300 + 1
        for at in range(0, len(data), size):
            yield bytes(data[at : at + size])

    def _made(self, step: Step, said: bytes) -> bytes:
        if step.kind == GREETS:
            return GREETING[:11] + bytes([step.variant & 0xFF]) + (step.data or GREETING[12:32])[:52].ljust(52, b"\0")
        if step.kind == FIRST:
            return self._frame(self._hello(step) if self._to_server else self._welcome(step, said), step)
        if step.kind == SECOND:
            return self._frame(self._initiate(step, said) if self._to_server else self._ready(step), step)
        if step.kind == MESSAGE:
            return self._message(step)
        if step.kind == BYTES:
            return step.data
        if step.kind == FRAME:
            head = bytes([step.variant & 0xFF])
            size = len(step.data) + step.number - 1
            size = max(0, min(size, (1 << 64) - 1))
            if step.variant & 2:
                return head + size.to_bytes(8, "big") + step.data
            return head + bytes([size & 0xFF]) + step.data
        if step.kind == AGAIN:
            return self.spoken[step.number % len(self.spoken)] if self.spoken else b""
        return b"\x04\x0a" + REFUSED

    def _frame(self, body: bytes, step: Step) -> bytes:
        flags = 4 ^ (step.variant >> 8 & 5)
        if len(body) < 256 and not step.variant & 1 << 12:
            return bytes([flags, len(body)]) + body
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body

    def _nonce(self, step: Step) -> bytes:
        self._number = (self._number + step.number) % (1 << 64)
        return self._number.to_bytes(8, "big")

    def _hello(self, step: Step) -> bytes:
        self._short = OTHER_SHORT if step.variant & 4 else SHORT
        nonce = self._nonce(step)
        content = bytes(63) + b"\1" if step.variant & 2 else bytes(64)
        box = sealed(content, b"CurveZMQHELLO---" + nonce, shared(SERVER[0], self._short[1]))
        name = b"\x05HELLO\x02\x00" if step.variant & 1 else b"\x05HELLO\x01\x00"
        return name + bytes(72) + (SHORT[0] if step.variant & 8 else self._short[0]) + nonce + box

    def _welcome(self, step: Step, said: bytes) -> bytes:
        theirs = said[146:178].ljust(32, b"\0")
        nonce = (step.data or b"n").ljust(16, b"\0")[:16]
        self._short = OTHER_SHORT if step.variant & 4 else SHORT
        told = bytes(32) if step.variant & 8 else os.urandom(32) if step.variant & 16 else self._short[0]
        by = STRANGER if step.variant & 1 else SERVER
        self._key = shared(theirs, self._short[1])
        content = told + bytes(range(96)) + (b"more" if step.variant & 2 else b"")
        return b"\x07WELCOME" + nonce + sealed(content, b"WELCOME-" + nonce, shared(theirs, by[1]))

    def _initiate(self, step: Step, said: bytes) -> bytes:
        welcome = opened(said[90:234], b"WELCOME-" + said[74:90], shared(SERVER[0], self._short[1]))
        theirs = SERVER[0] if welcome is None else welcome[:32]
        cookie = bytes(96) if welcome is None else welcome[32:]
        self._key = shared(theirs, self._short[1])
        variant, nonce, other = step.variant, self._nonce(step), bytes(16)
        own = STRANGER if variant & 16 else MEMBER
        by = STRANGER if variant & 32 else own
        short = OTHER_SHORT[0] if variant & 2 else self._short[0]
        vouch = sealed(short + (STRANGER if variant & 4 else SERVER)[0], b"VOUCH---" + other, shared(theirs, by[1]))
        inner = own[0] + other + vouch + (step.data or DEALER)
        name = b"\x08INITIATX" if variant & 1 else b"\x08INITIATE"
        if variant & 8:
            cookie = cookie[1:] + cookie[:1]
        return name + cookie + nonce + sealed(inner, b"CurveZMQINITIATE" + nonce, self._key)

    def _ready(self, step: Step) -> bytes:
        nonce = self._nonce(step)
        name = b"\x05READX" if step.variant & 1 else b"\x05READY"
        return name + nonce + sealed(step.data or ROUTER, b"CurveZMQREADY---" + nonce, self._key)

    def _message(self, step: Step) -> bytes:
        count = 33 if step.variant & 1 << 10 else 31 if step.variant & 1 << 11 else 1
        return b"".join(self._one_message(step) for _ in range(count))

    def _one_message(self, step: Step) -> bytes:
        nonce = self._nonce(step)
        letter = b"C" if self._to_server != bool(step.variant & 8) else b"S"
        content = b"" if step.variant & 128 else bytes([step.variant & 7]) + step.data
        box = sealed(content, b"CurveZMQMESSAGE" + letter + nonce, self._key)
        body = (b"\x07MESSAGF" if step.variant & 64 else b"\x07MESSAGE") + nonce + box
        flags = step.variant >> 4 & 1 | step.variant >> 3 & 4
        if len(body) < 256 and not step.variant & 1 << 12:
            return bytes([flags, len(body)]) + body
        return bytes([flags | 2]) + len(body).to_bytes(8, "big") + body


# --- one end in memory ---


def is_member(user: bytes) -> bool:
    """Who is let in."""
    return user == MEMBER[0]


def _told(meaning: Meaning) -> str:
    """The word for an outcome, or the refusal."""
    if meaning.state == "open":
        return f"open, {min(len(meaning.frames), 12)} frames"
    raise ProtocolError(f"{meaning.state} at {meaning.stage or 'a message'}{' refused' if meaning.refused else ''}")


def _take_end(data: bytes, *, server: bool) -> str:
    steps = steps_of(data)
    if server:
        peer = Peer(own_public=SERVER[0], own_secret=SERVER[1], limit=LIMIT)
    else:
        peer = Peer(own_public=MEMBER[0], own_secret=MEMBER[1], server_public=SERVER[0], limit=LIMIT)
    hostile, frames, stream, said = Hostile(to_server=server), [], bytearray(), peer.take()
    for step in steps:
        for piece in hostile.says(step, said):
            stream += piece
            frames += peer.feed(piece)
            if peer.judged:
                peer.judge(is_member(peer.peer_public))
                frames += peer.feed(b"")
            said += peer.take()
    told = read(bytes(stream), server=server, said=said, members=(MEMBER[0],), limit=LIMIT)
    state = "ended" if peer.ended else "open" if peer.open else "waits"
    require(state == told.state, f"it is {state} where it must be {told.state}, at {told.stage}")
    require(frames == told.frames, f"{len(frames)} frames are delivered where {len(told.frames)} were sent")
    require(not server or not peer.open or peer.peer_public == told.proved, "somebody else is let in")
    require(server or peer.refused == told.refused, "it takes itself for refused, or not")
    return _told(told)


def _take_server(data: bytes) -> str:
    return _take_end(data, server=True)


def _take_client(data: bytes) -> str:
    return _take_end(data, server=False)


# --- somebody in the middle ---

BETWEEN: Final = ("change", "cut", "insert", "twice", "hold", "reflect", "split", "drop")


def _take_between(data: bytes) -> str:
    """Two honest ends, and a script for what lies between: [turn, kind, place, bytes]."""
    try:
        tree = msgpack.unpackb(data, raw=False)
        acts = [(int(turn) % 12, int(kind) % 8, int(at), bytes(by)) for turn, kind, at, by in tree[:STEPS_MAX]]
    except NO_SCRIPT:
        raise ProtocolError("no script") from None
    server = Peer(own_public=SERVER[0], own_secret=SERVER[1], limit=LIMIT)
    client = Peer(own_public=MEMBER[0], own_secret=MEMBER[1], server_public=SERVER[0], limit=LIMIT)
    ends = (client, server)
    sent: tuple[list[Any], list[Any]] = ([], [])
    got: tuple[list[Any], list[Any]] = ([], [])
    held = [b"", b""]
    for turn in range(12):
        who = turn % 2
        if ends[who].open:
            for number in range(2):
                content = b"%d/%d/%d" % (who, turn, number)
                ends[who].send(content, number & turn & 1)
                sent[who].append((number & turn & 1, content))
        carried = held[who] + ends[who].take()
        held[who] = b""
        pieces = [carried]
        for when, kind, at, by in acts:
            if when != turn or not carried:
                continue
            place = at % len(carried)
            if kind == 0:
                mask = (by or b"\1")[0] or 1
                carried = carried[:place] + bytes([carried[place] ^ mask]) + carried[place + 1 :]
            elif kind == 1:
                carried = carried[:place]
            elif kind == 2:
                carried = carried[:place] + by[:200] + carried[place:]
            elif kind == 3 and len(carried) < CONTENT_MAX:
                carried += carried
            elif kind == 4:
                held[who], carried = carried, b""
            elif kind == 5:
                got[who].extend(ends[who].feed(carried))
            elif kind == 7:
                carried = b""
            pieces = [carried[:place], carried[place:]] if kind == 6 else [carried]
        other = ends[1 - who]
        for piece in pieces:
            got[1 - who].extend(other.feed(piece))
            if other.judged:
                require(other.peer_public == MEMBER[0], "somebody else's key is proved")
                other.judge(is_member(other.peer_public))
                got[1 - who].extend(other.feed(b""))
    for who in (0, 1):
        rest = iter(sent[who])
        require(all(each in rest for each in got[1 - who]), "what is delivered was not sent, or in another order")
    harmless = all(kind == 6 for _, kind, _, _ in acts)
    carried_all = (got[1], got[0]) == sent and len(sent[0]) > 4
    require(not harmless or carried_all, "an honest conversation is not carried")
    require(not client.open or client.ended or server.open or server.ended, "the client is in where nobody let it in")
    if not got[0] and not got[1]:
        raise ProtocolError(f"nothing is delivered; ended: {client.ended}, {server.ended}")
    return f"{len(got[0])} and {len(got[1])} frames"


# --- a router, with sockets ---


class _Routers:
    """A router with an honest member, whom nothing may disturb; made once."""

    def __init__(self) -> None:
        members = {z85.encode(MEMBER[0]).decode()}
        self.gone: list[Connection] = []
        self.router = Router(lambda user: user in members, limit=LIMIT, replies_max=8)
        self.router.gone = self.gone.append
        self.address = f"\0keyquorum-fuzz-{os.getpid()}-{id(self):x}"
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(self.address)
        listening.listen(16)
        listening.setblocking(False)
        self.router.listen(listening.detach(), 1, *SERVER)
        self.honest = Peer(own_public=MEMBER[0], own_secret=MEMBER[1], server_public=SERVER[0])
        self.socket, self.connection = self.connected()
        while not self.honest.open:
            self.socket.sendall(self.honest.take())
            self.received()
            self.honest.feed(self.socket.recv(4_096))
        self.count = 0

    def connected(self) -> tuple[socket.socket, Connection]:
        """A new connection, and the router's end of it."""
        made = socket.socket(socket.AF_UNIX)
        made.connect(self.address)
        before = set(self.router.connections)
        self.router.poll(0)
        (connection,) = set(self.router.connections) - before
        return made, connection

    def received(self) -> list[tuple[Connection, bytes, int]]:
        """Everything that there is."""
        found = []
        while True:
            self.router.poll(0)
            message = self.router.receive()
            if message is not None:
                found.append(message)
            elif not self.router.pending:
                return found


_routers: list[_Routers] = []


def _take_router(data: bytes) -> str:
    steps = steps_of(data)
    if not _routers:
        _routers.append(_Routers())
    site = _routers[0]
    site.gone.clear()
    hostile, stream, found = Hostile(to_server=True), bytearray(), []
    stranger, connection = site.connected()
    said = b""
    try:
        stranger.setblocking(False)
        for step in steps:
            for piece in hostile.says(step, said):
                try:
                    stranger.sendall(piece)
                except ConnectionError:
                    require(not connection.open, "the connection broke and is told to be open")
                    break
                stream += piece
                site.count += 1
                site.honest.send(b"%d" % site.count)
                site.socket.sendall(site.honest.take())
                received = site.received()
                for each in received:
                    require(each[0] in (connection, site.connection), "a message of nobody")
                told = [each[1] for each in received if each[0] is site.connection]
                require(told == [b"%d" % site.count], "an honest member is disturbed")
                found += [(content, parts) for each, content, parts in received if each is connection]
                held_max = HELD_MAX if connection.proved else STRANGER_HELD_MAX
                require(connection.held <= held_max, f"it keeps {connection.held} bytes of one connection")
                with suppress(BlockingIOError, ConnectionError):
                    said += stranger.recv(65_536)
        _judge_router(bytes(stream), said, connection, found)
        require(site.gone == ([] if connection.open else [connection]), "an end is not told once")
        told_all = read(bytes(stream), server=True, said=said, members=(MEMBER[0],), limit=LIMIT)
        return _told(told_all)
    finally:
        site.router.end(connection)
        stranger.close()


def _judge_router(stream: bytes, said: bytes, connection: Connection, found: list[tuple[bytes, int]]) -> None:
    told = read(stream, server=True, said=said, members=(MEMBER[0],), limit=LIMIT)
    messages, parts, pongs, ended = [], 0, 0, told.state == "ended"
    for flags, content in told.frames:
        if flags & 2:
            pongs += 7 <= len(content) <= 23 and content[:5] == b"\x04PING"
            continue
        parts += 1
        if flags & 1:
            if parts >= PARTS_MAX:
                ended = True
                break
            continue
        messages.append((content if parts == 1 else b"", parts))
        parts = 0
    require(found == messages, f"{len(found)} messages are delivered where {len(messages)} were sent")
    require(connection.open != ended, f"it is {'open' if connection.open else 'ended'} at {told.stage or 'a message'}")
    require(told.state != "open" or connection.user == z85.encode(told.proved).decode(), "it is somebody else's")
    require(connection.proved == (told.state == "open" and not ended), "a key counts as proved, or does not")
    if told.state == "open" and not ended:
        at = 234
        answers = -1
        while (frame := frame_at(said, at, COMMAND_MAX)) is not None:
            answers, at = answers + 1, frame[2]
        require((answers, at) == (pongs, len(said)), f"{answers} answers to {pongs} pings")


# --- a line, with its socket ---

USES: Final = 3
WAIT_S: Final = 20.0
"""It only ends what hangs."""

_thread: list[ThreadPoolExecutor] = []


def _use_line(line: Line) -> tuple[bool, list[tuple[int, bytes | None]]]:
    """Whether it opens, and what comes of some uses: (how many were answered before, the frame or the result)."""
    told: list[tuple[int, bytes | None]] = []
    is_open = line.shake(*MEMBER, SERVER[0], WAIT_S)
    number = 1
    while is_open and number <= USES:
        code = line.operate(number, b"mac", b"k", b"", b"data", b"", b"", False, 1_000, WAIT_S)
        while code == OTHER:
            told.append((OTHER, line.frame))
            code = line.resume()
        if code != DONE:
            require(code in (BROKEN, NOT_SENT), "it waits for what ended")
            require(not line.open, "it broke and is open")
            break
        told.append((DONE, line.data))
        number += 1
    line.close()
    return is_open, told


def _uses(frames: list[tuple[int, bytes]]) -> list[tuple[int, bytes | None]]:
    """What must come of these frames."""
    told: list[tuple[int, bytes | None]] = []
    number, parts = 1, False
    for flags, content in frames:
        if flags & 2 or number > USES:
            continue
        if flags & 1 or parts:
            if not flags & 1:
                told.append((OTHER, b""))
            parts = bool(flags & 1)
            continue
        result = read_result(content)
        if result is None or result[0] != PROTOCOL_VERSION:
            told.append((OTHER, content))
        elif result[1] == number:
            told.append((DONE, result[2]))
            number += 1
    return told


def _take_line(data: bytes) -> str:
    steps = steps_of(data)
    if not _thread:
        _thread.append(ThreadPoolExecutor(1))
    stream, said, told = b"", b"", Meaning()
    ours, theirs = socket.socketpair(socket.AF_UNIX)
    with ours:
        ours.settimeout(WAIT_S)
        done = _thread[0].submit(_use_line, Line(theirs.detach(), limit=LIMIT, version=PROTOCOL_VERSION))
        hostile = Hostile(to_server=False)
        for step in steps:
            while told.stage == "WELCOME" and told.state == "waits" and len(said) < 266:
                said += _more(ours)
            with suppress(ConnectionError):
                for piece in hostile.says(step, said):
                    ours.sendall(piece)
                    stream += piece
            told, said = _meaning(ours, stream, said)
        asked = 1 + sum(code == DONE for code, _ in _uses(told.frames))
        while not told.stage and _messages(said) < min(USES, asked):
            said += _more(ours)  # who ended before a use is asked for nothing
        ours.shutdown(socket.SHUT_WR)
        is_open, uses = done.result(WAIT_S)
    require(is_open == (not told.stage), f"it is {'open' if is_open else 'not open'} at {told.stage}")
    require(uses == _uses(told.frames), f"{len(uses)} answers, and {len(_uses(told.frames))} were sent")
    return _told(told)


def _messages(said: bytes) -> int:
    """Frames behind INITIATE."""
    count, at = -1, 266
    while (frame := frame_at(said, at, COMMAND_MAX)) is not None:
        count, at = count + 1, frame[2]
    return count


def _more(ours: socket.socket) -> bytes:
    came = b""
    with suppress(ConnectionError):
        came = ours.recv(65_536)
    require(came, "the line ended where it should go on")
    return came


def _meaning(ours: socket.socket, stream: bytes, said: bytes) -> tuple[Meaning, bytes]:
    """The meaning, once all was said that must be said to it."""
    while True:
        try:
            return read(stream, server=False, said=said, members=(), limit=LIMIT), said
        except Finding:
            said += _more(ours)


# --- targets ---


def _result(number: int, size: int = 3) -> bytes:
    body = REPLY_CODECS["mac"].encode(Result(bytes(size)))
    return reply_codec.encode(Reply(PROTOCOL_VERSION, number, Status.OK, body, Load(0, 1, True), {}))


def _scripts(*, server: bool) -> Callable[[], Sequence[bytes]]:
    def made() -> list[bytes]:
        shake = (Step(GREETS, variant=1), Step(FIRST), Step(SECOND))
        ping = Step(MESSAGE, variant=2, data=b"\x04PING\0\0context")
        messages = [Step(MESSAGE, data=bytes(size)) for size in (0, 1, 222, 223, LIMIT - 33)]
        known = DEALER if server else ROUTER
        tails = (b"\x04abcd", b"\x01a\0\0\0\x05abcd", b"\x04ab", b"\0\0\0\0\0", b"\x01a\0\0\0\x02ab")
        other = Step(SECOND, data=b"\x0bsocket-type\0\0\0\x03" + (b"REQ" if server else b"REP"))
        return [
            script(*shake, *messages),
            script(*shake, Step(MESSAGE, variant=1, data=b"a"), ping, *[Step(MESSAGE, data=b"b")] * 2),
            script(*[replace(each, piece=1) for each in (*shake, messages[1])]),
            script(*shake, *[Step(MESSAGE, data=b"m")] * 12, *[ping] * 3, Step(MESSAGE, data=b"z" * 300, piece=7)),
            script(*shake[:2], other, Step(MESSAGE, number=1 << 40, data=b"late")),
            script(*shake, Step(MESSAGE, data=b"once"), Step(AGAIN, number=3), Step(MESSAGE, data=b"no")),
            script(*shake[:2], Step(SECOND, variant=16), Step(ERROR)),
            script(Step(GREETS, data=b"NULL"), Step(FRAME, variant=4, data=b"\x05READY")),
            script(Step(GREETS), Step(FIRST, variant=1 << 12), Step(SECOND, cut=5), Step(BYTES, data=b"\0" * 5)),
            script(*shake, *[Step(MESSAGE, variant=1)] * 20, Step(FRAME, variant=2, data=bytes(40))),
            script(*shake, *[Step(MESSAGE, variant=2, data=ping.data[:7] + bytes(size)) for size in (0, 16, 17)]),
            script(*shake, Step(MESSAGE, variant=1 | 1 << 10), messages[1], *[Step(MESSAGE, variant=1)] * 3),
            script(*shake, *[Step(MESSAGE, variant=1 | 1 << 11)] * 2, Step(MESSAGE, variant=1), messages[0]),
            script(*shake, *[Step(MESSAGE, variant=1 | 1 << 11)] * 2, *[Step(MESSAGE, variant=1)] * 2),
            script(*shake, *[Step(MESSAGE, variant=1 << 10, data=b"many")] * 2, replace(ping, variant=2 | 1 << 10)),
            *[script(*shake[:2], Step(SECOND, data=known + tail), messages[1]) for tail in tails],
            script(*shake, *[Step(MESSAGE, data=_result(number), piece=number) for number in (1, 2, 9, 3)]),
            script(*shake, *[Step(MESSAGE, data=_result(number, 1_000 - 300 * number)) for number in (1, 2, 3)]),
        ]

    return made


def _between_scripts() -> list[bytes]:
    acts: list[list[list[Any]]] = [
        [],
        [[turn, 6, 11, b""] for turn in range(12)],
        [[2, 0, 100, b"\1"]],
        [[6, 3, 0, b""]],
        [[4, 4, 0, b""], [6, 3, 0, b""]],
        [[6, 5, 0, b""], [8, 7, 0, b""]],
        [[7, 1, 40, b""], [9, 2, 10, b"\xff\xff"]],
    ]
    return [bytes(msgpack.packb(each, use_bin_type=True)) for each in acts]


def _number(r: Random) -> int:
    return r.choice(
        (0, 1, 2, 7, 8, 31, 64, 255, 256, 1_467, 1_500, 4_096, 65_535, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)
    )


def _change_script(r: Random, data: bytes, donor: bytes) -> bytes:
    """Change steps, their order, fields or faults; or the MessagePack of it."""
    if r.random() < 0.1:
        return change_message(r, data, donor)
    try:
        tree, other = msgpack.unpackb(data, raw=False), msgpack.unpackb(donor, raw=False)
        for _ in range(r.choice((1, 1, 1, 2, 3))):
            at, what = r.randrange(len(tree) + 1), r.random()
            if what < 0.1 and other:
                tree.insert(at, r.choice(other))
            elif not tree:
                continue
            else:
                at %= len(tree)
                step = tree[at] = list(tree[at])
                if what < 0.17:
                    tree.insert(r.randrange(len(tree) + 1), step)
                elif what < 0.24:
                    tree.insert(r.randrange(len(tree)), tree.pop(at))
                elif what < 0.3:
                    del tree[at]
                elif what < 0.35:
                    tree[at:] = [step] * r.choice((2, 9, 17))
                else:
                    _change_step(r, step)
        return bytes(msgpack.packb(tree, use_bin_type=True))
    except NO_SCRIPT:
        return change_message(r, data, donor)


def _change_step(r: Random, step: list[Any]) -> None:
    place = r.randrange(len(step))
    value = step[place]
    if isinstance(value, bytes):
        size = r.choice((0, 1, 16, 200, 255, 256, 1_466, 1_467, 1_468, 2_100))
        step[place] = r.choice((value[: size or 1], value + bytes(size), r.randbytes(min(size, 40)), value[1:]))
    elif isinstance(value, list):
        step[place] = [*value[-3:], [r.choice((r.randrange(16), r.randrange(400), _number(r))), 1 << r.randrange(8)]]
    elif len(step) == 7 and place == 2:
        step[place] = value ^ 1 << r.randrange(13)
    elif len(step) == 7 and place == 6:
        step[place] = r.choice((0, 1, 2, 3, 9, 33, 64))
    else:
        step[place] = r.choice((_number(r), r.randrange(16), value + 1, max(0, value - 1)))


def zmtp_targets() -> list[Target]:
    """Both ends in memory, what is between them, and the router."""
    feed, judge = "engine.client._zmtp.Peer.feed", "engine.client._zmtp.Peer.judge"
    shake, operate = "engine.client._fastline.Line.shake", "engine.client._fastline.Line.operate"
    receive = "engine.client._router.Router.receive"
    server, client = _scripts(server=True), _scripts(server=False)
    return [
        Target("zmtp/server", server, _take_server, _change_script, weight=3, covers=(feed, judge)),
        Target("zmtp/client", client, _take_client, _change_script, weight=2, covers=(feed,)),
        Target("zmtp/between", _between_scripts, _take_between, _change_script, covers=(feed, judge)),
        Target("zmtp/router", server, _take_router, _change_script, weight=2, cpu_s=1.0, covers=(receive,)),
        Target("zmtp/line", client, _take_line, _change_script, weight=2, cpu_s=1.0, covers=(shake, operate)),
    ]
