"""``keyquorum cluster``: identity cards in, a signed manifest out, and into the members' folders.

It reads and writes files: operators may work on machines without a network. ``push`` alone opens connections.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import click
import zmq
from msgspec import Meta, Struct
from msgspec.structs import replace

from engine.cli.chains import ChainView, view_chain
from engine.cli.identity import (
    CONFIG_FILES,
    IDENTITY_FILE,
    MANIFEST_FILE,
    fingerprint,
    open_operator,
    passphrase_option,
)
from engine.cli.output import (
    Settings,
    client_config,
    common_options,
    emit,
    note,
    one_line,
    reading,
    start_logging,
    table,
    writing,
)
from engine.client.client import ClientSettings, load_settings
from engine.client.config import (
    CARD_PREFIX,
    CurveSource,
    Identity,
    forget_retiring,
    load_config,
    load_identity,
    read_card,
    resolve,
    rotate_curve,
    write_card,
    write_private,
)
from engine.client.membership import Membership
from engine.client.spreading import push as spread
from engine.client.transport import Channel
from engine.errors import ClusterError, ConfigError, EngineError, ManifestError, NodeUnavailable
from engine.protocol import manifest as documents
from engine.protocol.manifest import (
    Member,
    PolicyRule,
    Retiring,
    Role,
    countersign_chain,
    issue_cluster_manifest,
    open_chain,
)
from engine.protocol.wire import Name

__all__ = ["bring", "cluster", "install", "own_chain"]

F = TypeVar("F", bound=Callable[..., Any])

GROUPS: Final = 1024
MANIFEST_MAX: Final = 64 * 1024 * 1024
PUSH_TIMEOUT_S: Final = 5.0
_PIN_LINE: Final = re.compile(r'^manifest_pin[ \t]*=[ \t]*"[^"\n]*"[ \t]*$', re.MULTILINE)


class _Rule(Struct, frozen=True, forbid_unknown_fields=True):
    """One ``[[rule]]`` of a policy file."""

    identity: Annotated[str, Meta(min_length=1, max_length=128)]
    keys: Annotated[str, Meta(min_length=1, max_length=128)]
    operations: Annotated[list[Annotated[str, Meta(min_length=1, max_length=32)]], Meta(min_length=1, max_length=32)]


class _Policy(Struct, frozen=True, forbid_unknown_fields=True):
    """A policy file."""

    version: Annotated[int, Meta(ge=1, le=1)]
    rule: list[_Rule] = []


class _Who(Struct, frozen=True):
    """What an identity file says in plain; the rest of it is for ``load_identity``."""

    name: Name
    role: Role


class _Trust(Struct, frozen=True):
    """What every member's configuration says about its cluster."""

    manifest: str
    manifest_pin: str


def _folder_option(command: F) -> F:
    return click.option(
        "--operator",
        "folder",
        required=True,
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="The signing operator's folder.",
    )(command)


def _out_option(command: F) -> F:
    return click.option("--out", metavar="FILE", help="Where to write the manifest.")(command)


@click.group(no_args_is_help=True)
def cluster() -> None:
    """Sign, show and join a cluster over several hosts.

    The manifest names every member, its keys, its place and what each client may do. It is signed by operators; each
    member pins the hash of the first one and follows the chain from there.

    \b
    Examples:
      keyquorum cluster sign --operator ./alice --name prod --policy policy.toml \\
          --card node1.card --card node2.card --card bal.card --card shop.card --out cluster.manifest
      keyquorum cluster show cluster.manifest
      keyquorum cluster join ./node1 cluster.manifest --pin 5f0c...
    """


# --- sign -----------------------------------------------------------------------------------------------------------


