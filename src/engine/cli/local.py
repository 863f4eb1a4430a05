"""``keyquorum up``, ``down`` and ``status``: a cluster of real processes in a folder of this machine, and how it is.

It starts and stops through ``LocalCluster`` and knows no token and no key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from rich.console import Console

from engine.cli.output import (
    Settings,
    client_config,
    common_options,
    emit,
    note,
    one_line,
    printable,
    start_logging,
    table,
)
from engine.client.calls import MemberStatus
from engine.client.client import connect
from engine.client.local import LocalCluster
from engine.errors import ClusterError
from engine.protocol.requests import STAGES, BalancerStatus, NodeStatus, StageLatency

__all__ = ["down", "state_of", "status", "troubles_of", "up"]

NODES: Final = 5
THRESHOLD: Final = 3
DOMAINS: Final = 3

_folder = click.argument(
    "folder", metavar="[DIR]", type=click.Path(file_okay=False, path_type=Path), default=Path("keyquorum-cluster")
)


@contextmanager
def _events(settings: Settings) -> Iterator[Callable[[str], None]]:
    """A function that shows what goes on: beside a spinner on a terminal, else as plain lines."""
    if settings.json or not sys.stderr.isatty():
        yield (lambda text: None) if settings.json else note
        return
    with Console(stderr=True).status("starting") as spinner:
        yield lambda text: spinner.update(printable(text))


@click.command()
@_folder
@click.option("--nodes", type=click.IntRange(1, 64), help=f"How many nodes; {NODES} by default.")
@click.option("--threshold", type=click.IntRange(1, 64), help=f"Shares that give a key back; {THRESHOLD} by default.")
@click.option("--domains", type=click.IntRange(1, 64), help=f"Sites the nodes are spread over; {DOMAINS} by default.")
@click.option(
    "--nodes-per-token", type=click.IntRange(1, 64), help="How many nodes share one token, on one host; 1 by default."
)
@common_options()
@click.pass_obj
def up(
    settings: Settings,
    folder: Path,
    nodes: int | None,
    threshold: int | None,
    domains: int | None,
    nodes_per_token: int | None,
) -> None:
    """Start a cluster on this machine, in DIR (./keyquorum-cluster by default).

    Every node is a process with a SoftHSM token, its own unless --nodes-per-token says otherwise; they go on after the
    command has ended, until `keyquorum down`. A cluster that is already in the folder is started again, from its disks.

    \b
    Examples:
      keyquorum up
      keyquorum up /srv/kq --nodes 7 --threshold 4 --domains 7
    """
    start_logging(settings)
    with _events(settings) as tell:
        if (folder / "cluster.toml").exists():
            local = LocalCluster.open(folder, on_event=tell)
            _check_same(local, nodes, threshold)
            local.start()
        else:
            local = LocalCluster(
                nodes or NODES,
                threshold or _threshold(nodes),
                folder,
                domains=domains or DOMAINS,
                nodes_per_token=nodes_per_token or 1,
                detached=True,
                on_event=tell,
            )
    told = {
        "folder": str(local.path),
        "nodes": len(local.nodes),
        "threshold": local.threshold,
        "config": str(local.client_config),
    }
    emit(settings, told | {"pids": local.running()}, None if settings.json else _up_text(local))


def _threshold(nodes: int | None) -> int:
    """The default t: 3, or the majority of fewer nodes."""
    return min(THRESHOLD, (nodes or NODES) // 2 + 1)


def _check_same(local: LocalCluster, nodes: int | None, threshold: int | None) -> None:
    for what, told, held in (("nodes", nodes, len(local.nodes)), ("threshold", threshold, local.threshold)):
        if told not in (None, held):
            raise ValueError(f"{local.path} holds a cluster with {what} {held}, not {told}; name another folder")


def _up_text(local: LocalCluster) -> str:
    return (
        f"{len(local.nodes)} nodes and a balancer serve in {local.path}\n"
        f"keys are split {local.threshold}-of-{local.shares}\n"
        f"client configuration: {local.client_config}"
    )


@click.command()
@_folder
@common_options()
@click.pass_obj
def down(settings: Settings, folder: Path) -> None:
    """Stop the cluster in DIR; its keys stay on its disks."""
    start_logging(settings)
    with _events(settings) as tell:
        local = LocalCluster.open(folder, on_event=tell)
        running = [name for name, pid in local.running().items() if pid is not None]
        local.stop()
    left = [name for name, pid in local.running().items() if pid is not None]
    if left:
        raise ClusterError(f"{local.path}: {', '.join(left)} could not be ended")
    emit(settings, {"folder": str(local.path), "stopped": running}, f"stopped {len(running)} processes in {local.path}")


@click.command()
@click.option(
    "-v", "--verbose", is_flag=True, help="Show caches, how quick peers are, and how good the forecasts were."
)
@click.option("--latency", is_flag=True, help="Show how long requests took, and in which stages; all with -v.")
@common_options(connects=True)
@click.pass_context
def status(context: click.Context, verbose: bool, latency: bool) -> None:
    """Ask every node and balancer how it is.

    The exit code is 2 if none answers, 0 otherwise.
    """
    settings: Settings = context.obj
    start_logging(settings)
    with connect(client_config(settings)) as kq:
        members = kq.status(latency=latency, timeout=settings.timeout_s)
        name, serial, draining = kq.cluster.name, kq.cluster.serial, kq.cluster.draining
    told = {"cluster": name, "serial": serial, "members": [_member_json(member, draining) for member in members]}
    if settings.json:
        emit(settings, told)
    else:
        columns = ("MEMBER", "ROLE", "STATE", "ENDPOINT", "LOCATION", "KEYS", "LOADED", "QUEUE", "UP")
        table(settings, (*columns, "RELEASE", "PROTOCOL"), [_row(member, draining) for member in members], None)
        if verbose:
            _details(settings, members)
        if latency:
            _latencies(settings, members, verbose)
        for member in members:
            for text in troubles_of(member):
                note(f"{member.name}: {text}")
    if not any(member.status for member in members):
        context.exit(2)


def _member_json(member: MemberStatus, draining: Collection[str]) -> dict[str, Any]:
    return {
        "name": member.name,
        "role": member.role,
        "endpoint": member.endpoint,
        "location": member.location,
        "up": member.status is not None,
        "ready": state_of(member) == "up",
        "draining": member.name in draining,
        "error": "" if member.error is None else str(member.error),
        "status": None if member.status is None else _fields(member.status),
    } | ({} if member.latency is None else {"latency": _fields(member.latency)})


def _fields(status: msgspec.Struct) -> dict[str, Any]:
    return {name: _named(getattr(status, name)) for name in status.__struct_fields__}


def _named(value: Any) -> Any:
    """The value with structs, which are arrays on the wire, as objects."""
    if isinstance(value, msgspec.Struct):
        return _fields(value)
    return [_named(each) for each in value] if isinstance(value, list) else value


def _row(member: MemberStatus, draining: Collection[str]) -> tuple[object, ...]:
    state = state_of(member)
    state = "draining" if state == "up" and member.name in draining else state
    head = (member.name, member.role, state, member.endpoint, member.location or "-")
    found = member.status
    if found is None:
        return (*head, "-", "-", "-", "-", "-", "-")
    tail = (f"{found.uptime_ms // 1000} s", found.software, found.protocol)
    if isinstance(found, NodeStatus):
        return (*head, found.shares, found.loaded, found.queue, *tail)
    return (*head, found.keys, "-", "-", *tail)


def _details(settings: Settings, members: Sequence[MemberStatus]) -> None:
    nodes = [(member.name, member.status) for member in members if isinstance(member.status, NodeStatus)]
    columns = ("NODE", "CACHE", "ENTRIES", "BYTES", "HITS", "MISSES", "TTL", "USES", "ROOM", "CHANGED", "FLUSHED")
    caches = [(name, *msgspec.structs.astuple(each)) for name, status in nodes for each in status.caches]
    click.echo()
    table(settings, columns, caches, None)
    tokens = [
        (
            name,
            status.token,
            status.health.made,
            status.health.renewals,
            f"{status.health.canary_age_ms // 1000} s",
            f"{status.health.fresh_age_ms // 1000} s",
        )
        for name, status in nodes
    ]
    click.echo()
    table(settings, ("NODE", "TOKEN", "OBJECTS", "RENEWALS", "FOUND WELL", "BY A FRESH PROCESS"), tokens, None)
    peers = [
        (name, each.node, each.samples, f"{each.expected_us} us", f"{each.p95_us} us", "down" if each.down else "up")
        for name, status in nodes
        for each in status.holders
    ]
    click.echo()
    table(settings, ("NODE", "HOLDER", "RELEASES", "EXPECTED", "P95", "STATE"), peers, None)
    clients = [
        (each.client, member.name, each.software, each.protocol, each.connections, f"{each.ago_ms // 1000} s ago")
        for member in members
        if member.status is not None
        for each in member.status.clients
    ]
    click.echo()
    table(settings, ("CLIENT", "SEEN BY", "RELEASE", "PROTOCOL", "CONNECTIONS", "CAME"), sorted(clients), None)
    _moves(settings, members)
    _forecasts(settings, members)


def _moves(settings: Settings, members: Sequence[MemberStatus]) -> None:
    """Which keys each balancer has moved, repaired and refreshed, and which wait for it."""
    told = [(member.name, member.status) for member in members if isinstance(member.status, BalancerStatus)]
    rows = [
        (name, each.why, each.waiting, each.under_way, each.done, each.failed)
        for name, status in told
        for each in status.moves
    ]
    if rows:
        click.echo()
        table(settings, ("BALANCER", "KEYS", "WAITING", "UNDER WAY", "DONE", "FAILED"), rows, None)
    for name, status in told:
        click.echo(f"{name}: {one_line(status.moving)}")


def _forecasts(settings: Settings, members: Sequence[MemberStatus]) -> None:
    """How good each balancer's forecasts were of late, for the next tick and for the tenth."""
    rows = [
        (
            member.name,
            each.request_class,
            each.model,
            *(f"{value / 1000:.2f}" if each.error else "-" for value in (each.error, each.error_tenth)),
            *(f"{value / 10:.0f} %" if each.error else "-" for value in (each.coverage, each.coverage_tenth)),
            *(f"{value / 10:+.0f} %" if each.error else "-" for value in (each.bias, each.bias_tenth)),
        )
        for member in members
        if isinstance(member.status, BalancerStatus)
        for each in member.status.forecasts
    ]
    if rows:
        click.echo()
        head = ("BALANCER", "CLASS", "FORECAST BY", "MASE", "TENTH", "P90 HELD", "TENTH", "BIAS", "TENTH")
        table(settings, head, rows, None)


