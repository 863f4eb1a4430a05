"""A local cluster that lost all its nodes and its balancer, made anew under the same names, with fresh keys and tokens.

What is left of the old one is what its people keep elsewhere: the operators, the clients and the chain of manifests.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from engine import LocalCluster
from engine.client.config import create_identity, load_identity, write_private, write_toml
from engine.protocol.manifest import Member, issue_cluster_manifest
from engine.protocol.signed import SigningKey


def sign_again(
    cluster: LocalCluster,
    members: Sequence[Member],
    *,
    signers: Sequence[SigningKey] = (),
    quorum: int | None = None,
) -> None:
    """Sign a further manifest of these members into a cluster's folder, by its operator and the other ``signers``."""
    now = cluster.cluster
    secret = (cluster.path / "secrets" / "operator.passphrase").read_text(encoding="ascii").strip()
    operator = load_identity(cluster.path / "operator" / "identity.toml", secret)
    file = cluster.path / "cluster.manifest"
    chain = issue_cluster_manifest(
        name=now.name,
        members=members,
        rules=now.rules,
        operators=[operator.signing, *signers],
        quorum=quorum or now.quorum,
        groups=now.groups,
        domain_level=now.domain_level,
        chain=file.read_bytes(),
    )
    write_private(file, chain)


def replace_node(cluster: LocalCluster, name: str, signers: Sequence[SigningKey] = ()) -> None:
    """Lose a node's disk and token, and make one of that name with fresh keys in its place, which is started."""
    cluster.stop_node(name)
    was = cluster.cluster.members[name]
    folder = cluster.path / "nodes" / name
    shutil.rmtree(folder)
    (cluster.path / "secrets" / f"{name}.pin").unlink()
    folder.mkdir(mode=0o700)
    identity = create_identity(folder / "identity.toml", name, "node")
    fresh = identity.member(endpoint=was.endpoint, publish_endpoint=was.publish_endpoint, location=was.location)
    members = [fresh if member.name == name else member for member in cluster.cluster.members.values()]
    sign_again(cluster, members, signers=signers)
    cluster._write_node(name, cluster.cluster.pin.hex(), name)
    cluster._init_tokens([name])
    cluster._await_manifest(cluster.cluster)
    cluster.start_node(name)


def reborn(before: LocalCluster, path: Path, signers: Sequence[SigningKey] = ()) -> LocalCluster:
    """Destroy a cluster wholly and make a fresh one of its members in ``path``; it is not started."""
    before.stop()
    old = before.cluster
    shutil.copytree(before.path, path, ignore=shutil.ignore_patterns("nodes", "balancer*", "run", "*.pin", "lock"))
    names = before.nodes
    shutil.rmtree(before.path)
    members = {member.name: member for member in old.members.values()}
    pin = old.pin.hex()
    fresh = LocalCluster.__new__(LocalCluster)
    fresh._temporary, fresh.path = False, path.resolve()
    fresh._set_up(False, 60.0, None)
    for name in [*names, "balancer"]:
        was = members[name]
        folder = path / "nodes" / name if name != "balancer" else path / name
        folder.mkdir(mode=0o700, parents=True)
        identity = create_identity(folder / "identity.toml", name, was.role)
        members[name] = identity.member(
            endpoint=was.endpoint, publish_endpoint=was.publish_endpoint, location=was.location
        )
    fresh._load()
    sign_again(fresh, list(members.values()), signers=signers)
    for name in names:
        fresh._write_node(name, pin, name)
    write_toml(
        path / "balancer" / "balancer.toml",
        {
            "version": 1,
            "identity": "identity.toml",
            "manifest": "../cluster.manifest",
            "manifest_pin": pin,
            "data": "data",
            "migrate": {"enabled": False},
        },
    )
    fresh._init_tokens(names)
    fresh._load()
    return fresh
