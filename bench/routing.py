"""Owns the figures of live routing: the choice itself, and a real cluster whose token is slow or whose node dies.

``make bench-routing`` runs it (5 minutes): a cluster of processes on loopback with real tokens that sleep for as long
as is said, so that few cores do for several nodes. The same requests are played with our routing and with rivals, and
then in the simulator of ``make bench-balancer``, by service, way, charge for cold keys and detection as measured in the
same run. It prints a table and writes ``build/bench/routing.json``.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Final

import click
import numpy as np
from balancing.arrivals import Arrivals, cluster_of
from balancing.control import Loop
from balancing.events import Outcome, Simulation
from balancing.measured import Measured
from balancing.policies import POLICIES, Source
from balancing.report import SETTLED, Target, last_above_s, mean_ms, p99_ms, row
from balancing.scenarios import Death, Flush, NodeSpec, Scenario, Site
from figures import Row, show, write
from live import NODES, OWN, THRESHOLD, Live
from numpy.typing import NDArray
from rig import NoiseMeter, machine

import engine
from engine.protocol.requests import classify_request
from engine.protocol.routing import Router
from engine.protocol.wire import Load

OUTPUT: Final = Path(__file__).parents[1] / "build" / "bench" / "routing.json"
PARTS: Final = ("decision", "slowed", "killed", "flushed", "epoch")
ROUND_ROBIN: Final = "round robin"
TWO: Final = "two choices, own"
PLAYED: Final = (OWN, ROUND_ROBIN, TWO)

CLIENTS: Final = 3
KEYS: Final = 16
EPOCH_KEYS: Final = 16
BASE_S: Final = 0.004
"""What a token sleeps for a use."""
SLOW: Final = 2
SLOWED: Final = 5.0
"""Which node's token is slow in part "slowed", and how many times as long it sleeps."""
ROBIN_LOAD: Final = 0.8
"""The load there, as the part of its time that the slow node is busy where it gets every fifth request."""
BUSY_LOAD: Final = 0.6
"""The load of the busy rows, of what all nodes can do together. Round robin would bring the slow node more than twice
what it can do."""
KILL_LOAD: Final = 0.45
FLUSH_KEYS: Final = 4
FLUSH_LOAD: Final = 0.2
POPULAR_USES: Final = 4
TOLD_S: Final = 0.03
"""Uses of a key before a new epoch, by which it is popular, and how long it takes until they are counted."""
AHEAD_MAX_S: Final = 15.0
AHEAD_IDLE_S: Final = 0.5
BATCH: Final = 100
VERB, ALGORITHM = "encrypt", "aes-256-gcm"

