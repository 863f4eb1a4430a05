"""Owns the proof that refresh, reshare and recovery keep the secret, agree with a naive field, and mix with nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ShareCorrupt
from engine.sharing import (
    Share,
    deal_sub_shares,
    deal_zero,
    finish_recovery,
    generate_shares,
    merge_sub_shares,
    reconstruct_key,
    recover_share,
    recovery_parts,
    refresh_share,
    refresh_shares,
    reshare,
    sharing_faults,
    sub_share_gaps,
    sum_recovery_parts,
    wrong_sub_sharings,
)

relaxed = settings(deadline=None)
indices = st.integers(1, 255)
# Long enough that two independent secrets, or a secret and garbage, are never equal by chance (2^-128).
secrets = st.binary(min_size=16, max_size=64)


def multiply(a: int, b: int) -> int:
    """The field's product by school multiplication, as FIPS 197 defines it."""
    product = 0
    while b:
        if b & 1:
            product ^= a
        a = a << 1 ^ (0x11B if a & 0x80 else 0)
        b >>= 1
    return product


def inverse(a: int) -> int:
    return next(b for b in range(1, 256) if multiply(a, b) == 1)


def value_at(shares: Sequence[Share], x: int) -> bytes:
    """Lagrange's formula, byte by byte: the oracle."""
    result = bytearray(len(shares[0].y))
    for share in shares:
        weight = 1
        for other in shares:
            if other.x != share.x:
                weight = multiply(weight, multiply(x ^ other.x, inverse(share.x ^ other.x)))
        for place, byte in enumerate(share.y):
            result[place] ^= multiply(weight, byte)
    return bytes(result)


@st.composite
def sharings(draw: st.DrawFn, least: int = 1, most: int = 8) -> tuple[bytes, int, list[Share]]:
    """(secret, threshold, shares), the threshold at least ``least``."""
    shares = draw(st.integers(least, most))
    threshold = draw(st.integers(least, shares))
    secret = draw(secrets)
    return secret, threshold, generate_shares(secret, threshold=threshold, shares=shares)


def some(data: st.DataObject, shares: Sequence[Share], count: int) -> list[Share]:
    return data.draw(st.permutations(list(shares)))[:count]


# Refresh.


@relaxed
@given(sharings(least=2), st.data())
def test_refreshed_shares_recover_the_same_secret(sharing: tuple[bytes, int, list[Share]], data: st.DataObject) -> None:
    secret, threshold, old = sharing
    new = refresh_shares(old, threshold=threshold)
    assert [share.x for share in new] == [share.x for share in old]
    assert all(a.y != b.y for a, b in zip(old, new, strict=True))
    assert reconstruct_key(some(data, new, threshold)) == secret
    assert value_at(some(data, new, threshold), 0) == secret
    # All n agree: the degree has not grown.
    assert reconstruct_key(new, threshold=threshold) == secret


@relaxed
@given(sharings(least=2), st.data())
def test_shares_of_two_epochs_do_not_mix(sharing: tuple[bytes, int, list[Share]], data: st.DataObject) -> None:
    """Any t shares with old and new ones among them give something else, and old with new beyond t never agree."""
    secret, threshold, old = sharing
    new = refresh_shares(old, threshold=threshold)
    place = data.draw(st.permutations(range(len(old))))[:threshold]
    renewed = data.draw(st.integers(1, threshold - 1))
    mixed = [new[j] for j in place[:renewed]] + [old[j] for j in place[renewed:]]
    assert reconstruct_key(mixed) != secret
    if len(old) > threshold:
        extra = next(j for j in range(len(old)) if j not in place)
        with pytest.raises(ShareCorrupt, match="are wrong"):
            reconstruct_key([*mixed, data.draw(st.sampled_from([old[extra], new[extra]]))], threshold=threshold)


@relaxed
@given(sharings(least=2), st.integers(1, 4), st.data())
def test_a_refresh_dealt_by_several_holders(
    sharing: tuple[bytes, int, list[Share]], dealers: int, data: st.DataObject
) -> None:
    """Each holder adds what each dealer sent it; one that misses a dealer's update is outside afterwards."""
    secret, threshold, old = sharing
    xs = [share.x for share in old]
    dealt = [deal_zero(len(secret), threshold=threshold, xs=xs) for _ in range(dealers)]
    new = [refresh_share(share, [updates[place] for updates in dealt]) for place, share in enumerate(old)]
    assert reconstruct_key(some(data, new, threshold)) == secret
    for updates in dealt:
        assert value_at(updates[:threshold], 0) == bytes(len(secret))
    if dealers > 1:
        late = refresh_share(old[0], [updates[0] for updates in dealt[1:]])
        assert reconstruct_key([late, *new[1:threshold]]) != secret


