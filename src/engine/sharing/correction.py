"""Owns finding wrong shares among too many, without commitments. It knows nothing of how the shares were gathered.

Shares of one secret are a Reed-Solomon code word in each of their bytes (McEliece and Sarwate, "On sharing secrets and
Reed-Solomon codes", CACM 24(9), 1981), and a wrong share is an error at the same place of all of them. So the bytes
need not be decoded one by one: a random linear combination of the columns is a code word too, with an error wherever a
share is wrong, but for a chance of 1 in 256. FOLDS combinations find all wrong shares, and the secret is then
interpolated from right ones alone, at full speed.

With commitments ``combiner`` names wrong shares from exactly t of them; this needs t + 2e for e wrong ones, or t + e
where a check value tells the right secret.
"""

from __future__ import annotations

import hmac
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, takewhile
from typing import Final

from engine._fastshamir import add, combine, dot
from engine.errors import ShareCorrupt
from engine.sharing.secret import SecretBuffer, wipe
from engine.sharing.share import SecretShare, Share, distinct

__all__ = ["Correction", "correct_shares", "find_consistent"]

FOLDS: Final = 9
"""A wrong share goes unseen in one combination with probability 2^-8, in all with 2^-72; any of 127 with 2^-65."""
COLUMNS_AT_ONCE: Final = 65_536
"""Bounds the random weights in memory: 9 x 64 KiB."""


MAX_TRIES: Final = 5_000
"""Combinations of shares that ``find_consistent`` tries: all of 3 among 31, or of 32 with one wrong one among 60."""


@dataclass(frozen=True, slots=True)
class Correction:
    """The shares that lie on one polynomial of degree < t, in the order given, and the indices of the wrong ones."""

    right: tuple[Share, ...]
    wrong: tuple[int, ...]


def correct_shares(share_set: Iterable[Share], *, threshold: int, names: Mapping[int, str] | None = None) -> Correction:
    """Tell the right shares from up to floor((m - t) / 2) wrong ones among m, however they are wrong.

    A wrong share (also one of another length than most) is missed with probability at most 2^-64 for all together,
    over randomness that is drawn after the shares were given, so no liar can aim at it. With m = t or t + 1 nothing can
    be corrected: m = t shares always agree, and t + 1 that do not are refused.

    Raises ShareCorrupt when more are wrong; it names all holders (``names`` maps x to them), as no one can say which.
    It can be fooled only by liars who know of each other: two sharings differ in m - t + 1 places at least, so more
    than floor((m - t) / 2) wrong shares have to fit to another sharing. Raises ValueError for a threshold outside
    1..255, fewer shares than the threshold, no share and one index twice.
    """
    given = distinct(share_set)
    if not 1 <= threshold <= 255:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..255")
    if len(given) < threshold:
        raise ValueError(f"{len(given)} shares were given, but the threshold is {threshold}")
    bound = (len(given) - threshold) // 2
    (length, _), *_ = Counter(len(share.y) for share in given).most_common(1)
    wrong = {share.x for share in given if len(share.y) != length}
    folded = _fold([share for share in given if share.x not in wrong], length) if len(wrong) <= bound else {}
    while folded:
        left = {x: row for x, row in folded.items() if x not in wrong}
        column = _first_disagreement(left, threshold)
        if not column:
            return Correction(
                tuple(share for share in given if share.x not in wrong),
                tuple(share.x for share in given if share.x in wrong),
            )
        found = locate_errors(column, threshold, bound - len(wrong))
        if not found:
            break
        wrong |= found
    holders = [(names or {}).get(share.x, f"x={share.x}") for share in given]
    raise ShareCorrupt(
        f"of {len(given)} shares with the threshold {threshold} more than {bound} are wrong, "
        f"which is more than can be told apart: {', '.join(holders)}",
        holders,
    )


