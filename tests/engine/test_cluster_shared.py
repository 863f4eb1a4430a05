"""Two nodes of one host on one token: each serves everything, and what one goes through does not disturb the other."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator

import pytest
from msgspec.structs import replace
from steering import prefer, until

import engine
from engine import ClusterError, Engine, LocalCluster
from engine.client.config import write_toml
from engine.protocol.manifest import Member
from engine.protocol.requests import NodeStatus

OWNER, SHARER, THIRD = "node1", "node2", "node3"
RECYCLE_LOADS = 12
DEADLINE_S = 30.0
KEYS = {
    "data": "aes-256-gcm",
    "mac": "hmac-sha256",
    "p256": "ecdsa-p256-sha256",
    "p384": "ecdsa-p384-sha384",
    "ed": "ed25519",
    "rsa": "rsa-2048-pss-sha256",
}
TROUBLES = ("token out of service", "canary failed", "could not be renewed")
"""What the log of a node tells when something is wrong with its token."""
SIGNING = ("p256", "p384", "ed", "rsa")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes, 2-of-3, two of them on one token; the one that shares it opens it anew after a few loads."""
    path = tmp_path_factory.mktemp("shared") / "kq"
    with LocalCluster(nodes=3, threshold=2, path=path, nodes_per_token=2) as made:
        made.stop_node(SHARER)
        config = made.path / "nodes" / SHARER / "node.toml"
        told = tomllib.loads(config.read_text(encoding="utf-8"))
        told["token"]["recycle_loads"] = RECYCLE_LOADS
        write_toml(config, told)
        made.start_node(SHARER)
        yield made


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as connected:
        for name, algorithm in KEYS.items():
            connected.create_key(name, algorithm, threshold=2, shares=3, timeout=60)
        yield connected


def status(kq: Engine, node: str) -> NodeStatus:
    """What the node says, as soon as it finds the time on a busy machine."""
    end = time.monotonic() + 90
    while True:
        found = next(member for member in kq.status(timeout=10) if member.name == node)
        if isinstance(found.status, NodeStatus):
            return found.status
        assert time.monotonic() < end, f"{node}: {found.error}"


def hits(kq: Engine, node: str) -> int:
    return sum(each.hits for each in status(kq, node).caches if each.cache == "keys")


class User:
    """A thread that uses keys at one node all the time, and has them loaded anew each time.

    That node has to serve it, and to have nothing to say of its token.
    """

    def __init__(self, cluster: LocalCluster, node: str) -> None:
        self.errors: list[BaseException] = []
        self.done = 0
        self._cluster, self._node = cluster, node
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._use)

    def __enter__(self) -> User:
        self._thread.start()
        until(lambda: bool(self.done or self.errors), "it begins")
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(60)

    def goes_on(self, kq: Engine, rounds: int = 5) -> None:
        before, served = self.done, hits(kq, self._node)
        until(lambda: self.done >= before + rounds or bool(self.errors), "it goes on")
        assert self.errors == []
        assert hits(kq, self._node) > served
        assert status(kq, self._node).health.problem == ""
        said = self._cluster.log_file(self._node).read_text()
        assert not [each for each in TROUBLES if each in said]

    def _use(self) -> None:
        try:
            with engine.connect(self._cluster.client_config) as kq:
                prefer(kq, self._node)
                while not self._ending.is_set():
                    for each in ("data", "p256"):
                        kq.flush(each)
                    sealed = kq.encrypt("data", b"kept", timeout=DEADLINE_S)
                    assert kq.decrypt("data", sealed, timeout=DEADLINE_S) == b"kept"
                    kq.verify("p256", b"m", kq.sign("p256", b"m", timeout=DEADLINE_S), timeout=DEADLINE_S)
                    self.done += 1
        except BaseException as error:
            self.errors.append(error)


