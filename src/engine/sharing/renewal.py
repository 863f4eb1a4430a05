"""Owns new shares out of old ones, without the secret: refresh, reshare, recovery. It knows no epoch and no holder.

Each protocol stands here twice: as the steps that holders take, each on what it may see (the way of a cluster), and as
one function for somebody who has the shares anyway. A share of before and one of after never fit together, but ``t``
of one time always do: whoever takes a step destroys the old shares, and gives the new ones a new epoch in their
commitments.

A refresh can be checked by everybody: ``fingerprint`` and ``zero_sharing_faults``; and a reshare in which more than t
take part: ``sharing_faults``, ``sub_share_gaps`` and ``wrong_sub_sharings``. No other step can tell whether the others
were honest. A wrong sub-share gives wrong shares, which the check value of the key shows at the next reconstruction,
and ``correction`` or the commitments show before.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from engine._fastshamir import add, combine, dot, interpolate, split
from engine.errors import ShareCorrupt
from engine.sharing.correction import correct_shares
from engine.sharing.secret import wipe
from engine.sharing.share import Share, distinct

__all__ = [
    "FINGERPRINT_BYTES",
    "deal_sub_shares",
    "deal_zero",
    "fingerprint",
    "finish_recovery",
    "merge_sub_shares",
    "recover_share",
    "recovery_parts",
    "refresh_share",
    "refresh_shares",
    "reshare",
    "sharing_faults",
    "sub_share_gaps",
    "sum_recovery_parts",
    "wrong_sub_sharings",
    "zero_sharing_faults",
]

FINGERPRINT_BYTES = 16
"""A false update passes with probability 2^-8 for each of these bytes."""

# Refresh: Herzberg, Jarecki, Krawczyk and Yung, "Proactive secret sharing", CRYPTO 1995, 3.2.


def deal_zero(length: int, *, threshold: int, xs: Sequence[int]) -> list[Share]:
    """Share ``length`` zero bytes: one holder's part in a refresh, a Share for each index of ``xs``, to be sent to it.

    All coefficients but the constant one are uniform. 2 <= threshold <= len(xs): a sharing with threshold 1 is the
    secret itself, and no refresh changes it.
    """
    if threshold < 2:
        raise ValueError(f"the threshold is {threshold}, but a refresh changes nothing below 2")
    if length < 1:
        raise ValueError(f"the shares have {length} bytes, but need at least 1")
    return [Share(x, y) for x, y in zip(xs, split(bytes(length), threshold, len(xs), xs), strict=True)]


def refresh_share(share: Share, updates: Iterable[Share]) -> Share:
    """The new share of one holder: its old one plus what each dealer of zero sent it. The old one is to be destroyed.

    Every holder has to add the updates of the same dealers. One honest dealer among them is enough to make the new
    shares independent of the old.
    """
    sums = [share.y]
    for update in updates:
        _check_addressed(update, share.x)
        sums.append(update.y)
    if len(sums) == 1:
        raise ValueError(f"0 updates were given for the share of x = {share.x}, but at least 1 is needed")
    return Share(share.x, add(sums))


# The check of a refresh. Hash commitments are not linear, so a dealer shares 16 bytes more, the mask, zero at 0 too.
# When it is bound to all that it dealt, public weights are drawn; each holder tells the weighted sums of its update,
# plus its mask. The sums of all holders are a sharing of zero again, if the update was one; if not, the weights would
# have to hit the mask's deviation in each of the 16 bytes. The mask's uniform coefficients hide all else.


def fingerprint(update: Share, weights: Sequence[bytes]) -> Share:
    """What a holder tells of an update whose last ``FINGERPRINT_BYTES`` bytes are the mask.

    ``weights`` are as many rows, each as long as the update without its mask. They must be a function of what the
    dealer is bound to, and nothing else: under two different sets of weights the two answers would show the update.
    """
    length = len(update.y) - FINGERPRINT_BYTES
    if length < 1 or len(weights) != FINGERPRINT_BYTES:
        raise ValueError(f"an update of {len(update.y)} bytes and {len(weights)} weights")
    (sums,) = dot([update.y[:length]], weights)
    return Share(update.x, add([sums, update.y[length:]]))


def zero_sharing_faults(values: Iterable[Share], *, threshold: int) -> tuple[int, ...] | None:
    """Which of the holders' values do not lie on one polynomial of degree < ``threshold`` that is zero at 0.

    No index: all do. None: no such polynomial goes through enough of them, so the dealer is at fault, or more holders
    than can be told. ValueError for fewer values than the threshold and one index twice.
    """
    given = distinct(values)
    if len(given) < threshold:
        raise ValueError(f"{len(given)} values were given, but the threshold is {threshold}")
    if len({len(value.y) for value in given}) == 1 and _shares_zero(given, threshold):
        return ()
    try:
        found = correct_shares(given, threshold=threshold)
    except ShareCorrupt:
        return None
    return found.wrong if found.wrong and _shares_zero(found.right, threshold) else None


def _shares_zero(values: Sequence[Share], threshold: int) -> bool:
    first, rest = values[:threshold], values[threshold:]
    targets = [0, *(value.x for value in rest)]
    expected = interpolate([value.x for value in first], [value.y for value in first], targets)
    return expected == [bytes(len(first[0].y)), *(value.y for value in rest)]


def sharing_faults(values: Iterable[Share], *, threshold: int) -> tuple[int, ...] | None:
    """As ``zero_sharing_faults``, of a sharing of anything: whether the values lie on a polynomial of that degree."""
    given = distinct(values)
    first, rest = given[:threshold], given[threshold:]
    targets = [value.x for value in rest]
    if not rest or interpolate([value.x for value in first], [value.y for value in first], targets) == [
        value.y for value in rest
    ]:
        return ()
    try:
        return correct_shares(given, threshold=threshold).wrong or None
    except ShareCorrupt:
        return None


def refresh_shares(share_set: Iterable[Share], *, threshold: int) -> list[Share]:
    """New shares of the same secret at the same indices. All holders' shares belong in ``share_set``.

    A share that is left out is worthless afterwards; ``recover_share`` makes a new one from ``threshold`` others.
    """
    given = distinct(share_set)
    updates = deal_zero(len(given[0].y), threshold=threshold, xs=[share.x for share in given])
    return [refresh_share(share, [update]) for share, update in zip(given, updates, strict=True)]


# Reshare: Desmedt and Jajodia, "Redistributing secret shares to new access structures and its applications",
# George Mason University ISSE-TR-97-01, 1997.


def deal_sub_shares(share: Share, *, threshold: int, xs: Sequence[int]) -> list[Share]:
    """Split a holder's share for the new holders ``xs``, of whom any ``threshold`` will suffice: one Share for each."""
    return [Share(x, y) for x, y in zip(xs, split(share.y, threshold, len(xs), xs), strict=True)]


