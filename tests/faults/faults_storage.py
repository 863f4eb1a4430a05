"""Faults of disks: full ones, read-only ones, and files that are damaged, swapped or put back while nobody uses them.

A damaged store fails closed for its node: it refuses to start and says why, or gives nothing wrong. The others go on.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from course import NO_BALANCER, NOTHING, ONE_NODE, Fault, Run
from harness import BALANCER, Disk, run
from proxy import flipped

import engine

REFUSALS = ("not authentic", "malformed", "damaged", "corrupt", "not a database", "StoreCorrupt", "disk image", "store")
"""Any of these must be in the last words of a node that does not start."""
FULL_WORDS = ("audit", "store", "disk", "full", "space")


# --- disks that are full or read-only ---


def _on_disk(run_: Run, victim: str, folder: Path, kind: str, size_kib: int) -> Disk:
    """Have a small file system in the place of a folder of a node, which is started again on it."""
    cluster = run_.cluster
    cluster.stop_node(victim)
    disk = Disk(folder, kind, size_kib)

    def undo() -> None:
        if cluster.running()[victim] is not None:
            cluster.stop_node(victim)
        disk.give_back()

    run_.undo.later(undo)
    cluster.start_node(victim)
    return disk


def disk_full(run_: Run) -> None:
    """The whole data folder is full while keys are made and used; then there is room again."""
    victim = run_.node()
    disk = _on_disk(run_, victim, run_.cluster.data_folder(victim), "tmpfs", 16 * 1024)
    left = run_.rng.choice((0, 0, 4, 16, 64))
    run_.note(f"{left} KiB left")
    disk.fill(left)
    run_.hold(1.2, 2.0)
    if left == 0:
        _tells_full(run_, victim)
    disk.empty()
    _well_again(run_, victim)


def audit_disk_full(run_: Run) -> None:
    """The audit log has a disk of its own, which is full: the node serves nothing, and says so."""
    victim = run_.node()
    disk = _on_disk(run_, victim, run_.cluster.data_folder(victim) / "audit", "tmpfs", 4 * 1024)
    disk.fill(0)
    run_.hold(1.0, 1.8)
    _tells_full(run_, victim)
    disk.empty()
    _well_again(run_, victim)


def _tells_full(run_: Run, victim: str) -> None:
    def told() -> bool:
        status = run_.status(victim)
        return bool(status.audit or status.store)

    run_.eventually(f"the status of {victim} says that its disk is full", told)


def _well_again(run_: Run, victim: str) -> None:
    def well() -> bool:
        status = run_.status(victim)
        return not (status.audit or status.store)

    run_.eventually(f"{victim} serves again by itself once there is room", well, 20.0)


def read_only(run_: Run) -> None:
    """The file system under a node fails, as a broken disk does: from then on it can only be read."""
    victim = run_.node()
    disk = _on_disk(run_, victim, run_.cluster.data_folder(victim), "ext4", 24 * 1024)
    with contextlib.suppress(OSError):  # the kernel obeys and says that it is in error
        run("mount", "-o", "remount,abort", disk.folder)
    run_.hold(1.2, 2.0)
    _tells_full(run_, victim)
    run_.cluster.kill(victim)
    disk.unmount()
    disk.mount()
    run_.cluster.start_node(victim)


# --- a node's files ---


def _damaged(run_: Run, damage: Callable[[Path], None], *, kill: bool = False, audit: bool = False) -> bool:
    """Stop a node, damage its data, start it; at the end it has again what it had. Whether it refused to start.

    Its audit log goes on, unless that is what was damaged: putting an older one back would be a fault of its own.
    """
    victim = run_.node()
    cluster = run_.cluster
    data = cluster.data_folder(victim)
    kept = data.with_name("kept")
    (cluster.kill if kill else cluster.stop_node)(victim)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(data, kept)

    def undo() -> None:
        if cluster.running()[victim] is not None:
            cluster.stop_node(victim)
        if not audit:
            shutil.rmtree(kept / "audit")
            (data / "audit").rename(kept / "audit")
        shutil.rmtree(data)
        kept.rename(data)

    run_.undo.later(undo)
    damage(data)
    refused = run_.refused_start(victim, *REFUSALS)
    run_.hold(0.8, 1.5)
    return refused


def _change_row(run_: Run, data: Path, change: Callable[[bytes], bytes]) -> None:
    with contextlib.closing(sqlite3.connect(data / "shares.db")) as store:
        rows = store.execute("SELECT key_id, epoch, sealed FROM keys WHERE length(sealed) > 0").fetchall()
        key_id, epoch, sealed = run_.rng.choice(rows)
        store.execute("UPDATE keys SET sealed = ? WHERE key_id = ? AND epoch = ?", (change(sealed), key_id, epoch))
        store.commit()


def corrupted_share(run_: Run) -> None:
    """One flipped bit in a sealed share."""
    refused = _damaged(run_, lambda data: _change_row(run_, data, lambda sealed: flipped(sealed, run_.rng)))
    run_.expect("a node with a damaged share does not start", refused)


def swapped_blobs(run_: Run) -> None:
    """The sealed shares of two keys change their places."""

    def swap(data: Path) -> None:
        with contextlib.closing(sqlite3.connect(data / "shares.db")) as store:
            rows = store.execute("SELECT key_id, epoch, sealed FROM keys WHERE length(sealed) > 0").fetchall()
            one, other = run_.rng.sample(rows, 2)
            for row, sealed in ((one, other[2]), (other, one[2])):
                store.execute("UPDATE keys SET sealed = ? WHERE key_id = ? AND epoch = ?", (sealed, *row[:2]))
            store.commit()

    run_.expect("a node with swapped shares does not start", _damaged(run_, swap))


def anothers_store(run_: Run) -> None:
    """A node gets the whole store of another node."""
    other = run_.rng.choice(run_.cluster.nodes)

    def swap(data: Path) -> None:
        source = run_.cluster.data_folder(other)
        if source == data:
            source = run_.cluster.data_folder(
                next(each for each in run_.cluster.nodes if each != other and run_.cluster.data_folder(each) != data)
            )
        for suffix in ("", "-wal", "-shm"):
            (data / f"shares.db{suffix}").unlink(missing_ok=True)
        with (
            contextlib.closing(sqlite3.connect(f"file:{source / 'shares.db'}?mode=ro", uri=True)) as theirs,
            contextlib.closing(sqlite3.connect(data / "shares.db")) as ours,
        ):
            theirs.backup(ours)
        (data / "shares.db").chmod(0o600)

    run_.expect("a node with another node's store does not start", _damaged(run_, swap))


def old_store(run_: Run) -> None:
    """A node's store is put back to what it was before keys were made, refreshed and destroyed."""
    victim = run_.node()
    cluster = run_.cluster
    data = cluster.data_folder(victim)
    cluster.stop_node(victim)
    kept = data.with_name("kept.db")
    shutil.copy(data / "shares.db", kept)
    cluster.start_node(victim)
    for _ in range(2):
        run_.workload.make("aes-256-gcm", run_.rng)
    for key in run_.rng.sample(run_.workload.living(own=True), 2):
        run_.workload.refresh(key)
    run_.hold(0.4, 0.8)
    cluster.stop_node(victim)
    for suffix in ("-wal", "-shm"):
        (data / f"shares.db{suffix}").unlink(missing_ok=True)
    kept.replace(data / "shares.db")
    run_.expect("a node with an old store starts", not run_.refused_start(victim, *REFUSALS))
    run_.hold(0.8, 1.4)


