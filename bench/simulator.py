"""Plays the project's own routing, forecast, programs and tables beside their rivals, in simulated time.

Every policy of a scenario and a seed gets the same requests at the same times (common random numbers), and the same
seed gives the same figures, byte for byte. Constants of the router were chosen on the first 70 % of the trace
(``--validation``); the figures are of the rest. ``bench/control_loop.py`` runs it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import click
from balancing.arrivals import Arrivals, cluster_of, draw
from balancing.control import Loop
from balancing.events import Outcome, Simulation
from balancing.plays import back, calm, death, flush, hour, shift, steady, surprise
from balancing.policies import POLICIES
from balancing.report import Target, mean_ms, p99_ms, recovered_s, row
from balancing.scenarios import Scenario
from figures import Row

from balancer.agenda import PLAN_S

OWN: Final = "own"
PERFECT: Final = "least completion, perfect"
TWO_OWN: Final = "two choices, own"
NO_SLOW_START: Final = "own, no slow start"
TWO_FRESH: Final = "two choices, fresh probes"
WEIGHTED: Final = "LP weights as ratios"


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is played: seconds of each scenario, and how many seeds."""

    steady_s: int
    death_s: int
    shift_s: int
    hour_s: int
    seeds: int


FULL: Final = Scale(20, 8, 60, 3600, 3)
QUICK: Final = Scale(4, 6, 28, 60, 1)
FIRST_SEED: Final = 101

Teller = Callable[[str], None]


class Stage:
    """A scenario and a seed, whose requests are drawn once for all policies."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.seed = scenario, seed
        self.cluster = cluster_of(scenario.site)
        self.arrivals: Arrivals = draw(scenario, self.cluster, seed)

    def play(self, policy: str, moves: str = "") -> Outcome:
        """One policy's outcome; those that go by a table have a balancer."""
        simulation = Simulation(self.scenario, self.seed, self.arrivals, self.cluster)
        tabled = policy.startswith(OWN) or policy == WEIGHTED
        return simulation.run(POLICIES[policy](simulation), Loop(simulation, moves) if tabled else None)


def rows(quick: bool, *, part: str = "test", tell: Teller = click.echo) -> list[Row]:
    """All rows of the simulator."""
    scale = QUICK if quick else FULL
    seeds = range(FIRST_SEED, FIRST_SEED + scale.seeds)
    on = {"validation": part == "validation"}
    result: list[Row] = []
    for layout in ("rel", "comp"):
        result += _steady_rows(replace(steady(layout, scale.steady_s), **on), seeds, tell)
    shifts = (replace(each(scale.shift_s), **on) for each in (shift, surprise))
    result += _shift_rows(*shifts, seeds, tell)
    result += _death_rows(replace(death(scale.death_s), **on), seeds, tell)
    result += _back_rows(replace(back(2 * scale.death_s), **on), seeds, tell)
    result += _flush_rows(replace(flush(scale.steady_s), **on), seeds, tell)
    result += _hour_rows(replace(hour(scale.hour_s), **on), tell)
    return result


