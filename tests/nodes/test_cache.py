"""The caches' mechanism: bounded in number, bytes, time and uses, and what was kept leaves exactly once."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nodes.cache import REASONS, Cache, CacheLimits


def a_cache(
    max_entries: int = 3, ttl_s: float = 10.0, max_uses: int = 1000, max_bytes: int = 1000
) -> tuple[Cache[bytes, str], list[str]]:
    left: list[str] = []
    return Cache(CacheLimits(ttl_s, max_entries, max_uses, max_bytes), left.append), left


def evictions(cache: Cache[bytes, str]) -> dict[str, int]:
    """Only the reasons that there were."""
    return {reason: count for reason, count in cache.statistics().evictions.items() if count}


def test_a_value_is_there_until_its_time_is_over() -> None:
    cache, left = a_cache()
    cache.put(b"k", "v", 100.0)
    assert cache.get(b"k", 109.999) == "v"
    assert cache.contains(b"k", 109.999)
    assert not cache.contains(b"k", 110.0)
    assert left == []
    assert cache.get(b"k", 110.0) is None
    assert left == ["v"]
    told = cache.statistics()
    assert (told.hits, told.misses, told.entries, len(cache)) == (1, 1, 0, 0)
    assert evictions(cache) == {"ttl": 1}


def test_use_does_not_prolong_the_time() -> None:
    cache, left = a_cache()
    cache.put(b"k", "v", 0.0)
    for now in range(10):
        assert cache.get(b"k", float(now)) == "v"
    assert cache.get(b"k", 10.0) is None
    assert left == ["v"]


def test_the_least_recently_used_leaves_first() -> None:
    cache, left = a_cache()
    for name in "abc":
        cache.put(name.encode(), name, 0.0)
    cache.get(b"a", 1.0)
    cache.put(b"d", "d", 1.0)
    assert left == ["b"]
    assert evictions(cache) == {"room": 1}
    assert cache.get(b"b", 1.0) is None


def test_a_new_value_of_a_key_lets_the_old_one_leave_and_starts_its_own_time() -> None:
    cache, left = a_cache()
    cache.put(b"k", "old", 0.0)
    cache.put(b"k", "new", 8.0)
    assert left == ["old"]
    assert cache.get(b"k", 17.0) == "new"


def test_expired_values_leave_together() -> None:
    cache, left = a_cache()
    cache.put(b"a", "a", 0.0)
    cache.put(b"b", "b", 5.0)
    assert cache.expire(10.0) == 1
    assert left == ["a"]
    assert cache.expire(10.0) == 0


def test_what_is_dropped_or_cleared_leaves() -> None:
    cache, left = a_cache()
    cache.put(b"a", "a", 0.0)
    cache.put(b"b", "b", 0.0)
    assert cache.drop(lambda key: key == b"a", "changed") == 1
    assert cache.drop(lambda key: key == b"a", "changed") == 0
    assert cache.clear("flushed") == 1
    assert cache.clear("flushed") == 0
    assert left == ["a", "b"]
    assert evictions(cache) == {"changed": 1, "flushed": 1}


def test_to_ask_whether_a_value_is_there_counts_nothing() -> None:
    cache, _ = a_cache()
    cache.put(b"a", "a", 0.0)
    cache.contains(b"a", 0.0)
    cache.contains(b"b", 0.0)
    assert (cache.statistics().hits, cache.statistics().misses) == (0, 0)
    assert cache.get(b"a", 0.0, counted=False) == "a"
    assert cache.get(b"b", 0.0, counted=False) is None
    assert (cache.statistics().hits, cache.statistics().misses) == (0, 0)


def test_a_value_is_used_only_so_often() -> None:
    cache, left = a_cache(max_uses=2)
    cache.put(b"k", "v", 0.0)
    assert [cache.get(b"k", 0.0), cache.contains(b"k", 0.0), cache.get(b"k", 0.0)] == ["v", True, "v"]
    assert not cache.contains(b"k", 0.0)  # the second use was the last one; who holds the value goes on with it
    assert left == []
    assert cache.get(b"k", 0.0) is None
    assert left == ["v"]
    assert evictions(cache) == {"uses": 1}
    cache.put(b"k", "w", 0.0)
    cache.get(b"k", 0.0)
    cache.get(b"k", 0.0)
    assert cache.expire(1.0) == 1
    assert evictions(cache) == {"uses": 2}


def test_bytes_are_bounded_and_counted() -> None:
    cache, left = a_cache(max_bytes=100)
    for name in "abc":
        assert cache.put(name.encode(), name, 0.0, 40)
    assert left == ["a"]
    assert cache.statistics().bytes == 80
    cache.put(b"b", "b2", 0.0, 10)
    assert cache.statistics().bytes == 50
    assert not cache.put(b"large", "large", 0.0, 101)
    assert left == ["a", "b"]  # what was refused is the caller's, and nothing left for it
    assert cache.put(b"d", "d", 0.0, 100)
    assert (cache.statistics().bytes, len(cache), left) == (100, 1, ["a", "b", "c", "b2"])


def test_a_value_cannot_leave_while_it_is_read() -> None:
    cache: Cache[bytes, bytearray] = Cache(CacheLimits(10.0, 2), bytearray.clear)
    cache.put(b"k", bytearray(b"secret"), 0.0)
    reading, go_on = threading.Event(), threading.Event()

    def reader(value: bytearray) -> bytes:
        reading.set()
        go_on.wait(10)
        return bytes(value)

    with ThreadPoolExecutor(2) as pool:
        read = pool.submit(cache.read, b"k", 0.0, reader)
        assert reading.wait(10)
        cleared = pool.submit(cache.clear, "flushed")
        assert not cleared.done()
        go_on.set()
        assert read.result(10) == b"secret"
        assert cleared.result(10) == 1


def test_a_callback_that_fails_leaves_no_entry_behind() -> None:
    told: list[str] = []

    def fail(value: str) -> None:
        told.append(value)
        raise RuntimeError(value)

    cache: Cache[bytes, str] = Cache(CacheLimits(10.0, 3), fail)
    cache.put(b"a", "a", 0.0)
    cache.put(b"b", "b", 0.0)
    with pytest.raises(RuntimeError, match="a"):
        cache.clear("flushed")
    assert len(cache) == 0
    assert told == ["a", "b"]


class AgainstDictionary(RuleBasedStateMachine):
    """The cache against a list of [key, value, expiry, uses, size], least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.left: Counter[int] = Counter()
        self.cache: Cache[bytes, int] = Cache(CacheLimits(5.0, 3, 2, 100), lambda value: self.left.update([value]))
        self.model: list[list[Any]] = []
        self.gone: Counter[int] = Counter()
        self.reasons = dict.fromkeys(REASONS, 0)
        self.hits = self.misses = 0
        self.now = 0.0
        self.next = 0

    keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])

    def remove(self, key: bytes, reason: Any) -> int:
        found = [each for each in self.model if each[0] == key]
        self.gone.update(each[1] for each in found)
        self.reasons[reason] += len(found)
        self.model = [each for each in self.model if each[0] != key]
        return len(found)

    def over(self, entry: list[Any]) -> str:
        return "ttl" if entry[2] <= self.now else "uses" if entry[3] == 0 else ""

    @rule(key=keys, size=st.integers(0, 110))
    def put(self, key: bytes, size: int) -> None:
        self.next += 1
        assert self.cache.put(key, self.next, self.now, size) == (size <= 100)
        if size > 100:
            return
        self.remove(key, "changed")
        self.model.append([key, self.next, self.now + 5.0, 2, size])
        while len(self.model) > 3 or sum(each[4] for each in self.model) > 100:
            self.remove(self.model[0][0], "room")

    @rule(key=keys, counted=st.booleans())
    def get(self, key: bytes, counted: bool) -> None:
        found = [each for each in self.model if each[0] == key]
        if found and self.over(found[0]):
            self.remove(key, self.over(found[0]))
            found = []
        assert self.cache.get(key, self.now, counted=counted) == (found[0][1] if found else None)
        self.hits += counted and bool(found)
        self.misses += counted and not found
        if found:
            found[0][3] -= 1
            self.model = [each for each in self.model if each[0] != key] + found

    @rule(chosen=st.sets(keys), reason=st.sampled_from(["changed", "flushed"]))
    def drop(self, chosen: set[bytes], reason: Any) -> None:
        assert self.cache.drop(lambda key: key in chosen, reason) == sum(self.remove(key, reason) for key in chosen)

    @rule()
    def expire(self) -> None:
        old = [(each[0], self.over(each)) for each in self.model if self.over(each)]
        assert self.cache.expire(self.now) == len(old)
        for key, reason in old:
            self.remove(key, reason)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def same(self) -> None:
        told = self.cache.statistics()
        assert told.entries == len(self.cache) == len(self.model) <= 3
        assert told.bytes == sum(each[4] for each in self.model) <= 100
        assert (told.hits, told.misses, told.evictions) == (self.hits, self.misses, self.reasons)
        assert self.left == self.gone
        assert all(count == 1 for count in self.left.values())
        for key in (b"a", b"b", b"c", b"d", b"e"):
            expected = any(each[0] == key and not self.over(each) for each in self.model)
            assert self.cache.contains(key, self.now) == expected


