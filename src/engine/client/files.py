"""Files of any length: the chunked container of encrypted streams, and signatures over streams. It opens no socket.

The container (integers big-endian): the magic ``KQSTREAM``, one format byte (1), a random 16-byte stream id; then, for
each chunk, its ciphertext's length as 4 bytes and the ciphertext. Every chunk but the last carries ``CHUNK`` bytes of
plaintext, and there is always a last one, empty for an empty file. A chunk is encrypted by itself, with the associated
data ``label || stream id || index (8 bytes) || last (1 byte) || the caller's associated data``. So a chunk that is
missing, moved, repeated, taken from another stream or added at the end does not verify: the chunk that ends the file is
the only one that verifies as the last.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from engine.errors import InvalidTag
from engine.keys import Algorithm, KeyKind, algorithm
from engine.protocol.wire import MAX_AAD, MAX_DATA

if TYPE_CHECKING:
    from engine.client.client import Engine

__all__ = ["CHUNK", "MAGIC", "decrypt_stream", "encrypt_stream", "rewrap_stream", "sign_stream", "verify_stream"]

MAGIC = b"KQSTREAM"
FORMAT = 1
CHUNK = MAX_DATA
"""Plaintext bytes of a chunk, 48 KiB."""
STREAM_ID = 16
LABEL = b"keyquorum/stream/1\0"
OVERHEAD_MAX = 128
"""A chunk's ciphertext is at most this much longer than its plaintext."""
BATCH = 16
"""Chunks that are under way at once; what is held in memory is about twice as much."""
MAX_STREAM_AAD = MAX_AAD - len(LABEL) - STREAM_ID - 8 - 1
READ = 1024 * 1024

Progress = Callable[[int], None]


def encrypt_stream(
    kq: Engine,
    name: str,
    source: BinaryIO,
    sink: BinaryIO,
    associated_data: bytes = b"",
    progress: Progress | None = None,
    *,
    timeout: float | None = None,
) -> int:
    """Encrypt ``source`` to its end into ``sink``; returns the bytes read.

    ``timeout`` in seconds is for each chunk. ``progress`` is called with the bytes done so far. After an error the sink
    holds an incomplete container, which no decryption accepts.
    """
    _check(kq, name, associated_data, timeout)
    stream_id = os.urandom(STREAM_ID)
    sink.write(MAGIC + bytes([FORMAT]) + stream_id)
    done = 0
    for first, batch, last in _batches(_plain_chunks(source)):
        aads = _aads(stream_id, first, len(batch), last, associated_data)
        for ciphertext in kq.encrypt_many(name, batch, associated_data=aads, timeout=timeout):
            sink.write(len(ciphertext).to_bytes(4, "big") + ciphertext)
        done += sum(map(len, batch))
        if progress is not None:
            progress(done)
    return done


def decrypt_stream(
    kq: Engine,
    name: str,
    source: BinaryIO,
    sink: BinaryIO,
    associated_data: bytes = b"",
    progress: Progress | None = None,
    *,
    timeout: float | None = None,
) -> int:
    """Decrypt a container into ``sink``; returns the bytes written.

    Only verified chunks are written, but until it returns their end is not: on ``InvalidTag`` (or any error) the caller
    must throw away what is in the sink. ``progress`` is called with the bytes written so far.
    """
    _check(kq, name, associated_data, timeout)
    stream_id = _read_head(source)[-STREAM_ID:]
    done = 0
    for first, batch, last in _batches(_cipher_chunks(source)):
        aads = _aads(stream_id, first, len(batch), last, associated_data)
        plaintexts = kq.decrypt_many(name, batch, associated_data=aads, timeout=timeout)
        for index, plaintext in enumerate(plaintexts, 1):
            if len(plaintext) != CHUNK and not (last and index == len(batch)):
                raise InvalidTag(f"chunk {first + index - 1} of the stream is short")
            sink.write(plaintext)
            done += len(plaintext)
        if progress is not None:
            progress(done)
    return done


def rewrap_stream(
    kq: Engine,
    name: str,
    source: BinaryIO,
    sink: BinaryIO,
    associated_data: bytes = b"",
    progress: Progress | None = None,
    *,
    timeout: float | None = None,
) -> int:
    """Have a container encrypted by the newest version of the key, into ``sink``; returns the bytes written.

    Each chunk is checked by a node, which shows no plaintext. After an error the sink holds an incomplete container.
    """
    _check(kq, name, associated_data, timeout)
    head = _read_head(source)
    sink.write(head)
    done = len(head)
    for first, batch, last in _batches(_cipher_chunks(source)):
        aads = _aads(head[-STREAM_ID:], first, len(batch), last, associated_data)
        for ciphertext in kq.rewrap_many(name, batch, associated_data=aads, timeout=timeout):
            sink.write(len(ciphertext).to_bytes(4, "big") + ciphertext)
            done += 4 + len(ciphertext)
        if progress is not None:
            progress(done)
    return done


