"""This node's unsealed shares, for a short time and in locked memory, so that not every release has the token unseal.

It knows no grant and no message: who may have a share is decided before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from engine.sharing import SALT_BYTES, SecretBuffer, SecretShare, Share
from nodes.cache import Cache, CacheLimits, CacheStatistics, Reason

__all__ = ["ShareCache", "ShareKey"]

GRANULE = 64
"""What locked memory is given out in, in bytes."""

R = TypeVar("R")


class ShareKey(NamedTuple):
    """Which share: of one version and epoch, as one manifest names it."""

    key_id: bytes
    version: int
    epoch: int
    manifest_hash: bytes


class ShareCache:
    """Salt and value of shares in SecretBuffers, closed when they leave; safe for several threads.

    Where locked memory is short, what is kept here makes room: a request never fails for the sake of the cache.
    ``clock`` gives monotonic seconds.
    """

    def __init__(self, limits: CacheLimits, clock: Callable[[], float]) -> None:
        self._cache: Cache[ShareKey, SecretBuffer] = Cache(limits, SecretBuffer.close)
        self._clock = clock

    def __len__(self) -> int:
        return len(self._cache)

    def statistics(self) -> CacheStatistics:
        """See ``Cache.statistics``."""
        return self._cache.statistics()

    def share(self, key: ShareKey, x: int, unseal: Callable[[], SecretBuffer]) -> tuple[Share, bytes]:
        """The share and its salt as ``bytes``, for a message; ``unseal`` gives salt || value where it is not here."""

        def read(plain: SecretBuffer) -> tuple[Share, bytes]:
            with memoryview(plain) as view:
                return Share(x, bytes(view[SALT_BYTES:])), bytes(view[:SALT_BYTES])

        return self._opened(key, unseal, read)

    def secret(self, key: ShareKey, x: int, unseal: Callable[[], SecretBuffer]) -> tuple[SecretShare, bytes]:
        """As ``share``, but a copy in locked memory, which the caller closes."""

        def read(plain: SecretBuffer) -> tuple[SecretShare, bytes]:
            with memoryview(plain) as view:
                return SecretShare(x, SecretBuffer.copy_of(view[SALT_BYTES:])), bytes(view[:SALT_BYTES])

        return self._opened(key, unseal, read)

    def _opened(self, key: ShareKey, unseal: Callable[[], SecretBuffer], read: Callable[[SecretBuffer], R]) -> R:
        now_s = self._clock()
        found = self.with_room(lambda: self._cache.read(key, now_s, read))
        if found is not None:
            return found
        plain = self.with_room(unseal)
        try:
            result = self.with_room(lambda: read(plain))
            if not self._cache.put(key, plain, now_s, -(-len(plain) // GRANULE) * GRANULE):
                plain.close()
        except BaseException:
            plain.close()
            raise
        return result

    def with_room(self, make: Callable[[], R]) -> R:
        """What ``make`` gives; where locked memory was short, everything here leaves and it is made once more."""
        try:
            return make()
        except OSError:
            if not self._cache.clear("room"):
                raise
        return make()

    def keep_only(self, current: ShareKey) -> int:
        """Let the shares of that key leave which rest on another manifest: an older epoch or version."""
        return self._cache.drop(lambda key: key.key_id == current.key_id and key != current, "changed")

    def drop_older(self, key_id: bytes, version: int, epoch: int) -> int:
        """Let the shares of that key leave which are older than the epoch that somebody named."""
        return self._cache.drop(
            lambda key: key.key_id == key_id and (key.version, key.epoch) < (version, epoch), "changed"
        )

    def drop(self, key_id: bytes, reason: Reason) -> int:
        """Let all shares of a key leave."""
        return self._cache.drop(lambda key: key.key_id == key_id, reason)

    def clear(self, reason: Reason) -> int:
        """Let all shares leave."""
        return self._cache.clear(reason)

    def expire(self) -> int:
        """Let the shares leave whose time or uses are over."""
        return self._cache.expire(self._clock())