@cluster.command()
@_folder_option
@click.option("--name", help="The cluster's name; fixed by its first manifest.")
@click.option(
    "--card", "cards", multiple=True, metavar="FILE", help="A member's identity card; may be given many times."
)
@click.option("--remove", "removed", multiple=True, metavar="NAME", help="A member to leave out from now on.")
@click.option(
    "--retire",
    "retired",
    multiple=True,
    metavar="NAME",
    help="End the change of a member's CURVE key: drop the old one.",
)
@click.option("--drain", "drained", multiple=True, metavar="NAME", help="A node that is to be given no more keys.")
@click.option("--undrain", "undrained", multiple=True, metavar="NAME", help="A node that is to be given keys again.")
@click.option("--policy", metavar="FILE", help="TOML file of rules; without it the earlier ones stay.")
@click.option("--quorum", type=click.IntRange(1, 64), help="How many operators must sign the next manifest.")
@click.option("--domain-level", type=click.IntRange(1, 8), help="Parts of a location that make a failure domain.")
@click.option("--groups", type=click.IntRange(1, 65536), help=f"Placement groups, fixed at first; {GROUPS} by default.")
@click.option("--previous", metavar="FILE", help="The manifest to go on from; by default the operator's own copy.")
@_out_option
@passphrase_option
@common_options()
@click.pass_obj
def sign(
    settings: Settings,
    folder: Path,
    name: str | None,
    cards: tuple[str, ...],
    removed: tuple[str, ...],
    retired: tuple[str, ...],
    drained: tuple[str, ...],
    undrained: tuple[str, ...],
    policy: str | None,
    quorum: int | None,
    domain_level: int | None,
    groups: int | None,
    previous: str | None,
    out: str | None,
    passphrase_file: str | None,
) -> None:
    """Sign a new manifest out of identity cards and a policy.

    A card of a member that is in the manifest already replaces its entry; if it shows another CURVE key, the one of
    before stays good too until a later manifest is signed with --retire. The operator itself is always in. A policy
    file lists rules; what none of them allows is denied:

    \b
      version = 1
      [[rule]]
      identity = "shop-*"        # client names, as a shell glob
      keys = "orders/*"          # key names, as a shell glob
      operations = ["encrypt", "decrypt", "describe"]      # or ["*"]
    """
    given = [read_card(Path(card)) for card in cards]
    rules = _read_policy(policy) if policy else None
    before_chain = _previous_chain(folder, previous)
    before = view_chain(before_chain) if before_chain else None
    if before is None and name is None:
        raise click.UsageError("the first manifest of a cluster needs --name")
    if before is not None and name is not None and name != before.name:
        raise ManifestError(f"the operator in {folder} belongs to the cluster {before.name!r}, not {name!r}")
    identity = open_operator(folder, passphrase_file)
    if rules is None:
        rules = before.rules if before else ()
    members = _merge(before.members if before else (), given, identity.member(), removed)
    chain = issue_cluster_manifest(
        name=before.name if before else str(name),
        members=members,
        retiring=_retiring(before, members, retired),
        draining=_draining(before, members, drained, undrained),
        rules=rules,
        operators=[identity.signing],
        quorum=quorum or (before.quorum if before else 1),
        groups=groups or (before.groups if before else GROUPS),
        domain_level=domain_level or (before.domain_level if before else 1),
        chain=before_chain,
    )
    _finish(settings, folder, identity, chain, out or MANIFEST_FILE)
    if not rules:
        note("no rules: every client is denied everything until a manifest with a --policy is signed")


def _read_policy(path: str) -> tuple[PolicyRule, ...]:
    policy = load_config(path, _Policy)
    return tuple(PolicyRule(rule.identity, rule.keys, rule.operations) for rule in policy.rule)


def _previous_chain(folder: Path, previous: str | None) -> bytes:
    """The chain to go on from, or nothing; never one that the operator has already gone beyond."""
    own = own_chain(folder)
    if previous is None:
        return own
    chain = _read_chain(previous)
    if own:
        known = view_chain(own)
        told = view_chain(chain, known.pin)
        if told.serial < known.serial:
            raise ManifestError(f"{previous}: has serial {told.serial}, the operator has signed {known.serial} already")
    return chain


def _merge(
    before: Iterable[Member], cards: Iterable[Member], operator: Member, removed: Iterable[str]
) -> tuple[Member, ...]:
    """The members of the next manifest, those of before first and in their order."""
    members = {member.name: member for member in before}
    known = members.get(operator.name)
    if known is not None and known != operator:
        raise ManifestError(f"the cluster knows {operator.name!r} by other keys than those in this folder")
    seen: set[str] = set()
    for card in cards:
        if card.name in seen:
            raise ManifestError(f"two cards are of {card.name!r}")
        seen.add(card.name)
        if card.name in members and members[card.name].role != card.role:
            raise ManifestError(f"{card.name!r} is a {members[card.name].role}; its card says {card.role}")
        members[card.name] = card
    members.setdefault(operator.name, operator)
    if members[operator.name] != operator:
        raise ManifestError(f"the card of {operator.name!r} shows other keys than those in this folder")
    for name in removed:
        if members.pop(name, None) is None:
            raise ManifestError(f"{name!r} is no member, so it can't be removed")
    return tuple(members.values())


