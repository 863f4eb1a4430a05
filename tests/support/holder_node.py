"""A holder with its own store, beside others on one lane: the test plays the network between them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.sharing import Share
from nodes.catalogue import Catalogue
from nodes.clock import TrustedClock
from nodes.holder import ShareHolder
from nodes.ledger import GrantLedger
from nodes.orders import BalancerOrders
from nodes.renewer import Renewer
from nodes.store import ShareStore
from nodes.token import Lane

__all__ = ["HolderNode"]


class HolderNode:
    """One node of a ``World``; ``key_id`` is the key that it is asked about."""

    def __init__(
        self, world: Any, name: str, folder: Path, lane: Lane, algorithms: Sequence[str], key_id: bytes
    ) -> None:
        self.world, self.name, self.lane, self.key_id = world, name, lane, key_id
        self.path = folder / f"{name}.db"
        self.algorithms = algorithms
        self.open()

    def open(self) -> None:
        world = self.world
        self.store = ShareStore(self.path, self.name, self.lane)
        self.catalogue = Catalogue(self.store.rows())
        key = world.keys[self.name]
        clock = TrustedClock(self.store.clock_mark().mark_ms, wall_ms=world.clock, steady_ms=lambda: 0)
        self.ledger = GrantLedger(self.store, clock)
        self.holder = ShareHolder(world.cluster, key, self.store, self.catalogue, self.algorithms, self.ledger)
        secret = world.curve_key(self.name).private_bytes_raw()
        self.orders = BalancerOrders(world.cluster, self.store, lambda: world.now_ms / 1_000)
        self.renewer = Renewer(world.cluster, lambda: [secret], self.catalogue, self.holder, self.orders, world.clock)

    def restart(self) -> None:
        self.store.close()
        self.open()

    @property
    def entry(self) -> Any:
        return self.catalogue.by_id(self.key_id)

    def share(self) -> Share:
        return self.holder.own_share(self.lane, self.entry)[0]

    def epochs(self) -> dict[int, str]:
        return {row.epoch: row.state for row in self.store.rows()}

    def rows(self) -> dict[int, tuple[str, bool]]:
        """Epoch -> state, and whether there is a share."""
        return {row.epoch: (row.state, bool(row.sealed)) for row in self.store.rows()}
