"""``keyquorum backup``: recovery keys and orders of operators, backups of all shares, and their restore and drill.

Operators' commands read and write files and may run on machines without a network; ``create`` and ``restore`` talk to
the nodes, as a client; ``drill`` starts a process with throw-away tokens, and no connection.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

import click
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from engine.cli.chains import view_chain
from engine.cli.cluster import own_chain, pin_bytes
from engine.cli.identity import IDENTITY_FILE, open_operator, passphrase_option, read_passphrase
from engine.cli.output import (
    Settings,
    client_config,
    common_options,
    emit,
    note,
    printable,
    reading,
    start_logging,
    table,
    writing,
)
from engine.client import backup as backups
from engine.client.backup import BackedUpKey, Report
from engine.client.client import load_settings
from engine.client.config import Identity, check_private, load_identity
from engine.client.recovery import RECOVERY_FILE, create_recovery, load_recovery, read_recovery_card
from engine.errors import ClusterError, ConfigError, ManifestError
from engine.protocol.backup import (
    ORDER_LIFETIME_MAX_MS,
    ExportOrder,
    add_order_signature,
    issue_export_order,
    open_export_order,
    open_recovery_card,
    read_export_order,
)
from engine.protocol.manifest import Cluster, open_chain

__all__ = ["backup"]

F = TypeVar("F", bound=Callable[..., Any])

ORDER_MAX: Final = 64 * 1024
DRILL_TIMEOUT_S: Final = 3600.0
_UNITS_MS: Final = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}

_operator = click.option(
    "--operator",
    "folder",
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="The operator's folder.",
)
_where = click.argument(
    "backup_folder", metavar="FOLDER", type=click.Path(exists=True, file_okay=False, path_type=Path)
)


def _valid(default: str) -> Callable[[F], F]:
    return click.option(
        "--valid",
        default=default,
        show_default=True,
        metavar="TIME",
        help="How long it is good: 30m, 12h or 7d, at most 31d.",
    )


def _valid_ms(value: str) -> int:
    unit = _UNITS_MS.get(value[-1:])
    if unit is None or not value[:-1].isascii() or not value[:-1].isdecimal() or not int(value[:-1][:6]) > 0:
        raise click.BadParameter(f"{value[:40]!r} is no time such as 30m, 12h or 7d", param_hint="--valid")
    if int(value[:-1]) * unit > ORDER_LIFETIME_MAX_MS:
        raise click.BadParameter(f"{value[:40]!r} is longer than 31d", param_hint="--valid")
    return int(value[:-1]) * unit


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


@click.group(no_args_is_help=True)
def backup() -> None:
    """Back up the shares of all nodes, encrypted to operators, and restore them into a fresh cluster.

    Each node gives an archive of its shares only by an order that the quorum of operators signed. It takes the recovery
    keys of k operators to open one, and each of them opens a piece on a machine of their own.

    \b
    Examples:
      keyquorum backup key ./alice                          once for each operator
      keyquorum backup order --operator ./alice --recovery alice.recovery --recovery bob.recovery \\
          --threshold 2 --client admin-1 --out export.order
      keyquorum backup countersign --operator ./bob export.order
      keyquorum backup create --order export.order --out backup-2026-12
      keyquorum backup verify backup-2026-12
      keyquorum backup drill backup-2026-12 --operator ./alice --operator ./bob
      keyquorum backup open backup-2026-12 --operator ./alice
      keyquorum backup restore backup-2026-12
    """


# --- operators ------------------------------------------------------------------------------------------------------


@backup.command("key")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@passphrase_option
@common_options()
@click.pass_obj
def make_key(settings: Settings, folder: Path, passphrase_file: str | None) -> None:
    """Make an operator's recovery key, encrypted under the operator's passphrase, and its public card."""
    identity, passphrase = _unlock(folder, passphrase_file)
    card = folder / f"{identity.name.replace('/', '_')}.recovery"
    public = create_recovery(folder / RECOVERY_FILE, card, identity, passphrase)
    emit(
        settings,
        {"name": identity.name, "recovery_key": str(folder / RECOVERY_FILE), "card": str(card), "public": public.hex()},
    )
    note(f"next: give {card} to the operator who makes the export order")


def _unlock(folder: Path, passphrase_file: str | None) -> tuple[Identity, str]:
    """The operator in a folder, and the passphrase, which is asked for once. What is opened goes into no core dump."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    file = folder / IDENTITY_FILE
    check_private(file)
    passphrase = read_passphrase(passphrase_file, new=False)
    identity = load_identity(file, passphrase)
    if identity.role != "operator":
        raise ConfigError(f"{file}: {identity.name!r} is a {identity.role}, not an operator")
    return identity, passphrase


