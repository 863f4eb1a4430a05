"""Owns which node holds which share: spread over failure domains, the same for everyone who asks.

It knows no clock, no load and no socket; a plan that follows the load starts from the order that is made here.

A location is a path such as ``site/room/rack/host``. A failure domain is the set of nodes whose paths agree in the
first ``domain_level`` components. Placement is safe when no failure domain holds t shares (it could reconstruct the
key alone) and losing any one domain leaves t (the key survives): with n shares and at most m in a domain, m < t and
n - m >= t. Both get better as m gets smaller, so the order made here keeps m least at every length.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from types import MappingProxyType

from engine.sharing.share import Share

__all__ = [
    "Distribution",
    "NodeLocation",
    "PlacementRisk",
    "check_placement",
    "distribute_shares",
    "order_holders",
    "placement_group",
    "placement_risk",
]

_ORDER_LABEL = b"keyquorum/holder-order/1\0"
_GROUP_LABEL = b"keyquorum/placement-group/1\0"


@dataclass(frozen=True, slots=True)
class NodeLocation:
    """Where a node stands: its name, and its path with the widest part first, such as ``site/room/rack/host``."""

    name: str
    location: str

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("the node's name is empty, but needs at least 1 character")
        if not all(self.path):
            raise ValueError(
                f"the location {self.location!r} of node {self.name!r} has an empty part, "
                "but must be a path such as site/room/rack/host"
            )

    @property
    def path(self) -> tuple[str, ...]:
        """The components of the location, the widest first."""
        return tuple(self.location.split("/"))


@dataclass(frozen=True, slots=True)
class Distribution:
    """Who holds what: ``assignment`` maps node names to shares in the holders' order.

    ``warnings`` are plain sentences about what the topology does not give; empty when the placement is safe.
    """

    assignment: Mapping[str, Share]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlacementRisk:
    """How far a placement is from a safe one; all zero where it is safe.

    ``alone``: failure domains that could reconstruct the key; ``missing``: how many shares would be too few after the
    worst loss of one; ``fatal``: those whose loss would cost the key.
    """

    alone: int
    missing: int
    fatal: int

    def worse_than(self, other: PlacementRisk) -> str:
        """In what it is worse than another placement of the key; empty if in nothing.

        Domains whose loss would be fatal count where as many shares would be missing: the 2 shares that a key needs are
        better off in two domains than in one.
        """
        if self.alone > other.alone:
            return f"{self.alone} failure domains could reconstruct it alone, {other.alone} before"
        if self.missing > other.missing:
            return f"losing a failure domain would leave {self.missing} shares too few, {other.missing} before"
        if self.missing == other.missing and self.fatal > other.fatal:
            return f"losing any of {self.fatal} failure domains would cost it, {other.fatal} before"
        return ""


def placement_group(name: str, groups: int) -> int:
    """The placement group in 0..groups-1 of a key's name: SHA-256 of the name, so that anyone can compute it."""
    if groups < 1:
        raise ValueError(f"the number of placement groups is {groups}, but must be at least 1")
    digest = sha256(_GROUP_LABEL + name.encode()).digest()
    return int.from_bytes(digest, "big") % groups


def order_holders(
    nodes: Sequence[NodeLocation], seed: bytes, *, domain_level: int = 1, count: int | None = None
) -> tuple[str, ...]:
    """The nodes (the first ``count``, or all) in the order in which they take shares: n shares use the first n.

    Every prefix is as balanced over the failure domains as their sizes allow, and inside that has as few nodes of one
    host, rack, room, ... as possible. Ties go by rendezvous hashing of ``seed`` and the node's name (Thaler and
    Ravishankar, IEEE/ACM ToN 6(1), 1998): different seeds spread the load, and a node that comes or goes moves little.
    The order of ``nodes`` does not matter. Raises ValueError for a name given twice and a domain_level below 1.
    """
    _by_name(nodes)
    _check_level(domain_level)
    depth = max((len(node.path) for node in nodes), default=0)
    # After the failure domain, the narrowest part comes first: two shares in one rack are worse than two in one room.
    levels = [domain_level, *(level for level in range(depth, 0, -1) if level != domain_level)]
    rank = {
        node.name: sha256(_ORDER_LABEL + len(seed).to_bytes(4, "big") + seed + node.name.encode()).digest()
        for node in nodes
    }
    taken: Counter[tuple[str, ...]] = Counter()
    free = {node.name: node.path for node in nodes}
    order: list[str] = []

    def cost(name: str) -> tuple[list[int], bytes]:
        return [taken[free[name][:level]] for level in levels], rank[name]

    while free and (count is None or len(order) < count):
        chosen = min(free, key=cost)
        path = free.pop(chosen)
        taken.update(path[: level + 1] for level in range(len(path)))
        order.append(chosen)
    return tuple(order)


