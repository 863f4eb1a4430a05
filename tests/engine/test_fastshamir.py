"""Owns the proof that every kernel of the native core is right: against a slow oracle, byte by byte."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine._fastshamir import available_kernels, combine, kernel_name, split, use_kernel

KERNELS = available_kernels()
GUARD = 0xA5


# The oracle: the field by its definition (FIPS 197, section 4.2), with nothing of the core in it.


def slow_multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= 0x11B << (bit - 8)
    return product


TIMES = [bytes(slow_multiply(scalar, byte) for byte in range(256)) for scalar in range(256)]
INVERSE = [0, *(TIMES[a].index(1) for a in range(1, 256))]


def exclusive_or(rows: Sequence[bytes]) -> bytes:
    total = reduce(lambda a, b: a ^ b, (int.from_bytes(row) for row in rows))
    return total.to_bytes(len(rows[0]))


def lagrange(xs: Sequence[int], target: int) -> list[int]:
    scalars = [1] * len(xs)
    for j, x in enumerate(xs):
        for m in xs:
            if m != x:
                scalars[j] = TIMES[TIMES[scalars[j]][target ^ m]][INVERSE[x ^ m]]
    return scalars


def slow_combine(xs: Sequence[int], ys: Sequence[bytes], target: int = 0) -> bytes:
    return exclusive_or([y.translate(TIMES[scalar]) for scalar, y in zip(lagrange(xs, target), ys, strict=True)])


@pytest.fixture(autouse=True, params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on every kernel that this machine has."""
    assert use_kernel(request.param) == request.param == kernel_name()
    yield request.param
    use_kernel()


# The field and the interpolation.


def test_the_example_of_fips_197() -> None:
    """{57} * {13} = {fe}: at x = 0xfb the scalar of the first share of x = 1, 2 is 0x57."""
    assert lagrange([1, 2], 0xFB)[0] == 0x57
    assert combine([1, 2], [b"\x13", b"\x00"], 0xFB) == b"\xfe"


def test_the_polynomial_is_0x11b() -> None:
    """2 * 0x80 = 0x1b; it would be 0x1d in the field of libgfshare and ISA-L."""
    assert combine([1, 2], [b"\x80", b"\x00"], 4) == b"\x1b"


def test_a_known_sharing() -> None:
    """f(x) = 0x42 + 0x57 x + 0x13 x^2 at x = 1, 2, 3, worked out by hand from FIPS 197's rules."""
    ys = [bytes([0x42 ^ 0x57 ^ 0x13]), bytes([0x42 ^ 0xAE ^ 0x4C]), bytes([0x42 ^ 0xF9 ^ 0x5F])]
    assert combine([1, 2, 3], ys) == b"\x42"
    assert combine([3, 1, 2], [ys[2], ys[0], ys[1]]) == b"\x42"


def test_every_scalar_times_every_byte() -> None:
    """With x = 1, 2 the scalars of the targets 0..255 run through the whole field; both rows are checked."""
    all_bytes, zeros = bytes(range(256)), bytes(256)
    scalars = set()
    for target in range(256):
        first, second = lagrange([1, 2], target)
        scalars.add(first)
        assert combine([1, 2], [all_bytes, zeros], target) == all_bytes.translate(TIMES[first])
        assert combine([1, 2], [zeros, all_bytes], target) == all_bytes.translate(TIMES[second])
    assert len(scalars) == 256


@pytest.mark.parametrize("count", [1, 2, 3, 10])
def test_every_length_unaligned_with_guard_bytes(count: int) -> None:
    """Lengths 1..257 at all alignments modulo 17: the result is right and no byte beside it is touched."""
    xs = [255, 1, 7, 128, 2, 99, 64, 31, 200, 11][:count]
    for length in range(1, 258):
        rows = [os.urandom(length + 40) for _ in xs]
        starts = [(length + 5 * j) % 17 for j in range(count)]
        ys = [memoryview(row)[start : start + length] for row, start in zip(rows, starts, strict=True)]
        room = bytearray([GUARD]) * (length + 64)
        start = 16 + length % 17
        target = length % 256
        assert combine(xs, ys, target, out=memoryview(room)[start : start + length]) is None
        assert room[start : start + length] == slow_combine(xs, [bytes(y) for y in ys], target)
        assert room[:start] == bytes([GUARD]) * start
        assert room[start + length :] == bytes([GUARD]) * (64 - start)