def test_updates_are_uniform_but_for_the_secret() -> None:
    """One share of a sharing of zero takes every value, and so does its leading coefficient, zero included."""
    dealt = [deal_zero(8192, threshold=2, xs=[1, 7]) for _ in range(4)]
    counts = Counter(byte for shares in dealt for byte in shares[0].y)  # at x = 1 the value is the coefficient itself
    assert set(counts) == set(range(256))
    # 32,768 draws over 256 values: chi-square of 255 degrees stays below 400 but for 1 run in 10^8.
    assert sum((counts[value] - 128) ** 2 / 128 for value in range(256)) < 400


# Reshare.


@relaxed
@given(sharings(), st.integers(1, 8), st.data())
def test_reshared_shares_recover_the_same_secret(
    sharing: tuple[bytes, int, list[Share]], new_threshold: int, data: st.DataObject
) -> None:
    secret, threshold, old = sharing
    xs = data.draw(st.lists(indices, min_size=new_threshold, max_size=10, unique=True))
    new = reshare(some(data, old, len(old)), threshold=threshold, new_threshold=new_threshold, xs=xs)
    assert [share.x for share in new] == xs
    assert reconstruct_key(some(data, new, new_threshold)) == secret
    assert reconstruct_key(new, threshold=new_threshold) == secret
    assert value_at(new[:new_threshold], 0) == secret


@relaxed
@given(sharings(least=2), st.integers(2, 6), st.data())
def test_old_and_new_shares_never_agree(
    sharing: tuple[bytes, int, list[Share]], new_threshold: int, data: st.DataObject
) -> None:
    """Sets of both sharings give garbage, and beyond the larger threshold they are refused."""
    secret, threshold, old = sharing
    xs = data.draw(st.lists(indices, min_size=new_threshold, max_size=8, unique=True))
    new = reshare(old, threshold=threshold, new_threshold=new_threshold, xs=xs)
    few_old = some(data, old, data.draw(st.integers(1, threshold - 1)))
    taken = {share.x for share in few_old}
    others = [share for share in new if share.x not in taken]
    few_new = others[: data.draw(st.integers(1, new_threshold - 1))]
    if few_new:
        unknowing = [Share(share.x, share.y) for share in (*few_old, *few_new)]
        assert reconstruct_key(unknowing) != secret
    both = [*old, *(share for share in new if share.x not in {each.x for each in old})]
    larger = max(threshold, new_threshold)
    if len(both) > len(old) and len(both) > larger:
        with pytest.raises(ShareCorrupt, match="are wrong"):
            reconstruct_key(both, threshold=larger)


def test_new_holders_who_merged_different_sets_do_not_fit() -> None:
    """Each merge is of one set of old holders: from another set comes another polynomial with the same secret."""
    secret = bytes(range(32))
    old = generate_shares(secret, threshold=2, shares=3)
    dealt = {share.x: deal_sub_shares(share, threshold=2, xs=[4, 5]) for share in old}

    def merged(x: int, place: int, holders: tuple[int, ...]) -> Share:
        return merge_sub_shares(x, {old_x: dealt[old_x][place] for old_x in holders}, threshold=2)

    for first, second in [((1, 2), (1, 2)), ((2, 3), (3, 2))]:
        assert reconstruct_key([merged(4, 0, first), merged(5, 1, second)]) == secret
    assert reconstruct_key([merged(4, 0, (1, 2)), merged(5, 1, (2, 3))]) != secret


# Recovery.