def truncated_store(run_: Run) -> None:
    """The store's file ends somewhere in its middle."""

    def cut(data: Path) -> None:
        path = data / "shares.db"
        size = path.stat().st_size
        with path.open("r+b") as stream:
            stream.truncate(run_.rng.randrange(0, size))

    _damaged(run_, cut)


def flipped_store(run_: Run) -> None:
    """One to a hundred bits are flipped anywhere in the store's file."""

    def flip(data: Path) -> None:
        path = data / "shares.db"
        content = path.read_bytes()
        for _ in range(run_.rng.choice((1, 1, 3, 10, 100))):
            content = flipped(content, run_.rng)
        path.write_bytes(content)

    _damaged(run_, flip)


def lost_log(run_: Run) -> None:
    """A killed node's write-ahead log is deleted, or ends in its middle: its newest transactions are gone."""

    def cut(data: Path) -> None:
        path = data / "shares.db-wal"
        if run_.rng.random() < 0.4:
            path.unlink(missing_ok=True)
        elif path.exists():
            with path.open("r+b") as stream:
                stream.truncate(run_.rng.randrange(0, path.stat().st_size + 1))
        (data / "shares.db-shm").unlink(missing_ok=True)

    _damaged(run_, cut, kill=True)


def corrupted_audit(run_: Run) -> None:
    """A bit of a node's newest audit file is flipped, or its end is cut off. The node can't know; the verifier must."""
    flip = run_.rng.random() < 0.6
    run_.note("a bit" if flip else "the end")

    def change(data: Path) -> None:
        path = max((data / "audit").glob("*.jsonl"))
        content = path.read_bytes()
        if flip:
            path.write_bytes(flipped(content, run_.rng))
        else:
            path.write_bytes(content[: run_.rng.randrange(len(content) // 2, len(content))])

    _damaged(run_, change, audit=True)
    if flip:
        run_.expect("keyquorum audit verify finds the flipped bit", not _audit_verifies(run_))


def _audit_verifies(run_: Run) -> bool:
    cluster = run_.cluster
    command = [str(Path(sys.executable).with_name("keyquorum")), "audit", "verify"]
    command += [str(cluster.data_folder(node) / "audit") for node in cluster.nodes]
    pin = tomllib.loads(cluster.config_file(cluster.nodes[0]).read_text())["manifest_pin"]
    command += ["--manifest", str(cluster.path / "cluster.manifest"), "--pin", pin]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"audit verify: {done.stderr[-300:]}")
    return done.returncode == 0


# --- the registry's database ---


def _registry(run_: Run) -> Path:
    return run_.cluster.path / "balancer" / "data"


def corrupted_registry(run_: Run) -> None:
    """The registry's file is damaged while the balancer is down; what was kept aside is put back later."""
    cluster = run_.cluster
    data = _registry(run_)
    cluster.kill(BALANCER)
    kept = data.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(data, kept)

    def undo() -> None:
        if cluster.running()[BALANCER] is not None:
            cluster.kill(BALANCER)
        shutil.rmtree(data)
        kept.rename(data)

    run_.undo.later(undo)
    path = data / "registry.db"
    with path.open("r+b") as stream:
        size = path.stat().st_size
        if run_.rng.random() < 0.5:
            stream.truncate(run_.rng.randrange(0, size))
        else:
            for _ in range(200):
                stream.seek(run_.rng.randrange(size))
                stream.write(run_.rng.randbytes(16))
    (data / "registry.db-wal").unlink(missing_ok=True)
    try:
        cluster.start_node(BALANCER)
    except engine.ClusterError:
        run_.note("refused to start")
    else:
        run_.note("started")
    run_.hold(0.8, 1.5)


def old_registry(run_: Run) -> None:
    """The registry is put back to what it was before keys were made, refreshed and destroyed."""
    cluster = run_.cluster
    data = _registry(run_)
    cluster.stop_node(BALANCER)
    kept = data.with_name("kept")
    shutil.copytree(data, kept)
    cluster.start_node(BALANCER)
    run_.hold(0.6, 1.0)
    for key in run_.rng.sample(run_.workload.living(own=True), 2):
        run_.workload.refresh(key)
    cluster.stop_node(BALANCER)
    shutil.rmtree(data)
    kept.rename(data)
    cluster.start_node(BALANCER)
    run_.hold(0.8, 1.4)
    _names_are_taken(run_)


def _names_are_taken(run_: Run) -> None:
    """A registry that does not know a key must not give its name to another one."""
    known = run_.workload.living()
    for key in run_.rng.sample(known, min(3, len(known))):
        try:
            run_.kq.create_key(key.name, "aes-128-gcm", threshold=3, shares=5, timeout=10.0)
        except engine.EngineError as error:
            run_.note(f"a second key of a name: {error.code}")
        else:
            run_.expect(f"the name of {key.name}, which exists, is not given to a second key", False)


def deleted_registry(run_: Run) -> None:
    """The registry's files are gone: the balancer begins with empty books."""
    cluster = run_.cluster
    cluster.stop_node(BALANCER)
    shutil.rmtree(_registry(run_))
    cluster.start_node(BALANCER)
    time.sleep(run_.rng.uniform(0.5, 1.5))
    _names_are_taken(run_)


STORE = replace(ONE_NODE, refresh=frozenset({"*"}))
FORGOTTEN = replace(NO_BALANCER, destroy=NO_BALANCER.destroy | {"key-not-found"}, refresh=frozenset({"*"}))
"""Keys that a registry does not know can be used and neither refreshed nor destroyed."""
TELLS = "the node does not start and says that its store is damaged"
FAULTS = [
    Fault(
        "disk-full",
        "storage",
        "a node's data folder is full",
        ONE_NODE,
        disk_full,
        tells="its status says so; it serves again by itself",
        needs=("tmpfs",),
    ),
    Fault(
        "audit-disk-full",
        "storage",
        "the audit log's own disk is full",
        ONE_NODE,
        audit_disk_full,
        tells="its status says so; it serves again by itself",
        needs=("tmpfs",),
    ),
    Fault(
        "read-only-disk",
        "storage",
        "a node's file system fails and is read-only",
        ONE_NODE,
        read_only,
        tells="its status says so",
        needs=("ext4",),
    ),
    Fault(
        "corrupted-share",
        "storage",
        "a flipped bit in a sealed share",
        ONE_NODE,
        corrupted_share,
        tells=TELLS,
        quick=True,
    ),
    Fault(
        "swapped-shares", "storage", "two sealed shares of a node change places", ONE_NODE, swapped_blobs, tells=TELLS
    ),
    Fault("anothers-store", "storage", "a node has another node's store", ONE_NODE, anothers_store, tells=TELLS),
    Fault(
        "old-store",
        "storage",
        "a node's store is put back to an older one",
        STORE,
        old_store,
        tells="the node learns what it missed",
        least_shares=3,
    ),
    Fault(
        "truncated-store",
        "storage",
        "a node's store is cut off",
        ONE_NODE,
        truncated_store,
        tells="refused, or nothing wrong",
        least_shares=3,
    ),
    Fault(
        "flipped-store",
        "storage",
        "1 to 100 flipped bits in a node's store",
        ONE_NODE,
        flipped_store,
        tells="refused, or nothing wrong",
        least_shares=3,
    ),
    Fault(
        "lost-log",
        "storage",
        "a node's write-ahead log is lost or cut off",
        STORE,
        lost_log,
        tells="refused, or nothing wrong",
        least_shares=3,
    ),
    Fault(
        "corrupted-audit",
        "storage",
        "a node's audit log is changed or cut off",
        ONE_NODE,
        corrupted_audit,
        tells="a flipped bit is found by keyquorum audit verify",
    ),
    Fault(
        "corrupted-registry",
        "storage",
        "the registry's file is damaged, then put back",
        NO_BALANCER,
        corrupted_registry,
    ),
    Fault("old-registry", "storage", "the registry is put back to an older one", FORGOTTEN, old_registry, fresh=True),
    Fault("deleted-registry", "storage", "the registry's files are gone", FORGOTTEN, deleted_registry, fresh=True),
]
__all__ = ["FAULTS", "NOTHING"]
