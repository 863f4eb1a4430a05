"""``keyquorum attack``: attacks on a running cluster of one's own, and the report of what was seen."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import click

from engine.attack import ATTACKS, Options, Report, Result, Target, Verdict, attack_cluster, choose, load_target
from engine.attack.model import DURATION_MAX_S, IDLE_MAX, RATE_MAX
from engine.attack.target import PREFIX, Leaver
from engine.cli.output import Settings, client_config, common_options, emit, note, start_logging, table
from engine.client.client import connect, load_settings
from engine.client.local import LocalCluster
from engine.protocol.manifest import PolicyRule

__all__ = ["attack"]

START_S: Final = 180.0
GOT_THROUGH: Final = 3
"""Exit code: an attack got through, or harmed the cluster."""
UNDECIDED: Final = 2
LOCAL_RULES: Final = (
    PolicyRule("local", "*", ["*"]),
    PolicyRule("attacker", PREFIX + "*", ["*"]),
    PolicyRule("neighbour", PREFIX + "*", ["encrypt", "decrypt"]),
)
_DEFAULT: Final = Options()


@click.command()
@click.option("--local", is_flag=True, help="Start a cluster for it on this machine, attack that, and remove it.")
@click.option("--second-client", metavar="FILE", help="Another client's configuration, for what crosses clients.")
@click.option(
    "--node-identity",
    "node_identities",
    metavar="FILE",
    multiple=True,
    help="identity.toml of a node, to play one that was taken over; may be given again.",
)
@click.option("--pid", "pids", metavar="NAME=PID", multiple=True, help="A member's process here, to watch its memory.")
@click.option("--allow-remote", is_flag=True, help="Attack a cluster that is not on loopback; needs --cluster.")
@click.option("--cluster", metavar="NAME", default="", help="The cluster's name, typed, as a safeguard.")
@click.option("--quick", is_flag=True, help="Fewer cases, shorter floods: some 30 s.")
@click.option("--only", metavar="ATTACK", multiple=True, help="Only these, by id, group or glob; may be given again.")
@click.option("--skip", metavar="ATTACK", multiple=True, help="All but these; may be given again.")
@click.option(
    "--rate", type=click.IntRange(1, RATE_MAX), default=_DEFAULT.rate, show_default=True, help="Of a flood, per s."
)
@click.option("--duration", type=click.FloatRange(0.1, DURATION_MAX_S), help="Of a flood, in s [default: 3, quick 1].")
@click.option(
    "--idle",
    type=click.IntRange(1, IDLE_MAX),
    default=_DEFAULT.idle,
    show_default=True,
    help="Idle connections at a time.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**32), default=_DEFAULT.seed, show_default=True, help="Of what is chosen."
)
@click.option("--report", metavar="FILE", help="Write FILE.md and FILE.json; their folder is made.")
@click.option("--list", "listing", is_flag=True, help="List the attacks and stop.")
@common_options(connects=True)
@click.pass_obj
@click.pass_context
def attack(
    context: click.Context,
    settings: Settings,
    local: bool,
    second_client: str | None,
    node_identities: tuple[str, ...],
    pids: tuple[str, ...],
    allow_remote: bool,
    cluster: str,
    quick: bool,
    only: tuple[str, ...],
    skip: tuple[str, ...],
    rate: int,
    duration: float | None,
    idle: int,
    seed: int,
    report: str | None,
    listing: bool,
) -> None:
    """Attack a running cluster of your own, and report what was seen.

    It plays strangers, clients and, with --node-identity, a node that was taken over, with bounded counts and times.
    Its keys are named keyquorum-attack/... and destroyed at the end; the policy must allow the client those. A cluster
    that is not on this machine's loopback is refused without --allow-remote and --cluster NAME.

    \b
    Examples:
      keyquorum attack --local
      keyquorum attack --config client.toml --second-client other.toml --report reports/2026-01-31
      keyquorum attack --only grants --only 'transport.*' --quick

    Exit codes: 0 every attack that was run held, 1 your mistake, 2 it could not be run or decided, 3 an attack got
    through.
    """
    if listing:
        _list(settings)
        return
    seconds = duration if duration is not None else 1.0 if quick else _DEFAULT.duration_s
    options = Options(seed, rate, seconds, idle, quick, only, skip)
    choose(options)
    start_logging(settings)
    place = _report_place(report)
    with ExitStack() as stack:
        if local:
            if second_client or node_identities or pids or allow_remote or settings.config:
                raise click.UsageError("--local brings its own identities")
            target = stack.enter_context(_local_target(settings))
        else:
            target = load_target(
                client_config(settings),
                second=second_client,
                node_identities=node_identities,
                pids=_pids(pids),
                allow_remote=allow_remote,
                cluster=cluster,
            )
        told = attack_cluster(target, options, lambda result: _tell(settings, result))
    if place is not None:
        _write(told, place)
    emit(settings, told.to_json(), _summary(told, place))
    if told.count(Verdict.FAILED):
        context.exit(GOT_THROUGH)
    if told.count(Verdict.UNDECIDED):
        context.exit(UNDECIDED)


def _list(settings: Settings) -> None:
    rows = [
        (each.id, each.title, ", ".join(sorted(each.needs)) or "-", "no" if each.slow else "yes") for each in ATTACKS
    ]
    value = [
        {
            "id": each.id,
            "title": each.title,
            "wants": each.wants,
            "must": each.must,
            "reference": each.reference,
            "needs": sorted(each.needs),
            "quick": not each.slow,
        }
        for each in ATTACKS
    ]
    table(settings, ("ATTACK", "WHAT IT IS", "NEEDS", "QUICK"), rows, value)


def _pids(given: tuple[str, ...]) -> dict[str, int]:
    found = {}
    for each in given:
        name, equals, number = each.partition("=")
        if not (name and equals and number.isdecimal()):
            raise click.UsageError(f"--pid {each}: NAME=PID is needed")
        found[name] = int(number)
    return found


def _report_place(report: str | None) -> Path | None:
    """Where the reports go, tried before anything is attacked."""
    if report is None:
        return None
    path = Path(report)
    if path.suffix in (".md", ".json"):
        path = path.with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        return path


def _write(report: Report, place: Path) -> None:
    texts = {
        ".md": report.to_markdown(),
        ".json": json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n",
    }
    for suffix, text in texts.items():
        # Not with_suffix: a name may hold a date with dots.
        final = place.with_name(place.name + suffix)
        temporary = final.with_name(f".{final.name}.new")
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        os.replace(temporary, final)


def _tell(settings: Settings, result: Result) -> None:
    if settings.json:
        return
    tail = f": {result.reason}" if result.reason else f", {result.trial.tried} cases"
    note(f"{result.verdict:>9}  {result.attack.id} ({result.seconds:.1f} s){tail}")


def _summary(report: Report, place: Path | None) -> str:
    lines = [f"cluster {report.cluster}, serial {report.serial}: {report.summary}"]
    if report.leftovers:
        lines.append(f"keys that could not be destroyed: {', '.join(report.leftovers)}")
    lines.append(f"digest {report.to_json()['digest']}")
    if place is not None:
        lines.append(f"report: {place}.md and {place.name}.json")
    return "\n".join(lines)


@contextmanager
def _local_target(settings: Settings) -> Iterator[Target]:
    """A cluster of five nodes with an attacker, a neighbour, and a key that is neither's."""
    tell: Any = (lambda text: None) if settings.json else note
    clients = ("local", "attacker", "neighbour", "leaver")
    begun = time.monotonic()
    with LocalCluster(5, 3, clients=clients, rules=LOCAL_RULES, start_timeout_s=START_S, on_event=tell) as running:
        with connect(running.client_config) as kq:
            kq.create_key("payroll", "aes-256-gcm", threshold=3, shares=5)
        tell(f"a cluster for the attacks is up ({time.monotonic() - begun:.1f} s)")
        yield load_target(
            running.client_config_of("attacker"),
            second=running.client_config_of("neighbour"),
            node_identities=[running.path / "nodes" / node / "identity.toml" for node in running.nodes[:2]],
            pids={name: pid for name, pid in running.serving().items() if pid},
            leaver=Leaver(
                load_settings(running.client_config_of("leaver")),
                lambda: _remove(running, "leaver"),
            ),
        )


def _remove(running: LocalCluster, name: str) -> None:
    running.sign_manifest([member for member in running.cluster.members.values() if member.name != name])