def merge_sub_shares(x: int, sub_shares: Mapping[int, Share], *, threshold: int) -> Share:
    """The share of the new holder ``x``: the sum of the sub-shares it got, weighted as the old shares are at 0.

    ``sub_shares`` maps the index of an old holder to what it sent; ``threshold`` is the old one, and exactly as many
    are needed. All new holders have to merge the sub-shares of the same old holders, or their shares do not fit
    together: agree on the set first.
    """
    if len(sub_shares) != threshold:
        raise ValueError(f"{len(sub_shares)} sub-shares were given, but the old threshold is {threshold}")
    for sub_share in sub_shares.values():
        _check_addressed(sub_share, x)
    return Share(x, combine(list(sub_shares), [sub_share.y for sub_share in sub_shares.values()]))


def reshare(share_set: Iterable[Share], *, threshold: int, new_threshold: int, xs: Sequence[int]) -> list[Share]:
    """Shares of the same secret for other holders: ``threshold``-of-any to ``new_threshold``-of-``len(xs)``.

    The first ``threshold`` of the shares given are used. The secret is never in memory; nor need it be with
    ``deal_sub_shares`` and ``merge_sub_shares``, where nobody has more than one old share either.
    """
    used = _first(share_set, threshold)
    dealt = {share.x: deal_sub_shares(share, threshold=new_threshold, xs=xs) for share in used}
    return [
        merge_sub_shares(x, {old: sub_shares[place] for old, sub_shares in dealt.items()}, threshold=threshold)
        for place, x in enumerate(xs)
    ]


# The check of a reshare. What the first t old holders share determines what any other one must share: at a new holder
# the *gap* of a further one is its sub-share less what those of the first say, and if all have shared their shares, a
# gap is a sharing of zero. It needs no mask: the shares of those who are honest, weighted so, add up to what those who
# are not know from their own, and t' - 1 new holders know the rest of the polynomial. So the gaps tell nobody anything
# that t - 1 old and t' - 1 new holders together do not know anyway.


def sub_share_gaps(sub_shares: Mapping[int, Share], *, threshold: int, weights: Sequence[bytes]) -> list[Share]:
    """What a new holder tells of how the sub-shares beyond the first ``threshold`` fit to these: a sum for each row.

    ``sub_shares`` maps the index of an old holder to what it sent, in the order of the deals; ``threshold`` is the old
    one. ``weights`` must be a function of all that the dealers are bound to.
    """
    given = list(sub_shares.items())
    first, rest = given[:threshold], given[threshold:]
    if not rest:
        return []
    expected = interpolate([x for x, _ in first], [share.y for _, share in first], [x for x, _ in rest])
    gaps = [add([share.y, should]) for (_, share), should in zip(rest, expected, strict=True)]
    return [Share(share.x, sums) for (_, share), sums in zip(rest, dot(gaps, weights), strict=True)]


