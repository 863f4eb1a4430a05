"""Owns the proof that other tools read what we write and the other way: Vault's parts, SLIP-39, libgfshare's files."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import pyshamir
import pytest
import shamir_mnemonic
from hypothesis import given, settings
from hypothesis import strategies as st
from shamir_mnemonic import shamir as slip39

from engine._fastshamir import combine, split
from engine.errors import ShareCorrupt
from engine.sharing import Share, generate_shares, reconstruct_key
from engine.sharing.formats import (
    gfshare_combine,
    gfshare_index,
    gfshare_name,
    gfshare_split,
    read_vault_part,
    slip39_interpolate,
    slip39_recover,
    slip39_split,
    write_vault_part,
)

relaxed = settings(deadline=None)
few = settings(deadline=None, max_examples=15)  # pyshamir takes tens of milliseconds a byte


# Vault.


@few
@given(st.binary(min_size=1, max_size=24), st.integers(2, 4), st.integers(0, 2))
def test_vaults_parts_both_ways(secret: bytes, threshold: int, spare: int) -> None:
    ours = [write_vault_part(share) for share in generate_shares(secret, threshold=threshold, shares=threshold + spare)]
    assert pyshamir.combine([bytearray(part) for part in ours[spare:]]) == secret
    theirs = [bytes(part) for part in pyshamir.split(secret, threshold + spare, threshold)]
    assert reconstruct_key([read_vault_part(part) for part in theirs[spare:]], threshold=threshold) == secret


PRIVY_SECRET = b"Keyquorum and privy agree"
PRIVY_PARTS = (
    "8b2aac75c8bc6aafe1b2067a587bbaf60b85aa90cb999cb830b0",
    "d6c459dbb8199b446d3a1a81e1b269cdb22a69b081c9ddea442d",
    "bed0a5ea9b0f840a37a69fcbc2aca88ba49e09025511d3a64856",
    "a3dc7023c428d441aacca8d1f07a371d0cf8b4eb2add209750ff",
    "1982dd2b3842785e33b6bd756092dbdf10a35c1563e34e6cf20f",
)
"""Written by ``split(secret, 5, 3)`` of npm's shamir-secret-sharing 0.0.4; tests/assurance runs it both ways."""


def test_parts_that_privy_wrote_are_read() -> None:
    parts = [read_vault_part(bytes.fromhex(part)) for part in PRIVY_PARTS]
    for some in combinations(parts, 3):
        assert reconstruct_key(some, threshold=3) == PRIVY_SECRET


@relaxed
@given(st.binary(min_size=1, max_size=100), st.integers(1, 255))
def test_a_vault_part_is_read_as_it_was_written(y: bytes, x: int) -> None:
    assert write_vault_part(Share(x, y)) == y + bytes([x])
    assert read_vault_part(write_vault_part(Share(x, y))) == Share(x, y)


# SLIP-39.

strong = st.integers(8, 32).flatmap(lambda half: st.binary(min_size=2 * half, max_size=2 * half))


@relaxed
@given(strong, st.integers(1, 16), st.data())
def test_slip39_both_ways(secret: bytes, threshold: int, data: st.DataObject) -> None:
    """Any members' values of ours are theirs to recover, and of theirs ours."""
    shares = data.draw(st.integers(threshold, 16))
    members = data.draw(st.permutations(range(shares)))[:threshold]
    ours = slip39_split(secret, threshold=threshold, shares=shares)
    assert list(ours) == list(range(shares))
    assert slip39._recover_secret(threshold, [slip39.RawShare(x, ours[x]) for x in members]) == secret
    theirs = {share.x: share.data for share in slip39._split_secret(threshold, shares, secret)}
    assert slip39_recover({x: theirs[x] for x in members}, threshold=threshold) == secret


@relaxed
@given(st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True), st.data())
def test_slip39s_interpolation_is_the_same_everywhere(members: list[int], data: st.DataObject) -> None:
    points = {x: data.draw(st.binary(min_size=20, max_size=20)) for x in members}
    raw = [slip39.RawShare(x, y) for x, y in points.items()]
    for target in (*range(16), 254, 255):
        assert slip39_interpolate(points, target) == slip39._interpolate(raw, target)


