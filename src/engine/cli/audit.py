"""``keyquorum audit``: check nodes' audit logs against each other and the cluster's manifest, and read them.

It reads files and opens no connection, so logs can be checked where they were collected. It holds a line at a time; the
heads that nodes signed go to a temporary database on the disk.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from engine.cli.output import Settings, byte_progress, client_config, common_options, emit, one_line
from engine.client.config import ClientConfig, load_cluster, load_config, resolve
from engine.errors import ConfigError
from engine.protocol.audit import MAX_LINE, ChainCheck, Claim, Finding, Record, line_hash, read_link, read_record
from engine.protocol.manifest import Cluster

__all__ = ["audit"]

SEGMENTS: Final = "audit-*.jsonl"
MAX_TOLD: Final = 1_000
"""Findings that are printed one by one; the rest are counted."""
BATCH_LINES: Final = 20_000
FAILED_CHECK: Final = 1


@click.group(no_args_is_help=True)
def audit() -> None:
    """Check and read the audit logs of nodes.

    \b
    Examples:
      keyquorum audit verify ./keyquorum-cluster
      keyquorum audit verify collected/node1 collected/node2 --manifest cluster.manifest --pin 5f0c...
      keyquorum audit show collected/node1 --key 'orders/*' --verb decrypt --since 2026-08-01
    """


@dataclass(slots=True)
class _Log:
    """One log: its files in order, and what the check of it found."""

    files: list[Path]
    check: ChainCheck
    ids: set[bytes] = field(default_factory=set)


class _Told:
    """The findings, the first ``MAX_TOLD`` of them kept."""

    def __init__(self) -> None:
        self.kept: list[Finding] = []
        self.count = 0

    def add(self, finding: Finding) -> None:
        self.count += 1
        if len(self.kept) < MAX_TOLD:
            self.kept.append(finding)


class _Claims:
    """Heads in a temporary database, so that a log of any length can be checked in bounded memory."""

    def __init__(self) -> None:
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute(
            "CREATE TABLE claims (node TEXT, log BLOB, seq INTEGER, hash BLOB, file TEXT, line INTEGER, "
            "PRIMARY KEY (node, log, seq, hash)) WITHOUT ROWID"
        )

    def close(self) -> None:
        self._db.close()

    def add(self, claim: Claim) -> None:
        head = claim.head
        self._db.execute(
            "INSERT OR IGNORE INTO claims VALUES (?, ?, ?, ?, ?, ?)",
            (head.node, head.log_id, head.seq, head.hash, claim.file, claim.line),
        )

    def of_log(self, node: str, log_id: bytes) -> Iterator[tuple[int, bytes, str, int]]:
        """(seq, hash, file, line) of a log's heads in order."""
        yield from self._db.execute(
            "SELECT seq, hash, file, line FROM claims WHERE node = ? AND log = ? ORDER BY seq", (node, log_id)
        )

    def logs(self) -> list[tuple[str, bytes, int, str, int]]:
        """(node, log id, greatest seq, where) of each log that a head is of."""
        return list(
            self._db.execute("SELECT node, log, max(seq), file, line FROM claims GROUP BY node, log ORDER BY node, log")
        )

    def forks(self) -> Iterator[tuple[str, int, str, int]]:
        """(node, seq, file, line) of heads of which another one names the same record with another hash."""
        yield from self._db.execute(
            "SELECT node, seq, file, line FROM claims GROUP BY node, log, seq HAVING count(*) > 1 ORDER BY node, seq"
        )


# --- verify ---------------------------------------------------------------------------------------------------------


@audit.command()
@click.argument("paths", metavar="FILE|DIR...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--manifest", metavar="FILE", help="The cluster's manifest; by default the client configuration's.")
@click.option("--pin", metavar="HEX", help="Hash of the cluster's first manifest; needed with --manifest.")
@click.option("--partial", is_flag=True, help="The oldest files of the logs are elsewhere.")
@common_options(connects=True)
@click.pass_context
def verify(
    context: click.Context, paths: tuple[Path, ...], manifest: str | None, pin: str | None, partial: bool
) -> None:
    """Find what was changed, removed, put in or moved in audit logs.

    A folder stands for all logs below it. Each log's chain is checked, and every signed head in it; the heads that
    other nodes kept of it are compared with it, so give the logs of as many nodes as you have: a log that was cut off
    at its end, or replaced by another one, is known by the others alone.

    The exit code is 1 if anything is found, else 0.
    """
    settings: Settings = context.obj
    cluster = _cluster(settings, manifest, pin)
    told = _Told()
    with closing(_Claims()) as claims:
        logs = _logs(paths, cluster, claims, partial=partial)
        total = sum(path.stat().st_size for log in logs for path in log.files)
        with byte_progress(settings, "checking", 2 * total) as progress:
            done = 0
            for log in logs:
                done = _chain_of(log, told, progress, done)
            for finding in _between(logs, claims):
                told.add(finding)
            for log in logs:
                done = _heads_of(log, claims, told, progress, done)
        missing = _missing(logs, claims)
    _report(settings, logs, told, missing)
    if told.count:
        context.exit(FAILED_CHECK)


