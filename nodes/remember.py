"""Signatures that were found good, so that the same grant, receipt or manifest is not verified twice by one node.

What is remembered is that this key signed these bytes, which stays true; time, policy and epoch are checked each time.
"""

from __future__ import annotations

from collections.abc import Callable

from nodes.cache import Cache, CacheLimits, CacheStatistics, Reason

__all__ = ["SignatureCache"]


class SignatureCache:
    """Digests of (public key, signature, signed bytes); see ``engine.protocol.signed.remember_signatures``."""

    def __init__(self, limits: CacheLimits, clock: Callable[[], float]) -> None:
        self._cache: Cache[bytes, bool] = Cache(limits)
        self._clock = clock

    def knows(self, digest: bytes) -> bool:
        """Whether that signature was found good."""
        return self._cache.get(digest, self._clock()) is not None

    def learn(self, digest: bytes) -> None:
        """Remember that it is good."""
        self._cache.put(digest, True, self._clock(), len(digest))

    def statistics(self) -> CacheStatistics:
        """See ``Cache.statistics``."""
        return self._cache.statistics()

    def clear(self, reason: Reason) -> int:
        """Forget all."""
        return self._cache.clear(reason)

    def expire(self) -> int:
        """Forget those whose time is over."""
        return self._cache.expire(self._clock())
