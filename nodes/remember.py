"""Signatures that were found good, and shares that were made of what was dealt, so that neither is worked out twice.

What is remembered is that this key signed these bytes, and what becomes of these bytes, which stay true; time, policy
and epoch are checked each time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from engine.protocol.refresh import Deal, NewShare, Terms
from engine.sharing import SALT_BYTES, SecretBuffer, Share
from nodes.cache import Cache, CacheLimits, CacheStatistics, Reason

__all__ = ["Remembered", "SignatureCache"]

SHARES_KEPT: Final = 256


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


_Kept = tuple[
    Terms, bytes, tuple[bytes, ...], tuple[bytes, ...], tuple[Deal, ...], tuple[bytes, ...], int, SecretBuffer
]


class Remembered:
    """New shares that were worked out for a statement and are to be stored in a moment; used by one thread.

    A few of the newest, each until it is taken, in locked memory: who forgets one works it out again.
    """

    def __init__(self) -> None:
        self._kept: dict[bytes, _Kept] = {}

    def put(
        self,
        terms: Terms,
        raws: Sequence[bytes],
        parts: Sequence[bytes],
        deals: Sequence[Deal],
        new: NewShare,
        certificate: bytes = b"",
    ) -> None:
        """Keep what these deals and parts make by these terms; ``certificate`` is of the epoch before."""
        key_id = terms.before.manifest.key_id
        self._drop(key_id)
        while len(self._kept) >= SHARES_KEPT:
            self._drop(next(iter(self._kept)))
        try:
            secret = SecretBuffer.copy_of(new.salt + new.share.y)
        except OSError:  # locked memory is short
            return
        self._kept[key_id] = (
            terms, certificate, tuple(raws), tuple(parts), tuple(deals), new.values, new.share.x, secret
        )  # fmt: skip

    def told(self, key_id: bytes) -> tuple[bytes, bytes, list[bytes], list[bytes]] | None:
        """By what the last was made that is kept of a key: manifest before, its certificate, deals and parts."""
        kept = self._kept.get(key_id)
        if kept is None:
            return None
        terms, certificate, raws, parts = kept[:4]
        return terms.before.raw, certificate, list(raws), list(parts)

    def take(self, terms: Terms, raws: Sequence[bytes], parts: Sequence[bytes]) -> tuple[list[Deal], NewShare] | None:
        """What was kept of exactly these bytes, once."""
        kept = self._kept.get(terms.before.manifest.key_id)
        if kept is None:
            return None
        before, _, its_raws, its_parts, deals, values, x, secret = kept
        same = (before.told(), before.order, before.before.digest) == (terms.told(), terms.order, terms.before.digest)
        found = None
        if same and its_raws == tuple(raws) and its_parts == tuple(parts):
            with memoryview(secret) as view:
                salt, y = bytes(view[:SALT_BYTES]), bytes(view[SALT_BYTES:])
            found = list(deals), NewShare(Share(x, y), salt, values)
        self._drop(terms.before.manifest.key_id)
        return found

    def _drop(self, key_id: bytes) -> None:
        kept = self._kept.pop(key_id, None)
        if kept is not None:
            kept[-1].close()
