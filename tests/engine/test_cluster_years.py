"""Years of a cluster in half a minute: nodes come, go and die, keys are refreshed and rotated; users notice nothing.

Each of their operations has 5 s, and all that was made on the way is compared in the end.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster
from engine.client import fleet

NODES, THRESHOLD, SHARES = 7, 2, 4
KINDS = ("aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "ed25519")
ROTATED = "years/aes-256-gcm/0"
DEADLINE_S = 5.0
PATIENCE_S = 240.0
USERS = 2
PAUSE_S = 0.02
"""Between two operations of a user: the load is steady, and leaves room for what is done beside it."""
FLUSHED_EVERY, KEPT_EVERY = 7, 5


def make(kq: Engine, name: str, message: bytes) -> bytes:
    """A ciphertext, tag or signature of the message, by what the key is for."""
    kind = name.split("/")[1]
    how = {"aes-256-gcm": kq.encrypt, "hmac-sha256": kq.mac}.get(kind, kq.sign)
    return how(name, message, timeout=DEADLINE_S)


def check(kq: Engine, name: str, message: bytes, made: bytes) -> None:
    """What ``make`` gave is of that key and message."""
    kind = name.split("/")[1]
    if kind == "aes-256-gcm":
        assert kq.decrypt(name, made, timeout=DEADLINE_S) == message, name
    else:
        verify = kq.verify_mac if kind == "hmac-sha256" else kq.verify
        verify(name, message, made, timeout=DEADLINE_S)


class Users:
    """Threads of two clients that use keys, warm and cold, all the while; any error of theirs fails the test."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._over = threading.Event()
        self.kept: list[tuple[str, bytes, bytes]] = []
        """Key, message and what was made."""

    def _use(self, kq: Engine, user: int) -> int:
        for number in count():
            if self._over.wait(PAUSE_S):
                return number
            name = self._names[(number + user * 5) % len(self._names)]
            message = f"{name} by {user}, {number}".encode()
            if number % FLUSHED_EVERY == 0:
                kq.flush(name, timeout=DEADLINE_S)
            made = make(kq, name, message)
            check(kq, name, message, made)
            if number % KEPT_EVERY == 0:
                self.kept.append((name, message, made))
        raise AssertionError

    @contextlib.contextmanager
    def at_work(self, settings: Path) -> Iterator[None]:
        """Have them work beside the block."""
        with engine.connect(settings) as one, engine.connect(settings) as two, ThreadPoolExecutor(USERS) as pool:
            users = [pool.submit(self._use, (one, two)[user % 2], user) for user in range(USERS)]
            try:
                yield
            finally:
                self._over.set()
            assert all(user.result() > len(self._names) for user in users)


def node_command(cluster: LocalCluster, *arguments: str) -> None:
    """``keyquorum node`` on the cluster's folder."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KEYQUORUM_")}
    program = Path(sys.executable).with_name("keyquorum")
    done = subprocess.run(
        [program, "node", *arguments, "--dir", cluster.path], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr


def held(cluster: LocalCluster) -> dict[tuple[str, int], dict[str, tuple[int, str]]]:
    """(Key, version) -> node -> epoch and state of each share that a member's disk has."""
    found: dict[tuple[str, int], dict[str, tuple[int, str]]] = {}
    for node in cluster.nodes:
        path = cluster.data_folder(node) / "shares.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            query = "SELECT name, version, epoch, state FROM keys WHERE length(sealed) > 0"
            for name, version, epoch, state in store.execute(query):
                assert node not in found.get((name, version), {}), f"{node} has two shares of {name!r}"
                found.setdefault((name, version), {})[node] = epoch, state
    return found


def test_users_notice_nothing_in_the_years_of_a_cluster(tmp_path: Path) -> None:
    """Two nodes come, one is emptied and leaves, one dies and is replaced; keys are refreshed, rotated, rewrapped."""
    names = [f"years/{kind}/{number}" for number in range(3) for kind in KINDS]
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(LocalCluster(NODES, THRESHOLD, tmp_path / "kq", shares=SHARES, domains=NODES))
        kq = stack.enter_context(engine.connect(made.client_config))
        for name in names:
            create_whole_key(kq, name, name.split("/")[1], threshold=THRESHOLD, shares=SHARES)
        users = Users(names)
        users.kept += [(name, name.encode(), make(kq, name, name.encode())) for name in names]
        gone, lost = kq.key_info(ROTATED).holders[:2]
        with users.at_work(made.client_config):
            came = [made.add_node(location=f"site{site}/room1/rack1/host1") for site in (8, 9)]
            node_command(made, "drain", gone, "--timeout", f"{PATIENCE_S:g}")
            node_command(made, "remove", gone)
            cluster = stack.enter_context(LocalCluster.open(made.path))  # as the commands left it
            cluster.kill(lost)
            came.append(cluster.replace_node(lost, lost=True))
            fleet.wait_empty(cluster, lost, PATIENCE_S)
            epochs = {name: kq.key_info(name).epoch for name in names}
            for name in names:
                assert kq.refresh_key(name, timeout=PATIENCE_S).epoch > epochs[name]
            assert kq.rotate_key(ROTATED, timeout=PATIENCE_S).version == 2
            old = [each for each in users.kept if each[0] == ROTATED and each[2][3:7] == bytes([0, 0, 0, 1])]
            new = kq.rewrap_many(ROTATED, [each[2] for each in old], timeout=PATIENCE_S)
            users.kept += [(name, message, wrapped) for (name, message, _), wrapped in zip(old, new, strict=True)]

        assert len(cluster.nodes) == NODES + 1
        assert {*came} < {*cluster.nodes}
        assert not {gone, lost} & {*cluster.nodes}
        rows = held(cluster)
        assert {*rows} == {*((name, 1) for name in names), (ROTATED, 2)}
        for (name, version), shares in rows.items():
            info = kq.key_info(name, version=version)
            assert shares == dict.fromkeys(info.holders, (info.epoch, "committed")), (name, version)
            assert len(shares) == SHARES
        made_by = {name for name, _, _ in users.kept}
        assert made_by == {*names}
        with engine.connect(cluster.client_config) as fresh:
            fresh.flush()
            for name in names:  # each holder puts the key together anew
                assert {*fresh.prewarm(name, timeout=PATIENCE_S)} == {*fresh.key_info(name).holders}, name
            for each in users.kept:
                check(fresh, *each)
