"""Who may send which verb to a node. It decides from the cluster manifest alone; no socket, no clock."""

from __future__ import annotations

from typing import Final

from engine.errors import AccessDenied, ProtocolError
from engine.keys import OPERATIONS, USES, RequestType
from engine.protocol.manifest import Cluster, Member
from engine.protocol.requests import (
    BACKUP_VERBS,
    BALANCER_VERBS,
    CLIENT_VERBS,
    HELLO,
    LATENCY,
    MANIFEST_VERBS,
    NODE_VERBS,
)

__all__ = ["check_key", "check_verb"]

CHANGES: Final = (
    RequestType.DESTROY,
    RequestType.REFRESH,
    RequestType.RESHARE,
    RequestType.ROTATE,
    RequestType.SETTINGS,
)
"""What is done to a key that is there."""


def check_verb(cluster: Cluster, member: Member, verb: str) -> None:
    """Refuse a verb that the member's role never sends. What a role may send at all is decided here, once."""
    if verb == HELLO or verb in MANIFEST_VERBS:
        allowed = member.role != "operator"
    elif verb in NODE_VERBS:
        allowed = member.role == "node"
    elif verb in BALANCER_VERBS:
        allowed = member.role == "balancer"
    elif verb in (RequestType.STATUS, LATENCY):
        allowed = member.role in ("balancer", "node") or cluster.allows_any_key(member.name, RequestType.STATUS)
    elif verb == RequestType.DESCRIBE and member.role == "node":
        allowed = True
    elif verb in CLIENT_VERBS or verb in BACKUP_VERBS:
        allowed = member.role == "client"
    else:
        raise ProtocolError(f"unknown verb {verb!r}")
    if not allowed:
        raise AccessDenied(f"{member.name!r}, a {member.role}, may not send {verb!r}")


def check_key(cluster: Cluster, member: Member, verb: str, key_name: str) -> None:
    """Refuse an operation on a key that no rule of the policy allows to this client.

    ``describe`` is allowed to whoever may do anything else with the key, since its use needs the description, and
    ``prewarm`` to whoever may use it, since any use would load it too.
    """
    if member.role == "node":
        return
    verbs: tuple[str, ...] = (verb,)
    if verb == RequestType.DESCRIBE:
        verbs = (verb, *USES, *CHANGES)
    elif verb == RequestType.PREWARM:
        verbs = (verb, *OPERATIONS)
    if not any(cluster.allows(member.name, each, key_name) for each in verbs):
        raise AccessDenied(f"{member.name!r} may not {verb} with the key {key_name!r}")
