"""The audit log on a real disk: the chain, its heads, who waits for the sync, a crash, a full disk, segments."""

from __future__ import annotations

import base64
import itertools
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import AuditUnavailable, ConfigError
from engine.protocol.audit import (
    AuditHead,
    ChainCheck,
    Claim,
    Finding,
    Record,
    chained_line,
    line_hash,
    open_head,
    use_lines,
)
from nodes._usebuffer import UseBuffer
from nodes.audit import AuditLog, segment_paths

Post = Callable[[], None]


def a_record(number: int, **changes: Any) -> Record:
    fields: dict[str, Any] = {"time_ms": 1, "node": "node1", "boot": "boot", "request": number, "event": "request"}
    return Record(**(fields | {"member": "alice", "verb": "sign"} | changes))


def a_buffer(folder: Path, now_ms: Callable[[], int] = lambda: 1) -> UseBuffer:
    return UseBuffer(str(folder / "uses"), now_ms, lambda: None, lambda: None)


class Open:
    """Opens logs of node1 in one folder, and closes what a test left open."""

    def __init__(self, folder: Path, world: Any) -> None:
        self.folder, self.world = folder, world
        self.posted: list[Post] = []
        self.opened: list[AuditLog] = []

    def __call__(self, **options: Any) -> AuditLog:
        settings: dict[str, Any] = {"boot": "boot", "post": self.posted.append, "now_ms": self.world.clock}
        log = AuditLog(self.folder, self.world.keys["node1"], **(settings | options))
        self.opened.append(log)
        return log

    def lines(self) -> list[bytes]:
        return [line for path in segment_paths(self.folder) for line in path.read_bytes().splitlines()]

    def events(self) -> list[str]:
        return [json.loads(line)["event"] for line in self.lines()]

    def check(self) -> tuple[list[Finding], list[Claim], ChainCheck]:
        claims: list[Claim] = []
        check = ChainCheck(self.world.cluster.sign_key_ever("node"), claims.append)
        found = [each for number, line in enumerate(self.lines(), 1) for each in check.feed("f", number, line)]
        return found, claims, check


def in_four_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


@pytest.fixture
def opens(tmp_path: Path, world: Any) -> Iterator[Open]:
    made = Open(tmp_path / "audit", world)
    yield made
    for log in made.opened:
        log.close()


def test_a_record_is_one_chained_line_without_empty_fields(opens: Open) -> None:
    log = opens()
    log.write(a_record(1, key="orders"), durable=True)
    log.write(a_record(2, detail='a\nline "quoted" \u2028 and \x00'))
    log.close()
    lines = opens.lines()
    first, log_id = json.loads(lines[0]), log.log_id.hex()
    assert (first["seq"], first["prev"], first["event"], first["log"]) == (1, log_id, "segment", log_id)
    for number, (line, after) in enumerate(itertools.pairwise(lines), 1):
        assert json.loads(line)["seq"] == number
        assert json.loads(after)["prev"] == line_hash(line).hex()
    (mine,) = [each for each in map(json.loads, lines) if each.get("key") == "orders"]
    assert mine == {
        "seq": mine["seq"], "prev": mine["prev"], "time_ms": 1, "node": "node1", "boot": "boot", "request": 1,
        "event": "request", "member": "alice", "verb": "sign", "key": "orders",
    }  # fmt: skip
    assert any(each.get("detail") == 'a\nline "quoted" \u2028 and \x00' for each in map(json.loads, lines))
    assert stat.S_IMODE(segment_paths(opens.folder)[0].stat().st_mode) == 0o600


def test_the_chain_goes_on_over_starts_and_the_stop_has_a_head(opens: Open) -> None:
    for number in range(3):
        log = opens()
        log.write(a_record(number))
        head = log.stop(10)
        assert head is not None
        log.close()
        log.close()
    found, claims, check = opens.check()
    assert not found
    assert check.seq == len(opens.lines())
    assert [json.loads(line)["request"] for line in opens.lines() if b'"request","member' in line] == [0, 1, 2]
    stop = opens.events().index("stop", len(opens.events()) - 3)
    assert set(opens.events()[stop + 1 :]) == {"head"}
    last = open_head(head.raw, opens.world.cluster.sign_key("node"))
    assert (last.seq, last.hash) == (check.seq - 1, line_hash(opens.lines()[-2]))
    assert len(claims) >= 3


