"""Which cluster is attacked, by whose identities, and whether that is allowed at all. It opens no connection."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from engine.client.client import ClientSettings, load_settings
from engine.client.config import ClientConfig, Identity, load_config, load_identity, resolve
from engine.errors import AccessDenied, ConfigError
from engine.keys import RequestType
from engine.protocol.manifest import Cluster, Member, Retiring

__all__ = ["PREFIX", "Leaver", "Target", "load_target"]

PREFIX: Final = "keyquorum-attack/"
"""How the names of the keys begin that a run makes, uses and destroys."""
NEEDED: Final = (
    RequestType.ENCRYPT,
    RequestType.DECRYPT,
    RequestType.SIGN,
    RequestType.VERIFY,
    RequestType.MAC,
    RequestType.VERIFY_MAC,
    RequestType.GENERATE,
    RequestType.DESTROY,
    RequestType.REFRESH,
    RequestType.LIST,
    RequestType.FLUSH,
    RequestType.STATUS,
)
"""What the policy must allow the first client on names with the prefix."""


@dataclass(frozen=True, slots=True)
class Leaver:
    """A client that the cluster's operator can remove meanwhile, and how; it is asked for once."""

    settings: ClientSettings
    remove: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Target:
    """A cluster that may be attacked. ``pids`` are processes of members on this machine, watched for memory."""

    first: ClientSettings
    chain: bytes
    second: ClientSettings | None = None
    nodes: Mapping[str, Identity] = field(default_factory=dict)
    pids: Mapping[str, int] = field(default_factory=dict)
    leaver: Leaver | None = None

    @property
    def cluster(self) -> Cluster:
        """The verified manifest that the first client goes by."""
        return self.first.cluster

    @property
    def servers(self) -> tuple[Member, ...]:
        """Nodes and balancers, nodes first."""
        return (*self.cluster.nodes.values(), *self.cluster.of_role("balancer"))


def load_target(
    config: str | os.PathLike[str],
    *,
    second: str | os.PathLike[str] | None = None,
    node_identities: Sequence[str | os.PathLike[str]] = (),
    pids: Mapping[str, int] | None = None,
    leaver: Leaver | None = None,
    allow_remote: bool = False,
    cluster: str = "",
) -> Target:
    """Load the identities; refuse a cluster that is not all on loopback, or whose policy lacks what a run needs.

    ``ConfigError`` and ``AccessDenied`` say what to change. Another host's cluster needs ``allow_remote`` and its name
    in ``cluster``.
    """
    first = load_settings(config)
    _check_place(first.cluster, allow_remote, cluster)
    _check_rights(first)
    beside = None if second is None else load_settings(second)
    if beside is not None:
        _check_same(first.cluster, beside.cluster, str(second))
        if beside.identity.name == first.identity.name:
            raise ConfigError(f"{second}: the second client must be another one than {first.identity.name!r}")
    nodes: dict[str, Identity] = {}
    for path in node_identities:
        identity = load_identity(path)
        member = first.cluster.nodes.get(identity.name)
        if identity.role != "node" or member is None or member.sign_public != identity.signing.public:
            raise ConfigError(f"{path}: no node's identity of the cluster {first.cluster.name!r}")
        nodes[identity.name] = identity
    told = load_config(config, ClientConfig)
    chain = resolve(config, told.manifest).read_bytes()
    return Target(first, chain, beside, nodes, dict(pids or {}), leaver)


def _check_place(cluster: Cluster, allow_remote: bool, name: str) -> None:
    if name and name != cluster.name:
        raise ConfigError(f"--cluster {name}: the configuration is of the cluster {cluster.name!r}")
    places: tuple[Member | Retiring, ...] = (*cluster.members.values(), *cluster.retiring.values())
    endpoints = {endpoint for each in places for endpoint in (each.endpoint, each.publish_endpoint) if endpoint}
    remote = sorted(each for each in endpoints if not _is_loopback(each))
    if remote and not (allow_remote and name == cluster.name):
        raise ConfigError(
            f"the cluster {cluster.name!r} is not on this machine's loopback alone ({', '.join(remote)[:200]}); to "
            f"attack a cluster of your own elsewhere give --allow-remote and --cluster {cluster.name}"
        )


def _is_loopback(endpoint: str) -> bool:
    host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _check_rights(settings: ClientSettings) -> None:
    client, cluster = settings.identity.name, settings.cluster
    lacking = [verb for verb in NEEDED if not cluster.allows(client, verb, f"{PREFIX}0/key")]
    if lacking:
        raise AccessDenied(
            f"the policy does not allow {client!r} to {', '.join(lacking)} keys named {PREFIX}*: a run makes, uses and "
            "destroys keys of its own there"
        )


def _check_same(cluster: Cluster, other: Cluster, where: str) -> None:
    if other.pin != cluster.pin:
        raise ConfigError(f"{where}: of the cluster {other.name!r} with another pin")
