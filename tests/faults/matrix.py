"""The fault matrix: every fault with every seed on real processes, a table while it runs, and a report at the end.

``matrix.py --only NAME --seed N`` runs one again; ``--list`` names the faults. The exit code is 1 if a row failed, 2 if
none could run. What this machine can't play is listed as not run, never as passed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "shim"))

import faults_balancers
import faults_clocks
import faults_loads
import faults_networks
import faults_processes
import faults_storage
import faults_tokens
from controls import CONTROLS, try_control
from course import Fault, Row, Session, carry_out, close_session, make_session
from harness import lacks, machine, own_network

ROOT = Path(__file__).parents[2]
REPORT = ROOT / "build" / "faults"
DOCS = ROOT / "docs" / "faults.md"
MARKS = "<!-- begin: written by matrix.py --docs -->\n", "<!-- end -->\n"
SEEDS = 5
FILES = 65_536
SESSION_RUNS = 60
"""After so many runs a cluster is replaced by a fresh one, so that no run depends on a long past."""
FAULTS: list[Fault] = [
    *faults_processes.FAULTS,
    *faults_networks.FAULTS,
    *faults_storage.FAULTS,
    *faults_clocks.FAULTS,
    *faults_tokens.FAULTS,
    *faults_loads.FAULTS,
    *faults_balancers.FAULTS,
]

STOP = threading.Event()
Tell = Callable[[str], None]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Sessions:
    """The cluster in use, made when first needed and replaced when a run asks for a fresh one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._current: Session | None = None
        self._number = 0

    def get(self, kind: str) -> Session:
        if self._current is not None and (self._current.kind != kind or self._current.serial >= SESSION_RUNS):
            self.drop()
        if self._current is None:
            self._number += 1
            self._current = make_session(kind, self._folder / f"{kind}-{self._number}", self._number)
        return self._current

    def drop(self) -> None:
        if self._current is not None:
            session, self._current = self._current, None
            try:
                close_session(session)
            finally:
                shutil.rmtree(session.cluster.path, ignore_errors=True)


def run_all(faults: Sequence[Fault], seeds: Sequence[int], folder: Path, rows: list[Row], tell: Tell = say) -> None:
    """Run them, those of one kind of cluster in a row; one in a network of its own in a thread of its own.

    The rows are added as they come, so that they are there also after Ctrl-C.
    """
    kinds = list(dict.fromkeys(fault.session for fault in faults))
    for kind in kinds:
        chosen = [fault for fault in faults if fault.session == kind]
        if kind == "namespace":
            _in_own_network(partial(_run_kind, chosen, seeds, folder, rows, tell))
        else:
            _run_kind(chosen, seeds, folder, rows, tell)


