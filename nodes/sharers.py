"""Nodes of one host that use one token: whose it is, who else uses it, and that they fall into one failure domain.

The node that a token was made for is its owner, and says who it is in its data folder; every other node that uses the
token leaves a mark there. Nobody changes a token that others use. It opens no token::

    data/owner.toml             the owner
    data/sharers/NAME.toml      each other node that ever served with the token; the operator removes it
    data/sharers/lock           held together by those that run, and alone by who changes the token
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from msgspec import Struct
from msgspec.structs import asdict

from engine.client.config import Identity, load_config, sync_folder, write_toml
from engine.client.process import lock_folder
from engine.errors import ClusterError, ConfigError
from engine.protocol.manifest import Cluster, Member
from nodes.rotation import is_pending

__all__ = ["Mark", "alone", "hold", "leave_mark", "list_marks", "misplaced", "owner_of", "tell_owner"]

OWNER_NAME: Final = "owner.toml"
SHARERS: Final = "sharers"


class Mark(Struct, frozen=True, forbid_unknown_fields=True):
    """A node that uses a token: its name, its public signing key in hex, and its configuration's path."""

    node: str
    signing: str
    config: str

    @classmethod
    def of(cls, identity: Identity, config: Path) -> Mark:
        """The mark of the node with this identity."""
        return cls(identity.name, identity.signing.public.hex(), str(config))

    def member(self, cluster: Cluster) -> Member | None:
        """The node in the manifest; None if that does not name it, with this very key."""
        found = cluster.nodes.get(self.node)
        return found if found is not None and found.sign_public.hex() == self.signing else None


def tell_owner(data: Path, own: Mark) -> None:
    """Say whose the token in this data folder is."""
    _write(data / OWNER_NAME, own)


def owner_of(data: Path) -> Mark:
    """Whose the token of this data folder is; ``ConfigError`` if there is none."""
    path = data / OWNER_NAME
    if not path.exists():
        raise ConfigError(
            f"{data} has no token to share (it has no {OWNER_NAME}): token.shared_with must name the data folder of "
            "the node that owns the token, and `python -m nodes init` must have run for that one"
        )
    return load_config(path, Mark)


def hold(data: Path) -> int:
    """Keep others from changing the token of this data folder until the returned descriptor is closed.

    ``ClusterError`` while it is being changed, or while a change that was cut off waits for its owner.
    """
    owner = owner_of(data)
    held = _lock(data, shared=True)
    if is_pending(data):
        os.close(held)
        raise ClusterError(f"a rotation of the KEK of {owner.node!r} was cut off in {data}; start that node first")
    return held


def leave_mark(data: Path, own: Mark) -> None:
    """Tell the owner of the token in this data folder that a node seals under its KEK. The caller holds the token."""
    _write(data / SHARERS / f"{quote(own.node, safe='')}.toml", own)


def list_marks(data: Path) -> list[Mark]:
    """The nodes that share the token of this data folder, beside its owner."""
    return [load_config(path, Mark) for path in sorted((data / SHARERS).glob("*.toml"))]


@contextmanager
def alone(data: Path) -> Iterator[None]:
    """Have the token of this data folder to change; ``ConfigError`` names the nodes that share it."""
    _check_unshared(data)  # first, since one that runs has the lock
    held = _lock(data, shared=False)
    try:
        _check_unshared(data)
        yield
    finally:
        os.close(held)


def _check_unshared(data: Path) -> None:
    if marks := list_marks(data):
        names = ", ".join(repr(mark.node) for mark in marks)
        raise ConfigError(
            f"the token in {data} is shared by {names}, whose shares are sealed under the same KEK; it can't be "
            f"changed while they use it. Where one of them is gone for good, remove its file in {data / SHARERS}"
        )


def misplaced(cluster: Cluster, own: Mark, others: Iterable[Mark]) -> str:
    """What is wrong with the places of nodes that share a token; empty if they lie in one failure domain.

    A node that the manifest does not name has no place, and nothing is wrong with it.
    """
    here = own.member(cluster)
    if here is None:
        return ""
    for mark in others:
        there = mark.member(cluster)
        if there is not None and _domain(cluster, here) != _domain(cluster, there):
            return (
                f"{own.node!r} shares a token with {mark.node!r}, but the cluster manifest (serial {cluster.serial}) "
                f"has them in the failure domains {_domain(cluster, here)!r} and {_domain(cluster, there)!r}: they "
                "fail together, so their locations must begin alike"
            )
    return ""


def _domain(cluster: Cluster, node: Member) -> str:
    return "/".join(node.location.split("/")[: cluster.domain_level])


def _lock(data: Path, *, shared: bool) -> int:
    folder = data / SHARERS
    if not folder.exists():
        folder.mkdir(mode=0o700, exist_ok=True)
        sync_folder(data)
    return lock_folder(folder, shared=shared)


def _write(path: Path, mark: Mark) -> None:
    if not path.exists() or load_config(path, Mark) != mark:
        write_toml(path, asdict(mark))
