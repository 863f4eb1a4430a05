"""Keys that the balancer moves, repairs and refreshes by itself, on real clusters and under load."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engine
from engine import Engine, LocalCluster
from engine.protocol.manifest import PolicyRule
from engine.protocol.requests import BalancerStatus, KeyMoves
from shim_cluster import ShimCluster

NODES = 7
GROW = [PolicyRule("local", "*", ["*"]), PolicyRule("balancer", "*", ["grow"])]
PATIENCE_S = 120.0
START_S = 180.0


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> Any:
    """The first true value of the condition, polled with a bound."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)
    return value


def status_of(kq: Engine) -> BalancerStatus:
    (status,) = [each.status for each in kq.status() if each.role == "balancer"]
    assert isinstance(status, BalancerStatus), status
    return status


def moves_of(kq: Engine) -> dict[str, KeyMoves]:
    return {each.why: each for each in status_of(kq).moves}


def shares_of(cluster: LocalCluster) -> dict[str, dict[str, int]]:
    """Key -> node -> epoch of the committed share that it has."""
    found: dict[str, dict[str, int]] = {}
    for node in cluster.nodes:
        with contextlib.closing(
            sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
        ) as store:
            query = "SELECT name, epoch FROM keys WHERE state = 'committed' AND length(sealed) > 0"
            for name, epoch in store.execute(query):
                found.setdefault(name, {})[node] = epoch
    return found


def audit_lines(cluster: LocalCluster) -> list[str]:
    """The records of all nodes' audit logs, of removed ones too; they are whole once the nodes have stopped."""
    files = cluster.path.glob("nodes/*/data/audit/*.jsonl")
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def names_of_group(cluster: LocalCluster, count: int, fits: Callable[[Sequence[str]], bool], shares: int) -> list[str]:
    """Names of keys of one placement group, whose first holders are fit."""
    manifest, by_group = cluster.cluster, {}
    for number in range(2**20):
        name = f"hot/{number}"
        group = manifest.group_of(name)
        if fits(manifest.group_holders(group)[:shares]):
            names = by_group.setdefault(group, [])
            names.append(name)
            if len(names) == count:
                return list(names)
    raise AssertionError("no such group")


class Load:
    """Uses of keys by threads of two clients all the while; the first error ends it, and is told at the end."""

    def __init__(
        self, cluster: LocalCluster, names: Sequence[str], threads: int, pause_s: float = 0.0, timeout_s: float = 5.0
    ) -> None:
        self._cluster, self._names, self._pause_s, self._timeout_s = cluster, names, pause_s, timeout_s
        self._threads = threads
        self._over = threading.Event()
        self.uses = 0

    def _use(self, kq: Engine, before: dict[str, bytes], first: int) -> None:
        for number in range(first, 2**40):
            if self._over.wait(self._pause_s):
                return
            name = self._names[number % len(self._names)]
            assert kq.decrypt(name, before[name], timeout=self._timeout_s) == name.encode()
            self.uses += 1

    @contextlib.contextmanager
    def running(self, kq: Engine) -> Iterator[None]:
        before = {name: kq.encrypt(name, name.encode()) for name in self._names}
        with engine.connect(self._cluster.client_config) as other, ThreadPoolExecutor(self._threads) as pool:
            users = [pool.submit(self._use, (kq, other)[at % 2], before, at) for at in range(self._threads)]
            try:
                yield
            finally:
                self._over.set()
            for user in users:
                user.result()
        for name, sealed in before.items():
            kq.flush(name)
            assert kq.decrypt(name, sealed) == name.encode()


