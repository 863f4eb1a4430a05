"""Owns the proof that the core's batches, buffers, fields and generators do what their contracts say, on any kernel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._fastshamir import (
    available_generators,
    available_kernels,
    combine,
    combine_many,
    generator_name,
    interpolate,
    kernel_name,
    key_stream,
    split,
    split_many,
    use_kernel,
)

KERNELS = available_kernels()
POLYNOMIALS = [0x11B, 0x11D]
LENGTHS = [1, 31, 32, 33, 255, 256, 257, 511, 512, 513, 4096, 5000]


def slow_multiply(a: int, b: int, polynomial: int) -> int:
    product = 0
    for bit in range(8):
        if b >> bit & 1:
            product ^= a << bit
    for bit in range(14, 7, -1):
        if product >> bit & 1:
            product ^= polynomial << (bit - 8)
    return product


TIMES = {p: [bytes(slow_multiply(a, b, p) for b in range(256)) for a in range(256)] for p in POLYNOMIALS}


def slow_combine(xs: list[int], ys: list[bytes], target: int, polynomial: int) -> bytes:
    """Lagrange's formula, one share after the other."""
    times = TIMES[polynomial]
    total = 0
    for x, y in zip(xs, ys, strict=True):
        scalar = 1
        for m in xs:
            if m != x:
                scalar = times[times[scalar][target ^ m]][times[x ^ m].index(1)]
        total ^= int.from_bytes(y.translate(times[scalar]))
    return total.to_bytes(len(ys[0]))


