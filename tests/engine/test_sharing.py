"""Owns the proof that any t shares recover a key, fewer never do unnoticed, and a wrong share is named."""

from __future__ import annotations

import hmac
import traceback
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from hashlib import sha256
from itertools import combinations
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ShareCorrupt
from engine.sharing import (
    BLINDING_BYTES,
    SALT_BYTES,
    SecretBuffer,
    Share,
    blind,
    check_value,
    commitment,
    dealer,
    find_corrupt,
    fresh_secret,
    generate_shares,
    new_salt,
    reconstruct_into,
    reconstruct_key,
    unblind,
    wipe,
)

CONTEXT = b"key-7/version-1/epoch-3"
NAMES = {x: f"node-{x}" for x in range(1, 256)}

secrets = st.binary(min_size=1, max_size=100)
# Machines differ: no test here times anything.
relaxed = settings(deadline=None)


@st.composite
def sharings(draw: st.DrawFn, least: int = 1) -> tuple[bytes, int, list[Share]]:
    """(secret, threshold, shares), with threshold >= least and shares up to 12."""
    shares = draw(st.integers(least, 12))
    threshold = draw(st.integers(least, shares))
    secret = draw(secrets)
    return secret, threshold, generate_shares(secret, threshold=threshold, shares=shares)


def committed(shares: Sequence[Share]) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """(commitments, salts) of the shares."""
    salts = {share.x: new_salt() for share in shares}
    return {share.x: commitment(salts[share.x], CONTEXT, share) for share in shares}, salts


def changed(share: Share, position: int, flip: int) -> Share:
    y = bytearray(share.y)
    y[position % len(y)] ^= flip
    return Share(share.x, bytes(y))


# Reconstruction.


@relaxed
@given(sharings(), st.randoms(use_true_random=False))
def test_any_threshold_of_the_shares_recover(sharing: tuple[bytes, int, list[Share]], random: object) -> None:
    """Any t, in any order, with and without commitments."""
    secret, threshold, shares = sharing
    random.shuffle(shares)  # type: ignore[attr-defined]
    commitments, salts = committed(shares)
    some = shares[:threshold]
    assert reconstruct_key(some) == secret
    assert reconstruct_key(iter(some), threshold=threshold) == secret
    assert reconstruct_key(shares, threshold=threshold) == secret
    assert reconstruct_key(some, threshold=threshold, commitments=commitments, salts=salts, context=CONTEXT) == secret


def test_every_subset_of_three_of_five() -> None:
    shares = generate_shares(b"the key", threshold=3, shares=5)
    assert all(reconstruct_key(some) == b"the key" for size in (3, 4, 5) for some in combinations(shares, size))


@relaxed
@given(sharings(least=2), st.data())
def test_fewer_never_recover_unnoticed(sharing: tuple[bytes, int, list[Share]], data: st.DataObject) -> None:
    """With the threshold known, as dealt shares know it, it is refused; without it, the check value does not match."""
    _, threshold, _ = sharing
    key = data.draw(secrets)
    secret = bytes(blind(key))
    shares = generate_shares(secret, threshold=threshold, shares=len(sharing[2]))
    commitments, salts = committed(shares)
    few = data.draw(st.permutations(shares))[: data.draw(st.integers(1, threshold - 1))]
    with pytest.raises(ValueError, match=rf"^{len(few)} shares were given, but the threshold is {threshold}$"):
        reconstruct_key(few, threshold=threshold)
    with pytest.raises(ValueError, match=rf"^{len(few)} shares were given, but the threshold is {threshold}$"):
        reconstruct_key(few, threshold=threshold, commitments=commitments, salts=salts, context=CONTEXT)
    with pytest.raises(ValueError, match=rf"^{len(few)} shares were given, but the threshold is {threshold}$"):
        reconstruct_key(few)
    garbage = reconstruct_key([Share(share.x, share.y) for share in few])
    assert garbage != secret
    assert check_value(garbage, CONTEXT) != check_value(secret, CONTEXT)


