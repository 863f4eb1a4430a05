"""Owns the memory that whole keys and opened shares lie in. It knows nothing of what they are for.

Python's ``bytes`` can be neither locked nor wiped, so a key that is used is a ``SecretBuffer``: see its documentation
in the native core for what it promises. It is input and output of everything in ``engine.sharing``.
"""

from __future__ import annotations

from engine._fastshamir import SecretBuffer, secret_memory

__all__ = ["SecretBuffer", "secret_memory", "take", "wipe"]


def take(source: bytearray | memoryview) -> SecretBuffer:
    """A secret buffer with the contents of ``source``, which is wiped, also when there is no memory for the buffer."""
    try:
        return SecretBuffer.copy_of(source)
    finally:
        wipe(source)


def wipe(buffer: bytearray | memoryview | SecretBuffer) -> None:
    """Overwrite a buffer with zeros in place. (``bytes`` can't be wiped: keep secrets in a SecretBuffer.)"""
    # A slice assignment of the same length is one memcpy into the same memory, also while views of it are open.
    view = memoryview(buffer)
    view[:] = bytes(len(view))
