"""A benchmark's figures beside their peers and targets: how they are kept, printed and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["Row", "show", "write"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure; a ``target`` is the most that the ratio may be, or the value where there is no ratio."""

    name: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    target: float | None = None
    stretch: float | None = None
    met: bool | None = None
    stretch_met: bool | None = None


def show(title: str, told: Sequence[Row]) -> None:
    """Print the table."""
    table = Table(title=title)
    for column in ("what", "value", "peer", "ratio", "must", "stretch", ""):
        table.add_column(column, justify="left" if column in ("what", "") else "right")
    for row in told:
        verdict = "" if row.met is None else "[green]met[/green]" if row.met else "[red]missed[/red]"
        table.add_row(
            row.name,
            f"{row.value:,.4g} {row.unit}",
            "-" if row.peer_value is None else f"{row.peer_value:,.4g} ({row.peer})",
            "-" if row.ratio is None else f"{row.ratio:.4f}",
            "-" if row.target is None else f"{row.target:g}",
            "-" if row.stretch is None else f"{row.stretch:g}",
            "[bold green]stretch[/bold green]" if row.stretch_met else verdict,
        )
    Console(width=170).print(table)


def write(told: Sequence[Row], path: Path) -> None:
    """Write the rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(row) for row in told], indent=1) + "\n", encoding="utf-8")
