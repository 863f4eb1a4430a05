"""The store: what is acknowledged stays, what was changed is refused, what was erased is gone."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import InvalidTag, TokenError
from engine.sharing import Share
from nodes import store as store_module
from nodes.store import (
    MIGRATIONS,
    SCHEMA_VERSION,
    Row,
    ShareStore,
    StoreCorrupt,
    seal_context,
    seal_share,
    secret_context,
    unseal_share,
)
from nodes.token import Lane

NODE = "node1"
COLUMNS = tuple(Row.__dataclass_fields__)


def a_row(number: int = 1, **changes: Any) -> Row:
    row = Row(
        key_id=number.to_bytes(16, "big"),
        version=1,
        epoch=1,
        attempt=3,
        name=f"orders-{number}",
        state="prepared",
        manifest_hash=os.urandom(32),
        manifest=os.urandom(700),
        certificate=b"",
        document=b"",
        sealed=os.urandom(125),
        changed_ms=1_800_000_000_000,
    )
    return replace(row, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shares.db"


@pytest.fixture
def store(path: Path, lane: Lane) -> Iterator[ShareStore]:
    opened = ShareStore(path, NODE, lane)
    yield opened
    opened.close()


def reopened(path: Path, lane: Lane) -> list[Row]:
    """The rows as the next start would see them."""
    opened = ShareStore(path, NODE, lane)
    try:
        return opened.rows()
    finally:
        opened.close()


def execute(path: Path, statement: str, *values: object) -> None:
    """Change the file behind the store's back."""
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()


# --- there and back ---


def test_rows_come_back_as_they_were_put(store: ShareStore, path: Path, lane: Lane) -> None:
    rows = [a_row(1), a_row(2, state="committed", certificate=b"c" * 900), a_row(3, name="a/b:c@d", sealed=b"")]
    for row in rows:
        assert store.put(row) == row
        assert store.get(row.key_id) == row
    assert sorted(store.rows(), key=lambda row: row.key_id) == rows
    assert store.get(bytes(16)) is None
    assert store.get(rows[0].key_id, epoch=2) is None
    store.close()
    assert sorted(reopened(path, lane), key=lambda row: row.key_id) == rows


def test_a_life_from_prepared_to_destroyed(store: ShareStore) -> None:
    row = store.put(a_row())
    committed = store.commit(row, b"certificate", 7)
    assert committed == replace(row, state="committed", certificate=b"certificate", changed_ms=7)
    gone = store.destroy(committed, b"order", 8)
    assert gone == replace(committed, state="destroyed", sealed=b"", document=b"order", changed_ms=8)
    assert store.rows() == [gone]


def test_a_prepared_row_is_deleted(store: ShareStore) -> None:
    kept, row = store.put(a_row(1)), store.put(a_row(2))
    store.delete(row)
    assert store.rows() == [kept]


def test_epochs_are_rows_of_their_own(store: ShareStore) -> None:
    first, second = store.put(a_row(epoch=1)), store.put(a_row(epoch=2))
    store.delete(first)
    assert store.get(second.key_id, epoch=2) == second
    assert store.get(first.key_id) is None


def test_the_file_is_private_and_written_through(store: ShareStore, path: Path) -> None:
    store.put(a_row())
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA secure_delete").fetchone() == (1,)


def test_a_failed_transaction_leaves_nothing(store: ShareStore, monkeypatch: pytest.MonkeyPatch) -> None:
    row = store.put(a_row())

    def fail(self: ShareStore, row: Row) -> bytes:
        raise RuntimeError

    monkeypatch.setattr(ShareStore, "_tag", fail)
    with pytest.raises(RuntimeError):
        store.put(a_row(2))
    monkeypatch.undo()
    assert store.rows() == [row]
    assert store.put(a_row(3)) in store.rows()


# --- what was changed is refused ---


