"""Who may send which verb: the full matrix of role and verb, and the policy's rules on keys."""

from __future__ import annotations

from typing import Any

import pytest

from engine.errors import AccessDenied, EngineError, ProtocolError
from engine.keys import OPERATIONS, RequestType
from engine.protocol.manifest import PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.requests import (
    BACKUP_VERBS,
    BALANCER_VERBS,
    BODIES,
    DEGRADED,
    HELLO,
    HOLDINGS,
    LATENCY,
    MANIFEST_VERBS,
    NODE_VERBS,
    PLAN,
    REGISTRY_VERBS,
    TABLE,
)
from nodes.policy import check_key, check_verb

ROLES = {"alice": "client", "bob": "client", "carol": "client", "node1": "node", "balancer": "balancer"}
CLIENTS_ALONE = {str(verb) for verb in RequestType} - {"status", "describe"}
UNKNOWN = (
    "",
    "nonsense",
    "share.releas",
    "SHARE.RELEASE",
    "operate",
    TABLE,
    PLAN,
    HOLDINGS,
    DEGRADED,
    *sorted(REGISTRY_VERBS),
)

ALLOWED = {
    **{verb: {"alice", "bob", "carol"} for verb in CLIENTS_ALONE},
    **{verb: {"node1"} for verb in NODE_VERBS},
    **{verb: {"alice", "bob", "carol"} for verb in BACKUP_VERBS},
    "describe": {"alice", "bob", "carol", "node1"},
    "status": {"alice", "node1", "balancer"},
    LATENCY: {"alice", "node1", "balancer"},
    **{verb: {"balancer"} for verb in BALANCER_VERBS},
    HELLO: set(ROLES),
    **{verb: set(ROLES) for verb in MANIFEST_VERBS},
}


def test_the_matrix_names_every_verb() -> None:
    assert set(ALLOWED) | set(UNKNOWN) - {"", "nonsense", "share.releas", "SHARE.RELEASE", "operate"} == set(BODIES)


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("verb", sorted(ALLOWED))
def test_a_role_may_send_its_own_verbs_alone(world: Any, verb: str, name: str) -> None:
    member = world.cluster.members[name]
    assert member.role == ROLES[name]
    if name in ALLOWED[verb]:
        check_verb(world.cluster, member, verb)
        return
    with pytest.raises(AccessDenied, match=f"may not send '{verb}'"):
        check_verb(world.cluster, member, verb)


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("verb", UNKNOWN)
def test_a_verb_of_no_node_is_refused_to_everyone(world: Any, verb: str, name: str) -> None:
    with pytest.raises(ProtocolError, match="unknown verb"):
        check_verb(world.cluster, world.cluster.members[name], verb)


def test_an_operator_may_send_nothing(world: Any) -> None:
    for verb in BODIES:
        with pytest.raises(EngineError):
            check_verb(world.cluster, world.cluster.members["op"], verb)


def cluster_with(world: Any, *rules: PolicyRule) -> Any:
    chain = issue_cluster_manifest(name="test", members=world.members, rules=rules, operators=[world.keys["op"]])
    return open_chain(chain, chain_pin(chain))


@pytest.mark.parametrize("verb", sorted(OPERATIONS | {RequestType.DESCRIBE, RequestType.PREWARM, RequestType.FLUSH}))
def test_what_no_rule_allows_is_denied(world: Any, verb: str) -> None:
    cluster = cluster_with(world)
    with pytest.raises(AccessDenied, match=f"may not {verb} with the key 'orders'"):
        check_key(cluster, cluster.members["alice"], verb, "orders")


@pytest.mark.parametrize("granted", sorted(RequestType))
@pytest.mark.parametrize("verb", sorted(OPERATIONS | {RequestType.DESCRIBE, RequestType.PREWARM, RequestType.FLUSH}))
def test_a_rule_allows_its_own_operation_and_what_comes_with_it(world: Any, verb: str, granted: str) -> None:
    cluster = cluster_with(world, PolicyRule("alice", "orders", [granted]))
    implied = {
        RequestType.DESCRIBE: OPERATIONS
        | {
            RequestType.DESCRIBE,
            RequestType.DESTROY,
            RequestType.REFRESH,
            RequestType.RESHARE,
            RequestType.REWRAP,
            RequestType.ROTATE,
            RequestType.SETTINGS,
        },
        RequestType.PREWARM: OPERATIONS | {RequestType.PREWARM},
    }
    expected = granted in implied.get(RequestType(verb), {verb})

    def allowed(member: str, key: str) -> bool:
        try:
            check_key(cluster, cluster.members[member], verb, key)
        except AccessDenied:
            return False
        return True

    assert allowed("alice", "orders") == expected
    assert not allowed("alice", "orders2")
    assert not allowed("alice", "Orders")
    assert not allowed("alice", "tenant/orders")
    assert not allowed("bob", "orders")


def test_a_pattern_matches_names_as_a_shell_does(world: Any) -> None:
    cluster = cluster_with(world, PolicyRule("a*", "team-[ab]/*", ["sign"]))
    alice = cluster.members["alice"]
    for good in ("team-a/x", "team-b/x/y", "team-a/"):
        check_key(cluster, alice, "sign", good)
    for wrong in ("team-c/x", "team-a", "xteam-a/x", "team-ab/x", "team-/x"):
        with pytest.raises(AccessDenied):
            check_key(cluster, alice, "sign", wrong)


def test_a_node_needs_no_rule_to_describe(world: Any) -> None:
    cluster = cluster_with(world)
    check_key(cluster, cluster.members["node1"], "describe", "orders")
