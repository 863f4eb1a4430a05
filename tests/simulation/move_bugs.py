"""Faults that are put into the code that moves keys, one at a time, as in ``bugs``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

from bugs import Bug, _any_epoch, _Anything, _grant_with, _replace

import balancer.registry
import engine.errors
import engine.protocol.manifest
import engine.protocol.reshare
import nodes.gather
import nodes.holder
import nodes.orders
import nodes.refresh
import nodes.renewer
from engine.errors import DeadlineExceeded, NodeUnavailable, StaleKey
from engine.protocol.manifest import ReshareOrder
from engine.protocol.requests import Prepared
from engine.sharing import wrong_sub_sharings
from nodes.holder import ShareHolder
from nodes.orders import BalancerOrders
from nodes.renewer import Renewer
from nodes.store import ShareStore
from nodes.trial import Trial


def _leaves_early(stack: ExitStack) -> None:
    """A dealer that will be no holder any more erases its share once it has dealt it."""
    real = Renewer.deal

    def deal(self: Renewer, lane: Any, body: Any, sender: Any) -> Any:
        dealt = real(self, lane, body, sender)
        order = nodes.renewer.open_change_order(body.order, self._cluster, None)[0]
        entry = self._catalogue.by_id(order.key_id)
        if entry is not None and self._node not in getattr(order, "holders", [self._node]):
            self._holder._store.delete(entry.row)
        return dealt

    stack.enter_context(mock.patch.object(Renewer, "deal", deal))


def _goes_on_without(stack: ExitStack) -> None:
    """A new epoch is committed although a new holder did not store its share."""

    real = nodes.refresh._whole

    def whole(job: Any, replies: dict[str, Any]) -> dict[str, Any]:
        if job.stated is not None:  # it is about what was stored
            replies = {
                n: each for n, each in replies.items() if not isinstance(each, NodeUnavailable | DeadlineExceeded)
            }
        return real(job, replies)

    stack.enter_context(mock.patch.object(nodes.refresh, "_whole", whole))
    stack.enter_context(
        mock.patch.object(engine.protocol.manifest, "receipts_needed", lambda threshold, shares, epoch=1: threshold)
    )


def _in_both(name: str, value: Any) -> Callable[[ExitStack], None]:
    """Put into the coordinator and into the holders."""

    def plant(stack: ExitStack) -> None:
        for module in (nodes.refresh, nodes.renewer):
            stack.enter_context(mock.patch.object(module, name, value))

    return plant


def _forged_is_good(stack: ExitStack) -> None:
    def opened(raw: bytes, record: Any, cluster: Any) -> tuple[str, ...]:
        return tuple(each.node for each in record.manifest.holders)

    stack.enter_context(mock.patch.object(nodes.holder, "open_certificate", opened))


def _old_makes_room(stack: ExitStack) -> None:
    """The share of the next epoch is stored in the place of the old one, and not beside it."""
    real = ShareStore.put

    def put(self: ShareStore, row: Any, *more: int) -> Any:
        if row.state == "prepared" and row.epoch > 1:
            self._db.execute("DELETE FROM keys WHERE key_id = ? AND epoch < ?", (row.key_id, row.epoch))
        return real(self, row, *more)

    stack.enter_context(mock.patch.object(ShareStore, "put", put))


def _leaving_is_missed(stack: ExitStack) -> None:
    """A holder that did not hear that it leaves never learns it."""
    real = ShareHolder.catch_up

    def catch_up(self: ShareHolder, item: Any) -> Any:
        if item.state == "committed":
            record = nodes.holder.open_key_manifest(item.manifest, self._cluster)
            if record.manifest.holder(self._node) is None:
                return None
        return real(self, item)

    stack.enter_context(mock.patch.object(ShareHolder, "catch_up", catch_up))


def _abort_takes_both(stack: ExitStack) -> None:
    """The notice that a change is given up deletes the share of the epoch before, too."""
    real = ShareHolder.abort

    def abort(self: ShareHolder, raw: bytes) -> None:
        real(self, raw)
        notice = nodes.holder.open_abort(raw, self._cluster)
        entry = self._catalogue.by_id(notice.key_id)
        if entry is not None and entry.row.attempt < notice.attempt and entry.row.state == "committed":
            self._store.delete(entry.row)

    stack.enter_context(mock.patch.object(ShareHolder, "abort", abort))


def _receipt_first(stack: ExitStack) -> None:
    """A new holder gives its receipt and stores the share a little later."""
    real = ShareStore.put

    def put(self: ShareStore, row: Any, *more: int) -> Any:
        if row.state != "prepared" or row.epoch == 1:
            return real(self, row, *more)
        sim = self._db._disk._sim  # type: ignore[attr-defined]
        sim.after(0.02, sim.running.inside(lambda: real(self, row, *more)))
        return row

    stack.enter_context(mock.patch.object(ShareStore, "put", put))


def _any_attempt(stack: ExitStack) -> None:
    """The registry commits an attempt that was given up."""
    real = balancer.registry.SqliteRegistry._check_next

    def check(self: Any, record: Any, row: Any, now_ms: int) -> Any:
        change = self._change(record.manifest.key_id)
        try:
            return real(self, record, row, now_ms)
        except engine.errors.ManifestError:
            if row is None or change is None or read(row.manifest).manifest.epoch + 1 != record.manifest.epoch:
                raise
            return row

    read = balancer.registry.read_key_manifest
    stack.enter_context(mock.patch.object(balancer.registry.SqliteRegistry, "_check_next", check))


def _first_is_wrong(first: Any, gaps: Any, *, threshold: int) -> tuple[int, ...]:
    right: Any = wrong_sub_sharings(first, gaps, threshold=threshold)
    return right if right == () else (min(first),)


def _any_fencing(self: BalancerOrders, order: Any, signed: Any, before: Any) -> None:
    if order.fencing and isinstance(order, ReshareOrder):
        nodes.orders.check_move(order, signed.issuer, before, self._cluster)


def _looks_away(self: Trial, talker: Any, body: Any, sender: Any, deadline_s: float) -> Prepared:
    entry = self._holder.coming(body.key_id)
    if entry is None:
        raise StaleKey("nothing is prepared")
    return Prepared(self._holder.receipt(entry.record, entry.manifest.holder(self._node).x, tried=True))  # type: ignore[union-attr]


def _epochs_mix(stack: ExitStack) -> None:
    """A holder releases the share that it has for a grant of any epoch, and the combiner takes it."""
    _grant_with(_any_epoch)(stack)
    stack.enter_context(mock.patch.object(nodes.gather, "commitment", return_value=_Anything()))


def _no_pledges(stack: ExitStack) -> None:
    """A holder follows whatever attempt is certified, also one before that for which it gave its statement."""
    stack.enter_context(mock.patch.object(ShareStore, "pledged", return_value=0))


MOVE_BUGS: dict[str, Bug] = {
    "left-early": Bug("a dealer that leaves erases its share before the certificate", _leaves_early),
    "gone-on-without": Bug("an epoch is committed with t receipts", _goes_on_without, first=70, rare=True),
    "sub-shares-unchecked": Bug(
        "nobody holds what was dealt against each other",
        _in_both("check_sub_shares", lambda *given: None),
        needs=frozenset({"false share"}),
    ),
    "wrong-one-named": Bug(
        "of those who deal for a reshare, the first is named as wrong, whoever it is",
        _replace(engine.protocol.reshare, "wrong_sub_sharings", _first_is_wrong),
        needs=frozenset({"false share"}),
    ),
    "forged-certificate": Bug(
        "a holder erases its share on a forged certificate", _forged_is_good, needs=frozenset({"rogue"})
    ),
    "old-makes-room": Bug("the next epoch's share is stored in the place of the old one", _old_makes_room, rare=True),
    "moved-share-kept": Bug(
        "who is no holder any more keeps its share", _replace(ShareHolder, "_leave", lambda *given: None)
    ),
    "leaving-missed": Bug("a holder that missed that it leaves never learns it", _leaving_is_missed),
    "abort-takes-both": Bug("a notice of abort takes the old share too", _abort_takes_both),
    "receipt-first": Bug("a receipt is given before the share is stored", _receipt_first, rare=True),
    "any-attempt": Bug("the registry commits an attempt that it has aborted", _any_attempt, 600, first=80, rare=True),
    "fencing-ignored": Bug(
        "a holder follows orders of a leader that is none any more",
        _replace(BalancerOrders, "check", _any_fencing),
        needs=frozenset({"old leader"}),
    ),
    "moves-unchecked": Bug(
        "a holder lets a balancer change t, n and what is at one site",
        _replace(nodes.orders, "check_move", lambda *given: None),
    ),
    "trial-unseen": Bug(
        "the node that is to try a new epoch says that it is the key, and has not looked",
        _replace(Trial, "run", _looks_away),
        needs=frozenset({"false share"}),
        rare=True,
    ),
    "no-pledges": Bug(
        "a holder follows an attempt after it has said that it will not",
        _no_pledges,
        needs=frozenset({"two-faced"}),
    ),
    "epochs-mixed": Bug("shares of two epochs are combined", _epochs_mix, rare=True),
}
