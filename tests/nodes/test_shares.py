"""Unsealed shares: unsealed once for many releases, wiped when they leave, never of an epoch that is over."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.protocol import signed
from engine.protocol.grant import check_grant
from engine.protocol.manifest import read_key_manifest
from engine.protocol.signed import remember_signatures
from engine.sharing import SALT_BYTES, SecretBuffer, Share
from nodes.cache import CacheLimits
from nodes.catalogue import Catalogue, Entry
from nodes.clock import TrustedClock
from nodes.holder import ShareHolder
from nodes.remember import SignatureCache
from nodes.shares import ShareCache, ShareKey
from nodes.store import Row, seal_context, seal_share, unseal_plain
from nodes.token import Lane

PLAIN = bytes(range(SALT_BYTES)) + b"the value of the share of node1!"
SALT, VALUE = PLAIN[:SALT_BYTES], PLAIN[SALT_BYTES:]
LIMITS = CacheLimits(60.0, 4, 5, 4096)


class Source:
    """Gives the plain share as the token would, and keeps what it gave."""

    def __init__(self) -> None:
        self.given: list[SecretBuffer] = []

    def __call__(self) -> SecretBuffer:
        self.given.append(SecretBuffer.copy_of(PLAIN))
        return self.given[-1]


def key(epoch: int = 1, version: int = 1, key_id: bytes = bytes(16)) -> ShareKey:
    return ShareKey(key_id, version, epoch, bytes([version, epoch]) * 16)


@pytest.fixture
def shares() -> ShareCache:
    return ShareCache(LIMITS, lambda: 0.0)


def test_a_share_is_unsealed_once_and_given_as_often_as_it_may_be_used(shares: ShareCache) -> None:
    source = Source()
    for _ in range(1 + LIMITS.max_uses):
        share, salt = shares.share(key(), 7, source)
        assert (share.x, share.y, salt) == (7, VALUE, SALT)
    assert len(source.given) == 1
    shares.share(key(), 7, source)
    assert [plain.closed for plain in source.given] == [True, False]
    assert shares.statistics().evictions["uses"] == 1


def test_a_secret_copy_is_the_callers_own(shares: ShareCache) -> None:
    source = Source()
    first, salt = shares.secret(key(), 7, source)
    second, _ = shares.secret(key(), 7, source)
    assert (bytes(first.y), bytes(second.y), salt) == (VALUE, VALUE, SALT)
    shares.clear("flushed")
    assert source.given[0].closed
    assert bytes(first.y) == VALUE
    first.close()
    assert bytes(second.y) == VALUE
    second.close()
    assert VALUE.hex() not in repr(first) + repr(second)


def test_a_newer_manifest_lets_the_older_share_of_that_key_alone_leave(shares: ShareCache) -> None:
    old, other = Source(), Source()
    shares.share(key(1), 1, old)
    shares.share(key(1, key_id=b"o" * 16), 1, other)
    assert shares.keep_only(key(2)) == 1
    assert (old.given[0].closed, other.given[0].closed) == (True, False)
    assert shares.keep_only(key(2)) == 0
    assert shares.statistics().evictions["changed"] == 1


@pytest.mark.parametrize(("version", "epoch", "dropped"), [(1, 1, 0), (1, 2, 0), (1, 3, 1), (2, 1, 1)])
def test_somebodys_word_of_a_newer_epoch_is_enough_to_drop(
    shares: ShareCache, version: int, epoch: int, dropped: int
) -> None:
    shares.share(key(2), 1, Source())
    assert shares.drop_older(bytes(16), version, epoch) == dropped
    assert len(shares) == 1 - dropped


def test_the_time_is_counted_from_the_unsealing() -> None:
    now = [0.0]
    shares, source = ShareCache(LIMITS, lambda: now[0]), Source()
    for now[0] in (0.0, 30.0, 59.9, 60.0):
        shares.share(key(), 1, source)
    assert [plain.closed for plain in source.given] == [True, False]
    now[0] = 120.0
    assert shares.expire() == 1
    assert source.given[1].closed


def test_without_room_nothing_is_kept_and_nothing_fails() -> None:
    for limits in (CacheLimits(60.0, 0), CacheLimits(60.0, 4, 5, 10)):
        shares, source = ShareCache(limits, lambda: 0.0), Source()
        for _ in range(2):
            assert shares.share(key(), 1, source)[0].y == VALUE
        assert len(shares) == 0
        assert [plain.closed for plain in source.given] == [True, True]


def test_where_locked_memory_is_short_the_cache_makes_room(shares: ShareCache) -> None:
    kept, source = Source(), Source()
    shares.share(key(1, key_id=b"o" * 16), 1, kept)

    def short() -> SecretBuffer:
        if not kept.given[0].closed:
            raise OSError("no locked memory")
        return source()

    assert shares.share(key(), 1, short)[0].y == VALUE
    assert shares.statistics().evictions["room"] == 1

    def none() -> SecretBuffer:
        raise OSError("no locked memory")

    shares.clear("flushed")
    with pytest.raises(OSError, match="no locked memory"):  # nothing is left to make room with
        shares.share(key(), 1, none)


# --- in the holder ---


class Held:
    """A holder with an epoch 1 and an epoch 2 of one key; unsealing is counted."""

    def __init__(self, world: Any, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world, self.lane = world, lane
        dealt = world.deal("orders")
        later = world.deal("orders", key_id=dealt.key_id, manifest={"epoch": 2, "previous": bytes(32)}, check=False)
        self.rows = [self._row(dealt), self._row(later)]
        self.dealt = dealt
        self.values = [each.offers["node1"].y for each in (dealt, later)]
        self.catalogue = Catalogue([])
        ledger: Any = SimpleNamespace(clock=TrustedClock(wall_ms=world.clock))
        self.holder = ShareHolder(
            world.cluster,
            world.keys["node1"],
            None,  # type: ignore[arg-type]
            self.catalogue,
            (),
            ledger,
            ShareCache(LIMITS, lambda: 0.0),
        )
        self.unsealed = 0

        def counted(*arguments: Any) -> SecretBuffer:
            self.unsealed += 1
            return unseal_plain(*arguments)

        monkeypatch.setattr("nodes.holder.unseal_plain", counted)

    def _row(self, dealt: Any) -> Row:
        offer, record = dealt.offers["node1"], read_key_manifest(dealt.record.raw)
        manifest = record.manifest
        context = seal_context(manifest, offer.x, "node1", record.digest)
        share = Share(offer.x, offer.y)
        return Row(
            manifest.key_id, manifest.version, manifest.epoch, 1, manifest.name, "committed", record.digest,
            record.raw, b"", b"", seal_share(self.lane, share, offer.salt, context), 1,
        )  # fmt: skip

    def put(self, number: int) -> Entry:
        return self.catalogue.put(self.rows[number])

    def value(self, entry: Entry) -> bytes:
        return self.holder.own_share(self.lane, entry)[0].y


@pytest.fixture
def held(world: Any, lane: Lane, monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    made = Held(world, lane, monkeypatch)
    yield made
    made.holder.shares.clear("flushed")


def test_releases_do_not_unseal_each_time_and_a_new_epoch_drops_the_old(held: Held) -> None:
    first = held.put(0)
    assert [held.value(first) for _ in range(3)] == [held.values[0]] * 3
    assert held.unsealed == 1
    second = held.put(1)
    assert len(held.holder.shares) == 0
    assert held.value(second) == held.values[1] != held.values[0]
    assert held.unsealed == 2
    assert held.holder.shares.statistics().evictions["changed"] == 1


def test_the_holder_keeps_shares_within_the_limits_of_the_cache_it_was_given(held: Held) -> None:
    entry = held.put(0)
    for _ in range(1 + LIMITS.max_uses):
        held.value(entry)
    assert held.unsealed == 1
    held.value(entry)
    assert held.unsealed == 2


def test_a_share_that_became_old_while_it_was_opened_does_not_stay(held: Held) -> None:
    first = held.put(0)
    held.put(1)
    assert held.value(first) == held.values[0]  # who still has the old entry is served what it asked for
    assert len(held.holder.shares) == 0


def test_a_destroyed_keys_share_does_not_stay(held: Held) -> None:
    held.value(held.put(0))
    held.catalogue.put(dataclasses.replace(held.rows[0], state="destroyed", sealed=b""))
    assert len(held.holder.shares) == 0


# --- signatures ---


@pytest.fixture
def memory() -> Iterator[SignatureCache]:
    made = SignatureCache(CacheLimits(60.0, 100), lambda: 0.0)
    remember_signatures(made)
    yield made
    remember_signatures(None)


def test_a_grant_is_verified_once_and_judged_each_time(
    world: Any, memory: SignatureCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    dealt = world.deal("orders")
    memory.clear("flushed")
    verified: list[bytes] = []
    real = signed._verify
    monkeypatch.setattr(signed, "_verify", lambda *told: verified.append(told[0]) or real(*told))
    raw = world.grant(dealt, "node1")
    memory.clear("flushed")  # the signature that this process made
    for _ in range(3):
        check_grant(raw, dealt.record, "node1", world.cluster, world.now_ms)
    assert len(verified) == 1
    with pytest.raises(Exception, match="expired"):
        check_grant(raw, dealt.record, "node1", world.cluster, world.now_ms + 60_000)
    with pytest.raises(Exception, match="is for the combiner 'node1'"):
        check_grant(raw, dealt.record, "node2", world.cluster, world.now_ms)
    assert len(verified) == 1
    assert memory.clear("flushed") == 1
    check_grant(raw, dealt.record, "node1", world.cluster, world.now_ms)
    assert len(verified) == 2


def test_a_wrong_signature_is_neither_taken_nor_remembered(world: Any, memory: SignatureCache) -> None:
    dealt = world.deal("orders")
    raw = world.grant(dealt, "node1")
    stranger = world.grant(dealt, "node1", client=world.stranger)
    check_grant(raw, dealt.record, "node1", world.cluster, world.now_ms)
    kept = memory.statistics().entries
    for place in (-1, -64):  # within the signature
        bad = bytearray(raw)
        bad[place] ^= 1
        for _ in range(2):
            with pytest.raises(Exception, match="signature of 'alice' is wrong"):
                check_grant(bytes(bad), dealt.record, "node1", world.cluster, world.now_ms)
    with pytest.raises(Exception, match="may not sign"):
        check_grant(stranger, dealt.record, "node1", world.cluster, world.now_ms)
    assert memory.statistics().entries == kept
