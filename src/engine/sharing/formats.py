"""Owns how other tools write shares: Vault's parts, SLIP-39's groups, libgfshare's files. It reads and writes no file.

None of these formats is used by a cluster. They are for moving a secret from or to such a tool: none of them but
SLIP-39's tells a wrong share, so check what comes out. Names and numbers are public, values are not.
"""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from engine._fastshamir import combine, split
from engine.errors import ShareCorrupt
from engine.sharing.share import Share, distinct

__all__ = [
    "gfshare_combine",
    "gfshare_index",
    "gfshare_name",
    "gfshare_split",
    "read_vault_part",
    "slip39_interpolate",
    "slip39_recover",
    "slip39_split",
    "write_vault_part",
]

# Vault's (shamir/shamir.go; also privy's and pyshamir's): the value, then x in one byte. The field is ours, 0x11B.


def write_vault_part(share: Share) -> bytes:
    """A share as a part of Vault's."""
    return share.y + bytes([share.x])


def read_vault_part(part: bytes) -> Share:
    """A part of Vault's as a share. ValueError for less than two bytes, and for x = 0, which Vault never gives."""
    if len(part) < 2:
        raise ValueError(f"the part has {len(part)} bytes, but needs at least 2")
    return Share(part[-1], bytes(part[:-1]))


# SLIP-0039, "Splitting a secret": the field is ours, members have the indices 0..15, f(254) holds a digest and f(255)
# the secret. What is around it (groups of groups, words, a passphrase) is not done here.

SLIP39_SECRET: Final = 255
SLIP39_DIGEST: Final = 254
SLIP39_MEMBERS_MAX: Final = 16
SLIP39_DIGEST_BYTES: Final = 4
SLIP39_SECRET_BYTES_MIN: Final = 16
_SHIFT: Final = 16
"""Added to every index. The field has characteristic 2, so f(x + 16) interpolates as f does, and no index is 0 then."""


def slip39_interpolate(points: Mapping[int, bytes], x: int) -> bytes:
    """The value at ``x`` of the polynomial through ``points`` (index -> value), indices in 0..15, 254 and 255."""
    for each in (*points, x):
        if not (0 <= each < SLIP39_MEMBERS_MAX or each in (SLIP39_DIGEST, SLIP39_SECRET)):
            raise ValueError(f"the index is {each}, but must be in 0..15, 254 or 255")
    return combine([each ^ _SHIFT for each in points], list(points.values()), x ^ _SHIFT)


def slip39_split(secret: bytes, *, threshold: int, shares: int) -> dict[int, bytes]:
    """Member index -> value, for 1 <= threshold <= shares <= 16. With threshold 1 every member has the secret itself.

    The secret has at least 16 bytes, and an even number of them.
    """
    if not 1 <= shares <= SLIP39_MEMBERS_MAX:
        raise ValueError(f"the number of shares is {shares}, but must be in 1..{SLIP39_MEMBERS_MAX}")
    if not 1 <= threshold <= shares:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..{shares}, the number of shares")
    if len(secret) < SLIP39_SECRET_BYTES_MIN or len(secret) % 2:
        raise ValueError(
            f"the secret has {len(secret)} bytes, but needs an even number from {SLIP39_SECRET_BYTES_MIN} on"
        )
    if threshold == 1:
        return dict.fromkeys(range(shares), bytes(secret))
    given = {index: os.urandom(len(secret)) for index in range(threshold - 2)}
    salt = os.urandom(len(secret) - SLIP39_DIGEST_BYTES)
    base = {**given, SLIP39_DIGEST: _slip39_digest(salt, secret) + salt, SLIP39_SECRET: bytes(secret)}
    return {**given, **{index: slip39_interpolate(base, index) for index in range(threshold - 2, shares)}}


def slip39_recover(points: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The secret from exactly ``threshold`` members' values; ShareCorrupt when its digest does not match."""
    if len(points) != threshold:
        raise ValueError(f"{len(points)} shares were given, but the threshold is {threshold}")
    if threshold == 1:
        return bytes(next(iter(points.values())))
    secret, digest = (slip39_interpolate(points, x) for x in (SLIP39_SECRET, SLIP39_DIGEST))
    expected = _slip39_digest(digest[SLIP39_DIGEST_BYTES:], secret)
    if not hmac.compare_digest(digest[:SLIP39_DIGEST_BYTES], expected):
        holders = [f"x={x}" for x in points]
        raise ShareCorrupt(f"one or more of the shares of {', '.join(holders)} are wrong", holders)
    return secret


def _slip39_digest(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha256")[:SLIP39_DIGEST_BYTES]


# libgfshare's gfsplit and gfcombine: the field is 0x11D, a file holds the value, and its name ends in x: "secret.042".

GFSHARE_FIELD: Final = 0x11D


def gfshare_name(stem: str, share: Share) -> str:
    """The file's name of a share."""
    return f"{stem}.{share.x:03}"


def gfshare_index(name: str) -> int:
    """The index in a file's name; ValueError if there is none in 1..255."""
    found = re.search(r"\.([0-9]{3})\Z", name)
    if found is None or not 1 <= int(found[1]) <= 255:
        raise ValueError(f"the name {name[-80:]!r} does not end in an index from .001 to .255")
    return int(found[1])


def gfshare_split(secret: bytes, *, threshold: int, xs: Sequence[int]) -> list[Share]:
    """The contents of gfsplit's files for the indices ``xs``. They are no shares of ``reconstruct_key``'s field."""
    values = split(secret, threshold, len(xs), xs, poly=GFSHARE_FIELD)
    return [Share(x, y) for x, y in zip(xs, values, strict=True)]


def gfshare_combine(share_set: Iterable[Share]) -> bytes:
    """What gfcombine makes of the files: give at least as many as the threshold. It has no way to tell a wrong one."""
    given = distinct(share_set)
    return combine([share.x for share in given], [share.y for share in given], poly=GFSHARE_FIELD)
