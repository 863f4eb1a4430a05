"""Disabled, retired and scheduled keys on the real cluster: every node refuses them, whoever was down, whoever lies."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from whole_keys import create_whole_key

import engine
from engine import Engine, KeyDisabled, LocalCluster, PolicyRule
from engine.cli import main
from engine.client.config import load_identity
from engine.client.transport import Channel, ask
from engine.errors import DeadlineExceeded, EngineError, ManifestError, NodeUnavailable, StaleKey
from engine.protocol.grant import issue_grant
from engine.protocol.manifest import read_key_manifest
from engine.protocol.requests import Describe, Operate, Settings, ShareSettings
from engine.protocol.settings import book_settings, issue_settings, read_settings

RULES = [
    PolicyRule("local", "*", ["*"]),
    PolicyRule("guard", "*", ["settings"]),
    PolicyRule("user", "*", ["encrypt", "decrypt", "destroy"]),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Five nodes, 3-of-5; each test starts again what it ended."""
    path = tmp_path_factory.mktemp("settings")
    with LocalCluster(nodes=5, threshold=3, path=path, clients=("local", "guard", "user"), rules=RULES) as running:
        yield running


@pytest.fixture(scope="module")
def kq(cluster: LocalCluster) -> Iterator[Engine]:
    with engine.connect(cluster.client_config) as connected:
        yield connected


def until(condition: Callable[[], Any], what: str, seconds: float = 30.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.1)
    return value


def channel_of(cluster: LocalCluster, kind: str, name: str) -> Channel:
    identity = load_identity(cluster.path / kind / name / "identity.toml")
    return Channel(identity.transport, {m.name: m for m in cluster.cluster.members.values() if m.endpoint})


def use_at(cluster: LocalCluster, node: str, name: str) -> str:
    """What one node says to an honest use of a key, with a fresh grant: ``ok``, or the error's code."""
    identity = load_identity(cluster.path / "clients" / "local" / "identity.toml")
    with channel_of(cluster, "clients", "local") as channel:
        try:
            record = read_key_manifest(ask(channel, node, "describe", Describe(name, 0), 10).manifest)
            now_ms = time.time_ns() // 1_000_000
            grant = issue_grant(identity.signing, record, "encrypt", node, now_ms, 10_000, os.urandom(16))
            ask(channel, node, "encrypt", Operate(name, b"", b"x", b"", b"", False, grant), 10)
        except EngineError as error:
            return error.code
    return "ok"


def settings_at(cluster: LocalCluster, node: str, name: str) -> bytes:
    with channel_of(cluster, "clients", "local") as channel:
        return bytes(ask(channel, node, "describe", Describe(name, 0), 10).settings)


def sealed(cluster: LocalCluster, name: str) -> set[str]:
    """The nodes whose store has a share of the key."""
    found = set()
    for node in cluster.nodes:
        store = sqlite3.connect(f"file:{cluster.data_folder(node) / 'shares.db'}?mode=ro", uri=True)
        try:
            if store.execute("SELECT 1 FROM keys WHERE name = ? AND length(sealed) > 0", (name,)).fetchone():
                found.add(node)
        finally:
            store.close()
    return found


def test_a_disabled_key_is_refused_on_every_node_and_comes_back(cluster: LocalCluster, kq: Engine) -> None:
    """Also by nodes that have it loaded; it is described, listed, refreshed and reshared, and nothing of it is lost."""
    create_whole_key(kq, "off/data", "aes-256-gcm", threshold=3, shares=5)
    ciphertext = kq.encrypt("off/data", b"x")
    kq.prewarm("off/data")
    told = kq.disable_key("off/data")
    assert (told.state, told.min_version, told.destroy_at) == ("disabled", 1, None)
    assert sorted(told.confirmed) == sorted(cluster.nodes)
    for call in (lambda: kq.encrypt("off/data", b"x"), lambda: kq.decrypt("off/data", ciphertext)):
        with pytest.raises(KeyDisabled, match="the key 'off/data' is disabled"):
            call()
    assert {node: use_at(cluster, node, "off/data") for node in cluster.nodes} == dict.fromkeys(
        cluster.nodes, "key-disabled"
    )
    with pytest.raises(KeyDisabled):
        kq.prewarm("off/data")
    assert kq.flush("off/data") == 0  # they dropped it when they heard of it
    assert kq.disable_key("off/data") == told
    assert kq.key_info("off/data").state == "disabled"
    assert [each.state for each in kq.list_keys("off/*")] == ["disabled"]
    assert kq.refresh_key("off/data").state == "disabled"
    assert kq.reshare_key("off/data", 2, 3).state == "disabled"
    for node in cluster.nodes:
        cluster.restart(node)
    with pytest.raises(KeyDisabled):
        kq.decrypt("off/data", ciphertext)
    assert kq.enable_key("off/data").state == "enabled"
    assert kq.decrypt("off/data", ciphertext) == b"x"
    kq.flush("off/data")
    assert kq.decrypt("off/data", ciphertext) == b"x"