def _known_cluster(folder: Path, manifest: str | None) -> Cluster:
    """The cluster by a manifest file, checked from the pin that the operator has, or by the operator's own."""
    own = own_chain(folder)
    if not own:
        raise ConfigError(f"{folder}: belongs to no cluster yet (`keyquorum cluster join`)")
    pin = view_chain(own).pin
    if manifest is None:
        return open_chain(own, pin)
    with reading(manifest) as stream:
        return open_chain(stream.read(backups.MANIFEST_MAX), pin)


@backup.command("order")
@_operator
@click.option(
    "--recovery",
    "cards",
    multiple=True,
    required=True,
    metavar="FILE",
    help="An operator's recovery card; once for each.",
)
@click.option(
    "--threshold", type=click.IntRange(1, 32), help="k, how many of them can open an archive; the quorum by default."
)
@click.option(
    "--client", "courier", required=True, metavar="NAME", help="The client that brings the order to the nodes."
)
@_valid("1d")
@click.option("--out", default="export.order", show_default=True, metavar="FILE", help="Where to write it.")
@passphrase_option
@common_options()
@click.pass_obj
def make_order(
    settings: Settings,
    folder: Path,
    cards: tuple[str, ...],
    threshold: int | None,
    courier: str,
    valid: str,
    out: str,
    passphrase_file: str | None,
) -> None:
    """Sign an order that every node give away its shares, encrypted to these operators.

    It may be used for any number of backups while it is good. Where the quorum is above 1, others countersign it.
    """
    cluster = _known_cluster(folder, None)
    member = cluster.members.get(courier)
    if member is None or member.role != "client":
        raise ManifestError(f"{courier!r} is no client of the cluster {cluster.name!r}")
    raw = [read_recovery_card(Path(each)) for each in cards]
    names = [open_recovery_card(each, cluster).name for each in raw]
    k = threshold or cluster.quorum
    order = ExportOrder(os.urandom(16), cluster.pin, k, raw, courier, _now_ms() + _valid_ms(valid))
    identity = open_operator(folder, passphrase_file)
    signed = issue_export_order(order, identity.signing, _now_ms())
    if cluster.quorum == 1:
        open_export_order(signed, cluster, _now_ms())
    elif not cluster.quorum <= k <= len(names):
        raise ManifestError(f"threshold {k}: the quorum is {cluster.quorum}, and there are {len(names)} recovery cards")
    _write_order(settings, cluster, signed, out)


@backup.command()
@_operator
@click.argument("file", metavar="ORDER")
@click.option("--yes", is_flag=True, help="Sign without asking.")
@passphrase_option
@common_options()
@click.pass_obj
def countersign(settings: Settings, folder: Path, file: str, yes: bool, passphrase_file: str | None) -> None:
    """Add another operator's signature to an export order, after showing what it says."""
    cluster, raw = _known_cluster(folder, None), _read_order(file)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("look at the order, then countersign with --yes")
        note(_order_text(cluster, raw))
        click.confirm("Sign this?", abort=True, err=True)
    identity = open_operator(folder, passphrase_file)
    _write_order(settings, cluster, add_order_signature(raw, identity.signing), file)


def _read_order(file: str) -> bytes:
    with reading(file) as stream:
        raw = stream.read(ORDER_MAX + 1)
    if len(raw) > ORDER_MAX:
        raise ConfigError(f"{file}: longer than {ORDER_MAX} bytes")
    return raw


