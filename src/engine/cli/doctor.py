"""``keyquorum doctor``: looks for what is wrong with a cluster or a member's host before it hurts, and says what to do.

What is looked at is told by the members' status and by the files of this machine; nothing is changed.
"""

from __future__ import annotations

import ctypes
import os
import resource
import stat
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import click

from engine.cli.local import troubles_of
from engine.cli.output import (
    Settings,
    client_config,
    common_options,
    emit,
    note,
    one_line,
    start_logging,
    table,
)
from engine.client.calls import MemberStatus
from engine.client.client import connect
from engine.client.speech import HOLD_VARIABLE
from engine.errors import ConfigError
from engine.protocol.manifest import CLOCK_SKEW_MS, Cluster
from engine.protocol.requests import HostHealth, NodeStatus, ServiceCount

__all__ = ["Finding", "doctor", "look_at_cluster", "look_at_folder", "look_at_member"]

State = Literal["ok", "warning", "wrong"]

CLOCK_WARN_MS: Final = 1_000
DISK_WARN: Final = 0.10
DISK_WRONG: Final = 0.02
DISK_WRONG_BYTES: Final = 256 * 1024 * 1024
FILES_WRONG: Final = 1_000
FULL: Final = 0.80
"""From this part on of what there may be, descriptors and connections are too many."""
LOCKED_LEAST: Final = 1024 * 1024
"""Bytes; a node locks 32 KiB at a time and needs more under load."""
CHECK_S: Final = 60
TIME_ERROR: Final = 5
CONFIGS: Final = {"node.toml": "nodes", "balancer.toml": "balancer", "client.toml": ""}
"""A member's configuration -> the program that checks it; a client's is checked by connecting."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, and where; ``advice`` says what to do if it is not well."""

    where: str
    what: str
    state: State
    text: str
    advice: str = ""


# --- the members, by what they tell --------------------------------------------------------------------------------


def look_at_member(member: MemberStatus) -> list[Finding]:
    """A member's answer: clock, disk, descriptors, and for a node its token, store and audit log."""
    where = member.name
    if member.status is None:
        text = one_line(str(member.error))
        return [Finding(where, "answer", "wrong", text, f"see its log, and whether {member.endpoint} can be reached")]
    found = [Finding(where, "answer", "ok", f"{member.status.software}, serial {member.status.cluster_serial}")]
    found.append(Finding(where, "protocol", "ok", f"speaks up to version {member.status.protocol}"))
    found.append(_clock(where, member.ahead_ms, member.within_ms))
    found += _disk(where, member.status.host)
    found += _service(where, member.status.service)
    if isinstance(member.status, NodeStatus):
        found += _token(where, member.status)
    troubles = troubles_of(member)
    found += [
        Finding(where, "trouble", "wrong", one_line(text), "docs/operating.md tells what it means") for text in troubles
    ]
    return found


def _clock(where: str, ahead_ms: int | None, within_ms: int) -> Finding:
    if ahead_ms is None:
        return Finding(where, "clock", "warning", "it does not tell its time", "it runs an earlier version: upgrade it")
    surely_ms = max(0, abs(ahead_ms) - within_ms)
    direction = "ahead of" if ahead_ms > 0 else "behind"
    text = f"{abs(ahead_ms)} ms {direction} this machine's, within {within_ms} ms"
    advice = f"orders and grants fail beyond {CLOCK_SKEW_MS} ms: run chrony or systemd-timesyncd on both"
    if surely_ms > CLOCK_SKEW_MS:
        return Finding(where, "clock", "wrong", text, advice)
    return Finding(where, "clock", "warning" if surely_ms > CLOCK_WARN_MS else "ok", text, advice)


