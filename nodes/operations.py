"""One use of a loaded key: checks of the request against the algorithm, the ciphertext's header, the token's call."""

from __future__ import annotations

import hashlib
from typing import Final

from engine.keys import Algorithm, KeyKind, RequestType
from engine.protocol.ciphertext import header
from engine.protocol.requests import Operate
from engine.protocol.wire import MAX_DATA, MAX_MESSAGE
from nodes.token import Lane, LoadedKey, Use

__all__ = ["bound", "check_operation", "most_data"]

OAEP_OVERHEAD: Final = 66
"""Bytes of an RSA block that OAEP with SHA-256 takes (RFC 8017, 7.1.1)."""


def check_operation(algo: Algorithm, verb: str, body: Operate) -> None:
    """Refuse what the algorithm can't do and sizes beyond the limits; ``ValueError`` names both."""
    if verb not in algo.operations:
        able = ", ".join(sorted(algo.operations))
        raise ValueError(f"{verb} is no operation of {algo.name}; it has {able}")
    if verb != RequestType.DECRYPT and len(body.data) > MAX_DATA:
        raise ValueError(f"{len(body.data)} bytes of data, the limit of one request is {MAX_DATA}")
    if algo.kind is not KeyKind.AES and body.associated_data:
        raise ValueError(f"{algo.name} takes no associated data")
    if len(body.data) > most_data(algo, verb):
        raise ValueError(f"{len(body.data)} bytes of data, {algo.name} takes {most_data(algo, verb)}")
    if body.digested and not algo.prehashed:
        raise ValueError(f"{algo.name} takes the message, not a digest")


def most_data(algo: Algorithm, verb: str) -> int:
    """Bytes of data that a use may come with; a ciphertext is as long as its message lets it be."""
    if verb == RequestType.DECRYPT:
        return MAX_MESSAGE
    if algo.kind is KeyKind.RSA and verb == RequestType.ENCRYPT:
        return algo.bits // 8 - OAEP_OVERHEAD
    return MAX_DATA


def bound(lane: Lane, key: LoadedKey, verb: str, version: int, *, digested: bool) -> Use:
    """What does such uses of a key, given data, associated data and proof; the empty result is a yes."""
    algo = key.algorithm
    hashes = verb in (RequestType.SIGN, RequestType.VERIFY) and algo.prehashed and not digested
    return lane.use(
        key,
        verb,
        _header(algo, version),
        getattr(hashlib, algo.hash_name) if hashes else None,
        f"the ciphertext does not begin with the header of format 1 and key version {version}",
    )


def _header(algo: Algorithm, version: int) -> bytes:
    """The header of an AES-GCM ciphertext; RSA-OAEP's stays bare, as other implementations give and take it."""
    return header(version) if algo.kind is KeyKind.AES else b""