def _retiring(before: ChainView | None, members: Iterable[Member], retired: Iterable[str]) -> list[Retiring]:
    """The keys that go on retiring, those that begin to, and none of those that are retired."""
    if before is None:
        return []
    known, kept = {member.name: member for member in before.members}, {each.name: each for each in before.retiring}
    for name in retired:
        if kept.pop(name, None) is None:
            raise ManifestError(f"{name!r} has no retiring key")
    found = []
    for member in members:
        old, retiring = known.get(member.name), kept.get(member.name)
        # One with another signing key is another machine by that name: the old one's key is good no more.
        same = old is not None and member.role != "operator" and old.sign_public == member.sign_public
        changed = same and old is not None and old.curve_public != member.curve_public
        if old is not None and not same:
            retiring = None
        if changed and retiring is not None:
            raise ManifestError(
                f"{member.name!r} has a retiring key already; sign one with --retire {member.name} first"
            )
        if changed and old is not None:
            retiring = Retiring(old.name, old.curve_public, old.endpoint, old.publish_endpoint)
        found += [] if retiring is None else [retiring]
    return found


def _draining(
    before: ChainView | None, members: Iterable[Member], drained: Iterable[str], undrained: Iterable[str]
) -> list[str]:
    """The nodes that go on draining, and those that begin to; none that left."""
    nodes = {member.name for member in members if member.role == "node"}
    found = {name for name in (before.draining if before else ()) if name in nodes}
    for name in undrained:
        if name not in found:
            raise ManifestError(f"{name!r} is not draining")
        found.remove(name)
    return sorted({*found, *drained})


# --- countersign ----------------------------------------------------------------------------------------------------


@cluster.command()
@_folder_option
@click.argument("file", metavar="MANIFEST")
@_out_option
@click.option(
    "--pin", metavar="HEX", help="Hash of the cluster's first manifest, if this operator has none pinned yet."
)
@click.option("--yes", is_flag=True, help="Sign without asking.")
@passphrase_option
@common_options()
@click.pass_obj
def countersign(
    settings: Settings,
    folder: Path,
    file: str,
    out: str | None,
    pin: str | None,
    yes: bool,
    passphrase_file: str | None,
) -> None:
    """Add another operator's signature to a manifest.

    Shows what is to be signed and asks first. Without --out the manifest is replaced by the one with the signature.
    """
    chain = _read_chain(file)
    own = own_chain(folder)
    known = view_chain(own) if own else None
    pinned = known.pin if known else pin_bytes(pin) if pin else None
    view = view_chain(chain, pinned)
    if known is not None and view.serial < known.serial:
        raise ManifestError(f"{file}: has serial {view.serial}, this operator knows {known.serial} already")
    identity = open_operator(folder, passphrase_file)
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("look at the manifest with `cluster show`, then countersign with --yes")
        note(describe(view))
        click.confirm(f"Sign this as {identity.name}?", abort=True, err=True)
    _finish(settings, folder, identity, countersign_chain(chain, identity.signing), out or file)


def _finish(settings: Settings, folder: Path, identity: Identity, chain: bytes, out: str) -> None:
    """Check what was signed, write it, keep a complete one in the operator's folder, and say what is next."""
    view = view_chain(chain)
    if identity.name not in view.signers:
        raise ManifestError(f"{identity.name!r} did not sign")
    with writing(out) as sink:
        sink.write(chain)
    if view.complete:
        install(folder, chain, view)
        note(f"next: on each member, keyquorum cluster join DIR {out} --pin {view.pin.hex()}")
    else:
        short = view.needed - len(view.signers)
        note(f"next: {short} more signatures, by keyquorum cluster countersign --operator DIR {out}")
    if out != "-":
        emit(settings, _json(view), _summary(view))