def test_the_core_interpolates_at_slip39s_places_itself() -> None:
    """Without member 0, which the core refuses as an index, no shift is needed: the target may be any x."""
    secret = bytes(range(16))
    theirs = [share for share in slip39._split_secret(3, 8, secret) if share.x != 0][:3]
    assert combine([share.x for share in theirs], [share.data for share in theirs], 255) == secret


def test_slip39s_words_hold_the_same_values() -> None:
    """From mnemonics made by shamir-mnemonic to its encrypted master secret, with every pair of members."""
    groups = shamir_mnemonic.generate_mnemonics(1, [(2, 3)], b"sixteen bytes..!", b"")
    shares = [slip39.Share.from_mnemonic(words) for words in groups[0]]
    expected = slip39.recover_ems(slip39.decode_mnemonics(groups[0][:2])).ciphertext
    for pair in combinations(shares, 2):
        assert slip39_recover({share.index: share.value for share in pair}, threshold=2) == expected


@relaxed
@given(st.integers(2, 6), st.integers(0, 15), st.integers(1, 255))
def test_slip39_notices_a_wrong_share(threshold: int, place: int, flip: int) -> None:
    shares = slip39_split(bytes(16), threshold=threshold, shares=threshold)
    wrong = bytearray(shares[threshold - 1])
    wrong[place] ^= flip
    with pytest.raises(ShareCorrupt, match=r"one or more of the shares of x=0, x=1.* are wrong"):
        slip39_recover({**shares, threshold - 1: bytes(wrong)}, threshold=threshold)


# libgfshare.

needs_gfshare = pytest.mark.skipif(shutil.which("gfsplit") is None, reason="needs Debian's libgfshare-bin")

GFSPLIT_SECRET = b"Keyquorum and libgfshare agree"
GFSPLIT_FILES = {
    "v.003": "686f85f4e9d5830df5c53aa4c315143a2beb63e31d2018053fa44eae1cdb",
    "v.095": "f65621caf97e67de86ef3b176db453484ce5e1baf737e32d75e857fd0e42",
    "v.156": "0d17a86af57e6ddc9aa25bd118b18e79adb712774cbbd1d754a500ef5572",
    "v.219": "6594a650b13c1c87343d8b3b9270d210dbe91b1c85431ef9ff45cfc07cc5",
    "v.223": "77405dcfdc4a070f418d6448fbf02decadd44b9576463a0587da57c3c859",
}
"""Written by ``gfsplit -n 3 -m 5`` of libgfshare-bin 2.0.0-6 (Debian 12)."""


def test_files_that_gfsplit_wrote_are_read() -> None:
    files = [Share(gfshare_index(name), bytes.fromhex(value)) for name, value in GFSPLIT_FILES.items()]
    for some in combinations(files, 3):
        assert gfshare_combine(some) == GFSPLIT_SECRET
    assert gfshare_combine(files) == GFSPLIT_SECRET
    assert reconstruct_key(files[:3]) != GFSPLIT_SECRET, "the two fields give the same"


@relaxed
@given(st.binary(min_size=1, max_size=100), st.integers(1, 6), st.integers(0, 3), st.data())
def test_what_we_split_in_libgfshares_field_is_combined(
    secret: bytes, threshold: int, spare: int, data: st.DataObject
) -> None:
    xs = data.draw(st.lists(st.integers(1, 255), min_size=threshold + spare, max_size=threshold + spare, unique=True))
    shares = gfshare_split(secret, threshold=threshold, xs=xs)
    assert [share.x for share in shares] == xs
    assert gfshare_combine(data.draw(st.permutations(shares))[:threshold]) == secret


def test_the_fields_differ_as_they_should() -> None:
    """2 times 0x80: a line through 0x80 at 0 with slope 1 is 0x81 at 1; at 0x80 its slope's multiple is reduced."""
    # f(x) = c x with f(2) = y means c = y / 2, and f(0x80) = 0x80 * y / 2; for y = 2 that is 0x80 in any field, and
    # for y = 4 it is 2 * 0x80: 0x1B over 0x11B, 0x1D over 0x11D.
    assert combine([255, 2], [bytes([product(255, 2, 0x11B)]), b"\x04"], 0x80) == b"\x1b"
    assert combine([255, 2], [bytes([product(255, 2, 0x11D)]), b"\x04"], 0x80, poly=0x11D) == b"\x1d"
    assert split(b"k", 1, 1, poly=0x11D) == [b"k"]


