"""Owns the table of the balancer: its forecast, programs and ticks, and routing in simulated time, beside their peers.

``python bench/control_loop.py`` prints it and writes ``build/bench/balancer.json``; ``--only`` takes a part of it, and
``--play`` one scenario of the simulator with every policy. All of it runs in one process, on one core.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Final

import click
import forecasting
import placement
import simulator
from balancing.plays import PLAYS
from balancing.policies import POLICIES
from figures import Row, show, write
from rig import machine

OUTPUT: Final = Path(__file__).parents[1] / "build" / "bench" / "balancer.json"
PARTS: Final = ("forecast", "programs", "simulator")


def measure(part: str, quick: bool, validation: bool) -> list[Row]:
    """The rows of one part."""
    begun = time.monotonic()

    def tell(text: str) -> None:
        click.echo(f"[{time.monotonic() - begun:4.0f} s] {text}")

    if part == "programs":
        return placement.rows(quick)
    where = "validation" if validation else "test"
    return (forecasting if part == "forecast" else simulator).rows(quick, part=where, tell=tell)


@click.command()
@click.option("--quick", is_flag=True, help="A smoke run: figures that mean little.")
@click.option("--only", type=click.Choice(PARTS), multiple=True, help="These parts alone.")
@click.option("--validation", is_flag=True, help="The part of the traces on which choices are made, not the test part.")
@click.option("--play", type=click.Choice(sorted(PLAYS)), help="One scenario of the simulator with every policy.")
@click.option("--seed", type=int, default=simulator.FIRST_SEED, show_default=True, help="The seed for --play.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=OUTPUT, help="Where the rows go.")
def main(quick: bool, only: tuple[str, ...], validation: bool, play: str | None, seed: int, output: Path) -> None:
    """Measure the balancer beside its peers."""
    if play:
        stage = simulator.Stage(replace(PLAYS[play](), validation=validation), seed)
        for policy in POLICIES:
            click.echo(f"{policy:30} {simulator.told(stage.play(policy))}")
        return
    click.echo(f"machine: {machine()}")
    begun = time.monotonic()
    rows: list[Row] = []
    for part in only or PARTS:
        found = measure(part, quick, validation)
        show(f"the balancer: {part}", found)
        rows += found
        write(rows, output)
    missed = [row.name for row in rows if row.met is False]
    click.echo(f"{len(rows)} rows in {output}, {time.monotonic() - begun:.0f} s; missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