def _latencies(settings: Settings, members: Sequence[MemberStatus], verbose: bool) -> None:
    """Of each class how long requests took in all, and the median of each stage; with ``verbose`` all of each stage."""
    told = [(member.name, each) for member in members if member.latency is not None for each in member.latency.classes]
    head = ("NODE", "CLASS", "COUNT", "ERRORS", "P50", "P90", "P99", "P99.9", "MAX")
    whole = [
        (name, each.request_class, stage.count, each.errors, *_times(stage))
        for name, each in told
        for stage in each.stages
        if stage.stage == "total"
    ]
    click.echo()
    table(settings, head, whole, None)
    there = {stage.stage for _, each in told for stage in each.stages}
    stages = [stage for stage in STAGES if stage in there and stage != "total"]
    medians = [
        (name, each.request_class, *(medians.get(stage, "-") for stage in stages))
        for name, each in told
        for medians in [{stage.stage: _time(stage.p50_ns) for stage in each.stages}]
    ]
    click.echo()
    table(settings, ("NODE", "CLASS", *(stage.upper() for stage in stages)), medians, None)
    if not verbose:
        return
    rows = [
        (name, each.request_class, stage.stage, stage.count, *_times(stage))
        for name, each in told
        for stage in each.stages
    ]
    click.echo()
    table(settings, ("NODE", "CLASS", "STAGE", "COUNT", *head[4:]), rows, None)