def changes(value: object) -> list[object]:
    """Each class of damage to a value: one bit at either end or in the middle; cut, longer, empty, of another type."""
    if isinstance(value, int):
        return [value ^ 1, value ^ (1 << 40), -value, str(value) + "x", value + 0.5]
    data = value.encode() if isinstance(value, str) else bytes(value)  # type: ignore[call-overload]
    found: list[bytes] = [data + b"\0", data[:-1], b""]
    for position in {0, len(data) // 2, len(data) - 1} if data else ():
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            found.append(bytes(changed))
    return [each for each in found if each != data]


@pytest.mark.parametrize("column", [*COLUMNS, "tag"])
def test_every_class_of_damage_to_a_column_is_refused(path: Path, lane: Lane, tmp_path: Path, column: str) -> None:
    opened = ShareStore(path, NODE, lane)
    row = opened.put(a_row(certificate=b"certificate", document=b"document"))
    tag = opened._tag(row)
    opened.close()
    value = tag if column == "tag" else getattr(row, column)
    tried = changes(value)
    assert len(tried) >= 5
    for number, wrong in enumerate(tried):
        copy = tmp_path / f"{number}.db"
        shutil.copy(path, copy)
        if isinstance(value, str) and isinstance(wrong, bytes):
            execute(copy, f"UPDATE keys SET {column} = CAST(? AS TEXT)", wrong)  # noqa: S608 # a column's name
        else:
            execute(copy, f"UPDATE keys SET {column} = ?", wrong)  # noqa: S608 # a column's name
        opened = ShareStore(copy, NODE, lane)
        with pytest.raises(StoreCorrupt, match="not authentic"):
            opened.rows()
        if column not in ("key_id", "version", "epoch"):
            with pytest.raises(StoreCorrupt, match="not authentic"):
                opened.get(row.key_id)
        opened.close()


def test_values_that_move_between_columns_are_refused(path: Path, lane: Lane) -> None:
    opened = ShareStore(path, NODE, lane)
    opened.put(a_row(certificate=b"one", document=b"two"))
    opened.close()
    execute(path, "UPDATE keys SET certificate = document, document = certificate")
    with pytest.raises(StoreCorrupt):
        reopened(path, lane)


@pytest.mark.parametrize("column", ["sealed", "manifest", "certificate", "state", "tag", "manifest_hash"])
def test_a_value_taken_from_another_row_is_refused(path: Path, lane: Lane, column: str) -> None:
    opened = ShareStore(path, NODE, lane)
    opened.put(a_row(1, certificate=b"x"))
    opened.put(a_row(2, state="committed"))
    opened.close()
    first, second = (number.to_bytes(16, "big") for number in (1, 2))
    execute(
        path,
        f"UPDATE keys SET {column} = (SELECT {column} FROM keys WHERE key_id = ?) WHERE key_id = ?",  # noqa: S608
        second,
        first,
    )
    with pytest.raises(StoreCorrupt):
        reopened(path, lane)


def test_a_row_of_another_store_of_the_same_token_is_refused(tmp_path: Path, lane: Lane) -> None:
    for name in ("one.db", "two.db"):
        opened = ShareStore(tmp_path / name, NODE, lane)
        opened.put(a_row(1 if name == "one.db" else 2))
        opened.close()
    db = sqlite3.connect(tmp_path / "one.db")
    db.execute("ATTACH ? AS other", (str(tmp_path / "two.db"),))
    with db:
        db.execute("INSERT INTO keys SELECT * FROM other.keys")
    db.close()
    with pytest.raises(StoreCorrupt):
        reopened(tmp_path / "one.db", lane)


@pytest.mark.parametrize("value", [b"", b"\0" * 60, None, 7, "text", b"\xff" * 500])
def test_a_changed_row_key_is_refused(path: Path, lane: Lane, value: object) -> None:
    ShareStore(path, NODE, lane).close()
    if value is None:
        execute(path, "UPDATE meta SET value = substr(value, 1, 40) WHERE name = 'sealed/row'")
    else:
        execute(path, "UPDATE meta SET value = ? WHERE name = 'sealed/row'", value)
    with pytest.raises(StoreCorrupt, match="does not belong to the token"):
        ShareStore(path, NODE, lane)


def test_rows_do_not_outlive_their_row_key(path: Path, lane: Lane) -> None:
    opened = ShareStore(path, NODE, lane)
    opened.put(a_row())
    opened.close()
    execute(path, "DELETE FROM meta WHERE name = 'sealed/row'")
    with pytest.raises(StoreCorrupt):
        reopened(path, lane)


def test_the_store_of_another_node_is_refused(path: Path, lane: Lane) -> None:
    ShareStore(path, "node2", lane).close()
    with pytest.raises(StoreCorrupt, match="does not belong to the token of 'node1'"):
        ShareStore(path, NODE, lane)


FOREIGN = """
import sys
from pathlib import Path
from nodes.config import PinSource, TokenConfig
from nodes.store import Row, ShareStore
from nodes.token import Token, initialize_token
module, folder, store = map(Path, sys.argv[1:])
config = TokenConfig(module, "foreign", PinSource("file", str(folder / "pin")))
initialize_token(config, folder / "data")
lane = Token(config, folder / "data").lane()
opened = ShareStore(store, "node1", lane)
opened.put(Row(bytes(16), 1, 1, 1, "k", "prepared", bytes(32), b"m", b"", b"", b"s", 1))
opened.close()
"""


def test_the_store_of_another_tokens_kek_is_refused(
    path: Path, lane: Lane, tmp_path: Path, token_config: Any, run_python: Callable[..., Any]
) -> None:
    made = run_python(FOREIGN, token_config.module, tmp_path, path)
    assert made.returncode == 0, made.stderr
    with pytest.raises(StoreCorrupt, match="does not belong to the token of 'node1'"):
        ShareStore(path, NODE, lane)


def test_a_file_that_is_no_database_is_refused(path: Path, lane: Lane) -> None:
    path.write_bytes(os.urandom(8192))
    with pytest.raises(StoreCorrupt, match="not a database"):
        ShareStore(path, NODE, lane)


def test_flips_anywhere_in_the_file_never_change_a_row_silently(path: Path, lane: Lane, tmp_path: Path) -> None:
    opened = ShareStore(path, NODE, lane)
    rows = [opened.put(a_row(number, certificate=b"c" * 300)) for number in range(1, 9)]
    opened.close()
    content = path.read_bytes()
    refused = 0
    for step in range(0, len(content) * 8, 997):
        flipped = bytearray(content)
        flipped[step // 8] ^= 1 << step % 8
        copy = tmp_path / "flipped.db"
        for stale in tmp_path.glob("flipped.db*"):
            stale.unlink()
        copy.write_bytes(flipped)
        try:
            found = reopened(copy, lane)
        except StoreCorrupt:
            refused += 1
            continue
        # A flip may hit free space, or lose whole rows; what is given is what was written.
        assert all(row in rows for row in found), step
    assert refused > 20


# --- sealed shares ---


def test_a_sealed_share_opens_under_its_own_context_alone(world: Any, lane: Lane) -> None:
    dealt, other = world.deal("one"), world.deal("two")
    offer = dealt.offers["node1"]
    share = Share(offer.x, offer.y)
    contexts = [
        seal_context(dealt.manifest, offer.x, "node1", dealt.record.digest),
        seal_context(dealt.manifest, offer.x, "node2", dealt.record.digest),
        seal_context(dealt.manifest, offer.x + 1, "node1", dealt.record.digest),
        seal_context(dealt.manifest, offer.x, "node1", bytes(32)),
        seal_context(other.manifest, offer.x, "node1", dealt.record.digest),
        seal_context(world.deal("one", threshold=3).manifest, offer.x, "node1", dealt.record.digest),
    ]
    assert len(set(contexts)) == len(contexts)
    sealed = seal_share(lane, share, offer.salt, contexts[0])
    assert unseal_share(lane, sealed, offer.x, contexts[0]) == (share, offer.salt)
    for context in contexts[1:]:
        with pytest.raises(InvalidTag):
            unseal_share(lane, sealed, offer.x, context)


def test_a_sealed_share_without_a_value_is_refused(lane: Lane) -> None:
    for plain in (b"", bytes(31), bytes(32)):
        with pytest.raises(InvalidTag, match="too short"):
            unseal_share(lane, lane.seal(plain, b"c"), 1, b"c")


def test_share_and_salt_are_in_no_file_of_the_store(store: ShareStore, path: Path, lane: Lane) -> None:
    share, salt = Share(1, os.urandom(64)), os.urandom(32)
    sealed = seal_share(lane, share, salt, b"context")
    row = store.put(a_row(sealed=sealed))
    everything = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert sealed in everything  # the control: the scan would find it
    for secret in (share.y, salt, share.y[:16], share.y[-16:], salt[:16], store._key):
        assert secret not in everything
    assert row.sealed == sealed


# --- erasing ---


def everywhere(path: Path) -> bytes:
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))