def test_no_use_that_begins_after_the_order_is_served(cluster: LocalCluster, kq: Engine) -> None:
    """A client that uses the key by the shortest way, all the time, is stopped at once and goes on at once."""
    create_whole_key(kq, "off/busy", "aes-256-gcm", threshold=3, shares=5)
    served: list[float] = []
    refused: list[float] = []
    wrong: list[Exception] = []
    end = threading.Event()

    def use() -> None:
        with engine.connect(cluster.client_config) as client:
            while not end.is_set():
                begun = time.monotonic()
                try:
                    client.encrypt("off/busy", b"x")
                    served.append(begun)
                except KeyDisabled:
                    refused.append(begun)
                except Exception as error:  # told below
                    wrong.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    try:
        until(lambda: len(served) >= 200, "the key is in use")
        for _ in range(3):
            assert len(kq.disable_key("off/busy").confirmed) == 5
            off = time.monotonic()
            refusals = len(refused)
            until(lambda: len(refused) >= refusals + 5, "uses are refused")  # noqa: B023 - called at once
            on = time.monotonic()
            assert not [begun for begun in served if off < begun < on]
            kq.enable_key("off/busy")
            uses = len(served)
            until(lambda: len(served) >= uses + 50, "the key is in use again")  # noqa: B023 - called at once
    finally:
        end.set()
        thread.join()
    assert wrong == []


def test_a_node_that_was_down_at_the_order_refuses_too(cluster: LocalCluster, kq: Engine) -> None:
    """It never serves the key after it is back: until it has read the books, the others give it no shares."""
    create_whole_key(kq, "off/down", "aes-256-gcm", threshold=3, shares=5)
    cluster.kill("node4")
    told = kq.disable_key("off/down")
    assert (sorted(told.confirmed), told.pending) == (["node1", "node2", "node3", "node5"], ("node4",))
    cluster.start_node("node4")
    answers: list[str] = []

    def refused() -> bool:
        answers.append(use_at(cluster, "node4", "off/down"))
        return settings_at(cluster, "node4", "off/down") != b""

    until(refused, "node4 has learnt that the key is disabled")
    assert "ok" not in answers
    assert use_at(cluster, "node4", "off/down") == "key-disabled"
    cluster.kill("node4")
    kq.enable_key("off/down")
    cluster.start_node("node4")
    assert kq.encrypt("off/down", b"x")
    until(lambda: use_at(cluster, "node4", "off/down") == "ok", "node4 has learnt that the key is enabled")


def test_settings_wait_for_the_registry_and_are_not_half_done(cluster: LocalCluster, kq: Engine) -> None:
    create_whole_key(kq, "off/later", "aes-256-gcm", threshold=3, shares=5)
    cluster.kill_balancer()
    try:
        with pytest.raises(engine.RegistryUnavailable):
            kq.disable_key("off/later", timeout=6)
        assert kq.encrypt("off/later", b"x")
    finally:
        cluster.start_balancer()
    assert kq.disable_key("off/later").state == "disabled"


