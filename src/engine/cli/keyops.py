"""``keyquorum key`` and the uses of keys: files and pipes in, the verbs of the client, files and pipes out.

It knows the public verbs alone; how they reach the nodes is the client's.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from engine.cli.output import (
    Settings,
    byte_progress,
    client_config,
    common_options,
    decode_bytes,
    emit,
    encode_bytes,
    note,
    reading,
    spinner,
    start_logging,
    table,
    writing,
)
from engine.cli.repairs import repair_all
from engine.client.calls import KeySettings
from engine.client.client import Engine, connect
from engine.client.files import decrypt_stream, encrypt_stream, rewrap_stream, sign_stream, verify_stream
from engine.client.local import LocalCluster
from engine.errors import ClusterError
from engine.keys import ALGORITHMS
from engine.protocol.wire import MAX_AAD, MAX_DATA

__all__ = ["decrypt", "encrypt", "flush", "key", "mac", "rewrap", "sign", "verify", "verify_mac"]

F = TypeVar("F", bound=Callable[..., Any])

_DURATION: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([smhd])", re.ASCII)
_UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
MATERIAL_MAX: Final = 64 * 1024
PROOF_MAX: Final = 8 * 1024

_name = click.argument("name")
_source = click.argument("source", metavar="[FILE]", default="-")
_version = click.option(
    "--version", type=click.IntRange(1), metavar="V", help="Another version of the key than the newest."
)
_out = click.option("--out", metavar="FILE", default="-", help="Where the result goes; the standard output by default.")
_force = click.option("--force", is_flag=True, help="Write binary data to a terminal too.")
_algorithm = click.argument("algorithm", type=click.Choice(tuple(ALGORITHMS)), metavar="ALGORITHM")


def _shares(command: F) -> F:
    command = click.option("--shares", type=click.IntRange(1, 64), help="n, over how many nodes the key is spread.")(
        command
    )
    return click.option("--threshold", type=click.IntRange(1, 64), help="t, how many shares give it back.")(command)


def _encoding(command: F) -> F:
    """How signatures and MACs are written: raw bytes, base64 or hex."""
    command = click.option("--hex", "encoding", flag_value="hex", help="As hex digits.")(command)
    command = click.option("--base64", "encoding", flag_value="base64", help="As base64.")(command)
    return click.option("--raw", "encoding", flag_value="raw", default="raw", help="As raw bytes (the default).")(
        command
    )


def _associated(command: F) -> F:
    command = click.option("--aad-file", metavar="FILE", help="The same, from a file.")(command)
    return click.option("--aad", metavar="TEXT", help="Associated data: authenticated, not encrypted.")(command)


@contextmanager
def _engine(settings: Settings) -> Iterator[Engine]:
    start_logging(settings)
    with connect(client_config(settings)) as kq:
        yield kq


def _read(path: str, limit: int, what: str) -> bytes:
    """All of a small input; ``ValueError`` beyond the limit, in bytes."""
    with reading(path) as source:
        data = source.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"{what}: longer than {limit} bytes")
    return data


# --- keys -----------------------------------------------------------------------------------------------------------


@click.group(no_args_is_help=True)
def key() -> None:
    """Create, import, show, rotate, refresh, reshare, disable and destroy keys.

    \b
    Examples:
      keyquorum key create orders aes-256-gcm
      keyquorum key create tls ecdsa-p256-sha256 --threshold 3 --shares 5
      keyquorum key import legacy rsa-2048-pss-sha256 legacy.pem
      keyquorum key list 'orders/*' -o json
      keyquorum key public tls --out tls.pem
      keyquorum key rotate orders
      keyquorum key show orders --versions
      keyquorum key refresh orders
      keyquorum key reshare orders --threshold 3 --shares 5
      keyquorum key degraded --without node3
      keyquorum key repair
      keyquorum key disable orders
      keyquorum key enable orders
      keyquorum key destroy orders --after 7d
      keyquorum key restore orders
      keyquorum key destroy orders
    """


@key.command()
@_name
@_algorithm
@_shares
@click.option(
    "--uses-max",
    type=click.IntRange(1),
    metavar="N",
    help="How often each version may encrypt, sign and make MACs, by all nodes together; 2^31 for AES-GCM by default.",
)
@common_options(connects=True)
@click.pass_obj
def create(
    settings: Settings,
    name: str,
    algorithm: str,
    threshold: int | None,
    shares: int | None,
    uses_max: int | None,
) -> None:
    """Generate a key inside the cluster, split t-of-n.

    Without --threshold and --shares the key is spread over at most 5 nodes, with a majority as threshold (a cluster
    made by `keyquorum up` remembers its own).
    """
    threshold, shares = _share_counts(settings, threshold, shares)
    with _engine(settings) as kq, spinner(settings, f"generating {name}"):
        info = kq.create_key(name, algorithm, threshold, shares, uses_max=uses_max, timeout=settings.timeout_s)
    _emit_info(settings, asdict(info))


def _share_counts(settings: Settings, threshold: int | None, shares: int | None) -> tuple[int | None, int | None]:
    """What was given, or what the local cluster that the configuration belongs to was made for."""
    config = client_config(settings).resolve()
    folder = config.parents[2] if len(config.parents) > 2 else config.parent
    if threshold is None and shares is None and (folder / "cluster.toml").exists():
        local = LocalCluster.open(folder)
        return local.threshold, local.shares
    return threshold, shares


def _emit_info(settings: Settings, info: dict[str, Any]) -> None:
    for warning in info["warnings"]:
        note(f"warning: {warning}")
    if settings.json:
        emit(settings, info)
        return
    usual = (("min_version", 1), ("uses_max", 0))
    hidden = ("public_key", "warnings", "shares", *(name for name, value in usual if info[name] == value))
    shown = {name: value for name, value in info.items() if name not in hidden}
    shown["threshold"] = f"{info['threshold']} of {info['shares']} shares"
    shown["destroy_at"] = _instant(info["destroy_at"])
    emit(settings, shown)


def _instant(at_s: float | None) -> str:
    """A time in UTC as people write it; empty for none."""
    if at_s is None:
        return ""
    return datetime.fromtimestamp(at_s, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00") + " UTC"


def _duration(value: str) -> float:
    """The seconds of a number with a unit."""
    match = _DURATION.fullmatch(value)
    if match is None:
        raise click.BadParameter(f"{value[:40]!r} is no time such as 90s, 15m, 1h or 7d")
    return float(match[1]) * _UNITS_S[match[2]]


@key.command("import")
@_name
@_algorithm
@click.argument("source", metavar="FILE")
@_encoding
@_shares
@common_options(connects=True)
@click.pass_obj
def import_(
    settings: Settings,
    name: str,
    algorithm: str,
    source: str,
    encoding: str,
    threshold: int | None,
    shares: int | None,
) -> None:
    """Import a key: raw bytes for AES and HMAC, unencrypted PKCS#8 (DER or PEM) for the others.

    FILE may be - for the standard input. Copies of the key outside the cluster stay where they are: erase them.
    """
    material = decode_bytes(_read(source, MATERIAL_MAX, source), encoding, source)
    threshold, shares = _share_counts(settings, threshold, shares)
    with _engine(settings) as kq, spinner(settings, f"importing {name}"):
        info = kq.import_key(name, algorithm, material, threshold, shares, timeout=settings.timeout_s)
    _emit_info(settings, asdict(info))


@key.command("list")
@click.argument("pattern", default="*")
@common_options(connects=True)
@click.pass_obj
def list_(settings: Settings, pattern: str) -> None:
    """List the keys whose names match PATTERN (a shell glob; all by default)."""
    with _engine(settings) as kq:
        keys = kq.list_keys(pattern, timeout=settings.timeout_s)
    rows = [
        (each.name, each.algorithm, each.version, f"{each.threshold}-of-{each.shares}", each.state) for each in keys
    ]
    table(settings, ("KEY", "ALGORITHM", "VERSION", "SHARES", "STATE"), rows, [asdict(each) for each in keys])


@key.command("show")
@_name
@_version
@click.option("--versions", is_flag=True, help="A line for each version, the newest first and at most 100.")
@common_options(connects=True)
@click.pass_obj
def show(settings: Settings, name: str, version: int | None, versions: bool) -> None:
    """Show what the signed manifest and settings say about a key: about its newest version, or another one."""
    if versions and version is not None:
        raise click.UsageError("--version and --versions exclude each other")
    with _engine(settings) as kq:
        if not versions:
            _emit_info(settings, asdict(kq.key_info(name, version=version, timeout=settings.timeout_s)))
            return
        found = kq.key_versions(name, timeout=settings.timeout_s)
    rows = [
        (each.version, each.epoch, f"{each.threshold}-of-{each.shares}", ", ".join(each.holders), each.key_id)
        for each in found
    ]
    table(settings, ("VERSION", "EPOCH", "SHARES", "HOLDERS", "ID"), rows, [asdict(each) for each in found])


@key.command("rotate")
@_name
@common_options(connects=True)
@click.pass_obj
def rotate(settings: Settings, name: str) -> None:
    """Make the next version of a key, which is what encrypts, signs and makes MACs from now on.

    Older versions go on decrypting and verifying. If somebody else rotates the key meanwhile, that version is shown.
    """
    with _engine(settings) as kq, spinner(settings, f"rotating {name}"):
        info = kq.rotate_key(name, timeout=settings.timeout_s)
    _emit_info(settings, asdict(info))


@key.command("public")
@_name
@_version
@_out
@common_options(connects=True)
@click.pass_obj
def public(settings: Settings, name: str, version: int | None, out: str) -> None:
    """Write the public key as PEM (SubjectPublicKeyInfo), as openssl takes it."""
    with _engine(settings) as kq:
        pem = kq.public_key(name, version=version, timeout=settings.timeout_s)
    if settings.json and out == "-":
        emit(settings, {"name": name, "public_key": pem})
        return
    with writing(out, text=True) as sink:
        sink.write(pem.encode())


@key.command("refresh")
@_name
@common_options(connects=True)
@click.pass_obj
def refresh(settings: Settings, name: str) -> None:
    """Replace all shares of a key by new ones. The key stays; shares that were stolen before are worthless.

    All its holders must be up and have their share.
    """
    with _engine(settings) as kq, spinner(settings, f"refreshing {name}"):
        info = kq.refresh_key(name, timeout=settings.timeout_s)
    _emit_info(settings, asdict(info))


@key.command("reshare")
@_name
@click.option("--threshold", type=int, metavar="T", help="How many shares suffice; by default as before.")
@click.option("--shares", type=int, metavar="N", help="How many holders, the first of the key's placement group.")
@click.option("--holder", "holders", multiple=True, metavar="NODE", help="A node to hold a share; once for each.")
@click.option(
    "--without", multiple=True, metavar="NODE", help="A holder that is given up, and need not be up; once for each."
)
@common_options(connects=True)
@click.pass_obj
def reshare(
    settings: Settings,
    name: str,
    threshold: int | None,
    shares: int | None,
    holders: tuple[str, ...],
    without: tuple[str, ...],
) -> None:
    """Share a key among other holders, or with another threshold. The key stays, and nobody puts it together for that.

    All its holders must be up but those given up. Where no more than its threshold are left, a node tries the new
    shares before the old ones are erased.
    """
    with _engine(settings) as kq, spinner(settings, f"resharing {name}"):
        info = kq.reshare_key(
            name, threshold, shares, holders=holders or None, without=without, timeout=settings.timeout_s
        )
    _emit_info(settings, asdict(info))


@key.command("degraded")
@click.option("--without", default="", metavar="NODE", help="As it would be if this node were lost.")
@common_options(connects=True)
@click.pass_obj
def degraded(settings: Settings, without: str) -> None:
    """List the keys that lack a share, and how many they have left, by the registry's books.

    With more than the threshold left, balancers make new shares by themselves; with just the threshold, `key repair`
    does; with fewer, a node that holds one must come back.
    """
    with _engine(settings) as kq, spinner(settings, "asking the registry"):
        found = kq.degraded_keys(without, timeout=settings.timeout_s)
    rows = [
        (each.name or "(may not be listed)", each.version, each.left, each.threshold, ", ".join(each.missing))
        for each in found
    ]
    value = [{**asdict(each), "left": each.left} for each in found]
    table(settings, ("KEY", "VERSION", "SHARES LEFT", "THRESHOLD", "MISSING AT"), rows, value)


@key.command("repair")
@click.argument("names", metavar="[KEY]...", nargs=-1)
@common_options(connects=True)
@click.pass_obj
def repair(settings: Settings, names: tuple[str, ...]) -> None:
    """Have the missing shares of keys made anew, of all that lack one by default: at the same nodes, or in their place.

    The keys stay. Where no more than the threshold of shares are left, a node tries the new ones before the old are
    erased, by this client's grant.
    """
    with _engine(settings) as kq:
        found = kq.degraded_keys(timeout=settings.timeout_s)
        chosen = [each for each in found if not names or each.name in names]
        for name in names:
            if all(each.name != name for each in chosen):
                kq.key_info(name, timeout=settings.timeout_s)  # or says that there is none
                note(f"{name} lacks no share")
        failed = repair_all(settings, kq, chosen)
    value = [{"name": each.name, "version": each.version, "repaired": each not in failed} for each in chosen]
    emit(settings, value, f"{len(chosen) - len(failed)} keys repaired")
    if failed:
        raise ClusterError(f"{len(failed)} of {len(chosen)} keys still lack a share")


@key.command("disable")
@_name
@common_options(connects=True)
@click.pass_obj
def disable(settings: Settings, name: str) -> None:
    """Have every node refuse every use of a key until it is enabled again. Nothing of it is lost."""
    with _engine(settings) as kq, spinner(settings, f"disabling {name}"):
        _emit_settings(settings, kq.disable_key(name, timeout=settings.timeout_s))


@key.command("enable")
@_name
@common_options(connects=True)
@click.pass_obj
def enable(settings: Settings, name: str) -> None:
    """Let a disabled key be used again."""
    with _engine(settings) as kq, spinner(settings, f"enabling {name}"):
        _emit_settings(settings, kq.enable_key(name, timeout=settings.timeout_s))


@key.command("min-version")
@_name
@click.argument("version", type=click.IntRange(1, 2**32 - 1))
@common_options(connects=True)
@click.pass_obj
def min_version(settings: Settings, name: str, version: int) -> None:
    """Have every node refuse uses of the versions of a key below VERSION. It can be lowered again."""
    with _engine(settings) as kq, spinner(settings, f"setting the least version of {name}"):
        _emit_settings(settings, kq.set_min_version(name, version, timeout=settings.timeout_s))


@key.command("restore")
@_name
@common_options(connects=True)
@click.pass_obj
def restore(settings: Settings, name: str) -> None:
    """Take back `key destroy --after` before the time has come. The key is enabled or disabled as it was."""
    with _engine(settings) as kq, spinner(settings, f"restoring {name}"):
        _emit_settings(settings, kq.restore_key(name, timeout=settings.timeout_s))


def _emit_settings(settings: Settings, told: KeySettings) -> None:
    text = f"{told.name} is {told.state}"
    if told.destroy_at is not None:
        text = f"{told.name} is refused from now on and destroyed at {_instant(told.destroy_at)} unless it is restored"
    if told.min_version > 1:
        text += f", versions below {told.min_version} are retired"
    if told.pending:
        text += f"; not told yet, and told when they are back: {', '.join(told.pending)}"
    emit(settings, {**asdict(told), "state": told.state}, text)


@key.command("destroy")
@_name
@click.option("--yes", is_flag=True, help="Destroy without asking.")
@click.option(
    "--after",
    type=_duration,
    metavar="TIME",
    help="Refuse all uses now and destroy only then: 90s, 15m, 1h, 7d ... `key restore` takes it back.",
)
@common_options(connects=True)
@click.pass_obj
def destroy(settings: Settings, name: str, yes: bool, after: float | None) -> None:
    """Destroy a key for good, all versions. What was encrypted with it can never be read again."""
    if after is not None:
        with _engine(settings) as kq, spinner(settings, f"ordering the destruction of {name}"):
            _emit_settings(settings, kq.destroy_key(name, after=after, timeout=settings.timeout_s))
        return
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("destroying a key needs --yes where nobody can be asked")
        click.confirm(f"Destroy {name} for good?", abort=True, err=True)
    with _engine(settings) as kq, spinner(settings, f"destroying {name}"):
        done = kq.destroy_key(name, timeout=settings.timeout_s)
    text = f"destroyed {name} on {', '.join(done.confirmed) or 'no node yet'}"
    if done.pending:
        text += f"; when they are back: {', '.join(done.pending)}"
    emit(settings, asdict(done), text)


@click.command()
@click.argument("name", default="")
@common_options(connects=True)
@click.pass_obj
def flush(settings: Settings, name: str) -> None:
    """Drop a key (or all) from the nodes' caches; the next use gathers its shares again."""
    with _engine(settings) as kq:
        dropped = kq.flush(name, timeout=settings.timeout_s)
    emit(settings, {"name": name, "dropped": dropped}, f"dropped {dropped}")


