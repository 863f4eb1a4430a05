"""The units of examples/systemd under a real systemd: node and balancer say that they are ready, alive, stopping."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from systemd_host import ROOT, SystemdHost, lacking

import engine
from engine import LocalCluster
from engine.notify import Notifier

UNITS = ROOT / "examples" / "systemd"
NODE, BALANCER = "keyquorum-node@node1", "keyquorum-balancer@balancer"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A socket where systemd's would be."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as received:
        received.bind(str(tmp_path / "notify"))
        received.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield received


def test_what_is_told(place: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    notifier = Notifier()
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    notifier.ready("serving")
    notifier.ready("serving again")
    for _ in range(3):
        notifier.alive()
    notifier.stopping()
    told = [place.recv(4096) for _ in range(4)]
    assert told == [b"READY=1\nSTATUS=serving", b"STATUS=serving again", b"WATCHDOG=1", b"STOPPING=1\nSTATUS=stopping"]


def test_the_watchdog_of_another_process_is_not_fed(place: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    notifier = Notifier()
    notifier.alive()
    notifier.status("here")
    assert place.recv(4096) == b"STATUS=here"


def test_without_systemd_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    Notifier().ready("serving")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "gone"))
    Notifier().ready("serving")


def test_the_units_under_a_real_systemd(tmp_path: Path, until: Callable[..., Any]) -> None:
    """Ready when they serve; killed and started anew by the watchdog; the PIN as a credential; a clean end."""
    if reason := lacking():
        pytest.skip(f"THE SYSTEMD UNITS WERE NOT TESTED: {reason}")
    with LocalCluster(nodes=3, threshold=2, path=tmp_path / "kq") as local:
        with engine.connect(local.client_config) as kq:
            kq.create_key("k", "aes-256-gcm", threshold=2, shares=3)
            sealed = kq.encrypt("k", b"kept")
        local.stop_node("node1")
        local.stop_node("balancer")
        host = SystemdHost(tmp_path / "host")
        for name, home in (("node1", local.path / "nodes" / "node1"), ("balancer", local.path / "balancer")):
            _settle(local.path, home, host.lib / name)
        shutil.copy(local.path / "secrets" / "node1.pin", host.etc / "node1.pin")
        host.give(host.lib)
        for unit in UNITS.glob("*.service"):
            assert "WatchdogSec=" in unit.read_text(encoding="utf-8")
            host.install(unit, "WatchdogSec=4", "TimeoutAbortSec=4", "RestartSec=0")
        with host.running():
            for unit in (BALANCER, NODE):
                host.systemctl("start", unit)  # comes back when it is ready
                assert host.show(unit, "ActiveState") == "active"
                assert host.show(unit, "StatusText") == "serving"
            pid = int(host.show(NODE, "MainPID"))
            environment = host.run("cat", f"/proc/{pid}/environ").stdout
            assert (host.etc / "node1.pin").read_text(encoding="utf-8").strip() not in environment
            with engine.connect(local.client_config) as kq:
                until(lambda kq=kq: all(each.error is None for each in kq.status()), "all are up", 30)
                assert kq.decrypt("k", sealed) == b"kept"
                kq.create_key("new", "aes-256-gcm", threshold=2, shares=3)
            for unit in (BALANCER, NODE):
                stopped = int(host.show(unit, "MainPID"))
                host.run("kill", f"-{signal.SIGSTOP.value}", str(stopped))
                until(lambda unit=unit, old=stopped: _came_back(host, unit, old), f"{unit} is started anew", 90)
                assert host.show(unit, "NRestarts") == "1"
            with engine.connect(local.client_config) as kq:
                until(lambda kq=kq: all(each.error is None for each in kq.status()), "all are up", 30)
                assert kq.decrypt("k", sealed) == b"kept"
            for unit in (NODE, BALANCER):
                host.systemctl("stop", unit)
                assert host.show(unit, "Result") == "success", host.log()  # "timeout" if it had to be killed


def _settle(local: Path, home: Path, place: Path) -> None:
    """A member's folder as it lies on a host of its own: the manifest in it, its PIN a credential."""
    shutil.copytree(home, place)
    shutil.copy(local / "cluster.manifest", place)
    for path in place.glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        for up in ("../../", "../"):
            text = text.replace(f'"{up}cluster.manifest"', '"cluster.manifest"')
        path.write_text(text.replace("file:../../secrets/", "credential:"), encoding="utf-8")


def _came_back(host: SystemdHost, unit: str, old: int) -> bool:
    return host.show(unit, "MainPID") not in ("0", str(old)) and host.show(unit, "ActiveState") == "active"
