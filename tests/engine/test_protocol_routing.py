"""The router's ranking of the combiners."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from tables import CLASS, CLUSTER, NODES, table

from engine.protocol._nodestate import DOWN_S, RELEARN_S, SLOW_START_S, SNAPSHOT_MAX_AGE_S
from engine.protocol.routing import COLD_CHARGE_US, Router
from engine.protocol.table import RoutingTable, pack_service
from engine.protocol.wire import Load

# --- the router ---


def a_router(made: RoutingTable | None = None) -> Router:
    router = Router(CLUSTER)
    if made is not None:
        router.install(made)
    return router


def answered(
    router: Router, node: str, *, queue: int = 0, loaded: bool = True, now: float = 0.0, service: int = 0
) -> None:
    router.sent(node, now - 1.0)
    router.answered(node, "k", CLASS, Load(queue, service, loaded), 300.0 + service, now)


def best(router: Router, now: float = 0.0, eligible: Sequence[str] = NODES) -> str:
    return router.rank(CLASS, "k", eligible, now)[0]


@given(st.lists(st.sampled_from([*NODES, "gone"]), unique=True), st.booleans(), st.booleans())
@settings(deadline=None)
def test_the_order_has_every_eligible_node_once(eligible: list[str], tabled: bool, down: bool) -> None:
    router = a_router(table(price=(0, 9, 9, 9)) if tabled else None)
    if down:
        router.failed("n2", 0.0)
    order = router.rank(CLASS, "k", eligible, 0.0)
    assert sorted(order) == sorted(name for name in eligible if name in NODES)


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(NODES),
        st.sampled_from(
            ["sent", "answered", "cold", "heard", "failed", "late", "late answer", "dropped", "up", "expect", "warmed"]
        ),
        st.integers(0, 30),
        st.floats(0, 0.4),
    ),
    max_size=40,
)


@given(EVENTS, st.tuples(*[st.integers(0, 500)] * 4), st.lists(st.integers(0, 8), min_size=4, max_size=4))
@settings(deadline=None)
def test_the_shortest_way_takes_the_node_that_the_order_puts_first(
    events: list[tuple[str, str, int, float]], price: tuple[int, ...], lanes: list[int]
) -> None:
    router, now = a_router(table(price=price, lanes=lanes)), 0.0
    router.prewarms = True
    for node, what, number, passed in events:
        now += passed
        if what == "sent":
            router.sent(node, now)
        elif what in ("answered", "cold"):
            answered(router, node, queue=number, loaded=what == "answered", now=now, service=10 * number)
        elif what == "heard":
            router.heard(node, number, now)
        elif what == "late answer":
            router.learned_direct(node, "k", CLASS, Load(number, 100, True), passed, now)
        elif what == "up":
            router.came_up(node, now)
        elif what == "dropped":
            router.dropped(node)
        elif what == "expect":
            router.expect("k", node)
        elif what == "warmed":
            router.warmed("k", node, number % 3 != 0)
        else:
            (router.failed if what == "failed" else router.late)(node, now)
    known = [node for node in NODES if router.is_loaded("k", node)]
    direct = router.begin_direct(CLASS, "k", NODES, now)
    if direct is not None:
        router.dropped(direct[0])
        direct[2].sent_s.pop()
        assert direct[0] in known
        assert direct[0] == router.rank(CLASS, "k", NODES, now)[0]
    elif not any(what in ("failed", "late") for _, what, _, _ in events):
        assert router.rank(CLASS, "k", NODES, now)[0] not in known


def test_a_warm_node_goes_first_if_all_else_is_equal() -> None:
    for node in NODES:
        router = a_router(table())
        answered(router, node)
        assert best(router) == node
        assert router.is_loaded("k", node)


def test_a_warm_node_with_a_long_queue_loses_to_a_cold_one() -> None:
    router = a_router(table())
    answered(router, "n3", queue=int(COLD_CHARGE_US) // 100 + 10)
    assert best(router) == "n1"


def test_what_a_cold_key_costs_is_measured() -> None:
    for cold_s, chosen in ((0.05, "n1"), (0.0, "n2")):
        router = a_router(table(price=(900, 0, 0, 0)))
        for number in range(200):  # keys that were loaded nowhere, as far as this client knew
            router.sent("n3", 0.0)
            router.answered("n3", f"k{number}", CLASS, Load(0, 100, True), 400.0 + cold_s * 1e6, 0.0)
        answered(router, "n1", service=100)
        assert router.rank(CLASS, "k", ("n1", "n2"), 9.0)[0] == chosen


def test_a_key_in_frequent_use_is_soon_loaded_elsewhere_too() -> None:
    def queue_that_is_left(uses: int) -> int:
        router = a_router(table())
        for _ in range(uses):
            answered(router, "n1", service=100)
        for queue in range(100):
            router.heard("n1", queue, 0.0)
            if best(router) != "n1":
                return queue
        raise AssertionError("it stays whatever the queue")

    assert queue_that_is_left(1) > 2 * queue_that_is_left(20) > 0


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
    router = a_router(table())
    answered(router, "n1")
    router.sent("n1", 0.0)
    router.failed("n1", 10.0)
    assert router.rank(CLASS, "k", NODES, 10.0)[-1] == "n1"
    assert not router.is_loaded("k", "n1")
    assert router.rank(CLASS, "k", ("n1",), 10.0) == ("n1",)
    assert best(router, 10.0 + DOWN_S) == "n1"
    assert best(router, 10.0 + DOWN_S) != "n1"  # one request is enough to find out how it is


def test_a_node_that_is_back_counts_in_full_little_by_little() -> None:
    """It is dearer at first; with the others' queues as long as that is worth, it has its part at once."""
    router = a_router()
    for node in NODES:
        answered(router, node, now=1.0, service=100)

    def with_queues(queue: int, now: float) -> str:
        for node in NODES[1:]:
            answered(router, node, queue=queue, now=now, service=100)
        return best(router, now)

    router.failed("n1", 1.0)
    assert with_queues(9, 1.1) != "n1"
    router.came_up("n1", 1.2)
    answered(router, "n1", now=1.2, service=100)
    assert with_queues(2, 1.2) != "n1"
    assert with_queues(200, 1.2) == "n1"
    answered(router, "n1", now=1.2 + SLOW_START_S, service=100)
    assert with_queues(2, 1.2 + SLOW_START_S) == "n1"


