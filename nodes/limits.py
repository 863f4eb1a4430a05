"""How many shares may leave a node: token buckets for each client, each asking combiner, and all. No clock."""

from __future__ import annotations

from dataclasses import dataclass

from engine.client.admission import TokenBucket
from engine.errors import Overloaded

__all__ = ["Limits", "ReleaseLimits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Releases a second that may go on for ever, and for how many seconds' worth a bucket has room.

    The defaults are several times what the benchmarks of cold keys reach on one client, and far below what would empty
    a node of 100,000 shares unnoticed.
    """

    client_per_s: float = 200.0
    combiner_per_s: float = 400.0
    total_per_s: float = 800.0
    burst_s: float = 10.0


class ReleaseLimits:
    """The buckets of one node; used by one thread at a time. Members are few, so it forgets none."""

    def __init__(self, limits: Limits, now_s: float) -> None:
        self._limits = limits
        self._total = TokenBucket(limits.total_per_s, limits.burst_s, now_s)
        self._clients: dict[str, TokenBucket] = {}
        self._combiners: dict[str, TokenBucket] = {}

    def asked(self, combiner: str, now_s: float) -> None:
        """Count a request by this node, before anything in it is looked at; ``Overloaded`` beyond its limit."""
        bucket = self._bucket(self._combiners, combiner, self._limits.combiner_per_s, now_s)
        if not bucket.holds_one(now_s):
            raise Overloaded(
                f"{combiner!r} asks for more shares than limits.combiner_per_s = {self._limits.combiner_per_s:g} allows"
            )
        bucket.take()

    def release(self, client: str, now_s: float) -> None:
        """Count a release under a grant that was verified to be this client's; ``Overloaded`` beyond a limit.

        Only verified grants count here, so that nobody can use up what is another's.
        """
        bucket = self._bucket(self._clients, client, self._limits.client_per_s, now_s)
        if not bucket.holds_one(now_s):
            raise Overloaded(
                f"{client!r} grants more shares than limits.client_per_s = {self._limits.client_per_s:g} allows"
            )
        if not self._total.holds_one(now_s):
            raise Overloaded(f"more shares are asked for than limits.total_per_s = {self._limits.total_per_s:g} allows")
        bucket.take()
        self._total.take()

    def _bucket(self, buckets: dict[str, TokenBucket], name: str, per_s: float, now_s: float) -> TokenBucket:
        found = buckets.get(name)
        if found is None:
            found = buckets[name] = TokenBucket(per_s, self._limits.burst_s, now_s)
        return found