def find_consistent(
    shares: Sequence[Share | SecretShare],
    *,
    threshold: int,
    is_right: Callable[[SecretBuffer], bool],
    tried: int = 0,
    tries: int = MAX_TRIES,
) -> tuple[SecretBuffer, tuple[int, ...]] | None:
    """The secret that ``is_right`` takes, in locked memory, and the x of the shares that are not on its polynomial.

    Every ``threshold`` of the shares are tried, at most ``tries`` times, newest first; the first ``tried`` of them
    were tried among themselves before. None if no secret is right: there are fewer than ``threshold`` right shares, or
    more combinations than tries. Shares of other lengths than most are wrong. The time tells how many tries it took.
    The secret is right in any case. One liar can't have others named; two who know which shares are tried together can
    choose errors that cancel out in the secret, and then right shares are off their polynomial.

    Raises ValueError for an index given twice, and OSError when there is no locked memory.
    """
    if not 1 <= threshold <= len(shares):
        return None
    (length, _), *_ = Counter(len(share.y) for share in shares).most_common(1)
    usable = [share for share in shares if len(share.y) == length]
    old = {share.x for share in shares[:tried]}
    # The newest come first, so those that begin with an old one were all tried before.
    subsets = takewhile(lambda subset: subset[0].x not in old, combinations(reversed(usable), threshold))
    secret = SecretBuffer(length)
    try:
        for subset in islice(subsets, tries):
            xs, ys = [share.x for share in subset], [share.y for share in subset]
            combine(xs, ys, out=secret)
            if is_right(secret):
                wrong = tuple(share.x for share in shares if share not in subset and not _lies_on(xs, ys, share))
                return secret, wrong
    except BaseException:
        secret.close()
        raise
    secret.close()
    return None


def _lies_on(xs: Sequence[int], ys: Sequence[bytes | SecretBuffer], share: Share | SecretShare) -> bool:
    if len(share.y) != len(ys[0]):
        return False
    expected = bytearray(len(share.y))
    try:
        combine(xs, ys, share.x, out=expected)
        return hmac.compare_digest(expected, share.y)
    finally:
        wipe(expected)


def _fold(shares: Sequence[Share], length: int) -> dict[int, bytes]:
    """Index -> FOLDS uniform linear combinations of the share's bytes, the same ones for every share."""
    folded = [bytes(FOLDS)] * len(shares)
    for begin in range(0, length, COLUMNS_AT_ONCE):
        parts = [memoryview(share.y)[begin : begin + COLUMNS_AT_ONCE] for share in shares]
        sums = dot(parts, [os.urandom(len(parts[0])) for _ in range(FOLDS)])
        folded = [add(pair) for pair in zip(folded, sums, strict=True)]
    return {share.x: row for share, row in zip(shares, folded, strict=True)}


def _first_disagreement(folded: Mapping[int, bytes], threshold: int) -> dict[int, int]:
    """Index -> difference from the polynomial through the first t points, for a column where some differ; or nothing.

    The differences depend on errors alone and on no share's secret, and uniform weights blind even the errors. From
    here on values may be branched on and looked up.
    """
    xs = list(folded)
    base, values = xs[:threshold], [folded[x] for x in xs[:threshold]]
    differences = {x: bytes(FOLDS) for x in base}
    for x in xs[threshold:]:
        differences[x] = add([combine(base, values, x), folded[x]])
    for place in range(FOLDS):
        if any(row[place] for row in differences.values()):
            return {x: row[place] for x, row in differences.items()}
    return {}


