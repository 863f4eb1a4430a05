"""Versions of keys on the real cluster: rotation, what older versions still do, and who wins where two rotate."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from users import users_of
from whole_keys import create_whole_key

import engine
from engine import Engine, LocalCluster, PolicyRule
from engine.sharing import check_placement


def held(cluster: LocalCluster, name: str) -> dict[tuple[str, int], str]:
    """(Node, version) -> state of every row of a key that the nodes' stores have."""
    found: dict[tuple[str, int], str] = {}
    for node in cluster.nodes:
        store = sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
        try:
            rows = store.execute("SELECT version, state FROM keys WHERE name = ?", (name,)).fetchall()
        finally:
            store.close()
        found |= {(node, version): state for version, state in rows}
    return found


def test_old_versions_decrypt_and_verify_and_the_newest_makes(cluster: LocalCluster, kq: Engine) -> None:
    """Of each kind of key: after two rotations all that was made stands, and what is made is of version 3."""
    for kind in ("aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "ed25519"):
        create_whole_key(kq, f"turn/{kind}", kind, threshold=2, shares=3)
    made: dict[int, tuple[bytes, bytes, bytes, bytes]] = {}
    with engine.connect(cluster.client_config) as other:
        for version in (1, 2, 3):
            if version > 1:
                for kind in ("aes-256-gcm", "hmac-sha256", "ecdsa-p256-sha256", "ed25519"):
                    info = kq.rotate_key(f"turn/{kind}")
                    assert (info.version, info.epoch, info.threshold, info.shares) == (version, 1, 2, 3)
            # The other client knows the version before: it goes on as if nothing had happened.
            made[version] = (
                other.encrypt("turn/aes-256-gcm", b"m", associated_data=b"a"),
                other.mac("turn/hmac-sha256", b"m"),
                other.sign("turn/ecdsa-p256-sha256", b"m"),
                other.sign("turn/ed25519", b"m"),
            )
            assert int.from_bytes(made[version][0][3:7], "big") == version
        for client in (kq, other):
            for sealed, tag, ecdsa, eddsa in made.values():
                for _ in range(3):  # cold, warm, by the shortest way
                    assert client.decrypt("turn/aes-256-gcm", sealed, associated_data=b"a") == b"m"
                    client.verify_mac("turn/hmac-sha256", b"m", tag)
                    client.verify("turn/ecdsa-p256-sha256", b"m", ecdsa)
                    client.verify("turn/ed25519", b"m", eddsa)
            with pytest.raises(engine.InvalidTag):
                client.decrypt("turn/aes-256-gcm", made[1][0][:-1] + bytes([made[1][0][-1] ^ 1]), associated_data=b"a")
            with pytest.raises(engine.InvalidSignature):
                client.verify_mac("turn/hmac-sha256", b"other", made[1][1])
            with pytest.raises(engine.InvalidSignature):
                client.verify("turn/ed25519", b"other", made[3][3])
            client.verify("turn/ed25519", b"m", made[1][3], version=1)
            with pytest.raises(engine.InvalidSignature):
                client.verify("turn/ed25519", b"m", made[1][3], version=2)
            assert (
                client.decrypt_many("turn/aes-256-gcm", [each[0] for each in made.values()], associated_data=b"a")
                == [b"m"] * 3
            )
    pems = {info.version: info.public_key for info in kq.key_versions("turn/ed25519")}
    assert list(pems) == [3, 2, 1]
    assert len(set(pems.values())) == 3
    assert kq.public_key("turn/ed25519", version=1) == pems[1]
    assert kq.public_key("turn/ed25519") == pems[3]
    assert [each.version for each in kq.list_keys("turn/ed25519")] == [3]
    with pytest.raises(ValueError, match=r"version 0; it must lie in 1\.\."):
        kq.key_info("turn/ed25519", version=0)
    with pytest.raises(engine.KeyNotFound, match="version 9"):
        kq.key_info("turn/ed25519", version=9)


def test_a_client_that_is_behind_verifies_what_a_newer_version_made(cluster: LocalCluster, kq: Engine) -> None:
    """It learns that there is one by what does not fit; and so for what fits to none."""
    create_whole_key(kq, "turn/behind", "ed25519", threshold=2, shares=3)
    with engine.connect(cluster.client_config) as behind:
        for _ in range(3):
            behind.verify("turn/behind", b"m", kq.sign("turn/behind", b"m"))
        kq.rotate_key("turn/behind")
        new = kq.sign("turn/behind", b"m")
        with pytest.raises(engine.InvalidSignature):
            behind.verify("turn/behind", b"other", new)
        behind.verify("turn/behind", b"m", new)


def test_rotations_at_once_make_one_version_each(cluster: LocalCluster, kq: Engine) -> None:
    """Each client gets a version that is newer than the one it knew; no version is made twice, none is left out."""
    create_whole_key(kq, "turn/race", "aes-256-gcm", threshold=2, shares=3)
    clients = [engine.connect(cluster.client_config) for _ in range(4)]
    try:
        with ThreadPoolExecutor(4) as pool:
            infos = list(pool.map(lambda client: client.rotate_key("turn/race", timeout=30.0), clients))
        last = kq.key_info("turn/race").version
        assert 2 <= min(info.version for info in infos) <= max(info.version for info in infos) == last <= 5
        ids = {(info.version, info.key_id) for info in kq.key_versions("turn/race")}
        assert sorted(version for version, _ in ids) == list(range(1, last + 1))
        assert {(info.version, info.key_id) for info in infos} <= ids
        for client in clients:
            assert client.decrypt("turn/race", clients[0].encrypt("turn/race", b"m")) == b"m"
    finally:
        for client in clients:
            client.close()


def test_users_notice_nothing_of_rotations(cluster: LocalCluster, kq: Engine) -> None:
    """Warm and cold uses go on beside several rotations, a refresh of an old version's shares and a reshare."""
    create_whole_key(kq, "turn/used", "aes-256-gcm", threshold=2, shares=3)
    with users_of(cluster, kq, "turn/used", 30.0), engine.connect(cluster.client_config) as admin:
        for _ in range(4):
            admin.rotate_key("turn/used", timeout=30.0)
            time.sleep(0.2)
        nodes = list(admin.key_info("turn/used").holders)
        others = [node for node in cluster.nodes if node not in nodes]
        admin.reshare_key("turn/used", holders=[*others[:1], *nodes[1:]], timeout=30.0)
        assert admin.rotate_key("turn/used", timeout=30.0).version == 6


def test_a_version_that_moved_away_is_found(cluster: LocalCluster, kq: Engine) -> None:
    """The newest version is on other nodes than the one before: its holders know, and name those that have it."""
    create_whole_key(kq, "turn/away", "aes-256-gcm", threshold=2, shares=3)
    old = kq.encrypt("turn/away", b"old")
    first = list(kq.key_info("turn/away").holders)
    kq.rotate_key("turn/away")
    places, level = kq.cluster.locations, kq.cluster.domain_level
    others = next(  # where they are as safe as on the first ones: else the next version would go back there
        nodes
        for nodes in itertools.permutations(cluster.nodes, 3)
        if set(nodes) != set(first) and not check_placement(places, nodes, 2, domain_level=level)
    )
    left = set(first) - set(others)
    kq.reshare_key("turn/away", holders=others)
    with engine.connect(cluster.client_config) as client:
        for _ in range(3):
            assert client.decrypt("turn/away", old) == b"old"
            assert client.decrypt("turn/away", client.encrypt("turn/away", b"new")) == b"new"
    info = kq.rotate_key("turn/away")  # dealt by those that have version 2, and held by them
    assert set(info.holders) == set(others)
    until = time.monotonic() + 20
    while any(held(cluster, "turn/away").get((node, 3)) != "moved" for node in left):
        assert time.monotonic() < until, held(cluster, "turn/away")
        time.sleep(0.1)
    assert kq.decrypt("turn/away", old) == b"old"
    with engine.connect(cluster.client_config) as client:
        assert client.key_info("turn/away").version == 3


def test_destruction_is_of_all_versions(cluster: LocalCluster, kq: Engine) -> None:
    """No node keeps a share of any version, and the name is free for another key, which begins at version 1."""
    create_whole_key(kq, "turn/gone", "aes-256-gcm", threshold=2, shares=3)
    old = kq.encrypt("turn/gone", b"m")
    kq.rotate_key("turn/gone")
    kq.rotate_key("turn/gone")
    done = kq.destroy_key("turn/gone")
    assert set(held(cluster, "turn/gone").values()) == {"destroyed"}
    assert len(done.confirmed) >= 3
    with pytest.raises(engine.KeyNotFound):
        kq.rotate_key("turn/gone")
    with pytest.raises(engine.KeyNotFound):
        kq.decrypt("turn/gone", old)
    assert create_whole_key(kq, "turn/gone", "aes-256-gcm", threshold=2, shares=3).version == 1
    with pytest.raises(engine.InvalidTag):
        kq.decrypt("turn/gone", old)


def test_the_asynchronous_client_rotates_too(cluster: LocalCluster, kq: Engine) -> None:
    """The same verbs with the same results."""
    create_whole_key(kq, "turn/async", "ed25519", threshold=2, shares=3)
    signature = kq.sign("turn/async", b"m")

    async def use() -> None:
        async with engine.aio.connect(cluster.client_config) as client:
            assert (await client.rotate_key("turn/async")).version == 2
            await client.verify("turn/async", b"m", signature)
            await client.verify("turn/async", b"m", await client.sign("turn/async", b"m"), version=2)
            assert [info.version for info in await client.key_versions("turn/async")] == [2, 1]

    asyncio.run(use())


def test_old_ciphertexts_are_rewrapped_inside_the_nodes(cluster: LocalCluster, kq: Engine) -> None:
    """Of all versions at once and in batches; what is bad is told in its place, and what is new stays as it is."""
    create_whole_key(kq, "turn/wrap", "aes-256-gcm", threshold=2, shares=3)
    plain = [bytes([number]) * (number * 700) for number in range(70)]
    sealed = kq.encrypt_many("turn/wrap", plain[:40], associated_data=b"a")
    kq.rotate_key("turn/wrap")
    sealed += kq.encrypt_many("turn/wrap", plain[40:], associated_data=b"a")
    kq.rotate_key("turn/wrap")
    newest = kq.encrypt("turn/wrap", b"new", associated_data=b"a")
    kq.flush("turn/wrap")
    with engine.connect(cluster.client_config) as behind:
        behind.encrypt("turn/wrap", b"m")
        version = kq.rotate_key("turn/wrap").version
        made = behind.rewrap_many("turn/wrap", [*sealed, newest], associated_data=b"a")
    assert {int.from_bytes(each[3:7], "big") for each in made} == {version}
    assert not set(made) & {*sealed, newest}
    assert kq.decrypt_many("turn/wrap", made, associated_data=b"a") == [*plain, b"new"]
    assert kq.rewrap("turn/wrap", made[0], associated_data=b"a") == made[0]
    bad = made[1][:-1] + bytes([made[1][-1] ^ 1])
    told = kq.rewrap_many("turn/wrap", [sealed[1], bad, sealed[2]], associated_data=b"a", return_exceptions=True)
    assert [type(each) for each in told] == [bytes, engine.InvalidTag, bytes]
    with pytest.raises(engine.InvalidTag):
        kq.rewrap("turn/wrap", sealed[3], associated_data=b"other")
    big = kq.encrypt("turn/wrap", bytes(48 * 1024), associated_data=bytes(4096))
    kq.rotate_key("turn/wrap")
    assert kq.decrypt(
        "turn/wrap", kq.rewrap("turn/wrap", big, associated_data=bytes(4096)), associated_data=bytes(4096)
    ) == bytes(48 * 1024)
    create_whole_key(kq, "turn/sign", "ed25519", threshold=2, shares=3)
    with pytest.raises(ValueError, match="rewrapping is for AES-GCM alone"):
        kq.rewrap("turn/sign", b"KQ\1\0\0\0\1")


def test_who_may_rewrap_sees_no_plaintext(cluster: LocalCluster, kq: Engine) -> None:
    """The operation is enough, and gives no other; without it, decrypt and encrypt are."""
    create_whole_key(kq, "turn/blind", "aes-256-gcm", threshold=2, shares=3)
    sealed = kq.encrypt("turn/blind", b"secret")
    kq.rotate_key("turn/blind")
    settings = cluster.add_client("blind", [PolicyRule("blind", "turn/*", ["rewrap"])])
    with engine.connect(settings) as blind:
        made = blind.rewrap("turn/blind", sealed)
        for refused in (
            lambda: blind.decrypt("turn/blind", sealed),
            lambda: blind.encrypt("turn/blind", b"m"),
            lambda: blind.rotate_key("turn/blind"),
        ):
            with pytest.raises(engine.AccessDenied):
                refused()
    assert kq.decrypt("turn/blind", made) == b"secret"
    with engine.connect(cluster.client_config_of("limited")) as limited, pytest.raises(engine.AccessDenied):
        limited.rewrap("turn/blind", sealed)


def test_the_commands(cluster: LocalCluster, kq: Engine, tmp_path: Path) -> None:
    """Rotate, show, and rewrap a file in its place."""
    create_whole_key(kq, "turn/command", "aes-256-gcm", threshold=2, shares=3)
    data = tmp_path / "data"
    data.write_bytes(os.urandom(200_000))

    def run(*command: str) -> str:
        program = Path(sys.executable).with_name("keyquorum")
        environment = {**os.environ, "KEYQUORUM_CONFIG": str(cluster.client_config)}
        done = subprocess.run([program, *command], env=environment, capture_output=True, timeout=120, check=True)
        return done.stdout.decode()

    sealed, back = str(tmp_path / "sealed"), tmp_path / "back"
    run("encrypt", "turn/command", str(data), "--out", sealed)
    assert json.loads(run("key", "rotate", "turn/command", "-o", "json"))["version"] == 2
    assert [each["version"] for each in json.loads(run("key", "show", "turn/command", "--versions", "-o", "json"))] == [
        2,
        1,
    ]
    assert json.loads(run("key", "show", "turn/command", "--version", "1", "-o", "json"))["version"] == 1
    old = Path(sealed).read_bytes()
    run("rewrap", "turn/command", sealed, "--out", sealed)
    assert Path(sealed).read_bytes()[:25] == old[:25]
    assert Path(sealed).read_bytes().count(b"KQ\1\0\0\0\2") >= 5
    run("decrypt", "turn/command", sealed, "--out", str(back))
    assert back.read_bytes() == data.read_bytes()
