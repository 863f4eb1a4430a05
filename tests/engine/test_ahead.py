"""What is loaded ahead, where and when: the decisions alone, with time and chance as arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from tables import CLASS, MEMBERS, NODES, NOW, description, signing, table

from engine.client.ahead import (
    AGAIN_S,
    BURST_S,
    PER_S,
    QUEUED_MAX,
    RENEW_S,
    SPREAD_S,
    UNDER_WAY,
    Ahead,
    PrewarmStats,
)
from engine.client.calls import Calls
from engine.protocol.manifest import Cluster, PolicyRule, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.routing import HALF_LIFE_S, HELD_S, HELD_UNHEARD_S, MISSED_S, POPULAR_MAX, POPULAR_USES, Router
from engine.protocol.wire import Load

BURST = int(PER_S * BURST_S)


def issue(*rules: PolicyRule) -> Cluster:
    operators = [signing("op")]
    chain = issue_cluster_manifest(name="test", members=MEMBERS, rules=list(rules), operators=operators, groups=64)
    return open_chain(chain, chain_pin(chain))


EVERYTHING = PolicyRule("alice", "*", ["*"])


class Stage:
    """A client's router and calls, and what is decided with them."""

    def __init__(self, *rules: PolicyRule, chance: float = 0.0) -> None:
        self.now_s = 1_000.0
        self.cluster = issue(*(rules or (EVERYTHING,)))
        self.router = Router(self.cluster)
        self.calls = Calls(
            self.cluster,
            signing("alice"),
            self.router,
            clock=lambda: self.now_s,
            now_ms=lambda: NOW,
            random_bytes=bytes,
        )
        self.woken = 0
        self.ahead = Ahead(self.calls, lambda: chance, self._woken)
        self._counter = 0

    def _woken(self) -> None:
        self.woken += 1

    def know(self, name: str, **changes: Any) -> None:
        self.calls._keep(description(name, self.cluster, **changes))

    def answer(self, node: str, name: str, *, loaded: bool = True, kind: str = CLASS) -> None:
        self.router.sent(node, self.now_s - 1.0)
        self.router.answered(node, name, kind, Load(0, 100, loaded), 300.0, self.now_s)

    def popular(self, name: str, nodes: Sequence[str] = ("n1",), uses: int = 5, **changes: Any) -> None:
        self.know(name, **changes)
        for node in nodes:
            for _ in range(uses):
                self.answer(node, name)

    def hint(self, *names: str, nodes: Sequence[int] = (0, 1, 2, 3), **changes: Any) -> None:
        """A newer table comes that hints these keys' groups."""
        self._counter += 1
        lines = [(group, list(nodes)) for group in dict.fromkeys(map(self.cluster.group_of, names))]
        assert self.router.install(table(self._counter, **({"hints": lines} | changes)))
        self.ahead.look()

    def run(self, *, loaded: bool = True) -> list[tuple[str, str]]:
        """Begin and end all that is due now."""
        done = []
        while begun := self.ahead.begin():
            for warm in begun:
                self.ahead.ended(warm, loaded=loaded)
                done.append((warm.name, warm.node))
        return done

    def best(self, name: str) -> str:
        return self.router.rank(CLASS, name, NODES[:3], self.now_s)[0]


def test_a_hint_asks_the_holders_that_have_the_key_not_loaded() -> None:
    """Holders by the key's own manifest alone; n1 has it, and n4 is none."""
    stage = Stage()
    stage.popular("k")
    stage.know("unused")
    stage.hint("k", "unused")
    assert stage.woken == 1
    assert sorted(stage.run()) == [("k", "n2"), ("k", "n3")]
    assert all(stage.router.is_loaded("k", node) for node in ("n1", "n2", "n3"))
    assert stage.ahead.stats == PrewarmStats(sent=2, loaded=2, failed=0)
    assert stage.ahead.wait_s() is None


def test_until_it_is_loaded_uses_go_where_it_is() -> None:
    """However long the queue there is; and at once to both when it is, or could not be."""
    stage = Stage()
    stage.popular("k", uses=400)
    for _ in range(50):
        stage.router.sent("n1", stage.now_s)
    assert stage.best("k") == "n2"  # without anything coming: a cold use is worth it
    stage.hint("k", nodes=[1, 2])
    assert stage.best("k") == "n1"
    assert stage.router.begin_direct(CLASS, "k", NODES[:3], stage.now_s)[0] == "n1"  # type: ignore[index]
    begun = {warm.node: warm for warm in stage.ahead.begin()}
    stage.ahead.ended(begun["n3"], loaded=True)
    assert stage.best("k") == "n3"
    assert stage.router.begin_direct(CLASS, "k", NODES[:3], stage.now_s)[0] == "n3"  # type: ignore[index]
    for _ in range(60):
        stage.router.sent("n3", stage.now_s)
    assert stage.best("k") == "n1"
    stage.ahead.ended(begun["n2"], loaded=False)
    assert stage.best("k") == "n2"


