"""``keyquorum node``: nodes come, are emptied, go, and take each other's place, while the cluster serves.

What is signed and what is waited for is decided in ``engine.client.fleet``. Here is who signs: the operator of a local
cluster's folder, or one with a folder of their own, whose manifest a client brings to the members.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import click
import zmq

from engine.cli.chains import view_chain
from engine.cli.cluster import PUSH_TIMEOUT_S, bring, install, own_chain
from engine.cli.identity import open_operator, passphrase_option
from engine.cli.output import (
    Settings,
    client_config,
    common_options,
    count_progress,
    emit,
    note,
    start_logging,
    table,
    writing,
)
from engine.cli.repairs import HOW, repair_all
from engine.client import fleet
from engine.client.calls import DegradedKey
from engine.client.client import ClientSettings, Engine, connect, load_settings
from engine.client.config import read_card
from engine.client.local import LocalCluster
from engine.client.membership import Membership, Servers
from engine.client.spreading import Gossip
from engine.client.transport import Channel
from engine.errors import ClusterError, ManifestError
from engine.protocol.manifest import Cluster, Member, issue_cluster_manifest, open_chain

__all__ = ["node"]

F = TypeVar("F", bound=Callable[..., Any])

LOCAL: Final = Path("keyquorum-cluster")
STALLED_S: Final = 10.0
"""After so long without progress it is told what the balancer says of it."""


def _whose(command: F) -> F:
    """The options that say which cluster, and who signs for it."""
    for option in (
        click.option(
            "--out", default="cluster.manifest", show_default=True, help="Where an operator's manifest is written."
        ),
        passphrase_option,
        click.option(
            "--operator",
            metavar="DIR",
            type=click.Path(exists=True, file_okay=False, path_type=Path),
            help="The signing operator's folder, of a cluster over several hosts.",
        ),
        click.option(
            "--dir",
            "folder",
            metavar="DIR",
            default=LOCAL,
            show_default=True,
            type=click.Path(file_okay=False, path_type=Path),
            help="The folder of a local cluster, without --operator.",
        ),
    ):
        command = option(command)
    return command


_lost = click.option("--lost", is_flag=True, help="Give up the shares that it holds; others make them anew.")
_give_up = click.option(
    "--give-up-keys",
    is_flag=True,
    help="With --lost: also where keys are lost for good with it, or nothing is known of that.",
)
_wait = click.option("--wait/--no-wait", default=True, show_default=True, help="Wait until its shares are elsewhere.")


class _Operator:
    """A cluster over several hosts: an operator signs, and the client of --config brings it and asks."""

    def __init__(self, settings: Settings, folder: Path, passphrase_file: str | None, out: str) -> None:
        self._settings = settings
        self._folder = folder
        self._passphrase_file = passphrase_file
        self._out = out
        self._client: ClientSettings = load_settings(client_config(settings))
        self._timeout_s = settings.timeout_s or PUSH_TIMEOUT_S
        self._chain = self._newest_chain()

    def _newest_chain(self) -> bytes:
        """The longest of the chains that the operator, the client and the members know."""
        own = own_chain(self._folder)
        if not own:
            raise ManifestError(
                f"{self._folder}: this operator belongs to no cluster yet; sign its first manifest first"
            )
        source = self._client.source
        if not isinstance(source, Membership) or view_chain(own).pin != source.cluster.pin:
            raise ManifestError(
                f"{self._folder}: this operator and the client of --config belong to different clusters"
            )
        source.offer_chain(own)
        with zmq.Context() as context, self._channel(context) as channel:
            Gossip(source, "").look(channel)
        return source.after(0)

    def _channel(self, context: zmq.Context[Any]) -> Channel:
        return Channel(self._client.own_curve(), Servers(self._client.source), context)

    @property
    def cluster(self) -> Cluster:
        """The newest manifest."""
        return self._client.cluster

    @cached_property
    def _identity(self) -> Any:
        return open_operator(self._folder, self._passphrase_file)

    def sign_nodes(self, members: Sequence[Member], draining: Collection[str]) -> Cluster:
        """Sign; if that is enough, bring it to all, else say what is missing."""
        before = self.cluster
        self._chain = issue_cluster_manifest(
            name=before.name,
            members=members,
            rules=list(before.rules),
            operators=[self._identity.signing],
            quorum=before.quorum,
            groups=before.groups,
            domain_level=before.domain_level,
            chain=self._chain,
            retiring=[each for each in before.retiring.values() if each.name in {member.name for member in members}],
            draining=sorted(draining),
        )
        view = view_chain(self._chain)
        with writing(self._out) as sink:
            sink.write(self._chain)
        if not view.complete:
            raise ClusterError(
                f"{self._out} has {len(view.signers)} of {view.needed} signatures needed: have others countersign it, "
                "bring it to the members by `keyquorum cluster push`, and give this command again"
            )
        install(self._folder, self._chain, view)
        newest = open_chain(self._chain, before.pin)
        told = bring(self._client, self._chain, newest, self._timeout_s)
        for name, problem in told.items():
            if problem and name in newest.servers:
                note(f"{name} has not taken the manifest yet: {problem}")
        if all(told.values()):
            raise ClusterError(
                f"no member took the manifest with serial {newest.serial}; bring it by `keyquorum cluster push`"
            )
        return newest

    def connect(self) -> Engine:
        """As the client of --config."""
        return connect(client_config(self._settings))

    def degraded(self, without: str) -> Sequence[DegradedKey]:
        """The keys that would lack a share without a node."""
        with self.connect() as client:
            return client.degraded_keys(without)

    def left_on(self, node: str) -> fleet.Left:
        """What a node holds."""
        with zmq.Context() as context, self._channel(context) as channel:
            return fleet.left_on(channel, self.cluster, node, self._timeout_s)

    def keys_by_node(self) -> dict[str, int]:
        """What all hold, by the registry's books."""
        with zmq.Context() as context, self._channel(context) as channel:
            return fleet.keys_by_node(channel, self.cluster, self._timeout_s)


