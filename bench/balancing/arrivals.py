"""The requests of a scenario and a seed, all drawn before anything is decided: every policy gets the same ones."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from balancing.scenarios import CLASSES, TEST_PART, Scenario, Site, capacity_of, expected_s, trace_counts
from engine.protocol.manifest import Cluster, Member, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.signed import SigningKey

__all__ = ["Arrivals", "cluster_of", "draw"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

WARM = 24


@dataclass(frozen=True, slots=True)
class Arrivals:
    """Everything that chance decides: per request its time (seconds, ascending), client, class, key and what it needs
    beside the mean time of service; per key its name and group; and what the balancer has counted before the start.
    """

    time_s: FloatArray
    client: IntArray
    kind: IntArray
    key: IntArray
    noise: FloatArray
    classes: tuple[str, ...]
    names: tuple[str, ...]
    group: IntArray
    past: IntArray
    """Requests per tick before the start (ticks, classes)."""
    warm: tuple[int, ...]
    """The placement groups that got most, or are to be hot: those whose past the balancer knows by class."""
    past_warm: IntArray
    """The part of ``past`` that was for these (ticks, classes, groups)."""
    service_s: FloatArray
    """Mean times of service (classes, nodes) in seconds."""
    hot_groups: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.time_s)


def cluster_of(site: Site) -> Cluster:
    """The site as a verified cluster manifest; its keys come from names, so that a seed alone decides what happens."""

    def signing(name: str) -> SigningKey:
        return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))

    members = [Member("op", "operator", signing("op").public, bytes(32), "", "", "")]
    for node in site.nodes:
        curve = hashlib.sha256(b"curve " + node.name.encode()).digest()
        place = f"{node.zone}/rack/{node.name}"
        members.append(Member(node.name, "node", signing(node.name).public, curve, "tcp://127.0.0.1:1", "", place))
    chain = issue_cluster_manifest(
        name="simulated", members=members, rules=[], operators=[signing("op")], groups=site.groups
    )
    return open_chain(chain, chain_pin(chain))


def draw(scenario: Scenario, cluster: Cluster, seed: int) -> Arrivals:
    """The requests of a seed."""
    random = np.random.default_rng([seed, 20])
    traffic = scenario.traffic
    kinds, counts = trace_counts(traffic.trace)
    classes = tuple(CLASSES[kind] for kind in kinds)
    service_s = expected_s(scenario.site, traffic, classes)
    workers = np.array([float(node.workers) for node in scenario.site.nodes])
    mix = counts.mean(axis=0)
    scale = traffic.load * capacity_of(service_s, mix, workers) / mix.sum()
    bins = round(scenario.tick_s)
    past_ticks = scenario.past_s // bins
    split = int(len(counts) * TEST_PART)
    first, last = (min(scenario.past_s, split), split) if scenario.validation else (split, len(counts))
    spare = last - first - scenario.seconds
    begin = first + int(random.integers(0, max(1, spare)))
    played = counts[np.arange(begin, begin + scenario.seconds) % len(counts)]
    before = counts[np.arange(begin - past_ticks * bins, begin) % len(counts)]
    if traffic.constant:
        played, before = np.broadcast_to(mix, played.shape), np.broadcast_to(mix, before.shape)
    before = before.reshape(past_ticks, bins, -1).sum(axis=1)
    number = random.poisson(played * scale)
    kind = np.concatenate([np.repeat(np.arange(len(kinds)), row) for row in number])
    time_s = np.repeat(np.arange(scenario.seconds, dtype=float), number.sum(axis=1)) + random.random(len(kind))
    order = np.argsort(time_s, kind="stable")
    time_s, kind = time_s[order], kind[order]
    names = tuple(f"key-{seed}-{at}" for at in range(traffic.keys))
    group = np.array([cluster.group_of(name) for name in names])
    popularity = np.arange(1, traffic.keys + 1, dtype=float) ** -traffic.zipf
    popularity /= popularity.sum()
    key = random.choice(traffic.keys, size=len(time_s), p=popularity)
    by_group = np.bincount(group, weights=popularity, minlength=cluster.groups)
    hot_groups: list[int] = []
    for hot in scenario.hot:
        chosen = _hot_group(scenario, cluster, by_group, hot_groups, hot.rank)
        hot_groups.append(chosen)
        members = np.flatnonzero(group == chosen)
        weights = popularity[members] / popularity[members].sum()
        moved = random.random(len(time_s)) < hot.at(time_s)
        key[moved] = random.choice(members, size=int(moved.sum()), p=weights)
    past = random.poisson(before * scale)
    warm = tuple(dict.fromkeys([*hot_groups, *np.argsort(-by_group, kind="stable")[:WARM].tolist()]))
    past_warm = np.zeros((past_ticks, len(kinds), len(warm)), dtype=np.int64)
    if scenario.hot:
        for tick in range(past_ticks):
            shares = by_group[list(warm)]
            for at, hot in enumerate(scenario.hot):
                share = float(hot.at(np.array((tick - past_ticks + 0.5) * scenario.tick_s)))
                shares = shares * (1 - share)
                shares[at] += share
            past_warm[tick] = random.multinomial(past[tick], [*shares, max(0.0, 1 - shares.sum())])[:, :-1]
    shape = 1 / traffic.variation**2 if traffic.variation else 0.0
    noise = random.gamma(shape, 1 / shape, len(time_s)) if shape else np.ones(len(time_s))
    client = random.integers(0, len(scenario.crowd.zones), len(time_s))
    return Arrivals(
        time_s, client, kind, key, noise, classes, names, group, past, warm, past_warm, service_s, tuple(hot_groups)
    )


def _hot_group(scenario: Scenario, cluster: Cluster, by_group: FloatArray, taken: list[int], rank: int) -> int:
    """The group of that rank by how little its holders can do together, among those of middling popularity."""
    site = scenario.site
    speed = {node.name: node.speed * node.workers for node in site.nodes}
    middling = np.argsort(-by_group, kind="stable")[site.groups // 8 : site.groups // 2].tolist()

    def ability(at: int) -> tuple[float, int]:
        return sum(speed[name] for name in cluster.group_holders(at)[: site.shares]), at

    return sorted((at for at in middling if at not in taken), key=ability)[rank]
