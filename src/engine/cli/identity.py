"""``keyquorum init``: the keys, the identity card and the configuration of one new member, in a folder of its own.

It opens no connection and knows nothing of other members.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from engine.cli.output import Settings, common_options, emit, note
from engine.client.config import Identity, check_private, create_identity, load_identity, write_card, write_private
from engine.errors import ConfigError, TokenError
from engine.protocol.manifest import Member, Role

__all__ = [
    "CONFIG_FILES",
    "IDENTITY_FILE",
    "MANIFEST_FILE",
    "fingerprint",
    "init",
    "open_operator",
    "passphrase_option",
]

F = TypeVar("F", bound=Callable[..., Any])

IDENTITY_FILE: Final = "identity.toml"
MANIFEST_FILE: Final = "cluster.manifest"
CONFIG_FILES: Final[dict[str, str]] = {
    "node": "node.toml",
    "client": "client.toml",
    "balancer": "balancer.toml",
    "operator": "operator.toml",
}
PASSPHRASE_VARIABLE: Final = "KEYQUORUM_OPERATOR_PASSPHRASE"  # noqa: S105 - the variable's name, not its value
PUBLISH_PORT_BEYOND: Final = 1_000
"""Not the next port: that is often another node's, on a host that has several."""
PASSPHRASE_MIN: Final = 8
TOKEN_LABEL_MAX: Final = 32
"""Longest label of a token in bytes (CK_TOKEN_INFO, PKCS#11 v2.40, 3.2)."""
TOKEN_TIMEOUT_S: Final = 120

_HEAD: Final = """\
# The {role} {name}, made by `keyquorum init {role}`. Paths are relative to this folder.
version = 1
identity = {identity}
# The cluster this {role} trusts. `keyquorum cluster join` puts the manifest here and writes the pin.
manifest = {manifest}
manifest_pin = ""
"""
_BODIES: Final[dict[str, str]] = {
    "client": """\
# Deadline of a request in seconds, where the caller names none.
timeout_s = 5.0
""",
    "operator": "",
    "balancer": """\
# The registry's folder. Back it up: it knows which keys exist.
data = "data"
# Where to listen, if not at the endpoints of the manifest (behind a NAT, in a container):
# bind = "tcp://0.0.0.0:7400"
# publish_bind = "tcp://0.0.0.0:7401"
# Milliseconds between two rounds of the control loop.
tick_ms = 1000

# Its page, metrics for Prometheus and the plan as JSON; elsewhere than on loopback with TLS and a token:
# [http]
# bind = "127.0.0.1:9465"
""",
    "node": """\
# Sealed shares, the audit log and a SoftHSM token's files.
data = "data"
# Where to listen, if not at the endpoints of the manifest (behind a NAT, in a container):
# bind = "tcp://0.0.0.0:7300"
# publish_bind = "tcp://0.0.0.0:8300"

[token]
label = {label}
# file:PATH, env:NAME or credential:NAME (systemd's). Never on the disk of the data folder: together they open every
# share of this node.
pin = {pin}
# Another PKCS#11 token than SoftHSM:
# module = "/usr/lib/vendor/libpkcs11.so"

[cache]
# How long, and how many, loaded keys stay in the token.
ttl_s = 300.0
max_keys = 1024

[create]
# When a new key is acknowledged: "up" (every holder that is up, t+1 at least), "quorum" (t+1) or "all".
acknowledge = "up"

[limits]
# How many shares may leave this node in a second, lastingly: under one client's grants, to one node, and in all;
# and for how many seconds' worth at once.
client_per_s = 200.0
combiner_per_s = 400.0
total_per_s = 800.0
burst_s = 10.0

[audit]
# "group": records of uses of keys are synced within 20 ms or so; "strict": no reply before its record is on the disk.
mode = "group"
# "hmac": the audit log has an HMAC in place of a key's name.
key_names = "plain"
""",
}


def fingerprint(member: Member) -> str:
    """A member's keys in 32 hex digits (128 bits of their SHA-256), for two people to compare by voice."""
    digest = hashlib.sha256(member.sign_public + member.curve_public).hexdigest()
    return "-".join(digest[start : start + 4] for start in range(0, 32, 4))


def passphrase_option(command: F) -> F:
    """The option that names the file of an operator's passphrase."""
    return click.option(
        "--passphrase-file",
        type=click.Path(dir_okay=False),
        help=f"The operator's passphrase (a file of mode 0600); else {PASSPHRASE_VARIABLE} or a prompt.",
    )(command)


