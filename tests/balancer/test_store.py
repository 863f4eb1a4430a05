"""The history on the disk: what is read is what was written, and no file keeps a balancer from starting."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import structlog

from balancer.forecast import predict_load
from balancer.history import CLASSES, GROUPS_MAX, SLOW_MS, History, Stored
from balancer.store import SCHEMA, HistoryStore
from engine.protocol.requests import ClassCount, NodeStats

SIGN = CLASSES.index("sign/ed25519")
TICK = 1_800_000_000


def store(path: Path, *, tick_ms: int = 1000, ticks: int = 200) -> HistoryStore:
    return HistoryStore(path / "history.db", tick_ms=tick_ms, ticks=ticks)


def history_of(counts: np.ndarray, first: int = TICK) -> History:
    """A history of a node that signs so often, half of it in group 7."""
    history = History(("a",), tick_ms=1000, ticks=200)
    total = 0
    for index, count in enumerate([0, *counts.tolist()]):
        total += int(count)
        told = [ClassCount("sign/ed25519", total, 0, total)]
        history.observe(
            first + index, {"a": NodeStats(b"a" * 16, 10**9, 0, told, [(0, 7, total // 2)], [], 1, 0, [], 0)}
        )
    return history


def written(path: Path, counts: np.ndarray) -> int:
    """Write a history; its last tick."""
    history = history_of(counts)
    kept = store(path)
    kept.save(*history.stored(TICK, 0))
    kept.close()
    return TICK + len(counts)


def restored(path: Path, tick: int, **more: int) -> History:
    history = History(("a",), tick_ms=more.get("tick_ms", 1000), ticks=200)
    history.restore(tick, *store(path, **more).load(tick, tick * 1000 // SLOW_MS - 1))
    return history


def test_a_restarted_history_forecasts_with_a_ridge_at_once(tmp_path: Path) -> None:
    """Counts of classes and pairs, and whole minutes, are as they were; the very first forecast is learnt from them."""
    wave = np.round(100 + 80 * np.sin(2 * np.pi * np.arange(180) / 20))
    before = history_of(wave).snapshot()
    tick = written(tmp_path, wave)
    after = restored(tmp_path, tick).snapshot()
    assert after.classes == before.classes == ("sign/ed25519",)
    assert np.array_equal(after.counts[-len(wave) :], before.counts[-len(wave) :])
    assert after.pairs == before.pairs == ((0, 7),)
    assert np.array_equal(after.pair_counts[-100:], before.pair_counts[-100:])
    assert before.slow is not None
    assert after.slow is not None
    known = before.slow.counts[~np.isnan(before.slow.counts[:, 0])]
    assert len(known) >= 2
    assert np.array_equal(after.slow.counts[-len(known) :], known)
    assert predict_load(after).models == ("ridge",)


def test_what_was_not_observed_is_unknown(tmp_path: Path) -> None:
    """The ticks of the restart are NaN, and old ones have left the ring."""
    tick = written(tmp_path, np.full(50, 10.0))
    history = restored(tmp_path, tick + 20)
    counts = history.snapshot().counts[:, 0]
    assert np.isnan(counts[-20:]).all()
    assert counts[-70:-20].tolist() == [10.0] * 50
    assert restored(tmp_path, tick + 10**6).snapshot().counts.size == 0


def test_a_clock_that_was_wrong(tmp_path: Path) -> None:
    """Steps of the future are not read; neither they nor a balancer that ran in another time erase what is right."""
    tick = written(tmp_path, np.full(50, 10.0))
    right = store(tmp_path).load(tick, 0)[0].steps.tolist()
    fast, _ = store(tmp_path).load(tick - 30, 0)
    assert fast.steps.tolist()[-1] == tick - 30
    for off in (-500_000, 500_000):
        again = store(tmp_path)
        again.load(tick + off, 0)
        again.save(*history_of(np.full(6, 3.0), TICK + off).stored(TICK + off - 100, 0))
        again.close()
        told = store(tmp_path).load(TICK + off + 10, 0)[0].steps.tolist()
        assert told[-5:] == list(range(TICK + off + 2, TICK + off + 7))
        assert store(tmp_path).load(tick, 0)[0].steps.tolist() == right


def test_a_file_that_is_locked_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The balancer goes on without it; the next one reads it."""
    tick = written(tmp_path, np.full(50, 10.0))
    right = store(tmp_path).load(tick, 0)[0].steps.tolist()
    connect = sqlite3.connect
    with contextlib.closing(connect(tmp_path / "history.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda *args, **more: connect(*args, **(more | {"timeout": 0.05})))
        with structlog.testing.capture_logs() as told:
            assert len(store(tmp_path).load(tick, 0)[0].steps) == 0
        assert [each["then"] for each in told] == ["it goes on without"]
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.damaged"))
    assert store(tmp_path).load(tick, 0)[0].steps.tolist() == right


def test_another_tick_length_keeps_the_minutes_alone(tmp_path: Path) -> None:
    """Counts of ticks of another length say nothing; minutes are minutes."""
    tick = written(tmp_path, np.full(180, 10.0))
    half = store(tmp_path, tick_ms=500)
    fast, slow = half.load(2 * tick, tick * 1000 // SLOW_MS - 1)
    assert (len(fast.steps), len(slow.steps) >= 2) == (0, True)
    half.save(*history_of(np.full(5, 3.0), 2 * tick).stored(2 * tick, 0))
    half.close()
    assert store(tmp_path, tick_ms=500).load(2 * tick + 5, 0)[0].steps.min() >= 2 * tick


@pytest.mark.parametrize("damage", ["noise", "cut", "schema", "folder row", "empty"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, damage: str) -> None:
    """A warning, a fresh start, and the next one reads what this one wrote."""
    tick = written(tmp_path, np.full(50, 10.0))
    path = tmp_path / "history.db"
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        if damage == "schema":
            db.execute(f"PRAGMA user_version={SCHEMA + 1}")
        if damage == "folder row":
            db.execute("UPDATE steps SET counts = ? WHERE cadence = 0", (b"12345",))
    db.close()
    content = path.read_bytes()
    if damage == "noise":
        path.write_bytes(np.random.default_rng(1).bytes(len(content)))
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2 - 1000])
    elif damage == "empty":
        path.write_bytes(b"")
    kept = store(tmp_path)
    with structlog.testing.capture_logs() as told:
        fast, slow = kept.load(tick, 0)
    assert (len(fast.steps), len(slow.steps)) == (0, 0)
    assert [each["log_level"] for each in told] == ([] if damage == "empty" else ["warning"])
    kept.save(*history_of(np.full(20, 5.0)).stored(TICK, 0))
    kept.close()
    assert len(store(tmp_path).load(tick, 0)[0].steps) == 20


def test_a_disk_that_refuses_is_told_once(tmp_path: Path) -> None:
    """Saving waits for nothing and fails nothing; the end does not wait for the disk either."""
    kept = HistoryStore(tmp_path / "missing" / "history.db", tick_ms=1000, ticks=100)
    batch = history_of(np.full(5, 1.0)).stored(TICK, 0)
    with structlog.testing.capture_logs() as told:
        for _ in range(30):
            kept.save(*batch)
        kept.close()
    assert [each["event"] for each in told] == ["history not written"]


def test_the_file_is_bounded_and_private(tmp_path: Path) -> None:
    """As many steps as the ring has stay, whatever was written; nobody else can read it."""
    kept = store(tmp_path, ticks=30)
    for first in range(TICK, TICK + 400, 100):
        kept.save(*history_of(np.full(100, 4.0), first).stored(first, 0))
    kept.close()
    with sqlite3.connect(tmp_path / "history.db") as db:
        assert db.execute("SELECT count(*) FROM steps WHERE cadence = 0").fetchone() == (30,)
    db.close()
    assert (tmp_path / "history.db").stat().st_mode & 0o077 == 0


def test_pairs_that_are_gone_lose_their_numbers(tmp_path: Path) -> None:
    """Series that no step names are forgotten when the file is read."""
    kept = store(tmp_path)
    numbers = SIGN * GROUPS_MAX + np.arange(50)
    counts = np.zeros((1, len(CLASSES)))
    pairs = np.zeros((1, 50))
    counts[0, SIGN], pairs[0, :3] = 100, 5
    nothing = Stored(np.zeros(0, dtype=np.int64), counts[:0], numbers[:0], pairs[:0, :0])
    kept.save(Stored(np.array([TICK]), counts, numbers, pairs), nothing)
    kept.close()
    fast, _ = store(tmp_path).load(TICK, 0)
    assert fast.pairs.tolist() == numbers[:3].tolist()
    with sqlite3.connect(tmp_path / "history.db") as db:
        assert db.execute("SELECT count(*) FROM series WHERE pg >= 0").fetchone() == (3,)
    db.close()
