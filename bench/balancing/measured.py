"""A small site as it was measured on a real cluster, and what is played on both: it runs neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from balancing.arrivals import Arrivals
from balancing.scenarios import Crowd, NodeSpec, Scenario, Site, Traffic
from engine.protocol.manifest import Cluster

__all__ = ["CLASS", "Measured", "poisson", "site_of", "spaced", "staged"]

CLASS: Final = "verify/rsa-2048-pkcs1-sha256"
"""What is asked for: it is made by a worker thread of the node one after the other, and costs little CPU time."""
ZONE: Final = "here"
PAST_TICKS: Final = 10
PAST_REQUESTS: Final = 20
"""What the balancer has seen before, which is the measuring of the site: ticks, and requests in each."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """Mean service by node in seconds, single ones over their mean, and what a request takes beside: its way, and more
    where the key has to be loaded.
    """

    service_s: Mapping[str, float]
    noise: tuple[float, ...]
    way_s: float = 0.0
    cold_s: float = 0.0


def site_of(cluster: Cluster, nodes: Sequence[str], measured: Measured) -> Site:
    """The site as measured: every node holds all keys, and has them loaded."""
    return Site(
        tuple(NodeSpec(node, ZONE) for node in nodes),
        near_s=measured.way_s / 2,
        groups=cluster.groups,
        threshold=len(nodes) // 2 + 1,
        shares=len(nodes),
        # With the way to the other holders and back it is the whole charge.
        release_s=max(0.0, measured.cold_s - measured.way_s),
        load_s=0.0,
    )


def staged(name: str, site: Site, clients: int, seconds: int, warmup_s: float) -> Scenario:
    """A scenario there, in which nothing happens yet."""
    return Scenario(name, site, Crowd((ZONE,) * clients), Traffic(), seconds, warmup_s=warmup_s, past_s=PAST_TICKS)


def poisson(
    scenario: Scenario, cluster: Cluster, keys: Sequence[str], measured: Measured, rate: float, seed: int
) -> Arrivals:
    """Poisson arrivals at ``rate`` a second, over all keys alike."""
    random = np.random.default_rng([seed, 8])
    count = random.poisson(rate * scenario.seconds)
    return _over_keys(scenario, cluster, keys, measured, np.sort(random.random(count)) * scenario.seconds, random)


def spaced(scenario: Scenario, cluster: Cluster, keys: Sequence[str], measured: Measured, every_s: float) -> Arrivals:
    """One request after another at an even pace, all of one client: by round robin each node has time for its own."""
    random = np.random.default_rng(9)
    made = _over_keys(scenario, cluster, keys, measured, np.arange(every_s, scenario.seconds, every_s), random)
    return replace(made, client=np.zeros_like(made.client))


def _over_keys(
    scenario: Scenario,
    cluster: Cluster,
    keys: Sequence[str],
    measured: Measured,
    time_s: FloatArray,
    random: np.random.Generator,
) -> Arrivals:
    count = len(time_s)
    return Arrivals(
        time_s=time_s,
        client=random.integers(0, len(scenario.crowd.zones), count),
        kind=np.zeros(count, dtype=np.int64),
        key=random.integers(0, len(keys), count),
        noise=random.choice(np.array(measured.noise), count),
        classes=(CLASS,),
        names=tuple(keys),
        group=np.array([cluster.group_of(name) for name in keys]),
        past=np.full((PAST_TICKS, 1), PAST_REQUESTS, dtype=np.int64),
        warm=(),
        past_warm=np.zeros((PAST_TICKS, 1, 0), dtype=np.int64),
        service_s=np.array([[measured.service_s[node.name] for node in scenario.site.nodes]]),
        hot_groups=(),
    )