@pytest.mark.parametrize("length", [1, 16, 33, 4096, 100_003])
def test_combine_of_all_255(length: int) -> None:
    """The largest set that exists, in a scrambled order, at a target among the shares and at 0."""
    xs = sorted(range(1, 256), key=lambda x: x * 73 % 257)
    ys = [os.urandom(length) for _ in xs]
    assert combine(xs, ys) == slow_combine(xs, ys)
    assert combine(xs, ys, xs[100]) == ys[100]


# Splitting.


def test_split_evaluates_every_scalar_on_every_byte() -> None:
    """For t = 2 the coefficient is y(1) + y(0); every other share must be secret + x * coefficient."""
    secret = os.urandom(16384)
    ys = split(secret, 2, 255)
    coefficient = exclusive_or([secret, ys[0]])
    assert len(set(coefficient)) == 256  # fails by chance once in 10^25
    for x, y in enumerate(ys, start=1):
        assert y == exclusive_or([secret, coefficient.translate(TIMES[x])])


@pytest.mark.parametrize(("threshold", "shares"), [(1, 1), (1, 3), (2, 2), (2, 3), (3, 5), (5, 5), (10, 16)])
def test_split_of_every_length(threshold: int, shares: int) -> None:
    """Lengths 1..257: the shares lie on polynomials of degree < t whose value at 0 is the secret."""
    for length in range(1, 258):
        secret = bytearray(os.urandom(length + 9))[length % 9 :][:length]
        ys = split(secret, threshold, shares)
        assert [len(y) for y in ys] == [length] * shares
        xs = list(range(1, threshold + 1))
        assert slow_combine(xs, ys[:threshold]) == secret
        for x in range(threshold + 1, shares + 1):
            assert slow_combine(xs, ys[:threshold], x) == ys[x - 1]


@pytest.mark.parametrize("length", [4095, 4096, 4097, 8191, 8192, 5 * 4096 + 13])
@pytest.mark.parametrize(("threshold", "shares"), [(1, 2), (3, 5), (10, 16), (40, 255)])
def test_split_across_blocks(length: int, threshold: int, shares: int) -> None:
    """The core works in blocks; the seams show nowhere, and each block has randomness of its own."""
    secret = bytes(length)
    ys = split(secret, threshold, shares)
    for start in (0, shares - threshold):
        xs = list(range(start + 1, start + threshold + 1))
        assert slow_combine(xs, ys[start : start + threshold]) == secret
    if threshold > 1 and length >= 8192:
        assert ys[0][:4096] != ys[0][4096:8192]


def test_split_at_given_indices() -> None:
    secret = os.urandom(64)
    xs = [255, 3, 77, 1]
    ys = split(secret, 3, 4, xs)
    assert slow_combine(xs[:3], ys[:3]) == secret
    assert slow_combine(xs[:3], ys[:3], 1) == ys[3]


def test_threshold_one_hands_out_the_secret() -> None:
    """A polynomial of degree 0: t = 1 is allowed and is no protection."""
    assert split(b"open", 1, 3) == [b"open"] * 3


def test_any_contiguous_buffer_is_a_secret() -> None:
    secret = os.urandom(48)
    for given in (secret, bytearray(secret), memoryview(secret), np.frombuffer(secret, np.uint8)):
        ys = split(given, 2, 2)  # type: ignore[arg-type]  # numpy declares __buffer__ from Python 3.12 on
        values: list[Any] = [bytearray(ys[0]), np.frombuffer(ys[1], np.uint8)]
        assert combine([1, 2], values) == secret


# Randomness. The bounds are fixed and so wide that a right core fails once in 10^9 runs or less.

SAMPLES = 1 << 18


