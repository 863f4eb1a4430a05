"""The supervisor's decisions, and real nodes under it: what ends them, what brings them back, and what does not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.client.local import _group, _Stamp
from engine.client.transport import ask
from engine.errors import EngineError
from engine.protocol.requests import Empty, Flush, NodeStatus
from nodes.supervisor import EXIT_CRASH_LOOP, MAX_RESTARTS, RUN_WELL_S, Patience, Restarts, lifeline_of, outcome
from pkcs11_shim import CKR, Shim, Who

NODE = "node1"


# --- decisions ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--config x", (True, None)),
        ("--config=x --lifeline 7 --log-level=debug", (True, 7)),
        ("--lifeline=12 --config x", (True, 12)),
        ("", (False, None)),
        ("--lifeline 7", (False, 7)),
        ("--config", (False, None)),
        ("--config x --lifeline seven", (False, None)),
        ("--config x --check-config", (False, None)),
        ("--config x --unsupervised", (False, None)),
        ("--supervised=1:2 --config x", (False, None)),
        ("--help", (False, None)),
        ("init --config x", (False, None)),
        ("check-token --config x", (False, None)),
        ("--config x --odd", (False, None)),
    ],
)
def test_only_a_node_that_serves_is_supervised(line: str, expected: tuple[bool, int | None]) -> None:
    assert lifeline_of(line.split()) == expected


@pytest.mark.parametrize(
    ("code", "first", "later"),
    [
        (0, "end", "end"),
        (1, "end", "end"),  # a mistake in the configuration
        (2, "end", "restart"),
        (3, "end", "end"),  # the PIN was refused: a restart would be another try
        (70, "end", "restart"),
        (-signal.SIGSEGV, "restart", "restart"),
        (-signal.SIGKILL, "restart", "restart"),
    ],
)
def test_what_follows_an_end(code: int, first: str, later: str) -> None:
    assert (outcome(code, served=False), outcome(code, served=True)) == (first, later)


def test_restarts_come_ever_later_and_at_last_no_more() -> None:
    restarts = Restarts()
    waits = [restarts.after_s(1.0) for _ in range(MAX_RESTARTS)]
    assert waits[0] == 0
    assert waits == sorted(waits, key=lambda wait: wait or 0)
    assert restarts.after_s(1.0) is None
    assert restarts.after_s(RUN_WELL_S) == 0
    assert restarts.after_s(1.0) == waits[1]


def test_time_in_which_nobody_ran_does_not_count() -> None:
    patience = Patience()
    assert patience.age_s(100.0, 100.5) == 0.5
    assert patience.age_s(100.0, 101.0) == 1.0
    assert patience.age_s(100.0, 500.0) == 2.0  # stopped, or starved
    assert patience.age_s(100.0, 500.5) == 2.5
    assert patience.age_s(500.2, 501.0) == pytest.approx(0.8)  # another call


# --- real nodes ---


def serving(node: Any) -> int | None:
    """The process that serves under a supervisor."""
    return next((pid for pid, parent in _group_of(node.pid).items() if parent == node.pid), None)


def _group_of(pid: int) -> dict[int, int]:
    return _group(os.getpgid(pid)) if _Stamp.of(pid) else {}


def status(folder: Any) -> NodeStatus | None:
    with folder.channel("alice") as channel:
        try:
            told: NodeStatus = ask(channel, NODE, "status", Empty(), 2)
        except EngineError:
            return None
        return told


@pytest.fixture
def shim(cluster_folder: Any, tmp_path: Path) -> Any:
    """node1 with a token, on a shim, which ends a call after two seconds."""
    assert cluster_folder.init(NODE).returncode == 0
    path = cluster_folder.config(NODE)
    with Shim(tmp_path / "shim") as made:
        told = f'[token]\nmodule = "{made.library}"\nhang_after_s = 2.0\n'
        path.write_text(path.read_text().replace("[token]\n", told))
        yield made


def killed_and_back(folder: Any, node: Any, until: Callable[..., Any], before: int | None) -> None:
    def back() -> bool:
        now = serving(node)
        return now not in (before, None) and status(folder) is not None

    until(back, "it is killed and serves again", 60)


def test_a_hung_node_is_killed_and_serves_again_what_it_had(
    cluster_folder: Any, shim: Shim, until: Callable[..., Any]
) -> None:
    """On the loop's lane (C_Encrypt, C_CreateObject), a talker's (C_Decrypt of a share), the slow worker's (C_Sign)."""
    node = cluster_folder.start(NODE, supervised=True)
    kept = cluster_folder.make_key(NODE, "aes-256-gcm")
    rsa = cluster_folder.make_key(NODE, "rsa-2048-pss-sha256")
    sealed = cluster_folder.operate(NODE, kept, "encrypt", b"kept")
    for function, key, verb in (
        ("C_Encrypt", kept, "encrypt"),
        ("C_CreateObject", kept, "encrypt"),
        ("C_Decrypt", kept, "encrypt"),
        ("C_Sign", rsa, "sign"),
    ):
        before = serving(node)
        with cluster_folder.channel("alice") as channel:
            ask(channel, NODE, "flush", Flush(""), 10)
        if function == "C_Encrypt":
            cluster_folder.operate(NODE, kept, "decrypt", sealed)
        # The keeper's canary seals and unseals too: it is not to be met.
        shim.hang(function, who=Who.FIRST if function in ("C_Encrypt", "C_CreateObject") else Who.OTHERS)
        with pytest.raises(EngineError):
            cluster_folder.operate(NODE, key, verb, bytes(32), timeout_s=1)
        until(lambda function=function: shim.fired(function) > 0, "it hangs")
        killed_and_back(cluster_folder, node, until, before)
        shim.clear()
        assert cluster_folder.operate(NODE, kept, "decrypt", sealed) == b"kept"
    assert node.log.count("node killed") == 4
    assert "a call of its token has gone on for" in node.log
    assert node.process.poll() is None
    assert node.end() == 0


