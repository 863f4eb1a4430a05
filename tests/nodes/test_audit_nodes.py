"""Audit logs of real nodes: whatever is done to one is found, a full disk stops service and ends no node."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from engine.cli.main import run
from engine.client.transport import ask
from engine.errors import AuditUnavailable, StoreUnavailable
from engine.protocol.audit import chained_line, line_hash, read_record
from engine.protocol.requests import Empty

ALICE = "alice"
LOG = "audit-000001.jsonl"


def configure(folder: Any, name: str, text: str) -> None:
    config = folder.config(name)
    config.write_text(f"{config.read_text(encoding='utf-8')}\n[audit]\n{text}\n", encoding="utf-8")


def log_of(root: Path, name: str) -> Path:
    return root / name / "data" / "audit" / LOG


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def status(folder: Any, name: str) -> Any:
    with folder.channel(ALICE) as channel:
        return ask(channel, name, "status", Empty(), 5)


def verify(folder: Any, root: Path, capsys: Any, *names: str) -> tuple[int, list[tuple[str, str]], list[str]]:
    """The exit code, (kind, whose log) of each finding, and the notes of `keyquorum audit verify`."""
    logs = [str(log_of(root, name).parent) for name in names or ("node1", "node2")]
    manifest = str(folder.root / "cluster.manifest")
    capsys.readouterr()
    code = run(["audit", "verify", *logs, "--manifest", manifest, "--pin", folder.pin, "-o", "json"])
    told = json.loads(capsys.readouterr().out)
    assert code == (1 if told["findings"] else 0)
    found = [(each["kind"], Path(each["file"]).parents[2].name) for each in told["findings"]]
    return code, found, [note["text"] for log in told["logs"] for note in log["notes"]]


def head_seq(folder: Any, witness: str, of: str) -> int:
    """The number of peer-heads of one node in another's log."""
    wanted = f'"event":"peer-head","member":"{of}"'.encode()
    return sum(wanted in line for line in lines_of(log_of(folder.root, witness)))


Change = Callable[[list[bytes]], Sequence[bytes]]
CHANGES: dict[str, tuple[str, Change]] = {
    "edit": ("edit", lambda lines: [*lines[:5], lines[5].replace(b"time_ms", b"time_mx", 1), *lines[6:]]),
    "byte": ("edit", lambda lines: [*lines[:5], lines[5].replace(b'"node":"', b'"node":"x'), *lines[6:]]),
    "unreadable": ("edit", lambda lines: [*lines[:5], b"\x00\xff\n", *lines[6:]]),
    "deletion": ("deletion", lambda lines: [*lines[:5], *lines[6:]]),
    "beginning": ("deletion", lambda lines: lines[3:]),
    "reorder": ("reorder", lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]]),
    "insertion": ("insertion", lambda lines: [*lines[:6], lines[5], *lines[6:]]),
    "truncation": ("truncation", lambda lines: lines[:-8]),
}


