"""What is played, as data: nodes, zones, classes, load, failures and moves. It simulates nothing and knows no policy.

A scenario says nothing of how it is carried out, so that the same one can be replayed on a real cluster.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

from engine.keys import ALGORITHMS

__all__ = [
    "TEST_PART",
    "Crowd",
    "Death",
    "Flush",
    "Hot",
    "NodeSpec",
    "Scenario",
    "Site",
    "Traffic",
    "capacity_of",
    "expected_s",
    "trace_counts",
]

FloatArray = NDArray[np.float64]

TRACES: Final = Path(os.environ.get("KEYQUORUM_TRACES") or Path(__file__).parents[1] / "traces")
TEST_PART: Final = 0.7
"""Models and constants were chosen on the part of a trace before this; what is told is played from behind it."""
CLASSES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "small": "sign/ecdsa-p256-sha256",
        "mid": "sign/ed25519",
        "large": "sign/ecdsa-p384-sha384",
        "image": "sign/rsa-2048-pss-sha256",
        "reason": "decrypt/rsa-2048-oaep-sha256",
    }
)
"""The types of the trace ``servegen_synth_1s``, and the request classes that they stand for."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node: its failure domain, how many times as fast as the reference token, and for some classes more than that.

    ``workers`` operations run at a time; one is what a token does (``balancer.plan.CAPACITY``).
    """

    name: str
    zone: str
    speed: float = 1.0
    faster: Mapping[str, float] = field(default_factory=dict)
    workers: int = 1


@dataclass(frozen=True, slots=True)
class Site:
    """The cluster, and the way between its zones in seconds (one way)."""

    nodes: tuple[NodeSpec, ...]
    near_s: float = 0.000_1
    far_s: float = 0.000_5
    groups: int = 1024
    threshold: int = 2
    shares: int = 3
    cache_entries: int = 4096
    cache_ttl_s: float = 300.0
    release_s: float = 0.000_2
    """What a holder takes to unseal and release a share."""
    load_s: float = 0.001
    """What loading a key takes of the combiner's token."""
    warm: bool = True
    """Whether every holder has its keys loaded at the start."""

    def delay_s(self, one: str, other: str) -> float:
        """One way between two zones."""
        return self.near_s if one == other else self.far_s

    @property
    def zones(self) -> tuple[str, ...]:
        """Every zone once, in order."""
        return tuple(dict.fromkeys(node.zone for node in self.nodes))


@dataclass(frozen=True, slots=True)
class Crowd:
    """The clients: one each of ``zones``, each with its own router."""

    zones: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hot:
    """A placement group that gets a share of all requests beyond its keys' own, again and again.

    It begins at ``begin_s`` and every ``period_s`` after, grows over ``ramp_s``, stays for ``hold_s``, falls over
    ``ramp_s``. ``rank`` is the group's by how little its holders can do: at 0 it is one that overloads them most.
    """

    rank: int
    share: float
    begin_s: float
    hold_s: float
    period_s: float
    ramp_s: float

    def at(self, time_s: FloatArray) -> FloatArray:
        """The share at each of some times (seconds)."""
        phase = np.mod(time_s - self.begin_s, self.period_s)
        up = np.clip(phase / max(self.ramp_s, 1e-9), 0.0, 1.0)
        down = np.clip((self.hold_s + 2 * self.ramp_s - phase) / max(self.ramp_s, 1e-9), 0.0, 1.0)
        return self.share * np.minimum(up, down)


@dataclass(frozen=True, slots=True)
class Death:
    """A node that dies, and comes back if ``back_s`` is given."""

    node: int
    at_s: float
    back_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class Flush:
    """All nodes lose every loaded key: a new epoch."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Traffic:
    """The load: seconds of a trace, of which each is played as one second, scaled to a mean utilisation.

    ``load`` is of what the site can do of the mix at best. Times of service are those of ``engine.keys`` times
    ``token_factor`` (a hardware token is slower than SoftHSM), and vary with the coefficient ``variation``.
    """

    trace: str = "servegen_synth_1s"
    load: float = 0.65
    keys: int = 8192
    zipf: float = 0.9
    token_factor: float = 6.8
    variation: float = 0.25
    constant: bool = False
    """The trace's means instead of its seconds."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """One course of events; the first ``warmup_s`` of its ``seconds`` are not counted."""

    name: str
    site: Site
    crowd: Crowd
    traffic: Traffic
    seconds: int
    validation: bool = False
    """Whether it plays the trace's part that constants are chosen on."""
    warmup_s: float = 3.0
    hot: tuple[Hot, ...] = ()
    deaths: tuple[Death, ...] = ()
    flushes: tuple[Flush, ...] = ()
    detection_s: float = 0.1
    """After so long a client knows that a node has died: its connection broke."""
    publishes: bool = True
    """Whether nodes publish their queues; otherwise snapshots ride on replies alone."""
    tick_s: float = 1.0
    decision_s: float = 0.05
    """From the end of a tick to the table at the clients."""
    past_s: int = 600
    """How much the balancer has seen already."""
    move_s: float = 4.0
    """How long a share's move takes."""


@cache
def trace_counts(name: str) -> tuple[tuple[str, ...], FloatArray]:
    """A trace's types and its counts (bins, types)."""
    columns: dict[str, dict[int, float]] = {}
    with (TRACES / f"{name}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            columns.setdefault(row["type"], {})[int(row["timestamp"])] = float(row["count"])
    bins = sorted(set().union(*columns.values()))
    counts = np.array([[columns[kind].get(at, 0.0) for kind in columns] for at in bins])
    return tuple(columns), counts


def expected_s(site: Site, traffic: Traffic, classes: tuple[str, ...]) -> FloatArray:
    """Mean times of service (classes, nodes) in seconds."""
    prior = np.array([ALGORITHMS[each.partition("/")[2]].prior_us for each in classes], dtype=float)
    speed = np.array([[node.speed * node.faster.get(each, 1.0) for node in site.nodes] for each in classes])
    return np.asarray(prior[:, None] * 1e-6 * traffic.token_factor / speed)


def capacity_of(service_s: FloatArray, mix: FloatArray, workers: FloatArray) -> float:
    """The most requests per second of a mix (classes,) that nodes can do, wherever each is done."""
    classes, nodes = service_s.shape
    cells = classes * nodes
    cost = np.zeros(cells + 1)
    cost[-1] = -1.0
    split = np.zeros((classes, cells + 1))
    work = np.zeros((nodes, cells + 1))
    for at in range(classes):
        split[at, at * nodes : (at + 1) * nodes] = 1.0
        split[at, -1] = -mix[at] / mix.sum()
        work[np.arange(nodes), at * nodes + np.arange(nodes)] = service_s[at]
    solved = linprog(cost, A_ub=work, b_ub=workers, A_eq=split, b_eq=np.zeros(classes), method="highs")
    return float(solved.x[-1])