def test_the_keys_of_a_lost_node_are_repaired_and_no_others(tmp_path: Path) -> None:
    """A killed node's shares are made anew elsewhere, while all is used; it comes back and keeps none of them."""
    settings = {"migrate": {"repair_after_s": 3.0}}
    with (
        LocalCluster(
            nodes=NODES, threshold=3, shares=5, path=tmp_path / "kq", balancer=settings, start_timeout_s=START_S
        ) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        names = [f"repair/{number}" for number in range(12)]
        for name in names:
            kq.create_key(name, "aes-256-gcm", threshold=3, shares=5)
        lost = kq.key_info(names[0]).holders[0]
        hit = {name for name in names if lost in kq.key_info(name).holders}
        load = Load(cluster, names, 3, 0.02)
        with load.running(kq):
            cluster.kill(lost)
            until(lambda: moves_of(kq)["repair"].done >= len(hit))
            until(lambda: moves_of(kq)["repair"].waiting == 0)
            used = load.uses
            until(lambda: load.uses > used + 20)
            cluster.start_node(lost)
            until(lambda: not any(lost in shares_of(cluster)[name] for name in hit))
        told = shares_of(cluster)
        for name in names:
            assert len(told[name]) == 5
            (epoch,) = set(told[name].values())
            assert epoch > 1 or name not in hit
            assert set(kq.key_info(name).holders) == set(told[name])
        until(lambda: status_of(kq).moving == "every key is where it is to be")
        assert moves_of(kq)["repair"].done == len(hit)


def test_a_drained_node_is_emptied_and_removed_under_load(tmp_path: Path) -> None:
    """A node comes, another is drained: its keys go to others, no use fails, and it leaves the cluster."""
    with (
        LocalCluster(nodes=NODES - 1, threshold=2, shares=3, path=tmp_path / "kq", start_timeout_s=START_S) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        names = [f"drain/{number}" for number in range(16)]
        for name in names:
            kq.create_key(name, "aes-256-gcm", threshold=2, shares=3)
        cluster.add_node()
        leaving = kq.key_info(names[0]).holders[0]
        hit = {name for name in names if leaving in kq.key_info(name).holders}
        with Load(cluster, names, 3, 0.02).running(kq):
            cluster.drain_node(leaving, timeout_s=PATIENCE_S)
            cluster.remove_node(leaving)
        told = shares_of(cluster)
        for name in names:
            assert len(told[name]) == 3
            (epoch,) = set(told[name].values())
            assert epoch > 1 or name not in hit
        moves = moves_of(kq)
        assert (moves["drain"].waiting, moves["repair"].done) == (0, 0)
        assert moves["drain"].done > 0
    told_of = [json.loads(line) for line in audit_lines(cluster)]
    assert any((each.get("member"), each.get("verb")) == ("balancer", "move") for each in told_of)
    for name in hit:
        steps = {each.get("verb") for each in told_of if each.get("key") == name}
        assert {"share.accept", "share.commit"} <= steps, (name, steps)


def test_epochs_are_renewed_when_they_are_old(tmp_path: Path) -> None:
    """Each key once, when its time has come, whoever uses it."""
    settings = {"migrate": {"refresh_every_h": 3.0 / 3600}}
    with (
        LocalCluster(
            nodes=4, threshold=2, shares=3, path=tmp_path / "kq", balancer=settings, start_timeout_s=START_S
        ) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        names = [f"old/{number}" for number in range(8)]
        for name in names:
            kq.create_key(name, "aes-256-gcm", threshold=2, shares=3, timeout=5.0)
        kq.create_key("single", "aes-256-gcm", threshold=1, shares=2, timeout=5.0)
        with Load(cluster, names, 2, 0.02).running(kq):
            until(lambda: all(set(shares_of(cluster)[name].values()) == {2} for name in names))
        assert set(shares_of(cluster)["single"].values()) == {1}
        assert moves_of(kq)["refresh"].done == 8
        text = cluster.log_file("balancer").read_text(encoding="utf-8")
        assert "keys were changed" in text


def test_a_plan_is_carried_out_and_a_killed_balancer_goes_on(tmp_path: Path) -> None:
    """One node's token gets slow: the hot group's keys go to another, some before and some after a kill."""
    settings = {"migrate": {"keys_per_s": 2.0, "batch": 1, "under_way": 1}}
    with (
        ShimCluster(
            nodes=NODES,
            threshold=2,
            shares=3,
            domains=NODES,
            path=tmp_path / "kq",
            balancer=settings,
            start_timeout_s=START_S,
        ) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        slow = "node1"
        names = names_of_group(cluster, 24, lambda holders: slow in holders, 3)
        for name in names:
            kq.create_key(name, "aes-256-gcm", threshold=2, shares=3)
        for node, shim in cluster.shims.items():
            shim.delay("C_Decrypt", 0.08 if node == slow else 0.004)

        def moved() -> list[str]:
            return [name for name in names if slow not in shares_of(cluster)[name]]

        with Load(cluster, names, 6).running(kq):
            until(lambda: len(moved()) >= 3)
            cluster.kill_balancer()
            early = moved()
            assert len(early) < len(names)
            cluster.start_balancer()
            until(lambda: len(moved()) == len(names))
            until(lambda: moves_of(kq)["plan"].waiting == 0)
        told = shares_of(cluster)
        assert all(len(told[name]) == 3 for name in names)
        assert len({frozenset(told[name]) for name in names}) == 1
        assert {epoch for name in early for epoch in told[name].values()} == {2}


def test_a_hot_group_gets_further_holders_that_serve_it(tmp_path: Path) -> None:
    """The simulator's shift of a hot group on a real cluster: three holders are too few, so the plan adds some.

    Each token sleeps 20 ms in a use, so that a node does 50 a second. The policy lets the balancer ``grow`` keys.
    """
    with (
        ShimCluster(
            nodes=NODES, threshold=2, shares=3, domains=NODES, path=tmp_path / "kq", rules=GROW, start_timeout_s=START_S
        ) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        names = names_of_group(cluster, 8, lambda _: True, 3)
        for name in names:
            kq.create_key(name, "aes-256-gcm", threshold=2, shares=3)
        first = set(kq.key_info(names[0]).holders)
        for shim in cluster.shims.values():
            shim.delay("C_Decrypt", 0.02)

        def served() -> dict[str, int]:
            return {
                each.name: sum(
                    kind.stages[-1].count
                    for kind in each.latency.classes
                    if kind.request_class == "decrypt/aes-256-gcm"
                )
                for each in kq.status(latency=True)
                if each.latency is not None
            }

        # More is asked than three such tokens can do, so uses wait long until the plan is carried out.
        with Load(cluster, names, 12, timeout_s=30.0).running(kq):
            until(lambda: all(len(shares_of(cluster)[name]) > 3 for name in names))
            holders = set(shares_of(cluster)[names[0]])
            before = served()
            until(lambda: all(served()[node] > before[node] + 20 for node in holders))
            info = kq.key_info(names[0])
            assert (info.threshold, len(info.holders) > 3) == (2, True)
            assert set(info.holders) - first


def test_a_share_that_was_not_made_with_its_key_is_made_later(tmp_path: Path) -> None:
    """A holder is down when a key is made; it comes back, and when the key's order is over it gets its share."""
    with (
        LocalCluster(nodes=5, threshold=2, shares=5, path=tmp_path / "kq", start_timeout_s=START_S) as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        cluster.kill("node5")
        for number in range(4):
            kq.create_key(f"thin/{number}", "aes-256-gcm", threshold=2, shares=5, timeout=5.0)
        sealed = kq.encrypt("thin/0", b"from before")
        cluster.start_node("node5")
        until(lambda: moves_of(kq)["top-up"].done >= 4)
        told = until(lambda: (found := shares_of(cluster)) and all(len(found[name]) == 5 for name in found) and found)
        assert len(told) == 4
        assert moves_of(kq)["top-up"].waiting == 0
        for node in ("node1", "node2", "node3"):
            cluster.kill(node)
        kq.flush("thin/0")
        assert kq.decrypt("thin/0", sealed) == b"from before", "with a share that was made later"
