"""A process that has imported what a node needs, and forks nodes: this side of ``nodes.forkserver``.

It is started with the first node of an embedded cluster, serves all clusters of this process, and ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Final

__all__ = ["fork_node"]

ANSWER_S: Final = 60.0
END_S: Final = 5.0
ROOM: Final = "." * 1024
"""An argument in whose place the nodes tell their command lines."""
LATE: Final = ("KEYQUORUM_FAILPOINTS", "PYTEST_CURRENT_TEST")
"""Variables that no import looks at: a node may have others than the process that it is forked from."""


class _ForkServer:
    def __init__(self, environment: dict[str, str]) -> None:
        self.owner = os.getpid()
        self.early = _early(environment)
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.settimeout(ANSWER_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "nodes.forkserver", str(theirs.fileno()), ROOM],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=environment,
            )

    def fork(self, arguments: Sequence[str], environment: dict[str, str], descriptors: Sequence[int]) -> int:
        """The process id of the node; ``OSError`` if there is none."""
        request = {"arguments": list(arguments), "environment": environment, "folder": os.getcwd()}
        socket.send_fds(self._requests, [json.dumps(request).encode()], descriptors)
        answer = self._requests.recv(32)
        if not answer:
            raise OSError("the process that forks nodes has ended")
        return int(answer)

    def close(self) -> None:
        """Have it end; what it forked goes on."""
        self._requests.close()
        if self.owner == os.getpid():
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)


def _early(environment: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in LATE}


_lock = threading.Lock()
_server: _ForkServer | None = None


def fork_node(arguments: Sequence[str], log: int, lifeline: int) -> int:
    """Start ``python -m nodes`` with these arguments in this environment, in a session of its own; its process id.

    It is no child of this process. ``log`` and ``lifeline`` are descriptors that it gets copies of. ``OSError`` if it
    can't be started so.
    """
    global _server
    environment = dict(os.environ)
    with _lock:
        if _server is not None and (_server.owner, _server.early) != (os.getpid(), _early(environment)):
            _server.close()
            _server = None
        try:
            if _server is None:
                _server = _ForkServer(environment)
            return _server.fork(arguments, environment, (log, lifeline))
        except OSError:
            if _server is not None:
                _server.close()
            _server = None
            raise


def _close() -> None:
    with _lock:
        if _server is not None:
            _server.close()


atexit.register(_close)
