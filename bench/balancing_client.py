"""Orders keys moved and renewed on a cluster as its balancer does, by the balancer's own identity."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import zmq

from engine import Engine, LocalCluster
from engine.client.config import load_identity
from engine.client.membership import Servers
from engine.client.transport import Channel, ask
from engine.errors import EngineError
from engine.protocol.manifest import KeyManifest, RefreshOrder, ReshareOrder, read_key_manifest, sign_orders
from engine.protocol.requests import MOVE, BalancerStatus, Describe, Move, MoveResult

__all__ = ["Mover"]


class Mover:
    """The balancer's signing key and a channel of its own to the nodes; and one of the first client's."""

    def __init__(self, cluster: LocalCluster, kq: Engine, fencing: int = 0) -> None:
        self.cluster = cluster
        self.identity = load_identity(cluster.path / "balancer" / "identity.toml")
        self.client = load_identity(cluster.client_config.parent / "identity.toml")
        self.context: zmq.Context[Any] = zmq.Context()
        self.channel = Channel(self.identity.transport, Servers(cluster), self.context)
        self.of_client = Channel(self.client.transport, Servers(cluster), self.context)
        self.fencing = fencing or _fencing(kq, self.identity.name)

    def __enter__(self) -> Mover:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.channel.close()
        self.of_client.close()
        self.context.destroy(linger=0)

    def manifest(self, name: str) -> KeyManifest:
        """A key's manifest as the first node has it that knows the key."""
        for node in self.cluster.nodes:
            try:
                found = ask(self.of_client, node, "describe", Describe(name, 0), 10.0)
            except EngineError:
                continue
            return read_key_manifest(found.manifest).manifest
        raise RuntimeError(f"no node knows {name!r}")

    def move(self, at: str, orders: Sequence[bytes], timeout_s: float = 30.0) -> list[MoveResult]:
        """Have a node carry these orders out."""
        results: list[MoveResult] = ask(self.channel, at, MOVE, Move(list(orders)), timeout_s).results
        return results

    def order(self, manifest: KeyManifest, holders: Sequence[str], **changes: Any) -> bytes:
        """A signed move order; ``changes`` are other fields of it."""
        return self.orders([(manifest, holders)], **changes)[0]

    def orders(self, moves: Sequence[tuple[KeyManifest, Sequence[str]]], **changes: Any) -> list[bytes]:
        """Move orders of keys to new holders, signed together; ``changes`` are other fields of them."""
        made = []
        for manifest, holders in moves:
            told = {"threshold": manifest.threshold, "holders": list(holders), "without": []}
            made.append(ReshareOrder(**self._fields(manifest, told | changes)))
        return sign_orders(made, self.identity.signing, now_ms())

    def renewal(self, manifest: KeyManifest, **changes: Any) -> bytes:
        """A signed renewal order."""
        return sign_orders([RefreshOrder(**self._fields(manifest, changes))], self.identity.signing, now_ms())[0]

    def _fields(self, manifest: KeyManifest, changes: dict[str, Any]) -> dict[str, Any]:
        return {
            "key_id": manifest.key_id,
            "name": manifest.name,
            "from_epoch": manifest.epoch,
            "nonce": os.urandom(16),
            "expires_ms": now_ms() + 60_000,
            "fencing": self.fencing,
        } | changes


def _fencing(kq: Engine, balancer: str) -> int:
    """The fencing epoch under which a balancer serves."""
    for member in kq.status(timeout=10.0):
        if member.name == balancer and isinstance(member.status, BalancerStatus):
            return member.status.fencing_epoch
    raise RuntimeError(f"{balancer} does not tell its status")


def now_ms() -> int:
    """The time as orders tell it."""
    return time.time_ns() // 1_000_000
