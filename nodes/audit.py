"""The audit log: one JSON object a line, a record for each request and each reply. It never sees key or data bytes."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct

__all__ = ["AuditLog", "Record"]


class Record(Struct, frozen=True, omit_defaults=True):
    """What one line says. ``time_ms`` is since the Unix epoch, ``request`` numbers the request within this start."""

    time_ms: int
    node: str
    boot: str
    request: int
    event: str
    member: str
    verb: str
    key: str = ""
    outcome: str = ""
    detail: str = ""
    elapsed_us: int = 0


class AuditLog:
    """An append-only file of mode 0600; safe for several threads. A record is one write, so lines never mix."""

    def __init__(self, path: Path) -> None:
        flags: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(path, flags, 0o600)
        size = os.fstat(self._descriptor).st_size
        if size:
            with path.open("rb") as whole:
                whole.seek(size - 1)
                if whole.read(1) != b"\n":
                    os.write(
                        self._descriptor, b"\n"
                    )  # an earlier start ended inside a record: it stays, alone on its line
        self._encode = msgspec.json.Encoder().encode
        self._lock = threading.Lock()

    def write(self, record: Record, *, durable: bool = False) -> None:
        """Append a record; ``durable`` returns only when it is on the disk."""
        line = self._encode(record) + b"\n"
        with self._lock:
            written = os.write(self._descriptor, line)
            if written != len(line):
                raise OSError(f"the audit log took {written} of {len(line)} bytes")
        if durable:
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Sync and close."""
        with self._lock:
            if self._descriptor >= 0:
                os.fsync(self._descriptor)
                os.close(self._descriptor)
                self._descriptor = -1
