"""The simulator itself: against queueing theory, what it must keep, and that a seed is the same course for ever."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from balancing.arrivals import Arrivals, cluster_of, draw
from balancing.control import Loop
from balancing.events import Outcome, Simulation
from balancing.plays import APART, PLAYS, REL, shift, steady
from balancing.policies import POLICIES, Own
from balancing.report import Target, row
from balancing.scenarios import Crowd, Death, Flush, Hot, NodeSpec, Scenario, Site, Traffic

from engine.protocol._nodestate import SNAPSHOT_MAX_AGE_S

REQUESTS = 60_000


def queue(workers: int, load: float, shape: str, seed: int) -> float:
    """Mean time in a queue of one node, in times of service, with Poisson arrivals; the network takes none."""
    site = Site((NodeSpec("n0", "a", workers=workers),), near_s=0.0, far_s=0.0, groups=1, threshold=1, shares=1)
    traffic = Traffic(keys=1, token_factor=25.0, constant=True, variation=0.0)
    scenario = Scenario("queue", site, Crowd(("a",)), traffic, 1, warmup_s=0.0, past_s=1)
    cluster = cluster_of(site)
    random = np.random.default_rng(seed)
    drawn = draw(scenario, cluster, seed)
    mean_s = float(drawn.service_s[1, 0])
    times = np.cumsum(random.exponential(mean_s / (load * workers), REQUESTS))
    noise = random.exponential(1.0, REQUESTS) if shape == "M" else np.ones(REQUESTS)
    zeros = np.zeros(REQUESTS, dtype=np.int64)
    arrivals: Arrivals = replace(drawn, time_s=times, client=zeros, kind=zeros + 1, key=zeros, noise=noise)
    scenario = replace(scenario, seconds=math.ceil(times[-1]))
    simulation = Simulation(scenario, seed, arrivals, cluster)
    outcome = simulation.run(POLICIES["random"](simulation))
    assert (outcome.served == 1).all()
    return float(outcome.latency_s.mean() / mean_s)


def erlang_c(workers: int, load: float) -> float:
    """The chance to wait in M/M/c (Kleinrock 1975, 3.5)."""
    offered = workers * load
    last = offered**workers / math.factorial(workers) / (1 - load)
    return last / (sum(offered**k / math.factorial(k) for k in range(workers)) + last)


@pytest.mark.parametrize(
    ("workers", "load", "shape", "theory"),
    [
        (1, 0.6, "M", 1 / (1 - 0.6)),
        (1, 0.6, "D", 1 + 0.6 / (2 * (1 - 0.6))),
        (4, 0.8, "M", 1 + erlang_c(4, 0.8) / (4 * (1 - 0.8))),
    ],
)
def test_a_queue_is_as_long_as_theory_says(workers: int, load: float, shape: str, theory: float) -> None:
    assert queue(workers, load, shape, 5) == pytest.approx(theory, rel=0.05)


def small(seconds: int = 2) -> Scenario:
    """The site of unequal nodes with little load, from an early part of the trace."""
    return replace(
        steady("rel", seconds),
        validation=True,
        traffic=Traffic(load=0.5, token_factor=80.0, keys=512),
        warmup_s=0.0,
        past_s=30,
    )


def played(scenario: Scenario, policy: str, seed: int = 3, moves: str = "") -> tuple[Outcome, Simulation]:
    simulation = Simulation(scenario, seed)
    balancer = Loop(simulation, moves) if policy.startswith(("own", "LP")) else None
    return simulation.run(POLICIES[policy](simulation), balancer), simulation


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_is_served_once_by_a_holder_of_its_key(policy: str) -> None:
    outcome, simulation = played(small(1), policy)
    assert len(outcome.arrivals) > 100
    assert (outcome.served == 1).all()
    assert (outcome.attempts == 1).all()
    assert np.isfinite(outcome.latency_s).all()
    for group, node in zip(outcome.arrivals.group[outcome.arrivals.key], outcome.node, strict=True):
        assert node in simulation.holders[group]
    counted = Counter(outcome.node.tolist())
    assert [sum(node.requests) for node in simulation.nodes] == [counted[at] for at in range(8)]
    assert all(node.pending == node.busy == 0 and not node.queue for node in simulation.nodes)
    assert all(abs(node.work_s) < 1e-9 for node in simulation.nodes)


@pytest.mark.parametrize("policy", ["own", "two choices, own", "least completion, perfect"])
def test_nothing_is_lost_when_a_node_dies_and_comes_back(policy: str) -> None:
    dying = replace(small(3), deaths=(Death(0, 0.5, 2.0),), flushes=(Flush(1.5),))
    outcome, simulation = played(dying, policy)
    assert np.isfinite(outcome.latency_s).all()
    again = outcome.attempts > 1
    assert again.any()
    assert (outcome.served[~again] == 1).all()  # one that was asked again may have been served by the node that died
    assert (outcome.served >= 1).all()
    times = outcome.arrivals.time_s
    down = (times > 0.5 + dying.detection_s) & (times < 2.0)
    assert 0 not in outcome.node[down & ~again]
    assert simulation.nodes[0].alive
    assert 0 in outcome.node[times > 2.5] or policy == "own"  # which may wait up to a second with its first try


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others() -> None:
    first, again, other = (played(small(1), "own", seed)[0] for seed in (3, 3, 4))
    assert first.latency_s.tobytes() == again.latency_s.tobytes()
    assert first.node.tobytes() == again.node.tobytes()
    assert first.tables == again.tables
    assert first.latency_s.tobytes() != other.latency_s.tobytes()


def test_all_policies_get_the_same_requests() -> None:
    one, two = (played(small(1), policy)[0].arrivals for policy in ("random", "own"))
    for name in ("time_s", "client", "kind", "key", "noise"):
        assert getattr(one, name).tobytes() == getattr(two, name).tobytes()


@pytest.mark.parametrize("publishes", [True, False])
def test_clients_know_the_queues_of_nodes_that_they_ask_nothing(publishes: bool) -> None:
    """As long as these live, and by publications alone."""
    scenario = replace(small(2), publishes=publishes, deaths=(Death(0, 1.0),))
    simulation = Simulation(scenario, 3)
    policy = Own(simulation)
    simulation.run(policy, Loop(simulation))
    oldest = [min(router._state(f"n{at}").seen_s for router in policy.routers) for at in range(8)]
    assert oldest[0] < 1.1
    assert (min(oldest[1:]) > 2.0 - SNAPSHOT_MAX_AGE_S) == publishes


def test_a_cold_key_is_gathered_once_for_all_who_wait() -> None:
    cold = replace(small(1), site=replace(REL, warm=False))
    outcome, simulation = played(cold, "random")
    warm, _ = played(small(1), "random")
    assert outcome.latency_s.mean() > warm.latency_s.mean() + 0.0005
    assert not any(node.gathering for node in simulation.nodes)


def test_the_hot_group_is_hot_when_it_is_said_to_be_and_moved_before() -> None:
    told = replace(
        shift(17),
        site=replace(APART, groups=128),
        hot=(Hot(0, 0.7, 11.0, 10.0, 60.0, 2.0),),
        traffic=Traffic(load=0.5, constant=True, token_factor=200.0),
        past_s=200,
        validation=True,
    )
    outcome, simulation = played(told, "own", moves="predictive")
    arrivals, (hot,) = outcome.arrivals, outcome.arrivals.hot_groups
    within = arrivals.group[arrivals.key] == hot
    part = [within[(arrivals.time_s >= at) & (arrivals.time_s < at + 4)].mean() for at in (4, 13)]
    assert part[0] < 0.05 < 0.6 < part[1] < 0.8
    moves = [at_s for at_s, group, _ in outcome.moves if group == hot]
    assert moves
    assert min(moves) <= 12.0
    assert np.isfinite(outcome.latency_s).all()
    assert all(len(set(holders)) == len(holders) >= 3 for holders in simulation.holders)


def test_a_hot_groups_share_rises_and_falls() -> None:
    hot = Hot(0, 0.4, 10.0, 6.0, 60.0, 2.0)
    at = np.array([9.9, 11.0, 12.0, 18.0, 19.0, 20.1, -50.0 + 2.5, 72.5])
    assert hot.at(at) == pytest.approx([0.0, 0.2, 0.4, 0.4, 0.2, 0.0, 0.4, 0.4])


def test_a_row_judges_its_ratio_and_the_worst_seed() -> None:
    median = row("x", [1.0, 2.0, 9.0], "ms", "peer", [2.0, 2.0, 3.0], Target(1.0, 0.5))
    assert (median.ratio, median.met, median.stretch_met) == (1.0, True, False)
    worst = row("x", [1.0, 2.0, 9.0], "ms", "peer", [2.0, 2.0, 3.0], Target(1.0), worst=True)
    assert (worst.ratio, worst.met, worst.stretch_met) == (3.0, False, None)
    assert row("x", [0.2, 0.3, 0.4], "s", target=Target(0.35)).met


def test_every_play_is_a_scenario_of_its_own() -> None:
    assert len({play().name for play in PLAYS.values()}) == len(PLAYS)