def _in_own_network(work: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def inside() -> None:
        try:
            own_network()
            work()
        except BaseException as error:  # it is raised again where it can be seen
            failed.append(error)

    thread = threading.Thread(target=inside, name="namespace")
    thread.start()
    try:
        thread.join()
    except BaseException:  # Ctrl-C comes to this thread, and the other one must undo its fault
        STOP.set()
        thread.join()
        raise
    if failed:
        raise failed[0]


def _run_kind(faults: Iterable[Fault], seeds: Sequence[int], folder: Path, rows: list[Row], tell: Tell) -> None:
    sessions = Sessions(folder)
    try:
        for fault in faults:
            missing = "; ".join(why for need in fault.needs if (why := lacks(need)))
            for seed in seeds:
                if STOP.is_set():
                    return
                if missing:
                    row = Row(fault.name, fault.group, seed, fault.expected, f"not run: {missing}", "not run")
                else:
                    row = _run_one(fault, seed, sessions)
                rows.append(row)
                tell(line(row))
    finally:
        sessions.drop()


def _run_one(fault: Fault, seed: int, sessions: Sessions) -> Row:
    try:
        session = sessions.get(fault.session)
    except Exception as error:  # no cluster, no run: the row failed, and the next one tries again
        told = f"no cluster could be made: {type(error).__name__}: {str(error)[:400]}"
        return Row(fault.name, fault.group, seed, fault.expected, told, "FAILED", findings=[f"sick: {told}"])
    row = carry_out(fault, seed, session)
    if row.sick or fault.fresh or row.verdict == "FAILED":
        keep_logs(sessions, row)
        sessions.drop()
    return row


def run_controls(folder: Path, tell: Tell = say) -> list[Row]:
    """Every planted bug; a row is ``noticed`` or ``UNNOTICED``."""
    rows: list[Row] = []
    sessions = Sessions(folder)
    try:
        for control in sorted(CONTROLS, key=lambda each: bool(each.bug)):
            rows.append(try_control(control, sessions.get("plain")))
            if rows[-1].sick:
                sessions.drop()
            tell(line(rows[-1]))
    finally:
        sessions.drop()
    return rows


def keep_logs(sessions: Sessions, row: Row) -> None:
    """What the members logged in a run that failed, under ``build/faults/logs``."""
    session = sessions._current
    if session is None or row.verdict == "survived":
        return
    target = REPORT / "logs" / f"{row.fault}-{row.seed}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for log in (session.cluster.path / "run").glob("*.log"):
        shutil.copy(log, target / log.name)


def line(row: Row) -> str:
    """One line of the table, and one for each finding."""
    text = f"{row.verdict:8} {row.fault:26} seed {row.seed}  {row.seconds:5.1f} s  {row.seen}"
    return "\n".join([text, *(f"           {finding}" for finding in row.findings)])


# --- the report ---


def commit() -> str:
    """What was tested."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def report(rows: Sequence[Row], controls: Sequence[Row], seconds: float) -> dict[str, Any]:
    """The whole outcome, as it is written to report.json."""
    return {
        "commit": commit(),
        "machine": machine(),
        "seconds": round(seconds),
        **totals([asdict(row) for row in rows]),
        "rows": [asdict(row) for row in rows],
        "controls": [asdict(row) for row in controls],
    }


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rows come to together."""
    sums = {name: sum(row[name] for row in rows) for name in ("acknowledged", "lost", "wrong", "operations")}
    return {
        "runs": len(rows),
        "faults": len({row["fault"] for row in rows}),
        "verdicts": dict(Counter(row["verdict"] for row in rows)),
        **sums,
    }


def table(told: dict[str, Any], faults: Sequence[Fault] = FAULTS, *, whole: bool = False) -> str:
    """The report as Markdown, one row a fault, all its seeds together; ``whole`` has what was left out too."""
    verdicts = ", ".join(f"{number} {verdict}" for verdict, number in told["verdicts"].items())
    lines = [
        f"{told['faults']} faults, {told['runs']} runs in {told['seconds'] / 60:.0f} minutes: {verdicts}. "
        f"{told['operations']} operations of clients; {told['acknowledged']} keys acknowledged, {told['lost']} lost; "
        f"{told['wrong']} wrong results.",
        "",
        "| fault | what is done | expected | seen | verdict |",
        "|---|---|---|---|---|",
    ]
    for fault in faults:
        rows = [row for row in told["rows"] if row["fault"] == fault.name]
        if not rows and whole:
            lines.append(f"| {fault.name} | {fault.what} | {fault.expected} | left out of this run | - |")
        elif rows:
            lines.append(f"| {fault.name} | {fault.what} | {fault.expected} | {_seen(rows)} | {_verdict(rows)} |")
    if told["controls"]:
        lines += ["", "Planted bugs, which the matrix must notice:", "", "| bug | what | must be | seen | verdict |"]
        lines.append("|---|---|---|---|---|")
        whats = {control.name: control.what for control in CONTROLS}
        for row in told["controls"]:
            seen = (row["findings"] or ["nothing"])[0][:160].replace("|", "/").replace("\n", " ")
            lines.append(f"| {row['fault']} | {whats[row['fault']]} | {row['expected']} | {seen} | {row['verdict']} |")
    return "\n".join(lines) + "\n"


def _seen(rows: Sequence[dict[str, Any]]) -> str:
    if all(row["verdict"] == "not run" for row in rows):
        return str(rows[0]["seen"])
    errors: Counter[str] = Counter()
    for row in rows:
        errors.update(row["errors"])
    told = ", ".join(f"{number} {kind}" for kind, number in sorted(errors.items())) or "no errors"
    gap, whole = max(row["gap_s"] for row in rows), max(row["recovered_s"] for row in rows)
    lost, wrong = sum(row["lost"] for row in rows), sum(row["wrong"] for row in rows)
    text = f"{told} in {sum(row['operations'] for row in rows)} operations; longest gap {gap:.1f} s; "
    text += f"whole after {whole:.1f} s at most; {lost} lost, {wrong} wrong"
    findings = list(dict.fromkeys(finding[:160] for row in rows for finding in row["findings"]))
    return "; ".join([text, *findings[:2]]).replace("|", "/").replace("\n", " ")


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{number} {name}" for name, number in counts.items())


def write(told: dict[str, Any], folder: Path = REPORT) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(told, indent=1) + "\n")
    head = f"# Fault matrix\n\nCommit {told['commit']}; " + ", ".join(f"{k} {v}" for k, v in told["machine"].items())
    (folder / "report.md").write_text(f"{head}\n\n{table(told)}")


