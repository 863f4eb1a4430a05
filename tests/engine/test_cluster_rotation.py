"""Members change their CURVE keys while the cluster works: both keys are good until the old one is retired."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq
from ports import free_port

import engine
from engine import Engine, LocalCluster
from engine.client.config import CurveIdentity, Identity, forget_retiring, load_identity, rotate_curve
from engine.client.transport import Channel
from engine.errors import ConfigError, EngineError
from engine.protocol.manifest import Member, Retiring
from engine.protocol.requests import HELLO, Hello, Welcome

WAIT_S = 20.0


def wait_for(what: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + WAIT_S
    while not what():
        if time.monotonic() > until_s:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    path = tmp_path_factory.mktemp("rotation") / "kq"
    with LocalCluster(nodes=3, threshold=2, path=path, clients=("local", "other")) as running:
        yield running


@pytest.fixture(scope="module")
def kq(local: LocalCluster) -> Iterator[Engine]:
    with engine.connect(local.client_config) as connected:
        connected.create_key("k", "aes-256-gcm", threshold=2, shares=3)
        yield connected


@contextlib.contextmanager
def under_load(kq: Engine) -> Iterator[list[Exception]]:
    """Uses and refreshes beside the block; the errors that came."""
    errors: list[Exception] = []
    stop, done = threading.Event(), [0, 0]

    def use() -> None:
        while not stop.is_set():
            data = os.urandom(64)
            try:
                assert kq.decrypt("k", kq.encrypt("k", data)) == data
                done[0] += 1
            except Exception as error:  # told to the test
                errors.append(error)

    def refresh() -> None:
        while not stop.is_set():
            try:
                kq.refresh_key("k", timeout=15.0)
                done[1] += 1
            except Exception as error:  # told to the test
                errors.append(error)
            stop.wait(0.5)

    threads = [threading.Thread(target=use), threading.Thread(target=refresh)]
    for thread in threads:
        thread.start()
    try:
        assert wait_for(lambda: min(done) > 0 or bool(errors))
        yield errors
        before = list(done)
        assert wait_for(lambda: (done[0] > before[0] + 5 and done[1] > before[1]) or bool(errors))
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def folder_of(local: LocalCluster, name: str) -> Path:
    if name == "balancer":
        return local.path / "balancer"
    return local.path / ("nodes" if name.startswith("node") else "clients") / name


def rotate(local: LocalCluster, name: str, *, elsewhere: bool) -> tuple[Identity, Member]:
    """A fresh key in the identity file, and a manifest with both; ``elsewhere``: the new one at a port of its own."""
    old = local.cluster.members[name]
    fresh = rotate_curve(folder_of(local, name) / "identity.toml")
    endpoint, publish = old.endpoint, old.publish_endpoint
    if elsewhere and endpoint:
        endpoint = f"tcp://127.0.0.1:{free_port()}"
        publish = publish and f"tcp://127.0.0.1:{free_port()}"
    member = fresh.member(endpoint=endpoint, publish_endpoint=publish, location=old.location)
    members = [member if each.name == name else each for each in local.cluster.members.values()]
    local.sign_manifest(members, retiring=[Retiring(name, old.curve_public, old.endpoint, old.publish_endpoint)])
    return fresh, old


def answers(pair: CurveIdentity, member: Member) -> bool:
    """Whether a server lets this pair in and answers."""
    with zmq.Context() as context, Channel(pair, {member.name: member}, context) as channel:
        try:
            told: Welcome = engine.client.transport.ask(channel, member.name, HELLO, Hello(1, "test"), 1.0)
        except EngineError:
            return False
        return told.name == member.name


@pytest.mark.parametrize("name", ["node2", "balancer"])
def test_a_server_changes_its_key_under_load(local: LocalCluster, kq: Engine, name: str) -> None:
    """Both keys are served, each at its endpoint; retired, the old endpoint is closed. No client sees an error."""
    client = load_identity(local.client_config.parent / "identity.toml").transport
    pids = local.running()
    with under_load(kq) as errors:
        fresh, old = rotate(local, name, elsewhere=True)
        new = local.cluster.members[name]
        assert new.curve_public == fresh.transport.raw_public != old.curve_public
        assert wait_for(lambda: answers(client, new))
        assert answers(client, old)  # who is behind goes on
        assert wait_for(lambda: kq.cluster.serial == local.cluster.serial)
        local.sign_manifest()
        assert wait_for(lambda: not answers(client, old))
        assert answers(client, new)
        forget_retiring(folder_of(local, name) / "identity.toml")
        installed = kq.table_stats.installed
        assert wait_for(lambda: kq.table_stats.installed > installed + 1)  # tables come by the new key too
    assert not errors
    assert local.running() == pids
    local.stop_node(name)
    local.start_node(name)  # with the new key alone
    assert answers(client, new)


def test_a_server_changes_its_key_at_its_endpoint(local: LocalCluster, kq: Engine) -> None:
    """Without a second port the new key takes the place of the old; clients go on by what they ask of others."""
    client = load_identity(local.client_config.parent / "identity.toml").transport
    with under_load(kq) as errors:
        _, old = rotate(local, "node3", elsewhere=False)
        assert wait_for(lambda: answers(client, local.cluster.members["node3"]))
        assert not answers(client, old)
        local.sign_manifest()
        forget_retiring(folder_of(local, "node3") / "identity.toml")
    # A refresh needs every holder at once, so one under way may fail; uses may not.
    assert not [each for each in errors if "refresh" not in str(each)]


def test_a_client_changes_its_key_under_load(local: LocalCluster, kq: Engine) -> None:
    """Both keys are let in until the old one is retired; then the old one is cut off, and the client goes on."""
    node = local.cluster.members["node1"]
    with under_load(kq) as errors:
        fresh, _ = rotate(local, "local", elsewhere=False)
        assert fresh.retiring is not None
        assert answers(fresh.transport, node)
        assert answers(fresh.retiring, node)
        assert wait_for(lambda: kq.cluster.serial == local.cluster.serial)
        local.sign_manifest()
        assert wait_for(lambda: not answers(fresh.retiring, node))  # type: ignore[arg-type]
        assert answers(fresh.transport, node)
        assert wait_for(lambda: kq.cluster.serial == local.cluster.serial)
    assert not [each for each in errors if "refresh" not in str(each)]
    forget_retiring(folder_of(local, "local") / "identity.toml")
    with engine.connect(local.client_config) as again:
        again.encrypt("k", b"data")


def test_a_second_change_waits_for_the_first(local: LocalCluster, tmp_path: Path) -> None:
    """An identity file has room for one retiring key; the secrets of neither are shown."""
    file = tmp_path / "identity.toml"
    file.write_bytes((folder_of(local, "other") / "identity.toml").read_bytes())
    file.chmod(0o600)
    fresh = rotate_curve(file)
    with pytest.raises(ConfigError, match="not over"):
        rotate_curve(file)
    assert fresh.retiring is not None
    assert fresh.transport.secret.decode() not in repr(fresh)
    assert fresh.retiring.secret.decode() not in repr(fresh)
    forget_retiring(file)
    assert load_identity(file).retiring is None
    assert load_identity(file).transport.public == fresh.transport.public
    assert (file.stat().st_mode & 0o777) == 0o600
