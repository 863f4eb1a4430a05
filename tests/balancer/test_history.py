"""The history: differences of counters per class and tick, from reports that may be lost, restarted or false."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from balancer.history import CLASSES, WINDOW_REQUESTS, History
from balancer.rings import PAIRS_MAX
from engine.protocol.requests import PAIRS_TOLD, ClassCount, NodeStats

SIGN, ENCRYPT = "sign/ed25519", "encrypt/aes-256-gcm"
BOOT, REBOOT = b"a" * 16, b"b" * 16


def report(boot: bytes = BOOT, *, uptime_ms: int = 10**9, queue: int = 0, **counts: tuple[int, int]) -> NodeStats:
    """Counters ``sign=(requests, busy_us)`` and ``encrypt=...``."""
    names = {"sign": SIGN, "encrypt": ENCRYPT, "new": "sign/of-tomorrow"}
    classes = [ClassCount(names[name], requests, 0, busy_us) for name, (requests, busy_us) in counts.items()]
    return NodeStats(boot, uptime_ms, queue, classes, [], [], 1, 0, [], 0)


def make(nodes: tuple[str, ...] = ("a", "b"), ticks: int = 10) -> History:
    return History(nodes, tick_ms=1000, ticks=ticks)


def series(history: History, label: str = SIGN) -> list[float]:
    snapshot = history.snapshot()
    return [float(value) for value in snapshot.counts[:, snapshot.classes.index(label)]]


def test_an_empty_history() -> None:
    """Nothing observed: no ticks, no classes, no node up."""
    snapshot = make().snapshot()
    assert (snapshot.counts.shape, snapshot.classes, snapshot.up) == ((0, 0), (), (False, False))


def test_counters_become_differences() -> None:
    """The first report of a node is the base line; then differences are summed over the nodes."""
    history = make()
    history.observe(0, {"a": report(sign=(100, 5000)), "b": report(sign=(7, 70))})
    history.observe(1, {"a": report(sign=(110, 6000)), "b": report(sign=(10, 100))})
    history.observe(2, {"a": report(sign=(110, 6000)), "b": report(sign=(15, 150), encrypt=(4, 40))})
    assert series(history) == pytest.approx([np.nan, 13, 5], nan_ok=True)
    assert series(history, ENCRYPT)[1:] == [0, 4]
    snapshot = history.snapshot()
    row = snapshot.classes.index(SIGN)
    assert snapshot.requests[row].tolist() == [10, 8]
    assert snapshot.busy_us[row].tolist() == [1000, 80]


def test_the_networks_time_is_told_once_it_changed_much() -> None:
    """A quarter and 100 us at least; what nobody knows now is as it was; what can't be is cut; nodes come and go."""
    history = make()

    def told(tick: int, **network_us: int) -> list[float]:
        history.observe(tick, {node: replace(report(), network_us=us) for node, us in network_us.items()})
        return history.snapshot().network_us.tolist()

    assert told(0, a=20, b=0) == [20.0, 0.0]
    assert told(1, a=110, b=2_000) == [20.0, 2_000.0]
    assert told(2, a=130, b=2_400) == [130.0, 2_000.0]
    assert told(3, a=0, b=2_600) == [130.0, 2_600.0]
    assert told(4, a=10**15) == [1e6, 2_600.0]
    history.follow(("b", "c"))
    assert history.snapshot().network_us.tolist() == [2_600.0, 0.0]


def test_a_restarted_node_counts_from_zero() -> None:
    """A new boot id means that all of its counts are new."""
    history = make(("a",))
    history.observe(0, {"a": report(sign=(100, 1))})
    history.observe(1, {"a": report(REBOOT, uptime_ms=500, sign=(5, 1))})
    assert series(history) == pytest.approx([np.nan, 5], nan_ok=True)


def test_lost_reports_are_spread_over_the_gap() -> None:
    """What was counted while a node was not heard is spread over those ticks; one lost report is no death."""
    history = make(("a",))
    history.observe(0, {"a": report(sign=(0, 0))})
    history.observe(1, {})
    assert history.snapshot().up == (True,)
    history.observe(2, {})
    assert history.snapshot().up == (False,)
    history.observe(3, {"a": report(sign=(30, 0))})
    assert series(history) == pytest.approx([np.nan, 10, 10, 10], nan_ok=True)
    assert history.snapshot().up == (True,)