def read_passphrase(file: str | None, *, new: bool) -> str:
    """The operator's passphrase, from a private file, the environment or the person; never from the arguments."""
    if file is not None:
        check_private(Path(file))
        found = Path(file).read_text(encoding="utf-8").strip("\r\n")
    elif PASSPHRASE_VARIABLE in os.environ:
        found = os.environ[PASSPHRASE_VARIABLE]
    elif sys.stdin.isatty():
        found = click.prompt("The operator's passphrase", hide_input=True, confirmation_prompt=new, err=True)
    else:
        raise ConfigError(
            f"an operator's key needs a passphrase: --passphrase-file, {PASSPHRASE_VARIABLE} or a terminal"
        )
    if new and len(found) < PASSPHRASE_MIN:
        raise ConfigError(f"the passphrase has {len(found)} characters, at least {PASSPHRASE_MIN} are needed")
    return found


def open_operator(folder: str | Path, passphrase_file: str | None) -> Identity:
    """The operator whose identity is in the folder."""
    file = Path(folder) / IDENTITY_FILE
    check_private(file)
    identity = load_identity(file, read_passphrase(passphrase_file, new=False))
    if identity.role != "operator":
        raise ConfigError(f"{file}: {identity.name!r} is a {identity.role}, not an operator")
    return identity


@click.group(no_args_is_help=True)
def init() -> None:
    """Make a new member: its keys, its identity card and its configuration.

    Each member is made on its own host, in a folder of its own, so that its secret keys never travel. Its card
    (NAME.card) is public: give it to an operator, who puts the member into the cluster's manifest.

    \b
    Examples:
      keyquorum init operator ./alice --name alice
      keyquorum init node /etc/keyquorum/node1 --name node1 \\
          --endpoint tcp://10.0.0.11:7300 --location paris/room1/rack3/host11
      keyquorum init balancer ./bal --name bal --endpoint tcp://10.0.0.5:7400 \\
          --publish-endpoint tcp://10.0.0.5:7401
      keyquorum init client ./shop --name shop
    """


def _name_option(command: F) -> F:
    return click.option("--name", required=True, help="The member's name, unique in the cluster.")(command)


@init.command("operator")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_name_option
@passphrase_option
@common_options()
@click.pass_obj
def init_operator(settings: Settings, folder: Path, name: str, passphrase_file: str | None) -> None:
    """Make an operator, who signs the cluster's manifest.

    Its signing key is encrypted under a passphrase. An operator has no connection to the cluster and may live on a
    machine without a network.
    """
    _check_free(folder)
    passphrase = read_passphrase(passphrase_file, new=True)
    _make(settings, folder, name, "operator", passphrase=passphrase)


@init.command("client")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_name_option
@common_options()
@click.pass_obj
def init_client(settings: Settings, folder: Path, name: str) -> None:
    """Make a client, who uses keys as far as the cluster's policy lets it."""
    _make(settings, folder, name, "client")


@init.command("balancer")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_name_option
@click.option("--endpoint", required=True, metavar="tcp://HOST:PORT", help="Where nodes and clients reach it.")
@click.option("--publish-endpoint", required=True, metavar="tcp://HOST:PORT", help="Where it publishes its tables.")
@common_options()
@click.pass_obj
def init_balancer(settings: Settings, folder: Path, name: str, endpoint: str, publish_endpoint: str) -> None:
    """Make a balancer, which keeps the registry of keys and runs the control loop."""
    _make(settings, folder, name, "balancer", endpoint=endpoint, publish_endpoint=publish_endpoint)