def product(a: int, b: int, poly: int) -> int:
    result = 0
    while b:
        if b & 1:
            result ^= a
        a = a << 1
        a ^= poly if a & 0x100 else 0
        b >>= 1
    return result


@needs_gfshare
@pytest.mark.parametrize(("threshold", "shares", "length"), [(2, 3, 1), (3, 5, 100), (5, 9, 70_000)])
def test_gfcombine_reads_our_files(tmp_path: Path, threshold: int, shares: int, length: int) -> None:
    secret = random.Random(length).randbytes(length)
    dealt = gfshare_split(secret, threshold=threshold, xs=random.Random(7).sample(range(1, 256), shares))
    names = [gfshare_name("ours", share) for share in dealt]
    for name, share in zip(names, dealt, strict=True):
        (tmp_path / name).write_bytes(share.y)
    subprocess.run(["gfcombine", "-o", "back", *names[:threshold]], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "back").read_bytes() == secret


@needs_gfshare
@pytest.mark.parametrize(("threshold", "shares", "length"), [(2, 3, 1), (3, 5, 100), (5, 9, 70_000)])
def test_we_read_gfsplits_files(tmp_path: Path, threshold: int, shares: int, length: int) -> None:
    secret = random.Random(length).randbytes(length)
    (tmp_path / "secret").write_bytes(secret)
    command = ["gfsplit", "-n", str(threshold), "-m", str(shares), "secret", "theirs"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    files = [Share(gfshare_index(path.name), path.read_bytes()) for path in tmp_path.glob("theirs.*")]
    assert len(files) == shares
    assert gfshare_combine(files[:threshold]) == secret
    assert gfshare_combine(files) == secret


# Refusals.

REFUSED: list[tuple[Callable[[], object], str]] = [
    (lambda: read_vault_part(b""), "the part has 0 bytes, but needs at least 2"),
    (lambda: read_vault_part(b"\x01"), "the part has 1 bytes, but needs at least 2"),
    (lambda: read_vault_part(b"a\x00"), r"the share index x is 0, but must be in 1\.\.255"),
    (lambda: slip39_interpolate({16: b"a"}, 255), r"the index is 16, but must be in 0\.\.15, 254 or 255"),
    (lambda: slip39_interpolate({1: b"a"}, -1), r"the index is -1, but must be in 0\.\.15, 254 or 255"),
    (lambda: slip39_interpolate({1: b"a"}, 253), "the index is 253"),
    (lambda: slip39_interpolate({}, 255), "0 shares were given"),
    (
        lambda: slip39_split(bytes(14), threshold=1, shares=1),
        "the secret has 14 bytes, but needs an even number from 16 on",
    ),
    (
        lambda: slip39_split(bytes(17), threshold=1, shares=1),
        "the secret has 17 bytes, but needs an even number from 16 on",
    ),
    (lambda: slip39_split(bytes(16), threshold=1, shares=17), r"the number of shares is 17, but must be in 1\.\.16"),
    (lambda: slip39_split(bytes(16), threshold=3, shares=2), r"the threshold is 3, but must be in 1\.\.2"),
    (lambda: slip39_recover({0: bytes(16)}, threshold=2), "1 shares were given, but the threshold is 2"),
    (lambda: gfshare_index("secret"), r"does not end in an index from \.001 to \.255"),
    (lambda: gfshare_index("secret.000"), r"does not end in an index from \.001 to \.255"),
    (lambda: gfshare_index("secret.256"), r"does not end in an index from \.001 to \.255"),
    (lambda: gfshare_index("secret.0255"), r"does not end in an index from \.001 to \.255"),
    (lambda: gfshare_index("secret.01\n"), r"does not end in an index from \.001 to \.255"),
    (lambda: gfshare_combine([]), "0 shares were given"),
    (lambda: gfshare_combine([Share(1, b"a"), Share(1, b"a")]), "two shares have the index x = 1"),
]


@pytest.mark.parametrize(("call", "text"), REFUSED)
def test_refusals_name_value_and_limit(call: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()
