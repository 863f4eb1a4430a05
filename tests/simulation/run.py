"""Run seeds of the simulation: ``--seed N`` one, ``--first A --count N`` many, ``--bugs`` every planted bug.

With ``--moves`` it is the one in which keys move all the time, with bugs of its own.

What it found goes to standard output as JSON lines, a violation in full to standard error too.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import moves
import scenario
from bugs import BUGS, Bug
from machine import Violated
from move_bugs import MOVE_BUGS


@dataclass(frozen=True)
class Kind:
    """A simulation: how a seed is run, what is drawn of it before, and the bugs that it must notice."""

    world: Callable[[int], scenario.World]
    run_seed: Callable[[int, str], scenario.Report]
    bugs: Mapping[str, Bug]

    def features(self, seed: int) -> frozenset[str]:
        """What is drawn of a seed before it begins."""
        return frozenset(self.world(seed).features)


LIVES = Kind(scenario.World, scenario.run_seed, BUGS)
MOVES = Kind(moves.MoveWorld, moves.run_seed, MOVE_BUGS)


def write(**told: Any) -> None:
    """One line of output."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def find_bugs(kind: Kind, *, rare: bool) -> int:
    """Plant each bug in turn and run its seeds until one fails; how many went unnoticed."""
    unnoticed = 0
    for name, bug in kind.bugs.items():
        if bug.rare and not rare:
            continue
        found = None
        with bug.planted():
            for seed in range(bug.first, bug.within):
                if not bug.needs <= kind.features(seed):
                    continue
                try:
                    kind.run_seed(seed, "")
                except Violated as error:
                    found = {"seed": seed, "violated": str(error).split("\n", 1)[0]}
                    break
        unnoticed += found is None
        write(bug=name, what=bug.what, within=bug.within, found=found)
    return unnoticed


def run(kind: Kind, seeds: range, bug: str) -> int:
    """Run seeds up to the first violation; whether there was one."""
    totals: Counter[str] = Counter()
    how = f" --bug {bug}" if bug else ""
    begun = time.process_time()
    with ExitStack() as stack:
        if bug:
            stack.enter_context(kind.bugs[bug].planted())
        for seed in seeds:
            try:
                report = kind.run_seed(seed, how)
            except Violated as error:
                write(seed=seed, violated=str(error))
                sys.stderr.write(f"{error}\n")
                return 1
            totals.update(seeds=1)
            totals.update(report.counts)
            totals.update(f"feature {each}" for each in report.features)
            if len(seeds) <= 100:
                write(seed=seed, trace=report.trace)
    write(totals=totals, cpu_seconds=round(time.process_time() - begun, 2))
    return 0


def run_many(count: int, jobs: int, arguments: list[str]) -> int:
    """Run seeds 0 to ``count`` in processes beside each other; prints the sum of what they did, and what failed."""
    parts = [range(count * job // jobs, count * (job + 1) // jobs) for job in range(jobs)]
    commands = [
        [sys.executable, __file__, "--first", str(part.start), "--count", str(len(part)), *arguments] for part in parts
    ]
    begun = time.monotonic()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    totals: Counter[str] = Counter()
    cpu_s = 0.0
    for process in processes:
        for line in process.communicate()[0].splitlines():
            told = json.loads(line)
            totals.update(told.get("totals", {}))
            cpu_s += told.get("cpu_seconds", 0.0)
    failed = sum(process.returncode != 0 for process in processes)
    write(totals=totals, failed=failed, cpu_seconds=round(cpu_s), seconds=round(time.monotonic() - begun))
    return 1 if failed else 0


def main() -> int:
    """Do what the command line says; the process's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--first", type=int, default=0, help="the first of many")
    parser.add_argument("--count", type=int, default=0, help="how many")
    parser.add_argument("--bug", default="", choices=["", *BUGS, *MOVE_BUGS], help="plant this bug first")
    parser.add_argument("--bugs", action="store_true", help="plant every bug in turn, until it is noticed")
    parser.add_argument("--rare", action="store_true", help="with --bugs: those too that take minutes")
    parser.add_argument("--moves", action="store_true", help="the simulation in which keys move")
    parser.add_argument("--jobs", type=int, default=1, help="so many processes for the seeds from 0 on")
    options = parser.parse_args()
    if options.jobs > 1:
        return run_many(options.count, options.jobs, ["--moves"] if options.moves else [])
    gc.set_threshold(100_000)  # collecting cycles as often as by default takes a tenth of the time
    kind = MOVES if options.moves else LIVES
    with scenario.simulated(kind.world):
        if options.bugs:
            return find_bugs(kind, rare=options.rare)
        first, count = (options.first, options.count) if options.seed is None else (options.seed, 1)
        return run(kind, range(first, first + count), options.bug)


if __name__ == "__main__":
    sys.exit(main())