def locate_errors(word: Mapping[int, int], threshold: int, bound: int) -> set[int]:
    """The x where ``word`` (x -> value, public) leaves a polynomial P of degree < t, if at most ``bound`` places do.

    Berlekamp and Welch (US patent 4,633,470, 1986; expired): find E of degree ``bound``, monic and zero at the errors,
    and N of degree < t + ``bound``, with N(x) = value(x) E(x) everywhere; then P = N / E. The word has to be zero at
    its first t places, which makes N a multiple of G, the product of (X - x) over them, so that N = G M and the
    equations for E and M are as few as the other places (the re-encoding of Koetter, Ma and Vardy, 2011). Empty if
    there is no such P, or nothing is wrong.
    """
    xs = list(word)
    base, spare = xs[:threshold], xs[threshold:]
    if bound < 1 or any(word[x] for x in base):
        return set()
    zeros = [1]
    for x in base:
        zeros = _times(zeros, [x, 1])
    equations = []
    for x in spare:
        powers = [1]
        for _ in range(bound):
            powers.append(_product(powers[-1], x))
        of_m = bytes(_product(_value(zeros, x), power) for power in powers[:bound])
        of_e = bytes(_product(word[x], power) for power in powers)
        equations.append(of_m + of_e)  # the last column, of E's leading 1, is the right-hand side
    solution = _solve(equations, 2 * bound)
    if solution is None:
        return set()
    numerator = _times(zeros, solution[:bound])
    quotient = _divide(numerator, [*solution[bound:], 1])
    if quotient is None:
        return set()
    return {x for x in xs if _value(quotient, x) != word[x]}


# Arithmetic on public values: the logarithms to the base 3, a generator of the field's non-zero elements.


def _powers_of_3() -> tuple[int, ...]:
    powers, element = [], 1
    for _ in range(255):
        powers.append(element)
        element ^= element << 1
        if element & 0x100:
            element ^= 0x11B
    return tuple(powers)


_POWER: Final = _powers_of_3() * 2
_LOGARITHM: Final = {element: exponent for exponent, element in enumerate(_POWER[:255])}


@cache
def _scale(scalar: int) -> bytes:
    """A table for ``bytes.translate``: every element times the scalar."""
    if scalar == 0:
        return bytes(256)
    shift = _LOGARITHM[scalar]
    return bytes([0, *(_POWER[_LOGARITHM[element] + shift] for element in range(1, 256))])


def _product(a: int, b: int) -> int:
    return _scale(a)[b]


def _inverse(a: int) -> int:
    return _POWER[255 - _LOGARITHM[a]]


def _value(polynomial: Sequence[int], x: int) -> int:
    """The value at x; coefficients begin with the constant one."""
    value = 0
    for coefficient in reversed(polynomial):
        value = _scale(value)[x] ^ coefficient
    return value


def _times(a: Sequence[int], b: Sequence[int]) -> list[int]:
    product = [0] * (len(a) + len(b) - 1)
    for i, left in enumerate(a):
        scale = _scale(left)
        for j, right in enumerate(b):
            product[i + j] ^= scale[right]
    return product


def _divide(numerator: Sequence[int], monic: Sequence[int]) -> list[int] | None:
    """The quotient by a monic polynomial, or None where a remainder is left."""
    rest, degree = list(numerator), len(monic) - 1
    quotient = [0] * max(1, len(rest) - degree)
    for place in range(len(rest) - degree - 1, -1, -1):
        quotient[place] = rest[place + degree]
        scale = _scale(quotient[place])
        for i, coefficient in enumerate(monic):
            rest[place + i] ^= scale[coefficient]
    return None if any(rest) else quotient


def _solve(equations: Sequence[bytes], unknowns: int) -> list[int] | None:
    """A solution of the equations (coefficients, then the right-hand side), or None. What is free becomes zero."""
    rows = list(equations)
    pivots: list[int] = []
    for column in range(unknowns):
        done = len(pivots)
        pivot = next((i for i in range(done, len(rows)) if rows[i][column]), None)
        if pivot is None:
            continue
        rows[done], rows[pivot] = rows[pivot], rows[done]
        rows[done] = rows[done].translate(_scale(_inverse(rows[done][column])))
        for i, row in enumerate(rows):
            if i != done and row[column]:
                rows[i] = add([row, rows[done].translate(_scale(row[column]))])
        pivots.append(column)
    if any(row[unknowns] for row in rows[len(pivots) :]):
        return None
    solution = [0] * unknowns
    for place, column in enumerate(pivots):
        solution[column] = rows[place][unknowns]
    return solution