def test_a_key_that_is_loaded_nowhere_does_not_wait_for_it() -> None:
    stage = Stage()
    stage.popular("k")
    stage.hint("k", nodes=[1])
    stage.answer("n1", "k", loaded=False)
    for _ in range(50):
        stage.router.sent("n1", stage.now_s)
        stage.router.sent("n3", stage.now_s)
    assert stage.best("k") == "n2"


def test_the_same_hint_is_one_request_for_a_while() -> None:
    """With each table, and whatever came of it; a new epoch is another matter."""
    stage = Stage()
    stage.popular("k")
    for _ in range(3):
        stage.hint("k", nodes=[1])
    assert stage.run(loaded=False) == [("k", "n2")]
    stage.hint("k", nodes=[1])
    assert stage.run() == []
    stage.now_s += AGAIN_S / 2
    stage.hint("k", nodes=[1])
    assert stage.run() == []
    stage.popular("k")
    stage.now_s += AGAIN_S / 2
    stage.hint("k", nodes=[1])
    assert stage.run(loaded=False) == [("k", "n2")]
    stage.popular("k", change=1)
    stage.run()
    stage.hint("k", nodes=[1])
    assert stage.run() == [("k", "n2")]
    assert stage.ahead.stats == PrewarmStats(sent=4, loaded=2, failed=2)


def test_what_a_hint_had_loaded_is_asked_for_again_while_the_hint_stands() -> None:
    """A node drops it after a while, and says so to nobody. What uses have loaded there, uses find out."""
    stage = Stage()
    stage.popular("k", uses=50)
    stage.hint("k", nodes=[0, 1])
    assert stage.run() == [("k", "n2")]
    for _ in range(3):
        stage.now_s += RENEW_S / 2
        stage.hint("k", nodes=[0, 1])
        assert stage.run() == []
        stage.now_s += RENEW_S / 2
        stage.popular("k")
        stage.hint("k", nodes=[0, 1])
        for _ in range(100):
            stage.router.sent("n1", stage.now_s)
        assert stage.best("k") == "n2"  # meanwhile it is used there
        assert stage.run() == [("k", "n2")]


def test_what_is_under_way_keeps_uses_away_whatever_is_wanted_meanwhile() -> None:
    stage = Stage()
    stage.popular("k", uses=400)
    stage.hint("k", nodes=[1])
    (warm,) = stage.ahead.begin()
    stage.hint("k", nodes=[1])
    for _ in range(50):
        stage.router.sent("n1", stage.now_s)
        stage.router.sent("n3", stage.now_s)
    assert stage.best("k") != "n2"
    stage.ahead.ended(warm, loaded=True)
    assert stage.best("k") == "n2"


def test_once_it_has_stopped_no_use_waits() -> None:
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.hint("k", nodes=[2])
    stage.router.failed("n2", stage.now_s)
    stage.ahead.stop()
    stage.router.came_up("n2", stage.now_s)
    stage.know("k", change=1)
    stage.hint("k", nodes=[1])
    assert stage.router._keys["k"].coming == frozenset()
    assert not stage.router.returned


def test_requests_are_few_at_a_time_and_few_a_second() -> None:
    stage = Stage()
    names = [f"k{number}" for number in range(POPULAR_MAX + 20)]
    for number, name in enumerate(names):
        stage.popular(name, uses=3 + number)
    stage.hint(*names, nodes=[1])
    begun = stage.ahead.begin()
    assert len(begun) == UNDER_WAY
    assert stage.ahead.begin() == []
    for warm in begun:
        stage.ahead.ended(warm, loaded=True)
    assert len(stage.run()) == BURST - UNDER_WAY
    assert stage.ahead.wait_s() == pytest.approx(1.0 / PER_S)
    stage.now_s += 0.5
    assert len(stage.run()) == PER_S / 2
    stage.now_s += 60.0
    assert len(stage.run()) == POPULAR_MAX - BURST - PER_S / 2
    assert stage.ahead.stats.sent == POPULAR_MAX
    stage.hint(*names, nodes=[1])
    assert all(int(name[1:]) >= 20 for name, _ in stage.ahead._sent)  # the most used