def test_a_node_that_publishes_and_was_taken_for_slow_is_tried_again() -> None:
    """What it publishes says nothing of how quick it is: it is measured anew after a while, as if it said nothing."""
    router = a_router(table(service=(100, 100, 100, 100)))
    for _ in range(40):
        for node in NODES[:2]:
            answered(router, node, now=1.0, service=100 if node == "n2" else 5_000)
    assert best(router, 1.0, NODES[:2]) == "n2"
    for second in range(2, 60):
        answered(router, "n2", now=float(second), service=150)
        router.heard("n1", 0, float(second))
    assert best(router, 60.0, NODES[:2]) == "n1"
    answered(router, "n1", now=60.0, service=90)
    assert router._nodes["n1"].service_us[CLASS] == 90.0


def test_a_first_measurement_is_no_more_than_an_outlier() -> None:
    router = a_router(table(service=(100, 100, 100, 100)))
    answered(router, "n1", service=50_000)
    assert router._nodes["n1"].service_us[CLASS] < 330.0


def test_one_outlier_is_no_habit_and_a_slow_token_is_soon_known() -> None:
    """A pause of a second changes the measured service by a fifth at most; one that is 5 times as slow shows."""
    router = a_router()
    for _ in range(20):
        answered(router, "n1", service=100)
    state = router._nodes["n1"]
    answered(router, "n1", service=1_000_000)
    assert state.service_us[CLASS] <= 120.001
    assert state.usual_us <= 110.001
    for _ in range(25):
        answered(router, "n1", service=500)
    assert state.service_us[CLASS] > 450