def write_docs(told: dict[str, Any], path: Path = DOCS) -> None:
    """Put the table of a report into the documentation."""
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    ran_on = f"{told['machine']['cpus']} CPUs, kernel {told['machine']['kernel'].partition('-')[0]}"
    head = f"Last run at commit {told['commit']} ({ran_on}).\n\n"
    path.write_text(f"{before}{MARKS[0]}\n{head}{table(told, whole=True)}\n{MARKS[1]}{after}")


def with_earlier(told: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """The report with the rows of an earlier one that were not run again: so a matrix may be run in parts."""
    again = {(row["fault"], row["seed"]) for row in told["rows"]}
    rows = [row for row in earlier["rows"] if (row["fault"], row["seed"]) not in again] + told["rows"]
    return told | {
        "commit": told["commit"] if told["commit"] == earlier["commit"] else f"{earlier['commit']} to {told['commit']}",
        "seconds": told["seconds"] + earlier["seconds"],
        "rows": rows,
        "controls": told["controls"] or earlier["controls"],
        **totals(rows),
    }


# --- the command ---


def chosen(only: str, group: str, quick: bool) -> list[Fault]:
    patterns = [each for each in only.split(",") if each]
    return [
        fault
        for fault in FAULTS
        if (not patterns or any(fnmatchcase(fault.name, pattern) for pattern in patterns))
        and (not group or fault.group in group.split(","))
        and (fault.quick or not quick)
    ]


def raise_limits() -> None:
    """Enough descriptors for us and what we start: the flood of idle connections needs them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < FILES and os.geteuid() == 0:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, FILES))
            hard = FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was chosen."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAMES", help="names of faults, as shell globs parted by commas")
    parser.add_argument("--group", default="", metavar="GROUPS", help="groups of faults, parted by commas")
    parser.add_argument("--seed", type=int, default=None, help="this seed alone")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"how many seeds each, {SEEDS} by default")
    parser.add_argument("--quick", action="store_true", help="the short list that make test runs")
    parser.add_argument("--controls", action="store_true", help="the planted bugs alone, which must be noticed")
    parser.add_argument("--no-controls", action="store_true", help="without the planted bugs")
    parser.add_argument("--add", action="store_true", help="add to the last report: for a matrix that is run in parts")
    parser.add_argument("--docs", action="store_true", help="put the last report into docs/faults.md, and end")
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    options = parser.parse_args(arguments)
    if options.docs:
        write_docs(json.loads((REPORT / "report.json").read_text()))
        return 0
    faults = chosen(options.only, options.group, options.quick)
    if not faults:
        parser.error(f"no fault fits --only {options.only!r} --group {options.group!r}; --list names all")
    if options.seeds < 1:
        parser.error(f"--seeds {options.seeds}: at least 1 is needed")
    if options.list:
        for fault in faults:
            say(f"{fault.name:26} {fault.group:10} {fault.what}")
        return 0
    seeds = [options.seed] if options.seed is not None else list(range(1, options.seeds + 1))
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    raise_limits()
    begun = time.monotonic()
    rows: list[Row] = []

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - begun:5.0f} s] {text}")

    folder = Path(tempfile.mkdtemp(prefix="keyquorum-faults-"))
    controls: list[Row] = []
    everything = not (options.only or options.group or options.quick)
    try:
        if not options.controls:
            run_all(faults, seeds, folder, rows, tell)
        if options.controls or (everything and not options.no_controls):
            controls = run_controls(folder, tell)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        told = report(rows, controls, time.monotonic() - begun)
        if options.add and (REPORT / "report.json").exists():
            told = with_earlier(told, json.loads((REPORT / "report.json").read_text()))
        write(told)
    say("\n" + table(told).split("\n", 1)[0])
    failed = [row for row in rows if row.verdict == "FAILED"]
    for row in failed:
        again = f'make faults FAULTS_ARGS="--only {row.fault} --seed {row.seed}"'
        say(f"FAILED: {row.fault} seed {row.seed}; once more by {again}")
    for name in dict.fromkeys(f"{row.fault}: {row.seen}" for row in rows if row.verdict == "not run"):
        say(f"NOT RUN: {name}")
    unnoticed = [row for row in controls if row.verdict != "noticed"]
    for row in unnoticed:
        say(f"UNNOTICED: the planted bug {row.fault}")
    say(f"the report is in {REPORT.relative_to(ROOT)}/report.md and report.json")
    if failed or unnoticed:
        return 1
    return 0 if any(row.verdict in ("survived", "noticed") for row in (*rows, *controls)) else 2


if __name__ == "__main__":
    sys.exit(main())
