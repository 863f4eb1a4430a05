"""What the registry grants of a key's uses: never more than the limit, whoever asks, whenever it dies."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec import structs
from registry_places import Place

from balancer.registry import SqlRegistry
from engine import failpoints
from engine.errors import AccessDenied, KeyNotFound, RegistryUnavailable
from engine.protocol.manifest import create_orders, first_quota, read_key_manifest
from engine.protocol.signed import read_unverified, sign_envelope

LIMIT = 1_000


class Key:
    """A committed key of three holders, whose uses are limited, in a registry on disk."""

    def __init__(self, world: Any, place: Place, uses_max: int) -> None:
        self.world, self.place = world, place
        self.registry: SqlRegistry = world.open(place)
        order = create_orders.decode(read_unverified(world.order("few")).payload)
        raw = create_orders.encode(structs.replace(order, uses_max=uses_max))
        self.order = sign_envelope("order.create", 1, raw, world.keys["alice"])
        manifest = read_key_manifest(world.commit(self.registry, self.order)).manifest
        self.key_id = manifest.key_id
        self.holders = [each.node for each in manifest.holders]
        self.stranger = next(each for each in world.nodes if each not in self.holders)
        self.first = len(self.holders) * first_quota(manifest)
        self._nonces = 0

    def ask(self, node: str, nonce: bytes = b"") -> int:
        return self.registry.quota(self.key_id, nonce or self.nonce(), node)

    def nonce(self) -> bytes:
        self._nonces += 1
        return self._nonces.to_bytes(16, "big")

    def reopen(self) -> None:
        self.registry.close()
        self.registry = self.world.open(self.place)

    def all_of_it(self, rng: random.Random) -> int:
        """What is granted until there is no more."""
        granted = 0
        while uses := self.ask(rng.choice(self.holders)):
            granted += uses
            assert self.first + granted <= LIMIT
        return granted


@pytest.fixture
def key(world: Any, place: Place) -> Iterator[Key]:
    made = Key(world, place, LIMIT)
    yield made
    failpoints.arm({})
    made.registry.close()


@pytest.mark.parametrize("seed", range(5))
def test_all_is_granted_and_no_more(key: Key, seed: int) -> None:
    """The first quotas and what is granted are the limit together; then nobody gets any, also after reopening."""
    rng = random.Random(seed)
    assert 0 < key.first <= LIMIT // 2
    assert key.first + key.all_of_it(rng) == LIMIT
    for _ in range(2):
        assert [key.ask(node) for node in key.holders] == [0, 0, 0]
        key.reopen()


def test_one_holder_does_not_take_it_all(key: Key) -> None:
    """What it gets is a part of what is left."""
    left = LIMIT - key.first
    for _ in range(4):
        uses = key.ask(key.holders[0])
        assert 1 <= uses <= left // 6
        left -= uses


def test_the_same_question_again_gets_the_same(key: Key) -> None:
    """Also after reopening, and it is counted once; another one gets more, and each node asks for itself."""
    nonce, (one, other, _) = key.nonce(), key.holders
    uses = key.ask(one, nonce)
    assert key.ask(one, nonce) == uses
    key.reopen()
    assert key.ask(one, nonce) == uses
    assert key.first + uses + key.ask(other, nonce) + key.all_of_it(random.Random(1)) == LIMIT


@pytest.mark.parametrize("point", ["before", "changed", "durable"])
def test_whenever_it_dies_nothing_is_granted_twice(key: Key, point: str) -> None:
    """The holder's question is lost, and it asks anew, as one that died too: less is had than the limit, never more."""

    def die() -> None:
        raise ConnectionAbortedError

    had, rng = key.first, random.Random(2)
    for _ in range(6):
        failpoints.arm({f"registry.quota.{point}": die})
        with pytest.raises(ConnectionAbortedError):
            key.ask(rng.choice(key.holders))
        failpoints.arm({})
        key.reopen()
        had += key.ask(rng.choice(key.holders))
    had += key.all_of_it(rng)
    assert had < LIMIT if point == "durable" else had == LIMIT


def test_only_holders_of_a_limited_key_are_granted_uses(key: Key, place: Place) -> None:
    """And of one that is there. Who is refused takes nothing away."""
    with pytest.raises(AccessDenied, match=f"'{key.stranger}' is no holder of 'few'"):
        key.ask(key.stranger)
    with pytest.raises(KeyNotFound, match="no key with id 6b6b"):
        key.registry.quota(b"k" * 16, key.nonce(), key.holders[0])
    assert key.first + key.all_of_it(random.Random(3)) == LIMIT
    key.registry.destroy(key.world.destroy_order(key.order), key.world.now_ms)
    with pytest.raises(KeyNotFound):
        key.ask(key.holders[0])


def test_a_count_that_was_changed_is_refused(key: Key) -> None:
    """As a damaged file would have it."""
    key.ask(key.holders[0])
    key.registry.close()
    key.place.execute("UPDATE quotas SET given = 0")
    key.registry = key.world.open(key.place)
    with pytest.raises(RegistryUnavailable, match=r"count of the uses of the key .* is damaged"):
        key.ask(key.holders[0])