FloatArray = NDArray[np.float64]
Teller = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is played: seconds of a play, seeds, and rounds.

    A node dies, or keys are forgotten, at ``happens_s``; its effect is looked for in ``watched_s``, and later is the
    settled state.
    """

    measured_s: int
    way_s: int
    slowed_s: int
    killed_s: int
    warmup_s: float
    happens_s: float
    watched_s: float
    seeds: int
    kills: int
    decisions: int
    epochs: int


FULL: Final = Scale(5, 2, 9, 6, 2.0, 2.5, 1.5, 3, 4, 200, 4)
QUICK: Final = Scale(2, 1, 2, 3, 0.5, 1.0, 1.0, 1, 1, 10, 1)
FIRST_SEED: Final = 31


# --- the choice -------------------------------------------------------------------------------------------------------


class _Empty:
    """The floor of a choice."""

    def call(self) -> None:
        """Nothing."""


def decision_rows(scale: Scale) -> list[Row]:
    """Class and node of a warm use, the same by the ordinary way, and the floor; in turns, medians of batches."""
    acts: dict[str, Callable[[], Callable[[], object]]] = {"floor": lambda: _Empty().call}
    acts["class"] = lambda: lambda: classify_request(VERB, ALGORITHM)
    for count in (5, 24):
        acts |= {f"direct, {count}": partial(_direct, count), f"ranked, {count}": partial(_ranked, count)}
    found: dict[str, list[float]] = {name: [] for name in acts}
    for _ in range(scale.decisions):
        for name, make in acts.items():
            act = make()
            begun = time.perf_counter()
            for _ in range(BATCH):
                act()
            found[name].append((time.perf_counter() - begun) * 1e6 / BATCH)
    medians = {name: [statistics.median(each)] for name, each in found.items()}
    rows = []
    for count, target in ((5, Target(3.0, 1.5)), (24, Target(5.0, 3.0))):
        direct, ranked = medians[f"direct, {count}"], medians[f"ranked, {count}"]
        name = f"routing decision, {count} combiners"
        rows += [
            row(name, direct, "us", target=target),
            row(f"{name} / floor", direct, "us", "an empty method call", medians["floor"]),
            row(f"{name}, all of them in order", ranked, "us"),
        ]
    return [*rows, row("classify_request", medians["class"], "us", "an empty method call", medians["floor"])]


def _taught(count: int) -> tuple[Router, str, tuple[str, ...]]:
    """A router that was answered by so many nodes, all of which have the key loaded."""
    names = tuple(f"n{at}" for at in range(count))
    cluster = cluster_of(Site(tuple(NodeSpec(name, "a") for name in names)))
    router, request_class = Router(Source(cluster)), classify_request(VERB, ALGORITHM)
    now_s = time.monotonic()
    for number, name in enumerate(names):
        router.sent(name, now_s)
        router.answered_direct(name, "key", request_class, Load(number % 3, 10 + number, True), 100e-6, now_s)
    return router, request_class, names


def _direct(count: int) -> Callable[[], object]:
    router, _, names = _taught(count)
    clock = time.monotonic

    def decide() -> object:
        found = router.begin_direct(classify_request(VERB, ALGORITHM), "key", names, clock())
        assert found is not None
        return found

    return decide


def _ranked(count: int) -> Callable[[], object]:
    router, _, names = _taught(count)
    clock = time.monotonic
    return lambda: router.rank(classify_request(VERB, ALGORITHM), "key", names, clock())


# --- what is played on both -------------------------------------------------------------------------------------------


class Scene:
    """Outcomes of one scenario by policy: on the cluster, and of the same requests in the simulator."""

    def __init__(self, live: Live, measured: Measured, rate: float, scale: Scale) -> None:
        self.real: dict[str, list[Outcome]] = {}
        self.simulated: dict[str, list[Outcome]] = {}
        self.noticed_s: list[float] = []
        """After how long a death was noticed first, by play."""
        self._live, self._measured, self._rate, self._scale = live, measured, rate, scale
        self._ways_s = [live.way_s(rate, scale.way_s)]

    def play(self, policy: str, scenario: Scenario, arrivals: Arrivals, seed: int) -> Outcome:
        """On the cluster."""
        played = self._live.play(policy, scenario, arrivals, seed)
        self.real.setdefault(policy, []).append(played.outcome)
        for death in scenario.deaths:
            self.noticed_s += [max(0.0, at - death.at_s) for at in played.missed_s[:1]]
        return played.outcome

    def simulate(self, tell: Teller) -> None:
        """The same in the simulator, by the way as it was before and after, and the time until deaths were noticed."""
        live = self._live
        way_s = statistics.fmean([*self._ways_s, live.way_s(self._rate, self._scale.way_s)])
        tell(f"way {way_s * 1e3:.2f} ms")
        site = live.site(replace(self._measured, way_s=way_s))
        detection_s = statistics.median(self.noticed_s) if self.noticed_s else 0.0
        for policy, outcomes in self.real.items():
            for number, each in enumerate(outcomes):
                scenario = replace(each.scenario, site=site, detection_s=detection_s)
                simulation = Simulation(scenario, FIRST_SEED + number, each.arrivals, live.cluster.cluster)
                loop = Loop(simulation) if policy == OWN else None
                outcome = simulation.run(POLICIES[policy](simulation), loop)
                self.simulated.setdefault(policy, []).append(outcome)

    def truth(self, name: str, *window: float) -> list[Row]:
        """What the simulator says beside what was, and pairs of policies that it puts in another order by mean or p99.

        It is of what arrives in the window (seconds), or after the warm-up.
        """
        means = self._both(lambda each: float(each.mean()), window)
        p99s = self._both(lambda each: float(np.percentile(each, 99)), window)
        rows = []
        for what, found, must in (("mean", means, 1.15), ("p99", p99s, 1.3)):
            for policy, (real, simulated) in found.items():
                told = f"simulator, {name}, {policy}: {what}"
                rows.append(_apart(told, real, simulated, "simulated", must))
        pairs = [pair for found in (means, p99s) for pair in combinations(found.values(), 2)]
        if pairs:
            wrong = float(sum((one[0] < other[0]) != (one[1] < other[1]) for one, other in pairs))
            told = f"simulator, {name}: pairs in another order, of {len(pairs)}"
            rows.append(row(told, [wrong], "pairs", target=Target(0.0)))
        return rows

    def _both(self, of: Callable[[FloatArray], float], window: Sequence[float]) -> dict[str, tuple[float, float]]:
        """A figure of all seeds together by policy, in milliseconds: as it was, and simulated."""
        return {
            policy: (of(_latencies(outcomes, window)) * 1e3, of(_latencies(self.simulated[policy], window)) * 1e3)
            for policy, outcomes in self.real.items()
        }


def _latencies(outcomes: Sequence[Outcome], window: Sequence[float]) -> FloatArray:
    """A request without an answer took for ever."""
    return np.asarray(np.nan_to_num(np.concatenate([each.window(*window) for each in outcomes]), nan=np.inf))


def _apart(name: str, one: float, other: float, peer: str, must: float | None = None) -> Row:
    """How far two figures are apart: the ratio is the larger's over the smaller's."""
    ratio = max(one, other) / min(one, other)
    met = None if must is None else ratio <= must
    return Row(name, round(one, 4), "ms", peer, round(other, 4), round(ratio, 4), must, None, met)


# --- a slow token -----------------------------------------------------------------------------------------------------


def slowed_rows(live: Live, measured: Measured, scale: Scale, tell: Teller) -> list[Row]:
    """p99 beside the rivals', at a load that round robin can bear and at one that it can't, and the simulator."""
    service_s = measured.service_s
    rates = {
        "": ROBIN_LOAD * NODES / service_s[live.cluster.nodes[SLOW]],
        ", busy": BUSY_LOAD * sum(1 / each for each in service_s.values()),
    }
    rows: list[Row] = []
    slow = {live.cluster.nodes[SLOW]: SLOWED}
    for told, rate in rates.items():
        name = f"one token slowed {SLOWED:g}x{told}"
        scenario = live.staged(name, measured, scale.slowed_s, scale.warmup_s)
        scene, policies = Scene(live, measured, rate, scale), PLAYED if not told else (OWN, TWO)
        live.slow(slow)
        seeds = range(FIRST_SEED, FIRST_SEED + (scale.seeds if not told else max(1, scale.seeds - 1)))
        for seed in seeds:
            arrivals = live.arrivals(scenario, measured, rate, seed)
            for policy in policies:
                outcome = scene.play(policy, scenario, arrivals, seed)
                tell(f"{name}, {rate:.0f}/s, seed {seed}, {policy}: {_told(outcome)}")
        p99 = {policy: [p99_ms(each) for each in outcomes] for policy, outcomes in scene.real.items()}
        for policy, target in ((ROUND_ROBIN, Target(0.3, 0.2)), (TWO, Target(0.8, 0.6))):
            if policy in p99:
                rows.append(row(f"{name}: p99 / {policy}", p99[OWN], "ms", policy, p99[policy], target))
        if not told:
            rows += _floor_rows(live, scene, measured, rate, tell)
        scene.simulate(tell)
        rows += scene.truth(name)
        rows.append(_lost_row(name, scene))
    return rows


def _floor_rows(live: Live, scene: Scene, measured: Measured, rate: float, tell: Teller) -> list[Row]:
    """How much a play differs from itself: the first seed once more."""
    rows = []
    for policy in (OWN, ROUND_ROBIN):
        before = scene.real[policy][0]
        again = live.play(policy, before.scenario, before.arrivals, FIRST_SEED).outcome
        tell(f"{before.scenario.name}, once more, {policy}: {_told(again)}")
        for what, of in (("mean", mean_ms), ("p99", p99_ms)):
            told = f"noise, {policy}: {what}, played twice"
            rows.append(_apart(told, of(before), of(again), "the second time"))
    return rows


def _lost_row(name: str, scene: Scene) -> Row:
    lost = [float(sum(np.isnan(each.latency_s).sum() for each in scene.real[OWN]))]
    return row(f"{name}: requests without an answer", lost, "requests", target=Target(0.0))


def _told(outcome: Outcome, *window: float) -> str:
    return f"mean {mean_ms(outcome, *window):.2f} ms, p99 {p99_ms(outcome, *window):.1f} ms"


# --- a node that is killed --------------------------------------------------------------------------------------------


def killed_rows(live: Live, measured: Measured, scale: Scale, tell: Teller) -> list[Row]:
    """How long p99 is above 1.5 times the settled one, all kills together, and the simulator."""
    rate = KILL_LOAD * sum(1 / each for each in measured.service_s.values())
    scene = Scene(live, measured, rate, scale)
    for number in range(scale.kills):
        scenario = live.staged("node killed", measured, scale.killed_s, scale.warmup_s)
        scenario = replace(scenario, deaths=(Death(number % NODES, scale.happens_s),))
        arrivals = live.arrivals(scenario, measured, rate, FIRST_SEED + number)
        # The rivals' half of it is enough to compare them by.
        for policy in PLAYED if number < (scale.kills + 1) // 2 else (OWN,):
            outcome = scene.play(policy, scenario, arrivals, FIRST_SEED + number)
            tell(f"node killed, {rate:.0f}/s, seed {FIRST_SEED + number}, {policy}: {_told(outcome)}")
    scene.simulate(tell)
    found = {policy: [_recovered_s(outcomes, scale)] for policy, outcomes in scene.real.items()}
    rows = [
        row("node killed: until p99 is within 1.5x of the settled one", found[OWN], "s", target=Target(1.0, 0.5)),
        row("node killed: the same in the simulator", [_recovered_s(scene.simulated[OWN], scale)], "s"),
        *(row(f"node killed: the same, {policy}", found[policy], "s") for policy in PLAYED[1:]),
        row("node killed: until the first client notices", [statistics.median(scene.noticed_s or [0.0]) * 1e3], "ms"),
        _lost_row("node killed", scene),
    ]
    return rows + scene.truth("node killed", scale.happens_s, scale.happens_s + scale.watched_s)


def _recovered_s(outcomes: Sequence[Outcome], scale: Scale) -> float:
    after_s = np.concatenate([each.arrivals.time_s - scale.happens_s for each in outcomes])
    latency_ms = np.nan_to_num(np.concatenate([each.latency_s for each in outcomes]), nan=np.inf) * 1e3
    settled = np.percentile(latency_ms[after_s >= scale.watched_s], 99)
    return last_above_s(after_s, latency_ms, SETTLED * float(settled), scale.watched_s)


# --- keys that are loaded nowhere -------------------------------------------------------------------------------------


def flushed_rows(live: Live, measured: Measured, scale: Scale, tell: Teller) -> list[Row]:
    """The first second after all nodes have forgotten every loaded key, beside the simulator's.

    Our routing alone: the load is so low that all are alike. What gathering costs is processor time, which here all
    nodes share, so there are few keys.
    """
    rate = FLUSH_LOAD * sum(1 / each for each in measured.service_s.values())
    window = scale.happens_s, scale.happens_s + 1.0
    scene = Scene(live, measured, rate, scale)
    for number in range(scale.kills):
        seed = FIRST_SEED + number
        scenario = live.staged("keys flushed", measured, math.ceil(scale.happens_s + 1.0), scale.warmup_s)
        scenario = replace(scenario, flushes=(Flush(scale.happens_s),))
        outcome = scene.play(OWN, scenario, live.arrivals(scenario, measured, rate, seed, FLUSH_KEYS), seed)
        tell(f"keys flushed, {rate:.0f}/s, seed {seed}: {_told(outcome, *window)} then")
    scene.simulate(tell)
    return [*scene.truth("keys flushed", *window), _lost_row("keys flushed", scene)]


# --- a new epoch ------------------------------------------------------------------------------------------------------


def epoch_rows(live: Live, scale: Scale) -> list[Row]:
    """The first use of each key in a new epoch that finds it loaded nowhere, and what was done ahead.

    A refresh leaves loaded keys where they are, so the nodes are told to forget them, as time, uses and restarts do. It
    is another client's than who uses them, but where that one is to have them loaded by itself.
    """
    names = [f"epoch{number}" for number in range(EPOCH_KEYS)]
    ways = ("prewarmed", "not", "still loaded", "by itself")
    found: dict[str, list[float]] = {way: [] for way in ways}
    with ExitStack() as stack:
        user = stack.enter_context(engine.connect(live.cluster.client_config_of(live.cluster.clients[1])))
        for name in names:
            live.kq.create_key(name, ALGORITHM, threshold=THRESHOLD, shares=NODES, timeout=60)
            user.prewarm(name)
        for number in range(scale.epochs):
            for way in ways if number % 2 else reversed(ways):
                for _ in range(POPULAR_USES):
                    for name in names:
                        user.encrypt(name, b"x")
                    time.sleep(TOLD_S)
                for name in names:
                    (user if way == "by itself" else live.kq).refresh_key(name)
                    if way != "still loaded":
                        live.kq.flush(name)
                    if way == "prewarmed":
                        live.kq.prewarm(name)
                if way == "by itself":
                    _await_loaded(user)
                found[way].append(statistics.fmean(_taken_ms(user, name) for name in names))
    head = "first requests after an epoch change"
    return [
        row(f"{head}: mean, prewarmed / not", found["prewarmed"], "ms", "not", found["not"], Target(0.5, 0.3)),
        row(
            f"{head}: mean, by the client itself / not", found["by itself"], "ms", "not", found["not"], Target(0.5, 0.3)
        ),
        row(f"{head}: mean, keys still loaded / not", found["still loaded"], "ms", "not", found["not"]),
    ]


def _await_loaded(user: engine.Engine) -> None:
    """Wait until the client has nothing more to have loaded ahead, which it does at a bounded rate."""
    until = time.monotonic() + AHEAD_MAX_S
    before, since = user.prewarm_stats, time.monotonic()
    while time.monotonic() < until and time.monotonic() - since < AHEAD_IDLE_S:
        time.sleep(0.05)
        now = user.prewarm_stats
        if now != before:
            before, since = now, time.monotonic()


def _taken_ms(user: engine.Engine, name: str) -> float:
    begun = time.perf_counter()
    user.encrypt(name, b"x")
    return (time.perf_counter() - begun) * 1e3


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(parts: Sequence[str], scale: Scale, tell: Teller) -> list[Row]:
    """The rows of these parts."""
    rows = decision_rows(scale) if "decision" in parts else []
    if set(parts) == {"decision"}:
        return rows
    meter = NoiseMeter()
    with (
        tempfile.TemporaryDirectory(prefix="keyquorum-bench-") as folder,
        Live(Path(folder), CLIENTS, KEYS, BASE_S) as live,
    ):
        if {"slowed", "killed", "flushed"} & set(parts):
            alike, slow = live.service(live.cluster.nodes[SLOW], SLOWED, scale.measured_s)
            tell(f"service {_range_ms(alike.service_s)} ms, one slow {_range_ms(slow.service_s)} ms, "
                 f"a cold key {alike.cold_s * 1e3:.2f} ms more")  # fmt: skip
        if "slowed" in parts:
            rows += slowed_rows(live, slow, scale, tell)
        if "killed" in parts:
            rows += killed_rows(live, alike, scale, tell)
        if "flushed" in parts:
            rows += flushed_rows(live, alike, scale, tell)
        if "epoch" in parts:
            rows += epoch_rows(live, scale)
    noise = meter.noise()
    rows.append(row("noise: CPU time of the machine that others used", [noise.foreign], "%"))
    return [*rows, row("noise: CPU time that the hypervisor took", [noise.steal], "%")]


def _range_ms(service_s: Mapping[str, float]) -> str:
    return f"{min(service_s.values()) * 1e3:.2f} to {max(service_s.values()) * 1e3:.2f}"


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run: figures that mean little.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="These parts alone.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=OUTPUT, help="Where the rows go.")
def main(quick: bool, only: tuple[str, ...], output: Path) -> None:
    """Measure live routing beside its rivals, and the simulator beside the real cluster."""
    click.echo(f"machine: {machine()}")
    begun = time.monotonic()
    rows = measure(
        only or PARTS, QUICK if quick else FULL, lambda text: click.echo(f"[{time.monotonic() - begun:4.0f} s] {text}")
    )
    show("live routing, and how true the simulator is", rows)
    write(rows, output)
    missed = [each.name for each in rows if each.met is False]
    click.echo(f"{len(rows)} rows in {output}, {time.monotonic() - begun:.0f} s; missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
