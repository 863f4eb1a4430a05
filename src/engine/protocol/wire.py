"""Frames and strict decoding. It knows how bytes become typed messages, not what the messages mean.

Every message is one MessagePack value (https://github.com/msgpack/msgpack/blob/master/spec.md) in canonical form: what
decodes is encoded again and must give the same bytes. So non-minimal integers, trailing data, repeated map keys, extra
array elements and invalid UTF-8 are refused by one rule. docs/protocol.md describes each message byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Final, Generic, TypeVar

import msgspec
from msgspec import Meta, Struct

from engine.errors import ProtocolError

__all__ = [
    "LOWEST_VERSION",
    "MAX_AAD",
    "MAX_DATA",
    "MAX_MESSAGE",
    "PROTOCOL_VERSION",
    "Codec",
    "ErrorBody",
    "Load",
    "Name",
    "Reply",
    "Request",
    "Status",
    "Versions",
    "reply_codec",
    "request_codec",
]

PROTOCOL_VERSION: Final = 2
"""The newest version that this software speaks. 2 added the last fields of ``NodeStatus`` and ``BalancerStatus``."""
LOWEST_VERSION: Final = 1
"""The oldest one: that of the release before, so that a cluster is upgraded member by member."""
MAX_MESSAGE = 64 * 1024
"""Longest message in bytes; also the sockets' ZMQ_MAXMSGSIZE."""
MAX_DATA = 48 * 1024
"""Longest data of one request in bytes."""
MAX_AAD = 4 * 1024
"""Longest associated data in bytes."""
MAX_TIMEOUT_MS = 600_000
MAX_EXTENSIONS = 8

Name = Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]*\Z")]
"""Names of keys and members: 1..128 characters, letters, digits and ``._:/@+-``, the first a letter or digit."""
UInt = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Text = Annotated[str, Meta(max_length=1024)]
Digest = Annotated[bytes, Meta(min_length=32, max_length=32)]
Identifier = Annotated[bytes, Meta(min_length=16, max_length=16)]
Data = Annotated[bytes, Meta(max_length=MAX_DATA + 128)]
"""A request's or reply's data; the margin is for headers, nonces and tags."""
Aad = Annotated[bytes, Meta(max_length=MAX_AAD)]
Blob = Annotated[bytes, Meta(max_length=MAX_MESSAGE)]
Extensions = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=32)], Annotated[bytes, Meta(max_length=4096)]],
    Meta(max_length=MAX_EXTENSIONS),
]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Versions:
    """The protocol versions that a process speaks: all from ``lowest`` to ``highest``.

    It takes requests of the version after, too: the forms of requests are the same in neighbouring versions, and who is
    of that version sends them before it knows with whom it speaks.
    """

    lowest: int
    highest: int

    def takes(self, version: int) -> bool:
        """Whether a message of that version is read."""
        return self.lowest <= version <= self.highest + 1

    def check(self, version: int) -> None:
        """Refuse a peer that is more than one protocol version away, as ``ProtocolError``."""
        if not self.takes(version):
            raise ProtocolError(
                f"protocol version {version}; this side speaks {self} and takes {self.lowest} to {self.highest + 1}"
            )

    def common(self, lowest: int, highest: int) -> int:
        """The newest version that a peer speaks too, which speaks these; 0 if there is none."""
        spoken = min(self.highest, highest)
        return spoken if spoken >= max(self.lowest, lowest) else 0

    def reply_to(self, version: int) -> int:
        """The version of the reply to a request of that version: the same, or else the newest one that is spoken."""
        return version if self.lowest <= version <= self.highest else self.highest

    def __str__(self) -> str:
        return str(self.highest) if self.lowest == self.highest else f"{self.lowest} to {self.highest}"