def test_a_tick_without_any_report_is_unknown() -> None:
    """Silence of every node is NaN, not 0; so are ticks that the clock left out."""
    history = make(("a",))
    history.observe(0, {"a": report(sign=(1, 1))})
    history.observe(1, {"a": report(sign=(1, 1))})
    history.observe(4, {})
    assert np.isnan(series(history)).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize(
    "false",
    [
        report(sign=(5, 20)),
        report(sign=(20, 5)),
        report(sign=(10**12, 20)),
        report(sign=(20, 10**13)),
        NodeStats(BOOT, 0, 0, [ClassCount(SIGN, 20, 0, 20), ClassCount(SIGN, 30, 0, 30)], [], [], 1, 0, [], 0),
    ],
    ids=["requests fell", "busy fell", "exploding", "too busy", "twice"],
)
def test_false_reports_are_dropped(false: NodeStats) -> None:
    """A report that can't be true changes nothing, and the next one is a new base line."""
    history = make(("a",))
    history.observe(0, {"a": report(sign=(10, 10))})
    assert history.observe(1, {"a": false}) == ("a",)
    assert history.observe(2, {"a": report(sign=(500, 500))}) == ()
    assert history.observe(3, {"a": report(sign=(503, 503))}) == ()
    assert np.nan_to_num(series(history)).tolist() == [0, 0, 0, 3]


def test_unknown_classes_and_nodes_are_passed_over() -> None:
    """A newer node's class and a stranger's report make no row."""
    history = make(("a",))
    history.observe(0, {"a": report(new=(0, 0)), "stranger": report(sign=(1, 1))})
    history.observe(1, {"a": report(new=(9, 9)), "stranger": report(sign=(9, 9))})
    assert history.snapshot().classes == ()


def test_ticks_must_grow() -> None:
    """The same tick twice is a mistake of the caller."""
    history = make()
    history.observe(4, {})
    with pytest.raises(ValueError, match="tick 4 does not follow tick 4"):
        history.observe(4, {})


def test_the_ring_is_bounded_and_snapshots_stand_alone() -> None:
    """Old ticks fall out; a snapshot does not change and can't be changed."""
    history = make(("a",), ticks=3)
    for tick in range(10):
        history.observe(tick, {"a": report(sign=(tick * tick, 0))})
    before = history.snapshot()
    history.observe(10, {"a": report(sign=(100, 0))})
    assert before.counts[:, 0].tolist() == [13, 15, 17]
    with pytest.raises(ValueError, match="read-only"):
        before.counts[0, 0] = 1
    history.observe(10_000, {})
    assert np.isnan(history.snapshot().counts).all()


