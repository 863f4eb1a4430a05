"""What an AES-GCM ciphertext begins with: it says which version of the key it is of. It knows no key."""

from __future__ import annotations

from typing import Final

__all__ = ["HEADER_BYTES", "header", "version_in"]

MAGIC: Final = b"KQ\x01"
HEADER_BYTES: Final = len(MAGIC) + 4
"""``KQ``, the format 1 and the key's version (big-endian), authenticated with the data."""


def header(version: int) -> bytes:
    """The header of ciphertexts of that version of a key."""
    return MAGIC + version.to_bytes(4, "big")


def version_in(ciphertext: bytes) -> int:
    """The version that a ciphertext says it is of, unauthenticated; 0 where it has no such header."""
    if not ciphertext.startswith(MAGIC) or len(ciphertext) < HEADER_BYTES:
        return 0
    return int.from_bytes(ciphertext[len(MAGIC) : HEADER_BYTES], "big")