def test_a_destruction_is_taken_back(cluster: LocalCluster, kq: Engine) -> None:
    """Refused from the order on, as it was before after ``restore``: a disabled key stays so."""
    create_whole_key(kq, "end/undone", "aes-256-gcm", threshold=3, shares=5)
    ciphertext = kq.encrypt("end/undone", b"x")
    before = time.time()
    told = kq.destroy_key("end/undone", after=3600)
    assert told.state == "destroying"
    assert before + 3600 <= (told.destroy_at or 0) + 0.001 <= time.time() + 3600.001
    with pytest.raises(KeyDisabled, match="is to be destroyed, and refused until it is restored"):
        kq.decrypt("end/undone", ciphertext)
    info = kq.key_info("end/undone")
    assert (info.state, info.destroy_at) == ("destroying", told.destroy_at)
    assert kq.restore_key("end/undone").state == "enabled"
    assert kq.decrypt("end/undone", ciphertext) == b"x"
    kq.disable_key("end/undone")
    kq.destroy_key("end/undone", after=3600)
    assert kq.restore_key("end/undone").state == "disabled"
    kq.enable_key("end/undone")
    assert kq.decrypt("end/undone", ciphertext) == b"x"


def test_what_is_not_taken_back_is_erased_everywhere(cluster: LocalCluster, kq: Engine) -> None:
    """By the registry when the time comes, at all holders, also at one that comes back later; the name is free then."""
    create_whole_key(kq, "end/due", "aes-256-gcm", threshold=3, shares=5)
    cluster.kill("node2")
    kq.destroy_key("end/due", after=4)
    assert sealed(cluster, "end/due") == set(cluster.nodes)
    until(lambda: sealed(cluster, "end/due") == {"node2"}, "the others erased their share")
    with pytest.raises(engine.KeyNotFound):
        kq.restore_key("end/due", timeout=5)
    cluster.start_node("node2")
    until(lambda: sealed(cluster, "end/due") == set(), "node2 erased its share")
    assert kq.list_keys("end/due") == ()
    create_whole_key(kq, "end/due", "hmac-sha256", threshold=3, shares=5)
    assert len(kq.mac("end/due", b"x")) == 32


def test_nobody_goes_back_to_older_settings(cluster: LocalCluster, kq: Engine) -> None:
    """Not by a node that sends them again or forges some, nor by a registry that is put back; that one is told."""
    create_whole_key(kq, "back/data", "aes-256-gcm", threshold=3, shares=5)
    kq.disable_key("back/data")
    old = settings_at(cluster, "node1", "back/data")
    registry = next(cluster.path.rglob("registry.db"))
    cluster.stop_node("balancer")
    for file in registry.parent.glob("registry.db*"):
        shutil.copy(file, file.with_name(f"kept-{file.name}"))
    cluster.start_balancer()
    kq.enable_key("back/data")
    new = settings_at(cluster, "node1", "back/data")
    order = read_settings(new).order
    later = replace(order, serial=order.serial + 1, previous=order.serial, enabled=False)
    client = load_identity(cluster.path / "clients" / "local" / "identity.toml").signing
    peer = load_identity(cluster.path / "nodes" / "node5" / "identity.toml").signing
    forged = issue_settings(read_settings(old).order, peer)
    with channel_of(cluster, "nodes", "node5") as channel:
        for raw, error, match in (
            (old, StaleKey, "older than"),
            (forged, ManifestError, "'node5' may not sign"),
            (issue_settings(later, client), ManifestError, "not countersigned by the registry"),
            (book_settings(issue_settings(later, client), peer), ManifestError, "'node5' may not sign"),
        ):
            with pytest.raises(error, match=match):
                ask(channel, "node1", "share.settings", ShareSettings(raw), 10)
        assert kq.encrypt("back/data", b"x")
        cluster.stop_node("balancer")
        for file in registry.parent.glob("registry.db*"):
            file.unlink()
        for file in registry.parent.glob("kept-registry.db*"):
            file.rename(file.with_name(file.name.removeprefix("kept-")))
        cluster.start_balancer()
        balancer = cluster.cluster.of_role("balancer")[0].name

        def told() -> bool:
            with contextlib.suppress(NodeUnavailable, DeadlineExceeded):
                return bool(ask(channel, balancer, "registry.settings", Settings(old), 10).settings == new)
            return False

        until(told, "the registry has learnt what it had lost")
    for node in cluster.nodes:
        assert settings_at(cluster, node, "back/data") == new
        assert use_at(cluster, node, "back/data") == "ok"