# --- show -----------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("file", metavar="MANIFEST|CARD")
@click.option("--pin", metavar="HEX", help="Check that the chain begins with this hash.")
@common_options()
@click.pass_obj
def show(settings: Settings, file: str, pin: str | None) -> None:
    """Show a manifest or an identity card, after checking every signature on it."""
    if _is_card(file):
        member = read_card(Path(file))
        emit(settings, _member_json(member))
        return
    view = view_chain(_read_chain(file), pin_bytes(pin) if pin else None)
    if settings.json:
        emit(settings, _json(view))
        return
    click.echo(_summary(view))
    click.echo()
    columns = ("MEMBER", "ROLE", "FINGERPRINT", "ENDPOINT", "LOCATION")
    table(settings, columns, [_row(member) for member in view.members], None)
    click.echo()
    rules = [(rule.identity, rule.keys, " ".join(rule.operations)) for rule in view.rules]
    table(settings, ("CLIENTS", "KEYS", "OPERATIONS"), rules, None)


def _is_card(file: str) -> bool:
    if file == "-":
        return False
    with reading(file) as stream:
        return stream.read(len(CARD_PREFIX)) == CARD_PREFIX.encode()


def _row(member: Member) -> tuple[str, ...]:
    return (member.name, member.role, fingerprint(member), member.endpoint or "-", member.location or "-")


def _summary(view: ChainView) -> str:
    lines = (
        ("cluster", view.name),
        ("serial", str(view.serial)),
        ("pin", view.pin.hex()),
        ("signed by", f"{', '.join(view.signers)} ({len(view.signers)} of {view.needed} needed)"),
        ("members", ", ".join(f"{count} {role}" for role, count in _counts(view.members))),
        ("draining", ", ".join(view.draining) or "none"),
        ("rules", str(len(view.rules))),
        ("quorum", f"{view.quorum} operators sign the next manifest"),
    )
    return "\n".join(f"{name:<10} {value}" for name, value in lines)


def _counts(members: Iterable[Member]) -> list[tuple[str, int]]:
    found: dict[str, int] = {}
    for member in members:
        found[member.role] = found.get(member.role, 0) + 1
    return list(found.items())


def describe(view: ChainView) -> str:
    """A manifest as text, for a person who is about to sign it."""
    members = "\n".join(one_line("  ".join(_row(member))) for member in view.members)
    rules = "\n".join(one_line(f"{rule.identity}  {rule.keys}  {' '.join(rule.operations)}") for rule in view.rules)
    return f"{_summary(view)}\n\n{members}\n\n{rules or 'no rules'}\n"


def _member_json(member: Member) -> dict[str, Any]:
    return {
        "name": member.name,
        "role": member.role,
        "fingerprint": fingerprint(member),
        "sign_public": member.sign_public.hex(),
        "curve_public": "" if member.role == "operator" else member.curve_z85,
        "endpoint": member.endpoint,
        "publish_endpoint": member.publish_endpoint,
        "location": member.location,
    }


def _json(view: ChainView) -> dict[str, Any]:
    return {
        "cluster": view.name,
        "serial": view.serial,
        "pin": view.pin.hex(),
        "hash": view.digest.hex(),
        "complete": view.complete,
        "signed_by": list(view.signers),
        "signatures_needed": view.needed,
        "quorum": view.quorum,
        "groups": view.groups,
        "domain_level": view.domain_level,
        "members": [_member_json(member) for member in view.members],
        "retiring": [
            {"name": each.name, "curve_public": each.curve_z85, "endpoint": each.endpoint} for each in view.retiring
        ],
        "draining": list(view.draining),
        "rules": [{"identity": r.identity, "keys": r.keys, "operations": list(r.operations)} for r in view.rules],
    }


# --- rekey ----------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--endpoint", default="", metavar="tcp://HOST:PORT", help="Where it is reached by the new key.")
@click.option("--publish-endpoint", default="", metavar="tcp://HOST:PORT", help="The same for what it publishes.")
@_out_option
@common_options()
@click.pass_obj
def rekey(settings: Settings, folder: Path, endpoint: str, publish_endpoint: str, out: str | None) -> None:
    """Make a fresh CURVE key for a member, and a card that shows it.

    Nothing changes until the operators sign a manifest with that card; from then on the member is known by both keys.
    With an endpoint of its own for the new key a node or balancer serves both, each at its place, so that nobody is
    turned away; at the same endpoint, those that have not heard of the new manifest are, until they have.
    """
    identity = load_identity(folder / IDENTITY_FILE)
    own = own_chain(folder)
    if not own:
        raise ConfigError(f"{folder}: belongs to no cluster yet; make a new identity instead")
    listed = next((each for each in view_chain(own).members if each.name == identity.name), None)
    if listed is None:
        raise ManifestError(f"{identity.name!r} is no member by its manifest")
    fresh = rotate_curve(folder / IDENTITY_FILE)
    member = fresh.member(
        endpoint=endpoint or listed.endpoint,
        publish_endpoint=publish_endpoint or listed.publish_endpoint,
        location=listed.location,
    )
    target = Path(out) if out else folder / f"{identity.name}.card"
    write_card(target, member, fresh.signing)
    emit(settings, _member_json(member), f"{target}: {identity.name} ({fingerprint(member)})")
    note(f"next: keyquorum cluster sign --operator DIR --card {target}")