def _cluster(settings: Settings, manifest: str | None, pin: str | None) -> Cluster:
    if manifest is not None:
        if not pin:
            raise click.UsageError("--manifest needs --pin, the hash of the cluster's first manifest")
        return load_cluster(manifest, pin)
    path = client_config(settings)
    file = load_config(path, ClientConfig)
    return load_cluster(resolve(path, file.manifest), pin or file.manifest_pin)


def _files(paths: Sequence[Path]) -> list[Path]:
    found: dict[Path, None] = {}
    for path in paths:
        listed = sorted(path.rglob(SEGMENTS)) if path.is_dir() else [path]
        if not listed:
            raise ConfigError(f"{path}: no audit log ({SEGMENTS}) in it")
        found |= dict.fromkeys(listed)
    return list(found)


def _logs(paths: Sequence[Path], cluster: Cluster, claims: _Claims, *, partial: bool) -> list[_Log]:
    """The logs that the files make: those of one folder that begin with records of one node are one."""
    keys = cluster.sign_key_ever("node")
    found: dict[tuple[Path, str], _Log] = {}
    for path in _files(paths):
        node = next((record.node for record in _records(path)), "")
        log = found.get((path.parent, node))
        if log is None:
            log = found[path.parent, node] = _Log([], ChainCheck(keys, claims.add, partial=partial))
        log.files.append(path)
    return list(found.values())


def _lines(path: Path) -> Iterator[bytes]:
    """The lines with their newlines; an overlong one comes in pieces, of which none is a record."""
    with path.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            yield line


def _records(path: Path) -> Iterator[Record]:
    for line in _lines(path):
        record = read_record(line.rstrip(b"\n"))
        if record is not None:
            yield record


def _chain_of(log: _Log, told: _Told, progress: Any, done: int) -> int:
    for path in log.files:
        for number, line in enumerate(_lines(path), 1):
            if line.endswith(b"\n") or path != log.files[-1] or len(line) == MAX_LINE:
                for finding in log.check.feed(str(path), number, line.rstrip(b"\n")):
                    told.add(finding)
            else:
                log.check.torn_end(str(path), number, len(line))
            done += len(line)
            if progress is not None and number % BATCH_LINES == 0:
                progress(done)
    if not log.check.records:
        told.add(Finding("deletion", str(log.files[0]), 0, "there is no record in it"))
    return done


def _between(logs: Sequence[_Log], claims: _Claims) -> Iterator[Finding]:
    """What the heads say of logs that end too early, are not given, or were begun anew."""
    given = {(log.check.node, log.check.log_id): log for log in logs}
    nodes = {log.check.node for log in logs}
    for node, log_id, seq, file, line in claims.logs():
        log = given.get((node, log_id))
        if log is not None and seq > log.check.seq:
            text = f"the log of {node!r} ends with record {log.check.seq}; it had signed record {seq}, as kept here"
            yield Finding("truncation", file, line, text)
        elif log is None and node in nodes:
            text = f"{node!r} had another log, {log_id.hex()[:16]}, of record {seq} at least, which is not given"
            yield Finding("fork", file, line, text)
    for node, seq, file, line in claims.forks():
        yield Finding("fork", file, line, f"{node!r} signed two different records {seq}")


def _missing(logs: Sequence[_Log], claims: _Claims) -> list[dict[str, Any]]:
    """Nodes of which heads are kept and no log is given: so one that was removed whole is told, if not as a finding."""
    nodes = {log.check.node for log in logs}
    return [
        {"node": node, "log": log_id.hex(), "last": seq, "file": file, "line": line}
        for node, log_id, seq, file, line in claims.logs()
        if node not in nodes
    ]