def check_placement(
    nodes: Sequence[NodeLocation], holders: Sequence[str], threshold: int, *, domain_level: int = 1
) -> tuple[str, ...]:
    """What is missing for a safe placement, one plain sentence each; empty when nothing is.

    ``nodes`` is the whole cluster, ``holders`` the names of those with a share. Raises ValueError for a holder that is
    unknown or given twice, and a threshold outside 1..len(holders).
    """
    places = _by_name(nodes)
    _check_level(domain_level)
    for holder, count in Counter(holders).items():
        if holder not in places:
            raise ValueError(f"the holder {holder!r} is none of the {len(places)} nodes of the cluster")
        if count > 1:
            raise ValueError(f"the holder {holder!r} is given {count} times, but a node holds at most 1 share of a key")
    _check_threshold(threshold, len(holders))
    warnings = _domain_warnings(places, holders, threshold, domain_level)
    return (*warnings, *_neighbour_warnings(places, holders, domain_level))


def placement_risk(
    nodes: Sequence[NodeLocation], holders: Sequence[str], threshold: int, *, domain_level: int = 1
) -> PlacementRisk:
    """The risk of a placement among these nodes. With threshold 1 every holder has the key, so none is counted alone.

    Raises ValueError for a holder that is none of the nodes, and a domain_level below 1.
    """
    _check_level(domain_level)
    paths = {node.name: node.path[:domain_level] for node in nodes}
    strangers = [holder for holder in holders if holder not in paths]
    if strangers:
        raise ValueError(f"the holder {strangers[0]!r} is none of the {len(paths)} nodes of the cluster")
    counts = Counter(paths[holder] for holder in holders).values()
    left = [len(holders) - count for count in counts] or [0]
    return PlacementRisk(
        alone=sum(count >= threshold for count in counts) if threshold > 1 else 0,
        missing=max(0, threshold - min(left)),
        fatal=sum(each < threshold for each in left),
    )


def distribute_shares(
    shares: Sequence[Share],
    cluster: Sequence[NodeLocation],
    *,
    threshold: int,
    seed: bytes = b"",
    domain_level: int = 1,
) -> Distribution:
    """Give each share a node of its own, spread over the failure domains as well as the cluster allows.

    No failure domain holds ``threshold`` shares, and losing any one leaves ``threshold``, where the topology allows;
    else the warnings say what is missing. The same seed and cluster give the same holders in the same order.
    Raises ValueError for fewer nodes than shares, a node or a share index given twice, and a threshold outside
    1..len(shares).
    """
    _check_threshold(threshold, len(shares))
    for x, count in Counter(share.x for share in shares).items():
        if count > 1:
            raise ValueError(f"{count} shares have the index x = {x}, but each must be given once")
    if len(cluster) < len(shares):
        raise ValueError(
            f"the cluster has {len(cluster)} nodes, but {len(shares)} shares need {len(shares)}: one node for each"
        )
    holders = order_holders(cluster, seed, domain_level=domain_level, count=len(shares))
    warnings = check_placement(cluster, holders, threshold, domain_level=domain_level)
    return Distribution(MappingProxyType(dict(zip(holders, shares, strict=True))), warnings)


def _domain_warnings(
    places: Mapping[str, tuple[str, ...]], holders: Sequence[str], threshold: int, domain_level: int
) -> Iterable[str]:
    total = len(holders)
    domains = Counter("/".join(places[holder][:domain_level]) for holder in holders)
    for domain, count in sorted(domains.items()):
        if count >= threshold:
            yield (
                f"failure domain {domain!r} holds {count} of {total} shares, but must hold fewer than the threshold "
                f"{threshold}: it could reconstruct the key alone"
            )
        if total - count < threshold:
            yield (
                f"losing failure domain {domain!r} takes {count} of {total} shares and leaves {total - count}, "
                f"but the threshold is {threshold}"
            )


def _neighbour_warnings(
    places: Mapping[str, tuple[str, ...]], holders: Sequence[str], domain_level: int
) -> Iterable[str]:
    """Holders in one rack (the path without its last part) or on one host while their domain has a better node.

    A node of another failure domain is no better: taking it would trade balance over domains for distance.
    """
    depth = max(len(path) for path in places.values())
    for what, level in (("host", depth), ("rack", depth - 1)):
        if level <= domain_level:
            continue
        together = Counter(places[holder][:level] for holder in holders)
        for place, count in sorted(together.items()):
            free = sorted(
                name
                for name, path in places.items()
                if path[:domain_level] == place[:domain_level] and together[path[:level]] == 0
            )
            if count > 1 and free:
                yield (
                    f"{what} {'/'.join(place)!r} holds {count} of {len(holders)} shares, but 1 would do: "
                    f"{', '.join(map(repr, free))} of the same failure domain stands apart and holds none"
                )


def _by_name(nodes: Iterable[NodeLocation]) -> dict[str, tuple[str, ...]]:
    places: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        if node.name in places:
            raise ValueError(f"the node name {node.name!r} is given twice, but each node must be given once")
        places[node.name] = node.path
    return places


def _check_level(domain_level: int) -> None:
    if domain_level < 1:
        raise ValueError(f"the domain level is {domain_level}, but must be at least 1")


def _check_threshold(threshold: int, shares: int) -> None:
    if not 1 <= threshold <= shares:
        raise ValueError(f"the threshold is {threshold}, but must be in 1..{shares}, the number of shares")