# --- uses -----------------------------------------------------------------------------------------------------------


def _aad(text: str | None, file: str | None) -> bytes:
    if text is not None and file is not None:
        raise click.UsageError("--aad and --aad-file exclude each other")
    return _read(file, MAX_AAD, "associated data") if file is not None else os.fsencode(text or "")


def _size(path: str) -> int | None:
    """The length of a file, for the progress bar."""
    return Path(path).stat().st_size if path != "-" and Path(path).is_file() else None


@click.command()
@_name
@_source
@_out
@_associated
@_force
@common_options(connects=True)
@click.pass_obj
def encrypt(
    settings: Settings, name: str, source: str, out: str, aad: str | None, aad_file: str | None, force: bool
) -> None:
    """Encrypt a file of any length, or the standard input.

    The file is encrypted in chunks of 48 KiB that can't be cut off, moved or mixed with others.

    \b
    Examples:
      keyquorum encrypt orders report.pdf --out report.kq
      tar c /etc | keyquorum encrypt backups --aad host7 > etc.kq
    """
    associated = _aad(aad, aad_file)
    _stream(settings, encrypt_stream, "encrypting", name, source, out, associated, force=force, private=False)


@click.command()
@_name
@_source
@_out
@_associated
@_force
@common_options(connects=True)
@click.pass_obj
def decrypt(
    settings: Settings, name: str, source: str, out: str, aad: str | None, aad_file: str | None, force: bool
) -> None:
    """Decrypt what `keyquorum encrypt` wrote.

    With --out the file (of mode 0600) appears only once all of it is verified. On the standard output verified chunks
    come as they are; only exit code 0 says that nothing is missing at the end.

    \b
    Examples:
      keyquorum decrypt orders report.kq --out report.pdf
      keyquorum decrypt backups etc.kq --aad host7 | tar t
    """
    associated = _aad(aad, aad_file)
    _stream(settings, decrypt_stream, "decrypting", name, source, out, associated, force=force, private=True)


