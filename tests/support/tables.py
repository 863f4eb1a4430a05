"""A small cluster of four nodes, and routing tables for it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from engine.client.calls import Description, KeyInfo
from engine.keys import algorithm
from engine.protocol.manifest import (
    Cluster,
    CreateOrder,
    Holder,
    KeyManifest,
    Member,
    chain_pin,
    create_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    open_key_manifest,
)
from engine.protocol.signed import SigningKey, sign_envelope
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


def description(
    name: str,
    cluster: Cluster = CLUSTER,
    *,
    holders: Sequence[str] = NODES[:3],
    key_id: bytes = b"i" * 16,
    change: int = 0,
) -> Description:
    """What a client keeps of a 2-of-n key that alice ordered and n1 dealt; ``change`` counts its refreshes."""
    order = CreateOrder(key_id, name, "ed25519", 2, len(holders), "generate", NOW + 60_000)
    raw = sign_envelope("order.create", 1, create_orders.encode(order), signing("alice"))
    held = [Holder(node, x, hashlib.sha256(bytes([x])).digest()) for x, node in enumerate(holders, 1)]
    manifest = KeyManifest(key_id, name, 1, 1, 1, "ed25519", 2, held, b"\x30" + bytes(50), bytes(32), raw, b"")
    record = open_key_manifest(sign_envelope("key", 1, key_manifests.encode(manifest), signing("n1")), cluster)
    if change:
        manifest = msgspec.structs.replace(manifest, epoch=1 + change)
        record = dataclasses.replace(record, manifest=manifest, digest=hashlib.sha256(bytes([change])).digest())
    info = KeyInfo(
        name, "ed25519", 1, 1 + change, 2, len(holders), tuple(holders), tuple(holders), key_id.hex(), "n1", ""
    )
    return Description(record, algorithm("ed25519"), tuple(holders), info, name)
