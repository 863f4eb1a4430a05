"""The history on the disk, so that a balancer that starts again forecasts at once: SQLite, in a file of its own.

Nothing depends on it: a file that is damaged or of another schema is set aside with a warning; one that is locked or
that the disk refuses is left alone, told once and tried again. Writing has a thread of its own; the control loop hands
over copies and never waits.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray

from balancer.history import CLASSES, GROUPS_MAX, SLOW_STEPS, Stored

__all__ = ["HistoryStore"]

FloatArray = NDArray[np.float64]

SCHEMA = 1
FAST, SLOW = 0, 1
QUEUE_MAX = 8
"""Batches that wait for the disk; beyond it the newest is left out, as the next one says most of it again."""
DAMAGE = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
"""Not its tables, not a sound file, or no database: what else SQLite says is not the file's fault."""
RETRY_S = 60.0
COUNT_MAX = 1e12
SERIES_MAX = 32_768
"""More series than this have no id; those that no step names any more lose theirs when the file is next read."""

_TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE series (id INTEGER PRIMARY KEY, class TEXT NOT NULL, pg INTEGER NOT NULL, UNIQUE (class, pg));
CREATE TABLE steps (cadence INTEGER NOT NULL, step INTEGER NOT NULL, counts BLOB NOT NULL, PRIMARY KEY (cadence, step))
    WITHOUT ROWID;