def _order_text(cluster: Cluster, raw: bytes) -> str:
    return "\n".join(f"{name}: {value}" for name, value in _order_told(cluster, raw).items())


def _order_told(cluster: Cluster, raw: bytes) -> dict[str, Any]:
    order, signed = read_export_order(raw)
    if order.cluster != cluster.pin:
        raise ManifestError(
            f"the order is of the cluster with the pin {order.cluster.hex()}, this one is {cluster.pin.hex()}"
        )
    names = ", ".join(open_recovery_card(each, cluster).name for each in order.recipients)
    return {
        "cluster": cluster.name,
        "export": order.export_id.hex(),
        "opened_by": f"{order.threshold} of {names}",
        "client": order.courier,
        "good_for": f"{max(0, order.expires_ms - _now_ms()) // 60_000} minutes",
        "signed_by": list(signed.signers),
        "signatures_needed": cluster.quorum,
    }


def _write_order(settings: Settings, cluster: Cluster, raw: bytes, out: str) -> None:
    told = _order_told(cluster, raw)
    with writing(out) as sink:
        sink.write(raw)
    if out != "-":
        emit(settings, told)
    short = cluster.quorum - len(told["signed_by"])
    note(
        f"next: {short} more signatures, by keyquorum backup countersign --operator DIR {out}"
        if short > 0
        else f"next: keyquorum backup create --order {out} --out FOLDER, as the client {told['client']}"
    )


# --- create and verify ----------------------------------------------------------------------------------------------


