"""A manifest is taken by running processes: members come and go, and the policy changes, without a restart."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

import engine
import engine.aio
from engine import Engine, LocalCluster, PolicyRule
from engine.client.config import load_identity
from engine.client.membership import Servers
from engine.client.spreading import push, serial_at
from engine.client.transport import Channel, Greeting, connect_options
from engine.errors import AccessDenied, EngineError, ManifestError
from engine.protocol._nodestate import SNAPSHOT_MAX_AGE_S, NodeState
from engine.protocol.manifest import issue_cluster_manifest

EVERYTHING = [PolicyRule("*", "*", ["*"])]
WAIT_S = 20.0


def wait_for(what: Callable[[], bool]) -> bool:
    """Whether it comes true within the time."""
    until_s = time.monotonic() + WAIT_S
    while not what():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = tmp_path_factory.mktemp("live") / "kq"
    with LocalCluster(nodes=5, threshold=3, path=path, clients=("local", "other"), rules=EVERYTHING) as running:
        yield running


@pytest.fixture(scope="module")
def kq(local: LocalCluster) -> Iterator[Engine]:
    with engine.connect(local.client_config) as connected:
        connected.create_key("orders", "aes-256-gcm", threshold=3, shares=5)
        connected.create_key("tls", "ecdsa-p256-sha256", threshold=3, shares=5)
        yield connected


@contextlib.contextmanager
def under_load(kq: Engine, name: str = "orders") -> Iterator[list[Exception]]:
    """Encrypts and decrypts beside the block; the errors that came, and that something went through."""
    errors: list[Exception] = []
    stop, done = threading.Event(), [0]

    def work() -> None:
        while not stop.is_set():
            data = os.urandom(64)
            try:
                assert kq.decrypt(name, kq.encrypt(name, data)) == data
                done[0] += 1
            except Exception as error:  # told to the test
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        assert wait_for(lambda: done[0] > 0)
        yield errors
        before = done[0]
        assert wait_for(lambda: done[0] > before + 5 or bool(errors))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_client_comes_and_goes_without_a_restart(local: LocalCluster, kq: Engine) -> None:
    """It works at once; taken out, its very next request on the open connections is refused; others notice nothing."""
    before = local.running()
    with under_load(kq) as errors:
        config = local.add_client("guest")
        with engine.connect(config) as guest:
            sealed = guest.encrypt("orders", b"from the guest")
            assert kq.decrypt("orders", sealed) == b"from the guest"
            cluster = local.cluster
            local.sign_manifest([each for each in cluster.members.values() if each.name != "guest"])
            for _ in range(3):
                with pytest.raises(EngineError):
                    guest.encrypt("orders", b"no more", timeout=1.0)
        with engine.connect(config) as again, pytest.raises(EngineError):
            again.encrypt("orders", b"no more", timeout=2.0)
    assert not errors
    assert local.running() == before


def test_a_revoked_connection_is_refused_and_cut(local: LocalCluster, kq: Engine) -> None:
    """On a raw connection that stays open: the message after the manifest gets no answer, and the connection ends."""
    config = local.add_client("raw")
    identity = load_identity(config.parent / "identity.toml")
    node = local.cluster.nodes["node1"]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        connect_options(socket, identity.transport, node)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        socket.connect(node.endpoint)
        hello = Greeting("node1").frame(1)
        socket.send(hello)
        assert socket.poll(WAIT_S * 1000)
        socket.recv()
        local.sign_manifest([each for each in local.cluster.members.values() if each.name != "raw"])
        with contextlib.suppress(zmq.Again):  # it may be cut already
            socket.send(hello, zmq.DONTWAIT)
        assert monitor.poll(WAIT_S * 1000), "the connection was not cut"
        assert not socket.poll(300), "a revoked client got an answer"
        socket.disable_monitor()
        monitor.close(0)


def test_a_revoked_subscriber_gets_no_further_table(local: LocalCluster, kq: Engine) -> None:
    """From the moment that the balancer goes by the manifest nothing comes any more; a member goes on."""
    config = local.add_client("reader")
    identity = load_identity(config.parent / "identity.toml")
    balancer = local.cluster.members["balancer"]
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        connect_options(socket, identity.transport, balancer)
        socket.subscribe(b"")
        socket.connect(balancer.publish_endpoint)
        assert socket.poll(WAIT_S * 1000), "a member gets tables"
        socket.recv()
        local.sign_manifest([each for each in local.cluster.members.values() if each.name != "reader"])
        while socket.poll(0):
            socket.recv()  # what was sent before
        installed = kq.table_stats.installed
        assert wait_for(lambda: kq.table_stats.installed >= installed + 3)
        assert not socket.poll(0), "a revoked subscriber got a table"


def test_the_policy_changes_at_once(local: LocalCluster, kq: Engine) -> None:
    """A rule that is taken away forbids the next request, also with a loaded key; given back, it allows it."""
    with engine.connect(local.client_config_of("other")) as other:
        other.sign("tls", b"m")
        rules = [PolicyRule("local", "*", ["*"]), PolicyRule("other", "*", ["encrypt"])]
        local.sign_manifest(rules=rules)
        with pytest.raises(AccessDenied):
            other.sign("tls", b"m")
        other.encrypt("orders", b"m")
        local.sign_manifest(rules=EVERYTHING)
        other.sign("tls", b"m")


def test_clients_follow(local: LocalCluster, kq: Engine) -> None:
    """A client that runs goes by the newest manifest within seconds, without a failed call."""
    with under_load(kq) as errors:
        taken = local.sign_manifest()
        assert wait_for(lambda: kq.cluster.serial == taken.serial)
    assert not errors


def _own_files(local: LocalCluster) -> None:
    """Give every member a manifest file of its own, as on several hosts."""
    for config in (*local.path.glob("nodes/*/node.toml"), local.path / "balancer" / "balancer.toml"):
        shutil.copy(local.path / "cluster.manifest", config.parent / "cluster.manifest")
        text = config.read_text().replace("../../cluster.manifest", "cluster.manifest")
        config.write_text(text.replace("../cluster.manifest", "cluster.manifest"))


def _next_chain(local: LocalCluster, chain: bytes, rules: Sequence[PolicyRule] = EVERYTHING) -> bytes:
    operator = load_identity(local.path / "operator" / "identity.toml", _passphrase(local))
    cluster = local.cluster
    return issue_cluster_manifest(
        name=cluster.name,
        members=list(cluster.members.values()),
        rules=rules,
        operators=[operator.signing],
        groups=cluster.groups,
        domain_level=cluster.domain_level,
        chain=chain,
    )


def _passphrase(local: LocalCluster) -> str:
    return (local.path / "secrets" / "operator.passphrase").read_text().strip()


def test_manifests_travel_between_hosts(tmp_path: Path) -> None:
    """Brought to one node, all have it soon, also one that was down through two; forks and forgeries get nowhere."""
    with LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as local:
        local.stop()
        _own_files(local)
        local.start()
        identity = load_identity(local.client_config.parent / "identity.toml")
        first = (local.path / "cluster.manifest").read_bytes()
        second = _next_chain(local, first)
        third = _next_chain(local, second)
        fork = _next_chain(local, first, [PolicyRule("local", "*", ["*"])])
        with zmq.Context() as context, Channel(identity.transport, Servers(local.cluster), context) as channel:
            everybody = ["node1", "node2", "node3", "balancer"]

            def all_have(serial: int, names: Sequence[str]) -> bool:
                return all(_serial(channel, name) == serial for name in names)

            local.kill("node3")
            assert push(channel, "node1", second, 2) == 2
            assert wait_for(lambda: all_have(2, ["node1", "node2", "balancer"]))
            assert push(channel, "balancer", third, 3) == 3
            assert wait_for(lambda: all_have(3, ["node1", "node2", "balancer"]))
            local.start_node("node3")
            assert wait_for(lambda: all_have(3, everybody))
            assert (local.path / "nodes" / "node3" / "cluster.manifest").read_bytes() == third

            for name in everybody:
                with pytest.raises(ManifestError, match="two manifests with serial 2"):
                    push(channel, name, fork, 2)
                assert push(channel, name, second, 2) == 3  # older: nothing happens
            assert all_have(3, everybody)
            with engine.connect(local.client_config) as kq:
                alarms = {each.name: each.status.alarms for each in kq.status() if each.role == "node" and each.status}
            assert all(any("two manifests" in text for text in told) for told in alarms.values()), alarms

            (local.path / "nodes" / "node2" / "cluster.manifest").write_bytes(fork)
            time.sleep(2.5)
            assert all_have(3, everybody)
            local.kill("node2")
            with pytest.raises(EngineError):
                local.start_node("node2")  # a file that was put back does not lead it back
            (local.path / "nodes" / "node2" / "cluster.manifest").write_bytes(third)
            local.start_node("node2")
            assert wait_for(lambda: all_have(3, everybody))


def _serial(channel: Channel, name: str) -> int:
    try:
        return serial_at(channel, name)
    except EngineError:
        return 0


def test_a_node_that_is_taken_out_serves_no_more(tmp_path: Path) -> None:
    """It says so itself, the others don't speak to it, and keys with holders enough go on."""
    with LocalCluster(nodes=4, threshold=2, path=tmp_path / "kq") as local, engine.connect(local.client_config) as kq:
        kq.create_key("k", "aes-256-gcm", threshold=2, shares=4)
        sealed = kq.encrypt("k", b"data")
        with under_load(kq, "k") as errors:
            local.sign_manifest([each for each in local.cluster.members.values() if each.name != "node2"])
            assert wait_for(lambda: "node2" not in kq.cluster.nodes)
            for _ in range(20):
                assert kq.decrypt("k", sealed) == b"data"
        assert not errors
        told = [each.name for each in kq.status() if each.role == "node"]
        assert told == ["node1", "node3", "node4"]
        assert wait_for(lambda: "removed from the cluster" in local.log_file("node2").read_text())