def _operator(settings: Settings, operator: Path, passphrase_file: str | None, out: str) -> _Operator:
    return _Operator(settings, operator, passphrase_file, out)


def _local(folder: Path) -> LocalCluster:
    return LocalCluster.open(folder, on_event=note)


def _make_anew(settings: Settings, whose: _Operator | LocalCluster, lost: str) -> None:
    """Make the shares of a lost node's keys anew where no balancer can, and wait for those where one can.

    ``ClusterError`` tells of keys that still lack one at the end.
    """
    with connect(whose.client_config) if isinstance(whose, LocalCluster) else whose.connect() as client:
        keys = [key for key in client.degraded_keys() if lost in key.missing and key.left <= key.threshold]
        gone = [key for key in keys if key.left < key.threshold]
        failed = repair_all(settings, client, [key for key in keys if key not in gone])
    for key in gone:
        note(f"{key.name} (version {key.version}) is lost: {key.left} of the {key.threshold} shares it needs are left")
    _await(settings, whose, lost, f"making the shares of {lost} anew", settings.timeout_s, len(gone) + len(failed))
    if failed:
        raise ClusterError(f"{lost} is no node any more, but {len(failed)} keys lack a share; make one {HOW}")


def _await(
    settings: Settings, whose: fleet.Fleet, name: str, what: str, timeout_s: float | None, given_up: int = 0
) -> None:
    """Wait until a node holds nothing, with a bar; where that gets no further, say what the balancer waits for."""
    with count_progress(settings, what) as draw:
        last, since_s, said = -1, time.monotonic(), ""

        def look(left: fleet.Left) -> None:
            nonlocal last, since_s, said
            draw(left.keys - given_up)
            now = time.monotonic()
            if left.keys != last:
                last, since_s = left.keys, now
            elif now - since_s > STALLED_S and left.moving not in ("", said):
                said = left.moving
                note(f"{left.keys} keys wait; the balancer: {said}")

        fleet.wait_empty(whose, name, timeout_s, look, given_up)