def test_what_waits_is_bounded() -> None:
    """What has no room does not keep its key away from anywhere."""
    stage = Stage()
    names = [f"k{number}" for number in range(400)]
    for name in names:
        stage.popular(name, uses=3)
    for begin in range(0, 400, 50):
        stage.hint(*names[begin : begin + 50])
    assert len(stage.ahead._queue) <= QUEUED_MAX
    coming = sum(len(known.coming) for known in stage.router._keys.values())
    assert coming == len(stage.ahead._queue)


def test_it_waits_for_a_random_time_first() -> None:
    stage = Stage(chance=0.5)
    stage.popular("k")
    stage.know("k", change=1)
    assert stage.ahead.wait_s() == pytest.approx(SPREAD_S / 2)
    assert stage.run() == []
    stage.now_s += SPREAD_S / 2
    assert stage.run() == [("k", "n1")]


def test_hints_of_no_groups_and_of_too_many_are_no_harm() -> None:
    stage = Stage()
    stage.popular("k")
    stage.hint(hints=[(group + 1_000_000, [0, 1, 2, 3] * 400) for group in range(10_000)])
    assert stage.run() == []
    group = stage.cluster.group_of("k")
    stage.hint(hints=[(group, [3] * 16 + [1])])  # so many nodes are no hint
    stage.hint(hints=[*((other, [1]) for other in range(2_000) if other != group), (group, [1])])
    assert stage.run() == []
    stage.hint(hints=[(group, [1, 1, 1])])
    assert stage.run() == [("k", "n2")]


def test_who_has_no_right_sends_nothing() -> None:
    """The right to use the key in any way, or to load it, will do."""
    for operations in (["list", "describe", "status"], ["sign"], ["prewarm"]):
        stage = Stage(PolicyRule("alice", "app/*", operations), PolicyRule("bob", "*", ["*"]))
        for name in ("app/k", "else"):
            stage.popular(name)
        stage.hint("app/k", "else", nodes=[1])
        assert stage.run() == ([] if "list" in operations else [("app/k", "n2")])
        assert stage.router._keys["else"].coming == frozenset()


def test_a_right_that_is_gone_when_it_is_sent_counts() -> None:
    stage = Stage(chance=0.5)
    stage.popular("k")
    stage.hint("k", nodes=[1])
    stage.calls._source = issue()
    stage.now_s += 5.0
    assert stage.run() == []
    assert stage.router._keys["k"].coming == frozenset()


# --- epochs ---


def test_a_new_epoch_is_asked_for_where_the_key_was_loaded() -> None:
    """Also where a node has said a moment ago that it has it no more; an older one, told by a node, is passed over."""
    stage = Stage()
    stage.popular("k", ("n1", "n2", "n3"))
    stage.answer("n3", "k", loaded=False)
    stage.know("k", change=2)
    assert stage.run() == [("k", "n1"), ("k", "n2"), ("k", "n3")]
    for change in (2, 1, 0):
        stage.know("k", change=change)
    assert stage.run() == []
    stage.answer("n3", "k", loaded=False)
    stage.now_s += MISSED_S + 1
    stage.know("k", change=3)
    assert stage.run() == [("k", "n1"), ("k", "n2")]


def test_new_holders_of_a_new_epoch_are_new_combiners() -> None:
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.know("k", change=1, holders=("n2", "n3", "n4"))
    assert stage.run() == [("k", "n2"), ("k", "n4")]  # n3 could have had it loaded before, and had not


def test_another_key_of_the_name_is_loaded_nowhere_yet() -> None:
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.know("k", key_id=b"j" * 16)
    assert not stage.router.is_loaded("k", "n1")
    assert stage.run() == [("k", "n1"), ("k", "n2")]
    assert stage.router.is_loaded("k", "n1")


def test_a_key_that_is_hardly_used_is_not_asked_for() -> None:
    """Uses are forgotten, by halves."""
    stage = Stage()
    stage.popular("k", uses=int(POPULAR_USES) - 1)
    stage.know("k", change=1)
    assert stage.run() == []
    stage.popular("k", uses=int(POPULAR_USES) + 1, change=1)
    stage.now_s += 3 * HALF_LIFE_S
    stage.know("k", change=2)
    stage.hint("k", nodes=[1])
    assert stage.run() == []


# --- nodes that come back ---


