"""Owns how a key becomes shares; it knows nothing of who will hold them."""

from __future__ import annotations

from engine._fastshamir import split
from engine.sharing.secret import SecretBuffer
from engine.sharing.share import Share

__all__ = ["BLINDING_BYTES", "blind", "fresh_secret", "generate_shares", "unblind"]

BLINDING_BYTES = 32

Secret = bytes | bytearray | memoryview | SecretBuffer


def generate_shares(secret: Secret, *, threshold: int, shares: int) -> list[Share]:
    """Split a secret of at least one byte into ``shares`` shares, x = 1..shares, any ``threshold`` of which suffice.

    Fewer than ``threshold`` shares say nothing about the secret (Shamir, CACM 22(11), 1979; GF(2^8), 0x11B).
    1 <= threshold <= shares <= 255, else ValueError; OSError when the system's random generator fails.
    """
    values = split(secret, threshold, shares)
    return [Share(x, y, threshold) for x, y in enumerate(values, start=1)]


def blind(key: Secret) -> SecretBuffer:
    """Make the secret that is shared: key || 32 random bytes, in locked memory. The caller closes it.

    The random bytes make the check value and the shares of a weak key useless for guessing it. OSError when there is
    no locked memory, or the system's random generator fails.
    """
    length = len(key)
    if length == 0:
        raise ValueError("the key has 0 bytes, but needs at least 1")
    secret = SecretBuffer.random(length + BLINDING_BYTES)
    memoryview(secret)[:length] = key
    return secret


def fresh_secret(length: int, mixed: bytes = b"") -> SecretBuffer:
    """A new blinded secret whose key is ``length`` random bytes that were never anywhere but in locked memory.

    The first ``length`` bytes of ``mixed``, from another random generator, are added to those of the system's: the key
    is no worse than the better of the two. ValueError if ``mixed`` is given, but shorter than the key.
    """
    if length < 1:
        raise ValueError(f"the key has {length} bytes, but needs at least 1")
    if mixed and len(mixed) < length:
        raise ValueError(f"{len(mixed)} random bytes were given for a key of {length}")
    secret = SecretBuffer.random(length + BLINDING_BYTES)
    secret.add(mixed[:length])
    return secret


def unblind(secret: SecretBuffer | bytearray) -> memoryview:
    """The key inside a reconstructed secret, as a view: wiping the secret wipes the key, and nothing is copied."""
    if len(secret) <= BLINDING_BYTES:
        raise ValueError(f"the secret has {len(secret)} bytes, but a blinded key has more than {BLINDING_BYTES}")
    return memoryview(secret)[:-BLINDING_BYTES]