def wrong_sub_sharings(
    first: Sequence[int], gaps: Mapping[int, Sequence[Share]], *, threshold: int
) -> tuple[int, ...] | None:
    """The old holders who did not share their share, by the gaps of those beyond the first, which are sharings.

    ``threshold`` is the new one. No index: all fit. None: more are wrong than can be told.
    """
    zeros = bytes(FINGERPRINT_BYTES)
    word = [Share(x, zeros) for x in first]
    for x, values in gaps.items():
        used = values[:threshold]
        word.append(Share(x, combine([value.x for value in used], [value.y for value in used])))
    if all(each.y == zeros for each in word):
        return ()
    try:
        # A word that differs from what was shared by right shares, and so has its errors where that has its own.
        return correct_shares(word, threshold=len(first)).wrong or None
    except ShareCorrupt:
        return None


# Recovery: the enrollment protocol of Nojoumian, Stinson and Grainger, "Unconditionally secure social secret sharing
# scheme", IET Information Security 4(4), 2010, 3.1 (surveyed in Laing and Stinson, "A survey and refinement of
# repairable threshold schemes", J. Math. Cryptol. 12(1), 2018).
#
# The lost share is the sum over the helpers i of c_i = weight_i * share_i. A helper must not send c_i, which shows its
# share. So it cuts c_i into uniform parts that add up to it, one for each helper; each helper adds up the parts that it
# got from all and sends the sum to the one who lost the share. That one sees sums, uniform but for their own sum, which
# is the share. Each helper sees parts of the others, but never the part that another kept for itself, without which the
# rest are uniform: so t - 1 helpers together learn nothing about the last one's share.


def recovery_parts(share: Share, *, helpers: Sequence[int], lost: int) -> list[Share]:
    """First step, by each of ``threshold`` helpers: what it adds to the lost share, in blinded parts for all.

    The Share of index x goes to the helper x, over a channel that nobody else reads; the helper's own stays with it.
    ``helpers`` are exactly as many as the threshold, the caller's own index among them.
    """
    _check_helpers(helpers, lost)
    if share.x not in helpers:
        raise ValueError(f"the share has x = {share.x}, but the helpers are {list(helpers)}")
    zeros = bytes(len(share.y))
    weighted = bytearray(len(share.y))
    # Lagrange interpolation with every other share taken as zero leaves this one times its weight.
    combine(helpers, [share.y if x == share.x else zeros for x in helpers], lost, out=weighted)
    try:
        blinds = {x: os.urandom(len(zeros)) for x in helpers if x != share.x}
        own = add([weighted, *blinds.values()])
        return [Share(x, blinds.get(x, own)) for x in helpers]
    finally:
        wipe(weighted)


def sum_recovery_parts(x: int, parts: Mapping[int, Share], *, helpers: Sequence[int]) -> Share:
    """Second step, by each helper ``x``: the sum of what all helpers sent it, to be sent to the one to be helped.

    ``parts`` maps the sender's index to the part, the helper's own part included.
    """
    _check_complete("parts", parts, helpers)
    for part in parts.values():
        _check_addressed(part, x)
    return Share(x, add([part.y for part in parts.values()]))


def finish_recovery(sums: Iterable[Share], *, helpers: Sequence[int], lost: int) -> Share:
    """Third step, by the one to be helped: the lost share. Sums and parts are to be destroyed then, everywhere."""
    _check_helpers(helpers, lost)
    by_helper = {each.x: each.y for each in distinct(sums)}
    _check_complete("sums", by_helper, helpers)
    return Share(lost, add(list(by_helper.values())))


def recover_share(share_set: Iterable[Share], *, threshold: int, lost: int) -> Share:
    """The share of index ``lost`` from the first ``threshold`` of the shares given. The secret is never in memory.

    It is for somebody who has the shares; the steps above are for holders who must not see each other's.
    """
    used = _first(share_set, threshold)
    _check_helpers([share.x for share in used], lost)
    return Share(lost, combine([share.x for share in used], [share.y for share in used], lost))


def _first(share_set: Iterable[Share], threshold: int) -> list[Share]:
    given = distinct(share_set)
    if not 1 <= threshold <= 255:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..255")
    if len(given) < threshold:
        raise ValueError(f"{len(given)} shares were given, but the threshold is {threshold}")
    return given[:threshold]


def _check_addressed(share: Share, x: int) -> None:
    if share.x != x:
        raise ValueError(f"what was sent is for x = {share.x}, but the holder's index is {x}")


def _check_helpers(helpers: Sequence[int], lost: int) -> None:
    if not 1 <= lost <= 255:
        raise ValueError(f"the lost index is {lost}, but must be in 1..255")
    if lost in helpers:
        raise ValueError(f"x = {lost} is lost, but is among the helpers {list(helpers)}")


def _check_complete(what: str, given: Mapping[int, object], helpers: Sequence[int]) -> None:
    if set(given) != set(helpers) or len(set(helpers)) != len(helpers):
        raise ValueError(f"{what} of {sorted(given)} were given, but the helpers are {list(helpers)}, one each")