@pytest.mark.parametrize("size", [125, 9000])
@pytest.mark.parametrize("how", ["destroy", "delete"])
def test_an_erased_blob_is_in_neither_database_nor_log(store: ShareStore, path: Path, how: str, size: int) -> None:
    others = [store.put(a_row(number)) for number in range(2, 12)]
    sealed = os.urandom(size)
    row = store.put(a_row(1, sealed=sealed))
    if how == "destroy":
        row = store.commit(row, b"c" * 400, 1)
    assert sealed[:100] in everywhere(path)
    if how == "destroy":
        store.destroy(row, b"order", 2)
    else:
        store.delete(row)
    store.truncate_log()
    left = everywhere(path)
    for start in range(0, size - 16, 8):
        assert sealed[start : start + 16] not in left
    assert all(other.sealed[:100] in left for other in others)


def test_a_log_that_can_not_be_truncated_is_told(store: ShareStore, path: Path) -> None:
    row = store.commit(store.put(a_row()), b"c", 1)
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM keys").fetchone()
    store._db.execute("PRAGMA busy_timeout = 50")
    store.destroy(row, b"order", 2)
    with pytest.raises(TokenError, match="may still be in the log"):
        store.truncate_log()
    assert row.sealed in everywhere(path)
    reader.execute("COMMIT")
    reader.close()
    store.truncate_log()
    assert row.sealed not in everywhere(path)