def _disk(where: str, host: HostHealth) -> list[Finding]:
    if not host.disk_bytes:
        return []
    part = host.disk_free_bytes / host.disk_bytes
    text = f"{_size(host.disk_free_bytes)} of {_size(host.disk_bytes)} free ({part:.0%}), {host.files_free} files"
    advice = "a node that can't write its store or its audit log serves nothing: make room on the disk of its data"
    # A file system without a fixed number of files tells 0 of both.
    few = 0 < host.files_free < FILES_WRONG
    if (part < DISK_WRONG and host.disk_free_bytes < DISK_WRONG_BYTES * 4) or host.disk_free_bytes < DISK_WRONG_BYTES:
        return [Finding(where, "disk", "wrong", text, advice)]
    return [Finding(where, "disk", "wrong" if few else "warning" if part < DISK_WARN else "ok", text, advice)]


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def _service(where: str, service: ServiceCount) -> Iterator[Finding]:
    for what, used, most, advice in (
        ("descriptors", service.descriptors, service.descriptors_max, "raise LimitNOFILE= of its unit (ulimit -n)"),
        ("connections", service.connections, service.connections_max, "see who has them open, and limits.connections"),
    ):
        if most:
            state: State = "warning" if used > FULL * most else "ok"
            yield Finding(where, what, state, f"{used} of {most}", advice)


def _token(where: str, status: NodeStatus) -> Iterator[Finding]:
    health = status.health
    if health.problem or health.check:
        return  # told among the troubles
    age_s = health.canary_age_ms // 1000
    yield Finding(
        where, "token", "ok", f"{one_line(status.token)}; found well {age_s} s ago, {health.renewals} renewals"
    )
    down = [each.node for each in status.holders if each.down]
    if down:
        yield Finding(where, "peers", "warning", f"it counts {', '.join(down)} as down", "the network between them")


# --- the cluster as a whole ------------------------------------------------------------------------------------------


def look_at_cluster(cluster: Cluster, members: Sequence[MemberStatus]) -> list[Finding]:
    """What the members' answers say together, of clients too, and the cluster manifest."""
    where = cluster.name
    told = [member.status for member in members if member.status is not None]
    found = []
    serials = Counter(status.cluster_serial for status in told)
    newest = max([cluster.serial, *serials])
    behind = [m.name for m in members if m.status is not None and m.status.cluster_serial < newest]
    text = (
        f"serial {newest} everywhere"
        if not behind
        else f"serial {newest}, but {', '.join(behind)} go by an earlier one"
    )
    advice = "bring it to them: keyquorum cluster push"
    found.append(Finding(where, "manifest", "warning" if behind else "ok", text, advice))
    found += _releases(where, members)
    if cluster.retiring:
        names = ", ".join(cluster.retiring)
        advice = "once all have the newest manifest, sign one without the old key: keyquorum cluster sign --retire"
        found.append(Finding(where, "keys of members", "warning", f"{names} change their CURVE key", advice))
    operators = cluster.of_role("operator")
    lone = len(operators) - cluster.quorum < 1
    text = f"{cluster.quorum} of {len(operators)} operators sign"
    advice = "with no operator to spare a lost key ends all changes of the cluster: add one"
    found.append(Finding(where, "operators", "warning" if lone else "ok", text, advice))
    found.append(_domains(cluster))
    balancers = cluster.of_role("balancer")
    if not balancers:
        found.append(Finding(where, "balancer", "wrong", "none", "without one no key can be made: add a balancer"))
    return found


def _releases(where: str, members: Sequence[MemberStatus]) -> Iterator[Finding]:
    """Which software and which protocol version the members run, and the clients that are connected to them."""
    told = {member.name: member.status for member in members if member.status is not None}
    releases = _by({name: status.software for name, status in told.items()})
    advice = "an upgrade is under way, or was not ended"
    yield Finding(where, "versions", "warning" if len(releases) > 1 else "ok", _listed(releases), advice)
    protocols = _by({name: str(status.protocol) for name, status in told.items()})
    advice = f"an upgrade is under way, or {HOLD_VARIABLE} still holds some of them"
    yield Finding(where, "protocol", "warning" if len(protocols) > 1 else "ok", _listed(protocols), advice)
    seen = {each.client: each for status in told.values() for each in status.clients if each.connections}
    newest = max((status.protocol for status in told.values()), default=0)
    older = [each for _, each in sorted(seen.items()) if each.protocol < newest]
    old = [f"{each.client} ({each.software}, {each.protocol})" for each in older]
    releases = _by({name: each.software for name, each in seen.items()})
    text = f"speak an older protocol: {one_line(', '.join(old))}" if old else _listed(releases)
    advice = "upgrade them before the members' next upgrade, which may no longer speak it"
    yield Finding(where, "clients", "warning" if old else "ok", text, advice)