def _times(stage: StageLatency) -> tuple[str, ...]:
    nanoseconds = (stage.p50_ns, stage.p90_ns, stage.p99_ns, stage.p999_ns, stage.max_ns)
    return tuple(map(_time, nanoseconds))


def _time(nanoseconds: int) -> str:
    """Three digits that count, in a unit that suits them."""
    for unit, size in (("s", 10**9), ("ms", 10**6)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds / 1000:.3g} us"


def state_of(member: MemberStatus) -> str:
    """``up``, ``not ready``, or the code of the error that came instead of a status."""
    if member.error is not None:
        return str(getattr(member.error, "code", "error"))
    problems = [getattr(member.status, name, "") for name in ("audit", "store")]
    if isinstance(member.status, NodeStatus):
        problems.append(member.status.health.problem)
    return "not ready" if any(problems) else "up"


def troubles_of(member: MemberStatus) -> list[str]:
    """What an operator must look at."""
    if isinstance(member.status, BalancerStatus):
        return [f"the forecast goes without the series {each}" for each in member.status.series]
    if member.status is None:
        return []
    unready = [f"serves nothing: the audit log can't be written: {member.status.audit}"] if member.status.audit else []
    health = member.status.health
    token = [f"serves no key: {health.problem}"] if health.problem else []
    check = [health.check] if health.check else []
    store = [f"serves only the keys that are loaded: {member.status.store}"] if member.status.store else []
    clock = [member.status.clock] if member.status.clock else []
    return [*unready, *token, *check, *store, *clock, *member.status.alarms]