@pytest.fixture(autouse=True, scope="module", params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here runs on every kernel that this machine has."""
    assert use_kernel(request.param) == request.param == kernel_name()
    yield request.param
    use_kernel()


# Fields.


@pytest.mark.parametrize("poly", POLYNOMIALS)
def test_every_scalar_times_every_byte(poly: int) -> None:
    """With x = 1, 2 the scalars of the targets 0..255 run through the whole field."""
    all_bytes, zeros = bytes(range(256)), bytes(256)
    for target in range(256):
        expected = slow_combine([1, 2], [all_bytes, zeros], target, poly)
        assert combine([1, 2], [all_bytes, zeros], target, poly=poly) == expected


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_any_threshold_of_the_shares_gives_the_secret_and_every_other_share(kernel: str, data: st.DataObject) -> None:
    """Shares lie on one polynomial of degree < t, in either field, wherever they begin in memory."""
    poly = data.draw(st.sampled_from(POLYNOMIALS))
    shares = data.draw(st.integers(1, 24))
    threshold = data.draw(st.integers(1, shares))
    xs = data.draw(st.lists(st.integers(1, 255), min_size=shares, max_size=shares, unique=True))
    length = data.draw(st.sampled_from(LENGTHS))
    start = data.draw(st.integers(0, 65))
    secret = os.urandom(length + start)[start:]
    room = np.zeros(shares * length + start, np.uint8)
    out = room[start:].reshape(shares, length)
    assert split(secret, threshold, shares, xs, out=out, poly=poly) is None  # type: ignore[call-overload]
    chosen = data.draw(st.permutations(range(shares)))[:threshold]
    some_xs, some_ys = [xs[j] for j in chosen], [bytes(out[j]) for j in chosen]
    assert combine(some_xs, some_ys, poly=poly) == secret
    assert interpolate(some_xs, some_ys, xs, poly=poly) == [bytes(row) for row in out]
    assert slow_combine(some_xs, some_ys, xs[-1], poly) == bytes(out[-1])


@pytest.mark.parametrize("length", [255, 256, 1000, 5000])
@pytest.mark.parametrize("threshold", [1, 2, 3])
def test_shares_that_are_sums_of_others(threshold: int, length: int) -> None:
    """Up to t = 3 some kernels add shares instead of multiplying; all 255 shares are right."""
    secret = os.urandom(length)
    ys = split(secret, threshold, 255)
    xs = list(range(1, threshold + 1))
    for x in range(threshold + 1, 256):
        assert ys[x - 1] == slow_combine(xs, ys[:threshold], x, 0x11B)
    assert slow_combine(xs, ys[:threshold], 0, 0x11B) == secret


@pytest.mark.parametrize("threshold", [2, 3, 4])
@pytest.mark.parametrize("others", range(1, 10))
def test_few_shares_of_every_length_around_the_steps(threshold: int, others: int) -> None:
    """The loops that draw and multiply at once, for each small number of computed shares, and their rests."""
    shares = threshold - 1 + others
    xs = list(range(shares + 1, 1, -1))
    for length in (255, 256, 257, 511, 512, 513, 1023, 1025, 3000):
        secret = os.urandom(length)
        ys = split(secret, threshold, shares, xs)
        points = [0, *xs[: threshold - 1]], [secret, *ys[: threshold - 1]]
        assert len({y[-8:] for y in ys[: threshold - 1]}) == threshold - 1
        for j in range(threshold - 1, shares):
            assert ys[j] == slow_combine(*points, xs[j], 0x11B)


@pytest.mark.parametrize("poly", POLYNOMIALS)
@pytest.mark.parametrize("shares", range(2, 10))
def test_the_usual_indices_at_every_length_around_the_steps(shares: int, poly: int) -> None:
    """Shares 1, 2, 3 .. of any threshold: where some are sums of others, every vector and every rest is one."""
    for threshold in range(2, shares + 1):
        for length in (1, 255, 256, 257, 319, 320, 384, 400, 511, 512, 513, 767, 1025, 3000):
            secret = os.urandom(length)
            ys = split(secret, threshold, shares, poly=poly)
            points = [0, *range(1, threshold)], [secret, *ys[: threshold - 1]]
            for x in range(threshold, shares + 1):
                assert ys[x - 1] == slow_combine(*points, x, poly)
            assert interpolate([*range(1, threshold + 1)], ys[:threshold], [0, shares], poly=poly) == [secret, ys[-1]]


@pytest.mark.parametrize("poly", POLYNOMIALS)
def test_interpolation_at_what_looks_like_sums(poly: int) -> None:
    """With a, b, c given: a + b + c, e, e + a + b, e + a + c, and what differs from that in one place."""
    ys = [os.urandom(400) for _ in range(3)]
    for xs in ([1, 2, 3], [2, 1, 3], [1, 2, 4], [8, 16, 32]):
        a, b, c = xs
        for e in (4, 7, 99, 255):
            right = [a ^ b ^ c, e, e ^ a ^ b, e ^ a ^ c]
            for count in (2, 3, 4):
                for wrong in range(count + 1):
                    targets = [x ^ 64 * (j == wrong) for j, x in enumerate(right[:count])]
                    expected = [slow_combine(xs, ys, target, poly) for target in targets]
                    assert interpolate(xs, ys, targets, poly=poly) == expected
            swapped = [right[0], right[1], right[3], right[2]]
            assert interpolate(xs, ys, swapped, poly=poly) == [slow_combine(xs, ys, x, poly) for x in swapped]


def test_all_255_shares_with_the_largest_matrix() -> None:
    secret = os.urandom(5000)
    ys = split(secret, 128, 255)
    xs = list(range(100, 228))
    assert combine(xs, ys[99:227]) == secret
    assert interpolate(xs, ys[99:227], range(256))[1:] == ys


# Large rows, which are written around the caches.


@pytest.mark.parametrize("starts", [(0, 0), (5, 5), (1, 2)])
def test_large_rows(starts: tuple[int, int]) -> None:
    """Rows of more than 24 MiB together, whether or not they begin alike; the bytes beside them stay."""
    length = 9_000_001
    secret = np.random.default_rng(1).integers(0, 256, length, np.uint8)
    rooms = [np.full(length + 128, 0xA5, np.uint8) for _ in range(2)]
    rows = [room[64 + start : 64 + start + length] for room, start in zip(rooms, starts, strict=True)]
    out = np.full(3 * length + 128, 0xA5, np.uint8)
    split(secret, 2, 3, out=out[64:-64])  # type: ignore[call-overload]
    assert (out[:64] == 0xA5).all()
    assert (out[-64:] == 0xA5).all()
    ys = [bytearray(out[64 + j * length : 64 + (j + 1) * length]) for j in range(3)]
    for row, xs in zip(rows, ([1, 3], [2, 3]), strict=True):
        combine(xs, [ys[x - 1] for x in xs], out=row)  # type: ignore[call-overload]
        assert (row == secret).all()
    for room, start in zip(rooms, starts, strict=True):
        assert (room[: 64 + start] == 0xA5).all()
        assert (room[64 + start + length :] == 0xA5).all()


@pytest.mark.parametrize("start", [0, 5])
def test_large_rows_that_are_sums_of_others(start: int) -> None:
    """With out on a cache line's start the rows go around the caches, if all of them begin alike."""
    length, xs, targets = 64 * 70_001, [1, 2, 3], [0, 4, 7, 6]
    ys = list(np.random.default_rng(2).integers(0, 256, (3, length), np.uint8))
    room = np.empty(4 * length + 128, np.uint8)
    start += -room.ctypes.data % 64
    out = room[start : start + 4 * length].reshape(4, length)
    interpolate(xs, ys, targets, out=out)  # type: ignore[arg-type, call-overload]
    values = [y.tobytes() for y in ys]
    for target, row in zip(targets, out, strict=True):
        assert row.tobytes() == slow_combine(xs, values, target, 0x11B)


# Batches and buffers.


def test_a_batch_is_the_same_sharing_of_each_secret() -> None:
    """An array and a list give rows by holder; each secret comes back from its places in them."""
    secrets = [os.urandom(32) for _ in range(100)]
    array = np.frombuffer(b"".join(secrets), np.uint8).reshape(100, 32)
    for given_secrets in (array, secrets, tuple(map(bytearray, secrets))):
        rows = split_many(given_secrets, 3, 5, [9, 8, 7, 6, 5])  # type: ignore[arg-type]
        assert [len(row) for row in rows] == [3200] * 5
        for i, secret in enumerate(secrets):
            assert combine([5, 9, 7], [rows[j][i * 32 : (i + 1) * 32] for j in (4, 0, 2)]) == secret
        assert combine_many([5, 9, 7], [rows[4], rows[0], rows[2]], 100) == secrets


def test_a_batch_into_buffers() -> None:
    """(count, length) becomes (shares, count, length), and back."""
    array = np.frombuffer(os.urandom(7 * 48), np.uint8).reshape(7, 48)
    out = np.zeros((4, 7, 48), np.uint8)
    assert split_many(array, 2, 4, out=out) is None  # type: ignore[call-overload]
    back = np.zeros((7, 48), np.uint8)
    assert combine_many([2, 4], out[[1, 3]], 7, out=back) is None  # type: ignore[call-overload]
    assert (back == array).all()


def test_out_may_be_flat_or_have_the_shape() -> None:
    secret = os.urandom(40)
    flat, view = bytearray(3 * 40), memoryview(bytearray(3 * 40)).cast("B", (3, 40))
    for out in (flat, view):
        assert split(secret, 2, 3, out=out) is None
        ys = [bytes(out)[j * 40 : (j + 1) * 40] for j in range(3)]
        assert combine([1, 3], [ys[0], ys[2]]) == secret
        assert interpolate([1, 3], [ys[0], ys[2]], [2, 0]) == [ys[1], secret]
    both = bytearray(80)
    assert interpolate([1, 3], [ys[0], ys[2]], [2, 0], out=both) is None
    assert both == ys[1] + secret


def test_buffers_are_given_back() -> None:
    """After success and after failure the bytearrays can be resized again: no export is left open."""
    secret, out = bytearray(8), bytearray(24)
    split(secret, 2, 3, out=out)
    split_many([secret, secret], 2, 3)
    for call in (
        lambda: split(secret, 2, 3, out=bytearray(23)),
        lambda: split(secret, 2, 3, out=memoryview(out)[:23]),
        lambda: split_many([secret, b"seven b"], 2, 3),
        lambda: split_many([secret, secret], 2, 3, out=out),
        lambda: combine_many([1], [secret], 3),
        lambda: combine_many([1], [secret], 2, out=out),
    ):
        with pytest.raises(ValueError, match="bytes"):
            call()
    for buffer in (secret, out):
        buffer.append(0)


Call = Callable[[], object]
ROOM = bytearray(64)
VALUE_ERRORS: list[tuple[Call, str]] = [
    (lambda: split(b"s", 1, 1, poly=0x11C), "poly is 284, but must be 0x11B or 0x11D"),
    (lambda: split(b"s", 1, 1, poly=-1), "poly is -1, but"),
    (lambda: combine([1], [b"s"], poly=2**80), f"poly is {2**80}, but"),
    (
        lambda: split(b"ab", 1, 2, out=bytearray(3)),
        r"out has 3 bytes, but needs 4 bytes or the shape \(2, 2\)",
    ),
    (lambda: split(b"ab", 1, 2, out=memoryview(bytearray(4)).cast("B", (4, 1))), r"out has the shape \(4, 1\), but"),
    (lambda: split(b"abcd", 1, 2, out=np.zeros(2, np.uint32)), r"of items of 4 bytes"),  # type: ignore[call-overload]
    (lambda: split(memoryview(ROOM)[:8], 1, 2, out=memoryview(ROOM)[7:23]), "out overlaps the secret"),
    (lambda: split_many([], 1, 1), "0 secrets were given, but at least 1 is needed"),
    (lambda: split_many([b""], 1, 1), "the secrets have 0 bytes, but need at least 1"),
    (lambda: split_many([b"ab", b"a"], 1, 1), "secret 1 has 1 bytes, but secret 0 has 2"),
    (lambda: split_many(b"flat", 1, 1), r"the shape \(4\) of items of 1 bytes, but need \(count, length\)"),
    (lambda: split_many([b"ab"], 2, 1), r"the threshold is 2, but must be in 1\.\.1"),
    (lambda: combine_many([1], [b"abc"], 2), "the shares have 3 bytes, but must be cut into 2 equally long parts"),
    (lambda: combine_many([1], [b"abc"], 0), r"the number of secrets is 0, but must be in 1\.\."),
    (lambda: interpolate([1], [b"a"], []), r"0 targets are asked for, but their number must be in 1\.\.256"),
    (lambda: interpolate([1], [b"a"], range(257)), "257 targets are asked for"),
    (lambda: interpolate([1], [b"a"], [256]), r"a target x is 256, but must be in 0\.\.255"),
    (lambda: key_stream("dice", bytes(32), 1), "there is no generator 'dice' on this machine, but only: .*chacha20"),
    (lambda: key_stream("chacha20", bytes(31), 1), "the seed has 31 bytes, but needs 32"),
]
TYPE_ERRORS: list[tuple[Call, str]] = [
    (lambda: split(b"s", 1, 1, poly="AES"), "poly must be an int, not str"),  # type: ignore[call-overload]
    (lambda: split(b"s", 1, 1, out=b"t"), "out must be a C-contiguous writable bytes-like object, not bytes"),
    (lambda: split_many(["s"], 1, 1), "a secret must be a C-contiguous bytes-like object, not str"),  # type: ignore[list-item]
    (lambda: split_many(np.zeros((4, 4), np.uint8).T[:, 1:], 1, 1), "must be a C-contiguous"),  # type: ignore[arg-type]
    (lambda: split(b"ab", 1, 2, out=np.zeros((2, 4), np.uint8)[:, :2]), "C-contiguous writable"),  # type: ignore[call-overload]
]


@pytest.mark.parametrize(("call", "text"), VALUE_ERRORS, ids=[text for _, text in VALUE_ERRORS])
def test_bad_values_are_named_with_their_limit(call: Call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), TYPE_ERRORS, ids=[text for _, text in TYPE_ERRORS])
def test_bad_types_are_named(call: Call, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


# Generators.


def expected_stream(name: str, seed: bytes, length: int, block: int = 0) -> bytes:
    """The same stream from OpenSSL."""
    if name == "chacha20":
        nonce = block.to_bytes(8, "little") + bytes(8)
        cipher: Cipher[Any] = Cipher(algorithms.ChaCha20(seed, nonce), None)
    else:
        cipher = Cipher(algorithms.AES256(seed), modes.CTR(block.to_bytes(16, "big")))
    return cipher.encryptor().update(bytes(length))


@pytest.mark.parametrize("name", available_generators())
def test_streams_are_those_of_openssl(name: str) -> None:
    """Of several seeds, at all lengths around the vectors' ends, and across a carry into the counter's upper half."""
    for seed in (bytes(32), bytes(range(32)), b"\xff" * 32, os.urandom(32)):
        for length in [*range(130), 255, 256, 257, 511, 512, 513, 1100, 70_001]:
            assert key_stream(name, seed, length) == expected_stream(name, seed, length)
    seed = os.urandom(32)
    for block in (1, 255, 65_535, 2**32 - 3):
        count = 100 if name == "chacha20" and block == 2**32 - 3 else 5000
        assert key_stream(name, seed, count, block) == expected_stream(name, seed, count, block)


def test_the_example_of_fips_197() -> None:
    """Appendix C.3's key; the block of counter 0 is its encryption of zeros, from OpenSSL."""
    for name in available_generators():
        if name.startswith("aes256ctr"):
            assert key_stream(name, bytes(range(32)), 16).hex() == "f29000b62a499fd0a9f39a6add2e7780"


def test_the_generator_comes_with_the_kernel(kernel: str) -> None:
    """The portable kernel promises to use no CPU feature, so its generator has none either."""
    assert generator_name() in available_generators()
    if kernel == "portable":
        assert generator_name() == "chacha20"
    elif "aes256ctr-aesni" in available_generators():
        assert generator_name().startswith("aes256ctr")


KNOWN_SEED = """
#include <string.h>
#include <sys/types.h>
int calls = 0;
ssize_t getrandom(void *buffer, size_t length, unsigned flags)
{
    (void)flags;
    calls++;
    for (size_t i = 0; i < length; i++)
        ((unsigned char *)buffer)[i] = (unsigned char)(7 * i + 1);
    return (ssize_t)length;
}
"""

SEEDED_SPLIT = """
import ctypes, hashlib, sys
from engine._fastshamir import combine, generator_name, key_stream, split
shim = ctypes.CDLL(sys.argv[1])
calls = ctypes.c_int.in_dll(shim, "calls")
seed = bytes((7 * i + 1) % 256 for i in range(32))
for length in (1, 16, 17, 32, 250, 600, 5000):
    secret = bytes(i % 251 for i in range(length))
    before = calls.value
    ys = split(secret, 3, 5)
    assert calls.value == before + 1, "one getrandom call"
    if 2 * length <= 32:
        assert ys[0] + ys[1] == seed[: 2 * length]
    elif 2 * length <= 512:
        assert ys[0] + ys[1] == key_stream(generator_name(), seed, 2 * length)
    else:
        assert ys[0][:256] == key_stream(generator_name(), seed, 256)
    assert combine([3, 4, 5], ys[2:]) == secret

def blocks(stream):
    return sorted(stream[i : i + 16] for i in range(0, len(stream), 16))

for t in (2, 3, 4):  # each piece of the stream is used, once
    drawn = b"".join(split(bytes(8192), t, t)[: t - 1])
    assert blocks(drawn) == blocks(key_stream(generator_name(), seed, len(drawn)))
print("done")
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the known getrandom")
def test_the_first_shares_are_the_random_stream(tmp_path: Path, kernel: str) -> None:
    """One call of getrandom a split, and shares 1..t-1 are the stream that OpenSSL makes of that seed too."""
    library = tmp_path / "known.so"
    (tmp_path / "known.c").write_text(KNOWN_SEED)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "known.c"], check=True, timeout=60)
    preload = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(library)]))
    environment = {**os.environ, "LD_PRELOAD": preload, "KEYQUORUM_KERNEL": kernel}
    command = [sys.executable, "-c", SEEDED_SPLIT, str(library)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == "done", done.stderr


def test_a_fork_shares_no_randomness() -> None:
    """The generator keeps nothing between calls, so parent and child can't draw the same."""
    reader, writer = os.pipe()
    split(bytes(1000), 2, 2)
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, split(bytes(1000), 2, 2)[0])
        finally:
            os._exit(0)
    os.close(writer)
    mine = split(bytes(1000), 2, 2)[0]
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert len(theirs) == 1000
    assert mine != theirs
