"""What a node remembers so that a grant is good once: the used grants and the clock's mark, and how fast shares leave.

It decides only whether a grant that ``check_grant`` found good was used before; it opens no share and no socket.
Invariants: what ``release`` allowed, and what ``spend`` allowed before the last ``flush``, is on the disk together with
the time of its use; a used grant is forgotten only after the mark has passed its expiry by more than clocks may differ.
So neither a restart nor a clock that is set back makes it good again.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from engine.errors import AccessDenied, Overloaded, StoreUnavailable
from engine.protocol.grant import Grant
from engine.protocol.manifest import CLOCK_SKEW_MS
from engine.protocol.signed import Signed
from nodes.clock import TrustedClock
from nodes.limits import Limits, ReleaseLimits
from nodes.store import ShareStore, UsedGrant

__all__ = ["MARK_EVERY_MS", "MAX_REMEMBERED", "RETRY_WINDOW_MS", "GrantLedger"]

RETRY_WINDOW_MS: Final = 2_000
"""For how long a holder answers the same grant again, since its first answer may have been lost."""
MARK_EVERY_MS: Final = 3_000
"""How old the clock's mark on the disk may get while nothing is released; less than clocks may differ."""
PRUNE_EVERY_MS: Final = 5_000
MAX_REMEMBERED: Final = 100_000
"""Grants remembered at a time; more are answered ``overloaded``."""
MAX_OF_CLIENT: Final = 25_000
"""The same of one client, so that none fills up the room of all: what it may have released in 40 s is a third of it."""


@dataclass(frozen=True, slots=True)
class _Use:
    """``answerable_s`` is the monotonic time until which the same grant gets the same answer."""

    digest: bytes
    expires_ms: int
    answerable_s: float


class GrantLedger:
    """The used grants of one node, as holder and as combiner; safe for several threads."""

    def __init__(
        self,
        store: ShareStore,
        clock: TrustedClock,
        limits: Limits | None = None,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self.problem = ""
        """Why the store could not be written when it was last tried; empty if it could."""
        self._store = store
        self._monotonic_s = monotonic_s
        self._limits = ReleaseLimits(limits or Limits(), monotonic_s())
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._floor_ms = store.clock_mark().floor_ms
        known = store.used_grants()
        self._used = {(each.issuer, each.nonce): _Use(each.digest, each.expires_ms, 0.0) for each in known}
        self._of_client = Counter(each.issuer for each in known)
        self._unwritten: list[UsedGrant] = []
        self._marked_ms = 0
        self._pruned_ms = 0

    def __len__(self) -> int:
        return len(self._used)

    def asked(self, combiner: str) -> None:
        """Count a request for a share, before anything in it is verified; ``Overloaded`` beyond the node's limit."""
        with self._lock:
            self._limits.asked(combiner, self._monotonic_s())

    def release(self, grant: Grant, signed: Signed) -> None:
        """Use the grant up for one release; when this returns, that is on the disk.

        The same grant again within ``RETRY_WINDOW_MS`` is allowed, in this process alone. ``AccessDenied`` if it was
        used before, ``Overloaded`` beyond a limit.
        """
        with self._lock:
            now_s = self._monotonic_s()
            self._limits.release(signed.issuer, now_s)
            before = self._used.get((signed.issuer, grant.nonce))
            if before is None or before.digest != signed.digest or now_s >= before.answerable_s:
                self._use(grant, signed, now_s + RETRY_WINDOW_MS / 1000)
        self.flush()

    def spend(self, grant: Grant, signed: Signed) -> None:
        """Use the grant up for one gathering by this node; ``flush`` makes it durable. It is quick: no disk.

        ``AccessDenied`` if it was used before: a client signs a new one for each attempt.
        """
        with self._lock:
            self._use(grant, signed, 0.0)

    def _use(self, grant: Grant, signed: Signed, answerable_s: float) -> None:
        key = (signed.issuer, grant.nonce)
        before = self._used.get(key)
        if before is not None:
            if before.digest != signed.digest:
                raise AccessDenied(f"another grant of {signed.issuer!r} with this nonce was used already")
            raise AccessDenied(f"the grant {signed.digest.hex()[:16]} of {signed.issuer!r} was used already")
        if self.clock.now_ms() > grant.expires_ms + CLOCK_SKEW_MS:  # it was checked, but may be forgotten since
            raise AccessDenied("the grant expired while the request waited")
        if grant.not_before_ms < self._floor_ms:
            raise AccessDenied("the grant was made before this node's clock was reset; a new one is needed")
        if len(self._used) >= MAX_REMEMBERED:
            raise Overloaded(f"{MAX_REMEMBERED} grants that have not expired are remembered")
        if self._of_client[signed.issuer] >= MAX_OF_CLIENT:
            raise Overloaded(f"{MAX_OF_CLIENT} grants of {signed.issuer!r} that have not expired are remembered")
        self._of_client[signed.issuer] += 1
        self._used[key] = _Use(signed.digest, grant.expires_ms, answerable_s)
        self._unwritten.append(UsedGrant(signed.issuer, grant.nonce, signed.digest, grant.expires_ms))

    def due(self) -> bool:
        """Whether something waits to be written, or the mark on the disk is old."""
        return bool(self._unwritten) or self.clock.now_ms() - self._marked_ms >= MARK_EVERY_MS

    def flush(self) -> None:
        """Write what was used since, with the clock's mark, in one durable transaction; it may wait for the disk."""
        with self._writing:
            now_ms = self.clock.now_ms()
            with self._lock:
                fresh, self._unwritten = self._unwritten, []
            if not fresh and now_ms - self._marked_ms < MARK_EVERY_MS:
                return
            prune = now_ms - self._pruned_ms >= PRUNE_EVERY_MS
            forget_ms = now_ms - CLOCK_SKEW_MS if prune else 0
            try:
                self._store.note_grants(fresh, now_ms, forget_ms)
            except BaseException as error:
                with self._lock:
                    self._unwritten = fresh + self._unwritten
                if isinstance(error, StoreUnavailable):
                    self.problem = str(error)
                raise
            self.problem = ""
            self._marked_ms = now_ms
            if prune:
                self._pruned_ms = now_ms
                self._forget(forget_ms)

    def _forget(self, before_ms: int) -> None:
        """Forget what expired; a grant of that age is refused by its expiry, as the clock never goes back."""
        with self._lock:
            for key in [key for key, use in self._used.items() if use.expires_ms < before_ms]:
                del self._used[key]
                self._of_client[key[0]] -= 1