def _by(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> who has it."""
    found: dict[str, list[str]] = {}
    for name, value in sorted(values.items()):
        found.setdefault(value, []).append(name)
    return found


def _listed(found: Mapping[str, Sequence[str]]) -> str:
    """The value that all have, or each with those that have it."""
    if len(found) == 1:
        return one_line(next(iter(found)))
    return one_line("; ".join(f"{value}: {', '.join(names)}" for value, names in sorted(found.items()))) or "-"


def _domains(cluster: Cluster) -> Finding:
    domains = Counter(location.path[: cluster.domain_level] for location in cluster.locations)
    largest, nodes = max(domains.values(), default=0), len(cluster.nodes)
    text = f"{nodes} nodes in {len(domains)} failure domains, {largest} in the largest"
    advice = "spread the nodes, or say where they stand: location in the cards, domain_level in the manifest"
    alone = nodes > 1 and len(domains) == 1
    return Finding(cluster.name, "failure domains", "warning" if alone else "ok", text, advice)


# --- this machine ----------------------------------------------------------------------------------------------------


def look_at_folder(folder: Path) -> list[Finding]:
    """A member's folder on this machine: its configuration, the modes of its files, its PIN's place, its disk.

    ``ConfigError``: it is no member's folder.
    """
    config = next((folder / name for name in CONFIGS if (folder / name).exists()), None)
    if config is None:
        raise ConfigError(f"{folder}: no member's folder: it has none of {', '.join(CONFIGS)}")
    where = str(folder)
    found = [_checked(where, config)] if CONFIGS[config.name] else []
    found += _private(where, folder)
    try:
        values: dict[str, Any] = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found  # `_checked` has told it, or the connection will
    data = folder / str(values.get("data", "data"))
    if data.exists():
        found += _pin_place(where, folder, values, data)
    return found


def _checked(where: str, config: Path) -> Finding:
    """By the program that will run with it, which knows best."""
    command = [sys.executable, "-P", "-m", CONFIGS[config.name], "--config", str(config), "--check-config"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CHECK_S, check=False)
    except subprocess.TimeoutExpired:
        return Finding(where, "configuration", "wrong", f"its check takes more than {CHECK_S} s", "see its disk")
    if done.returncode == 0:
        return Finding(where, "configuration", "ok", one_line(done.stdout)[-200:])
    return Finding(where, "configuration", "wrong", one_line(done.stderr)[-500:], f"correct {config}")


def _private(where: str, folder: Path) -> Iterator[Finding]:
    open_files = []
    for path in sorted(folder.rglob("*")):
        secret = path.name in ("identity.toml", "operator.toml") or path.suffix in (".pin", ".db")
        if secret and path.is_file() and stat.S_IMODE(path.stat().st_mode) & 0o077:
            open_files.append(path.name)
    text = f"others can read {', '.join(open_files)}" if open_files else "no secret can be read by others"
    yield Finding(where, "files", "wrong" if open_files else "ok", text, "chmod 600")


def _pin_place(where: str, folder: Path, values: dict[str, Any], data: Path) -> Iterator[Finding]:
    told = values.get("token", {})
    pin = str(told.get("pin", "")) if isinstance(told, dict) else ""
    place = folder / pin.removeprefix("file:").removeprefix("//")
    if not pin or pin.startswith(("env:", "credential:")) or not place.exists():
        return
    same = place.stat().st_dev == data.stat().st_dev
    text = "on the disk of the data folder" if same else "on another disk than the data folder"
    advice = "together they open every share: keep the PIN elsewhere, or as a credential of systemd's"
    yield Finding(where, "PIN", "warning" if same else "ok", text, advice)


def look_at_host() -> list[Finding]:
    """This machine: is its clock kept, is memory written to disk, may processes lock memory and open files?"""
    where = os.uname().nodename
    kept = _clock_is_kept()
    text = "kept by a time service" if kept else "kept by nobody" if kept is not None else "not known"
    found = [Finding(where, "time service", "ok" if kept else "warning", text, "run chrony or systemd-timesyncd")]
    swaps = [line.split()[0] for line in _lines(Path("/proc/swaps"))[1:] if line.strip()]
    open_swaps = [each for each in swaps if not each.startswith(("/dev/dm-", "/dev/zram"))]
    text = f"on: {', '.join(swaps)}" if swaps else "off"
    found.append(
        Finding(
            where,
            "swap",
            "warning" if open_swaps else "ok",
            text,
            "what a node has in memory may reach the disk: turn it off or encrypt it",
        )
    )
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    low = locked != resource.RLIM_INFINITY and locked < LOCKED_LEAST
    text = "no limit" if locked == resource.RLIM_INFINITY else _size(locked)
    found.append(
        Finding(where, "locked memory", "wrong" if low else "ok", text, "LimitMEMLOCK= of the unit (ulimit -l)")
    )
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _clock_is_kept() -> bool | None:
    """Whether the kernel's clock is synchronised (adjtimex(2)); None if it does not say."""
    size = 512  # struct timex has less; all 0 means to read
    answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(size))
    return None if answer < 0 else answer != TIME_ERROR


