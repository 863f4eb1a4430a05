"""A cluster one of whose tokens plays sick, and one of whose tokens is no SoftHSM: clients notice neither."""

from __future__ import annotations

import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from steering import prefer, until

import engine
from engine import Engine, LocalCluster
from engine.client.config import write_toml
from engine.protocol.requests import NodeStatus
from pkcs11_shim import CKR, NSS_LABEL, Shim, nss_token

SICK, OTHER = "node1", "node5"
DEADLINE_S = 5.0
KEYS = {"data": "aes-256-gcm", "sign": "ecdsa-p256-sha256", "rsa": "rsa-2048-pss-sha256", "mac": "hmac-sha256"}


def change_token(cluster: LocalCluster, node: str, **values: Any) -> None:
    path = cluster.path / "nodes" / node / "node.toml"
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    told["token"] |= values
    write_toml(path, told)


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shim]:
    with Shim(tmp_path_factory.mktemp("shim")) as made:
        yield made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, shim: Shim) -> Iterator[LocalCluster]:
    """Five nodes: one on a shim, one on NSS's softokn, which has no key yet."""
    folder = tmp_path_factory.mktemp("tokens")
    with (
        LocalCluster(nodes=5, threshold=3, path=folder / "kq") as made,
        nss_token(folder / "nss", made.path / "secrets" / f"{OTHER}.pin") as other,
    ):
        made.stop()
        change_token(made, SICK, module=str(shim.library), hang_after_s=2.0, canary_every_s=0.5)
        change_token(made, OTHER, module=str(other.library), label=NSS_LABEL)
        for file in made.data_folder(OTHER).glob("shares.db*"):
            file.unlink()
        made.start()
        yield made


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as connected:
        for name, algorithm in KEYS.items():
            connected.create_key(name, algorithm, threshold=3, shares=5, timeout=60)
        yield connected


def status(kq: Engine, node: str) -> NodeStatus | None:
    found = next(member.status for member in kq.status() if member.name == node)
    return found if isinstance(found, NodeStatus) else None


def is_well(kq: Engine, node: str) -> bool:
    found = status(kq, node)
    return found is not None and not found.health.problem


class Users:
    """Threads that use every key all the time, one of them at the sick node first, and what they met."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.errors: list[BaseException] = []
        self.done = 0
        self._cluster = cluster
        self._ending = threading.Event()
        self._threads = [threading.Thread(target=self._use, args=(go_to_sick,)) for go_to_sick in (False, True)]

    def __enter__(self) -> Users:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join(60)

    def _use(self, go_to_sick: bool) -> None:
        try:
            with engine.connect(self._cluster.client_config) as kq:
                if go_to_sick:
                    prefer(kq, SICK)
                while not self._ending.is_set():
                    sealed = kq.encrypt("data", b"kept", timeout=DEADLINE_S)
                    assert kq.decrypt("data", sealed, timeout=DEADLINE_S) == b"kept"
                    for name in ("sign", "rsa"):
                        kq.verify(name, b"m", kq.sign(name, b"m", timeout=DEADLINE_S), timeout=DEADLINE_S)
                    kq.verify_mac("mac", b"m", kq.mac("mac", b"m", timeout=DEADLINE_S), timeout=DEADLINE_S)
                    kq.flush("data")
                    self.done += 1
        except BaseException as error:
            self.errors.append(error)


def lock_pin(shim: Shim) -> None:
    shim.fail("C_Login", CKR.PIN_LOCKED)
    shim.fail("C_EncryptInit", CKR.SESSION_CLOSED, times=1)


def slow_down(shim: Shim) -> None:
    for function in ("C_Encrypt", "C_Sign"):
        shim.delay(function, 0.3)


FAULTS: dict[str, Callable[[Shim], None]] = {
    "session lost": lambda shim: shim.fail("C_EncryptInit", CKR.SESSION_HANDLE_INVALID, times=1),
    "login lost": lambda shim: shim.fail("C_SignInit", CKR.USER_NOT_LOGGED_IN, times=1),
    "removed": lambda shim: shim.fail_all(("C_EncryptInit", "C_OpenSession", "C_SignInit"), CKR.DEVICE_REMOVED),
    "slow": slow_down,
    "full": lambda shim: shim.fail("C_CreateObject", CKR.DEVICE_MEMORY, times=20),
    "hang in C_Encrypt": lambda shim: shim.hang("C_Encrypt"),
    "hang in C_Sign": lambda shim: shim.hang("C_Sign"),
    "hang in C_Decrypt": lambda shim: shim.hang("C_Decrypt"),
    "hang in C_CreateObject": lambda shim: shim.hang("C_CreateObject"),
    "crash": lambda shim: shim.crash("C_Sign"),
    "PIN locked": lock_pin,
}


SAYS = {
    "session lost": "token renewed",
    "login lost": "token renewed",
    "removed": "token out of service",
    "full": "the token is full",
    "hang": "node killed",
    "crash": "it was ended by SIGSEGV",
    "PIN locked": "the PIN is not tried again",
}
"""What the node's log tells of a fault."""


def test_whatever_one_token_does_the_others_serve(cluster: LocalCluster, kq: Engine, shim: Shim) -> None:
    """No error beyond the client's own retries within its deadline, and no wrong result; then the node is back."""
    for name, begin in FAULTS.items():
        with Users(cluster) as users:
            until(lambda: users.done >= 2 or bool(users.errors), "they begin")
            before = users.done
            said = cluster.log_file(SICK).read_text()
            begin(shim)
            expected = SAYS.get(name.partition(" in ")[0])
            if expected:
                until(
                    lambda: cluster.log_file(SICK).read_text().count(expected) > said.count(expected),  # noqa: B023
                    f"{name}: {expected}",
                    lambda: f"{status(kq, SICK)}, its log ends: {cluster.log_file(SICK).read_text()[-2000:]}",
                )
            else:
                time.sleep(2.0)
            until(lambda: users.done >= before + 4 or bool(users.errors), f"{name}: they go on")  # noqa: B023
            if name == "PIN locked":
                until(lambda: "not tried again" in str(status(kq, SICK)), "its status says so")
            shim.clear()
        assert users.errors == [], name
        if name == "PIN locked":
            cluster.restart(SICK)
        until(lambda: is_well(kq, SICK), f"{name}: it is back")


def test_a_node_on_another_module_serves_alone_what_it_can(cluster: LocalCluster, kq: Engine) -> None:
    found = status(kq, OTHER)
    assert found is not None
    assert "NSS" in found.token
    sealed = kq.encrypt("data", b"kept")
    # Of the five holders three stay: the two others give it their shares.
    for node in ("node1", "node2"):
        cluster.stop_node(node)
    try:
        before = status(kq, OTHER)
        assert before is not None
        with engine.connect(cluster.client_config) as user:
            prefer(user, OTHER)
            user.flush("data")
            assert user.decrypt("data", sealed, timeout=30) == b"kept"
            user.verify("sign", b"m", user.sign("sign", b"m", timeout=30), timeout=30)
        after = status(kq, OTHER)
        assert after is not None
        assert after.health.made > before.health.made
    finally:
        for node in ("node1", "node2"):
            cluster.start_node(node)
