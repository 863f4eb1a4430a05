"""The router's ranking of the combiners."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.protocol.manifest import Member, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.routing import (
    COLD_CHARGE_US,
    DOWN_S,
    SNAPSHOT_MAX_AGE_S,
    Router,
)
from engine.protocol.signed import SigningKey
from engine.protocol.table import RoutingTable, pack_service
from engine.protocol.wire import Load

NOW = 1_800_000_000_000
NODES = ("n1", "n2", "n3", "n4")
CLASS = "sign/ed25519"


def signing(name: str) -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"r" + name.encode()).digest()))


def member(name: str, role: Any) -> Member:
    curve = bytes(32) if role == "operator" else hashlib.sha256(name.encode()).digest()
    endpoint = "" if role in ("operator", "client") else "tcp://127.0.0.1:1"
    return Member(name, role, signing(name).public, curve, endpoint, "", f"site/{name}" if role == "node" else "")


MEMBERS = [member("op", "operator"), member("alice", "client"), member("bal", "balancer")]
MEMBERS += [member(name, "node") for name in NODES]
CHAIN = issue_cluster_manifest(name="test", members=MEMBERS, rules=[], operators=[signing("op")], groups=64)
CLUSTER = open_chain(CHAIN, chain_pin(CHAIN))


def table(
    counter: int = 1,
    fencing: int = 1,
    *,
    nodes: Sequence[str] = NODES,
    service: Sequence[int] = (100, 100, 100, 100),
    price: Sequence[int] = (0, 0, 0, 0),
    **changes: Any,
) -> RoutingTable:
    made = RoutingTable(
        fencing_epoch=fencing,
        counter=counter,
        issued_ms=NOW,
        expires_ms=NOW + 5_000,
        nodes=list(nodes),
        classes=[CLASS],
        service=pack_service([service]),
        price=list(price),
        caps=[1000],
        groups=[],
        hints=[],
        forecast=[(0, 0)],
    )
    return msgspec.structs.replace(made, **changes)


# --- the router ---


def a_router(made: RoutingTable | None = None, seed: int = 1) -> Router:
    router = Router(CLUSTER, Random(seed))  # a seed
    if made is not None:
        router.install(made)
    return router


def answered(
    router: Router, node: str, *, queue: int = 0, loaded: bool = True, now: float = 0.0, service: int = 0
) -> None:
    router.sent(node)
    router.answered(node, "k", CLASS, Load(queue, service, loaded), 300.0 + service, now)


def best(router: Router, now: float = 0.0, eligible: Sequence[str] = NODES) -> str:
    return router.rank(CLASS, "k", eligible, now)[0]


@given(st.lists(st.sampled_from([*NODES, "gone"]), unique=True), st.integers(0, 99), st.booleans(), st.booleans())
@settings(deadline=None)
def test_the_order_has_every_eligible_node_once(eligible: list[str], seed: int, tabled: bool, down: bool) -> None:
    router = a_router(table(price=(0, 9, 9, 9)) if tabled else None, seed)
    if down:
        router.failed("n2", 0.0)
    order = router.rank(CLASS, "k", eligible, 0.0)
    assert sorted(order) == sorted(name for name in eligible if name in NODES)


def test_a_warm_node_goes_first_whatever_was_sampled() -> None:
    for seed in range(30):
        router = a_router(table(), seed)
        answered(router, "n3")
        assert best(router) == "n3"
        assert router.is_loaded("k", "n3")


def test_a_warm_node_with_a_long_queue_loses_to_a_cold_one() -> None:
    router = a_router(table())
    answered(router, "n3", queue=COLD_CHARGE_US // 100 + 10)
    assert best(router) != "n3"


def test_a_node_that_lost_the_key_is_cold_again() -> None:
    router = a_router()
    answered(router, "n3")
    answered(router, "n3", loaded=False)
    assert not router.is_loaded("k", "n3")
    answered(router, "n2")
    answered(router, "n3")
    router.forget_loaded("other")
    assert router.is_loaded("k", "n2")
    router.forget_loaded("k")
    assert not router.is_loaded("k", "n2")
    answered(router, "n1")
    router.forget_loaded()
    assert not router.is_loaded("k", "n1")


def test_what_is_told_late_does_not_make_a_flushed_key_loaded() -> None:
    router = a_router()
    answered(router, "n1")
    router.forget_loaded("k")
    router.learned_direct("n1", "k", CLASS, Load(0, 50, True), 1e-4, 10.0)
    assert not router.is_loaded("k", "n1")
    answered(router, "n1")
    router.learned_direct("n1", "k", CLASS, Load(0, 50, True), 1e-4, 10.0)
    assert router.is_loaded("k", "n1")


def test_a_node_that_failed_is_last_until_its_time_is_over() -> None:
    for seed in range(30):
        router = a_router(table(), seed)
        answered(router, "n1")
        router.sent("n1")
        router.failed("n1", 10.0)
        assert router.rank(CLASS, "k", NODES, 10.0)[-1] == "n1"
        assert not router.is_loaded("k", "n1")
        assert router.rank(CLASS, "k", ("n1",), 10.0) == ("n1",)
    later = {best(a_router_after_failure(seed), 10.0 + DOWN_S) for seed in range(60)}
    assert "n1" in later


def a_router_after_failure(seed: int) -> Router:
    router = a_router(table(), seed)
    router.failed("n1", 10.0)
    return router


def test_an_answer_ends_the_time_of_a_failure() -> None:
    router = a_router(table())
    router.failed("n1", 10.0)
    answered(router, "n1", now=10.1)
    assert best(router, 10.1) == "n1"


TWO = NODES[:2]


def test_a_fresh_queue_counts_and_an_old_one_does_not() -> None:
    router = a_router(table())
    for node, queue in (("n1", 50), ("n2", 0)):
        answered(router, node, queue=queue, now=5.0)
    assert best(router, 4.99 + SNAPSHOT_MAX_AGE_S, TWO) == "n2"
    router = a_router(table(price=(0, 400, 0, 0)))
    for node, queue in (("n1", 50), ("n2", 0)):
        answered(router, node, queue=queue, now=5.0)
    assert best(router, 4.99 + SNAPSHOT_MAX_AGE_S, TWO) == "n2"
    assert best(router, 5.01 + SNAPSHOT_MAX_AGE_S, TWO) == "n1"  # its queue is unknown by then, so the price decides


def test_own_requests_under_way_count() -> None:
    router = a_router(table())
    for _ in range(5):
        router.sent("n1")
    assert best(router, eligible=TWO) == "n2"
    for _ in range(9):
        router.sent("n2")
    assert best(router, eligible=TWO) == "n1"


def test_the_price_and_the_service_time_of_the_table_count() -> None:
    assert best(a_router(table(price=(500, 0, 0, 0))), eligible=TWO) == "n2"
    assert best(a_router(table(service=(100, 150, 1, 1))), eligible=TWO) == "n1"
    # A price is paid for each second of service.
    assert best(a_router(table(service=(100, 40, 1, 1), price=(0, 1000, 0, 0))), eligible=TWO) == "n2"
    assert best(a_router(table(service=(100, 60, 1, 1), price=(0, 1000, 0, 0))), eligible=TWO) == "n1"


def test_measured_service_times_beat_the_tables() -> None:
    router = a_router(table(service=(100, 200, 1, 1)))
    for _ in range(3):
        answered(router, "n1", service=900)
        answered(router, "n2", service=200)
    assert best(router, 100.0, TWO) == "n2"


def test_the_least_score_decides() -> None:
    for seed in range(20):
        assert best(a_router(table(price=(9, 9, 0, 9)), seed)) == "n3"


def test_a_class_the_table_does_not_know_is_routed_by_first_guesses() -> None:
    router = a_router(table(price=(9, 9, 9, 0)))
    order = router.rank("mac/hmac-sha256", "k", NODES, 0.0)
    assert sorted(order) == list(NODES)
    assert sorted(router.rank("nonsense", "k", NODES, 0.0)) == list(NODES)


def test_a_node_the_table_does_not_know_is_still_there_for_failover() -> None:
    router = a_router(table(nodes=NODES[:2], service=(1, 1), price=(0, 0)))
    order = router.rank(CLASS, "k", NODES, 0.0)
    assert sorted(order) == list(NODES)
    assert set(order[:2]) == {"n1", "n2"}


def test_the_holders_of_a_group_come_from_the_table_or_the_clusters_rule() -> None:
    group = CLUSTER.group_of("k")
    assert a_router().holders("k") == CLUSTER.group_holders(group)
    assert a_router(table()).holders("k") == CLUSTER.group_holders(group)
    router = a_router(table(groups=[((group + 1) % 64, [0]), (group, [3, 1])]))
    assert router.holders("k") == ("n4", "n2")


def test_a_table_can_not_bring_in_a_node_that_is_no_member() -> None:
    group = CLUSTER.group_of("k")
    router = a_router(table(nodes=["n1", "evil", "n3", "n4"], groups=[(group, [1, 2])]))
    assert router.holders("k") == ("n3",)
    assert "evil" not in router.rank(CLASS, "k", ("evil", "n1"), 0.0)


def test_more_answers_than_requests_leave_no_credit() -> None:
    router = a_router(table())
    for _ in range(5):
        router.answered("n1", "k", CLASS, Load(0, 0, False), 300.0, -9.0)
    router.sent("n1")
    assert best(router, eligible=TWO) == "n2"
