"""A small real cluster for the balancer's tests: real keys, real signatures, a real manifest."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import structs
from postgres_server import PostgresServer, postgres_server
from registry_places import FilePlace, Place, ServerPlace

from balancer.registry import SqlRegistry
from engine.protocol.manifest import (
    Cluster,
    CreateOrder,
    DestroyOrder,
    Holder,
    KeyManifest,
    Member,
    PolicyRule,
    Receipt,
    chain_pin,
    create_orders,
    destroy_orders,
    issue_cluster_manifest,
    key_manifests,
    open_chain,
    receipts,
)
from engine.protocol.signed import SigningKey, read_unverified, sign_envelope

NOW_MS = 1_800_000_000_000
LIFETIME_MS = 60_000


def _signing(name: str) -> SigningKey:
    seed = hashlib.sha256(b"test " + name.encode()).digest()
    return SigningKey(name, Ed25519PrivateKey.from_private_bytes(seed))


class World:
    """An operator, clients alice (may do everything) and bob (nothing), some nodes in three sites, one balancer."""

    now_ms = NOW_MS

    def __init__(self, name: str = "test", nodes: int = 6) -> None:
        self.nodes = [f"node-{i}" for i in range(nodes)]
        self.keys = {each: _signing(each) for each in ("op", "alice", "bob", "balancer", *self.nodes)}
        roles = {"op": "operator", "alice": "client", "bob": "client", "balancer": "balancer"}
        members = [
            Member(
                each,
                roles.get(each, "node"),  # type: ignore[arg-type]
                key.public,
                bytes(32) if each == "op" else hashlib.sha256(b"curve " + each.encode()).digest(),
                "tcp://127.0.0.1:1" if each not in ("op", "alice", "bob") else "",
                "",
                f"site-{int(each[-1]) % 3}/room/rack/{each}" if each in self.nodes else "",
            )
            for each, key in self.keys.items()
        ]
        chain = issue_cluster_manifest(
            name=name, members=members, rules=[PolicyRule("alice", "*", ["*"])], operators=[self.keys["op"]]
        )
        self.cluster: Cluster = open_chain(chain, chain_pin(chain))
        self._ids = itertools.count(1)

    def key_id(self) -> bytes:
        return next(self._ids).to_bytes(16, "big")

    def order(
        self,
        name: str = "orders",
        key_id: bytes = b"",
        *,
        threshold: int = 2,
        shares: int = 3,
        expires_ms: int = NOW_MS + LIFETIME_MS,
        client: str = "alice",
    ) -> bytes:
        order = CreateOrder(key_id or self.key_id(), name, "aes-256-gcm", threshold, shares, "generate", expires_ms)
        return sign_envelope("order.create", 1, create_orders.encode(order), self.keys[client])

    def rotation(self, first: bytes, version: int = 2, client: str = "alice", **changes: Any) -> bytes:
        """An order for a further version of the key whose version 1 was ordered by ``first``."""
        before = create_orders.decode(read_unverified(first).payload)
        told = {"key_id": self.key_id(), "operation": "rotate", "version": version, "lineage": before.key_id}
        order = structs.replace(before, **(told | changes))
        return sign_envelope("order.create", 1, create_orders.encode(order), self.keys[client])

    def manifest(
        self, order: bytes, attempt: int, holders: list[str], dealer: str = "node-0", salt: bytes = b""
    ) -> bytes:
        wanted = create_orders.decode(read_unverified(order).payload)
        manifest = KeyManifest(
            key_id=wanted.key_id,
            name=wanted.name,
            version=wanted.version,
            epoch=1,
            attempt=attempt,
            algorithm=wanted.algorithm,
            threshold=wanted.threshold,
            holders=[
                Holder(node, x, hashlib.sha256(salt + node.encode()).digest()) for x, node in enumerate(holders, 1)
            ],
            public_key=b"",
            check_value=bytes(32),
            order=order,
            previous=b"",
        )
        return sign_envelope("key", 1, key_manifests.encode(manifest), self.keys[dealer])

    def receipts(self, manifest: bytes, *, signed_by: list[str] | None = None) -> list[bytes]:
        """Each holder's receipt, or those of the named ones."""
        signed = read_unverified(manifest)
        told = key_manifests.decode(signed.payload)
        return [
            sign_envelope(
                "receipt", 1, receipts.encode(Receipt(told.key_id, signed.digest, holder.x)), self.keys[holder.node]
            )
            for holder in told.holders
            if signed_by is None or holder.node in signed_by
        ]

    def destroy_order(
        self, order: bytes, *, name: str = "", expires_ms: int = NOW_MS + LIFETIME_MS, client: str = "alice"
    ) -> bytes:
        wanted = create_orders.decode(read_unverified(order).payload)
        payload = destroy_orders.encode(DestroyOrder(wanted.key_id, name or wanted.name, expires_ms))
        return sign_envelope("order.destroy", 1, payload, self.keys[client])

    def open(self, place: Place, now_ms: int = NOW_MS) -> SqlRegistry:
        return place.open(self.cluster, self.keys["balancer"], now_ms)

    def commit(self, registry: SqlRegistry, order: bytes, now_ms: int = NOW_MS, dealer: str = "node-0") -> bytes:
        """Take an order all the way; the manifest."""
        reserved = registry.reserve(order, dealer, now_ms)
        manifest = self.manifest(order, reserved.attempt, reserved.holders, dealer)
        registry.commit(manifest, self.receipts(manifest), now_ms)
        return manifest


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server that all tests share, each with databases of its own."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where a registry is kept: each test that asks runs on every back end there is."""
    if request.param == "sqlite":
        yield FilePlace(tmp_path / "registry.db")
        return
    with closing(ServerPlace(request.getfixturevalue("postgres"))) as shared:
        yield shared


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    return World


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture(scope="session")
def world_of_nine() -> World:
    """Nine nodes in three sites."""
    return World(nodes=9)
