"""What a balancer may order of a key: other holders that are no worse. Each holder decides it for itself.

It opens no socket and reads no clock. That the order is a balancer's of today, in time, and of nodes of the cluster,
``engine.protocol.manifest`` has checked.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import AccessDenied, ManifestError
from engine.protocol.manifest import Cluster, KeyManifest, ReshareOrder, ordered_shape
from engine.sharing import placement_risk

__all__ = ["check_move"]


def check_move(order: ReshareOrder, balancer: str, before: KeyManifest, cluster: Cluster) -> None:
    """Refuse a move that changes more than it may of the epoch ``before``, or leaves the key worse off.

    t stays. n is the client's, or where the policy gives the balancer ``grow`` on the key, more. A draining node that
    has no share gets none. No failure domain may hold t shares, and losing any one must leave t; where that is not so
    today, it may not get worse.
    """
    threshold, shares = ordered_shape(before)
    if order.threshold != threshold:
        raise AccessDenied(f"{balancer!r} may not change the threshold of {order.name!r} to {order.threshold}")
    count = len(order.holders)
    if count < shares:
        raise AccessDenied(f"{balancer!r} may not give {order.name!r} {count} holders; its client ordered {shares}")
    if count > shares and not cluster.may_grow(balancer, order.name):
        raise AccessDenied(
            f"{balancer!r} may not give {order.name!r} {count} holders, its client ordered {shares}: no rule of the "
            "policy lets it grow the key"
        )
    emptied = [node for node in order.holders if node in cluster.draining and before.holder(node) is None]
    if emptied:
        raise ManifestError(f"move order: {', '.join(emptied)} is draining, and is given no share of {order.name!r}")
    there = [each.node for each in before.holders if each.node in cluster.nodes]
    worse = _worse(cluster, there, order.holders, threshold)
    if worse:
        raise ManifestError(f"move order: {', '.join(order.holders)} would hold {order.name!r} less safely: {worse}")


def _worse(cluster: Cluster, there: Sequence[str], holders: Sequence[str], threshold: int) -> str:
    """In what these holders are worse than those, or nothing: it is the same for many keys."""
    key = (b"worse", "\n".join(there).encode(), "\n".join(holders).encode(), threshold.to_bytes(4, "big"))
    found: str | None = cluster.seen.get(*key)
    if found is None:
        level = cluster.domain_level
        today = placement_risk(cluster.locations, there, threshold, domain_level=level)
        found = placement_risk(cluster.locations, holders, threshold, domain_level=level).worse_than(today)
        cluster.seen.put(found, *key)
    return found
