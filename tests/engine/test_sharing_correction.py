"""Owns the proof that wrong shares are found without commitments, up to the bound and anywhere, and refused beyond."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine._fastshamir import add, dot
from engine.errors import ShareCorrupt
from engine.sharing import (
    SecretBuffer,
    Share,
    correct_shares,
    find_consistent,
    generate_shares,
    reconstruct_key,
    secret_memory,
)
from engine.sharing.correction import locate_errors

relaxed = settings(deadline=None)


def multiply(a: int, b: int) -> int:
    """The field's product by school multiplication."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def value_of(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = multiply(value, x) ^ coefficient
    return value


def changed(share: Share, place: int, flip: int) -> Share:
    y = bytearray(share.y)
    y[place % len(y)] ^= flip
    return Share(share.x, bytes(y))


@st.composite
def damaged(draw: st.DrawFn) -> tuple[bytes, int, list[Share], set[int]]:
    """(secret, threshold, shares, wrong indices), with up to the bound of wrong shares."""
    threshold = draw(st.integers(1, 6))
    count = draw(st.integers(threshold, 14))
    secret = draw(st.binary(min_size=16, max_size=80))
    shares = generate_shares(secret, threshold=threshold, shares=count)
    wrong = set()
    for place in draw(st.permutations(range(count)))[: draw(st.integers(0, (count - threshold) // 2))]:
        share = shares[place]
        match draw(st.sampled_from(["one bit", "garbage", "zero", "short", "long"])):
            case "one bit":
                shares[place] = changed(share, draw(st.integers(0, 99)), 1 << draw(st.integers(0, 7)))
            case "garbage":
                shares[place] = Share(share.x, draw(st.binary(min_size=len(secret), max_size=len(secret))))
            case "zero":
                shares[place] = Share(share.x, bytes(len(secret)))
            case "short":
                shares[place] = Share(share.x, share.y[:-1])
            case "long":
                shares[place] = Share(share.x, share.y + b"\0")
        if shares[place] != share:
            wrong.add(share.x)
    return secret, threshold, draw(st.permutations(shares)), wrong


@relaxed
@given(damaged())
def test_wrong_shares_up_to_the_bound_are_found(case: tuple[bytes, int, list[Share], set[int]]) -> None:
    """However they are wrong and wherever they stand; the right ones stay in the order given."""
    secret, threshold, shares, bad = case
    found = correct_shares(shares, threshold=threshold)
    assert set(found.wrong) == bad
    assert [share.x for share in found.right] == [share.x for share in shares if share.x not in found.wrong]
    assert reconstruct_key(found.right, threshold=threshold) == secret


def test_every_position_of_two_wrong_among_seven() -> None:
    secret = b"the key that was split"
    shares = generate_shares(secret, threshold=3, shares=7)
    for bad in combinations(range(7), 2):
        mixed = [changed(share, 5 + j, 0x80) if j in bad else share for j, share in enumerate(shares)]
        found = correct_shares(mixed, threshold=3)
        assert found.wrong == tuple(j + 1 for j in bad)
        assert reconstruct_key(found.right, threshold=3) == secret


@relaxed
@given(st.data())
def test_more_than_the_bound_is_refused(data: st.DataObject) -> None:
    """Independent errors beyond the bound never pass for another secret; the error names every holder."""
    threshold = data.draw(st.integers(1, 5))
    count = data.draw(st.integers(threshold + 1, 12))
    bound = (count - threshold) // 2
    number = data.draw(st.integers(bound + 1, count - threshold))  # t right ones, and so no chance of a code word
    shares = generate_shares(bytes(64), threshold=threshold, shares=count)
    noise = generate_shares(bytes(64), threshold=min(255, count + 1), shares=count + 1)  # independent uniform rows
    for place in data.draw(st.permutations(range(count)))[:number]:
        shares[place] = Share(shares[place].x, add([shares[place].y, noise[place].y]))
    names = {x: f"node{x}" for x in range(1, 256)}
    with pytest.raises(ShareCorrupt, match=rf"more than {bound} are wrong") as caught:
        correct_shares(shares, threshold=threshold, names=names)
    assert caught.value.holders == tuple(names[share.x] for share in shares)


def test_liars_of_one_mind_need_more_than_the_bound() -> None:
    """Wrong shares that fit to another sharing pass for it only when the right ones are within the bound of it."""
    ours = generate_shares(b"ours" * 8, threshold=2, shares=8)
    theirs = generate_shares(b"them" * 8, threshold=2, shares=8)
    for liars in range(4):  # the bound is 3
        found = correct_shares(theirs[:liars] + ours[liars:], threshold=2)
        assert reconstruct_key(found.right, threshold=2) == b"ours" * 8
        assert found.wrong == tuple(range(1, liars + 1))
    with pytest.raises(ShareCorrupt):
        correct_shares(theirs[:4] + ours[4:], threshold=2)


def test_errors_in_different_columns() -> None:
    """Each wrong share is wrong in one byte of its own, so that no column shows more than one of them."""
    secret = bytes(200)
    shares = generate_shares(secret, threshold=4, shares=16)
    bad = {1, 4, 9, 12, 13, 16}
    mixed = [changed(share, share.x * 11, share.x) if share.x in bad else share for share in shares]
    assert set(correct_shares(mixed, threshold=4).wrong) == bad


def test_one_wrong_bit_in_a_long_share() -> None:
    """Longer than the columns folded at once; the last byte counts as every other."""
    secret = bytes(3 * 65_536 + 1)
    shares = generate_shares(secret, threshold=2, shares=4)
    shares[1] = changed(shares[1], len(secret) - 1, 1)
    assert correct_shares(shares, threshold=2).wrong == (2,)


def test_the_largest_sharing() -> None:
    """All 255 shares with 127 wrong ones, and of threshold 255 with none to spare."""
    shares = generate_shares(b"k" * 16, threshold=1, shares=255)
    mixed = [changed(share, share.x, 7) if share.x % 2 == 0 else share for share in shares]
    assert correct_shares(mixed, threshold=1).wrong == tuple(range(2, 255, 2))
    full = generate_shares(b"k" * 16, threshold=255, shares=255)
    assert correct_shares(full, threshold=255).right == tuple(full)


def test_without_spare_shares_nothing_can_be_told() -> None:
    """m = t always agrees; m = t + 1 shows that something is wrong, but not what."""
    shares = generate_shares(b"k" * 16, threshold=3, shares=4)
    shares[0] = changed(shares[0], 0, 1)
    assert correct_shares(shares[:3], threshold=3).wrong == ()
    with pytest.raises(ShareCorrupt, match="more than 0 are wrong"):
        correct_shares(shares, threshold=3)


@relaxed
@given(st.data())
def test_locating_agrees_with_a_search_of_all_places(data: st.DataObject) -> None:
    """One column against the naive decoder: the places without which all the rest lie on a polynomial of degree < t."""
    threshold = data.draw(st.integers(1, 3))
    xs = data.draw(st.lists(st.integers(1, 255), min_size=threshold, max_size=8, unique=True))
    bound = (len(xs) - threshold) // 2
    word = {x: data.draw(st.sampled_from([0, 0, 0, 1, 2, 0x53, 0xFF])) for x in xs}
    word.update(dict.fromkeys(xs[:threshold], 0))
    found = locate_errors(word, threshold, bound)

    def lies_on_a_polynomial(rest: list[int]) -> bool:
        shares = [Share(x, bytes([word[x]])) for x in rest]
        try:
            reconstruct_key(shares, threshold=threshold)
        except ShareCorrupt:
            return False
        return True

    answers = [
        set(out)
        for size in range(bound + 1)
        for out in combinations(xs, size)
        if lies_on_a_polynomial([x for x in xs if x not in out])
    ]
    smallest = min(answers, key=len, default=set())
    assert found == smallest


@relaxed
@given(st.integers(1, 5), st.integers(0, 40), st.integers(1, 32), st.randoms(use_true_random=False))
def test_row_sums_and_dots_equal_the_naive_ones(rows: int, length: int, weights: int, random: object) -> None:
    draw = random.randbytes  # type: ignore[attr-defined]
    ys, scales = [draw(length) for _ in range(rows)], [draw(length) for _ in range(weights)]
    expected = bytearray(length)
    for y in ys:
        expected = bytearray(a ^ b for a, b in zip(expected, y, strict=True))
    assert add(ys) == expected
    for y, found in zip(ys, dot(ys, scales), strict=True):
        assert len(found) == weights
        for scale, value in zip(scales, found, strict=True):
            products = [multiply(a, b) for a, b in zip(y, scale, strict=True)]
            assert value == (add([bytes([each]) for each in products])[0] if products else 0)


@pytest.mark.parametrize("length", [1, 1023, 1024, 1025, 5000])
def test_row_work_over_block_bounds(length: int) -> None:
    """Sums and dot products agree at the edges of the blocks that the native code works in."""
    y, scale = bytes(j * 7 & 0xFF for j in range(length)), bytes(j * 5 + 1 & 0xFF for j in range(length))
    total = 0
    for a, b in zip(y, scale, strict=True):
        total ^= multiply(a, b)
    assert dot([bytearray(y)], [memoryview(scale)]) == [bytes([total])]
    assert add([y, scale, y]) == scale


SHARES = generate_shares(b"abcd", threshold=2, shares=3)
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: correct_shares([], threshold=1), "0 shares were given"),
    (lambda: correct_shares(SHARES, threshold=0), r"the threshold is 0, but must be in 1\.\.255"),
    (lambda: correct_shares(SHARES, threshold=4), "3 shares were given, but the threshold is 4"),
    (lambda: correct_shares([*SHARES, SHARES[1]], threshold=2), "two shares have the index x = 2"),
    (lambda: add([]), r"0 rows were given, but 1\.\.255 are allowed"),
    (lambda: add([b""] * 256), r"256 rows were given, but 1\.\.255 are allowed"),
    (lambda: add([b"ab", b"a"]), "a row has 1 bytes, but the first one has 2"),
    (lambda: dot([b"ab"], [b"a"]), "the weights have 1 bytes, but the rows have 2"),
    (lambda: dot([b"a"], [b"a"] * 33), "33 weights were given, but at most 32 are allowed"),
    (lambda: dot([b"a"], []), r"0 weights were given, but 1\.\.255 are allowed"),
]


@pytest.mark.parametrize(("call", "text"), REFUSED)
def test_refusals_name_value_and_limit(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("what", ["text", 7, None])
def test_rows_are_bytes_like(what: object) -> None:
    with pytest.raises(TypeError, match="must be a C-contiguous bytes-like object"):
        add([what])  # type: ignore[list-item]


# --- by the check value, from t + e shares for e wrong ones ---


def right_of(secret: bytes) -> Callable[[SecretBuffer], bool]:
    return lambda found: bytes(found) == secret


@given(st.integers(1, 5), st.integers(0, 3), st.integers(0, 2), st.data())
@settings(deadline=None, max_examples=80)
def test_the_check_value_tells_as_many_liars_as_there_are_shares_to_spare(
    threshold: int, liars: int, spare: int, data: Any
) -> None:
    """t right ones among t + e are found, and exactly the wrong ones are named; t - 1 right ones are not."""
    secret = data.draw(st.binary(min_size=8, max_size=40))
    count = threshold + liars + spare
    dealt = generate_shares(secret, threshold=threshold, shares=count)
    wrong = data.draw(st.sets(st.sampled_from([share.x for share in dealt]), min_size=liars, max_size=liars))
    given = [Share(s.x, random.Random(s.x).randbytes(len(s.y))) if s.x in wrong else s for s in dealt]
    order = data.draw(st.permutations(given))
    found = find_consistent(order, threshold=threshold, is_right=right_of(secret))
    assert found is not None
    with found[0] as buffer:
        assert bytes(buffer) == secret
    assert set(found[1]) == wrong
    few = [s for s in order if s.x in wrong] + [s for s in order if s.x not in wrong][: threshold - 1]
    assert find_consistent(few, threshold=threshold, is_right=right_of(secret)) is None


def test_what_was_tried_is_not_tried_again_and_tries_are_bounded() -> None:
    tried: list[bytes] = []

    def never(found: SecretBuffer) -> bool:
        tried.append(bytes(found))
        return False

    dealt = generate_shares(bytes(range(16)), threshold=3, shares=6)
    assert find_consistent(dealt[:3], threshold=3, is_right=never) is None
    assert find_consistent(dealt[:4], threshold=3, is_right=never, tried=3) is None
    assert find_consistent(dealt, threshold=3, is_right=never, tried=4) is None
    assert len(tried) == 20  # 6 over 3
    tried.clear()
    many = generate_shares(bytes(range(16)), threshold=32, shares=64)
    assert find_consistent(many, threshold=32, is_right=never, tries=50) is None
    assert len(tried) == 50


def test_a_share_of_another_length_is_a_wrong_one() -> None:
    secret = bytes(range(16))
    dealt = generate_shares(secret, threshold=2, shares=3)
    found = find_consistent([Share(dealt[0].x, dealt[0].y + b"\0"), *dealt[1:]], threshold=2, is_right=right_of(secret))
    assert found is not None
    found[0].close()
    assert found[1] == (dealt[0].x,)


def test_an_error_of_the_judge_leaves_no_locked_memory() -> None:
    def fail(found: SecretBuffer) -> bool:
        raise RuntimeError("no")

    dealt = generate_shares(bytes(64), threshold=2, shares=2)
    gc.collect()
    _, before = secret_memory()
    with pytest.raises(RuntimeError):
        find_consistent(dealt, threshold=2, is_right=fail)
    assert secret_memory()[1] == before