# --- versions ---


def test_a_newer_schema_is_refused(path: Path, lane: Lane) -> None:
    opened = ShareStore(path, NODE, lane)
    opened.put(a_row())
    opened.close()
    execute(path, "UPDATE meta SET value = ? WHERE name = 'schema'", SCHEMA_VERSION + 1)
    before = path.read_bytes()
    with pytest.raises(
        StoreCorrupt, match=f"the store has schema {SCHEMA_VERSION + 1}; this software knows up to {SCHEMA_VERSION}"
    ):
        ShareStore(path, NODE, lane)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", ["one", b"\xff", -1, 0, 1.5])
def test_a_damaged_schema_number_is_refused(path: Path, lane: Lane, value: object) -> None:
    ShareStore(path, NODE, lane).close()
    execute(path, "UPDATE meta SET value = ? WHERE name = 'schema'", value)
    with pytest.raises(StoreCorrupt):
        ShareStore(path, NODE, lane)


def test_an_older_schema_is_migrated_and_keeps_its_rows(
    path: Path, lane: Lane, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = ShareStore(path, NODE, lane)
    row = opened.put(a_row())
    opened.close()
    new = SCHEMA_VERSION + 2
    monkeypatch.setattr(store_module, "SCHEMA_VERSION", new)
    tables = "CREATE TABLE extra (a INTEGER); CREATE INDEX extra_a ON extra (a);"
    later = {new - 1: tables, new: "ALTER TABLE extra ADD b TEXT"}
    monkeypatch.setattr(store_module, "MIGRATIONS", {**MIGRATIONS, **later})
    for _ in range(2):
        opened = ShareStore(path, NODE, lane)
        assert opened.rows() == [row]
        assert opened._db.execute("SELECT a, b FROM extra").fetchall() == []
        assert opened._db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone() == (new,)
        opened.close()


def test_a_store_of_an_earlier_release_is_taken_over_whole(path: Path, lane: Lane) -> None:
    """Its tables are those of schema 5, written by the software of then; only the row key is sealed by this token."""
    key = bytes(range(32))
    db = sqlite3.connect(path)
    db.executescript((Path(__file__).parent / "data" / "store_schema_5.sql").read_text(encoding="utf-8"))
    assert db.execute("SELECT name, value FROM meta ORDER BY name").fetchall() == [("schema", 5), ("sealed/row", key)]
    sealed = lane.seal(key, secret_context(NODE, "row"))
    with db:
        db.execute("UPDATE meta SET value = ? WHERE name = 'sealed/row'", (sealed,))
    db.close()
    opened = ShareStore(path, NODE, lane)
    rows = sorted(opened.rows(), key=lambda row: row.key_id)
    assert [(row.name, row.state) for row in rows] == [
        ("orders-1", "prepared"),
        ("orders-2", "committed"),
        ("orders-3", "committed"),
        ("orders-4", "destroyed"),
    ]
    assert [len(row.sealed) for row in rows] == [40, 40, 40, 0]
    (used,) = opened.used_grants()
    assert (used.issuer, used.expires_ms, opened.clock_mark().mark_ms) == ("app", 1_900_000_000_000, 1_800_000_000_300)
    assert (opened.pledged(rows[1].key_id), opened.fencings()) == (4, {"balancer": 9})
    assert len(opened.settings()) == 1
    opened.note_quota(rows[1].key_id, 100, 10)  # in the table that schema 6 brought
    assert opened.quota(rows[1].key_id) == (100, 10)
    opened.close()
    assert sorted(reopened(path, lane), key=lambda row: row.key_id) == rows
    with sqlite3.connect(path) as db:
        assert db.execute("SELECT value FROM meta WHERE name = 'schema'").fetchone() == (SCHEMA_VERSION,)
    db.close()


def test_a_migration_that_fails_changes_nothing(path: Path, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = ShareStore(path, NODE, lane)
    row = opened.put(a_row())
    opened.close()
    with monkeypatch.context() as patched:
        new = SCHEMA_VERSION + 1
        patched.setattr(store_module, "SCHEMA_VERSION", new)
        patched.setattr(store_module, "MIGRATIONS", {**MIGRATIONS, new: "CREATE TABLE extra (a); DROP TABLE nothing"})
        with pytest.raises(StoreCorrupt):
            ShareStore(path, NODE, lane)
    assert reopened(path, lane) == [row]


# --- kill -9 ---

WRITER = """
import sys
from pathlib import Path
from nodes.store import Row, ShareStore

class Plain:
    def seal(self, plain, context):
        return plain
    def unseal(self, sealed, context):
        return sealed

store = ShareStore(Path(sys.argv[1]), "node1", Plain())
for number in range(100_000):
    key_id, manifest = number.to_bytes(16, "big"), b"m" * 700
    row = Row(key_id, 1, 1, 1, f"k{number}", "prepared", bytes(32), manifest, b"", b"", b"s" * 99, 1)
    store.put(row)
    if number % 3 == 0:
        store.commit(row, b"certificate", 2)
    print(number, flush=True)
"""


class Plain:
    """Stands in for a lane: the token is not what this test is about."""

    def seal(self, plain: bytes, context: bytes) -> bytes:
        return plain

    def unseal(self, sealed: bytes, context: bytes) -> bytes:
        return sealed


@pytest.mark.parametrize("after", [1, 40, 200])
def test_a_killed_writer_loses_no_acknowledged_row(path: Path, after: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().splitlines() if line.isdigit()]
    process.stdout.close()
    assert process.wait(20) == -signal.SIGKILL
    opened = ShareStore(path, NODE, Plain())  # type: ignore[arg-type]
    rows = {int.from_bytes(row.key_id, "big"): row for row in opened.rows()}
    opened.close()
    assert set(acknowledged) <= set(rows)
    assert len(rows) <= len(acknowledged) + 1
    for number in acknowledged:
        assert rows[number].state == ("committed" if number % 3 == 0 else "prepared")
