"""Owns the proof that what the core keeps of its last small call never shows in the next, whatever that asks for."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._fastshamir import available_kernels, combine, kernel_name, split, use_kernel

KERNELS = available_kernels()
POLYNOMIALS = [0x11B, 0x11D]
LENGTHS = [1, 16, 32, 33, 255, 256, 257, 600, 5000]


def slow_multiply(a: int, b: int, polynomial: int) -> int:
    product = 0
    for bit in range(8):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(14, 7, -1):
        product ^= (polynomial << (bit - 8)) * (product >> bit & 1)
    return product


TIMES = {p: [bytes(slow_multiply(a, b, p) for b in range(256)) for a in range(256)] for p in POLYNOMIALS}


def slow_combine(xs: Sequence[int], ys: Sequence[bytes], target: int = 0, polynomial: int = 0x11B) -> bytes:
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


def is_sharing(ys: list[bytes], secret: bytes, threshold: int, polynomial: int = 0x11B) -> bool:
    """Whether these are the shares at 1, 2 .. of a polynomial through the secret, all of them."""
    points = [0, *range(1, threshold)], [secret, *ys[: threshold - 1]]
    expected = [slow_combine(*points, x, polynomial) for x in range(1, len(ys) + 1)]
    return ys == expected and len(set(ys[: threshold - 1])) == threshold - 1


@pytest.fixture(autouse=True)
def kernel() -> Iterator[str]:
    """The kernel that was in force before is so again afterwards."""
    before = kernel_name()
    yield before
    use_kernel(before)


SOME_XS = [[2, 4, 5], (2, 4, 5), [2, 4, 6], [4, 2, 5], [2, 4], [2, 4, 5, 6], [255], list(range(1, 17)), range(1, 18)]


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_combines_in_any_order(data: st.DataObject) -> None:
    """Of two calls that differ in one thing (or nothing) each is right."""
    calls = data.draw(st.integers(2, 8))
    kernels, polys, targets = st.sampled_from(KERNELS), st.sampled_from(POLYNOMIALS), st.sampled_from([0, 1, 4, 255])
    xs, target, poly, length = SOME_XS[0], 0, 0x11B, 32
    for _ in range(calls):
        match data.draw(st.integers(0, 6)):
            case 0:
                xs = data.draw(st.sampled_from(SOME_XS))  # type: ignore[assignment]
            case 1:
                target = data.draw(targets)
            case 2:
                poly = data.draw(polys)
            case 3:
                use_kernel(data.draw(kernels))
            case 4:
                length = data.draw(st.sampled_from(LENGTHS))
        ys = [os.urandom(length) for _ in xs]
        expected = slow_combine(xs, ys, target, poly)
        given_xs = xs if data.draw(st.booleans()) else type(xs)(xs) if isinstance(xs, list | tuple) else list(xs)
        if poly == 0x11B and data.draw(st.booleans()):
            assert combine(given_xs, ys, target) == expected
        elif target == 0 and data.draw(st.booleans()):
            assert combine(given_xs, tuple(ys), poly=poly) == expected
        else:
            assert combine(given_xs, ys, target, poly=poly) == expected


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_splits_in_any_order(data: st.DataObject) -> None:
    """Every sharing has the threshold, the number of shares and the field that were asked for."""
    threshold, shares, poly, length = 3, 5, 0x11B, 32
    for _ in range(data.draw(st.integers(2, 8))):
        match data.draw(st.integers(0, 4)):
            case 0:
                shares = data.draw(st.integers(1, 18))
                threshold = data.draw(st.integers(1, shares))
            case 1:
                poly = data.draw(st.sampled_from(POLYNOMIALS))
            case 2:
                use_kernel(data.draw(st.sampled_from(KERNELS)))
            case 3:
                length = data.draw(st.sampled_from(LENGTHS[1:]))  # random shares of one byte may well be equal
        secret = os.urandom(length)
        ys = split(secret, threshold, shares) if poly == 0x11B else split(secret, threshold, shares, poly=poly)
        assert len(ys) == shares
        assert is_sharing(ys, secret, threshold, poly)
        if shares < 200 and data.draw(st.booleans()):
            xs = list(range(shares + 1, 1, -1))
            ys = split(secret, threshold, shares, xs, poly=poly)
            assert slow_combine(xs[:threshold], ys[:threshold], 0, poly) == secret
            assert slow_combine(xs[-threshold:], ys[-threshold:], 0, poly) == secret


def test_every_pair_of_kernels() -> None:
    ys = [os.urandom(32) for _ in range(3)]
    for first in KERNELS:
        for second in KERNELS:
            use_kernel(first)
            assert combine([1, 2, 3], ys) == slow_combine([1, 2, 3], ys)
            assert is_sharing(split(ys[0], 3, 5), ys[0], 3)
            use_kernel(second)
            assert combine([1, 2, 3], ys) == slow_combine([1, 2, 3], ys)
            assert is_sharing(split(ys[0], 3, 5), ys[0], 3)


def test_no_two_splits_are_alike() -> None:
    """What is kept holds no randomness."""
    for length in (16, 32, 200):
        first = {split(bytes(length), 3, 5)[j] for _ in range(100) for j in range(5)}
        assert len(first) == 500


# The lists are the caller's, and may change between calls.


def test_a_list_that_changes_between_calls() -> None:
    xs, ys = [1, 2, 3], [os.urandom(32) for _ in range(3)]
    for place, x in ((0, 9), (2, 200), (1, 77), (0, 1), (2, 3), (1, 2)):
        assert combine(xs, ys) == slow_combine(xs, ys)
        xs[place] = x
        assert combine(xs, ys) == slow_combine(xs, ys)
        ys[place] = os.urandom(32)
        assert combine(xs, ys) == slow_combine(xs, ys)
    xs.append(50)
    with pytest.raises(ValueError, match="4 share indices and 3 values were given"):
        combine(xs, ys)
    ys.append(os.urandom(32))
    assert combine(xs, ys) == slow_combine(xs, ys)
    del xs[0], ys[0]
    assert combine(xs, ys) == slow_combine(xs, ys)
    xs.reverse()
    assert combine(xs, ys) == slow_combine(xs, ys)


def test_errors_after_a_call_that_was_right() -> None:
    xs, ys = [1, 2, 3], [os.urandom(32) for _ in range(3)]
    right = slow_combine(xs, ys)
    wrong: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (ValueError, "x = 2 twice", ([1, 2, 2], ys), {}),
        (ValueError, "is 0, but must be in 1..255", ([1, 2, 0], ys), {}),
        (ValueError, "is 256, but must be in 1..255", ([1, 2, 256], ys), {}),
        (ValueError, "is 259, but", ([1, 2, 3 + 256], ys), {}),
        (ValueError, "3 share indices and 2 values", (xs, ys[:2]), {}),
        (ValueError, "2 share indices and 3 values", (xs[:2], ys), {}),
        (ValueError, "0 shares were given", ([], []), {}),
        (ValueError, "has 31 bytes", (xs, [ys[0], ys[1], ys[2][:31]]), {}),
        (ValueError, "has 33 bytes", (xs, [ys[0], ys[1] + b"0", ys[2]]), {}),
        (ValueError, "have 0 bytes", (xs, [b"", b"", b""]), {}),
        (ValueError, "the target x is 256", (xs, ys, 256), {}),
        (ValueError, "the target x is -1", (xs, ys, -1), {}),
        (ValueError, "poly is 1, but", (xs, ys), {"poly": 1}),
        (ValueError, "out has 31 bytes", (xs, ys), {"out": bytearray(31)}),
        (TypeError, "must be an int, not str", ([1, 2, "3"], ys), {}),
        (TypeError, "not str", (xs, [ys[0], ys[1], "text"]), {}),
        (TypeError, "the target x must be an int, not NoneType", (xs, ys, None), {}),
        (TypeError, "poly must be an int", (xs, ys), {"poly": None}),
        (TypeError, "not iterable", (7, ys), {}),
        (TypeError, "not iterable", (xs, None), {}),
    ]
    for error, text, arguments, named in wrong:
        assert combine(xs, ys) == right
        with pytest.raises(error, match=text):
            combine(*arguments, **named)
        with pytest.raises(error, match=text):
            combine(*arguments, **named)
    assert combine(xs, ys) == right
    assert combine(xs, ys, out=(out := bytearray(32))) is None  # type: ignore[func-returns-value]
    assert out == right
    assert combine(xs, [bytearray(y) for y in ys]) == right
    assert combine(iter(xs), iter(ys)) == right  # type: ignore[arg-type]


def test_errors_of_split_after_a_call_that_was_right() -> None:
    for secret, threshold, shares, text in (
        (b"", 3, 5, "0 bytes"),
        (bytes(32), 6, 5, "threshold is 6"),
        (bytes(32), 0, 5, "threshold is 0"),
        (bytes(32), 3, 0, "shares is 0"),
        (bytes(32), 3, 256, "shares is 256"),
    ):
        assert is_sharing(split(secret or b"s" * 32, 3, 5), secret or b"s" * 32, 3)
        for _ in range(2):
            with pytest.raises(ValueError, match=text):
                split(secret, threshold, shares)
    with pytest.raises(TypeError, match="the secret must be"):
        split("s" * 32, 3, 5)  # type: ignore[call-overload]
    assert is_sharing(split(bytearray(b"s" * 32), 3, 5), b"s" * 32, 3)


# Numbers that are none of the interpreter's own small ints.


class Number(int):
    """As its int, but says another one to whoever asks for the index."""

    def __index__(self) -> int:
        return 7


class Index:
    """Asks for something else in between."""

    def __init__(self, value: int, xs: list[Any] | None = None) -> None:
        self.value = value
        self.xs = xs

    def __index__(self) -> int:
        ys = [bytes([9] * 32)] * 4
        assert combine([9, 8, 7, 6], ys, 5) == slow_combine([9, 8, 7, 6], ys, 5)
        split(b"another" * 3, 2, 4)
        if self.xs is not None:
            self.xs[0] = 99
        return self.value


def test_other_kinds_of_numbers() -> None:
    ys = [os.urandom(32) for _ in range(3)]
    right = slow_combine([1, 2, 3], ys)
    for xs in ([True, 2, 3], [np.uint8(1), 2, 3], [Index(1), 2, 3], [1, 2, Index(3)], (True, 2, np.int64(3))):
        for _ in range(2):
            assert combine([1, 2, 3], ys) == right
            assert combine(xs, ys) == right  # type: ignore[arg-type]
            assert combine([1, 2, 4], ys) == slow_combine([1, 2, 4], ys)
    for target in (True, np.uint8(1), Index(1), Number(1)):
        expected = combine([1, 2, 3], ys, int.__int__(target) if isinstance(target, int) else 1)
        assert expected == ys[0]
        assert combine([1, 2, 3], ys) == right
        assert combine([4, 5, 6], ys, target) == slow_combine([4, 5, 6], ys, 1)  # type: ignore[arg-type]
        assert combine([4, 5, 6], ys) == slow_combine([4, 5, 6], ys)
    for threshold, shares in ((Index(3), 5), (3, Index(5)), (np.uint8(3), np.uint8(5)), (Index(3), Index(5))):
        assert is_sharing(split(ys[0], 3, 5), ys[0], 3)
        made = split(ys[0], threshold, shares)  # type: ignore[call-overload]
        assert len(made) == 5
        assert is_sharing(made, ys[0], 3)
        assert is_sharing(split(ys[0], 2, 4), ys[0], 2)


def test_a_number_that_changes_the_list_it_is_in() -> None:
    """What was read counts, and the list as it is now is not taken for it afterwards."""
    ys = [os.urandom(32) for _ in range(3)]
    xs: list[Any] = [1, 2, 3]
    xs[2] = Index(3, xs)
    assert combine(xs, ys) == slow_combine([1, 2, 3], ys)
    assert combine(xs, ys) == slow_combine([99, 2, 3], ys)
    xs[2] = 3
    assert combine(xs, ys) == slow_combine([99, 2, 3], ys)
    xs = [1, 2, 3]
    assert combine(xs, ys, Index(5, xs)) == slow_combine([1, 2, 3], ys, 5)  # type: ignore[arg-type]
    assert combine(xs, ys, 5) == slow_combine([99, 2, 3], ys, 5)


# Callers within calls, and beside them.


def test_values_from_a_generator_that_combines() -> None:
    ys = [os.urandom(32) for _ in range(3)]

    def values() -> Iterator[bytes]:
        for y in ys:
            assert combine([7, 8], ys[:2], 3) == slow_combine([7, 8], ys[:2], 3)
            use_kernel(KERNELS[-1])
            assert is_sharing(split(y, 2, 3), y, 2)
            use_kernel()
            yield y

    for _ in range(3):
        assert combine([1, 2, 3], ys) == slow_combine([1, 2, 3], ys)
        assert combine([1, 2, 3], values()) == slow_combine([1, 2, 3], ys)  # type: ignore[arg-type]


class Garbage:
    """Part of a cycle; whoever collects it runs its finalizer, in the middle of something."""

    collected = 0

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        Garbage.collected += 1
        use_kernel(KERNELS[Garbage.collected % len(KERNELS)])
        split(b"g" * 20, 2, 3 + Garbage.collected % 6)
        combine([3, 1, 2], [b"g" * 20] * 3, Garbage.collected % 256)


def test_a_finalizer_that_splits_in_the_middle_of_a_split() -> None:
    """The list of the shares is an object that may set the collector off."""
    secret = os.urandom(32)
    before, collected = gc.get_threshold(), Garbage.collected
    kept = []
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(300):
            Garbage()
            ys = split(secret, 3, 5)
            Garbage()
            kept.append((ys, combine([1, 4, 5], [ys[0], ys[3], ys[4]])))
    finally:
        gc.set_threshold(*before)
    assert Garbage.collected > collected
    for ys, back in kept:
        assert len(ys) == 5
        assert is_sharing(ys, secret, 3)
        assert back == secret


def test_threads_with_different_calls() -> None:
    """Small calls, and large ones that give the lock away, each thread with its own indices; kernels change."""
    failures: list[str] = []
    stop = threading.Event()

    def work(number: int) -> None:
        xs = [number + 1, number + 2, number + 3]
        small, large = ([os.urandom(length) for _ in xs] for length in (32, 40_000))
        expected = slow_combine(xs, small, number), slow_combine(xs, large, number)
        while not stop.is_set():
            found = combine(xs, small, number), combine(xs, large, number)
            ys = split(small[0], 2 + number % 3, 5)
            if found != expected or not is_sharing(ys, small[0], 2 + number % 3):
                failures.append(f"thread {number}")
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(60):
        use_kernel(KERNELS[turn % len(KERNELS)])
        stop.wait(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
