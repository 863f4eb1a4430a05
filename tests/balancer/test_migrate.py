"""What is done with which key next: by rules, and in played clusters where nodes die, come back, lie and are slow.

No socket and no clock: the cluster is played, and what a holder would refuse is refused as it would.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from balancer import migrate
from balancer.migrate import (
    PACE_MIN,
    WAIT_MAX_S,
    WAIT_S,
    Batch,
    Change,
    Kind,
    MigrateSettings,
    Migration,
    Result,
    Situation,
    change_of,
)
from balancer.places import Crowd, KeyPlace
from engine.sharing import placement_risk

FAST = MigrateSettings(keys_per_s=100.0, batch=16, under_way=2, repair_after_s=30.0)


@dataclass
class Key:
    """A key of the played cluster: its documents' content, and where its shares really are."""

    number: int
    group: int
    threshold: int
    shares: int
    holders: tuple[str, ...]
    there: set[str]
    grows: bool = False
    epoch: int = 1
    since_ms: int = 0

    @property
    def place(self) -> KeyPlace:
        crowd = Crowd(self.group, self.holders, self.threshold, self.shares, self.grows)
        missing = tuple(node for node in self.holders if node not in self.there)
        key_id = self.number.to_bytes(16, "big")
        return KeyPlace(key_id, f"key/{self.number}", self.epoch, crowd, missing, self.since_ms)


