"""What a holder lets a balancer order: under the newest fencing epoch, no faster than the limit, and no bad move.

Clients' orders pass: the policy has decided on them. It owns no thread and no socket. ``count`` is for one thread at a
time, the rest for several.
"""

from __future__ import annotations

from collections.abc import Callable

from engine.client.admission import TokenBucket
from engine.errors import AccessDenied, Overloaded
from engine.protocol.manifest import ClusterSource, FollowsCluster, KeyManifest, RefreshOrder, ReshareOrder
from engine.protocol.moves import check_move
from engine.protocol.signed import Signed
from nodes.limits import CHANGES_PER_S
from nodes.store import ShareStore

__all__ = ["BalancerOrders"]


class BalancerOrders(FollowsCluster):
    """The orders of balancers at one node; ``clock`` gives monotonic seconds.

    The fencing epochs that it has seen are in the store. They are kept by the balancer that told them, so that those of
    one that lied count no longer once it is no member any more.
    """

    def __init__(
        self,
        cluster: ClusterSource,
        store: ShareStore,
        clock: Callable[[], float],
        per_s: float = CHANGES_PER_S,
        burst_s: float = 10.0,
    ) -> None:
        self._source = cluster
        self._store = store
        self._per_s = per_s
        self._burst_s = burst_s
        self._clock = clock
        self._seen = store.fencings()
        self._buckets: dict[str, TokenBucket] = {}

    def heard(self, balancer: str, fencing: int) -> None:
        """A balancer serves, or signed, under this fencing epoch; durable when this returns."""
        if fencing > self._seen.get(balancer, 0):
            self._store.note_fencing(balancer, fencing)
            self._seen[balancer] = fencing

    @property
    def newest(self) -> int:
        """The newest fencing epoch of any balancer that is a member."""
        return max((self._seen.get(each.name, 0) for each in self._cluster.of_role("balancer")), default=0)

    def check(self, order: RefreshOrder | ReshareOrder, signed: Signed, before: KeyManifest) -> None:
        """Refuse what a balancer may not order of the key whose epoch is ``before``; the order was opened before.

        ``AccessDenied``: its fencing epoch is over; or what ``check_move`` raises.
        """
        if not order.fencing:
            return
        newest = self.newest
        if order.fencing < newest:
            raise AccessDenied(
                f"the order of {signed.issuer!r} for {order.name!r} is of the fencing epoch {order.fencing}; "
                f"{newest} has begun"
            )
        if isinstance(order, ReshareOrder):
            check_move(order, signed.issuer, before, self._cluster)
        self.heard(signed.issuer, order.fencing)

    def count(self, order: RefreshOrder | ReshareOrder, balancer: str) -> None:
        """Count a share that this node deals or takes in by a checked order; ``Overloaded`` beyond the limit."""
        if not order.fencing:
            return
        now_s = self._clock()
        bucket = self._buckets.get(balancer)
        if bucket is None:
            bucket = self._buckets[balancer] = TokenBucket(self._per_s, self._burst_s, now_s)
        if not bucket.holds_one(now_s):
            raise Overloaded(f"{balancer!r} orders more than limits.changes_per_s = {self._per_s:g} allows")
        bucket.take()
