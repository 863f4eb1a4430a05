"""Runs the benchmarks and holds their ratios to floors of the same run against the committed baseline.

``python bench/compare.py`` compares and exits 1 on a regression; ``--save`` writes the baseline anew, ``--add`` puts
what it lacks into it. A benchmark names its floors in ``extra_info["floor"]`` (their medians add up) and, if it does
several operations a round, their number in ``extra_info["operations"]``. Saved times of another machine say nothing;
ratios carry over, within a tolerance.

Everything is measured twice, first of all as a control: what two runs of the same code differ by is noise. A ratio
counts as a regression where the better one of both runs is worse than the baseline by more than that benchmark's
tolerance.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from engine.sharing import available_kernels

HERE = Path(__file__).parent
BASELINE = HERE / "baseline.json"
OUTPUT = HERE.parent / "build" / "bench"
KERNELS = ("gfni512", "gfni256", "avx2", "neon")
"""Kernels that not every CPU has, as they stand in the names of benchmarks."""
TOLERANCE_MAX = 2.0
"""A ratio more than this many times the baseline's is a regression on the noisiest machine."""
TOLERANCE_MIN = 1.3
"""A ratio within this many times the baseline's is none on the quietest one."""


def tolerance(noise: float, usual: float) -> float:
    """The tolerance of a benchmark whose two runs differ by the factor ``noise``, and most by less than ``usual``.

    The baseline is of another day, so the noise counts twice.
    """
    return min(TOLERANCE_MAX, max(TOLERANCE_MIN, noise**2, usual))


def measure(selection: str) -> dict[str, Any]:
    """Run the benchmarks that match and return pytest-benchmark's report."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    report = OUTPUT / "compare-run.json"
    command = [sys.executable, "-m", "pytest", str(HERE), "-q", "--benchmark-enable", "--benchmark-only"]
    command += ["--benchmark-disable-gc", "--benchmark-columns=median,iqr", f"--benchmark-json={report}"]
    ended = subprocess.run([*command, "-k", selection] if selection else command, check=False)
    if ended.returncode:
        raise click.ClickException(f"the benchmarks failed (pytest's exit code {ended.returncode})")
    loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return loaded


def ratios(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Benchmark -> its median in microseconds an operation, its floor's, and their ratio."""
    medians = {_short(each["fullname"]): each["stats"]["median"] * 1e6 for each in report["benchmarks"]}
    found = {}
    for each in report["benchmarks"]:
        floors = each["extra_info"].get("floor")
        if not floors:
            continue
        missing = [name for name in floors if name not in medians]
        if missing:
            raise click.ClickException(f"{each['fullname']}: its floor {missing[0]} was not measured")
        value = medians[_short(each["fullname"])] / each["extra_info"].get("operations", 1)
        floor = sum(medians[name] for name in floors)
        found[_short(each["fullname"])] = {"value": value, "floor": floor, "ratio": value / floor}
    return found


def _short(fullname: str) -> str:
    return fullname.rpartition("/")[2]


def merge(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Two runs of the same code: of each benchmark the better ratio, and by what factor both differ (``noise``)."""
    found = {}
    for name in sorted(set(first) & set(second)):
        better, worse = sorted((first[name], second[name]), key=lambda each: each["ratio"])
        found[name] = {**better, "noise": worse["ratio"] / better["ratio"]}
    return found


def usual_noise(now: dict[str, dict[str, float]]) -> float:
    """What nine of ten benchmarks differ by at most."""
    noises = sorted(each["noise"] for each in now.values())
    return noises[min(len(noises) - 1, int(0.9 * len(noises)))] if noises else 1.0


def rows(now: dict[str, dict[str, float]], baseline: dict[str, float]) -> list[dict[str, Any]]:
    """One row a benchmark, as ``build/bench/compare.json`` has them."""
    found = []
    usual = usual_noise(now)
    for name, each in sorted(now.items()):
        before = baseline.get(name)
        bound = tolerance(each["noise"], usual)
        found.append(
            {
                "name": name,
                "value": round(each["value"], 3),
                "unit": "us",
                "peer": "floor of the same run",
                "peer_value": round(each["floor"], 3),
                "ratio": round(each["ratio"], 3),
                "noise": round(each["noise"], 3),
                "target": None if before is None else round(before * bound, 3),
                "met": before is None or each["ratio"] <= before * bound,
            }
        )
    return found


def show(found: list[dict[str, Any]], baseline: dict[str, float]) -> None:
    """Print the rows as a table."""
    table = Table(title="medians, and their ratios to floors of the same run")
    for column in ("benchmark", "µs", "floor µs", "ratio", "A/A", "baseline", "at most", "verdict"):
        table.add_column(column, justify="left" if column == "benchmark" else "right", no_wrap=True)
    for row in found:
        before = baseline.get(row["name"])
        verdict = "new" if before is None else "ok" if row["met"] else "[red]slower[/red]"
        numbers = [f"{row[each]:.2f}" for each in ("value", "peer_value", "ratio", "noise")]
        numbers += ["-", "-"] if before is None else [f"{before:.2f}", f"{row['target']:.2f}"]
        table.add_row(escape(row["name"]), *numbers, verdict)
    Console(width=160).print(table)


@click.command()
@click.option("--save", is_flag=True, help="Write the measured ratios as the new baseline.")
@click.option("--add", is_flag=True, help="Write those of benchmarks that the baseline lacks into it; the others stay.")
@click.option("-k", "selection", default="", help="Only benchmarks that match, as pytest's -k.")
def main(save: bool, add: bool, selection: str) -> None:
    """Compare the benchmarks' ratios with the committed baseline; exit code 1 on a regression."""
    now = merge(ratios(measure(selection)), ratios(measure(selection)))
    baseline = {} if save else json.loads(BASELINE.read_text(encoding="utf-8"))
    found = rows(now, baseline)
    show(found, baseline)
    (OUTPUT / "compare.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if save or add:
        saved = {row["name"]: row["ratio"] for row in found} | baseline
        BASELINE.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    elif not selection:
        lost = sorted(set(baseline) - set(now))
        absent = [name for name in lost if any(kernel in name for kernel in set(KERNELS) - set(available_kernels()))]
        if absent:
            click.echo(f"NOT RUN, since this CPU lacks the kernel: {', '.join(absent)}")
        if set(lost) - set(absent):
            raise click.ClickException(f"benchmarks of the baseline did not run: {', '.join(set(lost) - set(absent))}")
    if not all(row["met"] for row in found):
        raise click.exceptions.Exit(1)


if __name__ == "__main__":
    main()