def test_lines_of_many_threads_never_mix(opens: Open) -> None:
    log = opens()

    def write(thread: int) -> None:
        for number in range(200):
            log.write(a_record(thread * 1000 + number, detail="x" * (number % 150)))

    in_four_threads(write)
    log.close()
    found, _, _ = opens.check()
    assert not found
    seen = [json.loads(line)["request"] for line in opens.lines() if b'"sign"' in line]
    assert sorted(seen) == sorted(thread * 1000 + number for thread in range(4) for number in range(200))


@pytest.mark.parametrize("elapsed_us", [0, 1, 123_456])
@pytest.mark.parametrize("key", ["orders", 'a"b\\c', "schl\u00fcssel \u20ac"])
def test_the_lines_of_a_use_are_those_of_its_two_records(tmp_path: Path, key: str, elapsed_us: int) -> None:
    """``use_lines`` have to write byte by byte what the records would be, for the next chain check and every reader."""
    lines = use_lines(node="n1", boot="00ff", member="alice", verb="sign", key=key)
    bodies = lines.written(1_700_000_000_000, 7, elapsed_us)
    uses = a_buffer(tmp_path, now_ms=lambda: 1_700_000_000_000)
    uses.record(lines, 7, elapsed_us)
    assert uses.waiting() == list(bodies)
    both, last, count, _ = uses.chained(41, bytes(range(32)))
    first, second, rest = both.split(b"\n")
    assert (rest, count) == (b"", 1)
    told = {"time_ms": 1_700_000_000_000, "node": "n1", "boot": "00ff", "request": 7}
    of = {"member": "alice", "verb": "sign", "key": key}
    assert first == chained_line(41, bytes(range(32)), Record(event="request", **told, **of))  # type: ignore[arg-type]
    reply = Record(event="reply", outcome="ok", elapsed_us=elapsed_us, **told, **of)  # type: ignore[arg-type]
    assert second == chained_line(42, line_hash(first), reply)
    assert last == line_hash(second)


def test_the_uses_of_many_threads_are_two_lines_each_in_one_chain(opens: Open) -> None:
    log = opens()
    lines = use_lines(node="node1", boot="boot", member="alice", verb="sign", key="orders")

    def write(thread: int) -> None:
        for number in range(100):
            log.uses.record(lines, thread * 1000 + number, number)
            if number % 7 == 0:
                log.drain()
            log.write(a_record(thread * 1000 + 500 + number, verb="mac"))

    in_four_threads(write)
    log.close()
    found, _, _ = opens.check()
    assert not found
    uses = [each for line in opens.lines() if (each := json.loads(line)).get("verb") == "sign"]
    assert [each["event"] for each in uses] == ["request", "reply"] * 400
    assert [each["request"] for each in uses[::2]] == [each["request"] for each in uses[1::2]]
    assert sorted(each["request"] for each in uses[::2]) == sorted(t * 1000 + n for t in range(4) for n in range(100))


def uses_of(opens: Open) -> list[tuple[str, int]]:
    told = [json.loads(line) for line in opens.lines()]
    return [(each["event"], each["request"]) for each in told if each.get("verb") == "sign"]