def _steady_rows(scenario: Scenario, seeds: Sequence[int], tell: Teller) -> list[Row]:
    found: dict[str, list[Outcome]] = {name: [] for name in POLICIES if name != NO_SLOW_START}
    for seed in seeds:
        stage = Stage(scenario, seed)
        for name in found:
            outcome = stage.play(name)
            found[name].append(outcome)
            tell(f"{scenario.name}, seed {seed}, {name}: {told(outcome)}")
    mean = {name: [mean_ms(each) for each in outcomes] for name, outcomes in found.items()}
    p99 = {name: [p99_ms(each) for each in outcomes] for name, outcomes in found.items()}
    unstable = {name: sum(not each.stable for each in outcomes) for name, outcomes in found.items()}
    head = scenario.name
    own_unstable = Target(0.0)
    result = [
        row(f"{head}: mean / perfect knowledge", mean[OWN], "ms", PERFECT, mean[PERFECT], Target(1.10, 1.05)),
        row(f"{head}: the same, worst seed", mean[OWN], "ms", PERFECT, mean[PERFECT], worst=True),
        row(f"{head}: mean / two choices", mean[OWN], "ms", TWO_OWN, mean[TWO_OWN], Target(0.60, 0.50)),
        row(f"{head}: p99 / two choices", p99[OWN], "ms", TWO_FRESH, p99[TWO_FRESH], Target(0.60, 0.50)),
        row(f"{head}: seeds in which it is unstable", [float(unstable[OWN])], "seeds", target=own_unstable),
        row(f"{head}: mean / without prices", mean[OWN], "ms", "own, no prices", mean["own, no prices"]),
    ]
    for name in found:
        if name not in (OWN, "own, no prices"):
            result.append(row(f"{head}: mean of {name}, unstable in {unstable[name]}", mean[name], "ms"))
            result.append(row(f"{head}: p99 of {name}", p99[name], "ms"))
    return result


def _shift_rows(scenario: Scenario, surprising: Scenario, seeds: Sequence[int], tell: Teller) -> list[Row]:
    """In the time that groups are hot, in the seconds before the first one is, and where none gets hot."""
    known = _shifts(scenario, ("", "reactive", "periodic", "predictive"), seeds, tell)
    unknown = _shifts(surprising, ("", "reactive", "periodic", "predictive"), seeds, tell)
    settled = _shifts(calm(scenario), ("", "periodic", "predictive"), seeds, tell)
    planned = "moves as planned"
    result = []
    for name, found in ((scenario.name, known), (surprising.name, unknown)):
        own, target = found["predictive"], Target(0.3, 0.2) if found is known else None
        result += [
            row(f"{name}: mean, {planned} / reactive moves", own.within, "ms", "reactive moves",
                found["reactive"].within, target),
            row(f"{name}: the same, worst seed", own.within, "ms", "reactive moves", found["reactive"].within,
                worst=True),
            row(f"{name}: mean, {planned} / plans each {PLAN_S:.0f} s alone", own.within, "ms", "plans now and then",
                found["periodic"].within),
            row(f"{name}: mean, {planned} / no moves", own.within, "ms", "no moves", found[""].within),
            row(f"{name}: before the shift / no moves, worst seed", own.before, "ms", "no moves", found[""].before,
                Target(1.05), worst=True),
        ]  # fmt: skip
    own = settled["predictive"]
    more = [each - beside for each, beside in zip(own.moves, settled["periodic"].moves, strict=True)]
    return [
        *result,
        row(f"{scenario.name}: moves more than by plans each {PLAN_S:.0f} s, where none gets hot, worst seed",
            more, "moves", target=Target(0.0), worst=True),
        row(f"{scenario.name}: mean where none gets hot / no moves", own.whole, "ms", "no moves", settled[""].whole),
    ]  # fmt: skip


@dataclass(slots=True)
class _Shifts:
    """By seed: mean latencies in milliseconds, and how often a group moved."""

    within: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    moves: list[float] = field(default_factory=list)


def _shifts(scenario: Scenario, ways: Sequence[str], seeds: Sequence[int], tell: Teller) -> dict[str, _Shifts]:
    """The outcomes by what moves are made by."""
    windows = [
        (each.begin_s, min(each.begin_s + each.hold_s + 2 * each.ramp_s, float(scenario.seconds)))
        for each in scenario.hot
    ]
    first = min(begin for begin, _ in windows)
    found = {way: _Shifts() for way in ways}
    for seed in seeds:
        stage = Stage(scenario, seed)
        for way, into in found.items():
            outcome = stage.play(OWN, way)
            parts = [outcome.window(*each) for each in windows]
            into.within.append(float(sum(each.sum() for each in parts) / sum(map(len, parts)) * 1e3))
            into.before.append(mean_ms(outcome, first - scenario.move_s - 4.0, first))
            into.whole.append(mean_ms(outcome))
            into.moves.append(float(len(outcome.moves)))
            tell(f"{scenario.name}, seed {seed}, {way or 'no'} moves: {into.within[-1]:.2f} ms in the windows, "
                 f"{into.before[-1]:.2f} before, {len(outcome.moves)} moves")  # fmt: skip
    return found