def test_a_crash_in_the_module_is_followed_by_a_restart(
    cluster_folder: Any, shim: Shim, until: Callable[..., Any]
) -> None:
    node = cluster_folder.start(NODE, supervised=True)
    kept = cluster_folder.make_key(NODE)
    sealed = cluster_folder.operate(NODE, kept, "encrypt", b"kept")
    before = serving(node)
    shim.crash("C_Encrypt")
    with pytest.raises(EngineError):
        cluster_folder.operate(NODE, kept, "encrypt", b"x", timeout_s=2)
    killed_and_back(cluster_folder, node, until, before)
    assert cluster_folder.operate(NODE, kept, "decrypt", sealed) == b"kept"
    assert "it was ended by SIGSEGV" in node.log
    # A process that stands still gives no sign of life.
    before = serving(node)
    assert before is not None
    os.kill(before, signal.SIGSTOP)
    killed_and_back(cluster_folder, node, until, before)
    assert "it gave no sign of life" in node.log


@pytest.mark.long
def test_a_crash_loop_ends_with_a_code_of_its_own(cluster_folder: Any, shim: Shim) -> None:
    shim.crash("C_Login", times=MAX_RESTARTS + 1)
    node = cluster_folder.spawn(NODE, supervised=True)
    assert node.process.wait(300) == EXIT_CRASH_LOOP
    assert "node given up" in node.log
    assert shim.fired("C_Login") == MAX_RESTARTS + 1


def test_a_refused_pin_is_tried_once(cluster_folder: Any, shim: Shim) -> None:
    shim.fail("C_Login", CKR.PIN_LOCKED)
    node = cluster_folder.spawn(NODE, supervised=True)
    assert node.process.wait(60) == 3
    assert "PinLocked" in node.log
    assert shim.fired("C_Login") == 1


def test_a_mistake_is_told_once_and_ends_it(cluster_folder: Any) -> None:
    node = cluster_folder.spawn(NODE, supervised=True)  # it has no token
    assert node.process.wait(60) == 2
    assert "node restarted" not in node.log
    path = cluster_folder.config(NODE)
    path.write_text(path.read_text() + "\nodd = 1\n")
    node = cluster_folder.spawn(NODE, supervised=True)
    assert node.process.wait(60) == 1
    assert "odd" in node.log


@pytest.mark.parametrize("how", ["term", "kill", "lifeline"])
def test_supervisor_and_node_end_together(cluster_folder: Any, until: Callable[..., Any], how: str) -> None:
    assert cluster_folder.init(NODE).returncode == 0
    node = cluster_folder.start(NODE, supervised=True)
    child = serving(node)
    assert child is not None
    if how == "lifeline":
        spare = os.open(os.devnull, os.O_RDONLY)
        os.dup2(spare, node.lifeline)  # closes the pipe's only writer; the number stays valid for the clean-up
        os.close(spare)
    else:
        node.process.send_signal(signal.SIGTERM if how == "term" else signal.SIGKILL)
    assert node.process.wait(30) == (-signal.SIGKILL if how == "kill" else 0)
    until(lambda: _Stamp.of(child) is None, "the serving process is gone")
    assert ("stopped" in node.log) == (how != "kill")


def test_a_stopped_and_resumed_node_is_not_killed(cluster_folder: Any, shim: Shim) -> None:
    """Both its processes stand still, as when a machine is suspended: nobody hung."""
    node = cluster_folder.start(NODE, supervised=True)
    child = serving(node)
    assert child is not None
    for pid in (node.pid, child):
        os.kill(pid, signal.SIGSTOP)
    time.sleep(4)  # twice what a call may take
    for pid in (child, node.pid):
        os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    assert status(cluster_folder) is not None
    assert serving(node) == child
    assert "node killed" not in node.log