def test_they_have_one_token_and_one_place(cluster: LocalCluster) -> None:
    members = cluster.cluster.nodes
    assert members[OWNER].location == members[SHARER].location != members[THIRD].location
    assert (cluster.data_folder(OWNER) / "tokens").is_dir()
    assert not (cluster.data_folder(SHARER) / "tokens").exists()
    assert len(list((cluster.path / "secrets").glob("*.pin"))) == 2


def test_each_serves_every_kind_of_operation(cluster: LocalCluster, kq: Engine) -> None:
    with engine.connect(cluster.client_config) as one, engine.connect(cluster.client_config) as two:
        users = {OWNER: one, SHARER: two}
        for node, user in users.items():
            prefer(user, node)
            before = hits(kq, node)
            tag = user.mac("mac", b"m", timeout=DEADLINE_S)
            for other in users.values():
                other.verify_mac("mac", b"m", tag, timeout=DEADLINE_S)
                sealed = user.encrypt("data", b"kept", associated_data=b"about", timeout=DEADLINE_S)
                assert other.decrypt("data", sealed, associated_data=b"about", timeout=DEADLINE_S) == b"kept"
                for name in SIGNING:
                    signature = user.sign(name, b"m", timeout=DEADLINE_S)
                    other.verify(name, b"m", signature, timeout=DEADLINE_S)
            assert hits(kq, node) > before
            made = user.create_key(f"by-{node}", "aes-256-gcm", threshold=2, shares=3, timeout=60)
            assert made.name == f"by-{node}"
            user.refresh_key(made.name, timeout=60)
            assert kq.decrypt(made.name, user.encrypt(made.name, b"x", timeout=DEADLINE_S), timeout=DEADLINE_S) == b"x"
            user.destroy_key(made.name, timeout=60)


def test_one_opens_the_token_anew_while_the_other_works(cluster: LocalCluster, kq: Engine) -> None:
    before = status(kq, SHARER).health.renewals
    with User(cluster, OWNER) as owner, User(cluster, SHARER) as sharer:
        until(lambda: status(kq, SHARER).health.renewals >= before + 2 or bool(owner.errors), "it is renewed")
        owner.goes_on(kq)
        sharer.goes_on(kq)
    assert owner.errors == sharer.errors == []
    assert status(kq, OWNER).health.renewals == 0


@pytest.mark.parametrize(("killed", "other"), [(SHARER, OWNER), (OWNER, SHARER)])
def test_one_is_killed_while_the_other_works(cluster: LocalCluster, kq: Engine, killed: str, other: str) -> None:
    config = cluster.path / "nodes" / killed / "node.toml"
    with User(cluster, other) as user:
        cluster.kill(killed)
        user.goes_on(kq)
        if killed == OWNER:
            command = [sys.executable, "-P", "-m", "nodes", "rotate-kek", "--config", str(config)]
            rotated = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert rotated.returncode == 1, rotated.stderr
            assert "is shared by 'node2', whose shares are sealed" in rotated.stderr
        cluster.start_node(killed)
        user.goes_on(kq)
    assert user.errors == []
    assert status(kq, killed).health.problem == ""


def test_in_two_failure_domains_they_raise_an_alarm_and_do_not_start(cluster: LocalCluster, kq: Engine) -> None:
    def places(location: str) -> list[Member]:
        members = cluster.cluster.members
        return [replace(each, location=location) if each.name == SHARER else each for each in members.values()]

    home = cluster.cluster.nodes[SHARER].location
    cluster.sign_manifest(places("elsewhere/room1/rack1/host1"))
    try:
        for node in (OWNER, SHARER):
            until(lambda: any("shares a token" in each for each in status(kq, node).alarms), node)  # noqa: B023
        assert kq.decrypt("data", kq.encrypt("data", b"still")) == b"still"
        cluster.stop_node(SHARER)
        with pytest.raises(ClusterError, match=r"shares a token with 'node1'.*'elsewhere' and 'site1'"):
            cluster.start_node(SHARER)
    finally:
        cluster.sign_manifest(places(home))
    cluster.start_node(SHARER)
    until(lambda: not status(kq, OWNER).alarms and not status(kq, SHARER).alarms, "all is well again")
