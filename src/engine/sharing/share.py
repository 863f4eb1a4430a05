"""Owns what a share is and the hashes that bind it to its key; it knows nothing of nodes, manifests or messages.

A commitment is SHA-256 over (label, salt, context, share). It names a wrong share, but does not show the share: the
salt is random and stays inside the sealed share, so a commitment is no oracle for a guessed one.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from engine.sharing.secret import SecretBuffer

__all__ = ["SALT_BYTES", "SecretShare", "Share", "check_value", "commitment", "distinct", "new_salt"]

SALT_BYTES = 32

# The labels keep the two hashes apart from each other and from any other SHA-256 in the project.
_COMMITMENT_LABEL = b"keyquorum/commitment/1\0"
_CHECK_VALUE_LABEL = b"keyquorum/check-value/1\0"


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The value of the secret polynomials at one index.

    ``x`` is the index in 1..255 (0 is where the secret lies and is refused), ``y`` the value: as many bytes as the
    secret, at least one. The value is secret: the repr hides it and comparison takes a time that does not depend on it.
    ``threshold`` is how many shares give the secret back, where that is known (else 0); it is public and no part of the
    share's identity.
    """

    x: int
    y: bytes
    threshold: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.x, int):
            raise TypeError(f"the share index x must be an int, not {type(self.x).__name__}")
        if not isinstance(self.y, bytes):
            raise TypeError(f"the share's value y must be bytes, not {type(self.y).__name__}")
        if not 1 <= self.x <= 255:
            raise ValueError(f"the share index x is {self.x}, but must be in 1..255")
        if not 0 <= self.threshold <= 255:
            raise ValueError(f"the threshold of the share of x = {self.x} is {self.threshold}, but must be in 0..255")
        if not self.y:
            raise ValueError(f"the share of x = {self.x} has 0 bytes, but needs at least 1")

    def __repr__(self) -> str:
        return f"Share(x={self.x}, y=<{len(self.y)} bytes>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Share):
            return NotImplemented
        return self.x == other.x and hmac.compare_digest(self.y, other.y)

    def __hash__(self) -> int:
        return hash((Share, self.x, len(self.y)))


@dataclass(frozen=True, slots=True, eq=False)
class SecretShare:
    """A share whose value lies in locked memory, which ``close`` wipes and gives back; else as ``Share``."""

    x: int
    y: SecretBuffer
    threshold: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.x <= 255:
            raise ValueError(f"the share index x is {self.x}, but must be in 1..255")

    def __repr__(self) -> str:
        return f"SecretShare(x={self.x}, y={self.y!r})"

    def close(self) -> None:
        """Wipe the value and give its memory back; harmless when repeated."""
        self.y.close()


def distinct(share_set: Iterable[Share]) -> list[Share]:
    """The shares as a list: at least one, each index once; ValueError or TypeError otherwise."""
    given = list(share_set)
    if not given:
        raise ValueError("0 shares were given, but at least 1 is needed")
    seen: set[int] = set()
    for share in given:
        if not isinstance(share, Share):
            raise TypeError(f"a share must be a Share, not {type(share).__name__}")
        if share.x in seen:
            raise ValueError(f"two shares have the index x = {share.x}, but each must be given once")
        seen.add(share.x)
    return given


def new_salt() -> bytes:
    """A fresh random commitment salt of ``SALT_BYTES`` bytes, one for each share."""
    return os.urandom(SALT_BYTES)


def commitment(salt: bytes, context: bytes, share: Share | SecretShare) -> bytes:
    """The 32-byte commitment to a share: SHA-256(label, |salt|, salt, |context|, context, x, y).

    ``salt`` has ``SALT_BYTES`` bytes. ``context`` is the caller's encoding of key id, version and epoch, so that a
    share of another epoch never passes. Lengths are four bytes, big-endian; x is one byte; y is the rest.
    """
    if len(salt) != SALT_BYTES:
        raise ValueError(f"a commitment salt has {len(salt)} bytes, but must have {SALT_BYTES}")
    state = sha256(_COMMITMENT_LABEL)
    for part in (salt, context):
        state.update(len(part).to_bytes(4, "big"))
        state.update(part)
    state.update(bytes([share.x]))
    state.update(share.y)
    return state.digest()


def check_value(secret: bytes | bytearray | memoryview | SecretBuffer, context: bytes) -> bytes:
    """The 32-byte check value of a shared secret: SHA-256(label, |context|, context, secret).

    It tells a right reconstruction from a wrong one. ``secret`` is key || 32 random bytes (``dealer.blind``): without
    the random bytes the check value of a weak imported key could be guessed.
    """
    state = sha256(_CHECK_VALUE_LABEL)
    state.update(len(context).to_bytes(4, "big"))
    state.update(context)
    state.update(secret)
    return state.digest()
