"""Owns how a key becomes shares; it knows nothing of who will hold them."""

from __future__ import annotations

import os

from engine._fastshamir import split
from engine.sharing.share import Share

__all__ = ["BLINDING_BYTES", "blind", "generate_shares", "unblind"]

BLINDING_BYTES = 32


def generate_shares(secret: bytes | bytearray | memoryview, *, threshold: int, shares: int) -> list[Share]:
    """Split a secret of at least one byte into ``shares`` shares, x = 1..shares, any ``threshold`` of which suffice.

    Fewer than ``threshold`` shares say nothing about the secret (Shamir, CACM 22(11), 1979; GF(2^8), 0x11B).
    1 <= threshold <= shares <= 255, else ValueError; OSError when the system's random generator fails.
    """
    values = split(secret, threshold, shares)
    return [Share(x, y) for x, y in enumerate(values, start=1)]


def blind(key: bytes | bytearray | memoryview) -> bytearray:
    """Make the secret that is shared: key || 32 random bytes. The caller wipes it.

    The random bytes make the check value and the shares of a weak key useless for guessing it.
    """
    if len(key) == 0:
        raise ValueError("the key has 0 bytes, but needs at least 1")
    secret = bytearray(len(key) + BLINDING_BYTES)  # made at its full size: growing would leave a copy behind
    secret[: len(key)] = key
    secret[len(key) :] = os.urandom(BLINDING_BYTES)
    return secret


def unblind(secret: bytearray) -> memoryview:
    """The key inside a reconstructed secret, as a view: wiping the secret wipes the key, and nothing is copied."""
    if len(secret) <= BLINDING_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, but a blinded key has more than {BLINDING_BYTES}")
    return memoryview(secret)[:-BLINDING_BYTES]
