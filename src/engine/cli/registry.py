"""``keyquorum registry``: look after the registry of keys, at a balancer."""

from __future__ import annotations

import subprocess
import sys

import click

from engine.cli.output import Settings, common_options, emit
from engine.errors import ConfigError, RegistryUnavailable

__all__ = ["registry"]


@click.group(no_args_is_help=True)
def registry() -> None:
    """Look after the registry of keys, which is a balancer's.

    \b
    Examples:
      keyquorum registry rebuild /etc/keyquorum/bal/balancer.toml
      keyquorum registry rebuild /etc/keyquorum/bal/balancer.toml --backup backup-2026-12
    """


@registry.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False))
@click.option("--without", "left_out", multiple=True, metavar="NODE", help="Do without a node that does not answer.")
@click.option(
    "--backup",
    "folder",
    type=click.Path(exists=True, file_okay=False),
    help="What is in this backup counts too, as what its nodes tell.",
)
@common_options()
@click.pass_obj
def rebuild(settings: Settings, config: str, left_out: tuple[str, ...], folder: str | None) -> None:
    """Take what the nodes keep into the registry of the balancer of CONFIG (its balancer.toml).

    For one that was lost, or put back to an older state: the nodes keep each key's signed manifest and certificate,
    what destroyed it, and its settings. All nodes must answer; the balancers are stopped meanwhile.
    """
    words = [sys.executable, "-P", "-m", "balancer", "--config", config, "--rebuild"]
    words += [f"--without={each}" for each in left_out]
    words += [f"--backup={folder}"] if folder else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        kind = ConfigError if done.returncode == 1 else RegistryUnavailable
        told = (done.stderr.strip().splitlines() or ["it ended without a word"])[-1]
        raise kind(told.removeprefix("balancer: "))
    lines = done.stdout.strip().splitlines()
    emit(settings, {"told": lines}, "\n".join(lines))