@click.command()
@_name
@_source
@_out
@_associated
@_force
@common_options(connects=True)
@click.pass_obj
def rewrap(
    settings: Settings, name: str, source: str, out: str, aad: str | None, aad_file: str | None, force: bool
) -> None:
    """Have what `keyquorum encrypt` wrote encrypted anew, by the newest version of the key.

    No plaintext leaves the nodes. With --out the file appears only once all of it is done, and may be the one that is
    read.

    \b
    Example:
      keyquorum key rotate orders && keyquorum rewrap orders report.kq --out report.kq
    """
    associated = _aad(aad, aad_file)
    _stream(settings, rewrap_stream, "rewrapping", name, source, out, associated, force=force, private=False)


def _stream(
    settings: Settings,
    work: Callable[..., int],
    what: str,
    name: str,
    source: str,
    out: str,
    associated: bytes,
    *,
    force: bool,
    private: bool,
) -> None:
    """Run a stream verb between two files."""
    with (
        reading(source) as data,
        _engine(settings) as kq,
        writing(out, force=force, private=private) as sink,
        byte_progress(settings, f"{what} with {name}", _size(source)) as progress,
    ):
        done = work(kq, name, data, sink, associated, progress, timeout=settings.timeout_s)
    if settings.json and out != "-":
        emit(settings, {"name": name, "out": out, "bytes": done})