def _death_rows(scenario: Scenario, seeds: Sequence[int], tell: Teller) -> list[Row]:
    at_s = scenario.deaths[0].at_s
    taken, rival = [], []
    for seed in seeds:
        stage = Stage(scenario, seed)
        for name, into in ((OWN, taken), (TWO_OWN, rival)):
            outcome = stage.play(name)
            settled = at_s + 2.0, float(scenario.seconds)
            into.append(recovered_s(outcome, at_s, 2.0, settled))
            tell(f"{scenario.name}, seed {seed}, {name}: p99 as settled after {into[-1]:.1f} s; {told(outcome)}")
    must = Target(scenario.detection_s + 0.25)
    return [
        row(f"{scenario.name}: until p99 is settled", taken, "s", target=must),
        row(f"{scenario.name}: the same, worst seed", taken, "s", target=must, worst=True),
        row(f"{scenario.name}: {TWO_OWN}", rival, "s"),
    ]


def _back_rows(scenario: Scenario, seeds: Sequence[int], tell: Teller) -> list[Row]:
    """The first second after a node was there again."""
    at_s = scenario.deaths[0].back_s
    found: dict[str, list[float]] = {OWN: [], NO_SLOW_START: [], TWO_FRESH: []}
    for seed in seeds:
        stage = Stage(scenario, seed)
        for name, p99s in found.items():
            p99s.append(p99_ms(stage.play(name), at_s, at_s + 1.0))
            tell(f"{scenario.name}, seed {seed}, {name}: p99 {p99s[-1]:.1f} ms in the first second")
    peers = NO_SLOW_START, TWO_FRESH
    return [row(f"{scenario.name}: p99 / {name}", found[OWN], "ms", name, found[name]) for name in peers]


def _flush_rows(scenario: Scenario, seeds: Sequence[int], tell: Teller) -> list[Row]:
    """The first two seconds after every key was forgotten."""
    at_s = scenario.flushes[0].at_s
    found: dict[str, list[float]] = {OWN: [], TWO_FRESH: [], PERFECT: []}
    for seed in seeds:
        stage = Stage(scenario, seed)
        for name, means in found.items():
            means.append(mean_ms(stage.play(name), at_s, at_s + 2.0))
            tell(f"{scenario.name}, seed {seed}, {name}: {means[-1]:.2f} ms in the first 2 s")
    return [
        row(f"{scenario.name}: mean / {name}", found[OWN], "ms", name, found[name]) for name in (TWO_FRESH, PERFECT)
    ]


def _hour_rows(scenario: Scenario, tell: Teller) -> list[Row]:
    stage = Stage(scenario, FIRST_SEED)
    found, seconds = {}, {}
    for name in (OWN, PERFECT):
        begun = time.process_time()
        found[name] = stage.play(name)
        seconds[name] = time.process_time() - begun
        tell(f"{scenario.name}, {name}: {told(found[name])}, {seconds[name]:.0f} s of CPU")
    own, perfect = [mean_ms(found[OWN])], [mean_ms(found[PERFECT])]
    return [
        row(f"{scenario.name}: mean / perfect knowledge", own, "ms", PERFECT, perfect, Target(1.10, 1.05)),
        row(f"{scenario.name}: {scenario.seconds} s take", [seconds[OWN]], "s of CPU"),
    ]


def told(outcome: Outcome) -> str:
    """An outcome in one line."""
    lost = int(sum(map(math.isnan, outcome.latency_s)))
    text = f"mean {mean_ms(outcome):.3f} ms, p99 {p99_ms(outcome):.2f} ms"
    return text + ("" if outcome.stable else ", unstable") + (f", {lost} without an answer" if lost else "")