# --- push -----------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("file", metavar="MANIFEST")
@common_options(connects=True)
@click.pass_obj
def push(settings: Settings, file: str) -> None:
    """Bring a signed manifest to every node and balancer, which go by it at once.

    It is sent as the client of --config, of whichever cluster; the manifest proves itself. Members that are in the
    manifest are told, and those that were in the client's own one. A member that can't be reached gets it from the
    others when it is back.
    """
    start_logging(settings)
    timeout = settings.timeout_s or PUSH_TIMEOUT_S
    chain = _read_chain(file)
    client = load_settings(client_config(settings))
    view = view_chain(chain, client.cluster.pin)
    if not view.complete:
        raise ManifestError(f"{file}: signed by {len(view.signers)} of {view.needed} operators needed")
    newest = open_chain(chain, client.cluster.pin)
    told = bring(client, chain, newest, timeout)
    rows = [(name, problem or "taken") for name, problem in told.items()]
    if settings.json:
        failed = {name: problem for name, problem in told.items() if problem}
        emit(
            settings,
            {"serial": newest.serial, "taken": [each for each in told if each not in failed], "failed": failed},
        )
    else:
        table(settings, ("MEMBER", f"SERIAL {newest.serial}"), rows, None)
    if any(told.values()):
        raise ClusterError(f"{sum(map(bool, told.values()))} of {len(told)} members did not take the manifest")


def bring(client: ClientSettings, chain: bytes, newest: documents.Cluster, timeout_s: float) -> dict[str, str]:
    """Bring a manifest to all members of it and of the one before: member -> why it did not take it, or nothing."""
    told = {}
    with zmq.Context() as context:
        for name in {**client.cluster.servers, **newest.servers}:
            places = _places(name, client.cluster, newest)
            told[name] = _bring(client.own_curve(), places, chain, newest, timeout_s, context)
    if isinstance(client.source, Membership):
        client.source.offer_chain(chain)
    return told


def _places(name: str, known: documents.Cluster, newest: documents.Cluster) -> list[Member]:
    """Where a member may be reached, and by which key: as it was known, and as the new manifest has it."""
    found = [cluster.servers[name] for cluster in (known, newest) if name in cluster.servers]
    retiring = newest.retiring.get(name)
    if retiring is not None:
        found.append(
            replace(
                found[-1],
                curve_public=retiring.curve_public,
                endpoint=retiring.endpoint,
                publish_endpoint=retiring.publish_endpoint,
            )
        )
    return [each for number, each in enumerate(found) if each not in found[:number]]


def _bring(
    own: CurveSource,
    places: Iterable[Member],
    chain: bytes,
    newest: documents.Cluster,
    timeout_s: float,
    context: zmq.Context[Any],
) -> str:
    """Bring a manifest to one member, where it can be reached; why it did not take it, or nothing."""
    problem = ""
    for member in places:
        with Channel(own, {member.name: member}, context) as channel:
            try:
                has = spread(channel, member.name, chain, newest.serial, timeout_s)
            except NodeUnavailable as error:
                problem = str(error)
                continue
            except EngineError as error:
                return str(error)
            return "" if has >= newest.serial else f"still goes by serial {has}"
    return problem


# --- join -----------------------------------------------------------------------------------------------------------