@contextmanager
def _node_progress(settings: Settings, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each node; lines where no person looks."""
    if settings.json:
        yield lambda node, done, total: None
        return
    if not sys.stderr.isatty():
        told: set[str] = set()

        def line(node: str, done: int, total: int) -> None:
            if done >= total and node not in told:
                told.add(node)
                note(f"{what} {node}: {total} keys")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} keys"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        tasks: dict[str, Any] = {}

        def draw(node: str, done: int, total: int) -> None:
            if node not in tasks:
                tasks[node] = progress.add_task(printable(f"{what} {node}"), total=total)
            progress.update(tasks[node], completed=done, total=max(total, done))

        yield draw


@backup.command()
@click.option("--order", "order_file", required=True, metavar="FILE", help="The operators' export order.")
@click.option("--out", "target", required=True, metavar="FOLDER", type=click.Path(path_type=Path), help="A new folder.")
@common_options(connects=True)
@click.pass_obj
def create(settings: Settings, order_file: str, target: Path) -> None:
    """Make a backup: an encrypted archive of each node's shares, and all documents of the keys.

    It is made as the client of --config, whose rights do not matter: the order names it. A node that does not answer
    is left out and named. Exit code 2 if a key can't be restored from what there is.
    """
    start_logging(settings)
    client = load_settings(client_config(settings))
    with _node_progress(settings, "archiving") as progress:
        report = backups.create_backup(client, _read_order(order_file), target, _now_ms(), progress)
    _show(settings, target, report)


@backup.command()
@_where
@click.option("--pin", metavar="HEX", help="The hash of the cluster's first manifest; by default what the backup says.")
@click.option("--keys", "list_keys", is_flag=True, help="List every key.")
@common_options()
@click.pass_obj
def verify(settings: Settings, backup_folder: Path, pin: str | None, list_keys: bool) -> None:
    """Check a backup as far as that needs no secret, and show what is in it.

    Every signature, the order, that no page is missing, and that t shares of one epoch of each key are there. That the
    shares are right, `keyquorum backup drill` shows.
    """
    pinned = pin_bytes(pin) if pin else None
    with _node_progress(settings, "verifying") as progress:
        report = backups.verify_backup(backup_folder, pinned, progress)
    _show(settings, backup_folder, report, list_keys=list_keys)
    if pin is None:
        note(f"the pin was not compared with yours: {report.cluster.pin.hex()}")


def _show(settings: Settings, where: Path, report: Report, *, list_keys: bool = False) -> None:
    """What is in a backup; an error if that is not enough to restore every key."""
    nodes = [
        {"node": node, "keys": keys, "shares": shares, "made_ms": report.archives[node].head.made_ms}
        for node, (keys, shares) in report.counts.items()
    ]
    value = {
        "folder": str(where),
        "cluster": report.cluster.name,
        "pin": report.cluster.pin.hex(),
        "export": report.export_id.hex(),
        "threshold": report.threshold,
        "recipients": list(report.recipients),
        "nodes": nodes,
        "missing": report.missing,
        "problems": report.problems,
        "keys": len(report.keys),
        "short": [_key_told(each) for each in report.short],
        **({"every_key": [_key_told(each) for each in report.keys.values()]} if list_keys else {}),
    }
    if settings.json:
        emit(settings, value)
    else:
        table(
            settings, ("NODE", "KEYS", "SHARES"), [(each["node"], each["keys"], each["shares"]) for each in nodes], None
        )
        if list_keys:
            click.echo()
            table(
                settings,
                ("KEY", "VERSION", "ALGORITHM", "EPOCH", "SHARES", "STATE"),
                list(map(_key_row, report.keys.values())),
                None,
            )
        click.echo(
            f"\n{len(report.keys)} keys and versions, opened by {report.threshold} of {', '.join(report.recipients)}"
        )
    for node, why in report.missing.items():
        note(f"missing: {node}: {why}")
    for problem in report.problems:
        note(f"wrong: {problem}")
    for key in report.short:
        note(
            f"short: {key.name} version {key.version}: {len(key.nodes)} shares of epoch {key.epoch}, "
            f"{key.threshold} are needed"
        )
    if report.problems:
        raise ManifestError(f"{where}: {len(report.problems)} problems; the first: {report.problems[0]}")
    if report.short:
        raise ClusterError(f"{where}: {len(report.short)} keys can't be restored from it; make another backup")


def _key_row(key: BackedUpKey) -> tuple[Any, ...]:
    state = "destroyed" if key.destroyed else "short" if key.short else "good"
    return (
        key.name,
        key.version,
        key.algorithm,
        key.epoch,
        f"{len(key.nodes)} of {key.threshold}-of-{key.shares}",
        state,
    )


def _key_told(key: BackedUpKey) -> dict[str, Any]:
    return {
        "name": key.name,
        "version": key.version,
        "algorithm": key.algorithm,
        "epoch": key.epoch,
        "threshold": key.threshold,
        "nodes": key.nodes,
        "destroyed": key.destroyed,
    }


# --- open and restore -----------------------------------------------------------------------------------------------


@backup.command("open")
@_where
@_operator
@click.option(
    "--manifest", metavar="FILE", help="The manifest of the cluster to restore into; the operator's own by default."
)
@_valid("7d")
@click.option(
    "--out", metavar="FILE", type=click.Path(path_type=Path), help="Where to write it; into the backup by default."
)
@passphrase_option
@common_options()
@click.pass_obj
def open_backup(
    settings: Settings,
    backup_folder: Path,
    folder: Path,
    manifest: str | None,
    valid: str,
    out: Path | None,
    passphrase_file: str | None,
) -> None:
    """Contribute to a restore: an operator's pieces, sealed to the nodes of the new cluster's manifest.

    Nobody but these nodes can read what is written. Restoring takes the contributions of k operators.
    """
    target = _known_cluster(folder, manifest)
    identity, passphrase = _unlock(folder, passphrase_file)
    opener = load_recovery(folder / RECOVERY_FILE, identity.name, passphrase)
    now = _now_ms()
    made, problems = backups.open_archives(backup_folder, identity, opener, target, now + _valid_ms(valid), now)
    for problem in problems:
        note(f"wrong: {problem}")
    if not made:
        raise ManifestError(f"{identity.name!r} can open no archive of {backup_folder}")
    where = out or backups.contributions_path(backup_folder, identity.name)
    backups.write_contributions(where, made.values())
    emit(
        settings, {"operator": identity.name, "nodes": list(made), "serial": target.serial, "contribution": str(where)}
    )
    if problems:
        raise ManifestError(f"{len(problems)} archives could not be opened; the first: {problems[0]}")


@backup.command()
@_where
@click.option(
    "--contribution",
    "files",
    multiple=True,
    metavar="FILE",
    help="An operator's contribution; by default all in the backup.",
)
@common_options(connects=True)
@click.pass_obj
def restore(settings: Settings, backup_folder: Path, files: tuple[str, ...]) -> None:
    """Bring each node of a fresh cluster its archive, as the client of --config.

    The cluster is the same by its chain of manifests; nodes of the same names have new keys and new tokens. A share is
    stored only where none is, and what was destroyed stays destroyed. Repeating it goes on where it was cut off.
    """
    start_logging(settings)
    client = load_settings(client_config(settings))
    given = [Path(each) for each in files] or sorted(
        each for each in (backup_folder / backups.CONTRIBUTIONS).glob("*") if not each.name.startswith(".")
    )
    with _node_progress(settings, "restoring") as progress:
        done = backups.restore_backup(client, backup_folder, given, progress)
    columns = ("restored", "present", "noted", "destroyed", "refused")
    counts = {node: done.counts(node) for node in done.results}
    rows = [(node, *(each.get(name, 0) for name in columns)) for node, each in counts.items()]
    value = {
        "nodes": {node: {name: each.get(name, 0) for name in columns} for node, each in counts.items()},
        "failed": done.failed,
        "refused": done.refused,
        "short": [_key_told(each) for each in done.short],
    }
    table(settings, ("NODE", *(each.upper() for each in columns)), rows, value)
    for node, why in done.failed.items():
        note(f"failed: {node}: {why}")
    for text in done.refused:
        note(f"refused: {text}")
    if done.short:
        names = ", ".join(f"{key.name} version {key.version}" for key in done.short[:10])
        raise ClusterError(f"{len(done.short)} keys have fewer shares back than they need: {names}")
    if done.failed or done.refused:
        raise ClusterError(f"{len(done.failed)} nodes and {len(done.refused)} keys of a node were not restored")
    note(
        f"next: with the balancer stopped, keyquorum registry rebuild CONFIG --backup {backup_folder}; "
        "then rotate the AES keys, and all others whose uses are limited"
    )


# --- drill ----------------------------------------------------------------------------------------------------------


@backup.command()
@_where
@click.option(
    "--operator",
    "folders",
    multiple=True,
    required=True,
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="An operator's folder; once for each of k.",
)
@click.option("--passphrase-file", "files", multiple=True, metavar="FILE", help="Their passphrases, in the same order.")
@click.option(
    "--work",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where it is done; in memory by default.",
)
@click.option("--module", default="", metavar="FILE", help="The PKCS#11 module; SoftHSM by default.")
@common_options()
@click.pass_obj
def drill(
    settings: Settings,
    backup_folder: Path,
    folders: tuple[Path, ...],
    files: tuple[str, ...],
    work: Path | None,
    module: str,
) -> None:
    """Prove that a backup can be restored: restore all of it under a throw-away token, and use every key once.

    Each archive goes into a fresh store by the code by which a node restores it. Each key is combined of all its
    shares, held against its check value, and used: it decrypts what it encrypted, signs, or makes a MAC. Whole keys are
    in this machine meanwhile: take one without a network. Nothing is left: the token's PIN is never written.
    """
    if files and len(files) != len(folders):
        raise click.UsageError(f"{len(files)} passphrase files for {len(folders)} operators; one for each is needed")
    _, then = backups.open_folder(backup_folder, _known_cluster(folders[0], None).pin)
    secret = X25519PrivateKey.generate()
    opened = _open_for_drill(settings, backup_folder, then, folders, files, secret.public_key().public_bytes_raw())
    told = {
        "secret": base64.b64encode(secret.private_bytes_raw()).decode("ascii"),
        "contributions": [base64.b64encode(each).decode("ascii") for each in opened],
    }
    begun_s = time.monotonic()
    with _work_folder(work) as place:
        shown = _run_drill(settings, backup_folder, then, place, module, json.dumps(told).encode())
    bad = [each for each in shown if each["problem"]]
    live = [each for each in shown if each["shown"]]
    rows = [(each["name"], each["version"], each["algorithm"], each["shares"], _outcome(each)) for each in shown]
    value = {
        "folder": str(backup_folder),
        "cluster": then.name,
        "keys": shown,
        "good": len(live),
        "destroyed": len(shown) - len(live) - len(bad),
        "bad": len(bad),
        "seconds": round(time.monotonic() - begun_s, 1),
    }
    table(settings, ("KEY", "VERSION", "ALGORITHM", "SHARES", "SHOWN"), rows, value)
    gone = value["destroyed"]
    note(f"{len(live)} keys were restored and used in {value['seconds']} s, {gone} are destroyed, {len(bad)} failed")
    if bad:
        raise ClusterError(f"{len(bad)} keys could not be restored; the first: {bad[0]['name']}: {bad[0]['problem']}")


def _outcome(told: dict[str, Any]) -> str:
    return f"FAILED: {told['problem']}" if told["problem"] else told["shown"] or "destroyed"


def _open_for_drill(
    settings: Settings, where: Path, then: Cluster, folders: Sequence[Path], files: Sequence[str], public: bytes
) -> list[bytes]:
    """Each operator's contributions, sealed to a key that is thrown away."""
    made: list[bytes] = []
    for number, folder in enumerate(folders):
        if not files:
            note(f"opening the pieces of the operator in {folder}")
        identity, passphrase = _unlock(folder, files[number] if files else None)
        opener = load_recovery(folder / RECOVERY_FILE, identity.name, passphrase)
        now = _now_ms()
        given, problems = backups.open_archives(where, identity, opener, then, now + _UNITS_MS["d"], now, public)
        if problems:
            raise ManifestError(f"{identity.name}: {problems[0]}")
        made += given.values()
    return made


@contextmanager
def _work_folder(work: Path | None) -> Iterator[Path]:
    """An empty folder of mode 0700, in memory if none is told; it is gone afterwards."""
    above = work
    if above is None:
        above = Path("/dev/shm")  # noqa: S108 - a folder of its own is made in it
        if not os.access(above, os.W_OK):
            raise ConfigError(f"{above} can't be written; --work names a folder for the drill")
    place = Path(tempfile.mkdtemp(prefix="keyquorum-drill-", dir=above))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _run_drill(
    settings: Settings, where: Path, then: Cluster, place: Path, module: str, told: bytes
) -> list[dict[str, Any]]:
    """Have a process of its own do it; what each key showed."""
    keys = {node: count for node, (count, _) in backups.verify_backup(where, then.pin).counts.items()}
    # -P: the current folder is no place to find modules in.
    words = [sys.executable, "-P", "-m", "nodes", "drill", "--backup", str(where.resolve()), "--work", str(place)]
    words += ["--pin", then.pin.hex(), *(("--module", module) if module else ())]
    shown: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as child,
    ):
        try:
            source, sink = cast(IO[bytes], child.stdout), cast(IO[bytes], child.stdin)
            with suppress(BrokenPipeError):
                sink.write(told)
                sink.close()
            with _node_progress(settings, "restoring") as progress:
                for line in source:
                    each = json.loads(line)
                    if "node" in each:
                        progress(each["node"], each["done"], keys[each["node"]])
                    else:
                        shown.append(each)
            code = child.wait(DRILL_TIMEOUT_S)
        finally:
            child.kill()
        errors.seek(0)
        why = errors.read(4096).decode("utf-8", errors="replace").strip().splitlines()
    if code:
        message = why[-1].removeprefix("error: ") if why else f"exit code {code}"
        raise ClusterError(f"the drill failed: {message}")
    return shown