def test_uses_that_a_killed_process_recorded_are_chained_by_the_next_start(opens: Open) -> None:
    root = str(Path(__file__).parents[2])
    script = CRASH[: CRASH.index("log = ")] + USES
    process = subprocess.run(
        [sys.executable, "-c", script, str(opens.folder), root],
        stdout=subprocess.PIPE,
        cwd=root,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL
    assert process.stdout.split() == ["5"], "some were chained before the kill"
    assert not uses_of(opens)
    opens().close()
    expected = [(event, number) for number in range(5) for event in ("request", "reply")]
    assert uses_of(opens) == expected
    opens().close()
    assert uses_of(opens) == expected
    assert {each.kind for each in opens.check()[0]} <= {"forgery"}


@pytest.mark.parametrize(("written", "taken"), [*((lines, False) for lines in range(5)), (4, True)])
def test_uses_are_chained_once_wherever_a_crash_cut_their_writing(opens: Open, written: int, *, taken: bool) -> None:
    """Lines get into the log first, then leave the buffer; a crash in between, or within, doubles and loses none."""
    log = opens()
    log.close()
    lines = use_lines(node="node1", boot="b", member="alice", verb="sign", key="orders")
    buffer = a_buffer(opens.folder)
    buffer.take(0, 0, len(opens.lines()))
    for number in (7, 8):
        buffer.record(lines, number, number)
    seq, previous = len(opens.lines()), line_hash(opens.lines()[-1])
    data, _, count, end = buffer.chained(seq + 1, previous)
    path = segment_paths(opens.folder)[-1]
    with path.open("ab") as stream:
        stream.write(b"".join(data.splitlines(keepends=True)[:written]))
    if taken:
        buffer.take(count, end, seq + 4)
    del buffer
    opens().close()
    assert uses_of(opens) == [("request", 7), ("reply", 7), ("request", 8), ("reply", 8)]
    assert not opens.check()[0]


@pytest.mark.parametrize("damage", ["magic", "length", "body"])
def test_a_damaged_buffer_is_said_and_never_breaks_the_chain(opens: Open, damage: str) -> None:
    opens().close()
    buffer = a_buffer(opens.folder)
    buffer.record(use_lines(node="node1", boot="b", member="alice", verb="sign", key="k"), 1, 1)
    del buffer
    path = opens.folder / "uses"
    raw = bytearray(path.read_bytes())
    at = raw.index(b'"time_ms":')
    where = {"magic": 0, "length": at - 8, "body": at + 3}[damage]
    raw[where] ^= 0xFF
    path.write_bytes(raw)
    log = opens()
    log.close()
    assert log.broken
    assert not uses_of(opens)
    assert [each.kind for each in opens.check()[0]] == ["alarm"]


def test_a_full_buffer_is_chained_at_once(opens: Open) -> None:
    log = opens()
    lines = use_lines(node="node1", boot="b", member="alice", verb="sign", key="k" * 4000)
    for number in range(200):
        log.uses.record(lines, number, 1)
    log.close()
    assert [number for event, number in uses_of(opens) if event == "reply"] == list(range(200))
    assert not opens.check()[0]


# --- who waits for the disk ---


class Disk:
    """A sync that the test lets through, counts, or has fail."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.syncs = 0
        self.error: OSError | None = None

    def __call__(self, descriptor: int) -> None:
        assert self.open.wait(30)
        if self.error is not None:
            raise self.error
        os.fdatasync(descriptor)
        self.syncs += 1


def test_who_waits_is_told_after_the_sync_and_one_sync_serves_many(opens: Open, until: Any) -> None:
    disk = Disk()
    log = opens(sync=disk)
    until(lambda: log.head is not None, "the first head")
    disk.open.clear()
    before = disk.syncs
    told: list[int] = []
    for number in range(200):
        seq = log.write(a_record(number))
        log.when_durable(seq, lambda failure, number=number: told.append(number))  # type: ignore[misc]
    time.sleep(0.1)
    assert not opens.posted
    assert not told
    disk.open.set()
    until(lambda: len(opens.posted) == 200, "all are told")
    assert disk.syncs - before <= 3
    for call in opens.posted:
        call()
    assert told == list(range(200))


def test_nobody_waits_in_group_mode_and_the_sync_comes_by_itself(opens: Open, until: Any) -> None:
    disk = Disk()
    log = opens(sync=disk)
    until(lambda: log.head is not None, "the first head")
    before = disk.syncs
    log.write(a_record(1))
    until(lambda: disk.syncs > before, "a sync that nobody asked for")


def test_a_sync_that_fails_is_told_and_the_record_is_written_again(opens: Open, until: Any) -> None:
    disk = Disk()
    log = opens(sync=disk)
    until(lambda: log.head is not None, "the first head")
    disk.error = OSError(5, "Input/output error")
    with pytest.raises(AuditUnavailable, match="Input/output error"):
        log.write(a_record(1, key="lost?"), durable=True)
    with pytest.raises(AuditUnavailable, match="can't be written"):
        log.write(a_record(2))
    assert log.problem == "Input/output error"
    disk.error = None
    until(lambda: not log.problem, "the log is written again")
    log.write(a_record(3), durable=True)
    log.close()
    assert not opens.check()[0]
    assert "resumed" in opens.events()
    assert any(b'"lost?"' in line for line in opens.lines())


# --- a crash ---

CRASH = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from engine.protocol.audit import Record
from engine.protocol.signed import SigningKey
from nodes.audit import AuditLog
key = SigningKey("node1", Ed25519PrivateKey.generate())
log = AuditLog(Path(sys.argv[1]), key, boot="crash", post=lambda call: None, now_ms=lambda: 1)
number = 0
while True:
    number += 1
    log.write(Record(1, "node1", "crash", number, "request"), durable=True)
    print(number, flush=True)
"""


USES = """
import nodes.audit, signal, time
from engine.protocol.audit import use_lines
log = AuditLog(Path(sys.argv[1]), key, boot="crash", post=lambda call: None, now_ms=lambda: 1)
while log._dirty.is_set():  # its thread has the start to write first
    time.sleep(0.01)
nodes.audit.GROUP_DELAY_S = 3600
time.sleep(0.2)
lines = use_lines(node="node1", boot="crash", member="alice", verb="sign", key="orders")
for number in range(5):
    log.uses.record(lines, number, 1)
print(log.uses.count, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_was_durable_is_there_after_kill_9(opens: Open) -> None:
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", CRASH, str(opens.folder), root], stdout=subprocess.PIPE, cwd=root, text=True
    )
    assert process.stdout is not None
    try:
        for _ in range(100):
            acknowledged = int(process.stdout.readline())
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    process.stdout.close()
    path = segment_paths(opens.folder)[0]
    with path.open("ab") as stream:
        stream.write(b'{"seq":9999,"prev":"00')  # what a crash within a write leaves
    opens().close()
    numbers = {json.loads(line)["request"] for line in opens.lines()}
    assert set(range(1, acknowledged + 1)) <= numbers
    found, _, check = opens.check()
    assert {each.kind for each in found} <= {"forgery"}  # the crashed process signed with a key of its own
    (torn,) = [text for _, _, text in check.notes]
    assert "cut 22 bytes of an unfinished line off audit-000001.jsonl" in torn


def test_a_torn_end_is_cut_off_and_said(opens: Open) -> None:
    log = opens()
    log.write(a_record(1), durable=True)
    log.close()
    whole = segment_paths(opens.folder)[0].read_bytes()
    for torn in (b"{", b"\0" * 5000, b'{"seq":7,"prev":"ab'):
        segment_paths(opens.folder)[0].write_bytes(whole + torn)
        opens().close()
        found, _, check = opens.check()
        assert not found
        assert [text.split()[2] for _, _, text in check.notes] == [str(len(torn))]
        assert segment_paths(opens.folder)[0].read_bytes().startswith(whole)


def test_a_changed_end_is_kept_and_said(opens: Open) -> None:
    log = opens()
    log.write(a_record(1, key="orders"), durable=True)
    log.close()
    path = segment_paths(opens.folder)[0]
    path.write_bytes(path.read_bytes().replace(b"orders", b"borders"))
    log = opens()
    assert "is not chained" in log.broken
    log.close()
    assert {each.kind for each in opens.check()[0]} == {"edit", "alarm"}
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]) + b"no record\n")
    log = opens()
    assert "no record" in log.broken
    log.close()
    assert b"no record\n" in path.read_bytes()


def test_a_file_of_another_kind_is_refused(opens: Open) -> None:
    opens.folder.mkdir()
    (opens.folder / "audit-000001.jsonl").write_text('{"time_ms":1,"node":"node1"}\n')
    with pytest.raises(ConfigError, match="no record of an audit log in it; move it aside"):
        opens()


def test_a_segment_that_was_only_begun_is_gone_on_with(opens: Open) -> None:
    log = opens()
    log.close()
    for torn in (b"", b'{"seq":'):
        last = segment_paths(opens.folder)[-1]
        number = int(last.stem[-6:]) + 1
        (opens.folder / f"audit-{number:06d}.jsonl").write_bytes(torn)
        log = opens()
        log.write(a_record(1), durable=True)
        log.close()
        assert not opens.check()[0]
        assert segment_paths(opens.folder)[-1].stat().st_size > 0


# --- segments ---


def test_the_chain_goes_on_over_segments_with_the_heads_of_others(opens: Open) -> None:
    log = opens(segment_bytes=3000)
    head = base64.b64encode(b"what another node signed").decode()
    log.write(a_record(0, event="peer-head", member="node2", head=head))
    for number in range(60):
        log.write(a_record(number), durable=number % 5 == 0)
    log.close()
    paths = segment_paths(opens.folder)
    assert len(paths) > 3
    for path in paths:
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert lines[0]["event"] == "segment"
        assert any(each["event"] == "peer-head" and each["head"] == head for each in lines)
    assert {each.kind for each in opens.check()[0]} == {"forgery"}  # node2's head is none
    paths[0].unlink()  # moved to an archive by an operator
    log = opens()
    assert [record.head for record in log.kept] == [head]
    log.close()
    assert segment_paths(opens.folder)[-1] == paths[-1]


def test_heads_come_with_time_and_with_records(opens: Open, until: Any) -> None:
    log = opens(head_every_s=0.2, head_every_records=50)
    until(lambda: log.head is not None, "the first head")
    first = log.head
    for number in range(120):
        log.write(a_record(number))
    until(lambda: log.head.seq > first.seq, "a head for many records")  # type: ignore[union-attr]
    late = log.write(a_record(1000))
    until(lambda: log.head.seq >= late, "a head for a late record")  # type: ignore[union-attr]
    seq = log.head.seq  # type: ignore[union-attr]
    time.sleep(0.5)
    assert log.head.seq == seq, "an idle log signed another head"  # type: ignore[union-attr]
    log.close()
    assert not opens.check()[0]


# --- a disk that takes no more ---


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        for _ in range(10_000):
            stream.write(bytes(4096))


def write_many(log: AuditLog) -> None:
    for number in range(100):
        log.write(a_record(number))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; where none can be mounted, that is said, and the test fails."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}; RLIMIT_FSIZE stands in")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_refuses_and_takes_up_again(small_disk: Path, world: Any, until: Any) -> None:
    opens = Open(small_disk / "audit", world)
    log = opens()
    log.write(a_record(1), durable=True)
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        fill(filler)
    with pytest.raises(AuditUnavailable, match=r"can't be written: (No space left|the disk took)"):
        write_many(log)
    assert log.problem
    size = segment_paths(opens.folder)[0].stat().st_size
    assert segment_paths(opens.folder)[0].read_bytes().endswith(b"}\n"), "a part of a line was left"
    with pytest.raises(AuditUnavailable):
        log.write(a_record(100))
    time.sleep(0.7)
    assert log.problem, "a full disk counts as usable"
    assert segment_paths(opens.folder)[0].stat().st_size == size
    filler.unlink()
    until(lambda: not log.problem, "the log is written again")
    log.write(a_record(101), durable=True)
    log.close()
    assert not opens.check()[0]
    assert "resumed" in opens.events()


def test_a_file_that_may_not_grow_refuses_and_takes_up_again(opens: Open, until: Any) -> None:
    """RLIMIT_FSIZE: the kernel takes a part of the line, then refuses."""
    log = opens()
    log.write(a_record(1), durable=True)
    path = segment_paths(opens.folder)[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    try:
        with pytest.raises(AuditUnavailable, match=r"can't be written: (the disk took|File too large)"):
            write_many(log)
        assert path.read_bytes().endswith(b"}\n")
        time.sleep(0.7)
        assert log.problem
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    until(lambda: not log.problem, "the log is written again")
    log.close()
    assert not opens.check()[0]


def test_a_record_has_no_field_for_bytes() -> None:
    assert all(kind in ("int", "str") for kind in Record.__annotations__.values())
    assert AuditHead.__struct_fields__ == ("node", "log_id", "seq", "hash", "time_ms")


@pytest.mark.parametrize("text", ["?", "Q\u202e==", "\u00e9" * 8, "Q" * 9])
def test_a_head_that_is_no_base64_is_a_forgery_and_ends_no_check(text: str) -> None:
    line = chained_line(1, bytes(32), Record(1, "node1", "b", 0, "peer-head", member="node2", head=text))
    assert {each.kind for each in ChainCheck({}).feed("log", 1, line)} == {"forgery"}
