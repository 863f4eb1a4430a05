"""Fuzz every decoder: all targets, then every planted bug, then which refusals were reached; a report at the end.

``--target T --seed S --iteration I`` makes one input again, ``--target T --file F`` takes a file's; both say what is
wrong with it and make it small. ``--collect`` adds what is interesting to the corpus. The exit status is 1 if anything
was found that must not be, or a planted bug was not found.
"""

from __future__ import annotations

import argparse
import ast
import ctypes
import inspect
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
sys.path.insert(0, str(Path(__file__).parent))

import driver
import inventory
import structlog
from driver import BLOCK, Tally, all_targets, run_block
from planted import BUGS, FRESH
from targets import Target
from world import quick_signatures

ROOT = Path(__file__).parents[2]
REPORT = Path(os.environ.get("KEYQUORUM_FUZZ_REPORT", ROOT / "build" / "fuzz"))
EXECUTIONS = 10_500_000
"""A little more than ten million, so that rounding takes nothing from them."""
GROWTH_MAX_KIB = 96 * 1024
"""What a process may grow by after its first job on a target; caches of the harness are the most of it."""
TRACED = 1_500
PR_SET_PDEATHSIG = 1

_held = ExitStack()
_targets: dict[str, Target] = {}


def prepare() -> None:
    """A worker's start: the harness's signatures, the targets, the bounds."""
    if not _targets:
        _held.enter_context(quick_signatures())
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
        _targets.update(all_targets())
        driver.quiet_process()


def die_with(parent: int) -> None:
    """A worker's first step: it ends when the process that started it does, however that ended."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def note_job(*told: object) -> None:
    """What this process is about to do, in a file: if it dies, that is what killed it."""
    REPORT.mkdir(parents=True, exist_ok=True)
    (REPORT / f"running.{os.getpid()}").write_text(json.dumps([str(each) for each in told]), encoding="utf-8")


def fuzz(name: str, seed: int, block: int, count: int) -> tuple[str, Tally, float]:
    """A job: one block of one target, with its memory's growth and the time it took."""
    prepare()
    note_job("target", name, "seed", seed, "block", block)
    begun = time.monotonic()
    return name, run_block(_targets[name], seed, block, count), time.monotonic() - begun


