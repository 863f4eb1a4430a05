"""Nodes that come and go: what is signed for it, and how much of a node's shares is still to be moved or made anew.

It decides and waits. Who signs and asks is a ``Fleet``: a local cluster, or an operator with a client's configuration.
No share is moved here: that is the balancer's, by what the manifest says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.client.calls import DegradedKey
from engine.client.transport import Channel, ask, raise_for_status
from engine.errors import ClusterError, EngineError, RegistryUnavailable
from engine.keys import RequestType
from engine.protocol.manifest import Cluster, Member
from engine.protocol.requests import (
    HOLDINGS,
    REQUEST_CODECS,
    Empty,
    Holdings,
    HoldingsPage,
    NodeStatus,
    balancer_status_codec,
)

__all__ = [
    "Fleet",
    "Left",
    "add",
    "drain",
    "endangered",
    "keys_by_node",
    "left_on",
    "remove",
    "replace",
    "undrain",
    "wait_empty",
]

ASK_S = 2.0
LOOK_EVERY_S = 0.25
NAMED = 5


@dataclass(frozen=True, slots=True)
class Left:
    """What a node holds: keys by the registry's books, shares by its own word (None where it does not answer).

    ``moving`` is what the balancer says of the keys that are to go: what is under way, and what it waits for.
    """

    booked: int
    stored: int | None
    moving: str = ""

    @property
    def keys(self) -> int:
        """How many keys are not moved away yet."""
        return max(self.booked, self.stored or 0)


class Fleet(Protocol):
    """Who can sign for a cluster, and ask its members."""

    @property
    def cluster(self) -> Cluster:
        """The newest manifest."""

    def sign_nodes(self, members: Sequence[Member], draining: Collection[str]) -> Cluster:
        """Have a manifest with these members, of which these nodes are draining, signed and brought to all."""

    def degraded(self, without: str) -> Sequence[DegradedKey]:
        """The keys that would lack a share without a node, by the registry; ``RegistryUnavailable`` if none tells."""

    def left_on(self, node: str) -> Left:
        """What a node holds, also one that is no member any more; ``RegistryUnavailable`` if no balancer tells."""


def keys_by_node(channel: Channel, cluster: Cluster, timeout_s: float = ASK_S) -> dict[str, int]:
    """How many keys the nodes hold shares of, by the books of the first balancer that answers."""
    problems = []
    for balancer in cluster.of_role("balancer"):
        found: dict[str, int] = {}
        after, more = "", True
        try:
            while more:
                page: HoldingsPage = ask(channel, balancer.name, HOLDINGS, Holdings(after), timeout_s)
                found |= {each.node: each.keys for each in page.entries}
                after, more = max(found, default=""), page.more and bool(page.entries)
        except EngineError as error:
            problems.append(f"{balancer.name}: {error}")
            continue
        return found
    told = "; ".join(problems) or "the cluster manifest names no balancer"
    raise RegistryUnavailable(f"what the nodes hold is not known ({told})")


def left_on(channel: Channel, cluster: Cluster, node: str, timeout_s: float = ASK_S) -> Left:
    """What a node holds, asked of a balancer and of itself."""
    booked = keys_by_node(channel, cluster, timeout_s).get(node, 0)
    try:
        status: NodeStatus | None = ask(channel, node, RequestType.STATUS, Empty(), timeout_s)
    except (EngineError, KeyError):
        status = None
    return Left(booked, None if status is None else status.shares, _moving(channel, cluster, timeout_s))


def _moving(channel: Channel, cluster: Cluster, timeout_s: float) -> str:
    """What the first balancer that answers says of the keys that it has moved."""
    body = REQUEST_CODECS[RequestType.STATUS].encode(Empty())
    for balancer in cluster.of_role("balancer"):
        try:
            reply = channel.call(balancer.name, RequestType.STATUS, body, timeout_s)
            raise_for_status(reply)
            return balancer_status_codec.decode(reply.body).moving
        except EngineError:
            continue
    return ""


def _node(cluster: Cluster, name: str) -> Member:
    if name not in cluster.nodes:
        raise ValueError(f"{name!r} is no node of the cluster; there are {', '.join(cluster.nodes)}")
    return cluster.nodes[name]


def _check_left(cluster: Cluster, leaving: str) -> None:
    if not set(cluster.nodes) - cluster.draining - {leaving}:
        raise ValueError(f"without {leaving!r} there is no node that keys can be given to")


def _check_new(cluster: Cluster, card: Member) -> None:
    if card.role != "node":
        raise ValueError(f"{card.name!r} is a {card.role}, not a node")
    if card.name in cluster.members:
        raise ValueError(f"the name {card.name!r} is a member's already")


def add(fleet: Fleet, card: Member) -> Cluster:
    """Take a node into the cluster; new keys are given to it from then on, others as the balancer sees fit."""
    cluster = fleet.cluster
    if cluster.nodes.get(card.name) == card:
        return cluster
    _check_new(cluster, card)
    return fleet.sign_nodes([*cluster.members.values(), card], cluster.draining)


def drain(fleet: Fleet, node: str) -> Cluster:
    """Have a node be emptied: it is given no more keys, and the balancer moves away those that it holds."""
    cluster = fleet.cluster
    _node(cluster, node)
    if node in cluster.draining:
        return cluster
    _check_left(cluster, node)
    return fleet.sign_nodes(list(cluster.members.values()), {*cluster.draining, node})


def undrain(fleet: Fleet, node: str) -> Cluster:
    """Have a node be given keys again; what was moved away stays away."""
    cluster = fleet.cluster
    _node(cluster, node)
    if node not in cluster.draining:
        return cluster
    return fleet.sign_nodes(list(cluster.members.values()), cluster.draining - {node})


def endangered(fleet: Fleet, node: str) -> tuple[DegradedKey, ...]:
    """The keys that have just their threshold of shares without a node: no balancer can make them another one.

    ``ClusterError`` if there are keys that would have fewer, or if no balancer tells: to remove the node could be what
    loses them.
    """
    try:
        found = [key for key in fleet.degraded(node) if node in key.missing]
    except RegistryUnavailable as error:
        raise ClusterError(f"whether keys would be lost with {node} is not known: {error}") from None
    gone = [key for key in found if key.left < key.threshold]
    if gone:
        named = ", ".join(dict.fromkeys(key.name or "(one that may not be listed)" for key in gone[:NAMED]))
        more = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        raise ClusterError(
            f"of {len(gone)} keys fewer shares than are needed would be left without {node} ({named}{more}): bring back"
            " another node that holds them, or give these keys up for good"
        )
    return tuple(key for key in found if key.left == key.threshold)


def remove(fleet: Fleet, node: str, *, lost: bool = False, give_up_keys: bool = False) -> Cluster:
    """Take an empty node out of the cluster; with ``lost`` also one that has shares, which are given up.

    Of a lost node's keys the balancer makes the missing shares anew elsewhere. ``ClusterError`` while the node holds
    shares, or could still be given some, and of a lost one, if keys would be lost with it that are not given up.
    """
    cluster = fleet.cluster
    _node(cluster, node)
    _check_left(cluster, node)
    if lost and not give_up_keys:
        endangered(fleet, node)
    if not lost:
        if node not in cluster.draining:
            raise ClusterError(f"{node} is not draining; drain it first, or give up its shares as lost")
        left = fleet.left_on(node)
        if left.keys:
            raise ClusterError(
                f"{node} holds shares of {left.keys} keys; wait until they are moved, or give them up as lost"
            )
    return fleet.sign_nodes([each for each in cluster.members.values() if each.name != node], cluster.draining - {node})


def replace(fleet: Fleet, node: str, card: Member, *, lost: bool = False, give_up_keys: bool = False) -> Cluster:
    """Take a new node in and have the other emptied, in one; with ``lost`` the other is out at once.

    Who replaces a node that is not lost waits until it is empty, and removes it then.
    """
    cluster = fleet.cluster
    _node(cluster, node)
    members = list(cluster.members.values())
    if cluster.nodes.get(card.name) != card:
        _check_new(cluster, card)
        members.append(card)
    if lost:
        if not give_up_keys:
            endangered(fleet, node)
        return fleet.sign_nodes([each for each in members if each.name != node], cluster.draining - {node})
    return fleet.sign_nodes(members, {*cluster.draining, node})


def wait_empty(
    fleet: Fleet,
    node: str,
    timeout_s: float | None = None,
    told: Callable[[Left], None] = lambda left: None,
    given_up: int = 0,
) -> None:
    """Wait until a node holds no share, or of a lost one, until none is missing any more; ``told`` hears how far it is.

    ``given_up`` keys are not waited for.

    While no balancer answers, it is waited for. ``ClusterError`` when the time is over; without one it is waited for
    ever, since what is missing may need an operator: another node, or one that is down to come back.
    """
    until_s = None if timeout_s is None else time.monotonic() + timeout_s
    reason = ""
    while True:
        try:
            left = fleet.left_on(node)
            if left.keys <= given_up:
                return
            reason = f"shares of {left.keys} keys are not moved; {left.moving}"
            told(left)
        except RegistryUnavailable as error:
            reason = str(error)
        if until_s is not None and time.monotonic() >= until_s:
            raise ClusterError(f"{node} is not empty after {timeout_s:g} s: {reason}")
        time.sleep(LOOK_EVERY_S)