"""
"""``pg`` is -1 for the class itself. ``counts`` are the counts above 0: ids (uint32), then as many float32."""

log = structlog.get_logger()


class HistoryStore:
    """The file of one balancer. ``load`` once, then ``save`` now and then, and ``close``."""

    def __init__(self, path: Path, *, tick_ms: int, ticks: int) -> None:
        self._path = path
        self._tick_ms = tick_ms
        self._keep = {FAST: ticks, SLOW: SLOW_STEPS}
        self._waiting: queue.Queue[tuple[Stored, Stored] | None] = queue.Queue(QUEUE_MAX)
        self._complained = False
        self._ids: dict[tuple[str, int], int] = {}
        self._thread = threading.Thread(target=self._write_all, name="history-store", daemon=True)
        self._started = False

    def load(self, tick: int, minute: int) -> tuple[Stored, Stored]:
        """Ticks and minutes up to these that an earlier process kept; empty if there are none to be had."""
        try:
            with self._opened() as db:
                told = self._read(db, FAST, tick), self._read(db, SLOW, minute)
                self._forget_series(db, {number for stored in told for number in stored.pairs.tolist()})
                return told
        except (sqlite3.Error, OSError, ValueError) as error:
            if _is_damage(error):
                self._set_aside(error)
            else:
                log.warning("history not read", file=str(self._path), reason=str(error), then="it goes on without")
        return _nothing(), _nothing()

    def save(self, fast: Stored, slow: Stored) -> None:
        """Hand a batch over to the writer; never waits."""
        if not self._started:
            self._started = True
            self._thread.start()
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait((fast, slow))

    def close(self) -> None:
        """Write what waits, and end."""
        if self._started:
            self._waiting.put(None)
            self._thread.join()
            self._started = False

    # --- the file ---

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        if not self._path.exists():
            os.close(os.open(self._path, os.O_CREAT | os.O_WRONLY, 0o600))
        db = sqlite3.connect(self._path, isolation_level=None, timeout=5.0)
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=NORMAL")
            self._prepare(db)
            yield db
        finally:
            db.close()

    def _prepare(self, db: sqlite3.Connection) -> None:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version == 0 and not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            with _transaction(db):
                for statement in _TABLES.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO about VALUES ('tick_ms', ?)", (self._tick_ms,))
                db.execute(f"PRAGMA user_version={SCHEMA}")
            return
        if version != SCHEMA:
            raise ValueError(f"schema {version}, this balancer writes {SCHEMA}")

    def _read(self, db: sqlite3.Connection, cadence: int, newest: int) -> Stored:
        if cadence == FAST:
            answer = db.execute("PRAGMA quick_check(1)").fetchone()
            if answer[0] != "ok":
                raise sqlite3.DatabaseError(str(answer[0]))
            kept = db.execute("SELECT value FROM about WHERE name = 'tick_ms'").fetchone()
            if kept is None or kept[0] != self._tick_ms:
                log.info("history of other ticks", kept_ms=kept and kept[0], tick_ms=self._tick_ms)
                return _nothing()
        series = {int(number): (str(name), int(group)) for number, name, group in db.execute("SELECT * FROM series")}
        rows = db.execute(
            "SELECT step, counts FROM steps WHERE cadence = ? AND step > ? AND step <= ? ORDER BY step",
            (cadence, newest - self._keep[cadence], newest),
        ).fetchall()
        return _unpacked(series, [(int(step), bytes(counts)) for step, counts in rows])

    def _forget_series(self, db: sqlite3.Connection, kept: set[int]) -> None:
        groups = db.execute("SELECT id, class, pg FROM series WHERE pg >= 0").fetchall()
        columns = {name: index for index, name in enumerate(CLASSES)}
        gone = [(number,) for number, name, pg in groups if columns.get(name, -1) * GROUPS_MAX + pg not in kept]
        with _transaction(db):
            db.executemany("DELETE FROM series WHERE id = ?", gone)

    def _set_aside(self, error: Exception) -> None:
        log.warning("history not read", file=str(self._path), reason=str(error), then="it begins anew")
        for suffix in ("", "-wal", "-shm"):
            part = Path(f"{self._path}{suffix}")
            with contextlib.suppress(OSError):
                if suffix:
                    part.unlink(missing_ok=True)
                elif part.exists():
                    part.replace(f"{self._path}.damaged")

    # --- the writer's thread ---

    def _write_all(self) -> None:
        ended = False
        while not ended:
            try:
                with self._opened() as db:
                    self._ids = {
                        (name, group): int(number) for number, name, group in db.execute("SELECT * FROM series")
                    }
                    ended = self._write_until(db)
            except (sqlite3.Error, OSError, ValueError) as error:
                if _is_damage(error):
                    self._set_aside(error)
                ended = self._wait_for_disk(error)

    def _write_until(self, db: sqlite3.Connection) -> bool:
        while (batch := self._waiting.get()) is not None:
            with _transaction(db):
                for cadence, stored in zip((FAST, SLOW), batch, strict=True):
                    self._write(db, cadence, stored)
            self._complained = False
        return True

    def _wait_for_disk(self, error: Exception) -> bool:
        """Whether the end was asked for while the disk refuses."""
        if not self._complained:
            self._complained = True
            log.warning("history not written", file=str(self._path), reason=str(error))
        with contextlib.suppress(queue.Empty):
            return self._waiting.get(timeout=RETRY_S) is None
        return False

    def _write(self, db: sqlite3.Connection, cadence: int, stored: Stored) -> None:
        kept_ms = db.execute("SELECT value FROM about WHERE name = 'tick_ms'").fetchone()
        if cadence == FAST and kept_ms != (self._tick_ms,):
            # The file was of other ticks: those say nothing any more.
            db.execute("DELETE FROM steps WHERE cadence = ?", (FAST,))
            db.execute("REPLACE INTO about VALUES ('tick_ms', ?)", (self._tick_ms,))
        if not len(stored.steps):
            return
        groups = [(CLASSES[number // GROUPS_MAX], number % GROUPS_MAX) for number in stored.pairs.tolist()]
        told = [self._id(db, *each) for each in [*((name, -1) for name in CLASSES), *groups]]
        ids = np.array(told, dtype=np.int64)
        counts = np.hstack([stored.counts, stored.pair_counts])
        rows = []
        for step, row in zip(stored.steps.tolist(), np.nan_to_num(counts, nan=0.0), strict=True):
            above = np.flatnonzero((row > 0) & (ids >= 0))
            rows.append(
                (cadence, step, ids[above].astype(np.uint32).tobytes() + row[above].astype(np.float32).tobytes())
            )
        db.executemany("REPLACE INTO steps VALUES (?, ?, ?)", rows)
        # So many rows up to this step are kept, whatever they are of. By their age, or because they are later, a clock
        # that was wrong for a moment would erase all. What lies in the future is written over when its time comes.
        newest = int(stored.steps[-1])
        oldest = db.execute(
            "SELECT step FROM steps WHERE cadence = ? AND step <= ? ORDER BY step DESC LIMIT 1 OFFSET ?",
            (cadence, newest, self._keep[cadence]),
        ).fetchone()
        if oldest is not None:
            db.execute("DELETE FROM steps WHERE cadence = ? AND step <= ?", (cadence, oldest[0]))

    def _id(self, db: sqlite3.Connection, name: str, group: int) -> int:
        number = self._ids.get((name, group))
        if number is None:
            if len(self._ids) >= SERIES_MAX:
                return -1
            number = max(self._ids.values(), default=-1) + 1
            db.execute("INSERT INTO series VALUES (?, ?, ?)", (number, name, group))
            self._ids[name, group] = number
        return number


def _is_damage(error: Exception) -> bool:
    """Whether the file itself is of no use."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF in DAMAGE
    return isinstance(error, ValueError)


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _nothing() -> Stored:
    return Stored(
        np.zeros(0, dtype=np.int64), np.zeros((0, len(CLASSES))), np.zeros(0, dtype=np.int64), np.zeros((0, 0))
    )