def _read_head(source: BinaryIO) -> bytes:
    """The head of a container; ``InvalidTag`` if there is none, or one of another format."""
    head = _read_full(source, len(MAGIC) + 1 + STREAM_ID)
    if len(head) != len(MAGIC) + 1 + STREAM_ID or not head.startswith(MAGIC):
        raise InvalidTag("no encrypted stream: its head is missing")
    if head[len(MAGIC)] != FORMAT:
        raise InvalidTag(f"an encrypted stream of format {head[len(MAGIC)]}; {FORMAT} is known")
    return head


def sign_stream(kq: Engine, name: str, source: BinaryIO, *, timeout: float | None = None) -> bytes:
    """The signature of what ``source`` holds; for an algorithm that hashes first, of any length."""
    algo = algorithm(kq.key_info(name, timeout=timeout).algorithm)
    if algo.prehashed:
        return kq.sign(name, digest=_digest(algo, source), timeout=timeout)
    return kq.sign(name, _whole(algo, source), timeout=timeout)


def verify_stream(kq: Engine, name: str, source: BinaryIO, signature: bytes, *, timeout: float | None = None) -> None:
    """Raise ``InvalidSignature`` unless ``signature`` is the key's for what ``source`` holds."""
    algo = algorithm(kq.key_info(name, timeout=timeout).algorithm)
    if algo.prehashed:
        kq.verify(name, None, signature, digest=_digest(algo, source), timeout=timeout)
    else:
        kq.verify(name, _whole(algo, source), signature, timeout=timeout)


def _check(kq: Engine, name: str, associated_data: bytes, timeout: float | None) -> None:
    if len(associated_data) > MAX_STREAM_AAD:
        raise ValueError(f"associated_data of {len(associated_data)} bytes; the limit for a stream is {MAX_STREAM_AAD}")
    algo = algorithm(kq.key_info(name, timeout=timeout).algorithm)
    if algo.kind is not KeyKind.AES:
        raise ValueError(f"the key {name!r} is {algo.name}; streams need aes-128-gcm or aes-256-gcm")


def _digest(algo: Algorithm, source: BinaryIO) -> bytes:
    state = hashlib.new(algo.hash_name)
    while block := source.read(READ):
        state.update(block)
    return state.digest()


def _whole(algo: Algorithm, source: BinaryIO) -> bytes:
    data = _read_full(source, MAX_DATA + 1)
    if len(data) > MAX_DATA:
        raise ValueError(f"more than {MAX_DATA} bytes; {algo.name} takes whole messages of at most that")
    return data


def _read_full(source: BinaryIO, size: int) -> bytes:
    """``size`` bytes, or fewer at the end of the file only: a pipe may give less at a time."""
    parts: list[bytes] = []
    left = size
    while left and (part := source.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _plain_chunks(source: BinaryIO) -> Iterator[bytes]:
    chunk = _read_full(source, CHUNK)
    yield chunk
    while len(chunk) == CHUNK and (chunk := _read_full(source, CHUNK)):
        yield chunk


def _cipher_chunks(source: BinaryIO) -> Iterator[bytes]:
    index = 0
    while prefix := _read_full(source, 4):
        size = int.from_bytes(prefix, "big")
        if len(prefix) != 4 or not 1 <= size <= CHUNK + OVERHEAD_MAX:
            raise InvalidTag(f"chunk {index} of the stream is malformed")
        ciphertext = _read_full(source, size)
        if len(ciphertext) != size:
            raise InvalidTag(f"chunk {index} of the stream is cut off")
        yield ciphertext
        index += 1
    if not index:
        raise InvalidTag("the stream has no chunk")


def _batches(chunks: Iterator[bytes]) -> Iterator[tuple[int, list[bytes], bool]]:
    """(index of the first, chunks, whether its last is the stream's last); one chunk is read ahead to know that."""
    first = 0
    batch: list[bytes] = []
    for chunk in chunks:
        if len(batch) == BATCH:
            yield first, batch, False
            first, batch = first + len(batch), []
        batch.append(chunk)
    yield first, batch, True


def _aads(stream_id: bytes, first: int, count: int, last: bool, associated_data: bytes) -> list[bytes]:
    return [
        LABEL
        + stream_id
        + index.to_bytes(8, "big")
        + bytes([last and index == first + count - 1])
        + bytes(associated_data)
        for index in range(first, first + count)
    ]