@pytest.mark.parametrize("how", ["heard", "connected", "answered"])
def test_a_node_that_is_back_gets_what_it_had_loaded(how: str) -> None:
    """Whatever tells of it. What was loaded ahead there just before counts no more, and nothing is used there first."""
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.popular("rare", ("n2",), uses=1)
    stage.hint("k", nodes=[2])
    assert stage.run() == [("k", "n3")]
    stage.router.failed("n3", stage.now_s)
    stage.router.failed("n2", stage.now_s)
    stage.ahead.look()
    assert stage.run() == []
    for node in ("n2", "n3"):
        if how == "heard":
            before = stage.router.returned
            stage.router.heard(node, 0, stage.now_s, serving=False)
            assert stage.router.returned == before
            stage.router.heard(node, 0, stage.now_s)
        elif how == "connected":
            stage.router.came_up(node, stage.now_s)
        else:
            stage.answer(node, "other")
    assert stage.router.returned
    stage.now_s += 10.0
    for _ in range(200):
        stage.router.sent("n1", stage.now_s)
    assert stage.best("k") == "n1"
    stage.ahead.look()
    assert not stage.router.returned
    assert sorted(stage.run()) == [("k", "n2"), ("k", "n3")]
    assert stage.best("k") != "n1"
    stage.ahead.look()
    assert stage.run() == []


@pytest.mark.parametrize("publishes", [True, False])
def test_a_node_of_which_nothing_is_heard_is_tried_again(publishes: bool) -> None:
    """Else nobody would find out that it is back; later where it has told of itself before."""
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    if publishes:
        stage.router.heard("n2", 0, stage.now_s)
    stage.router.failed("n2", stage.now_s)
    for _ in range(200):
        stage.router.sent("n1", stage.now_s)
        stage.router.sent("n3", stage.now_s)
    stage.now_s += 0.9 * (HELD_S if publishes else HELD_UNHEARD_S)
    stage.ahead.look()
    assert stage.best("k") != "n2"
    stage.now_s += 0.2 * (HELD_S if publishes else HELD_UNHEARD_S)
    stage.ahead.look()
    assert stage.router._keys["k"].coming == frozenset()


def test_a_node_that_was_started_anew_has_nothing_loaded() -> None:
    """Also where no request of this client has failed there."""
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.popular("rare", ("n2",), uses=1)
    stage.router.restarted("n2", stage.now_s)
    assert stage.router.returned
    assert not stage.router.is_loaded("rare", "n2")
    stage.ahead.look()
    assert stage.run() == [("k", "n2")]
    stage.router.restarted("n3", stage.now_s)
    assert not stage.router.returned


def test_of_many_keys_that_a_node_lost_the_most_popular_are_loaded() -> None:
    stage = Stage()
    names = [f"k{number}" for number in range(POPULAR_MAX + 30)]
    for number, name in enumerate(names):
        stage.popular(name, ("n2",), uses=3 + number)
    stage.router.failed("n2", stage.now_s)
    stage.router.came_up("n2", stage.now_s)
    stage.ahead.look()
    assert {warm.name for _, _, warm in stage.ahead._queue} == set(names[30:])


def test_a_flush_forgets_what_was_lost() -> None:
    stage = Stage()
    stage.popular("k", ("n1", "n2"))
    stage.router.failed("n2", stage.now_s)
    stage.router.forget_loaded()
    stage.router.came_up("n2", stage.now_s)
    stage.ahead.look()
    assert stage.run() == []


# --- groups that move ---


def test_a_holder_that_a_table_adds_to_a_group_gets_its_keys() -> None:
    """The first table of all adds nothing, nor does one that leaves the group as it was, or the manifest's rule."""
    stage = Stage()
    stage.popular("k", holders=NODES)
    group = stage.cluster.group_of("k")
    stage.hint(groups=[(group, [0, 1, 2])])
    stage.hint(groups=[(group, [0, 2, 1])])
    assert stage.run() == []
    stage.hint(groups=[(group, [0, 3, 1])])
    assert stage.run() == [("k", "n4")]
    stage.hint(groups=[])
    usual = stage.cluster.group_holders(group)[:4]
    assert stage.run() == [("k", node) for node in usual if node not in ("n1", "n4", "n2")]


def test_a_group_that_leaves_the_manifests_rule_has_its_keys_loaded_where_it_goes() -> None:
    """Also at holders that the key is not described to have yet: there are more than n where it has grown."""
    stage = Stage()
    group = stage.cluster.group_of("k")
    usual = stage.cluster.group_holders(group)
    stage.popular("k", holders=usual[:2])
    stage.hint(groups=[])
    nodes = list(stage.cluster.nodes)
    stage.hint(groups=[(group, [nodes.index(node) for node in usual[:4]])])
    assert stage.run() == [("k", node) for node in usual[2:4]]


def test_without_somebody_who_loads_nothing_is_held_back() -> None:
    """A router alone, as with the switch off, does as it always did."""
    stage = Stage()
    stage.router.prewarms = False
    stage.popular("k", ("n1", "n2"))
    stage.router.failed("n2", stage.now_s)
    stage.router.came_up("n2", stage.now_s)
    assert not stage.router.returned
    assert stage.router._keys["k"].coming == frozenset()