@click.command()
@_name
@_source
@_out
@_encoding
@_force
@common_options(connects=True)
@click.pass_obj
def sign(settings: Settings, name: str, source: str, out: str, encoding: str, force: bool) -> None:
    """Sign a file of any length, or the standard input. ECDSA signatures are DER, as openssl takes them.

    \b
    Examples:
      keyquorum sign tls report.pdf --out report.sig
      openssl dgst -sha256 -verify <(keyquorum key public tls) -signature report.sig report.pdf
    """
    with reading(source) as data, _engine(settings) as kq, spinner(settings, f"signing with {name}"):
        signature = sign_stream(kq, name, data, timeout=settings.timeout_s)
    _write_proof(settings, {"name": name, "signature": signature}, signature, out, encoding, force)


@click.command()
@_name
@_source
@click.option("--signature", required=True, metavar="FILE", help="The signature; - is the standard input.")
@_encoding
@common_options(connects=True)
@click.pass_obj
def verify(settings: Settings, name: str, source: str, signature: str, encoding: str) -> None:
    """Verify the signature of a file of any length, or of the standard input.

    The exit code is 0 if it is good, 1 if not.

    \b
    Example:
      keyquorum verify tls report.pdf --signature report.sig
    """
    _one_input(signature, source)
    proof = decode_bytes(_read(signature, PROOF_MAX, signature), encoding, signature)
    with reading(source) as data, _engine(settings) as kq:
        verify_stream(kq, name, data, proof, timeout=settings.timeout_s)
    emit(settings, {"name": name, "valid": True}, "good signature")