@dataclass
class Played:
    """A cluster: keys and where they are, nodes that are up, what was planned; and the decisions that move it."""

    cluster: Any
    options: MigrateSettings
    keys: dict[bytes, Key] = field(default_factory=dict)
    up: set[str] = field(default_factory=set)
    since_s: dict[str, float] = field(default_factory=dict)
    targets: dict[int, tuple[str, ...]] = field(default_factory=dict)
    draining: set[str] = field(default_factory=set)
    broken: set[bytes] = field(default_factory=set)
    now_s: float = 0.0
    strain: float = 1.0
    refused: list[str] = field(default_factory=list)
    changed: Counter[bytes] = field(default_factory=Counter)
    orders: Counter[bytes] = field(default_factory=Counter)
    clusters: dict[frozenset[str], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.up = self.up or set(self.cluster.nodes)
        self.migration = Migration(self.options)

    def add(
        self, count: int, *, threshold: int = 2, shares: int = 3, grows: bool = False, group: int | None = None
    ) -> None:
        for _ in range(count):
            number = len(self.keys) + 1
            at = number % 8 if group is None else group
            holders = self.cluster.group_holders(at)[:shares]
            key = Key(number, at, threshold, shares, holders, set(holders), grows)
            self.keys[key.place.key_id] = key

    def die(self, *nodes: str) -> None:
        self.up -= set(nodes)
        self.since_s |= dict.fromkeys(nodes, self.now_s)

    @property
    def today(self) -> Any:
        """The cluster with the nodes that are draining."""
        draining = frozenset(self.draining)
        if draining not in self.clusters:
            self.clusters[draining] = replace(self.cluster, draining=draining)
        return self.clusters[draining]

    def situation(self) -> Situation:
        crowds = Counter(key.place.crowd for key in self.keys.values())
        due_ms = int((self.now_s - self.options.refresh_every_s) * 1000)
        old = self.options.refresh_every_s > 0 and any(key.since_ms < due_ms for key in self.keys.values())
        return Situation(
            self.now_s,
            self.today,
            crowds,
            dict(self.targets),
            frozenset(self.up),
            {node: self.now_s - at for node, at in self.since_s.items() if node not in self.up},
            self.strain,
            sum(bool(key.place.missing) for key in self.keys.values()),
            int(old),
        )

    def fetch(self, source: Crowd | Kind, after: KeyPlace | None, most: int) -> Sequence[KeyPlace]:
        places = [key.place for key in self.keys.values()]
        order: Callable[[KeyPlace], Any] = lambda place: place.key_id  # noqa: E731
        if isinstance(source, Crowd):
            found = [place for place in places if place.crowd == source]
        elif source is Kind.TOP_UP:
            found = [place for place in places if place.missing]
        else:
            due_ms = int((self.now_s - self.options.refresh_every_s) * 1000)
            order = lambda place: (place.since_ms, place.key_id)  # noqa: E731
            found = [place for place in places if place.since_ms < due_ms and place.crowd.threshold > 1]
        found = sorted(found, key=order)
        return [place for place in found if after is None or order(place) > order(after)][:most]

    def step(self) -> list[Batch]:
        self.migration.look(self.situation())
        batches = []
        while (batch := self.migration.next_batch(self.fetch)) is not None:
            batches.append(batch)
            self.orders.update(order.key.key_id for order in batch.orders)
            told = [(self.keys[order.key.key_id], order.change) for order in batch.orders]
            self.refused += [reason for key, change in told if (reason := self.refusal(key, change))]
        return batches

    def carry_out(self, batch: Batch) -> None:
        """What the nodes do: each holder checks, all new holders are needed, and t + 1 dealers."""
        if batch.coordinator not in self.up:
            self.migration.ended(batch.number, [], "no connection")
            return
        results = []
        for order in batch.orders:
            reason = self.why_not(batch.coordinator, self.keys[order.key.key_id], order.key, order.change)
            if not reason:
                self.make(self.keys[order.key.key_id], order.change)
            epoch = 0 if reason else self.keys[order.key.key_id].epoch
            results.append(Result(order.key.key_id, epoch, reason))
        self.migration.ended(batch.number, results)

    def why_not(self, coordinator: str, key: Key, place: KeyPlace, change: Change) -> str:
        if place.key_id in self.broken:
            return "broken"
        if place.epoch != key.epoch:
            return "another epoch"
        assert coordinator in key.holders
        dealers = [node for node in key.holders if node not in change.without]
        if any(node not in self.up or node not in key.there for node in dealers):
            return "a dealer is away, or has no share"
        if any(node not in self.up for node in change.holders):
            return "a new holder is away"
        if change.kind is Kind.REFRESH:
            assert change.holders == key.holders
            return "" if len(dealers) == len(key.holders) else "a refresh needs all"
        if len(dealers) <= key.threshold:
            return "too few dealers"
        return self.refusal(key, change)

    def refusal(self, key: Key, change: Change) -> str:
        """What a holder refuses for good: nothing may ask for it."""
        if change.kind is Kind.REFRESH:
            return ""
        reason = ""
        if len(set(change.holders)) != len(change.holders) or any(n not in self.cluster.nodes for n in change.holders):
            reason = "no nodes, or one twice"
        elif len(change.holders) < key.shares or (len(change.holders) > key.shares and not key.grows):
            reason = "another n"
        elif set(change.holders) & self.draining - set(key.holders):
            reason = "to a draining node"
        else:
            level, places = self.cluster.domain_level, self.cluster.locations
            today = placement_risk(places, key.holders, key.threshold, domain_level=level)
            then = placement_risk(places, change.holders, key.threshold, domain_level=level)
            reason = then.worse_than(today)
        return reason

    def make(self, key: Key, change: Change) -> None:
        key.holders, key.there, key.epoch = change.holders, set(change.holders), key.epoch + 1
        key.since_ms = int(self.now_s * 1000)
        self.changed[key.place.key_id] += 1

    def run(self, seconds: float, tick_s: float = 0.5, *, while_: Callable[[], bool] = lambda: True) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s and while_():
            for batch in self.step():
                self.carry_out(batch)
            self.now_s += tick_s

    @property
    def waits(self) -> Mapping[Kind, int]:
        self.migration.look(self.situation())
        return {kind: count for kind, count in self.migration.progress().waiting.items() if count}

    def share_counts(self) -> Counter[str]:
        return Counter(node for key in self.keys.values() for node in key.there)


@pytest.fixture
def played(world: Any) -> Played:
    made = Played(world.cluster, FAST)
    made.add(64)
    return made


def test_keys_that_are_where_they_are_to_be_are_left_alone(played: Played) -> None:
    played.run(60.0)
    assert not played.orders
    assert played.migration.progress().text == "every key is where it is to be"


def test_a_plan_is_carried_out_and_not_twice(played: Played) -> None:
    """Every key of the planned groups goes there, in as many orders as there are keys; no other moves."""
    nodes = played.cluster.group_holders(3)
    target = (*nodes[3:6],)
    played.targets = {3: target, 5: played.cluster.group_holders(5)[:3]}
    played.run(10.0)
    for key in played.keys.values():
        assert set(key.holders) == set(target if key.group == 3 else played.cluster.group_holders(key.group)[:3])
        assert played.changed[key.place.key_id] == (key.group == 3)
    assert played.orders == played.changed
    assert not played.refused
    assert not played.waits


def test_a_plan_goes_on_after_a_restart(played: Played) -> None:
    """Nothing is kept but where keys are and are to be, and that is enough."""
    played.targets = {group: played.cluster.group_holders(group)[3:6] for group in range(8)}
    played.run(1.0)
    assert 0 < sum(played.changed.values()) < 64
    played.migration = Migration(played.options)
    played.run(10.0)
    assert set(played.changed.values()) == {1}
    assert len(played.changed) == 64


def test_a_larger_target_is_for_keys_that_may_grow(world: Any) -> None:
    """A hot group gets more holders than its keys' n where the policy lets it, and loses them again; others keep n."""
    played, nodes = Played(world.cluster, FAST), world.cluster.group_holders(3)
    played.add(8, threshold=3, shares=5, grows=True, group=3)
    played.add(8, threshold=3, shares=5, group=3)
    played.targets = {3: nodes}
    played.run(10.0)
    assert {key.holders for key in played.keys.values() if key.grows} == {nodes}
    assert {key.holders for key in played.keys.values() if not key.grows} == {nodes[:5]}
    played.targets = {3: nodes[1:]}
    played.run(10.0)
    assert {frozenset(key.holders) for key in played.keys.values()} == {frozenset(nodes[1:])}
    assert not played.refused


def test_a_key_grows_no_further_than_the_failure_domains_allow(world: Any) -> None:
    """With t = 2, none of three sites may have two of its shares: so it has three holders, whatever is planned."""
    played = Played(world.cluster, FAST)
    played.add(4, grows=True, group=3)
    played.targets = {3: world.cluster.group_holders(3)}
    played.run(10.0)
    assert not played.changed
    assert not played.waits


def test_keys_of_a_lost_node_are_repaired_when_it_was_silent_for_long(world: Any) -> None:
    played, lost = Played(world.cluster, FAST), world.cluster.group_holders(0)[0]
    played.add(64, threshold=3, shares=5)
    hit = [key for key in played.keys.values() if lost in key.holders]
    played.die(lost)
    played.run(FAST.repair_after_s - 1.0)
    assert not played.changed
    played.run(30.0)
    assert len(played.changed) == len(hit)
    assert lost not in {node for key in played.keys.values() for node in key.holders}
    played.up.add(lost)
    played.run(60.0)
    assert set(played.changed.values()) == {1}, "who comes back gets nothing back"
    assert not played.refused


def test_half_of_the_nodes_silent_is_this_process_cut_off(played: Played) -> None:
    played.die(*list(played.cluster.nodes)[:3])
    played.run(300.0)
    assert not played.orders


def test_a_draining_node_is_emptied_and_gets_nothing_new(played: Played) -> None:
    drained = played.cluster.group_holders(0)[0]
    played.draining = {drained}
    played.targets = {group: (drained, *played.cluster.group_holders(group)[3:5]) for group in range(8)}
    played.run(20.0)
    assert played.share_counts()[drained] == 0
    assert not played.refused
    assert not played.waits


def test_missing_shares_are_topped_up(played: Played) -> None:
    """Once their holder is there; who misses its share deals nothing."""
    thin = [key for key in played.keys.values() if key.number % 4 == 0]
    played.add(16, threshold=2, shares=4)
    thin += [key for key in played.keys.values() if key.shares == 4]
    for key in thin:
        key.there.discard(key.holders[-1])
    away = thin[-1].holders[-1]
    played.die(away)
    played.run(20.0)
    late = [key for key in thin if key.shares == 4 and away in key.holders]
    assert late
    assert {key.epoch for key in late} == {1}
    played.up.add(away)
    played.run(20.0)
    assert all(key.there == set(key.holders) for key in thin if key.shares == 4)
    assert all(key.epoch == 1 for key in played.keys.values() if key not in thin)


def test_old_epochs_are_renewed_and_young_ones_are_not(played: Played) -> None:
    played.options = replace(FAST, refresh_every_s=1000.0)
    played.migration = Migration(played.options)
    played.add(4, threshold=1, shares=3)
    for key in played.keys.values():
        key.since_ms = (key.number % 2) * 900_000
    played.now_s = 1500.0
    played.run(20.0)
    for key in played.keys.values():
        assert key.epoch == 1 + (key.threshold > 1 and key.number % 2 == 0)
    played.run(500.0)
    assert {key.epoch for key in played.keys.values() if key.threshold > 1} == {2}


def test_what_is_urgent_comes_first(world_of_nine: Any) -> None:
    """Repair before top-up before drain before plan before refresh, each batch of one kind."""
    cluster = world_of_nine.cluster
    played = Played(cluster, replace(FAST, refresh_every_s=10.0, under_way=1))
    played.add(80, threshold=3, shares=5)
    lost, drained = list(cluster.nodes)[:2]
    thin = [key for key in played.keys.values() if not {lost, drained} & set(key.holders)]
    thin[0].there.discard(thin[0].holders[0])
    played.die(lost)
    played.draining = {drained}
    played.targets = {thin[1].group: cluster.group_holders(thin[1].group)[-5:]}
    played.now_s = 100.0
    kinds: list[Kind] = []
    while played.now_s < 130.0:
        for batch in played.step():
            assert {order.change.kind for order in batch.orders} == {batch.kind}
            kinds.append(batch.kind)
            played.carry_out(batch)
        played.now_s += 0.5
    assert list(dict.fromkeys(kinds)) == list(Kind)
    assert kinds[: kinds.index(Kind.REFRESH)] == sorted(kinds[: kinds.index(Kind.REFRESH)])


def test_failing_keys_wait_longer_each_time_and_block_nobody(played: Played) -> None:
    """The first keys of each group fail for ever; the others are through as quickly as without them."""
    played.broken = {key.place.key_id for key in played.keys.values() if key.number <= 32}
    played.targets = {group: played.cluster.group_holders(group)[3:6] for group in range(8)}
    tries: dict[bytes, list[float]] = {key_id: [] for key_id in played.broken}
    while played.now_s < 700.0:
        for batch in played.step():
            for order in batch.orders:
                if order.key.key_id in tries:
                    tries[order.key.key_id].append(played.now_s)
            played.carry_out(batch)
        if played.now_s == 5.0:
            assert len(played.changed) == 32
        played.now_s += 0.5
    for times in tries.values():
        waits = [later - sooner for sooner, later in pairwise(times)]
        for at, wait in enumerate(waits):
            least = min(WAIT_MAX_S, WAIT_S * 2**at)
            assert least <= wait <= least + 3 * WAIT_S
    assert ("plan: broken", 32) in played.migration.progress().stuck
    played.broken = set()
    played.run(WAIT_MAX_S + 10.0)
    assert set(played.changed.values()) == {1}
    assert not played.waits


def test_many_that_fail_do_not_hide_those_behind_them(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are looked at for one batch, in one crowd, in front."""
    played = Played(world.cluster, replace(FAST, keys_per_s=5000.0, batch=64, under_way=4))
    monkeypatch.setattr(migrate, "LOOKED_MAX", 100)
    monkeypatch.setattr(migrate, "PAGE", 16)
    played.add(400, group=3)
    played.broken = {key.place.key_id for key in played.keys.values() if key.number <= 320}
    played.targets = {3: world.cluster.group_holders(3)[3:6]}
    played.run(60.0, while_=lambda: len(played.changed) < 80)
    assert len(played.changed) == 80


def test_a_coordinator_that_fails_is_asked_last(played: Played) -> None:
    """Nobody knows what became of what it was asked; when that has waited, another holder of the keys is asked."""
    played.targets = {3: played.cluster.group_holders(3)[3:6]}
    played.step()
    played.now_s += 1.0
    first, *_ = played.step()
    played.migration.ended(first.number, [], "no reply")
    played.now_s += WAIT_S
    again, *_ = played.step()
    assert again.orders[0].key == first.orders[0].key
    assert again.coordinator != first.coordinator
    played.carry_out(again)
    assert played.changed[first.orders[0].key.key_id] == 1


def test_the_pace_is_kept_and_falls_while_the_service_suffers(world: Any) -> None:
    """No more keys than the budget lets; half of it with each look while requests take long, and back when not."""
    played = Played(world.cluster, FAST)
    played.add(600)
    played.targets = {group: world.cluster.group_holders(group)[3:6] for group in range(8)}
    played.run(3.0, 0.1)
    assert 250 <= sum(played.orders.values()) <= 300 + 2 * FAST.batch
    played.strain = 3.0
    for _ in range(12):
        played.migration.pace.strained(3.0)
    assert played.migration.pace.keys_per_s == PACE_MIN
    before = sum(played.orders.values())
    played.run(20.0, 0.1)
    slow = sum(played.orders.values()) - before
    assert 1 <= slow <= 20 + 2 * FAST.batch
    for _ in range(40):
        played.migration.pace.strained(1.0)
    assert played.migration.pace.keys_per_s == FAST.keys_per_s
    played.migration.pace.strained(1.8)
    assert played.migration.pace.keys_per_s == FAST.keys_per_s, "between the two it stays"


def test_switched_off_it_tells_what_waits_and_does_nothing(played: Played) -> None:
    played.migration = Migration(replace(FAST, enabled=False))
    played.targets = {3: played.cluster.group_holders(3)[3:6]}
    played.run(10.0)
    assert not played.orders
    assert played.waits == {Kind.PLAN: 8}


def test_obstacles_are_told(played: Played) -> None:
    """What can't be done is not ordered, and told with why."""
    nodes = tuple(played.cluster.nodes)

    def obstacle(threshold: int, *holders: str, repair_after_s: float = FAST.repair_after_s) -> Any:
        now = played.situation()
        change = change_of(Crowd(0, holders, threshold, len(holders)), now, now.lost(repair_after_s))
        return change and (change.kind, change.obstacle)

    played.die("node-0", "node-1")
    played.now_s = 100.0
    assert obstacle(3, *nodes) == (Kind.REPAIR, "4 nodes can hold a share, 6 are needed")
    assert obstacle(3, *nodes[:3]) == (Kind.REPAIR, "fewer than 3 holders are left")
    assert obstacle(2, *nodes[2:5]) is None
    played.die("node-2")
    played.up.add("node-1")
    assert obstacle(3, *nodes[:5]) == (Kind.REPAIR, "node-2 does not answer")
    played.up.add("node-2")
    played.draining = {"node-3", "node-4", "node-5"}
    assert obstacle(2, "node-3", "node-1") == (Kind.DRAIN, "")
    assert obstacle(2, "node-5", "node-1", "node-0", "node-2") == (
        Kind.REPAIR,
        "2 nodes can hold a share, 4 are needed",
    )
    # Where nobody of another site is left: node-1 and node-4 are of one.
    played.draining = {"node-3", "node-5"}
    told = obstacle(2, "node-1", "node-2", "node-0")
    assert told is not None
    assert told[1].startswith("1 failure domains could reconstruct it alone")
    assert Situation(0.0, played.cluster, {}).lost(0.0) == frozenset(), "all are silent: it is cut off"


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_course_of_events_endangers_a_key_or_stops_the_rest(world_of_nine: Any, seed: int) -> None:
    """Nodes die and come back, are drained, plans change, keys break and mend, batches are lost, the process restarts.

    Nothing is asked for that a holder refuses for good; no key is ordered twice at a time; the budget is kept; and once
    nothing happens any more, every key is where it is to be, in full.
    """
    chance = random.Random(seed)
    cluster = world_of_nine.cluster
    options = replace(FAST, refresh_every_s=chance.choice([0.0, 120.0]), under_way=chance.randint(1, 3))
    played = Played(cluster, options)
    for threshold, shares in ((2, 3), (2, 4), (3, 5), (1, 3), (3, 7)):
        played.add(chance.randint(0, 12), threshold=threshold, shares=shares, grows=chance.random() < 0.5)
    nodes = list(cluster.nodes)
    waiting: list[tuple[float, Batch]] = []
    for _ in range(120):
        event = chance.random()
        if event < 0.02 and len(played.up) > 7:
            played.die(chance.choice(sorted(played.up)))
        elif event < 0.04 and len(played.up) < len(nodes):
            played.up.add(chance.choice(sorted(set(nodes) - played.up)))
        elif event < 0.06:
            played.draining = set(chance.sample(nodes, chance.randint(0, 2)))
        elif event < 0.10:
            group = chance.randrange(8)
            played.targets = {**played.targets, group: tuple(cluster.group_holders(group)[: chance.randint(3, 7)])}
            if chance.random() < 0.5:
                played.targets[group] = tuple(chance.sample(nodes, chance.randint(3, 7)))
        elif event < 0.12 and played.keys:
            played.broken ^= {chance.choice(sorted(played.keys))}
        elif event < 0.14 and played.keys:
            key = played.keys[chance.choice(sorted(played.keys))]
            if len(key.there) > key.threshold + 1:
                key.there.discard(chance.choice(sorted(key.there)))
        elif event < 0.15:
            played.migration, waiting = Migration(options), []
        played.migration.pace.strained(chance.choice([0.8, 1.0, 1.7, 4.0]))
        busy = [order.key.key_id for batch in played.migration.under_way for order in batch.orders]
        new = played.step()
        ordered = [order.key.key_id for batch in new for order in batch.orders]
        assert len(set(ordered + busy)) == len(ordered) + len(busy)
        assert len(played.migration.under_way) <= options.under_way
        assert len(ordered) <= options.batch * options.under_way
        waiting += [(played.now_s + chance.uniform(0.0, 5.0), batch) for batch in new]
        for due_s, batch in list(waiting):
            if due_s <= played.now_s:
                waiting.remove((due_s, batch))
                if chance.random() < 0.1:
                    played.migration.ended(batch.number, [], "lost on the way")
                else:
                    played.carry_out(batch)
        played.now_s += 0.5
    for _, batch in waiting:
        played.carry_out(batch)
    played.up, played.draining, played.broken = set(nodes), set(), set()
    played.options = replace(options, refresh_every_s=0.0)
    played.run(4 * WAIT_MAX_S, 5.0, while_=lambda: bool(played.waits))
    assert not played.refused
    stuck = {reason for reason, _ in played.migration.progress().stuck}
    assert all(key.there == set(key.holders) for key in played.keys.values()), stuck
    for key in played.keys.values():
        change = change_of(key.place.crowd, played.situation(), frozenset())
        assert change is None or change.obstacle