# --- the command -----------------------------------------------------------------------------------------------------


@click.command()
@click.option(
    "--folder",
    "folders",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A member's folder on this machine to look at, too; may be given again.",
)
@click.option("--host-only", is_flag=True, help="Look at this machine and the folders alone; connect to nobody.")
@click.option("-v", "--verbose", is_flag=True, help="Show also what is well.")
@common_options(connects=True)
@click.pass_context
def doctor(context: click.Context, folders: tuple[Path, ...], host_only: bool, verbose: bool) -> None:
    """Look for what is wrong with a cluster and with this machine, and say what to do.

    Of each member: does it answer, how far is its clock off, how full are disk and descriptors, how is its token.
    Of all: the manifest, releases, protocol, operators, failure domains. Of this machine: time service, swap, locked
    memory.

    \b
    Examples:
      keyquorum doctor
      keyquorum doctor --folder /var/lib/keyquorum/node1 --host-only
      keyquorum doctor -o json

    Exit codes: 0 nothing is wrong (warnings count as that), 2 something is.
    """
    settings: Settings = context.obj
    start_logging(settings)
    found = look_at_host()
    for folder in folders:
        found += look_at_folder(folder)
    if not host_only:
        with connect(client_config(settings)) as kq:
            members = kq.status(timeout=settings.timeout_s)
            found += look_at_cluster(kq.cluster, members)
            for member in members:
                found += look_at_member(member)
    wrong = sum(each.state == "wrong" for each in found)
    warnings = sum(each.state == "warning" for each in found)
    if settings.json:
        emit(settings, {"wrong": wrong, "warnings": warnings, "findings": [asdict(each) for each in found]})
    else:
        shown = [each for each in found if verbose or each.state != "ok"]
        if shown:
            rows = [(each.state, each.where, each.what, each.text) for each in shown]
            table(settings, ("STATE", "WHERE", "WHAT", "FOUND"), rows, None)
        for each in shown:
            if each.state != "ok" and each.advice:
                note(f"{each.where}, {each.what}: {each.advice}")
        click.echo(f"{len(found)} things looked at: {wrong} wrong, {warnings} warnings")
    if wrong:
        context.exit(2)
