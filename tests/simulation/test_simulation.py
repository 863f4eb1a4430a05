"""Thousands of seeds of the deterministic simulation, and the planted bugs that it must notice.

``run.py`` beside this file runs the seeds, in processes of their own: the code is changed for the simulation there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN = Path(__file__).parent / "run.py"
LONG = bool(os.environ.get("KEYQUORUM_ASSURANCE"))
ALL_SEEDS = 10_000
SEEDS = ALL_SEEDS if LONG else 400
MOVE_SEEDS = 2_000 if LONG else 60
"""``make moves`` runs 12,000."""
PROCESSES = 2
TIMEOUT_S = 900
"""It only ends a run that hangs."""
BUGS_MIN = 10


class Runner:
    """Processes of ``run.py``; they end with the test."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, hash_seed: int = 0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(RUN), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._running.append(process)
        return process

    @staticmethod
    def finish(process: subprocess.Popen[str]) -> tuple[int, list[dict[str, Any]], str]:
        """Exit status, what it told, and its standard error."""
        out, err = process.communicate(timeout=TIMEOUT_S)
        return process.returncode, [json.loads(line) for line in out.splitlines()], err

    def end(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    made = Runner()
    yield made
    made.end()


@pytest.fixture(scope="module")
def noticed(runner: Runner) -> dict[str, dict[str, Any]]:
    """What became of each planted bug."""
    return bugs(runner)


def bugs(runner: Runner, *arguments: str) -> dict[str, dict[str, Any]]:
    _, told, err = runner.finish(runner.start("--bugs", *arguments))
    assert told, err
    # A fault that does not fit the code any more breaks it: that notices nothing.
    unfit = [
        each for each in told if each["found"] and re.search("(Type|Attribute|Name)Error", each["found"]["violated"])
    ]
    assert not unfit
    assert not err
    return {each["bug"]: each for each in told}


def totals_of(runner: Runner, seeds: int, *arguments: str) -> Counter[str]:
    """What so many seeds did, none of which failed."""
    part = seeds // PROCESSES
    processes = [
        runner.start("--first", str(index * part), "--count", str(part), *arguments, hash_seed=index)
        for index in range(PROCESSES)
    ]
    totals: Counter[str] = Counter()
    for process in processes:
        status, told, err = runner.finish(process)
        assert status == 0, err
        totals.update(told[-1]["totals"])
    assert totals["seeds"] == seeds
    return totals


def test_no_seed_violates_an_invariant(runner: Runner) -> None:
    totals = totals_of(runner, SEEDS)
    # It is a proof of nothing if nothing happens: every kind of fault and attack is there often, and keys are used.
    assert totals["keys"] > SEEDS
    assert totals["gathers"] > SEEDS
    assert totals["refreshes"] > SEEDS // 10
    assert totals["reshares"] > SEEDS // 20
    assert totals["checked"] > SEEDS // 2
    features = {name: count for name, count in totals.items() if name.startswith("feature ")}
    faults = ("point", "die", "commit", "break", "cut", "loss", "double", "slow", "step", "full")
    for kind in (*faults, "liar", "thief", "clock attack", "restart attack", "rogue", "two creators"):
        assert features[f"feature {kind}"] > SEEDS // 50, features


def test_keys_that_move_are_whole_at_every_instant(runner: Runner) -> None:
    """Looked at after each commit of each process: t shares of the committed epoch, of one secret, and no older one."""
    totals = totals_of(runner, MOVE_SEEDS, "--moves")
    assert totals["instants"] > 100 * MOVE_SEEDS
    assert totals["moves"] > MOVE_SEEDS
    assert totals["refreshes"] > MOVE_SEEDS // 4
    assert totals["checked"] > MOVE_SEEDS // 2
    assert totals["crashes"] > MOVE_SEEDS
    for what in ("lies", "named liar", "named all", "fallbacks"):
        assert totals[what] > MOVE_SEEDS // 50, totals
    features = {name: count for name, count in totals.items() if name.startswith("feature ")}
    faults = ("point", "die", "commit", "break", "cut", "loss", "double", "slow", "full")
    evil = ("false share", "false degree", "false part", "false words", "fallback", "rogue", "two-faced", "old leader")
    for kind in (*faults, *evil):
        assert features[f"feature {kind}"] > MOVE_SEEDS // 50, features


def test_an_attempt_that_only_a_registry_of_before_knows_ends(runner: Runner) -> None:
    """The registry falls back and gives the number out anew: who prepared the first of that number gives it up."""
    status, _, err = runner.finish(runner.start("--moves", "--seed", "3063"))
    assert status == 0, err


def test_every_bug_in_what_moves_keys_is_noticed(runner: Runner) -> None:
    noticed = bugs(runner, "--moves", *(["--rare"] if LONG else []))
    assert len(noticed) >= (BUGS_MIN if LONG else BUGS_MIN - 3)
    unnoticed = [f"{name}: {each['what']}" for name, each in noticed.items() if each["found"] is None]
    assert not unnoticed


def test_a_seed_is_the_same_course_of_events_every_time(runner: Runner) -> None:
    """In processes whose hashes of strings differ; and two seeds differ."""
    for kind in ((), ("--moves",)):
        first, second = (runner.start("--first", "0", "--count", "8", *kind, hash_seed=each) for each in (1, 2))
        one, two = ([each.get("trace") for each in runner.finish(process)[1]] for process in (first, second))
        assert one == two
        assert len(set(one[:8])) == 8


def test_every_planted_bug_is_noticed(noticed: dict[str, dict[str, Any]]) -> None:
    """Each within its own number of seeds; the code as it is passes them all, in ``make assurance``."""
    assert len(noticed) >= BUGS_MIN
    assert max(each["within"] for each in noticed.values()) <= ALL_SEEDS
    unnoticed = [f"{name}: {each['what']}" for name, each in noticed.items() if each["found"] is None]
    assert not unnoticed


def test_a_violation_tells_how_to_see_it_again(runner: Runner, noticed: dict[str, dict[str, Any]]) -> None:
    seed = noticed["grant-combiner"]["found"]["seed"]
    status, told, err = runner.finish(runner.start("--seed", str(seed), "--bug", "grant-combiner"))
    assert status == 1
    assert f"seed {seed}: " in err
    assert "scenario: " in err
    assert "last events:" in err
    command = err.split("again: ")[1].splitlines()[0]
    again = subprocess.run(
        shlex.split(command), cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )
    assert again.stderr == err
    assert told[0]["seed"] == seed
