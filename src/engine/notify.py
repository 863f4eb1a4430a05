"""What a process tells systemd, if that started it with ``Type=notify``: ready, alive, stopping (sd_notify(3)).

Without ``NOTIFY_SOCKET`` in the environment nothing is told. It imports little, as a supervisor does.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import Final

__all__ = ["Notifier"]

SOCKET: Final = "NOTIFY_SOCKET"
WATCHDOG: Final = "WATCHDOG_USEC"
WATCHDOG_PID: Final = "WATCHDOG_PID"


class Notifier:
    """Tells systemd of this process, as its environment says; children are not to inherit that word, so it goes.

    ``alive`` may be called as often as wanted: it tells twice in the time that the watchdog waits. What can't be told
    (systemd restarts itself, say) is let go.
    """

    def __init__(self) -> None:
        self._address = os.environ.pop(SOCKET, "")
        told, whose = os.environ.pop(WATCHDOG, ""), os.environ.pop(WATCHDOG_PID, "")
        mine = told.isdecimal() and whose in ("", str(os.getpid()))
        self._every_s = int(told) / 2e6 if mine else 0.0
        self._told_s = 0.0
        self._ready = False

    def ready(self, status: str) -> None:
        """It serves; once more only changes the status line of ``systemctl status``."""
        self._tell(f"{'' if self._ready else 'READY=1' + chr(10)}STATUS={status}")
        self._ready = True

    def status(self, status: str) -> None:
        """What it is doing, in a line."""
        self._tell(f"STATUS={status}")

    def alive(self) -> None:
        """It does its work: without this word for the watchdog's time it is killed and started anew."""
        now = time.monotonic()
        if self._every_s and now >= self._told_s + self._every_s:
            self._told_s = now
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """It ends by itself."""
        self._tell("STOPPING=1\nSTATUS=stopping")

    def _tell(self, lines: str) -> None:
        if not self._address:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender,
        ):
            sender.setblocking(False)
            sender.sendto(lines.encode(), name)