def test_nodes_rest_from_a_class_of_which_they_did_more_than_its_cap() -> None:
    """At a quarter a second's work is followed by three of rest, in which the others come first; no name is lost."""
    router = a_router(table(caps=[250]))
    router.worked("n1", CLASS, 1.0, 10.0)
    assert router.order(NODES, 10.0, CLASS) == ("n2", "n3", "n4", "n1")
    assert router.order(NODES, 10.0, "encrypt/aes-256-gcm") == NODES
    assert router.order(NODES, 10.0) == NODES
    for node in NODES[1:]:
        router.worked(node, CLASS, 0.5, 10.0)
    assert router.order(NODES, 10.1, CLASS) == ("n2", "n3", "n4", "n1")
    assert router.order(NODES, 12.9, CLASS) == ("n2", "n3", "n4", "n1")
    assert router.order(NODES, 13.0, CLASS) == NODES
    router.failed("n3", 13.0)
    router.worked("n2", CLASS, 0.5, 13.0)
    assert router.order(NODES, 13.0, CLASS) == ("n1", "n4", "n2", "n3")


def test_without_a_cap_no_node_rests() -> None:
    router = a_router(table(caps=[1000]))
    router.worked("n1", CLASS, 1.0, 10.0)
    assert router.order(NODES, 10.0, CLASS) == NODES
    alone = a_router()
    alone.worked("n1", CLASS, 1.0, 10.0)
    assert alone.order(NODES, 10.0, CLASS) == NODES


def test_a_node_whose_time_is_over_keeps_nobody_from_the_shortest_way_unless_it_is_best() -> None:
    """It has nothing loaded any more, so that the others come first until they are busy."""
    router = a_router(table())
    for node in ("n1", "n2"):
        answered(router, node, service=100)
    router.failed("n1", 0.0)
    later = DOWN_S + 0.01
    eligible = ("n1", "n2")
    direct = router.begin_direct(CLASS, "k", eligible, later)
    assert direct is not None
    assert direct[0] == "n2"
    router.dropped("n2")
    answered(router, "n2", queue=int(COLD_CHARGE_US), now=later, service=100)
    assert router.begin_direct(CLASS, "k", eligible, later) is None
    assert best(router, later, eligible) == "n1"


def test_an_answer_ends_the_time_of_a_failure() -> None:
    router = a_router(table())
    router.failed("n1", 10.0)
    answered(router, "n1", now=10.1)
    assert best(router, 10.1) == "n1"


TWO = NODES[:2]


def test_without_an_answer_own_requests_count_however_many_are_told_to_be_there() -> None:
    router = a_router(table())
    for node in ("n1", "n2"):
        answered(router, node, now=5.0)
    for _ in range(5):
        router.sent("n1", 5.0)
    router.heard("n1", 0, 5.1)  # what was sent is there, and the node says that nothing is
    assert router.rank(CLASS, "k", ("n1", "n2"), 5.1)[0] == "n1"
    assert router.rank(CLASS, "k", ("n1", "n2"), 5.11 + SNAPSHOT_MAX_AGE_S)[0] == "n2"


def test_a_snapshot_counts_for_less_as_it_gets_older() -> None:
    router = a_router(table(price=(0, 9000, 9000, 9000)))
    for _ in range(100):
        answered(router, "n1", queue=0, service=1000)
        answered(router, "n2", queue=0, service=1000)
    router.heard("n1", 20, 0.0)
    assert best(router, 0.001, ("n1", "n2")) == "n2"
    assert best(router, 0.19, ("n1", "n2")) == "n1"


def test_what_the_snapshot_can_not_know_of_is_added() -> None:
    router = a_router(table())
    for node in ("n1", "n2"):
        answered(router, node, service=100, now=1.0)
    router.sent("n1", 1.00005)  # not yet there when the node's next snapshot leaves it
    router.heard("n1", 0, 1.0001)
    assert router.rank(CLASS, "k", ("n1", "n2"), 1.0001)[0] == "n2"
    router.heard("n1", 0, 1.1)  # by now it was there, and is counted in what the node says
    assert router.rank(CLASS, "k", ("n1", "n2"), 1.1)[0] == "n1"


def test_a_node_with_several_lanes_makes_nobody_wait_while_one_is_free() -> None:
    router = a_router(table(lanes=[4, 1, 1, 1]))
    for _ in range(50):
        for node in ("n1", "n2"):
            answered(router, node, service=100, now=1.0)
    assert [_queue_that_is_left(router, node, 1.0) for node in ("n1", "n2")] == [4, 1]