# --- what nodes publish ---


def state_of(kq: Any, node: str) -> NodeState:
    """What a client's router knows of a node."""
    state: NodeState = kq._calls.router._state(node)
    return state


def is_heard(kq: Any, node: str) -> bool:
    return time.monotonic() - state_of(kq, node).seen_s <= SNAPSHOT_MAX_AGE_S


def test_a_client_hears_of_nodes_that_it_never_asked(local: LocalCluster) -> None:
    """Both kinds of client, by what the nodes publish."""
    with engine.connect(local.client_config) as client:
        assert wait_for(lambda: all(is_heard(client, name) for name in local.nodes))
        assert client.table_stats.refused == 0

    async def main() -> bool:
        async with engine.aio.connect(local.client_config) as client:
            return await asyncio.to_thread(
                lambda: wait_for(lambda: all(is_heard(client, name) for name in local.nodes))
            )

    assert asyncio.run(main())


def test_the_queue_of_a_busy_node_reaches_a_client_that_asks_nobody(local: LocalCluster, kq: Engine) -> None:
    """One client has nodes sign with RSA many at a time; another one's router sees them wait there."""
    kq.create_key("slow", "rsa-2048-pss-sha256", threshold=3, shares=5)
    with engine.connect(local.client_config) as other:
        seen: set[int] = set()
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.005):
                seen.update(
                    round(told.excess + told.mean_queue) for name in local.nodes if (told := state_of(other, name))
                )

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            assert wait_for(lambda: bool(kq.sign_many("slow", [b"m"] * 100)) and max(seen, default=0) > 0)
        finally:
            done.set()
            watcher.join()


def test_a_stopped_node_is_heard_no_more_until_it_goes_on(local: LocalCluster) -> None:
    """What was heard of it grows old, and the router forgets it by itself."""
    with engine.connect(local.client_config) as client:
        state = state_of(client, "node2")
        assert wait_for(lambda: is_heard(client, "node2"))
        parent = local.running()["node2"]
        pids = [parent, *map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            assert wait_for(lambda: not is_heard(client, "node2"))
            before = state.seen_s
            time.sleep(0.3)
            assert state.seen_s == before
        finally:
            for pid in reversed(pids):  # the supervisor last: it ends a child that does not move
                os.kill(pid, signal.SIGCONT)
        assert wait_for(lambda: is_heard(client, "node2"))
