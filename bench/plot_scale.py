"""Owns the plot of docs/performance.md on scale: what grows with the keys, and what does not.

``python bench/plot_scale.py`` draws it from ``build/bench/scale.json`` (``make bench-scale``) and writes
docs/scale-growth.svg; it needs the extra ``docs``.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt  # the backend is chosen first

ROOT: Final = Path(__file__).parents[1]
ROWS: Final = ROOT / "build" / "bench" / "scale.json"
PLOT: Final = ROOT / "docs" / "scale-growth.svg"
PANELS: Final = {
    "a change of one key (ms)": (
        "a key is made",
        "a key gets a version",
        "a key is refreshed",
        "a key's settings are changed",
    ),
    "keys made, many at a time (keys/s)": ("keys made",),
    "all keys are listed (s)": ("all keys are listed", "all keys are listed, without any transport"),
    "clients and tables (ms)": (
        "client process, from its start to its first answer",
        "routing table, from its making until 8 clients have it",
        "tick of the balancer",
        "plan of where the groups go",
    ),
    "memory (MiB)": ("memory of a node", "memory of the balancer"),
    "disk (MiB)": ("disk of a node", "disk of the registry"),
}


def courses(rows: Path) -> dict[str, list[tuple[int, float]]]:
    """By what was measured: the numbers of keys and the values, in order; the nodes are told beside it."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in json.loads(rows.read_text(encoding="utf-8")):
        told = re.fullmatch(r"(\d+ nodes), ([\d,]+) keys: (.*)", row["name"])
        if told is not None:
            found[f"{told[3]}|{told[1]}"].append((int(told[2].replace(",", "")), row["value"]))
    return {name: sorted(each) for name, each in found.items()}


def main() -> None:
    """Draw it."""
    mpl.rcParams["svg.hashsalt"] = "keyquorum"
    found = courses(ROWS)
    figure, axes = plt.subplots(3, 2, figsize=(11, 11))
    for axis, (title, names) in zip(axes.flat, PANELS.items(), strict=True):
        for name, course in found.items():
            what, _, nodes = name.partition("|")
            if what in names:
                axis.plot(*zip(*course, strict=True), marker="o", markersize=3, label=f"{what} ({nodes})")
        axis.set(title=title, xlabel="keys", xscale="log")
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    print(PLOT)


if __name__ == "__main__":
    main()