def chi_square(sample: bytes) -> float:
    expected = len(sample) / 256
    counts = Counter(sample)
    return sum((counts[value] - expected) ** 2 / expected for value in range(256))


def leading_coefficient(ys: Sequence[bytes]) -> bytes:
    """Of the polynomial of degree 2 through x = 1, 2, 3: the sum of y_j / product of (x_j - x_m)."""
    scalars = [INVERSE[TIMES[1 ^ 2][1 ^ 3]], INVERSE[TIMES[2 ^ 1][2 ^ 3]], INVERSE[TIMES[3 ^ 1][3 ^ 2]]]
    return exclusive_or([y.translate(TIMES[scalar]) for scalar, y in zip(scalars, ys, strict=True)])


def test_the_leading_coefficient_is_zero_once_in_256() -> None:
    """Forced to be non-zero it leaks the secret over many sharings (RUSTSEC-2024-0398). Mean 1024, sigma 32."""
    zeros = leading_coefficient(split(os.urandom(SAMPLES), 3, 3)).count(0)
    assert 816 <= zeros <= 1232


def test_shares_and_coefficients_are_uniform() -> None:
    """Of a constant secret: each share, the leading coefficient and pairs of shares. 255 +- 23 is right."""
    secret = b"\x5a" * SAMPLES
    ys = split(secret, 3, 5)
    assert all(100 < chi_square(y) < 430 for y in ys)
    assert 100 < chi_square(leading_coefficient(ys[:3])) < 430
    for one, other in pairwise(ys):
        nibbles = bytes((a & 15) << 4 | (b & 15) for a, b in zip(one, other, strict=True))
        assert 100 < chi_square(nibbles) < 430
    neighbours = bytes((a & 15) << 4 | (b & 15) for a, b in zip(ys[0][::2], ys[0][1::2], strict=True))
    assert 100 < chi_square(neighbours) < 430


def test_two_splits_share_nothing() -> None:
    secret = bytes(32)
    first, second = split(secret, 3, 5), split(secret, 3, 5)
    assert len({*first, *second}) == 10


SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/types.h>
int calls_until_failure = -1;
ssize_t getrandom(void *buffer, size_t length, unsigned flags)
{
    if (calls_until_failure == 0) { errno = EIO; return -1; }
    if (calls_until_failure > 0) calls_until_failure--;
    return ((ssize_t (*)(void *, size_t, unsigned))dlsym(RTLD_NEXT, "getrandom"))(buffer, length, flags);
}
"""

FAILING_SPLIT = """
import ctypes, sys
from engine._fastshamir import split
control = ctypes.c_int.in_dll(ctypes.CDLL(sys.argv[1]), "calls_until_failure")
length = int(sys.argv[2])
out = bytearray(b"x" * 5 * length)
control.value = 0
try:
    split(b"s" * length, 3, 5, out=out)
except OSError as error:
    outcome = repr((error.errno, str(error)))
else:
    outcome = repr("split succeeded")
