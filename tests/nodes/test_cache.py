"""The cache of loaded keys: bounded in number and time, and what was put leaves exactly once."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nodes.cache import KeyCache


def a_cache(max_entries: int = 3, ttl_s: float = 10.0) -> tuple[KeyCache[str], list[str]]:
    left: list[str] = []
    return KeyCache(max_entries, ttl_s, left.append), left


def test_a_value_is_there_until_its_time_is_over() -> None:
    cache, left = a_cache()
    cache.put(b"k", "v", 100.0)
    assert cache.get(b"k", 109.999) == "v"
    assert cache.contains(b"k", 109.999)
    assert not cache.contains(b"k", 110.0)
    assert left == []
    assert cache.get(b"k", 110.0) is None
    assert left == ["v"]
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 0)


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
    assert cache.evictions == 1
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
    assert cache.drop(b"a")
    assert not cache.drop(b"a")
    assert cache.clear() == 1
    assert cache.clear() == 0
    assert left == ["a", "b"]


def test_to_ask_whether_a_value_is_there_counts_nothing() -> None:
    cache, _ = a_cache()
    cache.put(b"a", "a", 0.0)
    cache.contains(b"a", 0.0)
    cache.contains(b"b", 0.0)
    assert (cache.hits, cache.misses) == (0, 0)


def test_a_callback_that_fails_leaves_no_entry_behind() -> None:
    def fail(value: str) -> None:
        raise RuntimeError(value)

    cache: KeyCache[str] = KeyCache(3, 10.0, fail)
    cache.put(b"a", "a", 0.0)
    with pytest.raises(RuntimeError):
        cache.drop(b"a")
    assert len(cache) == 0


class AgainstDictionary(RuleBasedStateMachine):
    """The cache against a list of (key, value, expiry), least recently used first."""

    def __init__(self) -> None:
        super().__init__()
        self.left: Counter[int] = Counter()
        self.cache: KeyCache[int] = KeyCache(3, 5.0, lambda value: self.left.update([value]))
        self.model: list[tuple[bytes, int, float]] = []
        self.gone: Counter[int] = Counter()
        self.now = 0.0
        self.next = 0

    keys = st.sampled_from([b"a", b"b", b"c", b"d", b"e"])

    def remove(self, key: bytes) -> None:
        self.gone.update(value for each, value, _ in self.model if each == key)
        self.model = [each for each in self.model if each[0] != key]

    @rule(key=keys)
    def put(self, key: bytes) -> None:
        self.next += 1
        self.cache.put(key, self.next, self.now)
        self.remove(key)
        self.model.append((key, self.next, self.now + 5.0))
        if len(self.model) > 3:
            self.remove(self.model[0][0])

    @rule(key=keys)
    def get(self, key: bytes) -> None:
        found = [each for each in self.model if each[0] == key]
        if found and found[0][2] <= self.now:
            self.remove(key)
            found = []
        assert self.cache.get(key, self.now) == (found[0][1] if found else None)
        if found:
            self.model = [each for each in self.model if each[0] != key] + found

    @rule(key=keys)
    def drop(self, key: bytes) -> None:
        assert self.cache.drop(key) == any(each[0] == key for each in self.model)
        self.remove(key)

    @rule()
    def expire(self) -> None:
        old = [each[0] for each in self.model if each[2] <= self.now]
        assert self.cache.expire(self.now) == len(old)
        for key in old:
            self.remove(key)

    @rule(seconds=st.floats(0, 3))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def same(self) -> None:
        assert len(self.cache) == len(self.model) <= 3
        assert self.left == self.gone
        assert all(count == 1 for count in self.left.values())
        for key in (b"a", b"b", b"c", b"d", b"e"):
            expected = any(each[0] == key and each[2] > self.now for each in self.model)
            assert self.cache.contains(key, self.now) == expected


TestAgainstDictionary = AgainstDictionary.TestCase
TestAgainstDictionary.settings = settings(deadline=None, max_examples=60)


@given(st.lists(st.binary(min_size=1, max_size=1), max_size=40), st.integers(1, 5))
@settings(deadline=None)
def test_never_more_than_the_limit(keys: list[bytes], limit: int) -> None:
    cache: KeyCache[bytes] = KeyCache(limit, 1.0, lambda value: None)
    for key in keys:
        cache.put(key, key, 0.0)
        assert len(cache) <= limit
