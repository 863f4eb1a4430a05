"""The newest state of the registry that this balancer has seen, in a file of its own beside its data.

So a registry that was put back to an older state is noticed: from an old dump, or by a standby server of the database
that lacked the last commits. It is written once a second at most, and after what it speaks of is durable: it is behind
the registry, never before it.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

import msgspec
import structlog

from engine.client.config import write_private
from engine.errors import ConfigError

__all__ = ["Mark"]

EVERY_S = 1.0

log = structlog.get_logger()


class _Seen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fencing_epoch: int = 0
    revision: int = 0


class Mark:
    """The file; ``ConfigError`` if it can't be read. Any thread may use it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            self._written = msgspec.json.decode(path.read_bytes(), type=_Seen) if path.exists() else _Seen()
        except (OSError, msgspec.MsgspecError) as error:
            raise ConfigError(f"{path}: {error}") from None
        self._seen = self._written
        self._next_s = 0.0

    @property
    def seen(self) -> tuple[int, int]:
        """The fencing epoch and revision."""
        return self._seen.fencing_epoch, self._seen.revision

    def check(self, where: str, fencing_epoch: int, revision: int) -> None:
        """``ConfigError`` if the registry is at an older state than this balancer has seen."""
        seen = self._seen
        if fencing_epoch < seen.fencing_epoch or revision < seen.revision:
            raise ConfigError(
                f"{where}: fell back to revision {revision} of fencing epoch {fencing_epoch}; this balancer has seen "
                f"revision {seen.revision} of {seen.fencing_epoch}. `keyquorum registry rebuild` goes on from it, with "
                "what the nodes know"
            )

    def note(self, fencing_epoch: int, revision: int) -> None:
        """The registry is in this state, durably."""
        with self._lock:
            self._seen = _Seen(max(fencing_epoch, self._seen.fencing_epoch), max(revision, self._seen.revision))
            if time.monotonic() >= self._next_s:
                self._write()

    def put(self, fencing_epoch: int, revision: int) -> None:
        """Go on from this state, be it an older one: an operator wants it."""
        with self._lock:
            self._seen = _Seen(fencing_epoch, revision)
            self._write()

    def close(self) -> None:
        """Write what was not yet written."""
        with self._lock:
            self._write()

    def _write(self) -> None:
        self._next_s = time.monotonic() + EVERY_S
        if self._seen == self._written:
            return
        try:
            write_private(self._path, msgspec.json.encode(self._seen))
            self._written = self._seen
        except OSError as error:
            log.warning("the registry's mark is not written", file=str(self._path), reason=str(error))
