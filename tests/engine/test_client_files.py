"""Encrypted streams: what was cut, moved, spliced or added never decrypts. The cipher is AES-GCM in process."""

from __future__ import annotations

import io
import os
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag as PycaInvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.client import files
from engine.client.files import CHUNK, MAX_STREAM_AAD, decrypt_stream, encrypt_stream, sign_stream, verify_stream
from engine.errors import InvalidSignature, InvalidTag

HEAD = len(files.MAGIC) + 1 + files.STREAM_ID


class Keys:
    """An engine's part that streams use, with one AES key."""

    def __init__(self, algorithm: str = "aes-256-gcm") -> None:
        self._aead = AESGCM(bytes(32))
        self._algorithm = algorithm

    def key_info(self, name: str, timeout: float | None = None) -> Any:
        return SimpleNamespace(algorithm=self._algorithm)

    def encrypt_many(self, name: str, items: list[bytes], *, associated_data: Any, timeout: Any) -> list[bytes]:
        assert len(items) <= files.BATCH
        nonces = [os.urandom(12) for _ in items]
        return [
            n + self._aead.encrypt(n, item, aad) for n, item, aad in zip(nonces, items, associated_data, strict=True)
        ]

    def decrypt_many(self, name: str, items: list[bytes], *, associated_data: Any, timeout: Any) -> list[bytes]:
        try:
            return [
                self._aead.decrypt(item[:12], item[12:], aad) for item, aad in zip(items, associated_data, strict=True)
            ]
        except (PycaInvalidTag, ValueError):
            raise InvalidTag("no") from None

    def sign(
        self, name: str, message: bytes | None = None, *, digest: bytes | None = None, timeout: Any = None
    ) -> bytes:
        return b"S" + (digest if digest is not None else message or b"")

    def verify(self, name: str, message: Any, signature: bytes, *, digest: Any = None, timeout: Any = None) -> None:
        if signature != self.sign(name, message, digest=digest):
            raise InvalidSignature("no")


class Trickle(io.BytesIO):
    """A pipe: it gives at most 1,000 bytes at a time."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(min(size, 1000) if size is not None and size > 0 else size)


def seal(data: bytes, aad: bytes = b"") -> bytes:
    sink = io.BytesIO()
    assert encrypt_stream(Keys(), "k", io.BytesIO(data), sink, aad) == len(data)  # type: ignore[arg-type]
    return sink.getvalue()


def unseal(container: bytes, aad: bytes = b"") -> bytes:
    sink = io.BytesIO()
    decrypt_stream(Keys(), "k", Trickle(container), sink, aad)  # type: ignore[arg-type]
    return sink.getvalue()


def chunks(container: bytes) -> list[bytes]:
    found, at = [], HEAD
    while at < len(container):
        size = 4 + int.from_bytes(container[at : at + 4], "big")
        found.append(container[at : at + size])
        at += size
    return found


LONG = os.urandom(3 * CHUNK + 5)


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, files.BATCH * CHUNK, 17 * CHUNK + 3])
def test_any_length_comes_back(size: int) -> None:
    data = os.urandom(size)
    container = seal(data, b"me")
    assert unseal(container, b"me") == data
    assert len(chunks(container)) == max(1, -(-size // CHUNK))


def test_a_pipe_that_gives_little_at_a_time_makes_full_chunks() -> None:
    sink = io.BytesIO()
    encrypt_stream(Keys(), "k", Trickle(LONG), sink)  # type: ignore[arg-type]
    assert unseal(sink.getvalue()) == LONG
    assert len(chunks(sink.getvalue())) == 4


def test_progress_is_told() -> None:
    told: list[int] = []
    encrypt_stream(Keys(), "k", io.BytesIO(bytes(17 * CHUNK)), io.BytesIO(), progress=told.append)  # type: ignore[arg-type]
    assert told == [16 * CHUNK, 17 * CHUNK]


@pytest.mark.parametrize(
    "tamper",
    [
        lambda head, parts, other: head + b"".join(parts[:-1]),
        lambda head, parts, other: head + b"".join(parts)[:-1],
        lambda head, parts, other: head + b"".join(parts[:2]) + parts[2][:3],
        lambda head, parts, other: head,
        lambda head, parts, other: head[:-1],
        lambda head, parts, other: b"",
        lambda head, parts, other: head + b"".join([parts[1], parts[0], *parts[2:]]),
        lambda head, parts, other: head + b"".join([parts[0], parts[0], *parts[2:]]),
        lambda head, parts, other: head + b"".join([*parts, parts[-1]]),
        lambda head, parts, other: head + b"".join(parts) + b"\0",
        lambda head, parts, other: head + b"".join(parts) + bytes(4),
        lambda head, parts, other: head + b"".join([parts[0], other[1], *parts[2:]]),
        lambda head, parts, other: head + b"".join([*parts[:-1], other[-1]]),
        lambda head, parts, other: head + b"\xff\xff\xff\xff" + b"".join(parts),
        lambda head, parts, other: b"X" + head[1:] + b"".join(parts),
        lambda head, parts, other: head[:8] + b"\x02" + head[9:] + b"".join(parts),
        lambda head, parts, other: head[:9] + bytes(16) + b"".join(parts),
        lambda head, parts, other: head + parts[-1],
    ],
)
def test_what_was_changed_is_refused(tamper: Any) -> None:
    container = seal(LONG)
    changed = tamper(container[:HEAD], chunks(container), chunks(seal(LONG)))
    with pytest.raises(InvalidTag):
        unseal(changed)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_changed_byte_is_refused(data: st.DataObject) -> None:
    container = bytearray(seal(LONG[: CHUNK + 100]))
    at = data.draw(st.integers(0, len(container) - 1))
    container[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(InvalidTag):
        unseal(bytes(container))


def test_only_verified_chunks_reach_the_sink() -> None:
    container = bytearray(seal(bytes(17 * CHUNK)))
    container[-1] ^= 1
    sink = io.BytesIO()
    with pytest.raises(InvalidTag):
        decrypt_stream(Keys(), "k", io.BytesIO(container), sink)  # type: ignore[arg-type]
    assert sink.getvalue() == bytes(16 * CHUNK)


def test_the_callers_associated_data_counts_and_has_a_limit() -> None:
    container = seal(b"data", bytes(MAX_STREAM_AAD))
    assert unseal(container, bytes(MAX_STREAM_AAD)) == b"data"
    with pytest.raises(InvalidTag):
        unseal(container, b"")
    with pytest.raises(ValueError, match=f"{MAX_STREAM_AAD + 1} bytes; the limit"):
        seal(b"data", bytes(MAX_STREAM_AAD + 1))


def test_a_key_that_is_not_aes_is_refused() -> None:
    with pytest.raises(ValueError, match="ed25519; streams need"):
        encrypt_stream(Keys("ed25519"), "k", io.BytesIO(), io.BytesIO())  # type: ignore[arg-type]


def test_streams_are_signed_by_their_digest() -> None:
    keys: Any = Keys("ecdsa-p256-sha256")
    signature = sign_stream(keys, "k", Trickle(LONG))
    assert len(signature) == 33
    verify_stream(keys, "k", Trickle(LONG), signature)
    with pytest.raises(InvalidSignature):
        verify_stream(keys, "k", Trickle(LONG[1:]), signature)


def test_ed25519_streams_are_short() -> None:
    keys: Any = Keys("ed25519")
    assert sign_stream(keys, "k", Trickle(b"short")) == b"Sshort"
    with pytest.raises(ValueError, match="more than 49152"):
        sign_stream(keys, "k", Trickle(LONG))