@relaxed
@given(sharings(least=2), st.data())
def test_recovery_equals_the_lost_share(sharing: tuple[bytes, int, list[Share]], data: st.DataObject) -> None:
    """By the three steps, for any helpers and any lost index, also one that nobody had yet."""
    _, threshold, shares = sharing
    lost = data.draw(st.one_of(st.sampled_from([share.x for share in shares]), indices))
    able = [share for share in shares if share.x != lost]
    if len(able) < threshold:
        able = generate_shares(data.draw(secrets), threshold=threshold, shares=threshold + 1)
        able = [share for share in able if share.x != lost][:threshold]
    helping = some(data, able, threshold)
    helpers = [share.x for share in helping]
    dealt = {share.x: recovery_parts(share, helpers=helpers, lost=lost) for share in helping}
    sums = [
        sum_recovery_parts(x, {sender: parts[place] for sender, parts in dealt.items()}, helpers=helpers)
        for place, x in enumerate(helpers)
    ]
    found = finish_recovery(sums, helpers=helpers, lost=lost)
    assert found == Share(lost, value_at(helping, lost))
    assert recover_share(able, threshold=threshold, lost=lost) == Share(lost, value_at(able[:threshold], lost))
    for share in shares:
        if share.x == lost and helping[0] in shares:
            assert found == share


def test_what_travels_in_a_recovery_is_blinded() -> None:
    """No part that is sent, and no sum, is a helper's share or its weighted share; they are new each time."""
    shares = generate_shares(b"\0" * 64, threshold=3, shares=4)
    helpers = [1, 2, 3]
    weighted = {
        share.x: value_at([share, *(Share(x, bytes(64)) for x in helpers if x != share.x)], 4) for share in shares[:3]
    }
    seen: set[bytes] = set()
    for _ in range(8):
        for share in shares[:3]:
            for part in recovery_parts(share, helpers=helpers, lost=4):
                assert part.y not in (share.y, weighted[share.x], bytes(64))
                assert part.y not in seen
                seen.add(part.y)


def test_the_parts_of_all_but_one_are_uniform() -> None:
    """For a share of zeros, each part alone takes every value evenly, the helper's own part too."""
    for part in recovery_parts(Share(1, bytes(32_768)), helpers=[1, 2], lost=3):
        counts = Counter(part.y)
        assert sum((counts[value] - 128) ** 2 / 128 for value in range(256)) < 400


def test_every_lost_share_of_every_helpers() -> None:
    shares = generate_shares(b"all of the helpers", threshold=3, shares=6)
    for helping in combinations(shares, 3):
        for lost in shares:
            if lost not in helping:
                assert recover_share(helping, threshold=3, lost=lost.x) == lost


# The check of a reshare.


def test_faults_of_a_sharing_are_those_that_leave_its_polynomial() -> None:
    shares = generate_shares(b"x" * 16, threshold=2, shares=5)
    wrong = Share(3, b"y" * 16)
    assert sharing_faults(shares, threshold=2) == ()
    assert sharing_faults([wrong, *shares[:2], *shares[3:]], threshold=2) == (3,)
    assert sharing_faults([wrong, *shares[:2]], threshold=2) is None
    assert sharing_faults([wrong, shares[0]], threshold=2) == ()  # any two lie on a line


def test_gaps_of_true_sub_shares_share_zero_and_others_do_not() -> None:
    """For rows that are unit vectors a gap's sums are its own bytes."""
    length, xs = 16, [1, 2, 3, 4]
    old = generate_shares(b"s" * length, threshold=2, shares=4)
    rows = [bytes(place == row for place in range(length)) for row in range(16)]

    def gaps(false: dict[int, bytes]) -> dict[int, list[Share]]:
        dealt = {
            share.x: deal_sub_shares(Share(share.x, false.get(share.x, share.y)), threshold=2, xs=xs) for share in old
        }
        told = [
            sub_share_gaps({old_x: subs[place] for old_x, subs in dealt.items()}, threshold=2, weights=rows)
            for place in range(len(xs))
        ]
        return {share.x: [each[place] for each in told] for place, share in enumerate(old[2:])}

    assert wrong_sub_sharings([1, 2], gaps({}), threshold=2) == ()
    for liar in (1, 2, 3, 4):
        assert wrong_sub_sharings([1, 2], gaps({liar: b"t" * length}), threshold=2) == (liar,)
    assert wrong_sub_sharings([1, 2], gaps({1: b"t" * length, 3: b"u" * length}), threshold=2) is None
    assert sub_share_gaps({share.x: Share(1, share.y) for share in old[:2]}, threshold=2, weights=rows) == []
    assert wrong_sub_sharings([1, 2], {}, threshold=2) == ()