def _told(settings: Settings, whose: fleet.Fleet, text: str, **more: Any) -> None:
    serial = whose.cluster.serial
    emit(settings, {"serial": serial, **more}, f"{text} (manifest {serial})")


@click.group(no_args_is_help=True)
def node() -> None:
    """Add, empty, remove and replace nodes while the cluster serves.

    With --operator, of a cluster over several hosts: the manifest is signed by the operator there and brought to the
    members as the client of --config. Else of the local cluster in --dir.

    \b
    Examples:
      keyquorum node add
      keyquorum node drain node2
      keyquorum node remove node2
      keyquorum node replace node3 --lost
      keyquorum node add --operator ./alice --card node6.card --config admin-1/client.toml
    """


@node.command("list")
@_whose
@common_options(connects=True)
@click.pass_obj
def list_nodes(settings: Settings, folder: Path, operator: Path | None, passphrase_file: str | None, out: str) -> None:
    """Show how many keys each node holds shares of, and which nodes are draining."""
    start_logging(settings)
    whose: _Operator | LocalCluster = (
        _operator(settings, operator, passphrase_file, out) if operator is not None else _local(folder)
    )
    held, cluster = whose.keys_by_node(), whose.cluster
    rows = [
        (
            name,
            "draining" if name in cluster.draining else "member" if name in cluster.nodes else "gone",
            held.get(name, 0),
        )
        for name in dict.fromkeys((*cluster.nodes, *sorted(held)))
    ]
    value = [{"node": name, "state": state, "keys": keys} for name, state, keys in rows]
    table(settings, ("NODE", "STATE", "KEYS"), rows, {"serial": cluster.serial, "nodes": value})


@node.command("add")
@click.option("--card", metavar="FILE", help="The new node's card, made by `keyquorum init node` on its host.")
@click.option("--name", default="", help="Of a local cluster's new node; a fresh one by default.")
@click.option("--location", default="", help="Of a local cluster's new node; the emptiest site by default.")
@_whose
@common_options(connects=True)
@click.pass_obj
def add_node(
    settings: Settings,
    card: str | None,
    name: str,
    location: str,
    folder: Path,
    operator: Path | None,
    passphrase_file: str | None,
    out: str,
) -> None:
    """Take a new node in: keys that are made from now on are given to it too, and others as the load asks for it.

    A local cluster's node is made, signed and started. On another host, make it there (`keyquorum init node`), give
    its card here, and then let it join with the manifest that this writes, and start it.
    """
    start_logging(settings)
    if operator is None:
        if card is not None:
            raise click.UsageError("--card is of a cluster over several hosts, which needs --operator too")
        local = _local(folder)
        added = local.add_node(name, location=location)
        _told(settings, local, f"{added} is a node of the cluster", node=added)
        return
    if card is None or name or location:
        raise click.UsageError("with --operator a new node comes by its --card, which has its name and location")
    whose, member = _operator(settings, operator, passphrase_file, out), read_card(Path(card))
    cluster = fleet.add(whose, member)
    _told(settings, whose, f"{member.name} is a node of the cluster", node=member.name)
    _note_join(member.name, out, cluster)


def _note_join(name: str, out: str, cluster: Cluster) -> None:
    note(f"next, on its host: keyquorum cluster join DIR {out} --pin {cluster.pin.hex()}, and start {name}")