def _heads_of(log: _Log, claims: _Claims, told: _Told, progress: Any, done: int) -> int:
    """Compare the log with the heads that its node signed, in one more pass over both in order."""
    heads = claims.of_log(log.check.node, log.check.log_id)
    claim = next(heads, None)
    reached = 0
    for path in log.files:
        for number, line in enumerate(_lines(path), 1):
            done += len(line)
            if progress is not None and number % BATCH_LINES == 0:
                progress(done)
            link = read_link(line[:-1]) if claim is not None else None
            if link is None or link[0] <= reached:
                continue
            reached = link[0]
            while claim is not None and claim[0] < reached:
                claim = next(heads, None)  # a record that is missing, which the chain has told
            digest = line_hash(line[:-1]) if claim is not None and claim[0] == reached else b""
            while claim is not None and claim[0] == reached:
                if claim[1] != digest:
                    kept = f"{claim[2]}:{claim[3]}"
                    text = f"record {reached} is not the one that {log.check.node!r} signed; its head is kept at {kept}"
                    told.add(Finding("fork", str(path), number, text))
                claim = next(heads, None)
    return done


def _report(settings: Settings, logs: Sequence[_Log], told: _Told, missing: Sequence[dict[str, Any]]) -> None:
    value = {
        "good": not told.count,
        "logs": [
            {
                "node": log.check.node,
                "log": log.check.log_id.hex(),
                "files": [str(path) for path in log.files],
                "records": log.check.records,
                "first": log.check.first,
                "last": log.check.seq,
                "notes": [{"file": file, "line": line, "text": text} for file, line, text in log.check.notes],
            }
            for log in logs
        ],
        "missing": missing,
        "findings": [msgspec.to_builtins(each) for each in told.kept],
        "found": told.count,
    }
    if settings.json:
        emit(settings, value)
        return
    for log in logs:
        for file, line, text in log.check.notes:
            click.echo(one_line(f"{file}:{line}: note: {text}"))
    for each in missing:
        text = f"no log of {each['node']!r} is given, though it had signed record {each['last']}, as kept here"
        click.echo(one_line(f"{each['file']}:{each['line']}: note: {text}"))
    for finding in told.kept:
        click.echo(one_line(f"{finding.file}:{finding.line}: {finding.kind}: {finding.text}"))
    if told.count > len(told.kept):
        click.echo(f"and {told.count - len(told.kept)} more")
    for log in logs:
        check = log.check
        click.echo(one_line(f"{check.node or '?'}: {check.records} records, {check.first} to {check.seq}"))
    click.echo(f"{told.count} findings in {len(logs)} logs" if told.count else f"{len(logs)} logs, nothing found")


# --- show -----------------------------------------------------------------------------------------------------------


@audit.command()
@click.argument("paths", metavar="FILE|DIR...", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--key", metavar="GLOB", help="Records of these keys.")
@click.option("--member", metavar="GLOB", help="Records of these members' requests.")
@click.option("--verb", metavar="VERB", help="Records of this verb.")
@click.option("--event", metavar="EVENT", help="Records of this event; by default the replies and what is no request.")
@click.option("--since", metavar="TIME", help="Not before this time, as 2026-08-01 or 2026-08-01T12:30 (UTC).")
@common_options()
@click.pass_obj
def show(
    settings: Settings,
    paths: tuple[Path, ...],
    key: str | None,
    member: str | None,
    verb: str | None,
    event: str | None,
    since: str | None,
) -> None:
    """Print records of audit logs, one a line, without checking them.

    With -o json each line is the record as it stands in the log.
    """
    since_ms = _time_ms(since) if since else 0
    for path in _files(paths):
        for line in _lines(path):
            record = read_record(line.rstrip(b"\n"))
            if record is None or record.time_ms < since_ms or record.event != (event or record.event):
                continue
            if event is None and record.event == "request":
                continue
            if key is not None and not fnmatchcase(record.key, key):
                continue
            if (member is not None and not fnmatchcase(record.member, member)) or record.verb != (verb or record.verb):
                continue
            click.echo(_json_line(record, line) if settings.json else _text(record))


def _time_ms(text: str) -> int:
    if re.fullmatch(r"[0-9:T.Z+ -]+", text):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            pass
        else:
            return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() * 1000)
    raise ValueError(f"--since {text[:40]!r}: a time is like 2026-08-01 or 2026-08-01T12:30")


def _json_line(record: Record, line: bytes) -> str:
    """The record as it stands in the log; without what it has no name for where that can't be printed."""
    try:
        text = json.dumps(json.loads(line), ensure_ascii=False)
        text.encode()
    except (ValueError, RecursionError):
        return msgspec.json.encode(record).decode()
    return text


def _text(record: Record) -> str:
    try:
        when = datetime.fromtimestamp(record.time_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    except (OverflowError, ValueError, OSError):
        when = str(record.time_ms)
    parts = (record.verb or record.event, record.key, record.outcome, record.detail)
    return one_line("  ".join((when, record.node, record.member or "-", *(part for part in parts if part))))
