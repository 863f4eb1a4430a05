"""Failpoints: what the variable may say, and that nothing happens without it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

import engine
from engine import failpoints


@pytest.fixture(autouse=True)
def _all_off() -> Iterator[None]:
    yield
    failpoints.arm({})


def test_nothing_happens_by_default() -> None:
    """Passing every place does nothing as long as none is set."""
    for name in failpoints.POINTS:
        failpoints.failpoint(name)


def test_error_at_one_passing() -> None:
    """@N is the N-th passing alone; without it each one."""
    failpoints.arm(failpoints.parse("dealer.create.dealt=error@2; holder.commit.written = error ;"))
    failpoints.failpoint("dealer.create.dealt")
    with pytest.raises(engine.EngineError, match=r"dealer\.create\.dealt"):
        failpoints.failpoint("dealer.create.dealt")
    failpoints.failpoint("dealer.create.dealt")
    for _ in range(2):
        with pytest.raises(engine.EngineError, match=r"holder\.commit\.written"):
            failpoints.failpoint("holder.commit.written")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dealer.create.gone=kill", "dealer.create.gone"),
        ("gone" * 1_000 + "=kill", r"called '(gone){20}'$"),
        ("?" * 4_000, r"FAILPOINTS: '\?{80}' is not"),
        ("dealer.create.dealt=die", "die"),
        ("dealer.create.dealt", "name=kill"),
        ("dealer.create.dealt=kill@0", "@0"),
        ("dealer.create.dealt=kill@1000001", "1000001"),
        ("dealer.create.dealt=delay:60001", "60001"),
        ("dealer.create.dealt=delay", "delay:MS"),
        ("dealer.create.dealt=kill;dealer.create.dealt=error", "twice"),
    ],
)
def test_a_bad_value_is_named(text: str, told: str) -> None:
    """An unknown name, action or number is a ConfigError that says which."""
    with pytest.raises(engine.ConfigError, match=told):
        failpoints.parse(text)


def test_a_process_dies_where_it_is_told() -> None:
    """kill is SIGKILL to the process itself at that passing, and what is set is logged as a warning."""
    program = (
        "from engine.failpoints import *\n"
        "arm_from_environment(); failpoint('dealer.create.dealt')\n"
        "print('once', flush=True); failpoint('dealer.create.dealt'); print('twice', flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={failpoints.VARIABLE: "dealer.create.dealt=kill@2"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -9
    assert done.stdout.splitlines()[-1] == "once"
    assert "failpoints are set" in done.stdout + done.stderr
    assert "dealer.create.dealt=kill@2" in done.stdout + done.stderr


def test_a_process_stops_where_it_is_told() -> None:
    """stop is SIGSTOP to the process itself: it goes on by SIGCONT."""
    program = (
        "from engine.failpoints import *\n"
        "arm_from_environment(); failpoint('dealer.create.dealt'); print('further', flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", program],
        env={failpoints.VARIABLE: "dealer.create.dealt=stop"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            _, status = os.waitpid(process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            process.send_signal(signal.SIGCONT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out.splitlines()[-1]) == (0, "further")


@pytest.mark.parametrize("module", ["nodes", "balancer"])
def test_a_server_refuses_a_wrong_variable(module: str) -> None:
    """Nodes and balancer end with exit code 1 and the bad part's name before they open anything."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", module, "--config", "/nowhere"],
        env={failpoints.VARIABLE: "holder.nowhere=kill"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "holder.nowhere" in done.stderr
