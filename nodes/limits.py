"""How many shares may leave a node or be dealt anew, and how long it may make keys: token buckets. No clock."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from engine.client.admission import TokenBucket
from engine.errors import Overloaded

__all__ = ["CHANGES_PER_S", "GENERATE_PART", "GenerationLimit", "Limits", "ReleaseLimits"]

CHANGES_PER_S = 500.0
"""Shares a second that a balancer may have a holder deal or take in for ever, unless the configuration says so."""
GENERATE_PART = 0.25
GENERATE_BURST_S = 4.0
"""So many seconds' worth of its part a node has for making keys after a pause."""
GENERATE_S = {"rsa": 0.1}
"""What making a key is taken for until one was made."""


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


class GenerationLimit:
    """The part of a node's processor time that making keys may take for ever; used by one thread.

    An RSA key takes as long as thousands of uses. What is refused here another node may make, or this one a little
    later. A key is charged what its like took of late when it is asked for, so that none has to wait in a queue that
    the limit does not let through, and what it really took once it is made.
    """

    def __init__(self, part: float, now_s: float) -> None:
        self._part = part
        self._ms = TokenBucket(part * 1_000, GENERATE_BURST_S, now_s)
        self._usual_s: dict[str, float] = {}
        self._charged: dict[str, deque[float]] = {}

    def begin(self, algorithm: str, now_s: float) -> None:
        """A key of this algorithm is asked for; ``Overloaded`` while those before have taken more than their part."""
        if not self._ms.holds_one(now_s):
            raise Overloaded(f"making keys has taken limits.generate_part = {self._part:g} of this node's time")
        usual_s = self._usual_s.get(algorithm, GENERATE_S.get(algorithm.partition("-")[0], 0.0))
        self._charged.setdefault(algorithm, deque()).append(usual_s)
        self._ms.take(usual_s * 1_000)

    def ended(self, algorithm: str, seconds: float) -> None:
        """It is made or was given up, after so much processor time; 0 if it was not begun."""
        self._ms.take((seconds - self._charged[algorithm].popleft()) * 1_000)
        if seconds > 0.0:
            usual_s = self._usual_s.get(algorithm, seconds)
            self._usual_s[algorithm] = usual_s + 0.2 * (seconds - usual_s)