class Span:
    """What can be computed of unknown bytes from linear sums of them, over the field: the oracle of secrecy."""

    def __init__(self) -> None:
        self.rows: dict[object, dict[object, int]] = {}

    def _reduced(self, known: dict[object, int]) -> dict[object, int]:
        left = {name: value for name, value in known.items() if value}
        while pivot := next((name for name in left if name in self.rows), None):
            factor = left[pivot]
            for name, value in self.rows[pivot].items():
                left[name] = left.get(name, 0) ^ multiply(factor, value)
            left = {name: value for name, value in left.items() if value}
        return left

    def learn(self, known: dict[object, int]) -> None:
        left = self._reduced(known)
        if not left:
            return
        pivot = next(iter(left))
        scale = inverse(left[pivot])
        row = {name: multiply(scale, value) for name, value in left.items()}
        for other in self.rows.values():
            if factor := other.pop(pivot, 0):
                for name, value in row.items():
                    if name != pivot:
                        other[name] = other.get(name, 0) ^ multiply(factor, value)
                other[pivot] = 0
        self.rows[pivot] = row

    def hides(self, unknown: Sequence[object]) -> int:
        """How many of these, and of all sums of them, it leaves open."""
        before = len(self.rows)
        for name in unknown:
            self.learn({name: 1})
        return len(self.rows) - before


def power(x: int, exponent: int) -> int:
    return 1 if exponent == 0 else multiply(x, power(x, exponent - 1))


def plus(*terms: tuple[int, dict[object, int]]) -> dict[object, int]:
    total: dict[object, int] = {}
    for factor, known in terms:
        for name, value in known.items():
            total[name] = total.get(name, 0) ^ multiply(factor, value)
    return total


@pytest.mark.parametrize(("old", "dealers", "new", "holders"), [(1, 2, 2, 3), (2, 3, 2, 3), (2, 4, 3, 4), (3, 5, 2, 3)])
def test_all_that_is_told_shows_less_than_a_threshold_nothing(old: int, dealers: int, new: int, holders: int) -> None:
    """t - 1 old and t' - 1 new holders with all that is published: every gap in whole, and the masked sums.

    With one old holder more they can compute the key, and with one new: so it is not the oracle that sees nothing.
    Two bytes are shared and three masks.
    """
    length, masks = 2, 3
    # What each dealer shares is linear in the key's bytes, the old coefficients, its masks and the new coefficients.
    shares = {
        x: [
            plus((1, {("key", byte): 1}), *((power(x, d), {("old", byte, d): 1}) for d in range(1, old)))
            for byte in range(length)
        ]
        + [{("mask", x, row): 1} for row in range(masks)]
        for x in range(1, dealers + 1)
    }
    dealt = {
        (x, i): [
            plus((1, shares[x][place]), *((power(i, d), {("new", x, place, d): 1}) for d in range(1, new)))
            for place in range(length + masks)
        ]
        for x in shares
        for i in range(1, holders + 1)
    }

    def view(corrupt_old: int, corrupt_new: int) -> Span:
        span = Span()
        for x in range(1, corrupt_old + 1):
            for place in range(length + masks):
                span.learn(shares[x][place])
                for d in range(1, new):
                    span.learn({("new", x, place, d): 1})
        for (_, i), parts in dealt.items():
            if i <= corrupt_new:
                for part in parts:
                    span.learn(part)
        first = list(shares)[:old]
        for i in range(1, holders + 1):
            for x in shares:
                for row in range(masks):
                    weighted = [(17 * x + 5 * row + byte + 2, dealt[x, i][byte]) for byte in range(length)]
                    span.learn(plus(*weighted, (1, dealt[x, i][length + row])))
            for x in list(shares)[old:]:
                for byte in range(length):
                    gap = [(1, dealt[x, i][byte])]
                    for other in first:
                        weight = 1
                        for third in first:
                            if third != other:
                                weight = multiply(weight, multiply(x ^ third, inverse(other ^ third)))
                        gap.append((weight, dealt[other, i][byte]))
                    span.learn(plus(*gap))
        return span

    key = [("key", byte) for byte in range(length)]
    assert view(old - 1, new - 1).hides(key) == length
    assert view(old, 0).hides(key) == 0
    assert view(old - 1, new).hides(key) == 0