def tampered(folder: Any, root: Path, change: Change) -> None:
    for name in ("node1", "node2"):
        log_of(root, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(log_of(folder.root, name), log_of(root, name))
    path = log_of(root, "node1")
    path.write_bytes(b"".join(change(lines_of(path))))


def rechained(lines: list[bytes]) -> list[bytes]:
    """One line is taken out and all after it are chained anew, as who has the node would do to hide it."""
    made = [line.rstrip(b"\n") for line in lines[:5]]
    for line in lines[6:]:
        record = read_record(line.rstrip(b"\n"))
        assert record is not None
        made.append(chained_line(len(made) + 1, line_hash(made[-1]), record))
    return [line + b"\n" for line in made]


def test_whatever_is_done_to_a_log_is_found(cluster_folder: Any, until: Any, capsys: Any, tmp_path: Path) -> None:
    folder = cluster_folder
    configure(folder, "node1", 'mode = "strict"\nkey_names = "hmac"\nhead_every_s = 0.2')
    configure(folder, "node2", "head_every_s = 0.2")
    for name in ("node1", "node2"):
        made = folder.init(name)
        assert made.returncode == 0, made.stderr
    one, two = folder.start("node1"), folder.start("node2")
    dealt = folder.make_key("node1", name="payroll-2026")
    old = tmp_path / "old.jsonl"
    shutil.copy(log_of(folder.root, "node1"), old)
    for number in range(10):
        folder.operate("node1", dealt, "encrypt", b"x", grant=not number)
    with pytest.raises(ValueError, match="is no operation of"):
        folder.operate("node1", dealt, "sign", b"x")
    heard = head_seq(folder, "node2", "node1")
    folder.operate("node1", dealt, "encrypt", b"x")
    until(lambda: head_seq(folder, "node2", "node1") > heard, "node2 hears of node1")
    assert one.end() == 0  # its last head goes to node2
    assert head_seq(folder, "node2", "node1") > heard + 1
    assert two.end() == 0
    assert verify(folder, folder.root, capsys) == (0, [], [])

    # no name of a key in the log, and the operator's command gives what stands for it
    plain, log = b"payroll-2026", log_of(folder.root, "node1").read_bytes()
    assert plain not in log
    assert plain in b"".join(path.read_bytes() for path in (folder.root / "node1" / "data").glob("shares.db*"))
    named = folder.command("audit-name", "--config", str(folder.config("node1")), "payroll-2026")
    assert named.returncode == 0, named.stderr
    assert f'"key":"{named.stdout.split()[0]}"'.encode() in log

    for label, (kind, change) in {**CHANGES, "rechained": ("fork", rechained)}.items():
        tampered(folder, tmp_path / label, change)
        code, found, _ = verify(folder, tmp_path / label, capsys)
        assert code == 1, label
        assert (kind, "node2" if label == "truncation" else "node1") in found, (label, found)
        alone = verify(folder, tmp_path / label, capsys, "node1")[0]
        assert alone == (0 if label == "truncation" else 1), label  # the end of a log is known by the others alone

    # a torn line after kill -9 is no edit
    two = folder.start("node2")
    two.end(9)
    with log_of(folder.root, "node2").open("ab") as stream:
        stream.write(b'{"seq":')
    code, _, notes = verify(folder, folder.root, capsys)
    assert (code, notes) == (0, ["the end is torn: 7 bytes of a line that was not finished"])
    two = folder.start("node2")

    # an older copy of the log is put back: the other node sees it at once, and the check for ever
    shutil.copy(old, log_of(folder.root, "node1"))
    one = folder.start("node1")
    alarms = until(lambda: status(folder, "node2").alarms, "node2 sees that node1's log fell back")
    assert "the audit log of 'node1' fell back from record" in alarms[0]
    for number in range(20):
        folder.operate("node1", dealt, "encrypt", b"x", grant=not number)
    assert (one.end(), two.end()) == (0, 0)
    code, found, notes = verify(folder, folder.root, capsys)
    assert code == 1
    assert {("fork", "node1"), ("alarm", "node2")} <= set(found)
    assert [note.split()[:4] for note in notes] == [["torn:", "cut", "7", "bytes"]]

    # a log that is not given, whole, is no finding, yet told
    other, manifest = str(log_of(tmp_path / "edit", "node2")), str(folder.root / "cluster.manifest")
    assert run(["audit", "verify", other, "--manifest", manifest, "--pin", folder.pin]) == 0
    assert "note: no log of 'node1' is given, though it had signed record" in capsys.readouterr().out


# --- a full disk ---


@pytest.fixture
def small_disks(cluster_folder: Any) -> Iterator[Any]:
    """node1's data on a file system of 3 MiB, its audit log on another one."""
    data = cluster_folder.root / "node1" / "data"
    mounted: list[Path] = []
    try:
        for folder in (data, data / "audit"):
            folder.mkdir()
            command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
            made = subprocess.run(command, capture_output=True, check=False)
            if made.returncode != 0:
                pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
            mounted.append(folder)
        yield cluster_folder
    finally:
        for node in cluster_folder.running:
            if node.process.poll() is None:
                node.end(9)
        for folder in reversed(mounted):
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        for _ in range(10_000):
            stream.write(bytes(4096))


def test_a_full_disk_ends_no_node_and_service_resumes(small_disks: Any, until: Any) -> None:
    folder = small_disks
    data = folder.root / "node1" / "data"
    made = folder.init("node1")
    assert made.returncode == 0, made.stderr
    node = folder.start("node1")
    dealt = folder.make_key("node1")
    folder.operate("node1", dealt, "encrypt", b"x")

    def make_many() -> None:
        for _ in range(300):
            folder.make_key("node1")

    def use_many() -> None:
        for _ in range(100):
            folder.operate("node1", dealt, "encrypt", b"x", grant=False)

    # the store's disk
    with pytest.raises(OSError, match="No space"):
        fill(data / "filler")
    with pytest.raises(StoreUnavailable, match="disk is full"):
        make_many()
    folder.operate("node1", dealt, "encrypt", b"x", grant=False)
    assert status(folder, "node1").audit == ""
    until(lambda: "disk is full" in status(folder, "node1").store, "the status tells of the store's disk")
    (data / "filler").unlink()
    folder.make_key("node1")
    until(lambda: not status(folder, "node1").store, "the status tells that the store is written again")

    # the audit log's disk
    with pytest.raises(OSError, match="No space"):
        fill(data / "audit" / "filler")
    with pytest.raises(AuditUnavailable, match="can't be written"):
        use_many()
    with pytest.raises(AuditUnavailable):
        folder.make_key("node1")
    told = status(folder, "node1").audit
    assert "No space left" in told or "the disk took" in told
    written = log_of(folder.root, "node1").read_bytes()
    assert written.endswith(b"}\n")
    (data / "audit" / "filler").unlink()
    until(lambda: not status(folder, "node1").audit, "the log is written again")
    folder.operate("node1", dealt, "encrypt", b"x", grant=False)
    folder.make_key("node1")
    assert log_of(folder.root, "node1").read_bytes().startswith(written)
    assert node.process.poll() is None
    assert node.end() == 0