control.value = -1
assert out == bytes(5 * length)
print(outcome)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the failing getrandom")
@pytest.mark.parametrize("length", [1, 32, 300, 3 * 4096])
def test_without_randomness_there_is_no_share(tmp_path: Path, kernel: str, length: int) -> None:
    """A getrandom that fails ends the split and leaves zeros: there is no second source."""
    library = tmp_path / "shim.so"
    (tmp_path / "shim.c").write_text(SHIM)
    compiler = ["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "shim.c"), "-ldl"]
    subprocess.run(compiler, check=True, timeout=60)
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    done = subprocess.run(
        [sys.executable, "-c", FAILING_SPLIT, str(library), str(length)],
        env={**os.environ, "LD_PRELOAD": preload, "KEYQUORUM_KERNEL": kernel},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    number, text = ast.literal_eval(done.stdout)
    assert number == 5
    assert "getrandom gave no random coefficients" in text


# What is refused.

Call = Callable[[], object]
VALUE_ERRORS: list[tuple[Call, str]] = [
    (lambda: split(b"", 1, 1), "the secret has 0 bytes, but needs at least 1"),
    (lambda: split(b"s", 0, 5), r"the threshold is 0, but must be in 1\.\.5"),
    (lambda: split(b"s", 6, 5), r"the threshold is 6, but must be in 1\.\.5"),
    (lambda: split(b"s", -1, 5), r"the threshold is -1, but must be in 1\.\.5"),
    (lambda: split(b"s", 1, 0), r"the number of shares is 0, but must be in 1\.\.255"),
    (lambda: split(b"s", 1, 256), r"the number of shares is 256, but must be in 1\.\.255"),
    (lambda: split(b"s", 2**80, 5), rf"the threshold is {2**80}, but must be in 1\.\.5"),
    (lambda: split(b"s", 1, 2**80), rf"the number of shares is {2**80}, but must be in 1\.\.255"),
    (lambda: split(b"s", 1, 2, [0, 1]), r"share index x is 0, but must be in 1\.\.255"),
    (lambda: split(b"s", 1, 2, [1, 256]), r"share index x is 256, but must be in 1\.\.255"),
    (lambda: split(b"s", 1, 2, [7, 7]), "x = 7 twice"),
    (lambda: split(b"s", 1, 3, [1, 2]), "xs holds 2 indices, but 3 shares are asked for"),
    (lambda: split(b"s", 1, 255, range(1, 300)), "xs holds 299 indices, but at most 255"),
    (lambda: combine([], []), "0 shares were given, but at least 1 is needed"),
    (lambda: combine([0], [b"s"]), r"share index x is 0, but must be in 1\.\.255"),
    (lambda: combine([256], [b"s"]), r"share index x is 256, but must be in 1\.\.255"),
    (lambda: combine([-1], [b"s"]), r"share index x is -1, but must be in 1\.\.255"),
    (lambda: combine([3, 3], [b"s", b"s"]), "x = 3 twice"),
    (lambda: combine([1, 2], [b"s"]), "2 share indices and 1 values"),
    (lambda: combine([1, 2], [b"s", b"st"]), "x = 2 has 2 bytes, but that of x = 1 has 1"),
    (lambda: combine([1, 2], [b"s", b""]), "x = 2 has 0 bytes, but that of x = 1 has 1"),
    (lambda: combine([1], [b""]), "the shares have 0 bytes, but need at least 1"),
    (lambda: combine([1], [b"s"], 256), r"the target x is 256, but must be in 0\.\.255"),
    (lambda: combine([1], [b"s"], -1), r"the target x is -1, but must be in 0\.\.255"),
    (lambda: combine([1], [b"s"], out=bytearray(2)), "out has 2 bytes, but the shares have 1"),
    (lambda: combine([1], [b"s"], out=bytearray()), "out has 0 bytes, but the shares have 1"),
    (lambda: use_kernel("abacus"), "no kernel 'abacus' on this machine, but only: .*portable"),
]

TYPE_ERRORS: list[tuple[Call, str]] = [
    (lambda: split("s", 1, 1), "the secret must be a C-contiguous bytes-like object, not str"),  # type: ignore[arg-type]
    (lambda: split(b"s", 1.0, 1), "the threshold must be an int, not float"),  # type: ignore[arg-type]
    (lambda: split(b"s", 1, "1"), "the number of shares must be an int, not str"),  # type: ignore[arg-type]
    (lambda: split(b"s", 1, 1, 1), "not iterable"),  # type: ignore[arg-type]
    (lambda: split(b"s", 1, 1, ["1"]), "a share index x must be an int, not str"),  # type: ignore[list-item]
    (lambda: split(memoryview(b"secret")[::2], 1, 1), "must be a C-contiguous bytes-like object"),
    (lambda: combine([1.0], [b"s"]), "a share index x must be an int, not float"),  # type: ignore[list-item]
    (lambda: combine([1], ["s"]), "a share must be a C-contiguous bytes-like object, not str"),  # type: ignore[list-item]
    (lambda: combine([1], b"s"), "a share must be a C-contiguous bytes-like object, not int"),  # type: ignore[arg-type]
    (lambda: combine([1], [b"s"], None), "the target x must be an int, not NoneType"),  # type: ignore[call-overload]
    (lambda: combine([1], [b"s"], out=b"t"), "out must be a C-contiguous writable bytes-like object, not bytes"),
    (lambda: combine([1], [b"s"], out=3), "out must be a C-contiguous writable bytes-like object, not int"),  # type: ignore[call-overload]
    (lambda: use_kernel(3), "the kernel's name must be str or None, not int"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "text"), VALUE_ERRORS, ids=[text for _, text in VALUE_ERRORS])
def test_bad_values_are_named_with_their_limit(call: Call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), TYPE_ERRORS, ids=[text for _, text in TYPE_ERRORS])
def test_bad_types_are_named(call: Call, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


def test_out_must_be_apart_from_the_shares() -> None:
    """A kernel may read a row after writing the result, so an overlap would give garbage."""
    room = bytearray(range(1, 9))
    view = memoryview(room)
    for start in range(5):
        with pytest.raises(ValueError, match=r"out overlaps the share of x = 2"):
            combine([1, 2], [b"abcd", view[start : start + 4]], out=view[2:6])
    assert room == bytes(range(1, 9))
    combine([1, 2], [view[:4], b"\0\0\0\0"], 1, out=view[4:])
    assert room == bytes([1, 2, 3, 4, 1, 2, 3, 4])


def test_buffers_are_given_back() -> None:
    """After success and after each kind of failure the bytearrays can be resized again: no export is left open."""
    one, two, out = bytearray(b"ab"), bytearray(b"cd"), bytearray(2)
    combine([1, 2], [one, two], out=out)
    bad: list[list[Any]] = [[one, two, two], [one, b"x"], [one, "x"], [one, two]]
    for ys in bad:
        with pytest.raises((ValueError, TypeError)):
            combine([1, 2], ys, out=bytearray(7))
    split(one, 2, 3)
    for buffer in (one, two, out):
        buffer.append(0)


def test_no_references_leak() -> None:
    one, two, xs = os.urandom(8), os.urandom(8), [1, 2]
    before = [sys.getrefcount(item) for item in (one, two, xs)]
    for _ in range(100):
        ys = split(one, 2, 3)
        combine(xs, [one, two])
    assert [sys.getrefcount(item) for item in (one, two, xs)] == before
    made_by_python = [os.urandom(8) for _ in range(3)]
    assert [sys.getrefcount(y) for y in ys] == [sys.getrefcount(y) for y in made_by_python]


def test_an_index_whose_conversion_changes_the_list() -> None:
    """An __index__ with a side effect can't make the core read beyond the caller's list."""

    class Shrinking:
        def __index__(self) -> int:
            del xs[1:]
            return 1

    xs: list[Any] = [Shrinking(), 2, 3]
    assert combine(xs, [b"a", b"a", b"a"]) == b"a"
    assert len(xs) == 1


def test_threads_do_not_disturb_each_other() -> None:
    """Sizes at which the core works without the interpreter's lock."""
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(10):
            secret = os.urandom(50_000 + number)
            ys = split(secret, 3, 5)
            if combine([5, 2, 4], [ys[4], ys[1], ys[3]]) != secret:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# The dispatch.


def test_the_portable_kernel_is_always_there_and_last() -> None:
    assert KERNELS[-1] == "portable"
    assert len(set(KERNELS)) == len(KERNELS)


def test_the_fastest_kernel_is_the_default() -> None:
    assert use_kernel() == KERNELS[0] == kernel_name()


def run_with_kernel(name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import engine._fastshamir as core; print(core.kernel_name())"],
        env={**os.environ, "KEYQUORUM_KERNEL": name},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_environment_forces_a_kernel(kernel: str) -> None:
    assert run_with_kernel(kernel).stdout.strip() == kernel


def test_a_kernel_that_is_not_there_is_no_import() -> None:
    """An operator who forces a kernel must not silently get another one."""
    done = run_with_kernel("abacus")
    assert done.returncode == 1
    assert "ImportError: KEYQUORUM_KERNEL: there is no kernel 'abacus'" in done.stderr
