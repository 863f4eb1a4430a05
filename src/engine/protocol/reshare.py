"""What differs in a reshare from a refresh: sub-shares in the place of zero, and how it is seen that they are true.

Documents, sealing and terms are those of ``engine.protocol.refresh``. It opens no socket, reads no clock and draws no
randomness. docs/protocol.md has the argument.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Final

from engine.errors import ShareCorrupt
from engine.protocol.manifest import KeyRecord, ReshareOrder
from engine.protocol.refresh import (
    PART_OVERHEAD,
    STATEMENT_BYTES,
    BadDeal,
    Deal,
    NewShare,
    OpenedParts,
    PartStatement,
    Terms,
    check_complete,
    deals_digest,
    unlike_deal,
    weights,
)
from engine.protocol.wire import MAX_MESSAGE
from engine.sharing import (
    FINGERPRINT_BYTES,
    Share,
    fingerprint,
    merge_sub_shares,
    sharing_faults,
    sub_share_gaps,
    wrong_sub_sharings,
)

__all__ = ["check_reshare_size", "check_sub_shares", "merged_share"]

_WEIGHTS_LABEL = b"keyquorum/reshare-weights/1\0"
_HOLDER_BYTES: Final = 170
"""The most that one holder adds to a manifest."""
_MARGIN: Final = 4096


def check_reshare_size(
    record: KeyRecord, certificate: bytes, raw_order: bytes, order: ReshareOrder, length: int
) -> None:
    """Refuse a reshare whose messages would not fit, before anything is begun; ``length`` is the share's at most."""
    manifest = record.manifest
    dealers = sum(each.node not in order.without for each in manifest.holders)
    shares = len(order.holders)
    part = length + PART_OVERHEAD + 3
    deal = STATEMENT_BYTES + 34 * shares
    statement = STATEMENT_BYTES + 18 * (2 * dealers - manifest.threshold)
    manifests = 2 * len(record.raw) + len(certificate) + len(raw_order) + _HOLDER_BYTES * shares
    longest = max(deal + shares * part, manifests + dealers * (deal + part) + shares * statement) + _MARGIN
    if longest > MAX_MESSAGE:
        raise ValueError(
            f"{manifest.name!r} can't be reshared: {dealers} dealers and {shares} new holders with shares of {length} "
            f"bytes take messages of {longest} bytes, the limit is {MAX_MESSAGE}"
        )


def merged_share(terms: Terms, deals: Sequence[Deal], opened: OpenedParts) -> NewShare:
    """A new holder's share: the sub-shares of the first t dealers, weighted; and its values of the check."""
    threshold = terms.before.manifest.threshold
    ((usual, _),) = Counter(len(each.y) for each in opened.shares).most_common(1)
    for deal, each in zip(deals, opened.shares, strict=True):
        if len(each.y) != usual:
            raise BadDeal(f"{deal.dealer.node} dealt {len(each.y)} bytes, most {usual}", [deal.dealer.node])
    length = usual - FINGERPRINT_BYTES
    values = [fingerprint(each, weights(deal, length)) for deal, each in zip(deals, opened.shares, strict=True)]
    subs = {deal.dealer.x: Share(each.x, each.y[:length]) for deal, each in zip(deals, opened.shares, strict=True)}
    values += sub_share_gaps(subs, threshold=threshold, weights=_common_weights(deals, length))
    used = dict(list(subs.items())[:threshold])
    x = opened.shares[0].x
    return NewShare(merge_sub_shares(x, used, threshold=threshold), opened.salt, tuple(value.y for value in values))


def _common_weights(deals: Sequence[Deal], length: int) -> list[bytes]:
    """The public weights under which the deals are held against each other: a function of all of them."""
    stream = hashlib.shake_256(_WEIGHTS_LABEL + deals_digest(deals)).digest(FINGERPRINT_BYTES * length)
    return [stream[row * length : (row + 1) * length] for row in range(FINGERPRINT_BYTES)]


def check_sub_shares(terms: Terms, deals: Sequence[Deal], statements: Sequence[PartStatement]) -> None:
    """Every deal is a sharing with the new threshold, and what they share are shares of one secret.

    That secret is the key as long as fewer lie than there are deals beyond the old threshold. ``BadDeal`` names the
    dealers, and the holders whose values do not fit the others'; ``ShareCorrupt`` the holders alone.
    """
    check_complete(terms, statements)
    name = terms.before.manifest.name
    old, new = terms.before.manifest.threshold, terms.change.threshold if isinstance(terms.change, ReshareOrder) else 0
    nodes = {each.holder.x: each.holder.node for each in statements}
    for place, deal in enumerate(deals):
        faults = sharing_faults(_column(statements, place), threshold=new)
        if faults == ():
            continue
        dealer = deal.dealer.node
        if faults is None:
            raise unlike_deal(dealer, f"dealt for {name!r} is no sharing with the threshold {new}", statements, new)
        liars = [nodes[x] for x in faults]
        raise BadDeal(
            f"what {dealer} dealt for {name!r} does not fit what {', '.join(liars)} tells of it", [dealer, *liars]
        )
    gaps = {}
    for place, deal in enumerate(deals[old:], len(deals)):
        gaps[deal.dealer.x] = column = _column(statements, place)
        faults = sharing_faults(column, threshold=new)
        if faults != ():  # each deal is a sharing, and so is a sum of them
            liars = [nodes[x] for x in faults or nodes]
            raise ShareCorrupt(f"what {', '.join(liars)} tells of the deals for {name!r} contradicts itself", liars)
    first = [deal.dealer.x for deal in deals[:old]]
    wrong = wrong_sub_sharings(first, gaps, threshold=new)
    if wrong == ():
        return
    dealers = [deal.dealer.node for deal in deals if wrong is None or deal.dealer.x in wrong]
    others = list(nodes.values()) if len(statements) == new else []  # there one holder's lie looks just the same
    raise BadDeal(
        f"what {', '.join(dealers)} dealt for {name!r} is not its share"
        + (", or a new holder tells it wrong" if others else ", or one of them is not" if wrong is None else ""),
        [*dealers, *others],
    )


def _column(statements: Sequence[PartStatement], place: int) -> list[Share]:
    return [Share(each.holder.x, each.values[place]) for each in statements]