@relaxed
@given(sharings(), st.data())
def test_wrong_shares_are_named(sharing: tuple[bytes, int, list[Share]], data: st.DataObject) -> None:
    """Any changed shares are found, others are taken while there are t, and else the error names the holders."""
    secret, threshold, shares = sharing
    commitments, salts = committed(shares)
    bad = data.draw(st.sets(st.sampled_from(range(len(shares))), min_size=1))
    flips = st.integers(1, 255)
    mixed = [
        changed(share, data.draw(st.integers(0, 99)), data.draw(flips)) if place in bad else share
        for place, share in enumerate(shares)
    ]
    wrong = [shares[place].x for place in sorted(bad)]
    assert find_corrupt(mixed, commitments=commitments, salts=salts, context=CONTEXT) == wrong

    def attempt() -> bytes:
        return reconstruct_key(
            mixed, threshold=threshold, commitments=commitments, salts=salts, context=CONTEXT, names=NAMES
        )

    if len(shares) - len(bad) >= threshold:
        assert attempt() == secret
    else:
        with pytest.raises(ShareCorrupt) as caught:
            attempt()
        assert caught.value.holders == tuple(f"node-{x}" for x in wrong)
        assert all(f"node-{x}" in str(caught.value) for x in wrong)


@relaxed
@given(sharings(), st.data())
def test_spare_shares_must_agree_without_commitments(
    sharing: tuple[bytes, int, list[Share]], data: st.DataObject
) -> None:
    """More than t shares without commitments: one changed share among them can't pass, though no one can name it."""
    _, threshold, _ = sharing
    shares = generate_shares(b"some key", threshold=threshold, shares=threshold + 2)
    place = data.draw(st.integers(0, threshold + 1))
    shares[place] = changed(shares[place], data.draw(st.integers(0, 99)), data.draw(st.integers(1, 255)))
    with pytest.raises(ShareCorrupt, match=r"one or more of the shares of .* are wrong") as caught:
        reconstruct_key(shares, threshold=threshold, names=NAMES)
    assert f"node-{place + 1}" in caught.value.holders


@pytest.mark.parametrize("what", ["share of another key", "other context", "other salt", "no commitment", "no salt",
                                  "short salt", "short share", "other index"])  # fmt: skip
def test_every_way_to_be_wrong(what: str) -> None:
    """Each of these makes exactly the share of x = 2 a wrong one, and it is the holder's fault, not the caller's."""
    shares = generate_shares(b"k" * 48, threshold=2, shares=3)
    commitments, salts = committed(shares)
    match what:
        case "share of another key":
            shares[1] = generate_shares(b"j" * 48, threshold=2, shares=3)[1]
        case "other context":
            commitments[2] = commitment(salts[2], b"key-7/version-1/epoch-2", shares[1])
        case "other salt":
            salts[2] = new_salt()
        case "no commitment":
            del commitments[2]
        case "no salt":
            del salts[2]
        case "short salt":
            salts[2] = salts[2][:-1]
        case "short share":
            shares[1] = Share(2, shares[1].y[:-1])
        case "other index":
            commitments[2] = commitment(salts[2], CONTEXT, Share(3, shares[1].y))
    assert find_corrupt(shares, commitments=commitments, salts=salts, context=CONTEXT) == [2]
    assert reconstruct_key(shares, threshold=2, commitments=commitments, salts=salts, context=CONTEXT) == b"k" * 48
    with pytest.raises(ShareCorrupt, match=r"x=2 do not match .*: 2 right ones are left, but 3 are needed") as caught:
        reconstruct_key(shares, commitments=commitments, salts=salts, context=CONTEXT)
    assert caught.value.holders == ("x=2",)


def test_reconstruct_into_gives_locked_memory() -> None:
    shares = generate_shares(b"secret key", threshold=2, shares=2)
    with reconstruct_into(shares) as secret:
        assert isinstance(secret, SecretBuffer)
        assert secret == b"secret key"
        wipe(secret)
        assert secret == bytes(10)