@click.command()
@_name
@_source
@_out
@_encoding
@_force
@common_options(connects=True)
@click.pass_obj
def mac(settings: Settings, name: str, source: str, out: str, encoding: str, force: bool) -> None:
    """Compute the MAC of at most 48 KiB.

    \b
    Example:
      keyquorum mac hooks body.json --hex
    """
    message = _read(source, MAX_DATA, source)
    with _engine(settings) as kq:
        tag = kq.mac(name, message, timeout=settings.timeout_s)
    _write_proof(settings, {"name": name, "mac": tag}, tag, out, encoding, force)


@click.command("verify-mac")
@_name
@_source
@click.option("--mac", "tag", required=True, metavar="FILE", help="The MAC; - is the standard input.")
@_encoding
@common_options(connects=True)
@click.pass_obj
def verify_mac(settings: Settings, name: str, source: str, tag: str, encoding: str) -> None:
    """Verify the MAC of at most 48 KiB.

    The exit code is 0 if it is good, 1 if not.

    \b
    Example:
      keyquorum verify-mac hooks body.json --mac body.mac --hex
    """
    _one_input(tag, source)
    proof = decode_bytes(_read(tag, PROOF_MAX, tag), encoding, tag)
    message = _read(source, MAX_DATA, source)
    with _engine(settings) as kq:
        kq.verify_mac(name, message, proof, timeout=settings.timeout_s)
    emit(settings, {"name": name, "valid": True}, "good MAC")


def _one_input(first: str, second: str) -> None:
    if first == second == "-":
        raise click.UsageError("only one of the two can be the standard input")


def _write_proof(settings: Settings, told: dict[str, Any], proof: bytes, out: str, encoding: str, force: bool) -> None:
    """Write a signature or MAC: as JSON (base64), or as bytes in the encoding asked for."""
    if settings.json and out == "-":
        emit(settings, told)
        return
    with writing(out, force=force, text=encoding != "raw") as sink:
        sink.write(encode_bytes(proof, encoding))
    if settings.json:
        emit(settings, told | {"out": out})