@cluster.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("file", metavar="MANIFEST")
@click.option("--pin", metavar="HEX", help="Hash of the first manifest, as `cluster sign` printed it; needed once.")
@passphrase_option
@common_options()
@click.pass_obj
def join(settings: Settings, folder: Path, file: str, pin: str | None, passphrase_file: str | None) -> None:
    """Let a member trust a cluster: put the manifest into its folder and the pin into its configuration.

    Compare the pin with the operator's by another way than the one the manifest came by. Later manifests of the same
    cluster need no pin. A running process takes a new manifest within a second; the others hear of it from that one.
    """
    chain = _read_chain(file)
    identity = _open_member(folder, passphrase_file)
    pinned = _trust(folder, identity.role).manifest_pin
    if pin and pinned and pin.lower() != pinned.lower():
        raise ManifestError(f"{folder}: trusts the cluster with the pin {pinned}; a member belongs to one cluster")
    if not pin and not pinned:
        raise click.UsageError("the first time --pin is needed")
    view = view_chain(chain, pin_bytes(pinned or str(pin)))
    if not view.complete:
        raise ManifestError(f"{file}: signed by {len(view.signers)} of {view.needed} operators needed")
    _check_own_entry(identity, view)
    own = own_chain(folder)
    if own and view_chain(own).serial > view.serial:
        raise ManifestError(f"{file}: has serial {view.serial}, {folder} has {view_chain(own).serial} already")
    install(folder, chain, view)
    over = identity.curve is not None and identity.curve.raw_public in {each.curve_public for each in view.members}
    if over and identity.name not in {each.name for each in view.retiring}:
        forget_retiring(folder / IDENTITY_FILE)
    emit(settings, {"name": identity.name, "role": identity.role, **_json(view)}, _joined(identity, view))


def _open_member(folder: Path, passphrase_file: str | None) -> Identity:
    file = folder / IDENTITY_FILE
    if load_config(file, _Who).role == "operator":
        return open_operator(folder, passphrase_file)
    return load_identity(file)


def _check_own_entry(identity: Identity, view: ChainView) -> None:
    listed = next((member for member in view.members if member.name == identity.name), None)
    if listed is None:
        raise ManifestError(f"{identity.name!r} is no member of the cluster {view.name!r}")
    keys = {pair.raw_public for pair in identity.pairs} or {bytes(32)}
    if (listed.role, listed.sign_public) != (identity.role, identity.signing.public) or listed.curve_public not in keys:
        raise ManifestError(f"the cluster {view.name!r} knows {identity.name!r} by another role or other keys")


def _joined(identity: Identity, view: ChainView) -> str:
    operators = ", ".join(f"{each.name} ({fingerprint(each)})" for each in view.members if each.role == "operator")
    return f"{identity.name} now trusts this cluster, and these operators for it: {operators}\n{_summary(view)}"


def _trust(folder: Path, role: Role) -> _Trust:
    return load_config(folder / CONFIG_FILES[role], _Trust)


def own_chain(folder: Path) -> bytes:
    """The manifest that the member in the folder holds, checked against its pin; empty if it has none."""
    role = load_config(folder / IDENTITY_FILE, _Who).role
    config = folder / CONFIG_FILES[role]
    trust = load_config(config, _Trust)
    file = resolve(config, trust.manifest)
    if not trust.manifest_pin or not file.exists():
        return b""
    chain = file.read_bytes()
    view_chain(chain, pin_bytes(trust.manifest_pin))
    return chain


def install(folder: Path, chain: bytes, view: ChainView) -> None:
    """Write the manifest, then the pin: a member with a pin and no manifest would not start."""
    role = load_config(folder / IDENTITY_FILE, _Who).role
    config = folder / CONFIG_FILES[role]
    text = config.read_text(encoding="utf-8")
    line = f"manifest_pin = {json.dumps(view.pin.hex())}"
    changed, count = _PIN_LINE.subn(line, text)
    if count != 1:
        raise ConfigError(f'{config}: has no single line `manifest_pin = "..."` to write the pin {view.pin.hex()} to')
    write_private(resolve(config, _trust(folder, role).manifest), chain)
    if changed != text:
        write_private(config, changed.encode())


def _read_chain(file: str) -> bytes:
    with reading(file) as stream:
        chain = stream.read(MANIFEST_MAX + 1)
    if len(chain) > MANIFEST_MAX:
        raise ManifestError(f"{file}: longer than {MANIFEST_MAX} bytes")
    return chain


def pin_bytes(pin: str) -> bytes:
    try:
        found = bytes.fromhex(pin)
    except ValueError:
        found = b""
    if len(found) != 32:
        raise ValueError(f"a pin has 64 hex digits; this one has {len(pin)} characters")
    return found
