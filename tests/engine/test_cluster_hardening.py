"""Nodes and balancer keep their memory to themselves: no core dump, no look by the same user, no child that shares it.

The cluster and the one who looks are processes of one user, without the right over all processes that root has.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNPRIVILEGED = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 19, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_SYS_PTRACE; for others than root there is none
os.execv(sys.executable, [sys.executable, "-c", *sys.argv[1:]])
"""

HOST = """
import ctypes, json, sys, engine
ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, any: the control, also under Yama
with engine.LocalCluster(nodes=2, threshold=2, path=sys.argv[1]) as local:
    with engine.connect(local.client_config) as kq:
        kq.create_key("k", "aes-256-gcm", threshold=2, shares=2)
        kq.encrypt("k", b"x")
    print(json.dumps([local.serving(), local.running()]), flush=True)
    sys.stdin.read()
"""
LOOK = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long
def outcome(look):
    try:
        look()
        return "done"
    except OSError as error:
        return type(error).__name__
def attach(pid):
    if libc.ptrace(16, pid, None, None) != 0:  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(pid, 0)
    libc.ptrace(17, pid, None, None)  # PTRACE_DETACH
told = {}
for pid in map(int, sys.argv[1:]):
    told[pid] = {
        "mem": outcome(lambda: open(f"/proc/{pid}/mem", "rb").close()),
        "ptrace": outcome(lambda: attach(pid)),
    }
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def host() -> Iterator[tuple[int, dict[str, int], dict[str, int]]]:
    """A process that is not hardened; the processes of two nodes and a balancer by name; and their supervisors.

    All are of one user. The balancer stands for itself among the supervisors.
    """
    with tempfile.TemporaryDirectory() as folder:
        running = subprocess.Popen(
            [sys.executable, "-c", UNPRIVILEGED, HOST, f"{folder}/kq"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert running.stdout is not None
            yield running.pid, *json.loads(running.stdout.readline())
        finally:
            running.communicate(timeout=60)


def test_nobody_of_the_same_user_may_look(host: tuple[int, dict[str, int], dict[str, int]]) -> None:
    plain, serving, supervisors = host
    assert len(serving) == len(supervisors) == 3
    members = serving | {f"supervisor of {name}": pid for name, pid in supervisors.items()}
    assert len(set(members.values())) == 5
    command = [sys.executable, "-c", UNPRIVILEGED, LOOK, str(plain), *map(str, members.values())]
    looked = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    told = json.loads(looked.stdout)
    assert set(told[str(plain)].values()) == {"done"}, "the control is not to be read either"
    for name, pid in members.items():
        assert set(told[str(pid)].values()) == {"PermissionError"}, (name, told[str(pid)])


def test_no_core_no_tracer_and_locked_memory(host: tuple[int, dict[str, int], dict[str, int]]) -> None:
    for name, pid in host[1].items():
        limits = Path(f"/proc/{pid}/limits").read_text(encoding="ascii")
        assert re.search(r"^Max core file size +0 +0 ", limits, flags=re.MULTILINE), name
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines())
        assert status["TracerPid"] == "0"
        if name.startswith("node"):
            assert int(status["VmLck"].split()[0]) >= 32, name  # kB: a region of the arena at least


def test_servers_have_no_children(host: tuple[int, dict[str, int], dict[str, int]]) -> None:
    for name, pid in host[1].items():
        children = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children")]
        assert children, name
        assert not "".join(children).strip(), name


def test_nothing_forks() -> None:
    """A forked child would share the memory of its parent: new processes are started anew.

    But for local clusters' nodes: they are forked before there is anything but what was imported.
    """
    found = sorted(
        f"{path.relative_to(ROOT)}: {word}"
        for folder in ("src/engine", "nodes", "balancer")
        for path in (ROOT / folder).rglob("*.py")
        for word in re.findall(r"os\.fork\w*|multiprocessing|preexec_fn|ProcessPoolExecutor", path.read_text("utf-8"))
    )
    assert found == ["nodes/forkserver.py: os.fork", "nodes/supervisor.py: os.fork"]