def test_two_at_once_do_not_undo_each_other(cluster: LocalCluster, kq: Engine) -> None:
    """One disables while others order and take back its destruction: it ends disabled, whatever came first."""
    create_whole_key(kq, "back/both", "aes-256-gcm", threshold=3, shares=5)

    async def order() -> None:
        async with engine.aio.connect(cluster.client_config) as client:
            await asyncio.gather(
                client.destroy_key("back/both", after=3600, timeout=60), client.disable_key("back/both", timeout=60)
            )
            await asyncio.gather(client.restore_key("back/both", timeout=60), client.disable_key("back/both"))

    asyncio.run(order())
    info = kq.key_info("back/both")
    assert (info.state, info.destroy_at) == ("disabled", None)


def test_it_takes_the_operation_and_for_a_destruction_both(cluster: LocalCluster, kq: Engine) -> None:
    create_whole_key(kq, "rule/data", "aes-256-gcm", threshold=3, shares=5)
    with (
        engine.connect(cluster.client_config_of("guard")) as guard,
        engine.connect(cluster.client_config_of("user")) as user,
    ):
        assert guard.disable_key("rule/data").state == "disabled"
        with pytest.raises(KeyDisabled):
            user.encrypt("rule/data", b"x")
        for call in (
            lambda: user.enable_key("rule/data"),
            lambda: user.set_min_version("rule/data", 1),
            lambda: user.destroy_key("rule/data", after=3600),
            lambda: guard.destroy_key("rule/data", after=3600),
            lambda: guard.encrypt("rule/data", b"x"),
        ):
            with pytest.raises(engine.AccessDenied):
                call()
        kq.destroy_key("rule/data", after=3600)
        assert guard.restore_key("rule/data").state == "disabled"
        assert guard.enable_key("rule/data").state == "enabled"
        assert user.encrypt("rule/data", b"x")


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda kq: kq.set_min_version("bad", 0), ValueError, "version 0; it must lie in 1.."),
        (lambda kq: kq.set_min_version("bad", 2), ValueError, "the newest version of 'bad' is 1: 2 can't be the least"),
        (lambda kq: kq.set_min_version("bad", "2"), TypeError, "version must be int, not str"),
        (lambda kq: kq.destroy_key("bad", after=0), ValueError, "after 0 s; it must be above 0 and at most 31622400 s"),
        (lambda kq: kq.destroy_key("bad", after=4e7), ValueError, "at most 31622400 s"),
        (lambda kq: kq.destroy_key("bad", after="1h"), TypeError, "after must be a number of seconds, not str"),
        (lambda kq: kq.disable_key("no such", timeout=5), ValueError, "key name 'no such'"),
        (lambda kq: kq.disable_key("nosuch", timeout=5), engine.KeyNotFound, "nosuch"),
    ],
)
def test_what_can_t_be_is_told(kq: Engine, call: Any, error: type[Exception], match: str) -> None:
    if not kq.list_keys("bad"):
        kq.create_key("bad", "aes-256-gcm", threshold=3, shares=5)
    with pytest.raises(error, match=match):
        call(kq)
    assert kq.key_info("bad").state == "enabled"


