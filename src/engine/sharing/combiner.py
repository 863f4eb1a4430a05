"""Owns how shares become the secret again and which of them are wrong; it knows nothing of how they were gathered.

Bare Shamir returns garbage for a wrong share without a sign. So each share is held against its commitment, which
names the wrong ones from exactly t shares (decoding as Reed-Solomon would need t + 2e of them).
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping, Sequence

from engine._fastshamir import combine
from engine.errors import ShareCorrupt
from engine.sharing.secret import SecretBuffer, wipe
from engine.sharing.share import SALT_BYTES, Share, commitment, distinct

__all__ = ["find_corrupt", "reconstruct_into", "reconstruct_key"]


def reconstruct_key(
    share_set: Iterable[Share],
    *,
    threshold: int | None = None,
    commitments: Mapping[int, bytes] | None = None,
    salts: Mapping[int, bytes] | None = None,
    context: bytes = b"",
    names: Mapping[int, str] | None = None,
) -> bytes:
    """Reconstruct the secret as ``bytes``, which cannot be wiped; see ``reconstruct_into`` for the contract."""
    used = _checked(share_set, threshold, commitments, salts, context, names)
    return combine([share.x for share in used], [share.y for share in used])


def reconstruct_into(
    share_set: Iterable[Share],
    *,
    threshold: int | None = None,
    commitments: Mapping[int, bytes] | None = None,
    salts: Mapping[int, bytes] | None = None,
    context: bytes = b"",
    names: Mapping[int, str] | None = None,
) -> SecretBuffer:
    """Reconstruct the secret into locked memory, which the caller closes.

    ``threshold`` is the t of the key; without it every share given is used, which must be at least as many as the
    shares know to be needed. ``commitments`` and ``salts`` map x to the
    32-byte commitment and its salt, ``context`` is what the commitments were made with, ``names`` maps x to the node
    that gave the share (for errors). With commitments a wrong share is left out and another one taken; without them,
    shares beyond ``threshold`` must agree with the first ones.

    Raises ShareCorrupt, with the holders of the wrong shares, when fewer than ``threshold`` (without it: not all) are
    right, or when shares without commitments disagree. Raises ValueError for no share, one index twice, fewer shares
    than ``threshold`` (none of them wrong), different lengths, and commitments without salts; OSError when there is no
    locked memory (only here: ``reconstruct_key`` needs none).
    """
    used = _checked(share_set, threshold, commitments, salts, context, names)
    secret = SecretBuffer(len(used[0].y))
    try:
        combine([share.x for share in used], [share.y for share in used], out=secret)
    except BaseException:
        secret.close()
        raise
    return secret


def _checked(
    share_set: Iterable[Share],
    threshold: int | None,
    commitments: Mapping[int, bytes] | None,
    salts: Mapping[int, bytes] | None,
    context: bytes,
    names: Mapping[int, str] | None,
) -> list[Share]:
    """As many shares as are needed, of those that passed the checks."""
    given = distinct(share_set)
    needed = max(len(given), *(share.threshold for share in given)) if threshold is None else threshold
    if not 1 <= needed <= 255:
        raise ValueError(f"the threshold is {needed}, but must be in 1..255")
    if commitments is None:
        good = given
    else:
        if salts is None:
            raise ValueError("commitments were given without their salts, but each share is checked with both")
        good = _without_corrupt(given, needed, commitments, salts, context, names or {})
    if len(good) < needed:
        raise ValueError(f"{len(good)} shares were given, but the threshold is {needed}")
    used = good[:needed]
    if commitments is None:
        _check_agreement(used, good[needed:], names or {})
    return used


def find_corrupt(
    share_set: Iterable[Share],
    *,
    commitments: Mapping[int, bytes],
    salts: Mapping[int, bytes],
    context: bytes = b"",
) -> list[int]:
    """The indices x, in the order given, of the shares that do not match their commitments.

    A share without a commitment, or whose salt is missing or malformed, is a wrong one too: what a holder sends
    is never the caller's mistake.
    """
    corrupt = []
    for share in share_set:
        expected, salt = commitments.get(share.x), salts.get(share.x)
        if (
            expected is None
            or salt is None
            or len(salt) != SALT_BYTES
            or not hmac.compare_digest(commitment(salt, context, share), expected)
        ):
            corrupt.append(share.x)
    return corrupt


def _without_corrupt(
    given: Sequence[Share],
    needed: int,
    commitments: Mapping[int, bytes],
    salts: Mapping[int, bytes],
    context: bytes,
    names: Mapping[int, str],
) -> list[Share]:
    corrupt = find_corrupt(given, commitments=commitments, salts=salts, context=context)
    good = [share for share in given if share.x not in corrupt]
    if corrupt and len(good) < needed:
        holders = _holders(corrupt, names)
        raise ShareCorrupt(
            f"the shares of {', '.join(holders)} do not match their commitments: "
            f"{len(good)} right ones are left, but {needed} are needed",
            holders,
        )
    return good


def _check_agreement(used: Sequence[Share], spare: Iterable[Share], names: Mapping[int, str]) -> None:
    """Shares beyond the threshold lie on the polynomial of the others, or one of all is wrong: no one can say which."""
    xs, ys = [share.x for share in used], [share.y for share in used]
    for share in spare:
        expected = bytearray(len(used[0].y))
        try:
            combine(xs, ys, share.x, out=expected)
            if len(share.y) != len(expected):
                raise ValueError(
                    f"the share of x = {share.x} has {len(share.y)} bytes, but that of x = {xs[0]} has "
                    f"{len(expected)}: they are of different secrets"
                )
            if not hmac.compare_digest(share.y, expected):
                holders = _holders([*xs, share.x], names)
                raise ShareCorrupt(f"one or more of the shares of {', '.join(holders)} are wrong", holders)
        finally:
            wipe(expected)


def _holders(xs: Iterable[int], names: Mapping[int, str]) -> list[str]:
    return [names.get(x, f"x={x}") for x in xs]
