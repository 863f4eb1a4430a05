"""Where a registry of a test is kept: in a file, or in a database of a server. The same tests run on both."""

from __future__ import annotations

import itertools
import sqlite3
import time
from pathlib import Path
from typing import Any, Protocol

from postgres_server import PostgresServer

from balancer.mark import Mark
from balancer.postgres import PostgresRegistry
from balancer.registry import SqliteRegistry, SqlRegistry
from engine.protocol.manifest import Cluster
from engine.protocol.signed import SigningKey

__all__ = ["FilePlace", "Place", "ServerPlace", "leading"]

LEAD_S = 30.0


class Place(Protocol):
    """A registry's rows, and what others do to them."""

    def open(self, cluster: Cluster, signing: SigningKey, now_ms: int, mark: Mark | None = None) -> SqlRegistry:
        """A registry that leads; who opened one before has closed it."""

    def execute(self, statement: str, *values: object) -> list[Any]:
        """What a statement gives, past the registry, which is closed or does not notice."""

    def save(self) -> Any:
        """A copy of it all; the registry is closed."""

    def put_back(self, saved: Any) -> None:
        """Have it be as it was when it was saved; the registry is closed."""


def leading(registry: PostgresRegistry) -> PostgresRegistry:
    """The same, once it leads."""
    until = time.monotonic() + LEAD_S
    while not registry.term:
        assert time.monotonic() < until, registry.problem or "it does not lead"
        assert "fell back" not in registry.problem, registry.problem
        time.sleep(0.002)
    return registry


class FilePlace:
    """One file, of SQLite's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, cluster: Cluster, signing: SigningKey, now_ms: int, mark: Mark | None = None) -> SqlRegistry:
        return SqliteRegistry(self.path, cluster, signing, now_ms, mark)

    def execute(self, statement: str, *values: object) -> list[Any]:
        store = sqlite3.connect(self.path, isolation_level=None)
        try:
            return store.execute(statement, values).fetchall()
        finally:
            store.close()

    def save(self) -> bytes:
        return self.path.read_bytes()

    def put_back(self, saved: bytes) -> None:
        for leftover in self.path.parent.glob(f"{self.path.name}-*"):
            leftover.unlink()
        self.path.write_bytes(saved)


class ServerPlace:
    """A schema in a database of a PostgreSQL server."""

    _schemas = itertools.count(1)

    def __init__(self, server: PostgresServer) -> None:
        self.server = server
        self.schema = self._make()
        self._opened: list[PostgresRegistry] = []

    def close(self) -> None:
        """End what a test left open."""
        for registry in self._opened:
            registry.close()

    def _make(self) -> str:
        schema = f"test{next(self._schemas)}"
        self.server.execute(f"CREATE SCHEMA {schema}")
        return schema

    @property
    def conninfo(self) -> str:
        return f"{self.server.conninfo} options=-csearch_path={self.schema}"

    def open(self, cluster: Cluster, signing: SigningKey, now_ms: int, mark: Mark | None = None) -> SqlRegistry:
        registry = PostgresRegistry(self.conninfo, cluster, signing, lambda: now_ms, mark)
        self._opened.append(registry)
        registry.start()
        return leading(registry)

    def execute(self, statement: str, *values: object) -> list[Any]:
        return self.server.execute(f"SET search_path = {self.schema}; {statement}", *values)

    def save(self) -> str:
        copy = self._make()
        tables = self.server.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", self.schema)
        for (table,) in tables:
            self.server.execute(f"CREATE TABLE {copy}.{table} (LIKE {self.schema}.{table} INCLUDING ALL)")
            self.server.execute(f"INSERT INTO {copy}.{table} SELECT * FROM {self.schema}.{table}")  # noqa: S608
        return copy

    def put_back(self, saved: str) -> None:
        self.schema = saved