def find_bug(name: str, seed: int) -> tuple[str, int, str]:
    """A job: plant a bug and look for it; executions, and what was found."""
    prepare()
    note_job("bug", name, "seed", seed)
    bug = BUGS[name]
    target = _targets[bug.target]
    target.seeds()
    kept, done = target.made, 0
    try:
        with bug.planted():
            if bug.target in FRESH:
                target.made = []
            for block in range(-(-bug.within // BLOCK)):
                tally = run_block(target, seed, block, min(BLOCK, bug.within - done))
                done += tally.executions
                if tally.failures:
                    return name, done, tally.failures[0].problem
    finally:
        target.made = kept
    return name, done, ""


def trace(name: str, seed: int, count: int) -> dict[str, list[int]]:
    """A job: the lines that a target reaches, by file."""
    prepare()
    note_job("trace", name)
    return {file: sorted(lines) for file, lines in driver.traced([_targets[name]], seed, count).items() if lines}


# --- plans ---


def plan(targets: Sequence[Target], executions: int) -> Iterator[tuple[str, int, int]]:
    """(target, block, count): the parts of all executions by weight, long targets first."""
    whole = sum(each.weight for each in targets)
    jobs = []
    for target in targets:
        left = max(40, round(executions * target.weight / whole))
        for block in range(-(-left // BLOCK)):
            jobs.append((block, target.name, min(BLOCK, left - block * BLOCK)))
    for block, name, count in sorted(jobs, key=lambda job: (-job[0], job[1])):
        yield name, block, count


def unreached(lines: dict[str, set[int]], targets: Sequence[Target]) -> list[str]:
    """The refusals in the functions that the targets cover which no input reached."""
    found = []
    wanted = {each for target in targets for each in target.covers}
    for module, tree in inventory.sources(inventory.PACKAGES).items():
        path = str(inspect.getsourcefile(sys.modules[module])) if module in sys.modules else ""
        reached = lines.get(path, set())
        for name, node in inventory._functions(tree, module):
            if name not in wanted:
                continue
            for each in ast.walk(node):
                if isinstance(each, ast.Raise) and not reached & set(range(each.lineno, (each.end_lineno or 0) + 1)):
                    found.append(f"{name}: line {each.lineno}: {ast.unparse(each)[:110]}")
    return sorted(found)


def run_all(options: argparse.Namespace) -> int:
    """Everything, in ``options.processes`` processes; the report; the exit status."""
    prepare()
    chosen = [each for each in _targets.values() if not options.target or each.name == options.target]
    REPORT.mkdir(parents=True, exist_ok=True)
    for old in REPORT.glob("running.*"):
        old.unlink()
    begun, tallies, problems = time.monotonic(), {each.name: Tally() for each in chosen}, []
    growth: dict[str, int] = {}
    bugs: dict[str, dict[str, Any]] = {}
    lines: dict[str, set[int]] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(options.processes, mp_context=context, initializer=die_with, initargs=(os.getpid(),))
    try:
        jobs: dict[Future[Any], str] = {}
        for name, block, count in plan(chosen, options.executions):
            jobs[pool.submit(fuzz, name, options.seed, block, count)] = "fuzz"
        for name in BUGS if options.bugs and not options.target else ():
            jobs[pool.submit(find_bug, name, options.seed)] = "bug"
        for each in chosen if options.trace else ():
            jobs[pool.submit(trace, each.name, options.seed, options.trace)] = "trace"
        for job in as_completed(jobs):
            told = job.result()
            if jobs[job] == "fuzz":
                name, tally, _ = told
                growth[name] = growth.get(name, 0) + (tally.grown_kib if tallies[name].executions else 0)
                tallies[name].add(tally)
                show(options, tallies, begun)
            elif jobs[job] == "bug":
                name, executions, problem = told
                bugs[name] = {"what": BUGS[name].what, "target": BUGS[name].target, "within": BUGS[name].within,
                              "executions": executions, "found": problem}  # fmt: skip
            else:
                for file, seen in told.items():
                    lines.setdefault(file, set()).update(seen)
    except BrokenProcessPool:
        running = [path.read_text(encoding="utf-8") for path in sorted(REPORT.glob("running.*"))]
        problems.append(f"a process died; what was running: {'; '.join(running)}")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for old in REPORT.glob("running.*"):
            old.unlink()
    problems += [f"{name}: memory grew by {kib} KiB" for name, kib in growth.items() if kib > GROWTH_MAX_KIB]
    problems += [f"the bug {name!r} was not found" for name, bug in bugs.items() if not bug["found"]]
    if not options.target:
        problems += inventory.uncovered(list(_targets.values()), inventory.sources(inventory.PACKAGES))
    return report(options, tallies, bugs, problems, unreached(lines, chosen) if lines else [], time.monotonic() - begun)


_shown = [0.0]


def show(options: argparse.Namespace, tallies: dict[str, Tally], begun: float) -> None:
    """A line of progress now and then."""
    now = time.monotonic()
    if now - _shown[0] >= options.progress:
        _shown[0] = now
        done = sum(each.executions for each in tallies.values())
        failures = sum(len(each.failures) for each in tallies.values())
        sys.stderr.write(f"{now - begun:6.0f} s  {done:>11,} executions  {failures} failures\n")


def report(
    options: argparse.Namespace,
    tallies: dict[str, Tally],
    bugs: dict[str, dict[str, Any]],
    problems: list[str],
    not_reached: list[str],
    seconds: float,
) -> int:
    """Write report.json and report.txt; the failing inputs as files, made small; the exit status."""
    failures = []
    for name, tally in tallies.items():
        for failure in tally.failures:
            small = driver.minimise_failure(_targets[name], bytes.fromhex(failure.data))
            path = REPORT / f"failure-{driver.folder_name(name)}-{failure.seed}-{failure.iteration}.bin"
            path.write_bytes(small)
            failures.append(
                {**driver.failure_fields(failure), "data": small.hex()[:4096], "file": os.path.relpath(path, ROOT)}
            )
    total = sum(each.executions for each in tallies.values())
    told = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "python": sys.version.split()[0],
        "seed": options.seed,
        "processes": options.processes,
        "seconds": round(seconds, 1),
        "executions": total,
        "failures": failures,
        "problems": problems,
        "targets": {
            name: {
                "executions": each.executions,
                "per_cpu_second": round(each.executions / max(each.cpu_s, 1e-6)),
                "accepted": each.accepted,
                "accepted_outcomes": sum(reason.startswith("+ ") for reason in each.reasons),
                "refusals": sum(not reason.startswith("+ ") for reason in each.reasons),
                "slowest_ms": round(1000 * each.slowest_s, 1),
                "failures": len(each.failures),
            }
            for name, each in tallies.items()
        },
        "bugs": bugs,
        "refusals_not_reached": not_reached,
        "parsed_elsewhere": inventory.ELSEWHERE,
    }
    (REPORT / "report.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    text = as_text(told)
    (REPORT / "report.txt").write_text(text, encoding="utf-8")
    sys.stdout.write(text)
    return 1 if failures or problems else 0


def as_text(told: dict[str, Any]) -> str:
    """The report for people."""
    out = [
        f"Fuzzing of the decoders, {told['date']}, commit {told['commit']}, Python {told['python']}, "
        f"seed {told['seed']}",
        f"{told['executions']:,} executions in {told['seconds']:.0f} s by {told['processes']} processes: "
        f"{len(told['failures'])} failures, {len(told['problems'])} problems",
        "",
        f"{'target':44} {'executions':>10} {'per CPU s':>9} {'accepted':>9} {'kinds':>6} {'refusals':>8} {'slow':>7}",
    ]
    for name, each in told["targets"].items():
        out.append(
            f"{name:44} {each['executions']:>10,} {each['per_cpu_second']:>9,} {each['accepted']:>9,} "
            f"{each['accepted_outcomes']:>6} {each['refusals']:>8} {each['slowest_ms']:>6} ms"
            + ("  FAILED" if each["failures"] else "")
        )
    if told["bugs"]:
        out += ["", f"{'planted bug':18} {'target':28} {'found after':>11} {'within':>8}  what"]
        for name, each in sorted(told["bugs"].items()):
            after = f"{each['executions']:,}" if each["found"] else "NOT FOUND"
            out.append(f"{name:18} {each['target']:28} {after:>11} {each['within']:>8,}  {each['what']}")
    if told["refusals_not_reached"]:
        out += ["", "Refusals in covered functions that the traced inputs did not reach:"]
        out += [f"  {each}" for each in told["refusals_not_reached"]]
    for failure in told["failures"]:
        out += [
            "",
            f"FAILURE {failure['target']}: {failure['problem']}",
            f"  again: make fuzz FUZZ_ARGS=\"--target '{failure['target']}' --seed {failure['seed']} "
            f'--iteration {failure["iteration"]}"',
            f"  small: {failure['file']}",
        ]
    out += [f"PROBLEM {each}" for each in told["problems"]]
    return "\n".join(out) + "\n"


def commit() -> str:
    """The commit that was fuzzed, with a mark if the tree differs from it."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


# --- one input, the corpus ---


def again(target: Target, data: bytes) -> int:
    """What one input does; the exit status is 1 if that must not be."""
    sys.stdout.write(f"{target.name}: {len(data)} bytes: {data.hex()[:2000]}\n")
    problem = driver._problem(target, data)
    if not problem:
        outcome = driver.execute(target, data)
        sys.stdout.write(f"{'accepted' if outcome.accepted else 'refused'}: {outcome.reason}\n")
        return 0
    small = driver.minimise_failure(target, data)
    sys.stdout.write(f"FAILURE: {problem}\nsmall: {len(small)} bytes: {small.hex()[:2000]}\n")
    return 1


def replay(targets: Sequence[Target]) -> int:
    """Every sample and every input of the corpus once; one JSON line of what was found."""
    failures, executions = [], 0
    known = {driver.folder_name(each.name) for each in _targets.values()}
    strays = sorted(path.name for path in driver.CORPUS.iterdir() if path.name not in known)
    for target in targets:
        for data in [*target.seeds(), *driver.corpus_of(target.name)]:
            executions += 1
            problem = driver._problem(target, data)
            if problem:
                failures.append(f"{target.name}: {problem}: {data.hex()[:400]}")
    every = list(_targets.values())
    missing = inventory.uncovered(every, inventory.sources(inventory.PACKAGES))
    missing += inventory.uncovered_natives(every, inventory.natives(inventory.PACKAGES))
    told = {
        "executions": executions,
        "failures": failures,
        "strays": strays,
        "uncovered": missing,
        "targets": len(targets),
    }
    sys.stdout.write(json.dumps(told) + "\n")
    return 1 if failures or missing else 0


def collect(targets: Sequence[Target], seed: int, most: int) -> None:
    """Add to the corpus what gives an outcome that samples and corpus do not."""
    total = 0
    for target in targets:
        if target.name.startswith(("store/file", "token/")):
            continue
        found = driver.collect(target, seed, 1, min(most, 3) if target.name.startswith("codec/") else most)
        kept = []
        for reason, data in found.items():
            kept.append(driver.minimised(data, lambda each, t=target, r=reason: reason_of(t, each) == r, 400))
        total += driver.write_corpus(target.name, kept)
        sys.stderr.write(f"{target.name}: {len(kept)} inputs\n")
    sys.stderr.write(f"{total} bytes\n")


def reason_of(target: Target, data: bytes) -> str:
    """The outcome of an input in a word."""
    try:
        outcome = driver.execute(target, data)
    except driver.Finding as finding:
        return f"! {finding}"
    return f"+ {outcome.reason}" if outcome.accepted else outcome.reason


def main() -> int:
    """Do what the command line says; the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=int(datetime.now(UTC).strftime("%Y%m%d")), help="by default today's date"
    )
    parser.add_argument("--executions", type=int, default=EXECUTIONS, help="in all, over the targets by their weights")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--target", default="", help="this one alone")
    parser.add_argument("--iteration", type=int, help="make this input of the target again")
    parser.add_argument("--file", type=Path, help="take this file as an input of the target")
    parser.add_argument("--no-bugs", dest="bugs", action="store_false", help="plant no bugs")
    parser.add_argument("--trace", type=int, default=TRACED, help="inputs of each target to trace; 0: none")
    parser.add_argument("--progress", type=float, default=15.0, help="seconds between lines of progress")
    parser.add_argument("--replay", action="store_true", help="samples and corpus alone")
    parser.add_argument(
        "--collect", type=int, default=0, metavar="N", help="add at most N inputs of each target to the corpus"
    )
    parser.add_argument("--list", action="store_true", help="the targets and what they cover")
    options = parser.parse_args()
    if options.iteration is None and options.file is None and not (options.replay or options.collect or options.list):
        return run_all(options)
    prepare()
    if options.target and options.target not in _targets:
        parser.error(f"no target {options.target!r}; --list shows them")
    chosen = [_targets[options.target]] if options.target else list(_targets.values())
    if options.list:
        for each in chosen:
            sys.stdout.write(f"{each.name:44} {', '.join(each.covers)}\n")
        return 0
    if options.collect:
        collect(chosen, options.seed, options.collect)
        return 0
    if options.replay:
        return replay(chosen)
    if not options.target:
        parser.error("--iteration and --file need --target")
    target = chosen[0]
    target.seeds()
    return again(
        target, options.file.read_bytes() if options.file else driver.nth_input(target, options.seed, options.iteration)
    )


if __name__ == "__main__":
    os.environ.setdefault("PYTHONHASHSEED", "0")  # for the workers; nothing here depends on it, and so it stays
    sys.exit(main())
