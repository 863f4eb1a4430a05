"""The audit log: whole lines from many threads, appended to what was there, and no room for key bytes."""

from __future__ import annotations

import json
import os
import stat
import threading
from pathlib import Path

import pytest

from nodes.audit import AuditLog, Record


def a_record(number: int, **changes: str) -> Record:
    return Record(1, "node1", "boot", number, "request", "alice", "sign", **changes)


def test_a_record_is_one_line_of_json_without_empty_fields(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.write(a_record(1, key="orders"), durable=True)
    log.write(a_record(2, detail='a\nline "quoted" \u2028 and \x00'))
    log.close()
    first, second = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    assert json.loads(first) == {
        "time_ms": 1, "node": "node1", "boot": "boot", "request": 1, "event": "request", "member": "alice",
        "verb": "sign", "key": "orders",
    }  # fmt: skip
    assert json.loads(second)["detail"] == 'a\nline "quoted" \u2028 and \x00'


def test_a_later_start_appends(tmp_path: Path) -> None:
    for number in range(3):
        log = AuditLog(tmp_path / "audit.jsonl")
        log.write(a_record(number))
        log.close()
        log.close()
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["request"] for line in lines] == [0, 1, 2]
    assert stat.S_IMODE((tmp_path / "audit.jsonl").stat().st_mode) == 0o600


def test_lines_of_many_threads_never_mix(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")

    def write(thread: int) -> None:
        for number in range(200):
            log.write(a_record(thread * 1000 + number, detail="x" * (number % 150)))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    log.close()
    found = [json.loads(line)["request"] for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert sorted(found) == sorted(thread * 1000 + number for thread in range(4) for number in range(200))


def test_a_record_that_does_not_fit_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that can't audit must not go on as if it had."""
    log = AuditLog(tmp_path / "audit.jsonl")
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.raises(OSError, match="the audit log took 5 of"):
        log.write(a_record(1))
    monkeypatch.undo()
    log.close()


def test_a_record_has_no_field_for_bytes() -> None:
    assert all(kind in ("int", "str") for kind in Record.__annotations__.values())