@node.command("drain")
@click.argument("name", metavar="NODE")
@click.option("--undo", is_flag=True, help="Let it be given keys again.")
@_wait
@_whose
@common_options(connects=True)
@click.pass_obj
def drain_node(
    settings: Settings,
    name: str,
    undo: bool,
    wait: bool,
    folder: Path,
    operator: Path | None,
    passphrase_file: str | None,
    out: str,
) -> None:
    """Empty a node: it is given no more keys, and the balancer moves those that it holds to others.

    It serves them until then. This waits until it holds nothing (at most --timeout); ended earlier, it goes on.
    """
    start_logging(settings)
    whose: fleet.Fleet = _operator(settings, operator, passphrase_file, out) if operator is not None else _local(folder)
    if undo:
        fleet.undrain(whose, name)
        _told(settings, whose, f"{name} is given keys again", node=name)
        return
    fleet.drain(whose, name)
    if wait:
        _await(settings, whose, name, f"emptying {name}", settings.timeout_s)
    left = 0 if wait else whose.left_on(name).keys
    _told(settings, whose, f"{name} holds nothing" if wait else f"{name} is draining", node=name, keys=left)


@node.command("remove")
@click.argument("name", metavar="NODE")
@_lost
@_give_up
@_wait
@_whose
@common_options(connects=True)
@click.pass_obj
def remove_node(
    settings: Settings,
    name: str,
    lost: bool,
    give_up_keys: bool,
    wait: bool,
    folder: Path,
    operator: Path | None,
    passphrase_file: str | None,
    out: str,
) -> None:
    """Take a node out of the cluster, once it was emptied by `keyquorum node drain`.

    With --lost, one that does not come back: its shares are given up, and the others make them anew on other nodes. The
    balancer sees to keys with more than t shares left, and this command, as the client of --config or of the local
    cluster, to those with just t. It is refused where keys would have fewer than t shares left and so be lost.
    """
    start_logging(settings)
    whose: _Operator | LocalCluster
    if operator is None:
        whose = local = _local(folder)
        local.remove_node(name, lost=lost, give_up_keys=give_up_keys)
    else:
        whose = _operator(settings, operator, passphrase_file, out)
        fleet.remove(whose, name, lost=lost, give_up_keys=give_up_keys)
    if lost and wait:
        _make_anew(settings, whose, name)
    _told(settings, whose, f"{name} is no node of the cluster any more", node=name)


@node.command("replace")
@click.argument("name", metavar="NODE")
@click.option("--card", metavar="FILE", help="The card of the node that takes its place, with --operator.")
@_lost
@_give_up
@_wait
@_whose
@common_options(connects=True)
@click.pass_obj
def replace_node(
    settings: Settings,
    name: str,
    card: str | None,
    lost: bool,
    give_up_keys: bool,
    wait: bool,
    folder: Path,
    operator: Path | None,
    passphrase_file: str | None,
    out: str,
) -> None:
    """Put a new node in the place of another, which is emptied and removed; with --lost it is removed at once.

    A local cluster's new node is made and started. On another host, make it first, and start it as soon as it has
    joined with the manifest that this writes: the shares are waited for meanwhile.
    """
    start_logging(settings)
    whose: _Operator | LocalCluster
    if operator is None:
        if card is not None:
            raise click.UsageError("--card is of a cluster over several hosts, which needs --operator too")
        whose = local = _local(folder)
        added = local.begin_replacing(name, lost=lost, give_up_keys=give_up_keys)
    else:
        if card is None:
            raise click.UsageError("with --operator the new node comes by its --card")
        whose, member = _operator(settings, operator, passphrase_file, out), read_card(Path(card))
        cluster, added = fleet.replace(whose, name, member, lost=lost, give_up_keys=give_up_keys), member.name
        _note_join(added, out, cluster)
    if wait and lost:
        _make_anew(settings, whose, name)
    elif wait:
        _await(settings, whose, name, f"emptying {name}", settings.timeout_s)
        if isinstance(whose, LocalCluster):
            whose.remove_node(name)
        else:
            fleet.remove(whose, name)
    elif not lost:
        note(f"next, when it holds nothing: keyquorum node remove {name}")
    _told(settings, whose, f"{added} is in the place of {name}", node=added, replaced=name)
