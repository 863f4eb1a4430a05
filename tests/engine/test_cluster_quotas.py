"""Limits on how often a key is used, on the real cluster: they hold for all nodes together, whoever is killed."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from whole_keys import create_whole_key

import engine
from engine import ClientSettings, Engine, LocalCluster


def patient(cluster: LocalCluster) -> Engine:
    """A client that does not rotate by itself."""
    settings = engine.load_settings(cluster.client_config)
    return engine.connect(ClientSettings(settings.identity, settings.source, 10.0, settings.file, rotate=False))


def used_up(client: Engine, name: str, most: int, older: bytes = b"") -> list[bytes]:
    """Ciphertexts made until the key is exhausted, by rewrapping an older one where it is given."""
    made: list[bytes] = []
    while len(made) <= most:
        try:
            made.append(client.rewrap(name, older, timeout=30.0) if older else client.encrypt(name, b"m", timeout=30.0))
        except engine.KeyExhausted:
            return made
    return made


def signed(client: Engine, name: str, most: int) -> list[bytes]:
    """Signatures made until the key is exhausted, each checked several times."""
    made: list[bytes] = []
    while len(made) <= most:
        try:
            made.append(client.sign(name, b"m", timeout=30.0))
        except engine.KeyExhausted:
            return made
        for _ in range(3):
            client.verify(name, b"m", made[-1])
    return made


def test_a_limit_holds_for_all_nodes_together(cluster: LocalCluster, kq: Engine) -> None:
    """Of several clients at once, by whichever node; then the error names the limit, and decrypting goes on."""
    create_whole_key(kq, "limit/warm", "aes-256-gcm", threshold=2, shares=3)
    kq.destroy_key("limit/warm")
    kq.create_key("limit/few", "aes-256-gcm", threshold=2, shares=3, uses_max=300)
    clients = [patient(cluster) for _ in range(3)]
    try:
        with ThreadPoolExecutor(6) as pool:
            made = [
                each
                for some in pool.map(lambda at: used_up(clients[at % 3], "limit/few", 300), range(6))
                for each in some
            ]
        assert 200 <= len(made) <= 300
        with pytest.raises(engine.KeyExhausted, match="version 1 of 'limit/few' may be used 300 times"):
            clients[0].encrypt("limit/few", b"m")
        assert clients[0].decrypt_many("limit/few", made) == [b"m"] * len(made)
        # Rewrapping to a version takes its uses, too; and a rotation makes new ones. The uses that are left lie with
        # several nodes, so that not all can be taken by whole batches.
        kq.rotate_key("limit/few")
        again = clients[0].rewrap_many("limit/few", made[:100])
        again += used_up(clients[0], "limit/few", 200)
        again += used_up(clients[0], "limit/few", 200, made[100])
        assert 200 <= len(again) <= 300
        assert kq.decrypt_many("limit/few", again) == [b"m"] * len(again)
    finally:
        for client in clients:
            client.close()


def test_other_kinds_of_keys_have_a_limit_where_one_is_set(cluster: LocalCluster, kq: Engine) -> None:
    """Of signatures and MACs made, and none of those checked."""
    with patient(cluster) as client:
        for name, kind in (("limit/sign", "ed25519"), ("limit/rsa", "rsa-2048-pss-sha256")):
            kq.create_key(name, kind, threshold=2, shares=3, uses_max=20)
            made = signed(client, name, 20)
            assert 10 <= len(made) <= 20
    for uses, match in (
        (0, "uses_max 0; for aes-256-gcm it must lie in 1..2147483648"),
        (2**31 + 1, "must lie in 1.."),
    ):
        with pytest.raises(ValueError, match=match):
            kq.create_key("limit/bad", "aes-256-gcm", uses_max=uses)


def test_a_client_that_may_rotates_by_itself(cluster: LocalCluster, kq: Engine) -> None:
    """It and others go on without an error; no version is used more often than it may be."""
    kq.create_key("limit/turns", "aes-256-gcm", threshold=2, shares=3, uses_max=60)
    with engine.connect(cluster.client_config) as other, ThreadPoolExecutor(2) as pool:
        made = [
            each
            for some in pool.map(
                lambda client: [client.encrypt("limit/turns", b"m", timeout=60.0) for _ in range(100)], (kq, other)
            )
            for each in some
        ]
    versions = [int.from_bytes(each[3:7], "big") for each in made]
    assert all(versions.count(version) <= 60 for version in set(versions))
    assert 4 <= kq.key_info("limit/turns").version <= 12
    assert kq.decrypt_many("limit/turns", made) == [b"m"] * 200


def test_no_kill_makes_a_use_uncounted(own_cluster: LocalCluster) -> None:
    """Combiners and the registry are killed while a key is used up: never more uses are made than it may have."""
    rng = random.Random(9)
    with engine.connect(own_cluster.client_config) as admin:
        admin.create_key("limit/killed", "aes-256-gcm", threshold=2, shares=3, uses_max=400)
        holders = list(admin.key_info("limit/killed").holders)
    over = time.monotonic() + 240

    def use() -> int:
        made = 0
        with patient(own_cluster) as client:
            while time.monotonic() < over:
                try:
                    client.encrypt("limit/killed", b"m", timeout=5.0)
                    made += 1
                except engine.KeyExhausted:
                    return made
                except engine.EngineError:
                    continue
        raise AssertionError(f"not exhausted after {made} uses")

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(3)]
        for _ in range(6):
            time.sleep(0.3 + rng.random())
            victim = rng.choice(holders)
            own_cluster.kill(victim)
            if rng.random() < 0.5:
                own_cluster.kill_balancer()
                own_cluster.start_balancer()
            own_cluster.start_node(victim)
        made = sum(user.result() for user in users)
    assert 1 <= made <= 400


def test_uses_lost_on_the_way_count_as_made(own_cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder is killed before it asks the registry for more uses, and before it has noted what it was granted."""
    made = 0
    with patient(own_cluster) as client:
        client.create_key("limit/lost", "aes-256-gcm", threshold=2, shares=3, uses_max=120)
        holders = list(client.key_info("limit/lost").holders)
        for victim, point in zip(holders, ("combiner.quota.before", "combiner.quota.granted"), strict=False):
            own_cluster.kill(victim)
            with monkeypatch.context() as patch:
                patch.setenv("KEYQUORUM_FAILPOINTS", f"{point}=kill")
                own_cluster.start_node(victim)
            for each in set(holders) - {victim}:
                own_cluster.kill(each)
                own_cluster.start_node(each)
            until_s = time.monotonic() + 60
            while own_cluster.running()[victim] is not None:
                assert time.monotonic() < until_s, f"{point} was never passed"
                try:
                    client.encrypt("limit/lost", b"m", timeout=10.0)
                    made += 1
                except engine.EngineError:
                    continue
            own_cluster.start_node(victim)
        made += len(used_up(client, "limit/lost", 120))
    assert 1 <= made <= 120
