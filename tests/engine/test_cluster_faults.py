"""Nodes and the balancer die on the real cluster, and come back."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sampled import some
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster, PolicyRule
from engine.client.config import load_identity
from engine.failpoints import VARIABLE
from engine.protocol.manifest import issue_cluster_manifest

DEADLINE_S = 5.0


def _use(kq: Engine) -> None:
    """Warm and cold operations of three kinds, each result checked."""
    for cold in (False, True):
        if cold:
            kq.flush()
        assert (
            kq.decrypt("data", kq.encrypt("data", b"secret", associated_data=b"a"), associated_data=b"a") == b"secret"
        )
        kq.verify("sign", b"m", kq.sign("sign", b"m"))
        kq.verify_mac("mac", b"m", kq.mac("mac", b"m"))


def _make_keys(kq: Engine) -> None:
    for name, algorithm in (("data", "aes-256-gcm"), ("sign", "ecdsa-p256-sha256"), ("mac", "hmac-sha256")):
        create_whole_key(kq, name, algorithm, threshold=3, shares=5)


def _top(config: Path) -> dict[str, Any]:
    """One frame of ``keyquorum top``."""
    command = [Path(sys.executable).with_name("keyquorum"), "--config", config, "-o", "json", "top", "--once"]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _await_nodes(kq: Engine, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while any(member.error for member in kq.status(timeout=1.0)):
        assert time.monotonic() < until, [member for member in kq.status() if member.error]


@pytest.fixture(scope="module")
def lasting_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with LocalCluster(nodes=5, threshold=3, path=tmp_path_factory.mktemp("lasting") / "kq") as running:
        yield running


@pytest.fixture
def healed_cluster(lasting_cluster: LocalCluster) -> Iterator[LocalCluster]:
    """A cluster whose members a test may kill and stop; they are started again for the next, and the keys destroyed."""
    yield lasting_cluster
    for name, pid in lasting_cluster.running().items():
        if pid is None:
            lasting_cluster.start_node(name)
    with engine.connect(lasting_cluster.client_config) as kq:
        _await_nodes(kq, 30.0)
        for key in kq.list_keys():
            kq.destroy_key(key.name)


def test_any_two_nodes_may_die(healed_cluster: LocalCluster) -> None:
    """Pairs of nodes are killed in turn; warm and cold operations go on, and nothing is lost."""
    with engine.connect(healed_cluster.client_config) as kq:
        _make_keys(kq)
        before = kq.encrypt("data", b"from before")
        for pair in some(itertools.combinations(healed_cluster.nodes, 2)):
            for node in pair:
                healed_cluster.kill(node)
            _use(kq)
            assert kq.decrypt("data", before) == b"from before"
            for node in pair:
                healed_cluster.start_node(node)
            _await_nodes(kq)


def test_three_dead_nodes_and_back(healed_cluster: LocalCluster) -> None:
    """With t-1 nodes left, loaded keys are served, others refused by name in time; restarted nodes lost nothing."""
    with engine.connect(healed_cluster.client_config) as kq:
        _make_keys(kq)
        before = kq.encrypt("data", b"from before")
        assert set(kq.prewarm("data")) == set(healed_cluster.nodes)
        dead = healed_cluster.nodes[2:]
        for node in dead:
            healed_cluster.kill(node)
        assert kq.decrypt("data", before) == b"from before"
        kq.flush()
        for name, call in (
            ("data", lambda: kq.decrypt("data", before, timeout=DEADLINE_S)),
            ("sign", lambda: kq.sign("sign", b"m", timeout=DEADLINE_S)),
        ):
            begun = time.monotonic()
            with pytest.raises(engine.QuorumUnavailable, match=name) as caught:
                call()
            assert time.monotonic() - begun <= DEADLINE_S + 0.5  # the deadline is the promise, not a speed
            assert set(dead) <= set(caught.value.missing)
        with pytest.raises(engine.QuorumUnavailable, match="new"):
            kq.create_key("new", "aes-256-gcm", threshold=3, shares=5)
        for node in dead:
            healed_cluster.start_node(node)
        _await_nodes(kq)
        assert kq.decrypt("data", before) == b"from before"
        _use(kq)
        # The name of the creation that failed is free again, with nothing of the attempt in the way.
        assert len(kq.create_key("new", "aes-256-gcm", threshold=3, shares=5, timeout=30).stored) == 5


def test_a_node_that_missed_a_creation_serves_the_key(healed_cluster: LocalCluster) -> None:
    """A key made while a node is down is on the other four; the node learns of it and combines without a share."""
    late = healed_cluster.nodes[4]
    with engine.connect(healed_cluster.client_config) as kq:
        healed_cluster.kill(late)
        info = kq.create_key("young", "aes-256-gcm", threshold=3, shares=5)
        assert set(info.stored) == set(healed_cluster.nodes) - {late}
        assert any(late in warning for warning in info.warnings)
        ciphertext = kq.encrypt("young", b"x")
        healed_cluster.start_node(late)
        _await_nodes(kq)
        until = time.monotonic() + 10
        while late not in kq.prewarm("young"):
            assert time.monotonic() < until, "the node never learned of the key"
        for node in healed_cluster.nodes[:2]:
            healed_cluster.kill(node)
        kq.flush()
        with pytest.raises(engine.QuorumUnavailable):  # two shares are left among three nodes
            kq.decrypt("young", ciphertext)


def test_a_key_that_no_holder_was_told_of_is_used_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dealer's word to the holders is lost, its reply to the client is not: who asks waits for the books."""
    monkeypatch.setenv(VARIABLE, "holder.commit.checked=error@1")
    with (
        LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        kq.create_key("new", "aes-256-gcm", threshold=2, shares=3)
        logs = [(cluster.path / "run" / f"{node}.log").read_text() for node in cluster.nodes]
        assert sum(log.count("commit not taken in yet") for log in logs) == 3
        assert kq.key_info("new").shares == 3
        assert kq.decrypt("new", kq.encrypt("new", b"text")) == b"text"


def test_a_key_that_was_not_made_is_known_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holders miss the word that the creation was given up: who asks for the key has them ask the registry."""
    monkeypatch.setenv(VARIABLE, "dealer.create.prepared=error; dealer.abort.booked=error")
    with (
        LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as cluster,
        engine.connect(cluster.client_config) as kq,
    ):
        with pytest.raises(engine.EngineError):
            kq.create_key("new", "aes-256-gcm", threshold=2, shares=3, timeout=0.5)
        with pytest.raises(engine.KeyNotFound):
            kq.key_info("new")


def test_a_node_that_missed_a_destruction_carries_it_out(own_cluster: LocalCluster) -> None:
    """A destroyed key is erased from a node that was down, when it comes back."""
    late = own_cluster.nodes[0]
    with engine.connect(own_cluster.client_config) as kq:
        create_whole_key(kq, "doomed", "aes-256-gcm", threshold=3, shares=5)
        own_cluster.kill(late)
        gone = kq.destroy_key("doomed")
        assert late in gone.pending
        own_cluster.start_node(late)
        until = time.monotonic() + 10
        while _shares_of(kq, late) != 0:
            assert time.monotonic() < until, "the node kept the share of a destroyed key"
    own_cluster.stop_node(late)
    with contextlib.closing(sqlite3.connect(own_cluster.data_folder(late) / "shares.db")) as store:
        assert store.execute("SELECT state, length(sealed) FROM keys").fetchall() == [("destroyed", 0)]


def _shares_of(kq: Engine, node: str) -> int | None:
    return next(getattr(member.status, "shares", None) for member in kq.status() if member.name == node)


def test_without_a_balancer_data_operations_go_on(healed_cluster: LocalCluster) -> None:
    """Creation and destruction say why they can't; everything else, new clients included, works as before."""
    with engine.connect(healed_cluster.client_config) as kq:
        _make_keys(kq)
        healed_cluster.kill_balancer()
        _use(kq)
        with pytest.raises(engine.RegistryUnavailable, match=r"registry.*balancer"):
            kq.create_key("late", "aes-256-gcm", threshold=3, shares=5)
        with pytest.raises(engine.RegistryUnavailable, match="registry"):
            kq.destroy_key("data")
        with engine.connect(healed_cluster.client_config) as newcomer:
            assert newcomer.routing_table is None
            _use(newcomer)
        told = _top(healed_cluster.client_config)
        assert [each["state"] for each in told["nodes"]] == ["up"] * 5
        assert (told["balancer_up"], told["table"]) == (False, None)
        assert told["balancers"][0]["state"] == "node-unavailable"
        healed_cluster.start_balancer()
        until = time.monotonic() + 10
        while True:
            try:
                kq.create_key("late", "aes-256-gcm", threshold=3, shares=5)
                break
            except (engine.RegistryUnavailable, engine.NodeUnavailable):
                assert time.monotonic() < until
        _use(kq)


def test_a_stopped_node_costs_a_moment(healed_cluster: LocalCluster) -> None:
    """A node that hangs (SIGSTOP: no broken connection) is passed over inside the deadline."""
    with engine.connect(healed_cluster.client_config) as kq:
        _make_keys(kq)
        kq.encrypt("data", b"x")
        for node in healed_cluster.nodes:
            healed_cluster.pause(node)
            try:
                assert kq.decrypt("data", kq.encrypt("data", b"x", timeout=DEADLINE_S), timeout=DEADLINE_S) == b"x"
            finally:
                healed_cluster.resume(node)


@pytest.mark.parametrize("how", ["killed", "paused"])
def test_no_client_sees_an_error_when_a_node_goes(healed_cluster: LocalCluster, how: str) -> None:
    """Threads, a pipelined batch and tasks go on over a node that goes in the middle; each result is right."""
    node = healed_cluster.nodes[0]
    begun, gone = threading.Barrier(5), threading.Event()

    def one_after_the_other(kq: Engine) -> int:
        done = 0
        while not gone.is_set() or done < 20:
            assert kq.decrypt("data", kq.encrypt("data", b"x", timeout=DEADLINE_S), timeout=DEADLINE_S) == b"x"
            done += 1
            if done == 1:
                begun.wait(30)
        return sum(
            kq.decrypt("data", kq.encrypt("data", b"y", timeout=DEADLINE_S), timeout=DEADLINE_S) == b"y"
            for _ in range(20)
        )

    def batches(kq: Engine) -> int:
        kq.encrypt_many("data", [b"x"] * 100, timeout=DEADLINE_S)
        begun.wait(30)
        assert gone.wait(30)
        return len(kq.encrypt_many("data", [b"x"] * 200, timeout=DEADLINE_S))

    async def tasks() -> int:
        async with engine.aio.connect(healed_cluster.client_config) as kq:
            await kq.encrypt_many("data", [b"x"] * 100, timeout=DEADLINE_S)
            await asyncio.to_thread(begun.wait, 30)
            await asyncio.to_thread(gone.wait, 30)
            return len(await kq.encrypt_many("data", [b"x"] * 200, timeout=DEADLINE_S))

    with engine.connect(healed_cluster.client_config) as kq, ThreadPoolExecutor(4) as pool:
        _make_keys(kq)
        kq.prewarm("data")
        running = [
            pool.submit(one_after_the_other, kq),
            pool.submit(one_after_the_other, kq),
            pool.submit(batches, kq),
            pool.submit(asyncio.run, tasks()),
        ]
        try:
            begun.wait(30)
            if how == "killed":
                healed_cluster.kill(node)
            else:
                healed_cluster.pause(node)
            gone.set()
            assert [each.result(60) for each in running] == [20, 20, 200, 200]
            if how == "killed":
                healed_cluster.start_node(node)
        finally:
            gone.set()
            healed_cluster.resume(node)
        _await_nodes(kq)


def test_everything_killed_and_back(healed_cluster: LocalCluster) -> None:
    """kill -9 of every process; what was acknowledged is there after the restart."""
    made: dict[str, bytes] = {}
    with engine.connect(healed_cluster.client_config) as kq:
        for number in range(10):
            name = f"kept/{number}"
            kq.create_key(name, "aes-256-gcm", threshold=3, shares=5)
            made[name] = kq.encrypt(name, name.encode())
        healed_cluster.kill_balancer()
        for node in healed_cluster.nodes:
            healed_cluster.kill(node)
        with pytest.raises(engine.EngineError) as caught:
            kq.encrypt("kept/0", b"x", timeout=2)
        assert isinstance(caught.value, engine.NodeUnavailable | engine.DeadlineExceeded)
        healed_cluster.start()
        for name, ciphertext in made.items():
            assert kq.decrypt(name, ciphertext) == name.encode()
        assert len(kq.list_keys("kept/*")) == 10


def test_a_damaged_store_is_told_and_survived(own_cluster: LocalCluster) -> None:
    """One flipped bit in a node's store: that node refuses to start and says why; the others go on."""
    victim = own_cluster.nodes[1]
    with engine.connect(own_cluster.client_config) as kq:
        _make_keys(kq)
        own_cluster.stop_node(victim)
        with contextlib.closing(sqlite3.connect(own_cluster.data_folder(victim) / "shares.db")) as store:
            (sealed,) = store.execute("SELECT sealed FROM keys WHERE name = 'data'").fetchone()
            flipped = sealed[:40] + bytes([sealed[40] ^ 4]) + sealed[41:]
            store.execute("UPDATE keys SET sealed = ? WHERE name = 'data'", (flipped,))
            store.commit()
        with pytest.raises(engine.ClusterError, match="not authentic"):
            own_cluster.start_node(victim)
        _use(kq)


def test_keys_outlive_the_members_that_made_them(own_cluster: LocalCluster) -> None:
    """A holder, and the client that ordered a key, leave the manifest: the key serves the others as before."""
    config = own_cluster.add_client("passing", [PolicyRule("passing", "*", ["*"])])
    with engine.connect(config) as passing:
        passing.create_key("legacy", "aes-256-gcm", threshold=3, shares=5)
        ciphertext = passing.encrypt("legacy", b"still here")
    leaver = own_cluster.nodes[4]
    _sign_without(own_cluster, {"passing", leaver})
    own_cluster.stop()
    own_cluster.start_balancer()
    for name in own_cluster.nodes[:4]:
        own_cluster.start_node(name)
    with engine.connect(own_cluster.client_config) as kq:
        kq.flush()
        assert kq.decrypt("legacy", ciphertext) == b"still here"
        assert kq.key_info("legacy").holders
        kq.create_key("fresh", "aes-256-gcm", threshold=2, shares=4)
        assert kq.decrypt("fresh", kq.encrypt("fresh", b"x")) == b"x"
    with pytest.raises(engine.EngineError), engine.connect(config) as gone:
        gone.decrypt("legacy", ciphertext)


def _sign_without(cluster: LocalCluster, names: set[str]) -> None:
    passphrase = (cluster.path / "secrets" / "operator.passphrase").read_text(encoding="ascii").strip()
    operator = load_identity(cluster.path / "operator" / "identity.toml", passphrase)
    manifest = cluster.path / "cluster.manifest"
    now = cluster.cluster
    chain = issue_cluster_manifest(
        name=now.name,
        members=[member for name, member in now.members.items() if name not in names],
        rules=[rule for rule in now.rules if rule.identity not in names],
        operators=[operator.signing],
        groups=now.groups,
        domain_level=now.domain_level,
        chain=manifest.read_bytes(),
    )
    manifest.write_bytes(chain)


def test_a_destruction_outlives_the_client_that_ordered_it(own_cluster: LocalCluster) -> None:
    """A holder that was down erases its share although the client has left the manifest meanwhile."""
    config = own_cluster.add_client("passing", [PolicyRule("passing", "*", ["*"])])
    late = own_cluster.nodes[1]
    with engine.connect(config) as passing:
        passing.create_key("gone", "aes-256-gcm", threshold=2, shares=5)
        own_cluster.kill(late)
        assert late in passing.destroy_key("gone").pending
    _sign_without(own_cluster, {"passing"})
    own_cluster.stop()
    own_cluster.start()
    with engine.connect(own_cluster.client_config) as kq:
        until = time.monotonic() + 15
        while _shares_of(kq, late) != 0:
            assert time.monotonic() < until, "the node kept the share of a destroyed key"
            time.sleep(0.1)
        with pytest.raises(engine.KeyNotFound):
            kq.key_info("gone")


def test_making_keys_does_not_keep_cold_keys_waiting(healed_cluster: LocalCluster) -> None:
    """While every node has a queue of RSA keys to make, another key is gathered and used inside its deadline."""
    with engine.connect(healed_cluster.client_config) as kq:
        _make_keys(kq)
        with ThreadPoolExecutor(20) as pool:
            making = [
                pool.submit(kq.create_key, f"slow/{number}", "rsa-4096-pss-sha256", threshold=3, shares=5, timeout=120)
                for number in range(20)
            ]
            for _ in range(10):
                kq.flush("data")
                assert kq.decrypt("data", kq.encrypt("data", b"x", timeout=DEADLINE_S), timeout=DEADLINE_S) == b"x"
            assert not all(each.done() for each in making), "the creations were over too soon to show anything"
            for each in making:
                assert each.result().algorithm == "rsa-4096-pss-sha256"


def test_a_flush_of_one_key_asks_its_holders(healed_cluster: LocalCluster) -> None:
    """A key on three of five nodes is flushed on those; an unknown one is KeyNotFound."""
    with engine.connect(healed_cluster.client_config) as kq:
        kq.create_key("small", "aes-256-gcm", threshold=2, shares=3)
        loaded = kq.prewarm("small")
        assert len(loaded) == 3
        assert kq.flush("small") == 3
        assert kq.flush("small") == 0
        with pytest.raises(engine.KeyNotFound):
            kq.flush("unknown")