# Refusals.

OLD = generate_shares(b"k" * 16, threshold=2, shares=3)
PARTS = recovery_parts(OLD[0], helpers=[1, 2], lost=3)
SUMS = [Share(1, b"a" * 16), Share(2, b"b" * 16)]
REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: deal_zero(16, threshold=1, xs=[1, 2]), "the threshold is 1, but a refresh changes nothing below 2"),
    (lambda: deal_zero(0, threshold=2, xs=[1, 2]), "the shares have 0 bytes"),
    (lambda: deal_zero(16, threshold=3, xs=[1, 2]), r"the threshold is 3, but must be in 1\.\.2"),
    (lambda: deal_zero(16, threshold=2, xs=[0, 2]), r"a share index x is 0, but must be in 1\.\.255"),
    (lambda: refresh_shares([], threshold=2), "0 shares were given"),
    (lambda: refresh_shares([*OLD, OLD[0]], threshold=2), "two shares have the index x = 1"),
    (lambda: refresh_shares(OLD, threshold=4), r"the threshold is 4, but must be in 1\.\.3"),
    (lambda: refresh_share(OLD[0], []), "0 updates were given for the share of x = 1"),
    (lambda: refresh_share(OLD[0], [OLD[1]]), "what was sent is for x = 2, but the holder's index is 1"),
    (lambda: refresh_share(OLD[0], [Share(1, b"short")]), "a row has 5 bytes, but the first one has 16"),
    (lambda: reshare(OLD, threshold=4, new_threshold=1, xs=[1]), "3 shares were given, but the threshold is 4"),
    (lambda: reshare(OLD, threshold=0, new_threshold=1, xs=[1]), r"the threshold is 0, but must be in 1\.\.255"),
    (lambda: reshare(OLD, threshold=2, new_threshold=2, xs=[1]), r"the threshold is 2, but must be in 1\.\.1"),
    (lambda: reshare(OLD, threshold=2, new_threshold=1, xs=[1, 1]), "the share index x = 1 twice"),
    (lambda: merge_sub_shares(4, {1: Share(4, b"a")}, threshold=2), "1 sub-shares were given, but the old threshold"),
    (lambda: merge_sub_shares(4, {1: Share(5, b"a")}, threshold=1), "is for x = 5, but the holder's index is 4"),
    (lambda: recovery_parts(OLD[0], helpers=[1, 2], lost=2), "x = 2 is lost, but is among the helpers"),
    (lambda: recovery_parts(OLD[0], helpers=[2, 3], lost=4), r"the share has x = 1, but the helpers are \[2, 3\]"),
    (lambda: recovery_parts(OLD[0], helpers=[1, 2], lost=0), r"the lost index is 0, but must be in 1\.\.255"),
    (lambda: recovery_parts(OLD[0], helpers=[1, 1], lost=4), "the share index x = 1 twice"),
    (lambda: sum_recovery_parts(1, {1: PARTS[0]}, helpers=[1, 2]), r"parts of \[1\] were given, but the helpers are"),
    (lambda: sum_recovery_parts(1, {1: PARTS[0], 2: PARTS[1]}, helpers=[1, 2]), "is for x = 2, but the holder's"),
    (lambda: finish_recovery(SUMS[:1], helpers=[1, 2], lost=3), r"sums of \[1\] were given, but the helpers are"),
    (lambda: finish_recovery([*SUMS, SUMS[0]], helpers=[1, 2], lost=3), "two shares have the index x = 1"),
    (lambda: finish_recovery(SUMS, helpers=[1, 2], lost=1), "x = 1 is lost, but is among the helpers"),
    (lambda: recover_share(OLD, threshold=2, lost=1), r"x = 1 is lost, but is among the helpers \[1, 2\]"),
    (lambda: recover_share(OLD[:1], threshold=2, lost=9), "1 shares were given, but the threshold is 2"),
]


@pytest.mark.parametrize(("call", "text"), REFUSED)
def test_refusals_name_value_and_limit(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_no_error_shows_bytes_of_a_share() -> None:
    secret = b"\xee" * 16
    with pytest.raises(ValueError, match="a row has") as caught:
        refresh_share(Share(1, secret), [Share(1, secret[:-1])])
    assert "ee" not in str(caught.value)
    assert "\\x" not in str(caught.value)
