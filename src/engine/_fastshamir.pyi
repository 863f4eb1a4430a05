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
from typing import ClassVar, NoReturn, Self, SupportsIndex, final, overload

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

# --- Sums and dot products of rows, for work on shares ---

def add(ys: Sequence[Buffer]) -> bytes:
    """The sum of 1..255 rows of one length, byte by byte, in the field: exclusive or. Its time depends on sizes alone.

    Raises ValueError for another number of rows and for different lengths, TypeError for other types.
    """

def dot(ys: Sequence[Buffer], weights: Sequence[Buffer]) -> list[bytes]:
    """For each row of ``ys`` its dot products with the ``weights``, over 0x11B: ``(len(ys), len(weights)) uint8``.

    All rows and weights have one length. Its time depends on sizes alone, not on rows or weights.

    Raises ValueError for no row, more than 255 rows or 32 weights, and different lengths; TypeError for other types.
    """

# --- Memory for secrets ---

@final
class SecretBuffer:
    """A writable buffer (``(length,) uint8``, C-contiguous) in memory made for secrets, zero at first.

    Its pages are locked (never swapped), left out of core dumps, empty in a forked child, and fenced by pages that
    fault. They are overwritten when the buffer is closed or collected, and when the process ends by itself. A process
    that is killed, or ends by ``os._exit``, leaves that to the kernel, which clears pages before it gives them away.

    It is for keys: 64 bytes to some KiB. All buffers count against RLIMIT_MEMLOCK, shared 32 KiB at a time; one above
    8 KiB has pages of its own. Where the limit is too low, or the kernel refuses any of the above, OSError says so, and
    there is no buffer: no secret ever lies in memory that is not locked.

    ``len``, ``memoryview(buffer)`` and everything that takes bytes-like objects work. Comparison with any bytes-like
    object takes a time that depends on the length alone. The repr shows the length. It has no hash, and copying and
    pickling it is a TypeError. Used as a context manager it closes at the end.
    """

    def __new__(cls, length: int, /) -> Self: ...
    @staticmethod
    def copy_of(data: Buffer, /) -> SecretBuffer:
        """A new buffer with a copy of the bytes; wiping the original is the caller's."""

    @staticmethod
    def random(length: int, /) -> SecretBuffer:
        """A new buffer of ``length`` bytes of getrandom(2). OSError if that fails."""

    def add(self, data: Buffer, /) -> None:
        """Add (exclusive or) ``data`` to the first bytes; ValueError if it is longer, or overlaps the buffer."""

    def wipe(self) -> None:
        """Overwrite with zeros."""

    def close(self) -> None:
        """Overwrite with zeros and give the memory back, when the last view of it is released. Harmless again.

        After it every use is a ValueError, and views made before show zeros. The same goes for a buffer that a forked
        child has from its parent: it would read as zeros, which nobody must take for a key.
        """

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""

    def __len__(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *exception: object) -> None: ...
    def __eq__(self, other: object, /) -> bool: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __copy__(self) -> NoReturn: ...
    def __deepcopy__(self, memo: object) -> NoReturn: ...
    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...
    def __release_buffer__(self, buffer: memoryview, /) -> None: ...

def secret_memory() -> tuple[int, int]:
    """(bytes locked for secrets in this process, bytes of them given out)."""

def generator_name() -> str:
    """The generator that stretches the seed of a split; it comes with the kernel."""

def available_generators() -> tuple[str, ...]:
    """The generators that this machine can run, fastest first; the last is ``chacha20``."""

def key_stream(name: str, seed: Buffer, length: int, block: int = 0) -> bytes:
    """``length`` bytes of a generator's stream under a seed of 32 bytes, from cipher block ``block`` on. For tests.

    Cipher blocks are 16 bytes of AES-256-CTR from counter 0, or 64 of ChaCha20 with nonce 0.
    """
