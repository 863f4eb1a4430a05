"""Owns the plots of docs/balancer.md: figures over their targets, a forecast beside what came, and courses of time.

``python bench/plot_balancer.py`` draws them from ``build/bench/balancer.json`` (``make bench-balancer``) and from a few
runs of its own, and writes docs/balancer-*.svg; it needs the extra ``docs``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from balancing.plays import death, shift
from forecasting import load_series, snapshot
from simulator import FIRST_SEED, OWN, TWO_OWN, Stage

mpl.use("svg")
from matplotlib import pyplot as plt  # the backend is chosen first

from balancer.forecast import predict_load

ROOT: Final = Path(__file__).parents[1]
ROWS: Final = ROOT / "build" / "bench" / "balancer.json"
DOCS: Final = ROOT / "docs"
SERIES: Final = "servegen_synth_1s:mid/1s"
TICKS: Final = 180
LEARNT: Final = 1800


def save(figure: Any, name: str) -> None:
    """The same figures give the same file."""
    figure.tight_layout()
    figure.savefig(DOCS / f"balancer-{name}.svg", metadata={"Date": None})
    plt.close(figure)
    print(DOCS / f"balancer-{name}.svg")


def targets(rows: list[dict[str, Any]]) -> None:
    """Each figure that has a target as a part of it: what is left of the line is met."""
    told = [row for row in rows if row["target"]]
    parts = [
        (row["value"] if row["ratio"] is None or row["unit"] == "%" else row["ratio"]) / row["target"] for row in told
    ]
    figure, axis = plt.subplots(figsize=(10, 0.32 * len(told) + 1.2))
    colours = ["tab:green" if row["stretch_met"] else "tab:blue" if row["met"] else "tab:red" for row in told]
    axis.barh(range(len(told)), np.maximum(parts, 1e-3), color=colours)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set(
        yticks=range(len(told)),
        yticklabels=[row["name"] for row in told],
        xlabel="part of what is allowed (must)",
        xlim=(0, 2),
    )
    axis.invert_yaxis()
    save(figure, "targets")


def policies(rows: list[dict[str, Any]]) -> None:
    """Mean latency of every policy on both layouts."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, layout in zip(axes, ("rel", "comp"), strict=True):
        head = f"steady, {layout}: "
        found = {"Keyquorum's router": next(r["value"] for r in rows if r["name"] == f"{head}mean / perfect knowledge")}
        for row in rows:
            if row["name"].startswith(f"{head}mean of "):
                found[row["name"].removeprefix(f"{head}mean of ").partition(", unstable")[0]] = row["value"]
        order = sorted(found, key=lambda name: found[name])
        axis.bar(
            order,
            [found[name] for name in order],
            color=["tab:green" if "Keyq" in name else "tab:gray" for name in order],
        )
        axis.set(title=f"unequal nodes, {layout}", yscale="log")
        axis.tick_params(axis="x", rotation=75)
    axes[0].set_ylabel("mean latency (ms)")
    save(figure, "policies")


def forecast() -> None:
    """One second ahead, on a trace: median, P90 and what came."""
    series = next(each for each in load_series(Path(__file__).parent / "traces") if each.name == SERIES)
    begin = len(series.counts) * 7 // 10
    state, told, high = None, [], []
    for tick in range(begin, begin + TICKS):
        found = predict_load(snapshot(series.counts[tick - LEARNT : tick, None], 1000), state)
        state = found.state
        told.append(found.outlook.median[0, 0])
        high.append(found.outlook.p90[0, 0])
    figure, axis = plt.subplots(figsize=(10, 3.5))
    seconds = np.arange(TICKS)
    axis.plot(seconds, series.counts[begin : begin + TICKS], color="black", linewidth=0.8, label="came")
    axis.plot(seconds, told, color="tab:green", label="median, said a second before")
    axis.fill_between(seconds, told, high, color="tab:green", alpha=0.25, label="up to the P90")
    axis.set(title=SERIES, xlabel="s", ylabel="requests per second")
    axis.legend()
    save(figure, "forecast")


def course(name: str, title: str, stage: Stage, plays: dict[str, tuple[str, str]], bin_s: float, part: float) -> None:
    """A percentile of the latency over time, for each play (policy, moves)."""
    figure, axis = plt.subplots(figsize=(10, 3.5))
    edges = np.arange(0.0, stage.scenario.seconds, bin_s)
    for label, (policy, moves) in plays.items():
        outcome = stage.play(policy, moves)
        parts = [outcome.window(edge, edge + bin_s) for edge in edges]
        values = [
            1e3 * (each.mean() if not part else np.nanpercentile(each, part)) if len(each) else np.nan for each in parts
        ]
        axis.plot(edges, values, label=label)
    axis.set(title=title, xlabel="s", ylabel="p99 (ms)" if part else "mean (ms)", yscale="log")
    axis.legend()
    save(figure, name)


def main() -> None:
    """Draw all of them."""
    mpl.rcParams["svg.hashsalt"] = "keyquorum"
    rows = json.loads(ROWS.read_text(encoding="utf-8"))
    targets(rows)
    policies(rows)
    forecast()
    moves = {"no moves": (OWN, ""), "moves once it is hot": (OWN, "reactive"), "moves before": (OWN, "predictive")}
    course("shift", "a group is hot for 14 s, then another one", Stage(shift(60), FIRST_SEED), moves, 0.5, 0.0)
    ways = {"Keyquorum's router": (OWN, ""), "two choices": (TWO_OWN, "")}
    course("death", "a fast node dies", Stage(death(8), FIRST_SEED), ways, 0.1, 99.0)


if __name__ == "__main__":
    main()