def _unpacked(series: dict[int, tuple[str, int]], rows: list[tuple[int, bytes]]) -> Stored:
    """``ValueError`` for a row that no balancer wrote; series of classes that are no more are passed over."""
    columns = {name: index for index, name in enumerate(CLASSES)}
    known = {number: (columns[name], group) for number, (name, group) in series.items() if name in columns}
    parts = [(step, *_counts(blob)) for step, blob in rows]
    seen = np.unique(np.concatenate([ids for _, ids, _ in parts])) if parts else np.zeros(0, dtype=np.int64)
    pairs = sorted(
        known[number][0] * GROUPS_MAX + known[number][1]
        for number in seen.tolist()
        if number in known and 0 <= known[number][1] < GROUPS_MAX
    )
    width = len(CLASSES) + len(pairs)
    places = np.full(int(seen.max()) + 1 if seen.size else 0, width)
    at = {pair: len(CLASSES) + index for index, pair in enumerate(pairs)}
    for number in seen.tolist():
        if number in known:
            column, group = known[number]
            places[number] = column if group < 0 else at.get(column * GROUPS_MAX + group, width)
    counts = np.zeros((len(parts), width + 1))
    for row, (_, ids, values) in enumerate(parts):
        counts[row, places[ids]] = values
    steps = np.array([step for step, _, _ in parts], dtype=np.int64)
    return Stored(steps, counts[:, : len(CLASSES)], np.array(pairs, dtype=np.int64), counts[:, len(CLASSES) : width])


def _counts(blob: bytes) -> tuple[NDArray[np.int64], FloatArray]:
    if len(blob) % 8:
        raise ValueError(f"a row of {len(blob)} bytes")
    half = len(blob) // 2
    ids, values = np.frombuffer(blob[:half], dtype=np.uint32), np.frombuffer(blob[half:], dtype=np.float32)
    if not (np.isfinite(values).all() and (values >= 0).all() and (values <= COUNT_MAX).all()):
        raise ValueError("a count that is none")
    if ids.size and int(ids.max()) >= 2**24:
        raise ValueError("an id that is none")
    return ids.astype(np.int64), values.astype(np.float64)
