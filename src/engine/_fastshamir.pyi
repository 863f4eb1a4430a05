"""The native core: Shamir's secret sharing over GF(2^8) in constant time.

Source: A. Shamir, "How to share a secret", CACM 22(11), 1979; docs/shamir.md tells how it is done here. Only
``engine.sharing`` imports it. Constant time means that neither a branch nor an address depends on a secret or a share's
value; indices, counts and lengths are public.

All functions take any C-contiguous buffer (bytes, bytearray, memoryview, numpy) and an ``out`` that is writable, apart
from all that is read, and is either flat or has exactly the shape that is told; then they return None and make no copy
of a secret that can't be wiped. ``poly`` is the field: 0x11B (FIPS 197, Vault, SLIP-39) or 0x11D (libgfshare). Above
64 KiB of rows the interpreter's lock is given away; nobody may change the buffers meanwhile.
"""

from collections.abc import Sequence
from typing import overload

from typing_extensions import Buffer

@overload
def split(
    secret: Buffer, threshold: int, shares: int, xs: Sequence[int] | None = None, *, out: None = None, poly: int = 0x11B
) -> list[bytes]: ...
@overload
def split(
    secret: Buffer, threshold: int, shares: int, xs: Sequence[int] | None = None, *, out: Buffer, poly: int = 0x11B
) -> None:
    """Split ``secret`` (``length`` bytes) into ``shares`` values of ``length`` bytes, in the order of ``xs``.

    ``xs`` are the share indices, 1..shares by default; ``out`` has the shape ``(shares, length)``. Any ``threshold`` of
    the values give the secret back, fewer say nothing about it: the values at the first ``threshold`` - 1 indices are
    uniform random bytes, from one getrandom(2) call, stretched by AES-256-CTR or ChaCha20 where they are more than 32.

    Raises ValueError for a threshold outside 1..shares, shares outside 1..255, an index outside 1..255 or given twice,
    an ``xs`` of another length than ``shares``, an empty secret, another ``poly``, and an ``out`` of another shape or
    that overlaps the secret; TypeError for other types; OSError when the random generator fails (then no share exists,
    and ``out`` is zero).
    """

@overload
def split_many(
    secrets: Sequence[Buffer] | Buffer,
    threshold: int,
    shares: int,
    xs: Sequence[int] | None = None,
    *,
    out: None = None,
    poly: int = 0x11B,
) -> list[bytes]: ...
@overload
def split_many(
    secrets: Sequence[Buffer] | Buffer,
    threshold: int,
    shares: int,
    xs: Sequence[int] | None = None,
    *,
    out: Buffer,
    poly: int = 0x11B,
) -> None:
    """Split ``count`` secrets of one ``length`` in one go: a buffer of shape ``(count, length)``, or a list of them.

    The result is one row of ``count * length`` bytes for each holder, in the order of ``xs``: the share of secret i
    lies at ``[i * length : (i + 1) * length]``. ``out`` has the shape ``(shares, count, length)``. Errors as of
    ``split``, and ValueError for no secret and different lengths.
    """

@overload
def combine(
    xs: Sequence[int], ys: Sequence[Buffer], target: int = 0, *, out: None = None, poly: int = 0x11B
) -> bytes: ...
@overload
def combine(xs: Sequence[int], ys: Sequence[Buffer], target: int = 0, *, out: Buffer, poly: int = 0x11B) -> None:
    """Interpolate the polynomial of degree < len(xs) through (xs[j], ys[j]) at ``target`` (0: the secret).

    All ``ys`` have the same length, and so has ``out``: a bytearray can be wiped, ``bytes`` cannot. A wrong or foreign
    share gives a wrong result without a sign; ``engine.sharing`` has the checks.

    Raises ValueError for no share, an index outside 1..255 or given twice, a target outside 0..255, different lengths,
    empty values, another ``poly``, and an ``out`` of another length or that overlaps a share; TypeError for other
    types, a read-only ``out`` and buffers that are not contiguous.
    """

@overload
def combine_many(
    xs: Sequence[int], ys: Sequence[Buffer], count: int, target: int = 0, *, out: None = None, poly: int = 0x11B
) -> list[bytes]: ...
@overload
def combine_many(
    xs: Sequence[int], ys: Sequence[Buffer], count: int, target: int = 0, *, out: Buffer, poly: int = 0x11B
) -> None:
    """Interpolate ``count`` polynomials at once: from rows that ``split_many`` made to the list of the secrets.

    Each of ``ys`` has ``count * length`` bytes; ``out`` has the shape ``(count, length)``. Errors as of ``combine``,
    and ValueError for rows that can't be cut into ``count`` equal parts.
    """

@overload
def interpolate(
    xs: Sequence[int], ys: Sequence[Buffer], targets: Sequence[int], *, out: None = None, poly: int = 0x11B
) -> list[bytes]: ...
@overload
def interpolate(
    xs: Sequence[int], ys: Sequence[Buffer], targets: Sequence[int], *, out: Buffer, poly: int = 0x11B
) -> None:
    """As ``combine`` at several targets (1..256 of them, each 0..255) in one pass over ``ys``.

    ``out`` has the shape ``(len(targets), length)``.
    """

def kernel_name() -> str:
    """The kernel in force: the fastest that the machine can run, or the one that KEYQUORUM_KERNEL named at import."""

def available_kernels() -> tuple[str, ...]:
    """The kernels that this machine can run, fastest first; the last is ``portable``."""

def use_kernel(name: str | None = None) -> str:
    """Put a kernel in force for the whole process (None: the fastest) and return its name. For tests and benches.

    Raises ValueError for a name that is not among ``available_kernels()``.
    """

def generator_name() -> str:
    """The generator that stretches the seed of a split; it comes with the kernel."""

def available_generators() -> tuple[str, ...]:
    """The generators that this machine can run, fastest first; the last is ``chacha20``."""

def key_stream(name: str, seed: Buffer, length: int, block: int = 0) -> bytes:
    """``length`` bytes of a generator's stream under a seed of 32 bytes, from cipher block ``block`` on. For tests.

    Cipher blocks are 16 bytes of AES-256-CTR from counter 0, or 64 of ChaCha20 with nonce 0.
    """
