"""``python -m nodes.forkserver``: has imported all that a node needs, and forks nodes from that as it is asked.

Most of a node's start are its imports, and a local cluster starts many. It opens nothing, has one thread, and ends
with who started it: its requests then come to their end. Each node is what ``python -m nodes`` would be: with its own
session, log, environment and command line, and its supervisor forks it, too. How it is asked: ``Request``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, Final, NoReturn, TypedDict

from engine.client.process import harden_process
from nodes.allocator import overwrite_freed
from nodes.supervisor import FAILPOINTS, lifeline_of, supervise

__all__ = ["REQUEST_MAX", "Request"]

REQUEST_MAX: Final = 128 * 1024
DESCRIPTORS_MAX: Final = 2
ARGUMENTS_START: Final = 45
"""Where proc(5) tells the address of the command line, in ``/proc/self/stat`` from the state on."""


class Request(TypedDict):
    """A JSON object, sent with the descriptors of the log and maybe of the lifeline; the answer is the process id.

    ``arguments`` are those of ``python -m nodes`` without ``--lifeline``.
    """

    arguments: list[str]
    environment: dict[str, str]
    folder: str


def _serve(requests: socket.socket) -> None:
    """Fork nodes until there are no more requests; a forked one does not come back."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(requests, REQUEST_MAX, DESCRIPTORS_MAX)
        if not data:
            return
        request: Request = json.loads(data)
        pid = os.fork()
        if pid == 0:
            requests.close()
            _become(request, descriptors)
        for each in descriptors:
            os.close(each)
        requests.send(str(pid).encode())


def _become(request: Request, descriptors: list[int]) -> NoReturn:
    """Be the node of a request from here on."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    log, *lifelines = descriptors
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for own, standard in ((nowhere, 0), (log, 1), (log, 2)):
        os.dup2(own, standard)
    os.close(nowhere)
    os.close(log)
    arguments = [*request["arguments"], *(f"--lifeline={each}" for each in lifelines)]
    _name(arguments)
    supervised, lifeline = lifeline_of(arguments)
    if supervised and not os.environ.get(FAILPOINTS):
        sys.exit(supervise(arguments, lifeline, begin=lambda told: _run([f"--supervised={told}", *arguments])))
    _run(arguments)


def _run(arguments: list[str]) -> NoReturn:
    from nodes.command import run

    _name(arguments)
    sys.argv[1:] = arguments
    sys.exit(run())


def _name(arguments: list[str]) -> None:
    """Have the system tell the command line that this node would have, as far as there is room for it."""
    words = [sys.executable, "-P", "-m", "nodes", *arguments]
    sys.orig_argv[:] = words
    fields = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()
    start, end = int(fields[ARGUMENTS_START]), int(fields[ARGUMENTS_START + 1])
    if 0 < start < end:
        told = b"\0".join(map(os.fsencode, words))[: end - start - 1]
        ctypes.memmove(start, told.ljust(end - start, b"\0"), end - start)


def main() -> int:
    """Serve the socket that is the first argument; the others are room for command lines."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    requests.set_inheritable(False)
    harden_process()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the nodes here
    import nodes.command  # noqa: F401 - for those that are forked

    gc.freeze()
    _serve(requests)
    return 0


if __name__ == "__main__":
    overwrite_freed()
    gc.disable()  # all that is imported stays
    rich: Any = None
    sys.modules["rich"] = rich  # as in ``__main__``
    sys.exit(main())