def _queue_that_is_left(router: Router, node: str, now_s: float) -> int:
    other = "n2" if node == "n1" else "n1"
    router.heard(other, 0, now_s)
    for queue in range(100):
        router.heard(node, queue, now_s)
        if router.rank(CLASS, "k", (node, other), now_s)[0] != node:
            router.heard(node, 0, now_s)
            return queue
    raise AssertionError("it stays whatever the queue")


def test_a_node_that_was_slow_long_ago_is_tried_again() -> None:
    router = a_router(table())
    answered(router, "n1", service=90_000)
    for _ in range(3):
        answered(router, "n2", service=100)
    assert best(router, RELEARN_S - 1) == "n2"
    assert router.rank(CLASS, "k", ("n1", "n2"), RELEARN_S + 1)[0] == "n1"
    answered(router, "n1", service=100, now=RELEARN_S + 1)
    answered(router, "n2", service=110, now=RELEARN_S + 1)
    assert router.rank(CLASS, "k", ("n1", "n2"), RELEARN_S + 1)[0] == "n1"  # what was before counts no more


def test_own_requests_under_way_count() -> None:
    router = a_router(table())
    two = ("n1", "n2")
    assert best(router, eligible=two) == "n1"
    for _ in range(5):
        router.sent("n1", 0.0)
    assert best(router, eligible=two) == "n2"
    for _ in range(9):
        router.sent("n2", 0.0)
    assert best(router, eligible=two) == "n1"
    assert best(router) == "n3"


def test_the_price_and_the_service_time_of_the_table_count() -> None:
    assert best(a_router(table(price=(50, 0, 0, 0)))) == "n2"
    assert best(a_router(table(service=(150, 100, 120, 130)))) == "n2"


def test_measured_service_times_beat_the_tables() -> None:
    router = a_router(table(service=(100, 200, 1000, 1000)))
    for _ in range(3):
        answered(router, "n1", service=900)
        answered(router, "n2", service=200)
    assert best(router, 1.0) == "n2"


def test_a_dear_node_is_dearer_for_long_requests() -> None:
    """The price is what work costs others, so it counts by the time that a request takes."""
    long = "sign/rsa-4096-pss-sha256"
    router = a_router(
        table(
            classes=[CLASS, long],
            service=pack_service([[100, 100], [4000, 4000]]),
            nodes=["n1", "n2"],
            caps=[1000, 1000],
            forecast=[(0, 0), (0, 0)],
            price=(2000, 0),
        )
    )
    for _ in range(30):  # which are enough to find out that the way to n1 is short
        router.sent("n1", -1.0)
        router.answered("n1", "", CLASS, Load(0, 0, True), 10.0, 0.0)
    assert router.rank(CLASS, "k", ("n1", "n2"), 0.0)[0] == "n1"
    assert router.rank(long, "k", ("n1", "n2"), 0.0)[0] == "n2"


def test_the_longer_the_queues_the_more_a_request_goes_where_it_is_quick() -> None:
    """It keeps all who wait behind it waiting for as long as it takes."""
    other = "sign/rsa-2048-pss-sha256"
    router = a_router()
    for _ in range(200):
        for node, service in (("n1", 100), ("n2", 400)):
            router.sent(node, -1.0)
            router.answered(node, "", CLASS, Load(0, service, True), service + 10.0, 0.0)
        for _ in range(20):
            router.learned_direct("n2", "", other, Load(0, 100, True), 110e-6, 0.0)
            router.learned_direct("n1", "", other, Load(0, 100, True), 110e-6, 0.0)

    def chosen(first: int, second: int) -> str:
        router.heard("n1", first, 0.0)
        router.heard("n2", second, 0.0)
        return router.rank(CLASS, "k", ("n1", "n2"), 0.0)[0]

    assert chosen(2, 0) == "n1"
    assert chosen(6, 0) == "n2"
    assert chosen(30, 24) == "n1"
    assert chosen(30, 4) == "n2"


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
    router.sent("n1", 0.0)
    assert best(router) == "n2"