class Codec(Generic[T]):
    """A strict encoder and decoder of one message type, bounded by ``limit`` bytes.

    Fields at the end that have a default may be missing in what is decoded: documents of before such a field was added
    stay what they are. What is encoded has all of them, but for those that the message's ``ADDED`` (field -> protocol
    version) says to be newer than the version that is asked for.
    """

    def __init__(self, kind: type[T], what: str, limit: int = MAX_MESSAGE) -> None:
        self.what = what
        self.limit = limit
        self._decode: Callable[[Any], T] = msgspec.msgpack.Decoder(kind).decode
        self._encode: Callable[[Any], bytes] = msgspec.msgpack.Encoder().encode
        self._optional = len(getattr(kind, "__struct_defaults__", ()))
        self._added: list[int] = sorted(getattr(kind, "ADDED", {}).values())

    def encode(self, value: T, version: int = PROTOCOL_VERSION) -> bytes:
        """The canonical bytes, in the form of a protocol version; ``ValueError`` if they pass the limit."""
        newer = sum(each > version for each in self._added) if self._added else 0
        fields: Any = value
        if newer:
            fields = msgspec.structs.astuple(fields)[:-newer]
        data = self._encode(fields)
        if len(data) > self.limit:
            raise ValueError(f"{self.what}: {len(data)} bytes, the limit is {self.limit}")
        return data

    def decode(self, data: bytes) -> T:
        """The message, or ``ProtocolError`` that says what is wrong without showing the bytes."""
        if len(data) > self.limit:
            raise ProtocolError(f"{self.what}: {len(data)} bytes, the limit is {self.limit}")
        try:
            value = self._decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(f"{self.what}: {_reason(error)}") from None
        if self._encode(value) != data and not self._shorter(value, data):
            raise ProtocolError(f"{self.what}: not in canonical form")
        return value

    def _shorter(self, value: Any, data: bytes) -> bool:
        """Whether these are the value's bytes without some of the fields at its end, which have their defaults."""
        fields = msgspec.structs.astuple(value) if self._optional else ()
        lengths = range(len(fields) - self._optional, len(fields))
        return any(self._encode(fields[:length]) == data for length in lengths)


def _reason(error: Exception) -> str:
    if isinstance(error, msgspec.MsgspecError):
        return without_value(str(error))
    return "invalid UTF-8" if isinstance(error, UnicodeDecodeError) else "nested too deep"


def without_value(text: str) -> str:
    """A text of msgspec's without the value, of any length, that it quotes where one of a few words is expected."""
    if not text.startswith("Invalid enum value"):
        return text
    place = text.rfind(" - at `$")
    return f"Invalid enum value{text[place:]}" if place >= 0 else "Invalid enum value"


class Request(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request: ``[version, id, verb, timeout_ms, body, extensions]``; ``body`` is the verb's own message."""

    version: UInt
    id: UInt
    verb: Annotated[str, Meta(min_length=1, max_length=32)]
    timeout_ms: Annotated[int, Meta(ge=1, le=MAX_TIMEOUT_MS)]
    body: Blob
    extensions: Extensions


class Status:
    """The kinds of reply."""

    OK = 0
    ERROR = 1
    MOVED = 2


class Load(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The snapshot that rides on every reply: ``[queue, service_us, loaded]``.

    ``queue`` counts requests waiting in the node, ``service_us`` is what this request's token operation took in
    microseconds, ``loaded`` whether the request's key is now loaded in the node.
    """

    queue: UInt
    service_us: UInt
    loaded: bool


class Reply(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A reply: ``[version, id, status, body, load, extensions]``."""

    version: UInt
    id: UInt
    status: Annotated[int, Meta(ge=0, le=2)]
    body: Blob
    load: Load
    extensions: Extensions


class ErrorBody(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Body of an error reply: ``[code, message, names]``; the codes are those of ``engine.errors``.

    Body of a ``moved`` reply too, where ``names`` are the eligible combiners in order.
    """

    code: Annotated[str, Meta(min_length=1, max_length=64)]
    message: Text
    names: Annotated[list[Name], Meta(max_length=255)]


request_codec = Codec(Request, "request")
reply_codec = Codec(Reply, "reply")
error_codec = Codec(ErrorBody, "error reply")