TestAgainstDictionary = AgainstDictionary.TestCase
TestAgainstDictionary.settings = settings(deadline=None, max_examples=60)


def test_a_lease_takes_uses_in_advance_and_gives_back_what_is_left() -> None:
    left: list[str] = []
    cache: Cache[str, str] = Cache(CacheLimits(ttl_s=10.0, max_entries=4, max_uses=5), left.append)
    assert cache.lease("a", 0.0, 3) is None
    cache.put("a", "one", 0.0)
    assert cache.lease("a", 1.0, 3) == ("one", 3, 10.0)
    assert cache.lease("a", 1.0, 3) == ("one", 2, 10.0)
    assert cache.lease("a", 1.0, 3) is None
    assert cache.statistics().hits == 0
    cache.settle("a", "one", 1, 2)
    cache.settle("a", "one", 2, 0)
    assert cache.statistics().hits == 3
    assert [cache.get("a", 2.0) for _ in range(3)] == ["one", "one", None]
    assert left == ["one"]
    assert cache.lease("a", 2.0, 1) is None


def test_a_lease_of_what_left_meanwhile_gives_nothing_back() -> None:
    cache: Cache[str, str] = Cache(CacheLimits(ttl_s=10.0, max_entries=4, max_uses=5))
    cache.put("a", "one", 0.0)
    assert cache.lease("a", 9.0, 4) == ("one", 4, 10.0)
    cache.put("a", "two", 9.0)
    cache.settle("a", "one", 1, 3)
    assert cache.lease("a", 9.0, 9) == ("two", 5, 19.0)
    assert cache.lease("a", 19.0, 9) is None
    assert cache.statistics().hits == 1
