"""A small cluster of four nodes, and routing tables for it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.protocol.manifest import Member, chain_pin, issue_cluster_manifest, open_chain
from engine.protocol.signed import SigningKey
from engine.protocol.table import RoutingTable, pack_service

NOW = 1_800_000_000_000
NODES = ("n1", "n2", "n3", "n4")
CLASS = "sign/ed25519"


def signing(name: str) -> SigningKey:
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"r" + name.encode()).digest()))


def member(name: str, role: Any) -> Member:
    curve = bytes(32) if role == "operator" else hashlib.sha256(name.encode()).digest()
    endpoint = "" if role in ("operator", "client") else "tcp://127.0.0.1:1"
    return Member(name, role, signing(name).public, curve, endpoint, "", f"site/{name}" if role == "node" else "")


MEMBERS = [member("op", "operator"), member("alice", "client"), member("bal", "balancer")]
MEMBERS += [member(name, "node") for name in NODES]
CHAIN = issue_cluster_manifest(name="test", members=MEMBERS, rules=[], operators=[signing("op")], groups=64)
CLUSTER = open_chain(CHAIN, chain_pin(CHAIN))


def table(
    counter: int = 1,
    fencing: int = 1,
    *,
    nodes: Sequence[str] = NODES,
    service: Sequence[float] | bytes = (100, 100, 100, 100),
    price: Sequence[int] = (0, 0, 0, 0),
    **changes: Any,
) -> RoutingTable:
    made = RoutingTable(
        fencing_epoch=fencing,
        counter=counter,
        issued_ms=NOW,
        expires_ms=NOW + 5_000,
        nodes=list(nodes),
        classes=[CLASS],
        service=service if isinstance(service, bytes) else pack_service([service]),
        price=list(price),
        caps=[1000],
        groups=[],
        hints=[],
        forecast=[(0, 0)],
    )
    return msgspec.structs.replace(made, **changes)