def test_every_interface_sets(
    cluster: LocalCluster,
    kq: Engine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """The asynchronous client, and the command in words and as JSON."""
    create_whole_key(kq, "ways", "aes-256-gcm", threshold=3, shares=5)

    async def everything() -> list[str]:
        async with engine.aio.connect(cluster.client_config) as client:
            done = [
                await client.disable_key("ways"),
                await client.enable_key("ways"),
                await client.destroy_key("ways", after=3600.5),
                await client.restore_key("ways"),
                await client.set_min_version("ways", 1),
            ]
            return [each.state for each in done]

    assert asyncio.run(everything()) == ["disabled", "enabled", "destroying", "enabled", "enabled"]
    monkeypatch.setenv("KEYQUORUM_CONFIG", str(cluster.client_config))

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main.run(["key", *arguments])
        return code, *capsys.readouterr()

    assert run("disable", "ways")[:2] == (0, "ways is disabled\n")
    assert "state      disabled\n" in run("show", "ways")[1]
    assert " disabled" in run("list", "ways")[1]
    assert json.loads(run("enable", "ways", "-o", "json")[1])["state"] == "enabled"
    assert run("min-version", "ways", "1")[:2] == (0, "ways is enabled\n")
    code, out, _ = run("destroy", "ways", "--after", "1.5h")
    assert code == 0
    assert out.startswith("ways is refused from now on and destroyed at 20")
    assert " UTC unless it is restored" in out
    shown = json.loads(run("show", "ways", "-o", "json")[1])
    assert shown["state"] == "destroying"
    assert 5390 < shown["destroy_at"] - time.time() < 5400
    assert run("restore", "ways")[:2] == (0, "ways is enabled\n")
    for bad in ("1", "1h30m", "-1h", "soon", "1w"):
        code, _, error = run("destroy", "ways", "--after", bad)
        assert code == 1
        assert f"'{bad}' is no time such as 90s, 15m, 1h or 7d" in error
    code, _, error = run("destroy", "ways", "--after", "367d")
    assert (code, "Traceback" in error) == (1, False)
    assert "at most 31622400 s" in error
    assert run("disable", "nosuch") == (1, "", "keyquorum: no node that answers knows the key 'nosuch'\n")
    kq.disable_key("ways")
    code, _, error = run("public", "ways")  # described it is
    assert (code, error) == (1, "keyquorum: the key 'ways' is symmetric (aes-256-gcm): it has no public key\n")
    source = tmp_path / "text"
    source.write_bytes(b"x")
    code = main.run(["encrypt", "ways", str(source), "--out", str(tmp_path / "out")])
    assert (code, capsys.readouterr().err) == (1, "keyquorum: encrypt with 'ways': the key 'ways' is disabled\n")
    kq.enable_key("ways")
    assert kq.encrypt("ways", b"x")


def test_the_audit_logs_tell_who_set_what(cluster: LocalCluster, kq: Engine) -> None:
    """At the node that was asked, by the client; at each holder, by the node; durable with the acknowledgement."""
    create_whole_key(kq, "told", "aes-256-gcm", threshold=3, shares=5)
    kq.disable_key("told")
    records: list[dict[str, Any]] = []
    for node in cluster.nodes:
        for log in sorted((cluster.data_folder(node) / "audit").rglob("*.jsonl")):
            records += [
                json.loads(line) | {"at": node} for line in log.read_text(encoding="utf-8").splitlines() if line
            ]
    mine = [each for each in records if each.get("key") == "told" and each.get("outcome") == "ok"]
    ordered = [each for each in mine if each["verb"] == "settings"]
    kept = [each for each in mine if each["verb"] == "share.settings"]
    assert [each["member"] for each in ordered] == ["local"]
    assert ": disabled, versions from 1" in ordered[0]["detail"]
    assert sorted(each["at"] for each in kept) == sorted(cluster.nodes)
    assert {each["member"] for each in kept} == {ordered[0]["at"]}


def keeping(cluster: LocalCluster, name: str) -> set[str]:
    """The nodes that have settings of a key on their disk."""
    lineage = bytes.fromhex(lineage_of(cluster, name))
    found = set()
    for node in cluster.nodes:
        path = cluster.data_folder(node) / "shares.db"
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as store:
            if store.execute("SELECT 1 FROM settings WHERE lineage = ?", (lineage,)).fetchone():
                found.add(node)
    return found


def lineage_of(cluster: LocalCluster, name: str) -> str:
    with engine.connect(cluster.client_config) as connected:
        return connected.key_info(name, version=1).key_id


def test_holders_of_other_versions_alone_are_told_at_once(cluster: LocalCluster, kq: Engine) -> None:
    """No node knows all versions: the first is on two nodes, the next on the three others."""
    first, second = cluster.nodes[:2], cluster.nodes[2:]
    create_whole_key(kq, "apart", "aes-256-gcm", threshold=1, shares=2)
    kq.reshare_key("apart", 1, holders=first, timeout=30)
    before = kq.encrypt("apart", b"by the first")
    kq.rotate_key("apart", timeout=30)
    kq.reshare_key("apart", 2, holders=second, timeout=30)
    kq.disable_key("apart", timeout=30)
    assert kq.rotate_key("apart", timeout=30).state == "disabled"
    assert keeping(cluster, "apart") == set(cluster.nodes)
    with pytest.raises(KeyDisabled):
        kq.decrypt("apart", before)
    kq.enable_key("apart", timeout=30)
    assert kq.decrypt("apart", before) == b"by the first"