SHARES = [Share(1, b"abcd"), Share(2, b"efgh"), Share(3, b"ijkl")]
Call = Callable[[], object]
VALUE_ERRORS: list[tuple[Call, str]] = [
    (lambda: Share(0, b"y"), r"the share index x is 0, but must be in 1\.\.255"),
    (lambda: Share(256, b"y"), r"the share index x is 256, but must be in 1\.\.255"),
    (lambda: Share(4, b""), "the share of x = 4 has 0 bytes, but needs at least 1"),
    (lambda: generate_shares(b"", threshold=1, shares=1), "the secret has 0 bytes"),
    (lambda: generate_shares(b"s", threshold=3, shares=2), r"the threshold is 3, but must be in 1\.\.2"),
    (lambda: generate_shares(b"s", threshold=0, shares=2), r"the threshold is 0, but must be in 1\.\.2"),
    (lambda: generate_shares(b"s", threshold=2, shares=256), r"the number of shares is 256, but must be in 1\.\.255"),
    (lambda: reconstruct_key([]), "0 shares were given, but at least 1 is needed"),
    (lambda: reconstruct_key([*SHARES, SHARES[0]]), "two shares have the index x = 1"),
    (lambda: reconstruct_key(SHARES, threshold=0), r"the threshold is 0, but must be in 1\.\.255"),
    (lambda: reconstruct_key(SHARES, threshold=256), r"the threshold is 256, but must be in 1\.\.255"),
    (lambda: reconstruct_key(SHARES, threshold=4), "3 shares were given, but the threshold is 4"),
    (lambda: reconstruct_key([*SHARES, Share(4, b"m")]), "x = 4 has 1 bytes, but that of x = 1 has 4"),
    (lambda: reconstruct_key([*SHARES, Share(4, b"m")], threshold=3), "x = 4 has 1 bytes, but that of x = 1 has 4"),
    (lambda: reconstruct_key(SHARES, commitments={}), "commitments were given without their salts"),
    (lambda: commitment(b"short", b"", SHARES[0]), "salt has 5 bytes, but must have 32"),
    (lambda: fresh_secret(0), "the key has 0 bytes, but needs at least 1"),
    (lambda: blind(b""), "the key has 0 bytes, but needs at least 1"),
    (lambda: unblind(bytearray(32)), "the secret has 32 bytes, but a blinded key has more than 32"),
]
TYPE_ERRORS: list[tuple[Call, str]] = [
    (lambda: Share("1", b"y"), "the share index x must be an int, not str"),  # type: ignore[arg-type]
    (lambda: Share(1, "y"), "the share's value y must be bytes, not str"),  # type: ignore[arg-type]
    (lambda: Share(1, bytearray(b"y")), "must be bytes, not bytearray"),  # type: ignore[arg-type]
    (lambda: generate_shares("s", threshold=1, shares=1), "the secret must be a C-contiguous"),  # type: ignore[arg-type]
    (lambda: reconstruct_key([(1, b"y")]), "a share must be a Share, not tuple"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "text"), VALUE_ERRORS, ids=[text for _, text in VALUE_ERRORS])
