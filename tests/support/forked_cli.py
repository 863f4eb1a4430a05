"""The keyquorum command in processes that fork from one which has imported it: a start in Python takes half a second.

Each command has a process, standard streams, environment and working folder of its own. What the installed script does
beside ``engine.cli.main.main`` is for tests that start the script.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

MODULES = ("keyops", "local", "identity", "cluster", "audit")
REQUEST_MAX = 1 << 18


def run_command(
    words: Sequence[str | Path], cwd: Path, env: Mapping[str, str], stdin: bytes = b"", timeout_s: float = 60.0
) -> subprocess.CompletedProcess[bytes]:
    """Run ``keyquorum`` with these words; its exit code (negative for a signal) and what it printed."""
    request = json.dumps({"words": [str(word) for word in words], "cwd": str(cwd), "env": dict(env)}).encode()
    assert len(request) < REQUEST_MAX
    with (
        tempfile.TemporaryFile() as into,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        into.write(stdin)
        into.seek(0)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with here:
            with there:
                streams = [each.fileno() for each in (into, out, err, there)]
                socket.send_fds(_forking(), [request], streams)
            here.settimeout(timeout_s)
            pid = int(here.recv(64))
            try:
                told = here.recv(64)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise AssertionError(
                    f"keyquorum {' '.join(map(str, words))}: still running after {timeout_s} s"
                ) from None
        out.seek(0)
        err.seek(0)
        # A process that was killed has told nothing.
        code = int(told) if told else -signal.SIGKILL
        return subprocess.CompletedProcess(list(words), code, out.read(), err.read())


_started: list[tuple[socket.socket, subprocess.Popen[bytes]]] = []


def _forking() -> socket.socket:
    """The line to the process that forks; it ends when this one is gone, too."""
    if not _started:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            command = [sys.executable, "-P", str(Path(__file__).resolve()), str(there.fileno())]
            process = subprocess.Popen(command, pass_fds=[there.fileno()], stdin=subprocess.DEVNULL)
        _started.append((here, process))
        atexit.register(_end)
    return _started[0][0]


def _end() -> None:
    here, process = _started.pop()
    here.close()
    process.wait()


def _fork_for_each(line: socket.socket) -> None:
    from engine.cli import main as cli

    for name in MODULES:
        cli.import_module(f"engine.cli.{name}")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        request, streams, _, _ = socket.recv_fds(line, REQUEST_MAX, 4)
        if not request:
            return
        if os.fork() == 0:
            line.close()
            _become(request, streams, cli.main)
        for each in streams:
            os.close(each)


def _become(request: bytes, streams: Sequence[int], main: Callable[[], None]) -> None:
    code = 1
    with socket.socket(fileno=streams[3]) as caller:
        try:
            told = json.loads(request)
            caller.send(str(os.getpid()).encode())
            for target, stream in enumerate(streams[:3]):
                os.dup2(stream, target)
                os.close(stream)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.chdir(told["cwd"])
            os.environ.clear()
            os.environ.update(told["env"])
            sys.argv = ["keyquorum", *told["words"]]
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            caller.send(str(code).encode())
            os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as _line:
        _fork_for_each(_line)
