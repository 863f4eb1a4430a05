"""Run seeds of the simulation: ``--seed N`` one, ``--first A --count N`` many, ``--bugs`` every planted bug.

What it found goes to standard output as JSON lines, a violation in full to standard error too.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from bugs import BUGS
from machine import Violated
from scenario import features, run_seed, simulated


def write(**told: Any) -> None:
    """One line of output."""
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def find_bugs() -> int:
    """Plant each bug in turn and run its seeds until one fails; how many went unnoticed."""
    unnoticed = 0
    for name, bug in BUGS.items():
        found = None
        with bug.planted():
            for seed in range(bug.first, bug.within):
                if not bug.needs <= features(seed):
                    continue
                try:
                    run_seed(seed)
                except Violated as error:
                    found = {"seed": seed, "violated": str(error).split("\n", 1)[0]}
                    break
        unnoticed += found is None
        write(bug=name, what=bug.what, within=bug.within, found=found)
    return unnoticed


def run(seeds: range, bug: str) -> int:
    """Run seeds up to the first violation; whether there was one."""
    totals: Counter[str] = Counter()
    how = f" --bug {bug}" if bug else ""
    begun = time.process_time()
    with ExitStack() as stack:
        if bug:
            stack.enter_context(BUGS[bug].planted())
        for seed in seeds:
            try:
                report = run_seed(seed, how)
            except Violated as error:
                write(seed=seed, violated=str(error))
                sys.stderr.write(f"{error}\n")
                return 1
            totals.update(seeds=1, events=report.steps, gathers=report.gathers, releases=report.releases)
            totals.update(
                keys=report.keys, refreshes=report.refreshes, reshares=report.reshares, checked=report.checked
            )
            totals.update(f"feature {each}" for each in report.features)
            if len(seeds) <= 100:
                write(seed=seed, trace=report.trace)
    write(totals=totals, cpu_seconds=round(time.process_time() - begun, 2))
    return 0


def main() -> int:
    """Do what the command line says; the process's exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--first", type=int, default=0, help="the first of many")
    parser.add_argument("--count", type=int, default=0, help="how many")
    parser.add_argument("--bug", default="", choices=["", *BUGS], help="plant this bug first")
    parser.add_argument("--bugs", action="store_true", help="plant every bug in turn, until it is noticed")
    options = parser.parse_args()
    gc.set_threshold(100_000)  # collecting cycles as often as by default takes a tenth of the time
    with simulated():
        if options.bugs:
            return find_bugs()
        first, count = (options.first, options.count) if options.seed is None else (options.seed, 1)
        return run(range(first, first + count), options.bug)


if __name__ == "__main__":
    sys.exit(main())