def test_service_times_follow_the_newest_requests() -> None:
    """The window forgets by requests: after a slow past, the newest requests count."""
    history = make(("a",))
    requests = busy = 0
    history.observe(0, {"a": report(sign=(0, 0))})
    for tick in range(1, 41):
        requests += WINDOW_REQUESTS // 2
        busy += WINDOW_REQUESTS // 2 * (1000 if tick <= 10 else 100)
        history.observe(tick, {"a": report(sign=(requests, busy))})
    snapshot = history.snapshot()
    assert snapshot.requests[0, 0] == pytest.approx(WINDOW_REQUESTS)
    assert snapshot.busy_us[0, 0] / snapshot.requests[0, 0] == pytest.approx(100, rel=0.01)


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"a": st.integers(0, 50), "b": st.one_of(st.integers(0, 50), st.just("restart"))}
        ),
        max_size=30,
    )
)
@settings(deadline=None)
def test_no_request_is_lost_or_invented(steps: list[dict[str, int | str]]) -> None:
    """Whatever reports are lost, the ring's sum is what the nodes counted between their first and last report."""
    history = make(ticks=50)
    total, expected, boots = {"a": 0, "b": 0}, 0.0, {"a": 0, "b": 0}
    heard: set[str] = set()
    for tick, step in enumerate(steps):
        reports = {}
        for node, more in step.items():
            if more == "restart":
                boots[node] += 1
                total[node] = 0
                continue
            total[node] += int(more)
            expected += int(more) if node in heard else 0
            heard.add(node)
            reports[node] = report(bytes([boots[node]]) * 16, uptime_ms=10**6, sign=(total[node], total[node]))
        history.observe(tick, reports)
    counts = history.snapshot().counts
    assert float(np.nan_to_num(counts).sum()) == pytest.approx(expected)


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from("abc"),
            st.tuples(st.booleans(), st.integers(-20, 50), st.lists(st.integers(0, 4), max_size=3)),
        ),
        max_size=8,
    )
)
@settings(deadline=None, max_examples=40)
def test_nodes_together_are_as_each_alone(steps: list[dict[str, tuple[bool, int, list[int]]]]) -> None:
    """What one history makes of all nodes' reports, true and false, is the sum of what one for each makes of its."""
    together, *each = (History(nodes, tick_ms=60_000, ticks=10) for nodes in ("abc", "a", "b", "c"))
    alone = dict(zip("abc", each, strict=True))
    counters = dict.fromkeys("abc", 100)
    for tick, heard in enumerate(steps):
        reports = {}
        for name, (restarts, more, groups) in heard.items():
            counters[name] = max(0, counters[name] + more)
            told = report(REBOOT if restarts else BOOT, uptime_ms=180_000, sign=(counters[name], 10))
            reports[name] = replace(told, pairs=[(0, group, counters[name] // 3) for group in groups])
        dropped = together.observe(tick, reports)
        expected = [
            name for name in "abc" if alone[name].observe(tick, {k: v for k, v in reports.items() if k == name})
        ]
        assert list(dropped) == expected
    told, parts = together.snapshot(), [history.snapshot() for history in alone.values()]
    sums = [np.nansum(part.counts, axis=0) for part in parts if part.classes]
    assert np.nansum(told.counts) == pytest.approx(np.sum(sums))
    pairs: dict[tuple[int, int], float] = {}
    for part in parts:
        for pair, count in zip(part.pairs, np.nansum(part.pair_counts, axis=0), strict=True):
            pairs[pair] = pairs.get(pair, 0.0) + count
    assert dict(zip(told.pairs, np.nansum(told.pair_counts, axis=0), strict=True)) == pytest.approx(pairs)
    assert told.requests.sum() == pytest.approx(sum(part.requests.sum() for part in parts))


def test_the_classes_are_the_algorithms_own() -> None:
    """Every (type, algorithm) that can be counted has a row of its own."""
    assert len(set(CLASSES)) == len(CLASSES)
    assert {SIGN, ENCRYPT, "generate/rsa-4096-pss-sha256"} <= set(CLASSES)
    assert "encrypt/ed25519" not in CLASSES


def told(
    counts: dict[tuple[str, int], int], *, boot: bytes = BOOT, hot: tuple[tuple[str, str, int], ...] = ()
) -> NodeStats:
    """A report of these (class, group) counters; a class counts the sum of its groups."""
    names = sorted({name for name, _ in counts})
    classes = [ClassCount(name, sum(n for (c, _), n in counts.items() if c == name), 0, 0) for name in names]
    pairs = [(names.index(name), group, count) for (name, group), count in counts.items()]
    keys = [(key, names.index(name), count) for key, name, count in hot]
    return NodeStats(boot, 10**9, 0, classes, pairs, [], 1, 10_000 if hot else 0, keys, 0)


def pair_series(history: History) -> dict[tuple[str, int], list[float]]:
    snapshot = history.snapshot()
    return {
        (snapshot.classes[index], group): snapshot.pair_counts[:, column].tolist()
        for column, (index, group) in enumerate(snapshot.pairs)
    }


def test_pairs_are_counted_beside_their_class() -> None:
    """Differences by class and group, summed over the nodes; a pair that is told for the first time had counted 0."""
    history = make()
    history.observe(0, {"a": told({(SIGN, 3): 10}), "b": told({(SIGN, 3): 1})})
    history.observe(1, {"a": told({(SIGN, 3): 14, (ENCRYPT, 3): 2}), "b": told({(SIGN, 3): 2, (SIGN, 9): 5})})
    assert np.isnan([told[0] for told in pair_series(history).values()]).all()
    assert {pair: told[1:] for pair, told in pair_series(history).items()} == {
        (SIGN, 3): [5],
        (SIGN, 9): [5],
        (ENCRYPT, 3): [2],
    }
    assert series(history)[1:] == [10]


@pytest.mark.parametrize(
    "pairs",
    [[(1, 3, 5)], [(0, 3, 5), (0, 3, 6)], [(0, 3, 500)], [(0, 70_000, 5)]],
    ids=["class", "twice", "more", "group"],
)
def test_false_pairs_drop_the_report(pairs: list[tuple[int, int, int]]) -> None:
    """A class that is not told, a pair twice, more than the class counted, a group of no cluster."""
    history = make(("a",))
    history.observe(0, {"a": told({(SIGN, 3): 4})})
    false = NodeStats(BOOT, 10**9, 0, [ClassCount(SIGN, 10, 0, 0)], pairs, [], 1, 0, [], 0)
    assert history.observe(1, {"a": false}) == ("a",)


def test_pairs_of_a_full_report_begin_when_they_are_told() -> None:
    """Where not all pairs were told, nobody knows when one that comes was counted."""
    history = make(("a",))
    full = {(SIGN, group): 10 for group in range(PAIRS_TOLD)}
    history.observe(0, {"a": told(full)})
    history.observe(1, {"a": told(full | {(SIGN, 0): 12})})
    later = {key: count for key, count in full.items() if key[1]} | {(SIGN, 5000): 700}
    history.observe(2, {"a": told(later | {(SIGN, 1): 11})})
    assert (SIGN, 5000) not in pair_series(history)
    history.observe(3, {"a": told(later | {(SIGN, 5000): 703, (SIGN, 1): 11})})
    assert pair_series(history)[SIGN, 5000][1:] == [0, 0, 3]


def test_the_warmest_pairs_have_the_places() -> None:
    """With more pairs than places the cold ones are in their class alone; one that gets hot takes a place at once."""
    history = make(("a",), ticks=20)
    counts = {(SIGN, group): 0 for group in range(PAIRS_MAX + 100)}
    for tick in range(10):
        history.observe(tick, {"a": told(counts)})
        for group in range(PAIRS_MAX + 100):
            counts[SIGN, group] += 2 if group < PAIRS_MAX - 1 else 1
    assert len(history.snapshot().pairs) == PAIRS_MAX
    counts[SIGN, PAIRS_MAX + 50] += 500
    history.observe(10, {"a": told(counts)})
    found = pair_series(history)
    assert len(found) == PAIRS_MAX
    assert found[SIGN, PAIRS_MAX + 50][-1] == 501
    assert series(history)[-1] == sum(values[-1] for values in found.values()) + 101 - len(
        [1 for _, group in found if group >= PAIRS_MAX - 1]
    )


def test_minutes_are_sums_of_ticks() -> None:
    """A minute that was not seen from its beginning, or not at all, is unknown."""
    history = make(("a",), ticks=400)
    for tick in range(30, 400):
        if not 240 <= tick < 300:
            history.observe(tick, {"a": told({(SIGN, 1): 7 * tick})})
    slow = history.snapshot().slow
    assert slow is not None
    assert (slow.step_ms, slow.step) == (60_000, 5)
    assert slow.counts[:, 0].tolist()[2:5] == [420, 420, 420]
    assert slow.counts[-1, 0] == 7 * 120  # of two minutes: when in them they came is not known
    assert np.isnan(slow.counts[-2, 0])
    assert slow.pair_counts[2:5, 0].tolist() == [420, 420, 420]
    assert history.snapshot().slow is slow


def test_hot_keys_add_up_over_the_nodes() -> None:
    """Rates per second of the last window, of nodes that are up."""
    history = make()
    history.observe(
        0,
        {
            "a": told({(SIGN, 3): 900}, hot=(("orders", SIGN, 600), ("tls", SIGN, 200))),
            "b": told({(SIGN, 3): 500}, hot=(("orders", SIGN, 400),)),
        },
    )
    hot = history.snapshot().hot
    assert [(key.name, key.request_class, key.requests_per_s) for key in hot] == [
        ("orders", SIGN, 100.0),
        ("tls", SIGN, 20.0),
    ]
    history.observe(5, {"a": told({(SIGN, 3): 900})})
    assert history.snapshot().hot == ()


@given(
    st.lists(
        st.dictionaries(st.integers(0, 40), st.integers(1, 30), max_size=12),
        max_size=25,
    )
)
@settings(deadline=None, max_examples=40)
def test_pairs_never_count_more_than_their_class(steps: list[dict[int, int]]) -> None:
    """With room for all pairs, they add up to the class in every tick."""
    history = make(("a",), ticks=50)
    counts = {(SIGN, 0): 1}
    for tick, step in enumerate(steps):
        for group, more in step.items():
            counts[SIGN, group] = counts.get((SIGN, group), 0) + more
        history.observe(tick, {"a": told(counts)})
    if steps:
        snapshot = history.snapshot()
        heard = ~np.isnan(snapshot.counts[:, 0])
        assert snapshot.pair_counts[heard].sum(axis=1) == pytest.approx(snapshot.counts[heard, 0])
