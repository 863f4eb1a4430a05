"""Where the registry's rows are: the small interface that the registry is written for, and SQLite behind it.

Statements are such as SQLite and PostgreSQL take alike, with ``?`` for a value and ``x''`` for no bytes. A database
knows nothing of keys; what is in its rows and which may follow which is the registry's.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ConfigError

__all__ = ["Database", "Rows", "SqliteDatabase", "upsert"]

BUSY_TIMEOUT_S = 1.0


class Rows(Protocol):
    """What a statement gave."""

    def fetchone(self) -> Any:
        """The next row, or None."""

    def fetchall(self) -> list[Any]:
        """All that are left."""

    def __iter__(self) -> Iterator[Any]: ...


class Database(Protocol):
    """Tables, and one transaction at a time. One thread at a time calls it."""

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """What any method raises where the database fails. What was to be committed then may be, or not."""

    @property
    def shared(self) -> bool:
        """Whether others than this process can write it: then rows are signed, and a balancer leads for a while."""

    @property
    def where(self) -> str:
        """What people call it."""

    def version(self) -> int:
        """Of its schema; 0 where there is none."""

    def set_version(self, version: int) -> None:
        """Note the version, in a transaction."""

    def begin(self, term: int) -> None:
        """Begin a transaction that writes, under this fencing epoch; ``RegistryUnavailable`` if another has begun.

        Until its end no other transaction that writes begins, nor a newer fencing epoch.
        """

    def commit(self) -> None:
        """Make the transaction durable."""

    def rollback(self) -> None:
        """Undo it, if there still is one."""

    @property
    def in_transaction(self) -> bool:
        """Whether there is one, failed or not."""

    def execute(self, statement: str, values: Sequence[object] = ()) -> Rows:
        """Carry out a statement: in the transaction, or by itself if there is none."""

    def executemany(self, statement: str, values: Sequence[Sequence[object]]) -> None:
        """The same statement for several rows."""

    def close(self) -> None:
        """Let go of it."""


@lru_cache
def upsert(table: str, keys: str, *others: str) -> str:
    """A statement that writes a row, in the place of one with the same ``keys`` ("a, b"); columns in order."""
    columns = [*keys.split(", "), *others]
    changes = ", ".join(f"{each} = excluded.{each}" for each in others)
    return (
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "  # noqa: S608 - fixed texts
        f"ON CONFLICT ({keys}) DO {f'UPDATE SET {changes}' if changes else 'NOTHING'}"
    )


class SqliteDatabase:
    """One SQLite file (WAL, synchronous=FULL) that this process alone has open.

    ``ConfigError`` if it is in use or damaged.
    """

    failures = (sqlite3.Error,)
    shared = False

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self.file = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        try:
            self._open()
        except sqlite3.Error as error:
            self.file.close()
            busy = "in use by another process" if "locked" in str(error) else f"no usable registry: {error}"
            raise ConfigError(f"{path}: {busy}") from None
        except BaseException:
            self.file.close()
            raise

    def _open(self) -> None:
        # Exclusive: a second balancer on the same file fails here, and not in the middle of its work.
        for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=FULL", "trusted_schema=OFF"):
            self.file.execute(f"PRAGMA {pragma}")
        if (found := self.file.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise ConfigError(f"{self.where}: damaged: {str(found)[:200]}")

    def version(self) -> int:
        """Of its schema; 0 where there is none."""
        return int(self.file.execute("PRAGMA user_version").fetchone()[0])

    def set_version(self, version: int) -> None:
        """Note the version, in a transaction."""
        self.file.execute(f"PRAGMA user_version = {version}")

    def begin(self, term: int) -> None:
        """Begin a transaction that writes; the lock on the file fences others off."""
        self.file.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Make the transaction durable."""
        self.file.execute("COMMIT")

    def rollback(self) -> None:
        """Undo it; SQLite may have done that by itself."""
        if self.file.in_transaction:
            self.file.execute("ROLLBACK")

    @property
    def in_transaction(self) -> bool:
        """Whether there is one."""
        return self.file.in_transaction

    def execute(self, statement: str, values: Sequence[object] = ()) -> Rows:
        """Carry out a statement."""
        return self.file.execute(statement, values)

    def executemany(self, statement: str, values: Sequence[Sequence[object]]) -> None:
        """The same statement for several rows."""
        self.file.executemany(statement, values)

    def close(self) -> None:
        """Close the file; what was committed is in it."""
        self.file.close()