def test_bad_values_are_named_with_their_limit(call: Call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize(("call", "text"), TYPE_ERRORS, ids=[text for _, text in TYPE_ERRORS])
def test_bad_types_are_named(call: Call, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        call()


# Shares, commitments, check values, blinding.


def test_a_share_hides_its_value() -> None:
    share = Share(3, b"tell nobody")
    assert repr(share) == str(share) == f"{share}" == "Share(x=3, y=<11 bytes>)"
    assert "nobody" not in repr({"share": [share]})


def test_a_share_is_a_frozen_value() -> None:
    share = Share(3, b"yes")
    assert share == Share(3, b"yes")
    assert hash(share) == hash(Share(3, b"yes"))
    assert share != Share(4, b"yes")
    assert share != Share(3, b"no!")
    assert share != Share(3, b"no")
    assert share != (3, b"yes")
    with pytest.raises(FrozenInstanceError):
        share.x = 4  # type: ignore[misc]
    assert not hasattr(share, "__dict__")


def test_errors_hold_no_share() -> None:
    """The text of a ShareCorrupt shows indices and counts, and no value."""
    shares = [Share(1, b"tell nobody 1"), Share(2, b"tell nobody 2")]
    with pytest.raises(ShareCorrupt) as caught:
        reconstruct_key(shares, commitments={1: bytes(32)}, salts={1: bytes(32)})
    text = "".join(traceback.format_exception_only(caught.value))
    assert "x=1, x=2" in text
    assert "nobody" not in text


def test_the_commitment_is_as_documented() -> None:
    """SHA-256(label, |salt|, salt, |context|, context, x, y), written out by hand."""
    salt = bytes(range(32))
    by_hand = b"keyquorum/commitment/1\0" + b"\0\0\0\x20" + salt + b"\0\0\0\x02" + b"cc" + b"\x09" + b"value"
    assert commitment(salt, b"cc", Share(9, b"value")) == sha256(by_hand).digest()


def test_the_check_value_is_as_documented() -> None:
    by_hand = b"keyquorum/check-value/1\0" + b"\0\0\0\x02" + b"cc" + b"secret"
    for secret in (b"secret", bytearray(b"secret"), memoryview(b"secret")):
        assert check_value(secret, b"cc") == sha256(by_hand).digest()


@relaxed
@given(
    st.binary(max_size=8), st.binary(min_size=1, max_size=8), st.binary(max_size=8), st.binary(min_size=1, max_size=8)
)
def test_commitments_have_one_reading(context: bytes, y: bytes, other_context: bytes, other_y: bytes) -> None:
    """Bytes can't wander from the context into the share: different inputs, different hashes, and none is shared."""
    salt = bytes(32)
    same = (context, y) == (other_context, other_y)
    assert (
        hmac.compare_digest(commitment(salt, context, Share(1, y)), commitment(salt, other_context, Share(1, other_y)))
        == same
    )
    assert (check_value(y, context) == check_value(other_y, other_context)) == same
    assert commitment(salt, context, Share(1, y)) != check_value(y, context)


def test_salts_are_fresh() -> None:
    salts = {new_salt() for _ in range(100)}
    assert len(salts) == 100
    assert {len(salt) for salt in salts} == {SALT_BYTES} == {32}


@relaxed
@given(secrets)
def test_blinding_ends_in_32_random_bytes(key: bytes) -> None:
    with blind(key) as first, blind(bytearray(key)) as second:
        one, two = bytes(first), bytes(second)
        assert unblind(first) == key
    assert one[:-BLINDING_BYTES] == two[:-BLINDING_BYTES] == key
    assert len(one) == len(key) + 32
    assert one[-32:] != two[-32:]


@relaxed
@given(st.integers(1, 100), st.binary(max_size=120))
def test_a_fresh_secret_is_random_and_mixed(length: int, mixed: bytes) -> None:
    """Two are never alike, with nothing, the same or zeros mixed in; too few bytes to mix are refused."""
    if mixed and len(mixed) < length:
        with pytest.raises(ValueError, match=f"{len(mixed)} random bytes were given for a key of {length}"):
            fresh_secret(length, mixed)
        return
    with fresh_secret(length, mixed) as one, fresh_secret(length, mixed) as two:
        assert len(one) == length + BLINDING_BYTES
        assert one != two
        assert bytes(one)[length:] != bytes(two)[length:]


def test_what_is_mixed_in_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is the sum of both generators' bytes; the blinding is the system's alone."""
    known = SecretBuffer.copy_of(bytes(range(40)))
    monkeypatch.setattr(dealer, "SecretBuffer", SimpleNamespace(random=lambda length: known))
    assert fresh_secret(8, b"\xff" * 9) == bytes(255 - each for each in range(8)) + bytes(range(8, 40))


def test_wiping_the_secret_wipes_the_key_inside() -> None:
    """``unblind`` is a view: there is no second copy to forget."""
    secret = blind(b"the key")
    key = unblind(secret)
    wipe(secret)
    assert secret == bytes(39)
    assert key == bytes(7)
    part = memoryview(bytearray(b"abcd"))
    wipe(part[1:3])
    assert bytes(part) == b"a\0\0d"


@relaxed
@given(st.binary(min_size=1, max_size=300), st.integers(1, 6), st.integers(0, 6))
def test_the_whole_way_of_a_key(key: bytes, threshold: int, spare: int) -> None:
    """blind, split, commit; reconstruct, check, unblind."""
    secret = blind(key)
    expected = check_value(secret, CONTEXT)
    shares = generate_shares(secret, threshold=threshold, shares=threshold + spare)
    commitments, salts = committed(shares)
    again = reconstruct_into(
        reversed(shares), threshold=threshold, commitments=commitments, salts=salts, context=CONTEXT
    )
    assert check_value(again, CONTEXT) == expected
    assert unblind(again) == key