@init.command("node")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@_name_option
@click.option("--endpoint", required=True, metavar="tcp://HOST:PORT", help="Where clients and other nodes reach it.")
@click.option(
    "--publish-endpoint",
    metavar="tcp://HOST:PORT",
    help="Where it publishes how busy it is; by default the endpoint with 1000 added to the port. 'none' for nowhere.",
)
@click.option(
    "--location", required=True, metavar="SITE/ROOM/RACK/HOST", help="Where it stands; shares are spread by it."
)
@click.option(
    "--pin-file", type=click.Path(dir_okay=False, path_type=Path), help="The token's PIN; by default DIR/../NAME.pin."
)
@click.option("--token/--no-token", default=None, help="Make the SoftHSM token now, or leave it for later.")
@common_options()
@click.pass_obj
def init_node(
    settings: Settings,
    folder: Path,
    name: str,
    endpoint: str,
    publish_endpoint: str | None,
    location: str,
    pin_file: Path | None,
    token: bool | None,
) -> None:
    """Make a node, which keeps shares sealed by its token and serves requests.

    The PIN of the token goes to a file of mode 0600 outside the folder: whoever has both can open every share.
    """
    pin = (pin_file or folder.parent / f"{name.replace('/', '_')}.pin").resolve()
    if pin.is_relative_to(folder.resolve()):
        raise ConfigError(f"the PIN file {pin} lies in the node's folder {folder}; keep it elsewhere")
    if pin.exists():
        raise ConfigError(f"the PIN file {pin} exists already; it is never overwritten")
    publish = _publishing_beside(endpoint) if publish_endpoint is None else publish_endpoint.removesuffix("none")
    _make(settings, folder, name, "node", endpoint=endpoint, publish_endpoint=publish, location=location, pin=pin)
    config = folder / CONFIG_FILES["node"]
    if token is None:
        token = (
            sys.stdin.isatty() and not settings.json and click.confirm("Make its token now?", default=True, err=True)
        )
    if token:
        _make_token(config)
        note(f"made the token of {name}; its PIN is in {pin}")
    else:
        note(f"make its token with: python -m nodes init --config {config.resolve()}")


def _make_token(config: Path) -> None:
    # -P: the current folder is no place to find modules in.
    words = [sys.executable, "-P", "-m", "nodes", "init", "--config", str(config)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=TOKEN_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise TokenError(f"making the token took longer than {TOKEN_TIMEOUT_S} s") from None
    if done.returncode != 0:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        message = f"the token could not be made: {lines[-1].removeprefix('error: ')}"
        raise ConfigError(message) if done.returncode == 1 else TokenError(message)


def _check_free(folder: Path) -> None:
    if (folder / IDENTITY_FILE).exists():
        raise ConfigError(f"{folder}: a member lives there already; an identity is never overwritten")


def _make(
    settings: Settings,
    folder: Path,
    name: str,
    role: Role,
    *,
    endpoint: str = "",
    publish_endpoint: str = "",
    location: str = "",
    pin: Path | None = None,
    passphrase: str = "",
) -> None:
    """Write identity, card and configuration, and print where they are."""
    _check_free(folder)
    for address in filter(None, (endpoint, publish_endpoint)):
        _check_endpoint(address)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity = create_identity(folder / IDENTITY_FILE, name, role, passphrase)
    member = identity.member(endpoint=endpoint, publish_endpoint=publish_endpoint, location=location)
    card = folder / f"{name.replace('/', '_')}.card"
    write_card(card, member, identity.signing)
    config = folder / CONFIG_FILES[role]
    write_private(config, _config_text(role, name, pin).encode())
    told = {
        "name": name,
        "role": role,
        "identity": str(folder / IDENTITY_FILE),
        "card": str(card),
        "config": str(config),
        "fingerprint": fingerprint(member),
    }
    emit(settings, told)
    note(f"next: give {card} to an operator, who signs it into the cluster's manifest")


def _config_text(role: Role, name: str, pin: Path | None) -> str:
    # A JSON string of ASCII is a TOML basic string too (TOML 1.0, "String").
    label = f"keyquorum-{name}".encode()[-TOKEN_LABEL_MAX:].decode()
    head = _HEAD.format(role=role, name=name, identity=json.dumps(IDENTITY_FILE), manifest=json.dumps(MANIFEST_FILE))
    return head + _BODIES[role].format(label=json.dumps(label), pin=json.dumps(f"file:{pin}"))


def _publishing_beside(endpoint: str) -> str:
    """Where a node publishes if nobody says: on another port of the same host. Empty where that has none so high."""
    _check_endpoint(endpoint)
    host, _, port = endpoint.rpartition(":")
    return f"{host}:{int(port) + PUBLISH_PORT_BEYOND}" if int(port) + PUBLISH_PORT_BEYOND < 65_536 else ""


def _check_endpoint(address: str) -> None:
    match = re.fullmatch(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})", address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise ValueError(f"the endpoint {address!r} must look like tcp://host:port")
